"""The image and the compose file, as far as they can be checked where no container runs."""

import json
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.test_dashboards import NAMES, committed
from tests.server.conftest import Program

DATA = "/var/lib/lrpilot"


def tool(name: str) -> str:
    """Return a program that a package of ours brings."""
    return str(Path(sys.executable).parent / name)


@pytest.fixture(scope="module")
def dockerfile(root: Path) -> str:
    """The Dockerfile, with its lines joined."""
    return (root / "deploy/docker/Dockerfile").read_text().replace("\\\n", "")


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    """The compose file as docker-compose resolves it."""
    done = subprocess.run(
        [tool("docker-compose"), "-f", "deploy/compose.yml", "config", "--format", "json"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


def instruction(dockerfile: str, name: str) -> str:
    """Return the last instruction of that name."""
    found: list[str] = re.findall(rf"^{name} (.+)$", dockerfile, re.MULTILINE)
    return found[-1]


def test_hadolint_finds_nothing(root: Path) -> None:
    done = subprocess.run(
        [tool("hadolint"), "deploy/docker/Dockerfile"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_every_image_is_pinned(dockerfile: str, compose: dict[str, Any]) -> None:
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    foreign = [item["image"] for item in compose["services"].values() if "build" not in item]
    assert len(foreign) == 2
    for image in (*bases, *foreign):
        assert re.search(r":v?\d+\.\d+\.\d+(-|$)", image), image


def test_it_does_not_run_as_root(dockerfile: str) -> None:
    user = instruction(dockerfile, "USER")
    assert int(user) > 0
    assert f"-o {user} -g {user} {DATA}" in dockerfile
    assert instruction(dockerfile, "VOLUME") == DATA


def test_every_dependency_is_pinned(root: Path) -> None:
    lines = (root / "deploy/docker/requirements.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            requirement = Requirement(line)
            [specifier] = requirement.specifier
            assert specifier.operator == "==", line
            pinned[canonicalize_name(requirement.name)] = specifier.version
    wanted = [Requirement("lrpilot[server,postgres]")]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        for item in metadata.requires(requirement.name) or ():
            needed = Requirement(item)
            extras = requirement.extras or {""}
            environments = [{"extra": extra, "python_version": "3.12"} for extra in extras]
            if needed.marker and not any(map(needed.marker.evaluate, environments)):
                continue
            version = pinned.get(canonicalize_name(needed.name))
            assert version, f"{name} needs {needed}"
            assert needed.specifier.contains(version), f"{name} needs {needed}, pinned: {version}"
            if (key := (needed.name, tuple(sorted(needed.extras)))) not in seen:
                seen.add(key)
                wanted.append(needed)
    assert {canonicalize_name(name) for name, _ in seen} == set(pinned)


def test_the_image_has_what_the_wheel_is_made_of(root: Path, dockerfile: str) -> None:
    copied = re.findall(r"^COPY ((?!--from)[^\n]+) \S+$", dockerfile, re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert all((root / name).exists() for name in names)
    project = (root / "pyproject.toml").read_text()
    packages = re.search(r"\[tool.hatch.build.targets.wheel\]\npackages = \[(.+)\]", project)
    assert packages is not None
    rooms = {Path(item).parts[0] for item in re.findall(r'"([^"]+)"', packages.group(1))}
    assert names == rooms | {
        "deploy/docker/requirements.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }
    ignored = (root / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == names


def test_its_command_serves_and_its_health_check_finds_it(tmp_path: Path, dockerfile: str) -> None:
    assert json.loads(instruction(dockerfile, "ENTRYPOINT")) == ["lrpilot"]
    command = json.loads(instruction(dockerfile, "CMD"))
    assert command[:3] == ["serve", "--data", DATA]
    options = [word.replace("0.0.0.0:50051", "127.0.0.1:0") for word in command[3:]]
    options = [word.replace("0.0.0.0:50052", "127.0.0.1:0") for word in options]
    program = Program(tmp_path / "data", *options).wait_ready()
    _, _, check = instruction(dockerfile, "HEALTHCHECK").partition("CMD ")
    python, *arguments = json.loads(check)
    assert python == "python"
    words = [word.replace("127.0.0.1:50052", program.http) for word in arguments]
    assert words != arguments
    try:
        assert subprocess.run([sys.executable, *words], check=False).returncode == 0
    finally:
        program.dispose()
    dead = subprocess.run([sys.executable, *words], check=False, stderr=subprocess.DEVNULL)
    assert dead.returncode != 0


def test_compose_publishes_on_loopback_unless_told_otherwise(compose: dict[str, Any]) -> None:
    ports = [port for item in compose["services"].values() for port in item["ports"]]
    assert {port["published"] for port in ports} == {"50051", "50052", "9090", "3000"}
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


def test_what_compose_mounts_is_there_and_lets_nobody_write(
    root: Path, compose: dict[str, Any]
) -> None:
    mounts = [item for service in compose["services"].values() for item in service["volumes"]]
    bound = [item for item in mounts if item["type"] == "bind"]
    assert len(bound) == 3
    for item in bound:
        assert Path(item["source"]).is_dir()
        assert item["read_only"]
    named = {item["source"] for item in mounts if item["type"] == "volume"}
    assert named == set(compose["volumes"])
    build = compose["services"]["lrpilot"]["build"]
    assert Path(build["context"]) == root
    assert (root / build["dockerfile"]).is_file()


def test_the_parts_find_each_other(root: Path, compose: dict[str, Any]) -> None:
    services = compose["services"]
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    assert job["job_name"] == "lrpilot"
    [target] = job["static_configs"][0]["targets"]
    host, _, port = target.partition(":")
    assert int(port) in {item["target"] for item in services[host]["ports"]}
    provisioning = root / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    for name in NAMES:
        [variable] = [
            item
            for item in committed(root, name)["templating"]["list"]
            if item["type"] == "datasource"
        ]
        assert variable["current"]["value"] == source["uid"]
    [provider] = yaml.safe_load((provisioning / "dashboards/lrpilot.yml").read_text())["providers"]
    mounted = {item["target"]: item["source"] for item in services["grafana"]["volumes"]}
    assert mounted[provider["options"]["path"]] == str(root / "deploy/grafana/dashboards")
    home = Path(services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (root / "deploy/grafana/dashboards" / home.name).is_file()


def test_who_tells_that_the_server_is_away_does_not_wait_for_it(compose: dict[str, Any]) -> None:
    assert "depends_on" not in compose["services"]["prometheus"]
    assert set(compose["services"]["grafana"]["depends_on"]) == {"prometheus"}
    assert {item["restart"] for item in compose["services"].values()} == {"unless-stopped"}


def test_the_first_line_of_the_compose_file_is_how_it_is_started(root: Path) -> None:
    first = (root / "deploy/compose.yml").read_text().splitlines()[0]
    words = shlex.split(first.partition(": ")[2])
    assert words == ["docker", "compose", "-f", "deploy/compose.yml", "up", "-d"]

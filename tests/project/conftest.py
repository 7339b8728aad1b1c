"""Helpers for the tests of the project as a package: its root, and clean environments."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Environment:
    """A virtual environment of its own, without anything of the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, "-m", "venv", "--without-pip", os.fspath(folder)]
        subprocess.run(command, check=True)

    @property
    def bin(self) -> Path:
        return self.folder / "bin"

    def install(self, *requirements: str) -> None:
        """Install with the pip of the environment that runs the tests, into this one."""
        pip = [sys.executable, "-m", "pip", "--python", os.fspath(self.bin / "python")]
        self._check([*pip, "install", "--quiet", "--only-binary", ":all:", *requirements])

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a program of this environment, away from the source tree."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        return subprocess.run(
            [os.fspath(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=kept,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def python(self, code: str) -> subprocess.CompletedProcess[str]:
        """Run a few lines of Python with warnings as errors."""
        return self.run("python", "-W", "error", "-c", code)

    @staticmethod
    def _check(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@functools.cache
def _tracked_files() -> tuple[str, ...]:
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return tuple(name for name in listing.split("\0") if name and (ROOT / name).is_file())


@pytest.fixture(scope="session")
def tracked_files() -> tuple[str, ...]:
    """Every file of the project as git sees it, relative to the root."""
    return _tracked_files()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as a release is built: through the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", os.fspath(out), os.fspath(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture
def new_environment(tmp_path: Path) -> Callable[[str], Environment]:
    """Make a clean environment of the name given."""
    return lambda name: Environment(tmp_path / name)


@pytest.fixture
def serving(tmp_path: Path) -> Callable[[list[str]], AbstractContextManager[tuple[str, str]]]:
    """Run `<program> serve` and give its gRPC and its HTTP address."""

    @contextmanager
    def serve(program: list[str]) -> Iterator[tuple[str, str]]:
        listen = ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        log = tmp_path / "serve.log"
        with log.open("w") as errors:
            server = subprocess.Popen(
                [*program, "serve", "--data", os.fspath(tmp_path / "data"), *listen],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("lrpilot ready "), line + log.read_text()
            named = dict(word.split("=", 1) for word in line.split()[2:])
            yield named["grpc"], named["http"]
            server.terminate()
            assert server.wait(timeout=60) == 0, log.read_text()
        finally:
            if server.poll() is None:
                server.kill()
                server.wait()
            if server.stdout is not None:
                server.stdout.close()

    return serve

"""A real Prometheus for tests."""

import asyncio
import json
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


class Prometheus:
    """A Prometheus that scrapes one target every second, and keeps what it finds in a folder.

    It scrapes itself too, as most do.
    """

    def __init__(self, folder: Path, target: str, rules: Sequence[Path] = ()) -> None:
        folder.mkdir()
        # It cannot be told to let the kernel pick, nor say which port it got.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        config = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {"job_name": "lrpilot", "static_configs": [{"targets": [target]}]},
                {"job_name": "prometheus", "static_configs": [{"targets": [self.address]}]},
            ],
        }
        path = folder / "prometheus.yml"
        path.write_text(yaml.safe_dump(config))
        self._log = folder / "log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={path}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer; None while it does not answer."""
        assert self.process.poll() is None, self._log.read_text()
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except (urllib.error.HTTPError, urllib.error.URLError, ConnectionError):
            return None

    async def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Return what an instant query finds, by its labels besides name, job and instance."""
        data = await asyncio.to_thread(self.get, "query", query=expression)
        return {
            tuple(
                sorted(
                    (name, value)
                    for name, value in item["metric"].items()
                    if name not in {"__name__", "job", "instance"}
                )
            ): float(item["value"][1])
            for item in (data or {"result": []})["result"]
        }

    def end(self) -> None:
        """Kill it: what it stored is not needed any more."""
        self.process.kill()
        self.process.wait(60)

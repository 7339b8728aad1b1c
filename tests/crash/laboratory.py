"""Starts laboratories, each a process of its own, and hands them rounds to play."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.crash.cluster import StoreKind
from tests.crash.rounds import RoundResult

ROOT = Path(__file__).resolve().parents[2]

KEPT = ROOT / ".cache" / "crash"
"""Where the evidence of rounds that failed is kept."""

CLOSE_S = 30.0

_UNSHARE = (
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("--propagation", "private"),
)


def has_namespaces() -> bool:
    """Return whether laboratories can have namespaces of their own."""
    if os.geteuid() != 0 or any(shutil.which(name) is None for name in ("unshare", "ip")):
        return False
    tried = subprocess.run([*_UNSHARE, "true"], check=False, capture_output=True)
    return tried.returncode == 0


class Laboratory:
    """One laboratory, on one store; `bug` is one of `server_program`, or empty."""

    def __init__(
        self, store: StoreKind, *, namespaces: bool, bug: str = "", kept: Path = KEPT
    ) -> None:
        self.store = store
        self._kept = kept
        self._folder = Path(tempfile.mkdtemp(prefix="lrpilot-crash-"))
        # PostgreSQL runs as another user.
        self._folder.chmod(0o755)
        self._log = self._folder / "laboratory.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(_UNSHARE if namespaces else ()),
                    *(sys.executable, "-m", "tests.crash.laboratory_program"),
                    *("--store", store, "--folder", str(self._folder), "--bug", bug),
                    *(("--namespaces",) if namespaces else ()),
                ],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # An interrupt from the keyboard is for whoever hands out the rounds.
                start_new_session=True,
            )

    def __enter__(self) -> "Laboratory":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def play(self, seed: int, fault: str) -> RoundResult:
        """Play a round; what it left is kept where it found a violation."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"seed": seed, "fault": fault}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the laboratory ended:\n{self._log.read_text()[-5000:]}")
        result = RoundResult(**json.loads(line))
        folder = self._folder / f"round-{seed}-{fault.replace(' ', '-')}"
        if result.violations:
            result.folder = str(self._keep(folder))
        shutil.rmtree(folder, ignore_errors=True)
        return result

    def _keep(self, folder: Path) -> Path:
        kept = self._kept / f"{self.store}-{folder.name}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        for log in self._folder.glob("cluster-*/*.log"):
            shutil.copy(log, kept / f"{log.parent.name}-{log.name}")
        return kept

    def close(self) -> None:
        """End it, and leave nothing behind but what was kept."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(CLOSE_S)
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)

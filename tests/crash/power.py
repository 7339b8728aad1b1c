"""A loss of power, as honestly as one process can have it: what was not synced is gone.

SIGKILL alone does not show what a crash of the machine takes: the kernel still has every page that
the process wrote. So strace writes down each write and each sync of the process; once it is killed,
the folder is put back to what stood there at first, and only those writes are made again that a
later `fsync` or `fdatasync` of the same file had covered when it returned.

That is the worst that a disk may do that keeps to what it promises. A new file counts as there once
it was synced itself, as on ext4 and XFS. Files that are mapped (SQLite's -shm) come back empty or
not at all; SQLite makes them anew.
"""

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

DEADLINE_S = 30.0

_CALLS = "pwrite64,write,ftruncate,fsync,fdatasync"

_LINE = re.compile(r"(\d+\.\d+) (\w+)\(\d+<([^>]*)>(?:, )?(.*)\)\s+= (-?\d+|\?)")

_BYTE = re.compile(rb"\\x([0-9a-f]{2})")

_MOST_BYTES = 1 << 20
"""More than SQLite writes at once."""


class PowerLoss:
    """Watches what a process does to a folder, until the power is cut."""

    def __init__(self, pid: int, folder: Path) -> None:
        """Begin to watch; what stands in the folder now counts as synced."""
        self._folder = folder
        self._work = Path(tempfile.mkdtemp(prefix="lrpilot-power-"))
        # So that it writes nothing between the copy and the first look.
        os.kill(pid, signal.SIGSTOP)
        try:
            self._wait(pid, lambda status: "State:\tT" in status or "State:\tt" in status)
            shutil.copytree(folder, self._work / "before")
            self._strace = self._watch(pid)
            self._wait(pid, lambda status: "TracerPid:\t0\n" not in status)
        finally:
            os.kill(pid, signal.SIGCONT)

    def _watch(self, pid: int) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            [
                *("strace", "-ff", "-ttt", "-y", "-xx", "-s", str(_MOST_BYTES)),
                *("-e", f"trace={_CALLS}", "-o", str(self._work / "trace"), "-p", str(pid)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def _wait(self, pid: int, holds: Callable[[str], bool]) -> None:
        """Wait until something holds for the status of every thread."""
        end_s = time.monotonic() + DEADLINE_S
        while not all(map(holds, _statuses(pid))):
            assert time.monotonic() < end_s, f"process {pid} cannot be watched"
            time.sleep(0.01)

    def cut(self) -> int:
        """Leave in the folder what was synced; return how many writes are gone.

        The process must have ended by SIGKILL.
        """
        self._strace.wait(DEADLINE_S)
        shutil.rmtree(self._folder)
        shutil.copytree(self._work / "before", self._folder)
        pending: dict[str, list[tuple[int, bytes | None]]] = defaultdict(list)
        for call, path, arguments in self._calls():
            if call == "pwrite64":
                data, _, offset = arguments.rsplit(", ", 2)
                assert not data.endswith("..."), "strace has cut a write short"
                pending[path].append((int(offset), _unescaped(data.strip('"'))))
            elif call == "ftruncate":
                pending[path].append((int(arguments), None))
            elif call == "write":
                raise AssertionError(f"where {path} is written is not known")
            else:
                _carry_out(Path(path), pending.pop(path, []))
        for shared in self._folder.glob("*-shm"):
            shared.unlink()
        return sum(map(len, pending.values()))

    def close(self) -> None:
        """Leave nothing behind; a process that still runs is no longer watched."""
        if self._strace.poll() is None:
            self._strace.terminate()
            self._strace.wait(DEADLINE_S)
        shutil.rmtree(self._work)

    def _calls(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, path and the other arguments of the calls that did something, in order."""
        found = []
        # One file for each thread: calls of two of them would be torn apart in one.
        for trace in self._work.glob("trace.*"):
            for line in trace.read_text().splitlines():
                parts = _LINE.match(line)
                if parts is None:
                    continue
                at, call, shown, arguments, result = parts.groups()
                path = _unescaped(shown).decode()
                if Path(path).parent == self._folder and result.isdigit():
                    found.append((float(at), call, path, arguments))
        return (item[1:] for item in sorted(found, key=lambda item: item[0]))


def _statuses(pid: int) -> Iterator[str]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may end meanwhile.
        with suppress(OSError):
            yield (task / "status").read_text()


def _unescaped(text: str) -> bytes:
    return _BYTE.sub(lambda found: bytes.fromhex(found[1].decode()), text.encode())


def _carry_out(path: Path, writes: list[tuple[int, bytes | None]]) -> None:
    """Do to a file what was done to it; None for data: it was cut to that length."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for offset, data in writes:
            if data is None:
                os.ftruncate(file, offset)
            else:
                os.pwrite(file, data, offset)
    finally:
        os.close(file)

"""The ranks of one node share what the server answers: one asks, the others read a file.

The files lie in a folder of shared memory that belongs to one attempt. Each holds one answer of
GetValues as it came, so that directives and changes ride along, behind a digest that only the
attempt's token can make. A file appears complete, by a rename, and never changes. Who asks is
decided by a lock on the first progress wanted, which the kernel frees where its holder dies; it
is kept while a call is repeated, so that in an outage one rank of a node knocks at the door.

Nothing here is needed: whatever is wrong with the folder, the rank asks the server itself.
"""

import hashlib
import logging
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lrpilot.client import _timing
from lrpilot.client._call import Link
from lrpilot.v1 import trainer_pb2 as pb

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("lrpilot.client")

ROOT = Path("/dev/shm")  # noqa: S108 - what is made there is checked.
"""Where folders are made: memory that every process of a Linux machine shares."""

PREFIX = "lrpilot-"

KEPT_FILES = 64
"""Files of values kept in a folder: the longest lease, twice over. The oldest go first."""

LEFTOVER_S = 86_400.0
"""Age from which on the folder of a job that was killed is removed by a later one."""

_DIGEST_BYTES = 32

_NONCE_BYTES = 8

_ENTRIES = 100
"""How often a folder is made anew that another rank removes meanwhile."""

_VALUES = re.compile(r"(\d+)-([1-9]\d*)-([1-9]\d*)(-explained)?", re.ASCII)
"""Name of a file of values: its first progress, the stride, the number of steps."""

_LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",  # torchrun
    "LOCAL_SIZE",  # DeepSpeed's launcher
    "OMPI_COMM_WORLD_LOCAL_SIZE",  # Open MPI
    "MPI_LOCALNRANKS",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_SIZE",  # MVAPICH
    "SLURM_NTASKS_PER_NODE",  # Slurm, where the user gave it
    "SLURM_STEP_TASKS_PER_NODE",  # Slurm: one number for each node, as in 8(x2),4
    "SLURM_TASKS_PER_NODE",
)


class _Unusable(Exception):
    """A folder or a file is not what this module makes."""


def ranks_here(environment: Mapping[str, str]) -> int:
    """Return how many ranks launchers say to have started on a node; 1: they say nothing."""
    return max(
        (
            int(count)
            for name in _LOCAL_SIZES
            for count in re.findall(r"(?<![x\d])\d+", environment.get(name, ""), re.ASCII)
        ),
        default=1,
    )


def share(link: Link, opened: pb.OpenAttemptResponse, world_size: int) -> "Node | None":
    """Return what this rank shares with the others of its node; None: it asks for itself."""
    if sys.platform != "linux" or world_size == 1 or ranks_here(os.environ) == 1:
        return None
    try:
        _sweep()
        node = Node(link, opened)
    except (OSError, _Unusable) as error:
        _say_alone(link, error)
        return None
    logger.info("run %s: rank %d shares values in %s", link.run, link.rank, node.folder)
    return node


class Node:
    """The ranks of one attempt on this node, as one of them sees them.

    Two threads may use it at once: one asks with `blocked`, the other without.
    """

    def __init__(self, link: Link, opened: pb.OpenAttemptResponse) -> None:
        """Enter the folder. Raises OSError, _Unusable."""
        self._link = link
        self._groups = len(opened.groups)
        self._token = opened.attempt.token
        name = hashlib.blake2b(self._token + link.run.encode(), digest_size=16).hexdigest()
        self.folder = ROOT / f"{PREFIX}{name}"
        self._entered = _enter(self.folder)
        """Descriptor of the folder; a lock on it says that somebody is there."""
        self._locks = -1
        """Descriptor of the file whose bytes are locked: one open description a process, since
        closing another one would free them."""
        self._held: dict[bool, int] = {}
        """The byte that the blocked thread and the other one have locked."""
        self._is_alone = False
        try:
            self._locks = os.open(
                self.folder / "locks", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600
            )
            self._write("seed", secrets.token_bytes(16), replace=False)
            self._seed = self._read("seed") or b""
        except BaseException:
            self.close()
            raise

    def draw(self, end: int) -> float:
        """Return a number from [0, 1) that is random, and the same on every rank of the node."""
        drawn = hashlib.blake2b(b"%d" % end, key=self._seed, digest_size=7).digest()
        return int.from_bytes(drawn, "big") / 2.0**56

    def get_values(self, request: pb.GetValuesRequest, timeout_s: float) -> pb.GetValuesResponse:
        """Return an answer to GetValues: from a file, or from the server where this rank asks it.

        It may hold no values, like the server's. A rank that finds neither a file nor the lock
        free waits for `timeout_s` at most and then asks, whoever else does. Raises as
        `Link.once` does.
        """
        try:
            if request.explain:
                self._write("explain", b"", replace=False)
            elif self._exists("explain"):
                # Another rank of the node needs it, and may be the one that reads the answer.
                request = _explained(request)
            answer = self._await_file(request, time.monotonic() + timeout_s)
            if answer is None:
                self._see_furthest(request.stride)
        except (OSError, _Unusable) as error:
            self._leave(error, request)
            answer = None
        if answer is not None:
            return answer
        request.held.CopyFrom(self._link.held())
        fetched: pb.GetValuesResponse = self._link.once(
            self._link.stub.GetValues, request, timeout_s
        )
        try:
            self._publish(request, fetched)
        except (OSError, _Unusable) as error:
            self._leave(error, request)
        return fetched

    def let_go(self, *, blocked: bool) -> None:
        """Let another rank ask: this one needs no answer any more."""
        held = self._held.pop(blocked, None)
        if held is not None:
            fcntl.lockf(self._locks, fcntl.LOCK_UN, 1, held)

    def close(self) -> None:
        """Leave; the last one to do so removes the folder."""
        self._is_alone = True
        try:
            # Two that leave at once see each other in the first round, and not in the second.
            for _ in range(2):
                try:
                    fcntl.flock(self._entered, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    fcntl.flock(self._entered, fcntl.LOCK_UN)
                else:
                    _remove(self.folder)
                    break
        except OSError:
            # A later job removes what is left.
            logger.debug("%s was not removed", self.folder, exc_info=True)
        finally:
            os.close(self._entered)
            if self._locks >= 0:
                os.close(self._locks)

    # Who asks.

    def _await_file(
        self, request: pb.GetValuesRequest, end_s: float
    ) -> pb.GetValuesResponse | None:
        """Return what another rank was answered; None: this one is to ask."""
        link = self._link
        pause_s = _timing.NODE_POLL_FIRST_S
        cap_s = _timing.NODE_POLL_BLOCKED_S if request.blocked else _timing.NODE_POLL_AHEAD_S
        old_news = self._news(request)
        while not self._is_alone:
            found = self._find(request)
            if found is None and self._lock(request):
                # Who had the lock before may have come back with an answer meanwhile.
                found = self._find(request)
                if found is None:
                    return None
                self.let_go(blocked=request.blocked)
            if found is not None:
                return found
            if not request.wait_ms or time.monotonic() >= end_s:
                return None
            news = self._news(request)
            if news is not None and news != old_news:
                link.contact_s = time.monotonic()
                return pb.GetValuesResponse.FromString(news[_NONCE_BYTES:])
            if link.closing.is_set() or link.failure is not None:
                return pb.GetValuesResponse()
            link.pause(pause_s)
            pause_s = min(pause_s * 1.5, cap_s)
        return None

    def _lock(self, request: pb.GetValuesRequest) -> bool:
        """Return whether this rank alone is to ask for these values."""
        byte = 2 * request.begin + request.blocked
        if self._held.get(request.blocked) == byte:
            return True
        self.let_go(blocked=request.blocked)
        try:
            fcntl.lockf(self._locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        self._held[request.blocked] = byte
        return True

    def _leave(self, error: Exception, request: pb.GetValuesRequest) -> None:
        """Ask for oneself from now on, and say why once."""
        self.let_go(blocked=request.blocked)
        if not self._is_alone:
            self._is_alone = True
            _say_alone(self._link, error)

    # What the files hold.

    def _publish(self, request: pb.GetValuesRequest, answer: pb.GetValuesResponse) -> None:
        """Let the other ranks of the node read an answer."""
        if self._is_alone:
            return
        payload = answer.SerializeToString()
        if not answer.HasField("block"):
            # The same news once more are news: the server has answered again.
            self._write(_news_name(request), secrets.token_bytes(_NONCE_BYTES) + payload)
            return
        block = answer.block
        steps = len(block.learning_rates) // self._groups
        name = f"{block.begin}-{block.stride}-{steps}"
        self._write(f"{name}-explained" if request.explain else name, payload)
        self.let_go(blocked=request.blocked)
        files = sorted(self._files(), key=lambda file: file.end)
        for file in files[:-KEPT_FILES]:
            (self.folder / file.name).unlink(missing_ok=True)

    def _find(self, request: pb.GetValuesRequest) -> pb.GetValuesResponse | None:
        """Return the answer that reaches furthest from the first progress wanted on."""
        fitting = [
            file
            for file in self._files()
            if request.begin in range(file.begin, file.end, file.stride)
            and (file.is_explained or not request.explain)
        ]
        if not fitting:
            return None
        best = max(fitting, key=lambda file: (file.stride == request.stride, file.end))
        payload = self._read(best.name)
        return None if payload is None else pb.GetValuesResponse.FromString(payload)

    def _see_furthest(self, stride: int) -> None:
        """Let this rank hand back what any rank of the node has, where that reaches further."""
        got = self._link.got
        files = [file for file in self._files() if file.stride == stride]
        if not files:
            return
        file = max(files, key=lambda file: file.end)
        if file.end - file.stride > got.last and (payload := self._read(file.name)) is not None:
            got.add(pb.GetValuesResponse.FromString(payload).block, self._groups)

    def _news(self, request: pb.GetValuesRequest) -> bytes | None:
        return self._read(_news_name(request))

    # Files.

    def _files(self) -> Iterator["_File"]:
        for path in self.folder.iterdir():
            found = _VALUES.fullmatch(path.name)
            if found is not None:
                begin, stride, steps = map(int, found.group(1, 2, 3))
                yield _File(
                    path.name, begin, stride, begin + steps * stride, found.group(4) is not None
                )

    def _exists(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _write(self, name: str, payload: bytes, *, replace: bool = True) -> None:
        """Let a file appear, complete. Raises OSError."""
        path = self.folder / name
        new = self.folder / f".{secrets.token_hex(8)}"
        try:
            opened = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            with os.fdopen(opened, "wb") as file:
                file.write(self._digest(name, payload) + payload)
            if replace:
                new.replace(path)
            else:
                path.hardlink_to(new)
        except FileExistsError:
            # Another rank was first, with what all of them use.
            pass
        finally:
            new.unlink(missing_ok=True)

    def _read(self, name: str) -> bytes | None:
        """Return what a file holds; None: there is none. Raises OSError, _Unusable."""
        path = self.folder / name
        try:
            opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        with os.fdopen(opened, "rb") as file:
            _check(path, os.fstat(opened), stat.S_IFREG)
            content = file.read(2 * _timing.MESSAGE_BYTES)
        payload = content[_DIGEST_BYTES:]
        if not secrets.compare_digest(content[:_DIGEST_BYTES], self._digest(name, payload)):
            raise _Unusable(f"{path} is damaged")
        return payload

    def _digest(self, name: str, payload: bytes) -> bytes:
        """Return what a file begins with: none but the ranks of the attempt can make it."""
        return hashlib.blake2b(
            name.encode() + b"\0" + payload, key=self._token, digest_size=_DIGEST_BYTES
        ).digest()


class _File(NamedTuple):
    """A file of values, as its name tells."""

    name: str
    begin: int
    stride: int
    end: int
    is_explained: bool


def _news_name(request: pb.GetValuesRequest) -> str:
    return "news-blocked" if request.blocked else "news-ahead"


def _explained(request: pb.GetValuesRequest) -> pb.GetValuesRequest:
    copy = pb.GetValuesRequest()
    copy.CopyFrom(request)
    copy.explain = True
    return copy


def _say_alone(link: Link, error: Exception) -> None:
    logger.warning(
        "run %s: rank %d shares no values with the other ranks of its node, and asks the server "
        "itself: %s",
        link.run,
        link.rank,
        error,
    )


def _enter(folder: Path) -> int:
    """Make a folder, or enter it; return a locked descriptor. Raises OSError, _Unusable."""
    for _ in range(_ENTRIES):
        with suppress(FileExistsError):
            folder.mkdir(0o700)
        with suppress(FileNotFoundError, BlockingIOError):
            entered = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                _check(folder, os.fstat(entered), stat.S_IFDIR)
                fcntl.flock(entered, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(entered), folder.stat()):
                    return entered
            except BaseException:
                os.close(entered)
                raise
            os.close(entered)
        # The last rank to leave is removing it.
        time.sleep(_timing.NODE_POLL_FIRST_S)
    raise _Unusable(f"{folder} vanishes again and again")


def _check(path: Path, found: os.stat_result, kind: int) -> None:
    """Raise _Unusable unless something is of a kind, and its owner's alone."""
    if stat.S_IFMT(found.st_mode) != kind:
        raise _Unusable(f"{path} is something else")
    if found.st_uid != os.geteuid():
        raise _Unusable(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & 0o077:
        raise _Unusable(f"{path} has mode {stat.S_IMODE(found.st_mode):o}: others may reach it")


def _sweep() -> None:
    """Remove what jobs of this user left behind that were killed more than a day ago."""
    for folder in ROOT.glob(f"{PREFIX}*"):
        with suppress(OSError, _Unusable):
            if time.time() - folder.lstat().st_mtime > LEFTOVER_S:
                entered = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
                try:
                    _check(folder, os.fstat(entered), stat.S_IFDIR)
                    # A job that has slept for a day still holds its own lock.
                    fcntl.flock(entered, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(folder)
                finally:
                    os.close(entered)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()

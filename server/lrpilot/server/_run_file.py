"""A whole run as one file, and back: gzip over JSON lines, for `zcat` and `jq`.

    {"format":1,"lrpilot":"0.3.0","host":"node7","run":"my-run","first_seq":1,"exported_at_ns":…,"check":"…"}
    {"seq":1,"recorded_at_ns":…,"payload":{"kind":"created",…},"check":"…"}
    …
    {"events":12034,"last_seq":12034,"digest":"…","check":"…"}

The payloads are the events as the log has them, byte for byte, so that the hash chain can be
computed again; the last line says what must come out. `check` is the SHA-256 of all bytes before
it, of the lines before too: its first 8 digits on each line, so that the first line at fault is
known, and the whole of it on the last.
"""

import hashlib
import json
import re
import socket
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from lrpilot import core
from lrpilot.server._live_run import LiveRun
from lrpilot.server._packing import PackedLog
from lrpilot.server._store import MAX_SEQ, LogRow

FORMAT = 1
"""Version of the file, one for all that a release writes."""

MAX_BYTES = 1024 * 1024 * 1024
"""Most bytes of a file that is taken, unpacked: some millions of events."""

MAX_LINE_BYTES = core.MAX_STATE_BYTES + 1024 * 1024
"""Most bytes of a line: an event may hold a saved state."""

MAX_TEXT = 100
"""Most characters of what a file says of where it comes from."""

_STEP_BYTES = 1024 * 1024
"""Bytes that are unpacked at once."""

_GZIP = 16 + zlib.MAX_WBITS

Trim = Callable[[LiveRun, int | None], None]
"""Drops what a run will hardly be asked for; nothing from a given progress on. See History.trim."""

Seen = Callable[[LiveRun, LogRow, core.Event], None]
"""Is given each event, in order, with the run after it. As long as it has done nothing it may raise
HistoryNeeded: it is called again then, with a run that knows more."""

_LINE = re.compile(rb'(\{.*),"check":"([0-9a-f]{8}|[0-9a-f]{64})"\}', re.DOTALL)
_EVENT = re.compile(
    rb'\{"seq":([0-9]{1,19}),"recorded_at_ns":([0-9]{1,19}),"payload":(\{.*\})', re.DOTALL
)


def release() -> str:
    """Return the version of this release."""
    try:
        return metadata.version("lrpilot")
    except metadata.PackageNotFoundError:
        # Run from a checkout that is not installed.
        return "unknown"


class LogChanged(Exception):
    """The rows are not those of one log: the run was deleted, and perhaps made again."""


class RunFileWriter:
    """Writes a run's file, rows after rows. Any thread may call it, one at a time."""

    def __init__(self, run: str, now_ns: int) -> None:
        """Begin the file of a run at `now_ns`, Unix nanoseconds."""
        self._packer = zlib.compressobj(wbits=_GZIP)
        self._checked = hashlib.sha256()
        self.events = 0
        """Number of events written."""
        self.digest = core.RunState(run).digest
        """Digest of the log behind the last of them."""
        header = {
            "format": FORMAT,
            "lrpilot": release(),
            "host": socket.gethostname()[:MAX_TEXT],
            "run": run,
            "first_seq": 1,
            "exported_at_ns": now_ns,
        }
        self._header = self._line(_plain(header))

    def write(self, rows: Sequence[LogRow]) -> bytes:
        """Return the next bytes of the file, which may be none.

        Raises LogChanged where there are no rows, or they do not follow those before.
        """
        if not rows:
            raise LogChanged
        lines = [self._header]
        self._header = b""
        for row in rows:
            self.digest = core.chain(self.digest, row.payload)
            self.events += 1
            if (self.events, self.digest) != (row.seq, row.digest):
                raise LogChanged
            lines.append(
                self._line(
                    b'{"seq":%d,"recorded_at_ns":%d,"payload":%b'
                    % (row.seq, row.recorded_at_ns, row.payload)
                )
            )
        return self._packer.compress(b"".join(lines))

    def end(self, digest: str) -> bytes:
        """Return the last bytes of the file; `digest` is the log's. Raises LogChanged."""
        if self.digest != digest:
            raise LogChanged
        trailer = {"events": self.events, "last_seq": self.events, "digest": self.digest}
        last = self._packer.compress(self._line(_plain(trailer), digits=64))
        return last + self._packer.flush()

    def _line(self, body: bytes, digits: int = 8) -> bytes:
        self._checked.update(body)
        check = self._checked.hexdigest()[:digits].encode("ascii")
        return b'%b,"check":"%b"}\n' % (body, check)


@dataclass(frozen=True, slots=True)
class ReadRun:
    """What a whole file holds, every byte of it checked."""

    run: LiveRun
    """The run after its log."""
    log: PackedLog
    origin: str
    """Release and machine that exported it."""
    exported_at_ns: int
    """When, in Unix nanoseconds by the clock of that machine."""


class RunFileReader:
    """Reads a run's file, part after part, and folds the log meanwhile.

    In memory it has the log, packed, and what `trim` leaves of its fold. Any thread may call it,
    one at a time. Whatever is wrong raises InvalidRequest, which names the line; the reader is of
    no use any more then.
    """

    def __init__(self, trim: Trim, seen: Seen | None = None) -> None:
        self._trim = trim
        self._seen = seen
        self._unpacker = zlib.decompressobj(wbits=_GZIP)
        self._checked = hashlib.sha256()
        self._rest = b""
        """The beginning of a line."""
        self._line = 0
        """Number of whole lines read."""
        self._bytes = 0
        self._run: LiveRun | None = None
        """The run so far; None before the first line."""
        self._release = self._host = ""
        self._exported_at_ns = 0
        self._log = PackedLog()
        self._is_whole = False

    def feed(self, data: bytes) -> None:
        """Read the next bytes of the file."""
        unpacked = bytes(_STEP_BYTES)
        # A step that was full may have kept something back, though all data went in.
        while data or len(unpacked) == _STEP_BYTES:
            try:
                unpacked = self._unpacker.decompress(data, _STEP_BYTES)
            except zlib.error:
                got = "data that cannot be unpacked" if self._bytes else "no gzip data"
                raise self._fault(got, "a file as `lrpilot run export` wrote it") from None
            data = self._unpacker.unconsumed_tail
            self._bytes += len(unpacked)
            if self._bytes > MAX_BYTES:
                raise self._fault("a longer file", f"at most {MAX_BYTES} bytes, unpacked")
            *lines, self._rest = (self._rest + unpacked).split(b"\n")
            for line in lines:
                self._take(line)
            if len(self._rest) > MAX_LINE_BYTES:
                raise self._fault("a longer line", f"at most {MAX_LINE_BYTES} bytes")
            if self._unpacker.unused_data:
                raise self._fault("more data behind the end", "nothing")

    def end(self) -> ReadRun:
        """Return what the file holds, once all of it was fed."""
        is_whole = self._is_whole and self._unpacker.eof and not self._rest
        if not is_whole or self._run is None:
            raise self._fault("the end of the file", "the rest of it: it was cut off")
        origin = f"lrpilot {self._release} on {self._host}"
        return ReadRun(self._run, self._log, origin, self._exported_at_ns)

    def _take(self, line: bytes) -> None:
        if self._is_whole:
            raise self._fault("a line behind the last one", "the end of the file")
        found = _LINE.fullmatch(line)
        if found is None:
            raise self._fault(_shown(line), "a line as `lrpilot run export` wrote it")
        body, check = found.groups()
        self._checked.update(body)
        wanted = self._checked.hexdigest()
        if check.decode("ascii") not in {wanted, wanted[:8]}:
            raise self._fault(
                f"check {check.decode('ascii')}",
                f"{wanted[: len(check)]}: this line or where it stands was changed",
            )
        if self._run is None:
            self._begin(body)
        elif (event := _EVENT.fullmatch(body)) is not None:
            self._add(self._run, int(event[1]), int(event[2]), event[3])
        else:
            self._finish(self._run.state, body, check)
        self._line += 1

    def _begin(self, body: bytes) -> None:
        header = self._read(body)
        if "format" not in header or "lrpilot" not in header:
            raise self._fault(_shown(body), "the first line of an exported run")
        if header["format"] != FORMAT:
            raise self._fault(
                f"format {header['format']!r} of lrpilot {header['lrpilot']!r}"[:MAX_TEXT],
                f"format {FORMAT}, which lrpilot {release()} reads: the file was written by a "
                "newer release",
            )
        texts = [header.get(name) for name in ("lrpilot", "host", "run")]
        at_ns = header.get("exported_at_ns")
        if (
            not all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts)
            or not (type(at_ns) is int and 0 <= at_ns <= MAX_SEQ)
            or header.get("first_seq") != 1
        ):
            raise self._fault(_shown(body), "the first line of an exported run, from seq 1 on")
        self._release, self._host, self._exported_at_ns = header["lrpilot"], header["host"], at_ns
        self._run = LiveRun(header["run"])

    def _add(self, run: LiveRun, seq: int, recorded_at_ns: int, payload: bytes) -> None:
        state = run.state
        if seq != state.seq + 1:
            raise self._fault(f"seq {seq}", f"seq {state.seq + 1}")
        if recorded_at_ns > MAX_SEQ:
            raise self._fault(f"recorded_at_ns {recorded_at_ns}", f"at most {MAX_SEQ}")
        row = LogRow(seq, payload, core.chain(state.digest, payload), recorded_at_ns)
        try:
            event = core.decode(payload)
            is_created = isinstance(event, core.Created)
            if is_created == (seq == 1):
                run = self._run = self._applied(run, row, event)
                state = run.state
        except Exception as error:
            # Whatever a fold of what is no event raises.
            raise self._fault(
                str(error).partition("\n")[0] or type(error).__name__,
                f"an event that lrpilot {release()} knows; the file was written by "
                f"lrpilot {self._release}, perhaps a newer release",
            ) from error
        if is_created != (seq == 1):
            raise self._fault(f"seq {seq}, {_shown(payload)}", "'created' first, and only there")
        if is_created and state.spec.name != state.name:
            raise self._fault(f"the spec of run {state.spec.name!r}", f"that of {state.name!r}")
        blocks = len(self._log.blocks)
        self._log.add(row)
        if len(self._log.blocks) > blocks:
            self._trim(run, None)

    def _applied(self, run: LiveRun, row: LogRow, event: core.Event) -> LiveRun:
        """Return the run after a row, once it was seen. Raises as LiveRun.apply does."""
        floor: int | None = None
        while True:
            try:
                if floor is not None:
                    run = self._folded(run.state.name, floor)
                run.apply(row)
                if self._seen is not None:
                    self._seen(run, row, event)
            except core.HistoryNeeded as error:
                # Here, or earlier, the log goes back behind what is kept: keep more.
                floor = error.progress
            else:
                return run

    def _folded(self, name: str, floor: int) -> LiveRun:
        """Fold the log again, and drop nothing from `floor` on. Raises as LiveRun.apply does."""
        run = LiveRun(name)
        for rows in self._log.parts():
            for row in rows:
                run.apply(row)
            self._trim(run, floor)
        return run

    def _finish(self, state: core.RunState, body: bytes, check: bytes) -> None:
        trailer = self._read(body)
        wanted = {"events": state.seq, "last_seq": state.seq, "digest": state.digest}
        if trailer != wanted or not state.exists or len(check) < 64:
            raise self._fault(_shown(body), _plain(wanted).decode("ascii") + "}")
        self._is_whole = True

    def _read(self, body: bytes) -> dict[str, Any]:
        try:
            found = json.loads(body + b"}")
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._fault(_shown(body), "a line as `lrpilot run export` wrote it")
        return found

    def _fault(self, got: str, allowed: str) -> core.InvalidRequest:
        return core.InvalidRequest(
            "the file is not the whole export of a run; nothing was imported",
            [core.Violation(f"line {self._line + 1}", got, allowed)],
        )


def _plain(content: dict[str, Any]) -> bytes:
    """Return a line without its check and end."""
    return json.dumps(content, separators=(",", ":")).removesuffix("}").encode("ascii")


def _shown(line: bytes) -> str:
    return repr(line[:60].decode("ascii", "replace"))

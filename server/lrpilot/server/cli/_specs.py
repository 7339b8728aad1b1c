"""Where the SPEC of a command comes from."""

import sys
from pathlib import Path

from lrpilot.core._errors import InvalidSpec
from lrpilot.core._spec import RunSpec
from lrpilot.server._documents import MAX_BYTES, read_spec
from lrpilot.server.cli._failures import INVALID, CommandError, invalid_fields
from lrpilot.server.cli._presets import PREFIX, preset_document, preset_names


def spec_document(source: str) -> str:
    """Return the text of a spec: of a file, of standard input (`-`) or of `preset:NAME`."""
    if source.startswith(PREFIX):
        return preset_document(source.removeprefix(PREFIX))
    return read_text(source)


def load_spec(source: str) -> RunSpec:
    """Return the spec that a source holds; CommandError names every violation."""
    document = spec_document(source)
    try:
        return read_spec(document)
    except InvalidSpec as error:
        raise invalid_fields(_called(source), error) from None


def chosen_groups(spec: RunSpec, name: str | None) -> list[int]:
    """Return the indices of the group of that name, or of all groups; CommandError names them."""
    names = spec.group_names
    if name is None:
        return list(range(len(names)))
    if not spec.groups:
        raise CommandError(f"no group {name!r}: the spec declares none", INVALID)
    if name not in names:
        raise CommandError(f"no group {name!r}; the groups are {', '.join(names)}", INVALID)
    return [names.index(name)]


def read_text(source: str) -> str:
    """Return the text of a file, or of standard input (`-`)."""
    try:
        if source == "-":
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(source).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        # ValueError: a NUL in the name.
        reason = error.strerror if isinstance(error, OSError) else str(error)
        hint = f"the preset is named {PREFIX}{source}" if source in preset_names() else None
        raise CommandError(f"{_called(source)}: {reason}", INVALID, hint=hint) from None
    if len(data) > MAX_BYTES:
        raise CommandError(f"{_called(source)}: more than {MAX_BYTES:,} bytes", INVALID)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"{_called(source)}: no UTF-8 text (at byte {error.start})", INVALID
        ) from None


def _called(source: str) -> str:
    return "standard input" if source == "-" else source

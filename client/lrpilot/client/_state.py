"""What a scheduler puts into a checkpoint: plain types alone, so that anything can store it."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lrpilot.client import _timing
from lrpilot.client._errors import InvalidState

VERSION = 1
"""Version of the dictionary; the server's blob inside has one of its own."""


@dataclass(frozen=True)
class SavedState:
    """A state read back."""

    progress: int | None
    """Progress to resume at; None: saved before the attempt had opened."""
    blob: bytes
    """The server's state; empty: the server was away when it was saved."""


def encode(run: str, saved: SavedState) -> dict[str, Any]:
    """Return the dictionary for a checkpoint."""
    return {
        "version": VERSION,
        "run": run,
        "progress": saved.progress,
        "state": base64.b64encode(saved.blob).decode("ascii"),
    }


def decode(run: str, state: Mapping[str, Any]) -> SavedState:
    """Return what `encode` wrote. Raises InvalidState."""
    if not isinstance(state, Mapping):
        raise InvalidState(
            f"state: got {type(state).__name__}; allowed: what scheduler.state_dict() returned"
        )
    missing = [key for key in ("version", "run", "progress", "state") if key not in state]
    if missing:
        raise InvalidState(
            f"state: {', '.join(missing)} missing; allowed: what scheduler.state_dict() returned"
        )
    version, owner, progress = state["version"], state["run"], state["progress"]
    if version != VERSION:
        raise InvalidState(
            f"state: it has version {version!r}; this release reads version {VERSION}",
            facts={"version": version},
        )
    if owner != run:
        raise InvalidState(
            f"state: it belongs to run {owner!r}, not to run {run!r}",
            facts={"run": run, "state_run": owner},
        )
    if progress is not None and (
        type(progress) is not int or not 0 <= progress <= _timing.MAX_PROGRESS
    ):
        raise InvalidState(f"state: progress is {progress!r}; allowed: a non-negative integer")
    try:
        blob = base64.b64decode(state["state"], validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InvalidState("state: the part of the server is damaged (no base64)") from None
    return SavedState(progress, blob)

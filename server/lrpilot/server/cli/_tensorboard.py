"""Losses of a TensorBoard run: scalars of its event files."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

from lrpilot.server.cli._failures import INVALID, CommandError
from lrpilot.server.cli._losses import LossRow, refuse

USUAL_NAMES = (
    "loss",
    "train_loss",
    "training_loss",
    "loss/train",
    "loss/training",
    "train/loss",
    "training/loss",
    "lm_loss",
    "train/lm_loss",
    "total_loss",
    "train/total_loss",
    "train_loss_step",
    "train/loss_step",
)
"""What trainers call the loss, once blanks and hyphens are underscores and letters are small."""

VALIDATION = "val_loss"
"""Name under which the policies know the validation loss that was chosen."""

_MOST_TAGS = 30
"""Most tags that an error lists."""

Series: TypeAlias = list[tuple[int, float]]
"""(step, value) in rising order of step."""


def read_run(path: Path, tag: str | None, validation_tag: str | None) -> list[LossRow]:
    """Return the rows of a run: of one event file, or of all event files of a folder.

    A step is a progress. Where a restart wrote steps again, the later ones hold. A validation loss
    rides in the row of the next loss, as in a live run; one after the last has a row of its own.
    Values are float32, which is what TensorBoard keeps.

    Raises CommandError where the package `tensorboard` is missing, where no scalar or several are
    called like a loss, and for tags that the run does not have.
    """
    scalars = _read_scalars(path)
    losses = scalars[_loss_tag(path, scalars, tag)]
    by_progress: dict[int, LossRow] = {step: LossRow(step, value) for step, value in losses}
    if validation_tag is not None:
        _known(path, scalars, validation_tag)
        steps = [step for step, _ in losses]
        for step, value in scalars[validation_tag]:
            index = bisect_left(steps, step)
            at, loss = losses[index] if index < len(losses) else (step, None)
            by_progress[at] = LossRow(at, loss, {VALIDATION: value})
    rows = [by_progress[progress] for progress in sorted(by_progress)]
    if rows[0].progress < 0:
        refuse(str(path), "step", str(rows[0].progress), "steps from 0")
    return rows


def _loss_tag(path: Path, scalars: dict[str, Series], tag: str | None) -> str:
    if tag is not None:
        return _known(path, scalars, tag)
    usual = [name for name in scalars if re.sub(r"[ -]", "_", name.lower()) in USUAL_NAMES]
    if len(usual) == 1:
        return usual[0]
    what = "several scalars are" if usual else "no scalar is"
    raise CommandError(
        f"{path}: {what} called like a loss",
        INVALID,
        lines=[f"scalars: {_listed(usual or list(scalars))}"],
        hint="choose one with --tag",
    )


def _known(path: Path, scalars: dict[str, Series], tag: str) -> str:
    if tag not in scalars:
        raise CommandError(
            f"{path}: no scalar {tag!r}", INVALID, lines=[f"scalars: {_listed(list(scalars))}"]
        )
    return tag


def _listed(tags: list[str]) -> str:
    more = f" and {len(tags) - _MOST_TAGS} more" if len(tags) > _MOST_TAGS else ""
    return ", ".join(repr(tag) for tag in sorted(tags)[:_MOST_TAGS]) + more


def _read_scalars(path: Path) -> dict[str, Series]:
    scalars: dict[str, Series] = {}
    for file in _event_files(path):
        for tag, step, value in _events(file):
            series = scalars.setdefault(tag, [])
            if series and step <= series[-1][0]:
                # A restart went back; what it wrote again holds.
                del series[bisect_left(series, (step,)) :]
            series.append((step, value))
    if not scalars:
        refuse(str(path), "", "no scalars", "event files with scalars")
    return scalars


def _event_files(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise CommandError(f"{path}: No such file or directory", INVALID)
        return [path]
    # Their names begin with the time at which they were opened.
    files = sorted(file for file in path.iterdir() if "tfevents" in file.name)
    if not files:
        runs = sorted({str(file.parent) for file in path.rglob("*tfevents*")})
        raise CommandError(
            f"{path}: no event files in this folder",
            INVALID,
            lines=runs[:_MOST_TAGS],
            hint="give one of these runs" if runs else None,
        )
    return files


def _events(file: Path) -> Iterator[tuple[str, int, float]]:
    """Return (tag, step, value) of each scalar; a file that breaks off ends there."""
    try:
        from tensorboard.backend.event_processing import event_file_loader  # noqa: PLC0415
        from tensorboard.util import tensor_util  # noqa: PLC0415
    except ImportError as error:
        raise CommandError(
            f"TensorBoard runs need the package tensorboard: {error}",
            INVALID,
            hint="pip install 'lrpilot[tensorboard]'",
        ) from None
    for event in event_file_loader.LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            number = _scalar(value, tensor_util)
            if number is not None:
                yield value.tag, event.step, number


def _scalar(value: Any, tensor_util: Any) -> float | None:
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor") and value.metadata.plugin_data.plugin_name in ("scalars", ""):
        array = tensor_util.make_ndarray(value.tensor)
        if array.size == 1 and array.dtype.kind == "f":
            return float(array.item())
    return None

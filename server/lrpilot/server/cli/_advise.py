"""`lrpilot advise …`: how long to warm up, and what is wrong with a loss curve."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, get_args

import typer

from lrpilot.core import MAX_PROGRESS, Adjustment, InvalidSpec, parse_spec
from lrpilot.core._spec import Unit
from lrpilot.server._documents import dump_document, load_document
from lrpilot.server.cli._diagnosis import Diagnosis, Finding, assumed_document, diagnose
from lrpilot.server.cli._failures import command, invalid_fields
from lrpilot.server.cli._losses import LossRow, read_losses
from lrpilot.server.cli._options import CONTEXT, AsJson, LossTag, ValidationTag, examples
from lrpilot.server.cli._output import counted, write_json, write_output
from lrpilot.server.cli._specs import spec_document
from lrpilot.server.cli._warmup import advise_warmup, short_count

_COUNT = re.compile(r"(?P<number>\d{1,18}(\.\d{1,9})?)(?P<size>[KMBT]?)", re.ASCII | re.IGNORECASE)
_SIZES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SHOWN = 3
"""Signs of a trouble that are written out; --json has all."""

app = typer.Typer(
    name="advise",
    help="How long to warm up, and what is wrong with a loss curve, offline.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)


def _count(text: str) -> int:
    match = _COUNT.fullmatch(text.strip())
    number = Fraction(match["number"]) * _SIZES[match["size"].upper()] if match else Fraction(0)
    if number.denominator != 1 or not 0 < number <= 10**18:
        raise typer.BadParameter(f"{text!r} is no whole number above 0, such as 8000, 8B or 1.5T")
    return int(number)


@app.command(
    epilog=examples(
        "lrpilot advise warmup --parameters 8B --batch-tokens 4M --total 50000",
        "lrpilot advise warmup --parameters 405B --batch-tokens 16M --total 15.6T --unit tokens",
    )
)
@command
def warmup(
    *,
    parameters: Annotated[
        str, typer.Option("--parameters", metavar="N", help="Parameters of the model: 8B, 350M.")
    ],
    batch_tokens: Annotated[
        str, typer.Option("--batch-tokens", metavar="N", help="Tokens of a global batch: 4M.")
    ],
    total: Annotated[
        str, typer.Option("--total", metavar="N", help="Planned length of the run in the unit.")
    ],
    unit: Annotated[
        str, typer.Option("--unit", metavar="UNIT", help=f"{', '.join(get_args(Unit))}.")
    ] = "iterations",
    sequence_length: Annotated[
        str | None,
        typer.Option(
            "--sequence-length", metavar="N", help="Tokens of a sample, for --unit samples."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say how long to warm up: from the parameters, the batch and the length of the run."""
    if unit not in get_args(Unit):
        raise typer.BadParameter(f"--unit: {unit!r} is none of {', '.join(get_args(Unit))}")
    if (unit == "samples") != (sequence_length is not None):
        raise typer.BadParameter("--unit samples and --sequence-length go together")
    batch, length = _count(batch_tokens), _count(total)
    if length > MAX_PROGRESS:
        raise typer.BadParameter(f"--total: {length} is above the longest run, {MAX_PROGRESS}")
    # Progress that a step makes.
    step = {
        "iterations": Fraction(1),
        "samples": Fraction(batch, _count(sequence_length or "1")),
        "tokens": Fraction(batch),
    }[unit]
    steps = int(length / step)
    if steps < 1:
        raise typer.BadParameter(f"--total: {length} {unit} are less than one step")
    advice = advise_warmup(_count(parameters), batch, steps)
    in_unit, low, high = (round(n * step) for n in (advice.steps, advice.low, advice.high))
    fragment = {"learning_rate": {"warmup": in_unit}}
    if as_json:
        write_json(
            {
                "warmup": in_unit,
                "unit": unit,
                "low": low,
                "high": high,
                "steps": advice.steps,
                "share": advice.share,
                "reasons": advice.reasons,
                "sources": advice.sources,
                "spec": fragment,
            }
        )
        return
    in_steps = "" if unit == "iterations" else f"{counted(advice.steps, 'step')}, "
    tokens = f"{short_count(advice.steps * batch)} tokens"
    lines = [
        f"warmup: {in_unit:,} {unit} ({in_steps}{100 * advice.share:.3g}% of the run, {tokens})",
        f"usual:  {low:,} to {high:,} {unit}",
        "why:",
        *(f"  {reason}" for reason in advice.reasons),
        "sources:",
        *(f"  {source}" for source in advice.sources),
        "",
    ]
    typer.echo("\n".join(lines))
    typer.echo(dump_document(fragment), nl=False)


@app.command(
    epilog=examples(
        "lrpilot advise losses losses.csv",
        "lrpilot advise losses losses.csv spec.yaml -o better.yaml",
        "lrpilot advise losses runs/my-run --tag 'lm loss' --val-tag 'lm loss validation'",
    )
)
@command
def losses(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Recorded losses: CSV or JSONL (- for standard input), or a TensorBoard run.",
        ),
    ],
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="SPEC",
            help="The spec of the run: a YAML or JSON file, - for standard input, or preset:NAME. "
            "Without it a constant LR after a warmup of 5% is assumed.",
        ),
    ] = None,
    *,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the spec with the remedies there; -: to standard output, and the text to "
            "standard error.",
        ),
    ] = None,
    as_json: AsJson = False,
    tag: LossTag = None,
    val_tag: ValidationTag = None,
) -> None:
    """Say what is wrong with recorded losses, where it shows, and which spec change answers it.

    The policies look, in mode advise; the remedy lets those that saw something act.
    """
    if output is not None and spec is None:
        raise typer.BadParameter("-o writes a changed spec: give SPEC too")
    if output == "-" and as_json:
        raise typer.BadParameter("--json and -o - both write to standard output")
    if source == "-" and spec == "-":
        raise typer.BadParameter("FILE and SPEC cannot both be standard input")
    document = None if spec is None else _document(spec)
    rows = read_losses(source, tag=tag, validation_tag=val_tag)
    diagnosis = diagnose(assumed_document(rows) if document is None else document, rows)
    changed = any(finding.policies for finding in diagnosis.findings)
    written = output if output is not None and changed else None
    if written is not None and document is not None:
        write_output(written, [dump_document(diagnosis.document).encode()])
    tags = ["--tag", tag] if tag is not None else []
    tags += ["--val-tag", val_tag] if val_tag is not None else []
    simulate = None
    if written is not None:
        simulate = shlex.join(["lrpilot", "simulate", written, "--losses", source, *tags])
    if as_json:
        write_json(_as_mapping(diagnosis, rows, simulate))
        return
    lines = list(_lines(diagnosis, rows, assumed=document is None))
    if simulate is not None:
        lines += ["", f"wrote {written}; see what it would have done:", f"  {simulate}"]
    elif output is not None:
        lines += ["", f"{output} is not written: there is nothing to change"]
    elif changed:
        again = ["lrpilot", "advise", "losses", source, spec or "SPEC", *tags, "-o", "better.yaml"]
        lines += ["", "to get the changed spec:", f"  {shlex.join(again)}"]
    typer.echo("\n".join(lines), err=output == "-")


def _document(source: str) -> dict[str, Any]:
    """Return a spec as its author wrote it; CommandError names every violation."""
    text = spec_document(source)
    try:
        document = load_document(text)
        parse_spec(document)
    except InvalidSpec as error:
        raise invalid_fields("standard input" if source == "-" else source, error) from None
    return document


def _lines(diagnosis: Diagnosis, rows: Sequence[LossRow], *, assumed: bool) -> Iterator[str]:
    first, last = rows[0].progress, rows[-1].progress
    count = sum(row.loss is not None for row in rows)
    yield f"{counted(count, 'loss')} from {first:,} to {last:,}"
    if assumed:
        warmup = assumed_document(rows)["learning_rate"]["warmup"]
        yield f"no spec given: a constant LR after a warmup of {warmup:,} is assumed"
    for trouble, why in diagnosis.not_looked_for:
        yield f"{trouble}: not looked for, as {why}"
    if not diagnosis.findings:
        yield "no trouble found"
    for number, finding in enumerate(diagnosis.findings, 1):
        yield ""
        yield from _finding_lines(number, finding)


def _finding_lines(number: int, finding: Finding) -> Iterator[str]:
    signs = finding.signs
    first, last = signs[0].decided_at, signs[-1].decided_at
    where = f"at {first:,}" if first == last else f"from {first:,} to {last:,}"
    yield f"{number}. {finding.trouble}: {counted(len(signs), 'sign')}, {where}"
    for item in signs[:_SHOWN]:
        yield f"     at {item.decided_at:,}: {item.reason}"
    if len(signs) > _SHOWN:
        yield f"     and {len(signs) - _SHOWN:,} more"
    yield f"   remedy: {_remedy(finding)}"
    if finding.policies:
        document = dump_document({"policies": [dict(item) for item in finding.policies]})
        yield from (f"     {line}" for line in document.splitlines())


def _remedy(finding: Finding) -> str:
    if finding.is_late:
        return "mend the divergence first, of which it may be a consequence"
    if finding.policies:
        return f"let the policy act; or {finding.otherwise}"
    return f"the spec lets the policy act already; else {finding.otherwise}"


def _as_mapping(
    diagnosis: Diagnosis, rows: Sequence[LossRow], simulate: str | None
) -> Mapping[str, Any]:
    changed = any(finding.policies for finding in diagnosis.findings)
    return {
        "losses": sum(row.loss is not None for row in rows),
        "first": rows[0].progress,
        "last": rows[-1].progress,
        "findings": [
            {
                "trouble": finding.trouble,
                "policy": finding.kind,
                "seen": [_sign(item) for item in finding.seen],
                "after_divergence": finding.is_late,
                "remedy": _remedy(finding),
                "spec": {"policies": finding.policies} if finding.policies else None,
            }
            for finding in diagnosis.findings
        ],
        "not_looked_for": [
            {"trouble": trouble, "why": why} for trouble, why in diagnosis.not_looked_for
        ],
        "spec": {"policies": diagnosis.document["policies"]} if changed else None,
        "simulate": simulate,
    }


def _sign(item: Adjustment) -> Mapping[str, Any]:
    return {"progress": item.decided_at, "reason": item.reason, "would": item.summary}

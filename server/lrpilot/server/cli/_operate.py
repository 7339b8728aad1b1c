"""`lrpilot run adjust|hold|release|approve|revise`: what operators do to a run.

Each takes effect from the horizon on, on every rank at the same step. Each is signed with a reason
and an author, can be tried with `--dry-run`, and can be bound with `--etag` to the plan that the
dry run has shown.
"""

import enum
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from lrpilot.core import ENDABLE
from lrpilot.core._errors import InvalidSpec, Violation
from lrpilot.server._author import caller
from lrpilot.server._documents import load_document
from lrpilot.server.cli._effect import (
    Answer,
    Effect,
    change_lines,
    effect_fields,
    effect_of,
    value_lines,
)
from lrpilot.server.cli._failures import command, invalid_fields
from lrpilot.server.cli._options import (
    SERVER,
    TIMEOUT_S,
    AsJson,
    RunArgument,
    Server,
    SpecArgument,
    TimeoutS,
    examples,
)
from lrpilot.server.cli._output import check_output, needs, picture_form, write_json, write_output
from lrpilot.server.cli._remote import Runs, connected
from lrpilot.server.cli._specs import spec_document
from lrpilot.v1 import runs_pb2

LARGEST = 2**63 - 1
"""Progress is an int64 on the wire."""

Reason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why, for those who read the log.")
]
OptionalReason = Annotated[
    str, typer.Option("--reason", metavar="TEXT", help="Why, beside the reason of the advice.")
]
Author = Annotated[
    str | None,
    typer.Option("--author", metavar="NAME", help="Who, for the log. Default: USER@HOST."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what it would do, and do nothing.")]
Etag = Annotated[
    str,
    typer.Option(
        "--etag", metavar="TAG", help="Only if the plan is still the one that a dry run showed."
    ),
]
Picture = Annotated[
    str | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Draw LR and WD before and after into FILE, which ends in .png or .svg.",
    ),
]


class Directive(str, enum.Enum):
    """What the trainers can be asked for."""

    ROLLBACK = "rollback"
    SKIP = "skip"
    EVALUATE = "evaluate"
    STOP = "stop"


_FIELDS = {
    "--scale-lr": "scale_lr",
    "--set-lr": "set_lr",
    "--scale-wd": "scale_weight_decay",
    "--begin-decay": "begin_decay",
    "--next-stage": "next_stage",
    "--total": "total",
    "--undo": "undo",
    "--ask": "directive",
}
"""Options of `adjust` to the fields of the request that they are."""

_OWNERS: Mapping[str, tuple[str, tuple[Directive, ...]]] = {
    "--style": ("--begin-decay", ()),
    "--before": ("--ask", (Directive.ROLLBACK,)),
    "--factor": ("--ask", (Directive.ROLLBACK,)),
    "--until": ("--ask", (Directive.ROLLBACK, Directive.SKIP)),
}
"""Options of `adjust` that say more of a change: the option and the values that they go with."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How an operator's command is to be carried out, and how its answer is wanted."""

    words: tuple[str, ...]
    """The command line that says what to do, without what this class holds."""
    reason: str
    author: str | None
    dry_run: bool
    etag: str
    picture: str | None
    server: str
    as_json: bool
    timeout_s: float

    @property
    def signature(self) -> dict[str, Any]:
        """The fields that every request of an operator has."""
        return {
            "reason": self.reason,
            "author": caller() if self.author is None else self.author,
            "dry_run": self.dry_run,
            "etag": self.etag,
        }

    def repeated(self, etag: str) -> str:
        """Return the command line that carries out what a dry run of it has shown."""
        words = [*self.words]
        words += ["--reason", self.reason] if self.reason else []
        words += ["--author", self.author] if self.author is not None else []
        words += ["--etag", etag]
        words += ["-o", self.picture] if self.picture is not None else []
        words += ["--server", self.server] if self.server != SERVER else []
        return shlex.join(words)


@command
def adjust(
    name: RunArgument,
    *,
    reason: Reason,
    scale_lr: Annotated[
        float | None, typer.Option("--scale-lr", metavar="F", help="Multiply every group's LR.")
    ] = None,
    set_lr: Annotated[
        float | None,
        typer.Option(
            "--set-lr", metavar="X", help="Set the first group's LR; the others move alike."
        ),
    ] = None,
    scale_wd: Annotated[
        float | None, typer.Option("--scale-wd", metavar="F", help="Multiply every group's WD.")
    ] = None,
    begin_decay: Annotated[
        str | None,
        typer.Option(
            "--begin-decay",
            metavar="LENGTH",
            help="Anneal the LR over so much progress, or such a share of the progress so far "
            "(10%).",
        ),
    ] = None,
    style: Annotated[
        str | None,
        typer.Option(
            "--style",
            metavar="STYLE",
            help="With --begin-decay: exponential, linear, cosine or minus_sqrt (the default).",
        ),
    ] = None,
    next_stage: Annotated[
        bool, typer.Option("--next-stage", help="Leave the stage in force.")
    ] = False,
    total: Annotated[
        int | None,
        typer.Option(
            "--total",
            metavar="N",
            min=0,
            max=LARGEST,
            help="Extend or shorten the run; what ended with it ends with it still.",
        ),
    ] = None,
    undo: Annotated[
        str | None,
        typer.Option("--undo", metavar="ID", help="Take an adjustment back: `run show` has ids."),
    ] = None,
    ask: Annotated[
        Directive | None,
        typer.Option("--ask", help="Ask the trainers for something, at one step on every rank."),
    ] = None,
    before: Annotated[
        int | None,
        typer.Option(
            "--before",
            metavar="N",
            min=1,
            max=LARGEST,
            help="With --ask rollback: where the damage began.",
        ),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(
            "--factor",
            metavar="F",
            help="With --ask rollback: what the LR is multiplied by from there. Default: 0.5.",
        ),
    ] = None,
    until: Annotated[
        int | None,
        typer.Option(
            "--until",
            metavar="N",
            min=1,
            max=LARGEST,
            help="With --ask rollback or skip: up to where the data is suspect.",
        ),
    ] = None,
    author: Author = None,
    dry_run: DryRun = False,
    etag: Etag = "",
    picture: Picture = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Change the plan of a run from its horizon on; exactly one change at a time."""
    asked: dict[str, Any] = {
        "--scale-lr": scale_lr,
        "--set-lr": set_lr,
        "--scale-wd": scale_wd,
        "--begin-decay": begin_decay,
        "--next-stage": next_stage or None,
        "--total": total,
        "--undo": undo,
        "--ask": ask,
    }
    given = [option for option, value in asked.items() if value is not None]
    if len(given) != 1:
        got = " and ".join(given) or "none"
        raise typer.BadParameter(f"got {got}; give exactly one of {', '.join(asked)}")
    option, value = given[0], asked[given[0]]
    more = {"--style": style, "--before": before, "--factor": factor, "--until": until}
    details = {key: detail for key, detail in more.items() if detail is not None}
    _check_details(option, value, details)
    words = ["lrpilot", "run", "adjust", name, *_words(option, value)]
    for item in details.items():
        words += _words(*item)
    _adjust(
        name,
        _action(option, value, details),
        "nothing is to be done",
        Wish(
            words=tuple(words),
            reason=reason,
            author=author,
            dry_run=dry_run,
            etag=etag,
            picture=picture,
            server=server,
            as_json=as_json,
            timeout_s=timeout_s,
        ),
    )


@command
def hold(
    name: RunArgument,
    *,
    reason: Reason,
    author: Author = None,
    dry_run: DryRun = False,
    etag: Etag = "",
    picture: Picture = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Freeze LR and WD at their values at the horizon, until a release."""
    _adjust(
        name,
        runs_pb2.AdjustRunRequest(hold=True),
        "it is held already",
        Wish(
            words=("lrpilot", "run", "hold", name),
            reason=reason,
            author=author,
            dry_run=dry_run,
            etag=etag,
            picture=picture,
            server=server,
            as_json=as_json,
            timeout_s=timeout_s,
        ),
    )


@command
def release(
    name: RunArgument,
    *,
    reason: Reason,
    author: Author = None,
    dry_run: DryRun = False,
    etag: Etag = "",
    picture: Picture = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """End every hold: LR and WD return to the schedule at the progress reached."""
    _adjust(
        name,
        runs_pb2.AdjustRunRequest(release=True),
        "it is not held",
        Wish(
            words=("lrpilot", "run", "release", name),
            reason=reason,
            author=author,
            dry_run=dry_run,
            etag=etag,
            picture=picture,
            server=server,
            as_json=as_json,
            timeout_s=timeout_s,
        ),
    )


@command
def approve(
    name: RunArgument,
    advice: Annotated[
        str, typer.Argument(metavar="ADVICE_ID", help="Id of the advice; `run show` has it.")
    ],
    *,
    reason: OptionalReason = "",
    author: Author = None,
    dry_run: DryRun = False,
    etag: Etag = "",
    picture: Picture = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Turn an advice into an adjustment, from the horizon on."""
    wish = Wish(
        words=("lrpilot", "run", "approve", name, advice),
        reason=reason,
        author=author,
        dry_run=dry_run,
        etag=etag,
        picture=picture,
        server=server,
        as_json=as_json,
        timeout_s=timeout_s,
    )
    request = runs_pb2.ApproveAdviceRequest(run=name, advice=advice, **wish.signature)
    _carry_out(wish, lambda runs: runs.approve(request), "nothing is to be done")


@command
def revise(
    source: SpecArgument,
    *,
    reason: Reason,
    author: Author = None,
    dry_run: DryRun = False,
    etag: Etag = "",
    picture: Picture = None,
    server: Server = SERVER,
    as_json: AsJson = False,
    timeout_s: TimeoutS = TIMEOUT_S,
) -> None:
    """Give the run that a spec names this spec, from its horizon on."""
    wish = Wish(
        words=("lrpilot", "run", "revise", source),
        reason=reason,
        author=author,
        dry_run=dry_run,
        etag=etag,
        picture=picture,
        server=server,
        as_json=as_json,
        timeout_s=timeout_s,
    )
    document = spec_document(source)
    # The server checks the spec; all that is needed here is the run to ask it about.
    name = _name_in(document, source)
    request = runs_pb2.ReviseRunRequest(run=name, spec_document=document, **wish.signature)
    _carry_out(wish, lambda runs: runs.revise(request), "it has that spec already")


COMMANDS: Sequence[tuple[Callable[..., None], str]] = (
    (
        adjust,
        examples(
            "lrpilot run adjust my-run --scale-lr 0.5 --reason 'loss oscillates' --dry-run",
            "lrpilot run adjust my-run --begin-decay 10% --reason 'budget ends' -o anneal.png",
            "lrpilot run adjust my-run --undo 812-804-3000 --reason 'no better'",
            "lrpilot run adjust my-run --ask rollback --before 41000 --reason 'diverged'",
        ),
    ),
    (hold, examples("lrpilot run hold my-run --reason 'cluster maintenance'")),
    (release, examples("lrpilot run release my-run --reason 'maintenance is over'")),
    (
        approve,
        examples(
            "lrpilot run approve my-run 812-804-0 --dry-run -o advice.png",
            "lrpilot run approve my-run 812-804-0 --reason 'validation loss agrees'",
        ),
    ),
    (
        revise,
        examples(
            "lrpilot run revise spec.yaml --reason 'longer run' --dry-run -o both.png",
            "lrpilot run revise spec.yaml --reason 'longer run' --etag 0123456789abcdef",
        ),
    ),
)
"""The commands of this file with their examples, in the order in which `run -h` lists them."""


def _adjust(name: str, request: runs_pb2.AdjustRunRequest, unchanged: str, wish: Wish) -> None:
    request.MergeFrom(runs_pb2.AdjustRunRequest(run=name, **wish.signature))
    _carry_out(wish, lambda runs: runs.adjust(request), unchanged)


def _carry_out(wish: Wish, call: Callable[[Runs], Answer], unchanged: str) -> None:
    """Call the server and show its answer; `unchanged` says why nothing was done."""
    draw = None if wish.picture is None else _drawing(wish.picture)
    check_output(wish.picture)
    with connected(wish.server, wish.timeout_s) as runs:
        effect = effect_of(call(runs), is_dry=wish.dry_run)
    if wish.as_json:
        write_json(effect_fields(effect))
    elif effect.is_unchanged:
        typer.echo(f"unchanged: {effect.run.name}: {unchanged}")
    else:
        _say(effect, wish)
    if draw is not None and effect.preview:
        write_output(wish.picture, [draw(effect)])


def _say(effect: Effect, wish: Wish) -> None:
    typer.echo(f"dry run, nothing changed; {effect.title}" if effect.is_dry else effect.title)
    for line in change_lines(effect.changes):
        typer.echo(f"  {line}")
    for line in value_lines(effect):
        typer.echo(f"  {line}")
    if effect.is_pending:
        typer.echo("leader mode: later, if the job has gone on alone beyond that progress")
    made = effect.adjustment
    if effect.is_dry:
        typer.echo(f"carry it out with\n  {wish.repeated(effect.run.etag)}")
    elif made is not None and made.action in {kind.action for kind in ENDABLE}:
        undo = ["lrpilot", "run", "adjust", effect.run.name, "--undo", made.id]
        undo += ["--server", wish.server] if wish.server != SERVER else []
        typer.echo(f"id {made.id}; take it back with\n  {shlex.join(undo)} --reason …")
    elif made is not None:
        typer.echo(f"id {made.id}")


def _drawing(picture: str) -> Callable[[Effect], bytes]:
    """Return what draws; before the call, so that nothing is done where it cannot be drawn."""
    form = picture_form(picture)
    with needs("matplotlib"):
        # A second to import, and nothing else needs it.
        from lrpilot.server.cli._plot_change import draw_change  # noqa: PLC0415
    return lambda effect: draw_change(effect, form)


def _check_details(option: str, value: Any, details: Mapping[str, Any]) -> None:
    """Refuse options that say more of a change that is not asked for."""
    for detail in details:
        owner, values = _OWNERS[detail]
        if option != owner or (values and value not in values):
            shown = " or ".join(f"{owner} {item.value}" for item in values) or owner
            raise typer.BadParameter(f"{detail} goes with {shown}")
    if value is Directive.ROLLBACK and "--before" not in details:
        raise typer.BadParameter("--ask rollback needs --before N: where the damage began")
    factor = details.get("--factor", 1.0)
    # On the wire 0 says nothing.
    if not 0.0 < factor <= 1.0:
        raise typer.BadParameter(f"--factor: got {factor}; allowed: above 0 and up to 1")


def _action(option: str, value: Any, details: Mapping[str, Any]) -> runs_pb2.AdjustRunRequest:
    """Return the request that asks for a change, not signed yet."""
    # Each detail is a field by its own name.
    more: dict[str, Any] = {name.removeprefix("--"): detail for name, detail in details.items()}
    if option == "--begin-decay":
        value = runs_pb2.BeginDecay(length=value, **more)
    elif option == "--ask":
        value = runs_pb2.DirectiveRequest(kind=value.value, **more)
    action: dict[str, Any] = {_FIELDS[option]: value}
    return runs_pb2.AdjustRunRequest(**action)


def _words(option: str, value: Any) -> tuple[str, ...]:
    """Return an option as the words of a command line."""
    if value is True:
        return (option,)
    return (option, value.value if isinstance(value, enum.Enum) else str(value))


def _name_in(document: str, source: str) -> str:
    try:
        name = load_document(document).get("name")
    except InvalidSpec as error:
        raise invalid_fields(source, error) from None
    if not isinstance(name, str):
        missing = Violation("name", repr(name), "the name of the run to revise")
        raise invalid_fields(source, InvalidSpec("the run spec is invalid", [missing]))
    return name

"""`lrpilot preset …`: known configurations as specs."""

import json
import textwrap
from typing import Annotated

import typer

from lrpilot.core import PRESETS, Preset
from lrpilot.server._documents import dump_document
from lrpilot.server.cli._failures import INVALID, CommandError, command
from lrpilot.server.cli._options import CONTEXT, AsJson, examples
from lrpilot.server.cli._output import table_lines, write_json

PREFIX = "preset:"
"""What a SPEC begins with that names a preset."""

app = typer.Typer(
    name="preset",
    help="Known configurations as specs, to start from.",
    no_args_is_help=True,
    context_settings=CONTEXT,
)


def preset_names() -> tuple[str, ...]:
    """Return the names of the presets."""
    return tuple(PRESETS)


def preset_document(name: str) -> str:
    """Return a preset as a YAML document that begins with where its numbers come from."""
    preset = _preset(name)
    notes = textwrap.wrap(f"{preset.summary}. {preset.source}", 96)
    return "".join(f"# {note}\n" for note in notes) + dump_document(preset.spec.to_mapping())


@app.command("list", epilog=examples("lrpilot preset list"))
@command
def list_presets(as_json: AsJson = False) -> None:
    """List the presets: their names, and what each is."""
    if as_json:
        for name, preset in PRESETS.items():
            write_json({"name": name, "summary": preset.summary, "source": preset.source})
        return
    rows = [(name, preset.summary) for name, preset in PRESETS.items()]
    for line in table_lines(("preset", "what"), rows, left=2):
        typer.echo(line)


@app.command(
    epilog=examples(
        "lrpilot preset show llama3-8b-fp8 > spec.yaml",
        "lrpilot preset show llama3-8b-fp8 --json",
    )
)
@command
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of the preset.", autocompletion=lambda: list(preset_names())
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Write a preset as a spec, every default filled in."""
    if as_json:
        typer.echo(json.dumps(_preset(name).spec.to_mapping(), indent=2))
    else:
        typer.echo(preset_document(name), nl=False)


def _preset(name: str) -> Preset:
    try:
        return PRESETS[name]
    except KeyError:
        known = ", ".join(PRESETS)
        raise CommandError(f"no preset {name!r}; the presets are {known}", INVALID) from None

"""The program `lrpilot`, assembled from its commands."""

import sys
from importlib import metadata
from typing import Annotated

import typer

from lrpilot.server.cli import _advise, _presets, _runs
from lrpilot.server.cli._curve import curve
from lrpilot.server.cli._options import CONTEXT, examples
from lrpilot.server.cli._serve import serve
from lrpilot.server.cli._simulate import simulate

app = typer.Typer(
    name="lrpilot",
    no_args_is_help=True,
    context_settings=CONTEXT,
    # A traceback is for errors of ours, and then it should be whole.
    pretty_exceptions_enable=False,
    epilog=examples(
        "lrpilot serve --data /var/lib/lrpilot",
        "lrpilot curve preset:llama3-8b-fp8 -o curve.png",
        "lrpilot run show my-run",
    )
    + "\n\nExit codes: 0 done; 1 refused by the server, unknown run, or serve could not start; "
    "2 wrong usage or invalid spec; 3 no answer from the server.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lrpilot {_version()}")
        raise typer.Exit


@app.callback()
def lrpilot(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
        ),
    ] = False,
) -> None:
    """The autopilot for learning rates: one server holds the LR and WD of every training run."""


app.command(
    epilog=examples(
        "lrpilot serve --data /var/lib/lrpilot",
        "lrpilot serve --config /etc/lrpilot.yaml --log-level warning",
        "lrpilot serve --listen 0.0.0.0:50051 --http 0.0.0.0:50052 --insecure",
    )
)(serve)
app.command(
    epilog=examples(
        "lrpilot curve spec.yaml",
        "lrpilot curve spec.yaml --at 0,1000,50000 --format jsonl",
        "lrpilot curve spec.yaml --group embedding --every 100 -o embedding.jsonl",
        "lrpilot curve preset:gpt3-175b -o curve.png",
    )
)(curve)
app.command(
    epilog=examples(
        "lrpilot simulate spec.yaml --losses losses.csv",
        "lrpilot simulate spec.yaml --losses losses.jsonl --format jsonl",
        "lrpilot simulate spec.yaml --losses runs/my-run --tag 'lm loss' -o simulation.png",
    )
)(simulate)
app.add_typer(_advise.app)
app.add_typer(_runs.app)
app.add_typer(_presets.app)


def main() -> None:
    """Run the program; the console script `lrpilot`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal without Unicode shows a question mark rather than a traceback.
            stream.reconfigure(errors="replace")
    app(prog_name="lrpilot")


def _version() -> str:
    try:
        return metadata.version("lrpilot")
    except metadata.PackageNotFoundError:
        # Run from a checkout that is not installed.
        return "unknown"

"""Draws docs/images/watch.svg, the screen of `lrpilot run watch`.

    python scripts/draw_watch.py [FILE]

A real server and a real client; the losses are made up and always the same. Times of day on the
screen differ from run to run.
"""

import argparse
import io
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console

import lrpilot.client as lrpilot
from lrpilot.server.cli._remote import connected
from lrpilot.server.cli._screen import OneRun, Screen

ROOT = Path(__file__).resolve().parents[1]
RUN = "llama3-8b"
WIDTH, HEIGHT = 120, 42
STEPS, TOTAL = 6_400, 12_000
SPEC: dict[str, Any] = {
    "name": RUN,
    "total": TOTAL,
    "learning_rate": {"peak": 2e-4, "min": 1e-5, "warmup": 400, "decay": {"style": "cosine"}},
    "weight_decay": {"start": 0.05, "end": 0.1, "style": "linear", "over": TOTAL},
    "policies": [
        {"kind": "plateau", "factor": 0.5, "patience": 1, "window": 100, "cooldown": 4000},
        {"kind": "overfit", "metric": "val_loss", "mode": "advise", "window": 100},
    ],
    "feedback": {"delay": 64},
}


class Optimizer:
    """One parameter group without parameters."""

    def __init__(self) -> None:
        self.param_groups: list[dict[str, Any]] = [{"lr": 0.0, "weight_decay": 0.0}]


def train(address: str) -> None:
    """Report the losses of a run that stops falling, has a NaN and a spike, and falls again."""
    noise = random.Random(1)
    with lrpilot.connect(address, run=RUN, spec=json.dumps(SPEC), resume_at=0) as pilot:
        scheduler = pilot.scheduler(Optimizer())
        for n in range(STEPS):
            falling = 2.6 + 3.0 * math.exp(-n / 500) - 0.5 * (1 - math.exp(-max(0, n - 3400) / 800))
            loss = falling + noise.gauss(0.0, 0.06)
            loss = math.nan if n == 1_900 else 4.6 if 5_200 <= n < 5_206 else loss
            rising = max(0, n - 4_500) / 4_000
            scheduler.step(loss=loss, val_losses={} if n % 100 else {"val_loss": falling + rising})


def screen(address: str) -> str:
    """Return the screen as SVG, without fonts from elsewhere."""
    console = Console(
        file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT, force_terminal=True,
        color_system="standard", highlight=False, legacy_windows=False, _environ={},
    )  # fmt: skip
    with connected(address, 30.0) as runs:
        view = OneRun(runs, RUN, log=False, group=None)()
    console.print(Screen(view, None), height=HEIGHT)
    layout = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    return console.export_svg(
        title=f"lrpilot run watch {RUN}",
        code_format=layout.replace("Fira Code", "DejaVu Sans Mono"),
        unique_id="watch",
    )


def ready(said: Path) -> str:
    """Return where a server listens, once it has said so."""
    for _ in range(600):
        if "grpc=" in (text := said.read_text()):
            return text.split("grpc=")[1].split()[0]
        time.sleep(0.1)
    raise TimeoutError("the server does not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = ROOT / "docs" / "images" / "watch.svg"
    parser.add_argument("file", nargs="?", type=Path, default=default, metavar="FILE")
    target: Path = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        options = ["--data", folder, "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
        said = Path(folder, "said")
        with said.open("w") as file:
            server = subprocess.Popen(
                [sys.executable, "-m", "lrpilot.server.cli", "serve", *options],
                stdout=file,
                stderr=subprocess.DEVNULL,
            )
        try:
            address = ready(said)
            train(address)
            target.write_text(screen(address), encoding="utf-8")
        finally:
            server.terminate()
            server.wait(timeout=30)
    print(f"wrote {target}")


if __name__ == "__main__":
    main()

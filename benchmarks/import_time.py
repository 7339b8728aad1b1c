"""What importing lrpilot.client costs each rank, and what `pip install lrpilot` brings.

Each import is timed in fresh interpreters, in turns, less the start of one that imports nothing.
The distributions are found in the metadata of what is installed here, without extras.

    python benchmarks/import_time.py --repeat 10
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from importlib import metadata

IMPORTS = ("lrpilot.client", "grpc", "torch")

out = sys.stdout.write


def run_s(statement: str) -> float:
    """Return the seconds from the start of an interpreter that runs a statement to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)  # noqa: S603 (this interpreter)
    return time.perf_counter() - begin


def requirements(name: str) -> list[str]:
    """Return the distributions that one asks for on this machine without extras."""
    found = []
    for line in metadata.requires(name) or []:
        wanted, _, marker = line.partition(";")
        # What is for an extra is not brought; no other marker is in use here.
        if "extra ==" not in marker:
            found.append(re.split(r"[^A-Za-z0-9._-]", wanted.strip(), maxsplit=1)[0])
    return found


def brought_by(name: str) -> list[str]:
    """Return a distribution and all that it brings, in the order in which they are met."""
    found, ahead = [name], [name]
    while ahead:
        for item in requirements(ahead.pop(0)):
            if item not in found:
                found.append(item)
                ahead.append(item)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=10, help="imports of each (%(default)s)")
    repeat = parser.parse_args().repeat
    times: dict[str, list[float]] = {name: [] for name in ("pass", *IMPORTS)}
    for turn in range(repeat + 1):
        for name, taken in times.items():
            sys.stderr.write(f"turn {turn} of {repeat}: {name}\x1b[K\r")
            seconds = run_s("pass" if name == "pass" else f"import {name}")
            if turn:  # The first brings the files into memory.
                taken.append(seconds)
    sys.stderr.write("\x1b[K")
    nothing = statistics.median(times.pop("pass"))
    out(f"Python {sys.version.split()[0]}, median of {repeat}, beyond a start of ")
    out(f"{nothing * 1000:.0f} ms\n\n{'import':<20}{'ms':>8}\n")
    for name, taken in times.items():
        out(f"{name:<20}{(statistics.median(taken) - nothing) * 1000:>8.0f}\n")
    brought = brought_by("lrpilot")
    out(f"\npip install lrpilot brings {len(brought)} distributions\n\n")
    for name in brought:
        out(f"{name:<20}{metadata.version(name):>12}\n")


if __name__ == "__main__":
    main()

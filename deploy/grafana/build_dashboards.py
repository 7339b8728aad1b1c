"""Write the dashboards as JSON: python deploy/grafana/build_dashboards.py [FOLDER]

The folder is deploy/grafana/dashboards unless another one is given. What is there is committed, and
a test builds it anew and compares.
"""

import json
import sys
from pathlib import Path

from fleet import fleet
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from run import run
from service import service


def main() -> None:
    """Write each dashboard to a file of its own."""
    default = Path(__file__).parent / "dashboards"
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in {"run": run, "fleet": fleet, "service": service}.items():
        path = folder / f"{name}.json"
        path.write_text(_as_json(make()) + "\n")


def _as_json(builder: dashboard.Dashboard) -> str:
    built = builder.build()
    for number, panel in enumerate(built.panels or (), 1):
        panel.id_val = number
    return json.dumps(built, cls=JSONEncoder, indent=2, sort_keys=True)


if __name__ == "__main__":
    main()

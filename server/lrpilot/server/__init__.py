"""The server of lrpilot, and the program `lrpilot`. It is run, not imported: see docs/server.md."""

from importlib.util import find_spec as _find_spec

if _missing := [name for name in ("pydantic", "sqlalchemy", "typer") if _find_spec(name) is None]:
    raise ImportError(
        f"lrpilot.server needs {', '.join(_missing)}, which the thin client leaves out: "
        "pip install 'lrpilot[server]'"
    )

"""What the server answers over HTTP: metrics, probes, the page and what it is made of."""

from lrpilot.server.web._http import listen
from lrpilot.server.web._web import Web

__all__ = ["Web", "listen"]

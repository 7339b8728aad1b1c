"""Who may ask for what: nobody has a password, so the way by which somebody comes must do.

On a loopback address whoever is on the machine may look and act, as with gRPC. But a browser on
the machine carries the requests of every page that is open in it. Such a page is kept out by
what browsers say of each request and no page can change: `Host` (a page of another site whose
name was made to lead here, DNS rebinding, gives its own name), `Origin` and `Sec-Fetch-Site`.
"""

import ipaddress
import re
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What each answer asks of browsers: nothing from elsewhere, and nobody looks in."""

_PROXIES = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP")
"""What a proxy between a browser and here adds, unless it was told not to."""

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(?::[0-9]*)?", re.ASCII)


class Access:
    """What may be done over one listening socket."""

    MISDIRECTED = "this server is asked for by localhost, 127.0.0.1 or [::1], with any port"

    def __init__(self, host: str, listener: socket.socket) -> None:
        self._is_loopback = _is_loopback(listener.getsockname()[0])
        # A name of this machine's own that leads to loopback, where it was bound by that.
        self._name = host.strip("[]").lower()

    def is_misdirected(self, headers: Headers) -> bool:
        """Return whether a request is meant for another host than this machine's loopback.

        Any port will do: people come through tunnels. Beyond loopback any name will do.
        """
        return self._is_loopback and not self._is_ours(headers.get("Host", ""))

    def why_read_only(self, headers: Headers) -> str | None:
        """Return why whoever sent these headers may change nothing, for people; None: may."""
        if not self._is_loopback:
            return (
                "the server listens beyond this machine, and there are no passwords: "
                "serve --http on a loopback address to act from the page"
            )
        if self.is_misdirected(headers):
            return "the address in the browser is not a loopback address"
        if any(name in headers for name in _PROXIES):
            return "this came through a proxy, and there are no passwords"
        return None

    def _is_ours(self, host: str) -> bool:
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found.group(1).strip("[]").removesuffix(".")
        return name in {"localhost", self._name} or _is_loopback(name)


def is_foreign(headers: Headers) -> bool:
    """Return whether a page of another site sent a request, or may have."""
    site = headers.get("Sec-Fetch-Site", "none")
    if site not in {"same-origin", "none"}:
        return True
    origin = headers.get("Origin")
    return origin is not None and origin.partition("://")[2] != headers.get("Host")


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


class Guarded:
    """An application whose answers carry `HEADERS`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_guarded)

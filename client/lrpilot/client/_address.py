"""Where the server is: what users write, and what gRPC takes."""

import ipaddress
import json
import logging
import re
import socket
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from lrpilot.client._arguments import text
from lrpilot.client._errors import invalid_argument

logger = logging.getLogger("lrpilot.client")

ALLOWED = (
    "HOST:PORT; several of them with commas between, all reached by IPv4 or all by IPv6; or one "
    "of gRPC's targets dns:///HOST:PORT, ipv4:ADDRESS:PORT, ipv6:[ADDRESS]:PORT, unix:PATH"
)

_SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        # The empty name is the server as a whole: it says so while it ends, too.
        "healthCheckConfig": {"serviceName": ""},
    }
)

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?", re.ASCII)

_FAMILIES = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


@dataclass(frozen=True)
class Target:
    """A server, or several of them, as gRPC takes it."""

    name: str
    """Target of a channel."""
    has_several: bool
    """Whether it may stand for several servers."""

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Channel options that it needs beside those of every channel.

        Several servers are asked in turn, each while its health service says that it serves. To
        watch that takes one call more at each connection, which a single server is spared.
        """
        return (("grpc.service_config", _SERVICE_CONFIG),) if self.has_several else ()


@dataclass(frozen=True)
class _Place:
    """One HOST:PORT."""

    host: str
    port: int
    kind: Literal["name", "ipv4", "ipv6"]

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.kind == "ipv6" else self.host
        return f"{host}:{self.port}"


def read_target(address: object) -> Target:
    """Return the target that an address stands for; names in a list are looked up now.

    A name that stands alone is left to gRPC, which looks it up again when connections fail, and
    takes every host that it finds. Raises InvalidArgument.
    """
    given = text("address", address).strip()
    scheme, _, rest = given.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return Target(given, has_several=False) if rest.strip("/") else _refuse(address)
    if scheme == "dns":
        place = _read_place(rest.rpartition("/")[2], address)
        return Target(given, has_several=place.kind == "name")
    if scheme in _FAMILIES:
        places = [_read_place(item, address) for item in rest.split(",")]
        if any(place.kind != scheme for place in places):
            _refuse(address)
        return _literal(scheme, places)
    places = [_read_place(item, address) for item in given.split(",")]
    if len(places) == 1 and places[0].kind == "name":
        return Target(f"dns:///{places[0]}", has_several=True)
    return _literal(*_look_up(places, address))


def _literal(scheme: str, places: list[_Place]) -> Target:
    return Target(f"{scheme}:{','.join(map(str, places))}", has_several=len(places) > 1)


def _read_place(item: str, address: object) -> _Place:
    host, _, port = item.strip().rpartition(":")
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        _refuse(address, f"with a port from 1 to 65535 behind {item.strip()!r}")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        literal = ipaddress.ip_address(host[1:-1] if bracketed else host)
    except ValueError:
        if bracketed or not _HOST.fullmatch(host):
            _refuse(address)
        return _Place(host, int(port), "name")
    if bracketed != (literal.version == 6):
        # Without brackets nobody can tell the port of an IPv6 address.
        _refuse(address)
    return _Place(str(literal), int(port), "ipv6" if bracketed else "ipv4")


def _look_up(places: list[_Place], address: object) -> tuple[str, list[_Place]]:
    """Return the places with names replaced by what they stand for, of one family."""
    found = {place: _addresses(place) for place in places}
    for place in places:
        if not found[place]:
            logger.warning("the host %r of the address %r cannot be found", place.host, address)
    known = [place for place in places if found[place]]
    if not known:
        _refuse(address, "with at least one host that can be found")
    for scheme in ("ipv4", "ipv6"):
        chosen = [[item for item in found[place] if item.kind == scheme] for place in known]
        if all(chosen):
            # Two names may stand for one host.
            return scheme, list(dict.fromkeys(item for items in chosen for item in items))
    return _refuse(address)


def _addresses(place: _Place) -> list[_Place]:
    if place.kind != "name":
        return [place]
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    kinds: dict[int, Literal["ipv4", "ipv6"]] = {
        socket.AF_INET: "ipv4",
        socket.AF_INET6: "ipv6",
    }
    return [
        _Place(str(where[0]), place.port, kinds[family])
        for family, _, _, _, where in found
        if family in kinds
    ]


def _refuse(address: object, detail: str = "") -> NoReturn:
    raise invalid_argument("address", address, f"{ALLOWED}; {detail}" if detail else ALLOWED)

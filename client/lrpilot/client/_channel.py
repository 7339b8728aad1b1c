"""The channel to a server: the same options for every connection of the client."""

import os

import grpc

from lrpilot.client import _timing
from lrpilot.client._address import Target

_OPTIONS = (
    ("grpc.max_send_message_length", _timing.MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _timing.MESSAGE_BYTES),
    # Servers stand beside the trainers, never behind the proxy that leads out of the cluster.
    ("grpc.enable_http_proxy", 0),
    # Calls are repeated by Link, which knows what may be repeated and for how long.
    ("grpc.enable_retries", 0),
    # gRPC's own pauses between connection attempts grow to two minutes by default.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", int(_timing.RECONNECT_CAP_S * 1000)),
    # Finds a host that vanished; the server permits a ping each 20 s. None without calls.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # A connection belongs to one pilot or picture alone, and ends with it.
    ("grpc.use_local_subchannel_pool", 1),
)

_BACKUP_POLL = ("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS", "200")
"""Old releases of gRPC, such as 1.54, drive connections that no call waits for each 5 s alone: a
server would be back for 10 s before it is found. They read this when the first channel is made;
there is no option for it. Newer ones do not need it."""


def open_channel(target: Target) -> grpc.Channel:
    """Return a new channel; nothing is sent before the first call."""
    os.environ.setdefault(*_BACKUP_POLL)
    return grpc.insecure_channel(target.name, options=_OPTIONS + target.options)

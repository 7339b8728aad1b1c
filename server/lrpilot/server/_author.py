"""Who acts, where nobody says it."""

import getpass
import os
import socket


def caller() -> str:
    """Return user and machine of this process, for the log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):
        # A container may run under a number that has no name.
        user = f"uid-{os.getuid()}" if hasattr(os, "getuid") else "unknown"
    return f"{user}@{socket.gethostname()}"

"""Imports grpc so that it leaves forks alone, and says nothing of them.

Data loaders and programs are started by forks while values are renewed. A forked child has no
connection of ours, so grpc has nothing to do there. Left to itself it stops and restarts its
threads around each fork, in the child too: one that closes what it inherited and is yet to run
another program (`subprocess` with a `preexec_fn`) then dies of SIGABRT now and then. Its line to
stderr tells of the forks that it does leave alone.

grpc reads both settings once, as it is imported; what the user has set, or all of it where grpc
was imported before, stays.
"""

import os
import sys

_SETTINGS = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR"}

if "grpc" not in sys.modules:
    _ours = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(_ours)
    try:
        import grpc  # noqa: F401
    finally:
        for _name in _ours:
            del os.environ[_name]

"""Imports grpc without the line that it writes to stderr at each fork while a call is under way.

Data loaders fork workers while values are renewed. The line says that grpc leaves the fork alone,
which is what is wanted: a forked child has no connection. grpc reads its level once, as it is
imported; where the user has set one, or has imported grpc before, it stays.
"""

import os
import sys

_LEVEL = "GRPC_VERBOSITY"

if _LEVEL not in os.environ and "grpc" not in sys.modules:
    os.environ[_LEVEL] = "ERROR"
    try:
        import grpc  # noqa: F401
    finally:
        del os.environ[_LEVEL]

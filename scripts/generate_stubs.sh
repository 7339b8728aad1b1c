#!/usr/bin/env bash
# Generate the stubs of proto/lrpilot/v1 into a folder: scripts/generate_stubs.sh OUT
#
# The old generators are on purpose: what they write runs on every protobuf from 4.21.12 to 7,
# while newer ones shut older training images out. They need Python 3.10 or 3.11; $PYTHON names
# one where `python3` is neither.
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

for python in "${PYTHON:-python3}" python3.11 python3.10; do
    if "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' \
        2>/dev/null; then
        found=$python
        break
    fi
done
if [ -z "${found:-}" ]; then
    echo "generating the stubs needs Python 3.10 or 3.11 on PATH, or its path in PYTHON" >&2
    exit 1
fi

venv=.cache/protoc-venv
if [ ! -e "$venv/.installed" ]; then
    "$found" -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet \
        'grpcio-tools==1.54.3' 'mypy-protobuf==3.6.0' 'setuptools<80'
    touch "$venv/.installed"
fi

PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -W ignore -m grpc_tools.protoc -Iproto \
    --python_out="$out" --grpc_python_out="$out" --mypy_out="$out" --mypy_grpc_out="$out" \
    proto/lrpilot/v1/*.proto 2>"$out/.protoc.log" || { cat "$out/.protoc.log" >&2; exit 1; }
rm -f "$out/.protoc.log"
# A file without a service gets empty service stubs: they say nothing.
rm -f "$out"/lrpilot/v1/errors_pb2_grpc.py "$out"/lrpilot/v1/errors_pb2_grpc.pyi

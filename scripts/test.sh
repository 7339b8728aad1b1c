#!/usr/bin/env bash
# The whole suite. What it could not run where a system package is missing stands in pytest's
# closing notice; with LRPILOT_REQUIRE_ALL=1 a missing package is an error instead.
set -euo pipefail
cd "$(dirname "$0")/.."

bash scripts/lint.sh
echo "== the client on the oldest versions that it runs on"
python scripts/check_versions.py --floors
echo "== pytest"
exec python -m pytest -n 2 --dist loadgroup "$@"

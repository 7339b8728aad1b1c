#!/usr/bin/env bash
# The whole suite. What it could not run where a system package is missing stands in pytest's
# closing notice; with LRPILOT_REQUIRE_ALL=1 a missing package is an error instead.
set -euo pipefail
cd "$(dirname "$0")/.."

times=()
timed() {
    local name=$1 begin=$SECONDS
    shift
    echo "== $name"
    "$@"
    times+=("$(printf '%6d s  %s' $((SECONDS - begin)) "$name")")
}

timed "linters and type checker" bash scripts/lint.sh
timed "the client on the oldest versions that it runs on" python scripts/check_versions.py --floors
# Many tests wait rather than work: three at a time keep two cores busy. They are handed out one by
# one, because a few take a minute.
timed "pytest" python -m pytest -n 3 --maxschedchunk 1 "$@"
printf '== wall time\n'
printf '%s\n' "${times[@]}"

#!/usr/bin/env bash
# Measures Highwater beside the tools a reader may use today, in one run, on the
# same machine and data, and prints Markdown tables. `make bench` installs what
# this needs and builds the release binary first.
#
#   BENCH_SEGMENTS=20    WAL segments pushed and fetched by each tool
#   BENCH_SCALE=20,80    pgbench scales to back up; 1 is about 15 MB
#   BENCH_LARGE=240      one more scale, for Highwater alone and once; 0 for none
#   BENCH_RUNS=3         backups and restores of each tool and scale
#   BENCH_STORES=file,s3 where the repository is
#   BENCH_MAJOR=15       PostgreSQL; Debian 12's pgBackRest knows none later
#   BENCH_OUT=DIR        where results.md and results.json go
#
# A quick look at whether all of it works:
#   BENCH_SEGMENTS=3 BENCH_SCALE=2 BENCH_LARGE=0 BENCH_RUNS=1 benches/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HIGHWATER_TEST_CACHE=$(tests/setup/install.sh --cache)
export HIGHWATER_TEST_CACHE
if [ -z "${HIGHWATER_BENCH_BINARY:-}" ]; then
    target=$(cargo metadata --format-version 1 --no-deps \
        | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    HIGHWATER_BENCH_BINARY=$target/release/highwater
    export BENCH_OUT=${BENCH_OUT:-$target/bench}
fi
export HIGHWATER_BENCH_BINARY
[ -x "$HIGHWATER_BENCH_BINARY" ] || {
    echo "no release binary at $HIGHWATER_BENCH_BINARY; run \`make bench\`" >&2
    exit 1
}
exec python3 -B benches/measure.py

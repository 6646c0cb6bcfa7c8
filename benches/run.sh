#!/usr/bin/env bash
# Measures Highwater beside the tools a reader may use today, in one run, on the
# same machine and data, and prints Markdown tables. `make bench` installs what
# this needs and builds the release binary first.
#
#   benches/run.sh                 all of it
#   benches/run.sh tools           archiving, backup and restore
#   benches/run.sh receive         streaming WAL, about seven minutes
#
# For archiving, backup and restore:
#
#   BENCH_PARTS=wal,backlog,backups,increments  what is measured
#   BENCH_SEGMENTS=20    WAL segments pushed and fetched by each tool
#   BENCH_SCALE=20,80    pgbench scales to back up; 1 is about 15 MB
#   BENCH_LARGE=240      one more scale, for Highwater alone and once; 0 for none
#   BENCH_RUNS=3         backups and restores of each tool and scale
#   BENCH_STORES=file,s3 where the repository is
#   BENCH_INCREMENTS=10  incremental backups of each tool, with WAL summaries and without
#   BENCH_MAJOR=18       PostgreSQL
#
# For streaming:
#
#   BENCH_RECEIVE_PARTS=commits,rate,cost  what is measured
#   BENCH_RECEIVE_CLIENTS=1,8,32           pgbench clients whose commits wait
#   BENCH_RECEIVE_SECONDS=8                how long each pgbench of those takes
#   BENCH_RECEIVE_DELAYS=0,5,20            milliseconds added to the way to S3 and back
#   BENCH_RECEIVE_LOAD=768                 MiB of rows loaded at full speed
#   BENCH_RECEIVE_RANDOM=192               MiB of a load that does not compress
#   BENCH_RECEIVE_WRITERS=60,40,15         seconds of the idle, light and heavy writer
#   BENCH_RECEIVE_MAJOR=18                 PostgreSQL
#   BENCH_S3_SERVER=COMMAND                another S3 server than Ceph RGW, without TLS, for commits and rate: a command with
#                                          {port}, {key}, {secret} and {directory}, below which directories are buckets
#   BENCH_STORE_CPU=N                      a processor for the S3 server alone, as if it were elsewhere; all else on the others
#
# For both:
#
#   BENCH_PLACE=DIR      where servers and local repositories are made (/tmp)
#   HIGHWATER_BENCH_BINARY=FILE  what is measured, instead of the release build of this checkout
#   BENCH_OUT=DIR        where results.md and results.json go (receive.md, receive.json)
#
# A quick look at whether all of it works:
#   BENCH_SEGMENTS=3 BENCH_SCALE=2 BENCH_LARGE=0 BENCH_RUNS=1 BENCH_INCREMENTS=1 benches/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HIGHWATER_TEST_CACHE=$(tests/setup/install.sh --cache)
export HIGHWATER_TEST_CACHE
built_of="not known, HIGHWATER_BENCH_BINARY was given"
if [ -z "${HIGHWATER_BENCH_BINARY:-}" ]; then
    target=$(cargo metadata --format-version 1 --no-deps \
        | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
    HIGHWATER_BENCH_BINARY=$target/release/highwater
    built_of=
    export BENCH_OUT=${BENCH_OUT:-$target/bench}
fi
export HIGHWATER_BENCH_BINARY
[ -x "$HIGHWATER_BENCH_BINARY" ] || {
    echo "no release binary at $HIGHWATER_BENCH_BINARY; run \`make bench\`" >&2
    exit 1
}
[ $# -gt 0 ] || set -- tools receive
if [ -z "$built_of" ]; then
    # Figures are published with the commit of what was measured.
    sources=(src Cargo.toml Cargo.lock)
    if [ -n "$(find "${sources[@]}" -type f -newer "$HIGHWATER_BENCH_BINARY" -print -quit)" ]; then
        echo "$HIGHWATER_BENCH_BINARY is older than its sources; run \`make bench\`" >&2
        exit 1
    fi
    built_of=$(git log -1 --format=%h --abbrev=12 -- "${sources[@]}")
    git diff --quiet HEAD -- "${sources[@]}" || built_of="$built_of, with changes that are not committed"
fi
export HIGHWATER_BENCH_COMMIT=$built_of
for part in "$@"; do
    case $part in
        tools) python3 -B benches/measure.py ;;
        receive) python3 -B benches/receive.py ;;
        *) echo "no such part: $part (tools, receive)" >&2; exit 1 ;;
    esac
done

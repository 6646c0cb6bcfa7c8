#!/usr/bin/env bash
# The main job, for a reader to watch and to copy: archiving, a base backup,
# writing, a table dropped by mistake, the whole cluster lost, and the way back
# to the moment before. Lines that begin with `$` are commands. Everything
# happens in one temporary directory, which is removed at the end.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
bin=$("$here/install.sh" --demo-server)

bold='' green='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' green=$'\033[32m' plain=$'\033[0m'; fi
say() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
show() { printf '\n%s$ %s%s\n' "$green" "$1" "$plain"; }

# PostgreSQL refuses to run as root; then everything runs as another user.
if [ "$(id -u)" = 0 ]; then
    user=postgres
    id "$user" >/dev/null 2>&1 || user=nobody
    as_user=(setpriv --reuid "$user" --regid "$(id -g "$user")" --clear-groups)
else
    user=$(id -un)
    as_user=()
fi

# Another binary than the one of this source tree may be shown.
binary=${HIGHWATER_TEST_BINARY:-}
if [ -z "$binary" ]; then
    say "Building highwater (the first time, a few minutes)"
    # Naming a test as well gives the dependencies the features that `cargo test`
    # needs, so that `make test` afterwards compiles none of them again.
    cargo build --bin highwater --test tidy
    binary=$(cargo metadata --format-version 1 --no-deps \
        | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/debug/highwater
fi

# Short, for the path of a unix socket has at most 107 bytes.
place=$(mktemp -d /tmp/highwater-demo.XXXXXX)
chmod 755 "$place"
mkdir "$place/bin" "$place/repo" "$place/socket"
# A plain path, since the settings of PostgreSQL name it.
install -m 755 "$binary" "$place/bin/highwater"
chown -R "$user" "$place"

cleanup() {
    local status=$? directory
    for directory in "$place/data" "$place/restored"; do
        if [ -f "$directory/postmaster.pid" ]; then
            as_demo "pg_ctl stop -s -m immediate -D $directory" || true
        fi
    done
    if [ "$status" -ne 0 ]; then
        printf '\nThe demo failed (%s). The server log ends with:\n' "$status" >&2
        tail -n 20 "$place"/*.log >&2 || true
    fi
    rm -rf "$place"
    exit "$status"
}
trap cleanup EXIT

environment=(
    "HOME=$place" "PATH=$place/bin:$bin:/usr/bin:/bin" "LC_ALL=C"
    # Where the server is a relocated tree, its own libraries come first.
    "LD_LIBRARY_PATH=${bin%/bin}/lib"
    "PGHOST=$place/socket" "PGUSER=postgres" "PGDATABASE=postgres"
    "HIGHWATER_REPO=file://$place/repo" "HIGHWATER_CLUSTER=demo"
)
as_demo() { "${as_user[@]}" env -i "${environment[@]}" bash -c "cd $place && $1"; }
run() {
    show "$1"
    as_demo "$1"
}
ask() { as_demo "psql -XAtqc \"$1\""; }
# Asks until the answer is this one, at most half a minute.
wait_until() {
    for _ in $(seq 300); do
        [ "$(ask "$1")" = "$2" ] && return 0
        sleep 0.1
    done
    echo "not within 30 s: $1 gives $2" >&2
    return 1
}

say "1. A PostgreSQL cluster with continuous archiving"
printf '\n$ cd %s\n' "$place"
for setting in "${environment[@]:1}"; do printf '$ export %s\n' "$setting"; done
run "initdb -D data -U postgres -A trust --no-sync >/dev/null"
run "cat >> data/postgresql.conf <<END
listen_addresses = ''
unix_socket_directories = '$place/socket'
archive_mode = on
archive_command = '$place/bin/highwater --repo file://$place/repo --cluster demo archive-push %p'
END"
# The repository is claimed for this cluster before the server first archives.
run "pg_ctl start -s -w -D data -l server.log"
run "highwater init"
run "highwater check"

say "2. Data, and a base backup while it is written to"
run "pgbench -i -q -s 5 2>&1 | tail -n 1"
run "psql -Xqc \"create table orders as select n, md5(n::text) as item from generate_series(1, 50000) n\""
show "pgbench -n -c 2 -T 8 &"
as_demo "pgbench -n -c 2 -T 8 >pgbench.log 2>&1" &
writing=$!
run "highwater backup --fast"

say "3. A mistake"
orders=$(ask "select count(*) from orders")
written=$(ask "select count(*) from pgbench_history")
before=$(ask "select clock_timestamp()")
printf '\nIt is %s; table orders has %s rows.\n' "$before" "$orders"
run "psql -Xc 'drop table orders'"
wait "$writing"
all=$(ask "select count(*) from pgbench_history")

say "4. And then the whole cluster is lost"
# On a live system archive_timeout, or the next full segment, does this.
show "psql -Xc 'select pg_walfile_name(pg_switch_wal())'"
last=$(ask "select pg_walfile_name(pg_switch_wal())")
echo "$last"
wait_until "select last_archived_wal >= '$last' from pg_stat_archiver" t
run "kill -9 \$(head -n 1 data/postmaster.pid)"
# Its children notice by themselves and end.
sleep 1
# The lock beside the socket names a process that a container without a real
# init keeps as a zombie, and PostgreSQL would take it for alive.
run "rm -rf data socket/.s.PGSQL.*"

say "5. What can be brought back"
run "highwater info"

say "6. Back to the moment before the mistake"
began=$(date +%s%N)
run "highwater restore --pgdata restored --to-time '$before' --target-action promote"
run "pg_ctl start -s -w -D restored -l restored.log"
wait_until "select pg_is_in_recovery()" f
took=$((($(date +%s%N) - began) / 1000000))
run "psql -Xc 'select count(*) from orders'"
found=$(ask "select count(*) from orders")
kept=$(ask "select count(*) from pgbench_history")

say "The outcome"
printf '  table orders:          %s of %s rows are back\n' "$found" "$orders"
printf '  pgbench transactions:  %s kept; %s were there just before the chosen moment\n' "$kept" "$written"
printf '  lost:                  %s transactions, committed after %s, as asked for\n' "$((all - kept))" "$before"
printf '  time to bring it back: %d.%03d s, from the restore command to a server that takes writes\n' "$((took / 1000))" "$((took % 1000))"
if [ "$found" != "$orders" ] || [ "$kept" -lt "$written" ] || [ "$kept" -gt "$all" ]; then
    echo "  This is not what was promised." >&2
    exit 1
fi

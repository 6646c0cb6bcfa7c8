#!/bin/sh
# Installs the object-store servers that the tests use, where they are missing:
# Ceph RGW (an S3 server that verifies signatures and creates atomically) from
# the distribution, Azurite (Azure Blob Storage) from npm. Quick when all is there.
#
#   tests/servers/install.sh              everything
#   tests/servers/install.sh --packages   the distribution's packages only
#
# Azurite goes into ${HIGHWATER_TEST_CACHE:-$HOME/.cache/highwater-test}.
set -eu

CACHE=${HIGHWATER_TEST_CACHE:-${HOME:-/tmp}/.cache/highwater-test}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        echo "install: ERROR: this needs root, and sudo is not installed: $*" >&2
        exit 1
    fi
}

missing=
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph:ceph-common curl:curl openssl:openssl node:nodejs npm:npm; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
if [ -n "$missing" ]; then
    echo "install: apt-get update" >&2
    as_root apt-get -qq -o DPkg::Lock::Timeout=300 update
    echo "install: apt-get install$missing (with what they need, some hundred packages)" >&2
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 install $missing >/dev/null
fi

[ "${1:-}" = --packages ] && exit 0

# Every package at the version and with the hash of the lock file, so that what
# somebody publishes tomorrow cannot break it.
wanted=$(cd "$(dirname "$0")/azurite" && pwd)
if ! cmp -s "$wanted/package-lock.json" "$CACHE/azurite/.installed"; then
    node=$(node --version)
    if [ "$(printf 'v18\n%s\n' "$node" | sort -V | head -n 1)" != v18 ]; then
        echo "install: ERROR: Azurite needs Node.js 18 or newer, and node in PATH is $node" \
            "(Ubuntu 22.04 has 12). Install a newer one and run this again." >&2
        exit 1
    fi
    echo "install: Azurite from npm into $CACHE/azurite" >&2
    rm -rf "$CACHE/azurite"
    mkdir -p "$CACHE/azurite"
    cp "$wanted/package.json" "$wanted/package-lock.json" "$CACHE/azurite/"
    (cd "$CACHE/azurite" && npm ci --loglevel=error --ignore-scripts --no-audit --no-fund >/dev/null)
    cp "$wanted/package-lock.json" "$CACHE/azurite/.installed"
fi

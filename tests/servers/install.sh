#!/bin/sh
# Installs the object-store servers that the tests use, where they are missing:
# Ceph RGW (an S3 server that verifies signatures and creates atomically) from
# the distribution, Azurite (Azure Blob Storage) from npm. Quick when all is there.
#
#   tests/servers/install.sh
#
# Azurite goes into ${HIGHWATER_TEST_CACHE:-$HOME/.cache/highwater-test}.
set -eu

CACHE=${HIGHWATER_TEST_CACHE:-${HOME:-/tmp}/.cache/highwater-test}
AZURITE_VERSION=3.37.0

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        echo "need root to run: $*" >&2
        sudo "$@"
    else
        echo "error: this must run as root, and there is no sudo: $*" >&2
        exit 1
    fi
}

missing=
for pair in radosgw:radosgw ceph-mon:ceph-mon ceph-osd:ceph-osd ceph:ceph-common curl:curl openssl:openssl node:nodejs npm:npm; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
if [ -n "$missing" ]; then
    echo "installing:$missing"
    as_root apt-get update -q
    # shellcheck disable=SC2086 # a list of words
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
fi

if [ ! -x "$CACHE/azurite/node_modules/.bin/azurite-blob" ]; then
    echo "installing: azurite $AZURITE_VERSION into $CACHE/azurite"
    mkdir -p "$CACHE/azurite"
    npm install --silent --no-audit --no-fund --prefix "$CACHE/azurite" "azurite@$AZURITE_VERSION"
fi

#!/bin/sh
# Starts Azurite (Azure Blob Storage) on 127.0.0.1, creates one container, and
# then waits: when its standard input ends it stops what it started.
#
#   azurite-up.sh DIR PORT ACCOUNT KEY_BASE64 CONTAINER
#
# Prints `ready` when the container is there. Container names have 3 characters or more.
set -eu

D=$1 PORT=$2 ACCOUNT=$3 KEY=$4 CONTAINER=$5
CACHE=${HIGHWATER_TEST_CACHE:-${HOME:-/tmp}/.cache/highwater-test}
mkdir -p "$D"

stop() {
    trap - EXIT INT TERM
    kill -9 "$PID" 2>/dev/null || true
}
AZURITE_ACCOUNTS="$ACCOUNT:$KEY" node "$CACHE/azurite/node_modules/azurite/dist/src/blob/main.js" \
    --blobHost 127.0.0.1 --blobPort "$PORT" -l "$D" --silent --skipApiVersionCheck \
    >"$D/azurite.log" 2>&1 </dev/null &
PID=$!
trap stop EXIT
trap 'exit 1' INT TERM

tries=0
until curl -s -o /dev/null "http://127.0.0.1:$PORT/"; do
    tries=$((tries + 1))
    [ $tries -lt 120 ] || { echo "error: Azurite did not come up; see $D/azurite.log" >&2; exit 1; }
    sleep 0.5
done
node - "$PORT" "$ACCOUNT" "$KEY" "$CONTAINER" <<'JS'
// Creates a container with a shared-key signature, as the service's REST reference describes.
const [port, account, key, container] = process.argv.slice(2);
const crypto = require('crypto'), http = require('http');
const date = new Date().toUTCString(), version = '2021-12-02';
const headers = `x-ms-date:${date}\nx-ms-version:${version}\n`;
const resource = `/${account}/${account}/${container}\nrestype:container`;
const toSign = `PUT\n\n\n\n\n\n\n\n\n\n\n\n${headers}${resource}`;
const signature = crypto.createHmac('sha256', Buffer.from(key, 'base64')).update(toSign, 'utf8').digest('base64');
const request = http.request({
  host: '127.0.0.1', port, method: 'PUT', path: `/${account}/${container}?restype=container`,
  headers: { 'x-ms-date': date, 'x-ms-version': version, 'content-length': 0, authorization: `SharedKey ${account}:${signature}` },
}, (answer) => {
  answer.resume();
  if (answer.statusCode !== 201) { console.error(`container not created: ${answer.statusCode}`); process.exit(1); }
});
request.end();
JS
echo ready
cat >/dev/null
stop
rm -rf "$D"

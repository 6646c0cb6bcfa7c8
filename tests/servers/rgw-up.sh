#!/bin/sh
# Starts a Ceph monitor, an OSD in memory and an S3 gateway on 127.0.0.1, creates
# one user and one bucket, and then waits: when its standard input ends (the
# test is over, or was killed) it stops what it started.
#
#   rgw-up.sh DIR PORT MON_PORT_V2 MON_PORT_V1 KEY SECRET BUCKET
#
# DIR must be short (unix sockets are in it) and on a disk that is not full.
# Prints `ready` when the bucket is there. Works as root or not: the processes
# run as whoever calls, and keep everything in DIR.
# RGW_MORE_FRONTEND is added to the gateway's `rgw frontends`, for TLS.
set -eu

D=$1 PORT=$2 MON2=$3 MON1=$4 KEY=$5 SECRET=$6 BUCKET=$7
mkdir -p "$D/mon" "$D/osd0" "$D/run" "$D/log" "$D/rgw" "$D/crash"
exec 3>"$D/log/up.log"

stop() {
    trap - EXIT INT TERM
    for name in client.rgw osd.0 mon.a; do
        [ -s "$D/run/$name.pid" ] || continue
        kill -9 "$(cat "$D/run/$name.pid")" 2>/dev/null || true
    done
}
trap stop EXIT
trap 'exit 1' INT TERM

# Named, because Debian 13's packages look for it relative to the current directory.
for directory in /usr/lib/*/rados-classes /usr/lib/rados-classes; do
    [ -d "$directory" ] && CLASSES=$directory
done
FSID=$(cat /proc/sys/kernel/random/uuid)
cat >"$D/ceph.conf" <<C
[global]
fsid = $FSID
mon host = v2:127.0.0.1:$MON2/0,v1:127.0.0.1:$MON1/0
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $D/keyring
run dir = $D/run
pid file = $D/run/\$name.pid
admin socket = $D/run/\$name.asok
log file = $D/log/\$name.log
crash dir = $D/crash
public addr = 127.0.0.1
cluster addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 4096
mon data avail crit = 1
osd objectstore = memstore
osd class dir = ${CLASSES:?the RADOS classes of the package ceph-osd are not in /usr/lib}
memstore device bytes = ${RGW_BYTES_MAX:-2147483648}
mon data = $D/mon
osd data = $D/osd0
rgw data = $D/rgw
rgw frontends = beast endpoint=127.0.0.1:$PORT ${RGW_MORE_FRONTEND:-}
C
cd "$D"
{
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *'
    ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *'
    ceph-authtool keyring --gen-key -n client.rgw --cap mon 'allow *' --cap osd 'allow *'
    ceph-authtool keyring --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *'
    monmaptool --create --clobber --addv a "[v2:127.0.0.1:$MON2,v1:127.0.0.1:$MON1]" --fsid "$FSID" monmap
    ceph-mon -c ceph.conf --mkfs -i a --monmap monmap --keyring keyring
} >&3 2>&3
ceph-mon -c ceph.conf -i a -f >&3 2>&3 </dev/null &
echo $! >run/mon.a.pid
timeout 60 ceph -c ceph.conf auth import -i keyring >&3 2>&3
timeout 60 ceph -c ceph.conf osd create >&3 2>&3
ceph-osd -c ceph.conf -i 0 --mkfs >&3 2>&3
ceph-osd -c ceph.conf -i 0 -f >&3 2>&3 </dev/null &
echo $! >run/osd.0.pid
radosgw -c ceph.conf -n client.rgw -f >&3 2>&3 </dev/null &
echo $! >run/client.rgw.pid

tries=0
until curl -sf -o /dev/null "http://127.0.0.1:$PORT/"; do
    tries=$((tries + 1))
    if [ $tries -ge 240 ] || ! kill -0 "$(cat run/client.rgw.pid)" 2>/dev/null; then
        echo "error: the gateway did not come up; see $D/log" >&2
        exit 1
    fi
    sleep 0.5
done
timeout 60 radosgw-admin -c ceph.conf -n client.rgw user create --uid=test --display-name=test \
    --access-key="$KEY" --secret="$SECRET" >&3 2>&3
# A version 2 signature, because it is one line; the tests themselves sign with version 4.
request() {
    date=$(date -Ru)
    signature=$(printf '%s\n\n\n%s\n/%s' "$1" "$date" "$2" | openssl dgst -sha1 -hmac "$SECRET" -binary | base64)
    curl -sf -o /dev/null -X "$1" -H "Content-Length: 0" -H "Date: $date" -H "Authorization: AWS $KEY:$signature" \
        "http://127.0.0.1:$PORT/$2"
}
request PUT "$BUCKET"
# The pools for objects are made with the first one, which takes seconds that no test should have to wait.
request PUT "$BUCKET/first"
request DELETE "$BUCKET/first"
echo ready
exec 3>&-
# Until whoever started us closes the pipe or dies.
cat >/dev/null
stop
rm -rf "$D"

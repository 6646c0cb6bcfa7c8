"""What a store takes by itself: one small object put, without any tool."""

import datetime
import hashlib
import hmac
import http.client
import json
import os
import socket
import ssl
import struct
import time

from lab import BUCKET, KEY, SECRET

OBJECT = os.urandom(4096)


def signed_put(host, path, now):
    """Headers of a PUT that succeeds only if there is no such object (AWS Signature Version 4)."""
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    headers = {
        "host": host,
        "if-none-match": "*",
        "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
        "x-amz-date": stamp,
    }
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"PUT\n{path}\n\n{lines}\n{names}\nUNSIGNED-PAYLOAD"
    scope = f"{day}/us-east-1/s3/aws4_request"
    digest = hashlib.sha256(request.encode()).hexdigest()
    key = f"AWS4{SECRET}".encode()
    for part in (day, "us-east-1", "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    credential = f"AWS4-HMAC-SHA256 Credential={KEY}/{scope}"
    headers["authorization"] = f"{credential}, SignedHeaders={names}, Signature={signature}"
    return headers


def put_times_s3(port, ca, seconds, pause=0):
    """Puts one object after another over one connection, with a pause between two; returns how long each took.

    Without `ca` the server speaks no TLS.
    """
    host, times = f"127.0.0.1:{port}", []
    if ca is None:
        link = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    else:
        context = ssl.create_default_context(cafile=ca)
        link = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=30)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        path = f"/{BUCKET}/probe/{port}/{len(times)}-{time.monotonic_ns()}"
        headers = signed_put(host, path, datetime.datetime.now(datetime.UTC))
        began = time.monotonic()
        link.request("PUT", path, OBJECT, headers)
        answer = link.getresponse()
        said = answer.read()
        times.append(time.monotonic() - began)
        if answer.status != 200:
            raise RuntimeError(f"the store answers {answer.status}: {said[:500]}")
        time.sleep(pause)
    link.close()
    # The first one made the connection.
    return times[1:]


def put_times_file(directory, seconds, pause=0):
    """Creates one durable file after another, with a pause between two; returns how long each took."""
    times = []
    place = os.open(directory, os.O_RDONLY)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        path = f"{directory}/probe{time.monotonic_ns()}"
        began = time.monotonic()
        file = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        os.write(file, OBJECT)
        os.fsync(file)
        os.close(file)
        os.rename(f"{path}.new", path)
        os.fsync(place)
        times.append(time.monotonic() - began)
        time.sleep(pause)
    os.close(place)
    return times


def gateway_counts(directory):
    """Returns what the gateway has counted since it started: requests in all, puts."""
    with socket.socket(socket.AF_UNIX) as link:
        link.settimeout(10)
        link.connect(f"{directory}/run/client.rgw.asok")
        link.sendall(b'{"prefix": "perf dump"}\0')
        (length,) = struct.unpack(">I", link.recv(4, socket.MSG_WAITALL))
        said = json.loads(link.recv(length, socket.MSG_WAITALL))["rgw"]
    return said["req"], said["put"]

"""Measures `receive` beside `pg_receivewal`, and prints Markdown tables. See `run.sh`.

Three questions: what does a synchronous commit wait, how much WAL can be taken, and what
does it cost at a provider's prices.
"""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import stores
from lab import BUCKET, KEY, OTHER_S3, SECRET, STORE_CPU, Lab, free_port, leave_cpu_to_store, of_the_store
from measure import OUT, describe, load, note

MAJOR = int(os.environ.get("BENCH_RECEIVE_MAJOR", "18"))
CLIENTS = [int(n) for n in os.environ.get("BENCH_RECEIVE_CLIENTS", "1,8,32").split(",")]
# Milliseconds added to the way to the S3 server and back.
DELAYS = [int(n) for n in os.environ.get("BENCH_RECEIVE_DELAYS", "0,5,20").split(",")]
# Seconds between two puts that are timed while commits are: few enough to change nothing.
PROBE_PAUSE = 0.05
# Connections are opened, and how many pieces go at a time is found out, before anything counts.
WARM_SECONDS = 3
# Seconds that each pgbench of synchronous commits takes.
COMMIT_SECONDS = int(os.environ.get("BENCH_RECEIVE_SECONDS", "8"))
# WAL of the load that is taken as fast as it comes, in MiB.
LOAD_MIB = int(os.environ.get("BENCH_RECEIVE_LOAD", "768"))
# The same of a load that no codec makes smaller, in MiB: the S3 server holds it in memory.
RANDOM_MIB = int(os.environ.get("BENCH_RECEIVE_RANDOM", "192"))
# Seconds of each writer whose cost is counted.
IDLE, LIGHT, HEAVY = (int(n) for n in os.environ.get("BENCH_RECEIVE_WRITERS", "60,40,15").split(","))
PARTS = os.environ.get("BENCH_RECEIVE_PARTS", "commits,rate,cost").split(",")

SCALE = 20
PROBE_SECONDS = 3
MIB = 1 << 20
# US dollars, S3 Standard in us-east-1: 1000 PUT or LIST; a GB for a month. DELETE is free.
PUT_1000, GB_MONTH = 0.005, 0.023
MONTH_SECONDS = 30 * 86400

SETTINGS = """
listen_addresses = ''
shared_buffers = 512MB
max_wal_size = 8GB
checkpoint_timeout = 1h
autovacuum = off
archive_mode = off
max_wal_senders = 10
# A server whose commits matter: what is compared includes its own fsync.
fsync = on
synchronous_commit = on
"""


def wait_until(what, seconds, condition):
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(0.02)


class Receiver:
    """A service that takes WAL from the server; `name` is its row in the tables."""

    application = ""

    def __init__(self, lab, name, synchronous=False):
        self.lab, self.name, self.synchronous = lab, name, synchronous
        self.place = lab.directory(f"received/{re.sub('[^a-z0-9]+', '-', name.lower())}")

    def command(self):
        raise NotImplementedError

    def env(self):
        return {}

    def start(self):
        self.said = open(self.lab.place / "said", "wb")
        self.child = self.lab.popen(
            self.command(), self.env(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=self.said,
        )
        wait_until(f"{self.name} streams", 30, self.is_streaming)
        if self.synchronous:
            self.lab.sql("alter system set synchronous_standby_names = '*'")
            self.lab.sql("select pg_reload_conf()")
            state = f"select sync_state from {self.view()}"
            wait_until(f"{self.name} is waited for", 30, lambda: self.lab.sql(state) == "sync")
        return self

    def view(self):
        return f"pg_stat_replication where application_name = '{self.application}'"

    def is_streaming(self):
        if self.child.poll() is not None:
            raise RuntimeError(f"{self.name} ended:\n{(self.lab.place / 'said').read_text()}")
        state = self.lab.sql(f"select count(*) from {self.view()} and state in ('streaming', 'catchup')")
        return state == "1"

    def peak_kib(self):
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1])

    def cpu_seconds(self):
        fields = Path(f"/proc/{self.child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        """Ends it in good order; returns what it printed."""
        if self.synchronous:
            self.lab.sql("alter system reset synchronous_standby_names")
            self.lab.sql("select pg_reload_conf()")
        self.child.send_signal(signal.SIGINT)
        try:
            printed, _ = self.child.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise
        self.said.close()
        said = (self.lab.place / "said").read_text()
        # pg_receivewal ends with 0 as well when it is interrupted.
        if self.child.returncode != 0:
            raise RuntimeError(f"{self.name} ended with {self.child.returncode}:\n{said}")
        return printed.decode()

    def has(self, lsn, segment):
        """Whether all before `lsn`, where `segment` was switched, is where it shall be."""
        raise NotImplementedError

    def forget(self):
        shutil.rmtree(self.place, ignore_errors=True)
        self.lab.directory(self.place.relative_to(self.lab.place))


class PgReceiveWal(Receiver):
    application = "pg_receivewal"

    def __init__(self, lab, name, compress=None, **more):
        super().__init__(lab, name, **more)
        self.compress = compress

    def command(self):
        slot = ["-S", "pg_receivewal"]
        self.lab.run(["pg_receivewal", *slot, "--create-slot", "--if-not-exists"])
        method = [f"--compress={self.compress}"] if self.compress else []
        how = ["--synchronous"] if self.synchronous else []
        return ["pg_receivewal", "-D", self.place, *slot, "--no-loop", "-s", "1", *method, *how]

    def has(self, lsn, segment):
        suffix = {"lz4": ".lz4", None: ""}[self.compress]
        return (self.place / f"{segment}{suffix}").exists()

    def stop(self):
        printed = super().stop()
        # WAL that nobody wants any more is not kept for it.
        wait_until("the slot is free", 20, lambda: not self.is_slot_used())
        self.lab.sql("select pg_drop_replication_slot('pg_receivewal')")
        return printed

    def is_slot_used(self):
        return self.lab.sql("select count(*) from pg_replication_slots where active") != "0"


class Highwater(Receiver):
    application = "highwater"
    made = 0

    def __init__(self, lab, name, port=None, codec=None, **more):
        super().__init__(lab, name, **more)
        self.port, self.codec = port, codec
        Highwater.made += 1
        self.cluster = f"r{self.made}"

    def env(self):
        env = {
            "HIGHWATER_REPO": f"file://{self.place}",
            "HIGHWATER_CLUSTER": self.cluster,
            "HIGHWATER_SLOT": "highwater",
        }
        if self.codec:
            env["HIGHWATER_COMPRESSION"] = self.codec
        if self.port:
            env |= {
                "HIGHWATER_REPO": f"s3://{BUCKET}/receive",
                "HIGHWATER_REPO_ENDPOINT": f"{self.lab.gateway_url.split(':')[0]}://127.0.0.1:{self.port}",
                "HIGHWATER_REPO_ACCESS_KEY_ID": KEY,
                "HIGHWATER_REPO_SECRET_ACCESS_KEY": SECRET,
            }
            env |= (
                {"HIGHWATER_REPO_CA_FILE": self.lab.ca}
                if self.lab.ca
                else {"HIGHWATER_REPO_ALLOW_HTTP": "true"}
            )
        return env

    def command(self):
        self.lab.run([self.lab.highwater, "init"], self.env())
        how = ["--synchronous"] if self.synchronous else []
        return [self.lab.highwater, "--json", "receive", *how]

    def has(self, lsn, segment):
        return self.lab.sql(f"select flush_lsn >= '{lsn}' from {self.view()}") == "t"

    def stop(self):
        printed = super().stop()
        wait_until("the slot is free", 20, lambda: not self.is_slot_used())
        self.lab.sql("select pg_drop_replication_slot('highwater')")
        return json.loads(printed)

    def is_slot_used(self):
        return self.lab.sql("select count(*) from pg_replication_slots where active") != "0"


class Tables:
    """Everything said, and every figure in it."""

    def __init__(self):
        self.text, self.figures = [], {}

    def say(self, line=""):
        print(line, flush=True)
        self.text.append(line)

    def table(self, title, columns, rows):
        self.figures[title] = [dict(zip(columns, row, strict=True)) for row in rows]
        self.say(f"\n**{title}**\n")
        self.say(f"| {' | '.join(columns)} |")
        self.say(f"|{'---|' + '--:|' * (len(columns) - 1)}")
        for row in rows:
            self.say(f"| {' | '.join(str(cell) for cell in row)} |")

    def save(self):
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "receive.md").write_text("\n".join(self.text) + "\n")
        (OUT / "receive.json").write_text(json.dumps(self.figures, indent=1))


def quantiles(times):
    """Median and 99th percentile (nearest rank), in milliseconds."""
    ordered = sorted(times)
    slow = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return statistics.median(ordered) * 1000, slow * 1000


def pgbench(lab, clients, seconds, *more):
    """Runs pgbench; returns the seconds that each transaction took."""
    logs = lab.directory("out/transactions")
    lab.run([
        "pgbench", "-n", "-N", "-c", clients, "-j", min(clients, 2), "-T", seconds,
        "-l", f"--log-prefix={logs}/tx", *more,
    ])
    times = []
    for path in logs.iterdir():
        # client, number, microseconds, …
        times += [int(line.split()[2]) / 1e6 for line in path.open()]
        path.unlink()
    return times


def ratios(found, store, floor):
    """Returns what was found, by quantile, as parts of what the store and the floor take together."""
    return [f"{a / (b + c):.2f}" for a, b, c in zip(found, store, floor, strict=True)]


def measure_commits(lab, tables, ways):
    """Latency and throughput of commits that wait for the receiver."""
    def probe(where, seconds, pause=0):
        if where is None:
            return stores.put_times_file(str(lab.directory("received/probe")), seconds, pause)
        return stores.put_times_s3(ways[where], lab.ca, seconds, pause)

    probes = {}
    for where in [None, *ways]:
        note(f"puts, {'a local directory' if where is None else f'{where} ms'}")
        probes[where] = probe(where, PROBE_SECONDS)
    names = {None: "a local directory"}
    names |= {delay: f"S3 + {delay} ms" for delay in ways}
    rows = []
    for where, times in probes.items():
        rows.append([names[where], *(f"{t:.1f}" for t in quantiles(times)), len(times)])
    tables.table("store alone: one 4 KiB object after another", ["store", "p50, ms", "p99, ms", "puts"], rows)

    receivers = [(PgReceiveWal(lab, "pg_receivewal", synchronous=True), None)]
    for where, name in names.items():
        highwater = Highwater(lab, f"highwater, {name}", port=ways.get(where), synchronous=True)
        receivers.append((highwater, where))
    floor, rows = {}, []
    for receiver, where in receivers:
        receiver.start()
        measured = []
        for clients in CLIENTS:
            note(f"{receiver.name}, {clients} clients")
            lab.sql("checkpoint")
            pgbench(lab, clients, WARM_SECONDS)
            if isinstance(receiver, PgReceiveWal):
                times, meanwhile = pgbench(lab, clients, COMMIT_SECONDS), [0]
            else:
                with ThreadPoolExecutor() as pool:
                    probing = pool.submit(probe, where, COMMIT_SECONDS, PROBE_PAUSE)
                    times, meanwhile = pgbench(lab, clients, COMMIT_SECONDS), probing.result()
            rate = len(times) / COMMIT_SECONDS
            measured.append((clients, quantiles(times), rate, quantiles(meanwhile)))
        peak = receiver.peak_kib() / 1024
        receiver.stop()
        receiver.forget()
        for clients, found, rate, meanwhile in measured:
            more = [""] * 6
            if isinstance(receiver, PgReceiveWal):
                floor[clients] = found
            else:
                more = ratios(found, quantiles(probes[where]), floor[clients])
                more += [f"{t:.1f}" for t in meanwhile]
                more += ratios(found, meanwhile, floor[clients])
            p50, p99 = (f"{t:.1f}" for t in found)
            rows.append([receiver.name, clients, f"{rate:.0f}", p50, p99, *more, f"{peak:.0f}"])
    columns = [
        "receiver", "clients", "commits/s", "p50, ms", "p99, ms", "p50 ÷ (floor + idle store)", "p99 ÷ that",
        "store meanwhile p50, ms", "store meanwhile p99, ms", "p50 ÷ (floor + store meanwhile)",
        "p99 ÷ (floor + store meanwhile)", "peak memory, MiB",
    ]
    tables.table("synchronous commits (pgbench -N)", columns, rows)


def wal_position(lab):
    return int(lab.sql("select pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))


def write_rows(lab):
    """Rows that compress as an application's do."""
    rows = LOAD_MIB * MIB // 150
    lab.sql(
        "create table load as select g as id, md5(g::text) as a, md5((g / 3)::text) as b, now() as t"
        f" from generate_series(1, {rows}) g"
    )


def prepare_random(lab):
    """Makes 8 MiB of random values, which lie further apart than any codec here looks."""
    lab.sql("create table random (value bytea)")
    lab.sql("alter table random alter value set storage external")
    lab.sql(
        "insert into random select (select string_agg(uuid_send(gen_random_uuid()), '')"
        f" from generate_series(1, {MIB // 16}) as part where value > 0)"
        " from generate_series(1, 8) as value"
    )


def write_random(lab):
    """Values that were compressed or encrypted before they came."""
    lab.sql("create table load (value bytea)")
    lab.sql("alter table load alter value set storage external")
    for _ in range(RANDOM_MIB // 8):
        lab.sql("insert into load select value from random")


def bulk_load(lab, write):
    """Writes WAL as fast as the server can; returns seconds, bytes, and the end with its segment."""
    began, start = time.monotonic(), wal_position(lab)
    write(lab)
    end, segment = lab.sql(
        "with last as (select pg_switch_wal() as lsn) select lsn, pg_walfile_name(lsn) from last"
    ).split("|")
    taken = time.monotonic() - began
    written = wal_position(lab) - start
    lab.sql("drop table load")
    return taken, written, end, segment


def measure_rate(lab, tables, port):
    """How fast WAL is taken: beside a load, and alone when it has to catch up."""
    lab.sql("alter system set synchronous_commit = off")
    lab.sql("select pg_reload_conf()")
    measure_load(lab, tables, "a bulk load", write_rows, [
        PgReceiveWal(lab, "pg_receivewal, as it is"),
        Highwater(lab, "highwater none, a local directory", codec="none"),
        PgReceiveWal(lab, "pg_receivewal lz4", compress="lz4"),
        Highwater(lab, "highwater lz4, a local directory", codec="lz4"),
        Highwater(lab, "highwater zstd:1, a local directory"),
        Highwater(lab, "highwater zstd:1, S3", port=port),
    ])
    prepare_random(lab)
    measure_load(lab, tables, "random values", write_random, [
        Highwater(lab, "highwater none, S3", port=port, codec="none"),
        Highwater(lab, "highwater zstd:1, S3", port=port),
    ])
    lab.sql("drop table random")
    lab.sql("alter system reset synchronous_commit")
    lab.sql("select pg_reload_conf()")


def measure_load(lab, tables, what, write, receivers):
    """One load, which each receiver takes."""
    taken, written, _, _ = bulk_load(lab, write)
    alone = written / taken / 1e6
    rows = [["no receiver", f"{alone:.0f}", "", "", "", "", ""]]
    for receiver in receivers:
        note(f"{receiver.name}, {what}")
        lab.sql("checkpoint")
        receiver.start()
        taken, written, end, segment = bulk_load(lab, write)
        began = time.monotonic()
        wait_until("all is stored", 120, lambda r=receiver, e=end, s=segment: r.has(e, s))
        behind = time.monotonic() - began
        peak = receiver.peak_kib()
        # Now the server is ahead: the receiver stands still while WAL is written.
        receiver.child.send_signal(signal.SIGSTOP)
        _, waiting, end, segment = bulk_load(lab, write)
        cpu = receiver.cpu_seconds()
        began = time.monotonic()
        receiver.child.send_signal(signal.SIGCONT)
        wait_until("all is stored", 120, lambda r=receiver, e=end, s=segment: r.has(e, s))
        catching = time.monotonic() - began
        cpu = receiver.cpu_seconds() - cpu
        peak = max(peak, receiver.peak_kib()) / 1024
        receiver.stop()
        receiver.forget()
        rows.append([
            receiver.name, f"{written / taken / 1e6:.0f}", f"{behind:.2f}",
            f"{written / (taken + behind) / 1e6:.0f}", f"{waiting / catching / 1e6:.0f}",
            f"{cpu / (waiting / 1e9):.1f}", f"{peak:.0f}",
        ])
    columns = [
        "receiver", "server writes, MB/s", "all stored after, s", "taken beside the load, MB/s",
        "catching up, MB/s", "CPU, s per GB", "peak memory, MiB",
    ]
    tables.table(f"WAL of {what} ({written / 1e6:.0f} MB)", columns, rows)


def measure_cost(lab, tables, port):
    """Puts and bytes by default settings, for three kinds of writers."""
    writers = [
        ("idle", IDLE, lambda: time.sleep(IDLE)),
        ("light, 5 commits/s", LIGHT, lambda: pgbench(lab, 1, LIGHT, "-R", 5)),
        ("heavy, 8 clients", HEAVY, lambda: pgbench(lab, 8, HEAVY)),
    ]
    rows = []
    for name, seconds, write in writers:
        note(f"the cost of a writer: {name}")
        lab.sql("checkpoint")
        receiver = Highwater(lab, f"highwater, {name}", port=port).start()
        # What beginning costs is not the writer's.
        time.sleep(2)
        before, start = stores.gateway_counts(lab.gateway_place), wal_position(lab)
        began = time.monotonic()
        write()
        lasted = time.monotonic() - began
        wal, after = wal_position(lab) - start, stores.gateway_counts(lab.gateway_place)
        peak = receiver.peak_kib() / 1024
        report = receiver.stop()
        requests, puts = (b - a for a, b in zip(before, after, strict=True))
        put_month = puts / lasted * MONTH_SECONDS * PUT_1000 / 1000
        ratio = report["stored_bytes"] / max(report["wal_bytes"], 1)
        kept = kept_bytes(lab, receiver)
        gb = wal / lasted * MONTH_SECONDS * kept / max(report["wal_bytes"], 1) / 1e9
        rows.append([
            name, f"{lasted:.0f}", f"{wal / lasted / 1e3:.1f}", f"{puts / lasted:.2f}",
            f"{(requests - puts) / lasted:.2f}", f"{ratio:.2f}",
            f"{kept / max(report['wal_bytes'], 1):.2f}", f"{put_month:.2f}",
            f"{gb:.1f}", f"{gb * GB_MONTH:.2f}", f"{peak:.0f}",
        ])
    columns = [
        "writer", "s", "WAL, kB/s", "puts/s", "other requests/s", "bytes put per byte of WAL",
        "bytes kept per byte of WAL", "puts, USD a month", "a month's WAL, GB",
        "keeping it, USD a month", "peak memory, MiB",
    ]
    tables.table("default mode, what it costs at S3's list prices", columns, rows)
    tables.say(
        f"\nPrices: {PUT_1000} USD for 1000 PUT or LIST, {GB_MONTH} USD for a GB and month, DELETE free."
    )


def kept_bytes(lab, receiver):
    """What of a receiver's objects is there, in bytes, as the gateway's own listing says."""
    said = subprocess.run(
        ["radosgw-admin", "-c", f"{lab.gateway_place}/ceph.conf", "-n", "client.rgw",
         "bucket", "list", f"--bucket={BUCKET}", "--max-entries=100000"],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout
    ours = f"receive/{receiver.cluster}/wal/"
    return sum(e["meta"]["size"] for e in json.loads(said) if e["name"].startswith(ours))


def add_delays(lab):
    """Starts a proxy for each delay; returns the port of each, and the processes."""
    ways, proxies = {}, []
    for delay in DELAYS:
        if delay == 0:
            ways[delay] = lab.gateway_port
            continue
        port = free_port()
        script = [sys.executable, "-B", Path(__file__).with_name("delay.py")]
        args = [str(a) for a in [*script, port, lab.gateway_port, delay]]
        proxy = subprocess.Popen(of_the_store(args), stdout=subprocess.PIPE, text=True)
        proxies.append(proxy)
        if proxy.stdout.readline().strip() != "ready":
            raise RuntimeError("the proxy did not start")
        ways[delay] = port
    return ways, proxies


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if "cost" in PARTS and OTHER_S3 is not None:
        sys.exit("cost is told by Ceph RGW's counters: leave it out of BENCH_RECEIVE_PARTS, or BENCH_S3_SERVER")
    tables, proxies = Tables(), []
    began = time.monotonic()
    leave_cpu_to_store()
    lab = Lab(MAJOR)
    try:
        note(f"in {lab.place}")
        describe(tables, lab)
        if STORE_CPU is not None:
            tables.say(f"- processor {STORE_CPU} is the S3 server's alone, all others are everybody else's")
        if OTHER_S3 is not None:
            tables.say(f"- the S3 server: `{Path(OTHER_S3.split()[0]).name}`, without TLS")
        load(tables, "before")
        lab.start_gateway()
        lab.start_postgres(SETTINGS)
        lab.run(["pgbench", "-i", "-q", "-s", SCALE])
        lab.wait_for_gateway()
        ways, proxies = add_delays(lab)
        if "commits" in PARTS:
            measure_commits(lab, tables, ways)
            tables.save()
        if "rate" in PARTS:
            measure_rate(lab, tables, lab.gateway_port)
            tables.save()
        if "cost" in PARTS:
            measure_cost(lab, tables, lab.gateway_port)
        tables.say()
        load(tables, "after")
        tables.say(f"- the whole run took {time.monotonic() - began:.0f} s")
        tables.save()
    finally:
        for proxy in proxies:
            proxy.kill()
            proxy.wait()
        lab.close()
    note(f"saved in {OUT}")


main()

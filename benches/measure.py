"""Runs every measurement and prints the tables. See `run.sh` for the settings."""

import datetime
import filecmp
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from lab import REPO, Cost, Lab, cost_so_far
from tools import BACKLOG_TOOLS, BACKUP_TOOLS, INCREMENT_TOOLS, WAL_TOOLS, Highwater, PgBasebackup

SEGMENTS = int(os.environ.get("BENCH_SEGMENTS", "20"))
SCALES = [int(scale) for scale in os.environ.get("BENCH_SCALE", "20,80").split(",")]
LARGE = int(os.environ.get("BENCH_LARGE", "240"))
RUNS = int(os.environ.get("BENCH_RUNS", "3"))
PARTS = set(os.environ.get("BENCH_PARTS", "wal,backlog,backups,increments").split(","))
STORES = os.environ.get("BENCH_STORES", "file,s3").split(",")
MAJOR = int(os.environ.get("BENCH_MAJOR", "18"))
OUT = Path(os.environ.get("BENCH_OUT", REPO / "target/bench"))
INCREMENTS = int(os.environ.get("BENCH_INCREMENTS", "10"))
PAGE = 8192
CHANGE_A_PAGE_OF_A_HUNDRED = """
update pgbench_accounts set abalance = abalance + 1 where ctid = any (array(
    select format('(%s,1)', floor(random() * pages))::tid
    from (select relpages as pages from pg_class where relname = 'pgbench_accounts') as known,
        generate_series(1, pages / 100)))"""
PLACES = {"file": "a local directory", "s3": "S3 (Ceph RGW on the same machine, TLS)"}


class Results:
    """Every cost, by table and tool, in the order of measuring."""

    def __init__(self):
        self.tables = {}
        self.text = []
        self.shown = set()

    def add(self, table, tool, cost):
        self.tables.setdefault(table, {}).setdefault(tool, []).append(cost)

    def drop(self, tool):
        """Forgets a tool in the tables that are not shown yet."""
        for table, rows in self.tables.items():
            if table not in self.shown:
                rows.pop(tool, None)

    def say(self, line=""):
        print(line, flush=True)
        self.text.append(line)

    def show(self, table, unit, megabytes):
        """Prints one table: medians, and how many times Highwater's wall time each took."""
        self.shown.add(table)
        rows = self.tables.get(table)
        if not rows:
            return
        scale = {"ms": 1000, "s": 1}[unit]
        reference = next(iter(rows.values()))
        ours = statistics.median(cost.wall for cost in reference)
        self.say(f"\n**{table}** ({len(reference)} of each)\n")
        columns = [
            "", f"wall p50, {unit}", f"wall p99, {unit}", "MB/s", f"CPU, {unit}",
            "peak memory, MiB", "wall ÷ Highwater",
        ]
        costs = [cost for row in rows.values() for cost in row]
        commands = any(cost.command_p50 is not None for cost in costs)
        stored = any(cost.stored is not None for cost in costs)
        columns += ["one command p50, ms", "p99, ms"] * commands + ["stored, MB"] * stored
        self.say(f"| {' | '.join(columns)} |")
        self.say(f"|---{'|--:' * (len(columns) - 1)}|")
        for tool, costs in rows.items():
            walls = sorted(cost.wall for cost in costs)
            median = statistics.median(walls)
            # The nearest rank: of 100 runs or fewer the slowest.
            slow = walls[min(len(walls) - 1, int(len(walls) * 0.99))]
            cpu = statistics.median(cost.cpu for cost in costs)
            peak = max(cost.rss_kib for cost in costs) / 1024
            digits = 0 if unit == "ms" else 2
            cells = [
                tool, f"{median * scale:.{digits}f}", f"{slow * scale:.{digits}f}",
                f"{megabytes / median:.0f}", f"{cpu * scale:.{digits}f}", f"{peak:.0f}",
                f"{median / ours:.2f}",
            ]
            if commands:
                cells += [
                    f"{statistics.median(getattr(cost, name) for cost in costs) * 1000:.1f}"
                    for name in ("command_p50", "command_p99")
                ]
            if stored:
                known = [cost.stored for cost in costs if cost.stored is not None]
                cells.append(f"{statistics.median(known) / 1e6:.1f}" if known else "")
            self.say(f"| {' | '.join(cells)} |")

    def save(self):
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "results.md").write_text("\n".join(self.text) + "\n")
        plain = {
            table: {tool: [vars(cost) for cost in costs] for tool, costs in rows.items()}
            for table, rows in self.tables.items()
        }
        (OUT / "results.json").write_text(json.dumps(plain, indent=1))


def note(text):
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def each(results, tools, job):
    """Does a job with each tool; one that fails is said and left out of the tables."""
    kept = []
    for tool in tools:
        try:
            job(tool)
            kept.append(tool)
        except (RuntimeError, OSError) as error:
            results.say(f"\n{tool.name} is left out below: it failed.")
            note(f"{tool.name}: {error}")
            results.drop(tool.name)
    return kept


def make_segments(lab):
    """Has pgbench write WAL, and keeps the segments that are full."""
    wal = lab.place / "wal/pg_wal"
    lab.archive_with(f'cp "$1" {wal}/$2.new && mv {wal}/$2.new {wal}/$2')
    lab.run(["pgbench", "-i", "-q", "-s", "20"])
    lab.sql("checkpoint")
    for path in wal.iterdir():
        path.unlink()
    lab.sql("select pg_switch_wal()")
    while len(list(wal.glob("?" * 24))) < SEGMENTS + 2:
        lab.run(["pgbench", "-n", "-c", "4", "-T", "5"])
    lab.archive_with("exit 0")
    # The first ones may be of the loading, and one was cut short by the switch.
    return sorted(wal.glob("?" * 24))[-SEGMENTS:]


def measure_wal(lab, results, store, segments):
    tools = each(results, [make(lab) for make in WAL_TOOLS], lambda tool: tool.prepare(store))
    push, get = (f"archive-{verb}, 16 MiB segment, {PLACES[store]}" for verb in ("push", "get"))
    # Tools take turns, so that what else the machine does meets all of them alike.
    for segment in segments:
        def push_one(tool, segment=segment):
            if command := tool.push(segment):
                results.add(push, tool.name, lab.cost(command, tool.env))
        tools = each(results, tools, push_one)
    for segment in segments:
        def get_one(tool, segment=segment):
            target = lab.place / "out/segment"
            if command := tool.get(segment, target):
                results.add(get, tool.name, lab.cost(command, tool.env))
                if not filecmp.cmp(segment, target, shallow=False):
                    raise RuntimeError("another segment came back")
                target.unlink()
        tools = each(results, tools, get_one)
    for table in (push, get):
        results.show(table, "ms", 16.777)


def measure_backlog(lab, results, store, segments):
    """Archives and fetches all segments, one command after another, as a server does that lags behind."""
    push, get = (
        f"{verb} {len(segments)} segments, {PLACES[store]}"
        for verb in ("archive a backlog of", "recovery fetches")
    )
    server = lab.standing_server(segments)

    def all_of(table, tool, command_of, pause=0.0, check=None):
        walls, cpu, peak = [], 0.0, 0
        resident = tool.resident()
        before = cost_so_far(resident)[0] if resident else 0
        for segment in segments:
            if not (command := command_of(segment)):
                return
            cost = lab.cost(command, tool.env, server)
            walls.append(cost.wall)
            cpu, peak = cpu + cost.cpu, max(peak, cost.rss_kib)
            if check:
                check(segment)
            time.sleep(pause)
        if resident:
            its_cpu, its_peak, its_space = cost_so_far(resident)
            cpu, peak = cpu + its_cpu - before, max(peak, its_peak)
            note(f"{tool.name}: {its_peak >> 10} MiB resident, {its_space >> 10} MiB of address space")
        slow = sorted(walls)[min(len(walls) - 1, int(len(walls) * 0.99))]
        middle = statistics.median(walls)
        results.add(table, tool.name, Cost(sum(walls), cpu, peak, None, middle, slow))
        note(f"{tool.name}: {table}: {sum(walls):.2f} s")

    def fetched(segment):
        target = server / "pg_wal/RECOVERYXLOG"
        if not filecmp.cmp(segment, target, shallow=False):
            raise RuntimeError("another segment came back")
        # As the server does before each call.
        target.unlink()

    def once(tool):
        # What is resident begins when the server does, and not before there is anything to do.
        lab.make_ready(server, [])
        tool.before_backup()
        lab.make_ready(server, segments)
        # Only a call as the server's own works ahead.
        ours = isinstance(tool, Highwater)
        all_of(push, tool, lambda s: tool.push(Path("pg_wal") / s.name if ours else s))
        target = Path("pg_wal/RECOVERYXLOG")
        target = target if ours else server / target
        # The pause stands for replay.
        all_of(get, tool, lambda segment: tool.get(segment, target), 0.03, fetched)
        tool.end()

    tools = each(results, [make(lab) for make in BACKLOG_TOOLS], lambda tool: tool.prepare(store))
    for _ in range(RUNS):
        tools = each(results, tools, once)
    for table in (push, get):
        results.show(table, "s", len(segments) * 16.777)


def load_database(lab, scale):
    note(f"pgbench -i -s {scale}")
    lab.run(["pgbench", "-i", "-q", "-s", str(scale)])


def bytes_below(directory):
    return sum(p.stat().st_size for p in Path(directory).rglob("*") if p.is_file())


def page_at(path, at):
    with open(path, "rb") as file:
        return os.pread(file.fileno(), PAGE, at)


def change_pages(directory):
    """Overwrites one page of a hundred; returns where, with what stood there."""
    lost, chance = [], random.Random(8192)
    for path in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
        for number in range(path.stat().st_size // PAGE):
            if chance.random() < 0.01:
                lost.append((path, number * PAGE, page_at(path, number * PAGE)))
    for path, at, page in lost:
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), bytes(255 - byte for byte in page), at)
    return lost


def stored_by(lab, tool, command):
    """Returns what a backup costs, with what it has stored where that can be seen."""
    place = tool.kept_in()
    before = bytes_below(place) if place else 0
    cost = lab.cost(command, tool.env)
    cost.stored = bytes_below(place) - before if place else None
    return cost


def measure_increments(lab, results, store, summaries):
    """Changes one page of a hundred of the largest table, and backs up what has changed, again and again.

    In the end the newest is restored, and, in Highwater's case, the oldest too, which is a full backup.
    """
    by_summaries = summaries and store == "file"
    makers = [make for make in INCREMENT_TOOLS if by_summaries or make is not PgBasebackup]
    tools = each(results, [make(lab) for make in makers], lambda tool: tool.prepare(store))
    how = "with WAL summaries" if summaries else "without WAL summaries"
    place = f"{how}, {PLACES[store]}"
    table = f"incremental backup after 1 % of the largest table's pages has changed, {place}"
    newest = f"restore after {INCREMENTS} incremental backups, {place}"
    lab.summarize(summaries)
    lab.sql("vacuum freeze")

    def full(tool):
        tool.before_backup()
        lab.archive_with(tool.archive)
        lab.run(tool.backup(), tool.env)

    def increment(tool):
        lab.archive_with(tool.archive)
        results.add(table, tool.name, stored_by(lab, tool, tool.increment()))

    def restored(tool, name, command, target):
        results.add(newest, name, lab.cost(command, tool.env))
        lab.run(["rm", "-rf", target])

    def restore(tool):
        target = lab.place / "restored"
        if isinstance(tool, PgBasebackup):
            return
        restored(tool, tool.name, tool.restore(target), target)
        if command := tool.restore_oldest(target):
            restored(tool, f"{tool.name}, the full backup", command, target)

    lab.sql("checkpoint")
    tools = each(results, tools, full)
    for number in range(INCREMENTS):
        note(f"incremental backups, {place}: {number + 1}")
        lab.sql(CHANGE_A_PAGE_OF_A_HUNDRED)
        lab.sql("checkpoint")
        tools = each(results, tools, increment)
    for _ in range(RUNS):
        tools = each(results, tools, restore)
    lab.archive_with("exit 0")
    size = int(lab.sql("select sum(pg_database_size(oid)) from pg_database"))
    for name in (table, newest):
        results.show(name, "s", size / 1e6)


def measure_backups(lab, results, store, makers, runs):
    size = int(lab.sql("select sum(pg_database_size(oid)) from pg_database"))
    database = f"{size / 1e9:.2f} GB database, {PLACES[store]}"
    source = bytes_below(lab.place / "data/base")
    tools = each(results, [make(lab) for make in makers], lambda tool: tool.prepare(store))

    def once(tool):
        if not tool.backup():
            return
        tool.before_backup()
        lab.archive_with(tool.archive)
        lab.sql("checkpoint")
        note(f"{tool.name}: backup, {database}")
        results.add(f"backup, {database}", tool.name, stored_by(lab, tool, tool.backup()))
        target = lab.place / "restored"
        results.add(f"restore, {database}", tool.name, lab.cost(tool.restore(target), tool.env))
        found = bytes_below(target / "base")
        if command := tool.delta(target):
            lost = change_pages(target / "base")
            results.add(f"delta restore, {database}", tool.name, lab.cost(command, tool.env))
            if any(page_at(path, at) != page for path, at, page in lost):
                raise RuntimeError("a page did not come back")
        lab.run(["rm", "-rf", target])
        # A file that is emptied later or made meanwhile is a few pages, not a table.
        if abs(found - source) > source * 0.02:
            raise RuntimeError(f"{found} of {source} bytes came back")

    for _ in range(runs):
        tools = each(results, tools, once)
    lab.archive_with("exit 0")
    for verb in ("backup", "restore", "delta restore"):
        results.show(f"{verb}, {database}", "s", size / 1e6)


def output(*command):
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True).stdout.strip()


def describe(results, lab):
    cpu = next(line for line in open("/proc/cpuinfo") if line.startswith("model name"))
    memory = int(open("/proc/meminfo").readline().split()[1]) >> 20
    results.say(f"- date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    results.say(f"- commit: {os.environ['HIGHWATER_BENCH_COMMIT']}")
    model, system = cpu.split(":")[1].strip(), os.uname()
    results.say(
        f"- machine: {os.cpu_count()} processors ({model}), {memory} GiB, "
        f"{system.sysname} {system.release}"
    )
    results.say(f"- server: {lab.run(['postgres', '--version']).strip()}")


def describe_rivals(results, lab):
    zstd, backrest = output("zstd", "-q", "--version"), output(lab.pgbackrest, "version")
    results.say(f"- rivals: {backrest}, Barman 3.19.1, zstd {zstd}")


def load(results, when):
    results.say(f"- load average {when}: {' '.join(f'{x:.1f}' for x in os.getloadavg())}")


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results = Results()
    began = time.monotonic()
    lab = Lab(MAJOR)
    try:
        note(f"in {lab.place}")
        describe(results, lab)
        describe_rivals(results, lab)
        load(results, "before")
        nothing = statistics.median(lab.cost(["true"]).wall for _ in range(20)) * 1000
        results.say(f"- the stopwatch: `true` takes {nothing:.1f} ms, which are in every command's time")
        if "s3" in STORES:
            lab.start_gateway()
        lab.start_postgres()
        segments = make_segments(lab) if {"wal", "backlog"} & PARTS else []
        for store in STORES:
            note(f"WAL, {PLACES[store]}")
            if store == "s3":
                lab.wait_for_gateway()
            if "wal" in PARTS:
                measure_wal(lab, results, store, segments)
            if "backlog" in PARTS:
                measure_backlog(lab, results, store, segments)
            results.save()
        for scale in SCALES if {"backups", "increments"} & PARTS else []:
            load_database(lab, scale)
            if "backups" in PARTS:
                for store in STORES:
                    measure_backups(lab, results, store, BACKUP_TOOLS, RUNS)
                    results.save()
        if "increments" in PARTS:
            for store in STORES:
                for summaries in (False, True):
                    measure_increments(lab, results, store, summaries)
                    results.save()
        if LARGE and "backups" in PARTS:
            # Once and alone, to see whether memory grows with the database.
            load_database(lab, LARGE)
            for store in STORES:
                measure_backups(lab, results, store, [Highwater], 1)
        results.say()
        load(results, "after")
        results.say(f"- the whole run took {time.monotonic() - began:.0f} s")
        results.save()
    finally:
        lab.close()
    note(f"saved in {OUT}")


if __name__ == "__main__":
    main()

"""How each tool is told to do the same job.

A tool has `prepare(store)`, called once for each store and scale, and six
commands as argument lists: push, get, backup, increment, restore, delta. `None`
means that the tool has no such command for this store.
"""

import glob
import json
import time

from lab import BUCKET, CACHE, KEY, SECRET


def durable(directory):
    """A shell command that makes every file below a directory durable."""
    return f"find {directory} -type f -exec sync {{}} +"


class Tool:
    name = ""
    # Environment of its commands.
    env = {}
    # Shell command that archives WAL while this tool backs up.
    archive = "exit 0"

    def __init__(self, lab):
        self.lab = lab

    def prepare(self, store):
        """Makes an empty repository."""

    def before_backup(self):
        """Whatever a backup needs that is not measured."""

    def resident(self):
        """Returns the process that works beside its commands, if there is one."""
        return None

    def end(self):
        """Ends that process."""

    def push(self, segment):
        return None

    def get(self, segment, target):
        return None

    def backup(self):
        return None

    def increment(self):
        """Backs up what has changed since the last backup."""
        return None

    def restore(self, target):
        return None

    def restore_oldest(self, target):
        """Restores the first backup."""
        return None

    def delta(self, target):
        """Restores over files that stand."""
        return None

    def kept_in(self):
        """Returns the local directory in which backups are; None for other places."""
        return None


class Plain(Tool):
    """A copy into a local directory: the floor of what archiving can cost."""

    def prepare(self, store):
        self.file = store == "file"
        self.to = self.lab.directory("file/" + self.name.split()[0])

    def push(self, segment):
        return self.file and self.copy_in(segment)

    def get(self, segment, target):
        return self.file and self.copy_out(segment, target)


class Copy(Plain):
    name = "cp + fsync"

    def copy_in(self, segment):
        out = f"of={self.to}/{segment.name}"
        return ["dd", f"if={segment}", out, "bs=1M", "conv=fsync", "status=none"]

    def copy_out(self, segment, target):
        return ["cp", f"{self.to}/{segment.name}", target]


class Zstd(Plain):
    name = "zstd -1 + fsync"

    def copy_in(self, segment):
        out = f"{self.to}/{segment.name}.zst"
        return ["sh", "-c", f"zstd -q -f -1 {segment} -o {out} && sync {out}"]

    def copy_out(self, segment, target):
        return ["zstd", "-q", "-d", f"{self.to}/{segment.name}.zst", "-o", target]


class Highwater(Tool):
    name = "highwater"
    made = 0
    source = ()

    def prepare(self, store):
        self.store = store
        place = self.lab.directory("file/highwater")
        self.repo = {"file": f"file://{place}", "s3": f"s3://{BUCKET}/highwater"}[store]
        self.before_backup()

    def before_backup(self):
        # A cluster name of its own for each backup: no bytes of an earlier one are there. What the earlier
        # one fetched ahead, and who did it, goes too.
        spool = self.lab.place / "wal/pg_wal/highwater.spool"
        old = self.lab.place / f"file/highwater/{self.env.get('HIGHWATER_CLUSTER', 'none')}"
        self.lab.run(["rm", "-rf", spool, old])
        Highwater.made += 1
        self.env = {"HIGHWATER_REPO": self.repo, "HIGHWATER_CLUSTER": f"c{self.made}"}
        if self.store == "s3":
            self.env |= {
                "HIGHWATER_REPO_ENDPOINT": self.lab.gateway_url,
                "HIGHWATER_REPO_CA_FILE": self.lab.ca,
                "HIGHWATER_REPO_ACCESS_KEY_ID": KEY,
                "HIGHWATER_REPO_SECRET_ACCESS_KEY": SECRET,
            }
        exports = "\n".join(f"export {name}='{value}'" for name, value in self.env.items())
        self.archive = f'{exports}\nexec {self.lab.highwater} -q archive-push "$1"'
        self.lab.run([self.lab.highwater, "init"], self.env)

    def push(self, segment):
        return [self.lab.highwater, "archive-push", segment]

    def get(self, segment, target):
        return [self.lab.highwater, "archive-get", segment.name, target]

    def backup(self):
        return [self.lab.highwater, "backup", "--fast", *self.source]

    def increment(self):
        return self.backup()

    def kept_in(self):
        return self.store == "file" and self.lab.place / "file/highwater" / self.env["HIGHWATER_CLUSTER"] / "backup"

    def restore(self, target):
        return [self.lab.highwater, "restore", "--pgdata", target]

    def restore_oldest(self, target):
        known = json.loads(self.lab.run([self.lab.highwater, "--json", "info"], self.env))["backups"]
        oldest = min(backup["id"] for backup in known)
        return [self.lab.highwater, "restore", "--pgdata", target, "--backup", oldest, "--to-immediate"]

    def delta(self, target):
        return [self.lab.highwater, "restore", "--delta", "--pgdata", target]


class HighwaterFiles(Highwater):
    """The same, reading the server's files itself."""

    name = "highwater, files"
    source = ("--source", "files", "--jobs", "2")


class HighwaterDirect(Highwater):
    """The same without working ahead."""

    name = "highwater, nothing ahead"

    def before_backup(self):
        super().before_backup()
        self.env |= {"HIGHWATER_SPOOL": "none"}


class HighwaterAgent(Highwater):
    """The same with the resident service beside the server."""

    name = "highwater, agent"
    agent = None

    def prepare(self, store):
        super().prepare(store)
        # Others are measured first.
        self.end()

    def before_backup(self):
        super().before_backup()
        self.end()
        server = self.lab.place / "wal"
        socket = server / "pg_wal/highwater.spool/agent.sock"
        self.agent = self.lab.reside(
            [self.lab.highwater, "agent", "--pgdata", server], self.env, "agent.log"
        )
        for _ in range(200):
            if socket.exists():
                return
            time.sleep(0.05)
        raise RuntimeError((self.lab.place / "agent.log").read_text()[-4000:])

    def resident(self):
        return self.agent.pid

    def end(self):
        if self.agent:
            self.lab.leave(self.agent)
            self.agent = None


class PgBasebackup(Tool):
    name = "pg_basebackup plain"
    form = ("-Fp",)
    increments = 0

    def prepare(self, store):
        self.file = store == "file"
        self.to = self.lab.place / "file" / type(self).__name__

    def before_backup(self):
        self.lab.run(["rm", "-rf", self.to])

    def backup(self):
        return self.file and ["pg_basebackup", "-D", self.to, *self.form, "-X", "none", "-c", "fast"]

    def increment(self):
        """Since PostgreSQL 17, and by WAL summaries alone: a directory of its own for each."""
        before = self.increment_place(self.increments) if self.increments else self.to
        self.increments += 1
        to = self.increment_place(self.increments)
        return ["pg_basebackup", "-D", to, f"--incremental={before}/backup_manifest", "-X", "none", "-c", "fast"]

    def increment_place(self, number):
        return self.lab.place / "file" / f"increment{number}"

    def kept_in(self):
        return self.file and self.lab.place / "file"

    def restore(self, target):
        script = f"cp -a {self.to} {target} && {durable(target)}"
        return self.file and ["sh", "-c", script]


class PgBasebackupTar(PgBasebackup):
    name = "pg_basebackup tar"

    def __init__(self, lab):
        super().__init__(lab)
        # Not every build has zstd; Debian's has.
        self.program, self.codec = "pg_basebackup", "lz4"
        # An older one can talk to a newer server, and the other way round.
        for program in ("pg_basebackup", *sorted(glob.glob("/usr/lib/postgresql/*/bin/pg_basebackup"))):
            try:
                found = lab.run(["sh", "-c", f"ldd $(command -v {program})"])
            except RuntimeError:
                continue
            if "libzstd" in found:
                self.program, self.codec = program, "zstd"
                break
        self.name = f"pg_basebackup tar, {self.codec}:1"

    def backup(self):
        form = ["-Ft", "-Z", f"client-{self.codec}:level=1", "-X", "none", "-c", "fast"]
        return self.file and [self.program, "-D", self.to, *form]

    def restore(self, target):
        unpack = f"{self.codec} -dc {self.to}/base.tar.* | tar -x -C {target}"
        script = f"mkdir -m 700 {target} && {unpack} && {durable(target)}"
        return self.file and ["sh", "-c", script]


class PgBackRest(Tool):
    name = "pgBackRest"
    made = 0
    label = None
    # Blocks instead of whole files where a file has changed.
    block = "n"
    archiving = ("archive-async=n",)

    def prepare(self, store):
        self.file = store == "file"
        self.before_backup()

    def before_backup(self):
        # A repository and a spool of its own for each time: nothing of an earlier one is there.
        PgBackRest.made += 1
        lab, label = self.lab, f"pgbackrest{self.made}"
        if self.label:
            lab.run(["rm", "-rf", lab.place / "file" / self.label, self.base])
        self.label = label
        self.base = lab.directory(f"pgbackrest/{label}")
        repo = [f"repo1-path={lab.directory(f'file/{label}')}", "repo1-type=posix"]
        if not self.file:
            repo = [
                "repo1-type=s3", f"repo1-path=/{label}", f"repo1-s3-bucket={BUCKET}",
                "repo1-s3-endpoint=localhost", f"repo1-storage-port={lab.gateway_port}",
                "repo1-s3-region=us-east-1", "repo1-s3-uri-style=path",
                f"repo1-s3-key={KEY}", f"repo1-s3-key-secret={SECRET}",
                f"repo1-storage-ca-file={lab.ca}",
            ]
        shared = [
            "[global]", *repo, "repo1-bundle=y", f"repo1-block={self.block}", "repo1-retention-full=9",
            *self.archiving, f"cmd={lab.pgbackrest}", "compress-type=zst", "compress-level=1", "process-max=2", "start-fast=y",
            "log-level-console=warn", "log-level-file=off", f"lock-path={self.base}",
            f"spool-path={self.base}", f"log-path={self.base}", "[bench]",
            f"pg1-path={self.server()}", f"pg1-socket-path={lab.place}/socket", "pg1-user=postgres",
        ]
        lab.write(f"{label}.conf", "\n".join(shared) + "\n", 0o600)
        self.program = [lab.pgbackrest, f"--config={lab.place}/{label}.conf", "--stanza=bench"]
        # Debian's program with Debian's libraries, not the tree's.
        self.env = {"LD_LIBRARY_PATH": ""}
        self.archive = f'LD_LIBRARY_PATH= exec {" ".join(self.program)} archive-push "$1"'
        lab.run([*self.program, f"--pg1-path={lab.place}/data", "stanza-create"], self.env)

    def server(self):
        """The data directory of its settings."""
        return self.lab.place / "data"

    def push(self, segment):
        return [*self.program, "archive-push", segment]

    def get(self, segment, target):
        return [*self.program, "archive-get", segment.name, target]

    def backup(self):
        return [*self.program, "--type=full", "backup"]

    def increment(self):
        return [*self.program, "--type=incr", "backup"]

    def kept_in(self):
        return self.file and self.lab.place / "file" / self.label / "backup"

    def restore(self, target):
        return [*self.program, f"--pg1-path={target}", "restore"]

    def delta(self, target):
        return [*self.program, f"--pg1-path={target}", "--delta", "restore"]


class PgBackRestBlock(PgBackRest):
    name = "pgBackRest, block"
    block = "y"


class PgBackRestAsync(PgBackRest):
    """The same with its asynchronous process, which a command leaves behind."""

    name = "pgBackRest, async"
    archiving = ("archive-async=y", "archive-get-queue-max=1GiB")

    def server(self):
        return self.lab.place / "wal"


class Barman(Tool):
    name = "barman-cloud"
    runs = 0

    def prepare(self, store):
        self.s3 = store == "s3"
        self.place = [f"s3://{BUCKET}/barman", "bench"]
        self.env = {"LD_LIBRARY_PATH": ""}
        if self.s3:
            self.options = ["--endpoint-url", self.lab.gateway_url]
            # What boto3 sends by default since 2025 older servers do not know.
            self.env |= {
                "AWS_CA_BUNDLE": self.lab.ca, "AWS_ACCESS_KEY_ID": KEY,
                "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            }

    def before_backup(self):
        Barman.runs += 1

    def program(self, name, *flags):
        return self.s3 and [f"{CACHE}/barman/bin/barman-cloud-{name}", *self.options, *flags]

    def push(self, segment):
        program = self.program("wal-archive", "--zstd", "--compression-level", "1")
        return program and [*program, *self.place, segment]

    def get(self, segment, target):
        program = self.program("wal-restore")
        return program and [*program, *self.place, segment.name, target]

    def backup(self):
        program = self.program("backup", "--lz4", "--jobs", "2", "--immediate-checkpoint")
        name = ["-n", f"run{self.runs}", "-h", self.lab.env["PGHOST"], "-U", "postgres"]
        return program and [*program, *name, *self.place]

    def restore(self, target):
        program = self.program("restore")
        return program and [*program, *self.place, f"run{self.runs}", target]


WAL_TOOLS = (Highwater, Copy, Zstd, PgBackRest, Barman)
BACKUP_TOOLS = (Highwater, HighwaterFiles, PgBasebackup, PgBasebackupTar, PgBackRest, Barman)
BACKLOG_TOOLS = (Highwater, HighwaterAgent, HighwaterDirect, Copy, Zstd, PgBackRest, PgBackRestAsync)
INCREMENT_TOOLS = (Highwater, HighwaterFiles, PgBasebackup, PgBackRest, PgBackRestBlock)

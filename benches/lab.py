"""The place where everything is measured: a directory, a user, servers, a stopwatch.

Whatever is started here is stopped here, by its process id.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ["HIGHWATER_TEST_CACHE"])
KEY, SECRET, BUCKET = "benchkey", "benchsecret", "bench-bucket"
# The processor that the S3 server and the proxies before it have for themselves, if that is wanted.
STORE_CPU = os.environ.get("BENCH_STORE_CPU") or None
# The command of another S3 server, with {port}, {key}, {secret} and {directory}.
OTHER_S3 = os.environ.get("BENCH_S3_SERVER") or None

ARCHIVING = """
listen_addresses = ''
shared_buffers = 512MB
max_wal_size = 8GB
checkpoint_timeout = 1h
# The server's own durability is not what is measured.
fsync = off
synchronous_commit = off
autovacuum = off
archive_mode = on
# pgBackRest takes a backup only if it finds its name here.
archive_command = '{place}/archive %p %f # or pgbackrest'
"""


def of_the_store(command):
    """Returns the command of a part of the store, to be run where the store computes."""
    return command if STORE_CPU is None else ["taskset", "-c", STORE_CPU, *command]


def leave_cpu_to_store():
    """Keeps this process and all that it starts, but parts of the store, off the store's processor."""
    if STORE_CPU is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {int(STORE_CPU)})


@dataclass
class Cost:
    """What one run of one command took."""

    wall: float
    cpu: float
    rss_kib: int
    # By how much the tool's local repository has grown; None where that is not looked at.
    stored: int | None = None
    # Of a row that sums many commands: the median one and the slowest but one in a hundred, in seconds.
    command_p50: float | None = None
    command_p99: float | None = None


def cost_so_far(pid):
    """Returns the CPU seconds of a living process, and its peaks of memory and address space in KiB."""
    words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    ticks = int(words[11]) + int(words[12])
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    peak, space = (
        int(next(line for line in status if line.startswith(name)).split()[1])
        for name in ("VmHWM:", "VmPeak:")
    )
    return ticks / os.sysconf("SC_CLK_TCK"), peak, space


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lab:
    """A temporary directory, the user that owns it, and the servers in it."""

    def __init__(self, major):
        self.tree = CACHE / "pg" / str(major)
        self.summaries = False
        self.knows_summaries = major >= 17
        newer = CACHE / "pgbackrest/pgbackrest"
        self.pgbackrest = str(newer) if newer.exists() else "/usr/bin/pgbackrest"
        self.place = Path(tempfile.mkdtemp(
            prefix="hwbench", dir=os.environ.get("BENCH_PLACE", "/tmp")
        ))
        self.place.chmod(0o755)
        self.user = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            entry = pwd.getpwnam("postgres" if "postgres" in names else "nobody")
            self.user = (entry.pw_uid, entry.pw_gid)
        for name in ("bin", "socket", "wal/pg_wal", "out", "file", "pgbackrest"):
            self.directory(name)
        # A plain path that every user can reach.
        self.highwater = str(self.place / "bin/highwater")
        shutil.copy(os.environ["HIGHWATER_BENCH_BINARY"], self.highwater)
        self.env = {
            "PATH": f"{self.tree}/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": f"{self.tree}/lib",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.place),
            "PGHOST": str(self.place / "socket"),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
        }
        self.postgres = self.gateway = self.gateway_url = None
        self.gateway_ready = False
        self.residents = []
        # PostgreSQL starts its commands in the data directory.
        self.cwd = self.place

    def directory(self, name):
        path = self.place / name
        path.mkdir(parents=True, exist_ok=True)
        if self.user:
            for part in [path, *path.parents]:
                if part.is_relative_to(self.place):
                    os.chown(part, *self.user)
        return path

    def write(self, name, text, mode=0o644):
        """Replaces a file in one step, so that nobody sees half of it."""
        path, staged = self.place / name, self.place / f"{name}.new"
        staged.write_text(text)
        staged.chmod(mode)
        if self.user:
            os.chown(staged, *self.user)
        staged.rename(path)
        return path

    def popen(self, args, env=None, **more):
        if self.user:
            more |= {"user": self.user[0], "group": self.user[1], "extra_groups": []}
        environment = self.env | (env or {})
        more.setdefault("cwd", self.cwd)
        return subprocess.Popen([str(a) for a in args], env=environment, **more)

    def run(self, args, env=None):
        """Runs a command that must succeed, and returns what it printed."""
        child = self.popen(args, env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        said = child.communicate()[0].decode(errors="replace")
        if child.returncode != 0:
            raise RuntimeError(f"{args} ended with {child.returncode}:\n{said[-4000:]}")
        return said

    def cost(self, args, env=None, cwd=None):
        """Runs a command that must succeed, and returns what it took.

        GNU time starts it, since the kernel counts the memory of the process
        that forks (here Python) as its child's.
        """
        peak = self.place / "out/peak"
        timed = ["/usr/bin/time", "-f", "%M", "-o", peak, *args]
        with open(self.place / "said", "wb") as said:
            began = time.monotonic()
            child = self.popen(
                timed, env, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                cwd=cwd or self.cwd,
            )
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.monotonic() - began
            child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            said = (self.place / "said").read_text(errors="replace")
            raise RuntimeError(f"{args} ended with {child.returncode}:\n{said[-4000:]}")
        return Cost(wall, usage.ru_utime + usage.ru_stime, int(peak.read_text().split()[-1]))

    def standing_server(self, segments):
        """Makes a directory in which a server seems to run and these segments wait to be archived."""
        server = self.place / "wal"
        status = server / "pg_wal/archive_status"
        script = [
            f"mkdir -p {status} {server}/global && chmod 700 {server}",
            f"cp {self.place}/data/global/pg_control {server}/global",
            f"cp {self.place}/data/postmaster.pid {server}",
        ]
        self.run(["sh", "-ec", "\n".join(script)])
        self.make_ready(server, [])
        self.make_ready(server, segments)
        return server

    def make_ready(self, server, segments):
        """Makes these segments wait to be archived, and no others; of none: none."""
        status = server / "pg_wal/archive_status"
        files = [f"{segment.name}.ready" for segment in segments]
        self.run(["sh", "-ec", f"cd {status}\n" + (f"touch {' '.join(files)}" if files else "rm -f -- *")])

    def reside(self, args, env, log):
        """Starts a program that stays until `leave`."""
        with open(self.place / log, "wb") as said:
            child = self.popen(args, env, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        self.residents.append(child)
        return child

    def leave(self, child):
        self.residents.remove(child)
        child.terminate()
        child.wait(timeout=60)

    def sql(self, text):
        return self.run(["psql", "-XAtqc", text]).strip()

    def summarize(self, wanted):
        """Has the server write WAL summaries, or no more of them."""
        if self.knows_summaries:
            self.sql(f"alter system set summarize_wal = {'on' if wanted else 'off'}")
            self.sql("select pg_reload_conf()")
            self.summaries = wanted

    def archive_with(self, command):
        """Makes the server archive with this shell command; `$1` is %p, `$2` is %f."""
        self.write("archive", f"#!/bin/sh\n{command}\n", 0o755)

    def start_postgres(self, settings=None):
        """Starts a server, with settings of its own or those that archive as fast as can be."""
        data = self.place / "data"
        self.run(["initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "-k", "-E", "UTF8"])
        with open(data / "postgresql.conf", "a") as file:
            file.write(settings or ARCHIVING.format(place=self.place))
            file.write(f"unix_socket_directories = '{self.place}/socket'\n")
        self.archive_with("exit 0")
        with open(self.place / "postgres.log", "wb") as log:
            self.postgres = self.popen(["postgres", "-D", data], stdout=log, stderr=log)
        for _ in range(300):
            if self.popen(["pg_isready", "-q"]).wait() == 0:
                self.cwd = data
                return
            time.sleep(0.1)
        raise RuntimeError((self.place / "postgres.log").read_text()[-4000:])

    def start_gateway(self):
        """Begins to start Ceph RGW, with TLS because pgBackRest insists on it, or the server that is named instead."""
        if OTHER_S3 is not None:
            return self.start_other_gateway()
        tls = self.directory("tls")
        leaf = "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=CA:FALSE\n"
        (tls / "leaf").write_text(leaf)
        key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
        for line in (
            f"req -x509 -days 3 {key} -keyout ca.key -out ca.crt -subj /CN=bench",
            f"req -new {key} -keyout leaf.key -out leaf.csr -subj /CN=127.0.0.1",
            "x509 -req -days 3 -in leaf.csr -CA ca.crt -CAkey ca.key -CAcreateserial"
            " -out leaf.crt -extfile leaf",
        ):
            subprocess.run(["openssl", *line.split()], cwd=tls, check=True, capture_output=True)
        pem = tls / "leaf.pem"
        pem.write_text((tls / "leaf.crt").read_text() + (tls / "leaf.key").read_text())
        secure = self.gateway_port = free_port()
        self.gateway_url = f"https://127.0.0.1:{secure}"
        self.ca = str(tls / "ca.crt")
        directory = self.gateway_place = tempfile.mkdtemp(prefix="hwrgw", dir="/tmp")
        ports = [str(free_port()) for _ in range(3)]
        script = REPO / "tests/servers/rgw-up.sh"
        # Without the last each small answer comes 40 ms late: Nagle's algorithm there, delayed ACK here.
        more = f"ssl_endpoint=127.0.0.1:{secure} ssl_certificate={pem} tcp_nodelay=1"
        self.gateway = subprocess.Popen(
            of_the_store(["sh", str(script), directory, *ports, KEY, SECRET, BUCKET]),
            env=os.environ | {"RGW_MORE_FRONTEND": more, "RGW_BYTES_MAX": str(10 << 30)},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

    def start_other_gateway(self):
        """Starts another S3 server, which speaks no TLS and takes directories below its own for buckets."""
        self.gateway_port, self.ca = free_port(), None
        self.gateway_url = f"http://127.0.0.1:{self.gateway_port}"
        place = self.directory("other-s3")
        (place / BUCKET).mkdir()
        words = {"port": self.gateway_port, "key": KEY, "secret": SECRET, "directory": place}
        command = OTHER_S3.format(**words).split()
        self.gateway = subprocess.Popen(of_the_store(command), stdin=subprocess.PIPE)
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", self.gateway_port)).close()
                self.gateway_ready = True
                return
            except ConnectionRefusedError:
                time.sleep(0.1)
        raise RuntimeError(f"this S3 server did not start: {command}")

    def wait_for_gateway(self):
        if not self.gateway_ready and self.gateway.stdout.readline().strip() != "ready":
            raise RuntimeError("Ceph RGW did not start; see the log in the newest /tmp/hwrgw*")
        self.gateway_ready = True

    def stop_gateway(self):
        if self.gateway:
            # The script stops its servers when its input ends.
            self.gateway.stdin.close()
            if OTHER_S3 is not None:
                self.gateway.terminate()
            self.gateway.wait(timeout=30)
            self.gateway = None

    def close(self):
        try:
            for child in list(self.residents):
                self.leave(child)
            self.stop_gateway()
        finally:
            if self.postgres:
                self.postgres.send_signal(signal.SIGQUIT)
                self.postgres.wait(timeout=60)
            shutil.rmtree(self.place, ignore_errors=True)

//! One PostgreSQL server: made, started, asked, stopped, removed.

use super::binary::Highwater;
use super::lab::Lab;
use super::templates::Kind;
use super::trees::{Tree, give_to_server_user};
use super::wait::{passes_within, wait_for};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// Recovery of a test cluster, or its shutdown checkpoint, is done within this.
const SERVER_LIMIT: Duration = Duration::from_mins(2);

/// How often a start is tried again with another port when one is taken.
const PORT_TRIES: u32 = 5;

/// What a new cluster is to be.
#[derive(Clone)]
#[must_use]
pub struct ClusterBuilder {
    lab: Lab,
    major: u32,
    name: String,
    segment_mib: u32,
    checksums: bool,
    settings: Vec<String>,
    tablespaces: Vec<String>,
    listen: Listen,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Listen {
    SocketOnly,
    Loopback,
    LoopbackTls,
}

/// A cluster on disk and, between `start` and a stop, its server.
pub struct Cluster {
    pub major: u32,
    pub pgdata: PathBuf,
    tree: Tree,
    lab: Lab,
    name: String,
    listen: Listen,
    port: u16,
    server: Option<Child>,
    starts: u32,
}

impl ClusterBuilder {
    pub(super) fn new(lab: Lab, major: u32) -> Self {
        Self {
            lab,
            major,
            name: "pg".into(),
            segment_mib: 16,
            checksums: true,
            settings: Vec::new(),
            tablespaces: Vec::new(),
            listen: Listen::SocketOnly,
        }
    }

    /// Names the directory below the lab; needed for a second cluster.
    pub fn named(mut self, name: &str) -> Self {
        self.name = name.into();
        self
    }

    /// Sets the WAL segment size, a power of two from 1 to 1024 MiB.
    pub fn segment_mib(mut self, mib: u32) -> Self {
        self.segment_mib = mib;
        self
    }

    /// Leaves data checksums off.
    pub fn without_checksums(mut self) -> Self {
        self.checksums = false;
        self
    }

    /// Adds a line to postgresql.conf.
    pub fn conf(mut self, line: &str) -> Self {
        self.settings.push(line.into());
        self
    }

    /// Makes a tablespace of this name when the server first runs.
    pub fn tablespace(mut self, name: &str) -> Self {
        self.tablespaces.push(name.into());
        self
    }

    /// Listens on a loopback port and asks for SCRAM there: user `scram`,
    /// password `s3cret`.
    pub fn loopback(mut self) -> Self {
        self.listen = Listen::Loopback;
        self
    }

    /// Listens as `loopback` does, and only over TLS, with a certificate for
    /// `localhost` that stands in `tls/server.crt` of the lab.
    pub fn loopback_tls(mut self) -> Self {
        self.listen = Listen::LoopbackTls;
        self
    }

    /// Makes the cluster as initdb does and does not start it.
    pub fn create(self) -> Cluster {
        let pgdata = self.lab.path().join(&self.name);
        let kind =
            Kind { major: self.major, segment_mib: self.segment_mib, checksums: self.checksums };
        // Two clusters of one test must differ in their system identifiers.
        if kind.has_template() && self.lab.copies_first(kind) {
            kind.copy(&pgdata);
        } else {
            kind.make(&pgdata);
        }
        self.configure(&pgdata);
        let mut cluster = Cluster::adopt_as(self.lab.clone(), self.major, &pgdata, &self.name);
        cluster.listen = self.listen;
        cluster
    }

    /// Makes the cluster and starts it.
    pub fn start(self) -> Cluster {
        let tablespaces = self.tablespaces.clone();
        let listen = self.listen;
        let mut cluster = self.create();
        cluster.start();
        for name in tablespaces {
            let place = cluster.lab.directory(&format!("{}-{name}", cluster.name));
            cluster.sql(&format!("create tablespace {name} location '{}'", place.display()));
        }
        if listen != Listen::SocketOnly {
            cluster.sql("create role scram superuser replication login password 's3cret'");
        }
        cluster
    }

    fn configure(&self, pgdata: &Path) {
        // A test kills processes, never the machine, so that the page cache
        // survives and fsync would only cost time.
        let mut conf = String::from(
            "\nfsync = off\nshared_buffers = 32MB\nmax_connections = 50\ntimezone = 'UTC'\n\
             log_timezone = 'UTC'\nmin_wal_size = 32MB\nautovacuum_naptime = '1h'\n",
        );
        // A checkpoint that a backup asks for without `--fast` would rest a tenth of a second after each page.
        conf.push_str("checkpoint_completion_target = 0\n");
        // What was written stays in pg_wal for the test to look at.
        let keep = (self.segment_mib * 4).max(512);
        write!(conf, "wal_keep_size = {keep}MB\nmax_wal_size = {}MB\n", keep * 2).unwrap();
        if self.segment_mib > 16 {
            writeln!(conf, "min_wal_size = {}MB", self.segment_mib * 2).unwrap();
        }
        for line in &self.settings {
            conf.push_str(line);
            conf.push('\n');
        }
        if self.listen != Listen::SocketOnly {
            let mut hba = String::from("local all all trust\nlocal replication all trust\n");
            let kind = if self.listen == Listen::LoopbackTls { "hostssl" } else { "host" };
            for database in ["all", "replication"] {
                writeln!(hba, "{kind} {database} scram 127.0.0.1/32 scram-sha-256").unwrap();
            }
            std::fs::write(pgdata.join("pg_hba.conf"), hba).unwrap();
            conf.push_str("password_encryption = 'scram-sha-256'\n");
        }
        if self.listen == Listen::LoopbackTls {
            let tls = self.certificate();
            writeln!(conf, "ssl = on\nssl_cert_file = '{0}/server.crt'", tls.display()).unwrap();
            writeln!(conf, "ssl_key_file = '{0}/server.key'", tls.display()).unwrap();
        }
        append(&pgdata.join("postgresql.conf"), &conf);
    }

    fn certificate(&self) -> PathBuf {
        let tls = self.lab.directory("tls");
        let mut openssl = super::trees::as_server_user("/usr/bin/openssl");
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]);
        openssl.args(["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]);
        openssl.arg("-keyout").arg(tls.join("server.key")).arg("-out").arg(tls.join("server.crt"));
        finish(openssl);
        tls
    }
}

impl Cluster {
    /// Takes charge of a data directory that something else made.
    pub fn adopt(lab: &Lab, major: u32, pgdata: &Path) -> Self {
        let name = pgdata.file_name().unwrap().to_str().unwrap().to_owned();
        Self::adopt_as(lab.clone(), major, pgdata, &name)
    }

    fn adopt_as(lab: Lab, major: u32, pgdata: &Path, name: &str) -> Self {
        lab.directory(&format!("{name}-socket"));
        Self {
            major,
            tree: Tree::of(major),
            lab,
            pgdata: pgdata.to_path_buf(),
            name: name.to_owned(),
            listen: Listen::SocketOnly,
            port: 5432,
            server: None,
            starts: 0,
        }
    }

    /// Starts the server and waits until it takes connections.
    #[track_caller]
    pub fn start(&mut self) -> &mut Self {
        if let Err(log) = self.try_start() {
            panic!("{} did not start:\n{log}", self.name);
        }
        self
    }

    /// Starts the server; returns its log if it ends before it takes connections.
    pub fn try_start(&mut self) -> Result<(), String> {
        for _ in 0..PORT_TRIES {
            let result = self.start_once();
            let taken = |log: &String| log.contains("Address already in use");
            if self.listen == Listen::SocketOnly || !result.as_ref().is_err_and(taken) {
                return result;
            }
        }
        Err(format!("no free port in {PORT_TRIES} tries"))
    }

    fn start_once(&mut self) -> Result<(), String> {
        assert!(self.server.is_none(), "{} runs already", self.name);
        self.starts += 1;
        let log = std::fs::File::create(self.log_path()).unwrap();
        let mut command = self.tree.tool("postgres");
        command.arg("-D").arg(&self.pgdata);
        // On the command line, since a restored directory brings the settings
        // of its origin.
        let address = if self.listen == Listen::SocketOnly {
            "listen_addresses="
        } else {
            self.port = free_port();
            "listen_addresses=127.0.0.1"
        };
        command.args(["-c", address, "-c", &format!("port={}", self.port)]);
        command.args(["-c", &format!("unix_socket_directories={}", self.socket().display())]);
        command.args(["-c", "logging_collector=off", "-c", "log_destination=stderr"]);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.server = Some(command.spawn().expect("postgres starts"));
        let mut ended = false;
        let ready = passes_within(SERVER_LIMIT, || {
            ended = !self.runs();
            ended || self.takes_connections()
        });
        if ended || !ready {
            self.kill9();
            return Err(self.log());
        }
        Ok(())
    }

    /// Waits until the server ends by itself; returns its log.
    pub fn wait_for_end(&mut self) -> String {
        wait_for("the server ends", SERVER_LIMIT, || !self.runs());
        self.server = None;
        self.log()
    }

    /// True while the server process exists.
    pub fn runs(&mut self) -> bool {
        self.server.as_mut().is_some_and(|server| server.try_wait().unwrap().is_none())
    }

    // Line 8 of postmaster.pid holds the state (src/include/utils/pidfile.h).
    fn takes_connections(&self) -> bool {
        let Ok(text) = std::fs::read_to_string(self.pgdata.join("postmaster.pid")) else {
            return false;
        };
        matches!(text.lines().nth(7).map(str::trim_end), Some("ready" | "standby"))
    }

    /// Stops the server as `pg_ctl stop -m fast` does.
    pub fn fast_stop(&mut self) {
        self.stop_with(rustix::process::Signal::INT);
    }

    /// Ends the server without a shutdown checkpoint, so that the next start
    /// is a crash recovery (`pg_ctl stop -m immediate`).
    pub fn immediate_stop(&mut self) {
        self.stop_with(rustix::process::Signal::QUIT);
    }

    fn stop_with(&mut self, signal: rustix::process::Signal) {
        if self.runs() {
            rustix::process::kill_process(self.pid(), signal).unwrap();
            wait_for("the server stops", SERVER_LIMIT, || !self.runs());
        }
        self.server = None;
    }

    /// Kills the server with SIGKILL and waits until its children are gone too.
    pub fn kill9(&mut self) {
        let children = if self.runs() { self.children() } else { Vec::new() };
        if let Some(mut server) = self.server.take() {
            server.kill().ok();
            server.wait().ok();
        }
        // Children notice the death of the postmaster by themselves.
        wait_for("the server's children end", SERVER_LIMIT, || {
            children.iter().all(|pid| has_ended(pid))
        });
        std::fs::remove_file(self.pgdata.join("postmaster.pid")).ok();
        for name in [format!(".s.PGSQL.{}", self.port), format!(".s.PGSQL.{}.lock", self.port)] {
            std::fs::remove_file(self.socket().join(name)).ok();
        }
    }

    /// Kills every process of the server at once, as the loss of its machine does.
    pub fn kill9_all(&mut self) {
        let children = self.children();
        rustix::process::kill_process(self.pid(), rustix::process::Signal::KILL).ok();
        for child in children {
            let child = child.parse().ok().and_then(rustix::process::Pid::from_raw);
            // It may have ended with its client a moment ago.
            child.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok());
        }
        self.kill9();
    }

    fn pid(&self) -> rustix::process::Pid {
        let id = self.server.as_ref().expect("the server runs").id();
        rustix::process::Pid::from_raw(i32::try_from(id).unwrap()).unwrap()
    }

    fn children(&self) -> Vec<String> {
        let pid = self.pid().as_raw_nonzero();
        let path = format!("/proc/{pid}/task/{pid}/children");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// Reads the settings files again.
    pub fn reload(&self) {
        self.sql("select pg_reload_conf()");
    }

    /// Adds a line to postgresql.conf; the last one of a name counts.
    pub fn set(&self, line: &str) {
        append(&self.pgdata.join("postgresql.conf"), &format!("{line}\n"));
    }

    /// Points `archive_command` at this repository and reloads.
    pub fn archive_into(&self, highwater: &Highwater) {
        self.set(&archive_line(highwater));
        self.reload();
    }

    /// Has the archiver try again now: after three failures of a file it rests for a minute.
    pub fn wake_archiver(&self) {
        self.reload();
    }

    /// Promotes a standby and waits until it accepts writes.
    pub fn promote(&self) {
        // Not waiting in the server: a statement that waits may be cancelled for what recovery replays meanwhile.
        assert_eq!(self.sql("select pg_promote(false)"), "t");
        self.wait_until("select pg_is_in_recovery()", "f");
    }

    /// Runs SQL, which must succeed, and returns rows as lines with `|` between columns.
    #[track_caller]
    pub fn sql(&self, sql: &str) -> String {
        match self.try_sql(sql) {
            Ok(rows) => rows,
            Err(error) => panic!("{sql}: {error}\n--- log of {}\n{}", self.name, self.log()),
        }
    }

    /// Runs SQL; returns psql's error text if it fails.
    pub fn try_sql(&self, sql: &str) -> Result<String, String> {
        let output =
            self.client("psql").args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-c", sql]).output();
        let output = output.expect("psql starts");
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into_owned());
        }
        Ok(String::from_utf8(output.stdout).unwrap().trim_end().to_owned())
    }

    /// Waits until a query returns exactly this text.
    #[track_caller]
    pub fn wait_until(&self, sql: &str, wanted: &str) {
        let mut last = String::new();
        let seen = passes_within(SERVER_LIMIT, || {
            last = self.try_sql(sql).unwrap_or_else(|error| error);
            last == wanted
        });
        assert!(seen, "{sql} gives {last:?}, not {wanted:?}\n--- log\n{}", self.log());
    }

    /// Waits until the server has nothing left to archive up to this file.
    #[track_caller]
    pub fn wait_archived(&self, file: &str) {
        let done = self.pgdata.join(format!("pg_wal/archive_status/{file}.done"));
        let archived = passes_within(SERVER_LIMIT, || done.exists());
        assert!(archived, "{file} was not archived:\n{}", self.log());
    }

    /// Ends the current segment and returns its name. Something is written
    /// first, since a switch right after another does nothing.
    pub fn switch_wal(&self) -> String {
        self.sql(
            "select pg_logical_emit_message(true, 'test', 'a segment of its own'); \
             select pg_walfile_name(pg_switch_wal())",
        )
        .lines()
        .last()
        .unwrap()
        .to_owned()
    }

    /// Ends the current segment, waits until it is archived, returns its name.
    pub fn archive_now(&self) -> String {
        let file = self.switch_wal();
        self.wait_archived(&file);
        file
    }

    /// Runs pgbench with these arguments to its end.
    pub fn pgbench(&self, arguments: &[&str]) -> Output {
        let mut command = self.client("pgbench");
        command.args(arguments);
        finish(command)
    }

    /// Starts pgbench in the background; the caller waits for it or kills it.
    pub fn pgbench_in_background(&self, arguments: &[&str]) -> Child {
        let mut command = self.client("pgbench");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("pgbench starts")
    }

    /// Returns everything in the cluster as SQL text that can be compared.
    pub fn dump(&self) -> String {
        let mut command = self.client("pg_dumpall");
        command.arg("--no-sync");
        let text = String::from_utf8(finish(command).stdout).unwrap();
        // These two carry a random word in each dump.
        let random = ["\\restrict", "\\unrestrict"];
        let fixed = |line: &&str| !random.iter().any(|word| line.starts_with(word));
        text.lines().filter(fixed).collect::<Vec<_>>().join("\n")
    }

    /// Checks every table and index with pg_amcheck.
    pub fn amcheck(&self) {
        let mut command = self.client("pg_amcheck");
        command.args(["--all", "--install-missing", "--heapallindexed"]);
        finish(command);
    }

    /// Returns one of the tree's programs, to run as the server's user.
    pub fn tool(&self, name: &str) -> Command {
        self.tree.tool(name)
    }

    /// Returns one of the tree's client programs, set up to connect to this server.
    pub fn client(&self, name: &str) -> Command {
        let mut command = self.tree.tool(name);
        command.env("PGHOST", self.socket()).env("PGPORT", self.port.to_string());
        command.env("PGUSER", "postgres").env("PGDATABASE", "postgres");
        command
    }

    /// Returns one value of pg_controldata, by the name it prints.
    pub fn control(&self, name: &str) -> String {
        let output = finish({
            let mut command = self.tool("pg_controldata");
            command.arg("-D").arg(&self.pgdata);
            command
        });
        let text = String::from_utf8(output.stdout).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name:?} not in:\n{text}")).trim().to_owned()
    }

    /// Returns the path of a WAL file in pg_wal.
    pub fn wal(&self, name: &str) -> PathBuf {
        self.pgdata.join("pg_wal").join(name)
    }

    /// Lists complete segments in pg_wal that are no longer written to, in order.
    pub fn finished_segments(&self) -> Vec<String> {
        // Plus one, for older servers name a position on a border after the
        // segment before it.
        let current = self.sql("select pg_walfile_name(pg_current_wal_lsn() + 1)");
        let entries = std::fs::read_dir(self.pgdata.join("pg_wal")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut found: Vec<_> = names.filter(|name| name.len() == 24 && *name < current).collect();
        found.sort();
        found
    }

    /// Returns the connection string over the unix socket.
    pub fn dsn(&self) -> String {
        let socket = self.socket();
        format!("host={} port={} user=postgres dbname=postgres", socket.display(), self.port)
    }

    /// Returns the connection string that names several servers of the lab, those that are not
    /// made yet by the name they will have.
    pub fn dsn_of(lab: &Lab, names: &[&str]) -> String {
        let socket = |name: &&str| lab.path().join(format!("{name}-socket")).display().to_string();
        let hosts: Vec<_> = names.iter().map(socket).collect();
        format!("host={} port=5432 user=postgres dbname=postgres", hosts.join(","))
    }

    /// Returns the loopback port, after `start`.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the directory of a tablespace made by the builder.
    pub fn tablespace(&self, name: &str) -> PathBuf {
        self.lab.path().join(format!("{}-{name}", self.name))
    }

    /// Copies the stopped or running cluster with pg_basebackup as a streaming
    /// standby, and starts it.
    pub fn standby(&self, name: &str, settings: &[&str]) -> Self {
        let pgdata = self.lab.path().join(name);
        let mut command = self.client("pg_basebackup");
        command.arg("-D").arg(&pgdata).args(["-R", "-X", "stream", "-c", "fast", "--no-sync"]);
        finish(command);
        let mut standby = Self::adopt(&self.lab, self.major, &pgdata);
        for line in settings {
            standby.set(line);
        }
        standby.start();
        standby
    }

    /// Returns the server's log since its last start.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_path(&self) -> PathBuf {
        self.lab.path().join(format!("{}-{}.log", self.name, self.starts))
    }

    fn socket(&self) -> PathBuf {
        self.lab.path().join(format!("{}-socket", self.name))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.runs() {
            if std::thread::panicking() {
                eprintln!("--- log of {}\n{}", self.name, self.log());
            }
            rustix::process::kill_process(self.pid(), rustix::process::Signal::QUIT).ok();
            passes_within(Duration::from_secs(10), || !self.runs());
        }
        if let Some(mut server) = self.server.take() {
            server.kill().ok();
            server.wait().ok();
        }
    }
}

/// pgbench in the background, ended when dropped.
pub struct Load(Child);

impl Load {
    /// Begins: four clients on the tables that `pgbench -i` made.
    pub fn on(cluster: &Cluster) -> Self {
        Self(cluster.pgbench_in_background(&["-n", "-c", "4", "-T", "600"]))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Runs a command that must succeed.
#[track_caller]
pub fn finish(mut command: Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn archive_line(highwater: &Highwater) -> String {
    format!("archive_command = '{}'", highwater.archive_command())
}

fn append(path: &Path, text: &str) {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    std::fs::write(path, old + text).unwrap();
    give_to_server_user(path);
}

/// True if a process is gone, or is a zombie that nobody collects: a container
/// may have no init that does.
fn has_ended(pid: &str) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
}

/// Returns a loopback port that nothing listened on a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

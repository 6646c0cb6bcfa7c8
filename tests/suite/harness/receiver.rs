//! `highwater receive`, or `highwater agent`, while it runs, and what the server knows of it.

use super::binary::{Highwater, Run, Running};
use super::cluster::Cluster;
use super::wait::{passes_within, wait_for};
use rustix::process::Signal;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Within this a receiver has said, stored or noticed whatever a test waits for: its pauses
/// between two attempts are at most 15 s.
const LIMIT: Duration = Duration::from_secs(90);

/// A running receiver or agent. Killed when dropped, and its log shown if the test has failed.
pub struct Receiver {
    running: Option<Running>,
    log: PathBuf,
}

impl Receiver {
    /// Starts `receive` with these further arguments.
    pub fn start(highwater: &Highwater, arguments: &[&str]) -> Self {
        let mut all = vec!["-v", "receive"];
        all.extend(arguments);
        Self::service(highwater, &all)
    }

    /// Starts an agent for this data directory, with these further arguments, and waits until it serves.
    #[track_caller]
    pub fn agent(highwater: &Highwater, pgdata: &Path, arguments: &[&str]) -> Self {
        let mut all = vec!["-vv", "--json", "agent", "--pgdata", pgdata.to_str().unwrap()];
        all.extend(arguments);
        let agent = Self::service(highwater, &all);
        agent.wait_says("serving");
        agent
    }

    /// Starts another command that runs for long.
    pub fn service(highwater: &Highwater, all: &[&str]) -> Self {
        let mut command = highwater.command();
        command.args(all);
        Self::of(highwater, command, all.join(" "))
    }

    /// Starts a prepared command that runs for long.
    pub fn of(highwater: &Highwater, command: Command, arguments: String) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("service-{}.log", COUNT.fetch_add(1, Ordering::Relaxed));
        let log = highwater.scratch(&name);
        let running = Running::start_logging(command, arguments, &log);
        Self { running: Some(running), log }
    }

    /// Returns its root directory as it sees it, with what is mounted for it alone.
    pub fn root(&self) -> PathBuf {
        let id = self.running.as_ref().expect("it was started").id();
        PathBuf::from(format!("/proc/{id}/root"))
    }

    /// Starts `receive` and waits until this server streams to it.
    #[track_caller]
    pub fn streaming(highwater: &Highwater, cluster: &Cluster, arguments: &[&str]) -> Self {
        let receiver = Self::start(highwater, arguments);
        receiver.wait_streaming(cluster);
        receiver
    }

    /// Returns what it has said so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until it has said this.
    #[track_caller]
    pub fn wait_says(&self, text: &str) {
        let said = passes_within(LIMIT, || self.log().contains(text));
        assert!(said, "{text:?} not in\n{}", self.log());
    }

    /// Waits until this server streams to it.
    #[track_caller]
    pub fn wait_streaming(&self, cluster: &Cluster) {
        let query = "select count(*) > 0 from pg_stat_replication \
                     where application_name = 'highwater' and state = 'streaming'";
        let streams = passes_within(LIMIT, || cluster.try_sql(query).as_deref() == Ok("t"));
        assert!(streams, "nothing is streamed:\n{}\n--- server\n{}", self.log(), cluster.log());
    }

    /// Waits until all that is flushed on this primary now is acknowledged; returns its end.
    #[track_caller]
    pub fn wait_acknowledged(&self, cluster: &Cluster) -> String {
        let lsn = cluster.sql("select pg_current_wal_flush_lsn()");
        let query = format!(
            "select coalesce(max(flush_lsn) >= '{lsn}', false) from pg_stat_replication \
             where application_name = 'highwater'"
        );
        let done = passes_within(LIMIT, || cluster.try_sql(&query).as_deref() == Ok("t"));
        assert!(done, "{lsn} is not acknowledged:\n{}", self.log());
        lsn
    }

    /// Returns the most memory that it has had so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        self.status("VmHWM:")
    }

    /// The same without its code and libraries, which a build for tests has more of.
    pub fn peak_memory_without_code(&self) -> u64 {
        self.peak_memory().saturating_sub(self.status("RssFile:"))
    }

    fn status(&self, field: &str) -> u64 {
        let pid = self.running.as_ref().expect("it was started").id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        kib << 10
    }

    /// Returns the most address space that it has had so far, in bytes.
    pub fn peak_address_space(&self) -> u64 {
        self.status("VmPeak:")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        self.running.as_ref().expect("it was started").signal(signal);
    }

    /// True while the process exists.
    pub fn runs(&mut self) -> bool {
        self.running.as_mut().is_some_and(|running| !running.ended())
    }

    /// Asks it to stop, and waits for that.
    #[track_caller]
    pub fn terminate(mut self) -> Run {
        let running = self.running.take().expect("it was started");
        running.signal(Signal::TERM);
        self.with_log(running.wait())
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn wait(mut self) -> Run {
        wait_for("the receiver ends by itself", LIMIT, || !self.runs());
        let running = self.running.take().expect("it was started");
        self.with_log(running.wait())
    }

    /// Kills it with SIGKILL.
    pub fn kill9(mut self) -> Run {
        let running = self.running.take().expect("it was started");
        let run = running.kill_after(Duration::ZERO);
        self.with_log(run)
    }

    fn with_log(&self, run: Run) -> Run {
        Run { stderr: self.log(), ..run }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        if self.running.is_some() && std::thread::panicking() {
            eprintln!("--- log of the receiver\n{}", self.log());
        }
    }
}

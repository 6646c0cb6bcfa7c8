//! The binary under test.

use super::lab::Lab;
use super::trees::{as_server_user, cache};
use super::wait::passes_within;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// No command of these tests needs longer; one that does hangs.
const LIMIT: Duration = Duration::from_mins(4);

/// The binary, set up for one cluster in one repository.
#[derive(Clone)]
pub struct Highwater {
    lab: Lab,
    repo: String,
    cluster: String,
    env: Vec<(String, String)>,
    directory: PathBuf,
}

/// What one run of the binary did.
#[derive(Debug)]
pub struct Run {
    pub arguments: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub elapsed: Duration,
}

/// The most memory that a process had, in KiB, from `/proc`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Peaks {
    /// In memory at one moment (`VmHWM`).
    pub resident: u64,
    /// Of that, pages of files: its code and libraries (the most of `RssFile`).
    pub code: u64,
    /// Reserved at one moment (`VmPeak`).
    pub address_space: u64,
}

impl Peaks {
    /// Takes in what the kernel says now; it keeps the peaks itself until the process ends.
    fn look(&mut self, pid: u32) {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.trim_matches([':', '\t', ' ', 'k', 'B']).parse().ok())
        };
        self.resident = self.resident.max(field("VmHWM").unwrap_or(0));
        self.code = self.code.max(field("RssFile").unwrap_or(0));
        self.address_space = self.address_space.max(field("VmPeak").unwrap_or(0));
    }
}

/// A run that has not ended yet. Killed when dropped.
pub struct Running {
    arguments: String,
    child: Child,
    started: Instant,
    stdout: Option<JoinHandle<String>>,
    stderr: Option<JoinHandle<String>>,
}

impl Highwater {
    pub(super) fn new(lab: Lab, repo: &str, cluster: &str) -> Self {
        let directory = lab.path().to_path_buf();
        Self { lab, repo: repo.into(), cluster: cluster.into(), env: Vec::new(), directory }
    }

    /// The same binary and repository for another cluster name.
    #[must_use]
    pub fn for_cluster(&self, cluster: &str) -> Self {
        Self { cluster: cluster.into(), ..self.clone() }
    }

    /// The same with another repository URL.
    #[must_use]
    pub fn for_repo(&self, repo: &str) -> Self {
        Self { repo: repo.into(), ..self.clone() }
    }

    /// The same with one more environment variable.
    #[must_use]
    pub fn with_env(&self, name: &str, value: &str) -> Self {
        let mut changed = self.clone();
        changed.env.push((name.into(), value.into()));
        changed
    }

    /// The same with this one's repository as a second one, with its key and its store options.
    #[must_use]
    pub fn with_second(&self, second: &Self) -> Self {
        let mut both = self.with_env("HIGHWATER_SECOND_REPO", &second.repo);
        if let Some(file) = second.env_of("HIGHWATER_KEY_FILE") {
            both = both.with_env("HIGHWATER_SECOND_KEY_FILE", file);
        }
        if let Some(file) = second.env_of("HIGHWATER_CONFIG") {
            let options = std::fs::read_to_string(file).unwrap();
            let options = options.replace("[repo.options]", "[second_repo.options]");
            let file = self.lab.write("both.toml", options.as_bytes());
            std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
            both = both.with_env("HIGHWATER_CONFIG", file.to_str().unwrap());
        }
        both
    }

    /// The same, repeating a request to a store that is away only so often; `archive_command` does so too.
    #[must_use]
    pub fn with_retries(&self, count: u32) -> Self {
        let count = count.to_string();
        let changed = self.with_env("HIGHWATER_REPO_RETRIES", &count);
        if self.env_of("HIGHWATER_SECOND_REPO").is_none() {
            return changed;
        }
        changed.with_env("HIGHWATER_SECOND_REPO_RETRIES", &count)
    }

    fn env_of(&self, name: &str) -> Option<&str> {
        let (_, value) = self.env.iter().rfind(|(known, _)| known == name)?;
        Some(value)
    }

    /// The same without one environment variable.
    #[must_use]
    pub fn without_env(&self, name: &str) -> Self {
        let mut changed = self.clone();
        changed.env.retain(|(known, _)| known != name);
        changed
    }

    /// The same with this file as its key.
    #[must_use]
    pub fn with_key(&self, file: &Path) -> Self {
        let changed = self.without_env("HIGHWATER_KEY_FILE");
        changed.with_env("HIGHWATER_KEY_FILE", file.to_str().unwrap())
    }

    /// Makes a key in a new file of the lab.
    pub fn new_key(&self, name: &str) -> PathBuf {
        let file = self.lab.path().join(name);
        self.run(&["key", "new", file.to_str().unwrap()]).done();
        file
    }

    /// The same, talking to this server.
    #[must_use]
    pub fn on(&self, cluster: &super::Cluster) -> Self {
        self.with_env("HIGHWATER_DSN", &cluster.dsn())
    }

    /// The same, started in another working directory.
    #[must_use]
    pub fn in_directory(&self, directory: &Path) -> Self {
        Self { directory: directory.into(), ..self.clone() }
    }

    /// Returns the directory of the repository, for a local one.
    pub fn repo_directory(&self) -> PathBuf {
        PathBuf::from(self.repo.strip_prefix("file://").expect("a local-directory repository"))
    }

    /// Returns the URL of the repository.
    pub(super) fn repo_url(&self) -> &str {
        &self.repo
    }

    /// Returns the path of a file in the lab, for what a test notes beside the repository.
    pub(super) fn scratch(&self, name: &str) -> PathBuf {
        self.lab.path().join(name)
    }

    /// Returns the value for PostgreSQL's `archive_command`.
    pub fn archive_command(&self) -> String {
        format!("{} archive-push %p", self.prefix())
    }

    /// Returns the value for PostgreSQL's `restore_command`.
    pub fn restore_command(&self) -> String {
        format!("{} archive-get %f %p", self.prefix())
    }

    fn prefix(&self) -> String {
        let binary = reachable_binary().display();
        let file = self.env_of("HIGHWATER_CONFIG");
        let file = file.map_or_else(String::new, |file| format!(" --config {file}"));
        let key = self.env_of("HIGHWATER_KEY_FILE");
        let key = key.map_or_else(String::new, |file| format!(" --key-file {file}"));
        let second: String = [
            ("HIGHWATER_SECOND_REPO", "--second-repo"),
            ("HIGHWATER_SECOND_KEY_FILE", "--second-key-file"),
        ]
        .into_iter()
        .filter_map(|(name, flag)| Some(format!(" {flag} {}", self.env_of(name)?)))
        .collect();
        // They have no flags; the server's shell takes them so.
        let retries: String = ["HIGHWATER_REPO_RETRIES", "HIGHWATER_SECOND_REPO_RETRIES"]
            .into_iter()
            .filter_map(|name| Some(format!("{name}={} ", self.env_of(name)?)))
            .collect();
        let (repo, cluster) = (&self.repo, &self.cluster);
        format!("{retries}{binary}{file} --repo {repo} --cluster {cluster}{key}{second}")
    }

    /// Returns a command with the settings of this repository in its environment.
    pub fn command(&self) -> Command {
        let mut command = as_server_user(reachable_binary());
        self.settings_for(&mut command);
        command
    }

    /// Puts the settings of this repository into a command's environment.
    pub fn settings_for(&self, command: &mut Command) {
        command
            .current_dir(&self.directory)
            .env("HOME", self.lab.path())
            .env("HIGHWATER_REPO", &self.repo)
            .env("HIGHWATER_CLUSTER", &self.cluster)
            .envs(self.env.iter().map(|(name, value)| (name, value)));
    }

    /// Runs a command to its end, which must come within a few minutes.
    pub fn run(&self, arguments: &[&str]) -> Run {
        self.spawn(arguments).wait()
    }

    /// Starts a command.
    pub fn spawn(&self, arguments: &[&str]) -> Running {
        let mut command = self.command();
        command.args(arguments);
        Running::start(command, arguments.join(" "))
    }

    /// Pushes one WAL file.
    pub fn push(&self, path: &Path) -> Run {
        self.run(&["archive-push", path.to_str().unwrap()])
    }

    /// Asks for one WAL file.
    pub fn get(&self, name: &str, path: &Path) -> Run {
        self.run(&["archive-get", name, path.to_str().unwrap()])
    }

    /// Returns the document of `info --json`.
    pub fn info(&self) -> serde_json::Value {
        self.run(&["--json", "info"]).done().json()
    }
}

impl Running {
    /// Starts a prepared command.
    pub fn start(command: Command, arguments: String) -> Self {
        Self::start_with(command, arguments, Stdio::piped())
    }

    /// Starts a prepared command whose talk goes to a file, to be read while it runs.
    pub(super) fn start_logging(command: Command, arguments: String, log: &Path) -> Self {
        let log = std::fs::File::create(log).unwrap();
        Self::start_with(command, arguments, log.into())
    }

    fn start_with(mut command: Command, arguments: String, stderr: Stdio) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().expect("the binary starts");
        let stdout = child.stdout.take().map(drain);
        let stderr = child.stderr.take().map(drain);
        Self { arguments, child, started: Instant::now(), stdout, stderr }
    }

    /// Returns the process's number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// True once the process has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for the end.
    pub fn wait(mut self) -> Run {
        if !passes_within(LIMIT, || self.ended()) {
            self.child.kill().ok();
            let run = self.collect();
            panic!("hangs, killed after {LIMIT:?}: {run}");
        }
        self.collect()
    }

    /// Waits for the end and looks every few milliseconds how much memory the process has had.
    pub fn wait_watching_memory(mut self) -> (Run, Peaks) {
        let mut peaks = Peaks::default();
        let ended = passes_within(LIMIT, || {
            peaks.look(self.child.id());
            self.ended()
        });
        assert!(ended, "hangs after {LIMIT:?}: {}", self.arguments);
        (self.collect(), peaks)
    }

    /// Waits for `moment`, then kills the process with SIGKILL unless it ended before.
    pub fn kill_after(mut self, moment: Duration) -> Run {
        passes_within(moment, || self.ended());
        self.child.kill().ok();
        self.collect()
    }

    /// Sends a signal, which the process may handle.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the process has not been waited for");
    }

    fn collect(&mut self) -> Run {
        let status = self.child.wait().unwrap();
        let text = |reader: &mut Option<JoinHandle<String>>| {
            reader.take().map(|reader| reader.join().unwrap()).unwrap_or_default()
        };
        Run {
            arguments: self.arguments.clone(),
            status,
            elapsed: self.started.elapsed(),
            stdout: text(&mut self.stdout),
            stderr: text(&mut self.stderr),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

impl Run {
    /// The exit code, or -1 for a process that was killed.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// True if a signal ended the process.
    pub fn was_killed(&self) -> bool {
        self.status.signal().is_some()
    }

    /// Fails the test unless the exit code is 0.
    #[track_caller]
    pub fn done(self) -> Self {
        self.ends_with(0)
    }

    /// Fails the test unless the exit code is this one.
    #[track_caller]
    pub fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.code(), code, "{self}");
        self
    }

    /// Fails the test unless stdout or stderr holds this text.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stdout.contains(text) || self.stderr.contains(text), "{text:?} not in {self}");
        self
    }

    /// Returns stdout as one JSON document.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}): {self}"))
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "highwater {} ended with {}", self.arguments, self.status)?;
        writeln!(f, "--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr)
    }
}

/// Reads a pipe to its end in a thread, so that a full pipe blocks nobody.
fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).ok();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// Returns the binary at a path that the server's user can reach: cargo's build
/// directory may be below somebody's home. `HIGHWATER_TEST_BINARY` puts another
/// one to the test, such as a release build.
pub fn reachable_binary() -> &'static Path {
    static PLACE: OnceLock<PathBuf> = OnceLock::new();
    PLACE.get_or_init(|| {
        let other = std::env::var_os("HIGHWATER_TEST_BINARY").map(PathBuf::from);
        let built = other.as_deref().unwrap_or(Path::new(env!("CARGO_BIN_EXE_highwater")));
        if as_server_user("/usr/bin/test").arg("-x").arg(built).status().unwrap().success() {
            return built.to_path_buf();
        }
        let directory = cache().join("bin");
        std::fs::create_dir_all(&directory).unwrap();
        let place = directory.join("highwater");
        let stage = directory.join(format!("highwater.{}", std::process::id()));
        std::fs::copy(built, &stage).unwrap();
        std::fs::set_permissions(&stage, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::rename(&stage, &place).unwrap();
        place
    })
}

//! The private server: its settings written, started, waited for, stopped.
//!
//! Its settings are decided in `plan::drill`. Never here: what is asked of it.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::binaries::Binaries;
use super::scratch::Scratch;
use super::watch::{Watch, not_started};
use super::{UNHARMED, not_on_disk};
use crate::failure::{Failure, Kind};
use crate::format::drill_text;
use crate::pg::ControlFile;
use crate::pgdata::{
    DiskError, Owner, PostmasterPid, read_control_bytes, restore_part, settings_text,
};
use crate::plan::drill::{PrivateServer, private_settings};

/// The role that checks connect as, made in the copy: the name of the cluster's own superuser is not known, and
/// none may be able to log in.
pub(super) const ROLE: &str = "highwater_drill";

/// How long a server may take that was told to stop at once; its children end within 5 s, or are killed by it.
const STOP_MAX: Duration = Duration::from_secs(30);

/// How often a server is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The part of a log that is looked through for what it says last.
const LOG_TAIL_BYTES: u64 = 256 << 10;

/// A server's access rule: whoever can reach its socket, which is nobody but its own user and root.
const HBA: &str = "local all all trust\n";

/// What every start of a program needs.
pub(super) struct Launch<'a> {
    pub(super) binaries: &'a Binaries,
    pub(super) scratch: &'a Scratch,
    /// Whose the server is, where root starts it.
    pub(super) owner: Option<Owner>,
    /// Variables that it must not have: those of libpq, some of which a server reads as well.
    pub(super) without_variables: &'a [String],
    /// `shared_preload_libraries`.
    pub(super) preload: &'a str,
}

/// A server that was started.
pub(super) struct Server {
    child: Child,
}

/// How a server came up.
pub(super) enum CameUp {
    /// It takes connections.
    Ready,
    /// It ended by itself.
    Ended,
}

impl Launch<'_> {
    /// Writes the settings of the server; those of the cluster that were restored with it are left unread.
    pub(super) fn write_settings(&self, major: u32) -> Result<(), Failure> {
        let scratch = self.scratch;
        let socket_directory = scratch.socket_directory();
        let (hba_file, ident_file) = (scratch.path("pg_hba.conf"), scratch.path("pg_ident.conf"));
        let control = self.control()?;
        let settings = private_settings(&PrivateServer {
            major,
            socket_directory: &socket_directory,
            hba_file: &hba_file,
            ident_file: &ident_file,
            limits: control.limits,
            segment_size: control.wal_segment_size,
            preload: self.preload,
        });
        let text = settings_text(&settings).map_err(|error| {
            let what = "could not write the settings of the private server";
            let next = "Use paths that a settings file can hold, without line breaks.";
            Failure::new(Kind::Usage, what, UNHARMED, next).because(error)
        })?;
        scratch.write("postgresql.conf", &text).map_err(not_on_disk)?;
        scratch.write("pg_hba.conf", HBA).map_err(not_on_disk)?;
        scratch.write("pg_ident.conf", "").map_err(not_on_disk)?;
        // It is read besides, whatever file is named, so only recovery's settings may stay in it.
        let auto = scratch.data().join("postgresql.auto.conf");
        let old =
            std::fs::read(&auto).map_err(|e| not_on_disk(DiskError::new("read", &auto, e)))?;
        scratch.write_at(&auto, restore_part(&old)).map_err(not_on_disk)
    }

    pub(super) fn control(&self) -> Result<ControlFile, Failure> {
        let bytes = read_control_bytes(&self.scratch.data()).map_err(not_on_disk)?;
        ControlFile::parse(&bytes).map_err(|error| {
            let what = "could not read the restored pg_control";
            let next = "`highwater verify --deep` tells whether the backup is whole.";
            Failure::new(Kind::Integrity, what, UNHARMED, next).because(error)
        })
    }

    /// Returns a command for one of PostgreSQL's programs, as the server's user and in a process group of its own,
    /// so that a key pressed on our terminal reaches us alone.
    pub(super) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.binaries.path(name));
        for variable in self.without_variables {
            command.env_remove(variable);
        }
        // Work ahead of recovery stays in this directory, whatever the settings say.
        command.env("HIGHWATER_SPOOL", "pg_wal");
        command.current_dir(self.scratch.root()).process_group(0);
        if let Some(Owner { uid, gid }) = self.owner {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn place(&self) -> [String; 4] {
        let config = self.scratch.path("postgresql.conf");
        let data = self.scratch.data();
        [
            "-D".into(),
            data.display().to_string(),
            "-c".into(),
            format!("config_file={}", config.display()),
        ]
    }

    /// Starts the server.
    pub(super) fn start(&self) -> Result<Server, Failure> {
        let log = || {
            let path = self.scratch.path("server.log");
            self.scratch.open(&path).map_err(not_on_disk)
        };
        let mut command = self.command("postgres");
        command.args(self.place()).stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        let child = command.spawn().map_err(|error| not_started(&command, error))?;
        Ok(Server { child })
    }

    /// Makes the role for checks, in single-user mode, which asks for no name. The server must be stopped.
    pub(super) async fn make_role(&self, watch: &mut Watch) -> Result<(), Failure> {
        // Each line is a command of its own; the role may be there already, and be less than we need.
        let sql = format!(
            "SET default_transaction_read_only = off;\n\
             CREATE ROLE {ROLE};\n\
             ALTER ROLE {ROLE} SUPERUSER LOGIN CONNECTION LIMIT -1;\n"
        );
        self.scratch.write("role.sql", &sql).map_err(not_on_disk)?;
        let file = self.scratch.path("role.sql");
        let mut said = String::new();
        // Any database will do; these are made by initdb, and each of them may have been dropped.
        for database in ["template1", "postgres", "template0"] {
            let stdin = std::fs::File::open(&file);
            let stdin = stdin.map_err(|e| not_on_disk(DiskError::new("read", &file, e)))?;
            let mut command = self.command("postgres");
            command.arg("--single").args(self.place()).arg(database);
            let ended = watch.program(command, stdin.into(), self.scratch).await?;
            if ended.code == Some(0) {
                return Ok(());
            }
            said = ended.text;
        }
        let next = "`--keep` keeps the files, so that you can look at the copy yourself.";
        let what = "could not make a role in the copy, in single-user mode";
        Err(Failure::new(Kind::Integrity, what, UNHARMED, next).because(said))
    }

    /// Returns the end of the server's log.
    pub(super) fn log_tail(&self) -> String {
        use std::io::{Read, Seek, SeekFrom};
        let read = || {
            let mut file = std::fs::File::open(self.scratch.path("server.log"))?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
        };
        read().unwrap_or_default()
    }

    pub(super) fn log_for_record(&self) -> String {
        drill_text(&self.log_tail())
    }
}

impl Server {
    fn pid_file(&self, launch: &Launch<'_>) -> Option<PostmasterPid> {
        let text = std::fs::read_to_string(launch.scratch.data().join("postmaster.pid")).ok()?;
        PostmasterPid::parse(&text).ok().filter(|found| found.pid == self.child.id())
    }

    /// Waits until the server has begun its work: its settings were read and its directory is its own.
    pub(super) async fn begun(
        &mut self,
        launch: &Launch<'_>,
        watch: &mut Watch,
    ) -> Result<CameUp, Failure> {
        self.until(launch, watch, |_| true).await
    }

    /// Waits until the server takes connections: recovery is over then.
    pub(super) async fn ready(
        &mut self,
        launch: &Launch<'_>,
        watch: &mut Watch,
    ) -> Result<CameUp, Failure> {
        self.until(launch, watch, |found| found.status.as_deref() == Some("ready")).await
    }

    async fn until(
        &mut self,
        launch: &Launch<'_>,
        watch: &mut Watch,
        is_there: impl Fn(&PostmasterPid) -> bool,
    ) -> Result<CameUp, Failure> {
        loop {
            if self.child.try_wait().is_ok_and(|status| status.is_some()) {
                return Ok(CameUp::Ended);
            }
            if self.pid_file(launch).is_some_and(|found| is_there(&found)) {
                return Ok(CameUp::Ready);
            }
            watch.pause(LOOK_EVERY).await?;
        }
    }

    /// Stops the server in good order (fast shutdown); returns whether it ended so.
    pub(super) async fn stop(&mut self, watch: &mut Watch) -> Result<bool, Failure> {
        self.signal(Signal::INT);
        Ok(watch.ended(&mut self.child).await?.success())
    }

    fn signal(&self, signal: Signal) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Once it has ended and was waited for, its number may be another's.
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            self.signal(Signal::QUIT);
            let until = Instant::now() + STOP_MAX;
            while self.child.try_wait().is_ok_and(|status| status.is_none()) {
                if Instant::now() >= until {
                    let _ = self.child.kill();
                }
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

//! What ends a drill early: a signal, the time it may take, and the room that must be left on the disk.

use std::future::Future;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::UNHARMED;
use super::scratch::Scratch;
use crate::failure::{Failure, Kind};
use crate::format::drill_text;
use crate::ops::StopRequest;
use crate::pgdata::free_bytes;

/// How often room and time are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// How often a program is asked whether it has ended.
const ASK_EVERY: Duration = Duration::from_millis(25);

/// Ends a drill.
pub(super) struct Watch {
    stop: StopRequest,
    /// A place on the file system that must keep its room.
    place: PathBuf,
    free_bytes_min: u64,
    /// What may be waited for, and how long; set when the server is started.
    deadline: Option<(Instant, Duration)>,
}

impl Watch {
    pub(super) fn new(stop: StopRequest, place: PathBuf, free_bytes_min: u64) -> Self {
        Self { stop, place, free_bytes_min, deadline: None }
    }

    /// From now on recovery and checks have so long.
    pub(super) fn limit(&mut self, time: Duration) {
        self.deadline = Some((Instant::now() + time, time));
    }

    /// Waits for `pause`.
    ///
    /// # Errors
    /// [`Kind::Stopped`], [`Kind::Integrity`] when the time is over, [`Kind::Disk`] when the room is.
    pub(super) async fn pause(&mut self, pause: Duration) -> Result<(), Failure> {
        tokio::select! {
            biased;
            signal = self.stop.wanted() => {
                return Err(Failure::new(
                    Kind::Stopped(signal),
                    format!("the drill was stopped by {signal}"),
                    UNHARMED,
                    "Nothing was proved; run it again.",
                ));
            }
            () = tokio::time::sleep(pause) => {}
        }
        if let Some((until, limit)) = self.deadline
            && Instant::now() >= until
        {
            return Err(Failure::new(
                Kind::Integrity,
                format!("recovery and checks were not over within {} s", limit.as_secs()),
                UNHARMED,
                "See where the time went: `--keep` keeps the files with the server's log. Give it more with `--timeout`, or take backups more often, so that less WAL is replayed.",
            ));
        }
        self.look_at_room()
    }

    fn look_at_room(&self) -> Result<(), Failure> {
        match free_bytes(&self.place) {
            Ok(free) if free < self.free_bytes_min => Err(Failure::new(
                Kind::Disk,
                format!(
                    "the file system of the scratch directory has {free} bytes left, less than the {} that must stay free",
                    self.free_bytes_min
                ),
                UNHARMED,
                "The drill has given its room back. Choose a larger place with `--scratch`, or lower `drill_disk_free_min` if nobody else needs that room.",
            )),
            // What cannot be asked is no reason to end.
            _ => Ok(()),
        }
    }

    /// Does some work, unless something ends the drill first; the work is dropped then.
    pub(super) async fn over<T>(
        &mut self,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                outcome = &mut work => return outcome,
                looked = self.pause(LOOK_EVERY) => looked?,
            }
        }
    }

    /// Waits until a program ends.
    pub(super) async fn ended(&mut self, child: &mut Child) -> Result<ExitStatus, Failure> {
        loop {
            if let Some(status) = child.try_wait().map_err(not_waited)? {
                return Ok(status);
            }
            self.pause(ASK_EVERY).await?;
        }
    }

    /// Runs a program to its end and returns its exit code and what it said (its end, bounded). The program is
    /// killed if something ends the drill first.
    pub(super) async fn program(
        &mut self,
        mut command: Command,
        stdin: Stdio,
        scratch: &Scratch,
    ) -> Result<Said, Failure> {
        let log = scratch.path("tools.log");
        scratch.write_at(&log, b"").map_err(super::not_on_disk)?;
        let said = || scratch.open(&log).map_err(super::not_on_disk);
        command.stdin(stdin).stdout(said()?).stderr(said()?);
        let mut child = command.spawn().map_err(|error| not_started(&command, error))?;
        let ended = self.ended(&mut child).await;
        if ended.is_err() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let text = std::fs::read(&log).unwrap_or_default();
        let text = drill_text(&String::from_utf8_lossy(&text));
        Ok(Said { code: ended?.code(), text })
    }
}

/// What a program said.
#[derive(Debug)]
pub(super) struct Said {
    /// Its exit code; `None` where a signal ended it.
    pub(super) code: Option<i32>,
    /// The end of what it wrote.
    pub(super) text: String,
}

pub(super) fn not_started(command: &Command, error: std::io::Error) -> Failure {
    Failure::new(
        Kind::Postgres,
        format!("could not start `{}`", command.get_program().display()),
        UNHARMED,
        "Look at the installation of PostgreSQL on this host; `--bindir` names another.",
    )
    .because(error)
}

fn not_waited(error: std::io::Error) -> Failure {
    let next = "Please report this with the lines above.";
    Failure::new(Kind::Bug, "could not wait for a program", UNHARMED, next).because(error)
}

//! Draining until nothing is left, or for as long as an agent lives.

use std::time::{Duration, Instant};

use super::{Destinations, Drained, Draining, OwnProgram, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::ops::StopRequest;
use crate::ops::failures::of_disk;
use crate::ops::stall::Stall;
use crate::pgdata::{SpoolLock, StallDirectory};

/// The pause after a failure, at first and at last. Shorter than [`crate::plan::stall::AWAY_SECONDS_MAX`], less what an
/// attempt takes: those who push rely on being told that the store is away.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_LAST: Duration = Duration::from_secs(30);

/// The pause between two backups that fail to close a gap, at first and at last; WAL is brought over meanwhile.
const BACKUP_PAUSE_FIRST: Duration = Duration::from_secs(5);
const BACKUP_PAUSE_LAST: Duration = Duration::from_mins(10);

/// How often and at what pauses the lock is asked for.
const LOCK_ATTEMPTS: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// How often an agent looks whether there is anything to do; and at last, while that must wait for something else.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_LAST: Duration = Duration::from_secs(10);

/// How long it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// Until nothing is left, or another process does it.
    UntilEmpty,
    /// Until it is asked to stop.
    ForEver,
}

/// Drains whenever there is something to drain, with growing pauses while that fails. Nobody is told but the log: what is
/// left stays where it is.
///
/// # Errors
/// The directory cannot be used.
pub async fn keep_drained(
    into: &Destinations,
    stall: &Stall,
    program: Option<&OwnProgram>,
    keeping: Keeping,
    mut stop: StopRequest,
) -> Result<Drained, Failure> {
    let mut all = Drained::default();
    let mut pause = PAUSE_FIRST;
    let mut backups = Backups { next: Instant::now(), pause: BACKUP_PAUSE_FIRST };
    let mut held: Option<(StallDirectory, SpoolLock)> = None;
    loop {
        if held.is_none() {
            held = take(stall).await?;
            if held.is_none() && keeping == Keeping::UntilEmpty {
                return Ok(all);
            }
        }
        let mut rest = LOOK_EVERY;
        if let Some((directory, _)) = &held
            && stall.is_pending()
        {
            all.gaps_open = Vec::new();
            let program = program.filter(|_| backups.next <= Instant::now());
            let mut run = Draining::new(into, stall, directory, &mut all);
            let outcome = tokio::select! {
                outcome = run.once(program) => outcome,
                _ = stop.wanted() => return Ok(all),
            };
            match outcome {
                Ok(is_done) => {
                    // What is left waits for a backup, or for one of two repositories; each look lists backups.
                    (rest, pause) = if is_done {
                        (LOOK_EVERY, PAUSE_FIRST)
                    } else {
                        (pause, (pause * 2).min(LOOK_LAST))
                    };
                    if program.is_some() {
                        backups.after(all.gaps_open.is_empty());
                    }
                }
                Err(failure) if keeping == Keeping::UntilEmpty && failure.kind != Kind::Store => {
                    return Err(failure);
                }
                Err(failure) => {
                    tracing::warn!("{failure}. It is tried again");
                    rest = pause;
                    pause = (pause * 2).min(PAUSE_LAST);
                }
            }
        } else if keeping == Keeping::UntilEmpty {
            // Somebody may have put a file there who saw that we were at work still.
            held = None;
            if !stall.is_pending() {
                return Ok(all);
            }
            continue;
        }
        if tokio::time::timeout(rest, stop.wanted()).await.is_ok() {
            return Ok(all);
        }
    }
}

/// When a backup is tried again.
struct Backups {
    next: Instant,
    pause: Duration,
}

impl Backups {
    fn after(&mut self, all_closed: bool) {
        if all_closed {
            self.pause = BACKUP_PAUSE_FIRST;
        } else {
            self.next = Instant::now() + self.pause;
            self.pause = (self.pause * 2).min(BACKUP_PAUSE_LAST);
        }
    }
}

/// Takes the right to drain; `None` if there is nothing yet, or another process has it. It is asked for more than once:
/// who looks whether anybody drains has the lock for a moment.
async fn take(stall: &Stall) -> Result<Option<(StallDirectory, SpoolLock)>, Failure> {
    let Some(directory) = stall.find()? else { return Ok(None) };
    for attempt in 0..LOCK_ATTEMPTS {
        if attempt > 0 {
            tokio::time::sleep(LOCK_PAUSE).await;
        }
        let lock = directory.lock().map_err(|error| {
            of_disk(error, format!("could not use `{}`", directory.path().display()), UNHARMED)
        })?;
        if let Some(lock) = lock {
            return Ok(Some((directory, lock)));
        }
    }
    Ok(None)
}

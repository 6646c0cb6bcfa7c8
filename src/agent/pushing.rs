//! Storing files before their own command comes, and answering it.
//!
//! ```text
//! archive_status: 7, 8, 9, … are ready -> several are stored at a time, the oldest first, histories before all
//! archive-push 7   stored, and nobody wrote to it since? -> "stored"
//! archive-push 8   on its way                            -> when it is stored
//! archive-push 9   not begun                             -> begun now; when it is stored
//! ```
//!
//! One task owns all that is known; commands come to it as [`Asked`]. What cannot be stored is left to its own command,
//! which meets the reason and tells it. Nothing is kept on disk: an agent that starts anew stores again, and finds
//! the same content there. Never here: whether what is known may be told (`plan::stored_file`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinSet};

use super::message::Word;
use crate::failure::Failure;
use crate::ops::StopRequest;
use crate::ops::archive_push::{Resident, is_as_stored};
use crate::pg::WalFileName;
use crate::pgdata::{FileFacts, ReadyFiles};
use crate::plan::stored_file::{self, Belief, StoredFile};

/// The oldest files that wait; those behind them are not begun before these are archived.
const WINDOW: usize = 128;

/// Files on their way at a time, those that commands wait for not counted. Memory has a bound of its own
/// (`Resident`): while some are compressed, others wait for the store.
const IN_FLIGHT: usize = 4;

/// How often it looks what is ready, while nothing else happens.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long nothing is begun ahead after a failure, at first and at last: the store may be away.
const REST_FIRST: Duration = Duration::from_secs(1);
const REST_LAST: Duration = Duration::from_secs(30);

/// How long a file that could not be stored is left to its own command.
const LEFT_ALONE: Duration = Duration::from_secs(30);

/// How long files on their way may take once the agent is asked to stop.
const STOP_MAX: Duration = Duration::from_secs(10);

/// A command's question whether a file is stored.
pub(super) struct Asked {
    pub(super) file: WalFileName,
    /// What the file is for the command.
    pub(super) facts: FileFacts,
    /// When it asked.
    pub(super) at: Instant,
    /// Where the answer goes; it may be gone.
    pub(super) reply: oneshot::Sender<Word>,
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Tally {
    /// Files that the store has confirmed.
    pub(super) stored: u64,
    /// Commands that were told so.
    pub(super) answered: u64,
}

/// Where a file is.
enum Fate {
    OnTheWay { waiting: Vec<Asked> },
    Stored { file: Arc<StoredFile>, begun: Instant, confirmed: Instant },
    NotStored { until: Instant },
}

/// A file that was pushed: its name, when that began, and what came of it.
type Pushed = (WalFileName, Instant, Result<Option<StoredFile>, Failure>);

/// Stores what is ready and answers for it.
pub(super) struct Pushing {
    resident: Arc<Resident>,
    wal_directory: PathBuf,
    ready: ReadyFiles,
    files: BTreeMap<WalFileName, Fate>,
    on_the_way: JoinSet<Pushed>,
    /// Each tells whether a command was answered with "stored".
    hashing: JoinSet<bool>,
    rest: Option<(Instant, Duration)>,
    /// Whether it was said that what is ready cannot be seen.
    is_blind: bool,
    tally: Tally,
}

impl Pushing {
    /// Will store what is ready in this directory of WAL.
    pub(super) fn new(resident: Resident, wal_directory: &Path) -> Self {
        Self {
            resident: Arc::new(resident),
            wal_directory: wal_directory.to_owned(),
            ready: ReadyFiles::new(wal_directory, WINDOW),
            files: BTreeMap::new(),
            on_the_way: JoinSet::new(),
            hashing: JoinSet::new(),
            rest: None,
            is_blind: false,
            tally: Tally::default(),
        }
    }

    /// Works until it is asked to stop; then what is on its way is brought to an end, or given up after some seconds:
    /// nobody was told that it is stored.
    pub(super) async fn run(
        mut self,
        mut questions: mpsc::Receiver<Asked>,
        mut stop: StopRequest,
    ) -> Tally {
        loop {
            self.begin_ready();
            tokio::select! {
                Some(asked) = questions.recv() => self.answer(asked),
                Some(pushed) = self.on_the_way.join_next() => self.settle(pushed),
                Some(told) = self.hashing.join_next() => self.count(told),
                () = tokio::time::sleep(LOOK_EVERY) => {}
                _ = stop.wanted() => break,
            }
        }
        let ending = async {
            while let Some(pushed) = self.on_the_way.join_next().await {
                self.settle(pushed);
            }
        };
        if tokio::time::timeout(STOP_MAX, ending).await.is_err() {
            tracing::info!("files on their way are given up; their own commands store them");
        }
        self.tally
    }

    /// Begins to store the oldest files that wait, as far as there are hands free.
    fn begin_ready(&mut self) {
        let ready = match self.ready.look() {
            Ok(ready) => ready.to_vec(),
            Err(error) => {
                if !std::mem::replace(&mut self.is_blind, true) {
                    tracing::warn!("nothing is stored ahead: {error}");
                }
                return;
            }
        };
        self.is_blind = false;
        let is_ready = |file: &WalFileName| {
            ready.binary_search_by_key(&file.archive_order(), |name| name.archive_order()).is_ok()
        };
        let now = Instant::now();
        self.files.retain(|file, fate| match fate {
            Fate::OnTheWay { .. } => true,
            Fate::Stored { .. } => is_ready(file),
            Fate::NotStored { until } => is_ready(file) && *until > now,
        });
        if self.is_resting() {
            return;
        }
        let free = IN_FLIGHT.saturating_sub(self.on_the_way.len());
        let new = ready.iter().filter(|file| !self.files.contains_key(file));
        for file in new.take(free).copied().collect::<Vec<_>>() {
            self.begin(file, Vec::new());
        }
    }

    fn is_resting(&self) -> bool {
        self.rest.is_some_and(|(until, _)| until > Instant::now())
    }

    fn path(&self, file: WalFileName) -> PathBuf {
        self.wal_directory.join(file.to_string())
    }

    /// Tells whether the server has taken the file away or given it another name, as it may once its own command said
    /// that it is archived: then there was nothing to store, and the store is well.
    fn is_gone(&self, file: WalFileName) -> bool {
        let found = std::fs::symlink_metadata(self.path(file));
        found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    }

    fn begin(&mut self, file: WalFileName, waiting: Vec<Asked>) {
        let (resident, path, begun) = (self.resident.clone(), self.path(file), Instant::now());
        self.files.insert(file, Fate::OnTheWay { waiting });
        self.on_the_way.spawn(async move { (file, begun, resident.push(&path).await) });
    }

    fn answer(&mut self, asked: Asked) {
        let (file, is_resting) = (asked.file, self.is_resting());
        match self.files.get_mut(&file) {
            Some(Fate::OnTheWay { waiting }) => waiting.push(asked),
            Some(Fate::Stored { file: stored, begun, confirmed }) => {
                let (stored, begun, confirmed) = (stored.clone(), *begun, *confirmed);
                if let Some(unanswered) = self.tell(asked, &stored, begun, confirmed) {
                    // Another file has its name by now, or it was long ago.
                    self.begin(file, vec![unanswered]);
                }
            }
            Some(Fate::NotStored { .. }) => say_no(asked, "it could not store the file"),
            None if is_resting => say_no(asked, "it could not store other files just now"),
            None => self.begin(file, vec![asked]),
        }
    }

    /// Tells that a file is stored if it is still the one that was; returns the question if it is not.
    fn tell(
        &mut self,
        asked: Asked,
        stored: &Arc<StoredFile>,
        begun: Instant,
        confirmed: Instant,
    ) -> Option<Asked> {
        let path = self.path(asked.file);
        let Ok(seen) = FileFacts::of_path(&path) else {
            say_no(asked, "it cannot read the file");
            return None;
        };
        let question = stored_file::Asked {
            facts: asked.facts,
            seen,
            read_since: begun >= asked.at,
            age: confirmed.elapsed(),
        };
        match stored.belief(question) {
            Belief::Stored => {
                self.tally.answered += 1;
                let _ = asked.reply.send(word_of(stored));
            }
            Belief::IfSameDigest => {
                let stored = stored.clone();
                self.hashing.spawn_blocking(move || {
                    let same = is_as_stored(&path, &stored);
                    if same {
                        let _ = asked.reply.send(word_of(&stored));
                    } else {
                        say_no(asked, "the file has changed since it was stored");
                    }
                    same
                });
            }
            Belief::Nothing => return Some(asked),
        }
        None
    }

    fn settle(&mut self, pushed: Result<Pushed, JoinError>) {
        let (file, begun, outcome) = match pushed {
            Ok(pushed) => pushed,
            Err(error) => {
                // Which one is not known; all are begun again, and those who wait do it themselves.
                self.files.retain(|_, fate| !matches!(fate, Fate::OnTheWay { .. }));
                self.rest = Some((Instant::now() + REST_LAST, REST_LAST));
                return tracing::error!("a file was not stored: {error}");
            }
        };
        let waiting = match self.files.remove(&file) {
            Some(Fate::OnTheWay { waiting }) => waiting,
            _ => Vec::new(),
        };
        let stored = match outcome {
            Ok(Some(stored)) => Arc::new(stored),
            Ok(None) => {
                let until = Instant::now() + LEFT_ALONE;
                self.files.insert(file, Fate::NotStored { until });
                for asked in waiting {
                    say_no(asked, "it cannot answer for the file");
                }
                return;
            }
            Err(failure) if self.is_gone(file) => {
                tracing::debug!(
                    "`{file}` is gone, as after its own command has stored it: {failure}"
                );
                for asked in waiting {
                    say_no(asked, "the file is gone");
                }
                return;
            }
            Err(failure) => return self.give_up(file, waiting, &failure),
        };
        tracing::debug!("`{file}` is stored");
        self.rest = None;
        self.tally.stored += 1;
        let confirmed = Instant::now();
        for asked in waiting {
            if let Some(asked) = self.tell(asked, &stored, begun, confirmed) {
                say_no(asked, "the file changed while it was stored");
            }
        }
        self.files.insert(file, Fate::Stored { file: stored, begun, confirmed });
    }

    fn give_up(&mut self, file: WalFileName, waiting: Vec<Asked>, failure: &Failure) {
        let rest = self.rest.map_or(REST_FIRST, |(_, rest)| (rest * 2).min(REST_LAST));
        let now = Instant::now();
        self.rest = Some((now + rest, rest));
        self.files.insert(file, Fate::NotStored { until: now + LEFT_ALONE });
        tracing::warn!("`{file}` is not stored yet and is left to its own command: {failure}");
        for asked in waiting {
            say_no(asked, &failure.what);
        }
    }

    fn count(&mut self, told: Result<bool, JoinError>) {
        self.tally.answered += u64::from(told.unwrap_or(false));
    }
}

fn word_of(stored: &StoredFile) -> Word {
    Word::Stored {
        plain_bytes: stored.plain_bytes,
        stored_bytes: stored.stored_bytes,
        blake3: stored.blake3.clone(),
    }
}

fn say_no(asked: Asked, why: &str) {
    let _ = asked.reply.send(Word::No { why: why.to_owned() });
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::format::Codec;
    use crate::repo::Repository;
    use crate::store::memory::MemoryStore;

    const FILE: &str = "000000010000000000000001";

    /// An agent before a directory of WAL in which one file is ready, and a repository that nobody has claimed.
    fn pushing(place: &tempfile::TempDir) -> Pushing {
        let status = place.path().join("archive_status");
        std::fs::create_dir(&status).unwrap();
        std::fs::write(status.join(format!("{FILE}.ready")), "").unwrap();
        let repository = Repository::new(Arc::new(MemoryStore::new()), "main".parse().unwrap());
        let resident = Resident::new(&repository, None, Codec::None, Duration::from_secs(5));
        Pushing::new(resident, place.path())
    }

    async fn push_once(pushing: &mut Pushing) {
        pushing.begin_ready();
        assert_eq!(pushing.on_the_way.len(), 1);
        let pushed = pushing.on_the_way.join_next().await.unwrap();
        pushing.settle(pushed);
    }

    #[tokio::test]
    async fn a_file_that_its_own_command_has_archived_meanwhile_is_no_failure_of_the_store() {
        let place = tempfile::tempdir().unwrap();
        let mut pushing = pushing(&place);
        push_once(&mut pushing).await;
        assert!(!pushing.is_resting());
        assert!(pushing.files.is_empty());
        assert_eq!(pushing.tally, Tally::default());
    }

    #[tokio::test]
    async fn after_a_failure_nothing_is_begun_for_a_while() {
        let place = tempfile::tempdir().unwrap();
        let mut pushing = pushing(&place);
        std::fs::write(place.path().join(FILE), vec![0; 1 << 20]).unwrap();
        push_once(&mut pushing).await;
        assert!(pushing.is_resting());
        pushing.begin_ready();
        assert!(pushing.on_the_way.is_empty());
        assert_eq!(pushing.tally, Tally::default());
    }
}

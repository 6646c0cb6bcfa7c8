//! Where `archive-push` and `archive-get` note what they did ahead.
//!
//! Shared by both. Never here: what is done ahead, or whether a note is believed (`plan::spool`).

use std::path::{Path, PathBuf};

use crate::ops::Which;
use crate::pg::SegmentName;
use crate::pgdata::{Moment, Spool};
use crate::plan::spool::{Circumstances, Doubt, Note, OutageNote};

/// What the names of notes end with: of a segment that was pushed, and of one that was fetched.
pub(super) const STORED: &str = ".stored";
pub(super) const FETCHED: &str = ".fetched";

/// What the name of the mark ends with that stands while a segment is being fetched.
pub(super) const COMING: &str = ".coming";

/// The name of the file that holds which segment was asked for last.
pub(super) const WANTED: &str = "wanted";

/// What the name of the note begins with that one of two repositories could not be reached.
const AWAY: &str = "away.";

/// Returns whether a file of the spool, by its name, is of fetching ahead.
pub(super) fn is_of_fetching(name: &str) -> bool {
    let segment = name.strip_suffix(FETCHED).or(name.strip_suffix(COMING)).unwrap_or(name);
    name == WANTED || SegmentName::parse(segment).is_some()
}

/// Permission to work ahead, and where that is noted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ahead {
    /// The spool; made when it is needed, its parent never.
    pub spool: PathBuf,
    /// What tells repository and cluster from all others; two that differ in a setting may have two marks.
    pub place: String,
    /// The most bytes of WAL that may lie in the spool.
    pub room_bytes: u64,
}

impl Ahead {
    /// Finds the spool if it is there and is this user's alone.
    pub(crate) fn find(&self) -> Option<Spool> {
        Spool::find(&self.spool).inspect_err(|error| tracing::debug!("no spool: {error}")).ok()
    }

    /// Finds the spool, or makes it.
    pub(super) fn open(&self) -> Option<Spool> {
        Spool::open(&self.spool)
            .inspect_err(|error| tracing::info!("nothing is done ahead: {error}"))
            .ok()
    }

    /// Returns which of two repositories could not be reached a moment ago, if that was noted of one alone.
    pub(super) fn away(&self) -> Option<Which> {
        let (spool, now) = (self.find()?, Moment::now()?);
        let is_away = |which: Which| {
            let note = spool.note(&outage_name(which));
            note.is_some_and(|bytes| OutageNote::holds(&bytes, &self.place, &now))
        };
        match [Which::First, Which::Second].map(is_away) {
            [true, false] => Some(Which::First),
            [false, true] => Some(Which::Second),
            _ => None,
        }
    }

    /// Notes that one of two repositories could not be reached.
    pub(super) fn note_away(&self, which: Which) {
        let (Some(spool), Some(now)) = (self.open(), Moment::now()) else { return };
        let note = OutageNote::new(&self.place, now);
        if let Err(error) = spool.write_note(&outage_name(which), &note.to_bytes()) {
            tracing::debug!("the outage is not noted: {error}");
        }
    }

    /// Reads the note of this name about `segment`; `None` if there is none that may be believed.
    pub(super) fn note(&self, spool: &Spool, name: &str, segment: SegmentName) -> Option<Note> {
        let bytes = spool.note(name)?;
        let now = Moment::now()?;
        let note = Note::read(&bytes, Circumstances { place: &self.place, segment, now: &now });
        note.inspect_err(|doubt| passed_over(name, *doubt)).ok()
    }
}

fn outage_name(which: Which) -> String {
    format!("{AWAY}{}", which.word())
}

/// Says why a note was not believed: of interest only to who wonders why things are slow.
pub(super) fn passed_over(name: &str, doubt: Doubt) {
    tracing::debug!("the note `{name}` is passed over: {doubt}");
}

/// Returns the directory of WAL, if `path` is as PostgreSQL names a file to its commands: `pg_wal/<name>`, in the
/// data directory. By hand and from anywhere else, nothing is done ahead.
pub fn wal_directory_of_server(path: &Path) -> Option<&Path> {
    let directory = path.parent()?;
    (directory == Path::new("pg_wal")).then_some(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_fetching_are_known_from_those_of_pushing() {
        for suffix in [FETCHED, COMING, ""] {
            assert!(is_of_fetching(&format!("000000010000000000000007{suffix}")), "{suffix}");
        }
        assert!(is_of_fetching(WANTED));
        for other in ["000000010000000000000007.stored", "lock", "x", "00000007"] {
            assert!(!is_of_fetching(other), "{other}");
        }
    }

    #[test]
    fn only_a_call_of_the_server_itself_works_ahead() {
        let of = |path: &'static str| wal_directory_of_server(Path::new(path));
        assert_eq!(of("pg_wal/000000010000000000000001"), Some(Path::new("pg_wal")));
        for other in ["000000010000000000000001", "/data/pg_wal/x", "x/pg_wal/y", "pg_wal/a/b"] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}

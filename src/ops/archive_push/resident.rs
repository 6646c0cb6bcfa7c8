//! Storing for a process that stays: several files at a time, and what may be said of each afterwards.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{OnceCell, Semaphore};

use super::both::{self, Pushes, Second, What};
use super::{Push, Report, Request, digest_of, room_of};
use crate::failure::Failure;
use crate::format::Codec;
use crate::pgdata::{FileFacts, has_own_times};
use crate::plan::stored_file::StoredFile;
use crate::repo::Repository;

/// What files on their way may hold, in MiB.
const HELD_MIB: usize = 36;

/// Stores WAL files of one server, as `archive-push` does, within one bound of memory.
pub struct Resident {
    repository: Repository,
    codec: Codec,
    deadline: Duration,
    second: Option<Arc<Second>>,
    rooms: [Semaphore; 2],
}

impl Resident {
    /// Will store into this repository, and into the second if there is one, and give each file so long.
    pub fn new(
        repository: &Repository,
        second: Option<Arc<Second>>,
        codec: Codec,
        deadline: Duration,
    ) -> Self {
        let mib = room_of(codec, if second.is_some() { HELD_MIB / 2 } else { HELD_MIB });
        let rooms = [Semaphore::new(mib), Semaphore::new(mib)];
        Self { repository: repository.clone(), codec, deadline, second, rooms }
    }

    /// Stores one file, named as PostgreSQL's `%p` does; `None` if nothing may be said of it later all the same: it
    /// changed meanwhile, or is one that was accepted as damaged.
    ///
    /// # Errors
    /// As `archive-push` itself.
    pub async fn push(&self, path: &Path) -> Result<Option<StoredFile>, Failure> {
        let request = Request {
            path: path.to_owned(),
            codec: self.codec,
            deadline: self.deadline,
            accept_damaged: false,
            ahead: None,
            second: self.second.clone(),
        };
        // The place may have been given to another cluster since the last file.
        let identities = [OnceCell::new(), OnceCell::new()];
        let read_from = SystemTime::now();
        let before = FileFacts::of_path(path);
        let into = |repository, number: usize| Push {
            repository,
            request: &request,
            beside_others: true,
            identity: &identities[number],
            room: &self.rooms[number],
        };
        let second = self.second.as_deref();
        let pushes = Pushes {
            first: into(&self.repository, 0),
            second: second.map(|second| (second, into(second.repository(), 1))),
        };
        let report = both::push(pushes, What::Asked);
        let Report { plain_bytes, stored_bytes, blake3, .. } = report.await?;
        let (Ok(before), Ok(after), Some(blake3)) = (before, FileFacts::of_path(path), blake3)
        else {
            return Ok(None);
        };
        let shows_writes = before.would_show_a_write_at(read_from)
            && has_own_times(path).is_ok_and(|has_own_times| has_own_times);
        let stored = StoredFile { facts: before, shows_writes, blake3, plain_bytes, stored_bytes };
        Ok((after == before && before.bytes() == plain_bytes).then_some(stored))
    }
}

/// Reads a file again, and returns whether it is the one that was stored, byte for byte. Blocks.
pub fn is_as_stored(path: &Path, stored: &StoredFile) -> bool {
    let digest = digest_of(path, stored.plain_bytes);
    let same = digest.is_ok_and(|(bytes, digest)| {
        bytes == stored.plain_bytes && digest.to_hex().as_str() == stored.blake3
    });
    same && FileFacts::of_path(path).is_ok_and(|facts| facts == stored.facts)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_changed_are_not_as_stored_though_times_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x");
        std::fs::write(&path, b"12").unwrap();
        let stored = |bytes: &[u8]| StoredFile {
            facts: FileFacts::of_path(&path).unwrap(),
            shows_writes: false,
            blake3: blake3::hash(bytes).to_hex().to_string(),
            plain_bytes: 2,
            stored_bytes: 2,
        };
        assert!(is_as_stored(&path, &stored(b"12")));
        assert!(!is_as_stored(&path, &stored(b"13")));
        let before = stored(b"12");
        std::fs::write(&path, b"123").unwrap();
        assert!(!is_as_stored(&path, &before));
        std::fs::remove_file(&path).unwrap();
        assert!(!is_as_stored(&path, &before));
    }
}

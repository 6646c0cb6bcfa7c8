//! How a data directory is read for a backup: how much at a time, and what a suspect page is.

use crate::pg::Lsn;

/// Bytes that are read at a time: a multiple of a chunk and of every page size.
pub const STRETCH_BYTES: usize = 1 << 20;

/// Small files that are read together.
pub const FILES_TOGETHER_MAX: usize = 64;

/// The most threads that read; more would only wait for the same disks.
const READERS_MAX: usize = 16;

/// How a data directory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadingPlan {
    /// Threads that read.
    pub readers: usize,
    /// Stretches that are read and not yet recorded, at most.
    pub stretches_max: usize,
}

/// Divides the memory that there is for stretches among `jobs` readers; there is always one, with a stretch in hand and
/// one more that waits.
pub fn reading_plan(memory_bytes: u64, jobs: usize) -> ReadingPlan {
    let share = memory_bytes / STRETCH_BYTES as u64;
    let room = usize::try_from(share).unwrap_or(usize::MAX).max(2);
    let readers = jobs.clamp(1, READERS_MAX).min(room - 1);
    ReadingPlan { readers, stretches_max: (readers * 3).min(room) }
}

/// Decides whether a page with a wrong checksum is damaged, given the position in its header, and
/// where the backup starts and stops.
///
/// A page that was changed since the start is in WAL as a whole, and may be caught half-written.
/// But no page reaches the disk before the WAL of its last change does, so a position behind the
/// stop was never written by the server.
pub fn is_damaged(page_lsn: Lsn, start_lsn: Lsn, stop_lsn: Lsn) -> bool {
    page_lsn < start_lsn || page_lsn > stop_lsn
}

/// Decides whether a session comes from the server's own host, given both of its addresses as the
/// server sees them; over a Unix socket there are none.
pub fn is_on_the_same_host(client: Option<&str>, server: Option<&str>) -> bool {
    client == server
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_least_memory_still_reads_and_much_of_it_does_not_make_more_readers_than_asked() {
        assert_eq!(reading_plan(0, 4), ReadingPlan { readers: 1, stretches_max: 2 });
        assert_eq!(reading_plan(8 << 20, 4), ReadingPlan { readers: 4, stretches_max: 8 });
        assert_eq!(reading_plan(8 << 20, 64), ReadingPlan { readers: 7, stretches_max: 8 });
        assert_eq!(reading_plan(32 << 20, 2), ReadingPlan { readers: 2, stretches_max: 6 });
        assert_eq!(reading_plan(8 << 30, 64), ReadingPlan { readers: 16, stretches_max: 48 });
    }

    proptest! {
        #[test]
        fn no_reader_is_without_a_stretch_and_the_share_is_kept(memory: u64, jobs: usize) {
            let plan = reading_plan(memory, jobs);
            prop_assert!(plan.readers >= 1 && plan.readers < plan.stretches_max);
            let taken = (plan.stretches_max * STRETCH_BYTES) as u64;
            prop_assert!(taken <= memory.max(2 * STRETCH_BYTES as u64));
        }
    }

    #[test]
    fn a_wrong_page_is_damage_only_where_wal_does_not_replace_it() {
        let is = |lsn| is_damaged(Lsn(lsn), Lsn(100), Lsn(200));
        assert_eq!([0, 99, 100, 150, 200, 201].map(is), [true, true, false, false, false, true]);
    }

    #[test]
    fn a_socket_and_ones_own_address_are_of_the_same_host() {
        assert!(is_on_the_same_host(None, None));
        assert!(is_on_the_same_host(Some("127.0.0.1"), Some("127.0.0.1")));
        assert!(is_on_the_same_host(Some("10.0.0.5"), Some("10.0.0.5")));
        assert!(!is_on_the_same_host(Some("10.0.0.6"), Some("10.0.0.5")));
    }
}

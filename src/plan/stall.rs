//! What becomes of a WAL file that the store cannot take, and of the gap that is left where it was let go.
//!
//! ```text
//! the store takes it            -> stored, as ever
//! it does not answer            -> into the spool, while there is room         kept, on this host only
//! and the spool cannot take it  -> keep trying                                 PostgreSQL keeps it; the default
//! and too much waits, where an operator said so: wal_backlog_max
//!                               -> let go, as a recorded gap                   lost
//! ```
//!
//! Each call decides anew, so that no more is let go than brings what waits below the maximum.

use crate::format::{BackupId, Committed, WalGap};
use crate::pg::{Lsn, Timeline};

/// Of a file system that holds a spool so much stays free: the larger of these bytes and this part.
const FREE_BYTES_MIN: u64 = 64 << 20;
const FREE_PART_MIN: u64 = 20;

/// What a stored file may need besides its own bytes: header, encryption, directories.
const OVERHEAD_BYTES: u64 = 256 << 10;

/// How long it is believed that the store is away, in seconds: longer than the pause between two attempts of whoever
/// drains the spool, which renew it.
pub const AWAY_SECONDS_MAX: u64 = 90;

/// The same for letting go, which nothing undoes.
pub const AWAY_SECONDS_MAX_TO_LET_GO: u64 = 30;

/// Whether a spool can take a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// No spool is set.
    Absent,
    /// It holds as much as it may, its disk has no room, or it cannot be used.
    Full,
    /// There is room.
    Free,
}

/// What is held by a spool, and what its disk has left; in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpoolSpace {
    /// What it holds.
    pub held: u64,
    /// The most that it may hold.
    pub max: u64,
    /// What can still be written on its file system.
    pub free: u64,
    /// The size of that file system.
    pub total: u64,
}

impl SpoolSpace {
    /// Returns whether a file of so many bytes fits: never beyond the bound, and never so that the disk fills.
    pub fn room_for(&self, bytes: u64) -> Room {
        let needed = bytes.saturating_add(OVERHEAD_BYTES);
        let floor = FREE_BYTES_MIN.max(self.total / FREE_PART_MIN);
        let within = self.held.saturating_add(needed) <= self.max;
        let fits = self.free.saturating_sub(needed) >= floor && self.free >= needed;
        if within && fits { Room::Free } else { Room::Full }
    }
}

/// What kind of file waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waiting {
    /// A segment, or the `.partial` of one.
    Wal,
    /// A backup history file: no recovery by Highwater reads it.
    BackupHistory,
    /// A timeline's history file: without it a whole timeline cannot be reached.
    TimelineHistory,
}

/// What is known when the store has not taken a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalled {
    /// Whether it failed because it is away: nothing else is a reason for anything but trying again.
    pub store_is_away: bool,
    /// Whether the spool can take it.
    pub spool: Room,
    /// The bytes of WAL that are nowhere but on this host: ready for archiving, or in the spool.
    pub backlog_bytes: u64,
    /// `wal_backlog_max`; `None`: nothing is ever let go.
    pub backlog_max_bytes: Option<u64>,
    /// What it is.
    pub file: Waiting,
}

/// What becomes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// PostgreSQL keeps it and asks again.
    KeepTrying,
    /// It goes into the spool.
    Spool,
    /// It is let go, and recorded before that.
    LetGo,
}

/// Decides what becomes of one file.
pub fn decide(at: Stalled) -> Fate {
    if !at.store_is_away {
        return Fate::KeepTrying;
    }
    if at.spool == Room::Free {
        return Fate::Spool;
    }
    let is_too_much = at.backlog_max_bytes.is_some_and(|max| at.backlog_bytes >= max);
    if is_too_much && at.file != Waiting::TimelineHistory {
        return Fate::LetGo;
    }
    Fate::KeepTrying
}

/// Adds a segment to a gap that it follows, or that holds it already; `None`: it needs a record of its own.
pub fn extended(gap: &WalGap, timeline: Timeline, start: Lsn, end: Lsn) -> Option<WalGap> {
    let touches = gap.timeline == timeline && gap.start_lsn <= start && start <= gap.end_lsn;
    touches.then(|| WalGap { end_lsn: gap.end_lsn.max(end), ..gap.clone() })
}

/// Returns whether WAL that was let go is stored all the same, as by `receive`, or by a call that the server repeated.
/// `ranges` is what is stored of its timeline: starts included, ends excluded.
pub fn is_stored(gap: &WalGap, ranges: &[(Lsn, Lsn)]) -> bool {
    ranges.iter().any(|(start, end)| *start <= gap.start_lsn && gap.end_lsn <= *end)
}

/// Returns the backup that makes a gap unneeded for the newest moments: the first, of those given, that begins behind
/// it, on its timeline or a later one.
pub fn closed_by<'a>(
    gap: &WalGap,
    backups: impl IntoIterator<Item = &'a Committed>,
) -> Option<&'a BackupId> {
    let behind = backups.into_iter().filter(|backup| {
        backup.system_identifier == gap.system_identifier
            && backup.timeline >= gap.timeline
            && backup.start_lsn >= gap.end_lsn
    });
    behind.min_by_key(|backup| backup.start_lsn).map(|backup| &backup.id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::SystemId;

    const GIB: u64 = 1 << 30;

    fn stalled() -> Stalled {
        Stalled {
            store_is_away: true,
            spool: Room::Full,
            backlog_bytes: 50 * GIB,
            backlog_max_bytes: Some(50 * GIB),
            file: Waiting::Wal,
        }
    }

    #[test]
    fn each_circumstance_alone_keeps_wal_from_being_let_go() {
        assert_eq!(decide(stalled()), Fate::LetGo);
        assert_eq!(decide(Stalled { spool: Room::Absent, ..stalled() }), Fate::LetGo);
        for other in [
            Stalled { store_is_away: false, ..stalled() },
            Stalled { backlog_bytes: 50 * GIB - 1, ..stalled() },
            Stalled { backlog_max_bytes: None, backlog_bytes: u64::MAX, ..stalled() },
            Stalled { file: Waiting::TimelineHistory, ..stalled() },
        ] {
            assert_eq!(decide(other), Fate::KeepTrying, "{other:?}");
        }
        assert_eq!(decide(Stalled { spool: Room::Free, ..stalled() }), Fate::Spool);
        let history = Stalled { spool: Room::Free, file: Waiting::TimelineHistory, ..stalled() };
        assert_eq!(decide(history), Fate::Spool);
    }

    proptest! {
        #[test]
        fn without_a_maximum_nothing_is_let_go(
            store_is_away: bool, backlog_bytes: u64, spool in 0_usize..3, file in 0_usize..3,
        ) {
            let spool = [Room::Absent, Room::Full, Room::Free][spool];
            let file = [Waiting::Wal, Waiting::BackupHistory, Waiting::TimelineHistory][file];
            let at = Stalled { store_is_away, spool, backlog_bytes, backlog_max_bytes: None, file };
            let fate = decide(at);
            prop_assert_ne!(fate, Fate::LetGo);
            prop_assert_eq!(fate == Fate::Spool, store_is_away && spool == Room::Free);
        }

        /// As the server calls: whatever waits, no more goes than what lies at or above the maximum.
        #[test]
        fn letting_go_ends_as_soon_as_less_than_the_maximum_waits(
            files in 0_u64..500, max in 1_u64..500, spooled in 0_u64..100,
        ) {
            let mut waiting = files;
            let mut gone = 0;
            while waiting > 0 {
                let backlog_bytes = waiting + spooled;
                let at = Stalled { backlog_bytes, backlog_max_bytes: Some(max), ..stalled() };
                match decide(at) {
                    Fate::LetGo => { waiting -= 1; gone += 1; }
                    _ => break,
                }
            }
            prop_assert!(waiting == 0 || waiting + spooled < max);
            prop_assert!(gone == 0 || waiting + 1 + spooled >= max, "one too many");
        }

        #[test]
        fn a_spool_never_grows_beyond_its_bound_nor_into_the_last_of_its_disk(
            max in 0_u64..100 * GIB, total in 1_u64..1000 * GIB, used in 0_u64..1000 * GIB,
            sizes in prop::collection::vec(1_u64..2 * GIB, 0..200),
        ) {
            let mut free = total.saturating_sub(used);
            let before = free;
            let mut held = 0;
            for bytes in sizes {
                let space = SpoolSpace { held, max, free, total };
                if space.room_for(bytes) == Room::Free {
                    held += bytes + OVERHEAD_BYTES;
                    free -= bytes + OVERHEAD_BYTES;
                }
            }
            prop_assert!(held <= max);
            prop_assert!(free == before || free >= FREE_BYTES_MIN.max(total / FREE_PART_MIN));
        }
    }

    #[test]
    fn segments_that_follow_extend_a_gap_and_others_do_not() {
        let one = WalGap::sample(16, 32);
        let add = |timeline, start, end| {
            extended(&one, Timeline(timeline), Lsn(start), Lsn(end)).map(|gap| gap.end_lsn.0)
        };
        assert_eq!(add(1, 32, 48), Some(48));
        assert_eq!(add(1, 16, 32), Some(32), "asked again after a crash");
        assert_eq!(add(1, 48, 64), None, "a hole between them");
        assert_eq!(add(1, 0, 16), None, "before it");
        assert_eq!(add(2, 32, 48), None, "another timeline");
    }

    #[test]
    fn what_is_stored_as_a_whole_was_not_lost() {
        let is_stored = |ranges: &[(u64, u64)]| {
            let ranges: Vec<_> = ranges.iter().map(|(a, b)| (Lsn(*a), Lsn(*b))).collect();
            super::is_stored(&WalGap::sample(16, 32), &ranges)
        };
        assert!(is_stored(&[(0, 8), (16, 32)]) && is_stored(&[(0, 64)]));
        assert!(!is_stored(&[]) && !is_stored(&[(16, 31)]) && !is_stored(&[(0, 24), (25, 64)]));
    }

    #[test]
    fn a_gap_is_closed_by_a_backup_behind_it_and_by_no_other() {
        let backup = |second: u32, start: u64, timeline: u32, id: u64| {
            let at: jiff::Timestamp = format!("2026-11-22T03:15:{second:02}Z").parse().unwrap();
            Committed {
                start_lsn: Lsn(start),
                timeline: Timeline(timeline),
                system_identifier: SystemId(id),
                ..Committed::example(BackupId::at(at, 1))
            }
        };
        let gap = WalGap { timeline: Timeline(2), ..WalGap::sample(100, 200) };
        let all = [
            backup(1, 150, 2, 7),
            backup(2, 300, 1, 7),
            backup(3, 300, 2, 8),
            backup(4, 250, 3, 7),
            backup(5, 200, 2, 7),
        ];
        assert_eq!(closed_by(&gap, &all), Some(&all[4].id));
        assert_eq!(closed_by(&gap, &all[..4]), Some(&all[3].id));
        assert_eq!(closed_by(&gap, &all[..3]), None);
    }
}

//! How much room a replication slot has left before the server removes WAL that it protects.

/// A slot with more room than this, in bytes, is in no danger whatever it may keep.
const ROOM_BYTES: i64 = 1 << 30;

/// What `pg_replication_slots` and the settings say of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotRoom {
    /// `wal_status`.
    pub wal_status: String,
    /// `safe_wal_size`: what may be written before the slot is in danger; `None`: any amount.
    pub safe_bytes: Option<i64>,
    /// `max_slot_wal_keep_size`; `None` where it is not known or has no limit.
    pub keep_bytes: Option<i64>,
}

impl SlotRoom {
    /// Returns whether WAL that is not stored yet may soon be removed: less than a quarter of what the slot may keep is
    /// left, and less than 1 GiB; or the next checkpoint removes it.
    pub fn is_in_danger(&self) -> bool {
        self.has_less_than(ROOM_BYTES, 4)
    }

    /// Returns whether it is worth looking more often: less than half is left, and less than 2 GiB.
    pub fn is_shrinking(&self) -> bool {
        self.has_less_than(2 * ROOM_BYTES, 2)
    }

    fn has_less_than(&self, bytes: i64, part: i64) -> bool {
        let bound = self.keep_bytes.map_or(bytes, |keep| (keep / part).min(bytes));
        self.wal_status == "unreserved" || self.safe_bytes.is_some_and(|safe| safe < bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: i64 = 1 << 20;
    const GIB: i64 = 1 << 30;

    fn room(wal_status: &str, safe: Option<i64>, keep: Option<i64>) -> SlotRoom {
        SlotRoom { wal_status: wal_status.to_owned(), safe_bytes: safe, keep_bytes: keep }
    }

    #[test]
    fn danger_is_a_quarter_of_what_the_slot_may_keep_or_a_gigabyte() {
        let danger = |safe, keep| room("extended", Some(safe), Some(keep)).is_in_danger();
        assert!(!danger(512 * MIB, 512 * MIB), "nothing of it is used");
        assert!(!danger(128 * MIB, 512 * MIB));
        assert!(danger(128 * MIB - 1, 512 * MIB));
        assert!(!danger(GIB, 100 * GIB));
        assert!(danger(GIB - 1, 100 * GIB));
        assert!(danger(-MIB, 2 * MIB));
        assert!(danger(-1, 0) && !danger(0, 0));
    }

    #[test]
    fn what_the_server_does_not_say_is_no_danger_but_what_it_says_is() {
        let unknown = SlotRoom::default();
        assert!(!unknown.is_in_danger() && !unknown.is_shrinking());
        assert!(!room("extended", None, None).is_in_danger());
        assert!(room("unreserved", None, None).is_in_danger());
        assert!(room("unreserved", Some(4 * GIB), Some(8 * GIB)).is_in_danger());
        assert!(room("extended", Some(GIB - 1), None).is_in_danger(), "the bound is not known");
    }

    #[test]
    fn it_is_looked_at_more_often_before_it_is_in_danger() {
        let shrinking = |safe, keep| room("extended", Some(safe), Some(keep)).is_shrinking();
        assert!(!shrinking(256 * MIB, 512 * MIB) && shrinking(256 * MIB - 1, 512 * MIB));
        assert!(!shrinking(2 * GIB, 100 * GIB) && shrinking(2 * GIB - 1, 100 * GIB));
    }
}

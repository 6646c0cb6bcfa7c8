//! What can go wrong with a stream, in words.

use super::UNHARMED;
use super::source::Facts;
use crate::failure::{Failure, Kind};
use crate::ops::failures::of_postgres;
use crate::repo::AssemblyError;
use crate::walsender::PgError;

/// How a stream ends early.
pub(super) enum Trouble {
    /// The server has not the WAL any more that comes next.
    WalRemoved(Failure),
    /// The slot protects nothing any more.
    SlotLost(Failure),
    /// Anything else.
    Other(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

/// PostgreSQL 14 to 17 stream on with a slot that was invalidated, and keep nothing for it.
pub(super) fn slot_lost() -> Trouble {
    Trouble::SlotLost(Failure::new(
        Kind::Postgres,
        "the server has invalidated the replication slot (wal_status lost)",
        UNHARMED,
        "The slot is made anew. Raise max_slot_wal_keep_size, or find out why the store is slow.",
    ))
}

pub(super) fn trouble(error: PgError, what: &str) -> Trouble {
    if error.is_wal_removed() {
        let what = "the server has removed WAL that is not stored yet";
        return Trouble::WalRemoved(of_postgres(error, what, UNHARMED));
    }
    if error.is_slot_lost() {
        let what = "the replication slot protects nothing any more";
        return Trouble::SlotLost(of_postgres(error, what, UNHARMED));
    }
    if error.is_slot_in_use() {
        return Trouble::Other(
            Failure::new(
                Kind::Postgres,
                "the replication slot is in use by another receiver",
                UNHARMED,
                "Two receivers of one cluster do no harm: this one goes on when the other ends. If there is no other, the server has not noticed yet that an earlier connection is gone (wal_sender_timeout).",
            )
            .because(error),
        );
    }
    Trouble::Other(of_postgres(error, what, UNHARMED))
}

pub(super) fn no_memory(error: std::io::Error) -> Failure {
    Failure::new(
        Kind::Bug,
        "WAL could not be compressed",
        UNHARMED,
        "There is a lack of memory, or this is a defect of Highwater; please report it.",
    )
    .because(error)
}

/// The server has other WAL than is stored; `which` says where, as far as that is known.
pub(super) fn diverges(facts: &Facts, which: &str) -> Failure {
    Failure::new(
        Kind::Conflict,
        format!("{} sends other WAL than is stored of the same timeline{which}", facts.place),
        UNHARMED,
        "Two servers write this timeline, or this one was put back to an earlier state without recovery. Find out which is the real one; give a copy a cluster name of its own.",
    )
}

/// The server's bytes cannot be what they should be.
pub(super) fn not_taken(error: AssemblyError, facts: &Facts) -> Failure {
    let place = &facts.place;
    let (kind, what, next) = match &error {
        AssemblyError::Diverges { .. } => return diverges(facts, "").because(error),
        AssemblyError::Damage(damage) if damage.is_wrong_identity() => (
            Kind::Conflict,
            format!("{place} sends WAL of another cluster"),
            "Check `--dsn` and the cluster name: each cluster needs a place of its own.",
        ),
        AssemblyError::Damage(_) => (
            Kind::Integrity,
            format!("{place} sends WAL that is not sound"),
            "It is asked for again. If the damage stays, the server's own copy is damaged: take a base backup, look at its disks, and see `highwater archive-push --accept-damaged`.",
        ),
        AssemblyError::NoSuchSegment(_) => (
            Kind::Conflict,
            format!("{place} sends WAL at a position that cannot be"),
            "Check `--dsn` and the cluster name.",
        ),
        AssemblyError::Codec(_) | AssemblyError::Ended => (
            Kind::Bug,
            "WAL could not be compressed".to_owned(),
            "There is a lack of memory, or this is a defect of Highwater; please report it.",
        ),
    };
    Failure::new(kind, what, UNHARMED, next).because(error)
}

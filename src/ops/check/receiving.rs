//! `highwater receive` as the server sees it: does it stream, does its slot hold, and do
//! commits wait for it in a way that can work?

use super::Report;
use crate::failure::Kind;
use crate::ops::slot_view::{SlotView, view_slot};
use crate::walsender::{Connection, PgError, SlotName};

/// The finding's name.
pub(super) const NAME: &str = "receive";

/// The receiver as it would run with the settings of this command.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Its replication slot.
    pub slot: Option<SlotName>,
    /// What it calls itself.
    pub application_name: String,
    /// Whether it stores each commit at once.
    pub synchronous: bool,
}

/// What the server knows of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Found {
    /// `sync_state` of each walsender of that name; empty where the role may not see it.
    connected: Vec<String>,
    slot: Option<SlotView>,
    synchronous_standby_names: String,
    synchronous_commit: String,
}

impl Found {
    /// Returns whether such a receiver is connected.
    pub(super) fn streams(&self) -> bool {
        !self.connected.is_empty()
    }

    /// Returns whether commits may be waiting for a walsender called `name`.
    fn waits_for(&self, name: &str) -> bool {
        let names = self.synchronous_standby_names.split([',', '(', ')', ' ', '"']);
        names.into_iter().any(|word| word == "*" || word.eq_ignore_ascii_case(name))
    }
}

/// Asks the server.
pub(super) async fn ask(
    connection: &mut Connection,
    expected: &Expected,
) -> Result<Found, PgError> {
    let quoted = |text: &str| format!("'{}'", text.replace('\'', "''"));
    let name = quoted(&expected.application_name);
    let query = format!(
        "SELECT coalesce(sync_state, '') AS sync_state FROM pg_catalog.pg_stat_replication WHERE application_name = {name}"
    );
    let rows = connection.query(&query).await?;
    let connected =
        (0..rows.rows.len()).filter_map(|row| rows.get(row, "sync_state")).map(str::to_owned);
    let mut found = Found { connected: connected.collect(), ..Found::default() };
    if let Some(slot) = &expected.slot {
        found.slot = view_slot(connection, slot).await?;
    }
    found.synchronous_standby_names = connection.show("synchronous_standby_names").await?;
    found.synchronous_commit = connection.show("synchronous_commit").await?;
    Ok(found)
}

/// Says what is well and what is not.
pub(super) fn judge(expected: &Expected, found: &Found, report: &mut Report) {
    if found.streams() {
        report.ok(NAME, "it streams from this server");
    }
    if let (Some(name), Some(slot)) = (&expected.slot, &found.slot) {
        judge_slot(name, slot, report);
    }
    if found.waits_for(&expected.application_name) {
        judge_waiting(expected, found, report);
    }
}

fn judge_slot(name: &SlotName, slot: &SlotView, report: &mut Report) {
    const NAME: &str = "replication slot";
    match slot.room.wal_status.as_str() {
        "lost" => report.fail(
            NAME,
            Kind::Integrity,
            format!("`{name}` was invalidated: WAL was removed before it was stored"),
            "Start `highwater receive`, which makes the slot anew, and take a base backup; raise max_slot_wal_keep_size.",
        ),
        _ if !slot.is_active => report.warn(
            NAME,
            format!("`{name}` is there and nobody uses it: the server keeps WAL for it, until its disk is full"),
            "Start `highwater receive`; or, if you have stopped using it, SELECT pg_drop_replication_slot('…'). max_slot_wal_keep_size bounds what a slot may keep.",
        ),
        status if slot.room.is_in_danger() => report.warn(
            NAME,
            format!("`{name}` is about to lose WAL that is not stored yet (wal_status {status})"),
            "Look why the store is slower than the server writes, or raise max_slot_wal_keep_size.",
        ),
        status => report.ok(NAME, format!("`{name}`: {status}")),
    }
}

fn judge_waiting(expected: &Expected, found: &Found, report: &mut Report) {
    const NAME: &str = "synchronous commit";
    let name = &expected.application_name;
    if !found.streams() {
        report.warn(
            NAME,
            format!("synchronous_standby_names waits for `{name}`, which is not connected: commits may hang"),
            "Start `highwater receive --synchronous`, or take it out of synchronous_standby_names.",
        );
    } else if found.synchronous_commit == "remote_apply" {
        report.fail(
            NAME,
            Kind::Postgres,
            format!("synchronous_commit = remote_apply waits for `{name}` to apply WAL, which it never does: commits hang for ever where no other standby answers"),
            "Set synchronous_commit = on: a commit then waits until it is in the repository.",
        );
    } else if found.synchronous_commit == "remote_write" {
        report.warn(
            NAME,
            "synchronous_commit = remote_write: a commit is acknowledged when the receiver has it in memory, before it is stored",
            "Set synchronous_commit = on where no acknowledged commit may be lost.",
        );
    } else if !expected.synchronous
        && found.connected.iter().any(|state| matches!(state.as_str(), "sync" | "quorum"))
    {
        report.warn(
            NAME,
            format!("commits wait for `{name}`, and by these settings it stores only every so often (`rpo`)"),
            "Start it with `--synchronous` (or the setting `synchronous`), for a commit to take one round trip to the store.",
        );
    } else {
        report.ok(NAME, format!("commits wait for `{name}`"));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Status;
    use super::*;
    use crate::plan::slot::SlotRoom;

    fn expected(synchronous: bool) -> Expected {
        Expected {
            slot: Some("highwater_main".parse().unwrap()),
            application_name: "highwater".to_owned(),
            synchronous,
        }
    }

    fn found(sync_state: &str, names: &str, commit: &str) -> Found {
        Found {
            connected: vec![sync_state.to_owned()],
            slot: None,
            synchronous_standby_names: names.to_owned(),
            synchronous_commit: commit.to_owned(),
        }
    }

    fn statuses(expected: &Expected, found: &Found) -> Vec<(&'static str, Status)> {
        let mut report = Report::default();
        judge(expected, found, &mut report);
        report.findings.iter().map(|finding| (finding.name, finding.status)).collect()
    }

    #[test]
    fn a_receiver_that_nobody_waits_for_is_simply_well() {
        let found = found("async", "", "on");
        assert_eq!(statuses(&expected(false), &found), [(NAME, Status::Ok)]);
        assert_eq!(statuses(&expected(false), &Found::default()), [], "it is not in use");
    }

    #[test]
    fn commits_that_would_hang_for_ever_are_a_failure() {
        let hangs = found("sync", "FIRST 1 (Highwater, b)", "remote_apply");
        let statuses = statuses(&expected(true), &hangs);
        assert_eq!(statuses[1], ("synchronous commit", Status::Failed));
    }

    #[test]
    fn waiting_works_only_for_a_synchronous_receiver_that_is_there() {
        let waiting = |state: &str, commit: &str| found(state, "*", commit);
        let second = |synchronous, found: &Found| statuses(&expected(synchronous), found)[1].1;
        assert_eq!(second(true, &waiting("sync", "on")), Status::Ok);
        assert_eq!(second(false, &waiting("quorum", "on")), Status::Warning);
        assert_eq!(second(true, &waiting("sync", "remote_write")), Status::Warning);
        let gone = Found { connected: Vec::new(), ..waiting("sync", "on") };
        assert_eq!(statuses(&expected(true), &gone), [("synchronous commit", Status::Warning)]);
        let other = found("async", "standby1", "on");
        assert_eq!(statuses(&expected(false), &other).len(), 1, "they wait for somebody else");
    }

    #[test]
    fn a_slot_is_judged_by_what_it_still_holds() {
        let slot = |wal_status: &str, is_active, safe_bytes| {
            let room = SlotRoom {
                wal_status: wal_status.to_owned(),
                safe_bytes,
                keep_bytes: Some(256 << 20),
            };
            let slot = SlotView { room, is_active, ..SlotView::default() };
            Found { slot: Some(slot), ..Found::default() }
        };
        let status = |found| statuses(&expected(false), &found)[0].1;
        assert_eq!(status(slot("reserved", true, None)), Status::Ok);
        assert_eq!(status(slot("reserved", false, None)), Status::Warning);
        assert_eq!(status(slot("unreserved", true, None)), Status::Warning);
        assert_eq!(status(slot("extended", true, Some(64 << 20))), Status::Ok);
        assert_eq!(status(slot("extended", true, Some(1 << 20))), Status::Warning);
        assert_eq!(status(slot("lost", false, None)), Status::Failed);
    }
}

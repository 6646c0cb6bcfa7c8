//! A ledger restored to twenty random targets equals, row for row, what was
//! committed by then. The order of commits is what pg_waldump says it is.

use crate::harness::{
    Archived, Cluster, EventKind, Ledger, MAJORS, NEWEST, Random, Target, events_of, remove_tree,
};

const TARGETS: usize = 20;

/// Time, LSN, transaction, restore point.
const KINDS: usize = 4;

/// Every kind of target in turn, each at a random place.
fn choose(random: &mut Random, events: &[crate::harness::Event], n: usize) -> (Target, bool) {
    let point = |e: &&crate::harness::Event| matches!(e.kind, EventKind::RestorePoint { .. });
    let (points, ends): (Vec<_>, Vec<_>) = events.iter().partition(point);
    // Not the very last: a target needs a record after it to stop at.
    let end = *random.one_of(&ends[..ends.len() - 2]);
    let exclusive = random.below(2) == 1;
    match (n % KINDS, &end.kind) {
        (0, _) => (Target::Time(end.time), exclusive),
        (1, _) => (Target::Lsn(end.lsn), exclusive),
        (2, EventKind::Commit { xid } | EventKind::Abort { xid }) => (Target::Xid(*xid), exclusive),
        _ => {
            let EventKind::RestorePoint { name } = &random.one_of(&points).kind else {
                unreachable!("only restore points were kept")
            };
            (Target::Name(name.clone()), false)
        }
    }
}

fn restore_and_compare(
    place: &Archived,
    ledger: &Ledger,
    target: &Target,
    exclusive: bool,
    committed: &[u32],
    n: usize,
) {
    let what = format!("{target:?}, exclusive {exclusive}");
    let mut arguments = target.arguments();
    if exclusive {
        arguments.push("--exclusive".into());
    }
    let promote = n.is_multiple_of(3);
    arguments.extend(["--target-action".into(), if promote { "promote" } else { "pause" }.into()]);
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut copy: Cluster = place.restore(&format!("copy{n}"), &arguments);
    copy.start();
    if promote {
        copy.wait_until("select pg_is_in_recovery()", "f");
    } else {
        copy.wait_until("select pg_get_wal_replay_pause_state()", "paused");
    }
    ledger.assert_copy_holds(&copy, committed, &what);
    let pgdata = copy.pgdata.clone();
    drop(copy);
    remove_tree(&pgdata);
}

fn random_targets_give_exactly_the_rows_committed_by_then(major: u32, targets: usize) {
    let mut random = Random::new("ledger");
    let place = Archived::by_server(major);
    Ledger::create(&place.cluster);
    let first = place.cluster.archive_now();
    place.highwater.run(&["backup", "--fast"]).done();
    place.pass_earliest_time();
    // Rows from here on; what was before the backup is in every copy.
    for round in 0..5 {
        Ledger::write(&place.cluster, 4, 40);
        place.cluster.sql(&format!("select pg_create_restore_point('after round {round}')"));
        place.cluster.switch_wal();
        if round == 2 {
            place.highwater.run(&["backup", "--fast"]).done();
        }
    }
    let ledger = Ledger::read(&place.cluster);
    let events = events_of(&place.cluster, &first);
    place.cluster.archive_now();
    assert!(ledger.len() > 500);

    // Commits of the backups themselves and of the set-up come before any row.
    let first_row =
        events.iter().position(|e| matches!(e.kind, EventKind::Commit { xid } if ledger.has(xid)));
    let reachable = &events[first_row.unwrap()..];
    for n in 0..targets {
        let (target, exclusive) = choose(&mut random, reachable, n);
        let committed = target.committed(&events, exclusive);
        restore_and_compare(&place, &ledger, &target, exclusive, &committed, n);
    }
}

#[test]
fn twenty_random_targets_give_exactly_the_rows_committed_by_then() {
    random_targets_give_exactly_the_rows_committed_by_then(NEWEST, TARGETS);
}

#[test]
fn each_kind_of_target_is_exact_on_every_older_major() {
    for major in MAJORS.into_iter().filter(|major| *major != NEWEST) {
        random_targets_give_exactly_the_rows_committed_by_then(major, KINDS);
    }
}

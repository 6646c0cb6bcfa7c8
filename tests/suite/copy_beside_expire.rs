//! `copy` brings an old backup to where `expire` is just deleting WAL that nothing but that backup needs.

use std::path::PathBuf;
use std::time::Duration;

use crate::harness::{Lab, NEWEST, Receiver, Stored, Weather, rounds, wait_for};
use crate::two_repos::Two;

/// The objects of WAL.
fn wal(stored: &Stored) -> Vec<PathBuf> {
    let mut names = stored.names();
    names.retain(|name| name.iter().any(|part| part == "wal"));
    names
}

/// `expire` knows the destination from before the copy began, and deletes afterwards. In `make soak` the copy waits as
/// long as it must, and what it brought is restored.
#[test]
fn a_copy_that_begins_while_expire_runs_keeps_the_wal_that_only_it_needs() {
    let mut two = Two::new(NEWEST, Lab::highwater_on_s3);
    let (rough, way) = two.place.lab.highwater_on_s3_by_a_way();
    let (stored, both) = (Stored::of(&two.second), two.place.highwater.clone());
    let back_up = |only: &str| {
        let made = both.run(&["--only", only, "--json", "backup", "--fast"]).done().json();
        two.place.segments(2);
        two.place.pass_time_of(&made);
        made["id"].as_str().unwrap().to_owned()
    };
    two.place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let goes = back_up("second");
    let content = two.place.cluster.dump();
    let old = back_up("first");
    let newest = back_up("second");
    two.place.cluster.archive_now();
    let before = wal(&stored);
    let expire = ["--json", "expire", "--retain-backups", "1"];
    let dry = two.second.run(&[&expire[..], &["--dry-run"]].concat()).done().json();
    assert!(dry["wal"][0]["deleted_objects"].as_u64().unwrap() >= 4, "nobody else needs it: {dry}");

    way.set(Weather::Rough { delay_max: Duration::from_millis(300), cut_one_in: u64::MAX });
    let expiring = rough.spawn(&expire);
    let is_there = |id: &str, document: &str| {
        stored.names().iter().any(|name| name.ends_with(format!("backup/{id}/{document}")))
    };
    wait_for("the oldest backup goes", Duration::from_mins(2), || {
        !is_there(&goes, "committed.json")
    });
    way.set(Weather::Still);
    assert_eq!(wal(&stored), before, "it has not come to WAL yet");
    let mut copy = Receiver::service(&both, &["-v", "copy", &old]);
    wait_for("the copy begins", Duration::from_mins(1), || is_there(&old, "begun.json"));
    way.set(Weather::Fair);
    let expired = expiring.wait().done().json();
    assert_eq!(expired["deleted"]["backups"], 1, "{expired}");
    assert_eq!(expired["wal"][0]["deleted_objects"], 0, "{expired}");
    let after = wal(&stored);
    assert!(before.iter().all(|name| after.contains(name)), "{before:#?}\n{after:#?}");

    copy.wait_says("lest an `expire` deletes it still");
    assert!(!is_there(&old, "committed.json"), "it looks again before it commits");
    if rounds(1) == 1 {
        copy.terminate().ends_with(143);
        assert!(is_there(&newest, "committed.json") && !is_there(&old, "committed.json"));
        return;
    }
    wait_for("the copy has waited", Duration::from_mins(8), || !copy.runs());
    copy.wait().done();
    two.second.run(&["verify"]).done();
    two.place.highwater = two.second.clone();
    let arguments = ["--backup", &old, "--to-immediate", "--target-action", "promote"];
    let mut restored = two.place.restore("from-second", &arguments);
    restored.start();
    restored.wait_until("select pg_is_in_recovery()", "f");
    assert!(restored.dump() == content, "another content came back");
    restored.amcheck();
}

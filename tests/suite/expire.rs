//! `expire` against real servers: what stays restores as it was, whatever it leaned on, and what goes is gone.

use std::time::Duration;

use crate::harness::{
    Archived, Load, MAJORS, NEWEST, Random, Receiver, files_below, fingerprint, remove_tree, rounds,
};

/// Backups in the chain: six in `make test`, thirty in `make soak`.
fn chain_length() -> usize {
    usize::try_from(rounds(6)).unwrap().min(30)
}

/// A backup, and what the cluster held at a moment after it.
struct Link {
    id: String,
    moment: String,
    content: String,
}

/// Changes a part of everything, takes a backup, and remembers what the cluster then holds.
fn add_link(place: &Archived, source: &str) -> Link {
    place.cluster.pgbench(&["-c", "2", "-t", "200"]);
    let backup = ["backup", "--fast", "--json", "--source", source];
    let made = place.highwater.run(&backup).done().json();
    place.cluster.pgbench(&["-c", "1", "-t", "50"]);
    let content = place.cluster.dump();
    place.pass_time_of(&made);
    let moment = place.now();
    // A commit behind the moment, by which PostgreSQL sees that it has reached it.
    place.cluster.sql("create table if not exists passed (n int); insert into passed values (1)");
    place.cluster.sql("drop table passed");
    Link { id: made["id"].as_str().unwrap().to_owned(), moment, content }
}

/// Fails unless a backup brings the cluster back as it was at its moment.
fn assert_comes_back(place: &Archived, link: &Link, name: &str) {
    let target = ["--backup", &link.id, "--to-time", &link.moment, "--target-action", "promote"];
    let mut copy = place.restore(name, &target);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == link.content, "backup {} brought something else back", link.id);
    copy.amcheck();
    copy.fast_stop();
    remove_tree(&copy.pgdata);
}

/// The ids of the backups that exist.
pub(crate) fn ids(place: &Archived) -> Vec<String> {
    let info = place.highwater.info();
    let backups = info["backups"].as_array().unwrap().iter();
    backups.map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

/// Takes a chain of backups; after each, `expire` keeps the newest, half as many as are taken in all. Every kept one
/// must come back as the cluster was then.
fn a_chain(place: &Archived, source: &str, length: usize) {
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    let kept = (length / 2).max(3);
    let mut links: Vec<Link> = Vec::new();
    for _ in 0..length {
        links.push(add_link(place, source));
        let load = Load::on(&place.cluster);
        place.highwater.run(&["expire", "--retain-backups", &kept.to_string()]).done();
        drop(load);
        let newest = &links[links.len().saturating_sub(kept)..];
        let wanted: Vec<&str> = newest.iter().map(|link| link.id.as_str()).collect();
        assert_eq!(ids(place), wanted);
    }
    place.cluster.archive_now();
    let info = place.highwater.info();
    let oldest = &info["backups"][0];
    assert_eq!(info["recovery_window"]["earliest_lsn"], oldest["stop_lsn"], "{info}");
    assert_eq!(info["wal"][0]["gaps"].as_array().unwrap().len(), 0, "{info}");
    let remains = info["unfinished_backups"].as_array().unwrap();
    assert!(remains.iter().all(|one| one["begun_at"].is_null()), "{info}");
    assert_begins_with(&info);
    for (n, link) in links[length - kept..].iter().enumerate() {
        assert_comes_back(place, link, &format!("copy-{n}"));
    }
    let gone = &links[0].id;
    place.highwater.run(&["info", "--backup", gone]).ends_with(1);
    let pgdata = place.lab.path().join("never");
    let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--backup", gone];
    place.highwater.run(&arguments).ends_with(1);
}

/// WAL begins with the segment in which the oldest backup begins.
pub(crate) fn assert_begins_with(info: &serde_json::Value) {
    let lsn = |text: &serde_json::Value| crate::harness::parse_lsn(text.as_str().unwrap());
    let start = lsn(&info["backups"][0]["start_lsn"]);
    let first = lsn(&info["wal"][0]["start_lsn"]);
    let segment = info["wal_segment_bytes"].as_u64().unwrap();
    assert_eq!(first, start / segment * segment, "{info}");
}

#[test]
fn a_chain_of_backups_of_files_lives_on_when_its_oldest_are_expired() {
    a_chain(&Archived::by_server(NEWEST), "files", chain_length());
}

#[test]
fn a_chain_of_streamed_backups_lives_on_when_its_oldest_are_expired() {
    a_chain(&Archived::by_server(MAJORS[0]), "stream", chain_length().min(12));
}

#[test]
fn a_chain_on_s3_lives_on_beside_a_receiver() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    a_chain(&place, "stream", 4);
    receiver.terminate().done();
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().unwrap().len(), 0, "{info}");
}

#[test]
fn nothing_goes_without_a_policy_nor_in_a_dry_run() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    for _ in 0..2 {
        place.highwater.run(&["backup", "--fast"]).done();
        place.segments(1);
    }
    place.cluster.archive_now();
    let whole = fingerprint(&place.highwater.repo_directory());
    place.highwater.run(&["expire"]).ends_with(2).says("no retention is set");
    place.highwater.run(&["expire", "--retain-window", "30"]).ends_with(2).says("1h");
    assert!(fingerprint(&place.highwater.repo_directory()) == whole);
    // All backups lie in the window; what lies before the first of them is of no use to anybody.
    let window = place.highwater.run(&["expire", "--retain-window", "1h"]).done();
    window.says("deleted: 0 backups");
    assert_begins_with(&place.highwater.info());
    let before = fingerprint(&place.highwater.repo_directory());
    let dry = ["expire", "--retain-backups", "1", "--dry-run"];
    let run = place.highwater.run(&dry).done();
    run.says("would be deleted: 1 backups").says("goes");
    assert!(fingerprint(&place.highwater.repo_directory()) == before);
    let json = place.highwater.run(&[&dry[..], &["--json"]].concat()).done().json();
    assert_eq!(json["dry_run"], true);
    assert_eq!(json["backups"][0]["kept"], false);
    assert_eq!(json["backups"][1]["reasons"][0], "newest", "{json}");
    let highwater = place.highwater.with_env("HIGHWATER_RETAIN_BACKUPS", "1");
    let real = highwater.run(&["expire", "--json"]).done().json();
    assert_eq!(real["deleted"], json["deleted"], "a dry run tells what would go");
    highwater.run(&["info"]).done().says("retention: 1 newest backups");
    place.highwater.run(&["info"]).done().says("retention: none is set");
}

#[test]
fn a_pinned_backup_comes_back_from_its_own_wal() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let until = "2999-01-01 00:00:00+00";
    place.highwater.run(&["backup", "--fast", "--keep-until", "2001-01-01 00:00:00Z"]).ends_with(2);
    let backup = ["backup", "--fast", "--json", "--keep-until", until];
    let kept = place.highwater.run(&backup).done().json()["id"].as_str().unwrap().to_owned();
    let content = place.cluster.dump();
    place.segments(2);
    for _ in 0..2 {
        place.highwater.run(&["backup", "--fast"]).done();
        place.segments(2);
    }
    let second = ids(&place).remove(1);
    place.highwater.run(&["pin", &second, "--reason", "the audit"]).done();
    place.highwater.run(&["expire", "--retain-backups", "1"]).done().says("pinned until 2999");
    assert_eq!(ids(&place).len(), 3);
    let info = place.highwater.run(&["info"]).done();
    info.says("pinned until 2999-01-01T00:00:00").says(": the audit");
    let mut copy =
        place.restore("copy", &["--backup", &kept, "--to-immediate", "--target-action", "promote"]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == content);
    for id in [&second, &kept] {
        place.highwater.run(&["unpin", id]).done();
        place.highwater.run(&["unpin", id]).ends_with(1);
    }
    place.highwater.run(&["expire", "--retain-backups", "1"]).done();
    assert_eq!(ids(&place).len(), 1);
    place.highwater.run(&["pin", &kept]).ends_with(1);
    assert_begins_with(&place.highwater.info());
}

#[test]
fn a_promoted_timeline_takes_its_backups_from_the_one_before() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let first = add_link(&place, "stream");
    place.segments(1);
    place.cluster.archive_now();
    let mut copy = place.restore(
        "copy",
        &["--take-over", "--to-time", &first.moment, "--target-action", "promote"],
    );
    place.cluster.fast_stop();
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    copy.archive_into(&place.highwater);
    copy.sql("create table later as select generate_series(1, 1000) n");
    copy.archive_now();
    // No backup is on the new timeline: the one before its fork and the WAL of both stay.
    place.highwater.run(&["expire", "--retain-backups", "1"]).done().says("deleted: 0 backups");
    let highwater = place.highwater.on(&copy);
    highwater.run(&["backup", "--fast"]).done();
    highwater.run(&["expire", "--retain-backups", "1"]).done();
    let content = copy.dump();
    copy.archive_now();
    let pgdata = place.lab.path().join("third");
    highwater.run(&["restore", "--pgdata", pgdata.to_str().unwrap()]).done();
    let mut third = crate::harness::Cluster::adopt(&place.lab, NEWEST, &pgdata);
    third.start();
    third.wait_until("select pg_is_in_recovery()", "f");
    assert!(third.dump() == content);
    let histories = files_below(&place.highwater.repo_directory());
    let is_history = |path: &std::path::PathBuf| path.to_string_lossy().ends_with(".history");
    assert!(histories.iter().any(is_history), "history files are never deleted");
}

/// Killed at any moment, it harms no backup that is kept, and the next run ends what it began.
#[test]
fn a_killed_expire_harms_nothing_and_the_next_ends_it() {
    let mut random = Random::new("killed expire");
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let mut usual = Duration::from_millis(60);
    for round in 0..rounds(3).min(15) {
        let mut links: Vec<Link> = (0..2).map(|_| add_link(&place, "stream")).collect();
        place.segments(4);
        place.cluster.archive_now();
        let arguments = ["expire", "--retain-backups", "1"];
        let running = place.highwater.spawn(&arguments);
        let micros = u64::try_from(usual.as_micros()).unwrap();
        let run = running.kill_after(Duration::from_micros(random.below(micros)));
        assert!(run.was_killed() || run.code() == 0, "{run}");
        let last = links.pop().unwrap();
        assert_comes_back(&place, &last, &format!("copy-{round}"));
        let again = place.highwater.run(&arguments).done();
        usual = again.elapsed.max(Duration::from_millis(20));
        assert_eq!(ids(&place), [last.id.as_str()]);
        let info = place.highwater.info();
        // Killed between the two documents of a backup, it has left what might be a backup that runs, whose WAL stays.
        let unfinished = info["unfinished_backups"].as_array().unwrap();
        if unfinished.iter().all(|one| one["begun_at"].is_null()) {
            assert_begins_with(&info);
        }
        place.highwater.run(&arguments).done().says("deleted: 0 backups, 0 objects");
    }
}

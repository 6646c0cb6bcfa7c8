//! What cannot be done is refused before anything is touched, in words that
//! say what to do.

use crate::harness::{Archived, Lab, NEWEST, files_below};
use std::path::Path;

/// A backup, some commits, everything archived.
fn backed_up() -> Archived {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select 1 n");
    place.cluster.archive_now();
    place.highwater.run(&["backup", "--fast"]).done();
    place.pass_earliest_time();
    place.cluster.sql("insert into t values (2)");
    place.cluster.archive_now();
    place
}

#[track_caller]
fn refuses(place: &Archived, code: i32, arguments: &[&str]) -> crate::harness::Run {
    let pgdata = place.lab.path().join("copy");
    let mut all = vec!["restore", "--pgdata", pgdata.to_str().unwrap()];
    all.extend(arguments);
    let run = place.highwater.run(&all).ends_with(code);
    assert!(!pgdata.exists() || files_below(&pgdata).is_empty(), "something was written: {run}");
    run
}

#[test]
fn a_target_after_the_last_commit_names_the_nearest_reachable_one() {
    let place = backed_up();
    let latest = place.highwater.info()["recovery_window"]["latest_time"].clone();
    let run = refuses(&place, 4, &["--to-time", "2099-01-01 00:00:00+00"]);
    // To the second, for the wording may shorten the fraction or shift the zone.
    let minutes = &latest.as_str().unwrap()[14..19];
    assert!(run.stderr.contains(minutes), "{latest} is not named: {run}");
}

#[test]
fn a_target_before_the_first_backup_is_refused() {
    let place = backed_up();
    refuses(&place, 4, &["--to-time", "2001-01-01 00:00:00+00"]);
    refuses(&place, 4, &["--to-lsn", "0/1000028"]);
}

#[test]
fn a_target_inside_the_backup_itself_is_refused_or_served_by_an_older_one() {
    let place = backed_up();
    let first = place.highwater.info()["backups"][0].clone();
    // The start of the backup is before its end, so it cannot be consistent there.
    refuses(&place, 4, &["--to-lsn", first["start_lsn"].as_str().unwrap()]);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    let second = place.highwater.info()["backups"][1].clone();
    let lsn = second["start_lsn"].as_str().unwrap();
    let mut copy = place.restore("copy", &["--to-lsn", lsn, "--target-action", "promote"]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from t"), "2");
}

#[test]
fn an_unknown_xid_restore_point_timeline_or_backup_is_refused() {
    let place = backed_up();
    refuses(&place, 4, &["--to-xid", "123456789"]);
    refuses(&place, 4, &["--to-name", "never made"]).says("never made");
    refuses(&place, 4, &["--to-lsn", "7/0"]);
    assert!(matches!(refuses_any(&place, &["--timeline", "9"]), 1 | 4));
    assert!(matches!(refuses_any(&place, &["--backup", "20010101T000000Z"]), 1 | 2 | 4));
}

fn refuses_any(place: &Archived, arguments: &[&str]) -> i32 {
    let pgdata = place.lab.path().join("copy");
    let mut all = vec!["restore", "--pgdata", pgdata.to_str().unwrap()];
    all.extend(arguments);
    let run = place.highwater.run(&all);
    assert!(!pgdata.join("global/pg_control").exists(), "{run}");
    run.code()
}

#[test]
fn two_targets_at_once_are_wrong_use() {
    let place = backed_up();
    refuses(&place, 2, &["--to-immediate", "--to-xid", "800"]);
    refuses(&place, 2, &["--to-time", "2026-01-01 00:00:00+00", "--to-lsn", "0/5000000"]);
    refuses(&place, 2, &["--to-name", "x", "--exclusive"]);
    refuses(&place, 2, &["--to-time", "yesterday"]);
}

#[test]
fn a_time_without_a_zone_is_read_in_the_machines_zone_and_written_with_one() {
    let place = backed_up();
    let before = place.now();
    place.cluster.sql("insert into t values (3)");
    place.cluster.archive_now();
    // The same moment on the clock of a machine in Helsinki.
    let helsinki = jiff::tz::TimeZone::get("Europe/Helsinki").unwrap();
    let moment: jiff::Timestamp = before.parse().unwrap();
    let local = moment.to_zoned(helsinki);
    let bare = local.strftime("%Y-%m-%d %H:%M:%S.%6f").to_string();
    let pgdata = place.lab.path().join("copy");
    let highwater = place.highwater.with_env("TZ", "Europe/Helsinki");
    let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--to-time", &bare];
    highwater.run(&arguments).done().says(&local.strftime("%:z").to_string());
    let settings = std::fs::read_to_string(pgdata.join("postgresql.auto.conf")).unwrap();
    let line = settings.lines().rfind(|line| line.starts_with("recovery_target_time")).unwrap();
    assert!(line.contains("+00") && line.contains(&before[..19]), "{line}");
}

#[test]
fn a_dry_run_prints_the_plan_and_touches_nothing() {
    let place = backed_up();
    let run = refuses(&place, 0, &["--dry-run"]);
    let id = place.highwater.info()["backups"][0]["id"].as_str().unwrap().to_owned();
    run.says(&id);
}

#[test]
fn a_directory_that_is_not_empty_is_left_as_it_is() {
    let place = backed_up();
    let directory = place.lab.directory("occupied");
    place.lab.write("occupied/precious", b"do not touch");
    let run = place.highwater.run(&["restore", "--pgdata", directory.to_str().unwrap()]);
    assert!(matches!(run.code(), 2 | 3 | 7), "{run}");
    assert!(run.stderr.contains("precious"), "what is there is not named: {run}");
    assert_eq!(files_below(&directory), [Path::new("precious")]);
}

#[test]
fn the_directory_of_a_running_server_is_left_as_it_is() {
    let place = backed_up();
    let run = place.highwater.run(&["restore", "--pgdata", place.cluster.pgdata.to_str().unwrap()]);
    assert!(matches!(run.code(), 2 | 3 | 7), "{run}");
    assert_eq!(place.cluster.sql("select count(*) from t"), "2");
}

#[test]
fn a_tablespace_map_that_names_no_tablespace_is_refused() {
    let place = backed_up();
    let run = refuses_any(&place, &["--tablespace-map", "/no/such/place=/elsewhere"]);
    assert!(matches!(run, 2 | 4), "{run}");
}

#[test]
fn a_server_that_is_down_is_named() {
    let lab = Lab::open();
    let highwater = lab.highwater();
    let cluster = lab.cluster(NEWEST).create();
    let run = highwater.on(&cluster).run(&["init"]).ends_with(6);
    assert!(!run.stderr.is_empty());
}

#[test]
fn check_finds_what_is_wrong_and_says_the_remedy() {
    let lab = Lab::open();
    let highwater = lab.highwater();
    let cluster = lab.cluster(NEWEST).start();
    let highwater = highwater.on(&cluster);
    highwater.run(&["init"]).done();
    let run = highwater.run(&["check"]);
    assert_ne!(run.code(), 0, "archiving is off: {run}");
    run.says("archive_mode");
}

#[test]
fn check_waits_for_the_segment_it_forced() {
    let place = Archived::by_server(NEWEST);
    let before = place.cluster.sql("select archived_count from pg_stat_archiver");
    place.highwater.run(&["check"]).done();
    let after = place.cluster.sql("select archived_count from pg_stat_archiver");
    assert!(after.parse::<u64>().unwrap() > before.parse().unwrap());
    // One that looks right and stores nothing: only the forced segment shows it.
    place.cluster.set("archive_command = '/bin/true highwater archive-push %p'");
    place.cluster.reload();
    let run = place.highwater.run(&["check", "--wait-seconds", "3"]).ends_with(4);
    run.says("did not arrive").says("archive_command");
    // One that goes elsewhere is not waited for.
    place.cluster.set("archive_command = '/bin/true'");
    place.cluster.reload();
    let run = place.highwater.run(&["check"]).ends_with(6);
    assert!(run.elapsed < std::time::Duration::from_secs(20), "{run}");
    run.says("archive_command").says("not tried");
}

#[test]
fn a_server_without_wal_for_recovery_is_refused() {
    let lab = Lab::open();
    let highwater = lab.highwater();
    let builder = lab.cluster(NEWEST).conf("wal_level = minimal").conf("max_wal_senders = 0");
    let cluster = builder.start();
    let highwater = highwater.on(&cluster);
    highwater.run(&["init"]);
    let run = highwater.run(&["check"]);
    assert_ne!(run.code(), 0, "{run}");
    run.says("wal_level");
}

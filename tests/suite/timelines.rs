//! Promotions, standbys and clones: several servers around one repository.

use crate::backup_files::IN_BACKUP;
use crate::harness::{Archived, NEWEST, files_below, fingerprint};

const ARCHIVING: &[&str] = &["archive_mode = on"];

#[test]
fn a_promotion_brings_its_history_its_partial_and_the_segment_of_the_fork() {
    for major in [14, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.archive_now();
        let standby = place.cluster.standby("standby", ARCHIVING);
        place.cluster.sql("create table before_the_fork as select 1 n");
        standby.wait_until("select count(*) from pg_class where relname = 'before_the_fork'", "1");
        let open = place.cluster.sql("select pg_walfile_name(pg_current_wal_lsn())");
        standby.promote();
        let fork = standby.archive_now();
        assert_eq!(fork[8..], open[8..], "the fork lies in the open segment");
        let partial = format!("{open}.partial");
        for name in ["00000002.history", &partial, &fork] {
            standby.wait_archived(name);
            place.assert_gives_back(name, &std::fs::read(standby.wal(name)).unwrap());
        }
        // The first page of the fork's segment still carries the old timeline.
        let page = std::fs::read(standby.wal(&fork)).unwrap();
        assert_eq!((page[4], &fork[..8]), (1, "00000002"));
        assert_eq!(standby.sql("select failed_count from pg_stat_archiver"), "0");

        // The old primary goes on and completes the segment of the partial.
        let whole = place.cluster.archive_now();
        assert_eq!(whole, open);
        place.assert_gives_back(&open, &std::fs::read(place.cluster.wal(&open)).unwrap());
        place.assert_gives_back(&partial, &std::fs::read(standby.wal(&partial)).unwrap());
        assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    }
}

#[test]
fn a_standby_that_archives_too_offers_equal_segments() {
    let place = Archived::by_server(NEWEST);
    let standby = place.cluster.standby("standby", &["archive_mode = always"]);
    for _ in 0..3 {
        let name = place.cluster.archive_now();
        standby.wait_archived(&name);
        place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
    }
    for server in [&place.cluster, &standby] {
        assert_eq!(server.sql("select failed_count from pg_stat_archiver"), "0");
    }
}

#[test]
fn a_second_promotion_to_the_same_timeline_is_refused() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    let first = place.cluster.standby("first", ARCHIVING);
    let second = place.cluster.standby("second", &["archive_mode = on", "archive_command = ''"]);
    first.promote();
    first.archive_now();
    let history = std::fs::read(first.wal("00000002.history")).unwrap();
    // It must fork elsewhere, or its history would be the same text.
    place.cluster.sql("create table later as select 1 n");
    second.wait_until("select count(*) from pg_class where relname = 'later'", "1");
    second.promote();
    second.archive_into(&place.highwater);
    second.wait_until("select last_failed_wal from pg_stat_archiver", "00000002.history");
    place.assert_gives_back("00000002.history", &history);
    place.highwater.push(&second.wal("00000002.history")).ends_with(3).says("00000002.history");
    place.assert_gives_back("00000002.history", &history);
}

#[test]
fn a_backup_history_file_is_stored_under_its_own_name() {
    let place = Archived::by_server(NEWEST);
    let standby = place.cluster.standby("standby", &[]);
    place.cluster.archive_now();
    let is_backup = |name: &String| name.ends_with(".backup");
    let names = files_below(&place.cluster.pgdata.join("pg_wal")).into_iter();
    let mut names = names.map(|path| path.to_string_lossy().into_owned()).filter(is_backup);
    let name = names.next().expect("pg_basebackup leaves a backup history file");
    place.cluster.wait_archived(&name);
    place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
    drop(standby);
}

#[test]
fn a_restored_clone_cannot_write_where_its_origin_archives() {
    let place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("create table t as select generate_series(1, 100) n");
    place.cluster.archive_now();
    let mut clone = place.restore("clone", &[]);
    clone.start();
    clone.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(clone.sql("select count(*) from t"), "100");
    assert_eq!(clone.sql("show archive_mode"), "off");
    place.cluster.sql("select pg_create_restore_point('nothing else happens here')");
    let stored = fingerprint(&place.highwater.repo_directory());
    clone.sql("insert into t select generate_series(1, 1000)");
    clone.switch_wal();
    clone.fast_stop();
    assert_eq!(fingerprint(&place.highwater.repo_directory()), stored);
    place.cluster.archive_now();
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
}

#[test]
fn a_copy_that_takes_over_archives_the_next_timeline() {
    let mut place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("create table t as select 1 n");
    place.cluster.archive_now();
    place.cluster.kill9();
    let mut copy = place.restore("copy", &["--take-over"]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("show archive_mode"), "on");
    let name = copy.archive_now();
    assert!(name.starts_with("00000002"));
    place.assert_gives_back(&name, &std::fs::read(copy.wal(&name)).unwrap());
    copy.wait_archived("00000002.history");

    // The new timeline is backed up, and restored along its whole path.
    copy.sql("insert into t values (2)");
    copy.archive_now();
    let mut again = place.restore("again", &[]);
    again.start();
    again.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(again.sql("select count(*) from t"), "2");
    let mut old = place.restore("old", &["--timeline", "1"]);
    old.start();
    old.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(old.sql("select count(*) from t"), "1");
}

#[test]
fn a_standby_restored_from_the_repository_follows_it() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select 1 n");
    place.highwater.run(&["backup", "--fast"]).done();
    let mut standby = place.restore("follower", &["--standby"]);
    assert!(standby.pgdata.join("standby.signal").exists());
    standby.start();
    for count in 2..5 {
        place.cluster.sql(&format!("insert into t values ({count})"));
        place.cluster.archive_now();
        standby.wait_until("select count(*) from t", &count.to_string());
    }
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
}

fn a_promotion_comes_in_the_midst_of_a_backup(source: &str, in_its_midst: (&str, &str)) {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "10"]);
    let standby = place.cluster.standby("standby", &["archive_mode = always"]);
    place.cluster.archive_now();
    let highwater = place.highwater.on(&standby);
    // 150 MB at 20 MB/s.
    let backup = ["backup", "--fast", "--max-rate", "20MB", "--source", source];
    let running = highwater.spawn(&backup);
    standby.wait_until(in_its_midst.0, in_its_midst.1);
    standby.promote();
    let run = running.wait();
    assert!(matches!(run.code(), 4 | 6), "{run}");
    let info = place.highwater.info();
    let usable = info["backups"].as_array().unwrap().iter().filter(|b| b["usable"] == true);
    assert_eq!(usable.count(), 0, "{info}");
    // What it has left is in nobody's way.
    highwater.run(&["init"]).done();
    standby.archive_into(&highwater);
    let after = ["backup", "--fast", "--source", source];
    highwater.run(&after).done();
    place.assert_copy_equals("copy", &standby.dump());
}

#[test]
fn a_standby_promoted_during_its_streamed_backup_leaves_no_backup() {
    let streamed =
        "select count(*) from pg_stat_progress_basebackup where backup_streamed > 1000000";
    a_promotion_comes_in_the_midst_of_a_backup("stream", (streamed, "1"));
}

#[test]
fn a_standby_promoted_during_its_backup_of_files_leaves_no_backup() {
    a_promotion_comes_in_the_midst_of_a_backup("files", (IN_BACKUP, "1"));
}

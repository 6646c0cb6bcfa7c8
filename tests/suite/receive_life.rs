//! `receive` through the life of a cluster: promotion, failover, switch-over, shutdown, and
//! receivers that meet.

use crate::harness::{
    Archived, Cluster, Load, NEWEST, Receiver, finish, offset_in_segment, parse_lsn, switch_lsn,
    wait_for,
};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

fn modified(path: &Path) -> SystemTime {
    std::fs::metadata(path).unwrap().modified().unwrap()
}

/// Fails unless timeline 1 ends where timeline 2 began, and the history came before all WAL of
/// timeline 2.
fn assert_cut_at(place: &Archived, fork: &str, history: &Path) {
    let segment = place.cluster.sql(&format!("select pg_walfile_name('{fork}')"));
    let end = offset_in_segment(fork, 1);
    let objects = place.wal_objects();
    assert!(objects.iter().any(|(name, _)| name.starts_with("00000002")));
    for (name, path) in &objects {
        if name.starts_with("00000002") {
            assert!(modified(path) >= modified(history), "{name} was stored before the history");
        } else if let Some(name) = name.strip_suffix(".parts") {
            let piece = path.file_name().unwrap().to_str().unwrap();
            let (_, piece_end) = piece.split_once('-').unwrap();
            let piece_end = usize::from_str_radix(piece_end, 16).unwrap();
            let is_before = name < segment.as_str() || (name == segment && piece_end <= end);
            assert!(is_before, "{name} {piece} goes past the fork at {fork}");
        } else {
            assert!(*name < segment, "{name} goes past the fork at {fork}");
        }
    }
}

#[test]
fn a_standby_that_is_promoted_is_followed_across_the_fork() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 1);
        place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
        let standby = place.cluster.standby("standby", &[]);
        let highwater = place.highwater.on(&standby);
        let receiver = Receiver::streaming(&highwater, &standby, &["--from-standby"]);
        // Something to store, from which `backup` sees that WAL comes.
        place.cluster.sql("create table before_the_fork as select 1 n");
        place.highwater.run(&["backup", "--fast"]).done();
        receiver.terminate().done();
        // Nothing is cut because of its age, so that much is in hand when the timeline ends.
        let arguments = ["--from-standby", "--rpo", "1h"];
        let receiver = Receiver::streaming(&highwater, &standby, &arguments);
        let load = Load::on(&place.cluster);
        standby.wait_until("select count(*) > 200 from pgbench_history", "t");
        standby.promote();
        drop(load);
        receiver.wait_streaming(&standby);
        standby.sql("create table after_the_fork as select 1 n");
        for _ in 0..3 {
            standby.switch_wal();
        }
        let dump = standby.dump();
        // Autovacuum may finish more of them once nobody receives.
        let finished = standby.finished_segments();
        let end = standby.sql("select pg_current_wal_flush_lsn()");
        let received = format!("select write_lsn >= '{end}' from pg_stat_replication");
        standby.wait_until(&received, "t");
        receiver.terminate().done();

        let history = standby.wal("00000002.history");
        place.assert_gives_back("00000002.history", &std::fs::read(&history).unwrap());
        let stored = place.objects_of("00000002.history").remove(0);
        assert_cut_at(&place, &switch_lsn(&history), &stored);
        for name in finished.iter().filter(|name| name.starts_with("00000002")) {
            place.assert_gives_back(name, &std::fs::read(standby.wal(name)).unwrap());
        }
        assert_copy_holds(&place, "copy", &dump);
    }
}

fn assert_copy_holds(place: &Archived, name: &str, dump: &str) {
    let mut copy = place.restore(name, &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == dump, "the copy differs");
}

fn rows(place: &Archived, name: &str, arguments: &[&str]) -> String {
    let mut copy = place.restore(name, arguments);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    copy.sql(ROWS)
}

const ROWS: &str = "select string_agg(n::text, ',' order by n) from t";

/// Cuts a standby off its primary.
fn cut_off(standby: &Cluster) {
    standby.sql("alter system set primary_conninfo = ''");
    standby.reload();
    standby.wait_until("select count(*) from pg_stat_wal_receiver", "0");
}

#[test]
fn whichever_host_is_the_primary_is_followed_there_and_back() {
    let mut place = Archived::by_hand(NEWEST, 1);
    place.cluster.sql("create table t as select 1 n");
    let mut standby = place.cluster.standby("standby", &[]);
    let dsn = Cluster::dsn_of(&place.lab, &["pg", "standby"]);
    let highwater = place.highwater.with_env("HIGHWATER_DSN", &dsn);
    let receiver = Receiver::streaming(&highwater, &place.cluster, &[]);
    place.highwater.run(&["backup", "--fast"]).done();

    // Failover to a standby that is behind what was received.
    cut_off(&standby);
    place.cluster.sql("insert into t values (11)");
    receiver.wait_acknowledged(&place.cluster);
    place.cluster.kill9_all();
    standby.promote();
    receiver.wait_streaming(&standby);
    standby.sql("insert into t values (2)");
    receiver.wait_acknowledged(&standby);
    receiver.terminate().done();

    // The old primary comes back.
    place.cluster.start();
    place.cluster.sql("insert into t values (12)");
    Receiver::start(&place.highwater, &[]).wait().ends_with(6).says("replaced");
    let receiver = Receiver::streaming(&highwater, &standby, &[]);
    assert_eq!(place.cluster.sql("select count(*) from pg_stat_replication"), "0");
    standby.sql("insert into t values (3)");

    // It becomes a standby, and then the primary again.
    place.cluster.fast_stop();
    rewind(&place.cluster, &standby);
    place.cluster.start();
    place.cluster.wait_until(ROWS, "1,2,3");
    standby.fast_stop();
    place.cluster.promote();
    receiver.wait_streaming(&place.cluster);
    place.cluster.sql("insert into t values (4)");
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    assert_eq!(rows(&place, "newest", &[]), "1,2,3,4");
    // What only the old timeline had is kept too.
    assert_eq!(rows(&place, "oldest", &["--timeline", "1"]), "1,11");
}

/// Makes a stopped server a standby of one that replaced it.
fn rewind(old: &Cluster, new: &Cluster) {
    let mut command = new.tool("pg_rewind");
    command.arg("--target-pgdata").arg(&old.pgdata).arg("--source-server").arg(new.dsn());
    command.args(["-R", "--no-sync"]);
    finish(command);
}

/// Fails unless everything up to the last record of a server that was shut down, which is the shutdown
/// checkpoint, is stored as the server has it.
#[track_caller]
fn assert_shutdown_is_stored(place: &Archived) {
    let last = parse_lsn(&place.cluster.control("Latest checkpoint location"));
    let redo = place.cluster.control("Latest checkpoint's REDO location");
    assert_eq!(parse_lsn(&redo), last, "it was not shut down in good order");
    let info = place.highwater.info();
    let end = info["wal"][0]["end_lsn"].as_str().unwrap();
    assert!(parse_lsn(end) > last, "{info}");
    let name = place.cluster.control("Latest checkpoint's REDO WAL file");
    let (run, got) = place.fetch(&name);
    run.done();
    let end = offset_in_segment(end, 16);
    let wanted = std::fs::read(place.cluster.wal(&name)).unwrap();
    assert!(std::fs::read(got).unwrap()[..end] == wanted[..end], "{name} differs before {end}");
}

/// Shuts a server under load down; fails unless that takes less than 5 s and everything is stored.
fn a_fast_shutdown(major: u32, arguments: &[&str]) {
    let mut place = Archived::by_hand(major, 16);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, arguments);
    // A shutdown waits for what is flushed only where something was acknowledged before.
    place.cluster.switch_wal();
    place.cluster.wait_until("select flush_lsn is not null from pg_stat_replication", "t");
    let load = Load::on(&place.cluster);
    place.cluster.wait_until("select count(*) > 200 from pgbench_history", "t");
    let began = Instant::now();
    place.cluster.fast_stop();
    let elapsed = began.elapsed();
    drop(load);
    assert!(elapsed < Duration::from_secs(5), "the shutdown took {elapsed:?}");
    // The server closes the connection without waiting for the last status, which may meet its end.
    let ends = ["the server shut down in good order", "lost the stream"];
    let has_ended = || ends.iter().any(|end| receiver.log().contains(end));
    wait_for("the stream has ended", Duration::from_secs(20), has_ended);
    assert_shutdown_is_stored(&place);
    place.cluster.start();
    receiver.wait_streaming(&place.cluster);
    receiver.terminate().done();
}

#[test]
fn a_fast_shutdown_under_load_ends_soon_and_everything_is_stored() {
    for major in [14, 16, NEWEST] {
        a_fast_shutdown(major, &[]);
    }
}

#[test]
fn a_fast_shutdown_ends_soon_where_nothing_would_be_stored_because_of_its_age() {
    for major in [14, NEWEST] {
        a_fast_shutdown(major, &["--rpo", "1h"]);
    }
}

#[test]
fn a_second_receiver_on_the_same_slot_waits_and_takes_over() {
    let place = Archived::by_hand(NEWEST, 1);
    let first = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    let second = Receiver::start(&place.highwater, &[]);
    second.wait_says("in use by another receiver");
    place.cluster.sql("create table t as select 1 n");
    first.wait_acknowledged(&place.cluster);
    first.kill9();
    second.wait_streaming(&place.cluster);
    let name = place.cluster.switch_wal();
    second.wait_acknowledged(&place.cluster);
    second.terminate().done();
    place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
}

#[test]
fn two_receivers_with_slots_of_their_own_do_no_harm() {
    let place = Archived::by_hand(NEWEST, 1);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let first = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    let arguments = ["--rpo", "20ms", "--slot"];
    let start = |slot| {
        let arguments: Vec<_> = arguments.into_iter().chain([slot]).collect();
        Receiver::start(&place.highwater, &arguments)
    };
    let receivers = ["one", "other"].map(start);
    place
        .cluster
        .wait_until("select count(*) from pg_stat_replication where state = 'streaming'", "2");
    place.cluster.pgbench(&["-n", "-c", "4", "-t", "1000"]);
    place.cluster.switch_wal();
    let names = place.cluster.finished_segments();
    let lsn = place.cluster.sql("select pg_current_wal_flush_lsn()");
    let query = format!("select min(flush_lsn) >= '{lsn}' from pg_stat_replication");
    place.cluster.wait_until(&query, "t");
    for receiver in receivers {
        receiver.terminate().done();
    }
    for name in names.iter().filter(|name| **name >= first) {
        place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
    }
}

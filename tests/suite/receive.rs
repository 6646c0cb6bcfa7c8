//! `receive`: what it stores is what the server wrote, byte for byte, and nothing else.

use crate::harness::{
    Archived, Cluster, Lab, MAJORS, NEWEST, Receiver, Statement, WAITING_COMMITS, files_below,
    offset_in_segment, passes_within, switch_lsn,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A cluster whose `archive_command` is `cp`, beside a repository that only `receive` fills.
fn kept_by_cp(major: u32, segment_mib: u32, more: &[&str]) -> (Archived, PathBuf) {
    let lab = Lab::open();
    let kept = lab.directory("kept");
    let mut builder = lab.cluster(major).segment_mib(segment_mib).conf("archive_mode = on");
    builder = builder.conf(&format!("archive_command = 'cp %p {}/%f'", kept.display()));
    for line in more {
        builder = builder.conf(line);
    }
    let cluster = builder.start();
    let highwater = lab.highwater().on(&cluster);
    highwater.run(&["init"]).done();
    (Archived { cluster, highwater, lab }, kept)
}

/// Writes so many segments, of any length, most of them ended early.
fn write_segments(cluster: &Cluster, count: u32, bytes_max: u32) {
    cluster.sql(&format!(
        "do $$ begin for i in 1..{count} loop \
         perform pg_logical_emit_message(i % 5 = 0, 'filler', \
           repeat(md5(random()::text), (random() * {bytes_max} / 32)::int)); \
         if i % 8 <> 0 then perform pg_switch_wal(); end if; end loop; end $$"
    ));
}

fn current_segment(cluster: &Cluster) -> String {
    cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")
}

fn names_in(directory: &Path, suffix: &str) -> Vec<String> {
    let names = files_below(directory).into_iter();
    let names = names.map(|path| path.to_string_lossy().into_owned());
    names.filter(|name| name.ends_with(suffix)).collect()
}

/// Waits until each segment of this timeline that `cp` kept, from `first` on, stands in the repository as one object
/// and nothing else: stored whole, and its pieces removed, which the receiver does beside its work.
fn wait_whole(place: &Archived, kept: &Path, receiver: &Receiver, timeline: &str, first: &str) {
    let is_of_it =
        |name: &String| name.len() == 24 && name.starts_with(timeline) && name.as_str() >= first;
    let wanted: Vec<_> = names_in(kept, "").into_iter().filter(is_of_it).collect();
    assert!(!wanted.is_empty(), "nothing of timeline {timeline} was kept");
    let mut wrong = Vec::new();
    let whole = passes_within(Duration::from_mins(1), || {
        let objects = place.wal_objects();
        let named = |name: &str| objects.iter().filter(|(found, _)| found == name).count();
        let is_whole = |name: &&String| named(name) == 1 && named(&format!("{name}.parts")) == 0;
        wrong = wanted.iter().filter(|name| !is_whole(name)).collect();
        wrong.is_empty()
    });
    assert!(whole, "not whole, or not alone: {wrong:?}\n{}", receiver.log());
}

/// Has something committed of the segment at hand stored, which can only be in pieces; then ends the segment.
fn end_a_segment_of_pieces(place: &Archived, server: &Cluster, receiver: &Receiver) {
    server.sql("select pg_logical_emit_message(true, 'test', 'in pieces')");
    let lsn = receiver.wait_acknowledged(server);
    let name = server.sql(&format!("select pg_walfile_name('{lsn}'::pg_lsn - 1)"));
    let parts = format!("{name}.parts");
    let objects = place.wal_objects();
    assert!(objects.iter().any(|(found, _)| *found == parts), "{name} up to {lsn}: {objects:?}");
    server.archive_now();
}

/// Fails unless the repository gives back each history that `cp` kept, and each segment from
/// `first` on; returns how many segments.
fn assert_equals_kept(place: &Archived, kept: &Path, first: &str) -> usize {
    let names = names_in(kept, "");
    let is_segment = |name: &&String| name.len() == 24 && name.as_str() >= first;
    let segments: Vec<_> = names.iter().filter(is_segment).collect();
    for name in segments.iter().copied().chain(&names_in(kept, ".history")) {
        place.assert_gives_back(name, &std::fs::read(kept.join(name)).unwrap());
    }
    segments.len()
}

/// Runs `before` rounds of writing, a promotion and `after` more, of which each ends a segment or more except one in
/// eight; fails unless at least `least` segments were compared.
fn receive_stores_what_cp_keeps(
    major: u32,
    segment_mib: u32,
    (before, after): (u32, u32),
    least: usize,
) {
    let (mut place, kept) = kept_by_cp(major, segment_mib, &[]);
    let standby = place.cluster.standby("standby", &[]);
    let dsn = Cluster::dsn_of(&place.lab, &["pg", "standby"]);
    let highwater = place.highwater.with_env("HIGHWATER_DSN", &dsn);
    let first = current_segment(&place.cluster);
    let receiver = Receiver::streaming(&highwater, &place.cluster, &[]);
    let bytes_max = segment_mib << 20;
    write_segments(&place.cluster, before, bytes_max);
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    end_a_segment_of_pieces(&place, &place.cluster, &receiver);
    // Larger ones stay in parts of 16 MiB.
    let ends_whole = segment_mib <= 16;
    if ends_whole {
        wait_whole(&place, &kept, &receiver, "00000001", &first);
    }

    place.cluster.sql("create table at_the_fork (n int)");
    place.cluster.fast_stop();
    standby.promote();
    receiver.wait_streaming(&standby);
    write_segments(&standby, after, bytes_max);
    end_a_segment_of_pieces(&place, &standby, &receiver);
    if ends_whole {
        wait_whole(&place, &kept, &receiver, "00000002", &first);
    }
    receiver.wait_acknowledged(&standby);
    receiver.terminate().done();

    let count = assert_equals_kept(&place, &kept, &first);
    assert!(count >= least, "only {count} segments");
    // Of the segment of the fork, timeline 1 has what lies before the fork and nothing else.
    let fork = switch_lsn(&standby.wal("00000002.history"));
    let partial = names_in(&kept, ".partial").remove(0);
    let name = partial.trim_end_matches(".partial");
    let end = offset_in_segment(&fork, segment_mib);
    let mut wanted = std::fs::read(kept.join(&partial)).unwrap();
    wanted[end..].fill(0);
    place.assert_gives_back(name, &wanted);
}

#[test]
fn every_segment_is_the_file_that_archive_command_kept() {
    for major in [14, NEWEST] {
        receive_stores_what_cp_keeps(major, 1, (200, 40), 200);
    }
}

#[test]
fn larger_segments_are_the_files_that_archive_command_kept() {
    receive_stores_what_cp_keeps(16, 16, (8, 2), 8);
    receive_stores_what_cp_keeps(NEWEST, 64, (2, 1), 2);
}

#[test]
fn records_larger_than_a_segment_come_back_whole() {
    for major in [14, NEWEST] {
        let (place, kept) = kept_by_cp(major, 1, &["wal_compression = off"]);
        let first = current_segment(&place.cluster);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        for _ in 0..3 {
            place.cluster.sql(
                "select pg_logical_emit_message(true, 'large', \
                 (select string_agg(md5(g::text), '') from generate_series(1, 98304) g))",
            );
            place.cluster.switch_wal();
        }
        place.cluster.archive_now();
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        assert!(assert_equals_kept(&place, &kept, &first) >= 9);
    }
}

#[test]
fn archive_command_and_receive_agree_in_one_repository() {
    for major in [14, NEWEST] {
        let place = Archived::by_server_with(major, |builder| builder.segment_mib(1));
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
        place.cluster.pgbench(&["-c", "4", "-t", "200"]);
        write_segments(&place.cluster, 20, 1 << 20);
        let names = place.cluster.finished_segments();
        place.cluster.archive_now();
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
        assert!(names.len() > 20, "{names:?}");
        // What was ended before the slot was made is archive_command's alone, and is there too.
        for name in &names {
            place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
        }
    }
}

#[test]
fn a_segment_of_other_content_ends_receive_and_is_not_overwritten() {
    let mut place = Archived::by_hand(NEWEST, 1);
    place.segments(1);
    let twin = place.twin();
    // The twin's, for the segment that the real one writes now, and for the one after it.
    for ahead in 0..2 {
        let mut wanted = current_segment(&place.cluster);
        (0..ahead).for_each(|_| wanted = following(&wanted));
        let write_other = || {
            // Without it the two would write the same bytes.
            twin.sql("select pg_logical_emit_message(false, 'twin', md5(random()::text))");
            twin.switch_wal()
        };
        while write_other() < wanted {}
        let highwater = place.highwater.for_cluster(&format!("ahead{ahead}"));
        highwater.run(&["init"]).done();
        highwater.push(&twin.wal(&wanted)).done();
        let bytes = std::fs::read(twin.wal(&wanted)).unwrap();
        let slot = format!("slot{ahead}");
        let receiver = Receiver::streaming(&highwater, &place.cluster, &["--slot", &slot]);
        if ahead == 0 {
            assert_not_acknowledged(&place.cluster);
        }
        for _ in 0..=ahead + 1 {
            place.cluster.switch_wal();
        }
        let run = receiver.wait().ends_with(3).says(&wanted);
        let target = place.lab.path().join("target");
        highwater.get(&wanted, &target).done();
        assert!(std::fs::read(&target).unwrap() == bytes, "overwritten: {run}");
    }
}

/// Fails if a commit of now is acknowledged, which stands nowhere but under somebody else's bytes.
fn assert_not_acknowledged(cluster: &Cluster) {
    cluster.sql("create table if not exists here (n int)");
    let lsn = cluster.sql("select pg_current_wal_flush_lsn()");
    let query = format!("select max(flush_lsn) >= '{lsn}' from pg_stat_replication");
    let acknowledged = passes_within(Duration::from_secs(3), || cluster.sql(&query) == "t");
    assert!(!acknowledged, "{lsn} was acknowledged");
}

/// The name of the next segment, for the first few hundred of 1 MiB.
fn following(name: &str) -> String {
    let (front, back) = name.split_at(16);
    format!("{front}{:08X}", u32::from_str_radix(back, 16).unwrap() + 1)
}

/// A cluster whose commits wait for the receiver unless their session says otherwise.
fn synchronous(major: u32, more: &[&str]) -> Archived {
    let lab = Lab::open();
    let mut builder = lab.cluster(major).conf("synchronous_standby_names = 'highwater'");
    for line in more {
        builder = builder.conf(line);
    }
    let cluster = builder.start();
    let highwater = lab.highwater().on(&cluster);
    highwater.run(&["init"]).done();
    Archived { cluster, highwater, lab }
}

#[test]
fn an_order_to_stop_stores_what_is_in_hand_and_tells_the_server() {
    for major in [14, NEWEST] {
        // Statuses come often, so that the server soon knows what was received.
        let place = synchronous(major, &["wal_sender_timeout = '2s'"]);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "1h"]);
        place.cluster.sql(
            "set synchronous_commit = local; create table t as select generate_series(1, 1000) n",
        );
        let mut commit = Statement::begin(&place.cluster, "insert into t values (4711)");
        place.cluster.wait_until(WAITING_COMMITS, "1");
        let lsn = place.cluster.sql("select pg_current_wal_flush_lsn()");
        let name = place.cluster.sql("select pg_walfile_name(pg_current_wal_flush_lsn())");
        place
            .cluster
            .wait_until(&format!("select write_lsn >= '{lsn}' from pg_stat_replication"), "t");
        assert!(!commit.returns_within(Duration::ZERO), "stored before the order");
        receiver.terminate().done();
        assert!(commit.returns_within(Duration::from_secs(20)), "the server was not told");
        assert_eq!(place.cluster.sql("select count(*) from t where n = 4711"), "1");
        let told = format!("select restart_lsn >= '{lsn}' from pg_replication_slots");
        place.cluster.wait_until(&told, "t");
        let (run, got) = place.fetch(&name);
        run.done();
        let end = offset_in_segment(&lsn, 16);
        let (got, wanted) =
            (std::fs::read(got).unwrap(), std::fs::read(place.cluster.wal(&name)).unwrap());
        assert!(got[..end] == wanted[..end], "what was committed before the order is not stored");
    }
}

/// Fails unless this returns within seconds.
#[track_caller]
fn assert_returns(cluster: &Cluster, sql: &str) {
    let mut statement = Statement::begin(cluster, sql);
    assert!(statement.returns_within(Duration::from_secs(20)), "{sql} waits");
}

#[test]
fn every_kind_of_commit_is_stored_at_once_in_synchronous_mode() {
    for major in MAJORS {
        let place = synchronous(major, &["max_prepared_transactions = 4"]);
        let cluster = &place.cluster;
        // What is stored here is not stored because of its age.
        let arguments = ["--synchronous", "--rpo", "1h"];
        let receiver = Receiver::streaming(&place.highwater, cluster, &arguments);
        cluster.wait_until("select sync_state from pg_stat_replication", "sync");
        for sql in [
            "create table t (n int)",
            "insert into t values (1)",
            "begin; insert into t values (2); prepare transaction 'kept'",
            "commit prepared 'kept'",
            "begin; insert into t values (3); prepare transaction 'dropped'",
            "rollback prepared 'dropped'",
            "begin; savepoint s; insert into t values (4); release s; commit",
            "create database other",
            "vacuum full t",
            "drop table t",
        ] {
            assert_returns(cluster, sql);
        }
        receiver.terminate().done();
    }
}

#[test]
fn nothing_is_put_when_nothing_was_written() {
    let place = Archived::by_hand(NEWEST, 16);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    place.cluster.sql("create table t as select 1 n");
    receiver.wait_acknowledged(&place.cluster);
    let lsn = || place.cluster.sql("select pg_current_wal_insert_lsn()");
    let objects = || files_below(&place.highwater.repo_directory());
    // Four times the age at which a piece is cut; the server itself may write now and then.
    let idle = Duration::from_secs(4);
    let quiet = (0..10).any(|_| {
        receiver.wait_acknowledged(&place.cluster);
        let (before, stored) = (lsn(), objects());
        let changed = passes_within(idle, || objects() != stored);
        if before != lsn() {
            return false;
        }
        assert!(!changed, "{stored:?} became {:?}", objects());
        true
    });
    assert!(quiet, "the server never stopped writing");
    receiver.terminate().done();
}

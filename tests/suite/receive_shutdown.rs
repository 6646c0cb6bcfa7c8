//! A server that is stopped while `receive` cannot store what it has sent.

use crate::harness::{
    Archived, Cluster, Highwater, Lab, NEWEST, Receiver, Way, Weather, parse_lsn, passes_within,
};
use std::time::{Duration, Instant};

/// Within this a fast shutdown ends, however the store is.
const STOP_MAX: Duration = Duration::from_secs(30);

/// A cluster whose receiver reaches the store by a way, and the same repository without it.
fn by_a_way(major: u32, segment_mib: u32) -> (Archived, Highwater, Way) {
    let lab = Lab::open();
    let (highwater, way) = lab.highwater_on_s3_by_a_way();
    let cluster = lab.cluster(major).segment_mib(segment_mib).start();
    let (near, receiving) = (lab.highwater_on_s3().on(&cluster), highwater.on(&cluster));
    near.run(&["init"]).done();
    (Archived { cluster, highwater: near, lab }, receiving, way)
}

/// Stops the server as `pg_ctl stop -m fast` does.
#[track_caller]
fn stop_in_time(cluster: &mut Cluster) {
    let began = Instant::now();
    cluster.fast_stop();
    let elapsed = began.elapsed();
    assert!(elapsed < STOP_MAX, "the shutdown took {elapsed:?}");
    let state = cluster.control("Database cluster state");
    assert!(state.starts_with("shut down"), "{state}");
}

fn stored_lsn(place: &Archived) -> u64 {
    parse_lsn(place.highwater.info()["wal"][0]["end_lsn"].as_str().unwrap())
}

/// Starts the server; fails unless its slot keeps everything that is not stored, and all of it is streamed and comes
/// back once the store does.
fn assert_goes_on(mut place: Archived, receiver: Receiver, way: &Way, first: &str) {
    let stored = stored_lsn(&place);
    place.cluster.start();
    let kept = place.cluster.sql("select restart_lsn from pg_replication_slots");
    assert!(parse_lsn(&kept) <= stored, "kept from {kept}, stored to {stored:X}");
    way.set(Weather::Fair);
    receiver.wait_streaming(&place.cluster);
    place.cluster.sql("insert into t values (2, 'after')");
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    place.assert_all_comes_back_from(first);
}

fn begin(place: &Archived, receiving: &Highwater) -> (Receiver, String) {
    let receiver = Receiver::streaming(receiving, &place.cluster, &[]);
    place.cluster.sql("create table t (n int, t text)");
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    (receiver, place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())"))
}

#[test]
fn a_server_stops_while_the_store_is_away_and_nothing_false_is_told() {
    for (major, weather) in [(14, Weather::Still), (NEWEST, Weather::Gone)] {
        let (mut place, receiving, way) = by_a_way(major, 1);
        let (receiver, first) = begin(&place, &receiving);
        way.set(weather);
        place.cluster.sql("insert into t select g, md5(g::text) from generate_series(1, 20000) g");
        place.cluster.switch_wal();
        stop_in_time(&mut place.cluster);
        receiver.wait_says("the stream was ended, for the server to stop");
        assert_goes_on(place, receiver, &way, &first);
    }
}

#[test]
fn a_server_stops_while_the_receiver_holds_so_much_that_it_reads_no_more() {
    let (mut place, receiving, way) = by_a_way(NEWEST, 16);
    place.cluster.set("max_wal_size = 1GB");
    place.cluster.reload();
    let (receiver, first) = begin(&place, &receiving);
    way.set(Weather::Still);
    place.cluster.sql(
        "insert into t select g, (select string_agg(md5(g || '-' || n), '') from generate_series(1, 60) n) \
         from generate_series(1, 100000) g",
    );
    let behind = "select pg_current_wal_lsn() - sent_lsn > 60000000 from pg_stat_replication";
    let is_behind = || place.cluster.try_sql(behind).as_deref() == Ok("t");
    assert!(passes_within(STOP_MAX, is_behind), "everything was read");
    stop_in_time(&mut place.cluster);
    receiver.wait_says("the stream was ended, for the server to stop");
    assert_goes_on(place, receiver, &way, &first);
}

#[test]
fn an_idle_stream_over_a_short_timeout_is_never_taken_for_a_shutdown() {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).segment_mib(1).conf("wal_sender_timeout = '1s'").start();
    let (highwater, way) = lab.highwater_on_s3_by_a_way();
    let receiving = highwater.on(&cluster);
    receiving.run(&["init"]).done();
    let place = Archived { cluster, highwater: receiving.clone(), lab };
    let (receiver, _) = begin(&place, &receiving);
    way.set(Weather::Still);
    place.cluster.sql("insert into t values (1, 'waits')");
    let told =
        "select coalesce(max(reply_time), '-infinity') > '%'::timestamptz from pg_stat_replication";
    let later = place.cluster.sql("select now() + interval '15 s'");
    place.cluster.wait_until(&told.replace('%', &later), "t");
    let log = receiver.log();
    assert_eq!(log.matches("streaming timeline 1").count(), 1, "{log}");
    way.set(Weather::Fair);
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
}

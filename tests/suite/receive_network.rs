//! `receive` over a bad network to its server.

use crate::harness::{Archived, Highwater, Lab, NEWEST, Receiver, Way, Weather};
use std::time::Duration;

/// A cluster that a receiver reaches only by a way on which the weather can be made.
fn by_a_way() -> (Archived, Highwater, Way) {
    let lab = Lab::open();
    let builder = lab.cluster(NEWEST).segment_mib(1).loopback();
    let cluster = builder.conf("wal_sender_timeout = '3s'").start();
    let way = Way::to(cluster.port());
    let highwater = lab.highwater().on(&cluster);
    highwater.run(&["init"]).done();
    let dsn =
        format!("host=127.0.0.1 port={} user=scram password=s3cret dbname=postgres", way.port);
    let receiving = highwater.with_env("HIGHWATER_DSN", &dsn);
    (Archived { cluster, highwater, lab }, receiving, way)
}

#[test]
fn a_connection_that_fell_silent_is_given_up_and_made_again() {
    let (place, receiving, way) = by_a_way();
    let receiver = Receiver::streaming(&receiving, &place.cluster, &[]);
    receiver.wait_acknowledged(&place.cluster);
    way.set(Weather::Still);
    place.cluster.sql("create table t as select 1 n");
    receiver.wait_says("has not said a word");
    way.set(Weather::Fair);
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
}

#[test]
fn messages_cut_anywhere_leave_neither_a_gap_nor_other_bytes() {
    let (place, receiving, way) = by_a_way();
    let receiver = Receiver::streaming(&receiving, &place.cluster, &["--rpo", "20ms"]);
    let first = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    way.set(Weather::Rough { delay_max: Duration::from_millis(2), cut_one_in: 60 });
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    place.cluster.pgbench(&["-n", "-c", "4", "-t", "1000"]);
    place.cluster.switch_wal();
    way.set(Weather::Fair);
    receiver.wait_acknowledged(&place.cluster);
    let log = receiver.log();
    assert!(log.matches("streaming timeline 1").count() > 1, "nothing was cut: {log}");
    receiver.terminate().done();
    place.assert_all_comes_back_from(&first);
}

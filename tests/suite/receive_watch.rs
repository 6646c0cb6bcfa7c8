//! What `receive` sees of the server besides WAL: a slot without room, commits that wait for it, another like it.

use crate::harness::{Archived, Lab, NEWEST, Receiver, Weather};

const IN_DANGER: &str = "is about to lose WAL";

/// Waits until it has looked at the server again: the second look comes some seconds after the first.
fn wait_looked_at(place: &Archived, receiver: &Receiver) {
    let looked = "synchronous_standby_names makes commits wait for this receiver";
    place.cluster.set("synchronous_standby_names = 'highwater'");
    place.cluster.reload();
    receiver.wait_says(looked);
    place.cluster.set("synchronous_standby_names = ''");
    place.cluster.reload();
}

#[test]
fn a_slot_is_in_danger_only_when_little_of_what_it_may_keep_is_left() {
    for major in [14, NEWEST] {
        let lab = Lab::open();
        let (highwater, way) = lab.highwater_on_s3_by_a_way();
        let builder = lab.cluster(major).segment_mib(1).conf("wal_keep_size = 0");
        let cluster = builder.conf("max_slot_wal_keep_size = 8MB").start();
        let highwater = highwater.on(&cluster);
        highwater.run(&["init"]).done();
        let place = Archived { cluster, highwater, lab };
        place.cluster.sql("create table t (n int)");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.cluster.switch_wal();
        receiver.wait_acknowledged(&place.cluster);
        wait_looked_at(&place, &receiver);
        assert!(!receiver.log().contains(IN_DANGER), "{}", receiver.log());

        way.set(Weather::Still);
        let left = "select safe_wal_size from pg_replication_slots";
        while place.cluster.sql(left).parse::<i64>().unwrap() > 1 << 20 {
            place.cluster.sql("insert into t values (1)");
            place.cluster.switch_wal();
        }
        receiver.wait_says(IN_DANGER);
        way.set(Weather::Fair);
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
    }
}

#[test]
fn commits_that_wait_for_a_receiver_that_was_not_told_are_said() {
    let place = Archived::by_hand(NEWEST, 1);
    let said = "start it with `--synchronous`";
    place.cluster.set("synchronous_standby_names = 'highwater'");
    place.cluster.reload();
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--synchronous"]);
    let other = Receiver::start(&place.highwater, &["--slot", "other"]);
    receiver.wait_says("2 receivers called `highwater` stream from this server");
    assert!(!receiver.log().contains(said), "{}", receiver.log());
    other.wait_says(said);
    other.terminate().done();
    receiver.terminate().done();
}

#[test]
fn a_second_receiver_is_said_and_one_alone_is_not() {
    let place = Archived::by_hand(NEWEST, 1);
    let first = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    wait_looked_at(&place, &first);
    assert!(!first.log().contains("receivers called"), "{}", first.log());
    let second = Receiver::start(&place.highwater, &["--slot", "other"]);
    second.wait_says("2 receivers called `highwater` stream from this server");
    second.terminate().done();
    first.terminate().done();
}

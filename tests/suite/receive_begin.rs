//! Where `receive` begins when it is started again: at what another left out, and with all histories on its way.

use std::fs;
use std::time::Duration;

use crate::harness::{Archived, NEWEST, Receiver, wait_for};

const NO_SLOT: [&str; 2] = ["--slot", "none"];

/// Uploads overtake each other: where a receiver dies, WAL may stand behind a hole, and without a slot nobody tells.
#[test]
fn what_a_receiver_that_died_left_out_is_asked_for_where_no_slot_tells() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 1);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &NO_SLOT);
        let names = place.segments(6);
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        for object in place.objects_of(&names[2]) {
            fs::remove_file(object).unwrap();
        }
        assert_eq!(place.highwater.info()["wal"][0]["gaps"].as_array().unwrap().len(), 1);

        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &NO_SLOT);
        wait_for("the segment is stored again", Duration::from_mins(1), || {
            place.fetch(&names[2]).0.code() == 0
        });
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        for name in &names {
            place.assert_gives_back(name, &fs::read(place.cluster.wal(name)).unwrap());
        }
        let info = place.highwater.info();
        assert_eq!(info["wal"][0]["gaps"].as_array().unwrap().len(), 0, "{info}");
    }
}

/// Recovery looks for the newest timeline from one number to the next, and stops where a history is missing.
#[test]
fn the_history_of_a_timeline_that_came_and_went_meanwhile_is_stored_too() {
    for major in [14, NEWEST] {
        let mut place = Archived::by_hand(major, 1);
        place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.highwater.run(&["backup", "--fast"]).done();
        // Everything of timeline 1, the checkpoint of its shutdown included, is stored.
        place.cluster.fast_stop();
        receiver.terminate().done();
        for timeline in [2, 3] {
            place.lab.write("pg/standby.signal", b"");
            place.cluster.start();
            place.cluster.promote();
            place.cluster.sql(&format!("create table on_{timeline} as select {timeline} n"));
            if timeline == 2 {
                place.cluster.fast_stop();
            }
        }
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        let dump = place.cluster.dump();
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        for name in ["00000002.history", "00000003.history"] {
            place.assert_gives_back(name, &fs::read(place.cluster.wal(name)).unwrap());
        }
        place.assert_copy_equals("copy", &dump);
    }
}

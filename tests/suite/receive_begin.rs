//! Where `receive` begins when it is started again: at what another left out, and with all histories on its way.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::harness::{Archived, NEWEST, Receiver, copy_tree, parse_lsn, wait_for};

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

/// How a server goes on that was put back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PutBack {
    /// It has written past what is stored, which ends within a segment.
    PastWithinSegment,
    /// The same, and what is stored ends with a segment.
    PastBorder,
    /// It is still behind what is stored.
    Behind,
}

/// The disk's snapshot, and no recovery: the server goes on under the same timeline, with other WAL at the same positions.
#[test]
fn a_server_that_was_put_back_without_recovery_is_refused_and_what_is_stored_stays() {
    for (major, how) in [
        (14, PutBack::PastBorder),
        (NEWEST, PutBack::PastBorder),
        (NEWEST, PutBack::PastWithinSegment),
        (NEWEST, PutBack::Behind),
    ] {
        let mut place = Archived::by_hand(major, 1);
        Receiver::streaming(&place.highwater, &place.cluster, &[]).terminate().done();
        place.cluster.fast_stop();
        let snapshot = place.lab.path().join("snapshot");
        copy_tree(&place.cluster.pgdata, &snapshot);
        place.cluster.start();
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.segments(3);
        let last = match how {
            PutBack::PastBorder => "select pg_switch_wal()",
            PutBack::PastWithinSegment | PutBack::Behind => "create table later (n int)",
        };
        place.cluster.sql(last);
        let end = parse_lsn(&receiver.wait_acknowledged(&place.cluster));
        receiver.terminate().done();
        place.cluster.immediate_stop();
        let stored = place.highwater.info()["wal"][0]["end_lsn"].as_str().map(parse_lsn).unwrap();
        assert!(stored >= end);
        let is_border = stored.is_multiple_of(1 << 20);
        assert_eq!(is_border, how == PutBack::PastBorder, "{stored:X}");

        fs::remove_dir_all(&place.cluster.pgdata).unwrap();
        fs::rename(&snapshot, &place.cluster.pgdata).unwrap();
        place.cluster.start();
        let before = contents(&place);
        let write_past = || {
            let position = "select pg_current_wal_lsn()";
            while parse_lsn(&place.cluster.sql(position)) < stored + (1 << 20) {
                place.segments_with(1, 77);
            }
        };
        let receiver = if how == PutBack::Behind {
            let receiver = Receiver::start(&place.highwater, &[]);
            receiver.wait_says("streaming timeline");
            write_past();
            receiver
        } else {
            write_past();
            Receiver::start(&place.highwater, &[])
        };
        let run = receiver.wait().ends_with(3);
        run.says("sends other WAL than is stored of the same timeline");
        assert!(contents(&place) == before, "something was stored, or changed");
    }
}

/// Returns what stands in the repository of WAL.
fn contents(place: &Archived) -> Vec<(PathBuf, Vec<u8>)> {
    let objects = place.wal_objects().into_iter();
    let mut all: Vec<_> =
        objects.map(|(_, path)| (path.clone(), fs::read(path).unwrap())).collect();
    all.sort();
    all
}

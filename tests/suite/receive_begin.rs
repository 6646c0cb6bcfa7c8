//! Where `receive` begins when it is started again: at what another left out, and with all histories on its way.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::harness::{Archived, NEWEST, Receiver, copy_tree, parse_lsn, wait_for};
use crate::receive_resume::leave_in_pieces;

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

/// What is stored when a server is put back, and how it goes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum PutBack {
    /// It has written past what is stored, which ends within a segment.
    PastWithinSegment,
    /// The same, and what is stored ends with a segment.
    PastBorder,
    /// The same, and that segment is stored in pieces only.
    PastPieces,
    /// It is still behind what is stored.
    Behind,
}

/// A cluster that can be put back.
struct Snapshot {
    place: Archived,
    directory: PathBuf,
    segment_bytes: u64,
}

impl Snapshot {
    fn take(major: u32, segment_mib: u32) -> Self {
        let mut place = Archived::by_hand(major, segment_mib);
        Receiver::streaming(&place.highwater, &place.cluster, &[]).terminate().done();
        place.cluster.fast_stop();
        let directory = place.lab.path().join("snapshot");
        copy_tree(&place.cluster.pgdata, &directory);
        place.cluster.start();
        Self { place, directory, segment_bytes: u64::from(segment_mib) << 20 }
    }

    /// Has WAL stored that ends so, and returns where.
    fn store(&self, how: PutBack) -> u64 {
        let place = &self.place;
        if how == PutBack::PastPieces {
            leave_in_pieces(place);
        } else {
            let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
            place.segments(3);
            let last = match how {
                PutBack::PastBorder => "select pg_switch_wal()",
                _ => "create table later (n int)",
            };
            place.cluster.sql(last);
            receiver.wait_acknowledged(&place.cluster);
            receiver.terminate().done();
        }
        let info = place.highwater.info();
        let stored = parse_lsn(info["wal"][0]["end_lsn"].as_str().unwrap());
        let is_border = stored.is_multiple_of(self.segment_bytes);
        assert_eq!(
            is_border,
            matches!(how, PutBack::PastBorder | PutBack::PastPieces),
            "{stored:X}"
        );
        stored
    }

    fn put_back(&mut self) {
        self.place.cluster.immediate_stop();
        fs::remove_dir_all(&self.place.cluster.pgdata).unwrap();
        fs::rename(&self.directory, &self.place.cluster.pgdata).unwrap();
        self.place.cluster.start();
    }

    /// Writes other WAL, to a segment and more behind `lsn`.
    fn write_past(&self, lsn: u64) {
        let position = || parse_lsn(&self.place.cluster.sql("select pg_current_wal_lsn()"));
        while position() < lsn + self.segment_bytes {
            self.place.segments_with(1, 77);
        }
    }
}

/// The disk's snapshot, and no recovery: the server goes on under the same timeline, with other WAL at the same positions.
#[test]
fn a_server_that_was_put_back_without_recovery_is_refused_and_what_is_stored_stays() {
    for (major, segment_mib, how) in [
        (14, 1, PutBack::PastBorder),
        (NEWEST, 1, PutBack::PastBorder),
        // Its last 16 MiB, which are one object, hold only zeros.
        (NEWEST, 64, PutBack::PastBorder),
        (NEWEST, 1, PutBack::PastPieces),
        (NEWEST, 1, PutBack::PastWithinSegment),
        (NEWEST, 1, PutBack::Behind),
    ] {
        let mut snapshot = Snapshot::take(major, segment_mib);
        let stored = snapshot.store(how);
        snapshot.put_back();
        let place = &snapshot.place;
        let before = contents(place);
        let receiver = if how == PutBack::Behind {
            let receiver = Receiver::start(&place.highwater, &[]);
            receiver.wait_says("streaming timeline");
            snapshot.write_past(stored);
            receiver
        } else {
            snapshot.write_past(stored);
            Receiver::start(&place.highwater, &[])
        };
        let run = receiver.wait().ends_with(3);
        run.says("sends other WAL than is stored of the same timeline");
        let mut after = contents(place);
        // A segment that was in pieces only is complete now, of these pieces, which stay.
        after.retain(|object| how != PutBack::PastPieces || before.contains(object));
        assert!(after == before, "something was stored, or changed");
    }
}

/// What was acknowledged of the segment stands in pieces, which no reader would look at beside the complete one.
#[test]
fn another_servers_segment_is_not_archived_over_acknowledged_pieces() {
    for major in [14, NEWEST] {
        let mut snapshot = Snapshot::take(major, 1);
        let stored = snapshot.store(PutBack::PastPieces);
        let pieces = contents(&snapshot.place);
        snapshot.put_back();
        snapshot.write_past(stored);
        let place = &snapshot.place;
        let (parts, name) = newest_parts(&pieces);
        let refused = place.highwater.push(&place.cluster.wal(&name)).ends_with(3);
        refused.says(&name).says(".parts/").says("Nothing that is stored was changed");
        assert!(contents(place) == pieces, "something was stored, or changed");

        // It was stored all the same, in the moment before the pieces were, and their receiver died.
        let aside = place.lab.path().join("aside");
        fs::rename(&parts, &aside).unwrap();
        place.highwater.push(&place.cluster.wal(&name)).done();
        fs::rename(&aside, &parts).unwrap();
        let before = contents(place);
        let refused = Receiver::start(&place.highwater, &[]).wait().ends_with(3);
        refused.says(".parts/").says(&format!("/{name}`")).says("holds other WAL than");
        assert!(contents(place) == before, "acknowledged WAL was removed");
        place.highwater.run(&["verify", "--deep"]).ends_with(4).says(&name);
    }
}

/// Its receiver died before it removed them, and `archive_command` was quicker than the next.
#[test]
fn pieces_beside_the_complete_segment_of_their_own_server_are_compared_and_removed() {
    let place = Archived::by_hand(NEWEST, 1);
    let (name, whole) = leave_in_pieces(&place);
    let wanted = fs::read(place.cluster.wal(&name)).unwrap();
    place.highwater.push(&place.cluster.wal(&name)).done();
    assert!(place.objects_of(&name).len() > 2, "the pieces stay beside it");
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    wait_for("the pieces are removed", Duration::from_secs(30), || {
        place.objects_of(&name) == [whole.as_path()]
    });
    receiver.terminate().done();
    place.assert_gives_back(&name, &wanted);
    place.highwater.run(&["verify", "--deep"]).done();
}

/// Returns the directory of the newest pieces, and the name of their segment.
fn newest_parts(objects: &[(PathBuf, Vec<u8>)]) -> (PathBuf, String) {
    let parts = objects.iter().filter_map(|(path, _)| path.parent());
    let parts = parts.filter(|parent| parent.extension().is_some()).max().unwrap();
    (parts.to_owned(), parts.file_stem().unwrap().to_str().unwrap().to_owned())
}

/// Returns what stands in the repository of WAL.
fn contents(place: &Archived) -> Vec<(PathBuf, Vec<u8>)> {
    let objects = place.wal_objects().into_iter();
    let mut all: Vec<_> =
        objects.map(|(_, path)| (path.clone(), fs::read(path).unwrap())).collect();
    all.sort();
    all
}

//! `receive` and what happens to it: SIGKILL, a server that crashes, a store that goes away.
//! What was acknowledged is stored, and what follows joins it without a gap.

use crate::harness::{
    Archived, Lab, Load, NEWEST, Random, Receiver, Weather, flip_bit, offset_in_segment, parse_lsn,
    passes_within, rounds, wait_for,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

const SEGMENT_MIB: u32 = 1;

/// The most memory of a receiver, in bytes.
const MEMORY_MAX: u64 = 64 << 20;

/// Said once for each upload when its first attempt has failed.
const STORE_FAILED: &str = "is not stored yet";

/// Fails unless the repository holds all WAL before `lsn`, as the server has it.
#[track_caller]
fn assert_stored_up_to(place: &Archived, lsn: &str) {
    let info = place.highwater.info();
    let end = info["wal"][0]["end_lsn"].as_str().unwrap_or("0/0");
    assert!(parse_lsn(end) >= parse_lsn(lsn), "{lsn} was acknowledged, and {end} is stored");
    let offset = offset_in_segment(lsn, SEGMENT_MIB);
    if offset == 0 {
        return;
    }
    let name = place.cluster.sql(&format!("select pg_walfile_name('{lsn}')"));
    let (run, got) = place.fetch(&name);
    run.done();
    let (got, wanted) =
        (std::fs::read(got).unwrap(), std::fs::read(place.cluster.wal(&name)).unwrap());
    assert!(got[..offset] == wanted[..offset], "{name} is not stored up to {lsn}");
}

/// Fails unless every finished segment from `first` on is stored as the server has it, without a gap.
#[track_caller]
fn assert_unbroken_from(place: &Archived, first: &str) {
    place.assert_all_comes_back_from(first);
    let info = place.highwater.info();
    for timeline in info["wal"].as_array().unwrap() {
        assert_eq!(timeline["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    }
}

/// Ends the segment and the receiver; fails unless all WAL from the segment `first` on is stored and a restore of
/// the backup taken meanwhile comes as far as the server.
#[track_caller]
fn assert_all_is_stored(place: &Archived, receiver: Receiver, first: &str) {
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    assert_unbroken_from(place, first);
    let dump = place.cluster.dump();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    place.assert_copy_equals("copy", &dump);
}

fn begin(place: &Archived) -> String {
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())")
}

#[test]
fn a_killed_receiver_has_stored_what_it_acknowledged_and_goes_on_without_a_gap() {
    let mut random = Random::new("killed receiver");
    let place = Archived::by_hand(NEWEST, SEGMENT_MIB);
    let first = begin(&place);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    place.highwater.run(&["backup", "--fast"]).done();
    receiver.kill9();
    let load = Load::on(&place.cluster);
    for round in 0..rounds(6) {
        // The short age makes many pieces, the long one whole segments.
        let rpo = if round % 2 == 0 { "10ms" } else { "1s" };
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", rpo]);
        passes_within(Duration::from_millis(random.below(1500)), || false);
        let flushed = place.cluster.sql(
            "select max(flush_lsn) from pg_stat_replication where application_name = 'highwater'",
        );
        receiver.kill9();
        if !flushed.is_empty() {
            assert_stored_up_to(&place, &flushed);
        }
    }
    drop(load);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    assert_all_is_stored(&place, receiver, &first);
    // Whatever a stream left in pieces alone when it ended, the next one makes whole before it begins.
    let receiver = Receiver::start(&place.highwater, &[]);
    receiver.wait_says("streaming timeline");
    receiver.terminate().done();
    let current = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    let names: Vec<_> = place.wal_objects().into_iter().map(|(name, _)| name).collect();
    let is_left = |segment: &&str| *segment != current && !names.iter().any(|name| name == segment);
    let pieced = names.iter().filter_map(|name| name.strip_suffix(".parts"));
    let left: Vec<_> = pieced.filter(is_left).collect();
    assert_eq!(left, Vec::<&str>::new());
}

/// Has a receiver store the segment at hand to its end in pieces only, and kills it; returns the segment's name and where
/// its complete object belongs. Segments are of 1 MiB.
pub fn leave_in_pieces(place: &Archived) -> (String, PathBuf) {
    place.cluster.switch_wal();
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "10ms"]);
    let name = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    // Only a short last part of a segment is stored as a piece beside the segment itself. A message of a transaction is
    // flushed when the statement ends.
    place.cluster.sql("select pg_logical_emit_message(true, 'x', repeat('x', 900000))");
    receiver.wait_acknowledged(&place.cluster);
    let parts = place.objects_of(&name);
    let directory = parts.first().and_then(|piece| piece.parent()).unwrap();
    // What stands in the way of the complete object is no object.
    let whole = directory.with_file_name(&name);
    std::fs::create_dir(&whole).unwrap();
    place.cluster.sql("select pg_switch_wal()");
    receiver.wait_acknowledged(&place.cluster);
    receiver.kill9();
    std::fs::remove_dir(&whole).unwrap();
    let left = place.objects_of(&name);
    let are_pieces = left.iter().all(|piece| piece.starts_with(directory));
    assert!(left.len() >= 2 && are_pieces, "{left:?}");
    (name, whole)
}

/// The segment was acknowledged to its end, so no server need have it any more when the next receiver begins.
#[test]
fn a_segment_that_a_killed_receiver_left_in_pieces_is_stored_complete_by_the_next() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, SEGMENT_MIB);
        let (name, whole) = leave_in_pieces(&place);
        let wanted = std::fs::read(place.cluster.wal(&name)).unwrap();
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        receiver.wait_says(&format!("stored {name} complete"));
        wait_for("the pieces are removed", Duration::from_secs(30), || {
            place.objects_of(&name) == [whole.as_path()]
        });
        place.assert_gives_back(&name, &wanted);
        receiver.terminate().done();
    }
}

#[test]
fn a_server_that_crashes_again_and_again_is_followed_without_a_gap() {
    for major in [14, NEWEST] {
        let mut random = Random::new("crashing server");
        let mut place = Archived::by_hand(major, SEGMENT_MIB);
        let first = begin(&place);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "20ms"]);
        place.highwater.run(&["backup", "--fast"]).done();
        for _ in 0..3 {
            let load = Load::on(&place.cluster);
            passes_within(Duration::from_millis(200 + random.below(800)), || false);
            place.cluster.immediate_stop();
            drop(load);
            place.cluster.start();
            receiver.wait_streaming(&place.cluster);
        }
        assert_all_is_stored(&place, receiver, &first);
    }
}

/// Takes the store away while something is written: the acknowledgement must stand still, the
/// server must not wait, and everything must be there when the store is back.
fn outlives_an_outage(place: &Archived, away: impl FnOnce(), back: impl FnOnce()) {
    let first = begin(place);
    // The outage outlasts the server's patience with a silent client.
    place.cluster.set("wal_sender_timeout = '2s'");
    place.cluster.reload();
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    receiver.wait_acknowledged(&place.cluster);
    away();
    let before = place.cluster.sql("select pg_current_wal_flush_lsn()");
    place.cluster.pgbench(&["-n", "-c", "2", "-t", "1500"]);
    // More than may be held in memory.
    place.cluster.sql(
        "select pg_logical_emit_message(false, 'x', \
         (select string_agg(sha512((g * n)::text::bytea)::text, '') \
          from generate_series(1, 16384) g)) from generate_series(1, 40) n",
    );
    place.cluster.switch_wal();
    let written = place.cluster.sql("select pg_current_wal_flush_lsn()");
    receiver.wait_says(STORE_FAILED);
    let flushed = "select flush_lsn from pg_stat_replication";
    let stood = place.cluster.sql(flushed);
    // What the server wrote by itself before the store was gone may be stored.
    assert!(parse_lsn(&stood) <= parse_lsn(&before), "{stood} acknowledged during the outage");
    let moved = passes_within(Duration::from_secs(5), || place.cluster.sql(flushed) != stood);
    assert!(!moved, "acknowledged during the outage");
    back();
    let lsn = receiver.wait_acknowledged(&place.cluster);
    assert!(parse_lsn(&lsn) >= parse_lsn(&written));
    let peak = receiver.peak_memory();
    assert!(peak <= MEMORY_MAX, "{peak} bytes of memory");
    let log = place.cluster.log();
    assert!(!log.contains("replication timeout"), "the receiver fell silent:\n{log}");
    receiver.terminate().done();
    assert_stored_up_to(place, &lsn);
    assert_unbroken_from(place, &first);
}

#[test]
fn a_directory_that_is_not_mounted_holds_the_acknowledgement_until_it_is_back() {
    let place = Archived::by_hand(NEWEST, SEGMENT_MIB);
    let repo = place.highwater.repo_directory();
    let elsewhere = repo.with_extension("away");
    let rename = |from: &Path, to: &Path| std::fs::rename(from, to).unwrap();
    outlives_an_outage(
        &place,
        || {
            rename(&repo, &elsewhere);
            place.lab.directory("repo");
        },
        || {
            // Nothing may have been put where the mount point was empty.
            std::fs::remove_dir(&repo).expect("the mount point is still empty");
            rename(&elsewhere, &repo);
        },
    );
}

#[test]
fn an_s3_server_that_is_gone_holds_the_acknowledgement_until_it_is_back() {
    let lab = Lab::open();
    let (highwater, way) = lab.highwater_on_s3_by_a_way();
    let cluster = lab.cluster(NEWEST).segment_mib(SEGMENT_MIB).start();
    let highwater = highwater.on(&cluster);
    highwater.run(&["init"]).done();
    let place = Archived { cluster, highwater, lab };
    outlives_an_outage(&place, || way.set(Weather::Gone), || way.set(Weather::Fair));
}

#[test]
fn an_order_to_stop_during_an_outage_ends_in_time_and_says_what_is_not_stored() {
    let place = Archived::by_hand(NEWEST, SEGMENT_MIB);
    begin(&place);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    receiver.wait_acknowledged(&place.cluster);
    let repo = place.highwater.repo_directory();
    let elsewhere = repo.with_extension("away");
    std::fs::rename(&repo, &elsewhere).unwrap();
    place.lab.directory("repo");
    place.cluster.sql("create table t as select 1 n");
    receiver.wait_says(STORE_FAILED);
    let run = receiver.terminate().ends_with(5).says("never acknowledged");
    assert!(run.elapsed < Duration::from_secs(100), "{run}");
    std::fs::remove_dir(&repo).unwrap();
    std::fs::rename(&elsewhere, &repo).unwrap();
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    let lsn = receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    assert_stored_up_to(&place, &lsn);
}

/// A piece whose header is whole and whose bytes are not would be taken for stored when it is put again:
/// then a commit would be acknowledged that nobody can read back.
#[test]
fn over_a_damaged_piece_nothing_is_acknowledged_before_the_segment_is_stored_whole() {
    let place = Archived::by_hand(NEWEST, 16);
    place.cluster.switch_wal();
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    place.cluster.sql("create table t as select 0 n");
    receiver.wait_acknowledged(&place.cluster);
    receiver.kill9();
    let segment = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    let pieces = place.objects_of(&segment);
    let first = pieces.iter().min().expect("a piece of the unfinished segment is stored");
    // The last byte belongs to the frame's own checksum.
    flip_bit(first, usize::try_from(std::fs::metadata(first).unwrap().len()).unwrap() - 6);

    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "20ms"]);
    receiver.wait_says(&format!("what is stored of {segment} is damaged"));
    for n in 1..6 {
        let before = place.objects_of(&segment);
        place.cluster.sql(&format!("insert into t values ({n})"));
        wait_for("another piece is stored", Duration::from_secs(30), || {
            place.objects_of(&segment).iter().any(|piece| !before.contains(piece))
        });
        let flushed = place.cluster.sql("select flush_lsn from pg_stat_replication");
        let offset = offset_in_segment(if flushed.is_empty() { "0/0" } else { &flushed }, 16);
        assert_eq!(offset, 0, "{flushed} is acknowledged, inside the damaged segment");
    }
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    place.assert_gives_back(&segment, &std::fs::read(place.cluster.wal(&segment)).unwrap());
}

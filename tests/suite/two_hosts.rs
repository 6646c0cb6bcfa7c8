//! Two hosts that push into one place on an S3 server at the same moment.

use crate::harness::{Archived, NEWEST, Run};
use std::path::Path;

/// Pushes two files at once from two processes.
fn push_both(place: &Archived, cluster: &str, one: &Path, other: &Path) -> [Run; 2] {
    let highwater = place.highwater.for_cluster(cluster);
    highwater.run(&["init"]).done();
    let push = |path: &Path| highwater.spawn(&["archive-push", path.to_str().unwrap()]);
    [push(one), push(other)].map(crate::harness::Running::wait)
}

fn gives_back(place: &Archived, cluster: &str, name: &str) -> Vec<u8> {
    let target = place.lab.path().join(format!("got-{cluster}"));
    place.highwater.for_cluster(cluster).get(name, &target).done();
    std::fs::read(target).unwrap()
}

#[test]
fn the_same_segment_from_two_hosts_at_once_is_stored_once_and_both_succeed() {
    for (mib, rows, rounds) in [(16, 60_000, 4), (64, 400_000, 2)] {
        let place = Archived::by_hand_on_s3(NEWEST, mib);
        let name = &place.segments_with(1, rows)[0];
        let ours = place.cluster.wal(name);
        let bytes = std::fs::read(&ours).unwrap();
        // A second host has its own copy of the file, as a standby with archive_mode = always has.
        place.lab.directory("standby");
        let theirs = place.lab.write(&format!("standby/{name}"), &bytes);
        for round in 0..rounds {
            let cluster = format!("same{round}");
            for run in push_both(&place, &cluster, &ours, &theirs) {
                run.done();
            }
            assert!(gives_back(&place, &cluster, name) == bytes, "{mib} MiB, round {round}");
        }
    }
}

#[test]
fn different_bytes_under_one_name_from_two_hosts_at_once_have_one_winner() {
    for (mib, rows, rounds) in [(16, 60_000, 4), (64, 400_000, 2)] {
        let mut place = Archived::by_hand_on_s3(NEWEST, mib);
        let twin = place.twin();
        let name = &place.segments_with(1, rows)[0];
        twin.sql(&format!("create table another as select generate_series(1, {rows}) n"));
        assert_eq!(twin.switch_wal(), *name, "both servers end the same segment");
        let files = [place.cluster.wal(name), twin.wal(name)];
        let bytes = files.each_ref().map(|path| std::fs::read(path).unwrap());
        for round in 0..rounds {
            let cluster = format!("rivals{round}");
            // By turns, so that neither has always the start of the other.
            let (one, other) = if round % 2 == 0 { (0, 1) } else { (1, 0) };
            let runs = push_both(&place, &cluster, &files[one], &files[other]);
            let [first, second] = runs.each_ref().map(Run::code);
            let winner = match (first, second) {
                (0, 3) => one,
                (3, 0) => other,
                _ => panic!("{mib} MiB, round {round}: {} {}", runs[0], runs[1]),
            };
            assert!(gives_back(&place, &cluster, name) == bytes[winner], "{mib} MiB: {round}");
            // And so it stays, whoever comes again.
            let highwater = place.highwater.for_cluster(&cluster);
            highwater.push(&files[1 - winner]).ends_with(3).says(name);
            highwater.push(&files[winner]).done();
            assert!(gives_back(&place, &cluster, name) == bytes[winner], "{mib} MiB: {round}");
        }
    }
}

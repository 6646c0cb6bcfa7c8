//! SIGKILL at random moments: never a wrong success, never a stuck retry, never a half object
//! visible; in a local directory and on an S3 server, with whole segments and with segments of several
//! pieces. Five rounds (two on S3 or with pieces) in `make test`, fifty in `make soak`.

use crate::harness::{Archived, NEWEST, Random, files_below, passes_within};
use std::time::Duration;

fn rounds() -> u64 {
    crate::harness::rounds(5)
}

/// For the kinds that take long.
fn few_rounds() -> u64 {
    crate::harness::rounds(2)
}

/// On S3, whose server here keeps everything that is ever stored in memory.
fn s3_rounds() -> u64 {
    few_rounds().min(50)
}

/// Rows of a segment of 64 MiB that fill three of its four pieces.
const LARGE_ROWS: u32 = 400_000;

const PIECE: usize = 16 << 20;

/// A random moment within a run that takes about `usual`, or just after it.
fn moment(random: &mut Random, usual: Duration) -> Duration {
    let bound = usual.as_micros() * 12 / 10 + 1;
    Duration::from_micros(random.below(u64::try_from(bound).unwrap()))
}

#[test]
fn a_killed_push_leaves_a_whole_object_or_none_and_the_next_succeeds() {
    let place = Archived::by_hand(NEWEST, 16);
    kill_pushes(&place, &place.segments(2), rounds());
}

#[test]
fn a_killed_push_of_pieces_leaves_whole_pieces_and_the_next_succeeds() {
    let place = Archived::by_hand(NEWEST, 64);
    kill_pushes(&place, &place.segments_with(2, LARGE_ROWS), few_rounds());
}

#[test]
fn a_killed_push_to_s3_leaves_a_whole_object_or_none_and_the_next_succeeds() {
    let place = Archived::by_hand_on_s3(NEWEST, 16);
    kill_pushes(&place, &place.segments_with(2, 60_000), s3_rounds());
}

#[test]
fn a_killed_push_of_pieces_to_s3_leaves_whole_pieces_and_the_next_succeeds() {
    let place = Archived::by_hand_on_s3(NEWEST, 64);
    kill_pushes(&place, &place.segments_with(2, LARGE_ROWS), s3_rounds());
}

fn kill_pushes(place: &Archived, names: &[String], rounds: u64) {
    let mut random = Random::new("killed push");
    let usual = place.highwater.push(&place.cluster.wal(&names[0])).done().elapsed;
    let name = &names[1];
    let path = place.cluster.wal(name);
    let bytes = std::fs::read(&path).unwrap();
    let mut killed = 0;
    for round in 0..rounds {
        let highwater = place.highwater.for_cluster(&format!("round{round}"));
        highwater.run(&["init"]).done();
        let pushing = highwater.spawn(&["archive-push", path.to_str().unwrap()]);
        let run = pushing.kill_after(moment(&mut random, usual));
        killed += u32::from(run.was_killed());
        let target = place.lab.path().join("target");
        let stored = highwater.get(name, &target);
        match stored.code() {
            0 => {
                let found = std::fs::read(&target).unwrap();
                let whole = found == bytes;
                assert!(whole || is_prefix_of_pieces(&found, &bytes), "half an object is visible");
                assert!(whole || run.was_killed(), "success was told of a part: {run}");
            }
            1 => assert!(run.was_killed(), "success was told and nothing stored: {run}"),
            _ => panic!("neither whole nor absent: {stored}"),
        }
        assert!(run.was_killed() || run.code() == 0, "{run}");
        highwater.push(&path).done();
        highwater.get(name, &target).done();
        assert!(std::fs::read(&target).unwrap() == bytes);
    }
    eprintln!("killed {killed} of {rounds}");
}

/// Whole pieces, and zeros behind them.
fn is_prefix_of_pieces(found: &[u8], bytes: &[u8]) -> bool {
    let is_cut_at =
        |cut: usize| found[..cut] == bytes[..cut] && found[cut..].iter().all(|byte| *byte == 0);
    found.len() == bytes.len() && (PIECE..bytes.len()).step_by(PIECE).any(is_cut_at)
}

#[test]
fn a_killed_get_leaves_a_whole_file_or_none_and_the_next_succeeds() {
    let place = Archived::by_hand(NEWEST, 16);
    kill_gets(&place, &place.segments(1)[0], rounds());
}

#[test]
fn a_killed_get_of_pieces_leaves_a_whole_file_or_none_and_the_next_succeeds() {
    let place = Archived::by_hand(NEWEST, 64);
    kill_gets(&place, &place.segments_with(1, LARGE_ROWS)[0], few_rounds());
}

#[test]
fn a_killed_get_from_s3_leaves_a_whole_file_or_none_and_the_next_succeeds() {
    let place = Archived::by_hand_on_s3(NEWEST, 64);
    kill_gets(&place, &place.segments_with(1, LARGE_ROWS)[0], s3_rounds());
}

fn kill_gets(place: &Archived, name: &str, rounds: u64) {
    let mut random = Random::new("killed get");
    place.highwater.push(&place.cluster.wal(name)).done();
    let bytes = std::fs::read(place.cluster.wal(name)).unwrap();
    let directory = place.lab.directory("target");
    let target = directory.join("RECOVERYXLOG");
    let usual = place.highwater.get(name, &target).done().elapsed;
    for _ in 0..rounds {
        std::fs::remove_file(&target).unwrap();
        let getting = place.highwater.spawn(&["archive-get", name, target.to_str().unwrap()]);
        let run = getting.kill_after(moment(&mut random, usual));
        assert!(run.was_killed() || run.code() == 0, "{run}");
        match std::fs::read(&target) {
            Ok(found) => assert!(found == bytes, "half a file is visible"),
            Err(_) => assert!(run.was_killed(), "success was told without a file: {run}"),
        }
        place.highwater.get(name, &target).done();
        assert!(std::fs::read(&target).unwrap() == bytes);
        assert_eq!(files_below(&directory).len(), 1, "what the killed one left is swept");
    }
}

#[test]
fn a_killed_backup_is_no_backup_and_the_next_succeeds() {
    kill_backups(&Archived::by_server(NEWEST), rounds());
}

#[test]
fn a_killed_backup_to_s3_is_no_backup_and_the_next_succeeds() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster.segment_mib(64));
    kill_backups(&place, s3_rounds());
}

fn kill_backups(place: &Archived, rounds: u64) {
    let mut random = Random::new("killed backup");
    place.cluster.pgbench(&["-i", "-q", "-s", "3"]);
    let usual = place.highwater.run(&["backup", "--fast"]).done().elapsed;
    let mut wanted = 1;
    for _ in 0..rounds {
        // Something new each time, or there would be nothing left to store.
        place.cluster.sql("update pgbench_accounts set abalance = abalance + 1 where aid % 9 = 0");
        let backup = place.highwater.spawn(&["backup", "--fast"]);
        let run = backup.kill_after(moment(&mut random, usual));
        wanted += usize::from(run.code() == 0);
        assert!(run.was_killed() || run.code() == 0, "{run}");
        let info = place.highwater.info();
        let backups = info["backups"].as_array().unwrap();
        let usable = backups.iter().filter(|backup| backup["usable"] == true).count();
        // Killed between the last write and the exit, it exists without having said so.
        let unsaid = usize::from(run.was_killed() && usable == wanted + 1);
        assert_eq!(usable, wanted + unsaid, "{run}\n{info}");
        wanted += unsaid;
    }
    place.highwater.run(&["backup", "--fast"]).done();
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.dump(), dump);
    copy.amcheck();
}

/// As a kill, but the backup may clear up: it is whole and said so, or nothing of it is left.
#[test]
fn a_stopped_backup_is_whole_or_leaves_nothing() {
    let mut random = Random::new("stopped backup");
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "3"]);
    let usual = place.highwater.run(&["backup", "--fast"]).done().elapsed;
    let mut wanted = 1;
    for _ in 0..rounds() {
        place.cluster.sql("update pgbench_accounts set abalance = abalance + 1 where aid % 9 = 0");
        let mut backup = place.highwater.spawn(&["backup", "--fast"]);
        passes_within(moment(&mut random, usual), || backup.ended());
        if !backup.ended() {
            backup.signal(rustix::process::Signal::TERM);
        }
        let run = backup.wait();
        // A signal before the first line of ours has its own way, and nothing was begun.
        assert!(run.was_killed() || [0, 143].contains(&run.code()), "{run}");
        wanted += usize::from(run.code() == 0);
        let info = place.highwater.info();
        assert_eq!(info["backups"].as_array().unwrap().len(), wanted, "{run}\n{info}");
        assert_eq!(info["unfinished_backups"].as_array().unwrap().len(), 0, "{run}\n{info}");
        let directories = std::fs::read_dir(place.highwater.repo_directory().join("main/backup"));
        let full = |path: &std::path::PathBuf| !files_below(path).is_empty();
        let left = directories.unwrap().map(|entry| entry.unwrap().path()).filter(full).count();
        assert_eq!(left, wanted, "{run}");
    }
}

#[test]
fn a_killed_restore_cannot_start_and_a_second_one_succeeds() {
    kill_restores(&Archived::by_server(NEWEST), rounds());
}

#[test]
fn a_killed_restore_from_s3_cannot_start_and_a_second_one_succeeds() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster.segment_mib(64));
    kill_restores(&place, s3_rounds());
}

fn kill_restores(place: &Archived, rounds: u64) {
    let mut random = Random::new("killed restore");
    place.cluster.pgbench(&["-i", "-q", "-s", "3"]);
    place.highwater.run(&["backup", "--fast"]).done();
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    let pgdata = place.lab.path().join("timed");
    let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap()];
    let usual = place.highwater.run(&arguments).done().elapsed;
    std::fs::remove_dir_all(&pgdata).unwrap();
    for round in 0..rounds {
        let pgdata = place.lab.path().join(format!("round{round}"));
        let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap()];
        let run = place.highwater.spawn(&arguments).kill_after(moment(&mut random, usual));
        assert!(run.was_killed() || run.code() == 0, "{run}");
        if pgdata.join("global/pg_control").exists() {
            // Written last, so all of it is there, whether or not it said so.
            let mut copy = crate::harness::Cluster::adopt(&place.lab, NEWEST, &pgdata);
            copy.start();
            copy.wait_until("select pg_is_in_recovery()", "f");
            assert_eq!(copy.dump(), dump);
        } else {
            assert!(run.was_killed(), "success was told without pg_control: {run}");
            if pgdata.exists() && std::fs::read_dir(&pgdata).unwrap().next().is_some() {
                let again = place.highwater.run(&arguments);
                assert_ne!(again.code(), 0, "into the remains of another: {again}");
                std::fs::remove_dir_all(&pgdata).unwrap();
            }
            place.highwater.run(&arguments).done();
        }
        std::fs::remove_dir_all(&pgdata).unwrap();
    }
}

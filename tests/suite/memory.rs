//! The ceiling of memory: `memory_max` holds for a database of ten times its size, and for very many small files.
//!
//! What is held against it is the most that the process had in memory at any moment, with the code of the release
//! build in place of this one's, which is larger. Address space counts too: hosts that never overcommit refuse it.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{Archived, Cluster, Lab, NEWEST, Run, finish, parse_lsn, rounds, wait_for};

/// The lowest ceiling that there is.
const CEILING_MIB: u64 = 64;

/// What a backup or restore may reserve of the address space, beyond this build's larger code.
const ADDRESS_SPACE_MIB: u64 = 256;

/// What the release build has in memory of its code and libraries.
const RELEASE_CODE_MIB: u64 = 14;

/// Files of 64 MiB.
const LARGE_FILES: u64 = 10;
const LARGE_FILE_BYTES: usize = 64 << 20;

const FILES_IN_DIRECTORY: usize = 5000;

fn archived() -> Archived {
    let mut place = Archived::by_server(NEWEST);
    place.highwater =
        place.highwater.with_env("HIGHWATER_MEMORY_MAX", &format!("{CEILING_MIB}MiB"));
    place
}

/// Runs a command to its end and fails if it took more memory than it may.
#[track_caller]
fn run_within(place: &Archived, arguments: &[&str]) -> Run {
    let (run, peaks) = place.highwater.spawn(arguments).wait_watching_memory();
    let run = run.done();
    let mib = |kib: u64| kib >> 10;
    let held = mib(peaks.resident - peaks.code.min(peaks.resident)) + RELEASE_CODE_MIB;
    eprintln!("{arguments:?}: {held} MiB, {} MiB of address space", mib(peaks.address_space));
    assert!(peaks.resident > 0, "{arguments:?} was never looked at");
    assert!(held <= CEILING_MIB, "{arguments:?} held {held} MiB: {peaks:?}");
    let reserved = mib(peaks.address_space);
    assert!(reserved <= ADDRESS_SPACE_MIB, "{arguments:?} reserved {reserved} MiB: {peaks:?}");
    run
}

/// Puts a directory of its own into a database's, which base backups take along as it is.
fn place_for_files(cluster: &Cluster) -> PathBuf {
    let database = cluster.sql("select oid from pg_database where datname = current_database()");
    let directory = cluster.pgdata.join("base").join(database.trim()).join("many");
    fs::create_dir(&directory).unwrap();
    directory
}

/// Gives what was made to the server's user.
fn hand_over(directory: &Path, cluster: &Cluster) {
    let owner = fs::metadata(&cluster.pgdata).unwrap();
    let mut left = vec![directory.to_owned()];
    while let Some(path) = left.pop() {
        let facts = fs::symlink_metadata(&path).unwrap();
        if facts.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        if facts.uid() != owner.uid() {
            chown(&path, Some(owner.uid()), Some(owner.gid())).unwrap();
        }
    }
}

/// Bytes that a codec makes about half as long.
fn large_file(number: u64) -> Vec<u8> {
    let mut state = number + 1;
    let mut bytes = Vec::with_capacity(LARGE_FILE_BYTES);
    while bytes.len() < LARGE_FILE_BYTES {
        for _ in 0..8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.extend_from_slice(&[b'x'; 64]);
    }
    bytes
}

/// Makes files of eight bytes, a hundred names for each.
fn small_files(directory: &Path, count: usize) {
    for first in (0..count).step_by(FILES_IN_DIRECTORY) {
        let directory = directory.join(format!("d{first}"));
        fs::create_dir(&directory).unwrap();
        let mut named = PathBuf::new();
        for number in first..(first + FILES_IN_DIRECTORY).min(count) {
            let path = directory.join(format!("x{number:07}"));
            if number % 100 == 0 {
                File::create(&path).unwrap().write_all(format!("{number:08}").as_bytes()).unwrap();
                named = path;
            } else {
                fs::hard_link(&named, path).unwrap();
            }
        }
    }
}

/// Lets PostgreSQL's own tool compare every file with the manifest.
#[track_caller]
fn verify(place: &Archived, pgdata: &Path) {
    let mut verify = place.cluster.tool("pg_verifybackup");
    verify.arg("--no-parse-wal").arg(pgdata);
    finish(verify);
}

#[test]
fn a_database_ten_times_the_ceiling_is_backed_up_and_restored_below_it() {
    let place = archived();
    let directory = place_for_files(&place.cluster);
    for number in 0..LARGE_FILES {
        fs::write(directory.join(format!("{number}.large")), large_file(number)).unwrap();
    }
    hand_over(&directory, &place.cluster);
    let total = LARGE_FILES * LARGE_FILE_BYTES as u64;
    assert!(total >= 10 * (CEILING_MIB << 20), "ten times the ceiling");

    run_within(&place, &["backup", "--fast", "--source", "stream"]);
    // Nothing of the first is used, so that everything is stored again.
    for number in 0..LARGE_FILES {
        fs::write(directory.join(format!("{number}.large")), large_file(number + 100)).unwrap();
    }
    run_within(&place, &["backup", "--fast", "--source", "files", "--jobs", "4"]);
    let pgdata = place.lab.path().join("copy");
    let to = pgdata.to_str().unwrap();
    run_within(&place, &["restore", "--pgdata", to, "--jobs", "4"]);
    verify(&place, &pgdata);
    let database = directory.strip_prefix(&place.cluster.pgdata).unwrap();
    for number in 0..LARGE_FILES {
        let copy = fs::read(pgdata.join(database).join(format!("{number}.large"))).unwrap();
        assert!(copy == large_file(number + 100), "file {number} is another");
    }
    fs::write(pgdata.join(database).join("3.large"), large_file(7)).unwrap();
    run_within(&place, &["restore", "--delta", "--pgdata", to]);
    verify(&place, &pgdata);
}

/// Two hundred thousand, and a million in `make soak`.
fn very_many() -> usize {
    if rounds(1) > 1 { 1_000_000 } else { 200_000 }
}

#[test]
fn very_many_small_files_are_backed_up_below_the_ceiling() {
    let count = very_many();
    let place = archived();
    let directory = place_for_files(&place.cluster);
    small_files(&directory, count);
    hand_over(&directory, &place.cluster);
    for source in ["stream", "files", "files"] {
        let backup = run_within(&place, &["--json", "backup", "--fast", "--source", source]).json();
        assert!(backup["files"].as_u64().unwrap() > count as u64, "{backup}");
    }
}

/// Each is fsynced twice here.
#[test]
fn very_many_small_files_are_restored_below_the_ceiling() {
    let count = very_many();
    let place = archived();
    let directory = place_for_files(&place.cluster);
    small_files(&directory, count);
    hand_over(&directory, &place.cluster);
    place.highwater.run(&["backup", "--fast", "--source", "files"]).done();
    let pgdata = place.lab.path().join("copy");
    let to = pgdata.to_str().unwrap();
    run_within(&place, &["restore", "--pgdata", to]);
    verify(&place, &pgdata);
    let database = directory.strip_prefix(&place.cluster.pgdata).unwrap();
    let changed = pgdata.join(database).join("d5000/x0005001");
    fs::write(&changed, "changed").unwrap();
    fs::write(pgdata.join(database).join("d0/stranger"), "nobody's").unwrap();
    hand_over(&pgdata.join(database).join("d0"), &place.cluster);
    run_within(&place, &["restore", "--delta", "--pgdata", to]);
    verify(&place, &pgdata);
    assert_eq!(fs::read(&changed).unwrap(), b"00005000");
}

/// Writes some 120 MB of WAL that no codec makes shorter.
fn write_noise(cluster: &Cluster) {
    cluster.sql(
        "create table noise as select sha512(random()::text::bytea) a, sha512(random()::text::bytea) b \
         from generate_series(1, 800000)",
    );
}

/// A restore reads them too, for tablespaces that are younger than the backup.
#[test]
fn a_restore_beside_wal_that_no_codec_makes_shorter_stays_below_the_ceiling() {
    let place = archived();
    place.highwater.run(&["backup", "--fast"]).done();
    write_noise(&place.cluster);
    place.cluster.archive_now();
    let copy = place.lab.path().join("copy");
    let asked = ["--json", "restore", "--jobs", "4", "--pgdata", copy.to_str().unwrap()];
    let done = run_within(&place, &asked).json();
    let lsn = |name: &str| parse_lsn(done[name].as_str().unwrap());
    assert!(lsn("wal_end_lsn") - lsn("wal_start_lsn") > 100 << 20, "{done}");
    assert_eq!(done["made_by_replay"].as_array().unwrap().len(), 0, "it was looked for: {done}");
}

/// Whole segments of bytes that no codec makes shorter wait, encrypted or not: what is stored beside the one asked for
/// has to fit as well.
#[test]
fn archive_push_of_segments_that_no_codec_makes_shorter_is_bounded_with_a_key_as_without() {
    for has_key in [false, true] {
        let lab = Lab::open();
        let cluster = lab.cluster(NEWEST).conf("archive_mode = on").start();
        let mut highwater = lab.highwater().on(&cluster).in_directory(&cluster.pgdata);
        if has_key {
            highwater = highwater.with_key(&highwater.new_key("key"));
        }
        highwater.run(&["init"]).done();
        write_noise(&cluster);
        let last = cluster.switch_wal();
        let place = Archived { cluster, highwater, lab };
        let ready = place.cluster.pgdata.join(format!("pg_wal/archive_status/{last}.ready"));
        wait_for("the last segment is ready", Duration::from_secs(90), || ready.exists());
        let names = place.cluster.finished_segments();
        assert!(names.len() > 6, "{names:?}");
        run_within(&place, &["archive-push", &format!("pg_wal/{}", names[0])]);
        for name in &names[..4] {
            place.assert_gives_back(name, &fs::read(place.cluster.wal(name)).unwrap());
        }
    }
}

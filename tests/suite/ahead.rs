//! Working ahead: segments pushed before their own call, and fetched before recovery asks. Whatever becomes of the spool,
//! what is told stays true: nothing is acknowledged that is not stored, nothing is served that is not the segment.

use crate::harness::{
    Archived, Cluster, Highwater, Lab, NEWEST, NO_SMALL_DISK, Random, Run, Running, flip_bit,
    not_run, on_small_disk, passes_within, rounds, wait_for,
};
use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// Fetching ahead ends by itself within this, and some seconds for a busy machine.
const GONE_WITHIN: Duration = Duration::from_secs(30);

/// A cluster whose finished segments wait to be archived, for its `archive_command` is empty.
pub fn with_backlog(segment_mib: u32, count: usize) -> (Archived, Vec<String>) {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).segment_mib(segment_mib).conf("archive_mode = on").start();
    let highwater = lab.highwater().on(&cluster);
    highwater.run(&["init"]).done();
    let place = Archived { cluster, highwater, lab };
    let names = place.segments_with(count, 2000);
    let last = names.last().unwrap();
    let ready = place.cluster.pgdata.join(format!("pg_wal/archive_status/{last}.ready"));
    wait_for("the last segment is ready", Duration::from_secs(30), || ready.exists());
    (place, names)
}

/// The binary as the server runs it: in the data directory.
pub fn in_pgdata(place: &Archived) -> Highwater {
    place.highwater.in_directory(&place.cluster.pgdata)
}

/// The same, soon giving up on a store that is away.
fn impatient(place: &Archived) -> Highwater {
    in_pgdata(place).with_retries(2)
}

pub fn push(highwater: &Highwater, name: &str) -> Run {
    highwater.run(&["-v", "archive-push", &format!("pg_wal/{name}")])
}

pub fn get(highwater: &Highwater, name: &str) -> Run {
    highwater.run(&["archive-get", name, "pg_wal/RECOVERYXLOG"])
}

pub fn spool(place: &Archived) -> PathBuf {
    place.cluster.pgdata.join("pg_wal/highwater.spool")
}

/// Takes a local repository away while something is done.
pub fn without_repository<T>(place: &Archived, work: impl FnOnce() -> T) -> T {
    let repo = place.highwater.repo_directory();
    let away = repo.with_extension("away");
    std::fs::rename(&repo, &away).unwrap();
    let done = work();
    std::fs::rename(&away, &repo).unwrap();
    done
}

#[track_caller]
pub fn assert_is_stored(place: &Archived, name: &str) {
    assert_is_stored_in(&place.highwater, place, name);
}

#[track_caller]
pub fn assert_is_stored_in(highwater: &Highwater, place: &Archived, name: &str) {
    let target = place.lab.path().join("target");
    highwater.get(name, &target).done();
    let stored = std::fs::read(&target).unwrap();
    assert!(stored == std::fs::read(place.cluster.wal(name)).unwrap(), "{name}: other bytes");
}

// ---------------------------------------------------------------- pushing

#[test]
fn a_backlog_is_archived_with_every_byte() {
    for (segment_mib, count) in [(1, 120), (16, 20)] {
        let (place, names) = with_backlog(segment_mib, count);
        place.cluster.archive_into(&place.highwater);
        place.cluster.wait_archived(names.last().unwrap());
        let failed = place.cluster.sql("select failed_count from pg_stat_archiver");
        assert_eq!(failed, "0", "{}", place.cluster.log());
        assert!(spool(&place).exists(), "nothing was pushed ahead");
        for name in &names {
            assert_is_stored(&place, name);
        }
        let info = place.highwater.info();
        assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    }
}

#[test]
fn a_note_answers_once_and_only_for_the_bytes_that_are_stored() {
    for segment_mib in [1, 64] {
        let (place, names) = with_backlog(segment_mib, 4);
        let highwater = impatient(&place);
        push(&highwater, &names[0]).done();
        without_repository(&place, || {
            push(&highwater, &names[1]).done();
            push(&highwater, &names[1]).ends_with(5);
            push(&highwater, &names[0]).ends_with(5);
        });
        assert_is_stored(&place, &names[1]);
        // Whatever changes a segment, it is not the one that was stored.
        flip_bit(&place.cluster.wal(&names[2]), 9000);
        let code = push(&highwater, &names[2]).code();
        assert!([3, 4].contains(&code), "{code}");
        flip_bit(&place.cluster.wal(&names[2]), 9000);
        assert_is_stored(&place, &names[2]);
    }
}

#[test]
fn a_copy_of_the_cluster_is_not_taken_for_it_by_the_notes_that_were_copied() {
    let (mut place, names) = with_backlog(1, 3);
    push(&in_pgdata(&place), &names[0]).done();
    let twin = place.twin();
    assert!(twin.pgdata.join("pg_wal/highwater.spool").exists());
    // Both go on, and end the same segment with other content.
    let ours = place.segments(1).remove(0);
    twin.sql("create table another_life as select generate_series(1, 5000) n");
    assert_eq!(twin.switch_wal(), ours);
    let highwater = in_pgdata(&place);
    push(&highwater, &ours).done();
    let its = place.highwater.in_directory(&twin.pgdata);
    let note = std::fs::read_dir(spool(&place)).unwrap().count();
    assert!(note > 0, "there are notes to be misled by");
    push(&its, &ours).ends_with(3);
    assert_is_stored(&place, &ours);
}

#[test]
fn a_note_of_another_repository_or_cluster_name_is_not_believed() {
    let (place, names) = with_backlog(1, 3);
    let highwater = in_pgdata(&place);
    push(&highwater, &names[0]).done();
    let second = highwater.for_cluster("second");
    second.run(&["init"]).done();
    push(&second, &names[1]).done();
    assert_is_stored_in(&second, &place, &names[1]);
}

/// Its name, and how it is done to a spool.
type Fault = (&'static str, fn(&Path));

const READ_ONLY: &str = "it cannot be written";

/// What may be wrong with a spool; each is done to the spool that the binary would use.
fn faults() -> Vec<Fault> {
    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    }
    vec![
        ("it is missing", |spool| std::fs::remove_dir_all(spool).unwrap()),
        ("it is a file", |spool| {
            std::fs::remove_dir_all(spool).unwrap();
            std::fs::write(spool, "x").unwrap();
        }),
        (READ_ONLY, |spool| chmod(spool, 0o500)),
        ("it cannot be read", |spool| chmod(spool, 0o000)),
        ("anybody can write to it", |spool| chmod(spool, 0o777)),
        ("it holds nonsense", |spool| {
            for entry in std::fs::read_dir(spool).unwrap() {
                std::fs::write(entry.unwrap().path(), "nonsense").unwrap();
            }
        }),
        ("its files are empty", |spool| {
            for entry in std::fs::read_dir(spool).unwrap() {
                std::fs::write(entry.unwrap().path(), "").unwrap();
            }
        }),
        ("its notes are of an earlier start of the machine", |spool| {
            for entry in std::fs::read_dir(spool).unwrap() {
                let path = entry.unwrap().path();
                let Ok(note) = std::fs::read_to_string(&path) else { continue };
                let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
                std::fs::write(&path, note.replace(boot.trim(), "an earlier one")).unwrap();
            }
        }),
    ]
}

#[test]
fn a_spool_that_cannot_be_used_makes_a_push_neither_fail_nor_lie() {
    for (fault, break_it) in faults() {
        let (place, names) = with_backlog(1, 4);
        let highwater = impatient(&place);
        push(&highwater, &names[0]).done();
        break_it(&spool(&place));
        let run = without_repository(&place, || push(&highwater, &names[1]));
        // What can be read may be believed, though it can never be removed.
        let code = if fault == READ_ONLY { 0 } else { 5 };
        assert_eq!(run.code(), code, "{fault}: {run}");
        for name in &names[1..] {
            let run = push(&highwater, name);
            assert_eq!(run.code(), 0, "{fault}: {run}");
            assert_is_stored(&place, name);
        }
        std::fs::set_permissions(spool(&place), PermissionsExt::from_mode(0o700)).unwrap();
    }
}

/// Runs a shell script in the data directory with a spool on a file system of 4 MiB; `$1` is the binary.
fn with_small_spool(place: &Archived, script: &str, names: &[String]) -> Option<Run> {
    let mount = place.lab.directory("small");
    let mut command = on_small_disk(&mount, script)?;
    let highwater = in_pgdata(place).with_env("HIGHWATER_SPOOL", mount.to_str().unwrap());
    highwater.settings_for(&mut command);
    command.arg(highwater.command().get_program()).args(names);
    Some(Running::start(command, script.into()).wait())
}

#[test]
fn a_spool_on_a_full_disk_or_another_file_system_harms_nothing() {
    // Bytes are compared in the script: it sees the small file system, and nobody else does.
    let pushes = "push() { \"$hw\" -v archive-push pg_wal/$1; }; hw=$1; shift; \
                  push $1 && push $2 && cat /dev/zero > \"$0/fill\"; \
                  push $3 && rm \"$0/fill\" && push $4 && push $5";
    let (place, names) = with_backlog(1, 5);
    let Some(run) = with_small_spool(&place, pushes, &names) else {
        return not_run("ahead::a_spool_on_a_full_disk_or_another_file_system", NO_SMALL_DISK);
    };
    run.done();
    for name in &names {
        assert_is_stored(&place, name);
    }
    let gets = "get() { rm -f pg_wal/RECOVERYXLOG; \"$hw\" archive-get $1 pg_wal/RECOVERYXLOG && \
                cmp pg_wal/$1 pg_wal/RECOVERYXLOG; }; hw=$1; shift; \
                get $1 && get $2 && cat /dev/zero > \"$0/fill\"; get $3 && get $4 && get $5";
    let (place, names) = with_archive(1, 5);
    with_small_spool(&place, gets, &names).unwrap().done();
}

#[test]
fn nothing_is_done_ahead_where_that_is_not_wanted_or_a_person_calls() {
    let (place, names) = with_backlog(1, 3);
    push(&in_pgdata(&place).with_env("HIGHWATER_SPOOL", "none"), &names[0]).done();
    place.highwater.push(&place.cluster.wal(&names[0])).done();
    assert!(!spool(&place).exists());
    assert!(place.objects_of(&names[1]).is_empty());
    // A directory of its own for each server below the one that is named.
    let named = place.lab.directory("spools");
    let highwater = in_pgdata(&place).with_env("HIGHWATER_SPOOL", named.to_str().unwrap());
    push(&highwater, &names[0]).done();
    assert!(!spool(&place).exists());
    assert_eq!(std::fs::read_dir(&named).unwrap().count(), 1);
    without_repository(&place, || push(&highwater, &names[1]).done());
}

#[test]
fn a_damaged_segment_ahead_is_refused_at_its_own_call_and_those_behind_it_are_stored() {
    let (place, names) = with_backlog(1, 4);
    let highwater = in_pgdata(&place);
    flip_bit(&place.cluster.wal(&names[1]), 9000);
    push(&highwater, &names[0]).done();
    push(&highwater, &names[1]).ends_with(4);
    assert!(place.objects_of(&names[1]).is_empty());
    without_repository(&place, || push(&highwater, &names[2]).done());
    assert_is_stored(&place, &names[2]);
}

#[test]
fn a_killed_push_leaves_only_notes_of_what_is_stored() {
    let mut random = Random::new("killed push ahead");
    let (place, names) = with_backlog(1, 20);
    let usual = push(&in_pgdata(&place), &names[0]).done().elapsed;
    for round in 0..rounds(20) {
        let cluster = format!("round{round}");
        let highwater = in_pgdata(&place).for_cluster(&cluster);
        highwater.run(&["init"]).done();
        std::fs::remove_dir_all(spool(&place)).ok();
        let moment = u64::try_from(usual.as_micros()).unwrap() * 12 / 10;
        let pushing = highwater.spawn(&["archive-push", &format!("pg_wal/{}", names[0])]);
        pushing.kill_after(Duration::from_micros(random.below(moment)));
        let files = std::fs::read_dir(spool(&place)).into_iter().flatten();
        let noted: Vec<_> = files
            .filter_map(|entry| {
                let name = entry.unwrap().file_name().into_string().unwrap();
                name.strip_suffix(".stored").map(ToOwned::to_owned)
            })
            .collect();
        for name in &noted {
            assert_is_stored_in(&highwater, &place, name);
        }
        for name in &names {
            push(&highwater, name).done();
        }
        for name in &names {
            assert_is_stored_in(&highwater, &place, name);
        }
    }
}

// ---------------------------------------------------------------- fetching

/// Returns the processes that fetch ahead for this data directory.
pub fn fetchers(pgdata: &Path) -> BTreeSet<u32> {
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let fetches = |pid: &u32| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let directory = std::fs::read_link(format!("/proc/{pid}/cwd")).ok();
        command.ends_with(b"fetch-ahead\0") && directory.as_deref() == Some(pgdata)
    };
    numbers.filter(fetches).collect()
}

/// A running cluster whose finished segments are stored.
fn with_archive(segment_mib: u32, count: usize) -> (Archived, Vec<String>) {
    let place = Archived::by_hand(NEWEST, segment_mib);
    let names = place.segments_with(count, 2000);
    for name in &names {
        place.highwater.push(&place.cluster.wal(name)).done();
    }
    (place, names)
}

#[track_caller]
fn assert_got(place: &Archived, name: &str) {
    let got = std::fs::read(place.cluster.pgdata.join("pg_wal/RECOVERYXLOG")).unwrap();
    assert!(got == std::fs::read(place.cluster.wal(name)).unwrap(), "{name} came back otherwise");
}

/// Longer than any kernel's clock stands still in a file's times.
const CLOCK_TICK: Duration = Duration::from_millis(20);

#[track_caller]
fn wait_fetched(place: &Archived, name: &str) {
    let note = spool(place).join(format!("{name}.fetched"));
    wait_for("a segment is fetched ahead", Duration::from_secs(20), || note.exists());
}

#[test]
fn what_was_fetched_ahead_is_served_without_the_store_and_only_once() {
    for segment_mib in [1, 64] {
        let (place, names) = with_archive(segment_mib, 4);
        let highwater = impatient(&place);
        get(&highwater, &names[0]).done();
        assert_got(&place, &names[0]);
        wait_fetched(&place, &names[1]);
        without_repository(&place, || {
            get(&highwater, &names[1]).done();
            assert_got(&place, &names[1]);
            get(&highwater, &names[1]).ends_with(133);
        });
        for name in [&names[2], &names[3], &names[0], &names[3]] {
            get(&highwater, name).done();
            assert_got(&place, name);
        }
        let gone = || fetchers(&place.cluster.pgdata).is_empty();
        wait_for("fetching ahead ends by itself", GONE_WITHIN, gone);
        let left: Vec<_> = std::fs::read_dir(spool(&place)).unwrap().flatten().collect();
        assert!(left.iter().all(|entry| entry.file_name() == "lock"), "{left:?}");
    }
}

#[test]
fn that_a_segment_is_absent_is_asked_of_the_store_each_time() {
    let (place, names) = with_archive(1, 2);
    let highwater = in_pgdata(&place);
    let next = place.segments_with(1, 2000).remove(0);
    get(&highwater, &names[1]).done();
    get(&highwater, &next).ends_with(1);
    get(&highwater, &next).ends_with(1);
    place.highwater.push(&place.cluster.wal(&next)).done();
    get(&highwater, &next).done();
    assert_got(&place, &next);
}

#[test]
fn fetching_ahead_ends_with_the_server() {
    let (mut place, names) = with_archive(1, 3);
    get(&in_pgdata(&place), &names[0]).done();
    wait_fetched(&place, &names[1]);
    place.cluster.fast_stop();
    let gone = || fetchers(&place.cluster.pgdata).is_empty();
    assert!(passes_within(Duration::from_secs(5), gone), "it goes on without a server");
}

#[test]
fn a_spool_that_cannot_be_used_makes_a_get_neither_fail_nor_lie() {
    for (fault, break_it) in faults() {
        let (place, names) = with_archive(1, 4);
        let highwater = in_pgdata(&place);
        get(&highwater, &names[0]).done();
        names[1..3].iter().for_each(|name| wait_fetched(&place, name));
        for pid in fetchers(&place.cluster.pgdata) {
            kill(pid);
        }
        break_it(&spool(&place));
        for name in &names[1..] {
            let run = get(&highwater, name);
            assert_eq!(run.code(), 0, "{fault}: {run}");
            assert_got(&place, name);
        }
        std::fs::set_permissions(spool(&place), PermissionsExt::from_mode(0o700)).unwrap();
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
}

#[test]
fn a_segment_in_the_spool_that_was_touched_is_fetched_anew() {
    let (place, names) = with_archive(1, 3);
    let highwater = in_pgdata(&place);
    get(&highwater, &names[0]).done();
    // They come in any order, and it is the note that knows the file.
    names[1..].iter().for_each(|name| wait_fetched(&place, name));
    let fetched = spool(&place).join(&names[1]);
    wait_for("a write would show in its times", Duration::from_secs(5), || {
        let metadata = std::fs::metadata(&fetched).unwrap();
        let (seconds, nanos) = (metadata.ctime().try_into(), metadata.ctime_nsec().try_into());
        let changed = UNIX_EPOCH + Duration::new(seconds.unwrap(), nanos.unwrap());
        changed.elapsed().is_ok_and(|age| age > CLOCK_TICK)
    });
    flip_bit(&fetched, 9000);
    get(&highwater, &names[1]).done();
    assert_got(&place, &names[1]);
    without_repository(&place, || get(&highwater, &names[2]).done());
    assert_got(&place, &names[2]);
}

#[test]
fn no_process_is_left_behind_where_postgresql_would_inherit_it() {
    let (place, names) = with_archive(1, 2);
    let alone = place.lab.directory("alone");
    for directory in ["global", "pg_wal"] {
        place.lab.directory(&format!("alone/{directory}"));
    }
    let control = std::fs::read(place.cluster.pgdata.join("global/pg_control")).unwrap();
    place.lab.write("alone/global/pg_control", &control);
    place.lab.write("alone/postmaster.pid", b"1\n");
    get(&place.highwater.in_directory(&alone), &names[0]).done();
    assert!(!alone.join("pg_wal/highwater.spool").exists());
}

#[test]
fn recovery_with_killed_fetchers_brings_everything_back() {
    let mut random = Random::new("killed fetchers");
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    place.highwater.run(&["backup", "--fast"]).done();
    place.segments_with(60, 2000);
    place.cluster.archive_now();
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    let ends_by_itself = |copy: Cluster| {
        let gone = || fetchers(&copy.pgdata).is_empty();
        wait_for("fetching ahead ends by itself", GONE_WITHIN, gone);
    };
    let mut before = None;
    for round in 0..rounds(3) {
        let mut copy = place.restore(&format!("copy{round}"), &[]);
        let pgdata = copy.pgdata.clone();
        let kills = random.below(20);
        let killer = std::thread::spawn(move || {
            for _ in 0..kills {
                passes_within(Duration::from_millis(30), || false);
                fetchers(&pgdata).into_iter().for_each(kill);
            }
        });
        copy.start();
        killer.join().unwrap();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert!(copy.dump() == dump, "the copy differs");
        assert!(copy.pgdata.join("pg_wal/highwater.spool").exists(), "nothing was fetched ahead");
        // That takes a while, in which the next recovery begins.
        if let Some(copy) = before.replace(copy) {
            ends_by_itself(copy);
        }
    }
    if let Some(copy) = before {
        ends_by_itself(copy);
    }
}

//! `receive` into a directory whose disk does not confirm what was written: each `fsync` that fails is made to by strace.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{
    Archived, NEWEST, NO_SMALL_DISK, Receiver, Running, as_server_user, copy_tree, not_run,
    on_small_disk, parse_lsn, passes_within, reachable_binary, remove_tree, wait_for,
};

/// Starts `receive` so that the system calls fail which strace is told to let fail. It counts for each thread.
fn with_failing(place: &Archived, inject: &str) -> Running {
    let mut command = as_server_user("/usr/bin/strace");
    command.args(["-f", "-y", "-qq", "-o"]).arg(trace_of(place));
    command.args(["-e", "trace=fsync", "-e", inject, "--"]);
    place.highwater.settings_for(&mut command);
    command.arg(reachable_binary()).args(["-v", "receive", "--rpo", "20ms"]);
    Running::start(command, format!("receive, {inject}"))
}

fn trace_of(place: &Archived) -> PathBuf {
    place.lab.path().join("trace")
}

/// Asks what strace watches to end.
fn terminate(strace: &Running) {
    let id = strace.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let child = children.split_whitespace().next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(child).unwrap(), Signal::TERM).unwrap();
}

fn write_rows(place: &Archived, count: usize) {
    place.cluster.sql("create table if not exists t as select 1 n");
    for n in 0..count {
        place.cluster.sql(&format!("insert into t select {n} from generate_series(1, 500)"));
    }
}

fn flushed(place: &Archived) -> u64 {
    let slot = place.cluster.sql("select restart_lsn from pg_replication_slots");
    parse_lsn(&slot)
}

/// Case 38: nothing that the disk did not confirm is acknowledged, and the service ends and says so.
#[test]
fn a_disk_that_confirms_nothing_ends_receive_and_acknowledges_nothing() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 1);
        let first = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "20ms"]);
        write_rows(&place, 3);
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        let before = flushed(&place);
        let mut running = with_failing(&place, "inject=fsync:error=EIO:when=1+");
        wait_for("receive ends", Duration::from_mins(1), || {
            place.cluster.sql("insert into t values (0)");
            running.ended()
        });
        let run = running.wait().ends_with(7);
        let run = run.says("the disk did not confirm what was written").says("is written anew");
        run.says("Everything that was acknowledged is in the repository");
        assert_eq!(flushed(&place), before, "major {major}: acknowledged and not confirmed");
        let info = place.highwater.info();
        assert!(parse_lsn(info["wal"][0]["end_lsn"].as_str().unwrap()) >= before, "{info}");

        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "20ms"]);
        write_rows(&place, 1);
        place.cluster.switch_wal();
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        place.cluster.sql("checkpoint");
        let names = place.cluster.finished_segments();
        for name in names.iter().filter(|name| **name >= first) {
            place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
        }
    }
}

/// One failure here and there: of a file, or of the directory that holds its name. Both are written anew.
#[test]
fn what_a_disk_did_not_confirm_once_is_written_anew_and_acknowledged_then() {
    let (mut files, mut directories) = (0, 0);
    for (first_failing, every) in [(3, 7), (2, 9)] {
        let place = Archived::by_hand(NEWEST, 1);
        let first = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
        let running =
            with_failing(&place, &format!("inject=fsync:error=EIO:when={first_failing}+{every}"));
        let streams = "select count(*) > 0 from pg_stat_replication where state = 'streaming'";
        place.cluster.wait_until(streams, "t");
        write_rows(&place, 60);
        place.cluster.switch_wal();
        let end = place.cluster.sql("select pg_current_wal_flush_lsn()");
        let acknowledged =
            format!("select coalesce(max(flush_lsn) >= '{end}', false) from pg_stat_replication");
        place.cluster.wait_until(&acknowledged, "t");
        terminate(&running);
        running.wait().done();
        let trace = std::fs::read_to_string(trace_of(&place)).unwrap();
        let failed = trace.lines().filter(|line| line.contains("INJECTED"));
        let (of_files, of_directories): (Vec<_>, Vec<_>) =
            failed.partition(|line| line.contains(".staging/"));
        files += of_files.len();
        directories += of_directories.len();
        let names = place.cluster.finished_segments();
        assert!(names.last().unwrap() > &first);
        for name in names.iter().filter(|name| **name >= first) {
            place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
        }
    }
    assert!(files > 0 && directories > 0, "{files} files and {directories} directories");
}

/// A full disk is a store that takes nothing: nothing is acknowledged, and what was received is stored as soon as there
/// is room again.
#[test]
fn over_a_full_disk_the_acknowledgement_stands_still_until_there_is_room() {
    const NAME: &str =
        "receive_disk::over_a_full_disk_the_acknowledgement_stands_still_until_there_is_room";
    let place = Archived::by_hand(NEWEST, 1);
    let first = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    let repo = place.highwater.repo_directory();
    let before = place.lab.path().join("before");
    copy_tree(&repo, &before);
    // About 1 MiB is left.
    let script = "cp -r \"$1/.\" \"$0\" && head -c 3000000 /dev/zero > \"$0/filler\" && shift && exec \"$@\"";
    let Some(mut command) = on_small_disk(&repo, script) else {
        return not_run(NAME, NO_SMALL_DISK);
    };
    place.highwater.settings_for(&mut command);
    command.arg(&before).arg(reachable_binary()).args(["-v", "receive", "--rpo", "20ms"]);
    let receiver = Receiver::of(&place.highwater, command, "receive, on a small disk".to_owned());
    receiver.wait_streaming(&place.cluster);
    for _ in 0..20 {
        place.cluster.sql(
            "select pg_logical_emit_message(false, 'x', (select string_agg(sha512((g * random())::text::bytea), ''::bytea) \
             from generate_series(1, 1500) g))",
        );
    }
    let written = place.cluster.sql("select pg_current_wal_flush_lsn()");
    receiver.wait_says("is not stored yet");
    let flushed = "select flush_lsn from pg_stat_replication";
    let stood = place.cluster.sql(flushed);
    assert!(parse_lsn(&stood) < parse_lsn(&written), "all of it was stored: {stood}");
    let moved = passes_within(Duration::from_secs(3), || place.cluster.sql(flushed) != stood);
    assert!(!moved, "acknowledged over a full disk");

    let seen = receiver.root().join(repo.strip_prefix("/").unwrap());
    std::fs::remove_file(seen.join("filler")).unwrap();
    place.cluster.switch_wal();
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    // What was mounted for the receiver goes with it.
    let after = place.lab.path().join("after");
    copy_tree(&seen, &after);
    receiver.terminate().done();
    remove_tree(&repo);
    std::fs::rename(&after, &repo).unwrap();
    place.assert_all_comes_back_from(&first);
}

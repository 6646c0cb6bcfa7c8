//! SIGTERM and SIGINT: a backup that is asked to stop leaves nothing behind, or is whole.

use crate::harness::{Archived, Highwater, NEWEST, files_below, wait_for};
use rustix::process::Signal;
use std::time::Duration;

/// Packs of 6 MiB that are full soon, from a server that sends slowly.
fn slow(place: &Archived) -> Highwater {
    let highwater = place.highwater.with_env("HIGHWATER_COMPRESSION", "none");
    highwater.with_env("HIGHWATER_MEMORY_MAX", "64MiB")
}

const BACKUP: [&str; 4] = ["backup", "--fast", "--max-rate", "16MB"];

fn objects(place: &Archived, part: &str) -> Vec<String> {
    let names = files_below(&place.highwater.repo_directory()).into_iter();
    let names = names.map(|name| name.display().to_string());
    names.filter(|name| !name.starts_with(".staging/") && name.contains(part)).collect()
}

#[test]
fn a_backup_that_is_asked_to_stop_leaves_nothing_and_the_next_succeeds() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "5"]);
    for (signal, code, name) in [(Signal::TERM, 143, "SIGTERM"), (Signal::INT, 130, "SIGINT")] {
        let running = slow(&place).spawn(&BACKUP);
        wait_for("a pack is stored", Duration::from_mins(1), || {
            !objects(&place, "/pack/").is_empty()
        });
        assert_eq!(place.highwater.info()["unfinished_backups"].as_array().unwrap().len(), 1);
        running.signal(signal);
        let run = running.wait().ends_with(code).says(name).says("No backup was recorded");
        assert!(!run.stderr.contains("WARN"), "{run}");
        let info = place.highwater.info();
        assert_eq!(info["unfinished_backups"].as_array().unwrap().len(), 0, "{info}");
        assert_eq!(objects(&place, "/backup/"), [""; 0]);
        let senders = "select count(*) from pg_stat_replication";
        place.cluster.wait_until(senders, "0");
    }
    place.highwater.run(&["backup", "--fast"]).done();
    assert_eq!(place.highwater.info()["backups"][0]["usable"], true);
}

#[test]
fn a_second_signal_ends_a_backup_at_once() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "5"]);
    let running = slow(&place).spawn(&BACKUP);
    wait_for("a pack is stored", Duration::from_mins(1), || !objects(&place, "/pack/").is_empty());
    // Whichever is seen first, the other one is the second, unless clearing up was done before it.
    running.signal(Signal::INT);
    running.signal(Signal::TERM);
    let run = running.wait();
    assert!([130, 143].contains(&run.code()), "{run}");
    assert!(run.elapsed < Duration::from_mins(1), "{run}");
    place.highwater.run(&["backup", "--fast"]).done();
    let info = place.highwater.info();
    assert_eq!(info["backups"].as_array().unwrap().len(), 1, "{info}");
}

//! What a later backup stores and where it takes the rest from: pages of a parent, packs of a backup that died.

use std::path::PathBuf;
use std::time::Duration;

use crate::backup_restore::assert_restored_as_backed_up;
use crate::harness::{Archived, Highwater, NEWEST, files_below, passes_within};

const SOURCES: [&str; 2] = ["stream", "files"];

fn back_up(highwater: &Highwater, source: &str) -> serde_json::Value {
    highwater.run(&["backup", "--fast", "--source", source, "--json"]).done().json()
}

fn number(report: &serde_json::Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} of {report}"))
}

/// One page in a hundred of a table changes, ten times over: each time little more than these pages
/// is stored, and every one of the backups is the cluster as it was then.
#[test]
fn of_a_table_only_changed_pages_are_stored_and_every_backup_restores() {
    for major in [14, NEWEST] {
        for source in SOURCES {
            let place = Archived::by_server(major);
            // Room for the new version of a row on its own page.
            place.cluster.sql(
                "create table big with (fillfactor = 90) as select n, md5(n::text) || md5((-n)::text) \
                 || md5((n * 7)::text) || md5((n * 11)::text) as t from generate_series(1, 200000) n",
            );
            place.cluster.sql("vacuum freeze analyze");
            let first = back_up(&place.highwater, source);
            let pages = "select relpages from pg_class where relname = 'big'";
            let pages: u64 = place.cluster.sql(pages).parse().unwrap();
            let mut backups = Vec::new();
            for round in 0..10 {
                // A page holds some 45 rows.
                place.cluster.sql(&format!(
                    "update big set t = reverse(t) where n % 4500 = {}",
                    round * 137
                ));
                place.cluster.sql("checkpoint");
                let dump = place.cluster.dump();
                let report = back_up(&place.highwater, source);
                let changed = pages / 100 * 8192;
                let stored = number(&report, "stored_bytes");
                assert!(stored < changed, "{major}, {source}, {round}: {stored} for {changed}");
                backups.push((report["id"].as_str().unwrap().to_owned(), dump));
            }
            assert!(number(&first, "stored_bytes") > pages * 8192 / 4, "{first}");
            place.cluster.archive_now();
            for (id, dump) in [&backups[9], &backups[4]] {
                let arguments = ["--backup", id, "--to-immediate", "--target-action", "promote"];
                let mut copy = place.restore(&format!("copy-{id}"), &arguments);
                assert_restored_as_backed_up(&copy);
                copy.start();
                copy.wait_until("select pg_is_in_recovery()", "f");
                assert!(copy.dump() == *dump, "{major}, {source}: the copy differs");
                copy.amcheck();
            }
        }
    }
}

fn packs(place: &Archived) -> Vec<PathBuf> {
    let repo = place.highwater.repo_directory();
    let is_pack = |path: &PathBuf| {
        path.iter().any(|part| part == "pack") && !path.iter().any(|part| part == ".staging")
    };
    files_below(&repo).into_iter().filter(is_pack).map(|path| repo.join(path)).collect()
}

fn bytes_of(paths: &[PathBuf]) -> u64 {
    paths.iter().map(|path| std::fs::metadata(path).unwrap().len()).sum()
}

#[test]
fn a_backup_goes_on_from_those_that_were_killed_and_stores_only_the_rest() {
    for major in [14, NEWEST] {
        for source in SOURCES {
            let place = Archived::by_server(major);
            place.cluster.pgbench(&["-i", "-q", "-s", "6"]);
            place.cluster.sql("vacuum freeze analyze");
            place.cluster.sql("checkpoint");
            // Small packs, and time to kill between them.
            let highwater = place
                .highwater
                .with_env("HIGHWATER_COMPRESSION", "none")
                .with_env("HIGHWATER_MEMORY_MAX", "64MiB");
            let slowly = ["backup", "--fast", "--source", source, "--max-rate", "24MB"];
            for wanted in [2, 5] {
                let mut backup = highwater.spawn(&slowly);
                let some = || backup.ended() || packs(&place).len() >= wanted;
                assert!(passes_within(Duration::from_mins(1), some), "no pack comes");
                let run = backup.kill_after(Duration::ZERO);
                assert!(run.was_killed(), "{run}");
            }
            let had = bytes_of(&packs(&place));
            let dump = place.cluster.dump();
            let report = back_up(&highwater, source);
            let (stored, size) = (number(&report, "stored_bytes"), number(&report, "size_bytes"));
            assert!(stored + had < size + size / 10, "{had}, then {stored} of {size}: {report}");
            let resumed = number(&report, "resumed_bytes");
            assert!(resumed > had / 10 * 8, "{resumed} of {had}: {report}");
            assert_eq!(report["resumed"].as_array().unwrap().len(), 2, "{report}");
            let info = place.highwater.info();
            for unfinished in info["unfinished_backups"].as_array().unwrap() {
                assert_eq!(unfinished["needed_by"][0], report["id"], "{info}");
            }
            place.cluster.archive_now();
            let mut copy = place.restore("copy", &[]);
            assert_restored_as_backed_up(&copy);
            copy.start();
            copy.wait_until("select pg_is_in_recovery()", "f");
            assert!(copy.dump() == dump, "{major}, {source}: the copy differs");
            copy.amcheck();
            // The next one has a parent, and nothing to take over.
            let next = back_up(&highwater, source);
            assert!(
                next["resumed"].is_null() || number(&next, "resumed_bytes") < size / 50,
                "{next}"
            );
            assert!(number(&next, "stored_bytes") < size / 5, "{next}");
        }
    }
}

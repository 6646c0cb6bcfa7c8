//! `verify` on real repositories: whole ones pass, what is wrong is named with what it costs, and no proof is made twice.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::guide::assert_says_what_is_printed;
use crate::harness::{Archived, Lab, Load, MAJORS, NEWEST, files_below, flip_bit};

/// Two backups of a cluster that is written to, the second leaning on the first, and WAL behind them.
fn filled(place: &Archived, source: &str) -> [String; 2] {
    place.cluster.pgbench(&["-i", "-q", "-s", "3"]);
    let ids = [0, 1].map(|_| {
        place.cluster.pgbench(&["-c", "2", "-t", "300"]);
        let made = place.highwater.run(&["backup", "--fast", "--json", "--source", source]);
        made.done().json()["id"].as_str().unwrap().to_owned()
    });
    place.segments(3);
    place.cluster.archive_now();
    ids
}

/// Objects of the repository with this in their path.
fn objects(place: &Archived, part: &str) -> Vec<PathBuf> {
    let root = place.highwater.repo_directory();
    let all = files_below(&root).into_iter().map(|path| root.join(path));
    all.filter(|path| path.to_string_lossy().contains(part)).collect()
}

/// Proves a repository twice: everything, and then nothing that was proven.
fn prove_twice(place: &Archived) {
    let plain = place.highwater.run(&["verify"]).done();
    plain.says("everything is as it should be").says("2 backups");
    let deep = place.highwater.run(&["verify", "--deep", "--json"]).done().json();
    assert_eq!(deep["findings"].as_array().unwrap().len(), 0, "{deep}");
    assert_eq!(deep["notes"].as_array().unwrap().len(), 0, "{deep}");
    assert!(deep["read_bytes"].as_u64().unwrap() > 1_000_000, "{deep}");
    let again = place.highwater.run(&["verify", "--deep", "--json"]).done().json();
    assert_eq!(again["read_bytes"], 0, "{again}");
    assert!(again["skipped"].as_u64() > Some(5), "{again}");
    // What comes anew is proven, and that alone.
    place.segments(1);
    place.cluster.archive_now();
    let more = place.highwater.run(&["verify", "--deep", "--json"]).done().json();
    assert!(more["read_bytes"].as_u64().unwrap() > 0, "{more}");
    assert!(more["skipped"].as_u64() >= again["skipped"].as_u64(), "{more}");
    // What was measured tells how long a restore would take.
    let moment = place.now();
    place.segments(1);
    place.cluster.archive_now();
    let outlook = place.highwater.run(&["info", "--at", &moment, "--json"]).done().json();
    let info = place.highwater.info();
    let newest = info["backups"].as_array().unwrap().last().unwrap();
    assert_eq!(outlook["backup"], newest["id"], "{outlook}");
    assert!(outlook["measured"]["bytes_per_second"].as_u64() > Some(0), "{outlook}");
    assert!(outlook["wal_bytes"].as_u64() > Some(0), "{outlook}");
    place.highwater.run(&["info", "--at", "2020-01-01 00:00:00+00"]).ends_with(4);
}

#[test]
fn whole_repositories_of_the_oldest_and_the_newest_server_pass_and_are_not_read_twice() {
    for (major, source) in [(MAJORS[0], "stream"), (NEWEST, "files")] {
        let place = Archived::by_server(major);
        filled(&place, source);
        prove_twice(&place);
    }
}

#[test]
fn a_whole_repository_on_s3_passes_and_is_not_read_twice() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster);
    filled(&place, "stream");
    prove_twice(&place);
}

#[test]
fn an_encrypted_repository_passes_and_what_was_changed_in_it_is_found() {
    let place = Archived::by_server_encrypted(NEWEST, Lab::highwater, |cluster| cluster);
    let [first, _] = filled(&place, "stream");
    prove_twice(&place);
    let pack = objects(&place, &format!("{first}/pack/"))[0].clone();
    let good = std::fs::read(&pack).unwrap();
    flip_bit(&pack, 70_000);
    let found = place.highwater.run(&["verify", "--deep", "--all", "--json"]).ends_with(4).json();
    assert_eq!(found["findings"][0]["fault"], "damaged", "{found}");
    assert!(found["findings"][0]["lost_backups"].to_string().contains(&first), "{found}");
    // A wrong key is no finding: nothing is known then of what is stored.
    let stranger = place.highwater.with_key(&place.highwater.new_key("stranger"));
    stranger.run(&["verify"]).ends_with(2);
    std::fs::write(&pack, good).unwrap();
    place.highwater.run(&["verify", "--deep", "--all"]).done();
}

#[test]
fn it_runs_beside_a_server_that_archives_and_backups_that_come_and_go() {
    let place = Archived::by_server(NEWEST);
    filled(&place, "stream");
    let load = Load::on(&place.cluster);
    for _ in 0..3 {
        let backup = place.highwater.spawn(&["backup", "--fast"]);
        place.highwater.run(&["verify", "--deep"]).done();
        backup.wait().done();
        let expire = place.highwater.spawn(&["expire", "--retain-backups", "1"]);
        place.highwater.run(&["verify", "--deep"]).done();
        expire.wait().done();
    }
    drop(load);
}

#[test]
fn a_damaged_pack_is_found_and_named_and_acknowledged() {
    let place = Archived::by_server(NEWEST);
    let [first, second] = filled(&place, "files");
    place.highwater.run(&["verify", "--deep"]).done();
    let pack = objects(&place, &format!("{first}/pack/"))[0].clone();
    flip_bit(&pack, 70_000);
    let found = place.highwater.run(&["verify", "--deep", "--json"]).ends_with(4).json();
    let findings = found["findings"].as_array().unwrap();
    let lost: Vec<&str> =
        findings.iter().map(|one| one["lost_backups"][0].as_str().unwrap()).collect();
    assert!(lost.contains(&&*first), "{found}");
    assert!(lost.iter().all(|id| [&*first, &*second].contains(id)), "{found}");
    for finding in findings {
        assert_eq!(finding["fault"], "damaged", "{found}");
        assert!(pack.ends_with(finding["object"].as_str().unwrap()), "{found}");
    }
    // No restore gives out other bytes.
    let pgdata = place.lab.path().join("never");
    let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--backup", &first];
    place.highwater.run(&arguments).ends_with(4);
    place
        .highwater
        .run(&["verify", "--deep"])
        .ends_with(4)
        .says("FOUND")
        .says("cannot be restored");
    for finding in findings {
        let id = finding["id"].as_str().unwrap();
        let known = ["verify", "--acknowledge", id, "--reason", "a test broke it"];
        place.highwater.run(&known).done().says(id);
    }
    place.highwater.run(&["verify", "--deep"]).done().says("acknowledged").says("a test broke it");
    let info = place.highwater.info();
    assert_eq!(info["acknowledged"].as_array().unwrap().len(), findings.len(), "{info}");
    assert_eq!(info["verification"]["unacknowledged"], 0, "{info}");
    place.highwater.run(&["info"]).done().says("a test broke it").says("last verified");
    // Another loss is none that was acknowledged.
    std::fs::remove_file(&objects(&place, &format!("{second}/files"))[0]).unwrap();
    place.highwater.run(&["verify"]).ends_with(4).says(&second);
}

#[test]
fn a_gap_is_found_with_both_its_ends_and_a_recorded_one_can_be_acknowledged() {
    let place = Archived::by_server(MAJORS[0]);
    filled(&place, "stream");
    let gone = place.segments(1).remove(0);
    place.segments(2);
    place.cluster.archive_now();
    place.highwater.run(&["verify"]).done();
    for object in place.objects_of(&gone) {
        std::fs::remove_file(object).unwrap();
    }
    let found = place.highwater.run(&["verify", "--json"]).ends_with(4).json();
    let finding = &found["findings"][0];
    assert_eq!(finding["fault"], "gap", "{found}");
    let gap = &place.highwater.info()["wal"][0]["gaps"][0];
    let moments = &finding["lost_moments"][0];
    assert_eq!(moments["from_lsn"], gap["start_lsn"], "{found}");
    assert_eq!(moments["open"], true, "no backup was taken since: {found}");
    assert!(moments["from_time"].is_string(), "{found}");
    // A target behind it is refused, as the finding says.
    let pgdata = place.lab.path().join("never");
    let behind = gap["end_lsn"].as_str().unwrap();
    let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--to-lsn", behind];
    place.highwater.run(&arguments).ends_with(4).says("cannot be restored");
    // A backup closes what is lost; the hole stays one, with the nearest on both its sides.
    place.highwater.run(&["backup", "--fast"]).done();
    place.highwater.run(&arguments).ends_with(4).says("where a later backup is consistent");
    let reachable = place.highwater.info()["reachable"].as_array().unwrap().len();
    assert_eq!(reachable, 2, "before the hole, and from the new backup on");
    let found = place.highwater.run(&["verify", "--json"]).ends_with(4).json();
    let moments = &found["findings"][0]["lost_moments"][0];
    assert_eq!(moments["open"], false, "{found}");
    assert!(moments["to_time"].is_string(), "{found}");
    let id = found["findings"][0]["id"].as_str().unwrap();
    place.highwater.run(&["verify", "--acknowledge", id, "--reason", "known"]).done();
    place.highwater.run(&["verify"]).done().says("known");
}

#[test]
fn a_run_that_was_killed_is_gone_on_with() {
    let place = Archived::by_server(NEWEST);
    filled(&place, "stream");
    let running = place.highwater.spawn(&["verify", "--deep", "--rate", "300kB"]);
    let proofs = || objects(&place, "/verify/").into_iter().any(|path| is_proof(&path));
    crate::harness::wait_for("proofs of the first seconds", Duration::from_mins(1), proofs);
    running.kill_after(Duration::ZERO);
    let second = place.highwater.run(&["verify", "--deep", "--json"]).done().json();
    assert!(second["skipped"].as_u64() > Some(0), "{second}");
    assert_eq!(objects(&place, "/verify/").iter().filter(|path| is_proof(path)).count(), 1);
}

fn is_proof(path: &Path) -> bool {
    path.parent().is_some_and(|parent| parent.ends_with("proof"))
}

#[test]
fn a_store_that_is_away_is_no_finding() {
    let place = Archived::by_server(NEWEST);
    filled(&place, "stream");
    let root = place.highwater.repo_directory();
    std::fs::rename(&root, root.with_extension("away")).unwrap();
    place.highwater.with_retries(2).run(&["verify"]).ends_with(5);
    std::fs::rename(root.with_extension("away"), &root).unwrap();
    place.highwater.run(&["verify"]).done();
}

/// The guide's chapter, with its own commands: whole, then with a gap that is told as printed there, then acknowledged.
#[test]
fn the_guides_chapter_works_as_it_is_printed() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("\n## ").find(|part| part.contains("Test it, on a schedule")).unwrap();
    let is_command = |line: &&str| line.starts_with("highwater verify");
    let commands: Vec<&str> = chapter.lines().filter(is_command).collect();
    assert_eq!(commands.len(), 2, "{commands:?}");
    let place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    // Commits come before the gap, and behind it.
    let gone = place.segments(2).remove(1);
    place.segments(2);
    place.cluster.archive_now();
    let words = |command: &str| -> Vec<String> {
        command.split_whitespace().skip(1).map(ToOwned::to_owned).collect()
    };
    let run = |command: &str| {
        let words = words(command);
        place.highwater.run(&words.iter().map(String::as_str).collect::<Vec<_>>())
    };
    for command in &commands {
        run(command).done().says("everything is as it should be");
    }
    for object in place.objects_of(&gone) {
        std::fs::remove_file(object).unwrap();
    }
    // What is printed there is what is said, but for places, times and the finding's name.
    let printed = chapter.lines().skip_while(|line| !line.starts_with("FOUND "));
    let printed: Vec<&str> = printed.take_while(|line| !line.starts_with("```")).collect();
    let said = run(commands[0]).ends_with(4);
    assert_says_what_is_printed(printed, &said.stdout);
    let finding = said.stdout.lines().find_map(|line| line.strip_prefix("FOUND ")).unwrap();
    let finding = finding.split_whitespace().next().unwrap();
    run(&format!("highwater verify --acknowledge {finding} --reason known")).done();
    for command in &commands {
        run(command).done();
    }
}

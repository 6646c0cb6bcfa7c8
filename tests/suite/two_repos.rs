//! Two repositories: each stands alone, neither stops the other, and what one lacked comes to it.

use crate::harness::{Archived, Highwater, Lab, Random, Receiver, files_below, fingerprint};
use std::path::PathBuf;
use std::time::Duration;

/// A cluster that archives into two repositories, and each of them alone.
pub struct Two {
    pub place: Archived,
    pub first: Highwater,
    pub second: Highwater,
}

impl Two {
    /// The first is a local directory; `choose` makes the second.
    pub fn new(major: u32, choose: impl FnOnce(&Lab) -> Highwater) -> Self {
        let lab = Lab::open();
        let cluster = lab.cluster(major).conf("archive_mode = on").start();
        let (first, second) = (lab.highwater().on(&cluster), choose(&lab).on(&cluster));
        // Neither commands nor the server need wait long for one that a test has taken away.
        let highwater = first.with_second(&second).with_retries(2);
        highwater.run(&["init"]).done();
        cluster.archive_into(&highwater);
        Self { place: Archived { cluster, highwater, lab }, first, second }
    }

    fn back_up(&self) -> serde_json::Value {
        self.place.highwater.run(&["--json", "backup", "--fast"]).done().json()
    }

    /// Restores from one repository alone, lets the server replay all of it, and compares.
    fn assert_stands_alone(&mut self, which: &str, dump: &str) {
        let alone = if which == "first" { &self.first } else { &self.second };
        let both = std::mem::replace(&mut self.place.highwater, alone.clone());
        self.place.assert_copy_equals(&format!("from-{which}"), dump);
        self.place.highwater = both;
    }
}

pub fn beside(lab: &Lab) -> Highwater {
    let directory = lab.directory("second");
    lab.highwater().for_repo(&format!("file://{}", directory.display()))
}

fn beside_encrypted(lab: &Lab) -> Highwater {
    let second = beside(lab);
    second.with_key(&second.new_key("second.key"))
}

/// Takes a local repository away until it is dropped or brought back: a directory that is not mounted.
pub struct Away {
    directory: PathBuf,
    elsewhere: PathBuf,
}

impl Away {
    pub fn new(repo: &Highwater) -> Self {
        let directory = repo.repo_directory();
        let elsewhere = directory.with_extension("away");
        std::fs::rename(&directory, &elsewhere).unwrap();
        Self { directory, elsewhere }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        std::fs::rename(&self.elsewhere, &self.directory).unwrap();
    }
}

fn segments_missing(info: &serde_json::Value, to: &str) -> u64 {
    let ways = info["missing"].as_array().unwrap();
    let way = ways.iter().find(|way| way["to"] == to).unwrap();
    way["wal"]["segments"].as_u64().unwrap()
}

/// Each is away for a while, and in the end both hold all of it.
fn a_life(two: &mut Two) {
    let made = two.back_up();
    assert_eq!(made["second_copy"]["is_in_both"], true, "{made}");
    two.place.segments(2);
    two.place.cluster.archive_now();

    let away = Away::new(&two.first);
    let names = two.place.segments(3);
    two.place.cluster.archive_now();
    two.place.highwater.run(&["info"]).ends_with(5).says("in the first repository");
    // What is there comes from the other; what is not may be in the one that is away.
    two.place
        .assert_gives_back(&names[0], &std::fs::read(two.place.cluster.wal(&names[0])).unwrap());
    two.place.fetch("0000000100000000000000EE").0.ends_with(133);
    drop(away);
    two.place.fetch("0000000100000000000000EE").0.ends_with(1);
    let info = two.place.highwater.info();
    assert!(segments_missing(&info, "first") >= 3, "{info}");
    assert_eq!(segments_missing(&info, "second"), 0, "{info}");
    two.place.highwater.run(&["copy", "--wal"]).done();
    for name in &names {
        let wanted = std::fs::read(two.place.cluster.wal(name)).unwrap();
        let place = two.place.lab.path().join("one");
        two.first.get(name, &place).done();
        assert!(std::fs::read(&place).unwrap() == wanted, "{name}: other bytes came back");
    }
    let dump = two.place.cluster.dump();
    for which in ["first", "second"] {
        two.assert_stands_alone(which, &dump);
    }
}

#[test]
fn each_repository_may_be_away_and_both_hold_everything_in_the_end_14() {
    a_life(&mut Two::new(14, beside));
}

#[test]
fn each_repository_may_be_away_and_both_hold_everything_in_the_end_18() {
    a_life(&mut Two::new(18, beside));
}

#[test]
fn the_second_may_be_encrypted_where_the_first_is_not() {
    let mut two = Two::new(18, beside_encrypted);
    let second = two.second.repo_directory();
    a_life(&mut two);
    for file in files_below(&second).iter().filter(|file| file.starts_with("main/wal")) {
        assert_eq!(std::fs::read(second.join(file)).unwrap()[..4], *b"HWE1", "{}", file.display());
    }
}

#[test]
fn the_second_may_be_on_s3() {
    a_life(&mut Two::new(18, Lab::highwater_on_s3));
}

#[test]
fn a_backup_goes_on_while_the_second_is_away_and_is_copied_later() {
    let mut two = Two::new(18, beside);
    two.back_up();
    two.place.segments(1);
    let away = Away::new(&two.second);
    let made = two.back_up();
    assert_eq!(made["second_copy"]["is_in_both"], false, "{made}");
    let id = made["id"].as_str().unwrap();
    drop(away);
    two.place.highwater.run(&["copy", "--newest", "--wal"]).done().says(id);
    let again = two.place.highwater.run(&["--json", "copy", "--all", "--wal"]).done().json();
    for way in again["ways"].as_array().unwrap() {
        assert_eq!(way["wal"]["objects"], 0, "{again}");
    }
    // Taken into the second while the first is away, it goes the other way.
    let away = Away::new(&two.first);
    let made = two.back_up();
    assert_eq!(made["second_copy"]["taken_into"], "second", "{made}");
    drop(away);
    two.place.highwater.run(&["copy", "--all", "--wal"]).done();
    assert_same_objects(&two);
    two.place.cluster.archive_now();
    let dump = two.place.cluster.dump();
    for which in ["first", "second"] {
        two.assert_stands_alone(which, &dump);
    }
    two.place.highwater.run(&["verify", "--deep"]).done();
}

/// Both hold the same bytes; only `begun.json` and identities tell of where they were made.
fn assert_same_objects(two: &Two) {
    let of = |repo: &Highwater| {
        let mut all = fingerprint(&repo.repo_directory());
        all.retain(|path, _| {
            let in_wal = path.starts_with("main/wal");
            let in_backup = path.starts_with("main/backup") && !path.ends_with("begun.json");
            in_wal || in_backup
        });
        all
    };
    let (first, second) = (of(&two.first), of(&two.second));
    assert!(first.len() > 2, "{first:?}");
    assert_eq!(first, second);
}

#[test]
fn a_copy_that_is_killed_goes_on_where_it_stopped() {
    let two = Two::new(18, beside);
    two.place
        .cluster
        .sql("create table t as select g, md5(g::text) from generate_series(1, 200000) g");
    let away = Away::new(&two.second);
    two.back_up();
    two.place.segments(6);
    two.back_up();
    drop(away);
    let mut dice = Random::new("copies that are killed");
    let mut killed = 0;
    for round in 0..60 {
        let moment = Duration::from_millis(2 + round * 4 + dice.below(12));
        let run = two.place.highwater.spawn(&["copy", "--all", "--wal"]).kill_after(moment);
        if !run.was_killed() {
            run.done();
            break;
        }
        killed += 1;
    }
    assert!(killed > 3, "hardly a copy was killed");
    two.place.highwater.run(&["copy", "--all", "--wal"]).done();
    assert_same_objects(&two);
    two.second.run(&["verify", "--deep"]).done();
}

#[test]
fn each_repository_keeps_what_its_own_retention_says() {
    let two = Two::new(18, beside);
    let ids: Vec<serde_json::Value> = (0..3)
        .map(|_| {
            let made = two.back_up();
            two.place.segments(1);
            two.place.pass_time_of(&made);
            made["id"].clone()
        })
        .collect();
    let both = two
        .place
        .highwater
        .with_env("HIGHWATER_RETAIN_BACKUPS", "3")
        .with_env("HIGHWATER_SECOND_RETAIN_BACKUPS", "1");
    both.run(&["expire"]).done();
    let kept = |repo: &Highwater| {
        let info = repo.info();
        let backups = info["backups"].as_array().unwrap();
        backups.iter().map(|backup| backup["id"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(kept(&two.first), ids);
    assert_eq!(kept(&two.second), ids[2..]);
    let stored = fingerprint(&two.second.repo_directory());
    both.run(&["copy", "--all", "--wal"]).done().says("left out");
    let mut after = fingerprint(&two.second.repo_directory());
    after.retain(|path, _| path.starts_with("main/backup"));
    let mut before = stored;
    before.retain(|path, _| path.starts_with("main/backup"));
    assert_eq!(after, before, "what was deleted there does not come back");
    // A command may be told which of them is meant.
    both.run(&["--only", "second", "pin", ids[2].as_str().unwrap()]).done();
    both.run(&["--only", "second", "info"]).done().says("second");
}

#[test]
fn the_agent_brings_what_one_lacked_while_it_was_away() {
    let two = Two::new(18, beside);
    let away = Away::new(&two.first);
    two.place.segments(3);
    two.place.cluster.archive_now();
    drop(away);
    let agent = Receiver::agent(&two.place.highwater, &two.place.cluster.pgdata, &[]);
    agent.wait_says("to the repository that lacked them");
    agent.terminate().done();
    assert_same_objects(&two);
}

/// What the guide tells to do, with its own lines.
#[test]
fn the_guides_chapter_works_as_it_is_printed() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("\n## ").find(|part| part.contains("13. Two repositories")).unwrap();
    let two = Two::new(18, beside);
    two.place.segments(1);
    let mut done = 0;
    for block in chapter.split("```sh\n").skip(1) {
        let block = block.split("```").next().unwrap();
        for line in block.lines().filter(|line| line.starts_with("highwater ")) {
            let words: Vec<&str> =
                line.split('#').next().unwrap().split_whitespace().skip(1).collect();
            two.place.highwater.run(&words).done();
            done += 1;
        }
    }
    assert!(done >= 5, "{chapter}");
    assert_same_objects(&two);
}

//! Two repositories that are away, one or both: WAL goes to whichever takes it, into the spool while neither does, and is
//! let go, where that is set, only then. One is a directory and one is on S3, in either order, each with a key of its own.

use crate::harness::{Archived, Highwater, Lab, MAJORS, NEWEST, Receiver, Way, Weather, wait_for};
use crate::two_repos::Away;
use std::time::Duration;

const LIMIT: Duration = Duration::from_mins(3);

const SPOOL: &str = "stall_spool = \"STALL\"";

/// A cluster that archives into both, each of them alone, and the way to the one on S3.
struct Pair {
    place: Archived,
    local: Highwater,
    s3: Highwater,
    way: Way,
    local_is_first: bool,
}

impl Pair {
    fn new(major: u32, local_is_first: bool, settings: &str) -> Self {
        let lab = Lab::open();
        let stall = lab.directory("stall");
        let cluster = lab.cluster(major).conf("archive_mode = on").start();
        let local = lab.highwater();
        let local = local.with_key(&local.new_key("local.key")).on(&cluster);
        let (s3, way) = lab.highwater_on_s3_by_a_way();
        let s3 = s3.with_key(&s3.new_key("s3.key")).on(&cluster);
        // As a file: servers start their commands in an environment of their own. A store that is away need not be
        // asked for long.
        let options = std::fs::read_to_string(lab.path().join(format!("s3-{}.toml", way.port)));
        let options = options.unwrap().replace("[repo.options]", "retries = 1");
        let settings = settings.replace("STALL", stall.to_str().unwrap());
        let (highwater, of_s3, of_local) = if local_is_first {
            (local.with_second(&s3), "second_repo", "repo")
        } else {
            (s3.with_second(&local), "repo", "second_repo")
        };
        let text = format!(
            "dsn = \"{}\"\n{settings}\n[{of_local}.options]\nretries = 1\n[{of_s3}.options]\n{options}",
            cluster.dsn()
        );
        let file = lab.write("highwater.toml", text.as_bytes());
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .unwrap();
        let highwater = highwater.without_env("HIGHWATER_CONFIG");
        let highwater = highwater.with_env("HIGHWATER_CONFIG", file.to_str().unwrap());
        highwater.run(&["init"]).done();
        cluster.archive_into(&highwater);
        let place = Archived { cluster, highwater, lab };
        place.highwater.run(&["backup", "--fast"]).done();
        place.cluster.archive_now();
        Self { place, local, s3, way, local_is_first }
    }

    /// The words for the directory's place and for that of S3.
    fn words(&self) -> [&'static str; 2] {
        if self.local_is_first { ["first", "second"] } else { ["second", "first"] }
    }

    fn state(&self) -> serde_json::Value {
        let pgdata = self.place.cluster.pgdata.to_str().unwrap();
        self.place.highwater.run(&["--json", "spool", "--pgdata", pgdata]).done().json()
    }

    fn held(&self) -> u64 {
        self.state()["spool"]["files"].as_u64().unwrap()
    }

    /// Writes segments and waits until the server may forget them; returns their names and bytes.
    fn archived_segments(&self, count: usize) -> Vec<(String, Vec<u8>)> {
        let names = self.place.segments(count);
        let read = |name: String| {
            let bytes = std::fs::read(self.place.cluster.wal(&name)).unwrap();
            (name, bytes)
        };
        let files: Vec<_> = names.into_iter().map(read).collect();
        for (name, _) in &files {
            self.place.cluster.wait_archived(name);
        }
        files
    }

    #[track_caller]
    fn assert_holds(&self, repository: &Highwater, files: &[(String, Vec<u8>)]) {
        for (name, bytes) in files {
            let place = self.place.lab.path().join("fetched");
            std::fs::remove_file(&place).ok();
            repository.get(name, &place).done();
            assert!(std::fs::read(&place).unwrap() == *bytes, "{name}: other bytes came back");
        }
    }

    /// Restores from one alone, lets a server replay all of it, and compares.
    fn assert_stands_alone(&mut self, repository: Highwater, name: &str, dump: &str) {
        let both = std::mem::replace(&mut self.place.highwater, repository);
        self.place.assert_copy_equals(name, dump);
        self.place.highwater = both;
    }
}

#[test]
fn while_neither_takes_wal_the_spool_does_and_whichever_returns_first_gets_it() {
    for (at, major) in MAJORS.into_iter().enumerate() {
        neither_takes_it(Pair::new(major, at % 2 == 0, SPOOL), at % 4 < 2);
    }
}

fn neither_takes_it(mut pair: Pair, local_returns_first: bool) {
    let [local_word, _] = pair.words();
    // One that takes it is enough: nothing is kept here.
    pair.way.set(Weather::Gone);
    let in_local = pair.archived_segments(1);
    assert_eq!(pair.held(), 0, "{}", pair.state());
    let log = pair.place.cluster.log();
    assert!(log.contains(&format!("is stored in the {local_word} repository only")), "{log}");

    let away = Away::new(&pair.local);
    let files = pair.archived_segments(3);
    assert!(pair.held() >= 3, "{}", pair.state());
    let log = pair.place.cluster.log();
    assert!(log.contains("is kept on this host only"), "{log}");
    for (name, bytes) in &files {
        pair.place.assert_gives_back(name, bytes);
    }
    pair.place.highwater.run(&["spool", "--drain"]).ends_with(5);

    let mut away = Some(away);
    if local_returns_first {
        away = None;
    } else {
        pair.way.set(Weather::Fair);
    }
    wait_for("one that is back has what was kept here", LIMIT, || pair.held() == 0);
    let near = if local_returns_first { &pair.local } else { &pair.s3 };
    pair.assert_holds(near, &files);
    drop(away);
    pair.way.set(Weather::Fair);
    pair.place.highwater.run(&["copy", "--wal"]).done();
    for repository in [&pair.local, &pair.s3] {
        pair.assert_holds(repository, &files);
        pair.assert_holds(repository, &in_local);
    }
    pair.place.cluster.archive_now();
    let dump = pair.place.cluster.dump();
    pair.place.highwater.run(&["copy", "--wal"]).done();
    pair.assert_stands_alone(pair.local.clone(), "from-local", &dump);
    pair.assert_stands_alone(pair.s3.clone(), "from-s3", &dump);
    pair.place.highwater.run(&["verify"]).done();
}

#[test]
fn with_both_copies_wanted_the_spool_keeps_wal_until_both_have_it_and_an_agent_drains_it() {
    let pair = Pair::new(NEWEST, true, &format!("{SPOOL}\nwal_copies = \"all\""));
    let agent = Receiver::agent(&pair.place.highwater, &pair.place.cluster.pgdata, &[]);
    agent.wait_says("serving");
    pair.way.set(Weather::Gone);
    let files = pair.archived_segments(2);
    assert!(pair.held() >= 2, "{}", pair.state());
    pair.way.set(Weather::Fair);
    wait_for("the agent drains it", LIMIT, || pair.held() == 0);
    agent.wait_says("was brought from the spool");
    pair.assert_holds(&pair.local, &files);
    pair.assert_holds(&pair.s3, &files);
    agent.terminate().done();
}

#[test]
fn wal_that_neither_took_is_a_gap_in_each_until_each_has_a_backup_behind_it() {
    for (at, major) in MAJORS.into_iter().enumerate() {
        neither_ever_takes_it(Pair::new(major, at % 2 == 1, "wal_backlog_max = \"32MiB\""));
    }
}

fn neither_ever_takes_it(mut pair: Pair) {
    let [local_word, s3_word] = pair.words();
    let pgdata = pair.place.cluster.pgdata.to_str().unwrap().to_owned();
    pair.way.set(Weather::Gone);
    let away = Away::new(&pair.local);
    let names = pair.place.segments(4);
    pair.place.cluster.wait_archived(&names[1]);
    let log = pair.place.cluster.log();
    assert!(log.contains("was LET GO"), "{log}");
    assert_eq!(pair.state()["open_gaps"].as_array().map(Vec::len), Some(1), "{}", pair.state());

    // The directory is back: it gets the record and a backup, and this host knows which is still to come.
    drop(away);
    wait_for("a backup closes it in the directory", LIMIT, || {
        pair.place.cluster.sql("select pg_switch_wal()");
        pair.local.info()["let_go"][0]["closed_by"].is_string()
    });
    wait_for("this host knows", LIMIT, || pair.state()["open_gaps"][0]["closed_in"] == local_word);
    let spool = pair.place.highwater.run(&["spool", "--pgdata", &pgdata]).done();
    spool.says(&format!("the {s3_word} one lacks one still"));

    // And the other, once it is back.
    pair.way.set(Weather::Fair);
    wait_for("a backup closes it on S3", LIMIT, || {
        pair.place.cluster.sql("select pg_switch_wal()");
        pair.s3.info()["let_go"][0]["closed_by"].is_string()
    });
    wait_for("nothing is left to be told here", LIMIT, || {
        pair.state()["open_gaps"] == serde_json::json!([])
    });
    pair.place.highwater.run(&["verify"]).done().says("was let go at");
    let dump = pair.place.cluster.dump();
    pair.place.cluster.archive_now();
    pair.place.highwater.run(&["copy", "--wal"]).done();
    pair.assert_stands_alone(pair.local.clone(), "from-local", &dump);
    pair.assert_stands_alone(pair.s3.clone(), "from-s3", &dump);
}

#[test]
fn settings_that_contradict_each_other_and_the_second_alone_are_refused() {
    let pair = Pair::new(NEWEST, true, SPOOL);
    let both = pair.place.highwater.with_env("HIGHWATER_WAL_COPIES", "all");
    let refused = both.with_env("HIGHWATER_WAL_BACKLOG_MAX", "1GiB").run(&["info"]).ends_with(2);
    refused.says("wal_backlog_max").says("wal_copies");
    both.run(&["info"]).done();
    let refused = pair.place.highwater.run(&["--only", "second", "spool"]).ends_with(2);
    refused.says("sealed under the keys of the first repository");
}

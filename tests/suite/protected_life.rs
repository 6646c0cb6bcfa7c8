//! The life of a protected cluster on every major: it has a repository in a local directory and one on an S3 server,
//! each encrypted under a key of its own, an agent that runs what is due, and an operator who tries every feature by
//! which a repository proves itself, on either store alone. The local directory is the first repository and S3 the
//! second, and for a while it is the other way round.
//!
//! Each feature is a step, whose name is printed before it begins: the last one is what has failed.

use crate::drill::{check, driller, outcome_of};
use crate::encryption::assert_nothing_can_be_read;
use crate::expire::{assert_begins_with, ids};
use crate::harness::{
    Archived, Event, EventKind, Highwater, Lab, Receiver, Stored, Way, Weather, events_of,
    parse_lsn, remove_tree,
};
use crate::log::{assert_comes_back, drop_among_others, lines};
use serde_json::Value;

/// Rows at the time of the first backup, and at the moment that is gone back to.
const ROWS: [u32; 2] = [2000, 3000];

struct Life {
    /// Talks to both repositories.
    place: Archived,
    /// Each alone, as somebody sees it who knows of no other.
    alone: [(&'static str, Highwater); 2],
    way_to_s3: Way,
}

impl Life {
    fn begin(major: u32) -> Self {
        let lab = Lab::open();
        let cluster = lab.cluster(major).conf("archive_mode = on").start();
        let first = lab.highwater().on(&cluster);
        let first = first.with_key(&first.new_key("first.key"));
        let (second, way_to_s3) = lab.highwater_on_s3_by_a_way();
        let second = second.with_key(&second.new_key("second.key")).on(&cluster);
        let highwater = first.with_second(&second);
        highwater.run(&["init"]).done();
        let alone = [("the local directory", first), ("S3", second)];
        let mut life = Self { place: Archived { cluster, highwater, lab }, alone, way_to_s3 };
        life.order([0, 1]);
        life
    }

    /// From here on the repository of the one number is the first, and that of the other is the second.
    fn order(&mut self, [first, second]: [usize; 2]) {
        let (first, second) = (&self.alone[first].1, &self.alone[second].1);
        // One that is away is not waited for.
        self.place.highwater = first.with_second(second).with_retries(1);
        self.place.cluster.archive_into(&self.place.highwater);
    }

    /// Does something with the repository of this number alone.
    fn with(&mut self, number: usize, feature: &str, step: impl FnOnce(&Archived)) {
        let (store, alone) = &self.alone[number];
        eprintln!("{feature}, with {store}");
        let both = std::mem::replace(&mut self.place.highwater, alone.clone());
        step(&self.place);
        self.place.highwater = both;
    }

    /// Does something with each repository alone.
    fn with_each(&mut self, feature: &str, step: impl Fn(&Archived)) {
        for number in 0..self.alone.len() {
            self.with(number, feature, &step);
        }
    }
}

fn write_rows(place: &Archived, from: u32, to: u32) {
    place.cluster.sql(&format!(
        "insert into zanzibar_table select g, 'zanzibar_row ' || md5(g::text) \
         from generate_series({from} + 1, {to}) g"
    ));
}

fn a_life(major: u32) {
    let mut life = Life::begin(major);
    let sql = "create table zanzibar_table (n int primary key, zanzibar_row text)";
    life.place.cluster.sql(sql);
    write_rows(&life.place, 0, ROWS[0]);
    for table in ["orders", "items"] {
        let sql = format!("create table {table} as select generate_series(1, 500) n");
        life.place.cluster.sql(&sql);
    }
    let first = runs_in_their_time(&life, ROWS[0], "24h");
    life.with_each("one backup a day", |place| assert_eq!(ids(place), [first.as_str()]));

    write_rows(&life.place, ROWS[0], ROWS[1]);
    life.place.pass_earliest_time();
    let moment = life.place.now();
    life.place.cluster.sql("select pg_create_restore_point('zanzibar_point')");
    let rows = ["orders", "items"].map(|table| drop_among_others(&life.place.cluster, table));
    life.place.cluster.archive_now();
    let begin = life.place.highwater.info()["wal"][0]["start_lsn"].clone();
    let begin = parse_lsn(begin.as_str().unwrap()) >> 24;
    let events = events_of(&life.place.cluster, &format!("00000001{begin:016X}"));
    life.with_each("the recovery window", |place| {
        the_window_is_what_was_committed(place, &events, &moment);
    });
    life.with(1, "drill", |place| a_drill_reaches_the_moment(place, &moment, &events));
    life.with_each("log", |place| log_tells_what_pg_waldump_tells(place, &events));
    for (number, table) in ["orders", "items"].into_iter().enumerate() {
        life.with(number, "log --before-drop", |place| {
            assert_comes_back(place, table, &rows[number]);
        });
    }
    life.with_each("keys", keys_come_and_a_rotation_forgets_nobody);

    life.order([1, 0]);
    // The newest of each is older than that, or will be soon.
    runs_in_their_time(&life, ROWS[1], "10s");
    s3_is_away_and_gets_what_it_lacked(&life, "first");
    life.order([0, 1]);
    let last = s3_is_away_and_gets_what_it_lacked(&life, "second");
    life.with_each("verify", |place| a_flipped_bit_is_found(place, &first));
    pins_hold_and_retention_deletes(&mut life, &first, &last);
    life.place.cluster.archive_now();
    life.place.highwater.run(&["copy", "--wal"]).done();
    let dump = life.place.cluster.dump();
    life.with_each("encryption", assert_nothing_can_be_read);
    life.with(0, "restore", |place| place.assert_copy_equals("from-first", &dump));
    life.with(1, "restore", |place| place.assert_copy_equals("from-second", &dump));
}

/// Schedules: the agent brings a backup into both, proves them, expires and drills; `every` is its period, which leaves
/// each of these due. Returns the backup's name.
fn runs_in_their_time(life: &Life, rows: u32, every: &str) -> String {
    eprintln!("runs in their time, every {every}");
    let known = ids(&life.place);
    let question = "select count(*) from zanzibar_table";
    let checks = check(&life.place, "rows", question, Some(&format!("{rows}\n")));
    let highwater = [
        ("CHECKS", checks.to_str().unwrap()),
        ("BACKUP_EVERY", every),
        ("VERIFY_EVERY", every),
        ("EXPIRE_EVERY", every),
        ("DRILL_EVERY", every),
        ("RETAIN_BACKUPS", "5"),
        ("SECOND_RETAIN_BACKUPS", "5"),
    ]
    .into_iter()
    .fold(driller(&life.place), |highwater, (name, value)| {
        highwater.with_env(&format!("HIGHWATER_{name}"), value)
    });
    let agent = Receiver::agent(&highwater, &life.place.cluster.pgdata, &[]);
    for command in ["backup", "expire", "verify --deep", "drill"] {
        agent.wait_says(&format!("`{command}` has ended well"));
    }
    let run = agent.terminate().done();
    // What was due again is ended by the order to stop, and nothing else has failed.
    let ended = run.stderr.matches("` was ended").count();
    assert_eq!(run.json()["scheduled"]["failed"], ended, "{run}");
    let info = life.place.highwater.info();
    assert_eq!(info["drill"]["outcome"], "passed", "{info}");
    for info in [&info, &info["second"]] {
        let verification = &info["verification"];
        assert_eq!(verification["deep"], true, "{info}");
        assert_eq!(verification["findings"], 0, "{info}");
    }
    let new = |info: &Value| {
        let ids = info["backups"].as_array().unwrap().iter();
        let mut ids = ids.map(|backup| backup["id"].as_str().unwrap().to_owned());
        ids.find(|id| !known.contains(id)).unwrap()
    };
    assert_eq!(new(&info), new(&info["second"]), "{info}");
    new(&info)
}

fn lsn(value: &Value) -> u64 {
    parse_lsn(value.as_str().unwrap())
}

fn is_commit(event: &Event) -> bool {
    matches!(event.kind, EventKind::Commit { .. })
}

/// The window ends with the last commit that `pg_waldump` sees in what is archived, and what lies outside is refused
/// with the nearest that does not.
fn the_window_is_what_was_committed(place: &Archived, events: &[Event], moment: &str) {
    let info = place.highwater.info();
    let (window, backup) = (&info["recovery_window"], &info["backups"][0]);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    assert_eq!(window["earliest_lsn"], backup["stop_lsn"], "{info}");
    let is_archived = |event: &&Event| event.lsn < lsn(&window["latest_lsn"]);
    let last = events.iter().filter(is_archived).rfind(|event| is_commit(event)).unwrap();
    let latest: jiff::Timestamp = text(&window["latest_time"]).parse().unwrap();
    assert_eq!(latest.as_microsecond(), last.time, "{info}");

    let at = place.highwater.run(&["info", "--at", moment, "--json"]).done().json();
    assert_eq!(at["backup"], backup["id"], "{at}");
    assert_eq!(at["wal_start_lsn"], backup["start_lsn"], "{at}");
    // The time is reached where the first commit behind it is seen.
    let target = moment.parse::<jiff::Timestamp>().unwrap().as_microsecond();
    let is_behind = |event: &&Event| is_commit(event) && event.time > target;
    let behind = events.iter().find(is_behind).unwrap().lsn;
    assert_eq!(lsn(&at["wal_end_lsn"]), (behind / (16 << 20) + 1) * (16 << 20), "{at}");
    assert!(at["measured"]["bytes_per_second"].as_u64() > Some(0), "{at}");

    let pgdata = place.lab.path().join("never");
    let refused = |target: &str| {
        let restore = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--to-time", target];
        place.highwater.run(&["info", "--at", target]).ends_with(4);
        place.highwater.run(&restore).ends_with(4)
    };
    refused("2001-01-01 00:00:00+00").says(&text(&window["earliest_time"]));
    refused("2099-01-01 00:00:00+00").says(&text(&window["latest_time"])[..19]);
    assert!(!pgdata.exists());
}

fn log_tells_what_pg_waldump_tells(place: &Archived, events: &[Event]) {
    let end = lsn(&place.highwater.info()["recovery_window"]["latest_lsn"]);
    let arguments = ["log", "--json", "--aborts", "--oldest-first", "--names", "none"];
    let told = lines(&place.highwater.run(&arguments).done());
    let told = told.iter().filter_map(|line| match line["kind"].as_str().unwrap() {
        kind @ ("commit" | "abort") => {
            let time: jiff::Timestamp = line["time"].as_str().unwrap().parse().unwrap();
            let time = time.as_microsecond();
            Some(format!("{:X} {kind} {} {time}", lsn(&line["lsn"]), line["xid"]))
        }
        kind @ "restore-point" => {
            Some(format!("{:X} {kind} {}", lsn(&line["lsn"]), line["name"].as_str().unwrap()))
        }
        _ => None,
    });
    let expected = events.iter().filter(|event| event.lsn < end).map(|event| {
        let (lsn, time) = (event.lsn, event.time);
        match &event.kind {
            EventKind::Commit { xid } => format!("{lsn:X} commit {xid} {time}"),
            EventKind::Abort { xid } => format!("{lsn:X} abort {xid} {time}"),
            EventKind::RestorePoint { name } => format!("{lsn:X} restore-point {name}"),
        }
    });
    let (told, expected): (Vec<_>, Vec<_>) = (told.collect(), expected.collect());
    assert!(expected.iter().any(|event| event.ends_with("zanzibar_point")), "{expected:#?}");
    assert_eq!(told, expected);
}

/// A drill goes back to a moment, asks what was there then, and begins with the backup that `info --at` names.
fn a_drill_reaches_the_moment(place: &Archived, moment: &str, events: &[Event]) {
    let question = "select count(*) from zanzibar_table; select count(*) from items";
    let checks = check(place, "rows", question, Some(&format!("{}\n500\n", ROWS[1])));
    let (checks, driller) = (checks.to_str().unwrap(), driller(place));
    let drill = driller.run(&["drill", "--json", "--checks", checks, "--to-time", moment]);
    let drill = drill.done().json();
    assert_eq!(drill["outcome"], "passed", "{drill}");
    for name in ["page-checksums", "databases", "pg_amcheck", "sql:rows.sql"] {
        assert_eq!(outcome_of(&drill, name), "passed", "{drill}");
    }
    let at = place.highwater.run(&["info", "--at", moment, "--json"]).done().json();
    assert_eq!(drill["backup"], at["backup"], "{drill}");
    let micros = |text: &str| text.parse::<jiff::Timestamp>().unwrap().as_microsecond();
    let is_before = |event: &&Event| is_commit(event) && event.time <= micros(moment);
    let last = events.iter().rfind(is_before).unwrap();
    let reached = drill["reached"]["last_commit_time"].as_str().unwrap();
    assert_eq!(micros(reached), last.time, "{drill}");
    assert_eq!(place.highwater.info()["drill"]["id"], drill["id"]);
}

fn keys_come_and_a_rotation_forgets_nobody(place: &Archived) {
    let other = place.highwater.new_key("other.key");
    let text = other.to_str().unwrap();
    place.highwater.run(&["key", "add", text]).done();
    place.highwater.run(&["key", "rotate"]).ends_with(2);
    let keys = place.highwater.run(&["--json", "key", "rotate", "--also", text]).done().json();
    assert_eq!(keys["user_keys"].as_array().map(Vec::len), Some(2), "{keys}");
    assert_eq!(keys["repository_keys"].as_array().map(Vec::len), Some(2), "{keys}");
    // A segment under the old key and one under the new.
    let old = place.cluster.finished_segments().pop().unwrap();
    let new = place.segments(1).remove(0);
    let got = place.lab.path().join("got");
    for name in [old, new] {
        place.cluster.wait_archived(&name);
        for highwater in [&place.highwater, &place.highwater.with_key(&other)] {
            highwater.get(&name, &got).done();
            let wanted = std::fs::read(place.cluster.wal(&name)).unwrap();
            assert!(std::fs::read(&got).unwrap() == wanted, "{name}: other bytes came back");
            std::fs::remove_file(&got).unwrap();
        }
    }
    let stranger = place.highwater.new_key("stranger.key");
    place.highwater.with_key(&stranger).run(&["info"]).ends_with(2).says("opens nothing");
    for key in [other, stranger] {
        std::fs::remove_file(key).unwrap();
    }
}

/// The way to S3 ends, which is the first or the second repository: archiving and backups go on, and `copy` brings over
/// what was missed. Returns the backup's name.
fn s3_is_away_and_gets_what_it_lacked(life: &Life, s3: &str) -> String {
    eprintln!("two repositories, copy, S3 being the {s3}");
    let both = &life.place.highwater;
    life.way_to_s3.set(Weather::Gone);
    life.place.segments(1);
    life.place.cluster.archive_now();
    let made = both.run(&["--json", "backup", "--fast"]).done().json();
    let other = if s3 == "first" { "second" } else { "first" };
    assert_eq!(made["second_copy"]["taken_into"], other, "{made}");
    assert_eq!(made["second_copy"]["is_in_both"], false, "{made}");
    both.run(&["info"]).ends_with(5).says(&format!("in the {s3} repository"));
    life.way_to_s3.set(Weather::Fair);
    let id = made["id"].as_str().unwrap().to_owned();
    let missing = |info: &Value| -> u64 {
        let ways = info["missing"].as_array().unwrap().iter();
        ways.map(|way| way["wal"]["segments"].as_u64().unwrap()).sum()
    };
    let info = both.info();
    assert!(missing(&info) > 0, "{info}");
    both.run(&["copy", "--newest", "--wal"]).done().says(&id);
    let info = both.info();
    assert_eq!(missing(&info), 0, "{info}");
    for info in [&info, &info["second"]] {
        assert_eq!(info["backups"].as_array().unwrap().last().unwrap()["id"], *id, "{info}");
        assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    }
    id
}

/// Nothing is wrong and nothing is read twice; then a bit flips in the store.
fn a_flipped_bit_is_found(place: &Archived, backup: &str) {
    let deep = ["verify", "--deep", "--json"];
    let first = place.highwater.run(&deep).done().json();
    assert_eq!(first["findings"].as_array().map(Vec::len), Some(0), "{first}");
    assert!(first["read_bytes"].as_u64() > Some(0) && first["skipped"].as_u64() > Some(0));
    let second = place.highwater.run(&deep).done().json();
    assert_eq!(second["read_bytes"], 0, "{second}");

    let stored = Stored::of(&place.highwater);
    let part = format!("{backup}/pack/");
    let is_pack = |name: &&std::path::PathBuf| name.to_string_lossy().contains(&part);
    let names = stored.names();
    let pack = names.iter().find(is_pack).unwrap();
    let good = stored.read(pack);
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 0x04;
    stored.replace(pack, bad);
    let found = place.highwater.run(&["verify", "--deep", "--json", "--all"]).ends_with(4).json();
    let finding = &found["findings"][0];
    assert_eq!(finding["fault"], "damaged", "{found}");
    assert!(pack.ends_with(finding["object"].as_str().unwrap()), "{found}");
    assert!(finding["lost_backups"].to_string().contains(backup), "{found}");
    let pgdata = place.lab.path().join("never");
    let restore = ["restore", "--pgdata", pgdata.to_str().unwrap(), "--backup", backup];
    place.highwater.run(&restore).ends_with(4);
    std::fs::remove_dir_all(&pgdata).unwrap();
    stored.replace(pack, good);
    place.highwater.run(&deep).done();
}

/// The first backup is pinned, and stays for that; of those that were made after it, the last stays.
fn pins_hold_and_retention_deletes(life: &mut Life, first: &str, last: &str) {
    assert!(ids(&life.place).len() > 3, "there are others between them");
    eprintln!("pins and expire");
    let one_each = life.place.highwater.with_env("HIGHWATER_RETAIN_BACKUPS", "1");
    let one_each = one_each.with_env("HIGHWATER_SECOND_RETAIN_BACKUPS", "1");
    one_each.run(&["pin", first, "--reason", "zanzibar_reason"]).done();
    one_each.run(&["expire"]).done();
    life.with_each("pins", |place| {
        assert_eq!(ids(place), [first, last]);
        let target = ["--backup", first, "--to-immediate", "--target-action", "promote"];
        let mut copy = place.restore("pinned", &target);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.sql("select count(*) from zanzibar_table"), ROWS[0].to_string());
        copy.fast_stop();
        let socket = place.lab.path().join("pinned-socket");
        for directory in [&copy.pgdata, &socket] {
            remove_tree(directory);
        }
    });
    one_each.run(&["unpin", first]).done();
    let deleted = one_each.run(&["--json", "expire"]).done().json();
    for deleted in [&deleted, &deleted["second"]] {
        assert_eq!(deleted["deleted"]["backups"], 1, "{deleted}");
    }
    life.with_each("expire", |place| {
        assert_eq!(ids(place), [last]);
        assert_begins_with(&place.highwater.info());
        let names = Stored::of(&place.highwater).names();
        let is_of_a_backup = |name: &&std::path::PathBuf| name.ends_with("committed.json");
        let documents: Vec<_> = names.iter().filter(is_of_a_backup).collect();
        let kept = |name: &std::path::Path| name.ends_with(format!("{last}/committed.json"));
        assert!(documents.len() == 1 && kept(documents[0]), "{documents:?}");
        place.highwater.run(&["verify"]).done();
    });
}

#[test]
fn every_feature_proves_both_stores_of_a_cluster_on_postgresql_14() {
    a_life(14);
}

#[test]
fn every_feature_proves_both_stores_of_a_cluster_on_postgresql_15() {
    a_life(15);
}

#[test]
fn every_feature_proves_both_stores_of_a_cluster_on_postgresql_16() {
    a_life(16);
}

#[test]
fn every_feature_proves_both_stores_of_a_cluster_on_postgresql_17() {
    a_life(17);
}

#[test]
fn every_feature_proves_both_stores_of_a_cluster_on_postgresql_18() {
    a_life(18);
}

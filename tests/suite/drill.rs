//! `drill`: what is stored comes back, what does not is told, production sees nothing of it, and nothing is left.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::harness::{
    Archived, Highwater, Lab, Load, MAJORS, NEWEST, Random, files_below, fingerprint, flip_bit,
    passes_within, rounds, wait_for,
};

/// Cleaning up behind a drill takes no longer.
const CLEAN_LIMIT: Duration = Duration::from_secs(90);

/// The binary with what a drill of this cluster needs.
pub(crate) fn driller(place: &Archived) -> Highwater {
    let postgres = place.cluster.tool("postgres");
    let bin = Path::new(postgres.get_program()).parent().unwrap().to_path_buf();
    place
        .highwater
        .with_env("HIGHWATER_BINDIR", bin.to_str().unwrap())
        .with_env("LD_LIBRARY_PATH", bin.parent().unwrap().join("lib").to_str().unwrap())
        .with_env("HIGHWATER_SCRATCH", scratch(place).to_str().unwrap())
        .with_env("HIGHWATER_DRILL_DISK_FREE_MIN", "0")
}

fn scratch(place: &Archived) -> PathBuf {
    place.lab.path().join("drill")
}

/// Two backups with a tablespace, and WAL behind them.
fn filled(major: u32) -> Archived {
    let place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
    fill(&place);
    place
}

fn fill(place: &Archived) {
    place.cluster.sql("create database shop");
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    for _ in 0..2 {
        place.cluster.pgbench(&["-c", "2", "-t", "200"]);
        place.highwater.run(&["backup", "--fast"]).done();
    }
    place.cluster.pgbench(&["-c", "2", "-t", "200"]);
    place.segments(2);
    place.cluster.archive_now();
}

/// Writes a check of the user.
pub(crate) fn check(place: &Archived, name: &str, sql: &str, expected: Option<&str>) -> PathBuf {
    let directory = place.lab.path().join("checks");
    if !directory.exists() {
        place.lab.directory("checks");
    }
    place.lab.write(&format!("checks/{name}.sql"), sql.as_bytes());
    if let Some(expected) = expected {
        place.lab.write(&format!("checks/{name}.expected"), expected.as_bytes());
    }
    directory
}

pub(crate) fn outcome_of<'a>(drill: &'a Value, name: &str) -> &'a str {
    let checks = drill["checks"].as_array().unwrap();
    let found = checks.iter().find(|one| one["name"] == name);
    found.unwrap_or_else(|| panic!("no {name} in {drill}"))["outcome"].as_str().unwrap()
}

/// Processes whose working directory is the drill's data directory.
fn processes(place: &Archived) -> Vec<PathBuf> {
    let data = scratch(place).join("data");
    let all = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    all.filter(|one| std::fs::read_link(one.join("cwd")).is_ok_and(|cwd| cwd.starts_with(&data)))
        .collect()
}

#[track_caller]
fn assert_nothing_is_left(place: &Archived) {
    assert!(!scratch(place).exists(), "{:?}", files_below(&scratch(place)));
    assert_eq!(processes(place), [""; 0].map(PathBuf::from));
}

/// What production says of archiving (how much is counted late by PostgreSQL 14), and every object of its WAL in the
/// repository.
fn production(place: &Archived) -> (String, BTreeSet<PathBuf>) {
    let archiver = place.cluster.sql(
        "select failed_count, (select timeline_id from pg_control_checkpoint()), \
         (select count(*) from pg_replication_slots) from pg_stat_archiver",
    );
    let objects = files_below(&place.highwater.repo_directory()).into_iter();
    (archiver, objects.filter(|path| path.to_string_lossy().contains("/wal/")).collect())
}

#[test]
fn what_is_stored_comes_back_on_every_major_and_nothing_is_left_behind() {
    for major in MAJORS {
        let place = filled(major);
        place
            .cluster
            .sql("create table aside_table tablespace aside as select generate_series(1, 5000) n");
        // Nothing is left for production itself to write into its files.
        place.cluster.sql("vacuum freeze aside_table");
        place.cluster.sql("checkpoint");
        place.cluster.archive_now();
        let count = place.cluster.sql("select count(*) from pgbench_history");
        let ours = "select count(*) from aside_table; select count(*), null from pgbench_history";
        check(&place, "counts", ours, Some(&format!("5000\n{count}|\n")));
        let checks =
            check(&place, "other", "-- database: shop\nselect current_database()", Some("shop"));
        let before = production(&place);
        let aside = fingerprint(&place.cluster.tablespace("aside"));
        let run = driller(&place).run(&["drill", "--json", "--checks", checks.to_str().unwrap()]);
        let drill = run.done().json();
        assert_eq!(drill["outcome"], "passed", "{drill}");
        for name in ["page-checksums", "databases", "pg_amcheck", "sql:counts.sql", "sql:other.sql"]
        {
            assert_eq!(outcome_of(&drill, name), "passed", "{drill}");
        }
        let info = place.highwater.info();
        assert_eq!(drill["backup"], info["backups"][1]["id"], "the newest: {drill}");
        assert_eq!(drill["reached"]["timeline"], 1, "{drill}");
        // Recovery saw every commit: the last of them is the one that `info` tells of.
        assert_eq!(
            drill["reached"]["last_commit_time"], info["recovery_window"]["latest_time"],
            "{drill}"
        );
        assert!(drill["wal_bytes"].as_u64() > Some(1 << 20), "{drill}");
        let phases: Vec<&str> = drill["phases"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["name"].as_str().unwrap())
            .collect();
        let wanted = [
            "choosing",
            "reading-wal",
            "restoring",
            "starting",
            "replaying",
            "checking",
            "cleaning",
        ];
        assert_eq!(phases, wanted, "{drill}");
        assert_eq!(production(&place), before, "production and its archive are as they were");
        assert_eq!(fingerprint(&place.cluster.tablespace("aside")), aside);
        assert_nothing_is_left(&place);
        // It is on record.
        let info = place.highwater.info();
        assert_eq!(info["drill"]["id"], drill["id"], "{info}");
        assert_eq!(info["drill"]["outcome"], "passed", "{info}");
        assert!(info["drill"]["recovery_millis"].as_u64() > Some(0), "{info}");
        place.highwater.run(&["info"]).done().says("last drill").says("PASSED");
        place.highwater.run(&["check", "--no-switch"]).says("drill");
        let found = place.highwater.run(&["verify", "--deep", "--json"]).done().json();
        assert_eq!(found["notes"].as_array().unwrap().len(), 0, "{found}");
    }
}

/// What `docs/guide.md` tells to do: its commands, and the question it shows.
fn of_the_guide() -> (Vec<String>, String) {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("\n## ").find(|part| part.contains("highwater drill")).unwrap();
    let commands = chapter.lines().filter(|line| line.starts_with("highwater drill"));
    let sql = chapter.split("```sql\n").nth(1).unwrap().split("```").next().unwrap();
    (commands.map(ToOwned::to_owned).collect(), sql.to_owned())
}

#[test]
fn the_guides_commands_pass_from_s3_and_from_an_encrypted_cluster() {
    let (commands, sql) = of_the_guide();
    assert_eq!(commands.len(), 2, "{commands:?}");
    let on_s3 = || Archived::by_server_on_s3(NEWEST, |cluster| cluster);
    let encrypted = || Archived::by_server_encrypted(MAJORS[0], Lab::highwater, |cluster| cluster);
    let places: [&dyn Fn() -> Archived; 2] = [&on_s3, &encrypted];
    for place in places {
        let place = place();
        fill(&place);
        place
            .cluster
            .sql("create table orders as select now() placed from generate_series(1, 2000)");
        place.cluster.archive_now();
        let checks = check(&place, "orders", &sql, Some("t\n"));
        for (number, command) in commands.iter().enumerate() {
            let command = command
                .replace("/var/tmp/highwater-drill", scratch(&place).to_str().unwrap())
                .replace("/etc/highwater/checks", checks.to_str().unwrap());
            let words: Vec<&str> = command.split_whitespace().skip(1).collect();
            let run = driller(&place).run(&words).done().says("PASSED").says("ok       pg_amcheck");
            assert_eq!(run.stdout.contains("ok       sql:orders.sql"), number == 0, "{run}");
            assert_nothing_is_left(&place);
        }
        assert_eq!(place.highwater.info()["drill"]["outcome"], "passed");
    }
}

#[test]
fn a_random_moment_is_reached_and_its_seed_makes_it_the_same_again() {
    let place = filled(NEWEST);
    let mut random = Random::new("random moment");
    for _ in 0..rounds(3) {
        let seed = random.below(1_000_000).to_string();
        let arguments = ["drill", "--json", "--random-moment", "--seed", &seed];
        let drill = driller(&place).run(&arguments).done().json();
        assert_eq!(drill["outcome"], "passed", "{drill}");
        assert_eq!(drill["seed"].to_string(), seed, "{drill}");
        let again = driller(&place).run(&arguments).done().json();
        assert_eq!(again["target"], drill["target"], "{again}");
        assert_eq!(again["reached"], drill["reached"], "{again}");
        let window = &place.highwater.info()["recovery_window"];
        let lsn = |value: &Value| crate::harness::parse_lsn(value.as_str().unwrap());
        let reached = lsn(&drill["reached"]["end_lsn"]);
        assert!(reached >= lsn(&window["earliest_lsn"]), "{drill}");
        assert!(reached <= lsn(&window["latest_lsn"]), "{drill}");
    }
    let other = driller(&place).run(&["drill", "--json", "--random-moment"]).done().json();
    assert!(other["seed"].is_u64(), "{other}");
}

#[test]
fn a_target_is_reached_as_restore_would() {
    let place = filled(MAJORS[0]);
    place.cluster.sql("create table mark as select 1 n");
    place.cluster.sql("select pg_create_restore_point('here')");
    place.cluster.sql("insert into mark values (2)");
    place.segments(1);
    place.cluster.archive_now();
    let checks = check(&place, "mark", "select n from mark", Some("1\n"));
    let arguments = ["drill", "--json", "--to-name", "here", "--checks", checks.to_str().unwrap()];
    let drill = driller(&place).run(&arguments).done().json();
    assert_eq!(outcome_of(&drill, "sql:mark.sql"), "passed", "{drill}");
    // What cannot be reached is refused before anything is made, and on record as failed.
    let run = driller(&place).run(&["drill", "--json", "--to-time", "2020-01-01 00:00:00+00"]);
    let drill = run.ends_with(4).json();
    assert_eq!(
        (drill["outcome"].as_str(), &drill["failure"]["phase"]),
        (Some("failed"), &"choosing".into()),
        "{drill}"
    );
    assert_eq!(place.highwater.info()["drill"]["outcome"], "failed");
}

#[test]
fn damage_is_found_named_and_on_record_and_production_goes_on() {
    let place = filled(NEWEST);
    let load = Load::on(&place.cluster);
    let repo = place.highwater.repo_directory();
    let mut packs =
        files_below(&repo).into_iter().filter(|path| path.to_string_lossy().contains("/pack/"));
    let pack = packs.next_back().unwrap();
    let good = std::fs::read(repo.join(&pack)).unwrap();
    flip_bit(&repo.join(&pack), good.len() / 2);
    let run = driller(&place).run(&["drill"]).ends_with(4);
    run.says("FAILED").says(pack.file_name().unwrap().to_str().unwrap());
    assert_nothing_is_left(&place);
    let info = place.highwater.info();
    assert_eq!(info["drill"]["outcome"], "failed", "{info}");
    place.highwater.run(&["info"]).done().says("FAILED");
    place.highwater.run(&["check", "--no-switch"]).says("the last one");
    std::fs::write(repo.join(&pack), good).unwrap();
    // A segment that replay needs.
    drop(load);
    let gone = place.segments(1).remove(0);
    place.segments(1);
    place.cluster.archive_now();
    let segment = place.objects_of(&gone).remove(0);
    let good = std::fs::read(&segment).unwrap();
    flip_bit(&segment, good.len() / 2);
    driller(&place).run(&["drill"]).ends_with(4).says("FAILED").says(&gone);
    assert_nothing_is_left(&place);
    std::fs::write(&segment, good).unwrap();
    driller(&place).run(&["drill"]).done().says("PASSED");
}

#[test]
fn a_page_that_was_damaged_before_the_backup_is_found_by_the_drill() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    let file = place.cluster.sql("select pg_relation_filepath('pgbench_accounts')");
    place.cluster.fast_stop();
    flip_bit(&place.cluster.pgdata.join(&file), 3 * 8192 + 4000);
    place.cluster.start();
    place.highwater.run(&["backup", "--fast", "--source", "files"]).ends_with(4);
    let drill = driller(&place).run(&["drill", "--json"]).ends_with(4).json();
    assert_eq!(drill["outcome"], "failed", "{drill}");
    assert_eq!(outcome_of(&drill, "page-checksums"), "failed", "{drill}");
    assert_eq!(outcome_of(&drill, "databases"), "passed", "all checks are done: {drill}");
    let told = drill["checks"][0]["said"].as_str().unwrap();
    assert!(told.contains(&file), "{told}");
    assert_nothing_is_left(&place);
}

#[test]
fn a_wrong_row_or_an_error_of_a_users_check_fails_the_drill_and_the_others_are_done() {
    let place = filled(NEWEST);
    check(&place, "a-wrong", "select n from generate_series(1, 3) n", Some("1\n2\n4\n"));
    check(&place, "b-error", "select no_such_column from pgbench_history", None);
    check(&place, "c-elsewhere", "-- database: none_of_that_name\nselect 1", None);
    let checks = check(&place, "d-right", "select 1", None);
    let arguments = ["drill", "--json", "--checks", checks.to_str().unwrap()];
    let drill = driller(&place).run(&arguments).ends_with(4).json();
    assert_eq!(drill["outcome"], "failed", "{drill}");
    for (name, outcome) in [
        ("a-wrong", "failed"),
        ("b-error", "failed"),
        ("c-elsewhere", "failed"),
        ("d-right", "passed"),
    ] {
        assert_eq!(outcome_of(&drill, &format!("sql:{name}.sql")), outcome, "{drill}");
    }
    let told = drill.to_string();
    assert!(told.contains("row 3: expected `4`, found `3`"), "{drill}");
    assert!(told.contains("no_such_column") && told.contains("none_of_that_name"), "{drill}");
    assert!(drill["failure"].is_null(), "nothing ended it early: {drill}");
    assert_nothing_is_left(&place);
    let info = place.highwater.info();
    assert_eq!(info["drill"]["failed_checks"].as_array().unwrap().len(), 3, "{info}");
}

#[test]
fn a_tablespace_made_after_the_backup_is_refused_because_replay_would_write_into_it() {
    let place = filled(NEWEST);
    let late = place.lab.directory("late");
    place.cluster.sql(&format!("create tablespace late location '{}'", late.display()));
    place.cluster.sql("create table in_late tablespace late as select generate_series(1, 1000) n");
    place.cluster.sql("checkpoint");
    place.cluster.archive_now();
    let before = fingerprint(&late);
    let run = driller(&place).run(&["drill"]).ends_with(2);
    run.says(late.to_str().unwrap()).says("Take a new backup");
    assert_eq!(fingerprint(&late), before);
    assert_nothing_is_left(&place);
    assert!(place.highwater.info()["drill"].is_null(), "nothing was begun");
    // A moment before it can be drilled, and so can a backup that knows of it.
    driller(&place).run(&["drill", "--to-immediate"]).done();
    place.highwater.run(&["backup", "--fast"]).done();
    driller(&place).run(&["drill"]).done().says("PASSED");
    assert_eq!(fingerprint(&late), before);
}

#[test]
fn a_cluster_in_which_no_superuser_can_log_in_is_drilled() {
    let place = filled(MAJORS[0]);
    place.cluster.sql(
        "begin; alter role postgres nologin; commit; \
         select pg_create_restore_point('locked'); \
         begin; alter role postgres login; commit",
    );
    place.cluster.archive_now();
    let checks = check(
        &place,
        "nobody",
        "select count(*) from pg_roles where rolsuper and rolcanlogin and rolname <> current_user",
        Some("0\n"),
    );
    let arguments = ["drill", "--to-name", "locked", "--checks", checks.to_str().unwrap()];
    driller(&place).run(&arguments).done().says("PASSED");
}

#[test]
fn places_and_programs_that_will_not_do_are_refused_and_left_alone() {
    let place = filled(NEWEST);
    let driller = driller(&place);
    let inside = place.cluster.pgdata.join("inside");
    let run = driller.run(&["drill", "--scratch", inside.to_str().unwrap()]).ends_with(2);
    run.says("data directory");
    let full = place.lab.directory("full");
    place.lab.write("full/mine", b"x");
    driller.run(&["drill", "--scratch", full.to_str().unwrap()]).ends_with(2).says("not empty");
    assert_eq!(files_below(&full), [PathBuf::from("mine")]);
    driller.without_env("HIGHWATER_SCRATCH").run(&["drill"]).ends_with(2).says("--scratch");
    let none = place.lab.directory("none");
    let run = driller.run(&["drill", "--bindir", none.to_str().unwrap()]).ends_with(6);
    run.says(none.to_str().unwrap()).says("PostgreSQL 18");
    let narrow = driller.with_env("HIGHWATER_DRILL_DISK_FREE_MIN", "16000GiB");
    narrow.run(&["drill"]).ends_with(7).says("left");
    assert_nothing_is_left(&place);
    // What kept a drill from proving anything is on record as just that.
    assert_eq!(place.highwater.info()["drill"]["outcome"], "unfinished");
    let slow = check(&place, "slow", "select pg_sleep(60)", None);
    let slow = ["drill", "--timeout", "4s", "--checks", slow.to_str().unwrap()];
    let late = driller.run(&slow).ends_with(4);
    late.says("were not over within 4 s");
    assert_nothing_is_left(&place);
}

#[test]
fn what_is_kept_is_a_cluster_that_can_be_looked_at() {
    let place = filled(NEWEST);
    driller(&place).run(&["drill", "--keep"]).done().says("files and logs are left in");
    assert!(scratch(&place).join("data/global/pg_control").exists());
    assert!(
        std::fs::read_to_string(scratch(&place).join("server.log")).unwrap().contains("redo done")
    );
    assert_eq!(processes(&place).len(), 0);
    driller(&place).run(&["drill"]).ends_with(2).says("not empty");
}

#[test]
fn a_stopped_drill_ends_its_server_and_leaves_nothing() {
    let place = filled(NEWEST);
    let running = driller(&place).spawn(&["drill"]);
    wait_for("the private server", CLEAN_LIMIT, || !processes(&place).is_empty());
    running.signal(rustix::process::Signal::TERM);
    running.wait().ends_with(143).says("stopped by SIGTERM");
    assert_nothing_is_left(&place);
    assert!(place.highwater.info()["drill"].is_null(), "nothing was proved");
}

#[test]
fn a_drill_killed_at_any_moment_is_cleared_up_behind() {
    let place = filled(NEWEST);
    let usual = driller(&place).run(&["drill"]).done().elapsed;
    let before = production(&place);
    let mut random = Random::new("killed drill");
    for _ in 0..rounds(5) {
        let moment = random.below(u64::try_from(usual.as_millis()).unwrap());
        let run = driller(&place).spawn(&["drill"]).kill_after(Duration::from_millis(moment));
        assert!(run.was_killed() || run.code() == 0, "{run}");
        // Its guard does it, without a next drill.
        let is_gone = || !scratch(&place).exists() && processes(&place).is_empty();
        wait_for("the guard clears up", CLEAN_LIMIT, is_gone);
    }
    assert_eq!(production(&place), before);
    driller(&place).run(&["drill"]).done().says("PASSED");
}

/// Kills the guards of drills in this lab; returns how many there were.
fn kill_guards(place: &Archived) -> usize {
    let root = scratch(place);
    let is_guard = |process: &PathBuf| {
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("drill-guard") && line.contains(root.to_str().unwrap())
    };
    let all = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path());
    let guards: Vec<PathBuf> = all.filter(is_guard).collect();
    for guard in &guards {
        let pid = guard.file_name().unwrap().to_str().unwrap().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
    }
    guards.len()
}

#[test]
fn what_a_drill_and_its_guard_left_when_both_were_killed_goes_with_the_next() {
    let place = filled(NEWEST);
    let mut orphans = 0;
    for _ in 0..rounds(2) {
        let running = driller(&place).spawn(&["drill"]);
        wait_for("the private server", CLEAN_LIMIT, || !processes(&place).is_empty());
        assert_eq!(kill_guards(&place), 1);
        running.kill_after(Duration::ZERO);
        orphans += usize::from(!processes(&place).is_empty());
        assert!(scratch(&place).join("data").exists());
        // Another drill at work in the same place is left alone; a dead one is cleared away.
        let drill = driller(&place).run(&["drill", "--json"]).done().json();
        assert!(drill["notes"].to_string().contains("cleared away"), "{drill}");
        assert_nothing_is_left(&place);
    }
    assert!(orphans > 0, "no server outlived its drill");
}

#[test]
fn two_drills_do_not_share_a_place() {
    let place = filled(NEWEST);
    let running = driller(&place).spawn(&["drill"]);
    let has_begun = || scratch(&place).join("data").exists();
    assert!(passes_within(CLEAN_LIMIT, has_begun));
    driller(&place).run(&["drill"]).ends_with(3).says("another drill is at work");
    running.wait().done().says("PASSED");
    assert_nothing_is_left(&place);
}

//! What `highwater agent` runs by itself: backups, `expire`, `verify`, drills, as the guide says.

use crate::harness::{Archived, Highwater, MAJORS, NEWEST, Receiver, passes_within};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Within this an agent has run whatever a test waits for.
const LIMIT: Duration = Duration::from_mins(3);

#[track_caller]
fn wait_info(highwater: &Highwater, agent: &Receiver, what: &str, passes: impl Fn(&Value) -> bool) {
    let passed = passes_within(LIMIT, || passes(&highwater.info()));
    assert!(passed, "{what}: {}\n{}", highwater.info(), agent.log());
}

fn backups(info: &Value) -> usize {
    info["backups"].as_array().unwrap().len()
}

/// The settings that the guide shows.
fn of_the_guide() -> String {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("### Let the agent do it").nth(1).unwrap();
    chapter.split("```toml\n").nth(1).unwrap().split("```").next().unwrap().to_owned()
}

#[test]
fn the_guides_settings_bring_a_backup_a_verification_and_a_drill_and_no_second_of_any() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 1000) n");
    let scratch = place.lab.path().join("drill");
    let settings = of_the_guide().replace("/var/tmp/highwater-drill", scratch.to_str().unwrap());
    assert!(settings.contains(scratch.to_str().unwrap()), "{settings}");
    let file = place.lab.write("highwater.toml", settings.as_bytes());
    let postgres = place.cluster.tool("postgres");
    let bin = Path::new(postgres.get_program()).parent().unwrap().to_path_buf();
    let highwater = place
        .highwater
        .with_env("HIGHWATER_CONFIG", file.to_str().unwrap())
        .with_env("HIGHWATER_BINDIR", bin.to_str().unwrap())
        .with_env("LD_LIBRARY_PATH", bin.parent().unwrap().join("lib").to_str().unwrap())
        .with_env("HIGHWATER_DRILL_DISK_FREE_MIN", "0");
    let agent = Receiver::agent(&highwater, &place.cluster.pgdata, &[]);
    wait_info(&highwater, &agent, "a drill", |info| !info["drill"].is_null());
    agent.wait_says("`drill` has ended well");
    let info = highwater.info();
    assert_eq!(backups(&info), 1, "{info}");
    assert_eq!(info["drill"]["outcome"], "passed", "{info}");
    assert_eq!(info["drill"]["backup"], info["backups"][0]["id"], "{info}");
    assert_eq!(
        (&info["verification"]["deep"], &info["verification"]["unacknowledged"]),
        (&true.into(), &0.into())
    );
    for command in ["backup", "expire", "verify --deep", "drill"] {
        agent.wait_says(&format!("`{command}` has ended well"));
    }
    let report = agent.terminate().done().json();
    assert_eq!(
        (&report["scheduled"]["done"], &report["scheduled"]["failed"]),
        (&4.into(), &0.into())
    );
    // Another agent finds in the repository that nothing is due but `expire`, which leaves nothing there.
    let agent = Receiver::agent(&highwater, &place.cluster.pgdata, &[]);
    agent.wait_says("`expire` has ended well");
    let report = agent.terminate().done().json();
    assert_eq!(report["scheduled"]["done"], 1, "{report}");
    assert_eq!(backups(&highwater.info()), 1);
}

#[test]
fn with_short_periods_runs_come_again_and_again_and_old_backups_go() {
    for major in [MAJORS[0], NEWEST] {
        let place = Archived::by_server(major);
        let highwater = place
            .highwater
            .with_env("HIGHWATER_BACKUP_EVERY", "10s")
            .with_env("HIGHWATER_VERIFY_EVERY", "10s")
            .with_env("HIGHWATER_EXPIRE_EVERY", "10s")
            .with_env("HIGHWATER_RETAIN_BACKUPS", "1");
        let agent = Receiver::agent(&highwater, &place.cluster.pgdata, &[]);
        wait_info(&highwater, &agent, "the first backup", |info| backups(info) > 0);
        let first = highwater.info()["backups"][0]["id"].clone();
        wait_info(&highwater, &agent, "the first is gone", |info| {
            backups(info) > 0
                && info["backups"].as_array().unwrap().iter().all(|b| b["id"] != first)
        });
        wait_info(&highwater, &agent, "a verification", |info| !info["verification"].is_null());
        let verified = highwater.info()["verification"]["finished_at"].clone();
        wait_info(&highwater, &agent, "a second verification", |info| {
            info["verification"]["finished_at"] != verified
        });
        let report = agent.terminate().done().json();
        assert!(report["scheduled"]["done"].as_u64() >= Some(5), "{report}");
        place.cluster.archive_now();
        let dump = place.cluster.dump();
        place.cluster.archive_now();
        place.assert_copy_equals("copy", &dump);
    }
}

#[test]
fn a_stop_ends_the_backup_that_runs_in_good_order_and_begins_nothing() {
    let place = Archived::by_server(NEWEST);
    // A backup begins with a checkpoint, which takes its time: a tenth of a second for each page.
    place.cluster.set("checkpoint_completion_target = 0.9");
    place.cluster.set("checkpoint_timeout = '1h'");
    place.cluster.reload();
    place
        .cluster
        .sql("create table t as select n, repeat('x', 900) t from generate_series(1, 30000) n");
    let highwater = place.highwater.with_env("HIGHWATER_BACKUP_EVERY", "10s");
    let agent = Receiver::agent(&highwater, &place.cluster.pgdata, &[]);
    agent.wait_says("`backup` is due and begins");
    let senders = "select count(*) from pg_stat_activity where backend_type = 'walsender'";
    place.cluster.wait_until(senders, "1");
    let run = agent.terminate().done();
    let report = run.json();
    assert_eq!(
        (&report["scheduled"]["done"], &report["scheduled"]["failed"]),
        (&0.into(), &1.into())
    );
    assert!(run.stderr.contains("`backup` was ended"), "{run}");
    assert_eq!(run.stderr.matches("is due and begins").count(), 1, "{run}");
    // The child is gone, and so is what it had begun, on the server and in the repository. The server sees that only
    // when the checkpoint is done, which another one hurries on.
    place.cluster.sql("checkpoint");
    place.cluster.wait_until(senders, "0");
    let info = place.highwater.info();
    assert_eq!(info["unfinished_backups"].as_array().unwrap().len(), 0, "{info}\n{run}");
    assert_eq!(backups(&info), 0, "{info}");
}

#[test]
fn a_run_that_fails_is_told_and_tried_again_and_archiving_goes_on() {
    let place = Archived::by_server(NEWEST);
    let nowhere = place.lab.directory("nowhere");
    let highwater = place
        .highwater
        .with_env("HIGHWATER_DSN", &format!("host={} connect_timeout=5", nowhere.display()))
        .with_env("HIGHWATER_BACKUP_EVERY", "10s");
    let agent = Receiver::agent(&highwater, &place.cluster.pgdata, &[]);
    let failed = "`backup` has failed";
    let twice = passes_within(LIMIT, || agent.log().matches(failed).count() > 1);
    assert!(twice, "{}", agent.log());
    let name = place.cluster.archive_now();
    assert!(!place.objects_of(&name).is_empty());
    let report = agent.terminate().done().json();
    assert_eq!(report["scheduled"]["done"], 0, "{report}");
    assert_eq!(backups(&place.highwater.info()), 0);
}

#[test]
fn beside_a_standby_backups_are_taken_only_when_asked_for() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    let standby = place.cluster.standby("standby", &[]);
    standby.wait_until("select pg_is_in_recovery()", "t");
    let highwater = place
        .highwater
        .on(&standby)
        .with_env("HIGHWATER_BACKUP_EVERY", "10s")
        .with_env("HIGHWATER_VERIFY_EVERY", "10s");
    let agent = Receiver::agent(&highwater, &standby.pgdata, &[]);
    agent.wait_says("no backups are taken here");
    // Other runs come, so that a backup would have come as well.
    let twice = passes_within(LIMIT, || agent.log().matches("has ended well").count() > 1);
    assert!(twice, "{}", agent.log());
    agent.terminate().done();
    assert_eq!(backups(&highwater.info()), 0);
    let asked = highwater.with_env("HIGHWATER_BACKUP_ON_STANDBY", "on");
    let agent = Receiver::agent(&asked, &standby.pgdata, &[]);
    let taken = passes_within(LIMIT, || {
        // A standby's backup waits for WAL that only its primary can switch.
        let _ = place.cluster.try_sql("select pg_switch_wal()");
        backups(&asked.info()) > 0
    });
    assert!(taken, "{}", agent.log());
    agent.terminate().done();
}

#[test]
fn what_could_never_succeed_is_refused_at_the_start() {
    let place = Archived::by_hand(NEWEST, 16);
    let pgdata = place.cluster.pgdata.to_str().unwrap().to_owned();
    let run = |settings: &[(&str, &str)]| {
        let with = |highwater: Highwater, (name, value): &(&str, &str)| {
            highwater.with_env(&format!("HIGHWATER_{name}"), value)
        };
        let highwater =
            settings.iter().fold(place.highwater.with_env("HIGHWATER_PGDATA", &pgdata), with);
        highwater.run(&["agent"]).ends_with(2)
    };
    run(&[("EXPIRE_EVERY", "1h")]).says("retain_window");
    run(&[("DRILL_EVERY", "1h")]).says("scratch");
    run(&[("BACKUP_AT", "02:30")]).says("backup_every");
    run(&[("BACKUP_AT", "02:30"), ("BACKUP_EVERY", "5h")]).says("backup_every");
    run(&[("BACKUP_AT", "2.30"), ("BACKUP_EVERY", "24h")]).says("02:30");
}

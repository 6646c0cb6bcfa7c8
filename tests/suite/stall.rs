//! A store that is away: WAL is kept on the host if that is set, let go as a recorded gap if that is set, and by default
//! left to PostgreSQL. Whatever was acknowledged is in the spool or in the repository, or recorded as lost.

use crate::harness::{
    Archived, Highwater, Lab, MAJORS, NEWEST, NO_SMALL_DISK, Random, Receiver, Running, Way,
    Weather, not_run, on_small_disk, passes_within, rounds, wait_for,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_mins(3);

/// A cluster that archives with these settings in a file, as its `archive_command` finds them.
fn archived(major: u32, settings: &str, repository: impl FnOnce(&Lab) -> Highwater) -> Archived {
    let lab = Lab::open();
    lab.directory("stall");
    let highwater = repository(&lab);
    let cluster = lab.cluster(major).conf("archive_mode = on").start();
    let file = settings_file(&lab, &cluster.dsn(), settings);
    let highwater = highwater.with_env("HIGHWATER_CONFIG", file.to_str().unwrap());
    let highwater = highwater.on(&cluster);
    highwater.run(&["init"]).done();
    cluster.archive_into(&highwater);
    let place = Archived { cluster, highwater, lab };
    // The first push takes along what the spool needs to know.
    place.cluster.archive_now();
    place
}

fn settings_file(lab: &Lab, dsn: &str, settings: &str) -> PathBuf {
    // Those of an S3 server, if a test has put them there.
    let options = std::fs::read_to_string(lab.path().join("s3.options")).unwrap_or_default();
    let options = options.replace("[repo.options]", "");
    let text = format!("dsn = \"{dsn}\"\n{settings}\n[repo.options]\nretries = 1\n{options}");
    let text = text.replace("STALL", lab.path().join("stall").to_str().unwrap());
    let file = lab.write("highwater.toml", text.as_bytes());
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    file
}

const SPOOL: &str = "stall_spool = \"STALL\"";

fn with_spool(major: u32) -> Archived {
    archived(major, SPOOL, Lab::highwater)
}

fn away(place: &Archived) -> PathBuf {
    let repo = place.highwater.repo_directory();
    let away = repo.with_extension("away");
    std::fs::rename(&repo, &away).unwrap();
    away
}

fn back(place: &Archived) {
    let repo = place.highwater.repo_directory();
    std::fs::rename(repo.with_extension("away"), repo).unwrap();
}

fn state(place: &Archived) -> serde_json::Value {
    let pgdata = place.cluster.pgdata.to_str().unwrap();
    place.highwater.run(&["--json", "spool", "--pgdata", pgdata]).done().json()
}

fn held(place: &Archived) -> u64 {
    state(place)["spool"]["files"].as_u64().unwrap()
}

/// The bytes of segments that the server has still.
fn contents(place: &Archived, names: &[String]) -> Vec<Vec<u8>> {
    names.iter().map(|name| std::fs::read(place.cluster.wal(name)).unwrap()).collect()
}

/// Fails unless the objects of these segments are, byte for byte, what a push into a calm store makes of them.
#[track_caller]
fn assert_stored_as_ever(place: &Archived, names: &[String], contents: &[Vec<u8>]) {
    let twin = place.highwater.for_cluster("twin").with_env("HIGHWATER_STALL_SPOOL", "/nowhere");
    twin.run(&["init"]).done();
    place.lab.directory("again");
    let repo = place.highwater.repo_directory();
    for (name, bytes) in names.iter().zip(contents) {
        let path = place.lab.write(&format!("again/{name}"), bytes);
        twin.push(&path).done();
        let object = |cluster: &str| {
            let found = place.objects_of(name).into_iter();
            let mut found = found.filter(|path| path.starts_with(repo.join(cluster)));
            std::fs::read(found.next().expect("an object")).unwrap()
        };
        assert!(object("main") == object("twin"), "{name} is stored otherwise");
    }
}

#[test]
fn wal_is_kept_while_the_store_is_away_and_comes_into_it_byte_for_byte() {
    for major in MAJORS {
        let place = with_spool(major);
        place.highwater.run(&["backup", "--fast"]).done();
        away(&place);
        let names = place.segments(4);
        let bytes = contents(&place, &names);
        for name in &names {
            place.cluster.wait_archived(name);
        }
        assert!(held(&place) >= 4, "{}", state(&place));
        let log = place.cluster.log();
        assert!(log.contains("is kept on this host only"), "{log}");
        // Recovery on this host has them, and nobody else.
        for (name, bytes) in names.iter().zip(&bytes) {
            place.assert_gives_back(name, bytes);
        }
        place.fetch("0000000100000000000000FE").0.ends_with(133);
        let dump = place.cluster.dump();
        back(&place);
        wait_for("a process that archive-push left drains it", LIMIT, || held(&place) == 0);
        assert_stored_as_ever(&place, &names, &bytes);
        place.cluster.archive_now();
        let info = place.highwater.info();
        assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
        assert_eq!(info["let_go"].as_array().map(Vec::len), Some(0), "{info}");
        place.assert_copy_equals("copy", &dump);
        place.highwater.run(&["verify"]).done();
    }
}

#[test]
fn an_agent_drains_the_spool_and_the_server_archives_through_both() {
    let place = with_spool(NEWEST);
    let agent = Receiver::agent(&place.highwater, &place.cluster.pgdata, &[]);
    agent.wait_says("serving");
    place.cluster.archive_now();
    away(&place);
    let names = place.segments(3);
    let bytes = contents(&place, &names);
    for name in &names {
        place.cluster.wait_archived(name);
    }
    back(&place);
    wait_for("the agent drains it", LIMIT, || held(&place) == 0);
    for (name, bytes) in names.iter().zip(&bytes) {
        place.assert_gives_back(name, bytes);
    }
    agent.wait_says("was brought from the spool");
    agent.terminate().done();
}

#[test]
fn a_way_to_s3_that_ends_and_an_encrypted_cluster_make_no_difference() {
    for major in MAJORS {
        the_way_to_s3_ends(major);
    }
}

/// An encrypted cluster whose store is an S3 server, and the way to that.
fn archived_on_s3(major: u32, settings: &str) -> (Archived, Way) {
    let mut way = None;
    let place = archived(major, settings, |lab| {
        let (highwater, through) = lab.highwater_on_s3_by_a_way();
        let options = std::fs::read_to_string(lab.path().join(format!("s3-{}.toml", through.port)));
        lab.write("s3.options", options.unwrap().as_bytes());
        way = Some(through);
        let highwater = highwater.without_env("HIGHWATER_CONFIG");
        highwater.with_key(&highwater.new_key("key"))
    });
    (place, way.unwrap())
}

fn the_way_to_s3_ends(major: u32) {
    let (place, way) = archived_on_s3(major, SPOOL);
    let names = place.segments(2);
    let bytes = contents(&place, &names);
    way.set(Weather::Gone);
    for name in &names {
        place.highwater.push(&place.cluster.wal(name)).done().says("is kept on this host only");
    }
    for (name, bytes) in names.iter().zip(&bytes) {
        place.assert_gives_back(name, bytes);
    }
    place.highwater.run(&["spool", "--drain"]).ends_with(5);
    way.set(Weather::Fair);
    wait_for("it is drained", LIMIT, || {
        place.highwater.run(&["spool", "--drain"]).code() == 0 && held(&place) == 0
    });
    for (name, bytes) in names.iter().zip(&bytes) {
        place.assert_gives_back(name, bytes);
    }
}

/// A cluster that does not archive by itself, with a spool.
fn by_hand() -> Archived {
    let place = with_spool(NEWEST);
    place.cluster.sql("alter system set archive_command = ''");
    place.cluster.reload();
    place
}

/// Kills the processes that `archive-push` has left to drain, as the end of a container does.
fn kill_drainers(place: &Archived) {
    kill_all(place, "drain-spool");
}

/// Kills the processes of this place that run a command; returns how many.
fn kill_all(place: &Archived, command: &str) -> usize {
    let mut killed = 0;
    let lab = place.lab.path().to_str().unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let words = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        let pid = entry.file_name().to_str().and_then(|pid| pid.parse().ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        if let Some(pid) = pid.filter(|_| words.contains(command) && words.contains(lab)) {
            let kill = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            killed += usize::from(kill.is_ok());
        }
    }
    killed
}

#[test]
fn killed_anywhere_pushers_and_drainers_lose_nothing() {
    let place = by_hand();
    let mut random = Random::new("killed at the spool");
    let names = place.segments(3);
    let bytes = contents(&place, &names);
    for round in 0..rounds(4) {
        away(&place);
        for name in &names {
            let path = place.cluster.wal(name);
            let pushing = place.highwater.spawn(&["archive-push", path.to_str().unwrap()]);
            let run = pushing.kill_after(Duration::from_millis(random.below(1_500)));
            if run.code() == 0 {
                place.fetch(name).0.done();
            }
            assert!(run.was_killed() || run.code() == 0, "{run}");
            place.highwater.push(&path).done();
        }
        back(&place);
        while held(&place) > 0 {
            kill_drainers(&place);
            let draining = place.highwater.spawn(&["spool", "--drain"]);
            let run = draining.kill_after(Duration::from_millis(random.below(400)));
            assert!(run.was_killed() || matches!(run.code(), 0 | 5), "{run}");
            for (name, bytes) in names.iter().zip(&bytes) {
                place.assert_gives_back(name, bytes);
            }
        }
        for name in &names {
            let [object] = &place.objects_of(name)[..] else { panic!("round {round}: {name}") };
            std::fs::remove_file(object).unwrap();
        }
    }
}

#[test]
fn what_differs_from_the_repository_is_put_aside_and_said() {
    let place = by_hand();
    let history =
        place.lab.write("00000002.history", b"1\t0/3000000\tno recovery target specified\n");
    away(&place);
    place.highwater.push(&history).done();
    place.lab.write("00000002.history", b"1\t0/4000000\tno recovery target specified\n");
    place.highwater.push(&history).ends_with(3);
    kill_drainers(&place);
    back(&place);
    let other = place.highwater.without_env("HIGHWATER_CONFIG");
    other.push(&history).done();
    let mut run = place.highwater.run(&["spool", "--drain"]);
    // The process that archive-push left may have been first; what is put aside stays told.
    passes_within(LIMIT, || {
        run = place.highwater.run(&["spool", "--drain"]);
        run.code() == 3
    });
    run.ends_with(3).says("PUT ASIDE").says("00000002.history");
    let kept = place.lab.path().join("stall/main/refused/00000002.history");
    assert!(kept.exists());
    let check = place.highwater.run(&["check", "--no-switch"]).ends_with(3);
    check.says("not in the repository");
    place.assert_gives_back("00000002.history", b"1\t0/4000000\tno recovery target specified\n");
}

#[test]
fn a_full_spool_leaves_wal_to_postgresql_and_nothing_is_let_go_by_default() {
    let settings = "stall_spool = \"STALL\"\nstall_spool_max = \"32MiB\"\ncompression = \"none\"";
    let place = archived(NEWEST, settings, Lab::highwater);
    away(&place);
    let names = place.segments(4);
    place.cluster.wait_archived(&names[0]);
    place.cluster.wait_until("select failed_count >= 2 from pg_stat_archiver", "t");
    assert_eq!(held(&place), 1, "the second of 16 MiB and what it needs is beyond the bound");
    let state = state(&place);
    assert_eq!(state["open_gaps"].as_array().map(Vec::len), Some(0), "{state}");
    assert!(state["waiting"]["files"].as_u64().unwrap() >= 3, "{state}");
    assert!(state["waiting"]["bytes"].as_u64().unwrap() >= 3 << 24, "{state}");
    back(&place);
    place.cluster.wake_archiver();
    for name in &names {
        place.cluster.wait_archived(name);
    }
    wait_for("it is drained", LIMIT, || held(&place) == 0);
    place.cluster.archive_now();
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
}

#[test]
fn the_last_of_a_disk_is_left_to_others() {
    let place = by_hand();
    let name = place.segments(1).remove(0);
    let stall = place.lab.path().join("stall");
    let Some(mut command) = on_small_disk(&stall, "\"$@\"") else {
        return not_run("stall::the_last_of_a_disk_is_left_to_others", NO_SMALL_DISK);
    };
    away(&place);
    place.highwater.settings_for(&mut command);
    command.arg(place.highwater.command().get_program());
    command.arg("archive-push").arg(place.cluster.wal(&name));
    let run = Running::start(command, "archive-push beside a spool on a small disk".into()).wait();
    run.ends_with(5).says("takes no more");
}

#[test]
fn wal_that_is_let_go_is_a_recorded_gap_that_a_backup_closes_by_itself() {
    for major in MAJORS {
        let place = archived(major, LET_GO, Lab::highwater);
        a_gap_is_recorded_and_closed(&place, |place| drop(away(place)), back);
    }
}

#[test]
fn wal_that_is_let_go_beside_a_way_to_s3_that_ends_is_a_recorded_gap_too() {
    for major in MAJORS {
        let (place, way) = archived_on_s3(major, LET_GO);
        let set = |weather| way.set(weather);
        a_gap_is_recorded_and_closed(&place, |_| set(Weather::Gone), |_| set(Weather::Fair));
    }
}

const LET_GO: &str = "wal_backlog_max = \"32MiB\"";

fn a_gap_is_recorded_and_closed(
    place: &Archived,
    away: impl Fn(&Archived),
    back: impl Fn(&Archived),
) {
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    // Where no connection is possible, the gap stays open.
    settings_file(&place.lab, "host=/nowhere", LET_GO);
    away(place);
    let names = place.segments(5);
    place.cluster.wait_archived(&names[2]);
    let log = place.cluster.log();
    assert!(log.contains("was LET GO"), "{log}");
    let let_go = || state(place)["open_gaps"].clone();
    assert_eq!(let_go().as_array().map(Vec::len), Some(1), "one stretch");
    back(place);
    place.cluster.wake_archiver();
    wait_for("the gap is recorded in the repository", LIMIT, || {
        place.highwater.info()["let_go"].as_array().is_some_and(|all| all.len() == 1)
    });
    for name in &names[4..] {
        place.cluster.wait_archived(name);
    }
    let id = assert_is_open(place);
    // Once is enough: what closes it must do so where nobody has acknowledged it.
    if place.cluster.major == NEWEST {
        place.highwater.run(&["verify", "--acknowledge", &id, "--reason", "known"]).done();
        place.highwater.run(&["verify"]).done();
    }
    settings_file(&place.lab, &place.cluster.dsn(), LET_GO);
    wait_for("a backup closes it", LIMIT, || {
        place.cluster.sql("select pg_switch_wal()");
        place.highwater.info()["let_go"][0]["closed_by"].is_string()
    });
    wait_for("this host knows", LIMIT, || let_go() == serde_json::json!([]));
    let info = place.highwater.info();
    let gap = parse(&info["let_go"][0]["end_lsn"]);
    assert!(parse(&info["recovery_window"]["earliest_lsn"]) >= gap, "{info}");
    let verified = place.highwater.run(&["verify"]).done();
    verified.says("was let go at").says("begins behind it");
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    place.assert_copy_equals("copy", &dump);
}

#[test]
fn killed_while_wal_is_let_go_whatever_was_acknowledged_is_stored_or_recorded() {
    let place = archived(NEWEST, LET_GO, Lab::highwater);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    // By hand, as the server calls it: that waits a minute before it starts an archiver again whose command was killed.
    place.cluster.sql("alter system set archive_command = ''");
    place.cluster.reload();
    let mut random = Random::new("killed while WAL is let go");
    away(&place);
    let names = place.segments(6);
    let push = |name: &str| {
        let mut command = place.highwater.command();
        command.current_dir(&place.cluster.pgdata);
        command.arg("archive-push").arg(format!("pg_wal/{name}"));
        Running::start(command, format!("archive-push {name}, in the data directory"))
    };
    for name in &names[..5] {
        for _ in 0..rounds(3) {
            let run = push(name).kill_after(Duration::from_millis(random.below(300)));
            assert!(run.was_killed() || run.code() == 0, "{run}");
            kill_drainers(&place);
        }
        push(name).wait().done().says("was LET GO");
        let status = place.cluster.pgdata.join("pg_wal/archive_status");
        std::fs::rename(status.join(format!("{name}.ready")), status.join(format!("{name}.done")))
            .unwrap();
    }
    push(&names[5]).wait().ends_with(5);
    let gaps = state(&place)["open_gaps"].clone();
    for name in &names[..5] {
        let number = |at: std::ops::Range<usize>| u64::from_str_radix(&name[at], 16).unwrap();
        let start = (number(8..16) << 32) + (number(16..24) << 24);
        let is_recorded = |gap: &serde_json::Value| {
            parse(&gap["start_lsn"]) <= start && start + (1 << 24) <= parse(&gap["end_lsn"])
        };
        assert!(gaps.as_array().unwrap().iter().any(is_recorded), "{name}: {gaps}");
    }
    back(&place);
    place.cluster.sql("alter system reset archive_command");
    place.cluster.reload();
    let mut looks = 0;
    wait_for("a backup closes each gap, and this host knows", 2 * LIMIT, || {
        looks += 1;
        if looks < 10 && random.below(2) == 0 {
            kill_drainers(&place);
        }
        // Each push leaves a process to drain where there is none.
        if looks % 10 == 0 {
            place.cluster.switch_wal();
        }
        state(&place)["open_gaps"] == serde_json::json!([])
    });
    let info = place.highwater.info();
    let told = info["let_go"].as_array().unwrap();
    assert!(!told.is_empty() && told.iter().all(|gap| gap["closed_by"].is_string()), "{info}");
    place.cluster.archive_now();
    place.highwater.run(&["verify"]).done().says("was let go at");
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    place.assert_copy_equals("copy", &dump);
}

fn parse(lsn: &serde_json::Value) -> u64 {
    let (high, low) = lsn.as_str().unwrap().split_once('/').unwrap();
    let part = |text: &str| u64::from_str_radix(text, 16).unwrap();
    part(high) << 32 | part(low)
}

/// An open gap is told by everybody. Returns the name of what `verify` finds.
#[track_caller]
fn assert_is_open(place: &Archived) -> String {
    let info = place.highwater.info();
    let gap = &info["let_go"][0];
    assert!(gap["closed_by"].is_null() && gap["why"].is_string(), "{info}");
    let why = &info["wal"][0]["gaps"][0]["why"];
    assert!(why.as_str().is_some_and(|why| why.contains("let go")), "{info}");
    let verified = place.highwater.run(&["--json", "verify"]).ends_with(4).json();
    let findings = verified["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 1, "{verified}");
    assert!(findings[0]["what"].as_str().unwrap().contains("let go"), "{verified}");
    assert!(findings[0]["remedy"].as_str().unwrap().contains("backup"), "{verified}");
    let pgdata = place.cluster.pgdata.to_str().unwrap();
    let check = place.highwater.run(&["check", "--no-switch", "--pgdata", pgdata]);
    check.ends_with(4).says("was let go");
    findings[0]["id"].as_str().unwrap().to_owned()
}

#[test]
fn the_guides_example_does_what_it_says() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("\n## ").find(|part| part.starts_with("14. When the store is away"));
    let chapter = chapter.expect("a chapter of this name");
    let toml = chapter.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
    assert!(toml.contains("/var/spool/highwater-stall"), "{toml}");
    let settings = toml.replace("/var/spool/highwater-stall", "STALL");
    let place = archived(NEWEST, &settings, Lab::highwater);
    away(&place);
    let name = place.segments(1).remove(0);
    place.cluster.wait_archived(&name);
    let commands: Vec<&str> =
        chapter.lines().filter(|line| line.starts_with("highwater ")).collect();
    assert!(commands.contains(&"highwater spool --drain"), "{commands:?}");
    place.highwater.run(&["spool"]).done().says("ON THIS HOST ONLY");
    back(&place);
    wait_for("it is drained by hand or by itself", LIMIT, || {
        commands.iter().all(|line| {
            let words: Vec<&str> = line.split_whitespace().skip(1).collect();
            place.highwater.run(&words).code() == 0
        })
    });
    assert_eq!(held(&place), 0);
    assert!(Path::new(&place.objects_of(&name)[0]).exists());
}

//! The main job on every major: archive, back up, lose the cluster, bring it
//! back as of a moment, and compare everything.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::harness::{
    Archived, Cluster, ClusterBuilder, MAJORS, NEWEST, Target, files_below, finish, flip_bit,
    remove_tree,
};

/// The story of the README, on one major version, with this backup.
pub(crate) fn the_main_job(major: u32, backup: &[&str]) {
    let mut place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
    place.highwater.run(&["check"]).done();
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    place.cluster.sql(
        "create table moved tablespace aside as select g n, md5(g::text) t \
         from generate_series(1, 20000) g; create index on moved (t) tablespace aside",
    );
    place.cluster.sql("create unlogged table fleeting as select generate_series(1, 1000) n");
    // The server is written to all through the backup.
    let mut writing = place.cluster.pgbench_in_background(&["-c", "2", "-t", "500"]);
    place.highwater.run(backup).done();
    assert!(writing.wait().unwrap().success());
    place.cluster.pgbench(&["-c", "2", "-t", "100"]);
    place.cluster.sql("update moved set t = 'changed' where n % 7 = 0");
    let wanted = content(&place.cluster, &TABLES);
    let moment = place.now();
    place.cluster.sql("drop table pgbench_accounts cascade");
    place.cluster.archive_now();

    let info = place.highwater.info();
    assert_eq!(info["backups"].as_array().unwrap().len(), 1, "{info}");
    assert_eq!(info["backups"][0]["usable"], true, "{info}");
    assert_eq!(info["wal"][0]["gaps"].as_array().unwrap().len(), 0, "{info}");
    let latest = info["recovery_window"]["latest_time"].as_str().unwrap();
    let latest: jiff::Timestamp = latest.parse().unwrap();
    assert!(latest > moment.parse().unwrap(), "{info}");
    assert_eq!(
        info["system_identifier"].to_string().trim_matches('"'),
        place.cluster.control("Database system identifier")
    );

    let origin = place.cluster.tablespace("aside");
    place.cluster.kill9();
    remove_tree(&place.cluster.pgdata);
    let aside = place.lab.directory("new-aside");
    let map = format!("{}={}", origin.display(), aside.display());
    let mut copy = place.restore("copy", &["--to-time", &moment, "--tablespace-map", &map]);
    assert_restored_as_backed_up(&copy);
    copy.start();
    copy.wait_until("select pg_get_wal_replay_pause_state()", "paused");
    // Replay stands before the commit of the drop, with the drop's lock on the table in hand.
    let unlocked = content(&copy, &TABLES[1..]);
    assert!(wanted.ends_with(&unlocked), "{unlocked} is not in {wanted}");
    copy.sql("select pg_wal_replay_resume()");
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(content(&copy, &TABLES), wanted);
    copy.amcheck();
    assert_eq!(copy.sql("select count(*) from fleeting"), "0");
    assert_eq!(
        copy.sql("select pg_tablespace_location(oid) from pg_tablespace where spcname = 'aside'"),
        aside.to_str().unwrap()
    );
    assert!(!files_below(&aside).is_empty());
    let checksums = copy.sql("select coalesce(sum(checksum_failures), 0) from pg_stat_database");
    assert_eq!(checksums, "0");
}

const STREAM: [&str; 2] = ["backup", "--fast"];

/// Every table that the story writes to; the first is dropped in it.
const TABLES: [&str; 4] = ["pgbench_accounts", "pgbench_tellers", "pgbench_history", "moved"];

/// Tables row for row.
fn content(cluster: &Cluster, tables: &[&str]) -> String {
    let digest = |table: &&str| {
        cluster.sql(&format!(
            "select '{table}', count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"
        ))
    };
    tables.iter().map(digest).collect::<Vec<_>>().join("\n")
}

/// Compares the directory with the server's own manifest of the backup. What
/// restore writes itself is left out: PostgreSQL's tool ignores the settings
/// and the signal file by default.
pub(crate) fn assert_restored_as_backed_up(copy: &Cluster) {
    let mut verify = copy.tool("pg_verifybackup");
    verify.args(["--no-parse-wal", "--ignore=tablespace_map"]).arg(&copy.pgdata);
    finish(verify);
}

/// One test for each major version, so that each is seen, run and fails by itself.
macro_rules! the_main_job_on {
    ($how:expr; $($test:ident: $major:expr;)*) => {
        $(#[test] fn $test() { $crate::backup_restore::the_main_job($major, &$how); })*
    };
}
pub(crate) use the_main_job_on;

the_main_job_on! {
    STREAM;
    a_lost_cluster_comes_back_on_postgresql_14: MAJORS[0];
    a_lost_cluster_comes_back_on_postgresql_15: MAJORS[1];
    a_lost_cluster_comes_back_on_postgresql_16: MAJORS[2];
    a_lost_cluster_comes_back_on_postgresql_17: MAJORS[3];
    a_lost_cluster_comes_back_on_postgresql_18: MAJORS[4];
}

#[test]
fn without_a_target_everything_archived_comes_back() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.pgbench(&["-t", "200"]);
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    place.cluster.kill9();
    place.assert_copy_equals("copy", &wanted);
}

#[test]
fn immediate_ends_at_the_backup_itself() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select 1 n");
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("insert into t values (2)");
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &["--to-immediate", "--target-action", "promote"]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from t"), "1");
}

#[test]
fn a_target_action_of_shutdown_stops_the_server_at_the_target() {
    let place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("select pg_create_restore_point('here')");
    place.cluster.archive_now();
    let arguments = [
        &Target::Name("here".into()).arguments()[..],
        &["--target-action".into(), "shutdown".into()],
    ]
    .concat();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let mut copy = place.restore("copy", &arguments);
    let log = match copy.try_start() {
        Ok(()) => copy.wait_for_end(),
        Err(log) => log,
    };
    assert!(log.contains("recovery stopping at restore point \"here\""), "{log}");
    assert!(log.contains("shutdown at recovery target"), "{log}");
}

#[test]
fn a_second_backup_stores_only_what_changed_and_restores_alone() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "5"]);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("update pgbench_accounts set filler = 'once' where aid < 100");
    place.cluster.sql("create table second_only as select 1 n");
    place.highwater.run(&["backup", "--fast"]).done();
    let info = place.highwater.info();
    let backups = info["backups"].as_array().unwrap();
    assert_eq!(backups.len(), 2);
    let stored = |n: usize| backups[n]["stored_bytes"].as_u64().unwrap();
    assert!(stored(1) * 4 < stored(0), "{} then {}", stored(0), stored(1));
    assert!(
        backups[1]["size_bytes"].as_u64().unwrap() >= backups[0]["size_bytes"].as_u64().unwrap()
    );
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &["--backup", backups[1]["id"].as_str().unwrap()]);
    assert_restored_as_backed_up(&copy);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.dump(), wanted);
    let mut first = place.restore("first", &["--backup", backups[0]["id"].as_str().unwrap()]);
    assert_restored_as_backed_up(&first);
    first.start();
    first.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(first.dump(), wanted, "an older backup reaches the same end");
}

#[test]
fn backups_over_tls_with_a_password_equal_those_over_the_socket() {
    let place = Archived::by_server_with(NEWEST, ClusterBuilder::loopback_tls);
    place.cluster.sql("create table t as select generate_series(1, 1000) n");
    let root = place.lab.path().join("tls/server.crt");
    let dsn = |password: &str| {
        format!(
            "host=localhost hostaddr=127.0.0.1 port={} user=scram password={password} \
             dbname=postgres sslmode=verify-full sslrootcert={}",
            place.cluster.port(),
            root.display()
        )
    };
    let with = |password: &str| place.highwater.with_env("HIGHWATER_DSN", &dsn(password));
    let run = with("wrong-word").run(&["backup", "--fast"]).ends_with(6);
    assert!(!run.stderr.contains("wrong-word") && !run.stdout.contains("wrong-word"), "{run}");
    with("s3cret").run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &[]);
    assert_restored_as_backed_up(&copy);
    // The certificate's path in the settings still holds, and the clone has its own socket.
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from t"), "1000");
}

#[test]
fn backups_with_a_password_and_without_checksums_restore() {
    let place = Archived::by_server_with(14, |b| b.loopback().without_checksums());
    place.cluster.sql("create table t as select generate_series(1, 1000) n");
    let port = place.cluster.port();
    let dsn = format!("postgresql://scram:s3cret@127.0.0.1:{port}/postgres?sslmode=disable");
    place.highwater.with_env("HIGHWATER_DSN", &dsn).run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &[]);
    assert_restored_as_backed_up(&copy);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from t"), "1000");
}

/// The archive alone serves anybody's base backup.
#[test]
fn a_copy_by_pg_basebackup_recovers_through_restore_command() {
    let place = Archived::by_server(NEWEST);
    let pgdata = place.lab.path().join("copy");
    let mut basebackup = place.cluster.client("pg_basebackup");
    basebackup.arg("-D").arg(&pgdata).args(["-X", "none", "-c", "fast", "--no-sync"]);
    finish(basebackup);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    place.lab.write("copy/recovery.signal", b"");
    let mut copy = Cluster::adopt(&place.lab, NEWEST, &pgdata);
    copy.set("archive_mode = off");
    copy.set(&format!("restore_command = '{}'", place.highwater.restore_command()));
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.dump(), wanted);
}

#[test]
fn a_page_with_a_bad_checksum_on_the_server_means_no_good_backup_in_silence() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 5000) n; checkpoint");
    let file = place.cluster.sql("select pg_relation_filepath('t')");
    place.cluster.fast_stop();
    flip_bit(&place.cluster.pgdata.join(&file), 8192 + 5000);
    place.cluster.start();
    let run = place.highwater.run(&["backup", "--fast"]);
    assert!(matches!(run.code(), 4 | 6), "{run}");
    run.says("checksum");
    assert_no_backup(&place);
}

#[test]
fn a_damaged_backup_is_not_restored_to_a_startable_directory() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 100000) n");
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    let repo = place.highwater.repo_directory();
    let pack =
        files_below(&repo).into_iter().find(|path| path.to_string_lossy().contains("/pack/"));
    let pack = repo.join(pack.expect("a backup has packs"));
    let length = usize::try_from(std::fs::metadata(&pack).unwrap().len()).unwrap();
    flip_bit(&pack, length / 2);
    let directory = place.lab.path().join("copy");
    let run = place.highwater.run(&["restore", "--pgdata", directory.to_str().unwrap()]);
    assert_eq!(run.code(), 4, "{run}");
    assert!(!directory.join("global/pg_control").exists(), "half a restore could start");
}

#[test]
fn a_server_without_archiving_gets_no_backup_that_claims_to_be_usable() {
    let place = Archived::by_hand(NEWEST, 16);
    let highwater = place.highwater.with_env("HIGHWATER_WAL_TIMEOUT", "3s");
    let run = highwater.run(&["backup", "--fast"]);
    assert_ne!(run.code(), 0, "{run}");
    assert_no_backup(&place);
}

#[test]
fn a_backup_whose_wal_does_not_arrive_is_not_recorded_and_leaves_nothing() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 1000) n");
    place.cluster.set("archive_command = '/bin/false'");
    place.cluster.reload();
    let highwater = place.highwater.with_env("HIGHWATER_WAL_TIMEOUT", "2s");
    let run = highwater.run(&["backup", "--fast"]).ends_with(4);
    run.says("the backup needs WAL from").says("pg_stat_archiver").says("wal_timeout");
    assert_no_backup(&place);
    // As soon as archiving works again, so does the backup.
    place.cluster.archive_into(&place.highwater);
    place.highwater.run(&["backup", "--fast"]).done();
    assert_eq!(place.highwater.info()["backups"][0]["usable"], true);
}

/// Neither a backup nor the remains of one.
#[track_caller]
pub(crate) fn assert_no_backup(place: &Archived) {
    let info = place.highwater.info();
    assert_eq!(info["backups"].as_array().unwrap().len(), 0, "{info}");
    assert_eq!(info["unfinished_backups"].as_array().unwrap().len(), 0, "{info}");
    assert!(info["recovery_window"].is_null(), "{info}");
    let stored = files_below(&place.highwater.repo_directory());
    let of_backups = |path: &&PathBuf| path.components().any(|part| part.as_os_str() == "backup");
    let left: Vec<_> = stored.iter().filter(of_backups).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The servers of a list, reached over their sockets.
pub(crate) fn hosts(servers: &[&Cluster]) -> String {
    let list = |of: &dyn Fn(&Cluster) -> String| {
        servers.iter().map(|server| of(server)).collect::<Vec<_>>().join(",")
    };
    let socket = |server: &Cluster| {
        let dsn = server.dsn();
        dsn.split_once("host=").unwrap().1.split(' ').next().unwrap().to_owned()
    };
    let (hosts, ports) = (list(&socket), list(&|server| server.port().to_string()));
    format!("host={hosts} port={ports} user=postgres dbname=postgres")
}

#[test]
fn a_standby_gives_the_backup_and_its_primary_ends_the_segment() {
    for major in [14, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.sql("create table t as select generate_series(1, 1000) n");
        let mut standby = place.cluster.standby("standby", &["archive_mode = on"]);
        place.cluster.sql("insert into t select generate_series(1001, 2000)");
        standby.wait_until("select count(*) from t", "2000");
        // A restartpoint, so that the backup begins behind the rows.
        place.cluster.sql("checkpoint");
        // The primary is idle from here on and has no archive_timeout.
        let dsn = hosts(&[&place.cluster, &standby]);
        let highwater = place.highwater.with_env("HIGHWATER_DSN", &dsn);
        highwater.run(&["backup", "--fast", "--prefer-standby"]).done();
        let info = place.highwater.info();
        assert_eq!(info["backups"][0]["taken_from"], "standby", "{info}");
        assert_eq!(info["backups"][0]["usable"], true, "{info}");
        let mut copy = place.restore("copy", &[]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.sql("select count(*), sum(n) from t"), "2000|2001000");
        copy.amcheck();
        // Without a standby, the primary serves.
        standby.fast_stop();
        highwater.run(&["backup", "--fast", "--prefer-standby"]).done();
        assert_eq!(place.highwater.info()["backups"][1]["taken_from"], "primary");
    }
}

/// Paths below a data directory with their modes; what restore writes itself and what
/// comes after the backup is left out.
pub(crate) fn shape(pgdata: &Path) -> BTreeMap<PathBuf, u32> {
    let own = ["recovery.signal", "tablespace_map", "postgresql.auto.conf", "backup_manifest"];
    let mut found = BTreeMap::new();
    let mut open = vec![pgdata.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            // Tablespaces are links: what they lead to counts.
            let about = std::fs::metadata(&path).unwrap();
            let name = path.strip_prefix(pgdata).unwrap().to_path_buf();
            if about.is_dir() {
                open.push(path);
            } else if own.iter().any(|own| name.as_os_str() == *own) {
                continue;
            }
            found.insert(name, about.permissions().mode());
        }
    }
    found
}

#[test]
fn majors_14_and_18_restore_to_the_tree_that_pg_basebackup_leaves() {
    let mut documents = Vec::new();
    for major in [14, NEWEST] {
        let place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
        place.cluster.sql("create table inside as select generate_series(1, 1000) n");
        place.cluster.sql("create table outside tablespace aside as select 1 n");
        place.cluster.sql("create unlogged table fleeting as select 1 n");
        place.highwater.run(&["backup", "--fast"]).done();
        let origin = place.cluster.tablespace("aside");
        let map = |to: &Path| format!("{}={}", origin.display(), to.display());
        let ours = place.lab.directory("ours");
        let copy = place.restore("copy", &["--tablespace-map", &map(&ours)]);
        let mut basebackup = place.cluster.client("pg_basebackup");
        let theirs = place.lab.path().join("theirs");
        basebackup.arg("-D").arg(&theirs).args(["-X", "none", "-c", "fast", "--no-sync"]);
        basebackup.arg("-T").arg(map(&place.lab.path().join("their-aside")));
        finish(basebackup);
        assert_eq!(shape(&copy.pgdata), shape(&theirs), "PostgreSQL {major}");

        let stored = files_below(&place.highwater.repo_directory());
        let named = |path: &&PathBuf| path.ends_with("committed.json");
        let path = place.highwater.repo_directory().join(stored.iter().find(named).unwrap());
        let document: serde_json::Value =
            serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let keys: Vec<String> = document.as_object().unwrap().keys().cloned().collect();
        documents.push((keys, document["tablespaces"].as_array().unwrap().len()));
    }
    assert_eq!(documents[0], documents[1], "the same document on both");
}

#[test]
fn backups_from_before_an_upgrade_stay_usable_and_restore() {
    let mut place = Archived::by_server(17);
    place.cluster.sql("create table t as select generate_series(1, 100) n");
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("insert into t values (101)");
    place.cluster.archive_now();
    let old = place.highwater.info()["backups"][0].clone();
    place.cluster.fast_stop();

    let upgraded = place.lab.cluster(18).named("upgraded").conf("archive_mode = on").start();
    let highwater = place.highwater.on(&upgraded);
    highwater.run(&["init"]).ends_with(3);
    highwater.run(&["init", "--successor"]).done();
    upgraded.archive_into(&highwater);
    highwater.run(&["backup", "--fast"]).done();

    let info = highwater.info();
    assert_eq!(info["backups"][0]["id"], old["id"], "{info}");
    assert!(!info["backups"][0]["system_identifier"].is_null(), "{info}");
    for backup in info["backups"].as_array().unwrap() {
        assert_eq!(backup["usable"], true, "{info}");
    }
    let mut copy = place.restore("copy", &["--backup", old["id"].as_str().unwrap()]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from t"), "101");
}

#[test]
fn a_tablespace_inside_the_data_directory_comes_back_in_its_place() {
    // 15 knows in-place tablespaces and leaves them out of every base backup, pg_basebackup's too.
    for major in [16, NEWEST] {
        let place = Archived::by_server_with(major, |builder| {
            builder.conf("allow_in_place_tablespaces = on").tablespace("aside")
        });
        place.cluster.sql("create tablespace inside location ''");
        place.cluster.sql("create table i tablespace inside as select generate_series(1, 500) n");
        place.cluster.sql("create table a tablespace aside as select generate_series(1, 300) n");
        place.highwater.run(&["backup", "--fast"]).done();
        place.cluster.archive_now();
        let (old, new) = (place.cluster.tablespace("aside"), place.lab.directory("new-aside"));
        let map = format!("{}={}", old.display(), new.display());
        let mut copy = place.restore("copy", &["--tablespace-map", &map]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(
            copy.sql("select (select count(*) from i), (select count(*) from a)"),
            "500|300"
        );
        copy.amcheck();
    }
}

#[test]
fn restore_warns_of_a_tablespace_that_replay_makes_where_the_origin_has_it() {
    let place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("select pg_create_restore_point('before_it')");
    let late = place.lab.directory("late");
    let location = late.to_str().unwrap().to_owned();
    place.cluster.sql(&format!("create tablespace late location '{location}'"));
    place.cluster.sql("create table in_late tablespace late as select generate_series(1, 1000) n");
    place.cluster.archive_now();
    let copy = place.lab.path().join("copy");
    let asked = ["restore", "--pgdata", copy.to_str().unwrap()];
    let dry = place.highwater.run(&[&asked[..], &["--dry-run", "--json"]].concat()).done().json();
    let made = dry["made_by_replay"].as_array().unwrap();
    assert_eq!(made.len(), 1, "{dry}");
    assert_eq!((&made[0]["location"], &made[0]["stands_here"]), (&location.into(), &true.into()));
    let oid = place.cluster.sql("select oid from pg_tablespace where spcname = 'late'");
    assert_eq!(made[0]["oid"].to_string(), oid);
    // Where it is not yet made, there is nothing to warn of.
    let dry_before = [&asked[..], &["--dry-run", "--json", "--to-name", "before_it"]].concat();
    let before = place.highwater.run(&dry_before).done().json();
    assert_eq!(before["made_by_replay"].as_array().unwrap().len(), 0, "{before}");
    let real = place.highwater.run(&asked).done();
    real.says("WARNING: replay makes tablespace").says("another host");
    // On a host that has no such directory, recovery would stop there: that is said as well.
    place.cluster.sql("drop table in_late");
    place.cluster.sql("drop tablespace late");
    std::fs::remove_dir(&late).unwrap();
    let other = place.lab.path().join("other");
    let asked = ["restore", "--pgdata", other.to_str().unwrap(), "--dry-run"];
    place.highwater.run(&asked).done().says("make that directory first");
}

#[test]
fn info_prints_every_field_of_its_contract() {
    let place = Archived::by_server(NEWEST);
    let annotated = ["backup", "--fast", "--annotate", "why=before the upgrade"];
    place.highwater.run(&annotated).done();
    place.cluster.sql("create table t as select 1 n");
    place.cluster.archive_now();
    let info = place.highwater.info();
    let text =
        |value: &serde_json::Value| value.as_str().unwrap_or_else(|| panic!("{info}")).to_owned();
    assert_eq!(info["cluster"], "main");
    assert_eq!(
        text(&info["postgres_version"]),
        place.cluster.sql("show server_version").split(' ').next().unwrap()
    );
    let backup = &info["backups"][0];
    assert_eq!(backup["annotations"]["why"], "before the upgrade");
    assert_eq!(backup["source"], "stream");
    assert_eq!(backup["timeline"], 1);
    assert!(backup["size_bytes"].as_u64() > backup["stored_bytes"].as_u64(), "{info}");
    assert!(backup["stored_bytes"].as_u64() > Some(0), "{info}");
    let window = &info["recovery_window"];
    let times = [
        &backup["started_at"],
        &backup["finished_at"],
        &window["earliest_time"],
        &window["latest_time"],
    ];
    for time in times {
        let time = text(time);
        assert!(time.ends_with('Z') && time.parse::<jiff::Timestamp>().is_ok(), "{time}");
    }
    let wal = &info["wal"][0];
    assert_eq!((&wal["timeline"], &window["timeline"]), (&1.into(), &1.into()));
    let lsn = |value: &serde_json::Value| {
        // PostgreSQL itself reads and compares them.
        place
            .cluster
            .sql(&format!("select pg_wal_lsn_diff('{}', '0/0')", text(value)))
            .parse::<u64>()
            .unwrap()
    };
    let in_order =
        [&wal["start_lsn"], &backup["start_lsn"], &backup["stop_lsn"], &window["latest_lsn"]];
    assert!(in_order.map(lsn).is_sorted(), "{info}");
    assert_eq!(wal["end_lsn"], window["latest_lsn"]);
    assert_eq!(window["earliest_lsn"], backup["stop_lsn"]);
}

#[test]
fn a_target_outside_the_window_is_refused_with_the_nearest_point_and_writes_nothing() {
    let place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    place.pass_earliest_time();
    place.cluster.sql("create table t as select 1 n");
    place.cluster.archive_now();
    let info = place.highwater.info();
    let text = |name: &str| info["recovery_window"][name].as_str().unwrap().to_owned();
    let inside = info["backups"][0]["start_lsn"].as_str().unwrap().to_owned();
    let cases = [
        ("--to-time", "2001-01-01 00:00:00+00", text("earliest_time")),
        // To the second: the nearest moment is just before the last commit.
        ("--to-time", "2099-01-01 00:00:00+00", text("latest_time")[..19].to_owned()),
        ("--to-lsn", "0/1000028", text("earliest_lsn")),
        ("--to-lsn", &inside, text("earliest_lsn")),
        ("--to-lsn", "7/28", "the last archived record".to_owned()),
    ];
    for (flag, target, nearest) in cases {
        let pgdata = place.lab.path().join("copy");
        let arguments = ["restore", "--pgdata", pgdata.to_str().unwrap(), flag, target];
        place.highwater.run(&arguments).ends_with(4).says(&nearest);
        assert!(!pgdata.exists(), "{flag} {target}");
    }
}

//! `restore --delta`: over the cluster's own files, damaged or grown old, with the result of a fresh one.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use crate::harness::{Archived, Cluster, MAJORS, NEWEST, files_below, finish};

/// Rows of a table, in one digest.
fn rows(cluster: &Cluster, table: &str) -> String {
    cluster.sql(&format!(
        "select count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"
    ))
}

/// Every name below a directory with kind, mode and owner, and the content of files; but for the settings, which have
/// the time of the restore in them.
fn tree(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![directory.to_owned()];
    while let Some(now) = left.pop() {
        for entry in fs::read_dir(now).unwrap() {
            let path = entry.unwrap().path();
            let facts = fs::symlink_metadata(&path).unwrap();
            if facts.is_dir() {
                left.push(path.clone());
            }
            let is_compared = facts.is_file() && !path.ends_with("postgresql.auto.conf");
            let content = is_compared.then(|| blake3::hash(&fs::read(&path).unwrap()));
            let name = path.strip_prefix(directory).unwrap().display();
            names.push(format!("{name} {:o} {} {content:?}", facts.mode(), facts.uid()));
        }
    }
    names.sort();
    names
}

/// Does to standing files what disks and people do.
fn spoil(pgdata: &Path, aside: &Path) {
    let tables: Vec<PathBuf> = files_below(&pgdata.join("base"))
        .into_iter()
        .map(|name| pgdata.join("base").join(name))
        .filter(|path| fs::metadata(path).unwrap().len() > 16_384)
        .collect();
    let edit = |path: &Path| fs::OpenOptions::new().write(true).open(path).unwrap();
    edit(&tables[0]).write_all_at(b"spoiled", 9000).unwrap();
    edit(&tables[1]).set_len(8192).unwrap();
    fs::remove_file(&tables[2]).unwrap();
    symlink(&tables[0], &tables[2]).unwrap();
    fs::remove_file(&tables[3]).unwrap();
    fs::set_permissions(&tables[4], fs::Permissions::from_mode(0o640)).unwrap();
    fs::hard_link(&tables[5], aside.join("linked")).unwrap();
    edit(&tables[5]).write_all_at(b"shared", 100).unwrap();
    fs::create_dir_all(pgdata.join("base/99999/deep")).unwrap();
    fs::write(pgdata.join("base/99999/deep/1"), "nobody's").unwrap();
    symlink(aside, pgdata.join("base/aside")).unwrap();
    fs::remove_dir_all(pgdata.join("pg_notify")).unwrap();
    fs::write(pgdata.join("pg_notify"), "no directory").unwrap();
    let owner = fs::metadata(pgdata).unwrap();
    for made in ["base/99999", "base/99999/deep", "base/99999/deep/1", "pg_notify"] {
        chown(pgdata.join(made), Some(owner.uid()), Some(owner.gid())).unwrap();
    }
}

fn a_cluster_goes_back_over_its_own_files(major: u32) {
    let mut place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
    place.cluster.pgbench(&["-i", "-q", "-s", "4"]);
    place.cluster.sql(
        "create table moved tablespace aside as select g n, md5(g::text) t \
         from generate_series(1, 20000) g",
    );
    place.cluster.sql("create table empty_pages as select g n from generate_series(1, 90000) g");
    place.cluster.sql("delete from empty_pages where n > 10");
    place.cluster.sql("vacuum empty_pages");
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.pgbench(&["-c", "2", "-t", "200"]);
    place.cluster.sql("update moved set t = 'changed' where n % 7 = 0");
    let wanted = ["pgbench_accounts", "pgbench_history", "moved"].map(|t| rows(&place.cluster, t));
    place.pass_earliest_time();
    let moment = place.now();
    place.cluster.sql("drop table pgbench_accounts cascade; create table after as select 1 n");
    place.cluster.archive_now();
    let pgdata = place.cluster.pgdata.clone();
    let directory = pgdata.to_str().unwrap().to_owned();
    let arguments = ["restore", "--delta", "--pgdata", &directory, "--to-time", &moment, "--json"];

    place.highwater.run(&arguments).ends_with(2).says("is running in");
    place.cluster.fast_stop();
    let outside = place.lab.directory("outside");
    spoil(&pgdata, &outside);
    let linked = fs::read(outside.join("linked")).unwrap();

    let mut dry = arguments.to_vec();
    dry.push("--dry-run");
    let before = tree(&pgdata);
    let plan = place.highwater.run(&dry).done().json();
    assert_eq!(tree(&pgdata), before, "a dry run changes nothing");
    let survey = &plan["survey"];
    assert!(
        survey["kept_bytes"].as_u64().unwrap() > plan["size_bytes"].as_u64().unwrap() / 10,
        "{plan}"
    );
    assert!(survey["removed"].as_u64().unwrap() >= 3, "{plan}");
    assert!(survey["changed_files"].as_u64().unwrap() >= 6, "{plan}");

    let done = place.highwater.run(&arguments).done().json();
    assert_eq!(done["kept_bytes"], survey["kept_bytes"], "{done}");
    assert_eq!(fs::read(outside.join("linked")).unwrap(), linked, "what has another name");

    // The same backup in an empty place, but for the tablespace's.
    let aside = place.lab.directory("fresh-aside");
    let origin = place.cluster.tablespace("aside");
    let map = format!("{}={}", origin.display(), aside.display());
    let fresh = place.restore("fresh", &["--to-time", &moment, "--tablespace-map", &map]);
    let same = |tree: Vec<String>| -> Vec<String> {
        // It names the tablespace's place.
        tree.into_iter().filter(|line| !line.starts_with("tablespace_map ")).collect()
    };
    assert_eq!(same(tree(&pgdata)), same(tree(&fresh.pgdata)));
    assert_eq!(tree(&origin), tree(&aside));
    let copy = &mut place.cluster;
    let mut verify = copy.tool("pg_verifybackup");
    verify.args(["--no-parse-wal", "--ignore=tablespace_map"]).arg(&copy.pgdata);
    finish(verify);

    copy.start();
    copy.wait_until("select pg_get_wal_replay_pause_state()", "paused");
    copy.sql("select pg_wal_replay_resume()");
    copy.wait_until("select pg_is_in_recovery()", "f");
    let found = ["pgbench_accounts", "pgbench_history", "moved"].map(|t| rows(copy, t));
    assert_eq!(found, wanted);
    copy.amcheck();
}

#[test]
fn a_cluster_goes_back_over_its_own_files_on_postgresql_14() {
    a_cluster_goes_back_over_its_own_files(MAJORS[0]);
}

#[test]
fn a_cluster_goes_back_over_its_own_files_on_postgresql_18() {
    a_cluster_goes_back_over_its_own_files(NEWEST);
}

#[test]
fn files_that_are_not_this_clusters_and_wal_that_is_nowhere_else_are_left_alone() {
    let mut place = Archived::by_server(NEWEST);
    place.highwater.run(&["backup", "--fast"]).done();
    let mut other = place.lab.cluster(NEWEST).named("other").start();
    other.fast_stop();
    let restore = |pgdata: &Path| {
        let pgdata = pgdata.to_str().unwrap();
        place.highwater.run(&["restore", "--delta", "--pgdata", pgdata])
    };
    let before = tree(&other.pgdata);
    restore(&other.pgdata).ends_with(3).says("system identifier");
    assert_eq!(tree(&other.pgdata), before);

    let nobodys = place.lab.directory("nobodys");
    place.lab.write("nobodys/file", b"precious");
    restore(&nobodys).ends_with(2).says("is not empty");
    assert_eq!(fs::read(nobodys.join("file")).unwrap(), b"precious");

    // The server dies, and its list says that a segment never came to the archive.
    place.cluster.sql("create table late as select g from generate_series(1, 100) g");
    let segment = place.cluster.archive_now();
    place.cluster.kill9();
    let done = place.cluster.pgdata.join(format!("pg_wal/archive_status/{segment}.done"));
    fs::rename(&done, done.with_extension("ready")).unwrap();
    restore(&place.cluster.pgdata).ends_with(2).says(&segment);
    assert!(place.cluster.wal(&segment).exists());
    fs::rename(done.with_extension("ready"), &done).unwrap();
    restore(&place.cluster.pgdata).done();
    let copy = &mut place.cluster;
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from late"), "100");
}

#[test]
fn a_restore_that_was_killed_half_way_cannot_be_started_and_is_gone_on_with() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "10"]);
    place.highwater.run(&["backup", "--fast"]).done();
    let wanted = rows(&place.cluster, "pgbench_accounts");
    place.cluster.archive_now();
    place.cluster.fast_stop();
    let pgdata = place.cluster.pgdata.clone();
    // Nearly all has to be brought.
    for name in files_below(&pgdata.join("base")) {
        let path = pgdata.join("base").join(name);
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(0).unwrap();
    }
    let arguments = ["restore", "--delta", "--jobs", "1", "--pgdata", pgdata.to_str().unwrap()];
    let running = place.highwater.spawn(&arguments);
    let control = pgdata.join("global/pg_control");
    let until = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while control.exists() {
        assert!(std::time::Instant::now() < until);
        std::thread::yield_now();
    }
    let killed = running.kill_after(std::time::Duration::from_millis(20));
    assert!(killed.was_killed(), "nobody writes 150 MB in that time");
    assert!(!control.exists());
    assert!(place.cluster.try_start().is_err());
    let plain = ["restore", "--pgdata", pgdata.to_str().unwrap()];
    place.highwater.run(&plain).ends_with(2).says("--delta");
    place.highwater.run(&arguments).done();
    let copy = &mut place.cluster;
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(rows(copy, "pgbench_accounts"), wanted);
}

//! `backup --source files`: the data directory read beside the server. What comes back is what the
//! stream would have brought, whatever the server does meanwhile.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use crate::backup_restore::{
    assert_no_backup, assert_restored_as_backed_up, hosts, shape, the_main_job_on,
};
use crate::harness::{
    Archived, ClusterBuilder, MAJORS, NEWEST, files_below, flip_bit, remove_tree, wait_for,
};

const FILES: [&str; 4] = ["backup", "--fast", "--source", "files"];

/// A backup of files that takes some seconds.
const SLOWLY: [&str; 6] = ["backup", "--fast", "--source", "files", "--max-rate", "4MB"];

/// How many sessions hold the server in backup mode, once its files are being read.
pub const IN_BACKUP: &str = "select count(*) from pg_stat_activity where application_name = 'highwater' \
     and (query = 'SELECT 1' or query like '%clock_timestamp%')";

the_main_job_on! {
    FILES;
    a_lost_cluster_comes_back_from_its_files_on_postgresql_14: MAJORS[0];
    a_lost_cluster_comes_back_from_its_files_on_postgresql_15: MAJORS[1];
    a_lost_cluster_comes_back_from_its_files_on_postgresql_16: MAJORS[2];
    a_lost_cluster_comes_back_from_its_files_on_postgresql_17: MAJORS[3];
    a_lost_cluster_comes_back_from_its_files_on_postgresql_18: MAJORS[4];
}

#[test]
fn the_files_and_the_stream_of_an_idle_server_restore_to_one_tree() {
    for major in [14, NEWEST] {
        let place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
        place.cluster.sql("create table inside as select generate_series(1, 1000) n");
        place.cluster.sql("create table outside tablespace aside as select 1 n");
        place.cluster.sql("create unlogged table fleeting as select 1 n");
        let pgdata = &place.cluster.pgdata;
        // What people leave in data directories, and what a server left that died.
        place.lab.write("pg/notes.txt", b"ours");
        place.lab.write("pg/backup_label.old", b"old");
        place.lab.write("pg/base/1/pgsql_tmp1.0", b"temporary");
        place.lab.write("pg/global/pg_internal.init.77", b"cache");
        symlink("/etc/hosts", pgdata.join("linked")).unwrap();
        let _socket = UnixListener::bind(pgdata.join("socket")).unwrap();
        let run = place.highwater.run(&FILES).done();
        for left_out in ["linked", "socket"] {
            let said = format!("{}` is left out", pgdata.join(left_out).display());
            assert!(run.stderr.contains(&said), "{run}");
        }
        place.highwater.run(&["backup", "--fast"]).done();
        let info = place.highwater.info();
        let restored = |n: usize| {
            let backup = &info["backups"][n];
            let aside = place.lab.directory(&format!("aside-{n}"));
            let origin = place.cluster.tablespace("aside");
            let map = format!("{}={}", origin.display(), aside.display());
            let id = backup["id"].as_str().unwrap();
            let copy = format!("copy-{n}");
            let copy = place.restore(&copy, &["--backup", id, "--tablespace-map", &map]);
            assert_restored_as_backed_up(&copy);
            (backup["source"].as_str().unwrap(), shape(&copy.pgdata))
        };
        let ((source, files), (_, stream)) = (restored(0), restored(1));
        assert_eq!(source, "files");
        assert!(files == stream, "PostgreSQL {major}:\n{files:?}\n{stream:?}");
    }
}

#[test]
fn tables_that_come_grow_shrink_and_go_during_the_backup_are_as_their_wal_says() {
    for major in [15, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
        let numbered = |n: u32| {
            format!("create table t{n} as select generate_series(1, 20000) n; vacuum t{n}")
        };
        for n in 0..20 {
            for statement in numbered(n).split("; ") {
                place.cluster.sql(statement);
            }
        }
        let mut backup = place.highwater.spawn(&SLOWLY);
        let mut turn = 0;
        while !backup.ended() {
            let n = turn % 20;
            place.cluster.sql(&format!("drop table if exists t{n}"));
            place
                .cluster
                .sql(&format!("insert into t{} select generate_series(1, 30000)", (n + 7) % 20));
            place.cluster.sql(&format!("delete from t{} where n > 100", (n + 13) % 20));
            place.cluster.sql(&format!("vacuum t{}", (n + 13) % 20));
            place.cluster.sql(&format!("truncate t{}", (n + 3) % 20));
            place
                .cluster
                .sql(&format!("create table t{n} as select generate_series(1, {}) n", turn * 100));
            turn += 1;
        }
        backup.wait().done();
        assert!(turn > 3, "the backup was over too soon to show anything");
        let wanted = place.cluster.dump();
        place.cluster.archive_now();
        let mut copy = place.restore("copy", &[]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.dump(), wanted);
        copy.amcheck();
    }
}

#[test]
fn a_standbys_files_make_a_backup_of_their_own() {
    for major in [14, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
        let standby = place.cluster.standby("standby", &["archive_mode = on"]);
        let mut writing = place.cluster.pgbench_in_background(&["-c", "2", "-t", "500"]);
        standby.wait_until("select count(*) > 10 from pgbench_history", "t");
        let dsn = hosts(&[&place.cluster, &standby]);
        let highwater = place.highwater.with_env("HIGHWATER_DSN", &dsn);
        let arguments = [&FILES[..], &["--prefer-standby"]].concat();
        highwater.run(&arguments).done();
        assert!(writing.wait().unwrap().success());
        let info = place.highwater.info();
        assert_eq!(info["backups"][0]["taken_from"], "standby", "{info}");
        assert_eq!(info["backups"][0]["source"], "files", "{info}");
        assert_eq!(info["backups"][0]["usable"], true, "{info}");
        let wanted = place.cluster.dump();
        place.cluster.archive_now();
        let mut copy = place.restore("copy", &[]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.dump(), wanted);
        copy.amcheck();
    }
}

#[test]
fn a_damaged_page_is_named_and_the_backup_says_so_for_ever() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 50000) n; checkpoint");
    let file = place.cluster.sql("select pg_relation_filepath('t')");
    place.cluster.fast_stop();
    for block in [3, 170] {
        flip_bit(&place.cluster.pgdata.join(&file), block * 8192 + 5000);
    }
    place.cluster.start();
    let run = place.highwater.run(&FILES).ends_with(4);
    run.says("2 pages fail their checksum")
        .says(&format!("{file}, block 3\n"))
        .says(&format!("{file}, block 170\n"));
    let info = place.highwater.info();
    let backup = &info["backups"][0];
    assert_eq!(backup["usable"], true, "{info}");
    assert_eq!(backup["damaged_pages"]["count"], 2, "{info}");
    assert_eq!(backup["damaged_pages"]["named"][1]["file"], *file, "{info}");
    assert_eq!(backup["damaged_pages"]["named"][1]["block"], 170, "{info}");
    place.highwater.run(&["info"]).done().says(&format!("{file}, block 170"));
    // The pages are there as they were: no better, and no worse.
    let copy = place.restore("copy", &[]);
    assert_restored_as_backed_up(&copy);
    let bytes = |pgdata: &Path| std::fs::read(pgdata.join(&file)).unwrap();
    assert!(bytes(&copy.pgdata) == bytes(&place.cluster.pgdata));
}

#[test]
fn a_data_directory_that_is_not_this_servers_is_refused() {
    let mut place = Archived::by_server(NEWEST);
    let pgdata = place.cluster.pgdata.clone();
    let named = |directory: &Path| {
        let directory = directory.to_str().unwrap();
        place.highwater.run(&[&FILES[..], &["--pgdata", directory]].concat())
    };
    let other = place.lab.cluster(NEWEST).named("other").start();
    named(&other.pgdata).ends_with(3).says("is not the data directory of the server");
    named(&place.lab.directory("empty")).ends_with(3).says("is not the data directory");
    named(&place.lab.path().join("nowhere")).ends_with(3).says("is not the data directory");
    assert_no_backup(&place);
    named(&pgdata).done();
    // A running copy has the same system identifier, the same settings and the same files.
    let twin = place.twin();
    let directory = twin.pgdata.to_str().unwrap();
    let run = place.highwater.run(&[&FILES[..], &["--pgdata", directory]].concat());
    run.ends_with(3).says("is not the data directory of the server");
}

#[test]
fn a_killed_backup_leaves_the_server_out_of_backup_mode() {
    for major in [14, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
        let running = place.highwater.spawn(&SLOWLY);
        place.cluster.wait_until(IN_BACKUP, "1");
        running.kill_after(Duration::ZERO);
        place.cluster.wait_until(IN_BACKUP, "0");
        let label = place.cluster.pgdata.join("backup_label");
        assert!(!label.exists(), "the server would not start from its own directory");
        place.highwater.run(&FILES).done();
        let info = place.highwater.info();
        assert_eq!(info["backups"].as_array().unwrap().len(), 1, "{info}");
        assert_eq!(info["unfinished_backups"].as_array().unwrap().len(), 1, "{info}");
    }
}

#[test]
fn a_lost_session_gives_the_backup_up() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    let running = place.highwater.spawn(&SLOWLY);
    place.cluster.wait_until(IN_BACKUP, "1");
    place.cluster.immediate_stop();
    let run = running.wait().ends_with(6);
    run.says("the session that held the server in backup mode was lost");
    place.cluster.start();
    assert_no_backup(&place);
}

#[test]
fn a_role_needs_the_two_functions_and_is_told_so() {
    for major in [14, NEWEST] {
        let place = Archived::by_server(major);
        place.cluster.sql("create role backups login replication");
        let dsn = place.cluster.dsn().replace("user=postgres", "user=backups");
        let highwater = place.highwater.with_env("HIGHWATER_DSN", &dsn);
        highwater.run(&FILES).ends_with(2).says("--pgdata DIR");
        let pgdata = place.cluster.pgdata.to_str().unwrap();
        let arguments = [&FILES[..], &["--pgdata", pgdata]].concat();
        let run = highwater.run(&arguments).ends_with(6).says("GRANT EXECUTE ON FUNCTION");
        assert_no_backup(&place);
        let said = run.stderr.split("GRANT EXECUTE ON FUNCTION ").nth(1).unwrap();
        let functions = said.split(" TO the role").next().unwrap();
        place.cluster.sql(&format!("grant execute on function {functions} to backups"));
        highwater.run(&arguments).done();
    }
}

#[test]
fn files_without_checksums_and_with_sha256_restore_as_they_were() {
    let place = Archived::by_server_with(14, ClusterBuilder::without_checksums);
    place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
    place.highwater.run(&[&FILES[..], &["--manifest-checksums", "sha256"]].concat()).done();
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &[]);
    let manifest = std::fs::read_to_string(copy.pgdata.join("backup_manifest")).unwrap();
    assert!(manifest.contains("\"SHA256\""));
    assert_restored_as_backed_up(&copy);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from pgbench_accounts"), "100000");
}

#[test]
fn backups_of_both_sources_reference_each_other() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "5"]);
    place.highwater.run(&FILES).done();
    place.highwater.run(&["backup", "--fast"]).done();
    place.highwater.run(&FILES).done();
    let info = place.highwater.info();
    let stored = |n: usize| info["backups"][n]["stored_bytes"].as_u64().unwrap();
    assert!(stored(1) * 5 < stored(0) && stored(2) * 5 < stored(0), "{info}");
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    let newest = info["backups"][2]["id"].as_str().unwrap().to_owned();
    let mut copy = place.restore("copy", &["--backup", &newest]);
    assert_restored_as_backed_up(&copy);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.dump(), wanted);
}

/// Waits until everything in the data directory was last changed so long ago that the next backup's
/// successor can take it as unchanged.
fn wait_until_settled(place: &Archived) {
    use std::os::unix::fs::MetadataExt;
    place.cluster.sql("checkpoint");
    let newest = || {
        let changed = |path| std::fs::metadata(place.cluster.pgdata.join("base").join(path));
        let times = files_below(&place.cluster.pgdata.join("base"));
        times.into_iter().filter_map(|path| Some(changed(path).ok()?.ctime())).max().unwrap()
    };
    wait_for("the files are old enough", Duration::from_mins(1), || {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
        i64::try_from(now).unwrap() > newest() + 6
    });
}

/// A backup of files as its report tells it.
fn reported(place: &Archived, more: &[&str]) -> serde_json::Value {
    place.highwater.run(&[&FILES[..], &["--json"], more].concat()).done().json()
}

#[test]
fn files_that_nobody_wrote_to_are_not_read_again() {
    for major in [14, NEWEST] {
        let place = Archived::by_server_with(major, |builder| builder.tablespace("aside"));
        place.cluster.pgbench(&["-i", "-q", "-s", "4"]);
        place
            .cluster
            .sql("create table kept tablespace aside as select generate_series(1, 90000) n");
        place.cluster.sql("create table written as select generate_series(1, 90000) n");
        place.cluster.sql("vacuum freeze analyze");
        wait_until_settled(&place);
        let unread = |report: &serde_json::Value| report["unread_bytes"].as_u64().unwrap();
        assert_eq!(unread(&reported(&place, &[])), 0, "there is nothing before it");
        place.cluster.sql("update written set n = 0 where n = 45000; checkpoint");
        let second = reported(&place, &[]);
        let size = second["size_bytes"].as_u64().unwrap();
        assert!(unread(&second) > size / 10 * 8, "{second}");
        assert!(unread(&second) < size, "what was written to is read: {second}");
        assert!(second["stored_bytes"].as_u64().unwrap() < size / 50, "{second}");
        // A third one, with a parent that did not read them either.
        let third = reported(&place, &[]);
        assert!(unread(&third) > size / 10 * 8, "{third}");
        assert_eq!(unread(&reported(&place, &["--rehash"])), 0);
        assert_eq!(unread(&reported(&place, &["--manifest-checksums", "sha256"])), 0);
        let wanted = place.cluster.dump();
        place.cluster.archive_now();
        let origin = place.cluster.tablespace("aside");
        for (n, report) in [second, third].iter().enumerate() {
            let aside = place.lab.directory(&format!("aside-{n}"));
            let map = format!("{}={}", origin.display(), aside.display());
            let id = report["id"].as_str().unwrap();
            let arguments = ["--backup", id, "--tablespace-map", &map];
            let mut copy = place.restore(&format!("copy-{n}"), &arguments);
            assert_restored_as_backed_up(&copy);
            copy.start();
            copy.wait_until("select pg_is_in_recovery()", "f");
            assert_eq!(
                copy.dump().replace(aside.to_str().unwrap(), origin.to_str().unwrap()),
                wanted
            );
            copy.amcheck();
        }
    }
}

#[test]
fn a_file_of_the_same_size_and_time_with_other_bytes_is_read() {
    let place = Archived::by_server(NEWEST);
    let notes = place.lab.write("pg/base/1/notes", b"one");
    wait_until_settled(&place);
    let time = std::fs::metadata(&notes).unwrap().modified().unwrap();
    reported(&place, &[]);
    std::fs::write(&notes, b"two").unwrap();
    std::fs::File::options().write(true).open(&notes).unwrap().set_modified(time).unwrap();
    assert!(reported(&place, &[])["unread_bytes"].as_u64().unwrap() > 0);
    let newest = place.highwater.info()["backups"][1]["id"].as_str().unwrap().to_owned();
    let copy = place.restore("copy", &["--backup", &newest]);
    assert_eq!(std::fs::read(copy.pgdata.join("base/1/notes")).unwrap(), b"two");
}

#[test]
fn a_file_with_a_damaged_page_is_read_and_named_by_every_backup() {
    let mut place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t as select generate_series(1, 50000) n; checkpoint");
    let file = place.cluster.sql("select pg_relation_filepath('t')");
    place.cluster.fast_stop();
    flip_bit(&place.cluster.pgdata.join(&file), 3 * 8192 + 5000);
    place.cluster.start();
    wait_until_settled(&place);
    for _ in 0..2 {
        place.highwater.run(&FILES).ends_with(4).says(&format!("{file}, block 3\n"));
    }
    let info = place.highwater.info();
    assert_eq!(info["backups"][1]["damaged_pages"]["count"], 1, "{info}");
}

#[test]
fn each_of_a_chain_of_backups_under_load_restores_alone_to_the_same_end() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "3"]);
    wait_until_settled(&place);
    for round in 0..10 {
        let mut writing = place.cluster.pgbench_in_background(&["-n", "-c", "2", "-t", "150"]);
        let source = if round == 4 { "stream" } else { "files" };
        place.highwater.run(&["backup", "--fast", "--source", source]).done();
        assert!(writing.wait().unwrap().success());
        place
            .cluster
            .sql(&format!("create table round{round} as select generate_series(1, 5000) n"));
    }
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    let info = place.highwater.info();
    let backups = info["backups"].as_array().unwrap();
    assert_eq!(backups.len(), 10);
    for (n, backup) in backups.iter().enumerate() {
        let id = backup["id"].as_str().unwrap();
        let mut copy = place.restore(&format!("copy-{n}"), &["--backup", id]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.dump(), wanted, "backup {n}");
        copy.amcheck();
        copy.fast_stop();
        remove_tree(&copy.pgdata);
    }
}

/// A cluster whose WAL is summarized.
fn summarizing() -> Archived {
    Archived::by_server_with(NEWEST, |builder| builder.conf("summarize_wal = on"))
}

#[test]
fn with_wal_summaries_only_what_changed_of_a_table_is_read() {
    let place = summarizing();
    place.cluster.pgbench(&["-i", "-q", "-s", "10"]);
    place.cluster.sql("vacuum freeze analyze");
    let first = reported(&place, &[]);
    assert_eq!(first["unread_bytes"], 0, "{first}");
    place.cluster.sql("update pgbench_accounts set abalance = 1 where aid % 20000 = 7");
    let second = reported(&place, &[]);
    let bytes = |report: &serde_json::Value, name: &str| report[name].as_u64().unwrap();
    let table = place.cluster.sql("select pg_relation_size('pgbench_accounts')");
    let table: u64 = table.parse().unwrap();
    assert!(bytes(&second, "unread_bytes") > table / 2, "{second}");
    assert!(bytes(&second, "stored_bytes") * 4 < bytes(&first, "stored_bytes"), "{second}");
    // Rows go, pages are cut off and written anew, the map of visible pages is cleared.
    place.cluster.sql("delete from pgbench_accounts where aid > 600000");
    place.cluster.sql("vacuum pgbench_accounts");
    let third = reported(&place, &[]);
    place.cluster.sql("insert into pgbench_accounts select g, 1, 2, 'again' from generate_series(600001, 900000) g");
    place.cluster.sql("update pgbench_accounts set abalance = 2 where aid % 1000 = 3");
    place.cluster.sql("create database copied template postgres strategy file_copy");
    let fourth = reported(&place, &[]);
    place.cluster.sql("vacuum full pgbench_tellers");
    place.cluster.sql("drop database copied");
    place.cluster.sql("create database copied template postgres strategy wal_log");
    let fifth = reported(&place, &[]);
    assert_eq!(reported(&place, &["--rehash"])["unread_bytes"], 0);
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    for (n, report) in [first, second, third, fourth, fifth].iter().enumerate() {
        let id = report["id"].as_str().unwrap();
        let mut copy = place.restore(&format!("copy-{n}"), &["--backup", id]);
        // PostgreSQL's tool computes the checksum of every byte, those too that were not read.
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.dump(), wanted, "backup {n}");
        copy.amcheck();
        copy.fast_stop();
    }
}

#[test]
fn a_chain_of_backups_with_wal_summaries_under_load_restores_at_each_point() {
    let place = summarizing();
    place.cluster.pgbench(&["-i", "-q", "-s", "5"]);
    let mut unread = 0;
    for round in 0..12 {
        let mut writing = place.cluster.pgbench_in_background(&["-n", "-c", "2", "-t", "200"]);
        let report = reported(&place, &[]);
        unread += report["unread_bytes"].as_u64().unwrap();
        assert!(writing.wait().unwrap().success());
        match round % 4 {
            0 => place.cluster.sql("delete from pgbench_history where random() < 0.5"),
            1 => place.cluster.sql("vacuum"),
            2 => place.cluster.sql("truncate pgbench_history"),
            _ => place.cluster.sql("reindex table pgbench_accounts"),
        };
    }
    assert!(unread > 100 << 20, "{unread}");
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    let info = place.highwater.info();
    for (n, backup) in info["backups"].as_array().unwrap().iter().enumerate() {
        let id = backup["id"].as_str().unwrap();
        let mut copy = place.restore(&format!("copy-{n}"), &["--backup", id]);
        assert_restored_as_backed_up(&copy);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        assert_eq!(copy.dump(), wanted, "backup {n}");
        copy.amcheck();
        copy.fast_stop();
        remove_tree(&copy.pgdata);
    }
}

#[test]
fn a_stopped_backup_of_files_leaves_nothing_and_the_server_as_it_was() {
    let place = Archived::by_server(NEWEST);
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    let running = place.highwater.spawn(&SLOWLY);
    place.cluster.wait_until(IN_BACKUP, "1");
    running.signal(rustix::process::Signal::TERM);
    running.wait().ends_with(143).says("was stopped by SIGTERM");
    place.cluster.wait_until(IN_BACKUP, "0");
    assert_no_backup(&place);
    place.highwater.run(&FILES).done();
}

//! What works ahead of the server or beside it, with the repository on an S3 server: the same content comes back.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use crate::harness::{Archived, NEWEST, Receiver, files_below, passes_within};

const FILES: [&str; 6] = ["backup", "--fast", "--source", "files", "--jobs", "2"];

/// A server with small segments, two backups of its files and WAL after each. Returns what it holds then.
fn written(place: &Archived) -> String {
    place.cluster.pgbench(&["-i", "-q", "-s", "4"]);
    place.highwater.run(&FILES).done();
    place.segments_with(20, 2000);
    let second = place.highwater.run(&[&FILES[..], &["--json"]].concat()).done().json();
    assert!(second["referenced_bytes"].as_u64().unwrap() > 10 << 20, "{second}");
    place.segments_with(20, 2000);
    place.cluster.archive_now();
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    place.cluster.dump()
}

#[test]
fn an_agent_archives_and_recovers_with_its_repository_on_s3() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster.segment_mib(1));
    let agent = Receiver::agent(&place.highwater, &place.cluster.pgdata, &[]);
    let dump = written(&place);
    let report = agent.terminate().done().json();
    assert!(report["answered"].as_u64().unwrap() >= 40, "{report}");

    let mut copy = place.restore("copy", &[]);
    let agent = Receiver::agent(&place.highwater, &copy.pgdata, &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == dump, "the copy differs");
    let report = agent.terminate().done().json();
    assert!(report["fetched_segments"].as_u64().unwrap() > 5, "{report}");
}

#[test]
fn the_commands_alone_work_ahead_with_the_repository_on_s3() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster.segment_mib(1));
    let dump = written(&place);
    let spool = place.cluster.pgdata.join("pg_wal/highwater.spool");
    assert!(spool.is_dir(), "nothing was pushed ahead");
    let mut copy = place.restore("copy", &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == dump, "the copy differs");
    let ahead = || copy.pgdata.join("pg_wal/highwater.spool").is_dir();
    assert!(passes_within(Duration::from_secs(5), ahead), "nothing was fetched ahead");
}

#[test]
fn files_that_were_spoiled_go_back_from_s3() {
    let place = Archived::by_server_on_s3(NEWEST, |cluster| cluster.segment_mib(1));
    let dump = written(&place);
    let mut copy = place.restore("copy", &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    copy.immediate_stop();
    let base = copy.pgdata.join("base");
    for name in files_below(&base) {
        let file = OpenOptions::new().write(true).open(base.join(name)).unwrap();
        if file.metadata().unwrap().len() > 100_000 {
            file.write_all_at(&[0xA5; 300], 70_000).unwrap();
        }
    }
    let pgdata = copy.pgdata.to_str().unwrap();
    let delta = ["restore", "--delta", "--pgdata", pgdata, "--json"];
    let told = place.highwater.run(&delta).done().json();
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == dump, "the copy differs: {told}");
    copy.amcheck();
}

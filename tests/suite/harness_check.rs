//! The harness itself must be right before anything is concluded from it.

use crate::harness::{
    EventKind, Lab, Ledger, MAJORS, NEWEST, Target, events_of, files_below, fingerprint, flip_bit,
    passes_within, wait_for,
};
use std::time::Duration;

#[test]
fn every_major_starts_answers_and_stops() {
    for major in MAJORS {
        let lab = Lab::open();
        let mut cluster = lab.cluster(major).tablespace("aside").start();
        let version: u32 = cluster.sql("show server_version_num").parse().unwrap();
        assert_eq!(version / 10_000, major);
        assert_eq!(cluster.sql("show data_checksums"), "on");
        cluster.sql("create table t tablespace aside as select generate_series(1, 1000) n");
        cluster.amcheck();
        cluster.fast_stop();
        assert_eq!(cluster.control("Database cluster state"), "shut down");
        cluster.start();
        assert_eq!(cluster.sql("select count(*) from t"), "1000");
    }
}

#[test]
fn a_killed_server_starts_again_with_what_was_committed() {
    let lab = Lab::open();
    let mut cluster = lab.cluster(NEWEST).start();
    cluster.sql("create table t as select generate_series(1, 10) n");
    cluster.kill9();
    cluster.start();
    assert_eq!(cluster.sql("select count(*) from t"), "10");
    assert!(cluster.log().contains("database system was not properly shut down"));
}

#[test]
fn a_server_that_cannot_start_gives_its_log() {
    let lab = Lab::open();
    let mut cluster = lab.cluster(NEWEST).conf("wal_level = nonsense").create();
    let log = cluster.try_start().unwrap_err();
    assert!(log.contains("wal_level"), "{log}");
}

#[test]
fn every_segment_size_is_made() {
    for mib in [1, 64] {
        let lab = Lab::open();
        let cluster = lab.cluster(NEWEST).segment_mib(mib).start();
        let name = cluster.switch_wal();
        let size = std::fs::metadata(cluster.wal(&name)).unwrap().len();
        assert_eq!(size, u64::from(mib) << 20);
    }
}

#[test]
fn a_standby_follows_and_is_promoted() {
    for major in [14, 18] {
        let lab = Lab::open();
        let primary = lab.cluster(major).start();
        let standby = primary.standby("standby", &[]);
        primary.sql("create table t as select 1 n");
        standby.wait_until("select count(*) from pg_class where relname = 't'", "1");
        standby.promote();
        standby.sql("insert into t values (2)");
        assert!(standby.switch_wal().starts_with("00000002"));
    }
}

#[test]
fn loopback_asks_for_a_password_and_tls_for_a_certificate() {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).loopback_tls().start();
    let connect = |settings: &str| {
        let dsn = format!(
            "host=localhost hostaddr=127.0.0.1 port={} user=scram dbname=postgres {settings}",
            cluster.port()
        );
        let mut psql = cluster.tool("psql");
        psql.args(["-XAtq", "-c", "select ssl from pg_stat_ssl where pid = pg_backend_pid()"]);
        let output = psql.arg("-d").arg(dsn).output().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    let root = lab.path().join("tls/server.crt");
    let verified = format!("sslmode=verify-full sslrootcert={}", root.display());
    assert_eq!(connect(&format!("password=s3cret {verified}")), (true, "t\n".into()));
    assert!(!connect(&format!("password=wrong {verified}")).0);
    assert!(!connect("password=s3cret sslmode=disable").0);
}

#[test]
fn the_ledger_and_pg_waldump_tell_the_same_story() {
    for major in MAJORS {
        let lab = Lab::open();
        let cluster = lab.cluster(major).start();
        Ledger::create(&cluster);
        let first = cluster.switch_wal();
        Ledger::write(&cluster, 4, 50);
        cluster.sql("select pg_create_restore_point('between the two')");
        Ledger::write(&cluster, 2, 10);
        let ledger = Ledger::read(&cluster);
        let events = events_of(&cluster, &first);
        let committed = Target::Lsn(u64::MAX).committed(&events, false);
        ledger.assert_copy_holds(&cluster, &committed, "the origin itself");

        let point = EventKind::RestorePoint { name: "between the two".into() };
        assert!(events.iter().any(|event| event.kind == point), "restore point on {major}");
        let before = Target::Name("between the two".into()).committed(&events, false);
        assert!(before.len() < committed.len() && before.len() > 100);
        let aborts = events.iter().filter(|e| matches!(e.kind, EventKind::Abort { .. })).count();
        assert!(aborts > 0 && ledger.len() + aborts >= 220, "{} {aborts}", ledger.len());
    }
}

#[test]
#[should_panic(expected = "the origin itself: missing")]
fn the_ledger_notices_one_missing_row() {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).start();
    Ledger::create(&cluster);
    let first = cluster.switch_wal();
    Ledger::write(&cluster, 1, 30);
    let ledger = Ledger::read(&cluster);
    cluster.sql("delete from ledger where number = (select min(number) from ledger)");
    let committed = Target::Lsn(u64::MAX).committed(&events_of(&cluster, &first), false);
    ledger.assert_copy_holds(&cluster, &committed, "the origin itself");
}

#[test]
#[should_panic(expected = "not within 50ms: the impossible")]
fn a_wait_without_success_fails_the_test() {
    wait_for("the impossible", Duration::from_millis(50), || false);
}

#[test]
fn a_lab_is_removed_with_everything_in_it() {
    let lab = Lab::open();
    let path = lab.path().to_path_buf();
    let cluster = lab.cluster(NEWEST).start();
    let pid = std::fs::read_to_string(cluster.pgdata.join("postmaster.pid")).unwrap();
    let process = std::path::PathBuf::from("/proc").join(pid.lines().next().unwrap());
    assert!(process.exists());
    drop((cluster, lab));
    assert!(!path.exists());
    assert!(passes_within(Duration::from_secs(10), || !process.exists()));
}

#[test]
fn a_flipped_bit_changes_one_fingerprint() {
    let lab = Lab::open();
    let directory = lab.directory("files");
    std::fs::create_dir(directory.join("inner")).unwrap();
    std::fs::write(directory.join("inner/a"), b"aaaa").unwrap();
    std::fs::write(directory.join("b"), b"bbbb").unwrap();
    assert_eq!(files_below(&directory), [std::path::Path::new("b"), "inner/a".as_ref()]);
    let before = fingerprint(&directory);
    flip_bit(&directory.join("inner/a"), 3);
    let after = fingerprint(&directory);
    assert_eq!(before.iter().filter(|(name, digest)| after[*name] != **digest).count(), 1);
}

//! What `receive` has to do with its slot, with WAL that is gone, and with a wrong server.

use crate::harness::{
    Archived, Cluster, Highwater, Lab, Load, MAJORS, NEWEST, Receiver, Weather, files_below,
    parse_lsn,
};

#[test]
fn the_slot_is_made_and_never_runs_ahead_of_what_is_stored() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 1);
        place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
        let slots = "select slot_name, slot_type, temporary from pg_replication_slots";
        assert_eq!(place.cluster.sql(slots), "");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        assert_eq!(place.cluster.sql(slots), "highwater_main|physical|f");
        receiver.wait_acknowledged(&place.cluster);
        let load = Load::on(&place.cluster);
        for _ in 0..15 {
            let kept = place.cluster.sql("select restart_lsn from pg_replication_slots");
            let info = place.highwater.info();
            let stored = info["wal"][0]["end_lsn"].as_str().unwrap();
            assert!(parse_lsn(&kept) <= parse_lsn(stored), "kept from {kept}, stored to {stored}");
        }
        drop(load);
        receiver.terminate().done();
        assert_eq!(place.cluster.sql(slots), "highwater_main|physical|f");
    }
}

/// A cluster that keeps hardly any WAL.
fn forgetful(major: u32) -> Archived {
    let lab = Lab::open();
    let highwater = lab.highwater();
    forgetful_into(lab, &highwater, major, &[])
}

fn forgetful_into(lab: Lab, highwater: &Highwater, major: u32, more: &[&str]) -> Archived {
    let mut builder = lab.cluster(major).segment_mib(1);
    let hardly = ["wal_keep_size = 0", "max_slot_wal_keep_size = 2MB", "min_wal_size = 2MB"];
    for line in hardly.iter().chain(more) {
        builder = builder.conf(line);
    }
    let cluster = builder.conf("max_wal_size = 4MB").start();
    let highwater = highwater.on(&cluster);
    highwater.run(&["init"]).done();
    Archived { cluster, highwater, lab }
}

/// Streams, writes while nobody streams until the server has removed some of it, streams again.
fn lose_wal(place: &Archived, arguments: &[&str]) -> Receiver {
    place.cluster.sql("create table t (n int)");
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, arguments);
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    let next = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    (0..20).for_each(|_| drop(place.cluster.switch_wal()));
    place.cluster.sql("checkpoint");
    let is_gone = format!("select count(*) from pg_ls_waldir() where name = '{next}'");
    place.cluster.wait_until(&is_gone, "0");
    Receiver::start(&place.highwater, arguments)
}

/// Fails unless the gap is said, `info` shows it, and a backup from behind it works.
fn assert_gap_is_told_and_left_behind(place: &Archived, receiver: Receiver) {
    receiver.wait_says("GAP: WAL from");
    receiver.wait_streaming(&place.cluster);
    place.cluster.switch_wal();
    receiver.wait_acknowledged(&place.cluster);
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(1), "{info}");
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.sql("insert into t values (1)");
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    let mut copy = place.restore("copy", &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select n from t"), "1");
}

#[test]
fn a_lost_slot_is_a_gap_that_is_told_and_left_behind() {
    for major in MAJORS {
        let place = forgetful(major);
        let receiver = lose_wal(&place, &[]);
        assert_gap_is_told_and_left_behind(&place, receiver);
        let slots = "select wal_status in ('reserved', 'extended') from pg_replication_slots";
        assert_eq!(place.cluster.sql(slots), "t", "the slot was made anew");
    }
}

#[test]
fn wal_removed_without_a_slot_is_a_gap_that_is_told_and_left_behind() {
    for major in MAJORS {
        let place = forgetful(major);
        let receiver = lose_wal(&place, &["--slot", "none"]);
        assert_gap_is_told_and_left_behind(&place, receiver);
        assert_eq!(place.cluster.sql("select count(*) from pg_replication_slots"), "0");
    }
}

#[test]
fn a_slot_lost_while_the_store_stands_still_leaves_a_gap_behind_all_that_was_read() {
    for major in MAJORS {
        let lab = Lab::open();
        let (highwater, way) = lab.highwater_on_s3_by_a_way();
        let place = forgetful_into(lab, &highwater, major, &[]);
        place.cluster.sql("create table t (n int)");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.cluster.switch_wal();
        let acknowledged = parse_lsn(&receiver.wait_acknowledged(&place.cluster));
        way.set(Weather::Still);
        let read = "select sent_lsn = pg_current_wal_lsn() from pg_stat_replication";
        place.cluster.sql("insert into t select generate_series(1, 20000)");
        place.cluster.wait_until(read, "t");
        place.cluster.sql("truncate t");
        (0..60).for_each(|_| drop(place.cluster.switch_wal()));
        place.cluster.sql("checkpoint");
        let lost = "select wal_status = 'lost' from pg_replication_slots";
        place.cluster.wait_until(lost, "t");
        way.set(Weather::Fair);
        assert_gap_is_told_and_left_behind(&place, receiver);
        // What it held is not in the gap.
        let info = place.highwater.info();
        let gap = parse_lsn(info["wal"][0]["gaps"][0]["start_lsn"].as_str().unwrap());
        assert!(gap > acknowledged + (1 << 20), "{info}");
    }
}

/// Fails unless `info`, its document and `verify` all tell of this one gap and `verify` ends so.
#[track_caller]
fn assert_gap_is_seen(place: &Archived, from: &str, to: &str) {
    let info = place.highwater.info();
    let gaps = info["wal"][0]["gaps"].as_array().unwrap();
    assert_eq!(gaps.len(), 1, "{info}");
    assert_eq!((&gaps[0]["start_lsn"], &gaps[0]["end_lsn"]), (&from.into(), &to.into()), "{info}");
    let told = place.highwater.run(&["info"]).done();
    assert!(told.stdout.contains(&format!("GAP from {from} to {to}\n")), "{told}");
    let verified = place.highwater.run(&["verify", "--json"]).ends_with(4).json();
    let findings = verified["findings"].as_array().unwrap();
    let is_it = |finding: &&serde_json::Value| finding["fault"] == "gap";
    let found: Vec<_> = findings.iter().filter(is_it).collect();
    assert_eq!(found.len(), 1, "{verified}");
    let text = found[0].to_string();
    assert!(text.contains(from) && text.contains(to), "{verified}");
    place.highwater.run(&["verify"]).ends_with(4).says(from).says(to);
}

/// Returns from where to where the receiver says that WAL is missing, which it says once.
fn gap_told(receiver: &Receiver) -> (String, String) {
    receiver.wait_says("GAP: WAL from");
    let log = receiver.log();
    let told: Vec<_> = log.split("GAP: WAL from ").skip(1).collect();
    assert_eq!(told.len(), 1, "{log}");
    let mut words = told[0].split_whitespace();
    let mut next = || words.next().unwrap().to_owned();
    let (from, _, to) = (next(), next(), next());
    (from, to)
}

/// Loses WAL behind a backup while nobody streams, goes on, and brings what was lost from where it was kept aside.
fn a_gap_is_seen_until_it_is_filled(major: u32, arguments: &[&str]) {
    let lab = Lab::open();
    let kept = lab.directory("kept");
    let keep = format!("archive_command = 'cp %p {}/%f'", kept.display());
    let highwater = lab.highwater();
    let place = forgetful_into(lab, &highwater, major, &["archive_mode = on", &keep]);
    let cluster = &place.cluster;
    cluster.sql("create table t (n int)");
    let receiver = Receiver::streaming(&place.highwater, cluster, arguments);
    place.highwater.run(&["backup", "--fast"]).done();
    cluster.sql("insert into t values (1)");
    receiver.wait_acknowledged(cluster);
    receiver.terminate().done();
    let next = cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    cluster.sql("insert into t values (2)");
    (0..20).for_each(|_| drop(cluster.switch_wal()));
    let last = cluster.switch_wal();
    let all_kept = format!("select last_archived_wal >= '{last}' from pg_stat_archiver");
    cluster.wait_until(&all_kept, "t");
    cluster.sql("checkpoint");
    let is_gone = format!("select count(*) from pg_ls_waldir() where name = '{next}'");
    cluster.wait_until(&is_gone, "0");

    let receiver = Receiver::start(&place.highwater, arguments);
    let (from, to) = gap_told(&receiver);
    receiver.wait_streaming(cluster);
    cluster.sql("insert into t values (3)");
    receiver.wait_acknowledged(cluster);
    assert_gap_is_seen(&place, &from, &to);

    let behind = cluster.sql(&format!("select pg_walfile_name('{to}'::pg_lsn + 1)"));
    let is_lost = |name: &String| name.len() == 24 && *name >= next && *name < behind;
    let names = files_below(&kept).into_iter();
    let names = names.map(|name| name.to_string_lossy().into_owned());
    let lost: Vec<_> = names.filter(is_lost).collect();
    assert!(lost.len() > 10, "{lost:?}");
    for name in &lost {
        place.highwater.push(&kept.join(name)).done();
    }
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
    place.highwater.run(&["info"]).done().says("no gaps");
    place.highwater.run(&["verify"]).done();
    for name in &lost {
        place.assert_gives_back(name, &std::fs::read(kept.join(name)).unwrap());
    }
    cluster.sql("insert into t values (4)");
    receiver.wait_acknowledged(cluster);
    receiver.terminate().done();
    let mut copy = place.restore("copy", &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select string_agg(n::text, ',' order by n) from t"), "1,2,3,4");
}

#[test]
fn the_gap_of_a_lost_slot_is_seen_until_archive_push_fills_it() {
    for major in [14, NEWEST] {
        a_gap_is_seen_until_it_is_filled(major, &[]);
    }
}

#[test]
fn the_gap_of_wal_removed_without_a_slot_is_seen_until_archive_push_fills_it() {
    a_gap_is_seen_until_it_is_filled(NEWEST, &["--slot", "none"]);
}

/// The binary, told of a server by an address that can be turned to another one.
fn by_the_front(lab: &Lab, highwater: &Highwater, name: &str) -> Highwater {
    let front = lab.path().join("front");
    std::fs::remove_file(&front).ok();
    let socket = lab.path().join(format!("{name}-socket"));
    std::os::unix::fs::symlink(socket, &front).unwrap();
    let dsn = format!("host={} port=5432 user=postgres dbname=postgres", front.display());
    highwater.with_env("HIGHWATER_DSN", &dsn)
}

#[test]
fn a_server_of_another_cluster_behind_the_same_address_is_refused() {
    let mut place = Archived::by_hand(NEWEST, 1);
    let other: Cluster = place.lab.cluster(NEWEST).named("other").segment_mib(1).start();
    let highwater = by_the_front(&place.lab, &place.highwater, "pg");
    let receiver = Receiver::streaming(&highwater, &place.cluster, &[]);
    receiver.wait_acknowledged(&place.cluster);
    place.cluster.fast_stop();
    let system_id = other.control("Database system identifier");
    let highwater = by_the_front(&place.lab, &place.highwater, "other");
    receiver.wait().ends_with(3).says(&system_id);
    Receiver::start(&highwater, &[]).wait().ends_with(3).says(&system_id);
    assert_eq!(other.sql("select count(*) from pg_replication_slots"), "0");
    let repo = place.highwater.repo_directory();
    let stored = files_below(&repo);
    let foreign = |path: &std::path::PathBuf| path.to_string_lossy().contains(&system_id);
    assert!(!stored.iter().any(foreign), "{stored:?}");
}

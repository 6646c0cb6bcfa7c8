//! What `receive` stores is enough: for backups without `archive_command`, for restores, and for a
//! standby that has nothing but the repository.

use crate::harness::{
    Archived, EventKind, Load, MAJORS, NEWEST, Receiver, Target, events_in, wait_for,
};
use std::time::Duration;

#[test]
fn a_backup_without_archive_command_is_restored_with_what_was_streamed() {
    for major in MAJORS {
        let place = Archived::by_hand(major, 16);
        assert_eq!(place.cluster.sql("show archive_mode"), "off");
        place.cluster.pgbench(&["-i", "-q", "-s", "1"]);
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        let load = Load::on(&place.cluster);
        place.highwater.run(&["backup", "--fast"]).done();
        assert_eq!(place.highwater.info()["backups"][0]["usable"], true);
        drop(load);
        place.cluster.wait_until(
            "select count(*) from pg_stat_activity where application_name = 'pgbench'",
            "0",
        );
        place.cluster.sql("create table last as select 1 n");
        let dump = place.cluster.dump();
        receiver.wait_acknowledged(&place.cluster);
        receiver.terminate().done();
        place.assert_copy_equals("copy", &dump);
    }
}

#[test]
fn a_standby_that_has_only_the_repository_follows_within_seconds() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 16);
        place.cluster.sql("create table t as select 0 n");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
        place.highwater.run(&["backup", "--fast"]).done();
        let mut standby = place.restore("follower", &["--standby"]);
        // How often it asks, which is every five seconds by default.
        standby.set("wal_retrieve_retry_interval = '1s'");
        standby.start();
        let segment = || place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
        let before = segment();
        for count in 2..5 {
            place.cluster.sql("insert into t values (1)");
            let wanted = count.to_string();
            let seen = || standby.try_sql("select count(*) from t").is_ok_and(|n| n == wanted);
            wait_for("the row is seen on the standby", Duration::from_secs(15), seen);
        }
        assert_eq!(segment(), before, "no segment may have been completed");
        assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
        receiver.terminate().done();
    }
}

/// Each row is the transaction that wrote it.
const OWN_XID: &str = "insert into t select pg_current_xact_id()::text::bigint";

#[test]
fn each_kind_of_target_is_exact_in_a_segment_that_is_stored_in_pieces() {
    for major in [14, NEWEST] {
        let place = Archived::by_hand(major, 16);
        place.cluster.sql("create table t (xid bigint)");
        let receiver = Receiver::streaming(&place.highwater, &place.cluster, &["--rpo", "20ms"]);
        place.highwater.run(&["backup", "--fast"]).done();
        place.pass_earliest_time();
        for _ in 0..6 {
            place.cluster.sql(OWN_XID);
            receiver.wait_acknowledged(&place.cluster);
        }
        let segment = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
        receiver.terminate().done();
        let objects = place.wal_objects();
        assert!(objects.iter().all(|(name, _)| *name != segment), "{segment} is whole");
        // Under its own name, by which pg_waldump knows what it reads.
        let fetched = place.lab.directory("fetched").join(&segment);
        place.highwater.get(&segment, &fetched).done();
        let rows = place.cluster.sql("select string_agg(xid::text, ' ' order by xid) from t");
        let events = events_in(&place.cluster, &fetched);
        let is_row = |xid: u32| rows.split(' ').any(|row| row == xid.to_string());
        let is_ours = |kind: &EventKind| matches!(kind, EventKind::Commit { xid } if is_row(*xid));
        let ours: Vec<_> = events.iter().filter(|event| is_ours(&event.kind)).collect();
        assert_eq!(ours.len(), 6, "they are not all in {segment}: {events:?}");

        let latest = place.highwater.info()["recovery_window"]["latest_time"].clone();
        let latest: jiff::Timestamp = latest.as_str().unwrap().parse().unwrap();
        assert_eq!(latest.as_microsecond(), events.last().unwrap().time);

        let EventKind::Commit { xid } = ours[4].kind else { unreachable!("only commits are ours") };
        let targets = [Target::Time(ours[2].time), Target::Lsn(ours[3].lsn), Target::Xid(xid)];
        for (n, target) in targets.iter().enumerate() {
            let wanted = target.committed(&events, false).into_iter().filter(|xid| is_row(*xid));
            let wanted: Vec<_> = wanted.map(|xid| xid.to_string()).collect();
            assert_eq!(wanted.len(), n + 3, "{target:?}");
            let mut arguments = target.arguments();
            arguments.extend(["--target-action".into(), "promote".into()]);
            let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
            let mut copy = place.restore(&format!("copy{n}"), &arguments);
            copy.start();
            copy.wait_until("select pg_is_in_recovery()", "f");
            let got = copy.sql("select string_agg(xid::text, ' ' order by xid) from t");
            assert_eq!(got, wanted.join(" "), "{target:?}");
        }
    }
}

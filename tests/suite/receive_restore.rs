//! What `receive` stores is enough: for backups without `archive_command`, for restores, and for a
//! standby that has nothing but the repository.

use crate::harness::{Archived, Load, MAJORS, NEWEST, Receiver, wait_for};
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

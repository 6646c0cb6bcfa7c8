//! Schedules that several see: two agents of one cluster, and two repositories of one agent.

use crate::harness::{Archived, Highwater, NEWEST, Receiver, passes_within};
use crate::two_repos::{Away, Two, beside};
use std::time::Duration;

/// Within this an agent has run whatever a test waits for.
const LIMIT: Duration = Duration::from_mins(3);

fn backups(highwater: &Highwater) -> Vec<String> {
    let info = highwater.info();
    let backups = info["backups"].as_array().unwrap().iter();
    backups.map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

/// Waits until the agent has run this so often.
#[track_caller]
fn wait_runs(agent: &Receiver, end: &str, count: usize) {
    let came = passes_within(LIMIT, || agent.log().matches(end).count() >= count);
    assert!(came, "not {count} times {end:?}:\n{}", agent.log());
}

const BACKUP_BEGINS: &str = "`backup` is due and begins";
const EXPIRED: &str = "`expire` has ended well";
const VERIFIED: &str = "`verify --deep` has ended well";

#[test]
fn of_two_agents_of_one_cluster_one_takes_the_backup_and_the_other_can() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    let standby = place.cluster.standby("standby", &[]);
    standby.wait_until("select pg_is_in_recovery()", "t");
    let daily = place
        .highwater
        .with_env("HIGHWATER_BACKUP_EVERY", "1d")
        .with_env("HIGHWATER_BACKUP_ON_STANDBY", "on")
        .with_env("HIGHWATER_EXPIRE_EVERY", "10s")
        .with_env("HIGHWATER_RETAIN_BACKUPS", "2");
    let primarys = Receiver::agent(&daily, &place.cluster.pgdata, &[]);
    // From its first object on a backup that somebody is taking counts.
    let begun = passes_within(LIMIT, || {
        let info = daily.info();
        let any = |field: &str| !info[field].as_array().unwrap().is_empty();
        any("unfinished_backups") || any("backups")
    });
    assert!(begun, "{}", primarys.log());
    let standbys = Receiver::agent(&daily.on(&standby), &standby.pgdata, &[]);
    // Each has looked what is due more often than it would need to: `expire` leaves nothing on record, by which one
    // would spare it the other.
    wait_runs(&standbys, EXPIRED, 2);
    wait_runs(&primarys, EXPIRED, 2);
    assert!(!standbys.log().contains(BACKUP_BEGINS), "{}", standbys.log());
    assert_eq!(primarys.log().matches(BACKUP_BEGINS).count(), 1, "{}", primarys.log());
    assert_eq!(backups(&daily).len(), 1);
    standbys.terminate().done();
    // The primary's host is lost; what it would have done comes from the other, once it is due.
    primarys.kill9();
    let often = daily.with_env("HIGHWATER_BACKUP_EVERY", "10s").on(&standby);
    let standbys = Receiver::agent(&often, &standby.pgdata, &[]);
    let taken = passes_within(LIMIT, || {
        // A standby's backup waits for WAL that only its primary can switch.
        let _ = place.cluster.try_sql("select pg_switch_wal()");
        backups(&often).len() > 1
    });
    assert!(taken, "{}", standbys.log());
    standbys.terminate().done();
}

#[test]
fn of_two_repositories_the_newest_backup_in_either_counts() {
    let two = Two::new(NEWEST, beside);
    let both = two
        .place
        .highwater
        .with_env("HIGHWATER_BACKUP_EVERY", "1d")
        .with_env("HIGHWATER_VERIFY_EVERY", "10s")
        .with_env("HIGHWATER_EXPIRE_EVERY", "1d")
        .with_env("HIGHWATER_REPO_RETRY_DEADLINE", "2s")
        .with_env("HIGHWATER_SECOND_REPO_RETRY_DEADLINE", "2s")
        .with_env("HIGHWATER_RETAIN_BACKUPS", "2")
        .with_env("HIGHWATER_SECOND_RETAIN_BACKUPS", "2");
    let pgdata = &two.place.cluster.pgdata;
    let agent = Receiver::agent(&both, pgdata, &[]);
    wait_runs(&agent, VERIFIED, 2);
    agent.wait_says("`backup` has ended well");
    agent.wait_says("`expire` has ended well");
    let made = backups(&two.first);
    assert_eq!((made.len(), &made), (1, &backups(&two.second)));
    for repo in [&two.first, &two.second] {
        assert!(!repo.info()["verification"].is_null(), "each is verified");
    }
    agent.terminate().done();
    // Another agent, and one of them is away: what the other has still counts.
    let away = Away::new(&two.second);
    let agent = Receiver::agent(&both, pgdata, &[]);
    wait_runs(&agent, "`verify --deep` has failed", 1);
    assert!(!agent.log().contains(BACKUP_BEGINS), "{}", agent.log());
    agent.terminate().done();
    drop(away);
    // One that is due is taken into the repository that is there.
    let away = Away::new(&two.first);
    let agent = Receiver::agent(&both.with_env("HIGHWATER_BACKUP_EVERY", "10s"), pgdata, &[]);
    let taken = passes_within(LIMIT, || backups(&two.second).len() > 1);
    assert!(taken, "{}", agent.log());
    agent.terminate().done();
    drop(away);
    assert_eq!(backups(&two.first), made);
}

//! WAL streamed into two repositories: neither being away holds up the other, and each has all of it in the end.

use crate::harness::{
    Archived, Cluster, Highwater, Lab, Load, NEWEST, Receiver, Statement, WAITING_COMMITS,
    parse_lsn, passes_within,
};
use crate::two_repos::{Away, beside};
use std::path::Path;
use std::time::Duration;

const FIRST: &str = "highwater";
const SECOND: &str = "highwater_second";

/// Whatever is waited for comes within this: the longest pause of a receiver is 15 s.
const LIMIT: Duration = Duration::from_secs(90);

/// A server that archives nothing by itself, and two repositories that are claimed for it.
struct Streamed {
    place: Archived,
    first: Highwater,
    second: Highwater,
}

impl Streamed {
    fn new(major: u32, segment_mib: u32, settings: &[&str]) -> Self {
        let lab = Lab::open();
        let mut cluster = lab.cluster(major).segment_mib(segment_mib);
        for line in settings {
            cluster = cluster.conf(line);
        }
        let cluster = cluster.start();
        let (first, second) = (lab.highwater().on(&cluster), beside(&lab).on(&cluster));
        let highwater = first.with_second(&second);
        highwater.run(&["init"]).done();
        Self { place: Archived { cluster, highwater, lab }, first, second }
    }

    fn cluster(&self) -> &Cluster {
        &self.place.cluster
    }

    fn wait_streaming(&self, receiver: &Receiver, name: &str) {
        let query = format!(
            "select count(*) > 0 from pg_stat_replication where application_name = '{name}' and state = 'streaming'"
        );
        let streams = passes_within(LIMIT, || self.cluster().try_sql(&query).as_deref() == Ok("t"));
        assert!(streams, "{name} does not stream:\n{}", receiver.log());
    }

    fn flushed(&self, name: &str) -> u64 {
        let query = format!(
            "select coalesce(max(flush_lsn), '0/0') from pg_stat_replication where application_name = '{name}'"
        );
        parse_lsn(&self.cluster().sql(&query))
    }

    /// Waits until the stream of this name has stored all that is flushed now; returns its end.
    #[track_caller]
    fn wait_stored(&self, receiver: &Receiver, name: &str) -> u64 {
        let lsn = parse_lsn(&self.cluster().sql("select pg_current_wal_flush_lsn()"));
        let stored = passes_within(LIMIT, || self.flushed(name) >= lsn);
        assert!(stored, "{name} has not stored {lsn:X}:\n{}", receiver.log());
        lsn
    }

    /// While the repository of `stands` is away, the stream into the other goes on; then that one follows.
    #[track_caller]
    fn outlive(&self, away: &Highwater, stands: (&Receiver, &str), goes_on: (&Receiver, &str)) {
        let away = Away::new(away);
        let before = parse_lsn(&self.cluster().sql("select pg_current_wal_flush_lsn()"));
        let mut at = before;
        for _ in 0..3 {
            self.place.segments(2);
            let stored = self.wait_stored(goes_on.0, goes_on.1);
            assert!(stored > at, "nothing was written");
            at = stored;
        }
        // What the server wrote by itself before the directory was gone may be stored.
        assert!(self.flushed(stands.1) <= before, "acknowledged without a repository");
        drop(away);
        self.wait_stored(stands.0, stands.1);
    }

    /// Restores from each alone, and compares with what the server holds now.
    fn assert_each_holds_all(&mut self) {
        let dump = self.place.cluster.dump();
        for which in ["first", "second"] {
            let pgdata = self.place.lab.path().join(format!("from-{which}"));
            let pgdata = pgdata.to_str().unwrap();
            self.place.highwater.run(&["--only", which, "restore", "--pgdata", pgdata]).done();
            let mut copy =
                Cluster::adopt(&self.place.lab, self.place.cluster.major, Path::new(pgdata));
            copy.start();
            copy.wait_until("select pg_is_in_recovery()", "f");
            assert!(copy.dump() == dump, "{which}: another content came back");
        }
        self.place.highwater.run(&["verify", "--deep"]).done();
    }
}

fn slots(cluster: &Cluster) -> String {
    cluster.sql("select string_agg(slot_name || case when active then '' else ' idle' end, ' ' order by slot_name) from pg_replication_slots")
}

#[test]
fn two_receivers_each_outlive_the_others_repository() {
    for major in [14, NEWEST] {
        let mut streamed = Streamed::new(major, 1, &[]);
        let start = |which| Receiver::start(&streamed.place.highwater, &["--only", which]);
        let (first, second) = (start("first"), start("second"));
        streamed.wait_streaming(&first, FIRST);
        streamed.wait_streaming(&second, SECOND);
        assert_eq!(slots(streamed.cluster()), "highwater_main highwater_main_second");
        streamed.place.highwater.run(&["backup", "--fast"]).done();
        let load = Load::on(streamed.cluster());
        streamed.outlive(&streamed.second, (&second, SECOND), (&first, FIRST));
        streamed.outlive(&streamed.first, (&first, FIRST), (&second, SECOND));
        drop(load);
        streamed.wait_stored(&first, FIRST);
        streamed.wait_stored(&second, SECOND);
        first.terminate().done();
        second.terminate().done();
        streamed.assert_each_holds_all();
    }
}

#[test]
fn one_receiver_streams_into_both_and_outlives_each() {
    for major in [14, NEWEST] {
        let mut streamed = Streamed::new(major, 1, &["archive_mode = off"]);
        let receiver = Receiver::start(&streamed.place.highwater, &[]);
        streamed.wait_streaming(&receiver, FIRST);
        streamed.wait_streaming(&receiver, SECOND);
        assert_eq!(slots(streamed.cluster()), "highwater_main highwater_main_second");
        let checked = streamed.place.highwater.run(&["check"]).done();
        for slot in ["`highwater_main`: reserved", "`highwater_main_second`: reserved"] {
            assert!(checked.stdout.contains(slot), "{checked}");
        }
        streamed.place.highwater.run(&["backup", "--fast"]).done();
        let load = Load::on(streamed.cluster());
        streamed.outlive(&streamed.second, (&receiver, SECOND), (&receiver, FIRST));
        // The backup is taken where its WAL comes.
        let away = Away::new(&streamed.first);
        let hasty = streamed.place.highwater.with_retries(1);
        let made = hasty.run(&["--json", "backup", "--fast"]).done().json();
        assert_eq!(made["second_copy"]["taken_into"], "second", "{made}");
        drop(away);
        streamed.outlive(&streamed.first, (&receiver, FIRST), (&receiver, SECOND));
        drop(load);
        streamed.wait_stored(&receiver, FIRST);
        streamed.wait_stored(&receiver, SECOND);
        receiver.terminate().done().says("second");
        streamed.place.highwater.run(&["copy", "--all", "--wal"]).done();
        streamed.assert_each_holds_all();
    }
}

#[test]
fn a_slot_may_be_named_for_the_second_alone_and_each_has_its_own_where_one_is_set() {
    let streamed = Streamed::new(NEWEST, 1, &[]);
    let both = &streamed.place.highwater;
    let second = Receiver::start(both, &["--only", "second", "--slot", "mine"]);
    streamed.wait_streaming(&second, SECOND);
    assert_eq!(slots(streamed.cluster()), "mine");
    second.terminate().done();
    let named = both.with_env("HIGHWATER_SLOT", "named").with_env("PGAPPNAME", "archive");
    let receiver = Receiver::start(&named, &[]);
    streamed.wait_streaming(&receiver, "archive");
    streamed.wait_streaming(&receiver, "archive_second");
    assert_eq!(slots(streamed.cluster()), "mine idle named named_second");
    receiver.terminate().done();
}

fn insert(cluster: &Cluster, n: u32) -> Statement {
    Statement::begin(cluster, &format!("insert into t values ({n})"))
}

#[test]
fn commits_wait_for_one_or_for_both_as_the_server_is_told() {
    for major in [14, NEWEST] {
        let streamed = Streamed::new(major, 1, &[]);
        let cluster = streamed.cluster();
        cluster.sql("create table t (n int)");
        let receiver =
            Receiver::start(&streamed.place.highwater, &["--synchronous", "--rpo", "1h"]);
        streamed.wait_streaming(&receiver, FIRST);
        streamed.wait_streaming(&receiver, SECOND);
        let told = |names: &str, state: &str| {
            cluster.set(&format!("synchronous_standby_names = '{names}'"));
            cluster.reload();
            let states = "select string_agg(distinct sync_state, ' ') from pg_stat_replication";
            cluster.wait_until(states, state);
        };
        told("ANY 1 (highwater, highwater_second)", "quorum");
        for repo in [&streamed.first, &streamed.second] {
            let away = Away::new(repo);
            let mut inserting = insert(cluster, 1);
            assert!(inserting.returns_within(LIMIT), "one is enough:\n{}", receiver.log());
            drop(away);
        }
        streamed.wait_stored(&receiver, FIRST);
        streamed.wait_stored(&receiver, SECOND);
        told("FIRST 2 (highwater, highwater_second)", "sync");
        assert!(insert(cluster, 2).returns_within(LIMIT), "both are there:\n{}", receiver.log());
        let away = Away::new(&streamed.second);
        let mut inserting = insert(cluster, 3);
        cluster.wait_until(WAITING_COMMITS, "1");
        streamed.wait_stored(&receiver, FIRST);
        assert!(!inserting.returns_within(Duration::from_secs(2)), "the second has not stored it");
        drop(away);
        assert!(inserting.returns_within(LIMIT), "both are back:\n{}", receiver.log());
        assert_eq!(cluster.sql("select count(*) from t"), "4");
        receiver.terminate().done();
    }
}

#[test]
fn an_agent_streams_into_both() {
    let mut streamed = Streamed::new(NEWEST, 1, &["archive_mode = on"]);
    streamed.cluster().archive_into(&streamed.place.highwater);
    let pgdata = streamed.cluster().pgdata.clone();
    let agent = Receiver::agent(&streamed.place.highwater, &pgdata, &["--receive"]);
    streamed.wait_streaming(&agent, FIRST);
    streamed.wait_streaming(&agent, SECOND);
    streamed.place.highwater.run(&["backup", "--fast"]).done();
    streamed.outlive(&streamed.second, (&agent, SECOND), (&agent, FIRST));
    streamed.outlive(&streamed.first, (&agent, FIRST), (&agent, SECOND));
    let report = agent.terminate().done().json();
    for field in ["received", "received_into_second"] {
        assert!(report[field]["wal_bytes"].as_u64() > Some(0), "{report}");
    }
    streamed.assert_each_holds_all();
}

#[test]
fn a_stream_that_ends_by_itself_is_told_and_started_again_while_the_other_goes_on() {
    let streamed = Streamed::new(NEWEST, 1, &[]);
    let both = &streamed.place.highwater;
    // Where the second was, another cluster has the place now.
    let ours = Away::new(&streamed.second);
    let stranger = streamed.place.lab.cluster(NEWEST).named("stranger").start();
    for directory in ["second", "third"] {
        let directory = streamed.place.lab.directory(directory);
        let repo = streamed.first.for_repo(&format!("file://{}", directory.display()));
        repo.on(&stranger).run(&["init"]).done();
    }
    let third = streamed.place.lab.path().join("third");
    let neither = both.for_repo(&format!("file://{}", third.display()));
    // Where both end there is nothing to go on for.
    let ended = Receiver::start(&neither, &[]).wait().ends_with(3);
    ended.says("in the first repository").says("in the second repository");
    let receiver = Receiver::start(both, &[]);
    receiver.wait_says("receive into the second repository has ended");
    streamed.wait_streaming(&receiver, FIRST);
    streamed.place.segments(2);
    streamed.wait_stored(&receiver, FIRST);
    let second = streamed.second.repo_directory();
    std::fs::rename(&second, second.with_extension("strangers")).unwrap();
    drop(ours);
    streamed.wait_streaming(&receiver, SECOND);
    streamed.wait_stored(&receiver, SECOND);
    receiver.wait_says("second repository: streaming timeline 1");
    receiver.terminate().done();
}

#[test]
fn both_away_are_outlived_and_take_bounded_memory_whatever_the_wal_is_like() {
    let streamed = Streamed::new(NEWEST, 16, &[]);
    let receiver = Receiver::start(&streamed.place.highwater, &[]);
    streamed.wait_streaming(&receiver, FIRST);
    streamed.wait_streaming(&receiver, SECOND);
    let away = [&streamed.first, &streamed.second].map(Away::new);
    streamed.cluster().sql(
        "select pg_logical_emit_message(false, 'x', \
         (select string_agg(sha512((g * n)::text::bytea), ''::bytea) \
          from generate_series(1, 16384) g)) from generate_series(1, 80) n",
    );
    for name in ["first", "second"] {
        receiver.wait_says(&format!("{name} repository: `main/wal/"));
    }
    drop(away);
    streamed.wait_stored(&receiver, FIRST);
    streamed.wait_stored(&receiver, SECOND);
    // What the release build has in memory of its code and libraries.
    let peak = (receiver.peak_memory_without_code() >> 20) + 14;
    eprintln!("peak of a receiver into two repositories: {peak} MiB");
    assert!(peak <= 96, "{peak} MiB of memory");
    receiver.terminate().done();
}

/// Begins a commit in a session with this `synchronous_commit`.
fn insert_with(cluster: &Cluster, level: &str, n: u32) -> Statement {
    let sql = format!("set synchronous_commit = {level}; insert into t values ({n})");
    Statement::begin(cluster, &sql)
}

#[test]
fn while_the_store_is_away_each_commit_waits_as_its_level_says() {
    for major in [14, NEWEST] {
        let lab = Lab::open();
        let settings = "synchronous_standby_names = 'highwater'";
        let cluster = lab.cluster(major).conf(settings).start();
        let highwater = lab.highwater().on(&cluster);
        highwater.run(&["init"]).done();
        cluster.sql("set synchronous_commit = local; create table t (n int)");
        let arguments = ["--synchronous", "--rpo", "1h"];
        let receiver = Receiver::streaming(&highwater, &cluster, &arguments);
        assert!(insert_with(&cluster, "on", 1).returns_within(LIMIT), "{}", receiver.log());

        let away = Away::new(&highwater);
        let mut on = insert_with(&cluster, "on", 2);
        cluster.wait_until(WAITING_COMMITS, "1");
        for (level, n) in [("local", 3), ("off", 4)] {
            let mut commit = insert_with(&cluster, level, n);
            assert!(commit.returns_within(LIMIT), "{level} waits:\n{}", receiver.log());
        }
        // Not only with the status that comes every 10 s.
        for n in 30..33 {
            let mut commit = insert_with(&cluster, "remote_write", n);
            let limit = Duration::from_secs(5);
            assert!(commit.returns_within(limit), "remote_write waits:\n{}", receiver.log());
        }
        let mut remote_apply = insert_with(&cluster, "remote_apply", 6);
        cluster.wait_until(WAITING_COMMITS, "2");
        assert!(!on.returns_within(Duration::from_secs(2)), "it is not stored");
        drop(away);
        assert!(on.returns_within(LIMIT), "the store is back:\n{}", receiver.log());
        // All of it is stored, and that is not what this level waits for.
        receiver.wait_acknowledged(&cluster);
        assert!(!remote_apply.returns_within(Duration::from_secs(2)), "nothing is applied");
        assert_eq!(cluster.sql(WAITING_COMMITS), "1");
        let waiting = WAITING_COMMITS.replace("count(*)", "pg_cancel_backend(pid)");
        assert_eq!(cluster.sql(&waiting), "t");
        assert!(remote_apply.returns_within(LIMIT), "cancelled");

        let told = highwater.with_env("HIGHWATER_SYNCHRONOUS", "on");
        told.run(&["check", "--no-switch"]).says("commits wait for `highwater`");
        cluster.set("synchronous_commit = remote_apply");
        cluster.reload();
        cluster.wait_until("show synchronous_commit", "remote_apply");
        let check = told.run(&["check", "--no-switch", "--json"]).ends_with(6).json();
        let findings = check["findings"].as_array().unwrap();
        let waits = findings.iter().find(|finding| finding["name"] == "synchronous commit");
        let waits = waits.unwrap_or_else(|| panic!("{check}"));
        assert_eq!(waits["status"], "failed", "{check}");
        let text = waits.to_string();
        assert!(text.contains("synchronous_commit = remote_apply waits for `highwater`"), "{text}");
        receiver.terminate().done();
    }
}

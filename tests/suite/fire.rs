//! The ledger under fire: clients write numbered commits and note each acknowledgement outside the
//! cluster; every process of the primary is killed at a random moment, and its data directory deleted. What
//! `restore` brings back from the repository alone is compared with the notes.

use crate::harness::{
    Cluster, Highwater, Lab, NEWEST, Random, Receiver, Way, Weather, copy_tree, passes_within,
    remove_tree, rounds, wait_for,
};
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const CLIENTS: u64 = 4;

/// More commits than a client makes in a round.
const COMMITS_MAX: u64 = 20_000;

/// The longest time of writing after the first acknowledgements.
const WRITING_MAX: Duration = Duration::from_secs(2);

/// For busy processors: what the promise of default mode has on top of `rpo` and the store's latency.
const MARGIN: Duration = Duration::from_millis(500);

/// A commit's number and when it was acknowledged.
type Notes = Arc<Mutex<Vec<(u64, Instant)>>>;

/// One psql that commits number after number until the server is gone.
struct Client {
    psql: Child,
    threads: [JoinHandle<()>; 2],
}

impl Client {
    fn start(cluster: &Cluster, number: u64, notes: &Notes) -> Self {
        let mut psql = cluster.client("psql");
        psql.args(["-XAtq"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut psql = psql.spawn().expect("psql starts");
        let (mut input, output) = (psql.stdin.take().unwrap(), psql.stdout.take().unwrap());
        let notes = Arc::clone(notes);
        let writing = std::thread::spawn(move || {
            let first = number * COMMITS_MAX;
            for n in first..first + COMMITS_MAX {
                let line = format!("insert into fire values ({n}) returning n;\n");
                if input.write_all(line.as_bytes()).is_err() {
                    break;
                }
            }
        });
        // psql prints a row when the server has said that its transaction is committed.
        let noting = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                notes.lock().unwrap().push((line.parse().unwrap(), Instant::now()));
            }
        });
        Self { psql, threads: [writing, noting] }
    }

    /// Waits until it has noticed that the server is gone.
    fn finish(mut self) {
        self.psql.wait().unwrap();
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

/// What is burnt again and again: a stopped cluster to be copied, and the way to the repository.
struct Fire {
    lab: Lab,
    template: PathBuf,
    /// For the receiver.
    highwater: Highwater,
    /// For everything else, in fair weather.
    calm: Highwater,
    way: Option<(Way, Weather)>,
    random: Random,
    synchronous: bool,
}

/// What one round has shown.
struct Burnt {
    acknowledged: usize,
    /// How long before the kill the oldest commit that is lost was acknowledged.
    lost: Option<Duration>,
}

impl Fire {
    fn lay(lab: Lab, highwater: Highwater, calm: Highwater, synchronous: bool) -> Self {
        let mut builder = lab.cluster(NEWEST).named("template");
        if synchronous {
            // Small segments, so that a kill meets their borders too.
            builder = builder.segment_mib(1).conf("synchronous_standby_names = 'highwater'");
        }
        let template = builder.create().pgdata.clone();
        let random = Random::new("fire");
        Self { lab, template, highwater, calm, way: None, random, synchronous }
    }

    fn on_a_local_directory(synchronous: bool) -> Self {
        let lab = Lab::open();
        let highwater = lab.highwater();
        Self::lay(lab, highwater.clone(), highwater, synchronous)
    }

    fn on_s3(synchronous: bool, weather: Weather) -> Self {
        let lab = Lab::open();
        let calm = lab.highwater_on_s3();
        let (highwater, way) = lab.highwater_on_s3_by_a_way();
        Self { way: Some((way, weather)), ..Self::lay(lab, highwater, calm, synchronous) }
    }

    fn weather(&self, weather: impl FnOnce(Weather) -> Weather) {
        if let Some((way, rough)) = &self.way {
            way.set(weather(*rough));
        }
    }

    fn round(&mut self, round: u64) -> Burnt {
        let pgdata = self.lab.path().join(format!("burnt{round}"));
        copy_tree(&self.template, &pgdata);
        let mut cluster = Cluster::adopt(&self.lab, NEWEST, &pgdata);
        cluster.start();
        let name = format!("round{round}");
        let calm = self.calm.for_cluster(&name).on(&cluster);
        calm.run(&["init"]).done();
        let highwater = self.highwater.for_cluster(&name).on(&cluster);
        let mode: &[&str] = if self.synchronous { &["--synchronous"] } else { &[] };
        let mut receiver = Some(Receiver::streaming(&highwater, &cluster, mode));
        cluster.sql("create table fire (n bigint primary key)");
        calm.run(&["backup", "--fast"]).done();
        self.weather(|rough| rough);

        let notes = Notes::default();
        let clients: Vec<_> = (0..CLIENTS).map(|n| Client::start(&cluster, n, &notes)).collect();
        let some = || notes.lock().unwrap().len() >= 20;
        wait_for("commits are acknowledged", Duration::from_mins(1), some);
        let bound = u64::try_from(WRITING_MAX.as_micros()).unwrap();
        passes_within(Duration::from_micros(self.random.below(bound)), || false);
        // A receiver that outlives the server stores what it still has in hand, which may hide a lie.
        let receiver_dies_first = !self.synchronous || self.random.below(3) == 0;
        let receiver_dies = receiver_dies_first || self.random.below(2) == 0;
        let kill = Instant::now();
        if receiver_dies_first {
            receiver.take().map(Receiver::kill9);
        }
        cluster.kill9_all();
        if receiver_dies {
            receiver.take().map(Receiver::kill9);
        }
        clients.into_iter().for_each(Client::finish);
        remove_tree(&pgdata);
        if let Some(receiver) = receiver {
            receiver.terminate().done();
        }
        self.weather(|_| Weather::Fair);
        let acknowledged = notes.lock().unwrap().clone();
        self.compare(&calm, round, &acknowledged, kill)
    }

    fn compare(
        &self,
        calm: &Highwater,
        round: u64,
        acknowledged: &[(u64, Instant)],
        kill: Instant,
    ) -> Burnt {
        let pgdata = self.lab.path().join(format!("copy{round}"));
        calm.run(&["restore", "--pgdata", pgdata.to_str().unwrap()]).done();
        let mut copy = Cluster::adopt(&self.lab, NEWEST, &pgdata);
        copy.start();
        copy.wait_until("select pg_is_in_recovery()", "f");
        let rows = copy.sql("select n from fire");
        let rows: BTreeSet<u64> = rows.lines().map(|n| n.parse().unwrap()).collect();
        drop(copy);
        remove_tree(&pgdata);
        let lost = acknowledged.iter().filter(|(n, _)| !rows.contains(n));
        let lost = lost.map(|(_, at)| kill.saturating_duration_since(*at)).max();
        Burnt { acknowledged: acknowledged.len(), lost }
    }
}

fn nothing_acknowledged_is_lost(mut fire: Fire, rounds: u64) {
    let mut acknowledged = 0;
    for round in 0..rounds {
        let burnt = fire.round(round);
        assert_eq!(burnt.lost, None, "acknowledged so long before the kill, and lost");
        acknowledged += burnt.acknowledged;
    }
    eprintln!("{rounds} rounds, {acknowledged} acknowledged commits, none lost");
}

fn at_most_a_second_is_lost(mut fire: Fire, rounds: u64, latency: Duration) {
    let limit = Duration::from_secs(1) + latency + MARGIN;
    let mut lost = Vec::new();
    for round in 0..rounds {
        let burnt = fire.round(round);
        let this = burnt.lost.unwrap_or_default();
        assert!(this <= limit, "{this:?} of {} commits lost, limit {limit:?}", burnt.acknowledged);
        lost.push(this.as_millis());
    }
    lost.sort_unstable();
    eprintln!(
        "{rounds} rounds, lost in ms: median {}, most {}, limit {} (latency {})",
        lost[lost.len() / 2],
        lost[lost.len() - 1],
        limit.as_millis(),
        latency.as_millis()
    );
}

const ROUGH: Weather = Weather::Rough { delay_max: Duration::from_millis(20), cut_one_in: 40 };

/// Held in both directions; a request or an answer is one block.
const SLOW: Weather = Weather::Rough { delay_max: Duration::from_millis(50), cut_one_in: u64::MAX };

#[test]
fn synchronous_mode_loses_no_acknowledged_commit() {
    nothing_acknowledged_is_lost(Fire::on_a_local_directory(true), rounds(3));
}

#[test]
fn synchronous_mode_loses_no_acknowledged_commit_over_a_store_that_delays_and_fails() {
    nothing_acknowledged_is_lost(Fire::on_s3(true, ROUGH), rounds(3));
}

#[test]
fn default_mode_loses_at_most_a_second_and_the_stores_latency() {
    // An fsync of a file and its directory, on disks that others use too.
    at_most_a_second_is_lost(
        Fire::on_a_local_directory(false),
        rounds(3),
        Duration::from_millis(50),
    );
}

#[test]
fn default_mode_loses_at_most_a_second_and_the_latency_of_a_slow_store() {
    at_most_a_second_is_lost(Fire::on_s3(false, SLOW), rounds(2), Duration::from_millis(200));
}

//! `highwater agent`: WAL stored and fetched before it is asked for. Whatever becomes of the agent, what is told stays
//! true: a command that ends with 0 has its file in the repository, and archiving goes on.

use crate::ahead::{
    assert_is_stored, assert_is_stored_in, fetchers, get, in_pgdata, push, spool, with_backlog,
    without_repository,
};
use crate::harness::{
    Archived, Highwater, NEWEST, Random, Receiver, Run, files_below, flip_bit, not_run,
    passes_within, rounds, wait_for,
};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Within this an agent has stored, fetched or noticed whatever a test waits for.
const LIMIT: Duration = Duration::from_secs(90);

fn agent(place: &Archived, arguments: &[&str]) -> Receiver {
    Receiver::agent(&place.highwater, &place.cluster.pgdata, arguments)
}

fn socket(place: &Archived) -> PathBuf {
    spool(place).join("agent.sock")
}

#[track_caller]
fn wait_stored(agent: &Receiver, names: &[String]) {
    let told = |name: &String| agent.log().contains(&format!("`{name}` is stored"));
    let done = passes_within(LIMIT, || names.iter().all(told));
    assert!(done, "not all of {names:?} are stored:\n{}", agent.log());
}

/// Returns what the agent said at its end.
#[track_caller]
fn report(run: Run) -> serde_json::Value {
    run.done().json()
}

// ---------------------------------------------------------------- pushing

#[test]
fn what_is_ready_is_stored_ahead_and_answered_for_without_the_store() {
    for (segment_mib, count) in [(1, 40), (16, 8)] {
        let (place, names) = with_backlog(segment_mib, count);
        let agent = agent(&place, &[]);
        wait_stored(&agent, &names);
        let highwater = in_pgdata(&place);
        without_repository(&place, || {
            for name in &names {
                push(&highwater, name).done();
            }
            // By hand it is the direct way, and that the repository is away is true.
            let by_hand = place.highwater.with_retries(1);
            by_hand.push(&place.cluster.wal(&names[0])).ends_with(5);
        });
        for name in &names {
            assert_is_stored(&place, name);
        }
        let report = report(agent.terminate());
        assert_eq!(report["answered"], names.len(), "{report}");
        assert!(!socket(&place).exists(), "the socket is left behind");
    }
}

#[test]
fn the_server_archives_through_the_agent() {
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    let agent = agent(&place, &[]);
    let names = place.segments_with(30, 2000);
    // A backup history file too.
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.archive_now();
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    for name in &names {
        assert_is_stored(&place, name);
    }
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    let report = report(agent.terminate());
    assert!(report["answered"].as_u64().unwrap() >= 30, "{report}");
    place.assert_copy_equals("copy", &dump);
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
}

#[test]
fn a_promotion_is_archived_through_the_agent_history_and_partial_file_too() {
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    place.highwater.run(&["backup", "--fast"]).done();
    place.segments_with(3, 2000);
    place.cluster.archive_now();
    let mut copy = place.restore("copy", &["--take-over"]);
    let agent = Receiver::agent(&place.highwater, &copy.pgdata, &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    copy.archive_into(&place.highwater);
    let last = copy.archive_now();
    assert!(last.starts_with("00000002"), "{last}");
    let archived = |name: &String| copy.pgdata.join("pg_wal/archive_status").join(name).exists();
    let history = "00000002.history.done".to_owned();
    wait_for("the history is archived", LIMIT, || archived(&history));
    assert_eq!(copy.sql("select failed_count from pg_stat_archiver"), "0", "{}", copy.log());
    assert!(!place.objects_of("00000002.history").is_empty());
    agent.wait_says("`00000002.history` is stored");
    let report = report(agent.terminate());
    assert!(report["answered"].as_u64().unwrap() >= 2, "{report}");
}

#[test]
fn a_file_that_changed_after_it_was_stored_gets_the_direct_ways_verdict() {
    let (place, names) = with_backlog(1, 4);
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    let highwater = in_pgdata(&place);
    for (n, name) in names.iter().enumerate() {
        let path = place.cluster.wal(name);
        let times = std::fs::metadata(&path).unwrap().modified().unwrap();
        flip_bit(&path, 9000);
        if n % 2 == 1 {
            // Somebody hides it.
            let file = std::fs::File::options().write(true).open(&path).unwrap();
            file.set_times(std::fs::FileTimes::new().set_modified(times)).unwrap();
        }
        let run = push(&highwater, name);
        assert!([3, 4].contains(&run.code()), "{run}");
        flip_bit(&path, 9000);
        push(&highwater, name).done();
        assert_is_stored(&place, name);
    }
    // Another file under the same name, as old as can be.
    let path = place.cluster.wal(&names[0]);
    let copy = place.lab.path().join("copy");
    std::fs::copy(place.cluster.wal(&names[1]), &copy).unwrap();
    let (kept, owner) = (std::fs::read(&path).unwrap(), std::fs::metadata(&path).unwrap().uid());
    std::os::unix::fs::chown(&copy, Some(owner), None).unwrap();
    std::fs::rename(&copy, &path).unwrap();
    let run = push(&highwater, &names[0]);
    assert!([3, 4].contains(&run.code()), "{run}");
    std::fs::write(&path, kept).unwrap();
    assert_is_stored(&place, &names[0]);
    drop(agent);
}

#[test]
fn a_damaged_segment_is_refused_by_its_own_call_and_those_behind_it_are_stored_ahead() {
    let (place, names) = with_backlog(1, 6);
    flip_bit(&place.cluster.wal(&names[1]), 9000);
    let agent = agent(&place, &[]);
    let sound: Vec<_> = names.iter().filter(|name| **name != names[1]).cloned().collect();
    wait_stored(&agent, &sound);
    let highwater = in_pgdata(&place);
    push(&highwater, &names[1]).ends_with(4);
    assert!(place.objects_of(&names[1]).is_empty());
    without_repository(&place, || push(&highwater, &names[2]).done());
    assert_is_stored(&place, &names[2]);
}

#[test]
fn a_store_that_is_away_stops_neither_the_agent_nor_the_truth() {
    let (place, names) = with_backlog(1, 4);
    let repo = place.highwater.repo_directory();
    let away = repo.with_extension("away");
    std::fs::rename(&repo, &away).unwrap();
    let quick = place.highwater.with_retries(0);
    let agent = Receiver::agent(&quick, &place.cluster.pgdata, &[]);
    agent.wait_says("is left to its own command");
    push(&quick.in_directory(&place.cluster.pgdata), &names[0]).ends_with(5);
    std::fs::rename(&away, &repo).unwrap();
    // It begins again by itself.
    wait_stored(&agent, &names[3..]);
    for name in &names {
        push(&quick.in_directory(&place.cluster.pgdata), name).done();
        assert_is_stored(&place, name);
    }
}

#[test]
fn archiving_goes_on_while_agents_are_killed() {
    let mut random = Random::new("killed agents");
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    let mut names = Vec::new();
    for round in 0..rounds(6) {
        let agent = agent(&place, &[]);
        names.extend(place.segments_with(8, 2000));
        passes_within(Duration::from_millis(random.below(400)), || false);
        agent.kill9();
        // The socket that it has left leads nowhere.
        assert!(socket(&place).exists(), "round {round}");
        names.extend(place.segments_with(2, 2000));
    }
    place.cluster.archive_now();
    let failed = place.cluster.sql("select failed_count from pg_stat_archiver");
    assert_eq!(failed, "0", "{}", place.cluster.log());
    for name in &names {
        assert_is_stored(&place, name);
    }
    let info = place.highwater.info();
    assert_eq!(info["wal"][0]["gaps"].as_array().map(Vec::len), Some(0), "{info}");
}

#[test]
fn an_agent_that_was_killed_in_the_middle_is_followed_by_one_that_finishes() {
    let mut random = Random::new("killed in the middle");
    let (place, names) = with_backlog(16, 10);
    for _ in 0..rounds(4) {
        let agent = agent(&place, &[]);
        passes_within(Duration::from_millis(random.below(600)), || false);
        agent.kill9();
    }
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    without_repository(&place, || {
        for name in &names {
            push(&in_pgdata(&place), name).done();
        }
    });
    for name in &names {
        assert_is_stored(&place, name);
    }
}

#[test]
fn it_stops_in_good_order_in_the_middle_of_a_backlog() {
    let (place, names) = with_backlog(16, 10);
    let agent = agent(&place, &[]);
    agent.wait_says("is stored");
    let report = report(agent.terminate());
    assert!(report["stored_files"].as_u64().unwrap() >= 1, "{report}");
    assert!(!socket(&place).exists());
    for name in &names {
        push(&in_pgdata(&place), name).done();
        assert_is_stored(&place, name);
    }
    let left = files_below(&place.highwater.repo_directory());
    let temporary = left.iter().find(|path| path.to_string_lossy().contains("tmp"));
    assert_eq!(temporary, None);
}

// ---------------------------------------------------------------- who sits there

#[test]
fn one_agent_serves_a_data_directory() {
    let (place, names) = with_backlog(1, 2);
    let first = agent(&place, &[]);
    let pgdata = place.cluster.pgdata.to_str().unwrap().to_owned();
    place.highwater.run(&["agent", "--pgdata", &pgdata]).ends_with(2).says("another agent");
    wait_stored(&first, &names);
    first.kill9();
    let second = agent(&place, &[]);
    wait_stored(&second, &names);
    without_repository(&place, || push(&in_pgdata(&place), &names[0]).done());
}

#[test]
fn what_is_wrong_with_its_settings_is_told_at_once() {
    let (place, _) = with_backlog(1, 1);
    let pgdata = place.cluster.pgdata.to_str().unwrap().to_owned();
    let highwater = &place.highwater;
    highwater.run(&["agent"]).ends_with(2).says("no data directory is named");
    highwater.run(&["agent", "--pgdata", "/nonexistent"]).ends_with(7);
    let other = place.lab.directory("other");
    highwater.run(&["agent", "--pgdata", other.to_str().unwrap()]).ends_with(7);
    let without = highwater.with_env("HIGHWATER_SPOOL", "none");
    without.run(&["agent", "--pgdata", &pgdata]).ends_with(2).says("spool");
    let long = highwater.with_env("HIGHWATER_SPOOL", &format!("/{}", "x".repeat(120)));
    assert!([2, 7].contains(&long.run(&["agent", "--pgdata", &pgdata]).code()));
    // As PostgreSQL's own programs are told.
    let told = highwater.with_env("PGDATA", &pgdata);
    let agent = told.spawn(&["agent"]);
    wait_for("the agent serves", LIMIT, || socket(&place).exists());
    agent.signal(Signal::TERM);
    agent.wait().done().says("answered 0 commands");
}

#[test]
fn an_agent_whose_place_was_taken_away_says_so_and_ends() {
    let (place, names) = with_backlog(1, 2);
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    std::fs::remove_dir_all(spool(&place)).unwrap();
    agent.wait().ends_with(7).says("was removed");
    push(&in_pgdata(&place), &names[0]).done();
    assert_is_stored(&place, &names[0]);
}

#[test]
fn an_agent_of_another_repository_or_cluster_is_not_believed() {
    let (place, names) = with_backlog(1, 3);
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    let second = in_pgdata(&place).for_cluster("second");
    second.run(&["init"]).done();
    push(&second, &names[0]).done().says("serves another repository or cluster");
    assert_is_stored_in(&second, &place, &names[0]);
    agent.wait_says("commands ask with other settings");
}

/// What may sit where an agent should: what it does with one who comes.
type Foreigner = fn(UnixStream);

fn foreigners() -> Vec<(&'static str, Foreigner)> {
    fn question(stream: &UnixStream) -> serde_json::Value {
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).ok();
        serde_json::from_str(&line).unwrap_or_default()
    }
    fn stored(mut answer: serde_json::Value) -> String {
        answer["word"] = serde_json::json!({
            "stored": { "plain_bytes": 1, "stored_bytes": 1, "blake3": "" }
        });
        format!("{answer}\n")
    }
    vec![
        ("it hangs up", drop),
        ("it is silent", |stream| {
            let _ = BufReader::new(stream).read_until(b'!', &mut Vec::new());
        }),
        ("it says nonsense", |mut stream| {
            let _ = stream.write_all(&vec![b'{'; 1 << 20]);
        }),
        ("it says an empty line", |mut stream| {
            let _ = stream.write_all(b"\n\n\n");
        }),
        ("it is of another version", |mut stream| {
            let mut answer = question(&stream);
            answer["version"] = 2.into();
            let _ = stream.write_all(stored(answer).as_bytes());
        }),
        ("it has no version", |mut stream| {
            let mut answer = question(&stream);
            answer.as_object_mut().unwrap().remove("version");
            let _ = stream.write_all(stored(answer).as_bytes());
        }),
        ("it is of another place", |mut stream| {
            let mut answer = question(&stream);
            answer["place"] = "elsewhere".into();
            let _ = stream.write_all(stored(answer).as_bytes());
        }),
        ("it speaks of another file", |mut stream| {
            let mut answer = question(&stream);
            answer["file"] = "000000010000000000000001".into();
            let _ = stream.write_all(stored(answer).as_bytes());
        }),
        ("it speaks of another file of this name", |mut stream| {
            let mut answer = question(&stream);
            answer["facts"]["inode"] = 1.into();
            let _ = stream.write_all(stored(answer).as_bytes());
        }),
    ]
}

/// Something that listens where an agent should, until it is dropped with the test's process.
fn sit(place: &Archived, act: Foreigner) -> Arc<AtomicUsize> {
    std::fs::remove_file(socket(place)).ok();
    let listener = UnixListener::bind(socket(place)).unwrap();
    // Whoever runs the tests, the server's user may ask.
    std::fs::set_permissions(socket(place), PermissionsExt::from_mode(0o777)).unwrap();
    let visits = Arc::new(AtomicUsize::new(0));
    let seen = visits.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            seen.fetch_add(1, Ordering::SeqCst);
            act(stream);
        }
    });
    visits
}

#[test]
fn whatever_sits_in_the_agents_place_the_file_is_stored() {
    let (place, names) = with_backlog(1, 1);
    let highwater = in_pgdata(&place);
    // Makes the spool.
    drop(agent(&place, &[]));
    for (n, (what, act)) in foreigners().into_iter().enumerate() {
        let visits = sit(&place, act);
        let cluster = highwater.for_cluster(&format!("c{n}"));
        cluster.run(&["init"]).done();
        let began = Instant::now();
        let run = push(&cluster, &names[0]);
        assert_eq!(run.code(), 0, "{what}: {run}");
        assert!(began.elapsed() < Duration::from_secs(20), "{what}: {:?}", began.elapsed());
        assert_eq!(visits.load(Ordering::SeqCst), 1, "{what}: it was not asked");
        assert_is_stored_in(&cluster, &place, &names[0]);
    }
}

#[test]
fn a_socket_of_another_user_is_not_even_asked() {
    let (place, names) = with_backlog(1, 1);
    drop(agent(&place, &[]));
    let visits = sit(&place, drop);
    let owner = std::fs::metadata(&place.cluster.pgdata).unwrap().uid();
    if let Err(error) = std::os::unix::fs::chown(socket(&place), Some(owner + 1), None) {
        return not_run("agent::a_socket_of_another_user", &error.to_string());
    }
    push(&in_pgdata(&place), &names[0]).done().says("no socket of this user");
    assert_eq!(visits.load(Ordering::SeqCst), 0);
    assert_is_stored(&place, &names[0]);
}

#[test]
fn an_agent_that_hangs_holds_nobody_up_for_long() {
    let (place, names) = with_backlog(1, 2);
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    agent.signal(Signal::STOP);
    for name in &names {
        let run = push(&in_pgdata(&place), name).done();
        assert!(run.elapsed < Duration::from_secs(10), "{run}");
        assert_is_stored(&place, name);
    }
    agent.signal(Signal::CONT);
    without_repository(&place, || push(&in_pgdata(&place), &names[0]).done());
}

// ---------------------------------------------------------------- fetching

fn recovery_with(place: &Archived, name: &str, highwater: &Highwater, dump: &str) {
    let mut copy = place.restore(name, &[]);
    let agent = Receiver::agent(highwater, &copy.pgdata, &[]);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == dump, "the copy differs");
    assert!(fetchers(&copy.pgdata).is_empty(), "a process was left behind beside the agent");
    let report = report(agent.terminate());
    assert!(report["fetched_segments"].as_u64().unwrap() > 10, "{report}");
}

#[test]
fn recovery_with_an_agent_that_fetches_ahead_comes_to_the_same_end() {
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    place.highwater.run(&["backup", "--fast"]).done();
    place.segments_with(60, 2000);
    place.cluster.archive_now();
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    recovery_with(&place, "copy", &place.highwater, &dump);
}

#[test]
fn an_agent_fetches_where_postgresql_would_inherit_orphans_and_never_says_absent() {
    let place = Archived::by_hand(NEWEST, 1);
    let names = place.segments_with(5, 2000);
    for name in &names[..4] {
        place.highwater.push(&place.cluster.wal(name)).done();
    }
    let alone = place.lab.directory("alone");
    for directory in ["global", "pg_wal", "pg_wal/archive_status"] {
        place.lab.directory(&format!("alone/{directory}"));
    }
    let control = std::fs::read(place.cluster.pgdata.join("global/pg_control")).unwrap();
    place.lab.write("alone/global/pg_control", &control);
    place.lab.write("alone/postmaster.pid", b"1\n");
    // The same settings for both, or the one would not believe the other.
    let highwater = place.highwater.in_directory(&alone).with_retries(1);
    let agent = Receiver::agent(&highwater, &alone, &[]);
    let fetched = |name: &str| alone.join(format!("pg_wal/highwater.spool/{name}.fetched"));
    get(&highwater, &names[0]).done();
    // They come in any order.
    let both = || fetched(&names[1]).exists() && fetched(&names[2]).exists();
    wait_for("they are fetched ahead", LIMIT, both);
    without_repository(&place, || {
        get(&highwater, &names[1]).done();
        let got = std::fs::read(alone.join("pg_wal/RECOVERYXLOG")).unwrap();
        assert!(got == std::fs::read(place.cluster.wal(&names[1])).unwrap());
        // Not fetched, and the store cannot be asked: that is no absence.
        get(&highwater, &names[4]).ends_with(133);
    });
    get(&highwater, &names[4]).ends_with(1);
    place.highwater.push(&place.cluster.wal(&names[4])).done();
    get(&highwater, &names[4]).done();
    report(agent.terminate());
}

// ---------------------------------------------------------------- receiving

#[test]
fn an_agent_receives_and_archives_at_the_same_time() {
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    place.highwater.run(&["backup", "--fast"]).done();
    let agent = agent(&place, &["--receive"]);
    agent.wait_streaming(&place.cluster);
    let names = place.segments_with(10, 2000);
    place.cluster.wait_archived(names.last().unwrap());
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    // Of a segment that is not archived for long.
    place.cluster.sql("create table last_words as select 'here' as t");
    agent.wait_acknowledged(&place.cluster);
    let dump = place.cluster.dump();
    agent.wait_acknowledged(&place.cluster);
    let report = report(agent.terminate());
    assert!(report["received"]["wal_bytes"].as_u64().unwrap() > 0, "{report}");
    assert!(report["answered"].as_u64().unwrap() >= 10, "{report}");
    place.cluster.sql("select pg_drop_replication_slot('highwater_main')");
    place.assert_copy_equals("copy", &dump);
}

#[test]
fn archiving_goes_on_while_receiving_fails_and_receiving_begins_once_it_can() {
    let place = Archived::by_server_with(NEWEST, |builder| builder.segment_mib(1));
    place.cluster.sql("create role plain login");
    let dsn = place.cluster.dsn().replace("user=postgres", "user=plain");
    let agent = agent(&place, &["--receive", "--dsn", &dsn]);
    agent.wait_says("receive has ended");
    let names = place.segments_with(5, 2000);
    place.cluster.wait_archived(names.last().unwrap());
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    place.cluster.sql("alter role plain replication");
    agent.wait_streaming(&place.cluster);
    let report = report(agent.terminate());
    assert!(report["answered"].as_u64().unwrap() >= 5, "{report}");
}

// ---------------------------------------------------------------- memory

#[test]
fn a_large_backlog_takes_no_more_memory_than_a_small_one() {
    let (place, names) = with_backlog(16, 20);
    let agent = agent(&place, &[]);
    wait_stored(&agent, &names);
    let (resident, space) = (agent.peak_memory() >> 20, agent.peak_address_space() >> 20);
    eprintln!("peak of the agent: {resident} MiB resident, {space} MiB of address space");
    assert!(resident <= 48, "{resident} MiB");
    drop(agent);
}

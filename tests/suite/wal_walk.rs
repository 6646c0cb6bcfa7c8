//! The walk over WAL against `pg_waldump`, on segments of every major version:
//! the same records, the same transactions, the same restore points.

use crate::harness::{Archived, Cluster, Lab, MAJORS, NEWEST};
use highwater::pg::{
    Extent, Lsn, SegmentExpectation, SegmentFacts, SegmentSize, SegmentWalk, WalCarry, WalEvent,
    WalFileName,
};
use std::io::BufRead;
use std::process::Stdio;

/// What is kept of a line: a commit with thousands of invalidations is one line of megabytes.
const LINE_BYTES_MAX: usize = 512;

/// How a block falls on page and record borders must make no difference.
const BLOCK_BYTES: [usize; 3] = [8192, 100_003, 1 << 20];

/// An event, told the same way by the walk and by `pg_waldump`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    lsn: u64,
    what: String,
}

/// What one reader says of some WAL.
#[derive(Debug, Default, PartialEq, Eq)]
struct Reading {
    records: u64,
    first_record: Option<u64>,
    last_record: Option<u64>,
    events: Vec<Told>,
}

#[test]
fn the_walk_finds_what_pg_waldump_finds_on_every_major() {
    for major in MAJORS {
        let lab = Lab::open();
        let builder = lab.cluster(major).conf("max_prepared_transactions = 5");
        let cluster = builder.conf("wal_level = logical").start();
        let first = cluster.switch_wal();
        let mut names = vec![first];
        names.extend(every_kind_of_event(&cluster));
        compare(&cluster, &names);
    }
}

#[test]
fn the_walk_finds_what_pg_waldump_finds_in_records_longer_than_a_segment() {
    let place = Archived::by_hand(NEWEST, 1);
    let first = place.cluster.switch_wal();
    for bytes in [900_000, 3_500_000, 10] {
        let sql = format!("select pg_logical_emit_message(true, 'long', repeat('x', {bytes}))");
        place.cluster.sql(&sql);
    }
    // One commit that names thousands of relation files and is longer than a page.
    place.cluster.sql(
        "do $$ begin for n in 1..1200 loop execute format('create table many_%s (n int)', n); \
         end loop; end $$",
    );
    place.cluster.sql(
        "do $$ begin for n in 1..1200 loop execute format('drop table many_%s', n); \
         end loop; end $$",
    );
    let last = place.cluster.switch_wal();
    let between = |name: &String| *name >= first && *name <= last;
    let names: Vec<_> = place.cluster.finished_segments().into_iter().filter(between).collect();
    assert!(names.len() > 6, "{names:?}");
    compare(&place.cluster, &names);
}

/// Commits, aborts, subtransactions, prepared transactions, drops, restore points and
/// checkpoints, over several segments.
fn every_kind_of_event(cluster: &Cluster) -> Vec<String> {
    cluster.pgbench(&["-i", "-q", "-s", "2"]);
    cluster.pgbench(&["-n", "-c", "4", "-t", "200"]);
    let statements = [
        "begin; create table gone (n int primary key, t text); rollback",
        "begin; create table kept (n int primary key, t text); savepoint s; \
         insert into kept values (1); rollback to s; insert into kept values (2); commit",
        "begin; insert into kept values (3); prepare transaction 'taken'",
        "begin; insert into kept values (4); prepare transaction 'left'",
        "commit prepared 'taken'",
        "rollback prepared 'left'",
        "select pg_create_restore_point('before the drop')",
        "truncate kept",
        "drop table kept",
        "checkpoint",
        "vacuum full pgbench_tellers",
    ];
    for statement in statements {
        cluster.sql(statement);
    }
    let middle = cluster.switch_wal();
    cluster.sql("select pg_create_restore_point('with, commas; and 2026 in it')");
    let last = cluster.switch_wal();
    let finished = cluster.finished_segments().into_iter();
    let names: Vec<_> = finished.filter(|name| *name <= last).collect();
    assert!(names.contains(&middle) && names.len() > 3, "{names:?}");
    names.into_iter().skip(1).collect()
}

/// Compares each segment alone, and all of them as one stretch of WAL.
fn compare(cluster: &Cluster, names: &[String]) {
    let names = names.iter().collect::<std::collections::BTreeSet<_>>();
    let major = cluster.major;
    let mut all = Reading::default();
    let mut carry = None;
    let mut transactions = 0;
    for (&name, block) in names.iter().zip(BLOCK_BYTES.iter().cycle()) {
        let (facts, _, events) = walk(cluster, name, None, *block);
        let alone = reading(&facts, events);
        assert_eq!(alone, waldump(cluster, &[name]), "{major}: {name}");
        assert_eq!(facts.version.0, major);
        assert_eq!(facts.marks.unread_count, 0, "{major}: {name}");
        transactions += facts.marks.commits.count + facts.marks.aborts.count;

        let (facts, next, events) = walk(cluster, name, carry, *block);
        let joined = reading(&facts, events);
        all.records += joined.records;
        all.first_record = all.first_record.or(joined.first_record);
        all.last_record = joined.last_record.or(all.last_record);
        all.events.extend(joined.events);
        carry = next;
    }
    assert!(transactions > 3, "{major}: nothing happened");
    let (first, last) = (names.first().unwrap(), names.last().unwrap());
    assert_eq!(all, waldump(cluster, &[first, last]), "{major}: {first} to {last}");
}

fn walk(
    cluster: &Cluster,
    name: &str,
    carry: Option<WalCarry>,
    block: usize,
) -> (SegmentFacts, Option<WalCarry>, Vec<Told>) {
    let bytes = std::fs::read(cluster.wal(name)).unwrap();
    let expectation = expectation(cluster, name, bytes.len());
    let mut walk = match carry {
        Some(carry) => SegmentWalk::after(carry, expectation),
        None => SegmentWalk::new(expectation),
    };
    let mut events = Vec::new();
    for bytes in bytes.chunks(block) {
        let fed = walk.feed_with(bytes, &mut |mark| events.extend(told(mark.lsn, &mark.event)));
        fed.unwrap_or_else(|damage| panic!("{name}: {damage}"));
    }
    let (facts, carry) = walk.finish_with_carry().unwrap_or_else(|e| panic!("{name}: {e}"));
    (facts, carry, events)
}

fn expectation(cluster: &Cluster, name: &str, bytes: usize) -> SegmentExpectation {
    let Ok(WalFileName::Segment(segment)) = WalFileName::parse(name) else { panic!("{name}") };
    let size = SegmentSize::new(u32::try_from(bytes).unwrap()).unwrap();
    let system_id = cluster.control("Database system identifier").parse().unwrap();
    SegmentExpectation::of(segment, size, Some(system_id), Extent::Whole).unwrap()
}

fn reading(facts: &SegmentFacts, events: Vec<Told>) -> Reading {
    Reading {
        records: facts.marks.records,
        first_record: facts.first_record_lsn.map(|lsn| lsn.0),
        last_record: facts.last_record_lsn.map(|lsn| lsn.0),
        events,
    }
}

/// Tells an event of the walk in the words of `pg_waldump`; `None` for those it words
/// differently from version to version.
fn told(lsn: Lsn, event: &WalEvent) -> Option<Told> {
    let what = match event {
        WalEvent::Transaction(end) => {
            let verb = if end.committed { "COMMIT" } else { "ABORT" };
            let prepared = if end.prepared { "_PREPARED" } else { "" };
            let time = end.time.to_recovery_target().unwrap();
            format!("{verb}{prepared} {} {time}", end.xid.unwrap())
        }
        WalEvent::RestorePoint { name, .. } => format!("RESTORE_POINT {name}"),
        WalEvent::Switch => "SWITCH".to_owned(),
        WalEvent::Checkpoint { shutdown, .. } => format!("CHECKPOINT shutdown={shutdown}"),
        _ => return None,
    };
    Some(Told { lsn: lsn.0, what })
}

/// Reads one segment, or all from the first to the last, with `pg_waldump`.
fn waldump(cluster: &Cluster, range: &[&str]) -> Reading {
    let mut command = cluster.tool("pg_waldump");
    command.arg("-p").arg(cluster.pgdata.join("pg_wal")).arg(range[0]);
    // Alone, a segment ends at its own end: pg_waldump says what is cut there, and fails.
    command.arg(range.last().unwrap());
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut output = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut reading = Reading::default();
    while let Some(line) = short_line(&mut output) {
        let Some(lsn) = field(&line, "lsn: ").map(parse_lsn) else { continue };
        reading.records += 1;
        reading.first_record.get_or_insert(lsn);
        reading.last_record = Some(lsn);
        reading.events.extend(dumped(&line).map(|what| Told { lsn, what }));
    }
    child.wait().unwrap();
    reading
}

/// Returns the next line, of which only the beginning is kept; `None` at the end.
fn short_line(output: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    loop {
        let buffer = output.fill_buf().unwrap();
        if buffer.is_empty() {
            let text = String::from_utf8_lossy(&line).into_owned();
            return (!line.is_empty()).then_some(text);
        }
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let part = &buffer[..end.unwrap_or(buffer.len())];
        line.extend_from_slice(&part[..part.len().min(LINE_BYTES_MAX - line.len())]);
        let used = end.map_or(buffer.len(), |end| end + 1);
        output.consume(used);
        if end.is_some() {
            return Some(String::from_utf8_lossy(&line).into_owned());
        }
    }
}

fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(name)?.1.split([',', ' ']).next()
}

fn parse_lsn(text: &str) -> u64 {
    text.parse::<Lsn>().unwrap().0
}

/// Tells a line of `pg_waldump` in the same words as [`told`].
fn dumped(line: &str) -> Option<String> {
    let manager = line.strip_prefix("rmgr: ")?.split_whitespace().next()?;
    let (verb, rest) = {
        let description = line.split_once("desc: ")?.1;
        description.split_once(' ').unwrap_or((description, ""))
    };
    match (manager, verb) {
        ("Transaction", "COMMIT" | "ABORT") => {
            let xid = line.split_once("tx:")?.1.split(',').next()?.trim();
            Some(format!("{verb} {xid} {}", in_one_form(rest)))
        }
        ("Transaction", "COMMIT_PREPARED" | "ABORT_PREPARED") => {
            let (xid, rest) = rest.split_once(": ")?;
            Some(format!("{verb} {xid} {}", in_one_form(rest)))
        }
        ("XLOG", "RESTORE_POINT") => Some(format!("RESTORE_POINT {}", rest.trim())),
        ("XLOG", "SWITCH") => Some("SWITCH".to_owned()),
        ("XLOG", "CHECKPOINT_SHUTDOWN") => Some("CHECKPOINT shutdown=true".to_owned()),
        ("XLOG", "CHECKPOINT_ONLINE") => Some("CHECKPOINT shutdown=false".to_owned()),
        _ => None,
    }
}

/// `2026-11-22 03:00:00.12 UTC; more` with all six digits and an offset.
fn in_one_form(text: &str) -> String {
    let (stamp, _) = text.split_once(" UTC").unwrap_or_else(|| panic!("no time in {text:?}"));
    let civil: jiff::civil::DateTime = stamp.parse().unwrap();
    civil.strftime("%Y-%m-%d %H:%M:%S.%6f+00").to_string()
}

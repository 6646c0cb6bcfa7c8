//! The order of events as pg_waldump tells it: the outside truth for restores.

use super::cluster::{Cluster, finish};

/// One event that can end a recovery.
#[derive(Debug, Clone)]
pub struct Event {
    /// Start of the record.
    pub lsn: u64,
    /// Microseconds since 1970 UTC.
    pub time: i64,
    pub kind: EventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventKind {
    Commit { xid: u32 },
    Abort { xid: u32 },
    RestorePoint { name: String },
}

/// Where a recovery is to end.
#[derive(Debug, Clone)]
pub enum Target {
    Time(i64),
    Lsn(u64),
    Xid(u32),
    Name(String),
}

impl Target {
    /// Returns the arguments of `highwater restore` for this target.
    pub fn arguments(&self) -> Vec<String> {
        let (flag, value) = match self {
            Self::Time(time) => ("--to-time", format_time(*time)),
            Self::Lsn(lsn) => ("--to-lsn", format!("{:X}/{:X}", lsn >> 32, lsn & 0xFFFF_FFFF)),
            Self::Xid(xid) => ("--to-xid", xid.to_string()),
            Self::Name(name) => ("--to-name", name.clone()),
        };
        vec![flag.into(), value]
    }

    /// Returns the transactions that are visible after a recovery to this
    /// target, by the rules of `recoveryStopsBefore` and `recoveryStopsAfter`
    /// (src/backend/access/transam/xlogrecovery.c; 14: xlog.c).
    pub fn committed(&self, events: &[Event], exclusive: bool) -> Vec<u32> {
        let mut xids = Vec::new();
        for event in events {
            if self.stops_before(event, exclusive) {
                break;
            }
            if let EventKind::Commit { xid } = event.kind {
                xids.push(xid);
            }
            if self.stops_after(event, exclusive) {
                break;
            }
        }
        xids
    }

    fn stops_before(&self, event: &Event, exclusive: bool) -> bool {
        match (self, &event.kind) {
            (Self::Lsn(target), _) => exclusive && event.lsn >= *target,
            // Restore points carry a time too, but only the end of a
            // transaction is compared with a time target.
            (Self::Time(_), EventKind::RestorePoint { .. }) => false,
            (Self::Time(target), _) if exclusive => event.time >= *target,
            (Self::Time(target), _) => event.time > *target,
            (Self::Xid(target), EventKind::Commit { xid } | EventKind::Abort { xid }) => {
                exclusive && xid == target
            }
            _ => false,
        }
    }

    fn stops_after(&self, event: &Event, exclusive: bool) -> bool {
        match (self, &event.kind) {
            (Self::Name(target), EventKind::RestorePoint { name }) => name == target,
            (Self::Lsn(target), _) => !exclusive && event.lsn >= *target,
            (Self::Xid(target), EventKind::Commit { xid } | EventKind::Abort { xid }) => {
                !exclusive && xid == target
            }
            _ => false,
        }
    }
}

/// Reads the events of a running cluster from `first` (a segment name) to the
/// present, in WAL order. The cluster must still have that WAL in pg_wal.
pub fn events_of(cluster: &Cluster, first: &str) -> Vec<Event> {
    let last = cluster.switch_wal();
    let mut waldump = cluster.tool("pg_waldump");
    waldump.arg("-p").arg(cluster.pgdata.join("pg_wal")).args([first, &last]);
    let text = String::from_utf8(finish(waldump).stdout).unwrap();
    text.lines().filter_map(event).collect()
}

/// Reads the events of one segment file, which may end anywhere: what pg_waldump says of its end is not looked at.
pub fn events_in(cluster: &Cluster, segment: &std::path::Path) -> Vec<Event> {
    let output = cluster.tool("pg_waldump").arg(segment).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(event).collect()
}

/// Reads one line of pg_waldump, for example
/// `rmgr: Transaction len (rec/tot): 34/34, tx: 738, lsn: 0/0151A2B8, prev 0/0151A270, desc: COMMIT 2026-11-22 03:00:00.123456 UTC`.
fn event(line: &str) -> Option<Event> {
    let after = |key: &str| line.split_once(key).map(|(_, rest)| rest);
    let word = |key: &str| after(key)?.split([',', ' ']).next();
    let manager = after("rmgr: ")?.split_whitespace().next()?;
    let lsn = parse_lsn(word("lsn: ")?);
    let description = after("desc: ")?;
    let (verb, rest) = description.split_once(' ')?;
    match (manager, verb) {
        ("Transaction", "COMMIT" | "ABORT") => {
            let xid = after("tx:")?.split(',').next()?.trim().parse().ok()?;
            let kind =
                if verb == "COMMIT" { EventKind::Commit { xid } } else { EventKind::Abort { xid } };
            Some(Event { lsn, time: parse_time(rest)?, kind })
        }
        ("XLOG", "RESTORE_POINT") => {
            // The name comes first; some versions add the time after it.
            let name = rest.split(" 20").next()?.trim_end_matches(';').trim().to_owned();
            Some(Event { lsn, time: 0, kind: EventKind::RestorePoint { name } })
        }
        _ => None,
    }
}

/// Reads `2026-11-22 03:00:00.123456 UTC`, with anything after it.
fn parse_time(text: &str) -> Option<i64> {
    let (stamp, _) = text.split_once(" UTC")?;
    let civil: jiff::civil::DateTime = stamp.parse().ok()?;
    Some(civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().as_microsecond())
}

/// Reads an LSN as PostgreSQL prints it.
pub fn parse_lsn(text: &str) -> u64 {
    let (high, low) = text.split_once('/').unwrap_or_else(|| panic!("{text:?} is no LSN"));
    let part = |hex| u64::from_str_radix(hex, 16).unwrap();
    part(high) << 32 | part(low)
}

/// Returns where a timeline left the one before it, as the server's history file says.
pub fn switch_lsn(history: &std::path::Path) -> String {
    let text = std::fs::read_to_string(history).unwrap();
    let line = text.lines().rfind(|line| !line.trim().is_empty()).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

/// Returns where an LSN lies in its segment.
pub fn offset_in_segment(lsn: &str, segment_mib: u32) -> usize {
    usize::try_from(parse_lsn(lsn) % (u64::from(segment_mib) << 20)).unwrap()
}

/// Writes a time with an explicit zone, to the microsecond.
pub fn format_time(micros: i64) -> String {
    let time = jiff::Timestamp::from_microsecond(micros).unwrap();
    format!("{}+00", time.strftime("%Y-%m-%d %H:%M:%S.%6f"))
}

#[test]
fn a_commit_line_of_pg_waldump_is_read() {
    let line = "rmgr: Transaction len (rec/tot):     34/    34, tx:        738, lsn: \
                1/0151A2B8, prev 0/0151A270, desc: COMMIT 2026-11-22 03:00:00.123456 UTC; \
                subxacts: 739";
    let read = event(line).unwrap();
    assert_eq!(read.kind, EventKind::Commit { xid: 738 });
    assert_eq!(read.lsn, 0x1_0151_A2B8);
    assert_eq!(format_time(read.time), "2026-11-22 03:00:00.123456+00");
}

#[test]
fn an_inclusive_target_takes_one_transaction_more_than_an_exclusive_one() {
    let commit = |lsn, time, xid| Event { lsn, time, kind: EventKind::Commit { xid } };
    let events = [commit(10, 100, 3), commit(20, 200, 4), commit(30, 200, 5), commit(40, 300, 6)];
    assert_eq!(Target::Lsn(20).committed(&events, false), [3, 4]);
    assert_eq!(Target::Lsn(20).committed(&events, true), [3]);
    assert_eq!(Target::Time(200).committed(&events, false), [3, 4, 5]);
    assert_eq!(Target::Time(200).committed(&events, true), [3]);
    assert_eq!(Target::Xid(5).committed(&events, false), [3, 4, 5]);
    assert_eq!(Target::Xid(5).committed(&events, true), [3, 4]);
}

//! What a drill decides: the random moment it goes to, the settings of its private server, whether rows are those
//! expected, and which records of drills are kept.
//!
//! Never here: the server, the disk, the clock.

use std::path::Path;

use super::target::RecoveryPoint;
use crate::format::BackupId;
use crate::pg::{Lsn, SegmentSize, StandbyLimits, Timeline};
use crate::pgdata::Setting;

/// Records of drills are kept for so many days; the newest is always kept.
pub const RECORD_DAYS_KEPT: i64 = 400;

/// And at most so many of them.
pub const RECORDS_KEPT_MAX: usize = 1000;

/// What a difference shows of a line, in characters.
const LINE_SHOWN_MAX: usize = 200;

/// Recovery and checks need room beside the restored files: WAL on its way, WAL fetched ahead and what checks write.
pub const ROOM_BESIDE_FILES_BYTES: u64 = 512 << 20;

/// The private server's memory for pages. Small: it runs beside production, and is thrown away.
const SHARED_BUFFERS: &str = "64MB";

/// Entries for replication slots and origins. A copy uses no slot, but replay keeps the position of every
/// replication origin that commits name, and fails where there is no entry for it
/// (`replorigin_advance` in `src/backend/replication/logical/origin.c`).
const ORIGINS_MAX: u32 = 1024;

/// Moments that recovery can reach without a hole between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moments {
    /// The timeline whose way they lie on.
    pub timeline: Timeline,
    /// The first: where the oldest backup is consistent.
    pub first_lsn: Lsn,
    /// The last: where the last whole record begins. Not before `first_lsn`, or there is no moment.
    pub last_lsn: Lsn,
}

/// Returns a moment of these, each byte of WAL as likely as any other, so that busy hours are tried more often than
/// quiet ones. The same for the same seed and moments; `None` where there is none.
pub fn random_moment(moments: &[Moments], seed: u64) -> Option<(Timeline, Lsn)> {
    let length = |one: &Moments| (one.last_lsn.0 + 1).saturating_sub(one.first_lsn.0);
    let total: u64 = moments.iter().map(length).fold(0, u64::saturating_add);
    let mut at = mixed(seed).checked_rem(total)?;
    for one in moments {
        if at < length(one) {
            return Some((one.timeline, Lsn(one.first_lsn.0 + at)));
        }
        at -= length(one);
    }
    None
}

/// Spreads a seed over all 64 bits (the finalizer of SplitMix64), since people give small numbers.
fn mixed(seed: u64) -> u64 {
    let mut n = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    n = (n ^ (n >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    n = (n ^ (n >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    n ^ (n >> 31)
}

/// What the settings of a private server depend on.
#[derive(Debug, Clone, Copy)]
pub struct PrivateServer<'a> {
    /// Its major version.
    pub major: u32,
    /// The directory of its socket.
    pub socket_directory: &'a Path,
    /// Its `pg_hba.conf`.
    pub hba_file: &'a Path,
    /// Its `pg_ident.conf`.
    pub ident_file: &'a Path,
    /// What the cluster's `pg_control` says of its limits.
    pub limits: StandbyLimits,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// `shared_preload_libraries`.
    pub preload: &'a str,
}

/// Returns the settings of a server that may run beside the cluster it is a copy of: it can be reached over its own
/// socket only, reaches nobody, archives nothing, and takes little. They are all that it has: the cluster's own
/// settings files are not read.
pub fn private_settings(server: &PrivateServer<'_>) -> Vec<Setting> {
    let path = |path: &Path| path.display().to_string();
    let limit = |value: i32, least: i32| value.max(least).to_string();
    let text = |value: &str| value.to_owned();
    let limits = server.limits;
    let segment_mib = server.segment_size.bytes() >> 20;
    let mut settings: Vec<Setting> = vec![
        ("cluster_name", text("highwater drill")),
        // Who reaches it.
        ("listen_addresses", String::new()),
        ("port", DRILL_PORT.to_string()),
        ("unix_socket_directories", path(server.socket_directory)),
        ("unix_socket_permissions", text("0700")),
        ("hba_file", path(server.hba_file)),
        ("ident_file", path(server.ident_file)),
        ("ssl", text("off")),
        // Whom it reaches: nobody. Without the workers of logical replication, the copy of a subscriber does not
        // connect to the publisher and does not take what the subscriber waits for.
        ("archive_mode", text("off")),
        ("primary_conninfo", String::new()),
        ("synchronous_standby_names", String::new()),
        ("max_wal_senders", text("0")),
        ("max_logical_replication_workers", text("0")),
        ("max_replication_slots", ORIGINS_MAX.to_string()),
        ("shared_preload_libraries", text(server.preload)),
        // Without hot standby, recovery never stops for limits that the primary raised on the way.
        ("hot_standby", text("off")),
        ("wal_level", text("replica")),
        ("max_connections", limit(limits.max_connections, 20)),
        ("max_worker_processes", limit(limits.max_worker_processes, 8)),
        ("max_prepared_transactions", limit(limits.max_prepared_transactions, 100)),
        ("max_locks_per_transaction", limit(limits.max_locks_per_transaction, 64)),
        // How much it takes.
        ("shared_buffers", text(SHARED_BUFFERS)),
        ("huge_pages", text("off")),
        ("max_parallel_workers", text("0")),
        ("max_parallel_workers_per_gather", text("0")),
        ("max_parallel_maintenance_workers", text("0")),
        ("autovacuum", text("off")),
        ("jit", text("off")),
        ("min_wal_size", format!("{}MB", (segment_mib * 2).max(32))),
        ("max_wal_size", format!("{}MB", (segment_mib * 4).max(256))),
        // The copy is thrown away: nothing in it need survive a crash.
        ("fsync", text("off")),
        ("full_page_writes", text("off")),
        ("synchronous_commit", text("off")),
        ("restart_after_crash", text("off")),
        // What is read in its log, and in answers to its users' questions.
        ("logging_collector", text("off")),
        ("log_destination", text("stderr")),
        ("log_line_prefix", text("%m [%p] ")),
        ("log_timezone", text("UTC")),
        ("lc_messages", text("C")),
        ("timezone", text("UTC")),
        ("datestyle", text("ISO, MDY")),
    ];
    if server.major >= 17 {
        // A trigger on login may do anything, to anybody.
        settings.push(("event_triggers", text("off")));
    }
    if server.major >= 18 {
        settings.push(("max_active_replication_origins", ORIGINS_MAX.to_string()));
    }
    settings
}

/// The port of a private server: it names its socket, and nothing listens on it.
pub const DRILL_PORT: u16 = 5432;

/// Returns whether recovery to this point ends before the record of a transaction that ended at `unix_micros`.
pub fn ends_before(point: &RecoveryPoint, ended_unix_micros: i64) -> bool {
    matches!(point, RecoveryPoint::Time { unix_micros } if ended_unix_micros > *unix_micros)
}

/// Returns the database that a check is for: what its first line says, `-- database: NAME`, else `postgres`.
pub fn database_of_check(sql: &str) -> &str {
    let first = sql.lines().next().unwrap_or_default().trim();
    let comment = first.strip_prefix("--").map(str::trim_start);
    let name = comment.and_then(|comment| comment.strip_prefix("database:")).map(str::trim);
    name.filter(|name| !name.is_empty()).unwrap_or("postgres")
}

/// Returns rows as `psql --no-align --tuples-only` prints them: fields with `|` between them, nothing for a null.
pub fn rows_as_text(rows: &[Vec<Option<String>>]) -> String {
    let mut text = String::new();
    for row in rows {
        let fields: Vec<&str> = row.iter().map(|field| field.as_deref().unwrap_or("")).collect();
        text.push_str(&fields.join("|"));
        text.push('\n');
    }
    text
}

/// Returns how rows differ from those expected; `None` where they do not. Empty lines at the end do not count, nor
/// how lines end.
pub fn difference(expected: &str, found: &str) -> Option<String> {
    let lines = |text: &str| -> Vec<String> {
        text.trim_end_matches(['\n', '\r']).lines().map(str::to_owned).collect()
    };
    let (expected, found) = (lines(expected), lines(found));
    let shown = |line: Option<&String>| match line {
        None => "no more rows".to_owned(),
        Some(line) => format!("`{}`", line.chars().take(LINE_SHOWN_MAX).collect::<String>()),
    };
    let longest = expected.len().max(found.len());
    let at = (0..longest).find(|at| expected.get(*at) != found.get(*at))?;
    Some(format!(
        "row {}: expected {}, found {} ({} rows expected, {} found)",
        at + 1,
        shown(expected.get(at)),
        shown(found.get(at)),
        expected.len(),
        found.len()
    ))
}

/// Returns the records that go: those that began before `oldest_kept`, and those beyond [`RECORDS_KEPT_MAX`]; never
/// the newest. `ids` are sorted, newest first.
pub fn records_to_remove<'a>(ids: &'a [BackupId], oldest_kept: &BackupId) -> Vec<&'a BackupId> {
    let goes = |(at, id): &(usize, &BackupId)| *at >= RECORDS_KEPT_MAX || *id < oldest_kept;
    ids.iter().enumerate().skip(1).filter(goes).map(|(_, id)| id).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn server(major: u32, limits: StandbyLimits) -> Vec<Setting> {
        private_settings(&PrivateServer {
            major,
            socket_directory: Path::new("/s"),
            hba_file: Path::new("/h"),
            ident_file: Path::new("/i"),
            limits,
            segment_size: SegmentSize::new(1 << 30).unwrap(),
            preload: "",
        })
    }

    const LIMITS: StandbyLimits = StandbyLimits {
        max_connections: 500,
        max_worker_processes: 2,
        max_wal_senders: 10,
        max_prepared_transactions: 0,
        max_locks_per_transaction: 1024,
    };

    #[test]
    fn a_private_server_reaches_nobody_and_is_not_below_what_the_cluster_needs() {
        for major in 14..=18 {
            let settings = server(major, LIMITS);
            let value = |name: &str| {
                let all: Vec<_> = settings.iter().filter(|(known, _)| *known == name).collect();
                assert!(all.len() <= 1, "{name} is set twice");
                all.first().map(|(_, value)| value.as_str())
            };
            for name in ["listen_addresses", "primary_conninfo", "synchronous_standby_names"] {
                assert_eq!(value(name), Some(""), "{name}");
            }
            assert_eq!(value("archive_mode"), Some("off"));
            assert_eq!(value("max_logical_replication_workers"), Some("0"));
            assert_eq!(value("max_connections"), Some("500"));
            assert_eq!(value("max_locks_per_transaction"), Some("1024"));
            assert_eq!(value("max_worker_processes"), Some("8"));
            assert_eq!(value("min_wal_size"), Some("2048MB"), "at least two segments");
            assert_eq!(value("event_triggers").is_some(), major >= 17);
            assert_eq!(value("max_active_replication_origins").is_some(), major >= 18);
        }
    }

    #[test]
    fn a_check_names_its_database_in_its_first_line() {
        assert_eq!(database_of_check("-- database: shop\nselect 1"), "shop");
        assert_eq!(database_of_check("--database:shop  \r\nselect 1"), "shop");
        assert_eq!(database_of_check("select 1 -- database: shop"), "postgres");
        assert_eq!(database_of_check("\n-- database: shop"), "postgres");
        assert_eq!(database_of_check("-- database:"), "postgres");
        assert_eq!(database_of_check(""), "postgres");
    }

    #[test]
    fn rows_are_compared_as_psql_prints_them() {
        let rows = vec![vec![Some("1".into()), None, Some("a b".into())], vec![Some("2".into())]];
        assert_eq!(rows_as_text(&rows), "1||a b\n2\n");
        assert_eq!(difference("1||a b\r\n2", "1||a b\n2\n"), None);
        assert_eq!(difference("", ""), None);
        let told = difference("1\n2\n", "1\n3\n").unwrap();
        assert_eq!(told, "row 2: expected `2`, found `3` (2 rows expected, 2 found)");
        let told = difference("1\n", "").unwrap();
        assert_eq!(told, "row 1: expected `1`, found no more rows (1 rows expected, 0 found)");
    }

    #[test]
    fn the_newest_record_stays_whatever_its_age() {
        let id = |text: &str| text.parse::<BackupId>().unwrap();
        let ids = ["20240102T000000Z", "20240101T000000Z-2", "20240101T000000Z"].map(id);
        let gone = records_to_remove(&ids, &id("20260101T000000Z"));
        assert_eq!(gone, [&ids[1], &ids[2]]);
        assert!(records_to_remove(&ids, &id("20240101T000000Z")).is_empty());
        assert!(records_to_remove(&[], &id("20240101T000000Z")).is_empty());
    }

    proptest! {
        #[test]
        fn a_random_moment_is_one_of_those_that_can_be_reached(
            seed: u64,
            stretches in proptest::collection::vec((1u32..5, 0u64..1 << 40, 0u64..1 << 30), 1..6),
        ) {
            let moments: Vec<Moments> = stretches.into_iter().map(|(timeline, first, length)| Moments {
                timeline: Timeline(timeline),
                first_lsn: Lsn(first),
                last_lsn: Lsn(first + length),
            }).collect();
            let (timeline, lsn) = random_moment(&moments, seed).unwrap();
            let holds = |one: &Moments| {
                one.timeline == timeline && (one.first_lsn..=one.last_lsn).contains(&lsn)
            };
            prop_assert!(moments.iter().any(holds));
            prop_assert_eq!(random_moment(&moments, seed), Some((timeline, lsn)));
        }

        #[test]
        fn no_stretch_is_left_out_and_one_without_a_moment_is_never_taken(seed in 0u64..1000) {
            let at = |timeline: u32, first: u64, last: u64| Moments {
                timeline: Timeline(timeline), first_lsn: Lsn(first), last_lsn: Lsn(last),
            };
            let moments = [at(1, 10, 19), at(2, 50, 40), at(3, 0, 9)];
            let seen: std::collections::BTreeSet<u32> = (0..200)
                .map(|n| random_moment(&moments, seed * 1000 + n).unwrap().0.0)
                .collect();
            prop_assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1, 3]);
            prop_assert_eq!(random_moment(&[at(2, 50, 40)], seed), None);
            prop_assert_eq!(random_moment(&[], seed), None);
        }

        #[test]
        fn different_rows_are_always_told(expected in "[a-c\n]{0,8}", found in "[a-c\n]{0,8}") {
            let same = expected.trim_end_matches('\n') == found.trim_end_matches('\n');
            prop_assert_eq!(difference(&expected, &found).is_none(), same);
        }

        #[test]
        fn records_that_stay_are_young_and_not_too_many(days in proptest::collection::vec(1u32..29, 0..40)) {
            let mut ids: Vec<BackupId> =
                days.iter().map(|day| format!("202601{day:02}T000000Z").parse().unwrap()).collect();
            ids.sort_unstable_by(|one, other| other.cmp(one));
            let oldest: BackupId = "20260115T000000Z".parse().unwrap();
            let gone = records_to_remove(&ids, &oldest);
            prop_assert!(gone.iter().all(|id| **id < oldest));
            let old = ids.iter().skip(1).filter(|id| **id < oldest).count();
            prop_assert_eq!(gone.len(), old);
        }
    }
}

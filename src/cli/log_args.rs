//! Arguments of `log`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::args::{absolute, usage};
use super::environment::Environment;
use super::requests::{DroppedTable, LogRequest, NamesSource};
use super::target::{TargetTime, parse_time, parse_timeline, parse_xid};
use crate::failure::Failure;
use crate::pg::{Lsn, PgTimestamp};
use crate::plan::log::filter::{Bound, Filter, Kinds, RelationChoice};
use crate::plan::target::RecoveryPoint;

/// How many deleted rows make a large delete unless told otherwise.
const LARGE_DELETE_ROWS: u64 = 10_000;

const NEXT: &str = "`highwater log --help` shows each form";

/// Arguments of `log`.
#[derive(Args)]
pub struct LogArgs {
    /// From here on: a time or an LSN (included)
    #[arg(long, value_name = "WHEN")]
    since: Option<String>,
    /// Up to here: a time or an LSN (excluded)
    #[arg(long, value_name = "WHEN")]
    until: Option<String>,
    /// Only this transaction, or the one that this subtransaction belongs to
    #[arg(long, value_name = "XID")]
    xid: Option<String>,
    /// Only transactions in this database, by name or OID
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// Only transactions that touched this relation: NAME, SCHEMA.NAME or its file's number
    #[arg(long, value_name = "NAME")]
    relation: Option<String>,
    /// Only these kinds, with commas between: commits, aborts, restore-points, promotions, drops
    /// and large-deletes
    #[arg(long, value_name = "KINDS", value_delimiter = ',', hide_possible_values = true)]
    kinds: Vec<KindArg>,
    /// Tell aborts as well
    #[arg(long, conflicts_with = "kinds")]
    aborts: bool,
    /// How many deleted rows make a large delete
    #[arg(
        long, value_name = "ROWS", default_value_t = LARGE_DELETE_ROWS,
        value_parser = clap::value_parser!(u64).range(1..)
    )]
    large_delete: u64,
    /// Oldest first, not newest first
    #[arg(long)]
    oldest_first: bool,
    /// At most so many lines
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// The timeline whose way is read: current (the newest backup's), latest or a number
    #[arg(long, value_name = "TIMELINE", default_value = "latest")]
    timeline: String,
    /// Where names come from: backup (the nearest), server (--dsn, as it is now) or none
    #[arg(long, value_name = "WHERE", default_value = "backup", hide_possible_values = true)]
    names: NamesSource,
    /// Find the last drop of this table, and print the restore command that goes to just before it
    #[arg(
        long, value_name = "TABLE",
        conflicts_with_all = ["since", "until", "xid", "relation", "kinds", "aborts", "oldest_first", "limit"]
    )]
    before_drop: Option<String>,
    /// The directory for the command that --before-drop prints
    #[arg(long, value_name = "DIR", requires = "before_drop")]
    pgdata: Option<PathBuf>,
}

/// `--kinds`.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KindArg {
    Commits,
    Aborts,
    RestorePoints,
    Promotions,
    Drops,
    LargeDeletes,
}

impl LogArgs {
    /// Checks what was typed.
    pub(super) fn into_request(self, environment: &Environment) -> Result<LogRequest, Failure> {
        let wrong = |flag: &str, reason: String| usage(&format!("{flag}: {reason}"), NEXT);
        let mut in_full = Vec::new();
        let mut bound = |flag: &str, text: Option<String>| {
            let Some(text) = text else { return Ok(None) };
            if let Ok(lsn) = text.trim().parse::<Lsn>() {
                return Ok(Some(Bound::Lsn(lsn)));
            }
            let time = parse_time(&text, || environment.time_zone());
            let time =
                time.map_err(|error| wrong(flag, format!("{error}, or an LSN: 16/B374D848")))?;
            let TargetTime { point: RecoveryPoint::Time { unix_micros }, in_full: full } = time
            else {
                return Err(wrong(flag, "it is a time or an LSN".to_owned()));
            };
            in_full.push(format!("{flag} is {full}"));
            Ok(Some(Bound::Time(PgTimestamp::from_unix_micros(unix_micros))))
        };
        let since = bound("--since", self.since)?;
        let until = bound("--until", self.until)?;
        let xid = match self.xid.as_deref().map(parse_xid).transpose() {
            Ok(Some(RecoveryPoint::Xid(xid))) => Some(xid),
            Ok(_) => None,
            Err(error) => return Err(wrong("--xid", error.to_string())),
        };
        let timeline = parse_timeline(&self.timeline);
        let timeline = timeline.map_err(|error| wrong("--timeline", error.to_string()))?;
        let relation = relation("--relation", self.relation.as_deref())?;
        let before_drop = match relation_name(self.before_drop.as_deref())? {
            None => None,
            Some((schema, name)) => {
                let pgdata = self.pgdata.as_deref().map(absolute).transpose()?;
                Some(DroppedTable { schema, name, pgdata })
            }
        };
        let kinds = kinds(&self.kinds, self.aborts);
        Ok(LogRequest {
            timeline,
            filter: Filter { since, until, xid, kinds, large_delete_rows: self.large_delete },
            in_full,
            relation,
            database: self.database,
            oldest_first: self.oldest_first,
            limit: self.limit,
            names: self.names,
            before_drop,
        })
    }
}

fn kinds(only: &[KindArg], aborts: bool) -> Kinds {
    if only.is_empty() {
        return Kinds { aborts, ..Kinds::USUAL };
    }
    let has = |kind| only.contains(&kind);
    Kinds {
        commits: has(KindArg::Commits),
        aborts: has(KindArg::Aborts),
        restore_points: has(KindArg::RestorePoints),
        promotions: has(KindArg::Promotions),
        drops: has(KindArg::Drops),
        large_deletes: has(KindArg::LargeDeletes),
    }
}

fn relation(flag: &str, text: Option<&str>) -> Result<Option<RelationChoice>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let reason = format!("{flag}: `{text}` names no relation");
    let next = "write NAME, SCHEMA.NAME, the number of its files, or TABLESPACE/DATABASE/FILE";
    RelationChoice::parse(text).map(Some).ok_or_else(|| usage(&reason, next))
}

/// A table that is dropped has no files any more to be named by.
fn relation_name(text: Option<&str>) -> Result<Option<(Option<String>, String)>, Failure> {
    match relation("--before-drop", text)? {
        None => Ok(None),
        Some(RelationChoice::Name { schema, name }) => Ok(Some((schema, name))),
        Some(_) => Err(usage(
            "--before-drop takes a name, not the number of files",
            "write TABLE or SCHEMA.TABLE; `highwater log --relation` takes numbers",
        )),
    }
}

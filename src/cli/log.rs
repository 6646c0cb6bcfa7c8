//! Running `log`, and what a person reads of it.

use std::sync::atomic::{AtomicBool, Ordering};

use jiff::tz::TimeZone;
use serde::Serialize;

use super::dispatch::{Ended, Surroundings};
use super::drivers::{open_repository, program, repository_flags, run_parallel, server};
use super::output::one_line;
use super::requests::{DroppedTable, LogRequest, NamesSource};
use super::two::either;
use crate::failure::{Failure, Kind};
use crate::ops;
use crate::ops::log::{
    DatabaseName, DropFound, EndLine, Line, NamesFrom, RelationLine, RelationName, Removal, Told,
    TransactionLine,
};
use crate::pg::PgTimestamp;

/// Threads that fetch and walk segments.
const THREADS: usize = 3;

/// Relations that a line of text names; the rest is counted.
const NAMED_MAX: usize = 6;

/// What stands for the directory that the user has not named.
const SOME_DIRECTORY: &str = "NEW_DIRECTORY";

pub(super) fn log(request: LogRequest, surroundings: &Surroundings<'_>) -> Result<(), Ended> {
    for full in &request.in_full {
        surroundings.output.say(full);
    }
    if let Some(table) = request.before_drop.clone() {
        return Ok(before_drop(request, table, surroundings)?);
    }
    let end = either(surroundings, |one, began| log_from(request.clone(), one, began))?;
    if end.gaps > 0 { Err(Ended::Said(Kind::Integrity)) } else { Ok(()) }
}

/// Tells from one repository; `began` is set once a line is printed.
fn log_from(
    request: LogRequest,
    surroundings: &Surroundings<'_>,
    began: &AtomicBool,
) -> Result<EndLine, Failure> {
    let opened = open_repository(surroundings)?;
    let output = surroundings.output;
    let zone = surroundings.environment.time_zone().unwrap_or(TimeZone::UTC);
    let names = match request.names {
        NamesSource::Backup => NamesFrom::Backup,
        NamesSource::Server => NamesFrom::Server(Box::new(server(surroundings)?)),
        NamesSource::None => NamesFrom::Nowhere,
    };
    let request = ops::log::Request {
        timeline: request.timeline,
        filter: request.filter,
        relation: request.relation,
        database: request.database,
        oldest_first: request.oldest_first,
        limit: request.limit,
        names,
    };
    let mut tell = |line: &Line| {
        let text = if output.json { json(line)? } else { text(line, &zone) };
        // What only the last line says goes to people on stderr.
        began.store(true, Ordering::SeqCst);
        let goes_on = if text.is_empty() { true } else { output.line(&text)? };
        Ok(if goes_on { Told::GoOn } else { Told::Enough })
    };
    let end = run_parallel(THREADS, ops::log::run(&opened.repository, &request, &mut tell))?;
    if let Some(remark) = remark(&end, &request.names) {
        output.say(&remark);
    }
    Ok(end)
}

fn json(line: &Line) -> Result<String, Failure> {
    serde_json::to_string(line).map_err(|error| {
        let (what, unharmed) = ("could not make JSON of a line", "Nothing was changed.");
        Failure::new(Kind::Bug, what, unharmed, "please report this").because(error)
    })
}

/// Says what a reader of the lines should know as well.
fn remark(end: &EndLine, names: &NamesFrom) -> Option<String> {
    let mut parts = Vec::new();
    if end.gaps > 0 {
        parts.push(format!("{} gaps in WAL: what happened there is not told", end.gaps));
    }
    if end.unnamed_relations > 0 && !matches!(names, NamesFrom::Nowhere) {
        let other = match names {
            NamesFrom::Backup => {
                "the nearest backups do not know them; `--names server` asks the server"
            }
            _ => "the server does not know them any more, or not yet when they were written",
        };
        parts.push(format!("{} relations are told by their files: {other}", end.unnamed_relations));
    }
    if end.lines == 0 && end.complete {
        parts.push("nothing was found".to_owned());
    }
    (!parts.is_empty()).then(|| parts.join("; "))
}

/// Returns a line as text: `time  LSN  what`. Of the last line, nothing.
fn text(line: &Line, zone: &TimeZone) -> String {
    let (time, lsn, what) = match line {
        Line::Commit(end) => (end.time, end.lsn, transaction("commit", end)),
        Line::Abort(end) => (end.time, end.lsn, transaction("abort", end)),
        Line::RestorePoint { time, lsn, name, .. } => {
            (*time, *lsn, format!("restore point `{name}`"))
        }
        Line::Promotion { time, lsn, timeline, from_timeline, .. } => {
            (*time, *lsn, format!("PROMOTION: timeline {timeline} begins, {from_timeline} ends"))
        }
        Line::Gap { start_lsn, end_lsn, why } => {
            let why = why.as_ref().map_or_else(String::new, |why| format!(" ({why})"));
            let text = format!("GAP: no WAL from {start_lsn} to {end_lsn}{why}");
            return one_line(&text);
        }
        Line::End(_) => return String::new(),
    };
    format!("{}  {lsn}  {}", in_zone(time, zone), one_line(&what))
}

/// `2026-11-22 03:00:00.123456+02:00`
fn in_zone(time: PgTimestamp, zone: &TimeZone) -> String {
    let moment = time.to_jiff().map(|moment| moment.to_zoned(zone.clone()));
    let shown = moment.map(|moment| moment.strftime("%Y-%m-%d %H:%M:%S.%6f%:z").to_string());
    shown.unwrap_or_else(|| time.to_string())
}

fn transaction(verb: &str, end: &TransactionLine) -> String {
    let prepared = if end.prepared { " prepared" } else { "" };
    let xid = end.xid.map_or_else(|| "?".to_owned(), |xid| xid.to_string());
    let place =
        end.database.as_ref().map_or_else(String::new, |it| format!(" in {}", database(it)));
    let at_least = if end.records_exact { "" } else { "at least " };
    let records = if end.records == 1 { "record" } else { "records" };
    let mut text = format!("{verb}{prepared} {xid}{place}, {at_least}{} {records}", end.records);
    for dropped in &end.dropped_databases {
        text.push_str(&format!(
            "; DROPS DATABASE {} at {}",
            database(&dropped.database),
            dropped.lsn
        ));
    }
    for tablespace in &end.dropped_tablespaces {
        text.push_str(&format!("; DROPS TABLESPACE {tablespace}"));
    }
    if !end.truncated.is_empty() {
        let tables = end.truncated.iter().map(|table| {
            table.name.clone().unwrap_or_else(|| format!("the table with OID {}", table.oid))
        });
        text.push_str(&format!("; TRUNCATES {}", some_of(tables.collect(), 0)));
    }
    if let Some(removal) = end.removal() {
        let what = match removal {
            Removal::Drop => "DROPS",
            Removal::Replacement => "REPLACES (by TRUNCATE, VACUUM FULL or the like)",
        };
        let listed: Vec<&RelationName> = end.removed.iter().map(|it| &it.relation).collect();
        let more = (end.removed_files as usize).saturating_sub(listed.len());
        text.push_str(&format!("; {what} {}", named(&listed, more)));
    }
    if end.large_delete {
        let from = end.relations.iter().filter(|it| it.deleted_rows > 0);
        let from: Vec<&RelationName> = from.map(|it| &it.relation).collect();
        text.push_str(&format!("; DELETES {} rows from {}", end.deleted_rows, named(&from, 0)));
    }
    let touched: Vec<&RelationName> =
        end.relations.iter().map(|RelationLine { relation, .. }| relation).collect();
    let touched = of_users(&touched);
    if !touched.is_empty() {
        let more = if end.more_relations { " and more" } else { "" };
        text.push_str(&format!(": {}{more}", some_of(touched, 0)));
    }
    text
}

fn database(database: &DatabaseName) -> String {
    database.name.clone().unwrap_or_else(|| format!("database {}", database.oid))
}

/// Names what people know: tables first, and whatever has no name.
fn named(relations: &[&RelationName], more: usize) -> String {
    let shown = of_users(relations);
    if shown.is_empty() {
        let all: Vec<String> = relations.iter().map(|relation| shown_name(relation)).collect();
        return some_of(all, more);
    }
    let hidden = relations.len() - shown.len();
    some_of(shown, more + hidden)
}

/// Leaves out catalogs, indexes and the long values of tables, where a name tells them.
fn of_users(relations: &[&RelationName]) -> Vec<String> {
    let is_shown = |relation: &&&RelationName| {
        let is_own =
            |name: &str| !name.starts_with("pg_catalog.") && !name.starts_with("pg_toast.");
        relation.relation_kind != Some("index") && relation.name.as_deref().is_none_or(is_own)
    };
    relations.iter().filter(is_shown).map(|relation| shown_name(relation)).collect()
}

fn shown_name(relation: &RelationName) -> String {
    let RelationName { tablespace, database, file, name, .. } = relation;
    name.clone().unwrap_or_else(|| format!("file {tablespace}/{database}/{file}"))
}

/// Names the first few, and counts the rest with `more` others.
fn some_of(mut names: Vec<String>, more: usize) -> String {
    let more = more + names.len().saturating_sub(NAMED_MAX);
    names.truncate(NAMED_MAX);
    let listed = names.join(", ");
    if more > 0 { format!("{listed} and {more} more") } else { listed }
}

/// The document of `log --before-drop`. Field names are part of the contract of `--json`.
#[derive(Debug, Serialize)]
struct DropDocument {
    #[serde(flatten)]
    found: DropFound,
    /// The command that brings the cluster to just before the drop, for a shell.
    command: String,
}

fn before_drop(
    request: LogRequest,
    table: DroppedTable,
    surroundings: &Surroundings<'_>,
) -> Result<(), Failure> {
    let zone = surroundings.environment.time_zone().unwrap_or(TimeZone::UTC);
    let asked = ops::log::BeforeDrop {
        timeline: request.timeline,
        schema: table.schema,
        name: table.name,
        database: request.database,
    };
    let found = either(surroundings, |one, _| {
        let opened = open_repository(one)?;
        run_parallel(THREADS, ops::log::before_drop(&opened.repository, &asked))
    })?;
    let pgdata = table
        .pgdata
        .map_or_else(|| SOME_DIRECTORY.to_owned(), |pgdata| pgdata.display().to_string());
    let mut words = vec![program()?.display().to_string()];
    words.extend(repository_flags(surroundings));
    words.extend(["restore".to_owned(), "--pgdata".to_owned(), pgdata]);
    words.extend(["--to-lsn".to_owned(), found.lsn.to_string(), "--exclusive".to_owned()]);
    words.extend(["--timeline".to_owned(), found.timeline.to_string()]);
    // Paused there, the server would still hold the lock of the transaction that drops the table.
    words.extend(["--target-action".to_owned(), "promote".to_owned()]);
    let words: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let document = DropDocument { found, command: words.join(" ") };
    surroundings.output.report(&document, |document| drop_text(document, &zone))
}

fn drop_text(document: &DropDocument, zone: &TimeZone) -> String {
    let DropDocument { found, command } = document;
    let at =
        found.dropped_at.map_or_else(String::new, |time| format!(" at {}", in_zone(time, zone)));
    let by = found.xid.map_or_else(String::new, |xid| format!(" by transaction {xid}"));
    let with = if found.with_database { " with the whole database" } else { "" };
    let place = match found.dropped {
        "database" => String::new(),
        _ => format!(" of database `{}`", found.database),
    };
    let what = one_line(&format!("{} `{}`{place}", found.dropped, found.name));
    format!(
        "{what} was dropped{at}{by}{with}, LSN {}\n\
         to just before that, from backup {}, with everything that was committed until then:\n  {command}\n",
        found.lsn, found.backup
    )
}

/// Quotes a word for a POSIX shell, if it needs it.
fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+,".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests;

//! `log --before-drop`: the last moment at which a table stood, and whether a restore reaches it.
//!
//! From each backup on, newest first, WAL is read forward up to the next backup, with the rows of `pg_class` that the
//! backup holds (`plan::log::last_drop`). The first such stretch in which the table ended has its last end.

use serde::Serialize;

use super::catalog::BackupCatalog;
use super::scan::each_record;
use super::{Holdings, UNHARMED, gather};
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Committed};
use crate::ops::failures::of_repo;
use crate::pg::{Lsn, PgTimestamp, Timeline};
use crate::plan::log::filter::{Filter, Kinds};
use crate::plan::log::fold::Keep;
use crate::plan::log::last_drop::{Dropped, TableEnd, TableWatch, WantedTable};
use crate::plan::log::route::{Route, Stop};
use crate::plan::restore::{Reach, candidates, for_lsn};
use crate::plan::target::TimelineChoice;
use crate::repo::{RepoError, Repository};

/// What is asked.
#[derive(Debug, Clone)]
pub struct BeforeDrop {
    /// The timeline whose way is read.
    pub timeline: TimelineChoice,
    /// The schema; `None` for any.
    pub schema: Option<String>,
    /// The table's name; without a schema also a database's.
    pub name: String,
    /// The database: a name or an OID; `None` for any.
    pub database: Option<String>,
}

/// The drop that was found. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
pub struct DropFound {
    /// What was dropped: its name with its schema, or that of the database.
    pub name: String,
    /// `table`, `index` and so on, or `database`.
    pub dropped: &'static str,
    /// The database's name; its OID where no catalog tells it.
    pub database: String,
    /// Whether it went with the whole database.
    pub with_database: bool,
    /// When the drop was committed; null where that is not in WAL.
    pub dropped_at: Option<PgTimestamp>,
    /// The transaction.
    pub xid: Option<u32>,
    /// Where the record begins that must not be replayed: the target of the restore, exclusive.
    pub lsn: Lsn,
    /// The timeline to follow.
    pub timeline: Timeline,
    /// The backup that a restore begins with.
    pub backup: BackupId,
}

/// The name of a table as it is asked for, for messages.
fn asked_for(request: &BeforeDrop) -> String {
    match &request.schema {
        Some(schema) => format!("{schema}.{}", request.name),
        None => request.name.clone(),
    }
}

/// What a look at one stretch has left to say if no drop is found.
#[derive(Default)]
struct Doubts {
    renamed: Option<(Lsn, String)>,
    is_standing: bool,
    unknown_deletions: u64,
    gaps: u64,
    had_room: bool,
}

/// Looks for the last drop of a table.
///
/// # Errors
/// [`Kind::Absent`]: the WAL between the first backup and now drops no such table, all of it being there and
/// understood. [`Kind::Integrity`]: it was dropped and no backup reaches that moment, or a gap may hide the drop.
pub async fn before_drop(
    repository: &Repository,
    request: &BeforeDrop,
) -> Result<DropFound, Failure> {
    let holdings = gather(repository, request.timeline).await?;
    let on_way = holdings.on_way();
    let route = holdings.route();
    let mut doubts = Doubts { had_room: true, ..Doubts::default() };
    let mut end_lsn = Lsn(u64::MAX);
    for (number, backup) in on_way.iter().enumerate().rev() {
        let failed = |error: RepoError| {
            of_repo(
                error,
                format!("could not look for the drop behind backup {}", backup.id),
                UNHARMED,
            )
        };
        let stretch = route.between(backup.start_lsn, end_lsn);
        let is_newest = number + 1 == on_way.len();
        let looking = Looking { repository, request, holdings: &holdings, backup, is_newest };
        let found = looking.look(&stretch, &mut doubts).await.map_err(failed)?;
        if let Some((end, database)) = found {
            return reachable(&holdings, request, &end, database);
        }
        end_lsn = backup.start_lsn;
    }
    Err(not_found(request, &doubts, on_way.is_empty()))
}

/// One stretch of WAL, from a backup to the next.
struct Looking<'a> {
    repository: &'a Repository,
    request: &'a BeforeDrop,
    holdings: &'a Holdings,
    backup: &'a Committed,
    is_newest: bool,
}

impl Looking<'_> {
    /// Returns the last end of the table in a stretch, and its database's name.
    async fn look(
        &self,
        stretch: &Route,
        doubts: &mut Doubts,
    ) -> Result<Option<(TableEnd, String)>, RepoError> {
        let mut catalog = BackupCatalog::open(self.repository, self.backup).await?;
        let BeforeDrop { schema, name, database, .. } = self.request;
        let is_it = |(oid, own): &(&u32, &String)| {
            database.as_ref().is_some_and(|asked| **own == *asked || oid.to_string() == *asked)
        };
        let asked = catalog.databases().iter().find(is_it).map(|(oid, _)| *oid);
        if database.is_some() && asked.is_none() {
            // It is not there yet, or not any more.
            return Ok(None);
        }
        let (schema, name) = (schema.clone(), name.clone());
        let wanted = WantedTable { database: asked, schema, name };
        let mut watch = TableWatch::new(wanted, catalog.version());
        for oid in catalog.stored_databases() {
            if asked.is_none_or(|asked| asked == oid) {
                add_database(&mut watch, &mut catalog, oid).await?;
            }
        }
        let filter = Filter {
            since: None,
            until: None,
            xid: None,
            kinds: Kinds::NONE,
            large_delete_rows: u64::MAX,
        };
        let source = self.holdings.source(self.repository, &filter, Keep::Oldest);
        let from = self.backup.start_lsn;
        let segments = stretch.stops().filter_map(|stop| match stop {
            Stop::Segment(segment) => Some(segment),
            Stop::Gap(_) => None,
        });
        let mut lost = stretch.gaps().count() as u64;
        let on_record = |record: &crate::pg::WalRecord<'_>| {
            if record.lsn >= from {
                watch.add(record);
            }
        };
        each_record(&source, segments, on_record, |stop, why| {
            tracing::warn!("segment {} cannot be read: {why}", stop.name);
            lost += 1;
        })
        .await?;
        doubts.gaps += lost;
        doubts.unknown_deletions += watch.unknown_deletions();
        doubts.had_room &= watch.has_room();
        doubts.renamed = doubts.renamed.take().or_else(|| watch.last_rename().cloned());
        doubts.is_standing |= self.is_newest && watch.is_standing();
        let database = |oid: u32| {
            let name = catalog.databases().get(&oid);
            name.cloned().unwrap_or_else(|| oid.to_string())
        };
        Ok(watch.last_end().map(|end| (end.clone(), database(end.database))))
    }
}

async fn add_database(
    watch: &mut TableWatch,
    catalog: &mut BackupCatalog,
    oid: u32,
) -> Result<(), RepoError> {
    let files = catalog.files_of(oid).await?;
    let name = catalog.databases().get(&oid).cloned().unwrap_or_else(|| oid.to_string());
    watch.add_database(oid, name, files.class, files.namespace);
    for (namespace, name) in catalog.namespaces(oid, files.namespace).await? {
        watch.add_namespace(oid, namespace, name);
    }
    let mut pages = Vec::new();
    let row = |row: super::catalog::CatalogRow<'_>| {
        watch.add_row((oid, row.place), row.state, row.xmax, row.columns);
    };
    catalog.rows_of(oid, files.class, |block, lsn| pages.push((block, lsn)), row).await?;
    for (block, lsn) in pages {
        watch.add_page(oid, block, lsn);
    }
    Ok(())
}

/// Finds the backup that a restore to the moment begins with.
fn reachable(
    holdings: &Holdings,
    request: &BeforeDrop,
    end: &TableEnd,
    database: String,
) -> Result<DropFound, Failure> {
    let (name, dropped) = match &end.dropped {
        Dropped::Database => (request.name.clone(), "database"),
        Dropped::Relation { schema, kind, .. } => {
            let schema = schema.as_deref().or(request.schema.as_deref()).unwrap_or("?");
            (format!("{schema}.{}", request.name), kind.word())
        }
    };
    let coverage = holdings.inventory.coverage();
    let held = crate::plan::restore::Holdings {
        backups: &holdings.backups,
        coverage: &coverage,
        histories: &holdings.histories,
        segment_size: holdings.identity.segment_size,
    };
    let chosen = candidates(&held, &holdings.way, None).and_then(|usable| {
        // A record begins there, so PostgreSQL stops there.
        for_lsn(&usable, end.lsn, false, |one| Reach {
            last_xact_time: None,
            last_record_lsn: Some(one.unbroken_end),
        })
    });
    let chosen = chosen.map_err(|why| {
        let at = end.time.map_or_else(String::new, |time| format!(" at {time}"));
        Failure::new(
            Kind::Integrity,
            format!("`{name}` was dropped{at} (LSN {}), and no backup leads to the moment before", end.lsn),
            UNHARMED,
            "`highwater info` shows what can be reached. Older backups may lie in another repository.",
        )
        .because(why)
    })?;
    Ok(DropFound {
        name,
        dropped,
        database,
        with_database: end.with_database,
        dropped_at: end.time,
        xid: end.xid,
        lsn: end.lsn,
        timeline: holdings.way.timeline(),
        backup: chosen.backup.id.clone(),
    })
}

fn not_found(request: &BeforeDrop, doubts: &Doubts, has_no_backup: bool) -> Failure {
    let name = asked_for(request);
    if has_no_backup {
        return Failure::new(
            Kind::Absent,
            format!(
                "there is no backup that a restore to before the drop of `{name}` could begin with"
            ),
            UNHARMED,
            "`highwater info` lists the backups and timelines.",
        );
    }
    let mut next = Vec::new();
    if doubts.is_standing {
        next.push(format!("A table `{name}` stands at the end of the archived WAL; `highwater log --relation {name}` shows what was done to it."));
    }
    if let Some((lsn, to)) = &doubts.renamed {
        next.push(format!(
            "A table of this name was renamed to `{to}` at LSN {lsn}: look for that name."
        ));
    }
    if next.is_empty() {
        next.push("Check the spelling, schema and database: names are taken as the catalog has them, without quotes. `highwater log --kinds drops` lists all drops.".to_owned());
    }
    let what = format!("no drop of `{name}` was found in the WAL behind the oldest backup");
    let hidden = doubts.gaps > 0 || doubts.unknown_deletions > 0 || !doubts.had_room;
    if hidden {
        let failure = Failure::new(Kind::Integrity, what, UNHARMED, next.join(" "));
        let why = format!(
            "it may have been missed: {} gaps in WAL, {} drops whose table is not known",
            doubts.gaps, doubts.unknown_deletions
        );
        return failure.because(why);
    }
    Failure::new(Kind::Absent, what, UNHARMED, next.join(" "))
}

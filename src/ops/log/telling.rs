//! From what was found to what is told: names looked up, names asked for, lines counted.

use std::collections::BTreeSet;

use serde::Serialize;

use super::names::Names;
use crate::failure::Failure;
use crate::ops::failures::of_repo;
use crate::pg::{Lsn, PG_CLASS_OID, PgTimestamp, RelFileLocator, Timeline, TimelineHistory};
use crate::plan::log::filter::{Filter, RelationChoice};
use crate::plan::log::{Entry, Found, TransactionFound};
use crate::plan::window::Gap;
use crate::repo::RepoError;

/// Relations removed by one transaction that are told by name; the rest is counted.
const REMOVED_MAX: usize = 64;

/// Whether whoever listens wants more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Yes.
    GoOn,
    /// No.
    Enough,
}

/// One line of `log`. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Line {
    /// A transaction committed.
    Commit(Box<TransactionLine>),
    /// A transaction aborted.
    Abort(Box<TransactionLine>),
    /// `pg_create_restore_point` was called.
    RestorePoint {
        /// When.
        time: PgTimestamp,
        /// Where its record begins.
        lsn: Lsn,
        /// Where it ends (excluded).
        end_lsn: Lsn,
        /// The timeline.
        timeline: Timeline,
        /// Its name.
        name: String,
    },
    /// A timeline began.
    Promotion {
        /// When; in whole seconds where a checkpoint says it.
        time: PgTimestamp,
        /// Where the record begins that says so.
        lsn: Lsn,
        /// Where it ends (excluded).
        end_lsn: Lsn,
        /// The timeline that began.
        timeline: Timeline,
        /// The one that was left.
        from_timeline: Timeline,
    },
    /// WAL that is missing or cannot be read: what happened in it is not told.
    Gap {
        /// The first missing byte (included).
        start_lsn: Lsn,
        /// The end (excluded).
        end_lsn: Lsn,
        /// Why, where it is more than that nothing is stored.
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// The last line.
    End(EndLine),
}

/// A transaction that ended.
#[derive(Debug, Clone, Serialize)]
#[allow(clippy::struct_excessive_bools)] // each is a field of the contract
pub struct TransactionLine {
    /// When it ended, by the server's clock.
    pub time: PgTimestamp,
    /// Where the record of its end begins.
    pub lsn: Lsn,
    /// Where that ends (excluded).
    pub end_lsn: Lsn,
    /// The timeline.
    pub timeline: Timeline,
    /// Its id; null where the record is too long to be read to it.
    pub xid: Option<u32>,
    /// Whether it was a prepared transaction.
    pub prepared: bool,
    /// How many subtransactions ended with it.
    pub subtransactions: u32,
    /// The database; null where nothing says it.
    pub database: Option<DatabaseName>,
    /// Its records, its end among them.
    pub records: u64,
    /// Whether these are all. Otherwise it began before what was read, and there are more.
    pub records_exact: bool,
    /// Relations that it touched.
    pub relations: Vec<RelationLine>,
    /// Whether it touched more relations than are listed.
    #[serde(skip_serializing_if = "is_false")]
    pub more_relations: bool,
    /// Rows that it deleted.
    pub deleted_rows: u64,
    /// Whether these are as many as `--large-delete` says.
    pub large_delete: bool,
    /// Relation files that its end removes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<RemovedLine>,
    /// How many they are.
    pub removed_files: u32,
    /// Relations that it dropped, indexes and the like included; 0 where it removes files because others replace them.
    pub dropped_relations: u64,
    /// Tables that a TRUNCATE named, where `wal_level = logical` tells it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub truncated: Vec<TableName>,
    /// Databases that it dropped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dropped_databases: Vec<DroppedDatabase>,
    /// Tablespaces that it dropped.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dropped_tablespaces: Vec<u32>,
}

/// A database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatabaseName {
    /// Its OID.
    pub oid: u32,
    /// Its name; null where no catalog tells it.
    pub name: Option<String>,
}

/// A database that was dropped.
#[derive(Debug, Clone, Serialize)]
pub struct DroppedDatabase {
    /// Which.
    #[serde(flatten)]
    pub database: DatabaseName,
    /// Where the record begins whose replay removes it.
    pub lsn: Lsn,
}

/// A table that only its OID tells.
#[derive(Debug, Clone, Serialize)]
pub struct TableName {
    /// Its OID.
    pub oid: u32,
    /// Its name with its schema; null where no catalog tells it.
    pub name: Option<String>,
}

/// A relation's files and its name.
#[derive(Debug, Clone, Serialize)]
pub struct RelationName {
    /// The OID of the tablespace.
    pub tablespace: u32,
    /// The OID of the database; 0 for those of all databases.
    pub database: u32,
    /// The number of its files.
    pub file: u32,
    /// Its name with its schema; null where no catalog tells it.
    pub name: Option<String>,
    /// What it is, where a catalog tells it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relation_kind: Option<&'static str>,
}

/// A relation that a transaction touched.
#[derive(Debug, Clone, Serialize)]
pub struct RelationLine {
    /// Which.
    #[serde(flatten)]
    pub relation: RelationName,
    /// Records that changed it.
    pub records: u64,
    /// Rows deleted from it.
    pub deleted_rows: u64,
}

/// Files that the end of a transaction removes.
#[derive(Debug, Clone, Serialize)]
pub struct RemovedLine {
    /// Whose.
    #[serde(flatten)]
    pub relation: RelationName,
}

/// The end of what is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EndLine {
    /// Lines that were told.
    pub lines: u64,
    /// Gaps in the WAL that was asked for.
    pub gaps: u64,
    /// Whether everything asked for was looked at; false where `--limit` ended it before.
    pub complete: bool,
    /// Different relations that were met and have no name.
    pub unnamed_relations: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_false(flag: &bool) -> bool {
    !flag
}

/// How a removal came about, as far as the transaction's own records say it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// A relation was dropped: a row of `pg_class` was deleted.
    Drop,
    /// Files were replaced by others: TRUNCATE, VACUUM FULL, CLUSTER, REINDEX, ALTER TABLE.
    Replacement,
}

impl TransactionLine {
    /// Returns how its removal of files came about; `None` if it removed none.
    pub fn removal(&self) -> Option<Removal> {
        // Where `pg_class` itself was written anew, only its deleted rows tell.
        let moved = self.relations.iter().find(|line| {
            line.relation.name.as_deref() == Some("pg_catalog.pg_class")
                && line.relation.file != PG_CLASS_OID
        });
        let is_drop = self.dropped_relations > 0 || moved.is_some_and(|it| it.deleted_rows > 0);
        let how = if is_drop { Removal::Drop } else { Removal::Replacement };
        (self.removed_files > 0).then_some(how)
    }
}

/// Relations without a name that are remembered, to be counted once.
const UNNAMED_MAX: usize = 65_536;

/// Tells lines to whoever listens.
pub(super) struct Teller<'t, 'n> {
    pub(super) way: &'t TimelineHistory,
    pub(super) filter: &'t Filter,
    pub(super) relation: Option<&'t RelationChoice>,
    /// A name or an OID.
    pub(super) database: Option<&'t str>,
    pub(super) limit: Option<u64>,
    pub(super) names: Names<'n>,
    pub(super) listener: &'t mut (dyn FnMut(&Line) -> Result<Told, Failure> + Send),
    pub(super) end: EndLine,
    pub(super) unnamed: BTreeSet<RelFileLocator>,
}

impl Teller<'_, '_> {
    /// Tells an entry if it is wanted.
    pub(super) async fn entry(&mut self, entry: Entry) -> Result<Told, Failure> {
        if !self.filter.wants(&entry) {
            return Ok(Told::GoOn);
        }
        let line = match self.line(entry).await {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(Told::GoOn),
            Err(error) => {
                let what = "could not read the names in a backup's catalog";
                return Err(of_repo(error, what, super::UNHARMED));
            }
        };
        self.tell(&line)
    }

    /// Tells a gap. It is told whatever is filtered for: it may hold just that.
    pub(super) fn gap(&mut self, gap: Gap, why: Option<String>) -> Result<Told, Failure> {
        self.end.gaps += 1;
        let Gap { start_lsn, end_lsn } = gap;
        (self.listener)(&Line::Gap { start_lsn, end_lsn, why })
    }

    /// Notes that nothing is left that was asked for.
    pub(super) fn reached_end(&mut self) {
        self.end.complete = true;
    }

    /// Tells the last line.
    pub(super) fn finish(mut self) -> Result<EndLine, Failure> {
        self.end.unnamed_relations = self.unnamed.len() as u64;
        (self.listener)(&Line::End(self.end.clone()))?;
        Ok(self.end)
    }

    fn tell(&mut self, line: &Line) -> Result<Told, Failure> {
        self.end.lines += 1;
        let told = (self.listener)(line)?;
        let is_enough = self.limit.is_some_and(|limit| self.end.lines >= limit);
        Ok(if is_enough { Told::Enough } else { told })
    }

    async fn line(&mut self, entry: Entry) -> Result<Option<Line>, RepoError> {
        let (lsn, end_lsn) = (entry.lsn, entry.end_lsn);
        let timeline = self.way.owner_of(lsn);
        let is_open = self.relation.is_none() && self.database.is_none();
        Ok(match entry.found {
            Found::Transaction(end) => {
                let committed = end.committed;
                let line = self.transaction(*end, (lsn, end_lsn, timeline)).await?;
                line.map(|line| {
                    let line = Box::new(line);
                    if committed { Line::Commit(line) } else { Line::Abort(line) }
                })
            }
            Found::RestorePoint { name, time } => {
                is_open.then_some(Line::RestorePoint { time, lsn, end_lsn, timeline, name })
            }
            Found::Promotion { time, timeline, previous } => is_open.then_some(Line::Promotion {
                time,
                lsn,
                end_lsn,
                timeline,
                from_timeline: previous,
            }),
        })
    }

    async fn transaction(
        &mut self,
        end: TransactionFound,
        (lsn, end_lsn, timeline): (Lsn, Lsn, Timeline),
    ) -> Result<Option<TransactionLine>, RepoError> {
        let database = match end.database() {
            Some(oid) => Some(DatabaseName { oid, name: self.names.database(lsn, oid).await? }),
            None => None,
        };
        let mut dropped_databases = Vec::new();
        for &(oid, lsn) in &end.tally.dropped_databases {
            let database = DatabaseName { oid, name: self.names.database(lsn, oid).await? };
            dropped_databases.push(DroppedDatabase { database, lsn });
        }
        let is_wanted = |found: &DatabaseName| {
            self.database.is_none_or(|wanted| {
                found.name.as_deref() == Some(wanted) || found.oid.to_string() == wanted
            })
        };
        let all = database.iter().chain(dropped_databases.iter().map(|it| &it.database));
        if self.database.is_some() && !all.into_iter().any(is_wanted) {
            return Ok(None);
        }
        let mut relations = Vec::new();
        for touched in &end.tally.relations {
            let relation = self.relation_name(lsn, touched.relation).await?;
            let (records, deleted_rows) = (touched.records, touched.deleted_rows);
            relations.push(RelationLine { relation, records, deleted_rows });
        }
        let mut removed = Vec::new();
        let mut is_met =
            self.relation.is_none() || relations.iter().any(|it| self.is_asked_for(&it.relation));
        for (number, files) in end.removed.iter().enumerate() {
            // All of them are compared with what is asked for; the first are told.
            if number >= REMOVED_MAX && is_met {
                break;
            }
            let relation = self.relation_name(lsn, *files).await?;
            is_met |= self.is_asked_for(&relation);
            if number < REMOVED_MAX {
                removed.push(RemovedLine { relation });
            }
        }
        let truncated = self.truncated(lsn, database.as_ref(), &end.tally.truncated).await?;
        Ok(is_met.then(|| TransactionLine {
            time: end.time,
            lsn,
            end_lsn,
            timeline,
            xid: end.xid,
            prepared: end.prepared,
            subtransactions: end.subtransactions,
            database,
            records: end.tally.records,
            records_exact: end.is_exact,
            relations,
            more_relations: end.tally.has_more_relations,
            deleted_rows: end.tally.deleted_rows,
            large_delete: self.filter.is_large_delete(&end),
            removed,
            removed_files: end.removed_count,
            dropped_relations: end.tally.dropped_relations(),
            truncated,
            dropped_databases,
            dropped_tablespaces: end.tally.dropped_tablespaces.clone(),
        }))
    }

    async fn truncated(
        &mut self,
        lsn: Lsn,
        database: Option<&DatabaseName>,
        tables: &[u32],
    ) -> Result<Vec<TableName>, RepoError> {
        let of = database.map_or(0, |database| database.oid);
        let mut truncated = Vec::new();
        for &oid in tables {
            let named = self.names.relation_of_oid(lsn, of, oid).await?;
            truncated.push(TableName { oid, name: named.as_ref().map(full_name) });
        }
        Ok(truncated)
    }

    async fn relation_name(
        &mut self,
        lsn: Lsn,
        files: RelFileLocator,
    ) -> Result<RelationName, RepoError> {
        let named = self.names.relation(lsn, files).await?;
        if named.is_none() && self.unnamed.len() < UNNAMED_MAX {
            self.unnamed.insert(files);
        }
        let RelFileLocator { tablespace, database, relation: file } = files;
        let relation_kind = named.as_ref().map(|named| named.kind.word());
        let name = named.as_ref().map(full_name);
        Ok(RelationName { tablespace, database, file, name, relation_kind })
    }

    fn is_asked_for(&self, found: &RelationName) -> bool {
        let Some(choice) = self.relation else { return true };
        match choice {
            RelationChoice::File(file) => found.file == *file,
            RelationChoice::Locator(files) => {
                let RelFileLocator { tablespace, database, relation } = *files;
                (found.tablespace, found.database, found.file) == (tablespace, database, relation)
            }
            RelationChoice::Name { schema: Some(schema), name } => {
                found.name.as_deref() == Some(format!("{schema}.{name}").as_str())
            }
            RelationChoice::Name { schema: None, name } => {
                let own = found.name.as_deref().and_then(|full| full.split_once('.'));
                own.is_some_and(|(_, own)| own == name)
            }
        }
    }
}

/// A name with its schema; a schema without a name is told as `?`.
fn full_name(named: &super::names::Named) -> String {
    format!("{}.{}", named.schema.as_deref().unwrap_or("?"), named.name)
}

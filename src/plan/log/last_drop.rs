//! The last moment at which a table stood, found by following the rows of `pg_class` through WAL.
//!
//! It begins with the rows of a backup and goes forward from where its WAL begins. A page of the backup may hold changes
//! that stand behind that place: as in recovery, a page's LSN says which. A row that is deleted names the
//! table that is dropped; the moment is that of the commit, which must not be replayed. A database's files go when its
//! own record is replayed, before any commit, so there the moment is that record, or the one before it that marks the database as
//! invalid.
//!
//! ```text
//! insert pg_class (0,7) "orders" -> delete pg_class (0,7), xid 740 -> commit 740 at 0/3000028: that is it
//! ```

use std::collections::{BTreeMap, HashMap};

use crate::pg::{
    ClassRow, Fork, HeapChange, Lsn, MajorVersion, PG_CLASS_OID, PG_NAMESPACE_OID, PgTimestamp,
    RelationKind, RowPlace, RowState, StorageChange, TransactionEnd, WalEvent, WalRecord,
    heap_tuples, oid_and_name,
};

/// Rows of `pg_class` that are followed, of all databases together.
pub const ROWS_MAX: usize = 300_000;

/// Which table is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedTable {
    /// The OID of its database; `None` for any.
    pub database: Option<u32>,
    /// Its schema; `None` for any.
    pub schema: Option<String>,
    /// Its name; without a schema also that of a database.
    pub name: String,
}

/// What was dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dropped {
    /// A relation.
    Relation {
        /// Its OID.
        oid: u32,
        /// Its schema, if the name of that is known.
        schema: Option<String>,
        /// What it was.
        kind: RelationKind,
    },
    /// A database.
    Database,
}

/// The end of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableEnd {
    /// Replay that stops before the record which begins here keeps it.
    pub lsn: Lsn,
    /// When it was committed.
    pub time: Option<PgTimestamp>,
    /// The transaction.
    pub xid: Option<u32>,
    /// The OID of its database.
    pub database: u32,
    /// What was dropped.
    pub dropped: Dropped,
    /// Whether it went with its database.
    pub with_database: bool,
}

/// A row of `pg_class`.
#[derive(Debug, Clone)]
struct Row {
    columns: Box<[u8]>,
    /// The transaction in which the relation was made, if that is in WAL that was seen.
    made_by: u32,
    /// In a backup: the transaction that deleted it, if the page knows already.
    gone_by: u32,
}

/// What a transaction that is still open has done.
#[derive(Debug, Clone)]
enum Ending {
    Deleted { database: u32, row: ClassRow, made_by: u32 },
    DeletedUnknown { database: u32 },
    Renamed { to: String },
}

/// Follows the rows.
#[derive(Debug)]
pub struct TableWatch {
    wanted: WantedTable,
    version: MajorVersion,
    class_files: BTreeMap<u32, u32>,
    namespace_files: BTreeMap<u32, u32>,
    databases: BTreeMap<u32, String>,
    namespaces: HashMap<(u32, u32), String>,
    rows: HashMap<(u32, RowPlace), Row>,
    page_lsns: HashMap<(u32, u32), Lsn>,
    /// Relations of the wanted name that stand, by database and OID, with the number of their files.
    standing: BTreeMap<(u32, u32), (ClassRow, u32)>,
    ending: HashMap<u32, Vec<Ending>>,
    /// Where a database was marked as about to be dropped.
    invalidated: HashMap<u32, Lsn>,
    last: Option<TableEnd>,
    renamed: Option<(Lsn, String)>,
    unknown_deletions: u64,
    has_room: bool,
}

impl TableWatch {
    /// Begins to watch for a table.
    pub fn new(wanted: WantedTable, version: MajorVersion) -> Self {
        Self {
            wanted,
            version,
            class_files: BTreeMap::new(),
            namespace_files: BTreeMap::new(),
            databases: BTreeMap::new(),
            namespaces: HashMap::new(),
            rows: HashMap::new(),
            page_lsns: HashMap::new(),
            standing: BTreeMap::new(),
            ending: HashMap::new(),
            invalidated: HashMap::new(),
            last: None,
            renamed: None,
            unknown_deletions: 0,
            has_room: true,
        }
    }

    /// Says which files hold a database's `pg_class` and `pg_namespace`, and its name.
    pub fn add_database(&mut self, oid: u32, name: String, class_file: u32, namespace_file: u32) {
        self.databases.insert(oid, name);
        self.class_files.insert(oid, class_file);
        self.namespace_files.insert(oid, namespace_file);
    }

    /// Names a schema.
    pub fn add_namespace(&mut self, database: u32, oid: u32, name: String) {
        self.namespaces.insert((database, oid), name);
    }

    /// Takes a row of a backup's `pg_class`; `xmax` as the page has it.
    pub fn add_row(
        &mut self,
        (database, place): (u32, RowPlace),
        state: RowState,
        xmax: u32,
        columns: &[u8],
    ) {
        if state == RowState::Aborted {
            return;
        }
        let row = Row { columns: columns.into(), made_by: 0, gone_by: xmax };
        if state != RowState::Gone {
            self.note_standing(database, columns);
        }
        self.put(database, place, row);
    }

    /// Says up to where a page of a backup's `pg_class` holds all changes.
    pub fn add_page(&mut self, database: u32, block: u32, lsn: Lsn) {
        self.page_lsns.insert((database, block), lsn);
    }

    /// Returns the last end of the table so far.
    pub fn last_end(&self) -> Option<&TableEnd> {
        self.last.as_ref()
    }

    /// Returns what the table was renamed to last, and where; it may stand under that name.
    pub fn last_rename(&self) -> Option<&(Lsn, String)> {
        self.renamed.as_ref()
    }

    /// Returns whether a table of that name stands at the end of what was seen.
    pub fn is_standing(&self) -> bool {
        !self.standing.is_empty()
    }

    /// Returns how many drops could not be told from what was seen: of some relation, which may be the one wanted.
    pub fn unknown_deletions(&self) -> u64 {
        self.unknown_deletions
    }

    /// Returns whether every row had room.
    pub fn has_room(&self) -> bool {
        self.has_room
    }

    /// Takes the next record, in the order of WAL.
    pub fn add(&mut self, record: &WalRecord<'_>) {
        if let Some(WalEvent::Transaction(end)) = record.event {
            self.end(record.lsn, end);
            return;
        }
        match record.storage_change() {
            Some(StorageChange::DatabaseDropped { database }) => {
                self.drop_database(database, record);
                return;
            }
            Some(StorageChange::MapReplaced { database, files }) => {
                self.replace_map(database, &files);
                return;
            }
            _ => {}
        }
        if let Some(StorageChange::DatabaseInvalidated { database }) = record.storage_change() {
            self.invalidated.insert(database, record.lsn);
            return;
        }
        let images = self.take_images(record);
        let change = record.heap_change().filter(|(table, _)| self.is_followed(table));
        if let Some((table, change)) = change {
            // What was deleted or replaced still stands in an image.
            self.note_ends(table.database, table.relation, &change, record);
            self.apply((table.database, table.relation), change, &images, record);
        }
    }

    fn class_file(&self, database: u32) -> u32 {
        self.class_files.get(&database).copied().unwrap_or(PG_CLASS_OID)
    }

    fn namespace_file(&self, database: u32) -> u32 {
        self.namespace_files.get(&database).copied().unwrap_or(PG_NAMESPACE_OID)
    }

    fn is_followed(&self, table: &crate::pg::RelFileLocator) -> bool {
        let is_database = self.wanted.database.is_none_or(|wanted| wanted == table.database);
        let files = [self.class_file(table.database), self.namespace_file(table.database)];
        table.database != 0 && is_database && files.contains(&table.relation)
    }

    fn put(&mut self, database: u32, place: RowPlace, row: Row) {
        let key = (database, place);
        if self.rows.len() < ROWS_MAX || self.rows.contains_key(&key) {
            self.rows.insert(key, row);
        } else {
            self.has_room = false;
        }
    }

    fn is_wanted(&self, database: u32, row: &ClassRow) -> bool {
        let schema = self.namespaces.get(&(database, row.namespace));
        row.name == self.wanted.name
            && self.wanted.database.is_none_or(|wanted| wanted == database)
            && self.wanted.schema.as_ref().is_none_or(|wanted| schema == Some(wanted))
    }

    fn note_standing(&mut self, database: u32, columns: &[u8]) {
        if let Some(row) = ClassRow::parse(columns, self.version)
            && self.is_wanted(database, &row)
        {
            let file = row.file;
            self.standing.insert((database, row.oid), (row, file));
        }
    }

    /// Takes the pages that stand whole in a record: what they are when it is replayed, whatever they were before.
    /// Returns which blocks they are.
    fn take_images(&mut self, record: &WalRecord<'_>) -> Vec<u32> {
        let mut taken = Vec::new();
        let Some(parts) = record.parts() else { return taken };
        for block in &parts.blocks {
            let table = block.relation;
            if block.fork != Some(Fork::Main) || !self.is_followed(&table) {
                continue;
            }
            let Some(page) = block.image.and_then(|image| image.page()) else { continue };
            if table.relation == self.namespace_file(table.database) {
                let names = heap_tuples(&page).into_iter();
                for (oid, name) in names.filter_map(|tuple| oid_and_name(tuple.columns)) {
                    self.namespaces.insert((table.database, oid), name);
                }
                continue;
            }
            for tuple in heap_tuples(&page) {
                let place = RowPlace { block: block.block, offset: tuple.offset };
                let key = (table.database, place);
                let known = self.rows.get(&key).filter(|row| *row.columns == *tuple.columns);
                if known.is_none() {
                    let columns = tuple.columns.into();
                    self.put(table.database, place, Row { columns, made_by: 0, gone_by: 0 });
                }
            }
            self.page_lsns.remove(&(table.database, block.block));
            taken.push(block.block);
        }
        taken
    }

    /// Notes which wanted relation goes with a change, if its transaction commits.
    fn note_ends(&mut self, database: u32, file: u32, change: &HeapChange, record: &WalRecord<'_>) {
        if file != self.class_file(database) {
            return;
        }
        let (old, new_columns) = match change {
            HeapChange::Insert { .. } => return,
            HeapChange::Delete { place } => (*place, None),
            HeapChange::Update { old, columns, .. } => (*old, Some(columns)),
        };
        let xid = record.header.xid;
        let is_past = self.is_past(database, old.block, record);
        let known = self.rows.get(&(database, old));
        let known = known.filter(|row| !is_past || row.gone_by == xid);
        let parsed = known.and_then(|row| {
            let made_by = row.made_by;
            ClassRow::parse(&row.columns, self.version).map(|parsed| (parsed, made_by))
        });
        let Some((row, made_by)) = parsed else {
            if new_columns.is_none() && !is_past {
                self.unknown_deletions += 1;
                self.ending.entry(xid).or_default().push(Ending::DeletedUnknown { database });
            }
            return;
        };
        if !self.is_wanted(database, &row) {
            return;
        }
        let ending = match new_columns {
            None => Ending::Deleted { database, row, made_by },
            Some(columns) => {
                let before = self.rows.get(&(database, old)).map(|row| &row.columns[..]);
                let joined = columns.join(before);
                let new = joined.and_then(|columns| ClassRow::parse(&columns, self.version));
                let Some(new) = new.filter(|new| new.name != row.name) else { return };
                Ending::Renamed { to: new.name }
            }
        };
        self.ending.entry(xid).or_default().push(ending);
    }

    /// Returns whether a page of the backup holds this record's change already.
    fn is_past(&self, database: u32, block: u32, record: &WalRecord<'_>) -> bool {
        self.page_lsns.get(&(database, block)).is_some_and(|lsn| record.end_lsn <= *lsn)
    }

    fn apply(
        &mut self,
        (database, file): (u32, u32),
        change: HeapChange,
        images: &[u32],
        record: &WalRecord<'_>,
    ) {
        let xid = record.header.xid;
        let (place, columns, made_by) = match change {
            HeapChange::Delete { .. } => return,
            HeapChange::Insert { place, columns } => (place, columns.join(None), xid),
            HeapChange::Update { old, new, columns } => {
                let before = self.rows.get(&(database, old));
                let made_by = before.map_or(0, |row| row.made_by);
                (new, columns.join(before.map(|row| &row.columns[..])), made_by)
            }
        };
        if file == self.namespace_file(database) {
            if let Some((oid, name)) = columns.as_deref().and_then(oid_and_name) {
                self.namespaces.insert((database, oid), name);
            }
            return;
        }
        if images.contains(&place.block) {
            if let Some(row) = self.rows.get_mut(&(database, place)) {
                row.made_by = made_by;
                let columns = row.columns.clone();
                self.note_standing(database, &columns);
            }
        } else if self.is_past(database, place.block, record) {
            // The backup's page has it, or what came after it.
        } else if let Some(columns) = columns {
            self.note_standing(database, &columns);
            let columns = columns.into_boxed_slice();
            self.put(database, place, Row { columns, made_by, gone_by: 0 });
        } else {
            self.rows.remove(&(database, place));
        }
    }

    fn replace_map(&mut self, database: u32, files: &[(u32, u32)]) {
        let Some((_, file)) = files.iter().find(|(oid, _)| *oid == PG_CLASS_OID) else { return };
        if *file != self.class_file(database) {
            // The table was written anew before anything said where: its rows have other places.
            self.rows.retain(|(of, _), _| *of != database);
            self.page_lsns.retain(|(of, _), _| *of != database);
            self.class_files.insert(database, *file);
        }
    }

    fn end(&mut self, lsn: Lsn, end: &TransactionEnd) {
        let all: Vec<u32> =
            end.xid.into_iter().chain(end.subtransactions.iter().copied()).collect();
        let done: Vec<Ending> =
            all.iter().filter_map(|xid| self.ending.remove(xid)).flatten().collect();
        if let Some(last) = &mut self.last
            && last.time.is_none()
            && last.xid.is_some_and(|xid| all.contains(&xid))
        {
            last.time = Some(end.time);
        }
        if !end.committed {
            return;
        }
        for ending in done {
            match ending {
                // Made and dropped in one transaction, it never stood for anybody else.
                Ending::Deleted { made_by, .. } if all.contains(&made_by) => {}
                Ending::Deleted { database, row, .. } => self.ended(lsn, end, database, &row),
                Ending::Renamed { to } => self.renamed = Some((lsn, to)),
                Ending::DeletedUnknown { database } => {
                    let removed = |file: u32| {
                        let mut files = end.dropped.iter();
                        file != 0 && files.any(|it| it.database == database && it.relation == file)
                    };
                    let known = self
                        .standing
                        .iter()
                        .find(|((of, _), (_, file))| *of == database && removed(*file));
                    if let Some(row) = known.map(|(_, (row, _))| row.clone()) {
                        self.ended(lsn, end, database, &row);
                    }
                }
            }
        }
    }

    fn ended(&mut self, lsn: Lsn, end: &TransactionEnd, database: u32, row: &ClassRow) {
        self.standing.remove(&(database, row.oid));
        self.last = Some(TableEnd {
            lsn,
            time: Some(end.time),
            xid: end.xid,
            database,
            dropped: self.relation(database, row),
            with_database: false,
        });
    }

    fn relation(&self, database: u32, row: &ClassRow) -> Dropped {
        let schema = self.namespaces.get(&(database, row.namespace)).cloned();
        Dropped::Relation { oid: row.oid, schema, kind: row.kind }
    }

    fn drop_database(&mut self, database: u32, record: &WalRecord<'_>) {
        let is_it = self.wanted.schema.is_none()
            && self.wanted.database.is_none_or(|wanted| wanted == database)
            && self.databases.get(&database) == Some(&self.wanted.name);
        let mut inside = self.standing.iter().filter(|((of, _), _)| *of == database);
        let dropped = match inside.next() {
            Some((_, (row, _))) => Some((self.relation(database, row), true)),
            None => is_it.then_some((Dropped::Database, false)),
        };
        let xid = (record.header.xid != 0).then_some(record.header.xid);
        // One record for each tablespace: replay must stop before the first of them.
        let is_next = self.last.as_ref().is_some_and(|last| {
            last.database == database && last.xid == xid && last.time.is_none()
        });
        if let Some((dropped, with_database)) = dropped
            && !is_next
        {
            // Newer minor versions mark it first, and nobody can connect to it from then on.
            let lsn = self.invalidated.get(&database).copied().unwrap_or(record.lsn);
            self.last = Some(TableEnd { lsn, time: None, xid, database, dropped, with_database });
        }
        self.standing.retain(|(of, _), _| *of != database);
        self.rows.retain(|(of, _), _| *of != database);
        self.page_lsns.retain(|(of, _), _| *of != database);
        self.class_files.remove(&database);
        self.namespace_files.remove(&database);
    }
}

#[cfg(test)]
mod tests;

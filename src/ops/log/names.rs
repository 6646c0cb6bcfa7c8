//! The names of databases and relations: from the backups nearest to a position, or from a server.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::catalog::BackupCatalog;
use super::server_names::ServerNames;
use crate::format::{BackupId, Committed};
use crate::pg::{ClassRow, Lsn, RelFileLocator, RelationKind, RowState};
use crate::repo::{RepoError, Repository};

/// Catalogs of backups that are held: that before a position and that behind it.
const CATALOGS_HELD: usize = 2;

/// Relations of one catalog that are held. Of a larger one the rest has no names.
const NAMES_MAX: usize = 200_000;

/// `GLOBALTABLESPACE_OID`: where relations stand that belong to no database.
const GLOBAL_TABLESPACE: u32 = 1664;

/// A relation's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    /// Its schema, if that has a name.
    pub(super) schema: Option<String>,
    /// Its name.
    pub(super) name: String,
    /// Its OID.
    pub(super) oid: u32,
    /// What it is.
    pub(super) kind: RelationKind,
}

/// Names by files.
#[derive(Debug, Default)]
pub(super) struct NameTable {
    /// By database, file and tablespace; 0 for the tablespace of the database.
    relations: BTreeMap<(u32, u32, u32), (RowState, Named)>,
    is_full: bool,
}

impl NameTable {
    /// Takes a row of a database's `pg_class`.
    pub(super) fn add(
        &mut self,
        database: u32,
        row: &ClassRow,
        file: u32,
        state: RowState,
        schema: Option<&String>,
    ) {
        if file == 0 {
            return;
        }
        let is_shared = row.tablespace == GLOBAL_TABLESPACE;
        let key = (if is_shared { 0 } else { database }, file, row.tablespace);
        let is_known = self.relations.contains_key(&key);
        if !is_known && self.relations.len() >= NAMES_MAX {
            self.is_full = true;
            return;
        }
        if self.relations.get(&key).is_none_or(|(known, _)| *known <= state) {
            let (name, oid, kind) = (row.name.clone(), row.oid, row.kind);
            self.relations.insert(key, (state, Named { schema: schema.cloned(), name, oid, kind }));
        }
    }

    /// Returns the relation that these files belong to.
    pub(super) fn get(&self, files: RelFileLocator) -> Option<&Named> {
        let RelFileLocator { tablespace, database, relation } = files;
        let own = self.relations.get(&(database, relation, tablespace));
        own.or_else(|| self.relations.get(&(database, relation, 0))).map(|(_, named)| named)
    }

    /// Returns the relation of a database that has this OID.
    pub(super) fn by_oid(&self, database: u32, oid: u32) -> Option<&Named> {
        let mut all = self.relations.range((database, 0, 0)..=(database, u32::MAX, u32::MAX));
        all.find(|(_, (_, named))| named.oid == oid).map(|(_, (_, named))| named)
    }
}

/// A backup's catalog as far as it was read.
struct Loaded {
    id: BackupId,
    /// `None` if it cannot be read.
    catalog: Option<BackupCatalog>,
    names: NameTable,
    databases: BTreeSet<u32>,
}

/// Where names come from.
pub(super) enum Names<'a> {
    /// Nowhere.
    None,
    /// From a running server, as it is now.
    Server(Box<ServerNames>),
    /// From backups.
    Backups(BackupNames<'a>),
}

/// Names from the backups nearest to a position.
pub(super) struct BackupNames<'a> {
    repository: &'a Repository,
    /// Oldest first.
    backups: Vec<Committed>,
    held: VecDeque<Loaded>,
}

impl<'a> BackupNames<'a> {
    pub(super) fn new(repository: &'a Repository, mut backups: Vec<Committed>) -> Self {
        backups.sort_by_key(|backup| backup.stop_lsn);
        Self { repository, backups, held: VecDeque::new() }
    }

    /// Returns the backups nearest to a position: the one before it, then the one behind it.
    fn nearest(&self, lsn: Lsn) -> Vec<Committed> {
        let behind = self.backups.partition_point(|backup| backup.stop_lsn <= lsn);
        let before = behind.checked_sub(1).and_then(|at| self.backups.get(at));
        before.into_iter().chain(self.backups.get(behind)).cloned().collect()
    }

    /// Returns what is held of a backup's catalog, with the names of this database in it.
    async fn loaded(&mut self, backup: &Committed, database: u32) -> Result<&Loaded, RepoError> {
        let at = match self.held.iter().position(|held| held.id == backup.id) {
            Some(at) => at,
            None => {
                let catalog = match BackupCatalog::open(self.repository, backup).await {
                    Ok(catalog) => Some(catalog),
                    Err(error) => passed_over(&backup.id, error)?,
                };
                let id = backup.id.clone();
                let (names, databases) = (NameTable::default(), BTreeSet::new());
                self.held.truncate(CATALOGS_HELD - 1);
                self.held.push_front(Loaded { id, catalog, names, databases });
                0
            }
        };
        let held = &mut self.held[at];
        if held.databases.insert(database)
            && let Err(error) = held.load(database).await
        {
            passed_over::<()>(&backup.id, error)?;
        }
        Ok(&self.held[at])
    }
}

/// Without names WAL can be told as well: damage of a backup is said, and goes no further.
fn passed_over<T>(id: &BackupId, error: RepoError) -> Result<Option<T>, RepoError> {
    match error {
        error @ (RepoError::Damaged { .. } | RepoError::NotReadable { .. }) => {
            tracing::warn!(
                "the catalog in backup {id} cannot be read, so it names nothing: {error}"
            );
            Ok(None)
        }
        error if error.is_absent() => {
            tracing::warn!("backup {id} is going away, so it names nothing: {error}");
            Ok(None)
        }
        error => Err(error),
    }
}

impl Loaded {
    async fn load(&mut self, database: u32) -> Result<(), RepoError> {
        let Some(catalog) = &mut self.catalog else { return Ok(()) };
        let files = catalog.files_of(database).await?;
        // Shared relations stand in every database's catalog.
        let read = if database == 0 {
            catalog.stored_databases().first().copied()
        } else {
            Some(database)
        };
        let Some(read) = read else { return Ok(()) };
        let local = catalog.files_of(read).await?;
        let schemas = catalog.namespaces(read, local.namespace).await?;
        let version = catalog.version();
        let names = &mut self.names;
        let row = |row: super::catalog::CatalogRow<'_>| {
            let Some(found) = ClassRow::parse(row.columns, version) else { return };
            if row.state == RowState::Aborted {
                return;
            }
            let mapped = files.mapped.iter().find(|(oid, _)| *oid == found.oid);
            let file =
                if found.file == 0 { mapped.map_or(0, |(_, file)| *file) } else { found.file };
            names.add(read, &found, file, row.state, schemas.get(&found.namespace));
        };
        catalog.rows_of(read, local.class, |_, _| {}, row).await?;
        if names.is_full {
            tracing::warn!(
                "the catalog of backup {} has more than {NAMES_MAX} relations; the rest has no names here",
                self.id
            );
        }
        Ok(())
    }
}

impl Names<'_> {
    /// Returns the name of a relation as it was at a position, or nearest to it.
    pub(super) async fn relation(
        &mut self,
        lsn: Lsn,
        files: RelFileLocator,
    ) -> Result<Option<Named>, RepoError> {
        match self {
            Self::None => Ok(None),
            Self::Server(server) => Ok(server.relation(files).await),
            Self::Backups(names) => {
                for backup in names.nearest(lsn) {
                    let loaded = names.loaded(&backup, files.database).await?;
                    if let Some(named) = loaded.names.get(files) {
                        return Ok(Some(named.clone()));
                    }
                }
                Ok(None)
            }
        }
    }

    /// Returns the name of the relation of an OID.
    pub(super) async fn relation_of_oid(
        &mut self,
        lsn: Lsn,
        database: u32,
        oid: u32,
    ) -> Result<Option<Named>, RepoError> {
        match self {
            Self::None => Ok(None),
            Self::Server(server) => Ok(server.relation_of_oid(database, oid).await),
            Self::Backups(names) => {
                for backup in names.nearest(lsn) {
                    let loaded = names.loaded(&backup, database).await?;
                    if let Some(named) = loaded.names.by_oid(database, oid) {
                        return Ok(Some(named.clone()));
                    }
                }
                Ok(None)
            }
        }
    }

    /// Returns the name of a database as it was at a position, or nearest to it.
    pub(super) async fn database(
        &mut self,
        lsn: Lsn,
        oid: u32,
    ) -> Result<Option<String>, RepoError> {
        match self {
            Self::None => Ok(None),
            Self::Server(server) => Ok(server.database(oid)),
            Self::Backups(names) => {
                for backup in names.nearest(lsn) {
                    let loaded = names.loaded(&backup, oid).await?;
                    let known = loaded.catalog.as_ref().and_then(|it| it.databases().get(&oid));
                    if let Some(name) = known {
                        return Ok(Some(name.clone()));
                    }
                }
                Ok(None)
            }
        }
    }
}

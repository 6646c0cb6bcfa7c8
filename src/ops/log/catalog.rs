//! The catalog of a backup, read from its files: databases, and the rows of each one's `pg_class` and `pg_namespace`.
//!
//! A backup's files were copied while the server wrote them. Names do not mind: a row of another moment still says
//! which files had which name. Who follows rows through WAL gets the LSN of each page with them.

use std::collections::BTreeMap;

use futures_util::StreamExt;

use crate::format::{Committed, FileEntry};
use crate::pg::{
    ClassRow, CommitLog, DATA_PAGE_BYTES, Fork, Lsn, MajorVersion, PG_CLASS_OID, PG_DATABASE_OID,
    PG_NAMESPACE_OID, RelationDirectory, RelationFile, RowPlace, RowState, ServerVersion,
    heap_tuples, is_used_page, oid_and_name, page_lsn, parse_relation_map,
};
use crate::repo::{FileList, RepoError, Repository};

/// Files of the commit log that are read: the newest 8 million transactions. Older ones have left their marks in
/// the rows themselves.
const COMMIT_LOG_FILES_MAX: usize = 8;

/// Blocks in a file of a relation (`RELSEG_SIZE`).
const BLOCKS_PER_FILE: u32 = 131_072;

const MAP_FILE: &[u8] = b"pg_filenode.map";

/// A backup's catalog.
pub(super) struct BackupCatalog {
    list: FileList,
    version: MajorVersion,
    /// Files that were wanted so far, by path.
    files: BTreeMap<Vec<u8>, FileEntry>,
    /// Each database's directory.
    directories: BTreeMap<u32, Vec<u8>>,
    commit_log: CommitLog,
    databases: BTreeMap<u32, String>,
}

/// One row of a catalog table.
pub(super) struct CatalogRow<'a> {
    pub(super) place: RowPlace,
    pub(super) state: RowState,
    pub(super) xmax: u32,
    pub(super) columns: &'a [u8],
}

/// Which files hold a database's catalog tables.
#[derive(Debug, Clone, Default)]
pub(super) struct CatalogFiles {
    /// Pairs of a table's OID and the number of its files, from `pg_filenode.map`.
    pub(super) mapped: Vec<(u32, u32)>,
    /// `pg_class`
    pub(super) class: u32,
    /// `pg_namespace`
    pub(super) namespace: u32,
}

impl BackupCatalog {
    /// Reads which databases there are.
    pub(super) async fn open(
        repository: &Repository,
        backup: &Committed,
    ) -> Result<Self, RepoError> {
        let list = FileList::open(repository, &backup.id).await?.kept();
        let mut catalog = Self {
            list,
            version: ServerVersion(backup.postgres_version).major(),
            files: BTreeMap::new(),
            directories: BTreeMap::new(),
            commit_log: CommitLog::default(),
            databases: BTreeMap::new(),
        };
        catalog.collect(is_usual_place).await?;
        let maps = catalog.files.keys().filter_map(|path| {
            let directory = path.strip_suffix(MAP_FILE)?.strip_suffix(b"/")?;
            Some((RelationDirectory::at(directory)?.database, directory.to_vec()))
        });
        catalog.directories = maps.collect();
        catalog.read_commit_log().await?;
        let shared = catalog.mapped_files(0).await?;
        let file = mapped(&shared, PG_DATABASE_OID);
        let mut databases: BTreeMap<u32, (RowState, String)> = BTreeMap::new();
        catalog
            .rows_of(
                0,
                file,
                |_, _| {},
                |row| {
                    if let Some((oid, name)) = oid_and_name(row.columns)
                        && databases.get(&oid).is_none_or(|(known, _)| *known <= row.state)
                    {
                        databases.insert(oid, (row.state, name));
                    }
                },
            )
            .await?;
        catalog.databases = databases.into_iter().map(|(oid, (_, name))| (oid, name)).collect();
        Ok(catalog)
    }

    /// Returns the names of databases, by OID; of dropped ones too, as long as their rows are there.
    pub(super) fn databases(&self) -> &BTreeMap<u32, String> {
        &self.databases
    }

    /// Returns the OIDs of the databases whose files are in the backup.
    pub(super) fn stored_databases(&self) -> Vec<u32> {
        self.directories.keys().copied().filter(|oid| *oid != 0).collect()
    }

    pub(super) fn version(&self) -> MajorVersion {
        self.version
    }

    /// Returns which files hold a database's catalog tables; 0 for the shared ones, of which only `mapped` counts.
    pub(super) async fn files_of(&mut self, database: u32) -> Result<CatalogFiles, RepoError> {
        let mapped_files = self.mapped_files(database).await?;
        let class = mapped(&mapped_files, PG_CLASS_OID);
        let mut namespace = (RowState::Aborted, PG_NAMESPACE_OID);
        if database != 0 {
            let version = self.version;
            self.rows_of(
                database,
                class,
                |_, _| {},
                |row| {
                    let parsed = ClassRow::parse(row.columns, version);
                    if let Some(found) = parsed.filter(|found| found.oid == PG_NAMESPACE_OID)
                        && found.file != 0
                        && row.state >= namespace.0
                    {
                        namespace = (row.state, found.file);
                    }
                },
            )
            .await?;
        }
        Ok(CatalogFiles { mapped: mapped_files, class, namespace: namespace.1 })
    }

    /// Reads the schemas of a database.
    pub(super) async fn namespaces(
        &mut self,
        database: u32,
        file: u32,
    ) -> Result<BTreeMap<u32, String>, RepoError> {
        let mut names: BTreeMap<u32, (RowState, String)> = BTreeMap::new();
        self.rows_of(
            database,
            file,
            |_, _| {},
            |row| {
                if let Some((oid, name)) = oid_and_name(row.columns)
                    && names.get(&oid).is_none_or(|(known, _)| *known <= row.state)
                {
                    names.insert(oid, (row.state, name));
                }
            },
        )
        .await?;
        Ok(names.into_iter().map(|(oid, (_, name))| (oid, name)).collect())
    }

    /// Reads all rows of a catalog table, page by page; `on_page` gets the LSN of each. Without such files, none.
    pub(super) async fn rows_of(
        &mut self,
        database: u32,
        file: u32,
        mut on_page: impl FnMut(u32, Lsn),
        mut on_row: impl FnMut(CatalogRow<'_>),
    ) -> Result<(), RepoError> {
        let Some(directory) = self.directories.get(&database).cloned() else { return Ok(()) };
        let path = [&directory[..], b"/", file.to_string().as_bytes()].concat();
        if !self.files.contains_key(&path) {
            let prefix = [&directory[..], b"/"].concat();
            self.collect(|path| {
                let name = path.strip_prefix(&prefix[..]).and_then(RelationFile::parse);
                name.is_some_and(|name| name.number == file && name.fork == Fork::Main)
            })
            .await?;
        }
        let mut number = 0;
        loop {
            let path = match number {
                0 => path.clone(),
                _ => [&path[..], b".", number.to_string().as_bytes()].concat(),
            };
            let Some(entry) = self.files.get(&path) else { return Ok(()) };
            let mut block = number * BLOCKS_PER_FILE;
            let log = &self.commit_log;
            let chunk = |bytes: &[u8]| {
                for page in bytes.chunks_exact(DATA_PAGE_BYTES) {
                    if is_used_page(page) {
                        on_page(block, page_lsn(page));
                        for tuple in heap_tuples(page) {
                            let place = RowPlace { block, offset: tuple.offset };
                            let state = tuple.state(|xid| log.committed(xid));
                            let (xmax, columns) = (tuple.xmax, tuple.columns);
                            on_row(CatalogRow { place, state, xmax, columns });
                        }
                    }
                    block += 1;
                }
            };
            self.list.fetcher().read_file(entry, chunk).await?;
            number += 1;
        }
    }

    async fn mapped_files(&self, database: u32) -> Result<Vec<(u32, u32)>, RepoError> {
        let Some(directory) = self.directories.get(&database) else { return Ok(Vec::new()) };
        let path = [&directory[..], b"/", MAP_FILE].concat();
        let Some(entry) = self.files.get(&path) else { return Ok(Vec::new()) };
        let mut bytes = Vec::new();
        self.list.fetcher().read_file(entry, |chunk| bytes.extend_from_slice(chunk)).await?;
        // A map that cannot be read leaves the numbers that every cluster begins with.
        Ok(parse_relation_map(&bytes).unwrap_or_default())
    }

    async fn read_commit_log(&mut self) -> Result<(), RepoError> {
        let files = self.files.iter().filter_map(|(path, entry)| {
            let name = std::str::from_utf8(path.strip_prefix(b"pg_xact/")?).ok()?;
            Some((u32::from_str_radix(name, 16).ok()?, entry.clone()))
        });
        let files: BTreeMap<u32, FileEntry> = files.collect();
        for (number, entry) in files.into_iter().rev().take(COMMIT_LOG_FILES_MAX) {
            let mut bytes = Vec::new();
            let fetcher = self.list.fetcher();
            fetcher.read_file(&entry, |chunk| bytes.extend_from_slice(chunk)).await?;
            self.commit_log.add(number, bytes);
        }
        Ok(())
    }

    /// Remembers the files whose path is wanted.
    async fn collect(&mut self, is_wanted: impl Fn(&[u8]) -> bool) -> Result<(), RepoError> {
        let mut found = Vec::new();
        {
            let mut reading = std::pin::pin!(self.list.read());
            while let Some(entries) = reading.next().await.transpose()? {
                found.extend(entries.into_iter().filter(|entry| is_wanted(&entry.path)));
            }
        }
        self.files.extend(found.into_iter().map(|entry| (entry.path.clone(), entry)));
        Ok(())
    }
}

/// Returns whether a file is one of those that are needed first, with the numbers that catalogs have before
/// anything writes them anew.
fn is_usual_place(path: &[u8]) -> bool {
    let split = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (directory, name) = (&path[..split], &path[(split + 1).min(path.len())..]);
    if directory == b"pg_xact" {
        return true;
    }
    if RelationDirectory::at(directory).is_none() {
        return false;
    }
    let is_catalog = |file: RelationFile| {
        let usual = [PG_CLASS_OID, PG_NAMESPACE_OID, PG_DATABASE_OID];
        file.fork == Fork::Main && usual.contains(&file.number)
    };
    name == MAP_FILE || RelationFile::parse(name).is_some_and(is_catalog)
}

/// Returns the number of a catalog table's files: what the map says, else what it begins with.
fn mapped(map: &[(u32, u32)], oid: u32) -> u32 {
    map.iter().find(|(of, _)| *of == oid).map_or(oid, |(_, file)| *file)
}

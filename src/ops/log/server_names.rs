//! Names from a running server, as it is now.

use std::collections::{BTreeMap, BTreeSet};

use super::names::{NameTable, Named};
use crate::failure::Failure;
use crate::ops::failures::of_postgres;
use crate::pg::{ClassRow, RelFileLocator, RelationKind, RowState};
use crate::walsender::{ConnInfo, Connection, Mode, PgError};

/// What a server says of its relations. `pg_relation_filenode` knows what `pg_filenode.map` says as well.
const RELATIONS: &str = "select c.oid::text as oid, c.relname, n.nspname, \
     coalesce(pg_relation_filenode(c.oid), 0)::text as file, c.reltablespace::text as tablespace, \
     c.relkind::text as kind \
     from pg_class c join pg_namespace n on n.oid = c.relnamespace";

/// Names from a server. Each database is asked when its first relation is.
pub(super) struct ServerNames {
    server: ConnInfo,
    databases: BTreeMap<u32, String>,
    asked: BTreeSet<u32>,
    names: NameTable,
}

impl ServerNames {
    /// Asks the server which databases it has.
    ///
    /// # Errors
    /// [`crate::failure::Kind::Postgres`]: it does not answer, or is another cluster's.
    pub(super) async fn ask(
        server: ConnInfo,
        system_id: crate::pg::SystemId,
        unharmed: &str,
    ) -> Result<Self, Failure> {
        let what = "could not ask the server for names";
        let failed = |error: PgError| of_postgres(error, what, unharmed);
        let mut connection = Connection::connect(&server, Mode::Sql).await.map_err(failed)?;
        let own = connection
            .query("select system_identifier::text from pg_control_system()")
            .await
            .map_err(failed)?;
        if own.first() != Some(system_id.to_string().as_str()) {
            return Err(Failure::new(
                crate::failure::Kind::Conflict,
                "the server is not the one whose WAL this is",
                unharmed,
                "Give the server of this cluster with `--dsn`, or take names from backups with `--names backup`.",
            ));
        }
        let rows = connection
            .query("select oid::text as oid, datname from pg_database")
            .await
            .map_err(failed)?;
        connection.close().await;
        let databases = (0..rows.rows.len()).filter_map(|row| {
            Some((rows.get(row, "oid")?.parse().ok()?, rows.get(row, "datname")?.to_owned()))
        });
        let databases = databases.collect();
        Ok(Self { server, databases, asked: BTreeSet::new(), names: NameTable::default() })
    }

    pub(super) fn database(&self, oid: u32) -> Option<String> {
        self.databases.get(&oid).cloned()
    }

    pub(super) async fn relation(&mut self, files: RelFileLocator) -> Option<Named> {
        self.ask_once(files.database).await;
        self.names.get(files).cloned()
    }

    pub(super) async fn relation_of_oid(&mut self, database: u32, oid: u32) -> Option<Named> {
        self.ask_once(database).await;
        self.names.by_oid(database, oid).cloned()
    }

    async fn ask_once(&mut self, database: u32) {
        if !self.asked.insert(database) {
            return;
        }
        // Shared relations stand in every database's catalog.
        let place = match database {
            0 => Some(self.server.dbname().to_owned()),
            oid => self.databases.get(&oid).cloned(),
        };
        let Some(place) = place else { return };
        let oid =
            self.databases.iter().find(|(_, name)| **name == place).map_or(0, |(oid, _)| *oid);
        if let Err(error) = self.read(&place, oid).await {
            tracing::warn!("database `{place}` did not tell its names: {error}");
        }
    }

    async fn read(&mut self, place: &str, oid: u32) -> Result<(), PgError> {
        let server = self.server.clone().with_dbname(place);
        let mut connection = Connection::connect(&server, Mode::Sql).await?;
        let rows = connection.query(RELATIONS).await?;
        connection.close().await;
        for row in 0..rows.rows.len() {
            let number = |column| rows.get(row, column).and_then(|text| text.parse().ok());
            let kind = rows.get(row, "kind").and_then(|kind| kind.bytes().next()).unwrap_or(b' ');
            let found = ClassRow {
                oid: number("oid").unwrap_or(0),
                name: rows.get(row, "relname").unwrap_or_default().to_owned(),
                namespace: 0,
                file: number("file").unwrap_or(0),
                tablespace: number("tablespace").unwrap_or(0),
                kind: RelationKind::from_letter(kind),
            };
            let schema = rows.get(row, "nspname").map(ToOwned::to_owned);
            self.names.add(oid, &found, found.file, RowState::Live, schema.as_ref());
        }
        Ok(())
    }
}

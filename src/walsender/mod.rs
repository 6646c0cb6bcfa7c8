//! Connections to PostgreSQL: settings, login, queries, replication commands,
//! and the stream of a base backup as typed events.
//!
//! A small client over the `postgres-protocol` crate, because no published
//! client speaks physical replication. The face is [`ConnInfo`] (where and
//! who), [`Connection`] (one session, by simple queries) and [`BaseBackup`]
//! (one backup, the same events from every version of PostgreSQL).
//!
//! ```text
//! conninfo/ ----> dial --> tls --> certificate      reach the server
//! passfile -----> auth                              get in
//!                 wire --> connection --> rows      ask and be answered
//!                          replication, base_backup
//! ```
//!
//! Never here: what is done with the bytes (storage), or which backup, host or
//! retry is wise (policy). The process environment comes in as a value.

mod auth;
mod base_backup;
mod certificate;
mod connection;
mod conninfo;
mod dial;
mod error;
#[cfg(test)]
mod fake_server;
mod passfile;
mod quote;
mod replication;
mod rows;
mod tls;
mod wire;

pub use base_backup::{BackupEvent, BackupOptions, BaseBackup, ManifestChecksums, Tablespace};
pub use connection::{Connection, Mode};
pub use conninfo::{ConnInfo, PgEnvironment, SettingsError};
pub use error::{PgError, ServerError};
pub use quote::{quote_identifier, quote_literal};
pub use replication::{SystemIdentity, TimelineHistory};
pub use rows::Rows;

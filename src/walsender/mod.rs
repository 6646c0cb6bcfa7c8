//! Connections to PostgreSQL: settings, login, queries, replication commands,
//! slots, and the streams of a base backup and of WAL as typed events.
//!
//! A small client over the `postgres-protocol` crate, because no published
//! client speaks physical replication. The face is [`ConnInfo`] (where and
//! who), [`Connection`] (one session, by simple queries), [`BaseBackup`]
//! (one backup, the same events from every version of PostgreSQL) and
//! [`WalStream`] (WAL as it is written).
//!
//! ```text
//! conninfo/ ----> dial --> tls --> certificate      reach the server
//! passfile -----> auth                              get in
//!                 wire --> connection --> rows      ask and be answered
//!                          replication, slots, base_backup, wal_stream
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
#[cfg(test)]
mod mangling;
mod passfile;
mod quote;
mod replication;
mod rows;
mod slots;
mod tls;
mod wal_stream;
mod wire;

pub use base_backup::{BackupEvent, BackupOptions, BaseBackup, ManifestChecksums, Tablespace};
pub use connection::{Connection, Mode};
pub use conninfo::{ConnInfo, PgEnvironment, SettingsError};
pub use error::{PgError, ServerError};
pub use quote::{quote_identifier, quote_literal};
pub use replication::{SystemIdentity, TimelineHistory};
pub use rows::Rows;
pub use slots::{ParseSlotNameError, SlotName, SlotState};
pub use wal_stream::{StreamEvent, StreamStart, StreamStatus, WalStream};

//! Highwater: a PostgreSQL WAL archiver and point-in-time-recovery engine.
//!
//! The crate is a house with floors; imports go down only, and
//! `tests/tidy.rs` checks it. See `docs/architecture.md` for the drawing.
//!
//! ```text
//! 4  cli                              arguments, settings, output, exit codes
//! 3  agent, drill                     the resident service; restores that are tried; both run ops
//! 3  ops                              one file per use case
//! 2  plan, repo                       pure decisions; the archive as verbs
//! 1  format, store, walsender, pgdata bytes and names; stores; servers; disks
//!    failure                          what a user sees
//! 0  pg, causes, spelling             PostgreSQL's facts; errors as text; what a user meant
//! ```

pub mod agent;
pub mod causes;
pub mod cli;
pub mod drill;
pub mod failure;
pub mod format;
pub mod ops;
pub mod pg;
pub mod pgdata;
pub mod plan;
pub mod repo;
pub mod spelling;
pub mod store;
pub mod walsender;

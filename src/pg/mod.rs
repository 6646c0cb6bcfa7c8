//! PostgreSQL's facts as types: no I/O, no clock, no async.
//!
//! Everything here is a value or a pure walk over bytes. Each outside fact
//! names the PostgreSQL source file or manual section it comes from.

mod history;
mod lsn;
mod timestamp;
mod wal_name;

pub use history::TimelineHistory;
pub use lsn::{Lsn, ParseLsnError, SegmentSize, SystemId, Timeline};
pub use timestamp::PgTimestamp;
pub use wal_name::{SegmentName, WalFileName, WalFileNameError};

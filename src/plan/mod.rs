//! Pure decisions: what to do, given what is known.
//!
//! Never here: I/O, async, a clock, randomness, logging. Each function is
//! tested by values alone.

pub mod backup;
pub mod changed_chunks;
pub mod delta;
pub mod drill;
#[cfg(test)]
mod examples;
pub mod file_reading;
pub mod lineage;
pub mod log;
pub mod memory;
pub mod pace;
pub mod parting;
pub mod receive;
pub mod restore;
pub mod retention;
pub mod schedule;
pub mod slot;
pub mod spool;
pub mod stall;
pub mod stored_file;
pub mod target;
pub mod unchanged;
pub mod window;

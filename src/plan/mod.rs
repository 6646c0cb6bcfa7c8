//! placeholder
pub mod target;

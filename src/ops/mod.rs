//! placeholder
pub mod progress;

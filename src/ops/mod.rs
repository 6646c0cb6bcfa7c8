//! placeholder
pub mod progress;
pub use progress::{Progress, Silent};

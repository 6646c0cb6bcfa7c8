//! placeholder
pub mod disk;
pub mod running;
pub mod safe_path;
pub mod staged;
pub mod tar_stream;

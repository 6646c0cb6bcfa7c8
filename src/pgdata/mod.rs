//! placeholder
pub mod disk;
pub mod recovery_settings;
pub mod running;
pub mod safe_path;
pub mod staged;
pub mod tar_stream;

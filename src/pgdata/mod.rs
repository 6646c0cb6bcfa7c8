//! The data directory and other files on the local disk.
//!
//! Owns: writing that survives a crash, building a data directory, splitting
//! the archives one arrives in, the settings that make it recover, and facts about
//! one that stands. Never here: the network, object names, what WAL or
//! `pg_control` mean.
//!
//! Everything blocks its thread; async callers use `spawn_blocking`. Errors keep
//! the path and the act in them, and a full disk is told apart from a forbidden one.
//!
//! | Part | For |
//! |---|---|
//! | [`StagedFile`] | one file, complete or not there |
//! | [`TarSplitter`] | the bytes of BASE_BACKUP, entry by entry |
//! | [`TreePlan`], [`NewTree`] | a restore: refuse, build, publish the control file last |
//! | [`Places`] | what stands already, for a restore that takes it over |
//! | [`Finisher`] | fsyncs beside the writing |
//! | [`RecoverySettings`] | `postgresql.auto.conf` and the signal file |
//! | [`Spool`] | what was pushed and fetched ahead |
//! | [`ReadyFiles`], [`waiting_wal`] | what waits to be archived |
//! | [`StallDirectory`] | what the store cannot take |
//! | [`server_state`] and its neighbours | what is there already |
//! | [`ClusterWalk`] | which files of a running cluster belong to a base backup |
//! | [`ReadFile`], [`check_pages`] | reading them while the server writes |

mod backlog;
mod cluster_walk;
mod disk;
mod finisher;
mod page_read;
mod places;
mod ready;
mod recovery_settings;
mod restore_marker;
mod running;
mod safe_path;
mod spool;
mod staged;
mod stall_directory;
mod takeover;
mod tar_stream;
mod tree;
mod tree_plan;

pub use backlog::{Backlog, disk_room, files_held, share_a_disk, waiting_wal};
pub use cluster_walk::{
    ClusterWalk, FileLook, Found, FoundDirectory, FoundFile, TablespaceLink, WalkRules,
    has_own_times, tablespaces_of,
};
pub use disk::{DiskError, Owner, free_bytes};
pub use finisher::Finisher;
pub use page_read::{PageRules, ReadFile, SuspectPage, check_pages};
pub use places::{Places, Stranger};
pub use ready::ReadyFiles;
pub use recovery_settings::{
    CommandWord, RECOVERY_SETTINGS, RESTORE_POINT_NAME_BYTES_MAX, RecoveryMode, RecoverySettings,
    RecoverySettingsError, RecoveryTarget, Setting, TargetAction, command_line, last_value,
    restore_part, rewrite_auto_conf, settings_text, write_recovery_settings,
};
pub use restore_marker::{RESTORE_MARKER_NAME, RestoreMarker};
pub use running::{
    CONTROL_FILE_BYTES, PgVersionError, PostmasterPid, PostmasterPidError, Rereads, ServerState,
    SignalFiles, StableReadError, exported_snapshot, major_version, process_is_alive,
    read_control_bytes, read_stable, server_state, signal_files,
};
pub use safe_path::{PATH_BYTES_MAX, UnsafePath, safe_path};
pub use spool::{FileFacts, Moment, Spool, SpoolError, SpoolLock};
pub use staged::{Durability, Existing, StagedFile, sweep};
pub use stall_directory::{BACKUP_LOG, StallDirectory};
pub use takeover::holds_wal;
pub use tar_stream::{TarEnd, TarEntry, TarError, TarEvent, TarKind, TarSplitter};
pub use tree::{FileAttributes, NewFile, NewTree, SyncedTree};
pub use tree_plan::{Access, TablespaceTarget, TreeError, TreePlan};

//! `pin/<backup id>/<name>.json`: this backup is to be kept, whatever the retention policy says.
//!
//! A pin is an object of its own, since nothing stored is ever modified: pinning creates one more, unpinning
//! deletes them all, and of several on one backup the longest counts.

use serde::{Deserialize, Serialize};

use super::{BackupId, Document};
use crate::pg::PgTimestamp;

/// The longest reason, in bytes.
pub const PIN_REASON_BYTES_MAX: usize = 1024;

/// One pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The format version.
    pub format: u32,
    /// The backup that is kept.
    pub backup: BackupId,
    /// When it was pinned, by the clock of the host that did it.
    pub created_at: PgTimestamp,
    /// Until when (excluded); absent: until it is unpinned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<PgTimestamp>,
    /// Why, in the words of who pinned it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The host on which it was pinned.
    pub host: String,
    /// Its process there, so that two pins are never the same bytes.
    pub pid: u32,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Pin {
    const WHAT: &'static str = "pin";

    fn format(&self) -> u32 {
        self.format
    }
}

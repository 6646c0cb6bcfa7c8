//! What can be wrong with a WAL segment: one variant for each thing a person can act on.

use super::{Lsn, SystemId, Timeline};

/// Why a file is not a sound segment of WAL. Reading the file again may cure
/// any of these when the file was being written; nothing else does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalDamage {
    /// The file is longer or shorter than a segment.
    #[error("the file has {found} bytes, a WAL segment of this cluster has {expected}")]
    WrongSize {
        /// The segment size in bytes.
        expected: u64,
        /// How many bytes were fed.
        found: u64,
    },
    /// The segment was written by another cluster.
    #[error("the segment belongs to the cluster with system identifier {found}, not {expected}")]
    WrongSystemId {
        /// The identifier that the caller expects.
        expected: SystemId,
        /// The identifier in the first page header.
        found: SystemId,
    },
    /// The segment says another segment size.
    #[error("the segment says a WAL segment size of {found} bytes, expected is {expected}")]
    WrongSegmentSize {
        /// The size in bytes that the caller expects.
        expected: u64,
        /// The size in bytes in the first page header.
        found: u32,
    },
    /// The WAL page size is none that PostgreSQL can be built with.
    #[error("the segment says a WAL page size of {found} bytes, which is none PostgreSQL has")]
    BadBlockSize {
        /// The page size in bytes in the first page header.
        found: u32,
    },
    /// A page header is all zero: the page was never written.
    #[error("the WAL page at {lsn} is zeroed")]
    ZeroedPage {
        /// Where the page is.
        lsn: Lsn,
    },
    /// A page begins with no known magic: not WAL, or overwritten.
    #[error(
        "the WAL page at {lsn} has the magic {found:04X}, which no known PostgreSQL version writes"
    )]
    UnknownMagic {
        /// Where the page is.
        lsn: Lsn,
        /// The magic found.
        found: u16,
    },
    /// A page is of another version than the segment's first.
    #[error(
        "the WAL page at {lsn} is of PostgreSQL {found}, the segment's first page of {expected}"
    )]
    VersionChanged {
        /// Where the page is.
        lsn: Lsn,
        /// Major version of the first page.
        expected: super::MajorVersion,
        /// Major version of this page.
        found: super::MajorVersion,
    },
    /// A page says it stands elsewhere: a recycled file, or another segment under this name.
    #[error(
        "the WAL page at {lsn} says it is the page at {found}: the file is recycled or misnamed"
    )]
    WrongPageAddress {
        /// Where the page is.
        lsn: Lsn,
        /// Where the page says it is.
        found: Lsn,
    },
    /// A page is of a timeline it cannot be of.
    #[error(
        "the WAL page at {lsn} is on timeline {found}; it can only be on {at_least} to {at_most}"
    )]
    WrongTimeline {
        /// Where the page is.
        lsn: Lsn,
        /// The timeline in the page header.
        found: Timeline,
        /// The timeline of the page before (timelines never go back).
        at_least: Timeline,
        /// The timeline in the file's name.
        at_most: Timeline,
    },
    /// The flags of a page are unknown or missing where they must be.
    #[error("the WAL page at {lsn} has the impossible flags {found:04X}")]
    BadPageFlags {
        /// Where the page is.
        lsn: Lsn,
        /// The `xlp_info` found.
        found: u16,
    },
    /// A page does not go on with the record that the page before left off.
    #[error(
        "the WAL page at {lsn} continues {found} bytes of a record, but {expected} bytes are left"
    )]
    BadContinuation {
        /// Where the page is.
        lsn: Lsn,
        /// Bytes of the record left at the end of the page before; 0 if it was complete.
        expected: u64,
        /// Bytes that the page says; 0 if it continues nothing.
        found: u32,
    },
    /// A record's length is impossible.
    #[error("the WAL record at {lsn} has an impossible length of {length} bytes")]
    BadRecordLength {
        /// Where the record begins.
        lsn: Lsn,
        /// The length found.
        length: u32,
    },
    /// A record names a resource manager that its version does not have.
    #[error("the WAL record at {lsn} names the unknown resource manager {found}")]
    BadResourceManager {
        /// Where the record begins.
        lsn: Lsn,
        /// The resource manager found.
        found: u8,
    },
    /// A record's link back does not lead to the record before it.
    #[error("the WAL record at {lsn} says the record before it is at {found}, it is {expected}")]
    BadPreviousLink {
        /// Where the record begins.
        lsn: Lsn,
        /// The record before, or "an earlier one" where that is not known.
        expected: ExpectedLink,
        /// The link found.
        found: Lsn,
    },
    /// A record's bytes do not give its checksum.
    #[error(
        "the WAL record at {lsn} has the checksum {computed:08X}, its header says {stored:08X}"
    )]
    BadChecksum {
        /// Where the record begins.
        lsn: Lsn,
        /// The CRC-32C in the header.
        stored: u32,
        /// The CRC-32C of the bytes.
        computed: u32,
    },
    /// No record begins where one must, and no switch record explains it.
    #[error("valid WAL ends at {lsn}, inside the segment, without a switch record")]
    EndInside {
        /// The end of valid WAL (excluded).
        lsn: Lsn,
    },
}

/// What the link of a record must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpectedLink {
    /// Exactly this record.
    Record(Lsn),
    /// Some earlier record: the one before was not seen.
    Earlier,
}

impl std::fmt::Display for ExpectedLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Record(lsn) => write!(f, "at {lsn}"),
            Self::Earlier => write!(f, "an earlier one"),
        }
    }
}

impl WalDamage {
    /// Returns whether the first page says that another cluster wrote the file, or this one with
    /// another segment size; everything else is a file that is not whole.
    pub fn is_wrong_identity(&self) -> bool {
        matches!(self, Self::WrongSystemId { .. } | Self::WrongSegmentSize { .. })
    }
}

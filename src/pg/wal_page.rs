//! The header that starts each page of WAL.
//!
//! ```text
//! 0  u16 xlp_magic      the major version
//! 2  u16 xlp_info       flags
//! 4  u32 xlp_tli        timeline of the first record on the page
//! 8  u64 xlp_pageaddr   LSN of this page
//! 16 u32 xlp_rem_len    bytes left of a record continued from the page before
//! 20     padding; a short header ends at 24
//! 24 u64 xlp_sysid      long header only, on the first page of a segment
//! 32 u32 xlp_seg_size
//! 36 u32 xlp_xlog_blcksz; a long header ends at 40
//! ```
//!
//! Source: `src/include/access/xlog_internal.h`, the same from PostgreSQL 13 to 19.

use super::bytes::{u16_at, u32_at, u64_at};
use super::{Lsn, MajorVersion, SystemId, Timeline};

/// Bytes of a page header without cluster facts (`SizeOfXLogShortPHD`).
pub const SHORT_PAGE_HEADER_BYTES: usize = 24;
/// Bytes of a page header with cluster facts (`SizeOfXLogLongPHD`).
pub const LONG_PAGE_HEADER_BYTES: usize = 40;

const FIRST_IS_CONTRECORD: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
/// The four known bits (`XLP_ALL_FLAGS`); 0x0004 is `XLP_BKP_REMOVABLE`, a mere hint.
const ALL_FLAGS: u16 = 0x000F;

/// The `xlp_info` bits of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageFlags(u16);

impl PageFlags {
    /// Returns whether the page begins in the middle of a record.
    pub fn first_is_contrecord(self) -> bool {
        self.0 & FIRST_IS_CONTRECORD != 0
    }

    /// Returns whether the header is the long one.
    pub fn long_header(self) -> bool {
        self.0 & LONG_HEADER != 0
    }

    /// Returns whether the record that should have continued here was given up
    /// after a crash (13.5 and 14.1 on); a new record starts instead.
    pub fn first_is_overwrite_contrecord(self) -> bool {
        self.0 & FIRST_IS_OVERWRITE_CONTRECORD != 0
    }

    /// Returns the raw bits.
    pub fn bits(self) -> u16 {
        self.0
    }
}

/// What a long header says of the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterFacts {
    /// The cluster's system identifier.
    pub system_id: SystemId,
    /// The WAL segment size in bytes, as found: possibly illegal.
    pub segment_size: u32,
    /// The WAL page size (`XLOG_BLCKSZ`) in bytes, as found: possibly illegal.
    pub block_size: u32,
}

/// The header of one WAL page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageHeader {
    /// The major version that the magic names.
    pub version: MajorVersion,
    /// The flags; no unknown bit is set.
    pub flags: PageFlags,
    /// The timeline of the first record on the page.
    pub timeline: Timeline,
    /// The LSN of the page's first byte.
    pub address: Lsn,
    /// Bytes left of a record continued from the page before; meaningful with
    /// [`PageFlags::first_is_contrecord`] only.
    pub remaining: u32,
    /// Present in a long header.
    pub cluster: Option<ClusterFacts>,
}

/// Why bytes are not a page header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PageHeaderError {
    /// Fewer bytes than the header needs.
    #[error("the page header is cut: {found} bytes")]
    Cut {
        /// How many bytes there were.
        found: usize,
    },
    /// All bytes are zero: the page was never written.
    #[error("the page is zeroed")]
    Zeroed,
    /// The magic belongs to no known version.
    #[error("the page magic {found:04X} belongs to no known PostgreSQL version")]
    UnknownMagic {
        /// The magic found.
        found: u16,
    },
    /// A flag bit is set that PostgreSQL does not define.
    #[error("the page flags {found:04X} have unknown bits")]
    UnknownFlags {
        /// The flags found.
        found: u16,
    },
}

impl PageHeader {
    /// Returns the header at the start of `page`, which may be longer. Addresses
    /// and sizes are as found: comparing them is the caller's part.
    pub fn parse(page: &[u8]) -> Result<Self, PageHeaderError> {
        let cut = PageHeaderError::Cut { found: page.len() };
        let head = page.get(..SHORT_PAGE_HEADER_BYTES).ok_or(cut)?;
        if head.iter().all(|&byte| byte == 0) {
            return Err(PageHeaderError::Zeroed);
        }
        let magic = u16_at(head, 0).ok_or(cut)?;
        let version = MajorVersion::from_page_magic(magic)
            .ok_or(PageHeaderError::UnknownMagic { found: magic })?;
        let flags = PageFlags(u16_at(head, 2).ok_or(cut)?);
        if flags.0 & !ALL_FLAGS != 0 {
            return Err(PageHeaderError::UnknownFlags { found: flags.0 });
        }
        let cluster =
            if flags.long_header() { Some(parse_cluster(page).ok_or(cut)?) } else { None };
        Ok(Self {
            version,
            flags,
            timeline: Timeline(u32_at(head, 4).ok_or(cut)?),
            address: Lsn(u64_at(head, 8).ok_or(cut)?),
            remaining: u32_at(head, 16).ok_or(cut)?,
            cluster,
        })
    }

    /// Returns how many bytes the header takes: 24 or 40.
    pub fn size(&self) -> usize {
        if self.cluster.is_some() { LONG_PAGE_HEADER_BYTES } else { SHORT_PAGE_HEADER_BYTES }
    }

    /// Returns how many bytes a header beginning with `bytes` takes, or `None`
    /// while the flags (bytes 2 and 3) are not there yet.
    pub(super) fn size_of(bytes: &[u8]) -> Option<usize> {
        let long = PageFlags(u16_at(bytes, 2)?).long_header();
        Some(if long { LONG_PAGE_HEADER_BYTES } else { SHORT_PAGE_HEADER_BYTES })
    }
}

fn parse_cluster(page: &[u8]) -> Option<ClusterFacts> {
    Some(ClusterFacts {
        system_id: SystemId(u64_at(page, 24)?),
        segment_size: u32_at(page, 32)?,
        block_size: u32_at(page, 36)?,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The first 40 bytes of a segment of a PostgreSQL 17 cluster with 16 MiB segments.
    fn long_header() -> Vec<u8> {
        let mut bytes = vec![0x16, 0xD1, 0x06, 0, 1, 0, 0, 0];
        bytes.extend(0x0000_0001_0100_0000u64.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(7_575_123_456_789_012_345u64.to_le_bytes());
        bytes.extend((16u32 << 20).to_le_bytes());
        bytes.extend(8192u32.to_le_bytes());
        bytes
    }

    #[test]
    fn a_long_header_names_its_cluster() {
        let header = PageHeader::parse(&long_header()).unwrap();
        assert_eq!(header.version, MajorVersion(17));
        assert_eq!(header.address.to_string(), "1/1000000");
        assert_eq!(header.size(), 40);
        let cluster = header.cluster.unwrap();
        assert_eq!(cluster.system_id.to_string(), "7575123456789012345");
        assert_eq!((cluster.segment_size, cluster.block_size), (16 << 20, 8192));
    }

    #[test]
    fn a_zeroed_page_is_told_from_an_unknown_one() {
        assert_eq!(PageHeader::parse(&[0; 40]), Err(PageHeaderError::Zeroed));
        let mut bytes = long_header();
        bytes[0] = 0x17;
        assert_eq!(PageHeader::parse(&bytes), Err(PageHeaderError::UnknownMagic { found: 0xD117 }));
        bytes[0] = 0x16;
        bytes[2] |= 0x10;
        assert_eq!(PageHeader::parse(&bytes), Err(PageHeaderError::UnknownFlags { found: 0x16 }));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = PageHeader::parse(&bytes);
            let mut almost = long_header();
            for (to, from) in almost.iter_mut().zip(&bytes) { *to ^= from & 0x0F; }
            let _ = PageHeader::parse(&almost);
        }
    }
}

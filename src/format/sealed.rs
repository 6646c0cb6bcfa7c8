//! The sealed object: one skippable frame with a small header, then the body.
//!
//! ```text
//! offset  size
//!      0     4  5A 2A 4D 18        a skippable frame's magic; zstd and lz4 both skip it
//!      4     4  u32 LE             length L of what follows, up to the body
//!      8     4  "HWS1"             the seal
//!     12     4  u32 LE             CRC-32C of the JSON and its padding (L - 8 bytes)
//!     16   L-8  JSON, UTF-8        the header, padded with spaces
//!    8+L        body               frames of the codec, one after another
//! ```
//!
//! One ranged read of the first [`HEADER_PROBE_BYTES`] tells everything about an
//! object. The header names the object's own key, so that two objects cannot be swapped.

use serde::{Deserialize, Serialize};

use super::{Document, DocumentError, EncryptionError, FORMAT_VERSION, Packing};
use crate::pg::{Lsn, PgTimestamp, SystemId, Timeline};

/// zstd's and lz4's range of skippable frames is `184D2A50` to `184D2A5F`.
const SKIPPABLE_MAGIC: u32 = 0x184D_2A5A;
const SEAL: &[u8; 4] = b"HWS1";
const JSON_OFFSET: usize = 16;

/// How many bytes from the start of an object are sure to hold a whole header.
pub const HEADER_PROBE_BYTES: u64 = 16 << 10;

/// The length of a pack's header, body excluded: fixed, so that the place of a
/// frame is known before the pack is complete.
pub const PACK_HEADER_BYTES: usize = 1024;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// One complete WAL segment.
    Segment,
    /// A piece of a WAL segment.
    Piece,
    /// The incomplete last segment of a timeline.
    Partial,
    /// A segment that the server itself has damaged, kept as it was; recovery never asks for it.
    Damaged,
    /// A backup history file.
    BackupHistory,
    /// A timeline history file.
    TimelineHistory,
    /// A pack of a backup.
    Pack,
    /// The index of a backup's file list.
    Files,
    /// What a run of `verify` has proven.
    Proof,
}

/// A restore point that a segment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestorePointMark {
    /// The name given to `pg_create_restore_point`.
    pub name: String,
    /// The LSN behind its record, at which recovery to it ends.
    pub lsn: Lsn,
    /// The server's clock when it was made.
    pub time: PgTimestamp,
}

/// What the header of a WAL object tells about the records in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalSummary {
    /// The timeline in the segment's name.
    pub timeline: Timeline,
    /// The LSN of the object's first byte.
    pub start_lsn: Lsn,
    /// The LSN behind the last valid record, or behind the segment when a record goes on in the next one.
    pub end_lsn: Lsn,
    /// The `xlp_magic` of its pages, which tells the major version.
    pub page_magic: u16,
    /// Commit and abort records in it.
    pub xacts: u64,
    /// The earliest time of a commit or abort record; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_xact_time: Option<PgTimestamp>,
    /// The latest time of a commit or abort record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_xact_time: Option<PgTimestamp>,
    /// The latest time of a commit record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit_time: Option<PgTimestamp>,
    /// Where the last whole record begins; absent where none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_record_lsn: Option<Lsn>,
    /// Restore points, in WAL order; at most as many as fit the header.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub restore_points: Vec<RestorePointMark>,
    /// Restore points beyond those listed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub restore_points_unlisted: u64,
    /// Commits that dropped relation files (DROP, TRUNCATE, rewrites).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dropping_commits: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// The header of a sealed object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The version of the stored format.
    pub format: u32,
    /// What the object is.
    pub kind: Kind,
    /// The object's key below the cluster's place.
    pub name: String,
    /// The cluster's system identifier.
    pub system_identifier: SystemId,
    /// How the body is compressed.
    pub codec: Packing,
    /// The body's length before compression.
    pub plain_bytes: u64,
    /// The body's length as stored.
    pub stored_bytes: u64,
    /// BLAKE3 of the plain body, 64 hex digits. Packs have none: each chunk has its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// What the WAL in it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wal: Option<WalSummary>,
    /// Where the index of a pack stands that holds data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<IndexAt>,
}

/// Where the index of a pack stands in it: a frame of the pack's codec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexAt {
    /// The offset in the pack, header included.
    pub offset: u32,
    /// Its length as stored.
    pub stored: u32,
    /// Its length before compression.
    pub plain: u32,
}

impl Document for Header {
    const WHAT: &'static str = "object header";
    // The seal around it has one.
    const HAS_CHECKSUM: bool = false;

    fn format(&self) -> u32 {
        self.format
    }
}

/// The bytes do not begin with a seal, or it is damaged.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Not an object of ours at all, or its first bytes are damaged.
    #[error("it does not begin with Highwater's seal")]
    NotSealed,
    /// The header's checksum does not fit.
    #[error("its header is damaged (CRC-32C)")]
    Damaged,
    /// The bytes end before the header does.
    #[error("it ends within its header")]
    Cut,
    /// The header is longer than any we write.
    #[error("its header claims {0} bytes")]
    TooLong(u64),
    /// The header has another body length than the object.
    #[error("it holds {found_bytes} bytes of body where its header says {expected_bytes}")]
    WrongLength {
        /// What the header says.
        expected_bytes: u64,
        /// What is there.
        found_bytes: u64,
    },
    /// The JSON is of a newer format or cannot be understood.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// It is encrypted, and it was read as if it were not.
    #[error("it is encrypted")]
    Encrypted,
    /// It is encrypted in a way that this version cannot read.
    #[error(transparent)]
    Encryption(EncryptionError),
}

fn crc32c(bytes: &[u8]) -> u32 {
    // CRC-32C has 32 bits; the library returns every width in a u64.
    #[allow(clippy::cast_possible_truncation)]
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32;
    crc
}

/// Returns the bytes before the body.
///
/// # Errors
/// [`DocumentError`] if the header cannot be written as JSON.
pub fn encode_header(header: &Header) -> Result<Vec<u8>, DocumentError> {
    encode_header_padded(header, 0)
}

/// Returns the bytes before the body, at least `total_bytes` of them.
///
/// # Errors
/// [`DocumentError`] if the header cannot be written as JSON.
pub fn encode_header_padded(header: &Header, total_bytes: usize) -> Result<Vec<u8>, DocumentError> {
    let mut json = serde_json::to_vec(header)
        .map_err(|source| DocumentError::Malformed { what: Header::WHAT, source })?;
    json.resize(json.len().max(total_bytes.saturating_sub(JSON_OFFSET)), b' ');
    let frame_len = u32::try_from(json.len() + 8).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(JSON_OFFSET + json.len());
    out.extend_from_slice(&SKIPPABLE_MAGIC.to_le_bytes());
    out.extend_from_slice(&frame_len.to_le_bytes());
    out.extend_from_slice(SEAL);
    out.extend_from_slice(&crc32c(&json).to_le_bytes());
    out.extend_from_slice(&json);
    Ok(out)
}

/// Parses the header at the start of `bytes`, which may hold more than it; `object_bytes` is the
/// size of the whole object, against which the body's length is checked.
///
/// Returns the header and the offset of the body.
///
/// # Errors
/// [`SealError`]: none of them is cured by a retry.
pub fn parse_header(bytes: &[u8], object_bytes: u64) -> Result<(Header, usize), SealError> {
    let word =
        |at: usize| bytes.get(at..at + 4).and_then(|w| w.try_into().ok()).map(u32::from_le_bytes);
    if super::EncryptedHead::parse(bytes).is_ok() {
        return Err(SealError::Encrypted);
    }
    if bytes.len() < JSON_OFFSET {
        return Err(SealError::NotSealed);
    }
    let frame_len = word(4).unwrap_or(0) as usize;
    if word(0) != Some(SKIPPABLE_MAGIC) || bytes.get(8..12) != Some(SEAL) || frame_len < 8 {
        return Err(SealError::NotSealed);
    }
    let body_offset = 8 + frame_len;
    if body_offset as u64 > HEADER_PROBE_BYTES {
        return Err(SealError::TooLong(body_offset as u64));
    }
    let json = bytes.get(JSON_OFFSET..body_offset).ok_or(SealError::Cut)?;
    if word(12) != Some(crc32c(json)) {
        return Err(SealError::Damaged);
    }
    let header = Header::parse(json)?;
    let found_bytes = object_bytes.saturating_sub(body_offset as u64);
    if found_bytes != header.stored_bytes {
        return Err(SealError::WrongLength { expected_bytes: header.stored_bytes, found_bytes });
    }
    Ok((header, body_offset))
}

impl Header {
    /// Makes a header of the current format for a body that is described by the arguments.
    pub fn new(kind: Kind, name: String, system_identifier: SystemId, codec: Packing) -> Self {
        Self {
            format: FORMAT_VERSION,
            kind,
            name,
            system_identifier,
            codec,
            plain_bytes: 0,
            stored_bytes: 0,
            blake3: None,
            wal: None,
            index: None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn header(stored_bytes: u64) -> Header {
        let mut header =
            Header::new(Kind::Segment, "wal/1/x".to_owned(), SystemId(u64::MAX), Packing::Zstd);
        header.plain_bytes = 16 << 20;
        header.stored_bytes = stored_bytes;
        header
    }

    #[test]
    fn a_header_comes_back_and_says_where_the_body_begins() {
        let mut bytes = encode_header(&header(5)).unwrap();
        let head = bytes.len();
        bytes.extend_from_slice(b"hello");
        let (back, offset) = parse_header(&bytes, bytes.len() as u64).unwrap();
        assert_eq!((back, offset), (header(5), head));
        let padded = encode_header_padded(&header(0), PACK_HEADER_BYTES).unwrap();
        assert_eq!(padded.len(), PACK_HEADER_BYTES);
        assert_eq!(parse_header(&padded, 1024).unwrap().1, PACK_HEADER_BYTES);
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let good = encode_header(&header(0)).unwrap();
        let len = good.len() as u64;
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(parse_header(&bad, len).is_err(), "bit {bit}");
        }
        for cut in 0..good.len() {
            assert!(parse_header(&good[..cut], len).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_body_of_another_length_is_noticed() {
        let bytes = encode_header(&header(5)).unwrap();
        let error = parse_header(&bytes, bytes.len() as u64 + 4).unwrap_err();
        assert!(matches!(error, SealError::WrongLength { expected_bytes: 5, found_bytes: 4 }));
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let mut newer = header(0);
        newer.format = FORMAT_VERSION + 1;
        let bytes = encode_header(&newer).unwrap();
        let error = parse_header(&bytes, bytes.len() as u64).unwrap_err();
        assert!(matches!(error, SealError::Document(DocumentError::Newer { .. })), "{error}");
    }

    #[test]
    fn a_zstd_reader_skips_the_header() {
        let body = crate::format::Codec::DEFAULT.frame(b"plain text").unwrap();
        let mut object = encode_header(&header(body.len() as u64)).unwrap();
        object.extend_from_slice(&body);
        assert_eq!(zstd::decode_all(object.as_slice()).unwrap(), b"plain text");
    }
}

//! `backup_manifest`: every file of a base backup with its size and checksum.
//!
//! The server writes one file to a line, so a manifest of a million files is read
//! as it streams by, holding one line:
//!
//! ```text
//! { "PostgreSQL-Backup-Manifest-Version": 2,
//! "System-Identifier": 7710829184632056437,                        version 2 only
//! "Files": [
//! { "Path": "PG_VERSION", "Size": 3, "Last-Modified": "...", "Checksum-Algorithm": "CRC32C", "Checksum": "994e7be2" },
//! { "Encoded-Path": "62e9", "Size": 0, "Last-Modified": "..." }
//! ],
//! "WAL-Ranges": [
//! { "Timeline": 1, "Start-LSN": "0/2F000028", "End-LSN": "0/2F000120" }
//! ],
//! "Manifest-Checksum": "<SHA-256 of all lines above>"}
//! ```
//!
//! Sources: manual, "Backup Manifest Format"; `src/backend/backup/backup_manifest.c`.

use aws_lc_rs::digest::{Context, SHA256};
use serde::Deserialize;

use super::bytes::{from_hex, u32_at};
use super::{Lsn, PgTimestamp, SystemId, Timeline};

/// The longest line, in bytes: a path has at most 1024 (`MAXPGPATH`), hex doubles
/// it, JSON may take six for one.
const LINE_BYTES_MAX: usize = 32 << 10;
/// The most WAL ranges: one for each timeline the backup lived on.
const WAL_RANGES_MAX: usize = 1024;

/// How a file's checksum was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChecksumAlgorithm {
    /// CRC-32C, four bytes.
    Crc32c,
    /// SHA-224.
    Sha224,
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512.
    Sha512,
}

impl ChecksumAlgorithm {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "CRC32C" => Self::Crc32c,
            "SHA224" => Self::Sha224,
            "SHA256" => Self::Sha256,
            "SHA384" => Self::Sha384,
            "SHA512" => Self::Sha512,
            _ => return None,
        })
    }

    /// Returns the length of such a checksum, in bytes.
    pub fn checksum_bytes(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => 64,
        }
    }
}

/// The checksum of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestChecksum {
    /// How it was made.
    pub algorithm: ChecksumAlgorithm,
    /// The bytes as the manifest has them; as many as the algorithm gives.
    pub bytes: Vec<u8>,
}

impl ManifestChecksum {
    /// Returns the CRC-32C as a number, or `None` for another algorithm. The
    /// manifest shows its bytes as they stand in memory, little end first.
    pub fn crc32c(&self) -> Option<u32> {
        (self.algorithm == ChecksumAlgorithm::Crc32c).then(|| u32_at(&self.bytes, 0)).flatten()
    }
}

/// One file of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Its path below the data directory, as bytes: names need not be UTF-8.
    pub path: Vec<u8>,
    /// Whether the manifest gave the path in hex (`Encoded-Path`).
    pub encoded: bool,
    /// Its size in bytes, as sent.
    pub size: u64,
    /// When it was last changed; whole seconds.
    pub last_modified: PgTimestamp,
    /// Its checksum, or `None` if the backup was taken without.
    pub checksum: Option<ManifestChecksum>,
}

/// A stretch of WAL that the backup needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRange {
    /// The timeline.
    pub timeline: Timeline,
    /// The first byte needed (included).
    pub start_lsn: Lsn,
    /// The end (excluded): the earliest point at which the backup is consistent.
    pub end_lsn: Lsn,
}

/// What a complete manifest says beside its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEnd {
    /// The manifest's version: 1 up to PostgreSQL 16, 2 from 17 on.
    pub version: u32,
    /// The cluster; version 2 only.
    pub system_id: Option<SystemId>,
    /// The WAL needed, in the order of the manifest.
    pub wal_ranges: Vec<WalRange>,
    /// How many files were listed.
    pub file_count: u64,
}

/// Why bytes are not a whole, sound manifest. Nothing cures it but a new copy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A line is not what must stand there.
    #[error("line {line} of the backup manifest is not {expected}")]
    BadLine {
        /// The line, from 1.
        line: u64,
        /// What must stand there.
        expected: &'static str,
    },
    /// A line is longer than any real one.
    #[error("line {line} of the backup manifest is longer than {LINE_BYTES_MAX} bytes")]
    LineTooLong {
        /// The line, from 1.
        line: u64,
    },
    /// The version is not known.
    #[error("the backup manifest has version {found}, known are 1 and 2")]
    UnknownVersion {
        /// The version found.
        found: u32,
    },
    /// The manifest ends before its last line.
    #[error("the backup manifest is cut: it has no Manifest-Checksum")]
    Cut,
    /// The manifest's own checksum is wrong.
    #[error("the backup manifest does not match its own checksum")]
    BadChecksum,
}

/// What the next line must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Version,
    SystemIdentifier,
    FilesBegin,
    Files,
    RangesBegin,
    Ranges,
    Checksum,
    Done,
}

/// Reads a manifest in blocks of any size.
#[derive(Clone)]
pub struct ManifestReader {
    section: Section,
    line: Vec<u8>,
    line_number: u64,
    digest: Context,
    end: ManifestEnd,
}

impl std::fmt::Debug for ManifestReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestReader")
            .field("section", &self.section)
            .field("line_number", &self.line_number)
            .finish_non_exhaustive()
    }
}

impl Default for ManifestReader {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLine<'a> {
    #[serde(rename = "Path", borrow)]
    path: Option<std::borrow::Cow<'a, str>>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<&'a str>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Last-Modified")]
    last_modified: &'a str,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<&'a str>,
    #[serde(rename = "Checksum")]
    checksum: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeLine<'a> {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN")]
    start: &'a str,
    #[serde(rename = "End-LSN")]
    end: &'a str,
}

impl ManifestReader {
    /// Starts at the first byte.
    pub fn new() -> Self {
        let end =
            ManifestEnd { version: 0, system_id: None, wal_ranges: Vec::new(), file_count: 0 };
        let digest = Context::new(&SHA256);
        Self { section: Section::Version, line: Vec::new(), line_number: 0, digest, end }
    }

    /// Takes in the next bytes and shows each file as its line completes. Files are
    /// only to be believed once [`Self::finish`] has compared the checksum.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        on_file: &mut dyn FnMut(ManifestFile),
    ) -> Result<(), ManifestError> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (head, rest) = bytes.split_at(end + 1);
            bytes = rest;
            if self.line.is_empty() {
                self.take_line(head, on_file)?;
            } else {
                self.gather(head)?;
                let line = std::mem::take(&mut self.line);
                self.take_line(&line, on_file)?;
                self.line = line;
                self.line.clear();
            }
        }
        self.gather(bytes)
    }

    /// Ends the input and returns what the manifest says, its checksum compared.
    pub fn finish(self) -> Result<ManifestEnd, ManifestError> {
        let whole = self.section == Section::Done && self.line.is_empty();
        whole.then_some(self.end).ok_or(ManifestError::Cut)
    }

    fn gather(&mut self, bytes: &[u8]) -> Result<(), ManifestError> {
        if self.line.len() + bytes.len() > LINE_BYTES_MAX {
            return Err(ManifestError::LineTooLong { line: self.line_number + 1 });
        }
        self.line.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes one line, its line feed included.
    fn take_line(
        &mut self,
        line: &[u8],
        on_file: &mut dyn FnMut(ManifestFile),
    ) -> Result<(), ManifestError> {
        self.line_number += 1;
        if line.len() > LINE_BYTES_MAX {
            return Err(ManifestError::LineTooLong { line: self.line_number });
        }
        let number = self.line_number;
        let bad = |expected| ManifestError::BadLine { line: number, expected };
        let text = str::from_utf8(line).map_err(|_| bad("UTF-8"))?.trim_end_matches('\n');
        if self.section == Section::Checksum {
            return self.take_checksum(text);
        }
        self.digest.update(line);
        self.section = match self.section {
            Section::Version => self.take_version(text)?,
            Section::SystemIdentifier => {
                let expected = "the System-Identifier";
                let number = number_after(text, "\"System-Identifier\": ");
                self.end.system_id = Some(SystemId(number.ok_or(bad(expected))?));
                Section::FilesBegin
            }
            Section::FilesBegin if text == "\"Files\": [" => Section::Files,
            Section::FilesBegin => return Err(bad("the beginning of Files")),
            Section::Files if text == "]," => Section::RangesBegin,
            Section::Files => {
                on_file(parse_file(text).ok_or(bad("a file"))?);
                self.end.file_count += 1;
                Section::Files
            }
            Section::RangesBegin if text == "\"WAL-Ranges\": [" => Section::Ranges,
            Section::RangesBegin => return Err(bad("the beginning of WAL-Ranges")),
            Section::Ranges if text == "]," => Section::Checksum,
            Section::Ranges => {
                let full = self.end.wal_ranges.len() >= WAL_RANGES_MAX;
                let range = (!full).then(|| parse_range(text)).flatten();
                self.end.wal_ranges.push(range.ok_or(bad("a WAL range"))?);
                Section::Ranges
            }
            Section::Checksum | Section::Done => return Err(bad("the end")),
        };
        Ok(())
    }

    fn take_version(&mut self, text: &str) -> Result<Section, ManifestError> {
        let expected = "the beginning of a manifest";
        let bad = ManifestError::BadLine { line: self.line_number, expected };
        let number = number_after(text, "{ \"PostgreSQL-Backup-Manifest-Version\": ");
        let found = number.and_then(|number| u32::try_from(number).ok()).ok_or(bad)?;
        self.end.version = found;
        match found {
            1 => Ok(Section::FilesBegin),
            2 => Ok(Section::SystemIdentifier),
            _ => Err(ManifestError::UnknownVersion { found }),
        }
    }

    fn take_checksum(&mut self, text: &str) -> Result<(), ManifestError> {
        let bad =
            ManifestError::BadLine { line: self.line_number, expected: "the Manifest-Checksum" };
        let hex = text
            .strip_prefix("\"Manifest-Checksum\": \"")
            .and_then(|rest| rest.strip_suffix("\"}"))
            .filter(|hex| hex.len() == 64);
        let stored = hex.and_then(from_hex).ok_or(bad)?;
        if self.digest.clone().finish().as_ref() != stored {
            return Err(ManifestError::BadChecksum);
        }
        self.section = Section::Done;
        Ok(())
    }
}

/// Returns the number in `<prefix><digits>,`, all of `u64`.
fn number_after(text: &str, prefix: &str) -> Option<u64> {
    let digits = text.strip_prefix(prefix)?.strip_suffix(',')?;
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

fn parse_file(text: &str) -> Option<ManifestFile> {
    let line: FileLine<'_> = serde_json::from_str(text.strip_suffix(',').unwrap_or(text)).ok()?;
    let (path, encoded) = match (line.path, line.encoded_path) {
        (Some(path), None) => (path.into_owned().into_bytes(), false),
        (None, Some(hex)) => (from_hex(hex)?, true),
        _ => return None,
    };
    let checksum = match (line.algorithm, line.checksum) {
        (None, None) => None,
        (Some(name), Some(hex)) => {
            let algorithm = ChecksumAlgorithm::of(name)?;
            let bytes = from_hex(hex).filter(|bytes| bytes.len() == algorithm.checksum_bytes())?;
            Some(ManifestChecksum { algorithm, bytes })
        }
        _ => return None,
    };
    let civil: jiff::civil::DateTime = line.last_modified.strip_suffix(" GMT")?.parse().ok()?;
    let last_modified = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp().into();
    Some(ManifestFile { path, encoded, size: line.size, last_modified, checksum })
}

fn parse_range(text: &str) -> Option<WalRange> {
    let line: RangeLine<'_> = serde_json::from_str(text.strip_suffix(',').unwrap_or(text)).ok()?;
    let (start_lsn, end_lsn) = (line.start.parse().ok()?, line.end.parse().ok()?);
    let sound = line.timeline != 0 && start_lsn <= end_lsn;
    sound.then_some(WalRange { timeline: Timeline(line.timeline), start_lsn, end_lsn })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Real manifests of a nearly empty cluster, cut down to some files with the
    /// checksum made anew by another program.
    const VERSION_1: &[u8] = include_bytes!("../../tests/fixtures/pg/backup_manifest.14");
    const VERSION_2: &[u8] = include_bytes!("../../tests/fixtures/pg/backup_manifest.18");

    fn read(bytes: &[u8], block: usize) -> Result<(Vec<ManifestFile>, ManifestEnd), ManifestError> {
        let mut reader = ManifestReader::new();
        let mut files = Vec::new();
        for block in bytes.chunks(block) {
            reader.feed(block, &mut |file| files.push(file))?;
        }
        Ok((files, reader.finish()?))
    }

    #[test]
    fn both_versions_are_read_and_their_checksum_compared() {
        let (files, end) = read(VERSION_1, 4096).unwrap();
        assert_eq!((end.version, end.system_id), (1, None));
        assert_eq!(files.len() as u64, end.file_count);
        let (files, end) = read(VERSION_2, 4096).unwrap();
        assert_eq!((end.version, end.system_id), (2, Some(SystemId(7_710_829_184_632_056_437))));
        assert_eq!(end.wal_ranges.len(), 1);
        assert_eq!(end.wal_ranges[0].end_lsn.to_string(), "0/2F000120");
        let version = files.iter().find(|file| file.path == b"PG_VERSION").unwrap();
        assert_eq!(version.size, 3);
        assert_eq!(version.last_modified.to_string(), "2026-11-22T03:15:22.000000Z");
        let checksum = version.checksum.as_ref().unwrap();
        assert_eq!(checksum.crc32c(), Some(super::super::crc32c(b"18\n")));
    }

    #[test]
    fn encoded_paths_are_bytes_and_a_file_may_have_no_checksum() {
        let line = r#"{ "Encoded-Path": "62e92f", "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT" },"#;
        let file = parse_file(line).unwrap();
        assert_eq!((file.path.as_slice(), file.encoded), (&b"b\xE9/"[..], true));
        assert_eq!(file.checksum, None);
        let quoted =
            r#"{ "Path": "a\"b\u00e9", "Size": 1, "Last-Modified": "2026-11-22 03:15:22 GMT" }"#;
        assert_eq!(parse_file(quoted).unwrap().path, "a\"b\u{e9}".as_bytes());
    }

    #[test]
    fn malformed_files_are_refused() {
        for line in [
            r#"{ "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT" }"#,
            r#"{ "Path": "a", "Encoded-Path": "61", "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT" }"#,
            r#"{ "Path": "a", "Size": -1, "Last-Modified": "2026-11-22 03:15:22 GMT" }"#,
            r#"{ "Path": "a", "Size": 0, "Last-Modified": "yesterday" }"#,
            r#"{ "Path": "a", "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT", "Checksum": "00" }"#,
            r#"{ "Path": "a", "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00" }"#,
            r#"{ "Encoded-Path": "6g", "Size": 0, "Last-Modified": "2026-11-22 03:15:22 GMT" }"#,
        ] {
            assert_eq!(parse_file(line), None, "{line}");
        }
    }

    #[test]
    fn a_system_identifier_uses_all_64_bits() {
        let text = "\"System-Identifier\": 18446744073709551615,";
        assert_eq!(number_after(text, "\"System-Identifier\": "), Some(u64::MAX));
    }

    #[test]
    fn a_cut_manifest_is_never_whole() {
        for end in 0..VERSION_2.len() {
            assert!(read(&VERSION_2[..end], 1000).is_err(), "{end}");
        }
        let surplus = [VERSION_2, b"\n"].concat();
        assert!(read(&surplus, 1000).is_err());
    }

    #[test]
    fn an_endless_line_is_refused_before_it_is_held() {
        let mut reader = ManifestReader::new();
        let result = (0..100).try_for_each(|_| reader.feed(&[b' '; 1024], &mut |_| {}));
        assert_eq!(result, Err(ManifestError::LineTooLong { line: 1 }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_block_size_gives_the_same(block in 1usize..5000) {
            prop_assert_eq!(read(VERSION_2, block).unwrap(), read(VERSION_2, usize::MAX).unwrap());
        }

        #[test]
        fn a_changed_byte_is_always_noticed(at: prop::sample::Index, flip in 1u8..) {
            let mut bytes = VERSION_2.to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // The case of the checksum's hex digits is the one thing that says the same.
            if !bytes.eq_ignore_ascii_case(VERSION_2) {
                prop_assert!(read(&bytes, 4096).is_err());
            }
        }
    }
}

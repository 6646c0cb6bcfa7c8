//! `backup_manifest`, read as it streams by: one file at a time, whatever their number.
//!
//! ```text
//! { "PostgreSQL-Backup-Manifest-Version": 2,
//! "System-Identifier": 7575...,                                          version 2 only
//! "Files": [
//! { "Path": "backup_label", "Size": 227, "Last-Modified": "…", "Checksum-Algorithm": "CRC32C", "Checksum": "a1b2c3d4" },
//! { "Encoded-Path": "ff…", … }
//! ],
//! "WAL-Ranges": [
//! { "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000120" }
//! ],
//! "Manifest-Checksum": "<SHA-256 of all bytes before this line>"}
//! ```
//!
//! PostgreSQL writes one file per line, which this reader relies on; a manifest
//! that was formatted anew is refused rather than misread.
//!
//! Source: PostgreSQL `src/backend/backup/backup_manifest.c` and the manual,
//! "Backup Manifest Format".

use aws_lc_rs::digest::{Context, SHA256};
use serde::Deserialize;

use super::SystemId;

/// No line is longer: a path has at most 1024 bytes, two digits each when encoded.
const LINE_BYTES_MAX: usize = 64 << 10;

/// One file of the manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// The path below the data directory, as bytes.
    pub path: Vec<u8>,
    /// Its size in bytes.
    pub size: u64,
    /// Algorithm and checksum as the manifest prints it; CRC-32C stands in memory order.
    pub checksum: Option<(String, Vec<u8>)>,
}

/// What is known when the manifest has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestEnd {
    /// The system identifier; version 1 has none.
    pub system_id: Option<SystemId>,
    /// Files listed.
    pub files: u64,
}

/// Why bytes are not a whole manifest. A retry on the same bytes does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A line is longer than any that PostgreSQL writes.
    #[error("line {line} is too long")]
    LineTooLong {
        /// The line, from 1.
        line: u64,
    },
    /// A line is not what may stand there.
    #[error("line {line} cannot be understood")]
    BadLine {
        /// The line, from 1.
        line: u64,
    },
    /// The version is not 1 or 2.
    #[error("its version is {0}, and 1 and 2 are known")]
    Version(u64),
    /// It ends before its last line.
    #[error("it ends before its checksum")]
    Cut,
    /// Its own checksum does not fit.
    #[error("its checksum is not that of its bytes")]
    Checksum,
}

#[derive(Deserialize)]
struct FileLine {
    #[serde(rename = "Path")]
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    #[serde(rename = "Size")]
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    #[serde(rename = "Checksum")]
    checksum: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Start,
    Files,
    BetweenSections,
    Wal,
    Ended,
}

/// Reads a manifest as it streams by.
pub struct ManifestReader {
    section: Section,
    line: Vec<u8>,
    line_number: u64,
    hasher: Context,
    system_id: Option<SystemId>,
    files: u64,
}

impl std::fmt::Debug for ManifestReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestReader").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Default for ManifestReader {
    fn default() -> Self {
        Self::new()
    }
}

impl ManifestReader {
    /// Begins a manifest.
    pub fn new() -> Self {
        Self {
            section: Section::Start,
            line: Vec::new(),
            line_number: 0,
            hasher: Context::new(&SHA256),
            system_id: None,
            files: 0,
        }
    }

    /// Takes the next bytes, in blocks of any size, and shows each file.
    pub fn feed(
        &mut self,
        bytes: &[u8],
        on_file: &mut dyn FnMut(ManifestFile),
    ) -> Result<(), ManifestError> {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            self.line.extend_from_slice(part);
            if self.line.len() > LINE_BYTES_MAX {
                return Err(ManifestError::LineTooLong { line: self.line_number + 1 });
            }
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.line_number += 1;
                self.take_line(&line, on_file)?;
            }
        }
        Ok(())
    }

    /// Ends the manifest; its checksum was compared.
    pub fn finish(self) -> Result<ManifestEnd, ManifestError> {
        if self.section == Section::Ended && self.line.is_empty() {
            Ok(ManifestEnd { system_id: self.system_id, files: self.files })
        } else {
            Err(ManifestError::Cut)
        }
    }

    fn take_line(
        &mut self,
        line: &[u8],
        on_file: &mut dyn FnMut(ManifestFile),
    ) -> Result<(), ManifestError> {
        let bad = ManifestError::BadLine { line: self.line_number };
        if let Some(rest) = line.strip_prefix(b"\"Manifest-Checksum\": \"") {
            let expected = rest.strip_suffix(b"\"}\n").ok_or(bad)?;
            return self.end(expected);
        }
        self.hasher.update(line);
        let text = line.trim_ascii();
        match self.section {
            Section::Start => self.take_start(text, bad),
            Section::Files => match text {
                b"]," => {
                    self.section = Section::BetweenSections;
                    Ok(())
                }
                _ => {
                    on_file(parse_file(text).ok_or(bad)?);
                    self.files += 1;
                    Ok(())
                }
            },
            Section::BetweenSections if text == b"\"WAL-Ranges\": [" => {
                self.section = Section::Wal;
                Ok(())
            }
            Section::Wal if text.starts_with(b"{ \"Timeline\": ") || text == b"]," => Ok(()),
            _ => Err(bad),
        }
    }

    fn take_start(&mut self, text: &[u8], bad: ManifestError) -> Result<(), ManifestError> {
        let number = |rest: &[u8]| {
            std::str::from_utf8(rest.strip_suffix(b",")?).ok()?.trim().parse::<u64>().ok()
        };
        if let Some(rest) = text.strip_prefix(b"{ \"PostgreSQL-Backup-Manifest-Version\": ") {
            return match number(rest) {
                Some(1 | 2) => Ok(()),
                Some(other) => Err(ManifestError::Version(other)),
                None => Err(bad),
            };
        }
        if let Some(rest) = text.strip_prefix(b"\"System-Identifier\": ") {
            self.system_id = Some(SystemId(number(rest).ok_or(bad)?));
            return Ok(());
        }
        // An empty list is closed on the same line; no real backup has one.
        if text == b"\"Files\": [" {
            self.section = Section::Files;
            return Ok(());
        }
        Err(bad)
    }

    fn end(&mut self, expected: &[u8]) -> Result<(), ManifestError> {
        let found = std::mem::replace(&mut self.hasher, Context::new(&SHA256)).finish();
        let hex: String = found.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        if self.section != Section::Wal {
            return Err(ManifestError::BadLine { line: self.line_number });
        }
        self.section = Section::Ended;
        if hex.as_bytes() == expected { Ok(()) } else { Err(ManifestError::Checksum) }
    }
}

fn parse_file(text: &[u8]) -> Option<ManifestFile> {
    let text = text.strip_suffix(b",").unwrap_or(text);
    let line: FileLine = serde_json::from_slice(text).ok()?;
    let path = match (line.path, line.encoded_path) {
        (Some(path), None) => path.into_bytes(),
        (None, Some(hex)) => from_hex(&hex)?,
        _ => return None,
    };
    let checksum = match (line.algorithm, line.checksum) {
        (Some(algorithm), Some(hex)) => Some((algorithm, from_hex(&hex)?)),
        (None, None) => None,
        _ => return None,
    };
    (!path.is_empty()).then_some(ManifestFile { path, size: line.size, checksum })
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(version: u32, system_id: &str) -> String {
        let body = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": {version},\n{system_id}\"Files\": [\n\
             {{ \"Path\": \"PG_VERSION\", \"Size\": 3, \"Last-Modified\": \"2026-11-22 00:29:24 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"64440205\" }},\n\
             {{ \"Encoded-Path\": \"62ff\", \"Size\": 0, \"Last-Modified\": \"2026-11-22 00:29:24 GMT\" }}\n\
             ],\n\"WAL-Ranges\": [\n\
             {{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000120\" }}\n],\n"
        );
        let digest = aws_lc_rs::digest::digest(&SHA256, body.as_bytes());
        let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{body}\"Manifest-Checksum\": \"{hex}\"}}\n")
    }

    fn read(text: &[u8], cut: usize) -> Result<(ManifestEnd, Vec<ManifestFile>), ManifestError> {
        let mut reader = ManifestReader::new();
        let mut files = Vec::new();
        let (first, second) = text.split_at(cut.min(text.len()));
        for part in [first, second] {
            reader.feed(part, &mut |file| files.push(file))?;
        }
        Ok((reader.finish()?, files))
    }

    #[test]
    fn both_versions_are_understood_and_large_identifiers_kept() {
        let second = manifest(2, "\"System-Identifier\": 18446744073709551615,\n");
        let (end, files) = read(second.as_bytes(), 0).unwrap();
        assert_eq!(end, ManifestEnd { system_id: Some(SystemId(u64::MAX)), files: 2 });
        assert_eq!(files[0].checksum, Some(("CRC32C".into(), vec![0x64, 0x44, 0x02, 0x05])));
        assert_eq!((files[1].path.as_slice(), &files[1].checksum), (&b"b\xff"[..], &None));
        assert_eq!(read(manifest(1, "").as_bytes(), 0).unwrap().0.system_id, None);
        assert_eq!(read(manifest(3, "").as_bytes(), 0), Err(ManifestError::Version(3)));
    }

    #[test]
    fn every_changed_byte_is_noticed() {
        let good = manifest(1, "");
        for at in 0..good.len() {
            let mut bad = good.clone().into_bytes();
            bad[at] ^= 1;
            assert!(read(&bad, 0).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_files_and_a_missing_end_is_noticed(cut in 0usize..900) {
            let good = manifest(2, "\"System-Identifier\": 7,\n");
            prop_assert_eq!(read(good.as_bytes(), cut).unwrap(), read(good.as_bytes(), 0).unwrap());
            let cut = cut.min(good.len() - 1);
            prop_assert!(read(&good.as_bytes()[..cut], 0).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = read(&bytes, 0);
        }
    }
}

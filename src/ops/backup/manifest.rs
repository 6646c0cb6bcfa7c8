//! Comparing what arrived with the server's own manifest, file by file.
//!
//! The manifest comes last, so the checksum of each file is kept until then: a hash of its
//! path, its size and 16 bytes of its checksum, whatever the number of files.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use super::UNHARMED;
use super::recording::unexpected;
use crate::failure::{Failure, Kind};
use crate::pg::{Crc32c, ManifestFile, ManifestReader};
use crate::walsender::ManifestChecksums;

/// Paths of damaged files that an error names.
const NAMED_MAX: usize = 5;

enum Digest {
    Crc32c(Box<Crc32c>),
    Sha256(Box<aws_lc_rs::digest::Context>),
}

/// Compares files with the manifest.
pub(super) struct ManifestCheck {
    checksums: ManifestChecksums,
    current: Option<Digest>,
    hasher: RandomState,
    /// Hash of the path to size and the checksum's first bytes.
    files: HashMap<u64, (u64, [u8; 16])>,
    reader: Option<ManifestReader>,
    wrong: Vec<String>,
    wrong_count: u64,
}

impl ManifestCheck {
    pub(super) fn new(checksums: ManifestChecksums) -> Self {
        Self {
            checksums,
            current: None,
            hasher: RandomState::new(),
            files: HashMap::new(),
            reader: Some(ManifestReader::new()),
            wrong: Vec::new(),
            wrong_count: 0,
        }
    }

    pub(super) fn begin_file(&mut self) {
        self.current = Some(match self.checksums {
            ManifestChecksums::Crc32c => Digest::Crc32c(Box::default()),
            ManifestChecksums::Sha256 => Digest::Sha256(Box::new(aws_lc_rs::digest::Context::new(
                &aws_lc_rs::digest::SHA256,
            ))),
        });
    }

    pub(super) fn file_data(&mut self, data: &[u8]) {
        match &mut self.current {
            Some(Digest::Crc32c(crc)) => crc.update(data),
            Some(Digest::Sha256(sha)) => sha.update(data),
            None => {}
        }
    }

    /// Ends a file and returns its checksum as the file list carries it.
    pub(super) fn end_file(&mut self, path: &[u8], size: u64) -> String {
        let (algorithm, bytes) = match self.current.take() {
            // The manifest prints the four bytes in memory order.
            Some(Digest::Crc32c(crc)) => ("crc32c", crc.value().to_le_bytes().to_vec()),
            Some(Digest::Sha256(sha)) => ("sha256", sha.finish().as_ref().to_vec()),
            None => ("none", Vec::new()),
        };
        self.files.insert(self.hasher.hash_one(path), (size, first_bytes(&bytes)));
        let mut text = format!("{algorithm}:");
        for byte in bytes {
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }

    /// Takes the next bytes of the manifest.
    pub(super) fn feed(&mut self, data: &[u8]) -> Result<(), Failure> {
        let Some(mut reader) = self.reader.take() else { return Ok(()) };
        let fed = reader.feed(data, &mut |file| self.compare(&file));
        fed.map_err(|error| unexpected(format!("the manifest cannot be read: {error}")))?;
        self.reader = Some(reader);
        Ok(())
    }

    fn compare(&mut self, file: &ManifestFile) {
        let ours = self.files.remove(&self.hasher.hash_one(file.path.as_slice()));
        let theirs = file.checksum.as_ref().map(|sum| (file.size, first_bytes(&sum.bytes)));
        if ours.is_none() || ours != theirs {
            self.wrong_count += 1;
            if self.wrong.len() < NAMED_MAX {
                self.wrong.push(String::from_utf8_lossy(&file.path).into_owned());
            }
        }
    }

    pub(super) fn finish(self) -> Result<(), Failure> {
        let reader = self.reader.ok_or_else(|| unexpected("the manifest ended early"))?;
        reader
            .finish()
            .map_err(|error| unexpected(format!("the manifest is not whole: {error}")))?;
        if self.wrong_count > 0 {
            return Err(Failure::new(
                Kind::Integrity,
                format!(
                    "{} files did not arrive as the server's manifest lists them, among them {}",
                    self.wrong_count,
                    self.wrong.join(", ")
                ),
                UNHARMED,
                "Take the backup again. If it happens again, suspect memory or network hardware between server and this host.",
            ));
        }
        if !self.files.is_empty() {
            let many = self.files.len();
            return Err(unexpected(format!(
                "{many} files arrived that the manifest does not list"
            )));
        }
        Ok(())
    }
}

fn first_bytes(bytes: &[u8]) -> [u8; 16] {
    let mut first = [0; 16];
    let n = bytes.len().min(16);
    first[..n].copy_from_slice(&bytes[..n]);
    first
}

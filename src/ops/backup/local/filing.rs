//! What was read on its way into the repository, and into the manifest that lists it.

use std::sync::Arc;

use super::super::Making;
use super::super::arriving::Begin;
use super::super::recording::{ChunkFacts, Received, Recording, unexpected};
use super::super::server::Facts;
use super::ends::Ends;
use super::manifest_draft::ManifestDraft;
use super::reading::{Data, Event, facts_of};
use super::session::{Ended, Started};
use crate::failure::Failure;
use crate::format::{CHUNK_BYTES, DamagedPage, DamagedPages, EntryKind, FileStamp, digest_chunk};
use crate::ops::progress::Progress;
use crate::pg::{Crc32c, Lsn, ManifestedFile, crc32c_joined};
use crate::plan::file_reading::is_damaged;
use crate::repo::{FileMeta, FileRecorder, ParentFiles};
use crate::walsender::ManifestChecksums;

/// Pages with a wrong checksum that are remembered until the backup's stop tells what they are.
const SUSPECTS_MAX: usize = 10_000;

/// Permissions of the files that the server said the content of.
const SAID_MODE: u32 = 0o600;

/// The checksum of a file that is being recorded.
enum Sum {
    Crc32c(u32),
    Sha256(Box<aws_lc_rs::digest::Context>),
}

impl Sum {
    fn new(checksums: ManifestChecksums) -> Self {
        match checksums {
            ManifestChecksums::Crc32c => Self::Crc32c(Crc32c::new().value()),
            ManifestChecksums::Sha256 => {
                Self::Sha256(Box::new(aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256)))
            }
        }
    }

    fn take(&mut self, bytes: &[u8], crc: u32) {
        match self {
            Self::Crc32c(sum) => *sum = crc32c_joined(*sum, crc, bytes.len() as u64),
            Self::Sha256(sum) => sum.update(bytes),
        }
    }

    /// Returns its bytes as a manifest prints them.
    fn finish(self) -> Vec<u8> {
        match self {
            Self::Crc32c(sum) => sum.to_le_bytes().to_vec(),
            Self::Sha256(sum) => sum.finish().as_ref().to_vec(),
        }
    }
}

/// Returns the name of the checksum in file lists.
pub(in super::super) fn name_of(checksums: ManifestChecksums) -> &'static str {
    match checksums {
        ManifestChecksums::Crc32c => "crc32c",
        ManifestChecksums::Sha256 => "sha256",
    }
}

/// Returns the name of the checksum in manifests.
fn manifest_name_of(checksums: ManifestChecksums) -> &'static str {
    match checksums {
        ManifestChecksums::Crc32c => "CRC32C",
        ManifestChecksums::Sha256 => "SHA256",
    }
}

/// Digests a chunk of the manifest, of which no later backup references any.
fn manifest_facts(chunk: &[u8]) -> ChunkFacts {
    ChunkFacts { digest: digest_chunk(chunk), pages: None, is_zeros: false, crc: None }
}

fn bytes_of_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.len().is_multiple_of(2) || !hex.is_ascii() {
        return None;
    }
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect()
}

/// What was read on its way into the repository and into the manifest.
pub(super) struct Filing<'a> {
    recording: Recording<'a>,
    manifest: ManifestDraft,
    checksums: ManifestChecksums,
    progress: Arc<dyn Progress>,
    start_lsn: Lsn,
    /// The file that is being recorded.
    file: Option<(FileMeta, Sum)>,
    /// Pages with a wrong checksum, and the position each names.
    suspects: Vec<(DamagedPage, Lsn)>,
    suspects_left_out: u64,
}

impl<'a> Filing<'a> {
    pub(super) fn new(
        making: &'a Making<'a>,
        facts: &Facts,
        recorder: FileRecorder,
        parent: Option<ParentFiles>,
        start_lsn: Lsn,
    ) -> Self {
        Self {
            recording: Recording::new(making, recorder, parent),
            manifest: ManifestDraft::new(facts.version.major(), facts.system_id),
            checksums: making.request.manifest_checksums,
            progress: Arc::clone(&making.progress),
            start_lsn,
            file: None,
            suspects: Vec::new(),
            suspects_left_out: 0,
        }
    }

    pub(super) async fn take(&mut self, event: Event, bytes: &[u8]) -> Result<(), Failure> {
        match event {
            Event::Directory(meta) => self.recording.entry(meta).await,
            Event::File(meta, stamp) => {
                self.file = Some((meta.clone(), Sum::new(self.checksums)));
                self.recording.entry(meta).await?;
                self.recording.stamp(stamp);
                Ok(())
            }
            Event::Kept(count) => {
                for (crc, len) in self.recording.keep(count).await? {
                    self.progress.advance(len);
                    if let Some((_, Sum::Crc32c(sum))) = &mut self.file {
                        *sum = crc32c_joined(*sum, crc, len);
                    }
                }
                Ok(())
            }
            Event::Unchanged(meta, stamp) => self.unchanged(meta, stamp).await,
            Event::Data(data) => self.data(data, bytes).await,
            Event::FileEnd => self.end_file().await,
        }
    }

    /// Records a file that was not read, and lists it with the checksum that it had.
    async fn unchanged(&mut self, meta: FileMeta, stamp: FileStamp) -> Result<(), Failure> {
        self.progress.advance(meta.size);
        let (path, size, modified_unix) = (meta.path.clone(), meta.size, meta.mtime);
        let checksum = self.recording.unchanged(meta, stamp).await?;
        let (name, hex) = checksum.split_once(':').unwrap_or_default();
        let bytes = bytes_of_hex(hex).filter(|_| name == name_of(self.checksums));
        let bytes = bytes.ok_or_else(|| unexpected("a file's checksum in the list is not one"))?;
        let checksum = (manifest_name_of(self.checksums), &bytes[..]);
        self.manifest.file(&ManifestedFile { path: &path, size, modified_unix, checksum })
    }

    async fn data(&mut self, data: Data, bytes: &[u8]) -> Result<(), Failure> {
        let Data { at, chunks, suspects } = data;
        let bytes = &bytes[at];
        self.progress.advance(bytes.len() as u64);
        if let Some((meta, _)) = &self.file {
            for page in suspects {
                let file = String::from_utf8_lossy(&meta.path).into_owned();
                let suspect = (DamagedPage { file, block: page.block }, page.lsn);
                if page.lsn < self.start_lsn {
                    tracing::warn!(
                        "page {} of `{}` fails its checksum",
                        suspect.0.block,
                        suspect.0.file
                    );
                }
                if self.suspects.len() < SUSPECTS_MAX {
                    self.suspects.push(suspect);
                } else {
                    self.suspects_left_out += u64::from(page.lsn < self.start_lsn);
                }
            }
        }
        for (chunk, facts) in bytes.chunks(CHUNK_BYTES as usize).zip(chunks) {
            self.chunk(chunk, facts).await?;
        }
        Ok(())
    }

    async fn chunk(&mut self, bytes: &[u8], facts: ChunkFacts) -> Result<(), Failure> {
        if let (Some((_, sum)), Some(crc)) = (&mut self.file, facts.crc) {
            sum.take(bytes, crc);
        }
        self.recording.chunk(bytes, facts).await
    }

    async fn end_file(&mut self) -> Result<(), Failure> {
        let Some((meta, sum)) = self.file.take() else { return Ok(()) };
        let (algorithm, checksum) = (manifest_name_of(self.checksums), sum.finish());
        self.manifest.file(&ManifestedFile {
            path: &meta.path,
            size: meta.size,
            modified_unix: meta.mtime,
            checksum: (algorithm, &checksum),
        })?;
        let mut text = format!("{}:", name_of(self.checksums));
        for byte in checksum {
            text.push_str(&format!("{byte:02x}"));
        }
        self.recording.end_file(Some(text)).await
    }

    /// Records a file that is in memory.
    pub(super) async fn small(&mut self, meta: FileMeta, bytes: &[u8]) -> Result<(), Failure> {
        self.file = Some((meta.clone(), Sum::new(self.checksums)));
        self.recording.entry(meta).await?;
        for chunk in bytes.chunks(CHUNK_BYTES as usize) {
            self.chunk(chunk, facts_of(chunk)).await?;
        }
        self.end_file().await
    }

    /// Records what the server said at the end, and the manifest.
    pub(super) async fn finish(
        mut self,
        begin: Begin,
        started: &Started,
        ended: &Ended,
        ends: &Ends,
    ) -> Result<(FileRecorder, Received), Failure> {
        let said = [("backup_label", &ended.label), ("tablespace_map", &ended.tablespace_map)];
        for (name, content) in said {
            if !content.is_empty() {
                let meta = FileMeta {
                    path: name.as_bytes().to_vec(),
                    kind: EntryKind::File,
                    mode: SAID_MODE,
                    mtime: started.clock_unix,
                    size: content.len() as u64,
                };
                self.small(meta, content.as_bytes()).await?;
            }
        }
        let damaged = self.damaged_pages(ended.stop_lsn);
        let Self { mut recording, manifest, .. } = self;
        recording.files_were_read(started.read_from, damaged);
        recording.start(begin);
        recording.manifest();
        let mut rest: Vec<u8> = Vec::new();
        for part in manifest.finish(&ends.wal_ranges) {
            rest.extend(part?);
            let whole = rest.len() - rest.len() % CHUNK_BYTES as usize;
            for chunk in rest[..whole].chunks(CHUNK_BYTES as usize) {
                recording.chunk(chunk, manifest_facts(chunk)).await?;
            }
            rest.drain(..whole);
        }
        if !rest.is_empty() {
            recording.chunk(&rest, manifest_facts(&rest)).await?;
        }
        recording.end_file(None).await?;
        recording.stop(ended.stop_lsn, ends.stop_timeline);
        recording.finish()
    }

    fn damaged_pages(&mut self, stop_lsn: Lsn) -> DamagedPages {
        let mut damaged = DamagedPages::default();
        for (page, lsn) in std::mem::take(&mut self.suspects) {
            if is_damaged(lsn, self.start_lsn, stop_lsn) {
                damaged.push(page);
            }
        }
        damaged.count += self.suspects_left_out;
        damaged
    }
}

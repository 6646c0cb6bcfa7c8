//! Files and chunks, from wherever they come, become recorded files: the last stage of every source.
//!
//! A chunk that the parent holds at the same place is referenced, the others are stored. Memory:
//! one frame, and the parent's map of the current file.

use super::arriving::Begin;
use super::digests::Digested;
use super::{Making, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{
    ChunkDigest, ChunkEntry, ChunkMap, ChunkPart, DamagedPages, EntryKind, FileEntry, FileStamp,
    FrameRef, MAP_CHUNKS_MAX, PageDigests, PageMap, page_map_bytes,
};
use crate::ops::failures::of_repo;
use crate::pg::{BackupLabel, ControlFile, Lsn, PgTimestamp, Timeline};
use crate::plan::backup::{ChunkFate, changed_parts, chunk_fate, chunk_len, chunks_of};
use crate::repo::{FileMeta, FileRecorder, KnownMaps, ParentFiles, RepoError};

/// Files that are kept in memory besides being stored, because the backup's own record needs them.
const CAPTURED: [&str; 2] = ["backup_label", "global/pg_control"];

/// A captured file is never longer; `pg_control` has 8 KiB, a label little more than 1 KiB.
const CAPTURED_BYTES_MAX: u64 = 64 << 10;

/// The manifest's permissions, which the server does not send.
const MANIFEST_MODE: u32 = 0o600;

/// The manifest is stored beside the files it lists, as pg_basebackup leaves it.
const MANIFEST_NAME: &str = "backup_manifest";

/// Page maps of one chunk map, beyond which all of them are written anew as one, and their bytes in all.
const PAGE_MAPS_MAX: usize = 8;
const PAGE_MAPS_BYTES_MAX: usize = 2 * page_map_bytes(MAP_CHUNKS_MAX);

/// What is known of a chunk besides its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct ChunkFacts {
    pub(super) digest: ChunkDigest,
    /// Of a whole chunk.
    pub(super) pages: Option<PageDigests>,
    pub(super) is_zeros: bool,
    pub(super) crc: Option<u32>,
}

/// What came besides files.
pub(super) struct Received {
    pub(super) start_lsn: Lsn,
    pub(super) timeline: Timeline,
    pub(super) stop_lsn: Lsn,
    pub(super) stop_timeline: Timeline,
    /// OID and location.
    pub(super) tablespaces: Vec<(u32, String)>,
    pub(super) control: ControlFile,
    pub(super) group_access: bool,
    /// The server's clock when it wrote `backup_label`, seconds since 1970.
    pub(super) label_written_unix: i64,
    /// When the reading of files began, unless they were streamed.
    pub(super) read_from: Option<PgTimestamp>,
    /// Bytes of files that were not read, since nobody wrote to them after the backup before.
    pub(super) unread_bytes: u64,
    /// Pages that were damaged on the server's disk; a stream with such ends in an error instead.
    pub(super) damaged_pages: DamagedPages,
}

#[derive(Default)]
struct Captured {
    label: Option<(Vec<u8>, i64)>,
    /// With its permission bits.
    control: Option<(Vec<u8>, u32)>,
}

/// The file that is being recorded.
struct Current {
    path: Vec<u8>,
    size: u64,
    mtime: i64,
    mode: u32,
    received: u64,
    chunks: u64,
    parent: Option<FileEntry>,
    /// The parent's chunks of the gigabyte that is arriving, and which gigabyte that is.
    parent_map: ChunkMap,
    map_number: usize,
    /// What the parent knows of the pages of these chunks; read when the first of them has changed.
    parent_pages: Option<PageMap>,
    /// Whether the parent's page maps have become so many that all is written anew.
    renews_pages: bool,
    /// Whether the parent's maps have no checksums of chunks.
    parent_lacks_crcs: bool,
    /// Whether every chunk so far is the parent's.
    unchanged: bool,
    capture: Option<Vec<u8>>,
}

impl Current {
    /// Returns the map that the next chunk belongs to, and its place there.
    fn place_in_maps(&self) -> (usize, usize) {
        let chunk = usize::try_from(self.chunks).unwrap_or(usize::MAX);
        (chunk / MAP_CHUNKS_MAX, chunk % MAP_CHUNKS_MAX)
    }
}

/// Records one backup: entries in any order, each file's chunks between its entry and its end.
pub(super) struct Recording<'a> {
    making: &'a Making<'a>,
    recorder: FileRecorder,
    parent: Option<ParentFiles>,
    file: Option<Current>,
    in_manifest: bool,
    captured: Captured,
    begin: Option<Begin>,
    end: Option<(Lsn, Timeline)>,
    read_from: Option<PgTimestamp>,
    unread_bytes: u64,
    damaged_pages: DamagedPages,
}

impl<'a> Recording<'a> {
    pub(super) fn new(
        making: &'a Making<'a>,
        recorder: FileRecorder,
        parent: Option<ParentFiles>,
    ) -> Self {
        Self {
            making,
            recorder,
            parent,
            file: None,
            in_manifest: false,
            captured: Captured::default(),
            begin: None,
            end: None,
            read_from: None,
            unread_bytes: 0,
            damaged_pages: DamagedPages::default(),
        }
    }

    pub(super) async fn take(&mut self, next: Digested) -> Result<(), Failure> {
        match next {
            Digested::Start(begin) => self.start(begin),
            Digested::Entry(meta) => self.entry(meta).await?,
            Digested::Manifest => self.manifest(),
            Digested::Chunk { bytes, facts } => self.chunk(&bytes, facts).await?,
            Digested::FileEnd { checksum } => self.end_file(checksum).await?,
            Digested::End { stop_lsn, timeline } => self.stop(stop_lsn, timeline),
        }
        Ok(())
    }

    pub(super) fn start(&mut self, begin: Begin) {
        self.begin = Some(begin);
    }

    /// Records a directory, or begins a file.
    pub(super) async fn entry(&mut self, meta: FileMeta) -> Result<(), Failure> {
        if meta.kind == EntryKind::Directory {
            self.recorder.begin(meta);
            return self.recorder.end(None, None).await.map_err(|e| self.not_stored(e));
        }
        let parent = match &mut self.parent {
            Some(files) => files.entry(&meta.path).await.map_err(|e| not_read(self.making, e))?,
            None => None,
        };
        self.begin_file(meta, parent.filter(|entry| entry.kind == EntryKind::File));
        Ok(())
    }

    /// Begins the manifest, the last of all files.
    pub(super) fn manifest(&mut self) {
        self.in_manifest = true;
        self.begin_manifest();
    }

    pub(super) fn stop(&mut self, stop_lsn: Lsn, timeline: Timeline) {
        self.end = Some((stop_lsn, timeline));
    }

    /// Says what is known only of files that were read from the data directory: since when, and which
    /// pages were damaged.
    pub(super) fn files_were_read(&mut self, read_from: PgTimestamp, damaged: DamagedPages) {
        self.read_from = Some(read_from);
        self.damaged_pages = damaged;
    }

    /// Says what the current file looked like before it was read.
    pub(super) fn stamp(&mut self, stamp: FileStamp) {
        self.recorder.set_stamp(stamp);
    }

    /// Records a file that is as the parent has it, and returns its checksum.
    pub(super) async fn unchanged(
        &mut self,
        meta: FileMeta,
        stamp: FileStamp,
    ) -> Result<String, Failure> {
        let (making, size) = (self.making, meta.size);
        let Some(files) = &mut self.parent else { return Err(not_known(&meta)) };
        let entry = files.entry(&meta.path).await.map_err(|e| not_read(making, e))?;
        let Some(entry) = entry.filter(|e| e.size == size && e.stamp == Some(stamp)) else {
            return Err(not_known(&meta));
        };
        let Some(checksum) = entry.checksum.clone() else { return Err(not_known(&meta)) };
        self.recorder.begin(meta);
        self.recorder.set_stamp(stamp);
        let maps = KnownMaps::of(&entry);
        let mut number = 0;
        for map in 0..maps.as_ref().map_or(1, |known| known.maps.len()) {
            for chunk in files.chunks(&entry, map).await.map_err(|e| not_read(making, e))? {
                let len = chunk_len(size, number);
                if !chunk.is_whole(len) {
                    return Err(badly_listed(&entry.path));
                }
                number += 1;
                match &maps {
                    Some(_) => self.recorder.count_referenced(&chunk, u64::from(len)),
                    None => self
                        .recorder
                        .reference(chunk, u64::from(len))
                        .await
                        .map_err(|e| making.not_stored(e))?,
                }
            }
        }
        if number != chunks_of(size) {
            return Err(badly_listed(&entry.path));
        }
        let ended = self.recorder.end(Some(checksum.clone()), maps).await;
        ended.map_err(|e| making.not_stored(e))?;
        self.unread_bytes += size;
        Ok(checksum)
    }

    fn begin_file(&mut self, meta: FileMeta, parent: Option<FileEntry>) {
        let wanted = CAPTURED.iter().any(|name| name.as_bytes() == meta.path);
        self.file = Some(Current {
            unchanged: parent.as_ref().is_some_and(|entry| entry.size == meta.size),
            path: meta.path.clone(),
            size: meta.size,
            mtime: meta.mtime,
            mode: meta.mode,
            received: 0,
            chunks: 0,
            parent,
            parent_map: ChunkMap::default(),
            map_number: 0,
            parent_pages: None,
            renews_pages: false,
            parent_lacks_crcs: false,
            capture: (wanted && meta.size <= CAPTURED_BYTES_MAX).then(Vec::new),
        });
        self.recorder.begin(meta);
    }

    /// The manifest's length is not known before its end.
    fn begin_manifest(&mut self) {
        let meta = FileMeta {
            path: MANIFEST_NAME.as_bytes().to_vec(),
            kind: EntryKind::File,
            mode: MANIFEST_MODE,
            mtime: self.captured.label.as_ref().map_or(0, |(_, mtime)| *mtime),
            size: 0,
        };
        self.begin_file(meta, None);
    }

    /// Takes the current file's next chunk: whole but for the last.
    pub(super) async fn chunk(&mut self, bytes: &[u8], facts: ChunkFacts) -> Result<(), Failure> {
        self.load_parents_map().await?;
        let Some(file) = &mut self.file else { return Ok(()) };
        file.received += bytes.len() as u64;
        if let Some(capture) = &mut file.capture {
            capture.extend_from_slice(bytes);
        }
        let ChunkFacts { digest, pages, is_zeros, crc } = facts;
        let (_, in_map) = file.place_in_maps();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let parents = file.parent_map.chunks.get(in_map);
        // For a file that stays as it was, its zeros must have been zeros too.
        file.unchanged &= parents.is_some_and(|parent| parent.digest == digest);
        file.chunks += 1;
        let renews_pages = file.renews_pages;
        let (done, tells_pages) = match chunk_fate(digest, is_zeros, len, parents) {
            ChunkFate::Zeros => {
                let zeros = ChunkEntry { digest, runs: Vec::new() };
                (self.recorder.reference(zeros, 0).await, false)
            }
            ChunkFate::Referenced(entry) => {
                (self.recorder.reference(entry, u64::from(len)).await, renews_pages)
            }
            ChunkFate::Stored => {
                file.unchanged = false;
                let parents = parents.cloned();
                let done = match self.changed_parts(parents, pages).await? {
                    Some(parts) => self.recorder.store_parts(digest, bytes, parts).await,
                    None => self.recorder.store(digest, bytes).await,
                };
                (done, true)
            }
        };
        done.map_err(|e| self.not_stored(e))?;
        if let (true, Some(pages)) = (tells_pages, pages) {
            self.recorder.set_pages(digest, pages);
        }
        if let Some(crc) = crc {
            self.recorder.set_crc(crc);
        }
        Ok(())
    }

    /// Returns which parts of a chunk that differs from the parent's are to be stored, if not all of it.
    async fn changed_parts(
        &mut self,
        parents: Option<ChunkEntry>,
        new: Option<PageDigests>,
    ) -> Result<Option<Vec<ChunkPart>>, Failure> {
        let (Some(parents), Some(new)) = (parents, new) else { return Ok(None) };
        let old = self.parents_pages().await?.chunks.get(&parents.digest);
        Ok(old.and_then(|old| changed_parts(&parents, old, &new)))
    }

    /// Returns what the parent knows of the pages of the chunks that are arriving.
    async fn parents_pages(&mut self) -> Result<&PageMap, Failure> {
        let Some(file) = &mut self.file else { return Err(no_file()) };
        if file.parent_pages.is_none() {
            // The chunk at hand may be counted already, or not.
            let map = file.map_number;
            let read = match (&self.parent, &file.parent) {
                (Some(files), Some(entry)) => files.pages(entry, map).await,
                _ => Ok(PageMap::default()),
            };
            file.parent_pages = Some(match read {
                Ok(pages) => pages,
                Err(error @ RepoError::Damaged { .. }) => {
                    tracing::warn!("changed chunks are stored whole: {error}");
                    self.recorder.set_page_maps(&[]);
                    PageMap::default()
                }
                Err(error) => return Err(not_read(self.making, error)),
            });
        }
        file.parent_pages.as_ref().ok_or_else(no_file)
    }

    /// Adds the next `count` chunks of the current file as the parent has them; returns the CRC-32C
    /// and the length of each.
    pub(super) async fn keep(&mut self, count: u64) -> Result<Vec<(u32, u64)>, Failure> {
        let mut kept = Vec::new();
        for _ in 0..count {
            self.load_parents_map().await?;
            let Some(file) = &mut self.file else { return Ok(kept) };
            let (_, in_map) = file.place_in_maps();
            let len = chunk_len(file.size, file.chunks);
            let map = &file.parent_map;
            let (Some(chunk), Some(crc)) = (map.chunks.get(in_map), map.crcs.get(in_map)) else {
                return Err(badly_listed(&file.path));
            };
            if !chunk.is_whole(len) {
                return Err(badly_listed(&file.path));
            }
            let (chunk, crc, renews_pages) = (chunk.clone(), *crc, file.renews_pages);
            file.received += u64::from(len);
            file.chunks += 1;
            self.unread_bytes += u64::from(len);
            let known = if chunk.runs.is_empty() { 0 } else { u64::from(len) };
            let digest = chunk.digest;
            let done = self.recorder.reference(chunk, known).await;
            done.map_err(|e| self.making.not_stored(e))?;
            self.recorder.set_crc(crc);
            if renews_pages && let Some(pages) = self.parents_pages().await?.chunks.get(&digest) {
                let pages = *pages;
                self.recorder.set_pages(digest, pages);
            }
            kept.push((crc, u64::from(len)));
        }
        Ok(kept)
    }

    /// Loads the parent's chunks of the gigabyte that begins, if one does.
    async fn load_parents_map(&mut self) -> Result<(), Failure> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let (map, in_map) = file.place_in_maps();
        if in_map == 0
            && let (Some(files), Some(entry)) = (&self.parent, &file.parent)
        {
            let loaded = files.map(entry, map).await;
            file.parent_map = loaded.map_err(|e| not_read(self.making, e))?;
            file.parent_lacks_crcs |= file.parent_map.crcs.is_empty();
            file.map_number = map;
            file.parent_pages = None;
            let page_maps = entry.page_maps.get(map).map(Vec::as_slice).unwrap_or_default();
            file.renews_pages = are_too_many(page_maps);
            let named = if file.renews_pages { &[] } else { page_maps };
            let begun = self.recorder.begin_map(named).await;
            begun.map_err(|e| self.making.not_stored(e))?;
        }
        Ok(())
    }

    /// Ends the current file, with its checksum for the file list.
    pub(super) async fn end_file(&mut self, checksum: Option<String>) -> Result<(), Failure> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        if self.in_manifest {
            file.size = file.received;
            self.recorder.set_size(file.received);
        }
        if file.received != file.size {
            return Err(unexpected("a file is shorter than its header says"));
        }
        // The parent's maps serve as they are when not one chunk differs.
        let maps = file.parent.as_ref().filter(|_| {
            // Maps with checksums take the place of those without.
            file.unchanged && !(file.parent_lacks_crcs && self.making.reads_files())
        });
        let maps = maps.and_then(KnownMaps::of);
        if let Some(bytes) = file.capture {
            if file.path == b"backup_label" {
                self.captured.label = Some((bytes, file.mtime));
            } else {
                self.captured.control = Some((bytes, file.mode));
            }
        }
        self.recorder.end(checksum, maps).await.map_err(|e| self.not_stored(e))
    }

    fn not_stored(&self, error: RepoError) -> Failure {
        self.making.not_stored(error)
    }

    pub(super) fn finish(self) -> Result<(FileRecorder, Received), Failure> {
        let (Some(begin), Some((stop_lsn, stop_timeline))) = (self.begin, self.end) else {
            return Err(unexpected("the stream ended without its start and end positions"));
        };
        let label = self.captured.label.ok_or_else(|| unexpected("backup_label is missing"))?;
        let parsed = BackupLabel::parse(&label.0)
            .map_err(|error| unexpected(format!("backup_label cannot be understood: {error}")))?;
        if parsed.start_lsn != begin.start_lsn {
            return Err(unexpected("backup_label has another start than the server said"));
        }
        let (control, control_mode) =
            self.captured.control.ok_or_else(|| unexpected("pg_control is missing"))?;
        let control = ControlFile::parse(&control)
            .map_err(|error| unexpected(format!("pg_control cannot be understood: {error}")))?;
        if control.system_id != self.making.identity.system_identifier {
            return Err(unexpected("pg_control is another cluster's"));
        }
        let received = Received {
            start_lsn: begin.start_lsn,
            timeline: begin.timeline,
            stop_lsn,
            stop_timeline,
            tablespaces: begin.tablespaces,
            control,
            group_access: control_mode & 0o040 != 0,
            label_written_unix: label.1,
            read_from: self.read_from,
            unread_bytes: self.unread_bytes,
            damaged_pages: self.damaged_pages,
        };
        Ok((self.recorder, received))
    }
}

/// Returns whether the page maps of one chunk map are rather written anew as one.
fn are_too_many(page_maps: &[FrameRef]) -> bool {
    let bytes: usize = page_maps.iter().map(|frame| frame.plain as usize).sum();
    page_maps.len() >= PAGE_MAPS_MAX || bytes > PAGE_MAPS_BYTES_MAX
}

fn no_file() -> Failure {
    let next = "Take the backup again, and please report this.";
    Failure::new(Kind::Bug, "a chunk came without its file", UNHARMED, next)
}

fn not_read(making: &Making<'_>, error: RepoError) -> Failure {
    let what =
        format!("could not read the backup before this one in {}", making.repository.describe());
    of_repo(error, what, UNHARMED)
}

fn not_known(meta: &FileMeta) -> Failure {
    let path = String::from_utf8_lossy(&meta.path);
    Failure::new(
        Kind::Bug,
        format!("`{path}` was taken for unchanged and is not in the backup before"),
        UNHARMED,
        "Take the backup again with `--rehash`, and please report this.",
    )
}

fn badly_listed(path: &[u8]) -> Failure {
    let path = String::from_utf8_lossy(path);
    Failure::new(
        Kind::Integrity,
        format!("the backup before this one does not list all of `{path}`"),
        UNHARMED,
        "Take the backup again with `--rehash`, which reads every file, and keep the earlier one for inspection.",
    )
}

pub(super) fn unexpected(what: impl Into<String>) -> Failure {
    Failure::new(
        Kind::Postgres,
        what,
        UNHARMED,
        "Take the backup again. If it happens again, please report it with the server's version.",
    )
}

//! Recording a backup's files: chunks into frames, frames into maps, maps
//! into the file list.
//!
//! A frame's place is known only after it was compressed, so a finished file
//! waits until all of its frames have places; then its map is written (or goes
//! into its line), and the line waits for the map's place in turn. Both queues
//! have a bound, behind which frames are closed and waited for.

mod waiting;
mod writing;

use std::collections::{BTreeMap, VecDeque};

use super::backup_writer::Ticket;
use super::{BackupWriter, Leftovers, RepoError};
use crate::format::{
    BackupId, ChunkDigest, ChunkEntry, ChunkPart, EntryKind, FileStamp, FrameRef,
    INDEXED_BYTES_MIN, MAP_CHUNKS_MAX, PackUse, PageDigests, Piece, Reference, Run, digest_chunk,
    encode_page_map,
};
use crate::store::Key;
pub use waiting::KnownMaps;
use waiting::{Chunk, Map, MappedFile, NewRun, WaitingFile};

/// A frame of data is closed when it holds so many plain bytes: large enough to
/// compress well, small enough that one chunk can be fetched without much beside it.
const DATA_FRAME_BYTES: usize = 512 << 10;

/// Files and lines that wait for the places of their frames. A frame takes very many files of a few bytes, and one
/// changed file would hold up any number of unchanged ones behind it: then frames are closed before they are full.
const WAITING_MAX: usize = 4096;

/// What is known of a file or directory when it begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileMeta {
    /// The path below the data directory.
    pub path: Vec<u8>,
    /// File or directory.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Bytes.
    pub size: u64,
}

/// What was recorded, for `files` and `committed.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedFiles {
    /// The frames of the file list, in order.
    pub list_frames: Vec<FrameRef>,
    /// Lines, directories included.
    pub entries: u64,
    /// Files.
    pub files: u64,
    /// Bytes of all files.
    pub size_bytes: u64,
    /// Bytes of chunks, and of pages of chunks, that the parent had already.
    pub referenced_bytes: u64,
    /// Unfinished backups of which something was taken over, and its plain bytes.
    pub resumed: Vec<BackupId>,
    /// See `resumed`.
    pub resumed_bytes: u64,
    /// Every pack that is needed, by backup.
    pub references: Vec<Reference>,
}

/// Records the files of one backup, one after another.
#[derive(Debug)]
pub struct FileRecorder {
    writer: BackupWriter,
    next_ticket: Ticket,
    leftovers: Leftovers,
    data: Vec<u8>,
    /// What it consists of.
    data_pieces: Vec<Piece>,
    data_ticket: Ticket,
    current: Option<WaitingFile>,
    /// Files that wait for data frames, oldest first.
    waiting: VecDeque<WaitingFile>,
    /// Lines that wait for map frames.
    mapped: VecDeque<MappedFile>,
    list: Vec<u8>,
    list_tickets: Vec<Ticket>,
    list_frames: Vec<FrameRef>,
    uses: BTreeMap<BackupId, BTreeMap<u32, u64>>,
    entries: u64,
    files: u64,
    size_bytes: u64,
    referenced_bytes: u64,
}

impl FileRecorder {
    /// Begins recording into `writer`.
    pub fn new(writer: BackupWriter) -> Self {
        Self {
            writer,
            next_ticket: 1,
            leftovers: Leftovers::default(),
            data: Vec::with_capacity(DATA_FRAME_BYTES),
            data_pieces: Vec::new(),
            data_ticket: 0,
            current: None,
            waiting: VecDeque::new(),
            mapped: VecDeque::new(),
            list: Vec::new(),
            list_tickets: Vec::new(),
            list_frames: Vec::new(),
            uses: BTreeMap::new(),
            entries: 0,
            files: 0,
            size_bytes: 0,
            referenced_bytes: 0,
        }
    }

    /// Makes it look among what unfinished backups have stored before it stores anything.
    #[must_use]
    pub fn resuming(mut self, leftovers: Leftovers) -> Self {
        self.leftovers = leftovers;
        self
    }

    /// Returns the bytes stored so far.
    pub fn stored_bytes(&self) -> u64 {
        self.writer.stored_bytes()
    }

    /// Begins a file or directory; the one before must have ended.
    pub fn begin(&mut self, meta: FileMeta) {
        let oldest = self.data_ticket;
        self.current = Some(WaitingFile::new(meta, oldest));
    }

    /// Begins a map of the current file, whose next chunk is the first of a file or of a full map: names the page
    /// maps that tell the pages of those of its chunks that were not stored by this backup.
    pub async fn begin_map(&mut self, page_maps: &[FrameRef]) -> Result<(), RepoError> {
        self.close_full_map().await?;
        self.set_page_maps(page_maps);
        Ok(())
    }

    /// Names other page maps than [`Self::begin_map`] did.
    pub fn set_page_maps(&mut self, page_maps: &[FrameRef]) {
        if let Some(file) = &mut self.current {
            file.layers = page_maps.iter().cloned().map(Map::Known).collect();
        }
    }

    /// Adds the current file's next chunk, which must be stored.
    pub async fn store(&mut self, digest: ChunkDigest, bytes: &[u8]) -> Result<(), RepoError> {
        let all = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.store_parts(digest, bytes, vec![ChunkPart::New { in_chunk: 0, bytes: all }]).await
    }

    /// Adds the current file's next chunk, of which some parts must be stored. The parts cover it, in order; the
    /// digest is that of all its bytes.
    pub async fn store_parts(
        &mut self,
        digest: ChunkDigest,
        bytes: &[u8],
        parts: Vec<ChunkPart>,
    ) -> Result<(), RepoError> {
        self.close_full_map().await?;
        let new = parts.iter().map(|part| match part {
            ChunkPart::New { bytes, .. } => *bytes as usize,
            ChunkPart::Kept(_) => 0,
        });
        // All of them into one frame.
        if !self.data.is_empty() && self.data.len() + new.sum::<usize>() > DATA_FRAME_BYTES {
            self.close_data_frame().await?;
        }
        let mut runs = Vec::with_capacity(parts.len());
        for part in parts {
            runs.push(match part {
                ChunkPart::Kept(run) => {
                    self.referenced_bytes += u64::from(run.bytes);
                    NewRun::Known(run)
                }
                ChunkPart::New { in_chunk, bytes: len } => {
                    let (from, to) = (in_chunk as usize, (in_chunk + len) as usize);
                    let part = bytes.get(from..to).unwrap_or_default();
                    let digest =
                        if part.len() == bytes.len() { digest } else { digest_chunk(part) };
                    self.store_piece(digest, part, in_chunk).await?
                }
            });
        }
        self.add(Chunk::New { digest, runs });
        Ok(())
    }

    /// Stores bytes of the current file, unless an unfinished backup has them.
    async fn store_piece(
        &mut self,
        digest: ChunkDigest,
        bytes: &[u8],
        in_chunk: u32,
    ) -> Result<NewRun, RepoError> {
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let (repository, system_id) = (self.writer.repository(), self.writer.system_id());
        let is_indexed = len >= INDEXED_BYTES_MIN;
        if is_indexed
            && let Some(run) = self.leftovers.take(repository, system_id, digest, len).await?
        {
            return Ok(NewRun::Known(Run { in_chunk, ..run }));
        }
        let in_frame = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        self.data.extend_from_slice(bytes);
        if is_indexed {
            self.data_pieces.push(Piece { digest, in_frame, bytes: len });
        }
        Ok(NewRun::Stored { frame: self.data_ticket, in_frame, in_chunk, bytes: len })
    }

    /// Tells the pages of a chunk of the current file, where no page map that was named does.
    pub fn set_pages(&mut self, digest: ChunkDigest, pages: PageDigests) {
        if let Some(file) = &mut self.current {
            file.pages.push((digest, pages));
        }
    }

    /// Adds the current file's next chunk, which an earlier backup holds or which is
    /// all zeros. `bytes` is its length.
    pub async fn reference(&mut self, entry: ChunkEntry, bytes: u64) -> Result<(), RepoError> {
        self.close_full_map().await?;
        self.referenced_bytes += bytes;
        self.add(Chunk::Known(entry));
        Ok(())
    }

    /// Says the CRC-32C of the chunk that was added last; of each or of none.
    pub fn set_crc(&mut self, crc: u32) {
        if let Some(file) = &mut self.current {
            file.crcs.push(crc);
        }
    }

    /// Says the size of the current file, where it was not known when it began.
    pub fn set_size(&mut self, size: u64) {
        if let Some(file) = &mut self.current {
            file.meta.size = size;
        }
    }

    /// Says what the current file looked like before it was read.
    pub fn set_stamp(&mut self, stamp: FileStamp) {
        if let Some(file) = &mut self.current {
            file.stamp = Some(stamp);
        }
    }

    /// Counts a chunk of the current file that an earlier backup holds, where [`Self::end`] will name
    /// the maps that it stands in.
    pub fn count_referenced(&mut self, entry: &ChunkEntry, bytes: u64) {
        self.referenced_bytes += bytes;
        self.count_runs(entry);
    }

    fn add(&mut self, chunk: Chunk) {
        if let Some(file) = &mut self.current {
            file.chunks.push(chunk);
        }
    }

    /// Writes the map of the current file's chunks once it is full and another chunk follows, so that
    /// memory stays bounded. The last map waits for the file's end, when it is known whether the
    /// whole file is the parent's.
    async fn close_full_map(&mut self) -> Result<(), RepoError> {
        let is_full = |file: &WaitingFile| file.chunks.len() == MAP_CHUNKS_MAX;
        if !self.current.as_ref().is_some_and(is_full) {
            return Ok(());
        }
        self.close_data_frame().await?;
        self.writer.place_all().await?;
        if let Some(mut file) = self.current.take() {
            let map = self.take_map(&mut file)?;
            let ticket = self.push(map.encode()).await?;
            file.maps.push(Map::Pushed(ticket));
            self.close_page_map(&mut file).await?;
            file.oldest = self.data_ticket;
            self.current = Some(file);
        }
        Ok(())
    }

    /// Writes the page map that belongs to the chunks gathered so far, if there is anything to tell.
    async fn close_page_map(&mut self, file: &mut WaitingFile) -> Result<(), RepoError> {
        let mut layers = std::mem::take(&mut file.layers);
        let pages = std::mem::take(&mut file.pages);
        if !pages.is_empty() {
            layers.push(Map::Pushed(self.push(encode_page_map(&pages)).await?));
        }
        file.page_maps.push(layers);
        Ok(())
    }

    /// Ends the current file. `unchanged` names the maps of the parent's file, if every one
    /// of the chunks is the parent's; they are then named instead of written again.
    pub async fn end(
        &mut self,
        checksum: Option<String>,
        unchanged: Option<KnownMaps>,
    ) -> Result<(), RepoError> {
        let Some(mut file) = self.current.take() else { return Ok(()) };
        file.checksum = checksum;
        if let Some(KnownMaps { maps, page_maps }) = unchanged {
            // The chunks' packs are counted as used all the same.
            for chunk in std::mem::take(&mut file.chunks) {
                if let Chunk::Known(entry) = chunk {
                    self.count_runs(&entry);
                }
            }
            file.maps = maps.into_iter().map(Map::Known).collect();
            let known = |maps: Vec<FrameRef>| maps.into_iter().map(Map::Known).collect();
            file.page_maps = page_maps.into_iter().map(known).collect();
            (file.pages, file.layers) = (Vec::new(), Vec::new());
        }
        self.entries += 1;
        if file.meta.kind == EntryKind::File {
            self.files += 1;
            self.size_bytes += file.meta.size;
        }
        self.waiting.push_back(file);
        self.advance().await?;
        if self.waiting.len() + self.mapped.len() >= WAITING_MAX {
            self.settle().await
        } else {
            Ok(())
        }
    }

    /// Waits until every file that has ended is a line.
    async fn settle(&mut self) -> Result<(), RepoError> {
        self.close_data_frame().await?;
        self.writer.place_all().await?;
        self.advance().await?;
        // Their maps were pushed just now.
        self.writer.place_all().await?;
        self.advance().await
    }

    /// Ends the list: everything recorded is durable in packs when this returns.
    pub async fn finish(mut self) -> Result<(BackupWriter, RecordedFiles), RepoError> {
        self.settle().await?;
        self.close_list_frame().await?;
        self.writer.close_packs().await?;
        self.collect_list_frames();
        let key = Key::new(self.writer.repository().place().files(self.writer.id()));
        if !(self.waiting.is_empty() && self.mapped.is_empty() && self.list_tickets.is_empty()) {
            return Err(RepoError::task(format!("`{key}`: frames were left without a place")));
        }
        for frame in self.list_frames.clone() {
            self.count(&frame, frame.plain);
        }
        let references = self
            .uses
            .iter()
            .map(|(backup, packs)| Reference {
                backup: backup.clone(),
                packs: packs
                    .iter()
                    .map(|(pack, live_bytes)| PackUse { pack: *pack, live_bytes: *live_bytes })
                    .collect(),
            })
            .collect();
        let recorded = RecordedFiles {
            list_frames: self.list_frames,
            entries: self.entries,
            files: self.files,
            size_bytes: self.size_bytes,
            referenced_bytes: self.referenced_bytes,
            resumed: self.leftovers.ids_taken(),
            resumed_bytes: self.leftovers.taken_bytes(),
            references,
        };
        Ok((self.writer, recorded))
    }

    fn ticket(&mut self) -> Ticket {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        ticket
    }

    async fn push(&mut self, plain: Vec<u8>) -> Result<Ticket, RepoError> {
        let ticket = self.ticket();
        self.writer.push_frame(ticket, plain, Vec::new()).await?;
        Ok(ticket)
    }

    async fn close_data_frame(&mut self) -> Result<(), RepoError> {
        if self.data.is_empty() {
            return Ok(());
        }
        let plain = std::mem::replace(&mut self.data, Vec::with_capacity(DATA_FRAME_BYTES));
        let ticket = self.data_ticket;
        self.data_ticket = self.ticket();
        let pieces = std::mem::take(&mut self.data_pieces);
        self.writer.push_frame(ticket, plain, pieces).await
    }
}

//! Recording a backup's files: chunks into frames, frames into maps, maps
//! into the file list.
//!
//! A frame's place is known only after it was compressed, so a finished file
//! waits until all of its frames have places; then its map is written (or goes
//! into its line), and the line waits for the map's place in turn. Both queues
//! have a bound, behind which frames are closed and waited for.

use std::collections::{BTreeMap, VecDeque};

use super::backup_writer::Ticket;
use super::{BackupWriter, RepoError};
use crate::format::{
    BackupId, ChunkDigest, ChunkEntry, ChunkMap, EntryKind, FileContent, FileEntry, FileStamp,
    FrameRef, INLINE_CHUNKS_MAX, LIST_FRAME_BYTES, MAP_CHUNKS_MAX, PackUse, Reference, Run,
    write_line,
};
use crate::store::Key;

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
    /// Bytes of chunks that the parent had already.
    pub referenced_bytes: u64,
    /// Every pack that is needed, by backup.
    pub references: Vec<Reference>,
}

#[derive(Debug)]
enum Chunk {
    /// Zeros, or a chunk that an earlier backup holds.
    Known(ChunkEntry),
    /// Stored by this backup.
    New { digest: ChunkDigest, frame: Ticket, in_frame: u32, bytes: u32 },
}

#[derive(Debug)]
struct WaitingFile {
    meta: FileMeta,
    checksum: Option<String>,
    stamp: Option<FileStamp>,
    chunks: Vec<Chunk>,
    /// CRC-32C of each of them, or of none.
    crcs: Vec<u32>,
    /// Map frames that are pushed already, of the file's earlier chunks.
    maps: Vec<Map>,
    /// The first frame that it needs.
    oldest: Ticket,
}

#[derive(Debug)]
enum Map {
    Pushed(Ticket),
    Known(FrameRef),
}

/// Records the files of one backup, one after another.
#[derive(Debug)]
pub struct FileRecorder {
    writer: BackupWriter,
    next_ticket: Ticket,
    data: Vec<u8>,
    data_ticket: Ticket,
    current: Option<WaitingFile>,
    /// Files that wait for data frames, oldest first.
    waiting: VecDeque<WaitingFile>,
    /// Lines that wait for map frames.
    mapped: VecDeque<(FileEntry, Vec<Map>)>,
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
            data: Vec::with_capacity(DATA_FRAME_BYTES),
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

    /// Returns the bytes stored so far.
    pub fn stored_bytes(&self) -> u64 {
        self.writer.stored_bytes()
    }

    /// Begins a file or directory; the one before must have ended.
    pub fn begin(&mut self, meta: FileMeta) {
        let oldest = self.data_ticket;
        self.current = Some(WaitingFile {
            meta,
            checksum: None,
            stamp: None,
            chunks: Vec::new(),
            crcs: Vec::new(),
            maps: Vec::new(),
            oldest,
        });
    }

    /// Adds the current file's next chunk, which must be stored.
    pub async fn store(&mut self, digest: ChunkDigest, bytes: &[u8]) -> Result<(), RepoError> {
        self.close_full_map().await?;
        if !self.data.is_empty() && self.data.len() + bytes.len() > DATA_FRAME_BYTES {
            self.close_data_frame().await?;
        }
        let in_frame = u32::try_from(self.data.len()).unwrap_or(u32::MAX);
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        self.data.extend_from_slice(bytes);
        let frame = self.data_ticket;
        self.add(Chunk::New { digest, frame, in_frame, bytes: len });
        Ok(())
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
            file.oldest = self.data_ticket;
            self.current = Some(file);
        }
        Ok(())
    }

    /// Ends the current file. `unchanged` names the maps of the parent's file, if every one
    /// of the chunks is the parent's; they are then named instead of written again.
    pub async fn end(
        &mut self,
        checksum: Option<String>,
        unchanged: Option<Vec<FrameRef>>,
    ) -> Result<(), RepoError> {
        let Some(mut file) = self.current.take() else { return Ok(()) };
        file.checksum = checksum;
        if let Some(maps) = unchanged {
            // The chunks' packs are counted as used all the same.
            for chunk in std::mem::take(&mut file.chunks) {
                if let Chunk::Known(entry) = chunk {
                    self.count_runs(&entry);
                }
            }
            file.maps = maps.into_iter().map(Map::Known).collect();
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
        self.writer.push_frame(ticket, plain).await?;
        Ok(ticket)
    }

    async fn close_data_frame(&mut self) -> Result<(), RepoError> {
        if self.data.is_empty() {
            return Ok(());
        }
        let plain = std::mem::replace(&mut self.data, Vec::with_capacity(DATA_FRAME_BYTES));
        let ticket = self.data_ticket;
        self.data_ticket = self.ticket();
        self.writer.push_frame(ticket, plain).await
    }

    /// Moves on every file and line whose frames have places by now.
    async fn advance(&mut self) -> Result<(), RepoError> {
        // Thousands of small files wait for one frame: what follows is only worth it when one moved.
        let mut moved = false;
        while let Some(file) = self.waiting.front() {
            let ready = file.chunks.iter().all(|chunk| match chunk {
                Chunk::New { frame, .. } => self.writer.place_of(*frame).is_some(),
                Chunk::Known(_) => true,
            });
            if !ready {
                break;
            }
            if let Some(file) = self.waiting.pop_front() {
                moved = true;
                self.write_out(file).await?;
            }
        }
        while let Some((_, maps)) = self.mapped.front() {
            let places: Option<Vec<FrameRef>> = maps
                .iter()
                .map(|map| match map {
                    Map::Pushed(ticket) => self.writer.place_of(*ticket).cloned(),
                    Map::Known(place) => Some(place.clone()),
                })
                .collect();
            let Some(places) = places else { break };
            if let Some((mut entry, _)) = self.mapped.pop_front() {
                moved = true;
                for place in &places {
                    self.count(place, place.plain);
                }
                if !places.is_empty() {
                    entry.content = FileContent::Maps(places);
                }
                self.write_entry(&entry).await?;
            }
        }
        if moved {
            self.collect_list_frames();
            self.forget_places();
        }
        Ok(())
    }

    /// Turns a file whose frames are placed into a line, by way of a map if it is large.
    async fn write_out(&mut self, mut file: WaitingFile) -> Result<(), RepoError> {
        let inline = file.maps.is_empty() && file.chunks.len() <= INLINE_CHUNKS_MAX;
        let map = self.take_map(&mut file)?;
        let mut maps = std::mem::take(&mut file.maps);
        let mut content = FileContent::Inline(Vec::new());
        if inline {
            content = FileContent::Inline(map.chunks);
        } else if !map.chunks.is_empty() {
            maps.push(Map::Pushed(self.push(map.encode()).await?));
        }
        let FileMeta { path, kind, mode, mtime, size } = file.meta;
        let (checksum, stamp) = (file.checksum, file.stamp);
        let entry = FileEntry { path, kind, mode, mtime, size, checksum, stamp, content };
        self.mapped.push_back((entry, maps));
        Ok(())
    }

    /// Takes the chunks gathered so far as a map; all their frames have places.
    fn take_map(&mut self, file: &mut WaitingFile) -> Result<ChunkMap, RepoError> {
        let mut chunks = Vec::with_capacity(file.chunks.len());
        for chunk in std::mem::take(&mut file.chunks) {
            let entry = match chunk {
                Chunk::Known(entry) => entry,
                Chunk::New { digest, frame, in_frame, bytes } => {
                    let place = self.writer.place_of(frame).cloned();
                    let frame = place.ok_or_else(|| RepoError::task("a frame has no place"))?;
                    ChunkEntry { digest, runs: vec![Run { frame, in_frame, in_chunk: 0, bytes }] }
                }
            };
            self.count_runs(&entry);
            chunks.push(entry);
        }
        Ok(ChunkMap { chunks, crcs: std::mem::take(&mut file.crcs) })
    }

    async fn write_entry(&mut self, entry: &FileEntry) -> Result<(), RepoError> {
        let key = Key::new(self.writer.repository().place().files(self.writer.id()));
        write_line(entry, &mut self.list).map_err(|error| RepoError::of_list(&key, &error))?;
        if self.list.len() >= LIST_FRAME_BYTES {
            self.close_list_frame().await?;
        }
        Ok(())
    }

    async fn close_list_frame(&mut self) -> Result<(), RepoError> {
        if !self.list.is_empty() {
            let plain = std::mem::take(&mut self.list);
            let ticket = self.push(plain).await?;
            self.list_tickets.push(ticket);
        }
        Ok(())
    }

    fn collect_list_frames(&mut self) {
        let placed = self.list_tickets.iter().map_while(|t| self.writer.place_of(*t).cloned());
        let placed: Vec<FrameRef> = placed.collect();
        self.list_tickets.drain(..placed.len());
        self.list_frames.extend(placed);
    }

    /// Lets go of places that nothing waits for any more.
    fn forget_places(&mut self) {
        let maps = self.mapped.iter().flat_map(|(_, maps)| maps);
        let open_maps = self.current.iter().chain(&self.waiting).flat_map(|file| &file.maps);
        let tickets = maps.chain(open_maps).filter_map(|map| match map {
            Map::Pushed(ticket) => Some(*ticket),
            Map::Known(_) => None,
        });
        let files = self.current.iter().chain(&self.waiting).map(|file| file.oldest);
        let lists = self.list_tickets.iter().copied();
        let oldest = tickets.chain(files).chain(lists).min().unwrap_or(self.data_ticket);
        self.writer.forget_places_before(oldest.min(self.data_ticket));
    }

    fn count_runs(&mut self, entry: &ChunkEntry) {
        for run in &entry.runs {
            self.count(&run.frame, run.bytes);
        }
    }

    /// Counts `plain` bytes of a frame as needed, as the share of its stored bytes.
    fn count(&mut self, frame: &FrameRef, plain: u32) {
        let share = u64::from(frame.stored) * u64::from(plain);
        let live = share.div_ceil(u64::from(frame.plain.max(1)));
        let packs = self.uses.entry(frame.backup.clone()).or_default();
        *packs.entry(frame.pack).or_default() += live;
    }
}

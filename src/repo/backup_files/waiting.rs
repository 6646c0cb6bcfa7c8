//! Files on their way into the list: what of them has no place yet.

use super::FileMeta;
use crate::format::{
    ChunkDigest, ChunkEntry, FileContent, FileEntry, FileStamp, FrameRef, PageDigests, Run,
};
use crate::repo::backup_writer::Ticket;

/// A chunk of a file that waits.
#[derive(Debug)]
pub(super) enum Chunk {
    /// Zeros, or a chunk that an earlier backup holds.
    Known(ChunkEntry),
    /// Stored by this backup, or a part of it.
    New { digest: ChunkDigest, runs: Vec<NewRun> },
}

/// A run of a chunk, perhaps in a frame whose place is not known yet.
#[derive(Debug)]
pub(super) enum NewRun {
    Known(Run),
    Stored { frame: Ticket, in_frame: u32, in_chunk: u32, bytes: u32 },
}

/// The maps of a file that a later backup names because they hold for it too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownMaps {
    /// Its chunk maps.
    pub maps: Vec<FrameRef>,
    /// For each of them, the page maps.
    pub page_maps: Vec<Vec<FrameRef>>,
}

impl KnownMaps {
    /// Returns the maps of an entry; `None` if its chunks stand in its line.
    pub fn of(entry: &FileEntry) -> Option<Self> {
        match &entry.content {
            FileContent::Maps(maps) => {
                Some(Self { maps: maps.clone(), page_maps: entry.page_maps.clone() })
            }
            FileContent::Inline(_) => None,
        }
    }
}

/// A file that is being recorded, or waits for the places of its data.
#[derive(Debug)]
pub(super) struct WaitingFile {
    pub(super) meta: FileMeta,
    pub(super) checksum: Option<String>,
    pub(super) stamp: Option<FileStamp>,
    pub(super) chunks: Vec<Chunk>,
    /// CRC-32C of each of them, or of none.
    pub(super) crcs: Vec<u32>,
    /// Pages of chunks that no page map tells yet, of the map that is filling.
    pub(super) pages: Vec<(ChunkDigest, PageDigests)>,
    /// Page maps that tell those of the others.
    pub(super) layers: Vec<Map>,
    /// Map frames that are pushed already, of the file's earlier chunks, and their page maps.
    pub(super) maps: Vec<Map>,
    pub(super) page_maps: Vec<Vec<Map>>,
    /// The first frame that it needs.
    pub(super) oldest: Ticket,
}

impl WaitingFile {
    pub(super) fn new(meta: FileMeta, oldest: Ticket) -> Self {
        Self {
            meta,
            checksum: None,
            stamp: None,
            chunks: Vec::new(),
            crcs: Vec::new(),
            pages: Vec::new(),
            layers: Vec::new(),
            maps: Vec::new(),
            page_maps: Vec::new(),
            oldest,
        }
    }
}

/// A frame that holds a map.
#[derive(Debug)]
pub(super) enum Map {
    Pushed(Ticket),
    Known(FrameRef),
}

/// A line that waits for the places of its maps.
#[derive(Debug)]
pub(super) struct MappedFile {
    pub(super) entry: FileEntry,
    pub(super) maps: Vec<Map>,
    pub(super) page_maps: Vec<Vec<Map>>,
}

impl MappedFile {
    pub(super) fn all_maps(&self) -> impl Iterator<Item = &Map> {
        self.maps.iter().chain(self.page_maps.iter().flatten())
    }
}

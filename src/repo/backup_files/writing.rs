//! Lines and maps that waited for their frames are written out, in the order in which they were recorded.
//!
//! Never here: what is recorded (`super`).

use super::waiting::{Chunk, Map, MappedFile, NewRun, WaitingFile};
use super::{FileMeta, FileRecorder};
use crate::format::{
    ChunkEntry, ChunkMap, FileContent, FileEntry, FrameRef, INLINE_CHUNKS_MAX, LIST_FRAME_BYTES,
    Run, write_line,
};
use crate::repo::RepoError;
use crate::store::Key;

impl FileRecorder {
    /// Moves on every file and line whose frames have places by now.
    pub(super) async fn advance(&mut self) -> Result<(), RepoError> {
        // Thousands of small files wait for one frame: what follows is only worth it when one moved.
        let mut moved = false;
        while let Some(file) = self.waiting.front() {
            let is_placed = |run: &NewRun| match run {
                NewRun::Stored { frame, .. } => self.writer.place_of(*frame).is_some(),
                NewRun::Known(_) => true,
            };
            let is_ready = |chunk: &Chunk| match chunk {
                Chunk::New { runs, .. } => runs.iter().all(is_placed),
                Chunk::Known(_) => true,
            };
            if !file.chunks.iter().all(is_ready) {
                break;
            }
            if let Some(file) = self.waiting.pop_front() {
                moved = true;
                self.write_out(file).await?;
            }
        }
        while let Some(file) = self.mapped.front() {
            let is_placed = |map: &Map| self.place_of_map(map).is_some();
            if !file.all_maps().all(is_placed) {
                break;
            }
            if let Some(file) = self.mapped.pop_front() {
                moved = true;
                self.write_mapped(file).await?;
            }
        }
        if moved {
            self.collect_list_frames();
            self.forget_places();
        }
        Ok(())
    }

    fn place_of_map(&self, map: &Map) -> Option<FrameRef> {
        match map {
            Map::Pushed(ticket) => self.writer.place_of(*ticket).cloned(),
            Map::Known(place) => Some(place.clone()),
        }
    }

    /// Writes the line of a file whose maps are placed.
    async fn write_mapped(&mut self, file: MappedFile) -> Result<(), RepoError> {
        for place in file.all_maps().filter_map(|map| self.place_of_map(map)).collect::<Vec<_>>() {
            self.count(&place, place.plain);
        }
        let places = |maps: &Vec<Map>| -> Vec<FrameRef> {
            maps.iter().filter_map(|map| self.place_of_map(map)).collect()
        };
        let mut entry = file.entry;
        if !file.maps.is_empty() {
            entry.content = FileContent::Maps(places(&file.maps));
            entry.page_maps = file.page_maps.iter().map(places).collect();
        }
        self.write_entry(&entry).await
    }

    /// Turns a file whose frames are placed into a line, by way of a map if it is large.
    async fn write_out(&mut self, mut file: WaitingFile) -> Result<(), RepoError> {
        let inline = file.maps.is_empty() && file.chunks.len() <= INLINE_CHUNKS_MAX;
        let map = self.take_map(&mut file)?;
        let mut content = FileContent::Inline(Vec::new());
        if inline {
            content = FileContent::Inline(map.chunks);
        } else if !map.chunks.is_empty() {
            let ticket = self.push(map.encode()).await?;
            file.maps.push(Map::Pushed(ticket));
            self.close_page_map(&mut file).await?;
        }
        let (maps, page_maps) = (file.maps, file.page_maps);
        let FileMeta { path, kind, mode, mtime, size } = file.meta;
        let (checksum, stamp) = (file.checksum, file.stamp);
        let none = Vec::new();
        let entry =
            FileEntry { path, kind, mode, mtime, size, checksum, stamp, content, page_maps: none };
        self.mapped.push_back(MappedFile { entry, maps, page_maps });
        Ok(())
    }

    /// Takes the chunks gathered so far as a map; all their frames have places.
    pub(super) fn take_map(&mut self, file: &mut WaitingFile) -> Result<ChunkMap, RepoError> {
        let mut chunks = Vec::with_capacity(file.chunks.len());
        for chunk in std::mem::take(&mut file.chunks) {
            let entry = match chunk {
                Chunk::Known(entry) => entry,
                Chunk::New { digest, runs } => {
                    let runs = runs.into_iter().map(|run| self.placed_run(run));
                    ChunkEntry { digest, runs: runs.collect::<Result<_, _>>()? }
                }
            };
            self.count_runs(&entry);
            chunks.push(entry);
        }
        Ok(ChunkMap { chunks, crcs: std::mem::take(&mut file.crcs) })
    }

    fn placed_run(&self, run: NewRun) -> Result<Run, RepoError> {
        match run {
            NewRun::Known(run) => Ok(run),
            NewRun::Stored { frame, in_frame, in_chunk, bytes } => {
                let place = self.writer.place_of(frame).cloned();
                let frame = place.ok_or_else(|| RepoError::task("a frame has no place"))?;
                Ok(Run { frame, in_frame, in_chunk, bytes })
            }
        }
    }

    async fn write_entry(&mut self, entry: &FileEntry) -> Result<(), RepoError> {
        let key = Key::new(self.writer.repository().place().files(self.writer.id()));
        write_line(entry, &mut self.list).map_err(|error| RepoError::of_list(&key, &error))?;
        if self.list.len() >= LIST_FRAME_BYTES {
            self.close_list_frame().await?;
        }
        Ok(())
    }

    pub(super) async fn close_list_frame(&mut self) -> Result<(), RepoError> {
        if !self.list.is_empty() {
            let plain = std::mem::take(&mut self.list);
            let ticket = self.push(plain).await?;
            self.list_tickets.push(ticket);
        }
        Ok(())
    }

    pub(super) fn collect_list_frames(&mut self) {
        let placed = self.list_tickets.iter().map_while(|t| self.writer.place_of(*t).cloned());
        let placed: Vec<FrameRef> = placed.collect();
        self.list_tickets.drain(..placed.len());
        self.list_frames.extend(placed);
    }

    /// Lets go of places that nothing waits for any more.
    fn forget_places(&mut self) {
        let maps = self.mapped.iter().flat_map(MappedFile::all_maps);
        let open_maps = self
            .current
            .iter()
            .chain(&self.waiting)
            .flat_map(|file| file.maps.iter().chain(file.page_maps.iter().flatten()));
        let tickets = maps.chain(open_maps).filter_map(|map| match map {
            Map::Pushed(ticket) => Some(*ticket),
            Map::Known(_) => None,
        });
        let files = self.current.iter().chain(&self.waiting).map(|file| file.oldest);
        let lists = self.list_tickets.iter().copied();
        let oldest = tickets.chain(files).chain(lists).min().unwrap_or(self.data_ticket);
        self.writer.forget_places_before(oldest.min(self.data_ticket));
    }

    pub(super) fn count_runs(&mut self, entry: &ChunkEntry) {
        for run in &entry.runs {
            self.count(&run.frame, run.bytes);
        }
    }

    /// Counts `plain` bytes of a frame as needed, as the share of its stored bytes.
    pub(super) fn count(&mut self, frame: &FrameRef, plain: u32) {
        let share = u64::from(frame.stored) * u64::from(plain);
        let live = share.div_ceil(u64::from(frame.plain.max(1)));
        let packs = self.uses.entry(frame.backup.clone()).or_default();
        *packs.entry(frame.pack).or_default() += live;
    }
}

//! What the server sends, as entries and chunks: the first of the three stages.
//!
//! Runs on a task of its own, so that the server never waits for a digest or a store. Memory:
//! one chunk, and what [`ARRIVED_MAX`] allows.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::not_received;
use super::recording::unexpected;
use crate::failure::Failure;
use crate::format::{CHUNK_BYTES, EntryKind};
use crate::ops::progress::Progress;
use crate::pg::{Lsn, Timeline};
use crate::pgdata::{TarEnd, TarEntry, TarError, TarEvent, TarKind, TarSplitter};
use crate::repo::FileMeta;
use crate::walsender::{BackupEvent, BaseBackup};

/// What may wait between two stages, chunks of 64 KiB among it.
pub(super) const ARRIVED_MAX: usize = 32;

/// What arrived, in the order of the stream.
pub(super) enum Arrived {
    Start(Begin),
    /// A file or directory of the cluster.
    Entry(FileMeta),
    /// The manifest, whose length nobody knows yet.
    Manifest,
    /// The next chunk of the file: whole but for the last.
    Chunk(Vec<u8>),
    /// The file (not: directory) is complete.
    FileEnd,
    End {
        stop_lsn: Lsn,
        timeline: Timeline,
    },
}

/// What the server says first.
pub(super) struct Begin {
    pub(super) start_lsn: Lsn,
    pub(super) timeline: Timeline,
    /// OID and location.
    pub(super) tablespaces: Vec<(u32, String)>,
}

/// Splits the stream and hands on what arrives.
pub(super) struct Arriving {
    next_stage: mpsc::Sender<Arrived>,
    progress: Arc<dyn Progress>,
    tar: Option<TarSplitter>,
    /// Whether this server ends an archive with zero blocks: without them it was cut.
    tar_end_marked: bool,
    /// `pg_tblspc/<oid>/` within a tablespace's archive.
    prefix: String,
    /// The chunk that is filling, while a file arrives.
    chunk: Option<Vec<u8>>,
    in_manifest: bool,
}

impl Arriving {
    pub(super) fn new(
        next_stage: mpsc::Sender<Arrived>,
        progress: Arc<dyn Progress>,
        tar_end_marked: bool,
    ) -> Self {
        let (tar, prefix, chunk) = (None, String::new(), None);
        Self { next_stage, progress, tar, tar_end_marked, prefix, chunk, in_manifest: false }
    }

    /// Takes the whole stream. Ends early, without an error, when nobody listens any more.
    pub(super) async fn run(mut self, mut stream: BaseBackup) -> Result<(), Failure> {
        while let Some(event) = stream.next().await.map_err(not_received)? {
            match self.take(event).await {
                Ok(()) => {}
                Err(Ended::Failed(failure)) => return Err(failure),
                Err(Ended::Unheard) => return Ok(()),
            }
        }
        Ok(())
    }

    async fn take(&mut self, event: BackupEvent) -> Result<(), Ended> {
        match event {
            BackupEvent::Start { start_lsn, timeline, tablespaces, data_directory_kb } => {
                let sizes = tablespaces.iter().map(|tablespace| tablespace.size_kb);
                let kb: u64 = sizes.chain([data_directory_kb]).flatten().sum();
                self.progress.note("receiving files");
                self.progress.total((kb > 0).then_some(kb * 1024));
                let tablespaces = tablespaces.into_iter().map(|t| (t.oid, t.location)).collect();
                self.hand_on(Arrived::Start(Begin { start_lsn, timeline, tablespaces })).await?;
            }
            BackupEvent::ArchiveBegin { tablespace } => {
                self.end_archive()?;
                let oid = tablespace.map(|tablespace| tablespace.oid);
                self.prefix = oid.map_or_else(String::new, |oid| format!("pg_tblspc/{oid}/"));
                self.tar = Some(TarSplitter::new());
            }
            BackupEvent::Data(data) if self.in_manifest => self.file_data(&data).await?,
            BackupEvent::Data(data) => self.archive_data(data).await?,
            BackupEvent::ManifestBegin => {
                self.end_archive()?;
                self.in_manifest = true;
                self.hand_on(Arrived::Manifest).await?;
                self.chunk = Some(new_chunk());
            }
            BackupEvent::Progress { .. } => {}
            BackupEvent::End { stop_lsn, timeline } => {
                self.end_archive()?;
                if !self.in_manifest {
                    return Err(unexpected("the server sent no manifest").into());
                }
                self.end_entry().await?;
                self.hand_on(Arrived::End { stop_lsn, timeline }).await?;
            }
        }
        Ok(())
    }

    fn end_archive(&mut self) -> Result<(), Failure> {
        let Some(tar) = self.tar.take() else { return Ok(()) };
        match tar.finish().map_err(|error| broken_tar(&error))? {
            TarEnd::Unmarked if self.tar_end_marked => {
                Err(unexpected("an archive from the server ended without its end mark"))
            }
            TarEnd::Marked | TarEnd::Unmarked => Ok(()),
        }
    }

    async fn archive_data(&mut self, mut data: Bytes) -> Result<(), Ended> {
        self.progress.advance(data.len() as u64);
        let Some(mut tar) = self.tar.take() else {
            return Err(unexpected("the server sent data before the first archive").into());
        };
        while let Some(event) = tar.next_event(&mut data).map_err(|e| broken_tar(&e))? {
            match event {
                TarEvent::Entry(entry) => self.begin_entry(entry).await?,
                TarEvent::Data(bytes) => self.file_data(&bytes).await?,
                TarEvent::EntryEnd => self.end_entry().await?,
            }
        }
        self.tar = Some(tar);
        Ok(())
    }

    async fn begin_entry(&mut self, entry: TarEntry) -> Result<(), Ended> {
        let mut path = self.prefix.clone().into_bytes();
        path.extend_from_slice(entry.path.as_os_str().as_bytes());
        let (mode, mtime) = (entry.mode, entry.mtime_unix);
        let meta = match entry.kind {
            TarKind::Directory => {
                FileMeta { path, kind: EntryKind::Directory, mode, mtime, size: 0 }
            }
            // Links to tablespaces: `restore` makes them anew, from the list of tablespaces.
            TarKind::Symlink(_) if path.starts_with(b"pg_tblspc/") => return Ok(()),
            TarKind::Symlink(_) => {
                let path = entry.path.display();
                let what = format!("the server sent a symbolic link `{path}` outside pg_tblspc");
                return Err(unexpected(what).into());
            }
            TarKind::File => {
                self.chunk = Some(new_chunk());
                FileMeta { path, kind: EntryKind::File, mode, mtime, size: entry.size_bytes }
            }
        };
        self.hand_on(Arrived::Entry(meta)).await
    }

    async fn file_data(&mut self, mut data: &[u8]) -> Result<(), Ended> {
        while !data.is_empty() {
            let Some(chunk) = &mut self.chunk else { return Ok(()) };
            let room = CHUNK_BYTES as usize - chunk.len();
            let (now, later) = data.split_at(data.len().min(room));
            chunk.extend_from_slice(now);
            data = later;
            if chunk.len() == CHUNK_BYTES as usize {
                let full = std::mem::replace(chunk, new_chunk());
                self.hand_on(Arrived::Chunk(full)).await?;
            }
        }
        Ok(())
    }

    async fn end_entry(&mut self) -> Result<(), Ended> {
        let Some(rest) = self.chunk.take() else { return Ok(()) };
        if !rest.is_empty() {
            self.hand_on(Arrived::Chunk(rest)).await?;
        }
        self.hand_on(Arrived::FileEnd).await
    }

    async fn hand_on(&self, arrived: Arrived) -> Result<(), Ended> {
        self.next_stage.send(arrived).await.map_err(|_| Ended::Unheard)
    }
}

enum Ended {
    Failed(Failure),
    /// Nobody takes what arrives any more; whoever stopped has the reason.
    Unheard,
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

fn new_chunk() -> Vec<u8> {
    Vec::with_capacity(CHUNK_BYTES as usize)
}

fn broken_tar(error: &TarError) -> Failure {
    unexpected(format!("the server's archive cannot be read: {error}"))
}

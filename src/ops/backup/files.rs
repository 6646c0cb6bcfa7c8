//! From the server's stream to recorded files.
//!
//! Each file is cut into chunks as it arrives; a chunk that the parent holds at
//! the same place is referenced. Memory: one chunk, one frame, and the parent's
//! map of the current file.

use bytes::Bytes;

use super::manifest::ManifestCheck;
use super::server::Server;
use super::{Making, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{
    CHUNK_BYTES, ChunkEntry, EntryKind, FileContent, FileEntry, MAP_CHUNKS_MAX, digest_chunk,
};
use crate::ops::failures::{of_postgres, of_repo};
use crate::pg::{BackupLabel, ControlFile, Lsn, Timeline};
use crate::pgdata::{TarEnd, TarEntry, TarError, TarEvent, TarKind, TarSplitter};
use crate::plan::backup::{ChunkFate, chunk_fate};
use crate::repo::{FileMeta, FileRecorder, ParentFiles, RepoError};
use crate::walsender::{BackupEvent, BackupOptions, BaseBackup, PgError};

/// Files that are kept in memory besides being stored, because the backup's own record needs them.
const CAPTURED: [&str; 2] = ["backup_label", "global/pg_control"];

/// A captured file is never longer; `pg_control` has 8 KiB, a label little more than 1 KiB.
const CAPTURED_BYTES_MAX: u64 = 64 << 10;

/// The manifest's permissions, which the server does not send.
const MANIFEST_MODE: u32 = 0o600;

/// The manifest is stored beside the files it lists, as pg_basebackup leaves it.
const MANIFEST_NAME: &str = "backup_manifest";

/// From this major version on, an archive ends with its zero blocks; before, the server left them out
/// (`src/backend/backup/basebackup.c`, `sendTablespace` and its callers).
const TAR_END_MARKED_FROM: u32 = 15;

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
}

/// Receives the whole backup. Everything has been compared with the manifest when it returns.
pub(super) async fn receive(
    making: &Making<'_>,
    server: Server,
    recorder: FileRecorder,
    parent: Option<ParentFiles>,
) -> Result<(FileRecorder, Received), Failure> {
    let request = making.request;
    let options = BackupOptions {
        label: request.label.clone(),
        fast_checkpoint: request.fast_checkpoint,
        max_rate_kb: request.max_rate_kb,
        manifest_checksums: request.manifest_checksums,
        progress: true,
        ..BackupOptions::default()
    };
    making.progress.note("waiting for the server's checkpoint");
    let tar_end_marked = server.facts.version.major().0 >= TAR_END_MARKED_FROM;
    let mut stream = BaseBackup::start(server.connection, &options).await.map_err(not_received)?;
    let mut receiver = Receiver {
        making,
        recorder,
        parent,
        manifest: ManifestCheck::new(request.manifest_checksums),
        tar: None,
        tar_end_marked,
        prefix: String::new(),
        file: None,
        in_manifest: false,
        captured: Captured::default(),
        begin: None,
        end: None,
    };
    while let Some(event) = stream.next().await.map_err(not_received)? {
        receiver.take(event).await?;
    }
    receiver.finish()
}

fn not_received(error: PgError) -> Failure {
    of_postgres(error, "the server did not give a whole base backup", UNHARMED)
}

#[derive(Default)]
struct Captured {
    label: Option<(Vec<u8>, i64)>,
    /// With its permission bits.
    control: Option<(Vec<u8>, u32)>,
}

/// A file that is arriving.
struct Arriving {
    path: Vec<u8>,
    size: u64,
    mode: u32,
    mtime: i64,
    received: u64,
    chunk: Vec<u8>,
    chunks: u64,
    parent: Option<FileEntry>,
    /// The parent's chunks of the gigabyte that is arriving.
    parent_chunks: Vec<ChunkEntry>,
    /// Whether every chunk so far is the parent's.
    unchanged: bool,
    capture: Option<Vec<u8>>,
}

struct Begin {
    start_lsn: Lsn,
    timeline: Timeline,
    tablespaces: Vec<(u32, String)>,
}

struct Receiver<'a> {
    making: &'a Making<'a>,
    recorder: FileRecorder,
    parent: Option<ParentFiles>,
    manifest: ManifestCheck,
    tar: Option<TarSplitter>,
    /// Whether this server ends an archive with zero blocks: without them it was cut.
    tar_end_marked: bool,
    /// `pg_tblspc/<oid>/` within a tablespace's archive.
    prefix: String,
    file: Option<Arriving>,
    in_manifest: bool,
    captured: Captured,
    begin: Option<Begin>,
    end: Option<(Lsn, Timeline)>,
}

impl Receiver<'_> {
    async fn take(&mut self, event: BackupEvent) -> Result<(), Failure> {
        match event {
            BackupEvent::Start { start_lsn, timeline, tablespaces, data_directory_kb } => {
                let sizes = tablespaces.iter().map(|tablespace| tablespace.size_kb);
                let kb: u64 = sizes.chain([data_directory_kb]).flatten().sum();
                self.making.progress.note("receiving files");
                self.making.progress.total((kb > 0).then_some(kb * 1024));
                let tablespaces = tablespaces.into_iter().map(|t| (t.oid, t.location)).collect();
                self.begin = Some(Begin { start_lsn, timeline, tablespaces });
            }
            BackupEvent::ArchiveBegin { tablespace } => {
                self.end_archive()?;
                let oid = tablespace.map(|tablespace| tablespace.oid);
                self.prefix = oid.map_or_else(String::new, |oid| format!("pg_tblspc/{oid}/"));
                self.tar = Some(TarSplitter::new());
            }
            BackupEvent::Data(data) if self.in_manifest => {
                self.manifest.feed(&data)?;
                self.file_data(&data).await?;
            }
            BackupEvent::Data(data) => self.archive_data(data).await?,
            BackupEvent::ManifestBegin => {
                self.end_archive()?;
                self.in_manifest = true;
                self.begin_manifest();
            }
            BackupEvent::Progress { .. } => {}
            BackupEvent::End { stop_lsn, timeline } => {
                self.end_archive()?;
                self.end_manifest().await?;
                self.end = Some((stop_lsn, timeline));
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

    async fn archive_data(&mut self, mut data: Bytes) -> Result<(), Failure> {
        self.making.progress.advance(data.len() as u64);
        let Some(mut tar) = self.tar.take() else {
            return Err(unexpected("the server sent data before the first archive"));
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

    async fn begin_entry(&mut self, entry: TarEntry) -> Result<(), Failure> {
        use std::os::unix::ffi::OsStrExt;
        let mut path = self.prefix.clone().into_bytes();
        path.extend_from_slice(entry.path.as_os_str().as_bytes());
        let (mode, mtime) = (entry.mode, entry.mtime_unix);
        match entry.kind {
            TarKind::Directory => {
                let kind = EntryKind::Directory;
                self.recorder.begin(FileMeta { path, kind, mode, mtime, size: 0 });
                self.recorder.end(None, None).await.map_err(|e| self.not_stored(e))
            }
            // Links to tablespaces: `restore` makes them anew, from the list of tablespaces.
            TarKind::Symlink(_) if path.starts_with(b"pg_tblspc/") => Ok(()),
            TarKind::Symlink(_) => Err(unexpected(format!(
                "the server sent a symbolic link `{}` outside pg_tblspc",
                entry.path.display()
            ))),
            TarKind::File => self.begin_file(path, entry.size_bytes, mode, mtime).await,
        }
    }

    async fn begin_file(
        &mut self,
        path: Vec<u8>,
        size: u64,
        mode: u32,
        mtime: i64,
    ) -> Result<(), Failure> {
        let parent = match &mut self.parent {
            Some(files) => files.entry(&path).await.map_err(|e| not_read(self.making, e))?,
            None => None,
        };
        let parent = parent.filter(|entry| entry.kind == EntryKind::File);
        let wanted = CAPTURED.iter().any(|name| name.as_bytes() == path);
        let kind = EntryKind::File;
        self.recorder.begin(FileMeta { path: path.clone(), kind, mode, mtime, size });
        self.manifest.begin_file();
        self.file = Some(Arriving {
            unchanged: parent.as_ref().is_some_and(|entry| entry.size == size),
            path,
            size,
            mode,
            mtime,
            received: 0,
            chunk: Vec::with_capacity(CHUNK_BYTES as usize),
            chunks: 0,
            parent,
            parent_chunks: Vec::new(),
            capture: (wanted && size <= CAPTURED_BYTES_MAX).then(Vec::new),
        });
        Ok(())
    }

    async fn file_data(&mut self, mut data: &[u8]) -> Result<(), Failure> {
        if !self.in_manifest {
            self.manifest.file_data(data);
        }
        let Some(mut file) = self.file.take() else { return Ok(()) };
        file.received += data.len() as u64;
        if let Some(capture) = &mut file.capture {
            capture.extend_from_slice(data);
        }
        while !data.is_empty() {
            let room = CHUNK_BYTES as usize - file.chunk.len();
            let (now, later) = data.split_at(data.len().min(room));
            file.chunk.extend_from_slice(now);
            data = later;
            if file.chunk.len() == CHUNK_BYTES as usize {
                self.end_chunk(&mut file).await?;
            }
        }
        self.file = Some(file);
        Ok(())
    }

    async fn end_chunk(&mut self, file: &mut Arriving) -> Result<(), Failure> {
        let in_map = usize::try_from(file.chunks).unwrap_or(usize::MAX) % MAP_CHUNKS_MAX;
        if in_map == 0
            && let (Some(files), Some(entry)) = (&self.parent, &file.parent)
        {
            let map = usize::try_from(file.chunks).unwrap_or(usize::MAX) / MAP_CHUNKS_MAX;
            let chunks = files.chunks(entry, map).await;
            file.parent_chunks = chunks.map_err(|e| not_read(self.making, e))?;
        }
        let bytes = file.chunk.as_slice();
        let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let digest = digest_chunk(bytes);
        let is_zeros = bytes.iter().all(|byte| *byte == 0);
        let parents = file.parent_chunks.get(in_map);
        // For a file that stays as it was, its zeros must have been zeros too.
        file.unchanged &= parents.is_some_and(|parent| parent.digest == digest);
        let done = match chunk_fate(digest, is_zeros, len, parents) {
            ChunkFate::Zeros => {
                self.recorder.reference(ChunkEntry { digest, runs: Vec::new() }, 0).await
            }
            ChunkFate::Referenced(entry) => self.recorder.reference(entry, u64::from(len)).await,
            ChunkFate::Stored => {
                file.unchanged = false;
                self.recorder.store(digest, bytes).await
            }
        };
        done.map_err(|e| self.not_stored(e))?;
        file.chunks += 1;
        file.chunk.clear();
        Ok(())
    }

    async fn end_entry(&mut self) -> Result<(), Failure> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        if !file.chunk.is_empty() {
            self.end_chunk(&mut file).await?;
        }
        if file.received != file.size {
            return Err(unexpected("a file is shorter than its header says"));
        }
        let checksum = (!self.in_manifest).then(|| self.manifest.end_file(&file.path, file.size));
        // The parent's maps serve as they are when not one chunk differs.
        let maps = match &file.parent {
            Some(FileEntry { content: FileContent::Maps(maps), .. }) if file.unchanged => {
                Some(maps.clone())
            }
            _ => None,
        };
        if let Some(bytes) = file.capture {
            if file.path == b"backup_label" {
                self.captured.label = Some((bytes, file.mtime));
            } else {
                self.captured.control = Some((bytes, file.mode));
            }
        }
        self.recorder.end(checksum, maps).await.map_err(|e| self.not_stored(e))
    }

    /// The manifest's length is not known before its end.
    fn begin_manifest(&mut self) {
        self.file = Some(Arriving {
            path: MANIFEST_NAME.as_bytes().to_vec(),
            size: 0,
            mode: MANIFEST_MODE,
            mtime: self.captured.label.as_ref().map_or(0, |(_, mtime)| *mtime),
            received: 0,
            chunk: Vec::with_capacity(CHUNK_BYTES as usize),
            chunks: 0,
            parent: None,
            parent_chunks: Vec::new(),
            unchanged: false,
            capture: None,
        });
        self.recorder.begin(FileMeta {
            path: MANIFEST_NAME.as_bytes().to_vec(),
            kind: EntryKind::File,
            mode: MANIFEST_MODE,
            mtime: self.captured.label.as_ref().map_or(0, |(_, mtime)| *mtime),
            size: 0,
        });
    }

    async fn end_manifest(&mut self) -> Result<(), Failure> {
        let Some(file) = &mut self.file else {
            return Err(unexpected("the server sent no manifest"));
        };
        file.size = file.received;
        self.recorder.set_size(file.received);
        self.end_entry().await
    }

    fn not_stored(&self, error: RepoError) -> Failure {
        self.making.not_stored(error)
    }

    fn finish(self) -> Result<(FileRecorder, Received), Failure> {
        self.manifest.finish()?;
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
        };
        Ok((self.recorder, received))
    }
}

fn not_read(making: &Making<'_>, error: RepoError) -> Failure {
    let what =
        format!("could not read the backup before this one in {}", making.repository.describe());
    of_repo(error, what, UNHARMED)
}

fn broken_tar(error: &TarError) -> Failure {
    unexpected(format!("the server's archive cannot be read: {error}"))
}

pub(super) fn unexpected(what: impl Into<String>) -> Failure {
    Failure::new(
        Kind::Postgres,
        what,
        UNHARMED,
        "Take the backup again. If it happens again, please report it with the server's version.",
    )
}

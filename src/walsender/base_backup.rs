//! A base backup as one stream of events, the same from PostgreSQL 14 and 15+.
//!
//! ```text
//! 14    T D C  T D* C  | H d* c | H d* c | ... | H d* c   |  T D C  C Z
//! 15+   T D C  T D* C  | H dn dd* dp dn dd* ... dm dd* c  |  T D C  C Z
//!       start  archives| tablespaces, data dir.  manifest |  end
//! ```
//!
//! In 14 the archives come in the order of the second result set, each in a
//! COPY of its own, raw and without tar's two closing zero blocks; from 15 on
//! one COPY carries frames with a type byte: `n` new archive, `d` data, `p`
//! progress, `m` manifest. Here both give complete archives, closing blocks
//! included.
//!
//! [`BackupEvent::End`] comes only after CommandComplete *and* ReadyForQuery,
//! because the server reports bad page checksums as an error after everything
//! was sent, the end position included.
//!
//! Source: manual, "Streaming Replication Protocol", BASE_BACKUP;
//! `src/backend/backup/basebackup.c` and `basebackup_copy.c`.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{Buf, Bytes};

use crate::pg::{Lsn, Timeline};

use super::connection::Connection;
use super::error::PgError;
use super::quote::quote_literal;
use super::replication::read_timeline;
use super::rows::{RawRows, Rows};
use super::wire::Frame;

/// The longest label that the server takes, in bytes (`MAXPGPATH`).
const LABEL_BYTES_MAX: usize = 1024;

/// What MAX_RATE may be, in kB/s (`MAX_RATE_LOWER` and `_UPPER`).
const MAX_RATE_KB: std::ops::RangeInclusive<u32> = 32..=1_048_576;

/// The first version with the parenthesised syntax and the typed stream.
const TYPED_STREAM_VERSION: u32 = 150_000;

/// The two zero blocks that close a tar archive.
static TAR_TRAILER: [u8; 1024] = [0; 1024];

/// The checksums that the server writes into the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ManifestChecksums {
    /// Fast; guards against accidents.
    Crc32c,
    /// Slower; guards against a forger too.
    Sha256,
}

/// How to take the backup. Always with TABLESPACE_MAP and a manifest, without
/// WAL, compression by the server, or waiting for the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupOptions {
    /// At most 1024 bytes without line breaks: one would damage `backup_label`.
    pub label: String,
    /// Begin with an immediate checkpoint rather than a spread one, which may
    /// take minutes.
    pub fast_checkpoint: bool,
    /// Limit in kB/s, 32 to 1048576.
    pub max_rate_kb: Option<u32>,
    /// The checksums in the manifest.
    pub manifest_checksums: ManifestChecksums,
    /// Have the server estimate sizes first, which reads every directory.
    pub progress: bool,
    /// Have the server verify page checksums, where the cluster has them.
    pub verify_checksums: bool,
    /// The longest silence until the checkpoint is done and the sizes are known.
    pub checkpoint_limit: Duration,
    /// The longest silence after that.
    pub silence_limit: Duration,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            label: "highwater".to_owned(),
            fast_checkpoint: false,
            max_rate_kb: None,
            manifest_checksums: ManifestChecksums::Crc32c,
            progress: false,
            verify_checksums: true,
            checkpoint_limit: Duration::from_hours(1),
            silence_limit: Duration::from_mins(10),
        }
    }
}

/// A tablespace other than the two inside the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// The name of its link in `pg_tblspc`.
    pub oid: u32,
    /// The directory; relative if it lies in the data directory.
    pub location: String,
    /// The server's estimate in KiB; only with [`BackupOptions::progress`].
    pub size_kb: Option<u64>,
}

/// What happened in the backup, in this order: `Start`; for each archive
/// `ArchiveBegin` and its `Data`; `ManifestBegin` and its `Data`; `End`.
/// `Progress` may come between any two after `Start`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// The checkpoint is done.
    Start {
        /// Where WAL is needed from (included): the checkpoint's redo position.
        start_lsn: Lsn,
        /// The timeline at the start.
        timeline: Timeline,
        /// All tablespaces, each of which will have an archive.
        tablespaces: Vec<Tablespace>,
        /// The estimate for the data directory in KiB; only with `progress`.
        data_directory_kb: Option<u64>,
    },
    /// The bytes that follow are a tar archive.
    ArchiveBegin {
        /// Whose; `None` is the data directory. Each comes exactly once.
        tablespace: Option<Tablespace>,
    },
    /// The next bytes of the archive or manifest; never empty. A slice of the
    /// read buffer: keeping it long keeps the whole buffer.
    Data(Bytes),
    /// The bytes that follow are the backup manifest.
    ManifestBegin,
    /// The server counted so far.
    Progress {
        /// Bytes of all archives so far.
        bytes_done: u64,
    },
    /// The server says that all went well.
    End {
        /// Where WAL is needed up to (excluded).
        stop_lsn: Lsn,
        /// The timeline at the end.
        timeline: Timeline,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Nothing,
    Archive,
    Manifest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// 15+: inside the one typed COPY.
    Typed(Part),
    /// 14: before or inside COPY number `number` (from 0).
    Separate {
        number: usize,
        open: bool,
    },
    /// All COPYs are done.
    Closing,
    Ended,
    Failed,
}

/// One archive that was announced.
#[derive(Debug)]
struct Archive {
    tablespace: Option<Tablespace>,
    begun: bool,
}

/// A backup being taken; it has the connection for itself.
#[derive(Debug)]
pub struct BaseBackup {
    connection: Connection,
    archives: Vec<Archive>,
    stage: Stage,
    bytes_done: u64,
    /// Events that wait their turn; at most two.
    pending: VecDeque<BackupEvent>,
}

impl BaseBackup {
    /// Asks for the backup and waits for its checkpoint. Needs a connection in
    /// [`Mode::Replication`](super::Mode::Replication), and PostgreSQL 14 or later.
    ///
    /// Errors: `Request` for a label or rate that the server would refuse, and
    /// any [`PgError`]. After an error there is no backup.
    pub async fn start(
        mut connection: Connection,
        options: &BackupOptions,
    ) -> Result<Self, PgError> {
        let typed = connection.server_version_num() >= TYPED_STREAM_VERSION;
        let command = command(options, typed)?;
        connection.set_silence_limit(Some(options.checkpoint_limit));
        connection.send_query(&command).await?;
        connection.set_activity("waiting for the backup's checkpoint");
        let position = connection.next_row_set().await?;
        let (start_lsn, timeline) = read_position(&mut connection, position)?;
        let rows = connection.next_row_set().await?;
        let (archives, data_directory_kb) = read_archives(&mut connection, rows)?;
        connection.set_silence_limit(Some(options.silence_limit));
        connection.set_activity("waiting for data of the backup");
        let stage = if typed {
            let frame = connection.next_frame().await?;
            if frame.tag != b'H' {
                return Err(connection.unexpected(&frame, "where the backup's data begins"));
            }
            Stage::Typed(Part::Nothing)
        } else {
            Stage::Separate { number: 0, open: false }
        };
        let tablespaces = archives.iter().filter_map(|archive| archive.tablespace.clone());
        let start = BackupEvent::Start {
            start_lsn,
            timeline,
            tablespaces: tablespaces.collect(),
            data_directory_kb,
        };
        Ok(Self { connection, archives, stage, bytes_done: 0, pending: VecDeque::from([start]) })
    }

    /// Returns the next event; `None` after [`BackupEvent::End`].
    ///
    /// A call that is dropped unfinished gives the backup up. Errors: any
    /// [`PgError`]; whatever came before, there is no backup then. Calls after
    /// an error fail again.
    pub async fn next(&mut self) -> Result<Option<BackupEvent>, PgError> {
        if let Some(event) = self.pending.pop_front() {
            return Ok(Some(event));
        }
        let outcome = self.advance().await;
        if outcome.is_err() {
            self.stage = Stage::Failed;
        }
        outcome
    }

    /// Gives the connection back; after [`BackupEvent::End`] it can be used again.
    pub fn into_connection(self) -> Connection {
        self.connection
    }

    async fn advance(&mut self) -> Result<Option<BackupEvent>, PgError> {
        loop {
            match self.stage {
                Stage::Ended => return Ok(None),
                Stage::Closing => return self.close().await.map(Some),
                Stage::Failed => {
                    return Err(PgError::Closed {
                        place: self.connection.place().to_owned(),
                        reason: "the backup has failed before".to_owned(),
                    });
                }
                Stage::Typed(_) | Stage::Separate { .. } => {}
            }
            let frame = self.connection.next_frame().await?;
            let event = match self.stage {
                Stage::Separate { number, open } => self.take_separate(frame, number, open)?,
                Stage::Typed(part) => self.take_typed(frame, part)?,
                Stage::Closing | Stage::Ended | Stage::Failed => None,
            };
            if event.is_some() {
                return Ok(event);
            }
        }
    }

    /// Takes a message of the typed stream (15+).
    fn take_typed(&mut self, frame: Frame, part: Part) -> Result<Option<BackupEvent>, PgError> {
        match frame.tag {
            b'c' if part == Part::Manifest => {
                self.stage = Stage::Closing;
                return Ok(None);
            }
            b'd' => {}
            _ => return Err(self.connection.unexpected(&frame, "in the backup's data")),
        }
        let mut body = frame.body;
        let Some(kind) = body.try_get_u8().ok() else {
            return Err(self.connection.broken("a message of the backup has no kind"));
        };
        match kind {
            b'd' if part != Part::Nothing => Ok(self.data(body, part)),
            b'n' if part != Part::Manifest => {
                let tablespace = self.begin_named(&body)?;
                self.stage = Stage::Typed(Part::Archive);
                Ok(Some(BackupEvent::ArchiveBegin { tablespace }))
            }
            b'm' if part != Part::Manifest && self.archives.iter().all(|archive| archive.begun) => {
                self.stage = Stage::Typed(Part::Manifest);
                Ok(Some(BackupEvent::ManifestBegin))
            }
            b'p' => {
                let bytes_done = body.try_get_i64().ok().and_then(|done| u64::try_from(done).ok());
                match bytes_done {
                    Some(bytes_done) => Ok(Some(BackupEvent::Progress { bytes_done })),
                    None => Err(self.connection.broken("a progress message is malformed")),
                }
            }
            _ => {
                let kind = kind.escape_ascii();
                let reason = format!("a backup message of kind {kind} is unknown or out of turn");
                Err(self.connection.broken(reason))
            }
        }
    }

    /// Finds the archive that `base.tar` or `<oid>.tar` names, the first time it is named.
    fn begin_named(&mut self, body: &Bytes) -> Result<Option<Tablespace>, PgError> {
        let name = body.split(|byte| *byte == 0).next().unwrap_or_default();
        let archive = self.archives.iter_mut().find(|archive| {
            let expected = match &archive.tablespace {
                Some(tablespace) => format!("{}.tar", tablespace.oid),
                None => "base.tar".to_owned(),
            };
            !archive.begun && name == expected.as_bytes()
        });
        let Some(archive) = archive else {
            let name = name.escape_ascii();
            let reason = format!("the backup has an archive `{name}` twice or unannounced");
            return Err(self.connection.broken(reason));
        };
        archive.begun = true;
        Ok(archive.tablespace.clone())
    }

    /// Takes a message of the separate COPYs (14).
    fn take_separate(
        &mut self,
        frame: Frame,
        number: usize,
        open: bool,
    ) -> Result<Option<BackupEvent>, PgError> {
        let part = if number < self.archives.len() { Part::Archive } else { Part::Manifest };
        match (frame.tag, open) {
            (b'H', false) => {
                self.stage = Stage::Separate { number, open: true };
                Ok(Some(match self.archives.get_mut(number) {
                    Some(archive) => {
                        archive.begun = true;
                        BackupEvent::ArchiveBegin { tablespace: archive.tablespace.clone() }
                    }
                    None => BackupEvent::ManifestBegin,
                }))
            }
            (b'd', true) => Ok(self.data(frame.body, part)),
            (b'c', true) if part == Part::Manifest => {
                self.stage = Stage::Closing;
                Ok(None)
            }
            (b'c', true) => {
                self.stage = Stage::Separate { number: number + 1, open: false };
                let trailer = self.data(Bytes::from_static(&TAR_TRAILER), part);
                let bytes_done = self.bytes_done;
                self.pending.push_back(BackupEvent::Progress { bytes_done });
                Ok(trailer)
            }
            _ => Err(self.connection.unexpected(&frame, "in the backup's data")),
        }
    }

    fn data(&mut self, bytes: Bytes, part: Part) -> Option<BackupEvent> {
        if part == Part::Archive {
            self.bytes_done += bytes.len() as u64;
        }
        (!bytes.is_empty()).then_some(BackupEvent::Data(bytes))
    }

    /// Reads the end position, and then what the server thinks of it all.
    async fn close(&mut self) -> Result<BackupEvent, PgError> {
        let position = self.connection.next_row_set().await?;
        let (stop_lsn, timeline) = read_position(&mut self.connection, position)?;
        for tag in [b'C', b'Z'] {
            let frame = self.connection.next_frame().await?;
            if frame.tag != tag {
                return Err(self.connection.unexpected(&frame, "after the end of the backup"));
            }
        }
        self.stage = Stage::Ended;
        Ok(BackupEvent::End { stop_lsn, timeline })
    }
}

/// Puts the command together, in the grammar of 15+ or of 14.
fn command(options: &BackupOptions, typed: bool) -> Result<String, PgError> {
    let label = &options.label;
    if label.len() > LABEL_BYTES_MAX || label.contains(['\n', '\r', '\0']) {
        return Err(PgError::Request("a backup label has at most 1024 bytes and no line break"));
    }
    if options.max_rate_kb.is_some_and(|rate| !MAX_RATE_KB.contains(&rate)) {
        return Err(PgError::Request("a backup's rate limit is from 32 to 1048576 kB/s"));
    }
    let label = quote_literal(label);
    let checksums = match options.manifest_checksums {
        ManifestChecksums::Crc32c => "'CRC32C'",
        ManifestChecksums::Sha256 => "'SHA256'",
    };
    let rate = options.max_rate_kb.map(|rate| format!("MAX_RATE {rate}"));
    let mut words = vec![format!("LABEL {label}")];
    if typed {
        let checkpoint = if options.fast_checkpoint { "fast" } else { "spread" };
        words.push(format!("PROGRESS {}", options.progress));
        words.push(format!("CHECKPOINT '{checkpoint}'"));
        words.push("WAIT false".to_owned());
        words.extend(rate);
        words.push("TABLESPACE_MAP true".to_owned());
        words.push(format!("VERIFY_CHECKSUMS {}", options.verify_checksums));
        words.push("MANIFEST 'yes'".to_owned());
        words.push(format!("MANIFEST_CHECKSUMS {checksums}"));
        return Ok(format!("BASE_BACKUP ({})", words.join(", ")));
    }
    let word = |wanted: bool, word: &str| wanted.then(|| word.to_owned());
    words.extend(word(options.progress, "PROGRESS"));
    words.extend(word(options.fast_checkpoint, "FAST"));
    words.push("NOWAIT".to_owned());
    words.extend(rate);
    words.push("TABLESPACE_MAP".to_owned());
    words.extend(word(!options.verify_checksums, "NOVERIFY_CHECKSUMS"));
    words.push(format!("MANIFEST 'yes' MANIFEST_CHECKSUMS {checksums}"));
    Ok(format!("BASE_BACKUP {}", words.join(" ")))
}

/// Reads the result set `recptr, tli`.
fn read_position(connection: &mut Connection, rows: RawRows) -> Result<(Lsn, Timeline), PgError> {
    let rows = connection.checked(rows.into_text())?;
    let position = rows
        .get(0, "recptr")
        .and_then(|text| text.parse().ok())
        .zip(rows.get(0, "tli").and_then(read_timeline));
    connection.checked(position.ok_or("the backup's position makes no sense"))
}

/// Reads the result set `spcoid, spclocation, size`; in one row, the data
/// directory's, the first two are null.
fn read_archives(
    connection: &mut Connection,
    rows: RawRows,
) -> Result<(Vec<Archive>, Option<u64>), PgError> {
    let rows = connection.checked(rows.into_text())?;
    let archives = (0..rows.rows.len()).map(|row| read_archive(&rows, row)).collect();
    let archives: Option<Vec<Archive>> = archives;
    let archives = archives.filter(|archives| {
        archives.iter().filter(|archive| archive.tablespace.is_none()).count() == 1
    });
    let archives = connection.checked(archives.ok_or("the list of tablespaces makes no sense"))?;
    let own = archives.iter().position(|archive| archive.tablespace.is_none());
    let data_directory_kb =
        own.and_then(|row| rows.get(row, "size")).and_then(|size| size.parse().ok());
    Ok((archives, data_directory_kb))
}

fn read_archive(rows: &Rows, row: usize) -> Option<Archive> {
    let tablespace = match (rows.get(row, "spcoid"), rows.get(row, "spclocation")) {
        (None, None) => None,
        (Some(oid), Some(location)) => Some(Tablespace {
            oid: oid.parse().ok()?,
            location: location.to_owned(),
            size_kb: rows.get(row, "size").and_then(|size| size.parse().ok()),
        }),
        _ => return None,
    };
    Some(Archive { tablespace, begun: false })
}

#[cfg(test)]
mod tests;

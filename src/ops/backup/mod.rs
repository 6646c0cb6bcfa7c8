//! `backup`: a base backup, over the replication protocol or from the data directory itself.
//!
//! ```text
//! begun -> BASE_BACKUP's stream, manifest compared  -> chunks -> packs -> file list
//!          or the files between start and stop      -> its WAL is in the repository -> committed
//! ```
//!
//! Until `committed.json` stands there is no backup, whatever happens; what a
//! failed one has stored is removed again where the store allows it.

mod arriving;
mod digests;
mod local;
mod manifest;
mod recording;
mod server;
mod stream;
mod wal;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::failures::{of_postgres, of_repo};
use super::progress::Progress;
use super::server_facts::store_history;
use super::stop::StopRequest;
use super::{check_in_future, claimed_identity, new_pin, now};
use crate::failure::{Failure, Kind, StopSignal};
use crate::format::{
    BackupId, Begun, Codec, Committed, FORMAT_VERSION, FileEntry, FileIndex, Identity, Pin,
    ServerLimits, TablespaceAt,
};
use crate::pg::PgTimestamp;
use crate::plan::memory::BackupMemory;
use crate::plan::unchanged::{Doubt, is_worth_comparing, settled_before};
use crate::repo::{
    BackupWriter, FileRecorder, ParentFiles, RecordedFiles, RepoError, Repository, Uploads,
};
use crate::store::StoreError;
use crate::walsender::{ConnInfo, ManifestChecksums, PgError};
use local::Local;
use recording::Received;
use server::Server;

/// Backups of one second that are told apart.
const ATTEMPTS_PER_SECOND: u32 = 20;

/// How long a backup that is given up waits for its packs on their way, before it removes them.
const UPLOADS_END_MAX: Duration = Duration::from_mins(1);

const UNHARMED: &str =
    "No backup was recorded; earlier backups, archived WAL and the server are as they were.";

/// Where the files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The server sends them over a replication connection.
    Stream,
    /// They are read from the server's data directory, on its own host.
    Files {
        /// The directory, where the server cannot be asked for it or has it elsewhere.
        pgdata: Option<PathBuf>,
        /// Read every file, those too that nobody seems to have written to since the backup before.
        rehash: bool,
    },
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where the files come from.
    pub source: Source,
    /// The server or servers.
    pub server: ConnInfo,
    /// Take it from a standby where one is fit.
    pub prefer_standby: bool,
    /// The label given to the server.
    pub label: String,
    /// What the operator wants to keep beside it.
    pub annotations: BTreeMap<String, String>,
    /// Ask for a fast checkpoint instead of a spread one.
    pub fast_checkpoint: bool,
    /// The most that may be sent or read, in KiB per second.
    pub max_rate_kb: Option<u32>,
    /// Which checksums the manifest carries.
    pub manifest_checksums: ManifestChecksums,
    /// How frames are compressed.
    pub codec: Codec,
    /// Frames compressed at a time, and files read at a time.
    pub jobs: usize,
    /// What each stage may hold of the ceiling of memory.
    pub memory: BackupMemory,
    /// How long to wait for the backup's WAL to arrive.
    pub wal_timeout: Duration,
    /// The name of this host, for the record.
    pub host: String,
    /// Until when the backup is pinned from the beginning.
    pub keep_until: Option<PgTimestamp>,
}

/// What was done.
#[derive(Debug, Clone)]
pub struct Report {
    /// The backup as it was committed.
    pub backup: Committed,
    /// Bytes that were referenced in the parent instead of being stored.
    pub referenced_bytes: u64,
    /// Bytes of files among them that were not even read.
    pub unread_bytes: u64,
}

/// Takes a backup, unless `stop` is wanted before it is committed.
pub async fn run(
    repository: &Repository,
    request: &Request,
    progress: Arc<dyn Progress>,
    mut stop: StopRequest,
) -> Result<Report, Failure> {
    check_in_future(request.keep_until, UNHARMED)?;
    progress.note("connecting");
    let ready = tokio::select! {
        ready = Ready::find(repository, request) => ready?,
        signal = stop.wanted() => return Err(stopped(signal)),
    };
    let Ready { origin, facts, identity, parent, started_at } = ready;
    // Not to be given up half-way: only its answer says under which id the backup began.
    let writer = begin(repository, request, &identity, parent.as_ref(), started_at).await?;
    let (id, uploads) = (writer.id().clone(), writer.uploads());
    let making = Making {
        repository,
        request,
        identity: &identity,
        progress,
        commit_was_sent: AtomicBool::new(false),
    };
    let work = Box::pin(making.carry_out(origin, facts, writer, parent, started_at));
    let outcome = making.carry_out_unless(&mut stop, work).await;
    // Once its last object was sent, the backup may exist although the answer was lost, or come to
    // exist a moment later: then nothing of it may be removed.
    if outcome.is_err() && !making.commit_was_sent.load(Ordering::SeqCst) {
        making.forget(&id, &uploads).await;
    }
    outcome
}

/// Where the files come from, ready to give them.
enum Origin {
    Stream(Box<Server>),
    Files(Box<Local>),
}

/// What is known before a backup begins.
struct Ready {
    origin: Origin,
    facts: server::Facts,
    identity: Identity,
    parent: Option<Committed>,
    started_at: PgTimestamp,
}

impl Ready {
    async fn find(repository: &Repository, request: &Request) -> Result<Self, Failure> {
        let mut server = server::choose(request).await?;
        let identity = claimed_identity(repository, server.facts.system_id, UNHARMED).await?;
        server::check_fit(&server.facts, &identity)?;
        server::check_wal_comes(&server.facts, repository).await?;
        let of = (server.facts.system_id, server.facts.timeline);
        let connection = &mut server.connection;
        store_history(repository, connection, of, request.codec, UNHARMED).await?;
        let facts = server.facts.clone();
        let origin = match &request.source {
            Source::Stream => Origin::Stream(Box::new(server)),
            Source::Files { pgdata, .. } => {
                server.connection.close().await;
                Origin::Files(Box::new(Local::find(request, pgdata.as_deref(), &facts).await?))
            }
        };
        let started_at = now();
        let parent = newest_backup(repository, &identity).await?;
        Ok(Self { origin, facts, identity, parent, started_at })
    }
}

fn stopped(signal: StopSignal) -> Failure {
    Failure::new(
        Kind::Stopped(signal),
        format!("the backup was stopped by {signal}"),
        UNHARMED,
        "Take it again when it suits. What it had stored is removed, unless a warning above says otherwise.",
    )
}

async fn newest_backup(
    repository: &Repository,
    identity: &Identity,
) -> Result<Option<Committed>, Failure> {
    let backups = repository.committed_backups(identity.system_identifier).await;
    let backups = backups
        .map_err(|error| of_repo(error, "could not list the backups before this one", UNHARMED))?;
    for backup in &backups.unreadable {
        tracing::warn!("nothing is referenced in backup {}: {}", backup.id, backup.why);
    }
    Ok(backups.readable.into_iter().next_back())
}

/// Announces the backup under the first id of this second that is free.
async fn begin(
    repository: &Repository,
    request: &Request,
    identity: &Identity,
    parent: Option<&Committed>,
    started_at: PgTimestamp,
) -> Result<BackupWriter, Failure> {
    let failed = |error| of_repo(error, "could not announce a backup", UNHARMED);
    let moment = started_at.to_jiff().unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    for attempt in 1..=ATTEMPTS_PER_SECOND {
        let begun = Begun {
            format: FORMAT_VERSION,
            id: BackupId::at(moment, attempt),
            begun_at: started_at,
            host: request.host.clone(),
            pid: std::process::id(),
            parent: parent.map(|parent| parent.id.clone()),
            leans_on: parent
                .map(|parent| parent.references.iter().map(|r| r.backup.clone()).collect())
                .unwrap_or_default(),
            tool: super::TOOL.to_owned(),
        };
        let system_id = identity.system_identifier;
        let writer =
            BackupWriter::begin(repository, &begun, system_id, request.codec, request.jobs).await;
        match writer {
            Ok(writer) => return Ok(writer.with_packs_of(request.memory.pack_bytes)),
            Err(RepoError::Store(StoreError::Exists { .. })) => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(Failure::new(
        Kind::Conflict,
        format!("{ATTEMPTS_PER_SECOND} backups were begun in this second"),
        UNHARMED,
        "Look which hosts run `highwater backup` for this cluster; one at a time is enough.",
    ))
}

fn not_received(error: PgError) -> Failure {
    of_postgres(error, "the server did not give a whole base backup", UNHARMED)
}

/// One backup in the making.
struct Making<'a> {
    repository: &'a Repository,
    request: &'a Request,
    identity: &'a Identity,
    progress: Arc<dyn Progress>,
    commit_was_sent: AtomicBool,
}

impl Making<'_> {
    /// Carries the backup out; gives it up if `stop` is wanted before the commit was sent.
    async fn carry_out_unless(
        &self,
        stop: &mut StopRequest,
        work: impl Future<Output = Result<Report, Failure>>,
    ) -> Result<Report, Failure> {
        let mut working = pin!(work);
        let signal = tokio::select! {
            outcome = &mut working => return outcome,
            signal = stop.wanted() => signal,
        };
        if self.commit_was_sent.load(Ordering::SeqCst) {
            // Nobody can tell any more whether it exists; a moment later it can be told.
            return working.await;
        }
        self.progress.note("removing what was stored");
        Err(stopped(signal))
    }

    /// Pins the backup, if that was asked for: before it exists, so that no `expire` meets it without its pin.
    async fn pin(&self, id: &BackupId) -> Result<(), Failure> {
        let Some(until) = self.request.keep_until else { return Ok(()) };
        let pin = Pin { until: Some(until), ..new_pin(id.clone(), self.request.host.clone()) };
        self.repository.put_pin(&pin).await.map_err(|error| self.not_stored(error))?;
        Ok(())
    }

    /// Removes what a backup that was given up has stored, as far as the store lets us.
    async fn forget(&self, id: &BackupId, uploads: &Uploads) {
        if !uploads.ended(UPLOADS_END_MAX).await {
            tracing::warn!("packs of backup {id} are still on their way; some may stay behind");
        }
        if let Err(error) = self.repository.forget_unfinished(id).await {
            tracing::warn!("what backup {id} had stored could not be removed: {error}");
        }
        if self.request.keep_until.is_some()
            && let Err(error) = self.repository.remove_pins(id).await
        {
            tracing::warn!("the pin of backup {id} could not be removed: {error}");
        }
    }

    async fn carry_out(
        &self,
        origin: Origin,
        facts: server::Facts,
        writer: BackupWriter,
        parent: Option<Committed>,
        started_at: PgTimestamp,
    ) -> Result<Report, Failure> {
        let id = writer.id().clone();
        let settled = parent.as_ref().and_then(|parent| self.settled_before(parent, &origin));
        let parent_files = self.load_parent(parent.as_ref(), settled).await?;
        let parent_id = parent_files.as_ref().map(|files| files.id().clone());
        let recorder = FileRecorder::new(writer);
        let (recorder, received) = match origin {
            Origin::Stream(server) => {
                stream::receive(self, *server, recorder, parent_files).await?
            }
            Origin::Files(local) => {
                let before = parent.as_ref().filter(|_| parent_files.is_some());
                Box::pin(local.take(self, &facts, recorder, parent_files, before)).await?
            }
        };
        self.progress.note("storing the last packs");
        let (writer, recorded) = recorder.finish().await.map_err(|e| self.not_stored(e))?;
        self.progress.note("waiting for the backup's WAL to be archived");
        let reaches_from = wal::settle(self, &facts, &received).await?;
        let committed = self.committed(
            &id,
            &writer,
            started_at,
            &facts,
            &received,
            &recorded,
            reaches_from,
            parent_id,
        );
        self.pin(&id).await?;
        let index = FileIndex::new(id, recorded.entries, recorded.list_frames);
        self.commit_was_sent.store(true, Ordering::SeqCst);
        writer.commit(&index, &committed).await.map_err(|e| self.not_known(e))?;
        let (referenced_bytes, unread_bytes) = (recorded.referenced_bytes, received.unread_bytes);
        Ok(Report { backup: committed, referenced_bytes, unread_bytes })
    }

    /// Returns whether files are read from the data directory, whose chunks then have checksums.
    fn reads_files(&self) -> bool {
        matches!(self.request.source, Source::Files { .. })
    }

    /// Returns since when the parent's files may be taken as unchanged, in nanoseconds since 1970;
    /// `None` if every file is to be read.
    fn settled_before(&self, parent: &Committed, origin: &Origin) -> Option<i64> {
        let (Source::Files { rehash: false, .. }, Origin::Files(local)) =
            (&self.request.source, origin)
        else {
            return None;
        };
        if !local.has_own_times() {
            tracing::info!(
                "every file is read: the times of a file system of another machine prove nothing"
            );
            return None;
        }
        match settled_before(parent, now()) {
            Ok(settled) => Some(settled),
            Err(Doubt::NoStamps) => None,
            Err(Doubt::Damage) => {
                tracing::info!(
                    "every file is read: the backup before has more damaged pages than it names"
                );
                None
            }
            Err(Doubt::Clock) => {
                tracing::warn!(
                    "every file is read: this host's clock was set back during or after backup {}",
                    parent.id
                );
                None
            }
        }
    }

    /// Loads the parent's file list, unless the parent is gone by now or cannot be
    /// read: then every chunk is stored, which costs room but is never wrong.
    async fn load_parent(
        &self,
        parent: Option<&Committed>,
        settled_before_ns: Option<i64>,
    ) -> Result<Option<ParentFiles>, Failure> {
        let Some(parent) = parent else { return Ok(None) };
        // `begun.json` names the parent already. Whoever deletes it deletes its
        // `committed.json` first and looks for us afterwards: one sees the other.
        let failed = |error| of_repo(error, "could not look for the parent again", UNHARMED);
        if self.repository.committed(&parent.id).await.map_err(failed)?.is_none() {
            return Ok(None);
        }
        let checksums = local::checksum_name(self.request.manifest_checksums);
        let can_be_known = |entry: &FileEntry| {
            settled_before_ns
                .is_some_and(|settled| is_worth_comparing(entry, parent, settled, checksums))
        };
        let index_bytes = self.request.memory.index_bytes;
        match ParentFiles::load(self.repository, &parent.id, index_bytes, can_be_known).await {
            Ok(files) => Ok(Some(files)),
            Err(error @ (RepoError::Damaged { .. } | RepoError::NotReadable { .. })) => {
                tracing::warn!("nothing is referenced in backup {}: {error}", parent.id);
                Ok(None)
            }
            Err(error) if error.is_absent() => {
                tracing::warn!("nothing is referenced in backup {}: {error}", parent.id);
                Ok(None)
            }
            Err(error) => {
                Err(of_repo(error, "could not read the backup before this one", UNHARMED))
            }
        }
    }

    /// The last put failed: whether the backup exists is the store's secret for now.
    fn not_known(&self, error: RepoError) -> Failure {
        let what = format!("could not commit the backup in {}", self.repository.describe());
        let unharmed = "Earlier backups, archived WAL and the server are as they were. Whether this backup exists, `highwater info` tells: if it is listed there, it is whole.";
        of_repo(error, what, unharmed)
    }

    fn not_stored(&self, error: RepoError) -> Failure {
        let what = format!("could not store the backup in {}", self.repository.describe());
        of_repo(error, what, UNHARMED)
    }

    #[allow(clippy::too_many_arguments)] // each is one part of the document
    fn committed(
        &self,
        id: &BackupId,
        writer: &BackupWriter,
        started_at: PgTimestamp,
        facts: &server::Facts,
        received: &Received,
        recorded: &RecordedFiles,
        reaches_from: PgTimestamp,
        parent: Option<BackupId>,
    ) -> Committed {
        let control = &received.control;
        Committed {
            format: FORMAT_VERSION,
            id: id.clone(),
            cluster: self.repository.cluster().clone(),
            system_identifier: facts.system_id,
            postgres_version: facts.version.0,
            catalog_version: control.catalog_version,
            segment_size: facts.segment_size,
            data_checksums: control.data_checksum_version != 0,
            group_access: received.group_access,
            label: self.request.label.clone(),
            annotations: self.request.annotations.clone(),
            source: match self.request.source {
                Source::Stream => "stream",
                Source::Files { .. } => "files",
            }
            .to_owned(),
            taken_from: if facts.in_recovery { "standby" } else { "primary" }.to_owned(),
            started_at,
            finished_at: now(),
            timeline: received.timeline,
            start_lsn: received.start_lsn,
            stop_lsn: received.stop_lsn,
            stop_timeline: received.stop_timeline,
            reaches_from,
            tablespaces: received
                .tablespaces
                .iter()
                .map(|(oid, location)| TablespaceAt { oid: *oid, location: location.clone() })
                .collect(),
            files: recorded.files,
            size_bytes: recorded.size_bytes,
            stored_bytes: writer.stored_bytes(),
            packs: writer.packs(),
            references: recorded.references.clone(),
            parent,
            read_from: received.read_from,
            damaged_pages: received.damaged_pages.clone(),
            limits: ServerLimits {
                max_connections: control.limits.max_connections,
                max_worker_processes: control.limits.max_worker_processes,
                max_wal_senders: control.limits.max_wal_senders,
                max_prepared_transactions: control.limits.max_prepared_transactions,
                max_locks_per_transaction: control.limits.max_locks_per_transaction,
            },
            tool: super::TOOL.to_owned(),
        }
    }
}

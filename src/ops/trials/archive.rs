//! A small archive in memory to try things on: one cluster, 1 MiB segments, real WAL pages.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::failure::Failure;
use crate::format::{
    BackupId, Begun, CHUNK_BYTES, ChunkEntry, Codec, Committed, Document,
    ENCRYPTED_IDENTITY_VERSION, Encryption, EntryKind, FORMAT_VERSION, FileIndex, Header, Identity,
    KeyObject, Kind, Made, Place, RepositoryKeyName, SecretKey, WalObject, WrappedKey,
    digest_chunk,
};
use crate::ops::stall::Stall;
use crate::ops::{Silent, archive_get, archive_push, restore};
use crate::pg::wal_build::{RecordSpec, build_segment};
use crate::pg::{Lsn, PgTimestamp, SegmentName, SegmentSize, SystemId, Timeline};
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TargetAction, TimelineChoice};
use crate::repo::{
    BackupWriter, FileMeta, FileRecorder, KeySource, KeySourceError, Leftovers, RepoError,
    Repository, WalSealer,
};
use crate::store::faults::{Fault, FaultStore, Symptom};
use crate::store::memory::MemoryStore;
use crate::store::{Key, Store};

/// The cluster of `tests/fixtures/pg/pg_control.17`, as pg_controldata shows it.
pub(super) const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);

/// The incarnation before it, which owned the place once.
pub(super) const ANCESTOR: SystemId = SystemId(7_000_000_000_000_000_001);

pub(super) const SIZE_BYTES: u32 = 1 << 20;

/// Whether this is `ops::encrypted_trials`, where everything is tried once more over an encrypted cluster.
pub(super) const IS_ENCRYPTED: bool = module_path!().as_bytes()["highwater::ops::".len()] == b'e';

/// How a get ended, and what was handed out.
pub(super) type Got = (Result<archive_get::Report, Failure>, Option<Vec<u8>>);

/// Where encrypted trials have their key from.
#[derive(Debug)]
pub(super) struct UserKey;

impl KeySource for UserKey {
    fn user_key(&self) -> Result<SecretKey, KeySourceError> {
        Ok(SecretKey::new([9; 32]))
    }
}

pub(super) fn repository_key() -> (RepositoryKeyName, SecretKey) {
    let key = SecretKey::new([5; 32]);
    (RepositoryKeyName { number: 1, id: key.id() }, key)
}

/// Where the key that the trials are set up with opens the repository key of this name.
pub(super) fn wrapped_key(key: RepositoryKeyName) -> String {
    let user_key = UserKey.user_key().unwrap().id();
    Place::new("main".parse().unwrap()).key(KeyObject::Wrapped { key, user_key })
}

/// Makes the repository of the trial's cluster in a store.
pub(super) fn repository_in(store: Arc<dyn Store>) -> Repository {
    let cluster = "main".parse().unwrap();
    if IS_ENCRYPTED {
        Repository::encrypted(store, cluster, Arc::new(UserKey))
    } else {
        Repository::new(store, cluster)
    }
}

/// Stores the repository key that the identities of a trial name.
fn put_repository_key(memory: &MemoryStore) {
    let (name, key) = repository_key();
    let user_key = UserKey.user_key().unwrap();
    let cluster = "main".parse().unwrap();
    let made = Made { at: PgTimestamp(0), host: "host".to_owned(), tool: "test".to_owned() };
    let wrapped = WrappedKey::new(&cluster, name, &key, &user_key, made).unwrap();
    let object = KeyObject::Wrapped { key: name, user_key: user_key.id() };
    memory.overwrite(&Place::new(cluster).key(object), wrapped.to_json().unwrap());
}

/// How the Nth call fails: before its effect, after it, cut short; and it and all that follow, before and after.
pub(super) const MODES: [fn(u64) -> Fault; 5] = [
    |n| Fault::anywhere().nth(n),
    |n| Fault::anywhere().nth(n).after_effect(),
    |n| Fault::anywhere().nth(n).symptom(Symptom::CutAfter(100)),
    |n| Fault::anywhere().nth(n).for_ever(),
    |n| Fault::anywhere().nth(n).after_effect().for_ever(),
];

/// The archive: `repository` goes through faults, `calm` does not.
pub(super) struct Archive {
    pub(super) memory: MemoryStore,
    pub(super) faults: FaultStore,
    pub(super) repository: Repository,
    pub(super) calm: Repository,
    pub(super) size: SegmentSize,
    directory: tempfile::TempDir,
}

impl Archive {
    pub(super) async fn claimed(segment_bytes: u32) -> Self {
        let archive = Self::empty(segment_bytes);
        for (incarnation, system_identifier) in [(1, ANCESTOR), (2, SYSTEM)] {
            let identity = archive.identity(system_identifier, incarnation);
            archive.calm.claim(&identity).await.unwrap();
        }
        archive
    }

    pub(super) fn empty(segment_bytes: u32) -> Self {
        let memory = MemoryStore::new();
        let faults = FaultStore::new(Arc::new(memory.clone()));
        let repository = repository_in;
        if IS_ENCRYPTED {
            put_repository_key(&memory);
        }
        Self {
            repository: repository(Arc::new(faults.clone())),
            calm: repository(Arc::new(memory.clone())),
            memory,
            faults,
            size: SegmentSize::new(segment_bytes).unwrap(),
            directory: tempfile::tempdir().unwrap(),
        }
    }

    /// The repository as a new process finds it, which remembers no keys.
    pub(super) fn reopened(&self) -> Repository {
        let store: Arc<dyn Store> = Arc::new(self.memory.clone());
        let cluster = "main".parse().unwrap();
        if IS_ENCRYPTED {
            Repository::encrypted(store, cluster, Arc::new(UserKey))
        } else {
            Repository::new(store, cluster)
        }
    }

    pub(super) fn identity(&self, system_identifier: SystemId, incarnation: u32) -> Identity {
        Identity {
            format: if IS_ENCRYPTED { ENCRYPTED_IDENTITY_VERSION } else { FORMAT_VERSION },
            encryption: IS_ENCRYPTED.then(|| {
                let (name, key) = repository_key();
                Encryption::new(&"main".parse().unwrap(), system_identifier, name, &key)
            }),
            cluster: "main".parse().unwrap(),
            system_identifier,
            segment_size: self.size,
            postgres_major: 17,
            incarnation,
            succeeds: None,
            claimed_at: PgTimestamp(0),
            claimed_by: "host".to_owned(),
            tool: "test".to_owned(),
        }
    }

    pub(super) fn segment(&self, number: u64) -> (String, Vec<u8>) {
        let time = PgTimestamp(1_000_000 * i64::try_from(number).unwrap());
        let records =
            [RecordSpec::filler(30_000), RecordSpec::commit(700, time), RecordSpec::filler(100)];
        let bytes = build_segment(Timeline(1), number, self.size, SYSTEM, &records);
        (SegmentName::new(Timeline(1), number, self.size).to_string(), bytes)
    }

    pub(super) async fn push(
        &self,
        name: &str,
        bytes: &[u8],
    ) -> Result<archive_push::Report, Failure> {
        self.push_as(name, bytes, false).await
    }

    /// Stores a segment that the server has damaged, as an operator would.
    pub(super) async fn push_damaged(&self, name: &str, bytes: &[u8]) {
        self.push_as(name, bytes, true).await.unwrap();
    }

    async fn push_as(
        &self,
        name: &str,
        bytes: &[u8],
        accept_damaged: bool,
    ) -> Result<archive_push::Report, Failure> {
        let request = self.push_request(name, bytes, accept_damaged);
        archive_push::run(&self.repository, &request).await
    }

    /// Puts a file where a server would have it, and returns what storing it asks.
    pub(super) fn push_request(
        &self,
        name: &str,
        bytes: &[u8],
        accept_damaged: bool,
    ) -> archive_push::Request {
        let path = self.directory.path().join("pg_wal").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        archive_push::Request {
            path,
            codec: Codec::DEFAULT,
            deadline: Duration::from_mins(1),
            accept_damaged,
            ahead: None,
            second: None,
        }
    }

    /// Stores pieces of a segment; `cuts` are the offsets between which they lie.
    pub(super) async fn put_pieces(&self, number: u64, bytes: &[u8], cuts: &[u32]) {
        let segment = SegmentName::new(Timeline(1), number, self.size);
        for pair in cuts.windows(2) {
            let piece = WalObject::Piece { segment, start: pair[0], end: pair[1] };
            let key = self.calm.wal_key(SYSTEM, piece);
            let mut sealer = WalSealer::new(Codec::DEFAULT, None).unwrap();
            sealer.push(&bytes[pair[0] as usize..pair[1] as usize]).unwrap();
            let name = self.calm.below(&key);
            let header = Header::new(Kind::Piece, name, SYSTEM, Codec::DEFAULT.packing());
            self.calm.put_sealed(&key, &sealer.finish(header).unwrap()).await.unwrap();
        }
    }

    /// Gets a file; the second part is what stands at the target afterwards.
    pub(super) async fn get(&self, name: &str) -> Got {
        self.get_or_from(None, None, name).await
    }

    /// Gets a file from this archive or from a second one, or from what this host holds for a store that is away.
    pub(super) async fn get_or_from(
        &self,
        second: Option<&Self>,
        stall: Option<&Stall>,
        name: &str,
    ) -> Got {
        let directory = tempfile::tempdir().unwrap();
        let target = directory.path().join("RECOVERYXLOG");
        let request = archive_get::Request {
            name: name.to_owned(),
            target: target.clone(),
            data_directory: directory.path().to_owned(),
            deadline: Duration::from_mins(1),
            ahead: None,
            second: second.map(|second| second.repository.clone()),
        };
        let outcome = archive_get::run_beside(&self.repository, &request, stall).await;
        (outcome, std::fs::read(target).ok())
    }

    /// Every backup's WAL and two backups, the second of other content.
    pub(super) async fn with_backups() -> (Self, [BackupId; 2]) {
        let archive = Self::claimed(SIZE_BYTES).await;
        archive.push_wal().await;
        let ids = [1, 2].map(id);
        for (seed, id) in (1..).zip(&ids) {
            make_backup(&archive.calm, id, seed).await.unwrap();
        }
        (archive, ids)
    }

    pub(super) async fn push_wal(&self) {
        for number in 2..5 {
            let (name, bytes) = self.segment(number);
            self.push(&name, &bytes).await.unwrap();
        }
    }

    /// Returns the bytes that stand in the store where this document is stored under that key.
    pub(super) async fn as_stored(&self, key: &str, document: &impl Document) -> Bytes {
        let (store, key) = (self.calm.store(), Key::new(key));
        store.create(&key, document.to_json().unwrap().into()).await.unwrap();
        let stored = self.memory.bytes(key.as_str()).unwrap();
        store.delete(&key).await.unwrap();
        stored
    }

    pub(super) fn keys_below(&self, part: &str) -> Vec<String> {
        self.memory.keys().into_iter().filter(|key| key.contains(part)).collect()
    }

    /// Restores a backup as far as the archive goes; see [`Self::restore_with`].
    pub(super) async fn restore(&self, id: &BackupId) -> Result<Vec<(String, Vec<u8>)>, Failure> {
        Ok(self.restore_with(Some(id), RecoveryPoint::Latest).await?.1)
    }

    /// Restores and returns the plan and the files as (path, content); nothing on failure,
    /// after a look that PostgreSQL could not start from what is there.
    pub(super) async fn restore_with(
        &self,
        id: Option<&BackupId>,
        point: RecoveryPoint,
    ) -> Result<(restore::PlanReport, Vec<(String, Vec<u8>)>), Failure> {
        let (_directory, pgdata) = new_data_directory();
        self.restore_into(&pgdata, id, point, false).await
    }

    /// The same into a directory that is there; with `delta` over what stands in it.
    pub(super) async fn restore_into(
        &self,
        pgdata: &Path,
        id: Option<&BackupId>,
        point: RecoveryPoint,
        delta: bool,
    ) -> Result<(restore::PlanReport, Vec<(String, Vec<u8>)>), Failure> {
        let was_startable = pgdata.join("global/pg_control").exists();
        let request = restore::Request {
            pgdata: pgdata.to_owned(),
            backup: id.cloned(),
            target: RecoveryTarget {
                point,
                inclusive: true,
                timeline: TimelineChoice::Latest,
                action: TargetAction::Pause,
            },
            tablespace_map: Vec::new(),
            delta,
            standby: false,
            take_over: false,
            jobs: 2,
            range_bytes_max: 1 << 20,
            program: PathBuf::from("/usr/bin/highwater"),
            program_flags: Vec::new(),
        };
        let outcome = async {
            let planned = restore::make_plan(&self.repository, &request).await?;
            restore::check_place(&request, &planned).await?;
            let plan = planned.report.clone();
            restore::carry_out(&self.repository, &request, planned, Arc::new(Silent)).await?;
            Ok(plan)
        };
        match outcome.await {
            Ok(plan) => Ok((plan, files_of(pgdata))),
            Err(failure) => {
                let is_startable = pgdata.join("global/pg_control").exists();
                // Refused before anything was touched, what stood there stands.
                assert!(!is_startable || was_startable, "half a restore can start");
                Err(failure)
            }
        }
    }
}

/// An empty directory that a restore may fill.
pub(super) fn new_data_directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let pgdata = directory.path().canonicalize().unwrap().join("data");
    std::fs::create_dir(&pgdata).unwrap();
    if std::fs::metadata(&pgdata).unwrap().uid() == 0 {
        // As root, the files become those of the directory's owner, who must not be root.
        std::os::unix::fs::chown(&pgdata, Some(65534), Some(65534)).unwrap();
    }
    (directory, pgdata)
}

pub(super) fn control_file(major: u32) -> Vec<u8> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pg");
    std::fs::read(fixtures.join(format!("pg_control.{major}"))).unwrap()
}

pub(super) fn id(second: i64) -> BackupId {
    BackupId::at(jiff::Timestamp::from_second(second).unwrap(), 1)
}

pub(super) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

/// The files of the backup with this seed: an empty one, small ones, one with a map and a chunk of zeros.
pub(super) fn contents(seed: u64) -> Vec<(String, Vec<u8>)> {
    let mut large = noise(seed, 7 * CHUNK_BYTES as usize + 100);
    large[CHUNK_BYTES as usize..2 * CHUNK_BYTES as usize].fill(0);
    vec![
        ("PG_VERSION".to_owned(), b"17\n".to_vec()),
        ("backup_label".to_owned(), b"START WAL LOCATION: 0/200000\n".to_vec()),
        ("base/1/2619".to_owned(), large),
        ("base/1/empty".to_owned(), Vec::new()),
        ("global/1262".to_owned(), noise(seed + 100, 8192)),
        ("global/pg_control".to_owned(), control_file(17)),
    ]
}

pub(super) fn files_of(pgdata: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: &String| std::fs::read(pgdata.join(name)).unwrap();
    contents(0).into_iter().map(|(name, _)| (name.clone(), read(&name))).collect()
}

/// Makes a whole backup, as `backup` does once it has the bytes.
pub(super) async fn make_backup(
    repository: &Repository,
    id: &BackupId,
    seed: u64,
) -> Result<(), RepoError> {
    make_backup_of(repository, &begun(id, &[]), &contents(seed)).await.map(drop)
}

pub(super) fn begun(id: &BackupId, leans_on: &[BackupId]) -> Begun {
    Begun {
        format: FORMAT_VERSION,
        id: id.clone(),
        begun_at: PgTimestamp(0),
        host: "host".to_owned(),
        pid: 1,
        parent: None,
        leans_on: leans_on.to_vec(),
        tool: "test".to_owned(),
    }
}

/// Makes a backup of these files in packs of 4 MiB, and goes on from the unfinished ones that it leans on; returns
/// what it stored and what it took over, in bytes.
pub(super) async fn make_backup_of(
    repository: &Repository,
    begun: &Begun,
    files: &[(String, Vec<u8>)],
) -> Result<(u64, u64), RepoError> {
    let writer = BackupWriter::begin(repository, begun, SYSTEM, Codec::DEFAULT, 2).await?;
    let uploads = writer.uploads();
    let outcome = record(repository, begun, writer, files).await;
    if outcome.is_err() {
        // What is on its way arrives, or not; afterwards nothing changes any more.
        assert!(uploads.ended(Duration::from_mins(1)).await);
    }
    outcome
}

async fn record(
    repository: &Repository,
    begun: &Begun,
    writer: BackupWriter,
    files: &[(String, Vec<u8>)],
) -> Result<(u64, u64), RepoError> {
    let id = &begun.id;
    let leftovers = Leftovers::find(repository, SYSTEM, &begun.leans_on).await?;
    let mut recorder = FileRecorder::new(writer.with_packs_of(4 << 20)).resuming(leftovers);
    for path in ["base", "base/1", "global"] {
        recorder.begin(meta(path, EntryKind::Directory, 0));
        recorder.end(None, None).await?;
    }
    for (path, content) in files {
        recorder.begin(meta(path, EntryKind::File, content.len() as u64));
        for chunk in content.chunks(CHUNK_BYTES as usize) {
            let digest = digest_chunk(chunk);
            if chunk.iter().all(|byte| *byte == 0) {
                let zeros = ChunkEntry { digest, runs: Vec::new() };
                recorder.reference(zeros, chunk.len() as u64).await?;
            } else {
                recorder.store(digest, chunk).await?;
            }
        }
        recorder.end(None, None).await?;
    }
    let (writer, recorded) = recorder.finish().await?;
    let size = SegmentSize::new(SIZE_BYTES).unwrap();
    let committed = Committed {
        cluster: repository.cluster().clone(),
        system_identifier: SYSTEM,
        segment_size: size,
        start_lsn: size.start_of(2),
        stop_lsn: Lsn(size.start_of(3).0 + 0x100),
        reaches_from: PgTimestamp(3_000_000),
        files: recorded.files,
        size_bytes: recorded.size_bytes,
        stored_bytes: writer.stored_bytes(),
        packs: writer.packs(),
        references: recorded.references,
        ..Committed::example(id.clone())
    };
    let index = FileIndex::new(id.clone(), recorded.entries, recorded.list_frames);
    let stored = writer.stored_bytes();
    writer.commit(&index, &committed).await?;
    Ok((stored, recorded.resumed_bytes))
}

pub(super) fn meta(path: &str, kind: EntryKind, size: u64) -> FileMeta {
    let mode = if kind == EntryKind::File { 0o600 } else { 0o700 };
    FileMeta { path: path.as_bytes().to_vec(), kind, mode, mtime: 1, size }
}

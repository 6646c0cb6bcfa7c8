//! Proving objects, several at a time; each that seems wrong is looked at twice.

use std::time::{SystemTime, UNIX_EPOCH};

use tokio::task::JoinSet;

use crate::format::{BackupId, Depth, Proof, WalObject};
use crate::pg::{SegmentSize, SystemId};
use crate::repo::{Proven, RepoError, Repository};
use crate::store::{Key, Listed};

/// An object that is proven by itself.
#[derive(Debug, Clone)]
pub(super) enum Subject {
    Wal { system_id: SystemId, size: SegmentSize, object: WalObject },
    Pack { system_id: SystemId, id: BackupId, number: u32 },
    Files { system_id: SystemId, id: BackupId },
}

impl Subject {
    async fn prove(&self, repository: &Repository, depth: Depth) -> Result<Proven, RepoError> {
        match self {
            Self::Wal { system_id, size, object } => {
                repository.prove_wal(*system_id, *size, *object, depth).await
            }
            Self::Pack { system_id, id, number } => {
                repository.prove_pack(*system_id, id, *number, depth).await
            }
            Self::Files { system_id, id } => repository.prove_file_index(*system_id, id).await,
        }
    }
}

/// An object that is to be proven.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) subject: Subject,
    pub(super) key: Key,
    pub(super) look: u64,
    pub(super) size_bytes: u64,
}

impl Job {
    pub(super) fn of(subject: Subject, listed: &Listed) -> Self {
        let (key, size_bytes) = (listed.key.clone(), listed.size_bytes);
        Self { subject, key, look: look_of(listed), size_bytes }
    }
}

/// Returns how an object looks in a listing.
pub(super) fn look_of(listed: &Listed) -> u64 {
    Proof::look_of(listed.size_bytes, nanos_of(listed.modified))
}

fn nanos_of(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}

/// What came of a job.
pub(super) type Done = (Job, Result<Proven, RepoError>);

/// Proves several objects at a time.
#[derive(Debug)]
pub(super) struct Crew {
    repository: Repository,
    depth: Depth,
    jobs_max: usize,
    working: JoinSet<Done>,
}

impl Crew {
    pub(super) fn new(repository: &Repository, depth: Depth, jobs_max: usize) -> Self {
        let (repository, working) = (repository.clone(), JoinSet::new());
        Self { repository, depth, jobs_max: jobs_max.max(1), working }
    }

    /// Returns whether one must end before another begins.
    pub(super) fn is_busy(&self) -> bool {
        self.working.len() >= self.jobs_max
    }

    /// Begins a job.
    pub(super) fn begin(&mut self, job: Job) {
        let (repository, depth) = (self.repository.clone(), self.depth);
        self.working.spawn(async move {
            let outcome = prove_twice(&job, &repository, depth).await;
            (job, outcome)
        });
    }

    /// Waits for the next job to end; `None` if there is none.
    pub(super) async fn next(&mut self) -> Option<Result<Done, RepoError>> {
        let done = self.working.join_next().await?;
        Some(done.map_err(|error| RepoError::Task(error.into())))
    }
}

/// What the network or a cache has spoilt once is right the second time.
async fn prove_twice(
    job: &Job,
    repository: &Repository,
    depth: Depth,
) -> Result<Proven, RepoError> {
    if job.size_bytes == 0 {
        // Stores refuse to give the first bytes of nothing.
        return Err(RepoError::Damaged { key: job.key.clone(), why: "it is empty".to_owned() });
    }
    match job.subject.prove(repository, depth).await {
        Err(RepoError::Damaged { .. }) => job.subject.prove(repository, depth).await,
        outcome => outcome,
    }
}

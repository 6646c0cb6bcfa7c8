//! `verify`: prove that what is stored is whole, that WAL is unbroken, and that backups come back.
//!
//! ```text
//! take stock -> each object of WAL -> documents, packs and lists of each backup
//!            -> (with every digest) the files of each backup -> holes -> pins, strays
//!            -> everything that seems wrong is looked at again
//!            -> what is lost by each -> what somebody knows of already -> report
//! ```
//!
//! It reads only, but for its own proofs and reports (`verify/`). It takes no lock: what `expire` deletes, and what
//! `backup` and archiving add while it runs, is told apart from damage by a second look. A store that fails ends it: what
//! could not be read is never taken for damaged.
//!
//! Never here: what belongs to an object's proof (`repo`), or what a loss takes away (`plan::window`).

mod acknowledge;
mod backups;
mod conclude;
mod crew;
mod findings;
mod ledger;
mod let_go;
mod losses;
mod pace;
mod wal;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::failures::of_repo;
use super::progress::Progress;
use super::stock::{Gathered, take_stock_despite};
use super::stop::StopRequest;
use super::{TOOL, never_claimed, now};
use crate::failure::Failure;
use crate::format::{
    Acknowledgement, BackupId, Depth, FINDINGS_NAMED_MAX, FORMAT_VERSION, Identity, Proof,
    StoredFinding, Verification,
};
use crate::pg::{PgTimestamp, SystemId};
use crate::plan::retention::Policy;
use crate::repo::{RepoError, Repository, claim_of};
use crate::store::Key;
pub use acknowledge::{AcknowledgeRequest, acknowledge};
use backups::FaultyObject;
use crew::{Crew, Job, Subject};
use findings::{About, Fault, Raw, STRAYS_NAMED_MAX};
pub use findings::{Acknowledged, Finding, LostMoments, Report};
use ledger::{Ledger, Wanted};
use pace::Pace;

const UNHARMED: &str = "Nothing that is stored was changed.";

/// How long after a hole in WAL was seen it should be looked at again: segments are stored several at a time, and not
/// in order.
pub const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Reports that are kept.
const REPORTS_KEPT: usize = 10;

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// How far each object is looked at.
    pub depth: Depth,
    /// Look at everything, whatever was proven before.
    pub again: bool,
    /// Look again at what was proven longer ago than this.
    pub older_than: Duration,
    /// The most bytes read in a second.
    pub bytes_per_second: Option<u64>,
    /// Objects looked at at a time.
    pub jobs: usize,
    /// How long after a hole in WAL was seen it is looked at again.
    pub look_again_after: Duration,
    /// What is to be kept: a backup that retention keeps by itself needs no WAL behind its own.
    pub policy: Policy,
    /// The name of this host, for the record.
    pub host: String,
}

/// Proves what is stored.
///
/// # Errors
/// [`Kind::Store`](crate::failure::Kind::Store) if the store fails, and [`Kind::Stopped`](crate::failure::Kind::Stopped) once `stop` is wanted: what was proven until then is
/// remembered. What is wrong with stored objects is no error, but told in the report.
pub async fn run(
    repository: &Repository,
    request: &Request,
    progress: &dyn Progress,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let failed = |error| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    };
    let started_at = now();
    progress.note("taking stock");
    let mut raw = Vec::new();
    let identities = readable_identities(repository, &mut raw).await.map_err(failed)?;
    // History files are looked at with the other objects of WAL.
    let (gathered, _) = take_stock_despite(repository, &identities).await.map_err(failed)?;
    let owner = claim_of(&identities).map(|identity| identity.system_identifier);
    let owner = owner.or_else(|| gathered.stock.incarnations.last().map(|one| one.system_id));
    let Some(owner) = owner else {
        return Err(never_claimed(repository, UNHARMED));
    };
    let run = new_run(repository, started_at).await.map_err(failed)?;
    let Request { depth, again, older_than, .. } = *request;
    let wanted = Wanted { depth, again, older_than };
    let ledger = Ledger::open(repository, owner, run.clone(), started_at, wanted).await;
    let mut verifying = Verifying {
        repository,
        request,
        progress,
        stop,
        run,
        started_at,
        gathered,
        ledger: ledger.map_err(failed)?,
        pace: Pace::new(request.bytes_per_second),
        crew: Crew::new(repository, depth, request.jobs),
        raw,
        known: Vec::new(),
        faulty: Vec::new(),
        claimed: identities.iter().map(|identity| identity.system_identifier).collect(),
        files_seen: BTreeSet::new(),
        torn: Vec::new(),
        notes: Vec::new(),
        strays: Vec::new(),
        strays_unnamed: 0,
        backups: 0,
        checked: identities.len() as u64,
        skipped: 0,
        read_bytes: 0,
        redundant_pieces: 0,
        unfinished: 0,
        unneeded: 0,
        unneeded_bytes: 0,
    };
    verifying.known = acknowledged(repository, &mut verifying.raw).await.map_err(failed)?;
    match verifying.look().await {
        Ok(report) => Ok(report),
        Err(failure) => {
            // What was proven stays proven; if even that cannot be stored, it is proven again.
            if let Err(error) = verifying.ledger.store(repository).await {
                tracing::debug!("what was proven could not be stored: {error}");
            }
            Err(failure)
        }
    }
}

/// Reads the identities that can be read.
async fn readable_identities(
    repository: &Repository,
    raw: &mut Vec<Raw>,
) -> Result<Vec<Identity>, RepoError> {
    let level = repository.store().list_level(&Key::new(repository.place().identity_dir())).await?;
    let mut readable = Vec::new();
    for listed in level.objects {
        let name = listed.key.file_name().strip_suffix(".json");
        let Some(Ok(system_id)) = name.map(str::parse::<SystemId>) else { continue };
        match repository.identity(system_id).await {
            Ok(identity) if identity.cluster != *repository.cluster() => {
                let why = format!("`{}` is of the cluster `{}`", listed.key, identity.cluster);
                let about = About::Identity(system_id, listed.key);
                raw.push(Raw { about, fault: Fault::Damaged, why });
            }
            Ok(identity) => readable.push(identity),
            Err(RepoError::NotClaimed { .. }) => {}
            // Nothing at all can be read, nor what was proven be stored: no finding, but the end.
            Err(error @ RepoError::Key(_)) => return Err(error),
            Err(error) => {
                let (fault, why) = Fault::of(error)?;
                raw.push(Raw { about: About::Identity(system_id, listed.key), fault, why });
            }
        }
    }
    readable.sort_by_key(|identity| (identity.incarnation, identity.claimed_at));
    Ok(readable)
}

/// Names this run; another one of the same second keeps its name.
async fn new_run(repository: &Repository, at: PgTimestamp) -> Result<BackupId, RepoError> {
    let taken = repository.verify_runs().await?;
    let at = at.to_jiff().unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let mut attempt = 1;
    while taken.contains(&BackupId::at(at, attempt)) {
        attempt += 1;
    }
    Ok(BackupId::at(at, attempt))
}

/// One run.
struct Verifying<'a> {
    repository: &'a Repository,
    request: &'a Request,
    progress: &'a dyn Progress,
    stop: StopRequest,
    run: BackupId,
    started_at: PgTimestamp,
    gathered: Gathered,
    ledger: Ledger,
    pace: Pace,
    crew: Crew,
    raw: Vec<Raw>,
    /// What somebody knows of already.
    known: Vec<Acknowledgement>,
    faulty: Vec<FaultyObject>,
    /// Whose identity can be read.
    claimed: BTreeSet<SystemId>,
    /// Backups whose file list is there.
    files_seen: BTreeSet<BackupId>,
    /// Segments whose pieces do not join.
    torn: Vec<wal::Torn>,
    notes: Vec<String>,
    /// Objects that are none of ours, the first of them.
    strays: Vec<Key>,
    strays_unnamed: u64,
    backups: u64,
    checked: u64,
    skipped: u64,
    read_bytes: u64,
    redundant_pieces: u64,
    unfinished: u64,
    unneeded: u64,
    unneeded_bytes: u64,
}

impl Verifying<'_> {
    async fn look(&mut self) -> Result<Report, Failure> {
        let begun = Instant::now();
        let incarnations = self.gathered.stock.incarnations.iter();
        let incarnations: Vec<_> =
            incarnations.map(|one| (one.system_id, one.segment_size)).collect();
        for (system_id, size) in incarnations {
            self.look_at_wal(system_id, size).await?;
        }
        self.look_at_backups().await?;
        let reading = begun.elapsed();
        self.look_at_small_things().await?;
        let holes = self.look_for_holes().await?;
        let holes = self.judge_let_go(holes).await?;
        self.raw.extend(holes);
        let report = self.conclude().await?;
        let stored = self.stored_report(&report, reading);
        let stored = self.repository.put_verification(&stored).await;
        stored.map_err(|error| self.failed(error, "store what was proven"))?;
        let finished = self.ledger.finish(self.repository).await;
        finished.map_err(|error| self.failed(error, "store what was proven"))?;
        self.forget_old_reports().await?;
        Ok(report)
    }

    fn failed(&self, error: RepoError, doing: &str) -> Failure {
        let what = format!("could not {doing} in {}", self.repository.describe());
        let failure = of_repo(error, what, UNHARMED);
        let again = "What was proven until then is remembered: run `highwater verify` again, and it goes on from there.";
        let next = format!("{} {again}", failure.next);
        Failure { next, ..failure }
    }

    async fn check_stop(&mut self) -> Result<(), Failure> {
        let checked = self.checked;
        let next =
            "Run `highwater verify` again when it suits: what was proven until now is remembered.";
        self.stop.check(|| format!("{checked} objects were proven"), UNHARMED, next).await
    }

    /// Proves an object, unless that was done before and it cannot have changed.
    async fn prove(&mut self, job: Job) -> Result<(), Failure> {
        self.check_stop().await?;
        let object = Proof::object_of(job.key.as_str());
        if let Some(proof) = self.ledger.believed(object, job.look) {
            self.ledger.keep(proof);
            self.skipped += 1;
            return self.store_proofs_now_and_then().await;
        }
        while self.crew.is_busy() {
            self.settle_one().await?;
        }
        if self.request.depth == Depth::Whole {
            self.pace.spend(job.size_bytes, &mut self.stop).await;
            self.check_stop().await?;
        }
        self.crew.begin(job);
        Ok(())
    }

    async fn settle_all(&mut self) -> Result<(), Failure> {
        while self.settle_one().await? {}
        Ok(())
    }

    /// Waits for one object and notes what came of it; `false` if there is none left.
    async fn settle_one(&mut self) -> Result<bool, Failure> {
        let Some(done) = self.crew.next().await else { return Ok(false) };
        let (job, outcome) = done.map_err(|error| self.failed(error, "read an object"))?;
        let object = Proof::object_of(job.key.as_str());
        match outcome {
            Ok(proven) => {
                self.checked += 1;
                self.read_bytes += proven.read_bytes;
                self.progress.advance(proven.read_bytes);
                let content = proven.stored_digest.as_ref().map(Proof::content_of);
                let before = self.ledger.content_of(object);
                let is_changed = content.is_some() && before.is_some() && content != before;
                let changed = Raw {
                    why: format!(
                        "`{}` is whole, but not the stored bytes that were proven before, though nothing stored is ever modified",
                        job.key
                    ),
                    about: About::Changed(job.key),
                    fault: Fault::Changed,
                };
                // Known to somebody, it is what is to be compared with from now on.
                if is_changed && !self.known.iter().any(|one| one.finding == changed.id()) {
                    self.ledger.keep_all(object);
                    self.raw.push(changed);
                } else {
                    self.ledger.add(object, job.look, content, self.request.depth);
                }
            }
            Err(error) => {
                let found = Fault::of(error);
                let (fault, why) = found.map_err(|error| self.failed(error, "read an object"))?;
                self.ledger.keep_all(object);
                self.note_fault(job, fault, why);
            }
        }
        self.store_proofs_now_and_then().await?;
        Ok(true)
    }

    fn note_fault(&mut self, job: Job, fault: Fault, why: String) {
        let key = job.key;
        match job.subject {
            // `expire`, or `receive` that has stored something larger: if WAL is missing, that shows as a hole.
            Subject::Wal { .. } if fault == Fault::Missing => {}
            Subject::Wal { system_id, object, .. } => {
                let about = match object {
                    crate::format::WalObject::File(crate::pg::WalFileName::History(timeline)) => {
                        About::History(system_id, timeline, key)
                    }
                    _ => About::Wal(system_id, object, key),
                };
                self.raw.push(Raw { about, fault, why });
            }
            Subject::Pack { id, number, .. } => {
                let (owner, pack) = (id, Some(number));
                self.faulty.push(FaultyObject { owner, pack, key, fault, why });
            }
            Subject::Files { id, .. } => {
                self.faulty.push(FaultyObject { owner: id, pack: None, key, fault, why });
            }
        }
    }

    async fn store_proofs_now_and_then(&mut self) -> Result<(), Failure> {
        let stored = self.ledger.store_now_and_then(self.repository).await;
        stored.map_err(|error| self.failed(error, "store what was proven"))
    }

    fn stray(&mut self, key: &Key) {
        if self.strays.len() < STRAYS_NAMED_MAX {
            self.strays.push(key.clone());
        } else {
            self.strays_unnamed += 1;
        }
    }

    fn stored_report(&self, report: &Report, reading: Duration) -> Verification {
        let named = report.findings.iter().take(FINDINGS_NAMED_MAX);
        let findings: Vec<StoredFinding> = named
            .map(|finding| StoredFinding {
                id: finding.id.clone(),
                what: finding.what.clone(),
                consequence: finding.consequence.clone(),
            })
            .collect();
        let is_free = self.request.bytes_per_second.is_none();
        let is_whole = self.request.depth == Depth::Whole;
        Verification {
            format: FORMAT_VERSION,
            id: self.run.clone(),
            started_at: report.started_at,
            finished_at: report.finished_at,
            host: self.request.host.clone(),
            deep: is_whole,
            checked: report.checked,
            skipped: report.skipped,
            read_bytes: report.read_bytes,
            read_millis: (is_free && is_whole && report.read_bytes > 0)
                .then(|| u64::try_from(reading.as_millis()).unwrap_or(u64::MAX)),
            findings,
            findings_unnamed: report.findings_unnamed,
            tool: TOOL.to_owned(),
        }
    }

    /// Removes reports beyond the newest, and what is left of the runs that made them.
    async fn forget_old_reports(&mut self) -> Result<(), Failure> {
        let runs = self.repository.verify_runs().await;
        let runs = runs.map_err(|error| self.failed(error, "list earlier runs"))?;
        for run in runs.iter().skip(REPORTS_KEPT) {
            let key = Key::new(self.repository.place().verification(run));
            match self.repository.discard(&key).await {
                Ok(()) => {}
                Err(error) if error.is_not_allowed() => return Ok(()),
                Err(error) => return Err(self.failed(error, "remove an earlier report")),
            }
        }
        Ok(())
    }
}

/// Returns what somebody knows of already, and why an acknowledgement cannot be read.
async fn acknowledged(
    repository: &Repository,
    raw: &mut Vec<Raw>,
) -> Result<Vec<Acknowledgement>, RepoError> {
    let mut known = Vec::new();
    for (key, read) in repository.acknowledgements().await? {
        match read {
            Ok(one) => known.push(one),
            Err(error) => {
                let (fault, why) = Fault::of(error)?;
                raw.push(Raw { about: About::Acknowledgement(key), fault, why });
            }
        }
    }
    Ok(known)
}

//! `copy`: bring what one of two repositories has and the other has not into the other.
//!
//! ```text
//! for each way, first -> second and second -> first:
//!   history files
//!   each backup:  begun.json -> packs that are missing -> its WAL -> file list, committed.json -> packs, once more
//!   WAL:          what the destination would keep, is not there and does not lie in something larger there
//! ```
//!
//! There is no book of what is owed: it is what listings show to be in one and not in the other. So it may end at any
//! line and be run again, by anybody, anywhere, also by several at a time. Each repository has a retention of its own,
//! and what that of the destination would delete is not brought: or WAL would come and go for ever.
//!
//! Never here: how a single object is proven and stored (`repo::Transfer`).

mod backups;
mod footing;
mod report;
mod wal;

use std::collections::BTreeMap;
use std::time::Duration;

use self::backups::Candidates;
pub use self::report::{BackupLine, Outcome, Report, Trouble, WalLine, WayReport};
use self::wal::{Found, Kept};
use super::failures::{kind_of_repo, of_repo};
use super::progress::Progress;
use super::stop::StopRequest;
use super::{Which, never_claimed};
use crate::causes::in_one_line;
use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Identity};
use crate::plan::retention::Policy;
use crate::repo::{CopyError, RepoError, Repository, Transfer};

const UNHARMED: &str = "Nothing that stands in either repository was changed; what was copied before stays, and is not copied again.";

/// Troubles that are named; more are only counted.
const TROUBLES_NAMED_MAX: usize = 100;

/// One of the two.
#[derive(Debug, Clone)]
pub struct Side {
    /// Which.
    pub which: Which,
    /// The repository.
    pub repository: Repository,
    /// What its retention keeps; one that is not set keeps everything.
    pub policy: Policy,
}

impl Side {
    /// Returns how it is named in sentences.
    fn named(&self) -> String {
        format!("the {} repository, {}", self.which.word(), self.repository.describe())
    }
}

/// Which backups are copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// None.
    Nothing,
    /// All that the destination would keep.
    All,
    /// The newest one of both, to where it is not.
    Newest,
    /// This one, whether or not retention would keep it.
    Named(BackupId),
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// Backups, each with the WAL from its start to its stop.
    pub backups: Choice,
    /// All WAL that the destination would keep.
    pub wal: bool,
    /// The one that is read; `None` for both ways.
    pub from: Option<Which>,
    /// Tell what would be copied, and copy nothing.
    pub dry_run: bool,
    /// The name of this host, for the record.
    pub host: String,
    /// How long after it was announced a copy counts on packs that a deleted backup has left:
    /// [`crate::plan::retention::REMAINS_SETTLE_AFTER`], but for trials.
    pub settle_after: Duration,
}

/// One way, while it is gone.
struct Way<'a> {
    from: &'a Side,
    to: &'a Side,
    request: &'a Request,
    progress: &'a dyn Progress,
    stop: StopRequest,
    report: WayReport,
}

/// Copies what is missing, or only tells.
///
/// # Errors
/// [`Kind::Store`] if either repository fails, told which; [`Kind::Absent`] if a backup that is named is in neither.
/// What is damaged or in conflict stands in the report and stops nothing else.
pub async fn run(
    first: &Side,
    second: &Side,
    request: &Request,
    progress: &dyn Progress,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let mut report = Report {
        cluster: first.repository.cluster().to_string(),
        dry_run: request.dry_run,
        ways: Vec::new(),
    };
    for (from, to) in [(first, second), (second, first)] {
        if request.from.is_some_and(|which| which != from.which) {
            continue;
        }
        let mut way = Way {
            from,
            to,
            request,
            progress,
            stop: stop.clone(),
            report: WayReport::new(from, to),
        };
        Box::pin(way.go()).await?;
        report.ways.push(way.report);
    }
    match &request.backups {
        Choice::Named(id) if report.ways.iter().all(|way| way.backups.is_empty()) => {
            Err(Failure::new(
                Kind::Absent,
                format!("there is no backup `{id}` to be copied"),
                UNHARMED,
                "`highwater info` lists the backups of both repositories.",
            ))
        }
        _ => Ok(report),
    }
}

impl Way<'_> {
    async fn go(&mut self) -> Result<(), Failure> {
        let identities = self.identities().await?;
        for identity in &identities {
            self.bring_histories(identity).await?;
        }
        let candidates = Candidates::find(self, &identities).await?;
        let plan = self.kept_there(&identities, &candidates).await?;
        self.bring_backups(candidates, plan.as_ref()).await?;
        if self.request.wal {
            // A backup that was brought has a say in which WAL stays there.
            let plan = if self.report.backups.is_empty() {
                plan
            } else {
                self.kept_there(&identities, &Candidates::default()).await?
            };
            for identity in &identities {
                let kept = Kept { plan: plan.as_ref(), identity };
                let of = (identity.system_identifier, identity.segment_size);
                let found = self.bring_wal(of, Found::Kept(kept)).await?;
                self.report.wal.add(&found);
            }
        }
        Ok(())
    }

    /// Returns those that ever claimed the place in both; the destination must be claimed.
    async fn identities(&self) -> Result<Vec<Identity>, Failure> {
        let mut both = Vec::new();
        for side in [self.from, self.to] {
            let read = side.repository.identities().await;
            let read = read.map_err(|error| failed_at(side, error, "read who owns the place"))?;
            if read.is_empty() {
                return Err(never_claimed(&side.repository, UNHARMED));
            }
            both.push(read);
        }
        let known: BTreeMap<_, _> =
            both.pop().unwrap_or_default().into_iter().map(|i| (i.system_identifier, i)).collect();
        let ours = both.pop().unwrap_or_default();
        let common: Vec<Identity> =
            ours.into_iter().filter(|one| known.contains_key(&one.system_identifier)).collect();
        if common.is_empty() {
            let what = format!(
                "`{}` is another cluster in the first repository than in the second",
                self.from.repository.cluster()
            );
            let next = "Check both URLs and the cluster's name; `highwater init` claims the place in both.";
            return Err(Failure::new(Kind::Conflict, what, UNHARMED, next));
        }
        Ok(common)
    }

    fn transfer(&self) -> Transfer<'_> {
        Transfer { from: &self.from.repository, to: &self.to.repository }
    }

    /// Notes what is wrong with one object if that need not stop the others.
    fn troubled(&mut self, what: &str, error: CopyError) -> Result<(), Failure> {
        let side = if matches!(error, CopyError::From(_)) { self.from } else { self.to };
        let in_the = side.which.word();
        let error = match error.into_inner() {
            error @ (RepoError::Damaged { .. }
            | RepoError::NotReadable { .. }
            | RepoError::Conflict { .. }) => error,
            // Something else refers to it.
            error if error.is_absent() => error,
            error => return Err(failed_at(side, error, &format!("copy {what}"))),
        };
        let kind = kind_of_repo(&error);
        let trouble = Trouble {
            what: what.to_owned(),
            repository: in_the,
            kind: kind.word(),
            why: in_one_line(&error),
        };
        tracing::warn!("{what} was not copied: in the {in_the} repository, {}", trouble.why);
        self.report.note(trouble, kind, TROUBLES_NAMED_MAX);
        Ok(())
    }

    async fn check_stop(&mut self) -> Result<(), Failure> {
        let done = self.report.wal.objects;
        let next = "Run `highwater copy` again when it suits: it goes on where it stopped.";
        self.stop.check(|| format!("{done} objects of WAL were copied"), UNHARMED, next).await
    }
}

fn failed_at(side: &Side, error: RepoError, doing: &str) -> Failure {
    of_repo(error, format!("could not {doing} in {}", side.named()), UNHARMED)
}

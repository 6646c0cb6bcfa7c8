//! Storing into two repositories at the same time, so that neither holds up the other.
//!
//! ```text
//! both confirm                       done
//! one confirms, the other is away    done, and said: the other lacks it, until `copy` brings it (wal_copies = "any")
//! one confirms, the other refuses    a failure: other content, or another cluster, is nothing that passes
//! neither                            a failure
//! ```
//!
//! What the other lacks needs no bookkeeping: listings show it. One that was away a moment ago is not waited for again,
//! unless the other fails too.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};

use super::{Push, Report, Request, push_in_time, push_segment};
use crate::failure::{Failure, Kind};
use crate::ops::Which;
use crate::pg::SegmentName;
use crate::repo::Repository;

/// How long the other repository may take once one has confirmed: PostgreSQL waits meanwhile.
const OTHER_MAX: Duration = Duration::from_secs(10);

/// How long one that was away is not waited for again by this process; calls of their own go by the spool's note.
const AWAY_FOR: Duration = Duration::from_mins(1);

/// A second repository that takes all WAL as well.
#[derive(Debug)]
pub struct Second {
    repository: Repository,
    one_is_enough: bool,
    /// Which was away, and when.
    away: Mutex<Option<(Which, Instant)>>,
    /// Whether one lacks something since this was asked last.
    has_debt: AtomicBool,
}

impl Second {
    /// Will store into this repository as well; `one_is_enough` lets the server go on while either is away.
    pub fn new(repository: Repository, one_is_enough: bool) -> Self {
        let (away, has_debt) = (Mutex::default(), AtomicBool::new(false));
        Self { repository, one_is_enough, away, has_debt }
    }

    /// Returns the repository.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns whether something was stored in one repository only since this was asked last.
    pub fn take_debt(&self) -> bool {
        self.has_debt.swap(false, Ordering::SeqCst)
    }

    /// Returns whether this one was away a moment ago, and the other was not.
    pub(super) fn is_away(&self, request: &Request, which: Which) -> bool {
        self.away(request) == Some(which)
    }

    fn away(&self, request: &Request) -> Option<Which> {
        let known = *self.away.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.filter(|(_, at)| at.elapsed() < AWAY_FOR).map(|(which, _)| which);
        known.or_else(|| request.ahead.as_ref()?.away())
    }

    fn note_away(&self, request: &Request, which: Which) {
        *self.away.lock().unwrap_or_else(PoisonError::into_inner) = Some((which, Instant::now()));
        if let Some(ahead) = &request.ahead {
            ahead.note_away(which);
        }
    }
}

/// What is stored.
#[derive(Debug, Clone, Copy)]
pub(super) enum What {
    /// The file that was asked for, within its deadline.
    Asked,
    /// A segment that waits behind it.
    Ahead(SegmentName),
}

/// Pushes of one file: into the only repository, or into both.
#[derive(Clone, Copy)]
pub(super) struct Pushes<'a> {
    pub(super) first: Push<'a>,
    pub(super) second: Option<(&'a Second, Push<'a>)>,
}

impl<'a> Pushes<'a> {
    /// Returns the same for another file.
    pub(super) fn of<'b>(self, request: &'b Request) -> Pushes<'b>
    where
        'a: 'b,
    {
        Pushes {
            first: Push { request, ..self.first },
            second: self.second.map(|(second, push)| (second, Push { request, ..push })),
        }
    }

    fn into(self, which: Which) -> Push<'a> {
        match (which, self.second) {
            (Which::Second, Some((_, push))) => push,
            _ => self.first,
        }
    }
}

/// Stores a file.
///
/// # Errors
/// As for one repository. With two, that of one that refuses is told before that of one that is away.
pub(super) async fn push(pushes: Pushes<'_>, what: What) -> Result<Report, Failure> {
    let Some((second, _)) = pushes.second else { return one(pushes.first, what).await };
    let request = pushes.first.request;
    if second.one_is_enough
        && let Some(away) = second.away(request)
    {
        let near = away.other();
        match one(pushes.into(near), what).await {
            Ok(report) => {
                say_debt(second, &report, away, "it was away a moment ago");
                return Ok(report);
            }
            Err(failure) if failure.kind != Kind::Store => return Err(failure),
            // Now it is the other that is away.
            Err(failure) => {
                let far = one(pushes.into(away), what).await;
                return settle(second, request, near, Err(failure), far);
            }
        }
    }
    let (first, other) = (pushes.into(Which::First), pushes.into(Which::Second));
    let both = (std::pin::pin!(one(first, what)), std::pin::pin!(one(other, what)));
    let (in_first, in_second) = match select(both.0, both.1).await {
        Either::Left((in_first, rest)) => {
            let in_second = rest_of(rest, in_first.is_ok() && second.one_is_enough).await;
            (in_first, in_second)
        }
        Either::Right((in_second, rest)) => {
            let in_first = rest_of(rest, in_second.is_ok() && second.one_is_enough).await;
            (in_first, in_second)
        }
    };
    settle(second, request, Which::First, in_first, in_second)
}

async fn one(push: Push<'_>, what: What) -> Result<Report, Failure> {
    match what {
        What::Asked => Box::pin(push_in_time(push)).await,
        What::Ahead(segment) => Box::pin(push_segment(push, segment)).await,
    }
}

async fn rest_of(
    rest: impl Future<Output = Result<Report, Failure>>,
    is_bounded: bool,
) -> Result<Report, Failure> {
    if !is_bounded {
        return rest.await;
    }
    tokio::time::timeout(OTHER_MAX, rest).await.unwrap_or_else(|_| {
        Err(Failure::new(
            Kind::Store,
            format!("it did not confirm within {} s", OTHER_MAX.as_secs()),
            "The other repository has stored the file.",
            "`highwater check` tells more about the store.",
        ))
    })
}

/// Decides what two outcomes come to; `which` tells where the first of them is from.
fn settle(
    second: &Second,
    request: &Request,
    which: Which,
    here: Result<Report, Failure>,
    there: Result<Report, Failure>,
) -> Result<Report, Failure> {
    let (report, away, failure) = match (here, there) {
        (Ok(report), Ok(_)) => return Ok(report),
        (Ok(report), Err(failure)) => (report, which.other(), failure),
        (Err(failure), Ok(report)) => (report, which, failure),
        (Err(one), Err(other)) => {
            return Err(if one.kind == Kind::Store { other } else { one });
        }
    };
    if failure.kind != Kind::Store || !second.one_is_enough {
        return Err(failure.so(format!("in the {} repository", away.word())));
    }
    second.note_away(request, away);
    say_debt(second, &report, away, &failure.to_string());
    Ok(report)
}

fn say_debt(second: &Second, report: &Report, away: Which, why: &str) {
    second.has_debt.store(true, Ordering::SeqCst);
    tracing::warn!(
        "`{}` is stored in the {} repository only: the {} one is away ({why}); `highwater copy --wal` brings it there",
        report.name,
        away.other().word(),
        away.word(),
    );
}

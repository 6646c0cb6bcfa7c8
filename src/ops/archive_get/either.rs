//! Bringing a file back from whichever of two repositories has more of it.
//!
//! ```text
//! first \ second     whole      a part         absent         failed
//! whole              first      (not asked for)
//! a part             second     the longer     the part       FAILED
//! absent             second     the part       absent         FAILED
//! failed             second     FAILED         FAILED         FAILED
//! ```
//!
//! Absent, or the end of what there is, is said only if both have said so: PostgreSQL takes either for the end of the
//! archive, and the one that could not be asked may hold the rest.

use std::time::Duration;

use super::{Got, Report, Request, UNHARMED, get_from, hand_over};
use crate::failure::{Failure, Kind};
use crate::ops::Which;
use crate::repo::{Repository, SegmentSource};

/// How long one repository may take while there is another to be asked.
const ONE_OF_TWO_MAX: Duration = Duration::from_secs(20);

/// Brings a file back; see [`super::run`].
pub(super) async fn get(repository: &Repository, request: &Request) -> Result<Report, Failure> {
    let Some(second) = &request.second else {
        return hand_over(Box::pin(get_from(repository, request)).await?, request);
    };
    let away = request.ahead.as_ref().and_then(super::Ahead::away);
    let asked_first = if away == Some(Which::First) { Which::Second } else { Which::First };
    let of = |which: Which| if which == Which::First { repository } else { second };
    let here = get_in_time(of(asked_first), request, asked_first).await;
    if ends_it(&here, request) {
        return hand_over(here?, request);
    }
    let there = get_in_time(of(asked_first.other()), request, asked_first.other()).await;
    hand_over(better(here, there)?, request)
}

async fn get_in_time(
    repository: &Repository,
    request: &Request,
    which: Which,
) -> Result<Got, Failure> {
    let limit = ONE_OF_TWO_MAX.min(request.deadline / 3);
    let got = tokio::time::timeout(limit, Box::pin(get_from(repository, request))).await;
    let got = got.unwrap_or_else(|_| {
        let name = &request.name;
        let what = format!("`{name}` did not arrive within {} s", limit.as_secs());
        let next = "Look at the store's latency, or raise `archive_get_deadline`.";
        Err(Failure::new(Kind::Store, what, UNHARMED, next))
    });
    got.map_err(|failure| {
        if failure.kind == Kind::Absent {
            return failure;
        }
        if failure.kind == Kind::Store
            && let Some(ahead) = &request.ahead
        {
            ahead.note_away(which);
        }
        tracing::warn!("the {} repository: {failure}", which.word());
        failure.so(format!("in the {} repository", which.word()))
    })
}

/// Returns whether the other repository need not be asked: the file is there and complete, or what failed has nothing
/// to do with the repository.
fn ends_it(got: &Result<Got, Failure>, request: &Request) -> bool {
    match got {
        Ok(got) => !is_a_part(got),
        Err(failure) => {
            matches!(failure.kind, Kind::Disk | Kind::Bug)
                || crate::pg::WalFileName::parse(&request.name).is_err()
        }
    }
}

/// Returns whether the other repository may hold more of it.
fn is_a_part(got: &Got) -> bool {
    match got.source {
        Some(SegmentSource::Whole) | None => false,
        Some(SegmentSource::Pieces { .. } | SegmentSource::Partial { .. }) => true,
    }
}

fn valid_bytes(got: &Got) -> u64 {
    match got.source {
        Some(SegmentSource::Pieces { valid_bytes } | SegmentSource::Partial { valid_bytes }) => {
            valid_bytes
        }
        Some(SegmentSource::Whole) | None => u64::MAX,
    }
}

/// Decides between what two repositories said, by the table above.
fn better(here: Result<Got, Failure>, there: Result<Got, Failure>) -> Result<Got, Failure> {
    match (here, there) {
        (Ok(one), Ok(other)) => {
            Ok(if valid_bytes(&one) >= valid_bytes(&other) { one } else { other })
        }
        (Ok(whole), Err(_)) | (Err(_), Ok(whole)) if !is_a_part(&whole) => Ok(whole),
        (Ok(part), Err(failure)) | (Err(failure), Ok(part)) => {
            if failure.kind == Kind::Absent {
                Ok(part)
            } else {
                Err(unknown(failure))
            }
        }
        (Err(one), Err(other)) => {
            let failed = if one.kind == Kind::Absent { other } else { one };
            Err(if failed.kind == Kind::Absent { failed } else { unknown(failed) })
        }
    }
}

/// Says what is to be done where one repository cannot tell.
fn unknown(failure: Failure) -> Failure {
    let next = format!(
        "{} Recovery goes on from this point when the server is started again. If that repository is lost for good, leave it out: write `--only first` or `--only second` into restore_command, and recovery ends where the other one does.",
        failure.next
    );
    Failure { next, ..failure }
}

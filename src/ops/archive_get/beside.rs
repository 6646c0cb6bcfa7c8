//! Bringing WAL back that is on this host only, because the store could not take it.
//!
//! What lies in the spool is looked at first: it is whole, where the store may hold pieces of it, and it is there while the
//! store is away. What cannot be read there is never taken for absent.

use super::{Report, Request, run};
use crate::failure::{Failure, Kind};
use crate::ops::stall::Stall;
use crate::repo::Repository;

/// As [`run`], with what `stall` keeps on this host.
///
/// # Errors
/// As [`run`]. [`Kind::Absent`] only if neither has it.
pub async fn run_beside(
    repository: &Repository,
    request: &Request,
    stall: Option<&Stall>,
) -> Result<Report, Failure> {
    let Some(held) = stall.and_then(held) else { return run(repository, request).await };
    let spool = match held {
        Ok(spool) => spool,
        Err(unknown) => return or_else(run(repository, request).await, unknown),
    };
    let local = Request { second: None, ..request.clone() };
    match run(&spool, &local).await {
        Ok(report) => {
            tracing::info!("`{}` was brought from the spool of this host", report.name);
            Ok(report)
        }
        Err(failure) if failure.kind == Kind::Absent => run(repository, request).await,
        Err(failure) => or_else(run(repository, request).await, failure),
    }
}

/// Says that a file is absent only if nothing kept us from finding out.
fn or_else(outcome: Result<Report, Failure>, unknown: Failure) -> Result<Report, Failure> {
    match outcome {
        Err(failure) if failure.kind == Kind::Absent => Err(unknown),
        outcome => {
            tracing::warn!("the spool of this host could not be read: {unknown}");
            outcome
        }
    }
}

/// Returns the little repository, if it holds any WAL.
fn held(stall: &Stall) -> Option<Result<Repository, Failure>> {
    let spool = stall.spool.as_ref()?;
    let found = stall.find().and_then(|directory| match directory {
        Some(directory) => Ok(stall.held_in(&directory)?.files > 0),
        None => Ok(false),
    });
    match found {
        Ok(false) => None,
        Ok(true) => Some(Ok(spool.repository.clone())),
        Err(failure) => Some(Err(failure)),
    }
}

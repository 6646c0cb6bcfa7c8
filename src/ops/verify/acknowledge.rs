//! `verify --acknowledge`: somebody knows of a loss, so that the next one can be told from it.

use super::{REPORTS_KEPT, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{Acknowledgement, FORMAT_VERSION};
use crate::ops::failures::of_repo;
use crate::ops::{TOOL, current_identity, now};
use crate::repo::{RepoError, Repository};

const MAY_STAND: &str = "Nothing was deleted. The acknowledgement may stand all the same: the same command again tells, and harms nothing.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct AcknowledgeRequest {
    /// The finding.
    pub finding: String,
    /// Why it is accepted.
    pub reason: String,
    /// The name of this host, for the record.
    pub host: String,
}

/// Records that a finding of an earlier run is known. Acknowledged once, it stays so; a loss that is larger, or another's,
/// is another finding.
///
/// # Errors
/// [`Kind::Absent`] if no report that is kept names it; [`Kind::Conflict`] if it was acknowledged before.
pub async fn acknowledge(
    repository: &Repository,
    request: &AcknowledgeRequest,
) -> Result<Acknowledgement, Failure> {
    current_identity(repository, UNHARMED).await?;
    let id = &request.finding;
    let failed = |error| of_repo(error, format!("could not acknowledge `{id}`"), UNHARMED);
    let reports = repository.verifications(REPORTS_KEPT).await.map_err(failed)?;
    let found = reports.iter().flat_map(|report| &report.findings).find(|one| one.id == *id);
    let Some(found) = found else {
        return Err(Failure::new(
            Kind::Absent,
            format!("no report of verify names a finding `{id}`"),
            UNHARMED,
            "Run `highwater verify`, and acknowledge findings by the name that it prints.",
        ));
    };
    let one = Acknowledgement {
        format: FORMAT_VERSION,
        finding: id.clone(),
        what: found.what.clone(),
        consequence: found.consequence.clone(),
        acknowledged_at: now(),
        reason: request.reason.clone(),
        host: request.host.clone(),
        tool: TOOL.to_owned(),
    };
    let failed = |error| of_repo(error, format!("could not acknowledge `{id}`"), MAY_STAND);
    match repository.put_acknowledgement(&one).await {
        Ok(_) => Ok(one),
        Err(RepoError::Conflict { .. }) => Err(Failure::new(
            Kind::Conflict,
            format!("`{id}` was acknowledged before"),
            UNHARMED,
            "`highwater verify` shows by whom and why; nothing is to be done.",
        )),
        Err(error) => Err(failed(error)),
    }
}

//! `init`: claim a place in the repository for one cluster.
//!
//! The claim is the object `identity/<system id>.json`, created once. Two
//! clusters that claim at the same moment have two names, so each looks again
//! after its create, and so does every later `init`: at least one of them sees the other and withdraws.

use std::path::PathBuf;
use std::time::SystemTime;

use serde::Serialize;

use super::failures::{of_postgres, of_repo};
use super::server_facts::{check_segment_size, check_version};
use super::{TOOL, control_of, key_taker, now};
use crate::failure::{Failure, Kind};
use crate::format::{ENCRYPTED_IDENTITY_VERSION, Encryption, FORMAT_VERSION, Identity};
use crate::pg::{SegmentSize, ServerVersion, SystemId};
use crate::repo::{Claim, RepoError, Repository, claim_of};
use crate::store::Key;
use crate::store::open::probe;
use crate::walsender::{ConnInfo, Connection, Mode};

const UNHARMED: &str = "The place was not claimed, and nothing in the repository was changed.";

/// Said once a claim was tried: its create may have taken effect though the answer was lost.
const UNSETTLED: &str = "No other cluster's data was touched. Whether the place is claimed now is not known; `init` may be repeated and settles it.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The server to ask who it is.
    pub server: ConnInfo,
    /// The data directory to read it from instead, if one was given.
    pub pgdata: Option<PathBuf>,
    /// Claim the place as the successor of the cluster that lives there.
    pub successor: bool,
    /// The name of this host, for the record.
    pub host: String,
}

/// What was done.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The cluster's name.
    pub cluster: String,
    /// The repository's URL.
    pub repository: String,
    /// The system identifier.
    pub system_identifier: SystemId,
    /// The WAL segment size in bytes.
    pub wal_segment_bytes: u64,
    /// The major version.
    pub postgres_major: u32,
    /// Whether this call claimed the place; false if it was ours already.
    pub claimed: bool,
    /// Whether everything stored in it is encrypted.
    pub encrypted: bool,
}

/// Who the cluster is.
struct Who {
    system_id: SystemId,
    segment_size: SegmentSize,
    major: u32,
}

/// Claims the place.
pub async fn run(repository: &Repository, request: &Request) -> Result<Report, Failure> {
    let who = match &request.pgdata {
        Some(pgdata) => who_is_in(pgdata)?,
        None => who_is_at(&request.server).await?,
    };
    check_version("cluster", who.major, UNHARMED)?;
    let not_read = |error| {
        let what = format!("could not read who owns `{}`", repository.cluster());
        of_repo(error, what, UNHARMED)
    };
    let standing = repository.identities().await.map_err(not_read)?;
    if let Some(ours) = standing.iter().find(|known| known.system_identifier == who.system_id) {
        check_segment_size("cluster", who.segment_size, ours, UNHARMED)?;
        return settle(repository, &standing, ours, false).await;
    }
    let owner = claim_of(&standing);
    let mut identity = claimable(repository, request, &who, owner)?;
    check_store(repository).await?;
    let encryption = encryption(repository, request, &who, owner.is_none()).await;
    if let Some(encryption) = encryption.map_err(|error| not_settled(repository, error))? {
        identity = Identity {
            format: ENCRYPTED_IDENTITY_VERSION,
            encryption: Some(encryption),
            ..identity
        };
    }
    let (ours, claimed) = match repository.claim(&identity).await {
        Ok(Claim::Claimed) => (identity, true),
        Ok(Claim::AlreadyOurs(standing)) => (standing, false),
        Err(error) => return Err(not_settled(repository, error)),
    };
    let after = repository.identities().await.map_err(|error| not_settled(repository, error))?;
    settle(repository, &after, &ours, claimed).await
}

/// Makes sure that a claim which stands is the only one.
///
/// This is looked at again by every later `init`, because the call that claimed may have died,
/// or lost its answer, before it could look.
async fn settle(
    repository: &Repository,
    standing: &[Identity],
    ours: &Identity,
    claimed: bool,
) -> Result<Report, Failure> {
    let rival = standing.iter().find(|other| {
        other.system_identifier != ours.system_identifier && other.incarnation == ours.incarnation
    });
    let Some(rival) = rival else { return Ok(report(repository, ours, claimed)) };
    // A claim under which WAL was stored is evidence, and no longer ours to take back.
    let wal = Key::new(repository.place().wal_dir(ours.system_identifier));
    let level = repository.store().list_level(&wal).await;
    let level = level.map_err(|error| not_settled(repository, error.into()))?;
    if level.directories.is_empty() && level.objects.is_empty() {
        withdraw(repository, ours).await;
    }
    Err(other_cluster(repository, rival.system_identifier, ours.system_identifier))
}

fn not_settled(repository: &Repository, error: RepoError) -> Failure {
    let what = format!("could not claim `{}` in {}", repository.cluster(), repository.describe());
    of_repo(error, what, UNSETTLED)
}

fn who_is_in(pgdata: &std::path::Path) -> Result<Who, Failure> {
    let control = control_of(pgdata).ok_or_else(|| {
        Failure::new(
            Kind::Usage,
            format!("`{}` has no readable global/pg_control", pgdata.display()),
            UNHARMED,
            "Give the cluster's data directory with `--pgdata`, and run as a user who may read it.",
        )
    })?;
    Ok(Who {
        system_id: control.system_id,
        segment_size: control.wal_segment_size,
        major: control.version.0,
    })
}

async fn who_is_at(server: &ConnInfo) -> Result<Who, Failure> {
    let failed = |error| {
        let mut failure =
            of_postgres(error, "could not ask the server which cluster it is", UNHARMED);
        failure.next.push_str(" With `--pgdata DIR` no connection is needed.");
        failure
    };
    let mut connection = Connection::connect(server, Mode::Sql).await.map_err(failed)?;
    let system = connection
        .query("SELECT system_identifier FROM pg_catalog.pg_control_system()")
        .await
        .map_err(failed)?;
    let size = connection.show("wal_segment_size").await.map_err(failed)?;
    let version = ServerVersion(connection.server_version_num());
    connection.close().await;
    // The function shows the number as a signed one.
    let system_id = system.first().and_then(|text| text.parse::<i64>().ok());
    let system_id = system_id.map(|number| SystemId(number.cast_unsigned()));
    match (system_id, SegmentSize::parse_setting(&size)) {
        (Some(system_id), Some(segment_size)) => {
            Ok(Who { system_id, segment_size, major: version.major().0 })
        }
        _ => Err(Failure::new(
            Kind::Postgres,
            "the server's answer to who it is makes no sense",
            UNHARMED,
            "Check that the address is PostgreSQL's own and not a pooler's.",
        )),
    }
}

/// Returns the identity to claim the place with, or why it may not be claimed.
fn claimable(
    repository: &Repository,
    request: &Request,
    who: &Who,
    owner: Option<&Identity>,
) -> Result<Identity, Failure> {
    match (owner, request.successor) {
        (Some(owner), false) => {
            return Err(other_cluster(repository, owner.system_identifier, who.system_id));
        }
        (None, true) => {
            return Err(Failure::new(
                Kind::Usage,
                format!("`{}` has no cluster that could be succeeded", repository.cluster()),
                UNHARMED,
                "Check repository URL and cluster name; for a new place leave `--successor` out.",
            ));
        }
        (Some(owner), true) if owner.postgres_major > who.major => {
            return Err(Failure::new(
                Kind::Conflict,
                format!(
                    "`{}` belongs to a cluster of PostgreSQL {}, which one of {} cannot succeed",
                    repository.cluster(),
                    owner.postgres_major,
                    who.major
                ),
                UNHARMED,
                "Only pg_upgrade makes a successor, and it goes upwards. Choose another cluster name.",
            ));
        }
        _ => {}
    }
    Ok(Identity {
        format: FORMAT_VERSION,
        encryption: None,
        cluster: repository.cluster().clone(),
        system_identifier: who.system_id,
        segment_size: who.segment_size,
        postgres_major: who.major,
        incarnation: owner.map_or(1, |owner| owner.incarnation + 1),
        succeeds: owner.map(|owner| owner.system_identifier),
        claimed_at: now(),
        claimed_by: request.host.clone(),
        tool: TOOL.to_owned(),
    })
}

/// Returns what the identity says about encryption, if a key is set; the first claim of a place makes its first
/// repository key.
async fn encryption(
    repository: &Repository,
    request: &Request,
    who: &Who,
    is_free: bool,
) -> Result<Option<Encryption>, RepoError> {
    let taker = key_taker(request.host.clone());
    repository.encryption_for_claim(who.system_id, is_free, &taker).await
}

fn other_cluster(repository: &Repository, owner: SystemId, ours: SystemId) -> Failure {
    let cluster = repository.cluster().to_string();
    let error = RepoError::OtherCluster { cluster, owner, ours };
    let what = format!("`{}` in {} is taken", repository.cluster(), repository.describe());
    of_repo(error, what, UNHARMED)
}

/// Tries what every later write relies on.
async fn check_store(repository: &Repository) -> Result<(), Failure> {
    let nonce = super::nonce();
    let found = probe(&**repository.store(), &nonce, SystemTime::now()).await;
    for (step, result) in found.steps {
        let Err(error) = result else { continue };
        let what = format!("{} cannot {}", repository.describe(), step.title());
        let next = if found.conditional_put == Some(false) {
            "This store replaces objects although it is asked not to. If only one host ever writes to this place, set the store option `conditional_put = \"off\"`: Highwater then looks before it writes, which two writers at once can defeat."
        } else {
            "Check the credentials and that they may read, write, list and delete below the repository's prefix."
        };
        return Err(Failure::new(Kind::Store, what, UNHARMED, next).because(error));
    }
    Ok(())
}

async fn withdraw(repository: &Repository, identity: &Identity) {
    let key = Key::new(repository.place().identity(identity.system_identifier));
    if let Err(error) = repository.store().delete(&key).await {
        tracing::warn!("`{key}` could not be withdrawn: {error}");
    }
}

fn report(repository: &Repository, identity: &Identity, claimed: bool) -> Report {
    Report {
        cluster: repository.cluster().to_string(),
        repository: repository.describe(),
        system_identifier: identity.system_identifier,
        wal_segment_bytes: identity.segment_size.bytes(),
        postgres_major: identity.postgres_major,
        claimed,
        encrypted: identity.encryption.is_some(),
    }
}

//! `archive-get`: bring one WAL file back, checked before PostgreSQL sees it.
//!
//! "Absent" is said only when the store itself said so and the repository's own
//! identity was seen; everything else is another exit code, because PostgreSQL takes
//! "absent" for the end of the archive and may end recovery there.

mod ahead;
mod beside;
mod either;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::ahead::{fetch_ahead, stand_by, take_fetched, wants_fetching};
pub use self::beside::run_beside;
use super::ahead::Ahead;
use super::failures::{of_disk, of_repo};
use super::{control_of, current_identity};
use crate::failure::{Failure, Kind};
use crate::format::WalObject;
use crate::pg::{
    Lsn, PageHeader, SegmentName, SegmentSize, SystemId, TimelineHistory, WalFileName,
};
use crate::pgdata::{DiskError, Durability, Existing, StagedFile, sweep};
use crate::repo::{RepoError, Repository, SegmentSource};

const UNHARMED: &str = "Nothing was handed to PostgreSQL: the file is put in its place only when it is whole and checked.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The file's name, PostgreSQL's `%f`.
    pub name: String,
    /// Where to put it, PostgreSQL's `%p`.
    pub target: PathBuf,
    /// The data directory; PostgreSQL runs `restore_command` in it.
    pub data_directory: PathBuf,
    /// How long all of it may take.
    pub deadline: Duration,
    /// Whether segments may be taken from those that were fetched ahead.
    pub ahead: Option<Ahead>,
    /// A second repository, to be asked where the first does not have it, or cannot be asked.
    pub second: Option<Repository>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The file.
    pub name: WalFileName,
    /// For a segment, what stood for it.
    pub source: Option<SegmentSource>,
}

/// Whose WAL is wanted.
#[derive(Debug, Clone, Copy)]
struct Lineage {
    system_id: SystemId,
    segment_size: SegmentSize,
}

/// Brings one WAL file back.
///
/// # Errors
/// [`Kind::Absent`] only for certain absence.
pub async fn run(repository: &Repository, request: &Request) -> Result<Report, Failure> {
    let got = tokio::time::timeout(request.deadline, either::get(repository, request)).await;
    got.unwrap_or_else(|_| {
        Err(Failure::new(
            Kind::Store,
            format!("`{}` did not arrive within {} s", request.name, request.deadline.as_secs()),
            UNHARMED,
            "Recovery stops here and goes on from this point when the server is started again. Look at the store's latency, or raise `archive_get_deadline`.",
        ))
    })
}

/// A file that was brought and checked, and stands beside its place still.
struct Got {
    name: WalFileName,
    staged: StagedFile,
    /// For a segment, what stood for it.
    source: Option<SegmentSource>,
}

async fn get_from(repository: &Repository, request: &Request) -> Result<Got, Failure> {
    let name = WalFileName::parse(&request.name).map_err(|error| {
        Failure::new(
            Kind::Usage,
            format!("`{}` is not a WAL file", request.name),
            UNHARMED,
            "restore_command must be `highwater archive-get %f %p`.",
        )
        .because(error)
    })?;
    let lineage = match control_of(&request.data_directory) {
        Some(control) => {
            Lineage { system_id: control.system_id, segment_size: control.wal_segment_size }
        }
        None => {
            let identity = current_identity(repository, UNHARMED)
                .await
                .map_err(|failure| failure.so(not_brought(&request.name)))?;
            let segment_size = identity.segment_size;
            Lineage { system_id: identity.system_identifier, segment_size }
        }
    };
    let (staged, source) = match name {
        WalFileName::Segment(segment) => {
            let (staged, source) = get_segment(repository, request, lineage, segment).await?;
            (staged, Some(source))
        }
        WalFileName::Partial(_) => (get_as_it_is(repository, request, lineage, name).await?, None),
        WalFileName::Backup(..) | WalFileName::History(_) => {
            (get_small(repository, request, lineage, name).await?, None)
        }
    };
    Ok(Got { name, staged, source })
}

async fn get_segment(
    repository: &Repository,
    request: &Request,
    lineage: Lineage,
    segment: SegmentName,
) -> Result<(StagedFile, SegmentSource), Failure> {
    let size = lineage.segment_size;
    let mut staged = stage(&request.target)?;
    let mut head = Vec::with_capacity(crate::pg::LONG_PAGE_HEADER_BYTES);
    let sink = |block: &[u8]| {
        let missing = head.capacity() - head.len();
        head.extend_from_slice(&block[..missing.min(block.len())]);
        staged.append(block).map_err(std::io::Error::other)
    };
    let source = repository
        .fetch_segment(lineage.system_id, segment, size, sink)
        .await
        .map_err(|error| not_got(repository, &request.name, error))?
        .ok_or_else(|| absent(repository, &request.name))?;
    check_first_page(&head, lineage, segment).map_err(|why| {
        Failure::new(
            Kind::Integrity,
            format!("what is stored as `{segment}` is not that segment: {why}"),
            UNHARMED,
            "Keep the object for inspection. If another copy of the segment exists, put it into pg_wal by hand; else restore to a point before it.",
        )
    })?;
    Ok((staged, source))
}

fn check_first_page(head: &[u8], lineage: Lineage, segment: SegmentName) -> Result<(), String> {
    let page = PageHeader::parse(head).map_err(|error| error.to_string())?;
    let start: Option<Lsn> = segment.start_lsn(lineage.segment_size);
    if Some(page.address) != start {
        return Err(format!("its first page has address {}", page.address));
    }
    if page.timeline > segment.timeline {
        return Err(format!("its first page is of timeline {}", page.timeline));
    }
    match page.cluster {
        Some(cluster) if cluster.system_id != lineage.system_id => {
            Err(format!("it belongs to the cluster with system identifier {}", cluster.system_id))
        }
        Some(_) => Ok(()),
        None => Err("its first page has no long header".to_owned()),
    }
}

async fn get_as_it_is(
    repository: &Repository,
    request: &Request,
    lineage: Lineage,
    name: WalFileName,
) -> Result<StagedFile, Failure> {
    let key = repository.wal_key(lineage.system_id, WalObject::File(name));
    let mut staged = stage(&request.target)?;
    let sink = |block: &[u8]| staged.append(block).map_err(std::io::Error::other);
    match repository.fetch(&key, sink).await {
        Ok(_) => Ok(staged),
        Err(error) if error.is_absent() => {
            super::claimed_identity(repository, lineage.system_id, UNHARMED)
                .await
                .map_err(|failure| failure.so(not_brought(&request.name)))?;
            Err(absent(repository, &request.name))
        }
        Err(error) => Err(not_got(repository, &request.name, error)),
    }
}

async fn get_small(
    repository: &Repository,
    request: &Request,
    lineage: Lineage,
    name: WalFileName,
) -> Result<StagedFile, Failure> {
    let bytes = repository
        .fetch_small(lineage.system_id, name)
        .await
        .map_err(|error| not_got(repository, &request.name, error))?
        .ok_or_else(|| absent(repository, &request.name))?;
    if let WalFileName::History(timeline) = name {
        // An empty or garbled history would make PostgreSQL believe in other ancestors.
        TimelineHistory::parse(timeline, &bytes).map_err(|error| {
            Failure::new(
                Kind::Integrity,
                format!("what is stored as `{name}` is not a timeline history"),
                UNHARMED,
                "Keep the object for inspection; restore with `--timeline` to another timeline, or with the file from another copy.",
            )
            .because(error)
        })?;
    }
    let mut staged = stage(&request.target)?;
    staged.append(&bytes).map_err(|error| not_written(error, &request.target))?;
    Ok(staged)
}

fn stage(target: &Path) -> Result<StagedFile, Failure> {
    // What a killed call left is of no use to anybody.
    let _ = sweep(target);
    StagedFile::create(target).map_err(|error| not_written(error, target))
}

/// Hands the file to PostgreSQL.
fn hand_over(got: Got, request: &Request) -> Result<Report, Failure> {
    let Got { name, staged, source } = got;
    publish(staged, &request.target)?;
    Ok(Report { name, source })
}

fn publish(staged: StagedFile, target: &Path) -> Result<(), Failure> {
    // PostgreSQL renames the file durably itself; after a crash it asks again.
    staged.publish(Durability::None, Existing::Replace).map_err(|error| not_written(error, target))
}

fn not_written(error: DiskError, target: &Path) -> Failure {
    of_disk(error, format!("could not write `{}`", target.display()), UNHARMED)
}

fn not_brought(name: &str) -> String {
    format!("`{name}` was not brought back")
}

fn not_got(repository: &Repository, name: &str, error: RepoError) -> Failure {
    let what = format!("could not bring `{name}` back from {}", repository.describe());
    of_repo(error, what, UNHARMED)
}

fn absent(repository: &Repository, name: &str) -> Failure {
    Failure::new(
        Kind::Absent,
        format!("`{name}` is not in the archive of `{}`", repository.cluster()),
        UNHARMED,
        "Nothing, as a rule: PostgreSQL asks for the file after the last one to find the end of the archive.",
    )
}

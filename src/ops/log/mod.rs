//! `log`: what archived WAL tells, to find the moment to go back to.
//!
//! ```text
//! inventory, histories -> way -> plan::log::route: segments and gaps
//!   scan.rs     segment -> fetched, walked, folded (some at a time; headers say which need not be read)
//!   reading.rs  joined over borders, in order -> plan::log::order
//!   names.rs    files -> names, from the nearest backups' catalogs (catalog.rs) or a server (server_names.rs)
//!   telling.rs  what is wanted -> lines
//! before_drop.rs  the last moment a table stood: rows of pg_class followed from a backup on
//! ```
//!
//! Nothing is changed anywhere. Memory does not grow with WAL: see the bounds in `plan::log`.

mod before_drop;
mod catalog;
mod names;
mod reading;
mod scan;
mod server_names;
mod telling;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::current_identity;
use super::failures::of_repo;
use super::wal_times::histories_of;
use crate::failure::{Failure, Kind};
use crate::format::{Committed, Identity};
use crate::pg::{SegmentName, Timeline, TimelineHistory};
use crate::plan::log::filter::{Filter, RelationChoice};
use crate::plan::log::fold::Keep;
use crate::plan::log::route::Route;
use crate::plan::target::TimelineChoice;
use crate::repo::{RepoError, Repository, WalInventory};
use crate::walsender::ConnInfo;

pub use before_drop::{BeforeDrop, DropFound, before_drop};
pub use telling::{
    DatabaseName, DroppedDatabase, EndLine, Line, RelationLine, RelationName, Removal, RemovedLine,
    TableName, Told, TransactionLine,
};

const UNHARMED: &str = "Nothing was changed.";

/// Where names come from.
#[derive(Debug, Clone)]
pub enum NamesFrom {
    /// From the catalogs of backups.
    Backup,
    /// From this server, as it is now.
    Server(Box<ConnInfo>),
    /// Nowhere: files are told by number.
    Nowhere,
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The timeline whose way is read.
    pub timeline: TimelineChoice,
    /// What is wanted.
    pub filter: Filter,
    /// Only transactions that touched or removed this relation.
    pub relation: Option<RelationChoice>,
    /// Only transactions in this database: a name or an OID.
    pub database: Option<String>,
    /// Oldest first instead of newest first.
    pub oldest_first: bool,
    /// So many lines at most.
    pub limit: Option<u64>,
    /// Where names come from.
    pub names: NamesFrom,
}

/// What the repository holds, as far as it is needed.
struct Holdings {
    identity: Identity,
    /// Oldest first.
    backups: Vec<Committed>,
    inventory: WalInventory,
    histories: BTreeMap<Timeline, TimelineHistory>,
    way: TimelineHistory,
}

/// Reads WAL and tells it line by line; the last is [`Line::End`].
///
/// # Errors
/// [`Kind::Absent`] where no WAL is stored or the timeline is not known. A gap or a damaged segment is no failure: it is
/// told, and counted in what is returned.
pub async fn run(
    repository: &Repository,
    request: &Request,
    listener: &mut (dyn FnMut(&Line) -> Result<Told, Failure> + Send),
) -> Result<EndLine, Failure> {
    let holdings = gather(repository, request.timeline).await?;
    let names = match &request.names {
        NamesFrom::Nowhere => names::Names::None,
        NamesFrom::Backup => {
            let on_way = holdings.on_way().into_iter().cloned().collect();
            names::Names::Backups(names::BackupNames::new(repository, on_way))
        }
        NamesFrom::Server(server) => {
            let system_id = holdings.identity.system_identifier;
            let asked =
                server_names::ServerNames::ask(ConnInfo::clone(server), system_id, UNHARMED)
                    .await?;
            names::Names::Server(Box::new(asked))
        }
    };
    let order = if request.oldest_first { Keep::Oldest } else { Keep::Newest };
    let source = holdings.source(repository, &request.filter, order);
    let mut teller = telling::Teller {
        way: &holdings.way,
        filter: &request.filter,
        relation: request.relation.as_ref(),
        database: request.database.as_deref(),
        limit: request.limit,
        names,
        listener,
        end: EndLine { lines: 0, gaps: 0, complete: false, unnamed_relations: 0 },
        unnamed: BTreeSet::new(),
    };
    let route = holdings.route();
    reading::Reader::new(&source, &mut teller).run(&route).await?;
    teller.finish()
}

async fn gather(repository: &Repository, choice: TimelineChoice) -> Result<Holdings, Failure> {
    let identity = current_identity(repository, UNHARMED).await?;
    let failed = |error: RepoError| {
        of_repo(error, format!("could not take stock of {}", repository.describe()), UNHARMED)
    };
    let (system_id, size) = (identity.system_identifier, identity.segment_size);
    let found = repository.committed_backups(system_id).await.map_err(failed)?;
    for unreadable in &found.unreadable {
        tracing::warn!(
            "backup {} cannot be read, so it names nothing: {}",
            unreadable.id,
            unreadable.why
        );
    }
    let inventory = repository.wal_inventory(system_id, size).await.map_err(failed)?;
    let histories =
        histories_of(repository, system_id, inventory.histories.clone()).await.map_err(failed)?;
    let way = way_to(choice, &found.readable, &inventory, &histories)?;
    Ok(Holdings { identity, backups: found.readable, inventory, histories, way })
}

/// Chooses the way as a restore does; but WAL can be told without any backup.
fn way_to(
    choice: TimelineChoice,
    backups: &[Committed],
    inventory: &WalInventory,
    histories: &BTreeMap<Timeline, TimelineHistory>,
) -> Result<TimelineHistory, Failure> {
    let stored = inventory.timelines.keys().chain(histories.keys()).copied();
    let newest = stored.chain(backups.last().map(|backup| backup.stop_timeline)).max();
    let timeline = match choice {
        TimelineChoice::Number(timeline) => Some(timeline),
        TimelineChoice::Latest => newest,
        TimelineChoice::Current => backups.last().map(|backup| backup.stop_timeline).or(newest),
    };
    let Some(timeline) = timeline else {
        return Err(Failure::new(
            Kind::Absent,
            "no WAL is stored",
            UNHARMED,
            "Set up archive_command or `highwater receive`; `highwater check` tries the whole path.",
        ));
    };
    match histories.get(&timeline) {
        Some(history) => Ok(history.clone()),
        None if timeline == Timeline::FIRST => Ok(TimelineHistory::first()),
        None => Err(Failure::new(
            Kind::Absent,
            format!("the history file of timeline {timeline} is not in the repository"),
            UNHARMED,
            "`highwater info` lists the timelines; `--timeline` chooses one.",
        )),
    }
}

impl Holdings {
    fn route(&self) -> Route {
        let partials: BTreeMap<Timeline, Vec<SegmentName>> = self
            .inventory
            .timelines
            .iter()
            .map(|(timeline, wal)| (*timeline, wal.partials.clone()))
            .collect();
        let size = self.identity.segment_size;
        Route::along(&self.way, &self.inventory.coverage(), &partials, size)
    }

    /// Returns the backups that lie on the way, oldest first.
    fn on_way(&self) -> Vec<&Committed> {
        let on_way = |backup: &&Committed| crate::plan::restore::lies_on(&self.way, backup);
        self.backups.iter().filter(on_way).collect()
    }

    fn source(&self, repository: &Repository, filter: &Filter, order: Keep) -> scan::Source {
        scan::Source {
            repository: repository.clone(),
            system_id: self.identity.system_identifier,
            size: self.identity.segment_size,
            filter: Arc::new(filter.clone()),
            order,
        }
    }
}

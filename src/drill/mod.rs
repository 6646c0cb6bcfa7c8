//! `drill`: restore, start, replay, ask, and say how long it took.
//!
//! A room of its own beside `ops`, since it runs the use case `restore` and a server of its own.
//!
//! ```text
//! scratch directory claimed (scratch.rs) -> guarded (guard.rs)
//!   -> backup and target chosen, WAL read for tablespaces that replay would make elsewhere  (ops::restore)
//!   -> files restored (ops::restore) -> settings of its own -> private server -> target (replay.rs)
//!   -> checks (checks.rs) -> server stopped, files removed -> record stored
//! ```
//!
//! The server can be reached over a socket in a directory that nobody else may enter, and reaches nobody itself
//! (`plan::drill`). Whatever ends a drill early (watch.rs), the server is stopped and the files are removed. Never
//! here: what a restore does, what is decided.

mod binaries;
mod checks;
mod guard;
mod phases;
mod replay;
mod scratch;
mod server;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::failure::{Failure, Kind};
use crate::format::{BackupId, Drill, DrillFailure, DrillOutcome, FORMAT_VERSION};
use crate::ops::failures::{of_disk, of_repo, of_task};
use crate::ops::restore::{self, Planned};
use crate::ops::{Progress, StopRequest, TOOL, now};
use crate::pg::ServerVersion;
use crate::pgdata::{DiskError, Owner, free_bytes, last_value};
use crate::plan::drill::{ROOM_BESIDE_FILES_BYTES, random_moment};
use crate::plan::target::{RecoveryPoint, RecoveryTarget, TargetAction, TimelineChoice};
use crate::repo::Repository;
use binaries::Binaries;
use checks::{Checking, UserCheck, read_user_checks};
use guard::Guard;
pub use guard::{GUARD_COMMAND, guard};
use phases::{Phases, millis};
use scratch::{Scratch, ScratchError};
use server::Launch;
use watch::Watch;

const UNHARMED: &str =
    "The repository is as it was, and no server or file but the drill's own was touched.";

/// What a drill goes to.
#[derive(Debug, Clone)]
pub enum Goal {
    /// A target, as `restore` has it; its action does not count.
    Target(RecoveryTarget),
    /// A random moment of those that can be reached; the seed makes it the same again.
    RandomMoment {
        /// The seed.
        seed: u64,
    },
}

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The restore as it would be asked for: its backup, jobs, memory, program and flags count; the drill says itself
    /// where it goes and to what target.
    pub restore: restore::Request,
    /// Where recovery goes.
    pub goal: Goal,
    /// The scratch directory; absolute.
    pub scratch: PathBuf,
    /// Leave files and logs there.
    pub keep: bool,
    /// The directory of PostgreSQL's programs, if it was named.
    pub bindir: Option<PathBuf>,
    /// The search path in which they are looked for else.
    pub search_path: String,
    /// Whose the server shall be, where root runs the drill; else the owner of the scratch directory.
    pub owner: Option<Owner>,
    /// The directory of the user's own checks.
    pub checks: Option<PathBuf>,
    /// How long recovery and checks may take together.
    pub timeout: Duration,
    /// The room that must stay free on the file system of the scratch directory, in bytes.
    pub free_bytes_min: u64,
    /// `shared_preload_libraries` of the private server.
    pub preload: String,
    /// Variables of this process that the server must not have.
    pub without_variables: Vec<String>,
    /// This host.
    pub host: String,
}

/// What came of it.
#[derive(Debug)]
pub struct Report {
    /// What is on record.
    pub drill: Drill,
    /// Why the record could not be stored.
    pub not_stored: Option<Failure>,
    /// What ended the drill before its checks were over, or kept it from clearing up.
    pub failure: Option<Failure>,
}

impl Report {
    /// Returns what the exit code says: what ended the drill, else [`Kind::Integrity`] if a check failed.
    pub fn failed(&self) -> Option<Kind> {
        let ended = self.failure.as_ref().map(|failure| failure.kind);
        let failed = (self.drill.outcome == DrillOutcome::Failed).then_some(Kind::Integrity);
        ended.or(failed).or(self.not_stored.as_ref().map(|failure| failure.kind))
    }
}

/// Drills.
///
/// # Errors
/// [`Kind::Usage`], [`Kind::Conflict`] and [`Kind::Absent`] for what cannot be begun, and [`Kind::Stopped`]; none of
/// these is put on record. What was found out, and what else has ended the drill, is in the report.
pub async fn run(
    repository: &Repository,
    request: &Request,
    progress: Arc<dyn Progress>,
    stop: StopRequest,
) -> Result<Report, Failure> {
    let user_checks = request.checks.as_deref().map(read_user_checks).transpose()?;
    let owner = owner(request)?;
    let (root, started) = (request.scratch.clone(), now());
    let claiming =
        tokio::task::spawn_blocking(move || Scratch::claim(&root, owner, &started.to_string()));
    let claimed = claiming.await.map_err(|error| of_task(error, UNHARMED))?;
    let scratch = claimed.map_err(of_scratch)?;
    let guard = Guard::start(&request.restore.program, scratch.root(), request.keep);
    let mut drilling = Drilling {
        repository,
        request,
        progress,
        watch: Watch::new(stop, scratch.root().to_owned(), request.free_bytes_min),
        scratch: &scratch,
        owner,
        phases: Phases::default(),
        drill: new_record(request, started),
        server_log: String::new(),
    };
    if scratch.had_remains {
        let note = "what an earlier drill had left in the scratch directory, as it was killed, was cleared away";
        drilling.drill.notes.push(note.to_owned());
    }
    let outcome = Box::pin(drilling.all(&user_checks.unwrap_or_default())).await;
    let Drilling { mut phases, mut drill, server_log, .. } = drilling;
    let failed_in = phases.now();
    phases.begin("cleaning");
    let keep = request.keep;
    let clearing =
        tokio::task::spawn_blocking(move || if keep { scratch.leave() } else { scratch.remove() });
    let cleared = clearing.await.map_err(|error| of_task(error, UNHARMED))?;
    if let (Some(guard), true) = (guard, cleared.is_ok()) {
        guard.dismiss();
    }
    let failure = outcome.err().or(cleared.err().map(of_scratch));
    if let Some(failure) = failure {
        // Who asked for what cannot be, or stopped it, has proved nothing.
        if matches!(failure.kind, Kind::Usage | Kind::Conflict | Kind::Absent | Kind::Stopped(_)) {
            return Err(failure);
        }
        drill.failure = Some(DrillFailure {
            phase: failed_in,
            kind: failure.kind.word().to_owned(),
            what: failure.what.clone(),
            causes: failure.causes(),
            server_log,
        });
        return Ok(recorded(repository, drill, phases, Some(failure)).await);
    }
    Ok(recorded(repository, drill, phases, None).await)
}

/// Judges a drill that is over and puts it on record.
async fn recorded(
    repository: &Repository,
    mut drill: Drill,
    phases: Phases,
    failure: Option<Failure>,
) -> Report {
    drill.phases = phases.end();
    drill.finished_at = now();
    drill.outcome = match &failure {
        _ if !drill.failed_checks().is_empty() => DrillOutcome::Failed,
        None => DrillOutcome::Passed,
        Some(failure) if failure.kind == Kind::Integrity => DrillOutcome::Failed,
        Some(_) => DrillOutcome::Unfinished,
    };
    let stored = repository.put_drill(&mut drill).await;
    let not_stored = stored.err().map(|error| {
        let what = format!("could not put the drill on record in {}", repository.describe());
        of_repo(
            error,
            what,
            "What the drill has found out is told here; only `info` does not know of it.",
        )
    });
    Report { drill, not_stored, failure }
}

fn new_record(request: &Request, started_at: crate::pg::PgTimestamp) -> Drill {
    Drill {
        format: FORMAT_VERSION,
        id: BackupId::at(jiff::Timestamp::UNIX_EPOCH, 1),
        started_at,
        finished_at: started_at,
        host: request.host.clone(),
        outcome: DrillOutcome::Unfinished,
        backup: None,
        target: match &request.goal {
            Goal::Target(target) => target.to_string(),
            Goal::RandomMoment { .. } => "a random moment".to_owned(),
        },
        seed: match request.goal {
            Goal::Target(_) => None,
            Goal::RandomMoment { seed } => Some(seed),
        },
        reached: None,
        recovery_millis: None,
        size_bytes: 0,
        wal_bytes: 0,
        phases: Vec::new(),
        checks: Vec::new(),
        failure: None,
        notes: Vec::new(),
        tool: TOOL.to_owned(),
    }
}

/// Finds whose everything shall be: PostgreSQL does not run as root.
fn owner(request: &Request) -> Result<Option<Owner>, Failure> {
    use std::os::unix::fs::MetadataExt;
    if !rustix::process::geteuid().is_root() {
        return Ok(None);
    }
    let facts = std::fs::metadata(&request.scratch).ok();
    let present = facts.map(|facts| Owner { uid: facts.uid(), gid: facts.gid() });
    match request.owner.or(present).filter(|owner| owner.uid != 0) {
        Some(owner) => Ok(Some(owner)),
        None => Err(Failure::new(
            Kind::Usage,
            "the drill runs as root, and PostgreSQL does not",
            UNHARMED,
            "Run it as the server's user; or name a user with `drill_user` in the settings; or give the scratch directory to that user.",
        )),
    }
}

/// One drill.
struct Drilling<'a> {
    repository: &'a Repository,
    request: &'a Request,
    progress: Arc<dyn Progress>,
    watch: Watch,
    scratch: &'a Scratch,
    owner: Option<Owner>,
    phases: Phases,
    drill: Drill,
    /// What the server said last, before its log goes.
    server_log: String,
}

impl Drilling<'_> {
    async fn all(&mut self, user_checks: &[UserCheck]) -> Result<(), Failure> {
        self.phases.begin("choosing");
        self.progress.note("choosing backup and target");
        let mut asked = self.asked().await?;
        let plan = Box::pin(restore::make_plan(self.repository, &asked));
        let planned = self.watch.over(plan).await?;
        self.drill.backup = Some(planned.backup.id.clone());
        self.drill.size_bytes = planned.backup.size_bytes;
        self.with_tablespaces(&mut asked, &planned);
        hold_to_what_is_archived(&mut asked, &planned)?;
        self.scratch.make_directories().map_err(not_on_disk)?;
        restore::check_place(&asked, &planned).await?;
        let major = ServerVersion(planned.report.postgres_version).major().0;
        let named = self.request.bindir.as_deref();
        let binaries = Binaries::find(named, &self.request.search_path, major)?;
        self.check_room(planned.backup.size_bytes)?;
        self.phases.begin("reading-wal");
        self.refuse_foreign_tablespaces(&asked, &planned).await?;
        self.phases.begin("restoring");
        let began = Instant::now();
        let wal_start = planned.report.wal_start_lsn;
        let restoring =
            restore::carry_out(self.repository, &asked, planned, Arc::clone(&self.progress));
        self.watch.over(restoring).await?;
        self.tell_what_is_left_out();
        let launch = Launch {
            binaries: &binaries,
            scratch: self.scratch,
            owner: self.owner,
            without_variables: &self.request.without_variables,
            preload: &self.request.preload,
        };
        launch.write_settings(major)?;
        self.watch.limit(self.request.timeout);
        let outcome =
            replay::recover(&launch, &mut self.watch, &mut self.phases, &*self.progress).await;
        self.server_log = launch.log_for_record();
        let reached = outcome?;
        self.drill.wal_bytes = reached.end_lsn.0.saturating_sub(wal_start.0);
        self.drill.reached = Some(reached);
        // Stopping it in good order is the first of the checks.
        let recovery = began.elapsed().saturating_sub(self.phases.elapsed());
        self.drill.recovery_millis = Some(millis(recovery));
        let mut checking = Checking {
            launch: &launch,
            watch: &mut self.watch,
            progress: &*self.progress,
            checks: &mut self.drill.checks,
        };
        let checked = checking.run(user_checks).await;
        self.server_log = launch.log_for_record();
        checked
    }

    /// Returns the restore that this drill asks for.
    async fn asked(&mut self) -> Result<restore::Request, Failure> {
        let target = match &self.request.goal {
            Goal::Target(target) => target.clone(),
            Goal::RandomMoment { seed } => {
                let moments = Box::pin(restore::reachable_moments(self.repository));
                let moments = self.watch.over(moments).await?;
                let (timeline, lsn) = random_moment(&moments, *seed).ok_or_else(|| {
                    let next = "Take a backup with `highwater backup`.";
                    let what = "no moment can be reached, so that none can be chosen";
                    Failure::new(Kind::Absent, what, UNHARMED, next)
                })?;
                RecoveryTarget {
                    point: RecoveryPoint::Lsn(lsn),
                    inclusive: true,
                    timeline: TimelineChoice::Number(timeline),
                    action: TargetAction::Promote,
                }
            }
        };
        self.drill.target = target.to_string();
        Ok(restore::Request {
            pgdata: self.scratch.data(),
            target: RecoveryTarget { action: TargetAction::Promote, ..target },
            tablespace_map: Vec::new(),
            delta: false,
            standby: false,
            take_over: false,
            ..self.request.restore.clone()
        })
    }

    /// Puts every tablespace of the backup into the scratch directory.
    fn with_tablespaces(&self, asked: &mut restore::Request, planned: &Planned) {
        let outside = planned.backup.tablespaces.iter().filter(|one| one.location.starts_with('/'));
        let map = outside.map(|one| (one.location.clone(), self.scratch.tablespace(one.oid)));
        asked.tablespace_map = map.collect();
    }

    /// Other than `restore`, a drill does not begin where it would fill the disk: it is not worth that.
    fn check_room(&self, size_bytes: u64) -> Result<(), Failure> {
        let needed = size_bytes
            .saturating_add(ROOM_BESIDE_FILES_BYTES)
            .saturating_add(self.request.free_bytes_min);
        let free = free_bytes(self.scratch.root()).map_err(not_on_disk)?;
        if free >= needed {
            return Ok(());
        }
        Err(Failure::new(
            Kind::Disk,
            format!(
                "the drill needs {needed} bytes ({size_bytes} for the backup's files, {ROOM_BESIDE_FILES_BYTES} beside them, {} that must stay free), and the file system of the scratch directory has {free} left",
                self.request.free_bytes_min
            ),
            UNHARMED,
            "Choose a larger place with `--scratch`, or make room.",
        ))
    }

    /// Replay would write where the origin's own files may be.
    async fn refuse_foreign_tablespaces(
        &mut self,
        asked: &restore::Request,
        planned: &Planned,
    ) -> Result<(), Failure> {
        self.progress.note("reading the WAL to be replayed");
        let progress = Arc::clone(&self.progress);
        let found = restore::foreign_tablespaces(self.repository, asked, planned, &*progress);
        let found = self.watch.over(found).await?;
        let Some(first) = found.first() else { return Ok(()) };
        Err(Failure::new(
            Kind::Usage,
            format!(
                "the WAL up to the target makes a tablespace at `{}` (OID {}, at {}), where replay would write into whatever stands there, the cluster's own files too",
                first.location, first.oid, first.lsn
            ),
            UNHARMED,
            "Take a new backup and drill that: tablespaces that a backup knows are put into the scratch directory. Or choose a target before that LSN.",
        ))
    }

    /// Settings that the cluster has and the private server has not.
    fn tell_what_is_left_out(&mut self) {
        const NAME: &str = "shared_preload_libraries";
        let value = |file: &str| {
            let text = std::fs::read(self.scratch.data().join(file)).ok()?;
            last_value(&text, NAME)
        };
        let theirs = value("postgresql.auto.conf").or_else(|| value("postgresql.conf"));
        if let Some(theirs) = theirs.filter(|theirs| !theirs.is_empty())
            && self.request.preload.is_empty()
        {
            self.drill.notes.push(format!(
                "{NAME} = '{theirs}' of the cluster was left out, so that nothing of it acts here; `drill_preload` names what recovery itself needs"
            ));
        }
    }
}

/// Holds recovery to the last record that is archived now: what comes meanwhile was not looked at.
fn hold_to_what_is_archived(
    asked: &mut restore::Request,
    planned: &Planned,
) -> Result<(), Failure> {
    if asked.target.point != RecoveryPoint::Latest {
        return Ok(());
    }
    let last = planned.report.last_record_lsn.ok_or_else(|| {
        let what = "no record was found in the archived WAL behind the backup";
        let next = "Run `highwater verify --deep`, which tells what is wrong with it.";
        Failure::new(Kind::Integrity, what, UNHARMED, next)
    })?;
    asked.target.point = RecoveryPoint::Lsn(last);
    asked.target.inclusive = true;
    Ok(())
}

fn not_on_disk(error: DiskError) -> Failure {
    of_disk(error, "could not work in the scratch directory", UNHARMED)
}

fn of_scratch(error: ScratchError) -> Failure {
    let what = "the scratch directory cannot be used";
    let refused =
        |next: &str, error| Failure::new(Kind::Usage, what, UNHARMED, next).because(error);
    match error {
        ScratchError::Disk(error) => not_on_disk(error),
        error @ ScratchError::InDataDirectory { .. } => {
            refused("Choose a directory outside every data directory with `--scratch`.", error)
        }
        error @ ScratchError::NotEmpty { .. } => refused(
            "Choose an empty directory or a new one with `--scratch`; what a drill with `--keep` has left is yours to remove.",
            error,
        ),
        error @ ScratchError::TooLong { .. } => {
            refused("Choose a directory with a shorter path with `--scratch`.", error)
        }
        error @ ScratchError::InUse { .. } => Failure::new(
            Kind::Conflict,
            what,
            UNHARMED,
            "Let that drill end, or choose another directory with `--scratch`.",
        )
        .because(error),
        error @ ScratchError::StillRunning { .. } => Failure::new(
            Kind::Postgres,
            "the scratch directory could not be cleared",
            UNHARMED,
            "Look at that process, end it, and run the drill again: it clears up first.",
        )
        .because(error),
    }
}

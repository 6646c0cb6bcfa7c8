//! A backup whose files are read from the server's own data directory, beside the server.
//!
//! ```text
//! session: the directory is this server's -> pg_backup_start
//! reading: walk -> stretches of 1 MiB, pages checked, chunks digested      threads
//! here:    in order -> recording, the manifest's draft                     the backup's own task
//! then:    pg_control -> pg_backup_stop -> backup_label, tablespace_map -> backup_manifest
//! ```

mod changes;
mod ends;
mod filing;
mod manifest_draft;
mod reading;
mod session;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::arriving::Begin;
use super::recording::Received;
use super::server::Facts;
use super::{Making, Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::format::{Committed, EntryKind};
use crate::ops::failures::{of_disk, of_task};
use crate::ops::progress::Progress;
use crate::pg::{ControlFile, MajorVersion};
use crate::pgdata::{
    ClusterWalk, DiskError, Found, PageRules, Rereads, StableReadError, WalkRules, has_own_times,
    read_control_bytes, read_stable, tablespaces_of,
};
use crate::repo::{FileMeta, FileRecorder, ParentFiles};
use ends::Ends;
use filing::Filing;
pub(super) use filing::name_of as checksum_name;
use reading::{How, Known, Reading, Stretch};
use session::{Session, Started};

/// How often the session is used while files are read.
const PULSE: Duration = Duration::from_secs(20);

/// From this version on statistics have no directory of their own that can be moved.
const FIXED_STATISTICS_FROM: MajorVersion = MajorVersion(15);

/// A server whose data directory lies here.
pub(super) struct Local {
    session: Session,
    pgdata: PathBuf,
    control: ControlFile,
    stats_temp_directory: Option<Vec<u8>>,
}

impl Local {
    /// Finds the data directory of the server, and refuses one that is not this very server's.
    pub(super) async fn find(
        request: &Request,
        named: Option<&Path>,
        facts: &Facts,
    ) -> Result<Self, Failure> {
        let mut session = Session::open(request, facts).await?;
        let pgdata = session.data_directory(named).await?;
        session.prove(&pgdata, &facts.place).await?;
        let control = read_control(&pgdata).await?.1;
        if control.system_id != facts.system_id {
            return Err(Failure::new(
                Kind::Conflict,
                format!(
                    "`{}` is of the cluster {}, and the server says that it is {}",
                    pgdata.display(),
                    control.system_id,
                    facts.system_id
                ),
                UNHARMED,
                "See that the connection string leads to one server only.",
            ));
        }
        let mut stats_temp_directory = None;
        if facts.version.major() < FIXED_STATISTICS_FROM {
            let text = session.setting("stats_temp_directory").await?.unwrap_or_default();
            let below = Path::new(&text).strip_prefix(&pgdata).map(Path::to_owned);
            let below = below.unwrap_or_else(|_| PathBuf::from(text));
            let below = below.is_relative().then(|| below.into_os_string().into_encoded_bytes());
            stats_temp_directory = below.filter(|path| !path.is_empty());
        }
        Ok(Self { session, pgdata, control, stats_temp_directory })
    }

    /// Returns whether the files' times can be compared with this host's clock, in the data directory
    /// and in every tablespace.
    pub(super) fn has_own_times(&self) -> bool {
        let places = tablespaces_of(&self.pgdata).unwrap_or_default();
        let mut places = places.into_iter().map(|tablespace| self.pgdata.join(tablespace.location));
        let is_own = |place: &Path| has_own_times(place).unwrap_or(false);
        is_own(&self.pgdata) && places.all(|place| is_own(&place))
    }

    fn rules(&self, version: MajorVersion) -> WalkRules {
        WalkRules {
            version,
            version_directory: self.control.tablespace_version_directory(),
            stats_temp_directory: self.stats_temp_directory.clone(),
        }
    }

    /// Takes the whole backup.
    pub(super) async fn take(
        mut self,
        making: &Making<'_>,
        facts: &Facts,
        recorder: FileRecorder,
        parent: Option<ParentFiles>,
        before: Option<&Committed>,
    ) -> Result<(FileRecorder, Received), Failure> {
        let request = making.request;
        let version = facts.version.major();
        let rules = self.rules(version);
        making.progress.note("waiting for the server's checkpoint");
        let counting = tell_total(&self.pgdata, &rules, &making.progress);
        let started = self.session.start(&request.label, request.fast_checkpoint).await?;
        // Two walks at a time would hold the names of a large directory twice.
        counting.store(false, Ordering::Relaxed);
        making.progress.note("reading files");
        let failed = |error| of_disk(error, "could not read the data directory", UNHARMED);
        let tablespaces = tablespaces_of(&self.pgdata).map_err(failed)?;
        let walk = ClusterWalk::begin(&self.pgdata, rules).map_err(failed)?;
        let known = match (parent.as_ref(), before) {
            (Some(files), Some(before)) => {
                let control = &self.control;
                let changes = changes::find(request, facts, control, before, &started).await;
                Some(Known { files: files.known(), changes: changes.map(Arc::new) })
            }
            _ => None,
        };
        let mut filing = Filing::new(making, facts, recorder, parent, started.start_lsn);
        self.read_files(&mut filing, walk, known, &started, request).await?;
        // Last: on a standby it says how far the files that were read before reach.
        let (bytes, _) = read_control(&self.pgdata).await?;
        filing.small(control_meta(&self.pgdata, &bytes).map_err(failed)?, &bytes).await?;
        making.progress.note("ending the backup");
        let Self { session, pgdata, .. } = self;
        let ended = session.stop().await?;
        let ends = Ends::find(&pgdata, &started, &ended, facts).await?;
        let tablespaces =
            tablespaces.into_iter().map(|t| (t.oid, t.location.display().to_string())).collect();
        let begin = Begin { start_lsn: started.start_lsn, timeline: ends.timeline, tablespaces };
        filing.finish(begin, &started, &ended, &ends).await
    }

    /// Reads everything but `pg_control`, and keeps the session awake meanwhile.
    async fn read_files(
        &mut self,
        filing: &mut Filing<'_>,
        walk: ClusterWalk,
        known: Option<Known>,
        started: &Started,
        request: &Request,
    ) -> Result<(), Failure> {
        let control = &self.control;
        let pages = (control.data_checksum_version != 0).then_some(PageRules {
            page_bytes: control.block_size as usize,
            blocks_per_file: control.relation_segment_blocks,
            start_lsn: started.start_lsn,
        });
        let how = How {
            plan: request.memory.reading,
            pages,
            rate_max: request.max_rate_kb.map(|kb| u64::from(kb) << 10),
        };
        let mut reading = Reading::begin(walk, how, known)?;
        let mut pulse = interval_at(Instant::now() + PULSE, PULSE);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let stretch = tokio::select! {
                stretch = reading.next() => stretch?,
                _ = pulse.tick() => {
                    self.session.pulse().await?;
                    continue;
                }
            };
            let Some(Stretch { bytes, events }) = stretch else { return Ok(()) };
            for event in events {
                filing.take(event, &bytes).await?;
            }
            reading.give_back(bytes);
        }
    }
}

/// Counts what there is to read, while the server is busy with its checkpoint; given up once the answer is false.
fn tell_total(pgdata: &Path, rules: &WalkRules, progress: &Arc<dyn Progress>) -> Arc<AtomicBool> {
    let is_wanted = Arc::new(AtomicBool::new(true));
    let still = Arc::clone(&is_wanted);
    let (pgdata, rules, progress) = (pgdata.to_owned(), rules.clone(), Arc::clone(progress));
    tokio::task::spawn_blocking(move || {
        let size = |found: Result<Found, DiskError>| match found {
            Ok(Found::File(file)) => file.size,
            _ => 0,
        };
        if let Ok(walk) = ClusterWalk::begin(&pgdata, rules) {
            let total = walk.map(size).take_while(|_| still.load(Ordering::Relaxed)).sum();
            progress.total(still.load(Ordering::Relaxed).then_some(total));
        }
    });
    is_wanted
}

/// Reads `pg_control` until its checksum fits.
async fn read_control(pgdata: &Path) -> Result<(Vec<u8>, ControlFile), Failure> {
    let place = pgdata.to_owned();
    let read = tokio::task::spawn_blocking(move || {
        let keep =
            |bytes: &[u8]| ControlFile::parse(bytes).map(|control| (bytes.to_vec(), control));
        read_stable(Rereads::DEFAULT, || read_control_bytes(&place), keep)
    });
    let what = || format!("could not read global/pg_control in `{}`", pgdata.display());
    match read.await.map_err(|error| of_task(error, UNHARMED))? {
        Ok(read) => Ok(read),
        Err(StableReadError::Disk(error)) => Err(of_disk(error, what(), UNHARMED)),
        Err(StableReadError::Refused(error)) => {
            let next =
                "Look at it with pg_controldata; keep all earlier backups until that is settled.";
            Err(Failure::new(Kind::Integrity, what(), UNHARMED, next).because(error))
        }
    }
}

fn control_meta(pgdata: &Path, bytes: &[u8]) -> Result<FileMeta, DiskError> {
    use std::os::unix::fs::MetadataExt;
    let place = pgdata.join("global/pg_control");
    let about = std::fs::metadata(&place).map_err(|e| DiskError::new("look at", &place, e))?;
    Ok(FileMeta {
        path: b"global/pg_control".to_vec(),
        kind: EntryKind::File,
        mode: about.mode() & 0o7777,
        mtime: about.mtime(),
        size: bytes.len() as u64,
    })
}

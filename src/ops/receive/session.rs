//! One timeline from one server: bytes in, pieces and segments out, acknowledgements back.
//!
//! One task does it all but the sealing of large objects and the uploads, so statuses go out whatever the
//! store does: when too much is on its way, only the reading stops.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, MissedTickBehavior};

use super::source::Facts;
use super::uploads::{Purpose, Settled, Stored, Uploads};
use super::watch::Watch;
use super::{Report, Request, UNHARMED, no_memory};
use crate::failure::{Failure, Kind};
use crate::ops::failures::{of_postgres, of_repo};
use crate::ops::{StopRequest, now};
use crate::pg::{Lsn, Mark, SegmentName, Timeline, WalCarry, WalEvent};
use crate::plan::receive::{
    Cut, CutPolicy, Merges, Progress, Start, Uncut, tail_is_cut, when_to_cut,
};
use crate::repo::{
    AssemblyError, PIECE_BYTES, RepoError, Repository, SealedPiece, SegmentAssembly,
};
use crate::walsender::{Connection, PgError, StreamEvent, StreamStart, StreamStatus, WalStream};

/// Reading stops while more than this is held for uploads, in bytes: a unit in the making, incompressible, and a
/// third of another on its way; or several that compress as WAL does. Must exceed what the former holds
/// alone, or reading would never go on. The process itself takes more: pieces on their way may outlive
/// their unit, and an allocator leaves gaps.
const HELD_BYTES_MAX: u64 = 22 << 20;

/// How many status intervals may pass without a word from the server, which is asked for one in
/// each, before it is given up.
const SILENT_INTERVALS: u32 = 4;

/// The least patience with a silent server.
const SILENCE_MIN: Duration = Duration::from_secs(20);

/// How often it is logged how far things are.
const LOG_INTERVAL: Duration = Duration::from_mins(10);

/// How a stream ended.
pub(super) enum End {
    /// We were asked to stop, and everything received is stored.
    Asked,
    /// The server shut down; it has our word for everything it sent.
    ServerStopped,
    /// The server goes on with another timeline.
    Switched {
        /// The timeline that begins.
        next: Timeline,
        /// Where.
        switch_lsn: Lsn,
        /// The connection, idle.
        connection: Box<Connection>,
    },
}

/// How a stream ends early.
pub(super) enum Trouble {
    /// The server has not the WAL any more that comes next.
    WalRemoved(Failure),
    /// The slot protects nothing any more.
    SlotLost(Failure),
    /// Anything else.
    Other(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

/// A stream and all that is in hand of it.
pub(super) struct Session<'a> {
    repository: &'a Repository,
    request: &'a Request,
    facts: &'a Facts,
    report: &'a mut Report,
    start: Start,
    progress: Progress,
    assembly: Option<SegmentAssembly>,
    carry: Option<WalCarry>,
    uncut: Uncut,
    merges: Merges,
    uploads: Uploads,
    /// Segments that have, or had, pieces.
    pieced: BTreeSet<SegmentName>,
    /// Those of them that are stored complete and not tidied yet.
    untidy: BTreeSet<SegmentName>,
    began: Instant,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        repository: &'a Repository,
        request: &'a Request,
        facts: &'a Facts,
        start: Start,
        report: &'a mut Report,
    ) -> Self {
        report.timeline = Some(start.timeline);
        Self {
            repository,
            request,
            facts,
            report,
            start,
            progress: Progress::begin(start.lsn),
            assembly: None,
            carry: None,
            uncut: Uncut::default(),
            merges: Merges::default(),
            uploads: Uploads::new(repository, facts.system_id, facts.segment_size),
            pieced: BTreeSet::new(),
            untidy: BTreeSet::new(),
            began: Instant::now(),
        }
    }

    /// Returns the end of the unbroken WAL that is stored.
    pub(super) fn stored_lsn(&self) -> Lsn {
        self.progress.stored_lsn()
    }

    /// Streams until the connection ends or the service shall stop. Whatever the reason, what was
    /// received is stored when this returns, unless even that failed.
    pub(super) async fn run(
        &mut self,
        connection: Connection,
        watch: &mut Watch,
        mut stop: StopRequest,
    ) -> Result<End, Trouble> {
        self.open_segment(self.start.lsn).await?;
        let end = self.stream(connection, watch, &mut stop).await;
        // Perhaps the server is gone for good, and these bytes are nowhere else.
        let drained = match &end {
            Ok(End::Switched { switch_lsn, .. }) => {
                self.cut_until(*switch_lsn)?;
                self.drain(&mut stop).await
            }
            Ok(_) | Err(Trouble::WalRemoved(_) | Trouble::SlotLost(_)) => {
                self.drain(&mut stop).await
            }
            Err(Trouble::Other(failure)) if failure.kind == Kind::Conflict => Ok(()),
            Err(Trouble::Other(_)) => self.drain(&mut stop).await,
        };
        self.report.stored_lsn = Some(self.stored_lsn());
        match (end, drained) {
            (Ok(_), Err(failure)) => Err(failure.into()),
            (end, _) => end,
        }
    }

    async fn stream(
        &mut self,
        mut connection: Connection,
        watch: &mut Watch,
        stop: &mut StopRequest,
    ) -> Result<End, Trouble> {
        // Silence is watched here, where it is known whether anybody listens.
        connection.set_silence_limit(None);
        let start = StreamStart {
            slot: self.request.slot.clone(),
            start_lsn: self.start.lsn,
            timeline: self.start.timeline,
        };
        let opened = connection.stream_wal(&start).await;
        let stream = opened.map_err(|error| trouble(error, "could not start streaming"))?;
        let mut line = Line::new(stream, self.start.lsn, self.facts);
        loop {
            self.cut_if_due()?;
            self.merge_or_tidy()?;
            line.tell(&self.progress, false).await?;
            let listens = self.held_bytes() < HELD_BYTES_MAX;
            line.listens(listens);
            let cut_at = match self.when_to_cut() {
                Cut::At(at) => Some(self.began + at),
                Cut::Now | Cut::Wait => None,
            };
            tokio::select! {
                event = line.stream.next(), if listens => {
                    let event = event.map_err(|error| trouble(error, "lost the stream"))?;
                    line.heard();
                    match event {
                        StreamEvent::Wal { start_lsn, data, .. } => self.take(start_lsn, data).await?,
                        StreamEvent::Keepalive { reply_requested: true, .. } => {
                            self.uncut.hurry = self.uncut.since.is_some();
                            line.tell(&self.progress, true).await?;
                        }
                        StreamEvent::Keepalive { .. } => {}
                        StreamEvent::ServerStopped => return Ok(End::ServerStopped),
                        StreamEvent::TimelineEnd { next, switch_lsn } => {
                            let connection = Box::new(line.stream.into_connection());
                            return Ok(End::Switched { next, switch_lsn, connection });
                        }
                    }
                }
                settled = self.uploads.next(), if !self.uploads.is_empty() => self.settle(settled?),
                () = tokio::time::sleep_until(cut_at.unwrap_or(self.began)), if cut_at.is_some() => {}
                _ = line.timer.tick() => line.keep_alive(&self.progress).await?,
                Some(()) = watch.lost.recv() => return Err(slot_lost()),
                _ = stop.wanted() => {
                    self.drain(stop).await?;
                    line.tell(&self.progress, true).await?;
                    // The server may go on sending for a moment; nobody waits for that.
                    drop(line.stream.stop().await);
                    return Ok(End::Asked);
                }
            }
        }
    }

    fn held_bytes(&self) -> u64 {
        let assembly = self.assembly.as_ref().map_or(0, SegmentAssembly::held_bytes);
        self.uploads.held_bytes() + assembly
    }

    /// Takes WAL as it comes, and hands out every unit that it completes.
    async fn take(&mut self, start_lsn: Lsn, mut data: Bytes) -> Result<(), Failure> {
        let mut at = start_lsn;
        self.report.wal_bytes += data.len() as u64;
        while !data.is_empty() {
            if self.assembly.is_none() {
                self.open_segment(at).await?;
            }
            let Some(assembly) = &mut self.assembly else { return Ok(()) };
            let position = u64::from(assembly.position());
            let unit = u64::from(PIECE_BYTES).min(self.facts.segment_size.bytes());
            let room = usize::try_from(unit - position % unit).unwrap_or(data.len());
            let now = data.split_to(data.len().min(room));
            let mut commits = false;
            assembly
                .push(&now, &mut |mark| commits |= is_waited_for(mark))
                .map_err(|error| not_taken(error, self.facts))?;
            at = Lsn(at.0 + now.len() as u64);
            self.progress.receive(at);
            if assembly.position() > assembly.cut_position() {
                self.uncut.since.get_or_insert(self.began.elapsed());
                self.uncut.commits |= commits;
            }
            if u64::from(assembly.position()).is_multiple_of(unit) {
                self.end_unit()?;
            }
        }
        Ok(())
    }

    /// Begins the segment whose first byte is at `lsn`.
    async fn open_segment(&mut self, lsn: Lsn) -> Result<(), Failure> {
        let size = self.facts.segment_size;
        let system_id = self.facts.system_id;
        let segment = SegmentName::new(self.start.timeline, size.segment_of(lsn), size);
        let stored = if self.start.first_missing > lsn {
            match self.repository.stored_prefix(system_id, segment, size).await {
                Ok(stored) => stored,
                Err(error @ RepoError::Damaged { .. }) => {
                    tracing::error!(
                        "what is stored of {segment} is damaged; it is stored again: {error}"
                    );
                    None
                }
                Err(error) => {
                    let what = format!("could not read what is stored of {segment}");
                    return Err(of_repo(error, what, UNHARMED));
                }
            }
        } else {
            None
        };
        if let Some(stored) = &stored {
            self.pieced.insert(segment);
            self.progress.store(lsn, Lsn(lsn.0 + u64::from(stored.end)));
        }
        let codec = self.request.codec;
        let carry = self.carry.take();
        let begun =
            SegmentAssembly::begin(self.repository, system_id, segment, size, codec, carry, stored);
        self.assembly = Some(begun.map_err(|error| not_taken(error, self.facts))?);
        self.merges = Merges::default();
        Ok(())
    }

    /// Hands out a unit that has just become complete.
    fn end_unit(&mut self) -> Result<(), Failure> {
        let Some(assembly) = &mut self.assembly else { return Ok(()) };
        let position = assembly.position();
        let unit_bytes = u64::from(PIECE_BYTES).min(self.facts.segment_size.bytes());
        let tail = u64::from(position.saturating_sub(assembly.cut_position()));
        let policy = policy_of(self.request);
        let tail_is_cut = tail_is_cut(&policy, tail, unit_bytes, self.uncut.commits);
        if tail_is_cut {
            self.cut()?;
        }
        let Some(assembly) = &mut self.assembly else { return Ok(()) };
        let segment = assembly.segment();
        for unit in assembly.take_units() {
            self.uploads.put_unit(segment, unit);
        }
        self.uncut = Uncut::default();
        self.merges = Merges::default();
        if u64::from(position) == self.facts.segment_size.bytes()
            && let Some(assembly) = self.assembly.take()
        {
            let (_, carry) = assembly.finish().map_err(|error| not_taken(error, self.facts))?;
            self.carry = carry;
        }
        Ok(())
    }

    fn when_to_cut(&self) -> Cut {
        let policy = policy_of(self.request);
        when_to_cut(&policy, &self.uncut, self.uploads.pieces(), self.began.elapsed())
    }

    fn cut_if_due(&mut self) -> Result<(), Failure> {
        if self.when_to_cut() == Cut::Now { self.cut() } else { Ok(()) }
    }

    fn cut(&mut self) -> Result<(), Failure> {
        let Some(assembly) = &mut self.assembly else { return Ok(()) };
        let pieces = assembly.cut().map_err(no_memory)?;
        self.send(pieces);
        Ok(())
    }

    /// As [`Self::cut`], but nothing from `switch_lsn` on: that is not history.
    fn cut_until(&mut self, switch_lsn: Lsn) -> Result<(), Failure> {
        let Some(assembly) = &mut self.assembly else { return Ok(()) };
        let end = switch_lsn.0.saturating_sub(assembly.start_lsn().0);
        let end = u32::try_from(end).unwrap_or(u32::MAX).min(assembly.position());
        let pieces = assembly.cut_until(end).map_err(no_memory)?;
        self.send(pieces);
        self.assembly = None;
        Ok(())
    }

    fn send(&mut self, pieces: Vec<SealedPiece>) {
        self.uncut = Uncut::default();
        let Some(assembly) = &self.assembly else { return };
        let segment = assembly.segment();
        for piece in pieces {
            self.pieced.insert(segment);
            self.uploads.put_piece(segment, piece);
        }
    }

    fn settle(&mut self, settled: Settled) {
        let stored = match settled {
            Settled::Stored(stored) => stored,
            Settled::Sealed(piece) => {
                if let Some(assembly) = &mut self.assembly {
                    assembly.adopt(&piece);
                }
                return;
            }
            Settled::Tidied => return,
        };
        self.report.stored_bytes += stored.object_bytes;
        match stored.purpose {
            Purpose::Piece => {
                self.report.pieces += 1;
                self.progress.store(stored.start_lsn, stored.end_lsn);
                if let Some((start, end)) = self.offsets_in_unit(&stored) {
                    self.merges.store(start, end);
                }
            }
            Purpose::Unit => {
                self.report.segments += 1;
                self.progress.store(stored.start_lsn, stored.end_lsn);
                if self.pieced.remove(&stored.segment) {
                    self.untidy.insert(stored.segment);
                }
            }
            Purpose::Merge(merge) => {
                self.report.pieces += 1;
                if self.offsets_in_unit(&stored).is_some() {
                    self.merges.merged(merge);
                }
            }
        }
    }

    /// Returns where a stored piece lies in the segment in the making, if in its current unit.
    fn offsets_in_unit(&self, stored: &Stored) -> Option<(u32, u32)> {
        let assembly = self.assembly.as_ref()?;
        let offset = |lsn: Lsn| {
            let offset = lsn.0.checked_sub(assembly.start_lsn().0)?;
            u32::try_from(offset).ok()
        };
        let (start, end) = (offset(stored.start_lsn)?, offset(stored.end_lsn)?);
        let same_unit = start / PIECE_BYTES == assembly.position() / PIECE_BYTES;
        (assembly.segment() == stored.segment && same_unit).then_some((start, end))
    }

    /// Starts what makes reading back cheap, one thing at a time: joining small
    /// pieces, and removing those that stand in a complete segment.
    fn merge_or_tidy(&mut self) -> Result<(), Failure> {
        if self.uploads.is_tidying() {
            return Ok(());
        }
        if let Some(assembly) = &mut self.assembly
            && let Some(merge) = self.merges.next_merge()
        {
            let pieces = assembly.to_merge(merge.start, merge.end).map_err(no_memory)?;
            self.uploads.put_merge(assembly.segment(), merge, pieces);
            return Ok(());
        }
        let uploads = &self.uploads;
        let ready = self.untidy.iter().find(|segment| !uploads.has_piece_of(**segment)).copied();
        if let Some(segment) = ready {
            self.untidy.remove(&segment);
            self.uploads.tidy(segment);
        }
        Ok(())
    }

    /// Stores everything that was received. An ordered stop limits how long that may take.
    async fn drain(&mut self, stop: &mut StopRequest) -> Result<(), Failure> {
        self.cut()?;
        let mut deadline = None;
        while !self.uploads.is_settled() {
            if stop.is_wanted() && deadline.is_none() {
                deadline = Some(Instant::now() + self.request.stop_deadline);
            }
            tokio::select! {
                settled = self.uploads.next() => self.settle(settled?),
                _ = stop.wanted(), if deadline.is_none() => {}
                () = tokio::time::sleep_until(deadline.unwrap_or(self.began)), if deadline.is_some() => {
                    return Err(self.not_stored_in_time());
                }
            }
        }
        self.report.stored_lsn = Some(self.stored_lsn());
        Ok(())
    }

    fn not_stored_in_time(&self) -> Failure {
        Failure::new(
            Kind::Store,
            format!(
                "WAL from {} to {} was received and is not stored: the store did not take it within {} s of the order to stop",
                self.progress.stored_lsn(),
                self.progress.write_lsn(),
                self.request.stop_deadline.as_secs()
            ),
            "It was never acknowledged. The server keeps it where it has a slot or archive_command.",
            "Mend the store and start `highwater receive` again: it goes on at the first byte that is not stored.",
        )
    }
}

fn policy_of(request: &Request) -> CutPolicy {
    CutPolicy {
        rpo: request.rpo,
        synchronous: request.synchronous,
        uploads_max: request.uploads_max,
    }
}

/// The connection while WAL comes in: what the server was told, and when it was heard.
struct Line {
    stream: WalStream,
    timer: tokio::time::Interval,
    interval: Duration,
    silence_max: Duration,
    heard: Instant,
    listened: bool,
    start_lsn: Lsn,
    /// The flush position told last.
    told: Lsn,
    logged: Instant,
}

impl Line {
    fn new(stream: WalStream, start_lsn: Lsn, facts: &Facts) -> Self {
        let interval = facts.status_interval;
        let mut timer = tokio::time::interval(interval);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            stream,
            timer,
            interval,
            silence_max: (interval * SILENT_INTERVALS).max(SILENCE_MIN),
            heard: Instant::now(),
            listened: true,
            start_lsn,
            told: Lsn::INVALID,
            logged: Instant::now(),
        }
    }

    fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// Whoever does not listen cannot complain of silence.
    fn listens(&mut self, listens: bool) {
        if listens && !self.listened {
            self.heard();
        }
        self.listened = listens;
    }

    /// Tells the server how far we are, if that is news or an answer is wanted.
    async fn tell(&mut self, progress: &Progress, wanted: bool) -> Result<(), Trouble> {
        let flush_lsn = progress.flush_lsn();
        let is_news = flush_lsn > self.told.max(self.start_lsn);
        if is_news || wanted { self.send(progress, false).await } else { Ok(()) }
    }

    /// Lets the server know that we live, and looks whether it does.
    async fn keep_alive(&mut self, progress: &Progress) -> Result<(), Trouble> {
        if self.listened && self.heard.elapsed() > self.silence_max {
            return Err(Trouble::Other(Failure::new(
                Kind::Postgres,
                format!("the server has not said a word for {} s", self.heard.elapsed().as_secs()),
                UNHARMED,
                "Check the network between this host and the server.",
            )));
        }
        self.log(progress);
        let is_quiet = self.heard.elapsed() >= self.interval;
        self.send(progress, is_quiet).await
    }

    /// Says now and then how far things are.
    fn log(&mut self, progress: &Progress) {
        if self.logged.elapsed() >= LOG_INTERVAL {
            self.logged = Instant::now();
            tracing::info!(
                "stored up to {}, received up to {}",
                progress.stored_lsn(),
                progress.write_lsn()
            );
        }
    }

    async fn send(&mut self, progress: &Progress, reply_requested: bool) -> Result<(), Trouble> {
        let write_lsn = progress.write_lsn();
        // Nothing was received yet: 0 leaves the slot where it is.
        let has_news = progress.flush_lsn() > self.start_lsn;
        let flush_lsn = if has_news { progress.flush_lsn() } else { Lsn::INVALID };
        let status = StreamStatus { write_lsn, flush_lsn, reply_requested };
        let sent = tokio::time::timeout(self.silence_max, self.stream.send_status(&status, now()));
        match sent.await {
            Ok(Ok(())) => {
                self.told = flush_lsn;
                Ok(())
            }
            Ok(Err(error)) => Err(trouble(error, "lost the stream")),
            Err(_) => Err(Trouble::Other(Failure::new(
                Kind::Postgres,
                "the server takes no more messages",
                UNHARMED,
                "Check the network between this host and the server.",
            ))),
        }
    }
}

/// Returns whether a client may be waiting for this record to be stored.
///
/// Source: the callers of `SyncRepWaitForLSN` in `src/backend/access/transam/xact.c` and
/// `twophase.c`.
fn is_waited_for(mark: &Mark) -> bool {
    match &mark.event {
        WalEvent::Transaction(end) => end.committed || end.prepared,
        WalEvent::Prepared => true,
        _ => false,
    }
}

/// PostgreSQL 14 to 17 stream on with a slot that was invalidated, and keep nothing for it.
fn slot_lost() -> Trouble {
    Trouble::SlotLost(Failure::new(
        Kind::Postgres,
        "the server has invalidated the replication slot (wal_status lost)",
        UNHARMED,
        "The slot is made anew. Raise max_slot_wal_keep_size, or find out why the store is slow.",
    ))
}

fn trouble(error: PgError, what: &str) -> Trouble {
    if error.is_wal_removed() {
        let what = "the server has removed WAL that is not stored yet";
        return Trouble::WalRemoved(of_postgres(error, what, UNHARMED));
    }
    if error.is_slot_lost() {
        let what = "the replication slot protects nothing any more";
        return Trouble::SlotLost(of_postgres(error, what, UNHARMED));
    }
    if error.is_slot_in_use() {
        return Trouble::Other(
            Failure::new(
                Kind::Postgres,
                "the replication slot is in use by another receiver",
                UNHARMED,
                "Two receivers of one cluster do no harm: this one goes on when the other ends. If there is no other, the server has not noticed yet that an earlier connection is gone (wal_sender_timeout).",
            )
            .because(error),
        );
    }
    Trouble::Other(of_postgres(error, what, UNHARMED))
}

/// The server's bytes cannot be what they should be.
fn not_taken(error: AssemblyError, facts: &Facts) -> Failure {
    let place = &facts.place;
    let (kind, what, next) = match &error {
        AssemblyError::Diverges { .. } => (
            Kind::Conflict,
            format!("{place} sends other WAL than is stored of the same timeline"),
            "Two servers write this timeline, or this one was put back to an earlier state without recovery. Find out which is the real one; give a copy a cluster name of its own.",
        ),
        AssemblyError::Damage(damage) if damage.is_wrong_identity() => (
            Kind::Conflict,
            format!("{place} sends WAL of another cluster"),
            "Check `--dsn` and the cluster name: each cluster needs a place of its own.",
        ),
        AssemblyError::Damage(_) => (
            Kind::Integrity,
            format!("{place} sends WAL that is not sound"),
            "It is asked for again. If the damage stays, the server's own copy is damaged: take a base backup, look at its disks, and see `highwater archive-push --accept-damaged`.",
        ),
        AssemblyError::NoSuchSegment(_) => (
            Kind::Conflict,
            format!("{place} sends WAL at a position that cannot be"),
            "Check `--dsn` and the cluster name.",
        ),
        AssemblyError::Codec(_) | AssemblyError::Ended => (
            Kind::Bug,
            "WAL could not be compressed".to_owned(),
            "There is a lack of memory, or this is a defect of Highwater; please report it.",
        ),
    };
    Failure::new(kind, what, UNHARMED, next).because(error)
}

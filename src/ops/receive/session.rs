//! One timeline from one server: bytes in, pieces and segments out, acknowledgements back.
//!
//! One task does it all but compressing full frames, sealing large objects and the uploads, so
//! statuses go out whatever the store does: when too much is on its way, only the reading stops.

use std::collections::BTreeSet;
use std::pin::pin;

use bytes::Bytes;
use tokio::time::Instant;

use super::line::Line;
use super::source::Facts;
use super::troubles::{Trouble, no_memory, not_taken, slot_lost, trouble};
use super::uploads::{Purpose, Settled, Stored, Uploads};
use super::watch::Watch;
use super::{Report, Request, UNHARMED};
use crate::failure::{Failure, Kind};
use crate::ops::StopRequest;
use crate::ops::failures::of_repo;
use crate::pg::{Lsn, Mark, SegmentName, Timeline, WalCarry, WalEvent};
use crate::plan::pace::Pace;
use crate::plan::receive::{
    Cut, CutPolicy, Merges, Progress, Start, Uncut, tail_is_cut, when_to_cut,
};
use crate::repo::{FrameMaker, PIECE_BYTES, RepoError, Repository, SealedPiece, SegmentAssembly};
use crate::walsender::{Connection, StreamEvent, StreamStart};

/// Reading stops while more than this is held for uploads, in bytes: a unit in the making, incompressible, and a
/// third of another on its way; or several that compress as WAL does. Must exceed what the former holds
/// alone, or reading would never go on. The process itself takes more: pieces on their way may outlive
/// their unit, and an allocator leaves gaps.
const HELD_BYTES_MAX: u64 = 22 << 20;

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

/// A stream and all that is in hand of it.
pub(super) struct Session<'a> {
    repository: &'a Repository,
    request: &'a Request,
    facts: &'a Facts,
    report: &'a mut Report,
    start: Start,
    progress: Progress,
    /// The end of what the repository holds of the segment at hand and was not compared yet: until then it is
    /// somebody's WAL under that name, and nothing of it may be acknowledged.
    unproven: Option<Lsn>,
    /// A segment of which something damaged is stored: readers may meet that before our pieces, so only the
    /// complete segment counts as stored.
    doubtful: Option<SegmentName>,
    assembly: Option<SegmentAssembly>,
    frame_maker: FrameMaker,
    carry: Option<WalCarry>,
    uncut: Uncut,
    pace: Pace,
    merges: Merges,
    uploads: Uploads,
    /// Segments that have, or had, pieces.
    pieced: BTreeSet<SegmentName>,
    /// Those of them that are stored complete and not tidied yet.
    untidy: BTreeSet<SegmentName>,
    began: Instant,
    /// Until when an ordered stop may go on storing what is in hand.
    stop_at: Option<Instant>,
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
            unproven: None,
            doubtful: None,
            assembly: None,
            frame_maker: FrameMaker::start(request.codec),
            carry: None,
            uncut: Uncut::default(),
            pace: Pace::new(request.uploads_max),
            merges: Merges::default(),
            uploads: Uploads::new(repository, facts.system_id, facts.segment_size),
            pieced: BTreeSet::new(),
            untidy: BTreeSet::new(),
            began: Instant::now(),
            stop_at: None,
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
                self.drain(&mut stop, None).await
            }
            Ok(_) | Err(Trouble::WalRemoved(_) | Trouble::SlotLost(_)) => {
                self.drain(&mut stop, None).await
            }
            Err(Trouble::Other(failure)) if failure.kind == Kind::Conflict => Ok(()),
            Err(Trouble::Other(_)) => self.drain(&mut stop, None).await,
        };
        self.report.stored_lsn = Some(self.stored_lsn());
        match (end, drained) {
            // That something is not stored weighs more than why the stream ended.
            (_, Err(failure)) => Err(failure.into()),
            (end, Ok(())) => end,
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
            let listens = self.held_bytes() < HELD_BYTES_MAX
                && !self.progress.is_far_ahead(self.facts.segment_size);
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
                        StreamEvent::Wal { start_lsn, data, .. } => {
                            // It may have to read what is stored; meanwhile nothing that can be told changes.
                            let progress = self.progress.clone();
                            let mut taken = pin!(self.take(start_lsn, data));
                            loop {
                                tokio::select! {
                                    taken = &mut taken => break taken?,
                                    _ = line.timer.tick() => line.keep_alive(&progress).await?,
                                }
                            }
                        }
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
                    self.drain(stop, Some(&mut line)).await?;
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
            let mut commits = 0;
            assembly
                .push(&now, &mut |mark| commits += u32::from(is_waited_for(mark)))
                .map_err(|error| not_taken(error, self.facts))?;
            at = Lsn(at.0 + now.len() as u64);
            self.progress.receive(at);
            if let Some(end_lsn) = self.unproven.take_if(|end_lsn| *end_lsn <= at) {
                self.progress.store(assembly.start_lsn(), end_lsn);
            }
            if assembly.position() > assembly.cut_position() {
                self.uncut.since.get_or_insert(self.began.elapsed());
                self.uncut.commits += commits;
                self.pace.came(commits, self.began.elapsed());
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
            let settled = self.repository.settle_segments(system_id, [segment]).await;
            settled.map_err(|error| {
                of_repo(error, format!("could not make {segment} durable"), UNHARMED)
            })?;
            match self.repository.stored_prefix(system_id, segment, size).await {
                Ok(stored) => stored,
                Err(error @ RepoError::Damaged { .. }) => {
                    tracing::error!(
                        "what is stored of {segment} is damaged: {error}. Nothing of it is acknowledged before it is stored complete; commits that wait for it go on at once when the damaged object is moved away and receive is started again"
                    );
                    self.doubtful = Some(segment);
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
        if stored.is_some() {
            self.pieced.insert(segment);
        }
        self.unproven = stored.map(|stored| Lsn(lsn.0 + u64::from(stored.end)));
        let codec = self.request.codec;
        let carry = self.carry.take();
        let begun =
            SegmentAssembly::begin(self.repository, system_id, segment, size, codec, carry, stored);
        let mut assembly = begun.map_err(|error| not_taken(error, self.facts))?;
        assembly.make_frames_with(&self.frame_maker);
        self.assembly = Some(assembly);
        self.merges = Merges::default();
        Ok(())
    }

    /// Hands out a unit that has just become complete.
    fn end_unit(&mut self) -> Result<(), Failure> {
        let policy = self.policy();
        let Some(assembly) = &mut self.assembly else { return Ok(()) };
        let position = assembly.position();
        let unit_bytes = u64::from(PIECE_BYTES).min(self.facts.segment_size.bytes());
        let tail = u64::from(position.saturating_sub(assembly.cut_position()));
        let tail_is_cut = tail_is_cut(&policy, tail, unit_bytes, self.uncut.commits > 0);
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
        when_to_cut(&self.policy(), &self.uncut, self.uploads.pieces(), self.began.elapsed())
    }

    fn policy(&self) -> CutPolicy {
        let Request { rpo, synchronous, uploads_max, .. } = *self.request;
        let uploads_max = if synchronous { self.pace.uploads_max() } else { uploads_max };
        CutPolicy { rpo, synchronous, uploads_max }
    }

    fn cut_if_due(&mut self) -> Result<(), Failure> {
        if self.uncut.commits > 0 && self.uploads.pieces() >= self.pace.uploads_max() {
            self.pace.was_full();
        }
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
            self.pace.sent(piece.end_lsn);
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
                if self.doubtful != Some(stored.segment) {
                    self.progress.store(stored.start_lsn, stored.end_lsn);
                }
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
        let flush_lsn = self.progress.flush_lsn();
        self.pace.acknowledged(flush_lsn, self.began.elapsed());
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

    /// Stores everything that was received. An ordered stop limits how long that may take. As long as there is
    /// a `line`, the server is told of each piece: commits may be waiting for it.
    async fn drain(
        &mut self,
        stop: &mut StopRequest,
        mut line: Option<&mut Line>,
    ) -> Result<(), Failure> {
        self.cut()?;
        if let Some(line) = &mut line {
            line.listens(false);
        }
        while !self.uploads.is_settled() {
            if let Some(telling) = &mut line
                && telling.tell(&self.progress, false).await.is_err()
            {
                // What is in hand is stored all the same.
                line = None;
            }
            if stop.is_wanted() && self.stop_at.is_none() {
                self.stop_at = Some(Instant::now() + self.request.stop_deadline);
            }
            let stop_at = self.stop_at;
            tokio::select! {
                settled = self.uploads.next() => self.settle(settled?),
                lives = status_due(&mut line, &self.progress) => if !lives { line = None },
                _ = stop.wanted(), if stop_at.is_none() => {}
                () = tokio::time::sleep_until(stop_at.unwrap_or(self.began)), if stop_at.is_some() => {
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

/// Sends the next status when it is due; returns whether that went well. Never returns without a line.
async fn status_due(line: &mut Option<&mut Line>, progress: &Progress) -> bool {
    let Some(line) = line else { return std::future::pending().await };
    line.timer.tick().await;
    line.keep_alive(progress).await.is_ok()
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

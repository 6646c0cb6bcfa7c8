//! One timeline from one server: bytes in, pieces and segments out, acknowledgements back.
//!
//! One task does it all but compressing full frames, sealing large objects and the uploads, so
//! statuses go out whatever the store does: when too much is on its way, only the reading stops.

mod drain;
mod settle;

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;

use bytes::Bytes;
use tokio::time::Instant;

use super::line::{Line, silence_max};
use super::source::Facts;
use super::troubles::{Trouble, no_memory, not_taken, slot_lost, trouble};
use super::unfinished::Left;
use super::uploads::Uploads;
use super::watch::{News, Watch};
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
    /// The server shuts down and waits for our word, which the store does not let us give: it waits no longer.
    LetGo,
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

/// What a message from the server means for the stream.
enum Heeded {
    GoOn,
    /// We were asked to stop while it was taken: the stream ends here.
    Asked,
    Switched {
        next: Timeline,
        switch_lsn: Lsn,
    },
    ServerStopped,
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
    /// Segments that have pieces, are stored complete and not tidied yet. `Some` of those that an earlier receiver left: only
    /// these pieces were compared.
    untidy: BTreeMap<SegmentName, Option<BTreeSet<(u32, u32)>>>,
    /// Segments that were stored complete in this session, and beside which no piece is left.
    completed: BTreeSet<SegmentName>,
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
            untidy: BTreeMap::new(),
            completed: BTreeSet::new(),
            began: Instant::now(),
            stop_at: None,
        }
    }

    /// Has these pieces of complete segments removed, beside everything else.
    pub(super) fn tidy_later(&mut self, left: Left) {
        self.untidy.extend(left.into_iter().map(|(segment, same)| (segment, Some(same))));
    }

    /// Returns the segments that were stored complete, and beside which no piece is left.
    pub(super) fn take_completed(&mut self) -> BTreeSet<SegmentName> {
        std::mem::take(&mut self.completed)
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
        tokio::select! {
            opened = self.open_segment(self.start.lsn) => opened?,
            // Nothing is in hand yet.
            _ = stop.wanted() => return Ok(End::Asked),
        }
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

    /// Begins to stream; `None`: we were asked to stop before the server answered.
    async fn open_line(
        &self,
        mut connection: Connection,
        stop: &mut StopRequest,
    ) -> Result<Option<Line>, Trouble> {
        connection.set_silence_limit(Some(silence_max(self.facts)));
        let start = StreamStart {
            slot: self.request.slot.clone(),
            start_lsn: self.start.lsn,
            timeline: self.start.timeline,
        };
        let opened = tokio::select! {
            opened = connection.stream_wal(&start) => opened,
            _ = stop.wanted() => return Ok(None),
        };
        let mut stream = opened.map_err(|error| trouble(error, "could not start streaming"))?;
        // From here on the line watches silence: it knows whether anybody listens.
        stream.set_silence_limit(None);
        Ok(Some(Line::new(stream, self.start.lsn, self.facts)))
    }

    async fn stream(
        &mut self,
        connection: Connection,
        watch: &mut Watch,
        stop: &mut StopRequest,
    ) -> Result<End, Trouble> {
        let Some(mut line) = self.open_line(connection, stop).await? else {
            return Ok(End::Asked);
        };
        loop {
            self.cut_if_due()?;
            self.merge_or_tidy()?;
            line.tell(&self.progress).await?;
            if line.holds_up_a_shutdown(self.is_idle()) {
                return Ok(let_go());
            }
            let listens = self.held_bytes() < HELD_BYTES_MAX
                && !self.progress.is_far_ahead(self.facts.segment_size);
            line.listens(listens);
            let cut_at = match self.when_to_cut() {
                Cut::At(at) => Some(self.began + at),
                Cut::Now | Cut::Wait => None,
            };
            let (tell_at, look_at) = (line.tell_at(), line.look_at());
            tokio::select! {
                event = line.stream.next(), if listens => {
                    let event = event.map_err(|error| trouble(error, "lost the stream"))?;
                    match self.heed(event, &mut line, stop).await? {
                        Heeded::GoOn => {}
                        Heeded::Asked => return self.stop(line, stop).await,
                        Heeded::Switched { next, switch_lsn } => {
                            let mut connection = Box::new(line.stream.into_connection());
                            connection.set_silence_limit(Some(silence_max(self.facts)));
                            return Ok(End::Switched { next, switch_lsn, connection });
                        }
                        Heeded::ServerStopped => return Ok(End::ServerStopped),
                    }
                }
                settled = self.uploads.next(), if !self.uploads.is_empty() => {
                    if self.settle(settled?) {
                        line.stored();
                    }
                }
                () = until(cut_at) => {}
                _ = line.timer.tick() => line.keep_alive(&self.progress).await?,
                () = until(tell_at) => line.answer(&self.progress).await?,
                () = until(look_at) => {
                    line.looks();
                    watch.look_now();
                }
                Some(news) = watch.news.recv() => match news {
                    News::SlotLost => return Err(slot_lost()),
                    News::ShutsDown if line.holds_up_unread() => return Ok(let_go()),
                    News::ShutsDown => {}
                },
                _ = stop.wanted() => return self.stop(line, stop).await,
            }
        }
    }

    /// Takes what came from the server.
    async fn heed(
        &mut self,
        event: StreamEvent,
        line: &mut Line,
        stop: &mut StopRequest,
    ) -> Result<Heeded, Trouble> {
        line.heard();
        match event {
            StreamEvent::Wal { start_lsn, data, .. } => {
                line.received();
                // It may have to read what is stored; meanwhile nothing that can be told changes.
                let progress = self.progress.clone();
                let mut taken = pin!(self.take(start_lsn, data));
                loop {
                    tokio::select! {
                        biased;
                        taken = &mut taken => break taken?,
                        _ = line.timer.tick() => line.keep_alive(&progress).await?,
                        // What was not taken of it is not received; nothing may come behind it.
                        _ = stop.wanted() => return Ok(Heeded::Asked),
                    }
                }
            }
            StreamEvent::Keepalive { reply_requested, .. } => {
                if reply_requested {
                    self.uncut.hurry = self.uncut.since.is_some();
                    line.asked();
                }
            }
            StreamEvent::ServerStopped => return Ok(Heeded::ServerStopped),
            StreamEvent::TimelineEnd { next, switch_lsn } => {
                return Ok(Heeded::Switched { next, switch_lsn });
            }
        }
        Ok(Heeded::GoOn)
    }

    /// Ends the stream because we were asked to stop.
    async fn stop(&mut self, mut line: Line, stop: &mut StopRequest) -> Result<End, Trouble> {
        self.drain(stop, Some(&mut line)).await?;
        line.answer(&self.progress).await?;
        // The server may go on sending for a moment; nobody waits for that.
        drop(line.stream.stop().await);
        Ok(End::Asked)
    }

    /// Returns whether everything that was received is stored or cannot be acknowledged yet.
    fn is_idle(&self) -> bool {
        self.uploads.is_settled() && self.uncut.since.is_none()
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
            self.uploads.note_pieces(segment);
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
            self.pace.sent(piece.end_lsn);
            self.uploads.put_piece(segment, piece);
        }
    }
}

/// Said at once: storing what is in hand may take as long as the store is away.
fn let_go() -> End {
    tracing::warn!(
        "the server shuts down, and the store takes nothing: the stream was ended, for the server to stop. What was not acknowledged it keeps for the slot, and sends again when it is started"
    );
    End::LetGo
}

/// Waits until then; without end where there is no such time.
async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
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

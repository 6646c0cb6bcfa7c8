//! One WAL segment in the making: its bytes come in order, and any part of it can be sealed.
//!
//! Owns what lies between a stream of WAL and the objects that stand for it: the walk that checks every record, the
//! frames (each byte is compressed once and shared by every object it is in), digests and
//! headers. Never here: when to cut, when to merge, what to tell the server, or a call of the store.
//!
//! ```text
//! pushed     |-------------------------------------------->
//! frames     [1 MiB    ][1 MiB    ][300 K][2 K][ 90 K ]...   a cut ends the frame early
//! cut                                    ^    ^       ^
//! pieces     [0 .. 2.3 MiB              ][    ][      ]
//! merged     [0 .. 2.4 MiB                            ]     the same frames under another header
//! unit       the whole segment up to 16 MiB, else each 16 MiB of it: what archive-push would store
//! ```

mod frame_maker;
mod spans;
mod unsealed;

use std::io;
use std::ops::Range;

use bytes::Bytes;
use frame_maker::Frame;
pub use frame_maker::FrameMaker;
use spans::{FRAME_BYTES, Span};
use unsealed::{Label, summary_of};
pub use unsealed::{SealedPiece, Unsealed};

use super::{PIECE_BYTES, Repository, StoredPrefix, WHOLE_SEGMENT_BYTES_MAX};
use crate::format::{Codec, FrameCompressor, Kind, SummaryBuilder, WalObject, WalSummary};
use crate::pg::{
    Extent, Lsn, Mark, SegmentExpectation, SegmentFacts, SegmentName, SegmentSize, SegmentWalk,
    SystemId, WalCarry, WalDamage, WalFileName,
};

/// Why bytes were not taken. Each is final for the segment at hand: begin it anew.
#[derive(Debug, thiserror::Error)]
pub enum AssemblyError {
    /// No segment of this size has that name: its last part is too large.
    #[error(
        "`{0}` cannot be the name of a WAL segment of this cluster: its last part is too large"
    )]
    NoSuchSegment(SegmentName),
    /// The bytes are no sound WAL. Those before the block that was pushed are held and can be cut.
    #[error(transparent)]
    Damage(#[from] WalDamage),
    /// The bytes differ from those that the repository holds of this stretch: two servers write under
    /// one name. Nothing that is stored was touched.
    #[error(
        "segment {segment}: the WAL from {start_lsn} to {end_lsn} differs from what is stored of it"
    )]
    Diverges {
        /// The segment.
        segment: SegmentName,
        /// The segment's first byte.
        start_lsn: Lsn,
        /// Behind the last byte that was stored before.
        end_lsn: Lsn,
    },
    /// The codec failed, which means no memory.
    #[error("WAL could not be compressed")]
    Codec(#[from] io::Error),
    /// An earlier push failed.
    #[error("an earlier failure ended this segment")]
    Ended,
}

/// The stretch that no cut has ended yet.
#[derive(Debug)]
struct OpenSpan {
    start: u32,
    summary: SummaryBuilder,
    /// Hashes the stretch; where it begins with a unit, the unit's own hasher does.
    hasher: Option<blake3::Hasher>,
    frames: Vec<Frame>,
}

/// What the repository held before, until it is compared.
#[derive(Debug)]
struct Stored {
    prefix: StoredPrefix,
    hasher: blake3::Hasher,
}

/// Takes the bytes of one segment in order, from its first, and seals parts of it.
///
/// Offsets are bytes within the segment. Memory: the frames of the units that
/// [`Self::take_units`] has not handed out yet, at most one if it is called whenever
/// [`Self::position`] comes to a unit's end, and 2 MiB; [`Self::held_bytes`] tells.
#[derive(Debug)]
pub struct SegmentAssembly {
    repository: Repository,
    system_id: SystemId,
    segment: SegmentName,
    start_lsn: Lsn,
    size: SegmentSize,
    compressor: FrameCompressor,
    maker: Option<FrameMaker>,
    walk: SegmentWalk,
    stored: Option<Stored>,
    position: u32,
    cut_position: u32,
    /// The bytes of the frame in the making.
    plain: Vec<u8>,
    open: OpenSpan,
    /// What was ended, of units not handed out yet.
    spans: Vec<Span>,
    spans_bytes: u64,
    unit_hasher: blake3::Hasher,
    /// Digests of units that are complete and not handed out yet, in order.
    full_units: Vec<blake3::Hash>,
    has_failed: bool,
}

impl SegmentAssembly {
    /// Begins a segment. With `carry`, the walk goes on from the segment before. `stored` is what the
    /// repository holds of it already: those bytes must be pushed as well, are never cut again, and must be the same.
    ///
    /// # Errors
    /// [`AssemblyError::NoSuchSegment`], [`AssemblyError::Codec`].
    pub fn begin(
        repository: &Repository,
        system_id: SystemId,
        segment: SegmentName,
        size: SegmentSize,
        codec: Codec,
        carry: Option<WalCarry>,
        stored: Option<StoredPrefix>,
    ) -> Result<Self, AssemblyError> {
        let expectation = SegmentExpectation::of(segment, size, Some(system_id), Extent::Whole)
            .ok_or(AssemblyError::NoSuchSegment(segment))?;
        let walk = match carry {
            Some(carry) => SegmentWalk::after(carry, expectation),
            None => SegmentWalk::new(expectation),
        };
        let stored = stored.filter(|prefix| prefix.end > 0);
        let start_lsn = expectation.start_lsn;
        Ok(Self {
            repository: repository.clone(),
            system_id,
            segment,
            start_lsn,
            size,
            compressor: FrameCompressor::new(codec)?,
            maker: None,
            walk,
            position: 0,
            cut_position: stored.map_or(0, |prefix| prefix.end),
            stored: stored.map(|prefix| Stored { prefix, hasher: blake3::Hasher::new() }),
            plain: Vec::new(),
            open: OpenSpan {
                start: 0,
                summary: SummaryBuilder::new(segment.timeline, start_lsn),
                hasher: None,
                frames: Vec::new(),
            },
            spans: Vec::new(),
            spans_bytes: 0,
            unit_hasher: blake3::Hasher::new(),
            full_units: Vec::new(),
            has_failed: false,
        })
    }

    /// Has full frames compressed by `maker` from here on, while the next bytes are taken.
    pub fn make_frames_with(&mut self, maker: &FrameMaker) {
        self.maker = Some(maker.clone());
    }

    /// Takes the next bytes, which must not go past the segment's end, and shows every mark in WAL
    /// order: also those of a record that began in the segment before, and of a block that fails behind them.
    ///
    /// # Errors
    /// [`AssemblyError`]; every later push fails as well.
    pub fn push(
        &mut self,
        mut bytes: &[u8],
        on_mark: &mut dyn FnMut(&Mark),
    ) -> Result<(), AssemblyError> {
        if self.has_failed {
            return Err(AssemblyError::Ended);
        }
        self.has_failed = true;
        let (expected, found) = (self.size.bytes(), u64::from(self.position) + bytes.len() as u64);
        if found > expected {
            return Err(WalDamage::WrongSize { expected, found }.into());
        }
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(self.room()));
            self.take(now, on_mark)?;
            bytes = later;
        }
        self.has_failed = false;
        Ok(())
    }

    /// Returns the offset of the next byte.
    pub fn position(&self) -> u32 {
        self.position
    }

    /// Returns the offset up to which pieces were cut, units were handed out, or the repository held
    /// all before.
    pub fn cut_position(&self) -> u32 {
        self.cut_position
    }

    /// Returns the LSN of the segment's first byte.
    pub fn start_lsn(&self) -> Lsn {
        self.start_lsn
    }

    /// Returns the segment's name.
    pub fn segment(&self) -> SegmentName {
        self.segment
    }

    /// Returns about how much memory is held, in bytes; objects that were handed out share it.
    pub fn held_bytes(&self) -> u64 {
        // The compressor has as much room as the longest frame.
        self.spans_bytes
            + 2 * self.plain.capacity() as u64
            + self.open.frames.iter().map(Frame::held_bytes).sum::<u64>()
    }

    /// Ends the current frame and returns what came since the last cut: nothing, one piece, or one for
    /// each unit it lies in. Waits for its frames where they are still being made.
    ///
    /// # Errors
    /// Want of memory. Nothing is cut then, and never will be where a frame was lost.
    pub fn cut(&mut self) -> io::Result<Vec<SealedPiece>> {
        if self.position <= self.cut_position {
            return Ok(Vec::new());
        }
        self.end_span()?;
        self.wait_for_frames(self.cut_position, self.position)?;
        let fresh = self.spans.iter().filter(|span| span.start >= self.cut_position);
        let pieces = fresh.map(|span| self.sealed_piece(span)).collect::<io::Result<_>>()?;
        self.cut_position = self.position;
        Ok(pieces)
    }

    /// As [`Self::cut`], but returns nothing from `end` on; nothing can be pushed any more. For a timeline
    /// that ended before the last byte received.
    ///
    /// # Errors
    /// As [`Self::cut`].
    pub fn cut_until(&mut self, end: u32) -> io::Result<Vec<SealedPiece>> {
        self.has_failed = true;
        if end >= self.position {
            return self.cut();
        }
        if end <= self.cut_position {
            return Ok(Vec::new());
        }
        self.end_span()?;
        self.wait_for_frames(self.cut_position, self.position)?;
        let fresh = self.cut_position..end;
        let mut pieces = Vec::new();
        for span in self.spans.iter().filter(|span| fresh.contains(&span.start)) {
            if span.end <= end {
                pieces.push(self.sealed_piece(span)?);
            } else {
                let end_lsn = Lsn(self.start_lsn.0 + u64::from(end));
                let short = span.cut_short(end, end_lsn, &mut self.compressor)?;
                pieces.push(self.sealed_piece(&short)?);
            }
        }
        self.cut_position = end;
        Ok(pieces)
    }

    /// Returns what lies from `start` to `end` (excluded), to be sealed again as one larger piece. Cheap:
    /// the frames are shared. Nothing changes here until [`Self::adopt`].
    ///
    /// Both must be offsets at which was cut, or where a unit or what was stored before begins or ends, and
    /// lie in one unit that [`Self::take_units`] has not handed out.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for other offsets; else as [`Self::cut`].
    pub fn to_merge(&mut self, start: u32, end: u32) -> io::Result<Unsealed> {
        let is_in_one_unit = start < end && start / PIECE_BYTES == (end - 1) / PIECE_BYTES;
        let stretch = if is_in_one_unit { self.stretch(start, end) } else { None };
        let stretch = stretch.ok_or_else(no_such_stretch)?;
        self.wait_for_frames(start, end)?;
        let spans = &self.spans[stretch];
        let label = self.piece_label(start, end, summary_of(spans).ok_or_else(no_such_stretch)?);
        let known = if let [span] = spans { Some(span.digest) } else { None };
        let frames: Vec<Vec<Bytes>> = spans.iter().map(Span::made).collect::<io::Result<_>>()?;
        let frames = frames.into_iter().flatten().map(Frame::Made).collect();
        Ok(Unsealed::new(label, frames, known, None))
    }

    /// Holds the frames of a merged piece instead of those it was made of, which saves memory
    /// where those were small: what lay between its ends is one stretch from then on. Does nothing
    /// where they are no longer held, and for any other object.
    pub fn adopt(&mut self, piece: &SealedPiece) {
        let WalObject::Piece { segment, start, end } = piece.object else { return };
        if segment != self.segment {
            return;
        }
        let Some(stretch) = self.stretch(start, end) else { return };
        let Some(summary) = summary_of(&self.spans[stretch.clone()]) else { return };
        let frames = piece.sealed.body.pieces().iter().cloned().map(Frame::Made).collect();
        let span = Span { start, end, summary, digest: piece.digest, frames };
        self.spans_bytes += span.held_bytes();
        for replaced in self.spans.splice(stretch, [span]) {
            self.spans_bytes -= replaced.held_bytes();
        }
    }

    /// Returns the units that have become complete, each to be sealed as the object that `archive-push` stores: same
    /// name, same digest, same facts in the header. Cheap, and waits for no frame. Their bytes are no longer held here, and not cut any more.
    pub fn take_units(&mut self) -> Vec<Unsealed> {
        let mut units = Vec::new();
        for digest in std::mem::take(&mut self.full_units) {
            let unit = |span: &Span| span.start / PIECE_BYTES;
            let number = self.spans.first().map(unit);
            let count = self.spans.iter().take_while(|span| Some(unit(span)) == number).count();
            let spans: Vec<Span> = self.spans.drain(..count).collect();
            let (Some(summary), Some(first), Some(last)) =
                (summary_of(&spans), spans.first(), spans.last())
            else {
                break;
            };
            self.spans_bytes -= spans.iter().map(Span::held_bytes).sum::<u64>();
            self.cut_position = self.cut_position.max(last.end);
            let label = self.unit_label(first.start, last.end, summary);
            let known = if let [span] = spans.as_slice() { Some(span.digest) } else { None };
            let frames = spans.into_iter().flat_map(|span| span.frames).collect();
            units.push(Unsealed::new(label, frames, known, Some(digest)));
        }
        units
    }

    /// Ends the segment, and returns what it holds and what the walk of the next one goes on with.
    ///
    /// # Errors
    /// [`AssemblyError::Damage`] when bytes are missing.
    pub fn finish(self) -> Result<(SegmentFacts, Option<WalCarry>), AssemblyError> {
        Ok(self.walk.finish_with_carry()?)
    }

    /// How many bytes there are to the next place where a frame or a stretch ends.
    fn room(&self) -> usize {
        let in_unit = PIECE_BYTES - self.position % PIECE_BYTES;
        let in_stored = self.stored.as_ref().map(|stored| stored.prefix.end - self.position);
        let room = in_stored.map_or(in_unit, |left| in_unit.min(left)) as usize;
        room.min(FRAME_BYTES - self.plain.len())
    }

    fn take(&mut self, bytes: &[u8], on_mark: &mut dyn FnMut(&Mark)) -> Result<(), AssemblyError> {
        let start_lsn = self.start_lsn;
        let mut summary = SummaryBuilder::new(self.segment.timeline, self.lsn(self.position));
        self.walk.feed_with(bytes, &mut |mark| {
            // Headers count no record of an earlier segment: archive-push does not see its beginning.
            if mark.lsn >= start_lsn {
                summary.add(mark);
            }
            on_mark(mark);
        })?;
        // No block is longer than a frame.
        self.position += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        summary.reach(&self.walk, self.lsn(self.position));
        self.open.summary.absorb(summary);
        self.unit_hasher.update(bytes);
        if let Some(hasher) = &mut self.open.hasher {
            hasher.update(bytes);
        }
        self.gather(bytes);
        if self.plain.len() == FRAME_BYTES {
            self.end_frame()?;
        }
        self.compare_with_stored(bytes)?;
        let ends_segment = u64::from(self.position) == self.size.bytes();
        if ends_segment || self.position.is_multiple_of(PIECE_BYTES) {
            self.end_span()?;
            self.full_units.push(std::mem::take(&mut self.unit_hasher).finalize());
            self.open.hasher = None;
        }
        Ok(())
    }

    fn compare_with_stored(&mut self, bytes: &[u8]) -> Result<(), AssemblyError> {
        let Some(mut stored) = self.stored.take() else { return Ok(()) };
        stored.hasher.update(bytes);
        if self.position < stored.prefix.end {
            self.stored = Some(stored);
            return Ok(());
        }
        if stored.hasher.finalize() != stored.prefix.digest {
            let end_lsn = self.lsn(self.position);
            let (segment, start_lsn) = (self.segment, self.start_lsn);
            return Err(AssemblyError::Diverges { segment, start_lsn, end_lsn });
        }
        Ok(self.end_span()?)
    }

    /// Adds bytes to the frame in the making, whose room grows with it and never beyond a full one.
    fn gather(&mut self, bytes: &[u8]) {
        let (held, room) = (self.plain.len(), self.plain.capacity());
        if held + bytes.len() > room {
            let wanted = (2 * room).max(held + bytes.len()).min(FRAME_BYTES);
            self.plain.reserve_exact(wanted - held);
        }
        self.plain.extend_from_slice(bytes);
    }

    /// Ends the frame in the making. A full one is compressed aside if it can be, one that a cut ends
    /// here: whoever cuts waits for it.
    fn end_frame(&mut self) -> io::Result<()> {
        if self.plain.len() == FRAME_BYTES {
            let plain = std::mem::take(&mut self.plain);
            match self.made_aside(plain) {
                Ok(frame) => {
                    self.open.frames.push(frame);
                    self.plain = Vec::with_capacity(FRAME_BYTES);
                    // So that they count as what they have become.
                    return self.open.frames.iter_mut().try_for_each(Frame::look);
                }
                Err(plain) => self.plain = plain,
            }
        }
        if !self.plain.is_empty() {
            self.open.frames.push(Frame::Made(self.compressor.frame(&self.plain)?));
            self.plain.clear();
        }
        Ok(())
    }

    /// Makes a frame without compressing it here; gives its bytes back where that cannot be.
    fn made_aside(&self, plain: Vec<u8>) -> Result<Frame, Vec<u8>> {
        match (self.compressor.codec(), &self.maker) {
            (Codec::None, _) => Ok(Frame::Made(plain.into_boxed_slice().into())),
            (codec, Some(maker)) => maker.make(codec, plain),
            (_, None) => Err(plain),
        }
    }

    /// Waits until the frames of the spans from `start` to `end` are made.
    fn wait_for_frames(&mut self, start: u32, end: u32) -> io::Result<()> {
        let first = self.spans.partition_point(|span| span.start < start);
        for span in self.spans[first..].iter_mut().take_while(|span| span.start < end) {
            self.spans_bytes -= span.held_bytes();
            let waited = span.wait();
            self.spans_bytes += span.held_bytes();
            waited?;
        }
        Ok(())
    }

    /// Ends the stretch in the making, if there is one.
    fn end_span(&mut self) -> io::Result<()> {
        if self.open.start == self.position {
            return Ok(());
        }
        self.end_frame()?;
        let next = OpenSpan {
            start: self.position,
            summary: SummaryBuilder::new(self.segment.timeline, self.lsn(self.position)),
            hasher: Some(blake3::Hasher::new()),
            frames: Vec::new(),
        };
        let open = std::mem::replace(&mut self.open, next);
        let span = Span {
            start: open.start,
            end: self.position,
            summary: open.summary,
            digest: open.hasher.as_ref().unwrap_or(&self.unit_hasher).finalize(),
            frames: open.frames,
        };
        self.spans_bytes += span.held_bytes();
        self.spans.push(span);
        Ok(())
    }

    fn lsn(&self, offset: u32) -> Lsn {
        Lsn(self.start_lsn.0 + u64::from(offset))
    }

    /// Finds the spans that begin at `start` and end at `end`.
    fn stretch(&self, start: u32, end: u32) -> Option<Range<usize>> {
        let first = self.spans.binary_search_by_key(&start, |span| span.start).ok()?;
        let last = self.spans.binary_search_by_key(&end, |span| span.end).ok()?;
        (first <= last).then_some(first..last + 1)
    }

    fn sealed_piece(&self, span: &Span) -> io::Result<SealedPiece> {
        let label = self.piece_label(span.start, span.end, span.summary.clone());
        Ok(label.seal(span.digest, span.made()?))
    }

    fn piece_label(&self, start: u32, end: u32, summary: SummaryBuilder) -> Label {
        let object = WalObject::Piece { segment: self.segment, start, end };
        self.label(object, Kind::Piece, start..end, summary.finish_piece())
    }

    fn unit_label(&self, start: u32, end: u32, summary: SummaryBuilder) -> Label {
        if self.size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
            return self.piece_label(start, end, summary);
        }
        let object = WalObject::File(WalFileName::Segment(self.segment));
        let summary = summary.finish_segment(self.segment.timeline, &self.walk);
        self.label(object, Kind::Segment, start..end, summary)
    }

    fn label(&self, object: WalObject, kind: Kind, place: Range<u32>, wal: WalSummary) -> Label {
        let key = self.repository.wal_key(self.system_id, object);
        Label {
            object,
            kind,
            name: self.repository.below(&key),
            key,
            system_id: self.system_id,
            codec: self.compressor.codec(),
            start_lsn: self.lsn(place.start),
            end_lsn: self.lsn(place.end),
            wal,
        }
    }
}

fn no_such_stretch() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "no stretch of one unit begins and ends there")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

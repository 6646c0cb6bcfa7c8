//! Objects in the making: what is cheap is done where WAL comes in, the rest wherever there is time.

use std::io;

use bytes::Bytes;

use super::frame_maker::Frame;
use super::spans::{ANEW_BYTES, Span, are_small, joined};
use crate::format::{Codec, Header, Kind, SummaryBuilder, WalObject, WalSummary};
use crate::pg::{Lsn, SystemId};
use crate::repo::SealedObject;
use crate::store::{Body, Key};

/// A stretch of a segment, ready for [`Repository::put_sealed`](super::Repository::put_sealed).
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct SealedPiece {
    /// What it is: a piece, or the whole segment.
    pub object: WalObject,
    /// Its key.
    pub key: Key,
    /// Header and body.
    pub sealed: SealedObject,
    /// The LSN of its first byte.
    pub start_lsn: Lsn,
    /// The LSN behind its last byte, wherever records end.
    pub end_lsn: Lsn,
    /// BLAKE3 of its plain bytes, as the header has it in hex.
    pub(super) digest: blake3::Hash,
}

/// What a stretch is called, and what its header says beside size and digest.
#[derive(Debug)]
pub(super) struct Label {
    pub(super) object: WalObject,
    pub(super) kind: Kind,
    pub(super) key: Key,
    /// The part of the key below the cluster's place.
    pub(super) name: String,
    pub(super) system_id: SystemId,
    pub(super) codec: Codec,
    pub(super) start_lsn: Lsn,
    pub(super) end_lsn: Lsn,
    pub(super) wal: WalSummary,
}

impl Label {
    fn plain_bytes(&self) -> u64 {
        self.end_lsn.0 - self.start_lsn.0
    }

    /// Puts the header before frames; nothing is copied.
    pub(super) fn seal(self, digest: blake3::Hash, frames: Vec<Bytes>) -> SealedPiece {
        let plain_bytes = self.plain_bytes();
        let Self { object, kind, key, name, system_id, codec, start_lsn, end_lsn, wal } = self;
        let mut body = Body::default();
        for frame in frames {
            body.push(frame);
        }
        let mut header = Header::new(kind, name, system_id, codec.packing());
        header.plain_bytes = plain_bytes;
        header.stored_bytes = body.len();
        header.blake3 = Some(digest.to_hex().to_string());
        header.wal = Some(wal);
        let sealed = SealedObject { header, body };
        SealedPiece { object, key, sealed, start_lsn, end_lsn, digest }
    }
}

/// A stretch of a segment that [`Self::seal`] makes one object of, on any thread: for
/// thousands of small frames that takes tens of milliseconds, in which no WAL should wait.
#[derive(Debug)]
pub struct Unsealed {
    label: Label,
    frames: Vec<Frame>,
    /// The digest of the frames, where one stretch is all there is.
    known: Option<blake3::Hash>,
    /// What the digest must be, where it was taken from the bytes as they came.
    expected: Option<blake3::Hash>,
}

impl Unsealed {
    pub(super) fn new(
        label: Label,
        frames: Vec<Frame>,
        known: Option<blake3::Hash>,
        expected: Option<blake3::Hash>,
    ) -> Self {
        Self { label, frames, known, expected }
    }

    /// Returns the LSN of its first byte.
    pub fn start_lsn(&self) -> Lsn {
        self.label.start_lsn
    }

    /// Returns about how much memory it holds, in bytes, with what [`Self::seal`] needs: frames made anew are
    /// not larger than those they replace, which are let go one by one.
    pub fn held_bytes(&self) -> u64 {
        let held = self.frames.iter().map(Frame::held_bytes).sum::<u64>();
        if are_small(self.frames.len(), self.label.plain_bytes()) {
            held + ANEW_BYTES
        } else {
            held
        }
    }

    /// Makes the object: small frames are compressed again as large ones, others are shared, and
    /// the digest is taken from what the frames hold. Uses the processor, and waits for nothing but frames in the making.
    ///
    /// # Errors
    /// Want of memory, or frames that do not hold the bytes that were taken, which is no
    /// matter of trying again: begin the segment anew.
    pub fn seal(self) -> io::Result<SealedPiece> {
        let Self { label, frames, known, expected } = self;
        let wait = |mut frame: Frame| frame.wait().cloned();
        let frames = frames.into_iter().map(wait).collect::<io::Result<_>>()?;
        let (digest, frames) = joined(frames, label.plain_bytes(), known, label.codec)?;
        if expected.is_some_and(|expected| expected != digest) {
            return Err(io::Error::other("the frames held are not the bytes that were taken"));
        }
        Ok(label.seal(digest, frames))
    }
}

/// Returns what the records of spans that follow each other say; `None` of none.
pub(super) fn summary_of(spans: &[Span]) -> Option<SummaryBuilder> {
    let (first, others) = spans.split_first()?;
    let mut summary = first.summary.clone();
    for span in others {
        summary.absorb(span.summary.clone());
    }
    Some(summary)
}

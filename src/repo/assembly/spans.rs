//! Stretches of a segment as they are held: compressed once, sealed as often as needed.

use std::io;

use bytes::Bytes;

use super::frame_maker::{Frame, lost};
use crate::format::{Codec, CodecError, FrameCompressor, SummaryBuilder, read_frames};
use crate::pg::Lsn;
use crate::repo::objects::Pieces;

/// How many plain bytes a frame holds at most.
pub(super) const FRAME_BYTES: usize = 1 << 20;

/// Frames that hold less than this on average are made anew where many become one object: alone, a small
/// commit compresses badly.
const SMALL_FRAME_BYTES: u64 = 64 << 10;

/// What making frames anew needs beside them, in bytes: a frame's plain bytes, and the codec's room for it.
pub(super) const ANEW_BYTES: u64 = 3 << 20;

/// A stretch between two places at which a piece may begin or end.
#[derive(Debug)]
pub(super) struct Span {
    /// The offset of its first byte in the segment.
    pub(super) start: u32,
    /// The offset behind its last byte.
    pub(super) end: u32,
    /// What its records say.
    pub(super) summary: SummaryBuilder,
    /// BLAKE3 of its plain bytes.
    pub(super) digest: blake3::Hash,
    /// Its bytes, compressed.
    pub(super) frames: Vec<Frame>,
}

impl Span {
    /// Returns about how much memory it holds.
    pub(super) fn held_bytes(&self) -> u64 {
        size_of::<Self>() as u64 + self.frames.iter().map(Frame::held_bytes).sum::<u64>()
    }

    /// Waits until all its frames are made.
    ///
    /// # Errors
    /// As [`Frame::wait`].
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.frames.iter_mut().try_for_each(|frame| frame.wait().map(drop))
    }

    /// Returns its frames, shared.
    ///
    /// # Errors
    /// One was not waited for, or is lost.
    pub(super) fn made(&self) -> io::Result<Vec<Bytes>> {
        self.frames.iter().map(|frame| frame.made().cloned().ok_or_else(lost)).collect()
    }

    /// Makes a span of the bytes before `end`, which lies inside; the span is untouched.
    ///
    /// # Errors
    /// As [`joined`] and [`Self::made`].
    pub(super) fn cut_short(
        &self,
        end: u32,
        end_lsn: Lsn,
        compressor: &mut FrameCompressor,
    ) -> io::Result<Self> {
        let mut left = (end - self.start) as usize;
        let mut plain = Vec::with_capacity(left);
        let plain_bytes = u64::from(self.end - self.start);
        each_plain(self.made()?, plain_bytes, compressor.codec(), |block| {
            let now = &block[..block.len().min(left)];
            left -= now.len();
            plain.extend_from_slice(now);
            Ok(())
        })?;
        let mut summary = self.summary.clone();
        summary.cut_short(end_lsn);
        let frames =
            plain.chunks(FRAME_BYTES).map(|chunk| compressor.frame(chunk).map(Frame::Made));
        let frames = frames.collect::<io::Result<_>>()?;
        Ok(Self { start: self.start, end, summary, digest: blake3::hash(&plain), frames })
    }
}

/// Returns whether so many frames of `plain_bytes` in all are worth being made anew as one object.
pub(super) fn are_small(count: usize, plain_bytes: u64) -> bool {
    count > 1 && plain_bytes / SMALL_FRAME_BYTES < count as u64
}

/// Makes frames those of one object: small ones are made anew, others are shared. Returns
/// their digest as well, which is `known` where nothing has to be read for it.
///
/// # Errors
/// Only for want of memory, or if the frames do not give their bytes back.
pub(super) fn joined(
    frames: Vec<Bytes>,
    plain_bytes: u64,
    known: Option<blake3::Hash>,
    codec: Codec,
) -> io::Result<(blake3::Hash, Vec<Bytes>)> {
    if are_small(frames.len(), plain_bytes) {
        return made_anew(frames, plain_bytes, &mut FrameCompressor::new(codec)?);
    }
    if let Some(digest) = known {
        return Ok((digest, frames));
    }
    let mut hasher = blake3::Hasher::new();
    each_plain(frames.clone(), plain_bytes, codec, |block| {
        hasher.update(block);
        Ok(())
    })?;
    Ok((hasher.finalize(), frames))
}

/// Compresses the bytes of small frames again, in large ones; returns their digest as well. Each
/// is let go as soon as it is read, so that the bytes are not held twice.
fn made_anew(
    frames: Vec<Bytes>,
    plain_bytes: u64,
    compressor: &mut FrameCompressor,
) -> io::Result<(blake3::Hash, Vec<Bytes>)> {
    let mut hasher = blake3::Hasher::new();
    let mut plain = Vec::with_capacity(FRAME_BYTES);
    let mut anew = Vec::new();
    each_plain(frames, plain_bytes, compressor.codec(), |mut block| {
        hasher.update(block);
        while !block.is_empty() {
            let (now, later) = block.split_at(block.len().min(FRAME_BYTES - plain.len()));
            plain.extend_from_slice(now);
            block = later;
            if plain.len() == FRAME_BYTES {
                anew.push(compressor.frame(&plain)?);
                plain.clear();
            }
        }
        Ok(())
    })?;
    if !plain.is_empty() {
        anew.push(compressor.frame(&plain)?);
    }
    Ok((hasher.finalize(), anew))
}

/// Gives the plain bytes of `frames` block by block.
fn each_plain(
    frames: Vec<Bytes>,
    plain_bytes: u64,
    codec: Codec,
    mut take: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let stored = Pieces::behind(frames, 0);
    let outcome = read_frames(codec.packing(), stored, plain_bytes, |block| {
        take(block).map_err(Reading::Taking)
    });
    outcome.map_err(|error| match error {
        Reading::Codec(error) => io::Error::other(error),
        Reading::Taking(error) => error,
    })
}

enum Reading {
    Codec(CodecError),
    Taking(io::Error),
}

impl From<CodecError> for Reading {
    fn from(error: CodecError) -> Self {
        Self::Codec(error)
    }
}

//! What the data frames of a pack hold: the last frame of the pack, which its header names.
//!
//! It makes a pack tell by itself which chunks and pages are in it, so that what a backup has stored is of use
//! also when that backup died before it could write a map. Little endian:
//!
//! ```text
//! "HWI1"                                    4
//! u32 frames, then each:
//!     u32 frame offset | u32 frame stored bytes | u32 frame plain bytes
//!     u32 pieces, then each:
//!         digest                           16  BLAKE3 of its bytes, first 128 bits
//!         u32 offset in the plain frame | u32 bytes
//! ```
//!
//! Pieces below [`INDEXED_BYTES_MIN`] are left out: there may be very many of them, and they are soon stored again.

use super::{CHUNK_BYTES, ChunkDigest};

const MAGIC: &[u8; 4] = b"HWI1";

/// The least bytes of a piece that an index tells.
pub const INDEXED_BYTES_MIN: u32 = 4 << 10;

/// A chunk, or a stretch of pages of one, as it stands in a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The digest of its bytes.
    pub digest: ChunkDigest,
    /// Where it begins in the plain frame.
    pub in_frame: u32,
    /// How many bytes: 1 to [`CHUNK_BYTES`].
    pub bytes: u32,
}

/// A data frame of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexedFrame {
    /// The offset in the pack, header included.
    pub offset: u32,
    /// Its length as stored.
    pub stored: u32,
    /// Its length before compression.
    pub plain: u32,
    /// What it holds.
    pub pieces: Vec<Piece>,
}

/// The bytes are not a pack's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is not the index of a pack")]
pub struct PackIndexError;

/// Returns the bytes of the index of these frames.
pub fn encode_pack_index(frames: &[IndexedFrame]) -> Vec<u8> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&number(frames.len()));
    for frame in frames {
        for n in [frame.offset, frame.stored, frame.plain] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&number(frame.pieces.len()));
        for piece in &frame.pieces {
            out.extend_from_slice(&piece.digest.0);
            out.extend_from_slice(&piece.in_frame.to_le_bytes());
            out.extend_from_slice(&piece.bytes.to_le_bytes());
        }
    }
    out
}

/// Parses the index of a pack. Every piece lies in its frame.
///
/// # Errors
/// [`PackIndexError`]; a retry does not help. Nothing is allocated beyond the size of `bytes`.
pub fn decode_pack_index(bytes: &[u8]) -> Result<Vec<IndexedFrame>, PackIndexError> {
    let mut rest = Rest(bytes);
    if rest.take::<4>()? != MAGIC {
        return Err(PackIndexError);
    }
    let count = rest.number()?;
    let mut frames = Vec::new();
    for _ in 0..count {
        let (offset, stored, plain) = (rest.number()?, rest.number()?, rest.number()?);
        let mut pieces = Vec::new();
        for _ in 0..rest.number()? {
            let digest = ChunkDigest(*rest.take::<16>()?);
            let (in_frame, bytes) = (rest.number()?, rest.number()?);
            let end = in_frame.checked_add(bytes).ok_or(PackIndexError)?;
            if bytes == 0 || bytes > CHUNK_BYTES || end > plain {
                return Err(PackIndexError);
            }
            pieces.push(Piece { digest, in_frame, bytes });
        }
        frames.push(IndexedFrame { offset, stored, plain, pieces });
    }
    if rest.0.is_empty() { Ok(frames) } else { Err(PackIndexError) }
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take<const N: usize>(&mut self) -> Result<&'a [u8; N], PackIndexError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(PackIndexError)?;
        self.0 = tail;
        Ok(head)
    }

    fn number(&mut self) -> Result<u32, PackIndexError> {
        Ok(u32::from_le_bytes(*self.take::<4>()?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_frame() -> impl Strategy<Value = IndexedFrame> {
        let piece = (any::<[u8; 16]>(), 0..CHUNK_BYTES, 1..=CHUNK_BYTES).prop_map(
            |(digest, in_frame, bytes)| Piece { digest: ChunkDigest(digest), in_frame, bytes },
        );
        let pieces = prop::collection::vec(piece, 0..9);
        (any::<u32>(), any::<u32>(), 0u32..100, pieces).prop_map(
            |(offset, stored, more, pieces)| {
                let ends = pieces.iter().map(|piece| piece.in_frame + piece.bytes);
                let plain = ends.max().unwrap_or(0) + more;
                IndexedFrame { offset, stored, plain, pieces }
            },
        )
    }

    proptest! {
        #[test]
        fn any_index_comes_back(frames in prop::collection::vec(any_frame(), 0..5)) {
            prop_assert_eq!(decode_pack_index(&encode_pack_index(&frames)).unwrap(), frames);
        }

        #[test]
        fn a_cut_or_longer_index_is_refused(
            frames in prop::collection::vec(any_frame(), 0..5),
            cut: prop::sample::Index,
            extra: u8,
        ) {
            let mut bytes = encode_pack_index(&frames);
            prop_assert!(decode_pack_index(&bytes[..cut.index(bytes.len())]).is_err());
            bytes.push(extra);
            prop_assert!(decode_pack_index(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = decode_pack_index(&bytes);
        }
    }

    #[test]
    fn a_piece_outside_its_frame_is_refused() {
        let piece = |in_frame, bytes| Piece { digest: ChunkDigest([7; 16]), in_frame, bytes };
        let index = |pieces| {
            encode_pack_index(&[IndexedFrame { offset: 1024, stored: 9, plain: 100, pieces }])
        };
        assert!(decode_pack_index(&index(vec![piece(0, 60), piece(60, 40)])).is_ok());
        for wrong in [piece(60, 41), piece(5, 0), piece(u32::MAX, 2)] {
            assert!(decode_pack_index(&index(vec![wrong])).is_err(), "{wrong:?}");
        }
    }
}

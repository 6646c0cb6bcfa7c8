//! The bytes of an object on their way into a store.

use std::io::{self, Write};

use bytes::Bytes;

/// The longest piece that [`BodyWriter`] makes, in bytes. Bytes that grow in one piece are moved again and again, and
/// for a moment there is room for three times as many as were written.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// What an object is made of: pieces that follow each other. Cheap to clone,
/// so that an attempt can be repeated.
#[derive(Debug, Clone, Default)]
pub struct Body {
    pieces: Vec<Bytes>,
    len: u64,
}

impl Body {
    /// Appends one piece.
    pub fn push(&mut self, piece: Bytes) {
        self.len += piece.len() as u64;
        if !piece.is_empty() {
            self.pieces.push(piece);
        }
    }

    /// Returns the length of all pieces, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether there is not a single byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the pieces in order.
    pub fn pieces(&self) -> &[Bytes] {
        &self.pieces
    }

    /// Returns the pieces in order, each to be let go of by itself.
    pub fn into_pieces(self) -> Vec<Bytes> {
        self.pieces
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        let mut body = Self::default();
        body.push(bytes.into());
        body
    }
}

/// Gathers a body while it is written, in pieces of at most 1 MiB.
#[derive(Debug, Default)]
pub struct BodyWriter {
    done: Body,
    piece: Vec<u8>,
}

impl BodyWriter {
    /// Returns what was written.
    pub fn finish(mut self) -> Body {
        self.done.push(self.piece.into());
        self.done
    }
}

impl Write for BodyWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(PIECE_BYTES_MAX - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == PIECE_BYTES_MAX {
            // Whoever fills one piece will likely fill the next: room for it at once, where it need not be moved.
            let next = Vec::with_capacity(PIECE_BYTES_MAX);
            self.done.push(std::mem::replace(&mut self.piece, next).into());
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_any_portions_is_the_body_in_pieces_of_bounded_length() {
        let bytes: Vec<u8> = (0..=250).cycle().take(3 * PIECE_BYTES_MAX + 5).collect();
        for portion in
            [1000, PIECE_BYTES_MAX - 1, PIECE_BYTES_MAX, 2 * PIECE_BYTES_MAX + 1, bytes.len()]
        {
            let mut writer = BodyWriter::default();
            for part in bytes.chunks(portion) {
                writer.write_all(part).unwrap();
            }
            let body = writer.finish();
            assert_eq!(body.len(), bytes.len() as u64);
            assert_eq!(body.pieces().concat(), bytes);
            let lengths: Vec<_> = body.pieces().iter().map(Bytes::len).collect();
            assert_eq!(lengths, [PIECE_BYTES_MAX, PIECE_BYTES_MAX, PIECE_BYTES_MAX, 5]);
        }
        assert!(BodyWriter::default().finish().pieces().is_empty());
    }
}

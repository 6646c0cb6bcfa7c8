//! Full frames, compressed on a thread of their own while the next bytes come in.
//!
//! Owns the thread and what is on its way to it and back. Never here: which bytes make a frame, or what
//! frames are put into.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread;

use bytes::Bytes;

use super::spans::FRAME_BYTES;
use crate::format::{Codec, FrameCompressor};

/// How many full frames wait for the thread at most. One more means that the processor cannot keep up:
/// whoever has it then compresses it in place, and nobody waits.
const FRAMES_WAITING_MAX: usize = 2;

/// The stack: the codec's tables are elsewhere.
const STACK_BYTES: usize = 512 << 10;

/// The bytes of a frame, and who waits for it.
type Order = (Vec<u8>, SyncSender<io::Result<Bytes>>);

/// Compresses full frames for one segment after another. Clones share the thread, which ends with the last of them.
///
/// Memory: at most four frames of 1 MiB, plain, and what the codec needs. A thread of its own, not any of
/// the runtime's: an allocator keeps an arena for each thread, and each that had compressed once would
/// keep some MiB for the next time.
#[derive(Debug, Clone)]
pub struct FrameMaker {
    codec: Codec,
    /// The way to the thread; `None` where there is none.
    orders: Option<SyncSender<Order>>,
}

impl FrameMaker {
    /// Starts the thread. Where none can be had, or where there is nothing to compress, frames are made in place.
    pub fn start(codec: Codec) -> Self {
        if codec == Codec::None {
            return Self { codec, orders: None };
        }
        let (orders, waiting) = sync_channel::<Order>(FRAMES_WAITING_MAX);
        let work = move || {
            let mut compressor = None;
            for (plain, promise) in waiting {
                // Whoever does not wait any more has no use for it.
                let _ = promise.send(compressed(&mut compressor, codec, &plain));
            }
        };
        match thread::Builder::new().name("frames".to_owned()).stack_size(STACK_BYTES).spawn(work) {
            Ok(_) => Self { codec, orders: Some(orders) },
            Err(error) => {
                tracing::warn!(
                    "WAL is compressed where it comes in, for no thread could be started: {error}"
                );
                Self { codec, orders: None }
            }
        }
    }

    /// Has `plain` compressed; it is given back where the thread has enough to do, or compresses in
    /// another way than `codec`.
    pub(super) fn make(&self, codec: Codec, plain: Vec<u8>) -> Result<Frame, Vec<u8>> {
        let Some(orders) = self.orders.as_ref().filter(|_| codec == self.codec) else {
            return Err(plain);
        };
        let (promise, made) = sync_channel(1);
        match orders.try_send((plain, promise)) {
            Ok(()) => Ok(Frame::InMaking(made)),
            Err(TrySendError::Full((plain, _)) | TrySendError::Disconnected((plain, _))) => {
                Err(plain)
            }
        }
    }
}

/// Compresses one frame; what the codec needs is made with the first.
fn compressed(
    compressor: &mut Option<FrameCompressor>,
    codec: Codec,
    plain: &[u8],
) -> io::Result<Bytes> {
    let mut ready = match compressor.take() {
        Some(ready) => ready,
        None => FrameCompressor::new(codec)?,
    };
    let frame = ready.frame(plain);
    *compressor = Some(ready);
    frame
}

/// A frame that is made, or is being made.
#[derive(Debug)]
pub(super) enum Frame {
    /// Its bytes.
    Made(Bytes),
    /// It comes from the thread.
    InMaking(Receiver<io::Result<Bytes>>),
}

impl Frame {
    /// Returns about how much memory it takes, in bytes; of one in the making, the most.
    pub(super) fn held_bytes(&self) -> u64 {
        let bytes = match self {
            Self::Made(bytes) => bytes.len(),
            Self::InMaking(_) => FRAME_BYTES,
        };
        (bytes + size_of::<Self>()) as u64
    }

    /// Returns its bytes, if it is made.
    pub(super) fn made(&self) -> Option<&Bytes> {
        match self {
            Self::Made(bytes) => Some(bytes),
            Self::InMaking(_) => None,
        }
    }

    /// Takes note of its bytes if they are there by now.
    ///
    /// # Errors
    /// As [`Self::wait`].
    pub(super) fn look(&mut self) -> io::Result<()> {
        if let Self::InMaking(made) = self {
            match made.try_recv() {
                Ok(bytes) => *self = Self::Made(bytes?),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return Err(lost()),
            }
        }
        Ok(())
    }

    /// Waits until it is made, which takes milliseconds, and returns its bytes.
    ///
    /// # Errors
    /// Want of memory; a frame that failed stays lost, and every later call fails.
    pub(super) fn wait(&mut self) -> io::Result<&Bytes> {
        if let Self::InMaking(made) = self {
            *self = Self::Made(made.recv().map_err(|_| lost())??);
        }
        self.made().ok_or_else(lost)
    }
}

/// Returns the error of a frame that will not come any more.
pub(super) fn lost() -> io::Error {
    io::Error::other("a frame of WAL was lost where it was compressed")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::format::{CodecError, read_frames};

    fn plain_of(codec: Codec, frame: &Bytes, plain_bytes: usize) -> Vec<u8> {
        let mut plain = Vec::new();
        read_frames(codec.packing(), frame.as_ref(), plain_bytes as u64, |block| {
            plain.extend_from_slice(block);
            Ok::<_, CodecError>(())
        })
        .unwrap();
        plain
    }

    #[test]
    fn a_thread_with_enough_to_do_gives_the_bytes_back_and_loses_none() {
        let codec = Codec::Zstd(19);
        let maker = FrameMaker::start(codec);
        let text = |n: u8| [n, 1, 2, n ^ 0x4D, 4, 5, 6].repeat(30_000);
        let mut frames = Vec::new();
        let refused = (0u8..=u8::MAX).find(|n| match maker.make(codec, text(*n)) {
            Ok(frame) => {
                frames.push(frame);
                false
            }
            Err(plain) => {
                assert_eq!(plain, text(*n));
                true
            }
        });
        assert_eq!(usize::from(refused.unwrap()), frames.len());
        assert!(frames.len() >= FRAMES_WAITING_MAX);
        for (n, frame) in (0u8..).zip(&mut frames) {
            let bytes = frame.wait().unwrap();
            assert_eq!(plain_of(codec, bytes, 210_000), text(n));
            frame.look().unwrap();
            assert!(frame.made().is_some());
        }
    }

    #[test]
    fn what_is_asked_for_in_another_way_is_given_back() {
        for (started, asked) in [(Codec::Lz4, Codec::Zstd(1)), (Codec::None, Codec::None)] {
            let given = FrameMaker::start(started).make(asked, vec![7; 10]);
            assert_eq!(given.unwrap_err(), vec![7; 10]);
        }
    }

    #[test]
    fn a_frame_that_failed_is_never_taken_for_one_that_is_made() {
        let in_making = || {
            let (promise, made) = sync_channel(1);
            (promise, Frame::InMaking(made))
        };
        let (promise, mut failed) = in_making();
        failed.look().unwrap();
        assert_eq!(failed.held_bytes(), (FRAME_BYTES + size_of::<Frame>()) as u64);
        promise.send(Err(io::ErrorKind::OutOfMemory.into())).unwrap();
        drop(promise);
        assert_eq!(failed.wait().unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        assert!(failed.look().is_err() && failed.wait().is_err() && failed.made().is_none());

        let (promise, mut orphan) = in_making();
        drop(promise);
        assert!(orphan.look().is_err() && orphan.wait().is_err() && orphan.made().is_none());
    }
}

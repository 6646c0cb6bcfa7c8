//! Compression: standard zstd or lz4 frames, or plain bytes.
//!
//! Every frame carries its codec's own checksum, so that `zstd -d` and `lz4 -d`
//! notice damage without Highwater.

use std::cmp::Ordering;
use std::fmt;
use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;

use bytes::Bytes;
use lz4_flex::frame::FrameDecoder;
use serde::{Deserialize, Serialize};

/// How far back zstd looks for repetitions, as a power of two: 1 MiB. The tables of the slow levels grow with
/// it: at level 19 a window of 8 MiB needs 81 MiB of memory (`lib/compress/clevels.h`), this one about 18.
const WINDOW_LOG_MAX: u32 = 20;

/// How the bytes of an object are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// zstd at a level from 1 to 19. Level 1 is the default: on WAL, level 3
    /// is no smaller and costs two to four times the CPU (`docs/benchmarks.md`).
    Zstd(i32),
    /// lz4 frames: less CPU, about half as small on WAL.
    Lz4,
    /// As they are.
    None,
}

/// How stored bytes are compressed, as headers and frame references name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packing {
    /// zstd frames.
    Zstd,
    /// lz4 frames.
    Lz4,
    /// Plain bytes.
    None,
}

impl Packing {
    /// Returns the number that chunk maps carry.
    pub fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }

    /// Returns the packing with that number.
    pub fn of_code(code: u8) -> Option<Self> {
        [Self::None, Self::Zstd, Self::Lz4].into_iter().find(|packing| packing.code() == code)
    }
}

/// The codec's setting could not be understood, or a frame could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The setting names no codec.
    #[error("`{0}` is not a compression; use `zstd`, `zstd:1` to `zstd:19`, `lz4` or `none`")]
    Unknown(String),
    /// The stored bytes are damaged or cut short.
    #[error("the compressed bytes are damaged")]
    Damaged(#[source] io::Error),
    /// More came out than the header or entry promised.
    #[error("the compressed bytes hold more than the {expected_bytes} bytes they should")]
    TooLong {
        /// The promised plain length.
        expected_bytes: u64,
    },
    /// Less came out than the header or entry promised.
    #[error("the compressed bytes hold {found_bytes} bytes, not the {expected_bytes} they should")]
    TooShort {
        /// The promised plain length.
        expected_bytes: u64,
        /// What was found.
        found_bytes: u64,
    },
}

impl Codec {
    /// The codec used unless another is set.
    pub const DEFAULT: Self = Self::Zstd(1);

    /// Returns what readers need to know; the level is not among it.
    pub fn packing(self) -> Packing {
        match self {
            Self::Zstd(_) => Packing::Zstd,
            Self::Lz4 => Packing::Lz4,
            Self::None => Packing::None,
        }
    }

    /// Returns an upper bound of the memory that compressing takes besides what goes in and what comes out, in bytes.
    ///
    /// The tables are those of zstd's levels for long input, cut to the window (`lib/compress/clevels.h`;
    /// `ZSTD_estimateCCtxSize` in `lib/compress/zstd_compress.c`), with room for the window itself and a block.
    pub fn working_bytes(self) -> u64 {
        const MIB: u64 = 1 << 20;
        match self {
            Self::None => 0,
            Self::Lz4 => MIB,
            Self::Zstd(..=2) => 2 * MIB,
            Self::Zstd(..=6) => 5 * MIB,
            Self::Zstd(..=9) => 11 * MIB,
            Self::Zstd(..=15) => 16 * MIB,
            Self::Zstd(_) => 20 * MIB,
        }
    }

    /// Compresses `plain` into one frame.
    ///
    /// # Errors
    /// Only if the codec itself fails, which means no memory.
    pub fn frame(self, plain: &[u8]) -> io::Result<Vec<u8>> {
        let mut writer = FrameWriter::new(self, Some(plain.len() as u64))?;
        writer.write_all(plain)?;
        writer.finish()
    }
}

impl FromStr for Codec {
    type Err = CodecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "zstd" => Ok(Self::DEFAULT),
            "lz4" => Ok(Self::Lz4),
            "none" => Ok(Self::None),
            _ => text
                .strip_prefix("zstd:")
                .filter(|level| level.bytes().all(|digit| digit.is_ascii_digit()))
                .and_then(|level| level.parse().ok())
                .filter(|level| (1..=19).contains(level))
                .map(Self::Zstd)
                .ok_or_else(|| CodecError::Unknown(text.to_owned())),
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Lz4 => f.write_str("lz4"),
            Self::None => f.write_str("none"),
        }
    }
}

/// Returns whether a level would take a window above [`WINDOW_LOG_MAX`]: the first two have 512 KiB and 1 MiB.
fn wants_shorter_window(level: i32) -> bool {
    level > 2
}

/// Compresses a stream of bytes into one frame held in memory.
pub struct FrameWriter<W: Write = Vec<u8>> {
    inner: Inner<W>,
}

enum Inner<W: Write> {
    Zstd(zstd::stream::write::Encoder<'static, W>),
    Lz4(Box<lz4_flex::frame::FrameEncoder<W>>),
    Plain(W),
}

impl<W: Write> fmt::Debug for FrameWriter<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameWriter").finish_non_exhaustive()
    }
}

impl FrameWriter {
    /// Begins a frame. With `plain_bytes`, exactly so many must be written.
    pub fn new(codec: Codec, plain_bytes: Option<u64>) -> io::Result<Self> {
        Self::into(codec, plain_bytes, Vec::new())
    }

    /// As [`Self::new`], writing into `room` (emptied first), which [`Self::finish`] gives back.
    fn in_room(codec: Codec, plain_bytes: Option<u64>, mut room: Vec<u8>) -> io::Result<Self> {
        room.clear();
        Self::into(codec, plain_bytes, room)
    }
}

impl<W: Write> FrameWriter<W> {
    /// As [`FrameWriter::new`], writing into `out`, which [`Self::finish`] gives back.
    pub fn into(codec: Codec, plain_bytes: Option<u64>, out: W) -> io::Result<Self> {
        let inner = match codec {
            Codec::Zstd(level) => {
                let mut encoder = zstd::stream::write::Encoder::new(out, level)?;
                encoder.include_checksum(true)?;
                if wants_shorter_window(level) {
                    encoder.window_log(WINDOW_LOG_MAX)?;
                }
                encoder.set_pledged_src_size(plain_bytes)?;
                Inner::Zstd(encoder)
            }
            Codec::Lz4 => {
                // A smaller block needs less room, which makes a short frame cheap.
                let block_size = match plain_bytes {
                    Some(..=0xFFFF) => lz4_flex::frame::BlockSize::Max64KB,
                    _ => lz4_flex::frame::BlockSize::Max256KB,
                };
                let info = lz4_flex::frame::FrameInfo::new()
                    .content_checksum(true)
                    .content_size(plain_bytes)
                    .block_size(block_size);
                Inner::Lz4(Box::new(lz4_flex::frame::FrameEncoder::with_frame_info(info, out)))
            }
            Codec::None => Inner::Plain(out),
        };
        Ok(Self { inner })
    }

    /// Ends the frame and returns where it was written: by default its bytes.
    pub fn finish(self) -> io::Result<W> {
        match self.inner {
            Inner::Zstd(encoder) => encoder.finish(),
            Inner::Lz4(encoder) => encoder.finish().map_err(io::Error::other),
            Inner::Plain(out) => Ok(out),
        }
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut self.inner {
            Inner::Zstd(encoder) => encoder.write(bytes),
            Inner::Lz4(encoder) => encoder.write(bytes),
            Inner::Plain(out) => out.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Compresses texts one after another, each into a frame of its own; what the codec needs
/// for that is made once, so that a frame of a few hundred bytes is cheap.
pub struct FrameCompressor {
    codec: Codec,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    /// Where the codec writes; frames are copied out, so that none keeps room it does not need
    /// and no allocation that grew lies between those that stay.
    room: Vec<u8>,
}

impl fmt::Debug for FrameCompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrameCompressor").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl FrameCompressor {
    /// Makes a compressor.
    ///
    /// # Errors
    /// Only if the codec itself fails, which means no memory; so with the others.
    pub fn new(codec: Codec) -> io::Result<Self> {
        let zstd = match codec {
            Codec::Zstd(level) => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                compressor.include_checksum(true)?;
                if wants_shorter_window(level) {
                    compressor.window_log(WINDOW_LOG_MAX)?;
                }
                Some(compressor)
            }
            Codec::Lz4 | Codec::None => None,
        };
        Ok(Self { codec, zstd, room: Vec::new() })
    }

    /// Returns the codec.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Compresses `plain` into one frame, as [`Codec::frame`] does.
    pub fn frame(&mut self, plain: &[u8]) -> io::Result<Bytes> {
        match &mut self.zstd {
            _ if self.codec == Codec::None => Ok(Bytes::copy_from_slice(plain)),
            Some(compressor) => {
                self.room.clear();
                self.room.reserve(zstd::zstd_safe::compress_bound(plain.len()));
                compressor.compress_to_buffer(plain, &mut self.room)?;
                Ok(Bytes::copy_from_slice(&self.room))
            }
            None => {
                let room = std::mem::take(&mut self.room);
                let mut writer = FrameWriter::in_room(self.codec, Some(plain.len() as u64), room)?;
                writer.write_all(plain)?;
                self.room = writer.finish()?;
                Ok(Bytes::copy_from_slice(&self.room))
            }
        }
    }
}

/// Decompresses a sequence of frames and gives the plain bytes to `sink`, in
/// blocks of at most 256 KiB.
///
/// Exactly `plain_bytes` must come out: memory and disk stay bounded by what
/// the (checked) header promised, whatever the stored bytes claim.
///
/// # Errors
/// [`CodecError`] for damage; an error of `sink` is passed on as it is.
pub fn read_frames<E: From<CodecError>>(
    packing: Packing,
    stored: impl Read,
    plain_bytes: u64,
    mut sink: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut reader: Box<dyn Read> = match packing {
        Packing::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(stored).map_err(CodecError::Damaged)?;
            Box::new(LimitedWindow::checked(decoder)?)
        }
        Packing::Lz4 => {
            let stored = Some(io::BufReader::new(stored));
            Box::new(Lz4Frames { stored, current: None })
        }
        Packing::None => Box::new(stored),
    };
    let mut block = vec![0; 256 << 10];
    let mut found_bytes: u64 = 0;
    loop {
        let n = match reader.read(&mut block) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CodecError::Damaged(error).into()),
        };
        found_bytes += n as u64;
        if found_bytes > plain_bytes {
            return Err(CodecError::TooLong { expected_bytes: plain_bytes }.into());
        }
        sink(&block[..n])?;
    }
    if found_bytes < plain_bytes {
        return Err(CodecError::TooShort { expected_bytes: plain_bytes, found_bytes }.into());
    }
    Ok(())
}

/// As [`read_frames`], for what fits into memory: the plain bytes in one piece, without a copy on the way.
///
/// # Errors
/// As there. `plain_bytes` are reserved beforehand: the caller knows that it is no wild number.
pub fn read_whole(
    packing: Packing,
    stored: &[u8],
    plain_bytes: usize,
) -> Result<Vec<u8>, CodecError> {
    let mut plain = Vec::with_capacity(plain_bytes);
    if packing == Packing::Zstd {
        let mut decompressor = zstd::bulk::Decompressor::new().map_err(CodecError::Damaged)?;
        // It writes no more than there is room for, and the vector's capacity may be more than was asked for.
        let found = decompressor.decompress_to_buffer(stored, &mut plain);
        found.map_err(CodecError::Damaged)?;
        let (expected_bytes, found_bytes) = (plain_bytes as u64, plain.len() as u64);
        return match plain.len().cmp(&plain_bytes) {
            Ordering::Equal => Ok(plain),
            Ordering::Less => Err(CodecError::TooShort { expected_bytes, found_bytes }),
            Ordering::Greater => Err(CodecError::TooLong { expected_bytes }),
        };
    }
    read_frames(packing, stored, plain_bytes as u64, |block| {
        plain.extend_from_slice(block);
        Ok::<_, CodecError>(())
    })?;
    Ok(plain)
}

/// A zstd decoder that refuses frames whose window would need more than 64 MiB,
/// so that damaged bytes cannot make it allocate gigabytes.
struct LimitedWindow<R: Read>(zstd::stream::read::Decoder<'static, io::BufReader<R>>);

impl<R: Read> LimitedWindow<R> {
    const WINDOW_LOG_MAX: u32 = 26;

    fn checked(
        mut decoder: zstd::stream::read::Decoder<'static, io::BufReader<R>>,
    ) -> Result<Self, CodecError> {
        decoder.window_log_max(Self::WINDOW_LOG_MAX).map_err(CodecError::Damaged)?;
        Ok(Self(decoder))
    }
}

impl<R: Read> Read for LimitedWindow<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.0.read(out)
    }
}

/// Reads one lz4 frame after another, each with a decoder of its own: the library's keeps the
/// buffers of the first frame's block size, which another frame need not have.
struct Lz4Frames<R: Read> {
    stored: Option<io::BufReader<R>>,
    current: Option<FrameDecoder<io::BufReader<R>>>,
}

impl<R: Read> Read for Lz4Frames<R> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(decoder) = &mut self.current {
                match decoder.read(out)? {
                    0 => self.stored = self.current.take().map(FrameDecoder::into_inner),
                    n => return Ok(n),
                }
            }
            let Some(stored) = &mut self.stored else { return Ok(0) };
            if stored.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.current = self.stored.take().map(FrameDecoder::new);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn unframe(codec: Codec, stored: &[u8], plain_bytes: u64) -> Result<Vec<u8>, CodecError> {
        let mut plain = Vec::new();
        let streamed = read_frames(codec.packing(), stored, plain_bytes, |block| {
            plain.extend_from_slice(block);
            Ok::<_, CodecError>(())
        });
        let whole = read_whole(codec.packing(), stored, usize::try_from(plain_bytes).unwrap());
        assert_eq!(whole.ok(), streamed.is_ok().then(|| plain.clone()), "both ways are alike");
        streamed.map(|()| plain)
    }

    const ALL: [Codec; 3] = [Codec::Zstd(1), Codec::Lz4, Codec::None];

    #[test]
    fn frames_that_follow_each_other_are_one_text() {
        let long: Vec<u8> = (0..3_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for codec in ALL {
            let mut stored = codec.frame(b"first ").unwrap();
            stored.extend(codec.frame(&long).unwrap());
            stored.extend(codec.frame(b" last").unwrap());
            let plain = unframe(codec, &stored, long.len() as u64 + 11).unwrap();
            assert!(plain.starts_with(b"first ") && plain.ends_with(b" last"), "{codec}");
            assert_eq!(plain.len(), long.len() + 11);
        }
    }

    #[test]
    fn a_cut_frame_is_never_taken_for_a_shorter_text() {
        let plain = b"water marks ".repeat(1000);
        for codec in ALL {
            let stored = codec.frame(&plain).unwrap();
            for cut in [0, 1, stored.len() / 2, stored.len() - 1] {
                assert!(
                    unframe(codec, &stored[..cut], plain.len() as u64).is_err(),
                    "{codec} {cut}"
                );
            }
        }
    }

    #[test]
    fn more_bytes_than_promised_are_refused() {
        for codec in ALL {
            let stored = codec.frame(&[7; 10_000]).unwrap();
            let error = unframe(codec, &stored, 9_999).unwrap_err();
            assert!(matches!(error, CodecError::TooLong { .. }), "{codec}: {error}");
        }
    }

    #[test]
    fn the_window_of_every_level_is_at_most_one_mebibyte_so_that_its_memory_is_known() {
        let plain: Vec<u8> = (0..1_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for level in [1, 2, 3, 9, 15, 19] {
            let codec = Codec::Zstd(level);
            let streamed = codec.frame(&plain).unwrap();
            let at_once = FrameCompressor::new(codec).unwrap().frame(&plain).unwrap();
            for frame in [&streamed[..], &at_once] {
                let mut decoder = zstd::stream::read::Decoder::new(frame).unwrap();
                decoder.window_log_max(WINDOW_LOG_MAX).unwrap();
                let read = io::copy(&mut decoder, &mut io::sink());
                assert_eq!(read.unwrap(), plain.len() as u64, "level {level}");
            }
        }
    }

    #[test]
    fn a_segment_that_is_pushed_has_room_for_the_memory_of_every_codec() {
        // Of the 40 MiB for segments on their way, 16 are for the bytes of one.
        assert!(Codec::Zstd(19).working_bytes() <= 24 << 20);
    }

    #[test]
    fn settings_name_their_codec() {
        assert_eq!("zstd".parse::<Codec>().unwrap(), Codec::Zstd(1));
        assert_eq!("zstd:19".parse::<Codec>().unwrap(), Codec::Zstd(19));
        for bad in ["", "gzip", "zstd:0", "zstd:20", "zstd:", "zstd:+1", "LZ4"] {
            assert!(bad.parse::<Codec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_compressor_makes_many_frames_that_carry_length_and_checksum() {
        let long: Vec<u8> = (0..1_000_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for codec in ALL {
            let mut compressor = FrameCompressor::new(codec).unwrap();
            let (mut stored, mut plain) = (Vec::new(), Vec::new());
            for len in [1, 500, 4_000_000, 0, 70_000, 3] {
                let frame = compressor.frame(&long[..len]).unwrap();
                // A streaming writer that is told the length lays its frame's head out alike.
                let head = &codec.frame(&long[..len]).unwrap()[..frame.len().min(5)];
                assert_eq!(&frame[..head.len()], head, "{codec} {len}");
                stored.extend_from_slice(&frame);
                plain.extend_from_slice(&long[..len]);
            }
            assert_eq!(unframe(codec, &stored, plain.len() as u64).unwrap(), plain);
        }
    }

    proptest! {
        #[test]
        fn any_text_comes_back(plain: Vec<u8>, which in 0usize..3) {
            let stored = ALL[which].frame(&plain).unwrap();
            prop_assert_eq!(unframe(ALL[which], &stored, plain.len() as u64).unwrap(), plain);
        }

        #[test]
        fn no_stored_bytes_panic(stored: Vec<u8>, which in 0usize..3) {
            let _ = unframe(ALL[which], &stored, 100);
        }
    }
}

//! Chunks, the frames that hold them, and the map from a file to its chunks.
//!
//! A file is cut at fixed offsets into chunks of 64 KiB. A chunk is a list of
//! *runs*, each a stretch of bytes inside a frame of some pack; normally there is one, and more where
//! only the pages that changed were stored by a later backup. A chunk of zeros has none and is stored as nothing. The digest is always that of the whole chunk.
//!
//! The map of up to [`MAP_CHUNKS_MAX`] chunks is a frame of its own, so that a later
//! backup names an unchanged file's map instead of writing it again. Little endian:
//!
//! ```text
//! "HWM1"                                    4
//! u16 sources, then each: u8 length, id     the backups whose packs hold the runs
//! u32 chunks, then each:
//!     digest                               16  BLAKE3, first 128 bits
//!     u8 runs, then each:
//!         u16 source | u8 codec (0 none, 1 zstd, 2 lz4) | u32 pack | u32 frame offset | u32 frame stored bytes | u32 frame plain bytes
//!         u32 offset in the plain frame | u32 offset in the chunk | u32 bytes
//! u32 each                                  CRC-32C of each chunk, or nothing at all
//! ```

use serde::{Deserialize, Serialize};

use super::{BackupId, Packing};

/// The size of a chunk; a file's last one may be shorter.
pub const CHUNK_BYTES: u32 = 64 << 10;

/// The most chunks that one map frame describes: 1 GiB of file.
pub const MAP_CHUNKS_MAX: usize = 16384;

/// The most runs that a chunk may have: its own, and four stretches of pages that changed since, which
/// cut it into five. Beyond, it is stored whole again.
pub const RUNS_MAX: usize = 9;

const MAGIC: &[u8; 4] = b"HWM1";

/// The first 128 bits of a chunk's BLAKE3.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ChunkDigest(pub [u8; 16]);

impl std::fmt::Debug for ChunkDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from(*self))
    }
}

impl From<ChunkDigest> for String {
    fn from(digest: ChunkDigest) -> Self {
        format!("{:032x}", u128::from_be_bytes(digest.0))
    }
}

impl TryFrom<String> for ChunkDigest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let plain = text.len() == 32 && !text.starts_with('+');
        plain
            .then(|| u128::from_str_radix(&text, 16).ok())
            .flatten()
            .map(|n| Self(n.to_be_bytes()))
            .ok_or_else(|| format!("`{text}` is not a chunk digest"))
    }
}

/// Returns the digest of a chunk's bytes.
pub fn digest_chunk(bytes: &[u8]) -> ChunkDigest {
    let mut short = [0; 16];
    short.copy_from_slice(&blake3::hash(bytes).as_bytes()[..16]);
    ChunkDigest(short)
}

/// Where one frame stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FrameRef {
    /// The backup whose pack it is in.
    pub backup: BackupId,
    /// The pack's number.
    pub pack: u32,
    /// The offset in the pack, header included.
    pub offset: u32,
    /// Its length as stored.
    pub stored: u32,
    /// Its length before compression.
    pub plain: u32,
    /// How it is compressed.
    pub codec: Packing,
}

/// A stretch of a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The frame that holds it.
    pub frame: FrameRef,
    /// Where it begins in the plain frame.
    pub in_frame: u32,
    /// Where it begins in the chunk.
    pub in_chunk: u32,
    /// How many bytes.
    pub bytes: u32,
}

/// A part of a chunk that is being recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChunkPart {
    /// Bytes that are stored already.
    Kept(Run),
    /// Bytes that are to be stored.
    New {
        /// Where they begin in the chunk.
        in_chunk: u32,
        /// How many.
        bytes: u32,
    },
}

/// One chunk of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkEntry {
    /// The digest of the whole chunk, zeros included.
    pub digest: ChunkDigest,
    /// Its runs; none for a chunk of zeros.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub runs: Vec<Run>,
}

impl ChunkEntry {
    /// Checks that the runs cover `chunk_bytes` exactly once, in order, inside their frames.
    pub fn is_whole(&self, chunk_bytes: u32) -> bool {
        let mut at: u64 = 0;
        for run in &self.runs {
            let inside =
                u64::from(run.in_frame) + u64::from(run.bytes) <= u64::from(run.frame.plain);
            if u64::from(run.in_chunk) != at || !inside || run.bytes == 0 {
                return false;
            }
            at += u64::from(run.bytes);
        }
        self.runs.is_empty() || at == u64::from(chunk_bytes)
    }
}

/// The chunks of a file, or of 1 GiB of it, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ChunkMap {
    /// The chunks.
    pub chunks: Vec<ChunkEntry>,
    /// CRC-32C of each chunk, of which that of a file can be joined; empty where they are not known.
    pub crcs: Vec<u32>,
}

/// The bytes are not a chunk map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkMapError {
    /// The magic bytes are missing.
    #[error("it is not a chunk map")]
    NotAMap,
    /// It ends too early, or goes on behind its end.
    #[error("the chunk map has another length than its counts say")]
    WrongLength,
    /// A number in it is not possible.
    #[error("the chunk map holds an impossible {0}")]
    Impossible(&'static str),
}

impl ChunkMap {
    /// Returns the map's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut sources: Vec<&BackupId> = Vec::new();
        let mut entries = Vec::with_capacity(self.chunks.len() * 48);
        for chunk in &self.chunks {
            entries.extend_from_slice(&chunk.digest.0);
            entries.push(u8::try_from(chunk.runs.len()).unwrap_or(u8::MAX));
            for run in &chunk.runs {
                let known = sources.iter().rposition(|id| **id == run.frame.backup);
                let source = known.unwrap_or_else(|| {
                    sources.push(&run.frame.backup);
                    sources.len() - 1
                });
                let source = u16::try_from(source).unwrap_or(u16::MAX);
                entries.extend_from_slice(&source.to_le_bytes());
                let frame = &run.frame;
                entries.push(frame.codec.code());
                for n in [
                    frame.pack,
                    frame.offset,
                    frame.stored,
                    frame.plain,
                    run.in_frame,
                    run.in_chunk,
                    run.bytes,
                ] {
                    entries.extend_from_slice(&n.to_le_bytes());
                }
            }
        }
        let mut out = Vec::with_capacity(entries.len() + 64);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&u16::try_from(sources.len()).unwrap_or(u16::MAX).to_le_bytes());
        for id in sources {
            out.push(u8::try_from(id.as_str().len()).unwrap_or(u8::MAX));
            out.extend_from_slice(id.as_str().as_bytes());
        }
        out.extend_from_slice(&u32::try_from(self.chunks.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&entries);
        if self.crcs.len() == self.chunks.len() {
            out.extend(self.crcs.iter().flat_map(|crc| crc.to_le_bytes()));
        }
        out
    }

    /// Parses a map.
    ///
    /// # Errors
    /// [`ChunkMapError`]; nothing is allocated beyond the size of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChunkMapError> {
        let mut rest = Rest(bytes);
        if rest.take(4).map_err(|_| ChunkMapError::NotAMap)? != MAGIC {
            return Err(ChunkMapError::NotAMap);
        }
        let mut sources = Vec::new();
        for _ in 0..rest.u16()? {
            let len = usize::from(rest.take(1)?[0]);
            let text = std::str::from_utf8(rest.take(len)?).ok();
            let id = text.and_then(|text| text.parse::<BackupId>().ok());
            sources.push(id.ok_or(ChunkMapError::Impossible("backup id"))?);
        }
        let count = rest.u32()? as usize;
        if count > MAP_CHUNKS_MAX {
            return Err(ChunkMapError::Impossible("number of chunks"));
        }
        let mut chunks = Vec::with_capacity(count);
        for _ in 0..count {
            let digest = rest.take(16)?.try_into().map_err(|_| ChunkMapError::WrongLength)?;
            let runs = usize::from(rest.take(1)?[0]);
            if runs > RUNS_MAX {
                return Err(ChunkMapError::Impossible("number of runs"));
            }
            let runs = (0..runs).map(|_| rest.run(&sources)).collect::<Result<_, _>>()?;
            chunks.push(ChunkEntry { digest: ChunkDigest(digest), runs });
        }
        let count = if rest.0.is_empty() { 0 } else { count };
        let crcs = (0..count).map(|_| rest.u32()).collect::<Result<_, _>>()?;
        if rest.0.is_empty() { Ok(Self { chunks, crcs }) } else { Err(ChunkMapError::WrongLength) }
    }
}

struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], ChunkMapError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(ChunkMapError::WrongLength)?;
        self.0 = tail;
        Ok(head)
    }

    fn u16(&mut self) -> Result<u16, ChunkMapError> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, ChunkMapError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn run(&mut self, sources: &[BackupId]) -> Result<Run, ChunkMapError> {
        let source = usize::from(self.u16()?);
        let backup = sources.get(source).ok_or(ChunkMapError::Impossible("source"))?.clone();
        let codec = Packing::of_code(self.take(1)?[0]);
        let frame = FrameRef {
            backup,
            codec: codec.ok_or(ChunkMapError::Impossible("codec"))?,
            pack: self.u32()?,
            offset: self.u32()?,
            stored: self.u32()?,
            plain: self.u32()?,
        };
        Ok(Run { frame, in_frame: self.u32()?, in_chunk: self.u32()?, bytes: self.u32()? })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn id(n: u32) -> BackupId {
        BackupId::at("2026-11-22T00:00:00Z".parse().unwrap(), n + 2)
    }

    fn any_run() -> impl Strategy<Value = Run> {
        (0u32..3, any::<[u32; 4]>(), any::<[u32; 3]>()).prop_map(|(backup, f, r)| Run {
            frame: FrameRef {
                backup: id(backup),
                pack: f[0],
                offset: f[1],
                stored: f[2],
                plain: f[3],
                codec: Packing::Lz4,
            },
            in_frame: r[0],
            in_chunk: r[1],
            bytes: r[2],
        })
    }

    fn any_map() -> impl Strategy<Value = ChunkMap> {
        let chunk = (any::<[u8; 16]>(), prop::collection::vec(any_run(), 0..=RUNS_MAX))
            .prop_map(|(digest, runs)| ChunkEntry { digest: ChunkDigest(digest), runs });
        (prop::collection::vec((chunk, any::<u32>()), 0..20), any::<bool>()).prop_map(
            |(chunks, with_crcs)| {
                let (chunks, crcs): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
                ChunkMap { chunks, crcs: if with_crcs { crcs } else { Vec::new() } }
            },
        )
    }

    #[test]
    fn a_digest_is_the_start_of_blake3() {
        // The first 16 bytes of the published test vector for empty input.
        assert_eq!(String::from(digest_chunk(b"")), "af1349b9f5f9a1a6a0404dea36dcc949");
    }

    #[test]
    fn a_chunk_whose_runs_leave_a_hole_is_not_whole() {
        let frame = FrameRef {
            backup: id(0),
            pack: 0,
            offset: 0,
            stored: 9,
            plain: 100,
            codec: Packing::None,
        };
        let run =
            |in_frame, in_chunk, bytes| Run { frame: frame.clone(), in_frame, in_chunk, bytes };
        let entry = |runs| ChunkEntry { digest: digest_chunk(b""), runs };
        assert!(entry(vec![run(0, 0, 60)]).is_whole(60));
        assert!(entry(vec![run(0, 0, 30), run(70, 30, 30)]).is_whole(60));
        assert!(entry(vec![]).is_whole(60), "zeros");
        assert!(!entry(vec![run(0, 0, 30)]).is_whole(60), "short");
        assert!(!entry(vec![run(0, 0, 30), run(0, 31, 29)]).is_whole(60), "hole");
        assert!(!entry(vec![run(41, 0, 60)]).is_whole(60), "outside its frame");
    }

    proptest! {
        #[test]
        fn any_map_comes_back(map in any_map()) {
            prop_assert_eq!(ChunkMap::decode(&map.encode()).unwrap(), map);
        }

        #[test]
        fn a_cut_or_longer_map_is_refused(map in any_map(), cut: prop::sample::Index, extra: u8) {
            let mut bytes = map.encode();
            let cut = cut.index(bytes.len());
            // Without its checksums a map is whole as well.
            let is_whole = cut == bytes.len() - map.crcs.len() * 4;
            prop_assert_eq!(ChunkMap::decode(&bytes[..cut]).is_err(), !is_whole);
            bytes.push(extra);
            prop_assert!(ChunkMap::decode(&bytes).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = ChunkMap::decode(&bytes);
        }
    }
}

//! What a WAL record says of the blocks it changed: which relation, which block, the page image, the data.
//!
//! ```text
//! header 24 | block header, ... | 252 u32 top xid | 255 u8 or 254 u32 main length | image, data of each block, ... | main data
//!
//! block header: u8 id (0..=32) | u8 fork and flags | u16 data bytes
//!               [u16 image bytes | u16 hole offset | u8 image flags [u16 hole bytes]]
//!               [u32 tablespace | u32 database | u32 relation]  u32 block
//! ```
//!
//! Sources: `src/include/access/xlogrecord.h`, `src/backend/access/transam/xlogreader.c`
//! (`DecodeXLogRecord`, `RestoreBlockImage`), `src/common/pg_lzcompress.c`.

use super::bytes::{u16_at, u32_at};
use super::wal_record::{RECORD_HEADER_BYTES, RecordHeader, WalEvent};
use super::{Fork, Lsn, MajorVersion, RelFileLocator};

/// The size of a data page. Other sizes can be compiled in; their images are not restored.
pub const DATA_PAGE_BYTES: usize = 8192;

/// How much of the body of a record without an event is shown to whoever looks at records: enough
/// for the headers of every block and the images and data of the first few.
pub(super) const OBSERVED_BODY_MAX: usize = 64 << 10;

const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;

/// A complete record whose checksum was right, as a walk shows it.
#[derive(Debug, Clone, Copy)]
pub struct WalRecord<'a> {
    /// Where it begins.
    pub lsn: Lsn,
    /// Where it ends, rounded up to 8 bytes (excluded).
    pub end_lsn: Lsn,
    /// Its header.
    pub header: RecordHeader,
    /// What it means, if its kind has an event that was understood.
    pub event: Option<&'a WalEvent>,
    /// The body from byte 24 on, or as much of its beginning as was kept.
    pub(super) body: &'a [u8],
    pub(super) version: MajorVersion,
}

/// The parts of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordParts<'a> {
    /// The blocks it changed, in the order of their ids.
    pub blocks: Vec<BlockRef<'a>>,
    /// The main data, or as much of its beginning as was kept.
    pub main: &'a [u8],
}

/// One block of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRef<'a> {
    /// The relation.
    pub relation: RelFileLocator,
    /// The fork; `None` for a number that no version has.
    pub fork: Option<Fork>,
    /// The block of the fork.
    pub block: u32,
    /// The page image, if there is one and it was kept.
    pub image: Option<PageImage<'a>>,
    /// The block's own data, or as much of its beginning as was kept.
    pub data: &'a [u8],
}

/// A page image as it stands in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageImage<'a> {
    bytes: &'a [u8],
    hole_offset: usize,
    hole_bytes: usize,
    packing: ImagePacking,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ImagePacking {
    Plain,
    Pglz,
    Lz4,
    Zstd,
}

/// What a block header says before the data is looked at.
struct BlockHead {
    relation: RelFileLocator,
    fork: Option<Fork>,
    block: u32,
    image: Option<ImageHead>,
    data_bytes: usize,
}

struct ImageHead {
    bytes: usize,
    hole_offset: usize,
    hole_bytes: usize,
    packing: ImagePacking,
}

impl<'a> WalRecord<'a> {
    /// Makes a record for tests; `body` is what follows the header.
    #[cfg(test)]
    pub(crate) fn for_test(
        (lsn, end_lsn): (Lsn, Lsn),
        header: RecordHeader,
        event: Option<&'a WalEvent>,
        body: &'a [u8],
    ) -> Self {
        Self { lsn, end_lsn, header, event, body, version: MajorVersion(17) }
    }

    /// Returns the version that wrote it.
    pub fn version(&self) -> MajorVersion {
        self.version
    }

    /// Returns its parts; `None` when its headers are not what its length says, or were not kept whole.
    pub fn parts(&self) -> Option<RecordParts<'a>> {
        parts_of(&self.header, self.body, self.version)
    }
}

fn parts_of<'a>(
    header: &RecordHeader,
    body: &'a [u8],
    version: MajorVersion,
) -> Option<RecordParts<'a>> {
    let body_bytes = (header.total_bytes as usize).checked_sub(RECORD_HEADER_BYTES)?;
    let mut heads: Vec<BlockHead> = Vec::new();
    let (mut at, mut main_bytes) = (0, 0);
    // A record may have neither blocks nor main data.
    while at < body_bytes {
        match *body.get(at)? {
            255 => {
                main_bytes = usize::from(*body.get(at + 1)?);
                at += 2;
                break;
            }
            254 => {
                main_bytes = u32_at(body, at + 1)? as usize;
                at += 5;
                break;
            }
            253 => at += 3,
            252 => at += 5,
            0..=32 => {
                let before = heads.last().map(|head| head.relation);
                let (head, end) = block_head(body, at, before, version)?;
                heads.push(head);
                at = end;
            }
            33..=251 => return None,
        }
        let payload: usize = heads.iter().map(BlockHead::payload_bytes).sum();
        if at + payload >= body_bytes {
            break;
        }
    }
    let kept = |start: usize, bytes: usize| {
        let end = start.saturating_add(bytes).min(body.len());
        body.get(start.min(end)..end).unwrap_or_default()
    };
    let mut blocks = Vec::with_capacity(heads.len());
    for head in heads {
        let image = head.image.as_ref().and_then(|image| {
            let bytes = kept(at, image.bytes);
            (bytes.len() == image.bytes).then_some(PageImage {
                bytes,
                hole_offset: image.hole_offset,
                hole_bytes: image.hole_bytes,
                packing: image.packing,
            })
        });
        let image_bytes = head.image.map_or(0, |image| image.bytes);
        let data = kept(at + image_bytes, head.data_bytes);
        at += image_bytes + head.data_bytes;
        let BlockHead { relation, fork, block, .. } = head;
        blocks.push(BlockRef { relation, fork, block, image, data });
    }
    (at + main_bytes == body_bytes).then(|| RecordParts { blocks, main: kept(at, main_bytes) })
}

impl BlockHead {
    fn payload_bytes(&self) -> usize {
        self.data_bytes + self.image.as_ref().map_or(0, |image| image.bytes)
    }
}

/// Reads the block header at `at`; returns it and where it ends.
fn block_head(
    body: &[u8],
    at: usize,
    before: Option<RelFileLocator>,
    version: MajorVersion,
) -> Option<(BlockHead, usize)> {
    let fork_flags = *body.get(at + 1)?;
    let data_bytes = usize::from(u16_at(body, at + 2)?);
    if (fork_flags & HAS_DATA == 0) != (data_bytes == 0) {
        return None;
    }
    let mut at = at + 4;
    let image = if fork_flags & HAS_IMAGE == 0 {
        None
    } else {
        let (image, end) = image_head(body, at, version)?;
        at = end;
        Some(image)
    };
    let relation = if fork_flags & SAME_RELATION == 0 {
        let word = |offset| u32_at(body, at + offset);
        let found = RelFileLocator { tablespace: word(0)?, database: word(4)?, relation: word(8)? };
        at += 12;
        found
    } else {
        before?
    };
    let block = u32_at(body, at)?;
    let fork = Fork::from_number(u32::from(fork_flags & 0x0F));
    Some((BlockHead { relation, fork, block, image, data_bytes }, at + 4))
}

fn image_head(body: &[u8], at: usize, version: MajorVersion) -> Option<(ImageHead, usize)> {
    let bytes = usize::from(u16_at(body, at)?);
    let hole_offset = usize::from(u16_at(body, at + 2)?);
    let info = *body.get(at + 4)?;
    // 14: one bit, and always pglz; from 15 on one bit for each method.
    let packing = match (version.0 >= 15, info) {
        (false, info) if info & 0x02 != 0 => ImagePacking::Pglz,
        (true, info) if info & 0x04 != 0 => ImagePacking::Pglz,
        (true, info) if info & 0x08 != 0 => ImagePacking::Lz4,
        (true, info) if info & 0x10 != 0 => ImagePacking::Zstd,
        _ => ImagePacking::Plain,
    };
    let has_hole = info & IMAGE_HAS_HOLE != 0;
    let mut end = at + 5;
    let hole_bytes = match (has_hole, packing) {
        (false, _) => 0,
        (true, ImagePacking::Plain) => DATA_PAGE_BYTES.saturating_sub(bytes),
        (true, _) => {
            end += 2;
            usize::from(u16_at(body, at + 5)?)
        }
    };
    Some((ImageHead { bytes, hole_offset, hole_bytes, packing }, end))
}

impl PageImage<'_> {
    /// Returns the page of 8 KiB, the hole filled with zeros, or `None` if the bytes do not make one.
    pub fn page(&self) -> Option<Vec<u8>> {
        let solid = DATA_PAGE_BYTES.checked_sub(self.hole_bytes)?;
        let unpacked = match self.packing {
            ImagePacking::Plain => self.bytes.to_vec(),
            ImagePacking::Pglz => unpack_pglz(self.bytes, solid)?,
            ImagePacking::Lz4 => lz4_flex::block::decompress(self.bytes, solid).ok()?,
            ImagePacking::Zstd => zstd::bulk::decompress(self.bytes, solid).ok()?,
        };
        if unpacked.len() != solid || self.hole_offset > solid {
            return None;
        }
        let mut page = unpacked;
        let behind = page.split_off(self.hole_offset);
        page.resize(self.hole_offset + self.hole_bytes, 0);
        page.extend_from_slice(&behind);
        Some(page)
    }
}

/// Unpacks PostgreSQL's own LZ format, of which `plain_bytes` must come.
///
/// ```text
/// u8 control, then 8 items, lowest bit first:  0: a byte as it is
///                                              1: length-3 and offset in 12 bits, [a byte more of length]
/// ```
fn unpack_pglz(mut packed: &[u8], plain_bytes: usize) -> Option<Vec<u8>> {
    let mut plain = Vec::with_capacity(plain_bytes);
    while let Some((control, rest)) = packed.split_first() {
        packed = rest;
        for bit in 0..8 {
            if packed.is_empty() || plain.len() >= plain_bytes {
                break;
            }
            if control >> bit & 1 == 0 {
                plain.push(packed[0]);
                packed = &packed[1..];
                continue;
            }
            let (low, high) = (usize::from(*packed.get(1)?), usize::from(packed[0]));
            let offset = (high & 0xF0) << 4 | low;
            let mut length = (high & 0x0F) + 3;
            packed = &packed[2..];
            if length == 18 {
                let (more, rest) = packed.split_first()?;
                length += usize::from(*more);
                packed = rest;
            }
            let from = plain.len().checked_sub(offset).filter(|_| offset > 0)?;
            // What is copied may reach into what it makes.
            for at in from..from + length.min(plain_bytes - plain.len()) {
                let byte = *plain.get(at)?;
                plain.push(byte);
            }
        }
        if plain.len() >= plain_bytes {
            break;
        }
    }
    (plain.len() == plain_bytes && packed.is_empty()).then_some(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: RelFileLocator = RelFileLocator { tablespace: 1663, database: 5, relation: 16385 };

    fn header(body: &[u8]) -> RecordHeader {
        RecordHeader {
            total_bytes: 24 + body.len() as u32,
            xid: 7,
            previous: Lsn(0),
            info: 0,
            resource_manager: 10,
            crc: 0,
        }
    }

    fn words(words: &[u32]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn every_block_has_its_own_image_and_data() {
        let mut page = vec![7u8; 100];
        page.extend([9; 50]);
        let mut body = vec![0, 0x10 | 0x20, 3, 0]; // block 0: image and 3 bytes
        body.extend([150, 0, 100, 0, 0x01]); // hole from 100 on
        body.extend(words(&[1663, 5, 16385, 42]));
        body.extend([1, 0x20 | 0x80, 2, 0]); // block 1 of the same relation: 2 bytes
        body.extend(words(&[43]));
        body.extend([252, 1, 0, 0, 0, 255, 4]);
        body.extend(&page);
        body.extend([1, 2, 3, 4, 5, 0xA, 0xB, 0xC, 0xD]);
        let parts = parts_of(&header(&body), &body, MajorVersion(17)).unwrap();
        assert_eq!(parts.main, [0xA, 0xB, 0xC, 0xD]);
        let [first, second] = &parts.blocks[..] else { unreachable!() };
        assert_eq!((first.relation, first.block, first.data), (TABLE, 42, &[1u8, 2, 3][..]));
        assert_eq!((second.relation, second.block, second.data), (TABLE, 43, &[4u8, 5][..]));
        let restored = first.image.unwrap().page().unwrap();
        assert_eq!(restored.len(), DATA_PAGE_BYTES);
        assert_eq!((restored[99], restored[100], restored[8141], restored[8142]), (7, 0, 0, 9));
        // What was not kept is left out, and never read from elsewhere.
        let cut = &body[..body.len() - 60];
        let parts = parts_of(&header(&body), cut, MajorVersion(17)).unwrap();
        assert_eq!(parts.blocks[0].image, None);
        assert_eq!((parts.blocks[0].data, parts.main), (&[][..], &[][..]));
    }

    #[test]
    fn a_record_of_one_block_and_no_main_data_is_read() {
        let mut body = vec![0, 0x20, 2, 0];
        body.extend(words(&[1663, 5, 16385, 42]));
        body.extend([255, 1]);
        let parts = parts_of(&header(&body), &body, MajorVersion(17)).unwrap();
        assert_eq!((parts.blocks[0].data, parts.main), (&[255u8, 1][..], &[][..]));
        let parts = parts_of(&header(&[]), &[], MajorVersion(17)).unwrap();
        assert!(parts.blocks.is_empty() && parts.main.is_empty());
    }

    #[test]
    fn images_of_every_packing_come_back() {
        let page: Vec<u8> = (0..DATA_PAGE_BYTES).map(|at| (at / 500) as u8).collect();
        let whole = |bytes: &[u8], packing| {
            PageImage { bytes, hole_offset: 0, hole_bytes: 0, packing }.page()
        };
        let lz4 = lz4_flex::block::compress(&page);
        assert_eq!(whole(&lz4, ImagePacking::Lz4).as_ref(), Some(&page));
        let zstd = zstd::bulk::compress(&page, 1).unwrap();
        assert_eq!(whole(&zstd, ImagePacking::Zstd).as_ref(), Some(&page));
        assert_eq!(whole(&page, ImagePacking::Plain).as_ref(), Some(&page));
        assert_eq!(whole(&page[1..], ImagePacking::Plain), None);
    }

    #[test]
    fn pglz_copies_what_it_just_made() {
        // `ab`, then 6 bytes from 2 back, then `c`; and a copy of 18 + 2 bytes.
        assert_eq!(unpack_pglz(&[0b0100, b'a', b'b', 3, 2, b'c'], 9).unwrap(), b"ababababc");
        let long = unpack_pglz(&[0b10, b'x', 0x0F, 1, 2], 21).unwrap();
        assert_eq!(long, vec![b'x'; 21]);
        assert_eq!(unpack_pglz(&[0b1, 3, 2], 6), None, "nothing stands there to copy");
    }

    proptest! {
        #[test]
        fn no_body_panics(
            body in proptest::collection::vec(any::<u8>(), 0..300),
            version in 14u32..19,
            total in 0u32..400,
        ) {
            let header = RecordHeader { total_bytes: total, ..header(&body) };
            if let Some(parts) = parts_of(&header, &body, MajorVersion(version)) {
                for block in parts.blocks {
                    let _ = block.image.and_then(|image| image.page());
                }
            }
            let _ = unpack_pglz(&body, 100);
        }
    }
}

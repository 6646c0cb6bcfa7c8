//! Splits the tar archives of BASE_BACKUP as they arrive, in slices of any size.
//!
//! Owns: headers, entry borders, padding, the archive's end. Never here: what is
//! done with a file. No byte of a file is copied and only one header is held.
//!
//! ```text
//! archive = entry* [ 512 zero bytes, 512 zero bytes ]    the end is left out by 13 and 14
//! entry   = header, 512 bytes | data, size bytes | zeros up to the next multiple of 512
//! ```
//!
//! What PostgreSQL writes (`src/port/tar.c`, `tarCreateHeader`): ustar headers,
//! sizes above 8 GiB in base 256, a trailing slash on directories and on
//! symbolic links. Nothing else is accepted: a type of entry that we do not know
//! would be a file that we do not restore.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use bytes::{Buf, Bytes};
use tar::{EntryType, Header};

use super::safe_path::{UnsafePath, safe_path};

const BLOCK: usize = 512;

/// Largest entry taken; a file cannot be larger on any system we run on (`off_t`).
const SIZE_MAX: u64 = i64::MAX.cast_unsigned();

/// Where the checksum stands in a header (offset and length); it counts as blanks.
const CHECKSUM: std::ops::Range<usize> = 148..156;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    /// A file; its bytes follow.
    File,
    /// A directory, also one that is sent empty.
    Directory,
    /// A symbolic link to this target, as the server has it: for a tablespace
    /// `pg_tblspc/<oid>`, an absolute path on the server's host.
    Symlink(PathBuf),
}

/// One header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Relative and safe to join below a directory (see [`safe_path`]).
    pub path: PathBuf,
    /// What it is.
    pub kind: TarKind,
    /// Bytes of data that follow; 0 unless a file.
    pub size_bytes: u64,
    /// Permission bits (`0o7777` and below).
    pub mode: u32,
    /// Last change, unix seconds.
    pub mtime_unix: i64,
    /// Numeric owner on the server's host.
    pub uid: u64,
    /// Numeric group on the server's host.
    pub gid: u64,
}

/// What comes next in the archive: for each entry one `Entry`, any number of
/// `Data` that add up to its size, one `EntryEnd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarEvent {
    /// An entry begins.
    Entry(TarEntry),
    /// The next bytes of the entry, never empty; a slice of what was fed.
    Data(Bytes),
    /// All bytes of the entry have come.
    EntryEnd,
}

/// How an archive ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TarEnd {
    /// With its zero blocks, as 15 and later send them.
    Marked,
    /// Behind a whole entry without zero blocks, as 13 and 14 send it. From a
    /// later server this is a cut archive.
    Unmarked,
}

/// The bytes are not an archive that PostgreSQL sends. No retry on the same bytes helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TarError {
    /// A header's checksum is wrong: the stream is damaged, or we lost our place in it.
    #[error(
        "tar header at byte {offset} has checksum {expected}, but its bytes add up to {actual}"
    )]
    Checksum {
        /// Where the header begins in the archive.
        offset: u64,
        /// What the header says.
        expected: u32,
        /// What its bytes say.
        actual: u32,
    },
    /// A field of a header cannot be read.
    #[error("tar header at byte {offset} has a malformed {field}")]
    Field {
        /// Where the header begins in the archive.
        offset: u64,
        /// Which field.
        field: &'static str,
    },
    /// A kind of entry that PostgreSQL does not send.
    #[error("tar entry `{path}` at byte {offset} is of unknown type {type_flag:#04x}")]
    UnknownType {
        /// Where the header begins in the archive.
        offset: u64,
        /// The entry's name.
        path: String,
        /// The type byte.
        type_flag: u8,
    },
    /// A name that points outside.
    #[error("tar entry at byte {offset}: {source}")]
    Path {
        /// Where the header begins in the archive.
        offset: u64,
        /// What is wrong with the name.
        source: UnsafePath,
    },
    /// Bytes other than zero behind the end mark or in the padding of an entry.
    #[error("tar archive has data at byte {offset}, where only zeros may stand")]
    NotZero {
        /// Where in the archive, to within one slice.
        offset: u64,
    },
    /// The archive ended inside a header, an entry or its padding.
    #[error("tar archive ends at byte {offset}, in the middle of {inside}")]
    Cut {
        /// How many bytes came.
        offset: u64,
        /// In which part.
        inside: String,
    },
}

/// The splitter. Feed it with [`next_event`](Self::next_event), end it with
/// [`finish`](Self::finish); after an error it is of no further use.
#[derive(Debug)]
pub struct TarSplitter {
    state: State,
    /// Bytes taken so far.
    offset: u64,
    header: [u8; BLOCK],
    /// The path of the entry at work, for messages.
    current: PathBuf,
}

#[derive(Debug)]
enum State {
    /// `usize` bytes of the next header have come.
    Header(usize),
    Data {
        remaining: u64,
        padding: usize,
    },
    Padding(usize),
    /// A zero block has come.
    End,
}

impl Default for TarSplitter {
    fn default() -> Self {
        Self::new()
    }
}

impl TarSplitter {
    /// Starts at the first byte of an archive.
    pub fn new() -> Self {
        Self { state: State::Header(0), offset: 0, header: [0; BLOCK], current: PathBuf::new() }
    }

    /// Takes bytes from the front of `input` up to the next event and returns it;
    /// `None` when `input` is used up and more is needed.
    ///
    /// Call it again with the same `input` until it returns `None`.
    pub fn next_event(&mut self, input: &mut Bytes) -> Result<Option<TarEvent>, TarError> {
        loop {
            match self.state {
                State::Data { remaining: 0, padding } => {
                    self.state = State::Padding(padding);
                    return Ok(Some(TarEvent::EntryEnd));
                }
                State::Padding(0) => self.state = State::Header(0),
                _ if input.is_empty() => return Ok(None),
                State::Header(have) => {
                    if let Some(event) = self.take_header(have, input)? {
                        return Ok(Some(event));
                    }
                }
                State::Data { remaining, padding } => {
                    let here = usize::try_from(remaining).unwrap_or(usize::MAX).min(input.len());
                    let data = input.split_to(here);
                    self.offset += here as u64;
                    self.state = State::Data { remaining: remaining - here as u64, padding };
                    return Ok(Some(TarEvent::Data(data)));
                }
                State::Padding(left) => {
                    let here = left.min(input.len());
                    self.take_zeros(here, input)?;
                    self.state = State::Padding(left - here);
                }
                State::End => self.take_zeros(input.len(), input)?,
            }
        }
    }

    /// Says how the archive ended, when no more bytes come.
    pub fn finish(self) -> Result<TarEnd, TarError> {
        let inside = match self.state {
            State::End => return Ok(TarEnd::Marked),
            State::Header(0) | State::Padding(0) => return Ok(TarEnd::Unmarked),
            State::Header(_) => "a header".to_owned(),
            State::Data { remaining, .. } => {
                format!("`{}`, {remaining} bytes before its end", self.current.display())
            }
            State::Padding(_) => format!("the padding behind `{}`", self.current.display()),
        };
        Err(TarError::Cut { offset: self.offset, inside })
    }

    fn take_zeros(&mut self, count: usize, input: &mut Bytes) -> Result<(), TarError> {
        let zeros = input.split_to(count);
        if zeros.iter().any(|b| *b != 0) {
            return Err(TarError::NotZero { offset: self.offset });
        }
        self.offset += count as u64;
        Ok(())
    }

    fn take_header(
        &mut self,
        have: usize,
        input: &mut Bytes,
    ) -> Result<Option<TarEvent>, TarError> {
        let here = (BLOCK - have).min(input.len());
        input.copy_to_slice(&mut self.header[have..have + here]);
        self.offset += here as u64;
        if have + here < BLOCK {
            self.state = State::Header(have + here);
            return Ok(None);
        }
        if self.header.iter().all(|b| *b == 0) {
            self.state = State::End;
            return Ok(None);
        }
        let entry = parse_header(&self.header, self.offset - BLOCK as u64)?;
        let into_block = usize::try_from(entry.size_bytes % BLOCK as u64).unwrap_or(0);
        let padding = (BLOCK - into_block) % BLOCK;
        self.current.clone_from(&entry.path);
        self.state = State::Data { remaining: entry.size_bytes, padding };
        Ok(Some(TarEvent::Entry(entry)))
    }
}

fn parse_header(bytes: &[u8; BLOCK], offset: u64) -> Result<TarEntry, TarError> {
    let header = Header::from_byte_slice(bytes);
    let malformed = |field| move |_| TarError::Field { offset, field };

    let expected = header.cksum().map_err(malformed("checksum"))?;
    let actual = checksum(bytes);
    if expected != actual {
        return Err(TarError::Checksum { offset, expected, actual });
    }

    let raw_path = header.path_bytes();
    let size_bytes = header.entry_size().map_err(malformed("size"))?;
    let kind = match header.entry_type() {
        EntryType::Regular => TarKind::File,
        EntryType::Directory => TarKind::Directory,
        EntryType::Symlink => match header.link_name_bytes() {
            Some(target) if !target.is_empty() => {
                TarKind::Symlink(PathBuf::from(OsString::from_vec(target.into_owned())))
            }
            _ => return Err(TarError::Field { offset, field: "link target" }),
        },
        other => {
            let path = String::from_utf8_lossy(&raw_path).into_owned();
            return Err(TarError::UnknownType { offset, path, type_flag: other.as_byte() });
        }
    };
    if size_bytes > SIZE_MAX || (kind != TarKind::File && size_bytes != 0) {
        return Err(TarError::Field { offset, field: "size" });
    }
    // Old archives wrote directories so; PostgreSQL does not.
    if kind == TarKind::File && raw_path.ends_with(b"/") {
        return Err(TarError::Field { offset, field: "name" });
    }
    Ok(TarEntry {
        path: safe_path(&raw_path).map_err(|source| TarError::Path { offset, source })?,
        kind,
        size_bytes,
        mode: header.mode().map_err(malformed("mode"))? & 0o7777,
        // Times before 1970 are negative numbers in base 256.
        mtime_unix: header.mtime().map_err(malformed("mtime"))?.cast_signed(),
        uid: header.uid().map_err(malformed("uid"))?,
        gid: header.gid().map_err(malformed("gid"))?,
    })
}

/// The sum of all bytes, with the checksum's own eight counted as blanks.
fn checksum(bytes: &[u8; BLOCK]) -> u32 {
    let counted =
        |(at, byte): (usize, &u8)| u32::from(if CHECKSUM.contains(&at) { b' ' } else { *byte });
    bytes.iter().enumerate().map(counted).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(path: &str, kind: EntryType, size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.as_ustar_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o600);
        header.set_uid(26);
        header.set_gid(27);
        header.set_mtime(1_795_316_420);
        header.set_cksum();
        header
    }

    fn push(archive: &mut Vec<u8>, header: &Header, data: &[u8]) {
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(data);
        archive.resize(archive.len().next_multiple_of(BLOCK), 0);
    }

    /// Like a small `base.tar`, without its end.
    fn base_tar() -> Vec<u8> {
        let mut archive = Vec::new();
        push(&mut archive, &header("backup_label", EntryType::Regular, 5), b"START");
        let mut link = header("pg_tblspc/16400/", EntryType::Symlink, 0);
        link.set_link_name_literal("/mnt/fast").unwrap();
        link.set_cksum();
        push(&mut archive, &link, b"");
        push(&mut archive, &header("./pg_wal/archive_status/", EntryType::Directory, 0), b"");
        push(&mut archive, &header("base/5/1259", EntryType::Regular, 1024), &[7; 1024]);
        push(&mut archive, &header("base/5/1260", EntryType::Regular, 0), b"");
        archive
    }

    /// All events, with data of one entry joined, and how it ended.
    fn split(slices: &[&[u8]]) -> Result<(Vec<TarEvent>, TarEnd), TarError> {
        let mut splitter = TarSplitter::new();
        let mut events: Vec<TarEvent> = Vec::new();
        for slice in slices {
            let mut input = Bytes::copy_from_slice(slice);
            while let Some(event) = splitter.next_event(&mut input)? {
                match (events.last_mut(), event) {
                    (_, TarEvent::Data(data)) if data.is_empty() => panic!("empty data"),
                    (Some(TarEvent::Data(before)), TarEvent::Data(data)) => {
                        *before = [before.as_ref(), data.as_ref()].concat().into();
                    }
                    (_, event) => events.push(event),
                }
            }
            assert!(input.is_empty());
        }
        Ok((events, splitter.finish()?))
    }

    fn first_error(archive: &[u8]) -> TarError {
        split(&[archive]).unwrap_err()
    }

    #[test]
    fn base_backup_archive_is_split_into_its_entries() {
        let (events, end) = split(&[&base_tar()]).unwrap();
        assert_eq!(end, TarEnd::Unmarked);
        let entry = |path: &str, kind, size_bytes, mode| {
            TarEvent::Entry(TarEntry {
                path: path.into(),
                kind,
                size_bytes,
                mode,
                mtime_unix: 1_795_316_420,
                uid: 26,
                gid: 27,
            })
        };
        assert_eq!(
            events,
            [
                entry("backup_label", TarKind::File, 5, 0o600),
                TarEvent::Data(Bytes::from_static(b"START")),
                TarEvent::EntryEnd,
                entry("pg_tblspc/16400", TarKind::Symlink("/mnt/fast".into()), 0, 0o600),
                TarEvent::EntryEnd,
                entry("pg_wal/archive_status", TarKind::Directory, 0, 0o600),
                TarEvent::EntryEnd,
                entry("base/5/1259", TarKind::File, 1024, 0o600),
                TarEvent::Data(Bytes::from(vec![7; 1024])),
                TarEvent::EntryEnd,
                entry("base/5/1260", TarKind::File, 0, 0o600),
                TarEvent::EntryEnd,
            ]
        );
    }

    #[test]
    fn data_is_handed_on_without_a_copy() {
        let mut input = Bytes::from(base_tar());
        let (start, end) = (input.as_ptr() as usize, input.as_ptr() as usize + input.len());
        let mut splitter = TarSplitter::new();
        let mut seen = 0;
        while let Some(event) = splitter.next_event(&mut input).unwrap() {
            if let TarEvent::Data(data) = event {
                assert!((start..end).contains(&(data.as_ptr() as usize)));
                seen += 1;
            }
        }
        assert_eq!(seen, 2);
    }

    #[test]
    fn archive_of_a_tar_builder_is_split_with_its_end() {
        let mut builder = tar::Builder::new(Vec::new());
        let long = format!("{}/{}", "d".repeat(90), "f".repeat(60));
        let mut header = Header::new_ustar();
        header.set_size(3);
        header.set_mode(0o640);
        header.set_mtime(1);
        header.set_uid(0);
        header.set_gid(0);
        builder.append_data(&mut header, &long, &b"abc"[..]).unwrap();
        let archive = builder.into_inner().unwrap();
        let (events, end) = split(&[&archive]).unwrap();
        assert_eq!(end, TarEnd::Marked);
        let TarEvent::Entry(entry) = &events[0] else { panic!("{events:?}") };
        assert_eq!(entry.path, PathBuf::from(long), "the prefix field belongs to the name");
        assert_eq!((entry.mode, entry.size_bytes), (0o640, 3));
    }

    #[test]
    fn sizes_above_8_gib_are_read_in_base_256() {
        let size = 9 << 30;
        let header = header("big", EntryType::Regular, size);
        assert_eq!(header.as_ustar().unwrap().size[0], 0x80, "not in base 256");
        let mut splitter = TarSplitter::new();
        let mut input = Bytes::copy_from_slice(header.as_bytes());
        let Some(TarEvent::Entry(entry)) = splitter.next_event(&mut input).unwrap() else {
            panic!("no entry")
        };
        assert_eq!(entry.size_bytes, size);
        assert!(matches!(splitter.finish(), Err(TarError::Cut { .. })));
    }

    #[test]
    fn every_cut_inside_an_entry_is_an_error() {
        let archive = base_tar();
        let mut whole = 0;
        for end in 0..archive.len() {
            match split(&[&archive[..end]]) {
                Ok((_, TarEnd::Unmarked)) => whole += 1,
                Ok((_, TarEnd::Marked)) => panic!("{end}: no end mark is there"),
                Err(TarError::Cut { offset, .. }) => assert_eq!(offset, end as u64),
                Err(e) => panic!("{end}: {e}"),
            }
        }
        // The empty archive, and behind each entry but the last.
        assert_eq!(whole, 5);
    }

    #[test]
    fn every_flipped_bit_of_a_header_is_noticed() {
        let archive = base_tar();
        for bit in 0..BLOCK * 8 {
            let mut damaged = archive.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // The bytes of the checksum field's padding carry no information.
            if split(&[&damaged]).is_ok() {
                assert!(CHECKSUM.contains(&(bit / 8)), "bit {bit} went unnoticed");
            }
        }
    }

    #[test]
    fn unsafe_names_are_refused() {
        for path in ["/etc/passwd", "../x", "a/../../x", "./", "..", "base/.."] {
            let mut archive = Vec::new();
            push(&mut archive, &header(path, EntryType::Directory, 0), b"");
            assert!(matches!(first_error(&archive), TarError::Path { .. }), "{path}");
        }
    }

    #[test]
    fn entries_that_postgresql_never_sends_are_refused() {
        for kind in [
            EntryType::Link,
            EntryType::Char,
            EntryType::Block,
            EntryType::Fifo,
            EntryType::Continuous,
            EntryType::GNULongName,
            EntryType::GNUSparse,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
        ] {
            let mut archive = Vec::new();
            push(&mut archive, &header("x", kind, 0), b"");
            assert!(matches!(first_error(&archive), TarError::UnknownType { .. }), "{kind:?}");
        }
        for (path, kind, size) in [
            ("dir/", EntryType::Directory, 512),
            ("file/", EntryType::Regular, 0),
            ("link/", EntryType::Symlink, 0),
        ] {
            let mut archive = Vec::new();
            push(&mut archive, &header(path, kind, size), &vec![0; usize::try_from(size).unwrap()]);
            assert!(matches!(first_error(&archive), TarError::Field { .. }), "{path}");
        }
    }

    #[test]
    fn only_zeros_may_follow_the_end_or_pad_an_entry() {
        let mut archive = base_tar();
        archive.resize(archive.len() + 1024, 0);
        assert_eq!(split(&[&archive]).unwrap().1, TarEnd::Marked);
        let mut more = archive.clone();
        more.extend(base_tar());
        assert!(matches!(first_error(&more), TarError::NotZero { .. }));
        archive[512 + 5] = 1;
        assert_eq!(first_error(&archive), TarError::NotZero { offset: 512 + 5 });
    }

    proptest! {
        #[test]
        fn any_cut_into_slices_gives_the_same_events(
            cuts in proptest::collection::vec(0usize..6000, 0..20), marked: bool) {
            let mut archive = base_tar();
            if marked {
                archive.resize(archive.len() + 1024, 0);
            }
            let mut borders: Vec<usize> = cuts.into_iter().filter(|c| *c < archive.len()).collect();
            borders.extend([0, archive.len()]);
            borders.sort_unstable();
            let slices: Vec<&[u8]> = borders.windows(2).map(|w| &archive[w[0]..w[1]]).collect();
            prop_assert_eq!(split(&slices), split(&[&archive]));
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let _ = split(&[&bytes]);
        }
    }
}

//! The file list of a backup: one line of JSON per file or directory.
//!
//! Lines stand in frames of about [`LIST_FRAME_BYTES`], and the frames stand in
//! packs; `files` says where (see [`super::FileIndex`]). Small files carry their
//! chunks in the line; larger ones name the frames of their chunk maps:
//!
//! ```text
//! {"path":"base/5","kind":"directory","mode":448,"mtime":1763779200}
//! {"path":"PG_VERSION","kind":"file","mode":384,"mtime":…,"size":3,"checksum":"crc32c:…","chunks":[{"digest":…,"runs":[…]}]}
//! {"path":"base/5/16384","kind":"file",…,"size":1073741824,"maps":[{"backup":…,"pack":3,"offset":…,"stored":…,"plain":…}],"page_maps":[[{"backup":…}]]}
//! ```

use serde::{Deserialize, Serialize};

use super::{ChunkEntry, FrameRef};

/// Files of at most so many chunks carry them in their line.
pub const INLINE_CHUNKS_MAX: usize = 4;

/// A frame of the list is closed when it holds at least so many bytes.
pub const LIST_FRAME_BYTES: usize = 512 << 10;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
}

/// What a file looked like before it was read, for a later backup to see that nobody wrote to it since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FileStamp {
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Change time, nanoseconds since 1970: every write sets it, and nothing can set it back.
    pub ctime_ns: i64,
    /// The inode's number.
    pub inode: u64,
}

/// Where a file's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileContent {
    /// All chunks, in the line itself.
    Inline(Vec<ChunkEntry>),
    /// The frames of its chunk maps, each but the last of [`super::MAP_CHUNKS_MAX`] chunks.
    Maps(Vec<FrameRef>),
}

/// One line of the file list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// The path below the data directory, as bytes; files of tablespaces as `pg_tblspc/<oid>/…`.
    pub path: Vec<u8>,
    /// File or directory.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Bytes; 0 for a directory.
    pub size: u64,
    /// The checksum in PostgreSQL's backup manifest, as `<algorithm>:<hex>`, which was compared
    /// with the bytes received; absent for the few files that the manifest leaves out.
    pub checksum: Option<String>,
    /// What it looked like before it was read; only where it was read from the data directory itself.
    pub stamp: Option<FileStamp>,
    /// The content; empty for a directory.
    pub content: FileContent,
    /// For each of its maps, the frames of page maps that tell the pages of chunks in it. Some may be missing:
    /// a chunk whose pages are not told is stored whole when it changes.
    pub page_maps: Vec<Vec<FrameRef>>,
}

/// A line of the list is not one.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// The JSON cannot be understood.
    #[error("a line of the file list cannot be understood")]
    Malformed(#[from] serde_json::Error),
    /// The path is given twice, not at all, or in broken hex.
    #[error("a line of the file list has no usable path")]
    Path,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<String>,
    /// The path's bytes in hex, where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path_hex: Option<String>,
    kind: EntryKind,
    mode: u32,
    mtime: i64,
    #[serde(default, skip_serializing_if = "is_zero")]
    size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stamp: Option<FileStamp>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    chunks: Vec<ChunkEntry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    maps: Vec<FrameRef>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    page_maps: Vec<Vec<FrameRef>>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature.
fn is_zero(n: &u64) -> bool {
    *n == 0
}

/// Appends `entry` as one line with its newline.
///
/// # Errors
/// [`ListError::Malformed`] only if JSON cannot be written, which no entry causes.
pub fn write_line(entry: &FileEntry, out: &mut Vec<u8>) -> Result<(), ListError> {
    let (path, path_hex) = match std::str::from_utf8(&entry.path) {
        Ok(text) => (Some(text.to_owned()), None),
        Err(_) => (None, Some(to_hex(&entry.path))),
    };
    let (chunks, maps) = match &entry.content {
        FileContent::Inline(chunks) => (chunks.clone(), Vec::new()),
        FileContent::Maps(maps) => (Vec::new(), maps.clone()),
    };
    let line = Line {
        path,
        path_hex,
        kind: entry.kind,
        mode: entry.mode,
        mtime: entry.mtime,
        size: entry.size,
        checksum: entry.checksum.clone(),
        stamp: entry.stamp,
        chunks,
        maps,
        page_maps: entry.page_maps.clone(),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.push(b'\n');
    Ok(())
}

/// Parses one line, with or without its newline.
///
/// # Errors
/// [`ListError`]; a retry does not help.
pub fn parse_line(line: &[u8]) -> Result<FileEntry, ListError> {
    let line: Line = serde_json::from_slice(line)?;
    let path = match (line.path, line.path_hex) {
        (Some(text), None) => text.into_bytes(),
        (None, Some(hex)) => from_hex(&hex).ok_or(ListError::Path)?,
        _ => return Err(ListError::Path),
    };
    if path.is_empty() {
        return Err(ListError::Path);
    }
    let content = if line.maps.is_empty() {
        FileContent::Inline(line.chunks)
    } else {
        FileContent::Maps(line.maps)
    };
    Ok(FileEntry {
        path,
        kind: line.kind,
        mode: line.mode,
        mtime: line.mtime,
        size: line.size,
        checksum: line.checksum,
        stamp: line.stamp,
        content,
        page_maps: line.page_maps,
    })
}

fn to_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_path_comes_back(
            path in prop::collection::vec(1u8.., 1..60),
            size: u64,
            mtime: i64,
            stamp in prop::option::of(any::<(i64, i64, u64)>()),
        ) {
            let stamp = stamp
                .map(|(mtime_ns, ctime_ns, inode)| FileStamp { mtime_ns, ctime_ns, inode });
            let entry = FileEntry {
                path,
                kind: EntryKind::File,
                mode: 0o600,
                mtime,
                size,
                checksum: Some("crc32c:00000000".to_owned()),
                stamp,
                content: FileContent::Inline(Vec::new()),
                page_maps: Vec::new(),
            };
            let mut line = Vec::new();
            write_line(&entry, &mut line).unwrap();
            prop_assert_eq!(line.iter().position(|b| *b == b'\n'), Some(line.len() - 1));
            prop_assert_eq!(parse_line(&line).unwrap(), entry);
        }

        #[test]
        fn no_line_panics(line: Vec<u8>) {
            let _ = parse_line(&line);
        }
    }

    #[test]
    fn a_line_without_a_path_is_refused() {
        for line in [
            r#"{"kind":"file","mode":1,"mtime":1}"#,
            r#"{"path":"","kind":"file","mode":1,"mtime":1}"#,
            r#"{"path":"a","path_hex":"61","kind":"file","mode":1,"mtime":1}"#,
            r#"{"path_hex":"6","kind":"file","mode":1,"mtime":1}"#,
        ] {
            assert!(parse_line(line.as_bytes()).is_err(), "{line}");
        }
    }
}

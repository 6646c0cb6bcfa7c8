//! `backup_label`, backup history files and `tablespace_map`: the three small
//! text files of a base backup.
//!
//! ```text
//! START WAL LOCATION: 0/1D00028 (file 00000001000000000000001D)
//! STOP WAL LOCATION: 0/1D00138 (file 00000001000000000000001D)   only in the history file
//! CHECKPOINT LOCATION: 0/1D00060
//! BACKUP METHOD: streamed
//! BACKUP FROM: primary
//! START TIME: 2026-11-22 00:29:24 UTC
//! LABEL: nightly
//! START TIMELINE: 1
//! ```
//!
//! Source: PostgreSQL `src/backend/access/transam/xlogbackup.c`
//! (`build_backup_content`) and `xlogrecovery.c` (`read_backup_label`,
//! `read_tablespace_map`). The server reads the label with a fixed format, so
//! that a file which an editor has touched is fatal; we refuse it as well.

use super::{Lsn, Timeline};

/// A label is far shorter; the label text itself may have 1024 bytes.
const LABEL_BYTES_MAX: usize = 16 << 10;

/// What `backup_label` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where replay begins (included).
    pub start_lsn: Lsn,
    /// The checkpoint record that recovery starts from.
    pub checkpoint_lsn: Lsn,
    /// Whether a standby gave the backup.
    pub from_standby: bool,
    /// The label given to the server.
    pub label: String,
    /// The timeline at the start.
    pub start_timeline: Timeline,
}

/// What a backup history file (`<segment>.<offset>.backup`) says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupHistory {
    /// Where replay begins (included).
    pub start_lsn: Lsn,
    /// Where the backup became consistent (excluded).
    pub stop_lsn: Lsn,
    /// The timeline at the start.
    pub start_timeline: Timeline,
}

/// Why bytes are not the file they should be. A retry does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// It is longer than any that PostgreSQL writes.
    #[error("it has {0} bytes")]
    TooLong(usize),
    /// It holds carriage returns or bytes that are not text: something has edited it.
    #[error("it was edited: it holds a carriage return or bytes that are not UTF-8")]
    Edited,
    /// A line is missing or not as PostgreSQL writes it.
    #[error("its line `{0}` is missing or malformed")]
    Line(&'static str),
    /// The backup is incremental and cannot stand alone.
    #[error("it belongs to an incremental backup")]
    Incremental,
}

impl BackupLabel {
    /// Parses the bytes of `backup_label`.
    pub fn parse(bytes: &[u8]) -> Result<Self, LabelError> {
        let text = text_of(bytes)?;
        if text.lines().any(|line| line.starts_with("INCREMENTAL FROM LSN: ")) {
            return Err(LabelError::Incremental);
        }
        let mut lines = Lines::of(text)?;
        let start_lsn = location(lines.next("START WAL LOCATION: ")?, "START WAL LOCATION: ")?;
        let checkpoint = lines.next("CHECKPOINT LOCATION: ")?;
        let checkpoint_lsn =
            checkpoint.parse().map_err(|_| LabelError::Line("CHECKPOINT LOCATION: "))?;
        lines.next("BACKUP METHOD: ")?;
        let from_standby = match lines.next("BACKUP FROM: ")? {
            "primary" => false,
            "standby" => true,
            _ => return Err(LabelError::Line("BACKUP FROM: ")),
        };
        lines.next("START TIME: ")?;
        let label = lines.next("LABEL: ")?.to_owned();
        let start_timeline = timeline(lines.next("START TIMELINE: ")?)?;
        lines.end()?;
        Ok(Self { start_lsn, checkpoint_lsn, from_standby, label, start_timeline })
    }
}

impl BackupHistory {
    /// Parses the bytes of a backup history file.
    pub fn parse(bytes: &[u8]) -> Result<Self, LabelError> {
        let mut lines = Lines::of(text_of(bytes)?)?;
        let start_lsn = location(lines.next("START WAL LOCATION: ")?, "START WAL LOCATION: ")?;
        let stop_lsn = location(lines.next("STOP WAL LOCATION: ")?, "STOP WAL LOCATION: ")?;
        lines.next("CHECKPOINT LOCATION: ")?;
        lines.next("BACKUP METHOD: ")?;
        lines.next("BACKUP FROM: ")?;
        lines.next("START TIME: ")?;
        lines.next("LABEL: ")?;
        let start_timeline = timeline(lines.next("START TIMELINE: ")?)?;
        // STOP TIME and STOP TIMELINE follow, and whatever a later version adds.
        Ok(Self { start_lsn, stop_lsn, start_timeline })
    }
}

fn text_of(bytes: &[u8]) -> Result<&str, LabelError> {
    if bytes.len() > LABEL_BYTES_MAX {
        return Err(LabelError::TooLong(bytes.len()));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| LabelError::Edited)?;
    if text.contains('\r') { Err(LabelError::Edited) } else { Ok(text) }
}

struct Lines<'a>(std::str::Lines<'a>);

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Result<Self, LabelError> {
        if text.ends_with('\n') { Ok(Self(text.lines())) } else { Err(LabelError::Line("(last)")) }
    }

    fn next(&mut self, start: &'static str) -> Result<&'a str, LabelError> {
        let line = self.0.next().ok_or(LabelError::Line(start))?;
        line.strip_prefix(start).ok_or(LabelError::Line(start))
    }

    fn end(&mut self) -> Result<(), LabelError> {
        if self.0.next().is_none() { Ok(()) } else { Err(LabelError::Line("(behind the last)")) }
    }
}

/// Parses `0/1D00028 (file 00000001000000000000001D)`.
fn location(text: &str, line: &'static str) -> Result<Lsn, LabelError> {
    let (lsn, file) = text.split_once(" (file ").ok_or(LabelError::Line(line))?;
    let file = file.strip_suffix(')').ok_or(LabelError::Line(line))?;
    super::SegmentName::parse(file).ok_or(LabelError::Line(line))?;
    lsn.parse().map_err(|_| LabelError::Line(line))
}

fn timeline(text: &str) -> Result<Timeline, LabelError> {
    let number = text.parse().ok().filter(|number| *number > 0);
    number.map(Timeline).ok_or(LabelError::Line("START TIMELINE: "))
}

/// `tablespace_map`: which link of `pg_tblspc` leads where.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TablespaceMap {
    /// OID and absolute path, in the file's order.
    pub entries: Vec<(u32, Vec<u8>)>,
}

/// The bytes are not a `tablespace_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("line {0} of it is not `<oid> <path>`")]
pub struct TablespaceMapError(usize);

impl TablespaceMap {
    /// Parses the file. A backslash stands before a line break, a carriage return or a backslash of a path.
    pub fn parse(bytes: &[u8]) -> Result<Self, TablespaceMapError> {
        let mut entries = Vec::new();
        let mut line = Vec::new();
        let mut rest = bytes.iter();
        while let Some(&byte) = rest.next() {
            match byte {
                b'\\' => {
                    line.push(*rest.next().ok_or(TablespaceMapError(entries.len() + 1))?);
                }
                b'\n' | b'\r' if line.is_empty() => {}
                b'\n' | b'\r' => {
                    let number = entries.len() + 1;
                    let entry = parse_entry(&std::mem::take(&mut line));
                    entries.push(entry.ok_or(TablespaceMapError(number))?);
                }
                _ => line.push(byte),
            }
        }
        if line.is_empty() {
            Ok(Self { entries })
        } else {
            Err(TablespaceMapError(entries.len() + 1))
        }
    }

    /// Sends the link of `oid` elsewhere; one that the file does not have is left out.
    pub fn relocate(&mut self, oid: u32, path: &[u8]) {
        for entry in self.entries.iter_mut().filter(|entry| entry.0 == oid) {
            entry.1 = path.to_vec();
        }
    }

    /// Returns the file's bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (oid, path) in &self.entries {
            out.extend_from_slice(format!("{oid} ").as_bytes());
            for &byte in path {
                if matches!(byte, b'\n' | b'\r' | b'\\') {
                    out.push(b'\\');
                }
                out.push(byte);
            }
            out.push(b'\n');
        }
        out
    }
}

fn parse_entry(line: &[u8]) -> Option<(u32, Vec<u8>)> {
    let blank = line.iter().position(|byte| *byte == b' ')?;
    let oid = std::str::from_utf8(&line[..blank]).ok()?.parse().ok()?;
    let path = &line[blank + 1..];
    (!path.is_empty()).then(|| (oid, path.to_vec()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As PostgreSQL 18 wrote it.
    const LABEL: &str = "START WAL LOCATION: 0/1D00028 (file 00000001000000000000001D)\n\
        CHECKPOINT LOCATION: 0/1D00060\nBACKUP METHOD: streamed\nBACKUP FROM: standby\n\
        START TIME: 2026-11-22 00:29:24 UTC\nLABEL: t2 backup: x\nSTART TIMELINE: 3\n";

    #[test]
    fn a_label_is_understood() {
        let label = BackupLabel::parse(LABEL.as_bytes()).unwrap();
        assert_eq!(label.start_lsn, Lsn(0x1D0_0028));
        assert_eq!(label.checkpoint_lsn, Lsn(0x1D0_0060));
        assert!(label.from_standby);
        assert_eq!((label.label.as_str(), label.start_timeline), ("t2 backup: x", Timeline(3)));
    }

    #[test]
    fn an_edited_label_is_refused() {
        let crlf = LABEL.replace('\n', "\r\n");
        let cut = &LABEL[..LABEL.len() - 1];
        let blank = LABEL.replace("LOCATION: 0", "LOCATION:  0");
        let missing: String = LABEL.split_inclusive('\n').skip(1).collect();
        let more = format!("{LABEL}x\n");
        for bad in [&crlf, cut, &blank, &missing, &more, ""] {
            assert!(BackupLabel::parse(bad.as_bytes()).is_err(), "{bad}");
        }
        let incremental = format!("{LABEL}INCREMENTAL FROM LSN: 0/2000028\n");
        assert_eq!(BackupLabel::parse(incremental.as_bytes()), Err(LabelError::Incremental));
    }

    #[test]
    fn a_backup_history_file_is_understood() {
        let (first, rest) = LABEL.split_once('\n').unwrap();
        let text = format!(
            "{first}\nSTOP WAL LOCATION: 0/1D00138 (file 00000001000000000000001D)\n{rest}STOP TIME: x\nSTOP TIMELINE: 3\n"
        );
        let history = BackupHistory::parse(text.as_bytes()).unwrap();
        assert_eq!((history.start_lsn, history.stop_lsn), (Lsn(0x1D0_0028), Lsn(0x1D0_0138)));
        assert!(BackupHistory::parse(LABEL.as_bytes()).is_err());
        assert!(BackupHistory::parse(b"").is_err());
    }

    #[test]
    fn a_moved_tablespace_is_written_with_its_escapes() {
        let mut map = TablespaceMap::parse(b"16384 /a/b c\n16385 /x\\\\y\\\nz\n").unwrap();
        assert_eq!(map.entries[1], (16385, b"/x\\y\nz".to_vec()));
        map.relocate(16384, b"/new\\place");
        assert_eq!(map.to_bytes(), b"16384 /new\\\\place\n16385 /x\\\\y\\\nz\n");
    }

    proptest! {
        #[test]
        fn any_map_comes_back(entries in prop::collection::vec((any::<u32>(), prop::collection::vec(1u8.., 1..20)), 0..5)) {
            let map = TablespaceMap { entries };
            prop_assert_eq!(TablespaceMap::parse(&map.to_bytes()).unwrap(), map);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = (BackupLabel::parse(&bytes), BackupHistory::parse(&bytes), TablespaceMap::parse(&bytes));
        }
    }
}

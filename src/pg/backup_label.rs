//! `backup_label`, and the `.backup` history file that repeats it with the stop.
//!
//! ```text
//! START WAL LOCATION: 0/1D00028 (file 00000001000000000000001D)
//! STOP WAL LOCATION: 0/1D00120 (file 00000001000000000000001D)     history file only
//! CHECKPOINT LOCATION: 0/1D00060
//! BACKUP METHOD: streamed
//! BACKUP FROM: primary
//! START TIME: 2026-11-22 00:29:24 UTC
//! LABEL: nightly
//! START TIMELINE: 1
//! STOP TIME: 2026-11-22 00:29:31 UTC                               history file only
//! STOP TIMELINE: 1                                                 history file only
//! INCREMENTAL FROM LSN: 0/2000028                                  17 on, incremental only
//! INCREMENTAL FROM TLI: 1
//! ```
//!
//! PostgreSQL reads the file by fixed formats, so one changed byte can stop recovery:
//! it is stored and restored byte for byte, and only checked here. Sources:
//! `src/backend/access/transam/xlogbackup.c` (`build_backup_content`),
//! `xlogrecovery.c` (`read_backup_label`).

use super::{Lsn, SegmentName, Timeline};

/// The longest `backup_label` that is read, in bytes; a real one has some 300.
const LABEL_BYTES_MAX: usize = 64 << 10;

/// Which kind of server the backup was taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupFrom {
    /// A primary.
    Primary,
    /// A standby.
    Standby,
}

/// What `backup_label` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupLabel {
    /// Where redo from the backup's checkpoint begins (included).
    pub start_lsn: Lsn,
    /// The segment that holds it.
    pub start_segment: SegmentName,
    /// Where the checkpoint's record begins.
    pub checkpoint_lsn: Lsn,
    /// How it was taken: `streamed` since PostgreSQL 15; before also `pg_start_backup`.
    pub method: String,
    /// What it was taken from.
    pub from: BackupFrom,
    /// When it began, as the server wrote it in its `log_timezone`: for people only.
    pub start_time: String,
    /// The label its maker gave it.
    pub label: String,
    /// The timeline it began on.
    pub start_timeline: Timeline,
}

/// What a `.backup` history file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupHistory {
    /// What `backup_label` said.
    pub label: BackupLabel,
    /// Where the backup ended (excluded).
    pub stop_lsn: Lsn,
    /// The segment in the stop line.
    pub stop_segment: SegmentName,
    /// When it ended, for people only.
    pub stop_time: String,
    /// The timeline it ended on.
    pub stop_timeline: Timeline,
}

/// Why bytes are not what PostgreSQL wrote. No retry cures any of these.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackupLabelError {
    /// A carriage return: the file went through something that changes line ends.
    #[error("backup_label has Windows line ends; it must be kept byte for byte")]
    CarriageReturn,
    /// A line is missing, changed or out of place.
    #[error("backup_label should have `{expected}` in line {line}; it was edited or is damaged")]
    BadLine {
        /// The line, from 1.
        line: usize,
        /// How the line should begin.
        expected: &'static str,
    },
    /// Something follows the last line.
    #[error("backup_label goes on after its last line, in line {line}")]
    Surplus {
        /// The line, from 1.
        line: usize,
    },
    /// The backup is incremental: it needs `pg_combinebackup` before it can be used.
    #[error("the backup is incremental; only a full backup can be used")]
    Incremental,
    /// The file is far longer than any real one.
    #[error("backup_label has {found} bytes, more than {LABEL_BYTES_MAX}")]
    TooLong {
        /// How many bytes.
        found: usize,
    },
}

impl BackupLabel {
    /// Returns what the file says, or why PostgreSQL would refuse it.
    pub fn parse(bytes: &[u8]) -> Result<Self, BackupLabelError> {
        let mut lines = Lines::new(bytes)?;
        let start = lines.location("START WAL LOCATION: ")?;
        let label = Self::parse_rest(&mut lines, start)?;
        lines.end()?;
        Ok(label)
    }

    fn parse_rest(
        lines: &mut Lines<'_>,
        (start_lsn, start_segment): (Lsn, SegmentName),
    ) -> Result<Self, BackupLabelError> {
        Ok(Self {
            start_lsn,
            start_segment,
            checkpoint_lsn: lines.value("CHECKPOINT LOCATION: ", |text| text.parse().ok())?,
            method: lines.value("BACKUP METHOD: ", plain)?,
            from: lines.value("BACKUP FROM: ", |text| match text {
                "primary" | "master" => Some(BackupFrom::Primary),
                "standby" => Some(BackupFrom::Standby),
                _ => None,
            })?,
            start_time: lines.value("START TIME: ", plain)?,
            label: lines.value("LABEL: ", |text| Some(text.to_owned()))?,
            start_timeline: lines.value("START TIMELINE: ", timeline)?,
        })
    }
}

impl BackupHistory {
    /// Returns what the `.backup` file says.
    pub fn parse(bytes: &[u8]) -> Result<Self, BackupLabelError> {
        let mut lines = Lines::new(bytes)?;
        let start = lines.location("START WAL LOCATION: ")?;
        let (stop_lsn, stop_segment) = lines.location("STOP WAL LOCATION: ")?;
        let label = BackupLabel::parse_rest(&mut lines, start)?;
        let stop_time = lines.value("STOP TIME: ", plain)?;
        let stop_timeline = lines.value("STOP TIMELINE: ", timeline)?;
        lines.end()?;
        Ok(Self { label, stop_lsn, stop_segment, stop_time, stop_timeline })
    }
}

fn plain(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn timeline(text: &str) -> Option<Timeline> {
    let plain = text.bytes().all(|byte| byte.is_ascii_digit());
    let number: u32 = plain.then(|| text.parse().ok()).flatten()?;
    (number != 0).then_some(Timeline(number))
}

/// The lines of a label, taken one by one in the only legal order.
struct Lines<'a> {
    rest: &'a [u8],
    line: usize,
}

impl<'a> Lines<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, BackupLabelError> {
        if bytes.len() > LABEL_BYTES_MAX {
            return Err(BackupLabelError::TooLong { found: bytes.len() });
        }
        if bytes.windows(2).any(|pair| pair == b"\r\n") {
            return Err(BackupLabelError::CarriageReturn);
        }
        Ok(Self { rest: bytes, line: 0 })
    }

    /// Returns what `read` makes of the next line's text after `prefix`.
    ///
    /// A label given in another encoding than UTF-8 is legal, so bytes that are
    /// not UTF-8 show as U+FFFD; everywhere else they make `read` fail.
    fn value<T>(
        &mut self,
        prefix: &'static str,
        read: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T, BackupLabelError> {
        self.line += 1;
        let bad = BackupLabelError::BadLine { line: self.line, expected: prefix };
        let end = self.rest.iter().position(|&byte| byte == b'\n').ok_or(bad.clone())?;
        let text = &self.rest[..end];
        self.rest = &self.rest[end + 1..];
        let text = text.strip_prefix(prefix.as_bytes()).ok_or(bad.clone())?;
        read(&String::from_utf8_lossy(text)).ok_or(bad)
    }

    /// Reads `<prefix>X/X (file <24 hex digits>)`.
    fn location(&mut self, prefix: &'static str) -> Result<(Lsn, SegmentName), BackupLabelError> {
        self.value(prefix, |text| {
            let (lsn, file) = text.split_once(" (file ")?;
            Some((lsn.parse().ok()?, SegmentName::parse(file.strip_suffix(')')?)?))
        })
    }

    fn end(&self) -> Result<(), BackupLabelError> {
        if self.rest.is_empty() {
            return Ok(());
        }
        if self.rest.starts_with(b"INCREMENTAL FROM ") {
            return Err(BackupLabelError::Incremental);
        }
        Err(BackupLabelError::Surplus { line: self.line + 1 })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// As PostgreSQL 18 wrote it.
    const REAL: &str = "START WAL LOCATION: 0/2F000028 (file 0000000100000000000002F0)\n\
        CHECKPOINT LOCATION: 0/2F000080\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-11-22 03:15:33 UTC\n\
        LABEL: pg_basebackup base backup\n\
        START TIMELINE: 1\n";

    const REAL_HISTORY: &str = "START WAL LOCATION: 0/2F000028 (file 0000000100000000000002F0)\n\
        STOP WAL LOCATION: 0/2F000120 (file 0000000100000000000002F0)\n\
        CHECKPOINT LOCATION: 0/2F000080\n\
        BACKUP METHOD: streamed\n\
        BACKUP FROM: primary\n\
        START TIME: 2026-11-22 03:15:33 UTC\n\
        LABEL: pg_basebackup base backup\n\
        START TIMELINE: 1\n\
        STOP TIME: 2026-11-22 03:15:33 UTC\n\
        STOP TIMELINE: 1\n";

    #[test]
    fn a_real_label_is_read() {
        let label = BackupLabel::parse(REAL.as_bytes()).unwrap();
        assert_eq!(label.start_lsn, Lsn(0x2F00_0028));
        assert_eq!(label.start_segment.to_string(), "0000000100000000000002F0");
        assert_eq!(label.checkpoint_lsn, Lsn(0x2F00_0080));
        assert_eq!((label.from, label.start_timeline), (BackupFrom::Primary, Timeline(1)));
        assert_eq!(label.label, "pg_basebackup base backup");
        let history = BackupHistory::parse(REAL_HISTORY.as_bytes()).unwrap();
        assert_eq!(history.label, label);
        assert_eq!((history.stop_lsn, history.stop_timeline), (Lsn(0x2F00_0120), Timeline(1)));
    }

    #[test]
    fn an_edited_label_is_refused() {
        let refused = |text: String| BackupLabel::parse(text.as_bytes()).unwrap_err();
        assert_eq!(refused(REAL.replace('\n', "\r\n")), BackupLabelError::CarriageReturn);
        assert_eq!(refused(format!("{REAL}\n")), BackupLabelError::Surplus { line: 8 });
        let incremental = format!("{REAL}INCREMENTAL FROM LSN: 0/1\nINCREMENTAL FROM TLI: 1\n");
        assert_eq!(refused(incremental), BackupLabelError::Incremental);
        for (from, to) in [
            ("START WAL", " START WAL"),
            ("START TIMELINE: 1\n", "START TIMELINE: 1"),
            ("START TIMELINE: 1", "START TIMELINE: 0"),
            ("LABEL: ", "LABEL:"),
            ("primary", "elsewhere"),
            ("02F0)", "02F0"),
        ] {
            let error = refused(REAL.replacen(from, to, 1));
            assert!(matches!(error, BackupLabelError::BadLine { .. }), "{from}: {error}");
        }
    }

    #[test]
    fn a_cut_label_is_refused_at_every_byte() {
        for end in 0..REAL.len() {
            assert!(BackupLabel::parse(&REAL.as_bytes()[..end]).is_err(), "{end}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), keep in 0usize..227) {
            let keep = keep.min(REAL.len());
            let mixed = [&REAL.as_bytes()[..keep], &bytes].concat();
            let _ = BackupLabel::parse(&mixed);
            let _ = BackupHistory::parse(&mixed);
        }
    }
}

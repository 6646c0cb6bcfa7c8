//! Which files need not be read again, because nobody wrote to them since the backup before.
//!
//! A file's change time is set by every write and can be set back by nobody. So a file whose size,
//! times and inode are what they were before the parent read it has the bytes that the parent read,
//! if its times were some time in the past by then: within one tick of the clock a second write
//! leaves no trace.

use crate::format::{Committed, FileEntry, FileStamp};
use crate::pg::PgTimestamp;

/// How much older than the parent's reading a file's times must be, in nanoseconds: far more than a
/// tick of any kernel, and than the second or two in which some file systems count.
const MARGIN_NS: i64 = 5_000_000_000;

/// Why no file of a parent may be taken as unchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// It was streamed, so that it has no stamps, or an older version made it.
    NoStamps,
    /// The clock stands before the parent's end, or stood wrong in between.
    Clock,
    /// It holds more damaged pages than it names.
    Damage,
}

/// Returns since when files of `parent` may be taken as unchanged, in nanoseconds since 1970: their
/// stamps must be before that. `now` is this host's clock.
pub fn settled_before(parent: &Committed, now: PgTimestamp) -> Result<i64, Doubt> {
    let read_from = parent.read_from.ok_or(Doubt::NoStamps)?;
    if parent.damaged_pages.count > parent.damaged_pages.named.len() as u64 {
        return Err(Doubt::Damage);
    }
    if !(parent.started_at <= read_from
        && read_from <= parent.finished_at
        && parent.finished_at <= now)
    {
        return Err(Doubt::Clock);
    }
    let read_from_ns = read_from.to_unix_micros().and_then(|micros| micros.checked_mul(1000));
    Ok(read_from_ns.ok_or(Doubt::Clock)? - MARGIN_NS)
}

/// Decides whether a file that still looks as `entry` of `parent` says may be taken as unchanged;
/// `checksums` is the name of the manifest's algorithm in file lists.
pub fn is_worth_comparing(
    entry: &FileEntry,
    parent: &Committed,
    settled_before_ns: i64,
    checksums: &str,
) -> bool {
    let is_settled = |stamp: &FileStamp| {
        stamp.ctime_ns < settled_before_ns && stamp.mtime_ns < settled_before_ns
    };
    let is_damaged = || {
        let path = String::from_utf8_lossy(&entry.path);
        parent.damaged_pages.named.iter().any(|page| page.file == path)
    };
    entry.stamp.as_ref().is_some_and(is_settled)
        && entry.checksum.as_ref().is_some_and(|sum| {
            sum.strip_prefix(checksums).is_some_and(|rest| rest.starts_with(':'))
        })
        && !is_damaged()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::format::{BackupId, DamagedPage, EntryKind, FileContent};

    const SECOND_NS: i64 = 1_000_000_000;

    fn time(seconds: i64) -> PgTimestamp {
        PgTimestamp::from_unix_seconds(seconds)
    }

    fn parent() -> Committed {
        Committed {
            started_at: time(1000),
            read_from: Some(time(1010)),
            finished_at: time(1100),
            ..Committed::example(BackupId::at(jiff::Timestamp::UNIX_EPOCH, 1))
        }
    }

    fn entry(ctime_ns: i64, mtime_ns: i64) -> FileEntry {
        FileEntry {
            path: b"base/5/16384".to_vec(),
            kind: EntryKind::File,
            mode: 0o600,
            mtime: 0,
            size: 8192,
            checksum: Some("crc32c:00000000".to_owned()),
            stamp: Some(FileStamp { mtime_ns, ctime_ns, inode: 1 }),
            content: FileContent::Inline(Vec::new()),
            page_maps: Vec::new(),
        }
    }

    #[test]
    fn a_parent_is_only_compared_with_while_the_clock_goes_forward() {
        assert_eq!(settled_before(&parent(), time(1200)), Ok(1005 * SECOND_NS));
        assert_eq!(settled_before(&parent(), time(1099)), Err(Doubt::Clock));
        let stepped = Committed { started_at: time(1020), ..parent() };
        assert_eq!(settled_before(&stepped, time(1200)), Err(Doubt::Clock));
        let stepped = Committed { finished_at: time(1009), ..parent() };
        assert_eq!(settled_before(&stepped, time(1200)), Err(Doubt::Clock));
        let streamed = Committed { read_from: None, ..parent() };
        assert_eq!(settled_before(&streamed, time(1200)), Err(Doubt::NoStamps));
    }

    #[test]
    fn files_touched_shortly_before_they_were_read_are_read_again() {
        let is =
            |entry: &FileEntry| is_worth_comparing(entry, &parent(), 1005 * SECOND_NS, "crc32c");
        assert!(is(&entry(1005 * SECOND_NS - 1, 0)));
        assert!(!is(&entry(1005 * SECOND_NS, 0)), "its inode was touched");
        assert!(!is(&entry(0, 1005 * SECOND_NS)), "a time in the future");
        assert!(!is(&FileEntry { stamp: None, ..entry(0, 0) }));
        assert!(!is(&FileEntry { checksum: None, ..entry(0, 0) }));
        let sha256 = Some("sha256:00".to_owned());
        assert!(!is(&FileEntry { checksum: sha256, ..entry(0, 0) }), "the manifest wants another");
    }

    #[test]
    fn files_with_damaged_pages_are_read_again() {
        let mut damaged = parent();
        damaged.damaged_pages.push(DamagedPage { file: "base/5/16384".to_owned(), block: 3 });
        let is = |path: &[u8]| {
            let entry = FileEntry { path: path.to_vec(), ..entry(0, 0) };
            is_worth_comparing(&entry, &damaged, SECOND_NS, "crc32c")
        };
        assert!(!is(b"base/5/16384"));
        assert!(is(b"base/5/16385"));
        damaged.damaged_pages.count += 1;
        assert_eq!(settled_before(&damaged, time(1200)), Err(Doubt::Damage));
    }
}

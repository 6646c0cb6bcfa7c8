//! Writing a `backup_manifest` as the server would, for files that were read past the server.
//!
//! The bytes come out in pieces, so that a manifest of a million files needs no memory here; its
//! format is drawn at [`super::ManifestReader`]. Sources: manual, "Backup Manifest Format";
//! `src/backend/backup/backup_manifest.c`.

use aws_lc_rs::digest::{Context, SHA256};

use super::{Lsn, MajorVersion, SystemId, Timeline, TimelineHistory, WalRange};

/// From this version on a manifest has version 2, which names the cluster.
const VERSION_2_FROM: MajorVersion = MajorVersion(17);

/// One file, as the manifest lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestedFile<'a> {
    /// Its path below the data directory, as bytes.
    pub path: &'a [u8],
    /// Bytes.
    pub size: u64,
    /// When it was last changed, seconds since 1970.
    pub modified_unix: i64,
    /// The checksum's name (`CRC32C`, `SHA256`) and its bytes as printed in hex; CRC-32C with its
    /// low byte first.
    pub checksum: (&'static str, &'a [u8]),
}

/// Writes one manifest.
#[derive(Clone)]
pub struct ManifestWriter {
    digest: Context,
    /// What precedes the next file.
    before: String,
}

impl std::fmt::Debug for ManifestWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestWriter").finish_non_exhaustive()
    }
}

impl ManifestWriter {
    /// Begins the manifest of a cluster of this version.
    pub fn new(version: MajorVersion, system_id: SystemId) -> Self {
        let before = if version >= VERSION_2_FROM {
            format!(
                "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {system_id},\n\"Files\": [\n"
            )
        } else {
            "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n".to_owned()
        };
        Self { digest: Context::new(&SHA256), before }
    }

    /// Appends a file to `out`.
    pub fn file(&mut self, file: &ManifestedFile<'_>, out: &mut Vec<u8>) {
        let path = match str::from_utf8(file.path) {
            // A string's JSON is a string in quotes; it cannot fail.
            Ok(text) => {
                format!("\"Path\": {}", serde_json::Value::from(text))
            }
            Err(_) => format!("\"Encoded-Path\": \"{}\"", hex(file.path)),
        };
        let (algorithm, checksum) = file.checksum;
        let modified = jiff::Timestamp::from_second(file.modified_unix)
            .unwrap_or(jiff::Timestamp::UNIX_EPOCH)
            .strftime("%Y-%m-%d %H:%M:%S GMT");
        let before = std::mem::replace(&mut self.before, ",\n".to_owned());
        let line = format!(
            "{before}{{ {path}, \"Size\": {}, \"Last-Modified\": \"{modified}\", \"Checksum-Algorithm\": \"{algorithm}\", \"Checksum\": \"{}\" }}",
            file.size,
            hex(checksum)
        );
        self.write(&line, out);
    }

    /// Appends the end to `out`: the WAL that the backup needs, and the manifest's own checksum.
    pub fn finish(mut self, ranges: &[WalRange], out: &mut Vec<u8>) {
        let ranges: Vec<String> = ranges
            .iter()
            .map(|range| {
                format!(
                    "{{ \"Timeline\": {}, \"Start-LSN\": \"{}\", \"End-LSN\": \"{}\" }}",
                    range.timeline, range.start_lsn, range.end_lsn
                )
            })
            .collect();
        let end = format!("\n],\n\"WAL-Ranges\": [\n{}\n],\n", ranges.join(",\n"));
        self.write(&end, out);
        let digest = self.digest.finish();
        let line = format!("\"Manifest-Checksum\": \"{}\"}}\n", hex(digest.as_ref()));
        out.extend_from_slice(line.as_bytes());
    }

    fn write(&mut self, text: &str, out: &mut Vec<u8>) {
        self.digest.update(text.as_bytes());
        out.extend_from_slice(text.as_bytes());
    }
}

/// Returns the WAL between a backup's start (included) and stop (excluded) along the way of
/// `history`, newest timeline first as the server lists it; `None` if the start is not on that way.
pub fn wal_ranges_of(
    history: &TimelineHistory,
    start_timeline: Timeline,
    start_lsn: Lsn,
    stop_lsn: Lsn,
) -> Option<Vec<WalRange>> {
    let mut ranges = Vec::new();
    let mut end_lsn = stop_lsn;
    for stretch in history.path().into_iter().rev() {
        // The way may go on beyond the stop.
        if stretch.start_lsn > stop_lsn {
            continue;
        }
        let is_first = stretch.timeline == start_timeline;
        let begin = if is_first { start_lsn } else { stretch.start_lsn };
        ranges.push(WalRange { timeline: stretch.timeline, start_lsn: begin, end_lsn });
        if is_first {
            return Some(ranges);
        }
        end_lsn = stretch.start_lsn;
    }
    None
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        // Writing to a String cannot fail.
        let _ = write!(out, "{byte:02x}");
    }
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::{ChecksumAlgorithm, ManifestFile, ManifestReader};

    /// As `pg_basebackup` of these versions left them.
    const REAL: [(u32, &[u8]); 2] = [
        (14, include_bytes!("../../tests/fixtures/pg/backup_manifest.14")),
        (18, include_bytes!("../../tests/fixtures/pg/backup_manifest.18")),
    ];

    fn name_of(algorithm: ChecksumAlgorithm) -> &'static str {
        match algorithm {
            ChecksumAlgorithm::Sha256 => "SHA256",
            _ => "CRC32C",
        }
    }

    #[test]
    fn what_a_server_listed_is_written_byte_for_byte_as_it_wrote_it() {
        for (major, real) in REAL {
            let mut files: Vec<ManifestFile> = Vec::new();
            let mut reader = ManifestReader::new();
            reader.feed(real, &mut |file| files.push(file)).unwrap();
            let end = reader.finish().unwrap();
            let system_id = end.system_id.unwrap_or(SystemId(0));
            let mut writer = ManifestWriter::new(MajorVersion(major), system_id);
            let mut written = Vec::new();
            for file in &files {
                let checksum = file.checksum.as_ref().unwrap();
                writer.file(
                    &ManifestedFile {
                        path: &file.path,
                        size: file.size,
                        modified_unix: file.last_modified.to_unix_micros().unwrap() / 1_000_000,
                        checksum: (name_of(checksum.algorithm), &checksum.bytes),
                    },
                    &mut written,
                );
            }
            writer.finish(&end.wal_ranges, &mut written);
            assert!(written == real, "{major}:\n{}", String::from_utf8_lossy(&written));
        }
    }

    #[test]
    fn wal_ranges_follow_the_timelines_from_the_newest() {
        let history = TimelineHistory::parse(Timeline(3), b"1\t0/100\tx\n2\t0/200\ty\n").unwrap();
        let ranges = |timeline: u32, start: u64, stop: u64| {
            wal_ranges_of(&history, Timeline(timeline), Lsn(start), Lsn(stop)).map(|ranges| {
                let plain = |r: &WalRange| (r.timeline.0, r.start_lsn.0, r.end_lsn.0);
                ranges.iter().map(plain).collect::<Vec<_>>()
            })
        };
        assert_eq!(ranges(3, 0x250, 0x300), Some(vec![(3, 0x250, 0x300)]));
        let all = vec![(3, 0x200, 0x300), (2, 0x100, 0x200), (1, 0x50, 0x100)];
        assert_eq!(ranges(1, 0x50, 0x300), Some(all));
        assert_eq!(ranges(1, 0x50, 0x90), Some(vec![(1, 0x50, 0x90)]), "the way went on");
        assert_eq!(ranges(4, 0x250, 0x300), None);
    }

    proptest! {
        #[test]
        fn any_file_is_read_back(
            files in prop::collection::vec((prop::collection::vec(1u8.., 1..40), any::<u64>(),
                0i64..4_000_000_000, any::<[u8; 4]>()), 1..5),
            version in 14u32..19, system: u64,
        ) {
            let mut writer = ManifestWriter::new(MajorVersion(version), SystemId(system));
            let mut out = Vec::new();
            for (path, size, modified_unix, crc) in &files {
                let (size, modified_unix) = (*size, *modified_unix);
                writer.file(
                    &ManifestedFile { path, size, modified_unix, checksum: ("CRC32C", crc) },
                    &mut out,
                );
            }
            let range = WalRange { timeline: Timeline(1), start_lsn: Lsn(1), end_lsn: Lsn(2) };
            writer.finish(&[range], &mut out);
            let mut read = Vec::new();
            let mut reader = ManifestReader::new();
            reader.feed(&out, &mut |file| read.push(file)).unwrap();
            let end = reader.finish().unwrap();
            prop_assert_eq!(&end.wal_ranges, &[range]);
            prop_assert_eq!(end.system_id, (version >= 17).then_some(SystemId(system)));
            prop_assert_eq!(read.len(), files.len());
            for (read, (path, size, _, crc)) in read.iter().zip(&files) {
                prop_assert_eq!(&read.path, path);
                prop_assert_eq!(read.size, *size);
                prop_assert_eq!(&read.checksum.as_ref().unwrap().bytes, &crc.to_vec());
            }
        }
    }
}

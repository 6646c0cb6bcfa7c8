//! Digests of what arrives, and the comparison with the manifest: the second of the three stages.
//!
//! Runs on a thread of its own: BLAKE3, the manifest's checksum and the look for zeros take as long as
//! receiving does. Everything goes on in the order in which it came.

use tokio::sync::mpsc;

use super::arriving::{Arrived, Begin};
use super::manifest::ManifestCheck;
use super::recording::ChunkFacts;
use crate::failure::Failure;
use crate::format::{EntryKind, digest_pages};
use crate::pg::{Lsn, Timeline};
use crate::repo::FileMeta;
use crate::walsender::ManifestChecksums;

/// What arrived, with its digests.
pub(super) enum Digested {
    Start(Begin),
    Entry(FileMeta),
    Manifest,
    Chunk {
        bytes: Vec<u8>,
        facts: ChunkFacts,
    },
    /// The file is complete, with its checksum for the file list; the manifest itself has none.
    FileEnd {
        checksum: Option<String>,
    },
    End {
        stop_lsn: Lsn,
        timeline: Timeline,
    },
}

/// Digests everything until the stage before ends or the one behind listens no more. `Ok` after
/// [`Arrived::End`] means that every file is as the server's manifest lists it.
pub(super) fn digest_all(
    mut arrived: mpsc::Receiver<Arrived>,
    next_stage: &mpsc::Sender<Digested>,
    checksums: ManifestChecksums,
) -> Result<(), Failure> {
    let mut manifest = ManifestCheck::new(checksums);
    // The file that is arriving: path and size. None in the manifest.
    let mut file: Option<(Vec<u8>, u64)> = None;
    let mut in_manifest = false;
    while let Some(next) = arrived.blocking_recv() {
        let digested = match next {
            Arrived::Start(begin) => Digested::Start(begin),
            Arrived::Entry(meta) => {
                if meta.kind == EntryKind::File {
                    manifest.begin_file();
                    file = Some((meta.path.clone(), meta.size));
                }
                Digested::Entry(meta)
            }
            Arrived::Manifest => {
                in_manifest = true;
                Digested::Manifest
            }
            Arrived::Chunk(bytes) => {
                if in_manifest {
                    manifest.feed(&bytes)?;
                } else {
                    manifest.file_data(&bytes);
                }
                let is_zeros = bytes.iter().all(|byte| *byte == 0);
                let (digest, pages) = digest_pages(&bytes);
                Digested::Chunk { facts: ChunkFacts { digest, pages, is_zeros, crc: None }, bytes }
            }
            Arrived::FileEnd => {
                let ended = file.take();
                let checksum = ended.map(|(path, size)| manifest.end_file(&path, size));
                Digested::FileEnd { checksum }
            }
            Arrived::End { stop_lsn, timeline } => Digested::End { stop_lsn, timeline },
        };
        if next_stage.blocking_send(digested).is_err() {
            return Ok(());
        }
    }
    manifest.finish()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::failure::Kind;
    use crate::format::{CHUNK_BYTES, digest_chunk};

    /// The manifest of one file, as the server writes it, with this CRC-32C.
    fn manifest_of_version_file(crc: &str) -> Vec<u8> {
        let mut text = format!(
            "{{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n{{ \"Path\": \"PG_VERSION\", \"Size\": 3, \"Last-Modified\": \"2026-11-22 03:15:22 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc}\" }}\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000100\" }}\n],\n"
        );
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
        text.push_str("\"Manifest-Checksum\": \"");
        for byte in digest.as_ref() {
            text.push_str(&format!("{byte:02x}"));
        }
        text.push_str("\"}\n");
        text.into_bytes()
    }

    fn entry(path: &str, kind: EntryKind, size: u64) -> Arrived {
        Arrived::Entry(FileMeta { path: path.into(), kind, mode: 0o600, mtime: 1, size })
    }

    fn run(items: Vec<Arrived>) -> (Result<(), Failure>, Vec<Digested>) {
        let (sender, arrived) = mpsc::channel(64);
        let (next_stage, mut digested) = mpsc::channel(64);
        for item in items {
            sender.try_send(item).ok().unwrap();
        }
        drop(sender);
        let outcome = digest_all(arrived, &next_stage, ManifestChecksums::Crc32c);
        let mut out = Vec::new();
        while let Ok(next) = digested.try_recv() {
            out.push(next);
        }
        (outcome, out)
    }

    fn backup_of_version_file(manifest_crc: &str) -> Vec<Arrived> {
        vec![
            entry("base", EntryKind::Directory, 0),
            entry("PG_VERSION", EntryKind::File, 3),
            Arrived::Chunk(b"17\n".to_vec()),
            Arrived::FileEnd,
            Arrived::Manifest,
            Arrived::Chunk(manifest_of_version_file(manifest_crc)),
            Arrived::FileEnd,
            Arrived::End { stop_lsn: Lsn(1), timeline: Timeline::FIRST },
        ]
    }

    #[test]
    fn all_goes_on_in_order_with_the_digests_of_exactly_its_bytes() {
        // The checksum of "17\n" is what pg_basebackup's manifest said of that file.
        let (outcome, out) = run(backup_of_version_file("64440205"));
        outcome.unwrap();
        let [
            Digested::Entry(directory),
            Digested::Entry(file),
            Digested::Chunk { bytes, facts: ChunkFacts { digest, is_zeros: false, .. } },
            Digested::FileEnd { checksum: Some(checksum) },
            Digested::Manifest,
            Digested::Chunk { .. },
            Digested::FileEnd { checksum: None },
            Digested::End { .. },
        ] = &out[..]
        else {
            panic!("{} items in another order", out.len());
        };
        assert_eq!((&*directory.path, &*file.path), (&b"base"[..], &b"PG_VERSION"[..]));
        assert_eq!((&bytes[..], *digest), (&b"17\n"[..], digest_chunk(b"17\n")));
        assert_eq!(checksum, "crc32c:64440205");
    }

    #[test]
    fn a_file_that_is_not_as_the_manifest_says_ends_the_backup() {
        let (outcome, _) = run(backup_of_version_file("64440206"));
        let failure = outcome.unwrap_err();
        assert_eq!(failure.kind, Kind::Integrity);
        assert!(failure.what.contains("PG_VERSION"), "{failure}");
    }

    #[test]
    fn a_stream_that_ends_early_is_never_success() {
        // Up to the manifest's bytes; what is missing behind them is for the last stage to see.
        for kept in 0..6 {
            let mut items = backup_of_version_file("64440205");
            items.truncate(kept);
            let (outcome, out) = run(items);
            assert!(outcome.is_err(), "{kept} items");
            assert_eq!(out.len(), kept);
        }
    }

    #[test]
    fn only_zeros_are_zeros() {
        let mut almost = vec![0; CHUNK_BYTES as usize];
        let zeros = almost.clone();
        almost[CHUNK_BYTES as usize - 1] = 1;
        let (_, out) = run(vec![Arrived::Chunk(zeros), Arrived::Chunk(almost)]);
        let found: Vec<bool> = out
            .iter()
            .map(|item| matches!(item, Digested::Chunk { facts, .. } if facts.is_zeros))
            .collect();
        assert_eq!(found, [true, false]);
    }
}

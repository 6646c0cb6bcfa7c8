//! Digests of what arrives, and the comparison with the manifest: the second of the three stages.
//!
//! Runs on a thread of its own: BLAKE3, the manifest's checksum and the look for zeros take as long as
//! receiving does. Everything goes on in the order in which it came.

use tokio::sync::mpsc;

use super::arriving::{Arrived, Begin};
use super::manifest::ManifestCheck;
use crate::failure::Failure;
use crate::format::{ChunkDigest, EntryKind, digest_chunk};
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
        digest: ChunkDigest,
        is_zeros: bool,
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
                Digested::Chunk { digest: digest_chunk(&bytes), is_zeros, bytes }
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

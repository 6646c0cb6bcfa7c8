//! What a restore over standing files would do; nothing is changed.

use std::collections::VecDeque;
use std::pin::pin;

use futures_util::StreamExt;
use serde::Serialize;

use super::looking::{Belongings, Look, Looking, is_streamed, maps_of};
use super::{Request, UNHARMED, of_tree, tree_plan};
use crate::failure::Failure;
use crate::format::{Committed, FileEntry, FrameRef};
use crate::ops::failures::{of_repo, of_task};
use crate::pgdata::Places;
use crate::plan::backup::chunk_len;
use crate::plan::delta::{ChunkWork, chunk_work};
use crate::repo::{FileList, RepoError, Repository};

/// Frames that are remembered as counted.
const FRAMES_COUNTED: usize = 32;

/// What stands and what has to be brought. Field names are part of the contract of `--json`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Survey {
    /// Bytes of files that stand as they should be.
    pub kept_bytes: u64,
    /// Bytes that are written or cleared.
    pub changed_bytes: u64,
    /// Files in which anything is.
    pub changed_files: u64,
    /// Files, links and directories that are removed, each directory with all that is in it.
    pub removed: u64,
    /// Stored bytes that are fetched.
    pub fetch_bytes: u64,
    /// The frames that were counted last.
    #[serde(skip)]
    counted: VecDeque<FrameRef>,
}

impl Survey {
    fn add(&mut self, entry: &FileEntry, first: u64, look: Look) -> bool {
        let mut changes = false;
        for ((number, chunk), is_same) in (first..).zip(look.chunks).zip(look.same) {
            let bytes = u64::from(chunk_len(entry.size, number));
            match chunk_work(true, is_same, chunk.runs.is_empty()) {
                ChunkWork::Keep => self.kept_bytes += bytes,
                ChunkWork::Clear => {
                    self.changed_bytes += bytes;
                    changes = true;
                }
                ChunkWork::Bring => {
                    self.changed_bytes += bytes;
                    changes = true;
                    for run in chunk.runs {
                        // Frames hold neighbouring chunks or pages, so those of one follow each other,
                        // with those of a few others in between.
                        if !self.counted.contains(&run.frame) {
                            self.fetch_bytes += u64::from(run.frame.stored);
                            self.counted.truncate(FRAMES_COUNTED - 1);
                            self.counted.push_front(run.frame);
                        }
                    }
                }
            }
        }
        changes
    }
}

/// Compares what stands with a backup.
///
/// # Errors
/// Those of the repository and the disk.
pub async fn survey(
    repository: &Repository,
    request: &Request,
    backup: &Committed,
) -> Result<Survey, Failure> {
    let failed = |error: RepoError| {
        of_repo(error, format!("could not read the files of backup {}", backup.id), UNHARMED)
    };
    let places = Places::of(&tree_plan(request, backup)?);
    let list = FileList::open(repository, &backup.id).await.map_err(failed)?.kept();
    let belongings = Belongings::read(&list, |_| {}).await.map_err(failed)?;
    let looking = Looking::new(list.fetcher().clone(), Some(places.clone()), request.jobs);
    let mut survey = Survey::default();
    let mut reading = pin!(list.read());
    while let Some(entries) = reading.next().await.transpose().map_err(failed)? {
        let mut looks = pin!(looking.at(&entries));
        for entry in entries.iter().filter(|entry| is_streamed(entry)) {
            let (mut changes, mut number) = (false, 0);
            for _ in 0..maps_of(entry) {
                let Some(look) = looks.next().await.transpose().map_err(failed)? else { break };
                let count = look.chunks.len() as u64;
                changes |= survey.add(entry, number, look);
                number += count;
            }
            survey.changed_files += u64::from(changes);
        }
    }
    let counted = tokio::task::spawn_blocking(move || {
        let mut removed = 0;
        let mut count = |_| {
            removed += 1;
            Ok(())
        };
        places.strangers(&|path| belongings.hold(path), &mut count).map(|()| removed)
    });
    let counted = counted.await.map_err(|error| of_task(error, UNHARMED))?;
    survey.removed = counted.map_err(|error| of_tree(error, UNHARMED))?;
    Ok(survey)
}

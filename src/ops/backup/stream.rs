//! From the server's stream to recorded files: the stages put together.
//!
//! ```text
//! stream -> arriving: entries, chunks -> digests: BLAKE3, checksum, zeros -> recording: referenced or stored
//!           (a task)                     (a thread)                          (the backup's own task)
//! ```
//!
//! Memory: twice [`ARRIVED_MAX`] chunks between the stages, and what [`Recording`] holds.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::arriving::{ARRIVED_MAX, Arriving};
use super::digests::digest_all;
use super::recording::{Received, Recording};
use super::server::Server;
use super::{Making, UNHARMED, not_received};
use crate::failure::Failure;
use crate::ops::failures::of_task;
use crate::repo::{FileRecorder, ParentFiles};
use crate::walsender::{BackupOptions, BaseBackup};

/// From this major version on, an archive ends with its zero blocks; before, the server left them out
/// (`src/backend/backup/basebackup.c`, `sendTablespace` and its callers).
const TAR_END_MARKED_FROM: u32 = 15;

/// Receives the whole backup. Everything has been compared with the manifest when it returns.
pub(super) async fn receive(
    making: &Making<'_>,
    server: Server,
    recorder: FileRecorder,
    parent: Option<ParentFiles>,
) -> Result<(FileRecorder, Received), Failure> {
    let request = making.request;
    let options = BackupOptions {
        label: request.label.clone(),
        fast_checkpoint: request.fast_checkpoint,
        max_rate_kb: request.max_rate_kb,
        manifest_checksums: request.manifest_checksums,
        progress: true,
        ..BackupOptions::default()
    };
    making.progress.note("waiting for the server's checkpoint");
    let tar_end_marked = server.facts.version.major().0 >= TAR_END_MARKED_FROM;
    let stream = BaseBackup::start(server.connection, &options).await.map_err(not_received)?;
    let (to_digests, arrived) = mpsc::channel(ARRIVED_MAX);
    let (to_recording, mut digested) = mpsc::channel(ARRIVED_MAX);
    // Aborted when this is given up, so that nobody goes on receiving.
    let mut stages = JoinSet::new();
    let progress = Arc::clone(&making.progress);
    stages.spawn(Arriving::new(to_digests, progress, tar_end_marked).run(stream));
    let checksums = request.manifest_checksums;
    let digests =
        tokio::task::spawn_blocking(move || digest_all(arrived, &to_recording, checksums));
    let mut recording = Recording::new(making, recorder, parent);
    while let Some(next) = digested.recv().await {
        recording.take(next).await?;
    }
    // Whichever stage broke first, those behind it only saw an early end.
    while let Some(ended) = stages.join_next().await {
        ended.map_err(|error| of_task(error, UNHARMED))??;
    }
    digests.await.map_err(|error| of_task(error, UNHARMED))??;
    recording.finish()
}

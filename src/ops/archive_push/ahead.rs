//! Storing segments that wait behind the one that is asked for, so that their own calls are short.
//!
//! ```text
//! call for 7:  7 is pushed, and beside it 8, 9, 10, which are .ready too; each leaves a note once it is stored
//! call for 8:  a note? -> read 8, and compare with its digest -> done, without the store
//! ```
//!
//! The note is believed only for the very bytes that the store has confirmed: a segment that changed, was recycled
//! or is another cluster's has another digest, and is pushed as if there were no note.
//! What cannot be pushed ahead is no failure of this call: its own call will meet the reason, and tell it.

use std::path::Path;
use std::time::Duration;

use futures_util::StreamExt;

use super::both::{self, Pushes, What};
use super::{Report, Request, digest_of};
use crate::ops::ahead::{Ahead, STORED, is_of_fetching, passed_over};
use crate::pg::{SegmentName, SegmentSize, WalFileName};
use crate::pgdata::{Moment, Spool};
use crate::plan::spool::{Circumstances, Note, to_push_ahead};
use crate::repo::Put;

/// Segments on their way at a time besides the one that is asked for, as far as there is room (`Push::room`): while
/// some are compressed, others wait for the store.
const IN_FLIGHT: usize = 3;

/// How long others may still take once the segment that was asked for is stored: PostgreSQL waits meanwhile.
pub(super) const OTHERS_MAX: Duration = Duration::from_secs(10);

/// Answers from the note of an earlier call, without the repository, if there is one and the file's bytes are
/// those that were stored. `None`: push it.
pub fn pushed_before(request: &Request) -> Option<Report> {
    let ahead = request.ahead.as_ref()?;
    let segment = segment_of(&request.path)?;
    let spool = ahead.find()?;
    let name = note_name(segment);
    let note = ahead.note(&spool, &name, segment)?;
    let (plain_bytes, digest) = digest_of(&request.path, note.plain_bytes).ok()?;
    let digest = digest.to_hex();
    // Used or useless: in both cases it has had its time.
    spool.remove(&name);
    note.is_of_bytes(plain_bytes, &digest).inspect_err(|doubt| passed_over(&name, *doubt)).ok()?;
    Some(Report {
        name: WalFileName::Segment(segment),
        outcome: Put::AlreadyThere,
        plain_bytes,
        stored_bytes: note.stored_bytes,
        blake3: Some(note.blake3),
    })
}

/// What is pushed besides the segment that is asked for.
pub(super) struct Following {
    spool: Spool,
    segments: Vec<SegmentName>,
}

/// Looks which segments wait behind the one that is asked for; `None`: none, or there is no spool.
pub(super) fn following(request: &Request) -> Option<Following> {
    let ahead = request.ahead.as_ref()?;
    let segment = segment_of(&request.path)?;
    let bytes = std::fs::metadata(&request.path).ok()?.len();
    let size = SegmentSize::new(u32::try_from(bytes).ok()?)?;
    let status = request.path.parent()?.join("archive_status");
    // By name and not by listing: there may be thousands of files.
    let is_ready = |segment: SegmentName| status.join(format!("{segment}.ready")).exists();
    if to_push_ahead(segment, size, is_ready, |_| false).is_empty() {
        return None;
    }
    let spool = ahead.open()?;
    tidy(ahead, &spool);
    let is_noted = |segment| ahead.note(&spool, &note_name(segment), segment).is_some();
    let segments = to_push_ahead(segment, size, is_ready, is_noted);
    (!segments.is_empty()).then_some(Following { spool, segments })
}

/// Removes notes that nobody will believe, and what a killed process had fetched ahead.
fn tidy(ahead: &Ahead, spool: &Spool) {
    let nobody_fetches = spool.lock().ok().flatten();
    spool.tidy(|name| match name.strip_suffix(STORED).and_then(SegmentName::parse) {
        Some(segment) => ahead.note(spool, name, segment).is_some(),
        None => nobody_fetches.is_none() || !is_of_fetching(name),
    });
}

/// Pushes them, several at a time, and leaves a note of each that the store has confirmed.
pub(super) async fn push_following(pushes: Pushes<'_>, following: &Following) {
    futures_util::stream::iter(&following.segments)
        .map(|segment| push_and_note(pushes, &following.spool, *segment))
        .buffer_unordered(IN_FLIGHT)
        .collect::<()>()
        .await;
}

async fn push_and_note(pushes: Pushes<'_>, spool: &Spool, segment: SegmentName) {
    let asked = pushes.first.request;
    let path = asked.path.with_file_name(segment.to_string());
    let request = Request { path, ..asked.clone() };
    match both::push(pushes.of(&request), What::Ahead(segment)).await {
        Ok(report) => note(&request, spool, segment, report),
        Err(failure) => tracing::info!("`{segment}` was not pushed ahead: {failure}"),
    }
}

fn note(request: &Request, spool: &Spool, segment: SegmentName, report: Report) {
    // A segment that was accepted as damaged has no digest here: its own call shall say so again.
    let (Some(ahead), Some(blake3)) = (&request.ahead, report.blake3) else { return };
    let Some(now) = Moment::now() else { return };
    let at = Circumstances { place: &ahead.place, segment, now: &now };
    let note = Note::of_stored(at, (report.plain_bytes, report.stored_bytes), blake3);
    match spool.write_note(&note_name(segment), &note.to_bytes()) {
        Ok(()) => tracing::debug!("`{segment}` was pushed ahead"),
        Err(error) => {
            tracing::info!("`{segment}` was pushed ahead and will be read again: {error}");
        }
    }
}

fn note_name(segment: SegmentName) -> String {
    format!("{segment}{STORED}")
}

fn segment_of(path: &Path) -> Option<SegmentName> {
    SegmentName::parse(path.file_name()?.to_str()?)
}

//! The data directory as a row of stretches: read, checked and digested by several threads, handed on
//! in order.
//!
//! ```text
//! walk: jobs of up to 1 MiB, in order -> readers: bytes, pages, digests, checksum -> next(), in order
//! (a thread)                             (threads)
//! ```
//!
//! Memory: as many stretches as the plan says; the walk waits when they are all in use.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::super::UNHARMED;
use super::super::recording::ChunkFacts;
use crate::failure::{Failure, Kind};
use crate::format::{CHUNK_BYTES, EntryKind, FileStamp, digest_pages};
use crate::ops::failures::of_disk;
use crate::pg::crc32c;
use crate::pgdata::{
    ClusterWalk, DiskError, FileLook, Found, FoundFile, PageRules, ReadFile, SuspectPage,
    check_pages,
};
use crate::plan::backup::chunks_of;
use crate::plan::changed_chunks::ChangedChunks;
use crate::plan::file_reading::{FILES_TOGETHER_MAX, ReadingPlan, STRETCH_BYTES};
use crate::repo::{FileMeta, KnownFiles};

/// Stacks of these threads: they call nothing deep.
const STACK_BYTES: usize = 512 << 10;

/// How long the rate limit sleeps before it looks whether anybody still listens.
const NAP_MAX: Duration = Duration::from_millis(100);

/// How to read.
#[derive(Debug, Clone, Copy)]
pub(super) struct How {
    pub(super) plan: ReadingPlan,
    /// `None` where the cluster has no checksums.
    pub(super) pages: Option<PageRules>,
    /// Bytes per second.
    pub(super) rate_max: Option<u64>,
}

/// What became of one job.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) bytes: Vec<u8>,
    pub(super) events: Vec<Event>,
}

/// What a stretch holds, in order.
#[derive(Debug)]
pub(super) enum Event {
    /// A directory.
    Directory(FileMeta),
    /// The beginning of a file.
    File(FileMeta, FileStamp),
    /// A file that is as an earlier backup has it; its bytes were not read.
    Unchanged(FileMeta, FileStamp),
    /// So many chunks of the file are as the earlier backup has them, and were not read.
    Kept(u64),
    /// The next bytes of the file.
    Data(Data),
    /// The file is complete.
    FileEnd,
}

/// A part of a file.
#[derive(Debug)]
pub(super) struct Data {
    /// Where it stands in [`Stretch::bytes`].
    pub(super) at: std::ops::Range<usize>,
    /// Its chunks.
    pub(super) chunks: Vec<ChunkFacts>,
    /// Pages of it with a wrong checksum.
    pub(super) suspects: Vec<SuspectPage>,
}

/// Digests a chunk.
pub(super) fn facts_of(bytes: &[u8]) -> ChunkFacts {
    let (digest, pages) = digest_pages(bytes);
    ChunkFacts { digest, pages, is_zeros: is_zeros(bytes), crc: Some(crc32c(bytes)) }
}

type Answer = Result<Stretch, DiskError>;

struct Job {
    items: Vec<Item>,
    answer: oneshot::Sender<Answer>,
}

enum Item {
    /// So many chunks of the file that is open are not read; `true` if they are its last.
    Kept(Option<(FileMeta, FileStamp)>, u64, bool),
    Directory(FileMeta),
    Unchanged(FileMeta, FileStamp),
    /// A file that fits one stretch, with others perhaps.
    Small(FoundFile),
    /// A part of a file that is open.
    Part(Part),
}

struct Part {
    file: Arc<ReadFile>,
    /// Which file of its fork, if it consists of pages.
    segment: Option<u32>,
    /// The file itself, where this is its first part.
    begins: Option<(FileMeta, FileStamp)>,
    offset: u64,
    len: usize,
    is_last: bool,
}

/// What an earlier backup holds, and which of it is as it was.
#[derive(Clone)]
pub(super) struct Known {
    pub(super) files: Arc<KnownFiles>,
    /// What WAL summaries say, if there are any.
    pub(super) changes: Option<Arc<ChangedChunks>>,
}

/// A reading in progress. Its threads end by themselves when it is dropped.
pub(super) struct Reading {
    in_order: mpsc::Receiver<oneshot::Receiver<Answer>>,
    next: Option<oneshot::Receiver<Answer>>,
    spare: Spare,
}

/// Buffers that were used and can be used again.
type Spare = Arc<Mutex<Vec<Vec<u8>>>>;

impl Reading {
    /// Starts the threads. Files that are `known` are not read.
    pub(super) fn begin(
        walk: ClusterWalk,
        how: How,
        known: Option<Known>,
    ) -> Result<Self, Failure> {
        let (to_order, in_order) = mpsc::channel(how.plan.stretches_max);
        let (to_readers, jobs) = sync_channel(how.plan.stretches_max);
        let jobs = Arc::new(Mutex::new(jobs));
        let spare = Spare::default();
        for number in 1..=how.plan.readers {
            let (jobs, spare) = (Arc::clone(&jobs), Arc::clone(&spare));
            start_thread(&format!("read-{number}"), move || read_jobs(&jobs, &spare, how))?;
        }
        let rate = Rate { bytes_per_second: how.rate_max, began: Instant::now(), bytes: 0 };
        let walking = Walking { to_order, to_readers, rate, known, items: Vec::new(), bytes: 0 };
        start_thread("walk", move || walking.run(walk))?;
        Ok(Self { in_order, next: None, spare })
    }

    /// Returns the next stretch; `None` after the last. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Stretch>, Failure> {
        if self.next.is_none() {
            self.next = self.in_order.recv().await;
        }
        let Some(answer) = &mut self.next else { return Ok(None) };
        let answer = answer.await;
        self.next = None;
        match answer {
            Ok(Ok(stretch)) => Ok(Some(stretch)),
            Ok(Err(error)) => Err(of_disk(error, "could not read the data directory", UNHARMED)),
            Err(_) => Err(Failure::new(
                Kind::Bug,
                "a thread that read the data directory ended too early",
                UNHARMED,
                "Please report it with the lines above. `--source stream` does without.",
            )),
        }
    }

    /// Takes a stretch's buffer back.
    pub(super) fn give_back(&self, buffer: Vec<u8>) {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    builder.spawn(work).map(drop).map_err(|error| {
        let next = "Check the limits on threads and memory of this user.";
        Failure::new(Kind::Bug, "could not start a thread", UNHARMED, next).because(error)
    })
}

/// Nobody listens any more.
struct Unheard;

/// The thread that walks.
struct Walking {
    to_order: mpsc::Sender<oneshot::Receiver<Answer>>,
    to_readers: SyncSender<Job>,
    rate: Rate,
    known: Option<Known>,
    /// The job that is being gathered, and its bytes.
    items: Vec<Item>,
    bytes: usize,
}

impl Walking {
    fn run(mut self, walk: ClusterWalk) {
        for found in walk {
            let done = match found {
                Ok(found) => self.take(found),
                Err(error) => Err(Stopped::Disk(error)),
            };
            match done {
                Ok(()) => {}
                Err(Stopped::Disk(error)) => {
                    let (answer, slot) = oneshot::channel();
                    let _ = answer.send(Err(error));
                    let _ = self.send().and_then(|()| self.queue(slot));
                    return;
                }
                Err(Stopped::Unheard) => return,
            }
        }
        let _ = self.send();
    }

    fn take(&mut self, found: Found) -> Result<(), Stopped> {
        let item = match found {
            Found::Special(place) => {
                tracing::warn!(
                    "`{}` is left out: base backups hold regular files, directories and links to tablespaces only",
                    place.display()
                );
                return Ok(());
            }
            Found::Directory(directory) => Item::Directory(FileMeta {
                path: directory.path,
                kind: EntryKind::Directory,
                mode: directory.mode,
                mtime: directory.mtime,
                size: 0,
            }),
            Found::File(file) if self.is_known(&file) => {
                let (stamp, size) = (stamp_of(file.look), file.size);
                Item::Unchanged(meta_of(file, size), stamp)
            }
            Found::File(file) if file.size > STRETCH_BYTES as u64 => return self.large(file),
            Found::File(file) => {
                let size = usize::try_from(file.size).unwrap_or(STRETCH_BYTES);
                if self.bytes + size > STRETCH_BYTES {
                    self.send()?;
                }
                self.bytes += size;
                Item::Small(file)
            }
        };
        self.items.push(item);
        if self.items.len() >= FILES_TOGETHER_MAX {
            self.send()?;
        }
        Ok(())
    }

    fn is_known(&self, file: &FoundFile) -> bool {
        let known = self.known.as_ref();
        known.is_some_and(|known| known.files.holds(&file.path, file.size, stamp_of(file.look)))
    }

    /// Returns the chunks of a large file that are to be read; all, unless WAL summaries say which.
    fn wanted(&self, file: &FoundFile) -> Vec<Range<u64>> {
        let all = 0..chunks_of(file.size);
        let some = self.known.as_ref().and_then(|known| {
            let before = known.files.size_of(&file.path)?;
            let (directory, relation) = file.relation?;
            known.changes.as_ref()?.chunks_to_read(directory, relation, file.size, before)
        });
        some.unwrap_or_else(|| vec![all])
    }

    fn large(&mut self, file: FoundFile) -> Result<(), Stopped> {
        self.send()?;
        let Some(open) = ReadFile::open(&file.place).map_err(Stopped::Disk)? else { return Ok(()) };
        let open = Arc::new(open);
        let segment = file.relation.map(|(_, relation)| relation.segment);
        let wanted = self.wanted(&file);
        let (size, stamp) = (file.size, stamp_of(file.look));
        let mut begins = Some((meta_of(file, size), stamp));
        let mut next = 0;
        let end = chunks_of(size);
        for Range { start, end: until } in wanted.into_iter().chain(std::iter::once(end..end)) {
            if start > next {
                self.items.push(Item::Kept(begins.take(), start - next, start == end));
            }
            let (mut offset, until_byte) =
                (start * u64::from(CHUNK_BYTES), (until * u64::from(CHUNK_BYTES)).min(size));
            while offset < until_byte {
                let left = usize::try_from(until_byte - offset).unwrap_or(usize::MAX);
                let len = left.min(STRETCH_BYTES);
                let is_last = offset + len as u64 == size;
                let begins = begins.take();
                let file = Arc::clone(&open);
                self.items.push(Item::Part(Part { file, segment, begins, offset, len, is_last }));
                self.bytes = len;
                self.send()?;
                offset += len as u64;
            }
            next = until.max(next);
        }
        self.send()?;
        Ok(())
    }

    /// Hands the gathered job on.
    fn send(&mut self) -> Result<(), Unheard> {
        if self.items.is_empty() {
            return Ok(());
        }
        let (answer, slot) = oneshot::channel();
        let job = Job { items: std::mem::take(&mut self.items), answer };
        self.rate.wait_for(std::mem::take(&mut self.bytes), || self.to_order.is_closed());
        // The place in the row first: it is what bounds the stretches in memory.
        self.queue(slot)?;
        self.to_readers.send(job).map_err(|_| Unheard)
    }

    fn queue(&self, slot: oneshot::Receiver<Answer>) -> Result<(), Unheard> {
        self.to_order.blocking_send(slot).map_err(|_| Unheard)
    }
}

enum Stopped {
    Disk(DiskError),
    Unheard,
}

impl From<Unheard> for Stopped {
    fn from(_: Unheard) -> Self {
        Self::Unheard
    }
}

/// The rate limit.
struct Rate {
    bytes_per_second: Option<u64>,
    began: Instant,
    bytes: u64,
}

impl Rate {
    /// Waits until so many more bytes may be read, or nobody wants them.
    fn wait_for(&mut self, bytes: usize, unheard: impl Fn() -> bool) {
        let Some(rate) = self.bytes_per_second else { return };
        #[allow(clippy::cast_precision_loss)] // a pause need not be exact
        let due = Duration::from_secs_f64(self.bytes as f64 / rate.max(1) as f64);
        self.bytes += bytes as u64;
        while let Some(left) = due.checked_sub(self.began.elapsed())
            && !unheard()
        {
            std::thread::sleep(left.min(NAP_MAX));
        }
    }
}

fn stamp_of(look: FileLook) -> FileStamp {
    let FileLook { mtime_ns, ctime_ns, inode } = look;
    FileStamp { mtime_ns, ctime_ns, inode }
}

fn meta_of(file: FoundFile, size: u64) -> FileMeta {
    let FoundFile { path, mode, mtime, .. } = file;
    FileMeta { path, kind: EntryKind::File, mode, mtime, size }
}

/// A reader: takes jobs until there are no more.
fn read_jobs(jobs: &Mutex<Receiver<Job>>, spare: &Spare, how: How) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { items, answer }) = job else { return };
        let buffer = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut stretch = Stretch {
            bytes: buffer.unwrap_or_else(|| vec![0; STRETCH_BYTES]),
            events: Vec::with_capacity(items.len() * 3),
        };
        let read = read_items(items, &mut stretch, how);
        // Nobody listens: the backup was given up.
        let _ = answer.send(read.map(|()| stretch));
    }
}

fn read_items(items: Vec<Item>, stretch: &mut Stretch, how: How) -> Result<(), DiskError> {
    let mut at = 0;
    for item in items {
        match item {
            Item::Kept(begins, chunks, is_last) => {
                stretch.events.extend(begins.map(|(meta, stamp)| Event::File(meta, stamp)));
                stretch.events.push(Event::Kept(chunks));
                stretch.events.extend(is_last.then_some(Event::FileEnd));
            }
            Item::Directory(meta) => stretch.events.push(Event::Directory(meta)),
            Item::Unchanged(meta, stamp) => stretch.events.push(Event::Unchanged(meta, stamp)),
            Item::Small(file) => at = read_small(file, at, stretch, how)?,
            Item::Part(part) => read_part(part, stretch, how)?,
        }
    }
    Ok(())
}

/// Reads a whole file to `at`; returns where it ends. What it has grown by since it was looked at
/// is left out; WAL brings it again.
fn read_small(
    file: FoundFile,
    at: usize,
    stretch: &mut Stretch,
    how: How,
) -> Result<usize, DiskError> {
    let Some(open) = ReadFile::open(&file.place)? else { return Ok(at) };
    let room = usize::try_from(file.size).unwrap_or(usize::MAX).min(stretch.bytes.len() - at);
    let len = open.read_at(0, &mut stretch.bytes[at..at + room])?;
    let segment = file.relation.map(|(_, relation)| relation.segment);
    let stamp = stamp_of(file.look);
    stretch.events.push(Event::File(meta_of(file, len as u64), stamp));
    if len > 0 {
        let data = digest(&open, segment, 0, at..at + len, &mut stretch.bytes, how)?;
        stretch.events.push(Event::Data(data));
    }
    stretch.events.push(Event::FileEnd);
    Ok(at + len)
}

fn read_part(part: Part, stretch: &mut Stretch, how: How) -> Result<(), DiskError> {
    let Part { file, segment, begins, offset, len, is_last } = part;
    let filled = file.read_at(offset, &mut stretch.bytes[..len])?;
    // Cut off since it began: zeros stand for the rest, as in the server's own backups, until
    // replay cuts it off as well.
    stretch.bytes[filled..len].fill(0);
    stretch.events.extend(begins.map(|(meta, stamp)| Event::File(meta, stamp)));
    let data = digest(&file, segment, offset, 0..len, &mut stretch.bytes, how)?;
    stretch.events.push(Event::Data(data));
    if is_last {
        stretch.events.push(Event::FileEnd);
    }
    Ok(())
}

/// Checks and digests the part of a file that stands at `at` of `bytes`.
fn digest(
    file: &ReadFile,
    segment: Option<u32>,
    offset: u64,
    at: std::ops::Range<usize>,
    bytes: &mut [u8],
    how: How,
) -> Result<Data, DiskError> {
    let part = &mut bytes[at.clone()];
    let suspects = match (how.pages, segment) {
        (Some(rules), Some(segment)) => check_pages(file, segment, offset, part, rules)?,
        _ => Vec::new(),
    };
    let chunks = part.chunks(CHUNK_BYTES as usize).map(facts_of).collect();
    Ok(Data { at, chunks, suspects })
}

fn is_zeros(chunk: &[u8]) -> bool {
    let (blocks, rest) = chunk.as_chunks::<64>();
    blocks.iter().all(|block| *block == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

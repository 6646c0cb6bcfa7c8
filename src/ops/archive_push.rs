//! `archive-push`: store one WAL file, checked against its name.
//!
//! ```text
//! name -> identity of the place -> read, walk, hash, compress (one pass) -> create -> done
//! ```
//!
//! A file that does not look whole is read again before it is refused, since a
//! false alarm stops archiving. Success is returned only when the store has
//! confirmed the object, or holds the same content already.

mod ahead;
mod both;
mod damaged;
mod large;
mod resident;
mod stalled;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use both::{Pushes, What};
use damaged::{advice, settle};
use futures_util::future::{Either, select};
use tokio::sync::{OnceCell, Semaphore};

pub use self::ahead::pushed_before;
pub use self::both::Second;
pub use self::resident::{Resident, is_as_stored};
pub use self::stalled::{Pushed, run_despite};
use super::ahead::Ahead;
use super::failures::{of_repo, of_task};
use super::identity_of;
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Header, Identity, Kind as ObjectKind, SummaryBuilder, WalObject};
use crate::pg::{
    BackupHistory, Extent, LONG_PAGE_HEADER_BYTES, PageHeader, SegmentExpectation, SegmentName,
    SegmentWalk, TimelineHistory, WalDamage, WalFileName,
};
use crate::repo::{Put, Repository, SealedObject, WHOLE_SEGMENT_BYTES_MAX, WalSealer};

/// How often a file that does not look whole is read before it is refused.
const READINGS: u32 = 3;

/// The pause before it is read again.
const REREAD_PAUSE: Duration = Duration::from_millis(200);

/// What segments on their way may hold, in MiB, of the 64 that archiving may take in all.
const HELD_MIB: usize = 40;

/// What a segment may hold until it is known how well it compresses, in MiB; what its codec needs comes to that.
const UNSEALED_MIB: u32 = 16;

/// No history file or backup history file is longer.
const SMALL_FILE_BYTES_MAX: u64 = 1 << 20;

/// How much of a file is read at a time.
const READ_BYTES: usize = 256 << 10;

const UNHARMED: &str = "Nothing that is stored was changed, and the server keeps the file in pg_wal until it is archived.";

/// What is asked.
#[derive(Debug, Clone)]
pub struct Request {
    /// The file, as PostgreSQL's `%p` names it.
    pub path: PathBuf,
    /// How it is compressed.
    pub codec: Codec,
    /// How long all of it may take.
    pub deadline: Duration,
    /// Store a damaged segment as damaged instead of refusing it.
    pub accept_damaged: bool,
    /// Whether segments that wait behind it may be stored as well.
    pub ahead: Option<Ahead>,
    /// A second repository that takes it too.
    pub second: Option<Arc<Second>>,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The file's name.
    pub name: WalFileName,
    /// Whether this call stored it.
    pub outcome: Put,
    /// Its length.
    pub plain_bytes: u64,
    /// Its length as stored.
    pub stored_bytes: u64,
    /// BLAKE3 of a file that is stored as sound, in hex.
    pub blake3: Option<String>,
}

/// One push on its way.
#[derive(Clone, Copy)]
struct Push<'a> {
    repository: &'a Repository,
    request: &'a Request,
    /// Whether others are on their way too: then none may hold up the rest while it reads.
    beside_others: bool,
    /// The identity that was read first; nearly always that of all others.
    identity: &'a OnceCell<Identity>,
    /// Room for what is held, in MiB.
    room: &'a Semaphore,
}

/// Stores one WAL file and, where that is allowed, segments that wait behind it.
///
/// # Errors
/// Speak of the one file alone. Whatever becomes of the others, it was stored when this returns `Ok`.
pub async fn run(repository: &Repository, request: &Request) -> Result<Report, Failure> {
    let following = ahead::following(request);
    let beside_others = following.is_some() || request.second.is_some();
    let second = request.second.as_deref();
    let room = room_of(request.codec, if second.is_some() { HELD_MIB / 2 } else { HELD_MIB });
    let rooms = [Semaphore::new(room), Semaphore::new(room)];
    let identities = [OnceCell::new(), OnceCell::new()];
    let into = |repository, number: usize| Push {
        repository,
        request,
        beside_others,
        identity: &identities[number],
        room: &rooms[number],
    };
    let pushes = Pushes {
        first: into(repository, 0),
        second: second.map(|second| (second, into(second.repository(), 1))),
    };
    let own = both::push(pushes, What::Asked);
    let Some(following) = following else { return own.await };
    let own = std::pin::pin!(own);
    let others = std::pin::pin!(ahead::push_following(pushes, &following));
    match select(own, others).await {
        Either::Left((pushed, others)) => {
            let report = pushed?;
            if tokio::time::timeout(ahead::OTHERS_MAX, others).await.is_err() {
                tracing::info!("the store is slow; segments behind this one wait for their turn");
            }
            Ok(report)
        }
        Either::Right(((), own)) => own.await,
    }
}

/// Returns the room for what is held, in MiB: one segment fits in any case.
fn room_of(codec: Codec, wanted_mib: usize) -> usize {
    let least = UNSEALED_MIB as usize + (codec.working_bytes() >> 20) as usize;
    wanted_mib.max(least)
}

async fn push_in_time(push: Push<'_>) -> Result<Report, Failure> {
    let request = push.request;
    let pushed = tokio::time::timeout(request.deadline, push_file(push)).await;
    pushed.unwrap_or_else(|_| {
        Err(Failure::new(
            Kind::Store,
            format!(
                "`{}` was not stored within {} s",
                request.path.display(),
                request.deadline.as_secs()
            ),
            UNHARMED,
            "PostgreSQL tries again by itself. If this goes on, look at the store's latency, or raise `archive_push_deadline`.",
        ))
    })
}

async fn push_file(push: Push<'_>) -> Result<Report, Failure> {
    let request = push.request;
    let text = request.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = WalFileName::parse(text).map_err(|error| {
        Failure::new(
            Kind::Usage,
            format!("`{}` is not the path of a WAL file", request.path.display()),
            "Nothing was read or stored.",
            "archive_command must be `highwater archive-push %p`.",
        )
        .because(error)
    })?;
    match name {
        WalFileName::Segment(segment) => push_segment(push, segment).await,
        WalFileName::Partial(segment) => push_partial(push, segment).await,
        WalFileName::Backup(..) | WalFileName::History(_) => push_small(push, name).await,
    }
}

/// A file as it was read and sealed.
struct ReadFile {
    object: WalObject,
    sealed: SealedObject,
    plain_bytes: u64,
}

async fn push_segment(push: Push<'_>, segment: SegmentName) -> Result<Report, Failure> {
    let Push { repository, request, .. } = push;
    let identity = identity_of_segment(push).await?;
    let expectation = expectation(request, segment, &identity, Extent::Whole)?;
    let name = WalFileName::Segment(segment);
    // First come, first served, and the segment that was asked for comes first. Never closed.
    let codec_mib = u32::try_from(request.codec.working_bytes() >> 20).unwrap_or(u32::MAX);
    let unsealed_mib = UNSEALED_MIB + codec_mib;
    let mut room = push.room.acquire_many(unsealed_mib).await.ok();
    if identity.segment_size.bytes() > WHOLE_SEGMENT_BYTES_MAX {
        return large::push_segment(push, segment, &identity, expectation).await;
    }
    let read = {
        let (repository, request, identity) =
            (repository.clone(), request.clone(), identity.clone());
        move || read_whole(&request, &repository, segment, &identity, expectation)
    };
    match read_until_whole(push, read).await? {
        Ok(read) => {
            let sealed_mib = read.sealed.header.stored_bytes.div_ceil(1 << 20);
            let free_mib = u64::from(unsealed_mib).saturating_sub(sealed_mib);
            if let Some(room) = &mut room {
                drop(room.split(usize::try_from(free_mib).unwrap_or(0)));
            }
            store(repository, name, read).await
        }
        Err(damage) => settle(repository, request, segment, &identity, damage).await,
    }
}

/// Repeats a reading that found damage, and returns the damage that stays.
async fn read_until_whole<T: Send + 'static>(
    push: Push<'_>,
    read: impl Fn() -> Result<T, ReadError> + Clone + Send + 'static,
) -> Result<Result<T, WalDamage>, Failure> {
    for reading in 1.. {
        let found = if push.beside_others {
            let read = read.clone();
            tokio::task::spawn_blocking(read).await.map_err(|error| of_task(error, UNHARMED))?
        } else {
            // A thread more would cost memory and nothing would gain.
            read()
        };
        match found {
            Ok(value) => return Ok(Ok(value)),
            Err(ReadError::Damage(_)) if reading < READINGS => {
                tokio::time::sleep(REREAD_PAUSE).await;
            }
            Err(ReadError::Damage(damage)) => return Ok(Err(damage)),
            Err(ReadError::Io(error)) => return Err(unreadable(&push.request.path, error)),
        }
    }
    unreachable!("the loop ends by returning")
}

enum ReadError {
    Damage(WalDamage),
    Io(std::io::Error),
}

impl From<std::io::Error> for ReadError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<WalDamage> for ReadError {
    fn from(damage: WalDamage) -> Self {
        Self::Damage(damage)
    }
}

/// Reads a file block by block to its end, but never more than one block past `bytes_max`.
fn each_block(
    path: &Path,
    bytes_max: u64,
    mut take: impl FnMut(&[u8]) -> Result<(), ReadError>,
) -> Result<u64, ReadError> {
    let mut file = File::open(path)?;
    let mut block = vec![0; READ_BYTES];
    let mut total = 0;
    while total <= bytes_max {
        let n = file.read(&mut block)?;
        if n == 0 {
            break;
        }
        total += n as u64;
        take(&block[..n])?;
    }
    Ok(total)
}

/// Hashes a file, but no more than one block past `bytes_max`; returns how much it read.
fn digest_of(path: &Path, bytes_max: u64) -> std::io::Result<(u64, blake3::Hash)> {
    let mut hasher = blake3::Hasher::new();
    let read = each_block(path, bytes_max, |block| {
        hasher.update(block);
        Ok(())
    });
    match read {
        Ok(bytes) => Ok((bytes, hasher.finalize())),
        Err(ReadError::Io(error)) => Err(error),
        Err(ReadError::Damage(damage)) => Err(std::io::Error::other(damage)),
    }
}

/// Walks, hashes and compresses a segment in one pass.
fn read_whole(
    request: &Request,
    repository: &Repository,
    segment: SegmentName,
    identity: &Identity,
    expectation: SegmentExpectation,
) -> Result<ReadFile, ReadError> {
    let size = identity.segment_size.bytes();
    let mut walk = SegmentWalk::new(expectation);
    let mut summary = SummaryBuilder::new(segment.timeline, expectation.start_lsn);
    let mut sealer = WalSealer::new(request.codec, Some(size))?;
    let mut fed: u64 = 0;
    each_block(&request.path, size, |block| {
        fed += block.len() as u64;
        walk.feed_with(block, &mut |mark| summary.add(mark))?;
        // Past the pledged size the walk's own finding is the better message.
        if fed <= size { Ok(sealer.push(block)?) } else { Ok(()) }
    })?;
    let facts = walk.finish()?;
    let object = WalObject::File(WalFileName::Segment(segment));
    let key = repository.wal_key(identity.system_identifier, object);
    let mut header = Header::new(
        ObjectKind::Segment,
        repository.below(&key),
        identity.system_identifier,
        request.codec.packing(),
    );
    header.wal = Some(summary.finish(&facts));
    let sealed = sealer.finish(header)?;
    Ok(ReadFile { object, sealed, plain_bytes: size })
}

async fn push_partial(push: Push<'_>, segment: SegmentName) -> Result<Report, Failure> {
    let Push { repository, request, .. } = push;
    let identity = identity_of_segment(push).await?;
    let expectation = expectation(request, segment, &identity, Extent::Prefix)?;
    let read = {
        let (repository, request) = (repository.clone(), request.clone());
        move || read_partial(&request, &repository, segment, &identity, expectation)
    };
    let read = read_until_whole(push, read).await?;
    let read = read.map_err(|damage| refusal(&request.path, damage))?;
    store(repository, WalFileName::Partial(segment), read).await
}

/// As [`read_whole`], for a file whose records may end anywhere.
fn read_partial(
    request: &Request,
    repository: &Repository,
    segment: SegmentName,
    identity: &Identity,
    expectation: SegmentExpectation,
) -> Result<ReadFile, ReadError> {
    let object = WalObject::File(WalFileName::Partial(segment));
    let key = repository.wal_key(identity.system_identifier, object);
    let mut walk = SegmentWalk::new(expectation);
    let mut summary = SummaryBuilder::new(segment.timeline, expectation.start_lsn);
    let mut sealer = WalSealer::new(request.codec, None)?;
    let plain_bytes = each_block(&request.path, identity.segment_size.bytes(), |block| {
        walk.feed_with(block, &mut |mark| summary.add(mark))?;
        Ok(sealer.push(block)?)
    })?;
    let facts = walk.finish()?;
    let mut header = Header::new(
        ObjectKind::Partial,
        repository.below(&key),
        identity.system_identifier,
        request.codec.packing(),
    );
    header.wal = Some(summary.finish(&facts));
    Ok(ReadFile { object, sealed: sealer.finish(header)?, plain_bytes })
}

async fn push_small(push: Push<'_>, name: WalFileName) -> Result<Report, Failure> {
    let Push { repository, request, .. } = push;
    let mut bytes = Vec::new();
    let read = each_block(&request.path, SMALL_FILE_BYTES_MAX, |block| {
        bytes.extend_from_slice(block);
        Ok(())
    });
    if let Err(ReadError::Io(error)) = read {
        return Err(unreadable(&request.path, error));
    }
    let checked = match name {
        _ if bytes.len() as u64 > SMALL_FILE_BYTES_MAX => Err("it is too long".to_owned()),
        WalFileName::History(timeline) => {
            TimelineHistory::parse(timeline, &bytes).map(drop).map_err(|error| error.to_string())
        }
        _ => BackupHistory::parse(&bytes).map(drop).map_err(|error| error.to_string()),
    };
    if let Err(why) = checked {
        return Err(Failure::new(
            Kind::Integrity,
            format!("`{}` is not what its name says: {why}", request.path.display()),
            UNHARMED,
            "Look at the file; PostgreSQL writes it whole before it is archived. A disk error or an edit by hand are the usual causes.",
        ));
    }
    let identity = identity_of(repository, &data_directory_of(&request.path), UNHARMED)
        .await
        .map_err(|failure| failure.so(not_stored(request)))?;
    let put = repository.put_small(identity.system_identifier, name, &bytes, request.codec).await;
    let (outcome, sealed) = put.map_err(|error| {
        let what = format!("could not store `{name}` in {}", repository.describe());
        of_repo(error, what, UNHARMED)
    })?;
    let Header { stored_bytes, blake3, .. } = sealed.header;
    Ok(Report { name, outcome, plain_bytes: bytes.len() as u64, stored_bytes, blake3 })
}

async fn store(
    repository: &Repository,
    name: WalFileName,
    read: ReadFile,
) -> Result<Report, Failure> {
    let ReadFile { object, sealed, plain_bytes } = read;
    let (outcome, header) = repository.put_complete(object, sealed).await.map_err(|error| {
        let what = format!("could not store `{name}` in {}", repository.describe());
        of_repo(error, what, UNHARMED)
    })?;
    let Header { stored_bytes, blake3, .. } = header;
    Ok(Report { name, outcome, plain_bytes, stored_bytes, blake3 })
}

/// Reads whose segment it is from its first page, and looks whether that cluster lives here.
async fn identity_of_segment(push: Push<'_>) -> Result<Identity, Failure> {
    let Push { repository, request, .. } = push;
    let mut head = Vec::with_capacity(LONG_PAGE_HEADER_BYTES);
    File::open(&request.path)
        .and_then(|file| file.take(LONG_PAGE_HEADER_BYTES as u64).read_to_end(&mut head))
        .map_err(|error| unreadable(&request.path, error))?;
    let page = PageHeader::parse(&head).ok();
    let owner = page.and_then(|page| page.cluster).map(|cluster| cluster.system_id);
    let read = async || match owner {
        Some(owner) => super::claimed_identity(repository, owner, UNHARMED).await,
        // Not a first page, or not even that long. Walk it all the same, as this place's own
        // cluster's, for the exact finding.
        None => identity_of(repository, &data_directory_of(&request.path), UNHARMED).await,
    };
    let known = push.identity.get_or_try_init(&read).await;
    let identity = match known {
        Ok(known) if owner.is_none_or(|owner| owner == known.system_identifier) => {
            Ok(known.clone())
        }
        Ok(_) => read().await,
        Err(failure) => Err(failure),
    };
    identity.map_err(|failure| failure.so(not_stored(request)))
}

fn not_stored(request: &Request) -> String {
    format!("`{}` was not stored", request.path.display())
}

/// `%p` is `pg_wal/<name>`, relative to the data directory.
fn data_directory_of(path: &Path) -> PathBuf {
    match path.parent().and_then(Path::parent) {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn expectation(
    request: &Request,
    segment: SegmentName,
    identity: &Identity,
    extent: Extent,
) -> Result<SegmentExpectation, Failure> {
    let size = identity.segment_size;
    let system_id = Some(identity.system_identifier);
    SegmentExpectation::of(segment, size, system_id, extent).ok_or_else(|| {
        Failure::new(
            Kind::Integrity,
            format!(
                "`{}` cannot be the name of a segment of {size}: its last part is too large",
                request.path.display()
            ),
            UNHARMED,
            "Check that repository and cluster name belong to this server.",
        )
    })
}

fn unreadable(path: &Path, error: std::io::Error) -> Failure {
    let next = if error.kind() == std::io::ErrorKind::NotFound {
        "archive-push runs in the server's data directory and takes PostgreSQL's `%p`; check archive_command."
    } else {
        "Check the disk and that this user may read pg_wal."
    };
    Failure::new(Kind::Disk, format!("could not read `{}`", path.display()), UNHARMED, next)
        .because(error)
}

/// Returns why a damaged WAL file is refused.
fn refusal(path: &Path, damage: WalDamage) -> Failure {
    let file = path.display();
    if damage.is_wrong_identity() {
        let what = format!("`{file}` does not belong to this cluster's place");
        let next = "Check repository and cluster name: each cluster needs a place of its own.";
        return Failure::new(Kind::Conflict, what, UNHARMED, next).because(damage);
    }
    let what = format!("`{file}` is not the complete WAL segment that its name says");
    Failure::new(Kind::Integrity, what, UNHARMED, advice(path)).because(damage)
}

//! Writing a backup: frames gather in packs, packs are created, and
//! `committed.json` makes the backup exist.
//!
//! ```text
//! push_frame -> compress (several at a time) -> pack being filled -> create (two at a time)
//! ```
//!
//! Memory is bounded by `COMPRESSING_MAX` frames and `UPLOADING_MAX + 1` packs, whatever
//! the size of the database: `push_frame` waits when they are in use.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::objects::{Put, SealedObject};
use super::{RepoError, Repository};
use crate::format::{
    BackupId, Begun, Codec, Committed, Document, FileIndex, FrameCompressor, FrameRef, Header,
    IndexAt, IndexedFrame, Kind, PACK_HEADER_BYTES, Piece, encode_header_padded, encode_pack_index,
};
use crate::pg::SystemId;
use crate::store::{Body, Key, StoreError};

/// A pack is closed when its frames reach this size, unless [`BackupWriter::with_packs_of`] says another.
const PACK_BYTES: usize = 8 << 20;

/// Pieces that the index of a pack tells at most, 24 bytes each: 2 GiB of chunks that compress well.
const PACK_PIECES_MAX: usize = 32 << 10;

/// Packs being created at a time.
const UPLOADING_MAX: usize = 2;

/// Permits that all uploads together can hold.
const UPLOAD_PERMITS: u32 = 1 << 16;

/// The packs of one backup that are being created. Outlives the writer: a put that has begun may
/// take effect although nobody waits for it any more, so whoever clears up must.
#[derive(Debug, Clone)]
pub struct Uploads {
    permits: Arc<Semaphore>,
    stored_bytes: Arc<AtomicU64>,
}

impl Uploads {
    fn new() -> Self {
        let permits = Arc::new(Semaphore::new(UPLOAD_PERMITS as usize));
        Self { permits, stored_bytes: Arc::default() }
    }

    /// Returns the bytes of packs that the store has confirmed.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Acquire)
    }

    /// Waits until no put of this backup is under way; `false` if some still are after `limit`.
    /// The writer must be dropped, or new ones may begin.
    pub async fn ended(&self, limit: Duration) -> bool {
        tokio::time::timeout(limit, self.permits.acquire_many(UPLOAD_PERMITS)).await.is_ok()
    }
}

/// The number of a frame, in the order of [`BackupWriter::push_frame`].
pub(super) type Ticket = u64;

/// A frame on its way: what it holds, and its bytes before and after compression.
struct Compressed {
    ticket: Ticket,
    pieces: Vec<Piece>,
    plain: u32,
    frame: std::io::Result<Bytes>,
}

type Compressing = JoinHandle<Compressed>;

/// Compressors that are not at work: what a codec needs is made once and not for each frame.
type Idle = Arc<Mutex<Vec<FrameCompressor>>>;

/// Writes one backup.
#[derive(Debug)]
pub struct BackupWriter {
    repository: Repository,
    id: BackupId,
    system_id: SystemId,
    codec: Codec,
    compressing_max: usize,
    pack_bytes: usize,
    compressing: FuturesOrdered<Compressing>,
    idle: Idle,
    uploading: JoinSet<Result<(), RepoError>>,
    uploads: Uploads,
    frames: Vec<Bytes>,
    frames_bytes: usize,
    /// What the data frames among them hold.
    index: Vec<IndexedFrame>,
    indexed_pieces: usize,
    packs: u32,
    stored_bytes: u64,
    placed: BTreeMap<Ticket, FrameRef>,
}

impl BackupWriter {
    /// Announces the backup by creating `begun.json`, and makes its writer. `jobs` frames are
    /// compressed at a time.
    ///
    /// An id is taken also by what an earlier backup left below it: one whose removal was cut short, or is under way
    /// on another host while this one's clock reads the same second again.
    ///
    /// # Errors
    /// [`StoreError::Exists`] inside if the id is taken: try the next attempt's id.
    pub async fn begin(
        repository: &Repository,
        begun: &Begun,
        system_id: SystemId,
        codec: Codec,
        jobs: usize,
    ) -> Result<Self, RepoError> {
        let key = Key::new(repository.place().begun(&begun.id));
        // The document names host, process and time, so the same bytes there can only be
        // our own create whose answer was lost.
        let put = match repository.put_document(&key, begun).await {
            Ok(put) => put,
            Err(RepoError::Conflict { key, .. }) => return Err(StoreError::Exists { key }.into()),
            Err(error) => return Err(error),
        };
        // After `begun.json` stands: a removal deletes that first and packs last, so it is either over or seen here.
        if repository.holds_remains(&begun.id).await? {
            if put == Put::Stored {
                repository.store().delete(&key).await?;
            }
            return Err(StoreError::Exists { key }.into());
        }
        Ok(Self {
            repository: repository.clone(),
            id: begun.id.clone(),
            system_id,
            codec,
            compressing_max: jobs.max(1),
            pack_bytes: PACK_BYTES,
            compressing: FuturesOrdered::new(),
            idle: Idle::default(),
            uploading: JoinSet::new(),
            uploads: Uploads::new(),
            frames: Vec::new(),
            frames_bytes: 0,
            index: Vec::new(),
            indexed_pieces: 0,
            packs: 0,
            stored_bytes: 0,
            placed: BTreeMap::new(),
        })
    }

    /// Closes packs before they are larger than this, in bytes; the format's limit is 64 MiB. Three are in memory at
    /// a time, and their bytes are copied once on their way to some stores.
    #[must_use]
    pub fn with_packs_of(mut self, pack_bytes: usize) -> Self {
        self.pack_bytes = pack_bytes;
        self
    }

    /// Returns the backup's id.
    pub fn id(&self) -> &BackupId {
        &self.id
    }

    /// Returns the repository it is written to.
    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    /// Returns the packs that are being created, also after this writer is dropped.
    pub fn uploads(&self) -> Uploads {
        self.uploads.clone()
    }

    /// Returns the packs begun so far.
    pub fn packs(&self) -> u32 {
        self.packs
    }

    /// Returns the bytes stored so far, headers of packs included.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Returns the cluster it is of.
    pub(super) fn system_id(&self) -> SystemId {
        self.system_id
    }

    /// Takes a frame's plain bytes, and the pieces of files that it consists of, if it does. Its place is known some
    /// pushes later, or after [`Self::close_packs`].
    pub(super) async fn push_frame(
        &mut self,
        ticket: Ticket,
        plain: Vec<u8>,
        pieces: Vec<Piece>,
    ) -> Result<(), RepoError> {
        while self.compressing.len() >= self.compressing_max {
            self.place_next_frame().await?;
        }
        let (codec, idle) = (self.codec, Arc::clone(&self.idle));
        self.compressing.push_back(tokio::task::spawn_blocking(move || {
            let plain_len = u32::try_from(plain.len()).unwrap_or(u32::MAX);
            Compressed { ticket, pieces, plain: plain_len, frame: compress(codec, &idle, &plain) }
        }));
        Ok(())
    }

    /// Returns the place of a frame once it is known.
    pub(super) fn place_of(&self, ticket: Ticket) -> Option<&FrameRef> {
        self.placed.get(&ticket)
    }

    /// Forgets the places of frames before `ticket`.
    pub(super) fn forget_places_before(&mut self, ticket: Ticket) {
        self.placed = self.placed.split_off(&ticket);
    }

    /// Waits until every frame has its place and every pack is durable in the store.
    pub(super) async fn close_packs(&mut self) -> Result<(), RepoError> {
        while !self.compressing.is_empty() {
            self.place_next_frame().await?;
        }
        self.close_pack().await?;
        while let Some(done) = self.uploading.join_next().await {
            done.map_err(RepoError::task)??;
        }
        Ok(())
    }

    /// Waits until every frame pushed so far has its place.
    pub(super) async fn place_all(&mut self) -> Result<(), RepoError> {
        while !self.compressing.is_empty() {
            self.place_next_frame().await?;
        }
        Ok(())
    }

    async fn place_next_frame(&mut self) -> Result<(), RepoError> {
        let Some(done) = self.compressing.next().await else { return Ok(()) };
        let Compressed { ticket, pieces, plain, frame } = done.map_err(RepoError::task)?;
        let frame = frame.map_err(RepoError::task)?;
        let is_full = self.frames_bytes + frame.len() > self.pack_bytes
            || self.indexed_pieces + pieces.len() > PACK_PIECES_MAX;
        if is_full && !self.frames.is_empty() {
            self.close_pack().await?;
        }
        // Both are far below 4 GiB: a pack is at most 64 MiB.
        let offset = u32::try_from(PACK_HEADER_BYTES + self.frames_bytes).unwrap_or(u32::MAX);
        let stored = u32::try_from(frame.len()).unwrap_or(u32::MAX);
        let place = FrameRef {
            backup: self.id.clone(),
            pack: self.packs,
            offset,
            stored,
            plain,
            codec: self.codec.packing(),
        };
        self.placed.insert(ticket, place);
        if !pieces.is_empty() {
            self.indexed_pieces += pieces.len();
            self.index.push(IndexedFrame { offset, stored, plain, pieces });
        }
        self.frames_bytes += frame.len();
        self.frames.push(frame);
        Ok(())
    }

    async fn close_pack(&mut self) -> Result<(), RepoError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        while self.uploading.len() >= UPLOADING_MAX {
            if let Some(done) = self.uploading.join_next().await {
                done.map_err(RepoError::task)??;
            }
        }
        let key = Key::new(self.repository.place().pack(&self.id, self.packs));
        let name = self.repository.below(&key);
        let mut header = Header::new(Kind::Pack, name, self.system_id, self.codec.packing());
        header.index = self.push_index()?;
        header.stored_bytes = self.frames_bytes as u64;
        let head = encode_header_padded(&header, PACK_HEADER_BYTES)
            .map_err(|error| RepoError::of_document(&key, error))?;
        let mut body = Body::from(head);
        for frame in self.frames.drain(..) {
            body.push(frame);
        }
        self.stored_bytes += body.len();
        self.frames_bytes = 0;
        self.packs += 1;
        let store = self.repository.store().clone();
        let permit = Arc::clone(&self.uploads.permits).acquire_owned().await;
        let permit = permit.map_err(RepoError::task)?;
        let stored_bytes = Arc::clone(&self.uploads.stored_bytes);
        self.uploading.spawn(async move {
            let _permit = permit;
            match store.create(&key, body.clone()).await {
                Ok(()) => {}
                // The id is ours alone since `begun.json`: only our own create whose
                // answer was lost can have made it. Its bytes are compared all the same.
                Err(StoreError::Exists { .. }) => settle_pack(&*store, &key, &body).await?,
                Err(error) => return Err(error.into()),
            }
            stored_bytes.fetch_add(body.len(), Ordering::AcqRel);
            Ok(())
        });
        Ok(())
    }

    /// Puts the index behind the frames of the pack, if there is data among them.
    fn push_index(&mut self) -> Result<Option<IndexAt>, RepoError> {
        let index = std::mem::take(&mut self.index);
        self.indexed_pieces = 0;
        if index.is_empty() {
            return Ok(None);
        }
        let plain = encode_pack_index(&index);
        let frame = self.codec.frame(&plain).map_err(RepoError::task)?;
        let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let at = IndexAt {
            offset: number(PACK_HEADER_BYTES + self.frames_bytes),
            stored: number(frame.len()),
            plain: number(plain.len()),
        };
        self.frames_bytes += frame.len();
        self.frames.push(frame.into());
        Ok(Some(at))
    }

    /// Creates the index of the file list, and then `committed.json`: from here on the
    /// backup exists. Every pack must be closed.
    ///
    /// # Errors
    /// After an error of the store the backup may exist: list backups to know.
    pub async fn commit(self, index: &FileIndex, committed: &Committed) -> Result<(), RepoError> {
        let key = Key::new(self.repository.place().files(&self.id));
        let json = index.to_json().map_err(|error| RepoError::of_document(&key, error))?;
        let object = seal_bytes(
            &json,
            self.codec,
            Header::new(
                Kind::Files,
                self.repository.below(&key),
                self.system_id,
                self.codec.packing(),
            ),
        )?;
        self.repository.put_sealed(&key, &object).await?;
        // `expire` deletes it first of all that a backup has stored which it takes for dead: what was
        // stored may be gone then, and the backup must not come to exist without it. If it is deleted only
        // after this look, `expire` lists everything after that, finds the file list just stored and spares it all.
        let begun = Key::new(self.repository.place().begun(&self.id));
        if self.repository.begun(&self.id).await?.is_none() {
            return Err(StoreError::Absent { key: begun }.into());
        }
        let key = Key::new(self.repository.place().committed(&self.id));
        self.repository.put_document(&key, committed).await?;
        Ok(())
    }
}

impl Drop for BackupWriter {
    /// A put that was only abandoned could take effect unseen, behind whoever clears up; so each
    /// runs to its end and [`Uploads`] tells when.
    fn drop(&mut self) {
        self.uploading.detach_all();
    }
}

impl Repository {
    /// Removes what a backup that failed has stored, or one whose `committed.json` was deleted. Does nothing to a
    /// committed backup. May be repeated. Returns whether its packs are gone.
    ///
    /// `begun.json` goes first, and only then is looked whether another backup leans on this one: a backup that
    /// does has said so in its own `begun.json` before it looked whether this one's still stands. Whichever came
    /// first, one of them sees the other. What is leaned on stays. Packs go last: while one is left, no new backup
    /// takes this id ([`BackupWriter::begin`]), so none of a new one's objects is deleted here.
    ///
    /// # Errors
    /// What could not be removed stays, without a `committed.json`, and is no backup.
    pub async fn forget_unfinished(&self, id: &BackupId) -> Result<bool, RepoError> {
        if self.committed(id).await?.is_some() {
            return Ok(false);
        }
        self.store().delete(&Key::new(self.place().begun(id))).await?;
        if self.is_leaned_on(id).await? {
            return Ok(false);
        }
        self.store().delete(&Key::new(self.place().files(id))).await?;
        let packs = self.store().list_level(&Key::new(self.place().packs_dir(id))).await?;
        for pack in packs.objects {
            self.store().delete(&pack.key).await?;
        }
        Ok(true)
    }

    /// Returns whether there is anything of this backup besides `begun.json`.
    async fn holds_remains(&self, id: &BackupId) -> Result<bool, RepoError> {
        let begun = Key::new(self.place().begun(id));
        let top = self.store().list_level(&Key::new(self.place().backup_dir(id))).await?;
        if top.objects.iter().any(|object| object.key != begun) {
            return Ok(true);
        }
        let packs = self.store().list_level(&Key::new(self.place().packs_dir(id))).await?;
        Ok(!packs.objects.is_empty())
    }

    /// Returns the part of a key below the cluster's place, as headers carry it.
    pub fn below(&self, key: &Key) -> String {
        let place = format!("{}/", self.cluster());
        key.as_str().strip_prefix(&place).unwrap_or(key.as_str()).to_owned()
    }
}

/// Compresses with one that is idle, or one more; there are never more than frames at a time.
fn compress(codec: Codec, idle: &Idle, plain: &[u8]) -> std::io::Result<Bytes> {
    let idle = || idle.lock().unwrap_or_else(PoisonError::into_inner);
    let free = idle().pop();
    let mut compressor = match free {
        Some(compressor) => compressor,
        None => FrameCompressor::new(codec)?,
    };
    let frame = compressor.frame(plain)?;
    idle().push(compressor);
    Ok(frame)
}

/// Seals bytes that are at hand.
pub(super) fn seal_bytes(
    plain: &[u8],
    codec: Codec,
    mut header: Header,
) -> Result<SealedObject, RepoError> {
    let frame = codec.frame(plain).map_err(RepoError::task)?;
    header.plain_bytes = plain.len() as u64;
    header.stored_bytes = frame.len() as u64;
    header.blake3 = Some(blake3::hash(plain).to_hex().to_string());
    Ok(SealedObject { header, body: Body::from(frame) })
}

pub(super) async fn settle_pack(
    store: &dyn crate::store::Store,
    key: &Key,
    ours: &Body,
) -> Result<(), RepoError> {
    let reading = store.read(key, None).await?;
    let stored = super::objects::collect(key, reading.bytes, ours.len()).await?;
    let digest = |pieces: &[Bytes]| {
        let mut hasher = blake3::Hasher::new();
        for piece in pieces {
            hasher.update(piece);
        }
        hasher.finalize()
    };
    if digest(&stored) == digest(ours.pieces()) {
        return Ok(());
    }
    let (stored, ours) = ("another pack".to_owned(), "this backup's".to_owned());
    Err(RepoError::Conflict { key: key.clone(), stored, ours })
}

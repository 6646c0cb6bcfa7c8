//! The store of an encrypted cluster: everything that goes through it is encrypted, and nothing else comes out.
//!
//! Owns: that no object but identities and documents about keys is ever created in plain, or read as if it were one
//! of ours. Everything above works on plain bytes, offsets and lengths and knows nothing of it; of stored
//! objects it sees the lengths before encryption. Never here: which key, or what an object means.
//!
//! A range costs the blocks that it touches, and the head of an object once ([`CIPHERS_MAX`] are remembered).

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::RepoError;
use super::keyring::Keyring;
use crate::format::{
    BLOCK_BYTES, BLOCK_PLAIN_BYTES, BlockCipher, ENCRYPTED_HEAD_BYTES, EncryptedHead,
    EncryptionError, Place, SecretKey, block_offset, blocks_of, decrypted_bytes,
};
use crate::store::{Body, Key, Level, Listed, Reading, Store, StoreError};

/// Packs whose data key is remembered: as many as [`super::FrameFetcher`] remembers to have checked.
const CIPHERS_MAX: usize = 4096;

/// Encrypted bytes on their way to the store at a time, in MiB: beside them the plain ones are held until they are
/// confirmed. Two packs.
const ON_THEIR_WAY_MIB: u32 = 24;

/// Blocks that are encrypted into one stretch of memory: 1 MiB.
const BLOCKS_TOGETHER: u64 = 64;

/// Why the store of an encrypted cluster refused; becomes a [`RepoError`] again on the way up.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// What is stored is not what was encrypted.
    #[error(transparent)]
    Object(#[from] EncryptionError),
    /// The keys could not be had.
    #[error(transparent)]
    Keys(#[from] RepoError),
}

fn refused(key: &Key, refusal: impl Into<Refusal>) -> StoreError {
    match refusal.into() {
        Refusal::Keys(RepoError::Store(error)) => error,
        refusal => StoreError::Refused { key: key.clone(), cause: Box::new(refusal) },
    }
}

/// Returns whether a store's refusal is one of ours: what is stored cannot be decrypted.
pub(super) fn is_refusal_of_ours(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused { cause, .. } if cause.is::<Refusal>())
}

/// The store of one encrypted cluster.
#[derive(Debug)]
pub(super) struct EncryptingStore {
    below: Arc<dyn Store>,
    keyring: Arc<Keyring>,
    /// What decrypts the packs that were read last.
    ciphers: Mutex<HashMap<Key, BlockCipher>>,
    /// Room for encrypted bytes, in MiB. Never closed.
    room: Semaphore,
}

impl EncryptingStore {
    pub(super) fn new(below: Arc<dyn Store>, keyring: Arc<Keyring>) -> Self {
        let room = Semaphore::new(ON_THEIR_WAY_MIB as usize);
        Self { below, keyring, ciphers: Mutex::default(), room }
    }

    fn place(&self) -> &Place {
        self.keyring.place()
    }

    /// Returns its keys.
    pub(super) fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Returns the store into which encrypted bytes go.
    pub(super) fn below(&self) -> &Arc<dyn Store> {
        &self.below
    }

    /// Returns what is stored under `key` in place of a body, which it lets go of piece by piece, and the room that it
    /// takes until it is stored. Of what stays plain the body itself.
    pub(super) async fn encrypted(
        &self,
        key: &Key,
        body: Body,
    ) -> Result<(Body, Option<SemaphorePermit<'_>>), StoreError> {
        let Some(name) = self.place().encrypted_name(key.as_str()) else { return Ok((body, None)) };
        let in_use = self.keyring.in_use().await.map_err(|error| refused(key, error))?;
        let mib = u32::try_from(body.len().div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let room = self.room.acquire_many(mib.clamp(1, ON_THEIR_WAY_MIB)).await.ok();
        let body = encrypted(&in_use.1, name, body).map_err(|error| refused(key, error))?;
        Ok((body, room))
    }

    /// Returns what decrypts the object whose first bytes these are.
    async fn opened(&self, key: &Key, name: &str, head: &[u8]) -> Result<BlockCipher, StoreError> {
        let head = EncryptedHead::parse(head).map_err(|error| refused(key, error))?;
        let repository_key = self.keyring.key(head.repository_key).await;
        let repository_key = repository_key.map_err(|error| refused(key, error))?;
        let cipher = head.open(&repository_key, name).map_err(|error| refused(key, error))?;
        if name.starts_with("backup/") {
            let mut ciphers = self.ciphers.lock().unwrap_or_else(PoisonError::into_inner);
            if ciphers.len() >= CIPHERS_MAX {
                ciphers.clear();
            }
            ciphers.insert(key.clone(), cipher.clone());
        }
        Ok(cipher)
    }

    /// Returns what decrypts an object of which the beginning is not read otherwise.
    async fn cipher_of(&self, key: &Key, name: &str) -> Result<BlockCipher, StoreError> {
        let known = |ciphers: &Mutex<HashMap<Key, BlockCipher>>| {
            ciphers.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
        };
        if let Some(cipher) = known(&self.ciphers) {
            return Ok(cipher);
        }
        let mut head = self.below.read(key, Some(0..ENCRYPTED_HEAD_BYTES as u64)).await?;
        let mut stored = Stored::default();
        stored.gather(&mut head.bytes, ENCRYPTED_HEAD_BYTES).await?;
        self.opened(key, name, &stored.take_up_to(ENCRYPTED_HEAD_BYTES)).await
    }

    async fn read_encrypted(
        &self,
        key: &Key,
        name: &str,
        range: Option<Range<u64>>,
    ) -> Result<Reading, StoreError> {
        let start = range.as_ref().map_or(0, |range| range.start);
        let first = start / BLOCK_PLAIN_BYTES;
        let known = if first > 0 { Some(self.cipher_of(key, name).await?) } else { None };
        let stored_start = if first > 0 { block_offset(first) } else { 0 };
        let stored_range =
            range.as_ref().map(|range| stored_start..block_offset(blocks_of(range.end)));
        let mut reading = self.below.read(key, stored_range).await?;
        let mut stored = Stored::default();
        let cipher = match known {
            Some(cipher) => cipher,
            None => {
                stored.gather(&mut reading.bytes, ENCRYPTED_HEAD_BYTES).await?;
                self.opened(key, name, &stored.take_up_to(ENCRYPTED_HEAD_BYTES)).await?
            }
        };
        let stored_bytes = reading.size_bytes;
        let size_bytes = decrypted_bytes(stored_bytes).map_err(|error| refused(key, error))?;
        let end = range.as_ref().map_or(size_bytes, |range| range.end.min(size_bytes));
        if range.is_some() && start >= end {
            let cause = format!("bytes from {start} on lie outside its {size_bytes} bytes");
            return Err(StoreError::Refused { key: key.clone(), cause: cause.into() });
        }
        let decrypting = Decrypting {
            below: reading.bytes,
            key: key.clone(),
            cipher,
            stored,
            stored_bytes,
            number: first,
            blocks: blocks_of(size_bytes),
            end_number: blocks_of(end),
            skip: usize::try_from(start % BLOCK_PLAIN_BYTES).unwrap_or(usize::MAX),
            left: end - start,
        };
        let bytes = stream::try_unfold(decrypting, Decrypting::next).boxed();
        Ok(Reading { size_bytes, bytes })
    }
}

/// Bytes as they came from the store.
#[derive(Default)]
struct Stored {
    pieces: VecDeque<Bytes>,
    len: usize,
}

impl Stored {
    /// Reads until `wanted` bytes are at hand, or the end.
    async fn gather(
        &mut self,
        below: &mut BoxStream<'static, Result<Bytes, StoreError>>,
        wanted: usize,
    ) -> Result<(), StoreError> {
        while self.len < wanted {
            let Some(piece) = below.try_next().await? else { return Ok(()) };
            self.len += piece.len();
            self.pieces.push_back(piece);
        }
        Ok(())
    }

    /// Takes `wanted` bytes, or what is there.
    fn take_up_to(&mut self, wanted: usize) -> BytesMut {
        let mut taken = BytesMut::with_capacity(wanted.min(self.len));
        while taken.len() < wanted {
            let Some(piece) = self.pieces.front_mut() else { break };
            let n = piece.len().min(wanted - taken.len());
            taken.extend_from_slice(&piece[..n]);
            piece.advance(n);
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
        self.len -= taken.len();
        taken
    }
}

/// An encrypted object that is being read.
struct Decrypting {
    below: BoxStream<'static, Result<Bytes, StoreError>>,
    key: Key,
    cipher: BlockCipher,
    stored: Stored,
    /// The length of the whole object, as stored.
    stored_bytes: u64,
    /// The next block, and how many there are.
    number: u64,
    blocks: u64,
    /// The block behind the last one that is wanted.
    end_number: u64,
    /// Plain bytes at the start of the first block that are not wanted.
    skip: usize,
    /// Plain bytes that are still to be given.
    left: u64,
}

impl Decrypting {
    /// Gives the plain bytes of the next block.
    async fn next(mut self) -> Result<Option<(Bytes, Self)>, StoreError> {
        if self.number >= self.end_number {
            return Ok(None);
        }
        let is_last = self.number + 1 == self.blocks;
        let stored_bytes = self.stored_bytes - block_offset(self.number);
        let wanted = usize::try_from(stored_bytes.min(BLOCK_BYTES)).unwrap_or(usize::MAX);
        self.stored.gather(&mut self.below, wanted).await?;
        let mut block = self.stored.take_up_to(wanted);
        // One that is shorter than the store said does not authenticate either.
        let opened = self.cipher.open_block(self.number, is_last, &mut block);
        let plain = opened.map_err(|error| refused(&self.key, error))?;
        self.number += 1;
        block.truncate(plain);
        let mut plain = block.freeze();
        plain.advance(self.skip.min(plain.len()));
        self.skip = 0;
        plain.truncate(usize::try_from(self.left).unwrap_or(usize::MAX));
        self.left -= plain.len() as u64;
        Ok(Some((plain, self)))
    }
}

/// Encrypts a body under a new data key; lets go of its pieces one by one.
fn encrypted(repository_key: &SecretKey, name: &str, body: Body) -> Result<Body, EncryptionError> {
    let (head, cipher) = BlockCipher::begin(repository_key, &random_key()?, name)?;
    let mut out = Body::from(head.to_vec());
    let blocks = blocks_of(body.len());
    let mut left = body.len();
    let mut pieces = body.into_pieces().into_iter();
    let mut piece = Bytes::new();
    let mut together = Vec::new();
    for number in 0..blocks {
        if number % BLOCKS_TOGETHER == 0 {
            let room = (blocks - number).min(BLOCKS_TOGETHER) * BLOCK_BYTES;
            let room = room.min(left + (blocks - number) * (BLOCK_BYTES - BLOCK_PLAIN_BYTES));
            let room = usize::try_from(room).unwrap_or(0);
            out.push(std::mem::replace(&mut together, Vec::with_capacity(room)).into());
        }
        let start = together.len();
        let plain_bytes = left.min(BLOCK_PLAIN_BYTES);
        left -= plain_bytes;
        while ((together.len() - start) as u64) < plain_bytes {
            if piece.is_empty() {
                piece = pieces.next().unwrap_or_default();
            }
            let wanted = plain_bytes - (together.len() - start) as u64;
            let n = piece.len().min(usize::try_from(wanted).unwrap_or(usize::MAX));
            together.extend_from_slice(&piece[..n]);
            piece.advance(n);
        }
        cipher.seal_block(number, number + 1 == blocks, &mut together, start)?;
    }
    out.push(together.into());
    Ok(out)
}

/// Returns a key that nobody can guess.
pub(super) fn random_key() -> Result<SecretKey, EncryptionError> {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes)?;
    Ok(SecretKey::new(bytes))
}

/// Returns an object as layers above see it.
fn as_seen(place: &Place, mut listed: Listed) -> Listed {
    if place.encrypted_name(listed.key.as_str()).is_some() {
        // Of what is damaged the length says nothing; reading it does.
        listed.size_bytes = decrypted_bytes(listed.size_bytes).unwrap_or(listed.size_bytes);
    }
    listed
}

#[async_trait]
impl Store for EncryptingStore {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let (body, _room) = self.encrypted(key, body).await?;
        self.below.create(key, body).await
    }

    async fn read(&self, key: &Key, range: Option<Range<u64>>) -> Result<Reading, StoreError> {
        match self.place().encrypted_name(key.as_str()) {
            Some(name) => self.read_encrypted(key, name, range).await,
            None => self.below.read(key, range).await,
        }
    }

    fn list(&self, prefix: &Key) -> BoxStream<'static, Result<Listed, StoreError>> {
        let place = self.place().clone();
        self.below.list(prefix).map_ok(move |listed| as_seen(&place, listed)).boxed()
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        let mut level = self.below.list_level(prefix).await?;
        level.objects = level.objects.into_iter().map(|o| as_seen(self.place(), o)).collect();
        Ok(level)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.below.delete(key).await
    }

    async fn discard(&self, key: &Key) -> Result<(), StoreError> {
        self.below.discard(key).await
    }

    async fn settle(&self, prefix: &Key) -> Result<(), StoreError> {
        self.below.settle(prefix).await
    }

    fn describe(&self) -> String {
        self.below.describe()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
pub(in crate::repo) mod tests;

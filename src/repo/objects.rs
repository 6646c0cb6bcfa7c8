//! Putting and getting single objects: the rules that all of them obey.

use std::io::Read;

use bytes::Bytes;
use futures_util::StreamExt;

use super::{RepoError, Repository};
use crate::format::{
    CodecError, Document, EncryptedHead, HEADER_PROBE_BYTES, Header, SealError, encode_header,
    parse_header, read_frames,
};
use crate::store::{Body, Key, StoreError};

/// No object of ours is longer: a pack's 64 MiB, a segment's 16 MiB and room for headers.
const OBJECT_BYTES_MAX: u64 = 80 << 20;

/// No document of ours is longer (a committed document of a cluster with thousands of tablespaces).
pub(super) const DOCUMENT_BYTES_MAX: u64 = 16 << 20;

/// How often a create is tried again when the store says that the name is
/// taken and then that it is not (two creates that met; some stores answer 409).
const SETTLE_ATTEMPTS: u32 = 5;

/// What a put found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// The object was created by this call.
    Stored,
    /// The same content was there already.
    AlreadyThere,
}

/// A header with its body, ready to be stored.
#[derive(Debug, Clone)]
pub struct SealedObject {
    /// The header; its `stored_bytes` is the body's length.
    pub header: Header,
    /// The frames.
    pub body: Body,
}

impl Repository {
    /// Creates a sealed object, or finds the same content already there.
    ///
    /// Durable when it returns. May be repeated: a create whose answer was lost is
    /// settled by reading the stored header back.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if the name holds other content; the stored object is untouched.
    pub async fn put_sealed(&self, key: &Key, object: &SealedObject) -> Result<Put, RepoError> {
        // Pieces are shared, not copied.
        Ok(self.hand_over(key, object.clone()).await?.0)
    }

    /// As [`Self::put_sealed`], letting go of the object's bytes as soon as they are not needed: those of an encrypted
    /// cluster while they are encrypted. Returns the header too.
    ///
    /// # Errors
    /// As [`Self::put_sealed`].
    pub async fn hand_over(
        &self,
        key: &Key,
        object: SealedObject,
    ) -> Result<(Put, Header), RepoError> {
        let SealedObject { header, body: sealed } = object;
        let head = encode_header(&header).map_err(|e| RepoError::of_document(key, e))?;
        let mut body = Body::from(head);
        for piece in sealed.into_pieces() {
            body.push(piece);
        }
        Ok((self.put_encoded(key, &header, body).await?, header))
    }

    /// Creates a sealed object whose header is `header` and whose bytes, header and all, are `body`; see
    /// [`Self::put_sealed`].
    pub(super) async fn put_encoded(
        &self,
        key: &Key,
        header: &Header,
        body: Body,
    ) -> Result<Put, RepoError> {
        self.vet_before_storing(key).await?;
        // Encrypted once, however often it is tried.
        let (store, body, _room) = match &self.encrypting {
            Some(encrypting) => {
                let (body, room) = encrypting.encrypted(key, body).await?;
                (encrypting.below(), body, room)
            }
            None => (&self.store, body, None),
        };
        for _ in 0..SETTLE_ATTEMPTS {
            match store.create(key, body.clone()).await {
                Ok(()) => return Ok(Put::Stored),
                Err(StoreError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            match self.header(key).await {
                Ok(stored) => return same_content(key, &stored, header),
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error),
            }
        }
        let cause = "it says by turns that the name is taken and that it is free".into();
        Err(StoreError::Unavailable { key: key.clone(), cause }.into())
    }

    /// Creates a JSON document, or finds the very same bytes there.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if the name holds other bytes.
    pub(super) async fn put_document<D: Document>(
        &self,
        key: &Key,
        document: &D,
    ) -> Result<Put, RepoError> {
        self.vet_before_storing(key).await?;
        let json = document.to_json().map_err(|e| RepoError::of_document(key, e))?;
        for _ in 0..SETTLE_ATTEMPTS {
            match self.store.create(key, Body::from(json.clone())).await {
                Ok(()) => return Ok(Put::Stored),
                Err(StoreError::Exists { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            match self.read_whole(key, DOCUMENT_BYTES_MAX).await {
                Ok(stored) if stored.concat() == json => return Ok(Put::AlreadyThere),
                Ok(_) => {
                    let (stored, ours) = ("another document".to_owned(), D::WHAT.to_owned());
                    return Err(RepoError::Conflict { key: key.clone(), stored, ours });
                }
                Err(error) if error.is_absent() => {}
                Err(error) => return Err(error),
            }
        }
        let cause = "it says by turns that the name is taken and that it is free".into();
        Err(StoreError::Unavailable { key: key.clone(), cause }.into())
    }

    /// Reads and parses a JSON document.
    pub(super) async fn document<D: Document>(&self, key: &Key) -> Result<D, RepoError> {
        let bytes = self.read_whole(key, DOCUMENT_BYTES_MAX).await?.concat();
        if EncryptedHead::parse(&bytes).is_ok() {
            return Err(RepoError::of_seal(key, SealError::Encrypted));
        }
        D::parse(&bytes).map_err(|e| RepoError::of_document(key, e))
    }

    /// Reads the header of a sealed object: one ranged read.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it does not name its own key.
    pub async fn header(&self, key: &Key) -> Result<Header, RepoError> {
        let reading = self.store.read(key, Some(0..HEADER_PROBE_BYTES)).await?;
        let size_bytes = reading.size_bytes;
        let head = collect(key, reading.bytes, HEADER_PROBE_BYTES).await?.concat();
        let (header, _) =
            parse_header(&head, size_bytes).map_err(|e| RepoError::of_seal(key, e))?;
        self.check_name(key, &header)?;
        Ok(header)
    }

    /// Reads a whole sealed object, checks its header and digest, and gives its plain
    /// bytes to `sink` in order. Bytes may reach the sink before damage behind
    /// them is found: the sink's work counts only once this has returned `Ok`.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] for any mismatch; [`RepoError::Sink`] if the sink failed.
    pub async fn fetch(
        &self,
        key: &Key,
        sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<Header, RepoError> {
        self.fetch_sealed(key).await?.unseal(sink)
    }

    /// Reads a whole sealed object and checks its header; the body is as it was stored.
    pub(super) async fn fetch_sealed(&self, key: &Key) -> Result<Fetched, RepoError> {
        Ok(self.fetch_encoded(key).await?.1)
    }

    /// Does the same, and returns all bytes as they were stored beside it, header and all.
    pub(super) async fn fetch_encoded(&self, key: &Key) -> Result<(Body, Fetched), RepoError> {
        let reading = self.store.read(key, None).await?;
        let size_bytes = reading.size_bytes;
        if size_bytes > OBJECT_BYTES_MAX {
            return Err(RepoError::damaged(key, format_args!("it is {size_bytes} bytes long")));
        }
        let pieces = collect(key, reading.bytes, OBJECT_BYTES_MAX).await?;
        let mut body = Body::default();
        for piece in &pieces {
            body.push(piece.clone());
        }
        let head = prefix(&pieces, HEADER_PROBE_BYTES);
        let (header, body_offset) =
            parse_header(&head, size_bytes).map_err(|e| RepoError::of_seal(key, e))?;
        self.check_name(key, &header)?;
        let fetched =
            Fetched { key: key.clone(), header, body: Pieces::behind(pieces, body_offset) };
        Ok((body, fetched))
    }

    /// Reads all bytes of an object that may be at most `bytes_max` long.
    pub(super) async fn read_whole(
        &self,
        key: &Key,
        bytes_max: u64,
    ) -> Result<Vec<Bytes>, RepoError> {
        let reading = self.store.read(key, None).await?;
        if reading.size_bytes > bytes_max {
            return Err(RepoError::damaged(
                key,
                format_args!("it is {} bytes long", reading.size_bytes),
            ));
        }
        collect(key, reading.bytes, bytes_max).await
    }

    fn check_name(&self, key: &Key, header: &Header) -> Result<(), RepoError> {
        let place = format!("{}/", self.cluster());
        let below = key.as_str().strip_prefix(&place).unwrap_or(key.as_str());
        if header.name == below {
            Ok(())
        } else {
            Err(RepoError::damaged(
                key,
                format_args!("its header says that it is `{}`", header.name),
            ))
        }
    }
}

/// A sealed object that was read: its header is checked, its body not yet.
pub(super) struct Fetched {
    pub(super) key: Key,
    pub(super) header: Header,
    body: Pieces,
}

impl Fetched {
    /// Returns what would be read of an object that is not stored yet.
    pub(super) fn of_ours(key: &Key, object: &SealedObject) -> Self {
        let SealedObject { header, body } = object.clone();
        Self { key: key.clone(), header, body: Pieces::behind(body.into_pieces(), 0) }
    }

    /// Returns the digest of the body as it is stored.
    pub(super) fn body_digest(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.body.current);
        for piece in self.body.pieces.as_slice() {
            hasher.update(piece);
        }
        hasher.finalize()
    }

    /// Returns the body as it is stored; cheap.
    pub(super) fn body(&self) -> Body {
        let mut body = Body::default();
        body.push(self.body.current.clone());
        for piece in self.body.pieces.as_slice() {
            body.push(piece.clone());
        }
        body
    }

    /// Gives the plain bytes to `sink` in order and checks their digest, as [`Repository::fetch`].
    pub(super) fn unseal(
        self,
        mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<Header, RepoError> {
        let Self { key, header, body } = self;
        let mut hasher = blake3::Hasher::new();
        let outcome = read_frames(header.codec, body, header.plain_bytes, |block| {
            hasher.update(block);
            sink(block).map_err(FetchError::Sink)
        });
        match outcome {
            Ok(()) => {}
            Err(FetchError::Codec(error)) => return Err(RepoError::of_codec(&key, &error)),
            Err(FetchError::Sink(cause)) => return Err(RepoError::Sink { key, cause }),
        }
        if header.blake3.as_deref() != Some(hasher.finalize().to_hex().as_str()) {
            return Err(RepoError::damaged(&key, "its BLAKE3 digest is not the one in its header"));
        }
        Ok(header)
    }
}

fn same_content(key: &Key, stored: &Header, ours: &Header) -> Result<Put, RepoError> {
    let same = stored.blake3.is_some()
        && stored.blake3 == ours.blake3
        && stored.plain_bytes == ours.plain_bytes
        && stored.kind == ours.kind
        && stored.system_identifier == ours.system_identifier;
    if same {
        return Ok(Put::AlreadyThere);
    }
    let (stored, ours) = (in_short(stored), in_short(ours));
    Err(RepoError::Conflict { key: key.clone(), stored, ours })
}

/// Returns the beginning of an object's digest, as messages name its content.
pub(super) fn in_short(header: &Header) -> String {
    let hex = header.blake3.as_deref().unwrap_or("no digest");
    format!("BLAKE3 {}", hex.get(..16).unwrap_or(hex))
}

/// Collects a stream, refusing more than `bytes_max`.
pub(super) async fn collect(
    key: &Key,
    mut stream: futures_util::stream::BoxStream<'static, Result<Bytes, StoreError>>,
    bytes_max: u64,
) -> Result<Vec<Bytes>, RepoError> {
    let mut pieces = Vec::new();
    let mut len: u64 = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        len += piece.len() as u64;
        if len > bytes_max {
            return Err(RepoError::damaged(key, "it is longer than the store said"));
        }
        pieces.push(piece);
    }
    Ok(pieces)
}

fn prefix(pieces: &[Bytes], bytes: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for piece in pieces {
        let missing = usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(out.len());
        if missing == 0 {
            break;
        }
        out.extend_from_slice(&piece[..piece.len().min(missing)]);
    }
    out
}

enum FetchError {
    Codec(CodecError),
    Sink(std::io::Error),
}

impl From<CodecError> for FetchError {
    fn from(error: CodecError) -> Self {
        Self::Codec(error)
    }
}

/// Reads pieces one after another without joining them.
pub(super) struct Pieces {
    pieces: std::vec::IntoIter<Bytes>,
    current: Bytes,
}

impl Pieces {
    pub(super) fn behind(pieces: Vec<Bytes>, mut offset: usize) -> Self {
        let mut pieces = pieces.into_iter();
        let mut current = Bytes::new();
        for mut piece in pieces.by_ref() {
            if piece.len() > offset {
                current = piece.split_off(offset);
                break;
            }
            offset -= piece.len();
        }
        Self { pieces, current }
    }
}

impl Read for Pieces {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.next() {
                Some(piece) => self.current = piece,
                None => return Ok(0),
            }
        }
        let n = out.len().min(self.current.len());
        out[..n].copy_from_slice(&self.current.split_to(n));
        Ok(n)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

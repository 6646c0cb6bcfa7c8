//! The encrypted object: a head with a wrapped key, then blocks.
//!
//! Whatever an object holds is encrypted as a whole, its own header included: what surrounds a sealed object or a
//! document says nothing about it but its length.
//!
//! ```text
//! offset  size
//!      0     4  "HWE1"
//!      4     4  u32 LE             CRC-32C of the 80 bytes behind it
//!      8     8                     id of the repository key
//!     16    40                     the object's own data key, wrapped under the repository key (AES-256 key wrap, RFC 3394)
//!     56    32                     seal: HMAC-SHA-256 of the bytes 8 to 56 and the object's name, under the data key
//!     88        blocks             16384 bytes each, the last one shorter, each followed by its tag of 16 bytes
//! ```
//!
//! A block is AES-256-GCM; its nonce is its number, and its number, whether it is the last one, and the object's name are
//! authenticated with it. So no block can be moved, left out or repeated, and no object can be cut or stand under
//! another name. A data key encrypts one object only, so that a number is never used twice with it.
//!
//! Never here: where keys come from, and randomness.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use aws_lc_rs::{error::Unspecified, hmac};
use serde::{Deserialize, Serialize};

use crate::pg::crc32c;

const MAGIC: &[u8; 4] = b"HWE1";
/// What the magic of every version begins with.
const MAGIC_STEM: &[u8; 3] = b"HWE";

/// The bytes before the first block.
pub const ENCRYPTED_HEAD_BYTES: usize = 88;

/// The bytes of a whole block before encryption: the whole of what is read to see a header.
pub const BLOCK_PLAIN_BYTES: u64 = 16 << 10;

/// The bytes of a whole block as stored.
pub const BLOCK_BYTES: u64 = BLOCK_PLAIN_BYTES + TAG_BYTES;

const TAG_BYTES: u64 = 16;
const WRAPPED: std::ops::Range<usize> = 16..16 + WRAPPED_KEY_BYTES;
const SEAL: std::ops::Range<usize> = WRAPPED.end..ENCRYPTED_HEAD_BYTES;

/// The length of a wrapped key.
pub const WRAPPED_KEY_BYTES: usize = 40;

// Each use of a key has a key of its own, made with one of these words.
const FOR_ID: &str = "highwater key id";
const FOR_WRAPPING: &str = "highwater wrapping";
const FOR_SEAL: &str = "highwater object";
const FOR_BLOCKS: &str = "highwater blocks";

/// The identity of a key: no secret, and says nothing about the key's bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId([u8; 8]);

/// The text is not the identity of a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the id of a key; one has 16 hex digits (see `highwater key list`)")]
pub struct KeyIdError(String);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = KeyIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        bytes_of_hex(text).map(Self).ok_or_else(|| KeyIdError(text.to_owned()))
    }
}

impl TryFrom<String> for KeyId {
    type Error = KeyIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> Self {
        id.to_string()
    }
}

/// 256 secret bits: a user key, a repository key or a data key. Shown as its id only.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey([u8; 32]);

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {}", self.id())
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        self.0.fill(0);
        // The compiler must not see that nobody reads it any more.
        std::hint::black_box(&self.0);
    }
}

/// Bytes are not an encrypted object, or not the one that they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncryptionError {
    /// It does not begin as an encrypted object does.
    #[error(
        "it is not encrypted, though everything in this place is, or its first bytes are damaged"
    )]
    NotEncrypted,
    /// It was written by a newer version.
    #[error("it is encrypted in a newer way (`HWE{0}`) than this version knows")]
    Newer(char),
    /// It ends before its last block does.
    #[error("it was cut short: encrypted objects do not end after {0} bytes")]
    Cut(u64),
    /// The head's checksum does not fit.
    #[error("the head of its encryption is damaged (CRC-32C)")]
    HeadDamaged,
    /// The wrapped key or the seal do not fit: it was changed on purpose, or is another object.
    #[error("its seal does not fit: it was tampered with, or is another object under this name")]
    WrongSeal,
    /// A block is not what was encrypted.
    #[error("its block {0} is not what was stored: it was damaged, cut or tampered with")]
    WrongBlock(u64),
    /// The library refused, which no input of ours can cause.
    #[error("encryption failed")]
    Failed,
}

impl From<Unspecified> for EncryptionError {
    fn from(_: Unspecified) -> Self {
        Self::Failed
    }
}

impl SecretKey {
    /// Makes a key of bytes that nobody can guess.
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads a key as key files hold it: 64 hex digits, with white space around them. All zeros are no key.
    pub fn parse(text: &str) -> Option<Self> {
        bytes_of_hex(text.trim()).filter(|bytes| *bytes != [0; 32]).map(Self)
    }

    /// Returns the key as key files hold it, without a line break. A secret.
    pub fn to_hex(&self) -> String {
        hex_of_bytes(&self.0)
    }

    /// Returns its identity, which depends on the key alone.
    pub fn id(&self) -> KeyId {
        let mut id = [0; 8];
        id.copy_from_slice(&self.derive(FOR_ID, &[])[..8]);
        KeyId(id)
    }

    /// Returns 64 hex digits that only who has the key can make: proof that it was at hand for this `purpose` and
    /// these `parts`, of which none holds a byte 0.
    pub fn proof(&self, purpose: &str, parts: &[&str]) -> String {
        let parts: Vec<&[u8]> = parts.iter().flat_map(|part| [part.as_bytes(), &[0]]).collect();
        hex_of_bytes(&self.derive(purpose, &parts))
    }

    /// Returns whether `proof` is what [`Self::proof`] returns.
    pub fn proves(&self, proof: &str, purpose: &str, parts: &[&str]) -> bool {
        let ours = self.proof(purpose, parts);
        verify_slices_are_equal(ours.as_bytes(), proof.as_bytes()).is_ok()
    }

    /// Encrypts another key under this one: AES-256 key wrap (RFC 3394), which needs no nonce.
    ///
    /// # Errors
    /// [`EncryptionError::Failed`].
    pub fn wrap(&self, key: &SecretKey) -> Result<[u8; WRAPPED_KEY_BYTES], EncryptionError> {
        let mut wrapped = [0; WRAPPED_KEY_BYTES];
        self.wrapping_key()?.wrap(&key.0, &mut wrapped)?;
        Ok(wrapped)
    }

    /// Decrypts a key that was wrapped under this one; `None` if it was not, or is damaged.
    pub fn unwrap_key(&self, wrapped: &[u8]) -> Option<SecretKey> {
        let mut key = [0; 32];
        let wrapped: &[u8; WRAPPED_KEY_BYTES] = wrapped.try_into().ok()?;
        let taken = self.wrapping_key().ok()?.unwrap(wrapped, &mut key).ok()?.len();
        (taken == key.len()).then_some(SecretKey(key))
    }

    fn wrapping_key(&self) -> Result<AesKek, EncryptionError> {
        Ok(AesKek::new(&AES_256, &self.derive(FOR_WRAPPING, &[]))?)
    }

    /// HMAC-SHA-256 of the purpose, a byte 0 and the parts.
    fn derive(&self, purpose: &str, parts: &[&[u8]]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &self.0));
        context.update(purpose.as_bytes());
        context.update(&[0]);
        for part in parts {
            context.update(part);
        }
        let mut out = [0; 32];
        out.copy_from_slice(context.sign().as_ref());
        out
    }
}

/// The head of an encrypted object, its seal not yet checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncryptedHead {
    /// The repository key under which its data key is wrapped.
    pub repository_key: KeyId,
    bytes: [u8; ENCRYPTED_HEAD_BYTES],
}

impl EncryptedHead {
    /// Parses the first [`ENCRYPTED_HEAD_BYTES`] of an object.
    ///
    /// # Errors
    /// [`EncryptionError`]; a retry does not help.
    pub fn parse(bytes: &[u8]) -> Result<Self, EncryptionError> {
        let Some(head) = bytes.first_chunk::<ENCRYPTED_HEAD_BYTES>() else {
            let begins_right = !bytes.is_empty() && MAGIC.iter().zip(bytes).all(|(a, b)| a == b);
            let cut = EncryptionError::Cut(bytes.len() as u64);
            return Err(if begins_right { cut } else { EncryptionError::NotEncrypted });
        };
        if &head[..4] != MAGIC {
            let is_newer = head[..3] == *MAGIC_STEM && (b'2'..=b'9').contains(&head[3]);
            let newer = EncryptionError::Newer(char::from(head[3]));
            return Err(if is_newer { newer } else { EncryptionError::NotEncrypted });
        }
        if head[4..8] != crc32c(&head[8..]).to_le_bytes() {
            return Err(EncryptionError::HeadDamaged);
        }
        let mut id = [0; 8];
        id.copy_from_slice(&head[8..WRAPPED.start]);
        Ok(Self { repository_key: KeyId(id), bytes: *head })
    }

    /// Returns what decrypts the blocks of the object `name`.
    ///
    /// # Errors
    /// [`EncryptionError::WrongSeal`] if `repository_key` is not the one, or the object is not `name`.
    pub fn open(
        &self,
        repository_key: &SecretKey,
        name: &str,
    ) -> Result<BlockCipher, EncryptionError> {
        let data_key = repository_key.unwrap_key(&self.bytes[WRAPPED]);
        let data_key = data_key.ok_or(EncryptionError::WrongSeal)?;
        let seal = seal_of(&data_key, &self.bytes, name);
        verify_slices_are_equal(&seal, &self.bytes[SEAL])
            .map_err(|_| EncryptionError::WrongSeal)?;
        BlockCipher::new(&data_key, name)
    }
}

fn seal_of(data_key: &SecretKey, head: &[u8; ENCRYPTED_HEAD_BYTES], name: &str) -> [u8; 32] {
    data_key.derive(FOR_SEAL, &[&head[8..SEAL.start], name.as_bytes()])
}

/// Encrypts and decrypts the blocks of one object.
#[derive(Clone)]
pub struct BlockCipher {
    key: Arc<LessSafeKey>,
    name: Arc<str>,
}

impl fmt::Debug for BlockCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCipher").field("name", &self.name).finish_non_exhaustive()
    }
}

impl BlockCipher {
    /// Begins a new object: returns its head and what encrypts its blocks. `data_key` must be a new random key, used
    /// for nothing else, ever.
    ///
    /// # Errors
    /// [`EncryptionError::Failed`].
    pub fn begin(
        repository_key: &SecretKey,
        data_key: &SecretKey,
        name: &str,
    ) -> Result<([u8; ENCRYPTED_HEAD_BYTES], Self), EncryptionError> {
        let mut head = [0; ENCRYPTED_HEAD_BYTES];
        head[..4].copy_from_slice(MAGIC);
        head[8..WRAPPED.start].copy_from_slice(&repository_key.id().0);
        head[WRAPPED].copy_from_slice(&repository_key.wrap(data_key)?);
        let seal = seal_of(data_key, &head, name);
        head[SEAL].copy_from_slice(&seal);
        let crc = crc32c(&head[8..]);
        head[4..8].copy_from_slice(&crc.to_le_bytes());
        Ok((head, Self::new(data_key, name)?))
    }

    fn new(data_key: &SecretKey, name: &str) -> Result<Self, EncryptionError> {
        let key = UnboundKey::new(&AES_256_GCM, &data_key.derive(FOR_BLOCKS, &[]))?;
        Ok(Self { key: Arc::new(LessSafeKey::new(key)), name: name.into() })
    }

    /// Encrypts the block from `start` to the end of `buffer` in place, and appends its tag.
    ///
    /// # Errors
    /// [`EncryptionError::Failed`].
    pub fn seal_block(
        &self,
        number: u64,
        is_last: bool,
        buffer: &mut Vec<u8>,
        start: usize,
    ) -> Result<(), EncryptionError> {
        let aad = Aad::from(self.aad(number, is_last));
        let block = &mut buffer[start..];
        let tag = self.key.seal_in_place_separate_tag(nonce(number), aad, block)?;
        buffer.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Decrypts a block with its tag in place; returns the length of its plain bytes, at the start of `block`.
    ///
    /// # Errors
    /// [`EncryptionError::WrongBlock`]; nothing in `block` may be used then.
    pub fn open_block(
        &self,
        number: u64,
        is_last: bool,
        block: &mut [u8],
    ) -> Result<usize, EncryptionError> {
        let aad = Aad::from(self.aad(number, is_last));
        let plain = self.key.open_in_place(nonce(number), aad, block);
        plain.map(|plain| plain.len()).map_err(|_| EncryptionError::WrongBlock(number))
    }

    fn aad(&self, number: u64, is_last: bool) -> Vec<u8> {
        let mut aad = Vec::with_capacity(9 + self.name.len());
        aad.extend_from_slice(&number.to_le_bytes());
        aad.push(u8::from(is_last));
        aad.extend_from_slice(self.name.as_bytes());
        aad
    }
}

fn nonce(number: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&number.to_be_bytes());
    Nonce::assume_unique_for_key(nonce)
}

/// Returns how many blocks an object of so many plain bytes has: one at least.
pub fn blocks_of(plain_bytes: u64) -> u64 {
    plain_bytes.div_ceil(BLOCK_PLAIN_BYTES).max(1)
}

/// Returns the offset of a block in an encrypted object.
pub fn block_offset(number: u64) -> u64 {
    (ENCRYPTED_HEAD_BYTES as u64).saturating_add(number.saturating_mul(BLOCK_BYTES))
}

/// Returns the length as stored of an object of so many plain bytes.
pub fn encrypted_bytes(plain_bytes: u64) -> u64 {
    ENCRYPTED_HEAD_BYTES as u64 + plain_bytes + blocks_of(plain_bytes) * TAG_BYTES
}

/// Returns the plain length of an encrypted object of this length.
///
/// # Errors
/// [`EncryptionError::Cut`] for a length that no encrypted object has.
pub fn decrypted_bytes(stored_bytes: u64) -> Result<u64, EncryptionError> {
    let cut = EncryptionError::Cut(stored_bytes);
    let Some(blocks) = stored_bytes.checked_sub(ENCRYPTED_HEAD_BYTES as u64) else {
        return Err(cut);
    };
    let plain_bytes = blocks.saturating_sub(blocks.div_ceil(BLOCK_BYTES) * TAG_BYTES);
    if encrypted_bytes(plain_bytes) == stored_bytes { Ok(plain_bytes) } else { Err(cut) }
}

/// Returns bytes as small hex digits.
pub(super) fn hex_of_bytes(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Parses exactly `N` bytes in hex.
pub(super) fn bytes_of_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&text[at..at + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

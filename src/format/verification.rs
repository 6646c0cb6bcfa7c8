//! What `verify` leaves behind: what it has proven, what it found, and which losses somebody has acknowledged.
//!
//! Proofs of one run stand in sealed objects of kind `proof`, so that the next run need not read again what cannot
//! have changed. Little endian:
//!
//! ```text
//! "HWV1"                                    4
//! u32 number of proofs, then each:
//!     u64 object                            the first 64 bits of the BLAKE3 of its key
//!     u64 look                              the upper 48 bits: of the BLAKE3 of its size and of when it was stored;
//!                                           the lower 16: day and depth
//!     u64 content                           of the BLAKE3 of its body as stored; 0 where only its header was read
//! ```
//!
//! A proof is never needed: without it, things are only proven once more.

use serde::{Deserialize, Serialize};

use super::{BackupId, Document};
use crate::pg::PgTimestamp;

const MAGIC: &[u8; 4] = b"HWV1";
const PROOF_BYTES: usize = 24;

/// The bits of a proof's look that belong to day and depth.
const DAY_BITS: u64 = 0xFFFF;

/// The most proofs in one object.
pub const PROOFS_MAX: usize = 64 << 10;

/// The most findings that one report names; the others are counted.
pub const FINDINGS_NAMED_MAX: usize = 1000;

/// The longest reason of an acknowledgement, in bytes.
pub const REASON_BYTES_MAX: usize = 1024;

/// How much of an object was proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// It is there, with the size and the header that it should have.
    Header,
    /// Every byte of it was read and has its digest.
    Whole,
}

/// That one object, or the content of one backup, was proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Proof {
    /// Which: see [`Proof::object_of`].
    pub object: u64,
    look_and_day: u64,
    /// The digest of its body as stored, cut to 64 bits; 0 where it is not known.
    pub content: u64,
}

/// Returns the first 64 bits of the digest of what `write` gives to it.
fn short(write: impl FnOnce(&mut blake3::Hasher)) -> u64 {
    let mut hasher = blake3::Hasher::new();
    write(&mut hasher);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(bytes)
}

impl Proof {
    /// Makes a proof of today. `day` counts from 1970; 15 bits of it are kept, which lasts until 2059.
    pub fn new(object: u64, look: u64, content: u64, day: u16, depth: Depth) -> Self {
        let day = u64::from(day.min(0x7FFF)) << 1 | u64::from(depth == Depth::Whole);
        Self { object, look_and_day: look & !DAY_BITS | day, content }
    }

    /// Returns how an object is called in proofs.
    pub fn object_of(key: &str) -> u64 {
        short(|hasher| {
            hasher.update(key.as_bytes());
        })
    }

    /// Returns the look of an object: it changes whenever the store shows another size or time of storing.
    pub fn look_of(size_bytes: u64, modified_nanos: u128) -> u64 {
        short(|hasher| {
            hasher.update(&size_bytes.to_le_bytes());
            hasher.update(&modified_nanos.to_le_bytes());
        }) & !DAY_BITS
    }

    /// Returns the look of something that consists of several objects, in order.
    pub fn look_of_all(looks: impl Iterator<Item = u64>) -> u64 {
        short(|hasher| {
            for look in looks {
                hasher.update(&look.to_le_bytes());
            }
        }) & !DAY_BITS
    }

    /// Returns the form in which a digest of stored bytes is remembered; never 0.
    pub fn content_of(digest: &blake3::Hash) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest.as_bytes()[..8]);
        u64::from_le_bytes(bytes).max(1)
    }

    /// Returns the look.
    pub fn look(&self) -> u64 {
        self.look_and_day & !DAY_BITS
    }

    /// Returns the day on which it was proven, since 1970.
    pub fn day(&self) -> u16 {
        // 15 bits.
        u16::try_from((self.look_and_day & DAY_BITS) >> 1).unwrap_or(u16::MAX)
    }

    /// Returns how much was proven.
    pub fn depth(&self) -> Depth {
        if self.look_and_day & 1 == 1 { Depth::Whole } else { Depth::Header }
    }
}

/// The bytes are not those of proofs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it does not hold proofs")]
pub struct ProofsError;

/// Returns the bytes of these proofs, at most [`PROOFS_MAX`].
pub fn encode_proofs(proofs: &[Proof]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + proofs.len() * PROOF_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&u32::try_from(proofs.len()).unwrap_or(u32::MAX).to_le_bytes());
    for proof in proofs {
        for number in [proof.object, proof.look_and_day, proof.content] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    out
}

/// Parses proofs.
///
/// # Errors
/// [`ProofsError`]; a retry does not help. Nothing is allocated beyond the size of `bytes`.
pub fn decode_proofs(bytes: &[u8]) -> Result<Vec<Proof>, ProofsError> {
    let (magic, rest) = bytes.split_at_checked(4).ok_or(ProofsError)?;
    let (count, rest) = rest.split_first_chunk::<4>().ok_or(ProofsError)?;
    let count = u32::from_le_bytes(*count) as usize;
    let (proofs, behind) = rest.as_chunks::<PROOF_BYTES>();
    if magic != MAGIC || proofs.len() != count || !behind.is_empty() {
        return Err(ProofsError);
    }
    let number = |proof: &[u8; PROOF_BYTES], at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&proof[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let proof = |proof: &[u8; PROOF_BYTES]| Proof {
        object: number(proof, 0),
        look_and_day: number(proof, 8),
        content: number(proof, 16),
    };
    Ok(proofs.iter().map(proof).collect())
}

/// One finding, as a report of `verify` keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFinding {
    /// What it is called: 12 hex digits, always the same for the same loss.
    pub id: String,
    /// What is wrong, in one sentence.
    pub what: String,
    /// What is lost by it.
    pub consequence: String,
}

/// `verify/<second>/report.json`: what one run of `verify` came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// The format version.
    pub format: u32,
    /// The run: the second in which it began.
    pub id: BackupId,
    /// When it began, by the clock of its host.
    pub started_at: PgTimestamp,
    /// When it ended, by the same clock.
    pub finished_at: PgTimestamp,
    /// The host that did it.
    pub host: String,
    /// Whether every digest was looked at.
    pub deep: bool,
    /// Objects that were proven in this run.
    pub checked: u64,
    /// Objects that had been proven before and could not have changed.
    pub skipped: u64,
    /// Bytes that were read and digested, as stored.
    pub read_bytes: u64,
    /// How long that took, where nothing held it back on purpose.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_millis: Option<u64>,
    /// What is wrong, at most [`FINDINGS_NAMED_MAX`] of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<StoredFinding>,
    /// How much more is.
    #[serde(default)]
    pub findings_unnamed: u64,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Verification {
    const WHAT: &'static str = "report of verify";

    fn format(&self) -> u32 {
        self.format
    }
}

/// `acknowledged/<finding>.json`: somebody knows of this loss.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acknowledgement {
    /// The format version.
    pub format: u32,
    /// The finding.
    pub finding: String,
    /// What was wrong.
    pub what: String,
    /// What was lost by it.
    pub consequence: String,
    /// When it was acknowledged, by the clock of the host that did it.
    pub acknowledged_at: PgTimestamp,
    /// Why, in the words of who did it.
    pub reason: String,
    /// The host on which it was acknowledged.
    pub host: String,
    /// The version of Highwater.
    pub tool: String,
}

impl Document for Acknowledgement {
    const WHAT: &'static str = "acknowledgement";

    fn format(&self) -> u32 {
        self.format
    }
}

/// Returns whether this may be the id of a finding: 12 hex digits, small letters.
pub fn is_finding_id(text: &str) -> bool {
    let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == 12 && text.bytes().all(is_digit)
}

/// Returns the id of the finding that these words describe.
pub fn finding_id(kind: &str, subject: &str) -> String {
    let bits = short(|hasher| {
        hasher.update(kind.as_bytes());
        hasher.update(b" ");
        hasher.update(subject.as_bytes());
    });
    format!("{:012x}", bits >> 16)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_proof_keeps_day_and_depth_beside_the_look() {
        let object = Proof::object_of("main/wal/1/2");
        let look = Proof::look_of(5, 7);
        for depth in [Depth::Header, Depth::Whole] {
            let proof = Proof::new(object, look, 9, 20_000, depth);
            assert_eq!((proof.day(), proof.depth(), proof.look()), (20_000, depth, look));
        }
        assert_ne!(look, Proof::look_of(6, 7));
        assert_ne!(look, Proof::look_of(5, 8));
        assert_eq!(Proof::new(object, look, 0, u16::MAX, Depth::Whole).day(), 0x7FFF);
    }

    #[test]
    fn ids_of_findings_tell_kinds_and_subjects_apart_and_are_names() {
        let id = finding_id("pack", "a");
        assert!(is_finding_id(&id), "{id}");
        assert_ne!(id, finding_id("pack", "b"));
        assert_ne!(id, finding_id("gap", "a"));
        assert_eq!(id, finding_id("pack", "a"));
        for bad in ["", "0123456789a", "0123456789ab0", "0123456789aB", "../456789abcd"] {
            assert!(!is_finding_id(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn proofs_come_back(numbers: Vec<(u64, u64, u64, u16, bool)>) {
            let proofs: Vec<Proof> = numbers
                .into_iter()
                .map(|(object, look, content, day, whole)| {
                    let depth = if whole { Depth::Whole } else { Depth::Header };
                    Proof::new(object, look, content, day, depth)
                })
                .collect();
            prop_assert_eq!(decode_proofs(&encode_proofs(&proofs)).unwrap(), proofs);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = decode_proofs(&bytes);
        }

        #[test]
        fn cut_proofs_are_refused(count in 1usize..5, cut in 1usize..24) {
            let bytes = encode_proofs(&vec![Proof::new(1, 2, 3, 4, Depth::Whole); count]);
            prop_assert!(decode_proofs(&bytes[..bytes.len() - cut]).is_err());
        }
    }
}

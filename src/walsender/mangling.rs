//! What a broken network, a broken server or an enemy makes of a stream that was valid: equipment for tests.
//!
//! ```text
//! valid      | d 12 ........ | S 30 .................... | d 40 ...
//! mangled    | d 12 ........ | S 30 ......~....             a bit, a length, a cut, bytes twice or elsewhere
//!            ^ as it was sent             ^ from here on anything may come
//! ```

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Lengths that a message may claim and that never came.
const CLAIMS: [u32; 10] =
    [u32::MAX, i32::MAX as u32, 1 << 31, 64 << 20, 63 << 20, (1 << 20) + 64, 1 << 20, 65_535, 3, 0];

/// Returns how many cases a test of untrusted bytes looks at: `make soak` asks for a thousand a round.
pub(super) fn cases(usual: u32) -> ProptestConfig {
    let set = std::env::var("HIGHWATER_SOAK_ROUNDS").ok();
    let rounds = set.map(|rounds| rounds.parse::<u32>().unwrap());
    ProptestConfig::with_cases(rounds.map_or(usual, |rounds| rounds.saturating_mul(1000)))
}

/// One thing that happens to a stream.
#[derive(Debug, Clone)]
pub(super) enum Mangling {
    /// A bit is another.
    Flip(Index, u8),
    /// It ends early.
    Cut(Index),
    /// Some bytes are lost.
    Lose(Index, usize),
    /// Some bytes come twice.
    Repeat(Index, usize),
    /// Some bytes come once more elsewhere.
    Splice(Index, usize, Index),
    /// A message claims another length.
    Claim(Index, u32),
    /// Four bytes anywhere, perhaps a length or a count within a message, are a large number.
    Number(Index, u32),
}

/// Some manglings, at least one.
pub(super) fn manglings() -> impl Strategy<Value = Vec<Mangling>> {
    let at = any::<Index>;
    let claim = || prop_oneof![select(&CLAIMS[..]), any::<u32>()];
    let one = prop_oneof![
        3 => (at(), 0u8..8).prop_map(|(at, bit)| Mangling::Flip(at, bit)),
        1 => at().prop_map(Mangling::Cut),
        1 => (at(), 1usize..60).prop_map(|(at, count)| Mangling::Lose(at, count)),
        1 => (at(), 1usize..60).prop_map(|(at, count)| Mangling::Repeat(at, count)),
        1 => (at(), 1usize..60, at()).prop_map(|(at, count, to)| Mangling::Splice(at, count, to)),
        3 => (at(), claim()).prop_map(|(at, claim)| Mangling::Claim(at, claim)),
        1 => (at(), claim()).prop_map(|(at, number)| Mangling::Number(at, number)),
    ];
    prop::collection::vec(one, 1..4)
}

/// Mangles a stream; returns it, and how many of its first bytes are as they were.
pub(super) fn mangled(mut bytes: Vec<u8>, manglings: &[Mangling]) -> (Vec<u8>, usize) {
    let mut intact = bytes.len();
    for mangling in manglings {
        if !bytes.is_empty() {
            intact = intact.min(mangle(&mut bytes, mangling));
        }
    }
    (bytes, intact)
}

/// Returns where the first byte was changed.
fn mangle(bytes: &mut Vec<u8>, mangling: &Mangling) -> usize {
    let length = bytes.len();
    let stretch = |at: &Index, count: usize| {
        let start = at.index(length);
        start..(start + count).min(length)
    };
    match mangling {
        Mangling::Flip(at, bit) => {
            let at = at.index(length);
            bytes[at] ^= 1 << bit;
            at
        }
        Mangling::Cut(at) => {
            bytes.truncate(at.index(length));
            bytes.len()
        }
        Mangling::Lose(at, count) => {
            bytes.drain(stretch(at, *count)).fold(at.index(length), |at, _| at)
        }
        Mangling::Repeat(at, count) => {
            let stretch = stretch(at, *count);
            let (end, again) = (stretch.end, bytes[stretch].to_vec());
            bytes.splice(end..end, again);
            end
        }
        Mangling::Splice(at, count, to) => {
            let (to, again) = (to.index(length), bytes[stretch(at, *count)].to_vec());
            bytes.splice(to..to, again);
            to
        }
        Mangling::Claim(at, claim) => {
            let heads = heads(bytes);
            heads.get(at.index(heads.len().max(1))).map_or(length, |head| {
                bytes[head + 1..head + 5].copy_from_slice(&claim.to_be_bytes());
                head + 1
            })
        }
        Mangling::Number(at, number) => {
            let stretch = stretch(at, 4);
            let start = stretch.start;
            bytes[stretch.clone()].copy_from_slice(&number.to_be_bytes()[..stretch.len()]);
            start
        }
    }
}

/// Where messages begin, as far as the stream can be followed.
fn heads(bytes: &[u8]) -> Vec<usize> {
    let (mut heads, mut at) = (Vec::new(), 0);
    while let Some(head) = bytes.get(at..at + 5) {
        heads.push(at);
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        at = at.saturating_add(1 + length.max(4) as usize);
    }
    heads
}

//! CRC-32C, PostgreSQL's checksum of WAL records, `pg_control` and manifests.
//!
//! Castagnoli polynomial, not the CRC-32 of gzip. Source: `src/include/port/pg_crc32c.h`.

use crc_fast::{CrcAlgorithm, Digest};

/// A CRC-32C in the making.
#[derive(Debug, Clone)]
pub struct Crc32c(Digest);

impl Crc32c {
    /// Starts over no bytes.
    pub fn new() -> Self {
        Self(Digest::new(CrcAlgorithm::Crc32Iscsi))
    }

    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Goes back to the state of [`Self::new`], cheaper than making another.
    pub fn reset(&mut self) {
        self.0.reset();
    }

    /// Returns the checksum of all bytes taken in so far.
    pub fn value(&self) -> u32 {
        // The digest of a 32-bit CRC fits 32 bits by definition.
        #[allow(clippy::cast_possible_truncation)]
        let value = self.0.finalize() as u32;
        value
    }
}

impl Default for Crc32c {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns the CRC-32C of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The polynomial, its highest power last.
const POLYNOMIAL: u32 = 0x82F6_3B78;

/// The powers x^(2^n) modulo the polynomial: enough for the bits of any length in bytes.
const POWERS: [u32; 67] = powers();

/// Returns the CRC-32C of two stretches, one behind the other, given that of each; `second_bytes`
/// is the length of the second.
///
/// Bytes that follow multiply what came before by x^8 each, and the rest is a sum (exclusive or) modulo
/// the polynomial: the final complement of the first cancels out against the second's beginning.
pub fn crc32c_joined(first: u32, second: u32, second_bytes: u64) -> u32 {
    let mut moved = first;
    let mut bytes = second_bytes;
    // Of x^(8 * bytes), the lowest power is x^8.
    for power in &POWERS[3..] {
        if bytes == 0 || moved == 0 {
            break;
        }
        if bytes & 1 == 1 {
            moved = product(moved, *power);
        }
        bytes >>= 1;
    }
    moved ^ second
}

/// Multiplies two polynomials modulo [`POLYNOMIAL`], the highest bit standing for x^0.
const fn product(one: u32, other: u32) -> u32 {
    let (mut sum, mut shifted, mut bit) = (0, other, 1u32 << 31);
    while bit != 0 {
        if one & bit != 0 {
            sum ^= shifted;
        }
        shifted = if shifted & 1 == 1 { shifted >> 1 ^ POLYNOMIAL } else { shifted >> 1 };
        bit >>= 1;
    }
    sum
}

const fn powers() -> [u32; 67] {
    let mut powers = [1 << 30; 67];
    let mut n = 1;
    while n < powers.len() {
        powers[n] = product(powers[n - 1], powers[n - 1]);
        n += 1;
    }
    powers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_polynomial_is_castagnolis() {
        // The check value of RFC 3720, and what pg_basebackup's manifest said of the file "17\n".
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        assert_eq!(crc32c(b"17\n"), 0x0502_4464);
        let mut parts = Crc32c::new();
        parts.update(b"12345");
        parts.update(b"");
        parts.update(b"6789");
        assert_eq!(parts.value(), 0xE306_9283);
        parts.reset();
        assert_eq!(parts.value(), crc32c(b""));
        assert_eq!(crc32c_joined(crc32c(b"12345"), crc32c(b"6789"), 4), 0xE306_9283);
        assert_eq!(crc32c_joined(crc32c(b"123456789"), crc32c(b""), 0), 0xE306_9283);
        assert_eq!(crc32c_joined(crc32c(b""), crc32c(b"123456789"), 9), 0xE306_9283);
    }

    proptest::proptest! {
        #[test]
        fn joined_checksums_are_those_of_the_joined_bytes(
            first in proptest::collection::vec(proptest::num::u8::ANY, 0..100),
            second in proptest::collection::vec(proptest::num::u8::ANY, 0..70_000),
        ) {
            let joined = crc32c_joined(crc32c(&first), crc32c(&second), second.len() as u64);
            proptest::prop_assert_eq!(joined, crc32c(&[first, second].concat()));
        }
    }
}

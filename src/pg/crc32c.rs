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

/// Returns the CRC-32C of two stretches, one behind the other, given that of each; `second_bytes`
/// is the length of the second.
pub fn crc32c_joined(first: u32, second: u32, second_bytes: u64) -> u32 {
    let joined = crc_fast::checksum_combine(
        CrcAlgorithm::Crc32Iscsi,
        u64::from(first),
        u64::from(second),
        second_bytes,
    );
    // The digest of a 32-bit CRC fits 32 bits by definition.
    #[allow(clippy::cast_possible_truncation)]
    let joined = joined as u32;
    joined
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
}

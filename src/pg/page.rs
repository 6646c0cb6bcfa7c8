//! Data pages of relation files: the header's facts and the checksum.
//!
//! ```text
//!  0 u32 high, u32 low  pd_lsn          12 u16 pd_lower    18 u16 pd_pagesize_version
//!  8 u16                pd_checksum     14 u16 pd_upper    20 u32 pd_prune_xid
//! 10 u16                pd_flags        16 u16 pd_special
//! ```
//!
//! A page with `pd_upper` 0 was never used and is all zeros. Sources:
//! `src/include/storage/bufpage.h`, `checksum_impl.h`, `src/backend/storage/page/bufpage.c`
//! (`PageIsVerified`).

use super::Lsn;
use super::bytes::{u16_at, u32_at};

/// Bytes that the checksum takes at a time: 32 lanes of 4 bytes. Each page size is a multiple.
const ROW_BYTES: usize = 128;

const LANES: usize = 32;

/// `FNV_PRIME`.
const PRIME: u32 = 16_777_619;

/// `checksumBaseOffsets`.
const BASE: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// What a page says of itself in a cluster with data checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zeros: never used.
    New,
    /// Its checksum fits.
    Sound,
    /// Its checksum does not fit, or it claims to be new and is not empty. Read while the server
    /// was writing it, a sound page looks so too.
    Broken {
        /// The position its header names, as far as that can be believed.
        lsn: Lsn,
    },
}

/// Returns the state of a page, which is block `block` of its fork, counted through all of the
/// fork's files. The page's length is a multiple of 128 bytes and at least as much.
pub fn page_state(page: &[u8], block: u32) -> PageState {
    if u16_at(page, 14) == Some(0) && page.iter().all(|byte| *byte == 0) {
        return PageState::New;
    }
    let claims_to_be_new = u16_at(page, 14) == Some(0);
    if !claims_to_be_new && u16_at(page, 8) == Some(page_checksum(page, block)) {
        return PageState::Sound;
    }
    PageState::Broken { lsn: page_lsn(page) }
}

/// Returns the position of the last WAL record that changed the page.
pub fn page_lsn(page: &[u8]) -> Lsn {
    let half = |offset| u64::from(u32_at(page, offset).unwrap_or_default());
    Lsn(half(0) << 32 | half(4))
}

/// Returns the checksum that the page should carry; never 0. The one it carries is left out of it.
pub fn page_checksum(page: &[u8], block: u32) -> u16 {
    let (rows, _) = page.as_chunks::<ROW_BYTES>();
    let Some((first, rows)) = rows.split_first() else { return 1 };
    let mut first = *first;
    first[8] = 0;
    first[9] = 0;
    let mut sums = BASE;
    take_row(&mut sums, &first);
    for row in rows {
        take_row(&mut sums, row);
    }
    // Two rounds of zeros mix in what the last row brought.
    take_row(&mut sums, &[0; ROW_BYTES]);
    take_row(&mut sums, &[0; ROW_BYTES]);
    let mixed = sums.iter().fold(0, |all, sum| all ^ sum) ^ block;
    // The remainder is below 65535.
    u16::try_from(mixed % 65_535).unwrap_or_default() + 1
}

/// Takes one row into all lanes. The lanes do not depend on each other, so that the compiler
/// makes this a few vector instructions.
#[inline]
fn take_row(sums: &mut [u32; LANES], row: &[u8; ROW_BYTES]) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_le_bytes(*word);
        *sum = mixed.wrapping_mul(PRIME) ^ (mixed >> 17);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The first two pages of `pg_class` of a fresh cluster, PostgreSQL 18, checksums on.
    const REAL: &[u8] = include_bytes!("../../tests/fixtures/pg/pages.18");

    #[test]
    fn real_pages_are_sound_at_their_own_place_only() {
        for (block, page) in (0..).zip(REAL.chunks(8192)) {
            assert_eq!(page_state(page, block), PageState::Sound);
            let elsewhere = page_state(page, block + 1);
            assert_eq!(elsewhere, PageState::Broken { lsn: page_lsn(page) });
        }
        assert!(page_lsn(REAL) > Lsn(0x0100_0000) && page_lsn(REAL) < Lsn(0x1_0000_0000));
    }

    #[test]
    fn an_empty_page_is_new_and_a_filled_one_without_header_is_not() {
        let mut page = vec![0; 8192];
        assert_eq!(page_state(&page, 7), PageState::New);
        page[8191] = 1;
        assert!(matches!(page_state(&page, 7), PageState::Broken { .. }));
        let sum = page_checksum(&page, 7).to_le_bytes();
        page[8..10].copy_from_slice(&sum);
        assert!(matches!(page_state(&page, 7), PageState::Broken { .. }), "as the server sees it");
    }

    proptest! {
        #[test]
        fn every_flipped_bit_is_seen(bit in 0usize..8192 * 8) {
            let mut page = REAL[..8192].to_vec();
            page[bit / 8] ^= 1 << (bit % 8);
            let broken = matches!(page_state(&page, 0), PageState::Broken { .. });
            prop_assert!(broken);
        }

        #[test]
        fn no_bytes_panic(page: Vec<u8>, block: u32) {
            let _ = page_state(&page, block);
        }
    }
}

//! Vectors from outside, and everything that a hostile bucket may try with blocks.

use proptest::prelude::*;

use super::*;

const NAME: &str = "wal/7/00000002.history";

fn key(first: u8) -> SecretKey {
    let mut bytes = [first; 32];
    for (byte, n) in bytes.iter_mut().zip(0..) {
        *byte = byte.wrapping_add(n);
    }
    SecretKey::new(bytes)
}

fn encrypt(repository_key: &SecretKey, data_key: &SecretKey, name: &str, plain: &[u8]) -> Vec<u8> {
    let (head, cipher) = BlockCipher::begin(repository_key, data_key, name).unwrap();
    let mut out = head.to_vec();
    let blocks = blocks_of(plain.len() as u64);
    let mut chunks = plain.chunks(16 << 10);
    for number in 0..blocks {
        let start = out.len();
        out.extend_from_slice(chunks.next().unwrap_or_default());
        cipher.seal_block(number, number + 1 == blocks, &mut out, start).unwrap();
    }
    out
}

fn decrypt(
    repository_key: &SecretKey,
    name: &str,
    object: &[u8],
) -> Result<Vec<u8>, EncryptionError> {
    let head = EncryptedHead::parse(object)?;
    let cipher = head.open(repository_key, name)?;
    let plain_bytes = decrypted_bytes(object.len() as u64)?;
    let blocks = blocks_of(plain_bytes);
    let mut out = Vec::new();
    for (number, block) in (0..).zip(object[ENCRYPTED_HEAD_BYTES..].chunks(16400)) {
        let mut block = block.to_vec();
        let plain = cipher.open_block(number, number + 1 == blocks, &mut block)?;
        out.extend_from_slice(&block[..plain]);
    }
    Ok(out)
}

/// What Python's `cryptography` (OpenSSL) makes of the same keys, name and bytes, written after the format page:
/// `aes_key_wrap`, `AESGCM`, and the standard library's `hmac`.
#[test]
fn an_object_is_byte_for_byte_what_openssl_makes_of_it() {
    let plain: Vec<u8> =
        (0u64..40_000).map(|i| u8::try_from((i * i / 7 + i) % 251).unwrap()).collect();
    let object = encrypt(&key(0), &key(100), NAME, &plain);
    assert_eq!(key(0).id().to_string(), "b0e3425a775b3282");
    assert_eq!(
        hex_of_bytes(&object[..ENCRYPTED_HEAD_BYTES]),
        "48574531c7090659b0e3425a775b3282b63302a6a885d52c0ee9da2ddf005dc213331281f1c18dea779bdaf89a847be6\
         005a76eee03ac3c25155f9db605b4a452144882d1524480a78dee94e5bab6a738ba0a35d51ea3ea8"
    );
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &object);
    assert_eq!(
        hex_of_bytes(digest.as_ref()),
        "1e07180aff793caccdb274c8658c1b30a7b1f92976139528eb1e60b21b6df3d5"
    );
    let empty = encrypt(&key(0), &key(100), NAME, b"");
    assert_eq!(hex_of_bytes(&empty[ENCRYPTED_HEAD_BYTES..]), "b0edccfba180a5fc0eab3f2f78f123b5");
    assert_eq!(decrypt(&key(0), NAME, &object).unwrap(), plain);
}

/// RFC 3394, section 4.6: 256 bits of key data with a 256-bit key.
#[test]
fn keys_are_wrapped_as_rfc_3394_says() {
    let kek =
        bytes_of_hex::<32>("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F");
    let data =
        bytes_of_hex::<32>("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F");
    let mut wrapped = [0; WRAPPED_KEY_BYTES];
    let kek = AesKek::new(&AES_256, &kek.unwrap()).unwrap();
    kek.wrap(&data.unwrap(), &mut wrapped).unwrap();
    assert_eq!(
        hex_of_bytes(&wrapped),
        "28c9f404c4b810f4cbccb35cfb87f8263f5786e2d80ed326cbc7f0e71a99f43bfb988b9b7a02dd21"
    );
}

/// The GCM specification (McGrew and Viega), appendix B, test case 16: AES-256 with associated data.
#[test]
fn blocks_are_aes_256_gcm() {
    let key =
        bytes_of_hex::<32>("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308");
    let nonce = Nonce::assume_unique_for_key(bytes_of_hex("cafebabefacedbaddecaf888").unwrap());
    let mut text = bytes_of_hex::<60>(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
    )
    .unwrap();
    let aad = Aad::from(bytes_of_hex::<20>("feedfacedeadbeeffeedfacedeadbeefabaddad2").unwrap());
    let aead = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key.unwrap()).unwrap());
    let tag = aead.seal_in_place_separate_tag(nonce, aad, &mut text).unwrap();
    assert_eq!(
        hex_of_bytes(&text),
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    );
    assert_eq!(hex_of_bytes(tag.as_ref()), "76fc6ece0f4e1768cddf8853bb2d551b");
}

#[test]
fn a_key_is_read_from_hex_and_never_shown() {
    let text = key(7).to_hex();
    assert_eq!(SecretKey::parse(&format!(" {}\n", text.to_uppercase())), Some(key(7)));
    for wrong in ["", "00", &text[1..], &format!("{text}0"), &"0".repeat(64), &"g".repeat(64)] {
        assert_eq!(SecretKey::parse(wrong), None, "{wrong}");
    }
    let shown = format!("{:?} {:?}", key(7), BlockCipher::new(&key(7), NAME).unwrap());
    assert!(!shown.contains(&text[..8]), "{shown}");
    assert_eq!(key(7).id().to_string().parse(), Ok(key(7).id()));
}

#[test]
fn every_flipped_bit_is_noticed() {
    let good = encrypt(&key(1), &key(2), NAME, b"a commit record");
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(decrypt(&key(1), NAME, &bad).is_err(), "bit {bit}");
    }
    for cut in 0..good.len() {
        assert!(decrypt(&key(1), NAME, &good[..cut]).is_err(), "cut at {cut}");
    }
}

#[test]
fn what_is_wrong_is_told_apart() {
    use EncryptionError::{Cut, HeadDamaged, Newer, NotEncrypted, WrongBlock, WrongSeal};
    let good = encrypt(&key(1), &key(2), NAME, b"plain");
    let changed = |at: usize, byte: u8| {
        let mut bad = good.clone();
        bad[at] = byte;
        decrypt(&key(1), NAME, &bad).unwrap_err()
    };
    assert_eq!(changed(0, b'h'), NotEncrypted);
    assert_eq!(changed(3, b'2'), Newer('2'));
    assert_eq!(changed(9, good[9] ^ 1), HeadDamaged);
    assert_eq!(changed(90, good[90] ^ 1), WrongBlock(0));
    assert_eq!(decrypt(&key(3), NAME, &good), Err(WrongSeal));
    assert_eq!(decrypt(&key(1), "wal/7/00000003.history", &good), Err(WrongSeal));
    assert_eq!(decrypt(&key(1), NAME, &good[..100]), Err(Cut(100)));
    assert_eq!(decrypt(&key(1), NAME, &good[..50]), Err(Cut(50)));
    assert_eq!(decrypt(&key(1), NAME, b""), Err(NotEncrypted));
    assert_eq!(decrypt(&key(1), NAME, b"{\"format\": 1"), Err(NotEncrypted));
}

/// Three blocks, so that there is a first, a middle and a last one.
fn three_blocks(first: u8) -> (Vec<u8>, Vec<u8>) {
    let plain: Vec<u8> = (0..40_000u32).map(|i| first ^ u8::try_from(i % 251).unwrap()).collect();
    let object = encrypt(&key(1), &key(first), NAME, &plain);
    (plain, object)
}

fn block(object: &[u8], number: usize) -> &[u8] {
    object[ENCRYPTED_HEAD_BYTES..].chunks(16400).nth(number).unwrap()
}

#[test]
fn blocks_cannot_be_swapped_left_out_repeated_or_taken_from_elsewhere() {
    let (plain, good) = three_blocks(9);
    let (_, other) = three_blocks(10);
    assert_eq!(decrypt(&key(1), NAME, &good).unwrap(), plain);
    let head = &good[..ENCRYPTED_HEAD_BYTES];
    let joined = |blocks: &[&[u8]]| [&[head], blocks].concat().concat();
    let (a, b, c) = (block(&good, 0), block(&good, 1), block(&good, 2));
    assert_eq!(joined(&[a, b, c]), good);
    for bad in [
        joined(&[b, a, c]),
        joined(&[a, b]),
        joined(&[a]),
        joined(&[a, c]),
        joined(&[a, b, b, c]),
        joined(&[a, block(&other, 1), c]),
        joined(&[a, b, c, c]),
        joined(&[]),
    ] {
        assert!(decrypt(&key(1), NAME, &bad).is_err());
    }
    // With the other object's head: its data key opens none of our blocks.
    let spliced = [&other[..ENCRYPTED_HEAD_BYTES], &good[ENCRYPTED_HEAD_BYTES..]].concat();
    assert_eq!(decrypt(&key(1), NAME, &spliced), Err(EncryptionError::WrongBlock(0)));
}

proptest! {
    #[test]
    fn any_bytes_come_back(plain in prop::collection::vec(any::<u8>(), 0..50_000)) {
        let object = encrypt(&key(1), &key(2), NAME, &plain);
        prop_assert_eq!(object.len() as u64, encrypted_bytes(plain.len() as u64));
        prop_assert_eq!(decrypt(&key(1), NAME, &object).unwrap(), plain);
    }

    #[test]
    fn lengths_go_both_ways_and_no_other_length_is_taken(plain in 0u64..1 << 40, more in 0u64..16) {
        let stored = encrypted_bytes(plain);
        prop_assert_eq!(decrypted_bytes(stored), Ok(plain));
        let other = stored + more;
        if let Ok(plain) = decrypted_bytes(other) {
            prop_assert_eq!(encrypted_bytes(plain), other);
        }
        // A last block of no byte is written for an empty object only.
        let cut = block_offset(blocks_of(plain)) + more;
        if plain % BLOCK_PLAIN_BYTES == 0 && plain > 0 {
            prop_assert!(more == 0 || decrypted_bytes(cut).is_err());
        }
    }

    #[test]
    fn any_damage_anywhere_is_noticed(at: prop::sample::Index, xor in 1u8.., cut: prop::sample::Index) {
        let (_, good) = three_blocks(9);
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= xor;
        prop_assert!(decrypt(&key(1), NAME, &bad).is_err());
        prop_assert!(decrypt(&key(1), NAME, &good[..cut.index(good.len())]).is_err());
    }

    #[test]
    fn no_bytes_panic(bytes: Vec<u8>, length: u64) {
        let _ = decrypt(&key(1), NAME, &bytes);
        let _ = decrypted_bytes(length);
    }
}

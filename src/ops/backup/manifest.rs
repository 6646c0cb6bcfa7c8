//! Comparing what arrived with the server's own manifest, file by file.
//!
//! The manifest comes last, and nothing about a single file is kept until then. Files fall into places by their
//! paths; each place adds up a fingerprint of path, size and checksum of every file that arrived, and takes away
//! that of every file that is listed. Equal lists leave zero everywhere. Memory: the places, whatever the number
//! of files. What is lost is the name of a wrong file that shares its place with another.

use super::UNHARMED;
use super::recording::unexpected;
use crate::failure::{Failure, Kind};
use crate::pg::{Crc32c, ManifestFile, ManifestReader};
use crate::walsender::ManifestChecksums;

/// Paths of damaged files that an error names.
const NAMED_MAX: usize = 5;

/// Places, of 24 bytes and more: 4 MiB. A cluster of a few thousand files has nearly each by itself.
const PLACES: usize = 1 << 17;

/// Paths that are remembered as perhaps wrong until the end of the list.
const SUSPECTS_MAX: usize = 64;

/// What is known of all files of one place.
#[derive(Clone, Copy, Default)]
struct Place {
    arrived: u32,
    listed: u32,
    /// Fingerprints of what arrived, less those of what is listed, modulo 2^128.
    rest: u128,
}

impl Place {
    fn is_wrong(self) -> bool {
        self.rest != 0 || self.arrived != self.listed
    }
}

enum Digest {
    Crc32c(Box<Crc32c>),
    Sha256(Box<aws_lc_rs::digest::Context>),
}

/// Compares files with the manifest.
pub(super) struct ManifestCheck {
    checksums: ManifestChecksums,
    current: Option<Digest>,
    places: Vec<Place>,
    /// Files that may be wrong, by their place: it had a rest when they were listed.
    suspects: Vec<(usize, String)>,
    reader: Option<ManifestReader>,
}

impl ManifestCheck {
    pub(super) fn new(checksums: ManifestChecksums) -> Self {
        Self {
            checksums,
            current: None,
            places: vec![Place::default(); PLACES],
            suspects: Vec::new(),
            reader: Some(ManifestReader::new()),
        }
    }

    pub(super) fn begin_file(&mut self) {
        self.current = Some(match self.checksums {
            ManifestChecksums::Crc32c => Digest::Crc32c(Box::default()),
            ManifestChecksums::Sha256 => Digest::Sha256(Box::new(aws_lc_rs::digest::Context::new(
                &aws_lc_rs::digest::SHA256,
            ))),
        });
    }

    pub(super) fn file_data(&mut self, data: &[u8]) {
        match &mut self.current {
            Some(Digest::Crc32c(crc)) => crc.update(data),
            Some(Digest::Sha256(sha)) => sha.update(data),
            None => {}
        }
    }

    /// Ends a file and returns its checksum as the file list carries it.
    pub(super) fn end_file(&mut self, path: &[u8], size: u64) -> String {
        let (algorithm, bytes) = match self.current.take() {
            // The manifest prints the four bytes in memory order.
            Some(Digest::Crc32c(crc)) => ("crc32c", crc.value().to_le_bytes().to_vec()),
            Some(Digest::Sha256(sha)) => ("sha256", sha.finish().as_ref().to_vec()),
            None => ("none", Vec::new()),
        };
        let place = &mut self.places[place_of(path)];
        place.arrived = place.arrived.saturating_add(1);
        place.rest = place.rest.wrapping_add(fingerprint(path, size, &bytes));
        let mut text = format!("{algorithm}:");
        for byte in bytes {
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }

    /// Takes the next bytes of the manifest.
    pub(super) fn feed(&mut self, data: &[u8]) -> Result<(), Failure> {
        let Some(mut reader) = self.reader.take() else { return Ok(()) };
        let fed = reader.feed(data, &mut |file| self.compare(&file));
        fed.map_err(|error| unexpected(format!("the manifest cannot be read: {error}")))?;
        self.reader = Some(reader);
        Ok(())
    }

    fn compare(&mut self, file: &ManifestFile) {
        let number = place_of(&file.path);
        let place = &mut self.places[number];
        place.listed = place.listed.saturating_add(1);
        // A backup that is asked for checksums has one for each file; without, nothing fits.
        let checksum = file.checksum.as_ref().map_or(&[][..], |sum| &sum.bytes);
        place.rest = place.rest.wrapping_sub(fingerprint(&file.path, file.size, checksum));
        if place.is_wrong() && place.arrived <= 1 && self.suspects.len() < SUSPECTS_MAX {
            self.suspects.push((number, String::from_utf8_lossy(&file.path).into_owned()));
        }
    }

    pub(super) fn finish(self) -> Result<(), Failure> {
        let reader = self.reader.ok_or_else(|| unexpected("the manifest ended early"))?;
        reader
            .finish()
            .map_err(|error| unexpected(format!("the manifest is not whole: {error}")))?;
        let wrong: u64 = self.places.iter().filter(|place| place.is_wrong()).map(at_least).sum();
        if wrong == 0 {
            return Ok(());
        }
        // A file that is alone in its place, on both sides, is the wrong one.
        let alone = self.suspects.iter().filter(|(number, _)| {
            let place = self.places[*number];
            place.is_wrong() && place.arrived <= 1 && place.listed == 1
        });
        let named: Vec<&str> = alone.take(NAMED_MAX).map(|(_, path)| path.as_str()).collect();
        let among = if named.is_empty() {
            String::new()
        } else {
            format!(", among them {}", named.join(", "))
        };
        let total = |count: fn(&Place) -> u32| self.places.iter().map(count).map(u64::from).sum();
        let (arrived, listed): (u64, u64) =
            (total(|place| place.arrived), total(|place| place.listed));
        Err(Failure::new(
            Kind::Integrity,
            format!(
                "at least {wrong} files did not arrive as the server's manifest lists them{among} ({arrived} arrived, {listed} are listed)"
            ),
            UNHARMED,
            "Take the backup again. If it happens again, suspect memory or network hardware between server and this host.",
        ))
    }
}

/// How many files of a wrong place are wrong at least.
fn at_least(place: &Place) -> u64 {
    u64::from(place.arrived.abs_diff(place.listed).max(1))
}

fn place_of(path: &[u8]) -> usize {
    let hash = blake3::hash(path);
    let [a, b, c, ..] = *hash.as_bytes();
    usize::from(a) << 16 & (PLACES - 1) | usize::from(b) << 8 | usize::from(c)
}

/// Files that differ in anything have different fingerprints; so have, but for one in 2^128, sums of them.
fn fingerprint(path: &[u8], size: u64, checksum: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes()).update(&(path.len() as u64).to_le_bytes());
    hasher.update(path).update(checksum);
    let mut bytes = [0; 16];
    hasher.finalize_xof().fill(&mut bytes);
    u128::from_le_bytes(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pg::{
        Lsn, MajorVersion, ManifestWriter, ManifestedFile, SystemId, Timeline, WalRange,
    };

    type Files = Vec<(String, Vec<u8>)>;

    /// Lets `arrived` arrive, then a manifest that lists `listed`; the failure's sentence, if there is one.
    fn check(arrived: &Files, listed: &Files) -> Option<String> {
        let mut check = ManifestCheck::new(ManifestChecksums::Crc32c);
        for (path, content) in arrived {
            check.begin_file();
            check.file_data(content);
            check.end_file(path.as_bytes(), content.len() as u64);
        }
        let mut writer = ManifestWriter::new(MajorVersion(18), SystemId(7));
        let mut manifest = Vec::new();
        for (path, content) in listed {
            let checksum = crate::pg::crc32c(content).to_le_bytes();
            writer.file(
                &ManifestedFile {
                    path: path.as_bytes(),
                    size: content.len() as u64,
                    modified_unix: 0,
                    checksum: ("CRC32C", &checksum),
                },
                &mut manifest,
            );
        }
        let range = WalRange { timeline: Timeline(1), start_lsn: Lsn(1), end_lsn: Lsn(2) };
        writer.finish(&[range], &mut manifest);
        check.feed(&manifest).unwrap();
        check.finish().err().map(|failure| failure.to_string())
    }

    fn files(count: usize) -> Files {
        (0..count).map(|n| (format!("base/5/{n}"), n.to_le_bytes().to_vec())).collect()
    }

    #[test]
    fn what_arrived_as_listed_passes_in_any_order_and_more_files_than_places_too() {
        for count in [1, 1000, 2 * PLACES] {
            let arrived = files(count);
            let listed: Files = arrived.iter().rev().cloned().collect();
            assert_eq!(check(&arrived, &listed), None, "{count}");
        }
    }

    #[test]
    fn a_file_that_differs_is_named_where_it_is_alone_in_its_place() {
        let (mut arrived, listed) = (files(100), files(100));
        arrived[42].1[0] ^= 1;
        let said = check(&arrived, &listed).unwrap();
        assert!(
            said.contains("at least 1 files") && said.contains("among them base/5/42 ("),
            "{said}"
        );
    }

    #[test]
    fn one_wrong_file_among_very_many_is_noticed() {
        let (mut arrived, listed) = (files(2 * PLACES), files(2 * PLACES));
        arrived[7].1[0] ^= 1;
        assert!(check(&arrived, &listed).unwrap().contains("at least 1 files"));
    }

    proptest! {
        #[test]
        fn files_too_many_too_few_twice_or_exchanged_are_noticed(
            count in 2usize..60,
            at in any::<prop::sample::Index>(),
            what in 0..4,
        ) {
            let (mut arrived, listed) = (files(count), files(count));
            let at = at.index(count - 1);
            match what {
                0 => drop(arrived.remove(at)),
                1 => arrived.push(("base/5/more".to_owned(), Vec::new())),
                2 => arrived.push(arrived[at].clone()),
                _ => {
                    let other = arrived[at + 1].1.clone();
                    arrived[at].1 = other;
                }
            }
            prop_assert!(check(&arrived, &listed).is_some());
        }
    }
}

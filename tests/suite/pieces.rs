//! Segments of real servers that are stored piece by piece while they come.

use crate::harness::{Archived, MAJORS, NEWEST, Random, finish};
use highwater::format::{Codec, Header};
use highwater::pg::{SegmentName, SegmentSize, SystemId, WalCarry};
use highwater::repo::{Repository, SealedPiece, SegmentAssembly};
use highwater::store::file::FileStore;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// The place's repository, as the library sees it.
struct Seen<'a> {
    place: &'a Archived,
    repository: Repository,
    system_id: SystemId,
    size: SegmentSize,
    runtime: tokio::runtime::Runtime,
}

impl<'a> Seen<'a> {
    fn of(place: &'a Archived, segment_mib: u32) -> Self {
        let store = FileStore::new(place.highwater.repo_directory(), Duration::from_mins(1));
        let cluster = place.highwater.info()["cluster"].as_str().unwrap().parse().unwrap();
        let system_id = place.cluster.control("Database system identifier");
        let mut builder = tokio::runtime::Builder::new_current_thread();
        Self {
            place,
            repository: Repository::new(Arc::new(store), cluster),
            system_id: system_id.parse::<SystemId>().unwrap(),
            size: SegmentSize::new(segment_mib << 20).unwrap(),
            runtime: builder.enable_all().build().unwrap(),
        }
    }

    fn put(&self, pieces: &[SealedPiece]) {
        for piece in pieces {
            let put = self.repository.put_sealed(&piece.key, &piece.sealed);
            self.runtime.block_on(put).unwrap();
        }
        // The server's user reads and deletes them, whoever runs this test.
        let repo = self.place.highwater.repo_directory();
        let mut chown = std::process::Command::new("chown");
        chown.arg("-R").arg("--reference").arg(&repo).arg(&repo);
        finish(chown);
    }

    /// Stores a segment piece by piece; returns its units, which are not stored, and the carry.
    fn stream(
        &self,
        name: &str,
        carry: Option<WalCarry>,
        random: &mut Random,
    ) -> (Vec<SealedPiece>, Option<WalCarry>) {
        let bytes = std::fs::read(self.place.cluster.wal(name)).unwrap();
        let segment = SegmentName::parse(name).unwrap();
        let (codec, size) = (Codec::DEFAULT, self.size);
        let begun = SegmentAssembly::begin(
            &self.repository,
            self.system_id,
            segment,
            size,
            codec,
            carry,
            None,
        );
        let mut assembly = begun.unwrap();
        let (mut pieces, mut units) = (Vec::new(), Vec::new());
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let n = 1 + usize::try_from(random.below(3 << 20)).unwrap();
            let (now, later) = rest.split_at(n.min(rest.len()));
            assembly.push(now, &mut |_| {}).unwrap();
            pieces.extend(assembly.cut().unwrap());
            units.extend(assembly.take_units().into_iter().map(|unit| unit.seal().unwrap()));
            rest = later;
        }
        self.put(&pieces);
        (units, assembly.finish().unwrap().1)
    }

    fn header(&self, piece: &SealedPiece) -> Header {
        self.runtime.block_on(self.repository.header(&piece.key)).unwrap()
    }
}

#[test]
fn a_streamed_segment_comes_back_and_ends_as_archive_push_stores_it() {
    for (major, segment_mib) in [(MAJORS[0], 16), (NEWEST, 16), (NEWEST, 64)] {
        let place = Archived::by_hand(major, segment_mib);
        let seen = Seen::of(&place, segment_mib);
        let mut random = Random::new("pieces");
        let mut carry = None;
        for name in place.segments(3) {
            let bytes = std::fs::read(place.cluster.wal(&name)).unwrap();
            let units;
            (units, carry) = seen.stream(&name, carry, &mut random);
            place.assert_gives_back(&name, &bytes);
            let pieces = place.objects_of(&name).len();

            place.highwater.push(&place.cluster.wal(&name)).done();
            let segment = SegmentName::parse(&name).unwrap();
            let (place_of, none) = (seen.system_id, BTreeSet::new());
            let drop = seen.repository.drop_redundant_pieces(place_of, segment, seen.size, &none);
            let dropped = seen.runtime.block_on(drop).unwrap().dropped;
            assert_eq!(place.objects_of(&name).len(), units.len(), "{name}: {pieces} pieces");
            assert!(dropped + units.len() as u64 >= pieces as u64, "{name}");
            for unit in &units {
                let mut stored = seen.header(unit);
                // Frames may end elsewhere.
                stored.stored_bytes = unit.sealed.header.stored_bytes;
                assert_eq!(stored, unit.sealed.header, "{name}");
            }
            place.assert_gives_back(&name, &bytes);
        }
        assert!(carry.is_some());
    }
}

//! A timeline that ends: what is stored then is the WAL up to there, and nothing behind it.
//!
//! Everything is put into a store, read back from its bytes, and held against the bytes that were pushed.

use std::sync::OnceLock;

use proptest::sample::Index;

use super::*;
use crate::store::memory::MemoryStore;

/// A record by offsets: its first byte, and behind the bytes that fill it up to a multiple of 8.
#[derive(Debug, Clone, Copy)]
struct Record {
    start: u32,
    end: u32,
    is_commit: bool,
}

/// The bytes of a segment, and the records that end in it.
struct Sample {
    bytes: Vec<u8>,
    records: Vec<Record>,
}

impl Sample {
    fn build(segment_bytes: usize) -> Self {
        let mut builder = WalBuilder::new(Timeline(1), 2, size(segment_bytes), SYSTEM);
        let first = builder.lsn();
        let offset = |lsn: Lsn| u32::try_from(lsn.0 - first.0).unwrap();
        let mut records = Vec::new();
        for n in 0u32.. {
            let is_commit = n % 2 == 0;
            let spec = if is_commit {
                RecordSpec::commit(700 + n, PgTimestamp(1_000_000 + i64::from(n)))
            } else {
                RecordSpec::filler(n as usize * 7919 % 40_000)
            };
            let start = offset(builder.add(&spec));
            let end = offset(builder.lsn());
            if end as usize >= segment_bytes {
                break;
            }
            records.push(Record { start, end, is_commit });
        }
        Self { bytes: builder.into_segments().remove(0), records }
    }

    fn small() -> &'static Self {
        static SAMPLE: OnceLock<Sample> = OnceLock::new();
        SAMPLE.get_or_init(|| Self::build(MIB))
    }

    /// Of two units.
    fn large() -> &'static Self {
        static SAMPLE: OnceLock<Sample> = OnceLock::new();
        SAMPLE.get_or_init(|| Self::build(32 * MIB))
    }

    /// How many commits end from `start` to `end`, at least and at most: where one was filled up, it is
    /// complete some bytes before its end.
    fn commits(&self, start: u32, end: u32) -> (u64, u64) {
        let count = |is_inside: &dyn Fn(u32) -> bool| {
            self.records.iter().filter(|one| one.is_commit && is_inside(one.end)).count() as u64
        };
        (count(&|at| at >= start + 8 && at <= end), count(&|at| at > start && at < end + 8))
    }
}

/// What is done with the segment once some more bytes came.
#[derive(Debug, Clone, Copy)]
enum Act {
    Wait,
    Cut,
    Merge(usize, usize),
    TakeUnits,
}

/// A way through a segment until its timeline turns out to have ended.
#[derive(Debug, Clone)]
struct Way {
    steps: Vec<(usize, Act)>,
    /// What the repository held before, of all that is pushed.
    stored: Option<Index>,
    /// The record that is the timeline's last; `None`: it ends anywhere.
    last_record: Option<Index>,
    end: Index,
    pushed: Index,
    /// Cuts go on behind the end, as for somebody who does not know of it yet.
    overruns: bool,
    codec: usize,
    aside: bool,
}

fn ways(step_bytes_max: usize, steps_max: usize) -> impl Strategy<Value = Way> {
    let act = prop_oneof![
        3 => Just(Act::Wait),
        4 => Just(Act::Cut),
        2 => (0usize..40, 1usize..9).prop_map(|(first, count)| Act::Merge(first, count)),
        1 => Just(Act::TakeUnits),
    ];
    let step = prop_oneof![1usize..2_000, 1..step_bytes_max];
    let steps = proptest::collection::vec((step, act), 1..steps_max);
    let places = (any::<Option<Index>>(), any::<Option<Index>>(), any::<Index>(), any::<Index>());
    (steps, places, 0u32..8, 0usize..3, any::<bool>()).prop_map(
        |(steps, (stored, last_record, end, pushed), overruns, codec, aside)| {
            let overruns = overruns == 0;
            Way { steps, stored, last_record, end, pushed, overruns, codec, aside }
        },
    )
}

/// One object as it came back out of the store.
struct Opened {
    start: u32,
    end: u32,
    xacts: u64,
    last_record: Option<u32>,
}

/// A segment under way, and everything that was put of it.
struct Trial {
    sample: &'static Sample,
    store: MemoryStore,
    place: Repository,
    assembly: SegmentAssembly,
    opened: Vec<Opened>,
    /// Offsets where a cut ended, ascending.
    cuts: Vec<u32>,
    stored: u32,
}

impl Trial {
    fn begin(sample: &'static Sample, way: &Way, stored: usize) -> Self {
        let segment_bytes = sample.bytes.len();
        let (end, digest) = (u32::try_from(stored).unwrap(), blake3::hash(&sample.bytes[..stored]));
        let prefix = StoredPrefix { end, digest, is_complete: false };
        let codec = CODECS[way.codec];
        let mut assembly = begin(segment_bytes, codec, Some(prefix));
        if way.aside {
            assembly.make_frames_with(&FrameMaker::start(codec));
        }
        let store = MemoryStore::new();
        let place = Repository::new(Arc::new(store.clone()), "main".parse().unwrap());
        Self { sample, store, place, assembly, opened: Vec::new(), cuts: vec![end], stored: end }
    }

    /// Puts an object, reads it back, and compares it with what was pushed.
    fn open(&mut self, piece: &SealedPiece) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut bytes = Vec::new();
        let header = runtime.block_on(async {
            self.place.put_sealed(&piece.key, &piece.sealed).await.unwrap();
            let take = |block: &[u8]| {
                bytes.extend_from_slice(block);
                Ok(())
            };
            self.place.fetch(&piece.key, take).await.unwrap()
        });
        let (start, end) = match piece.object {
            WalObject::Piece { start, end, .. } => (start, end),
            _ => (0, u32::try_from(self.sample.bytes.len()).unwrap()),
        };
        assert!(bytes == self.sample.bytes[start as usize..end as usize], "{start} to {end}");
        assert_eq!(header, piece.sealed.header);
        assert_eq!(header.plain_bytes, u64::from(end - start));
        assert_eq!(header.blake3, Some(blake3::hash(&bytes).to_hex().to_string()));
        let lsn = |offset: u32| Lsn((2 * self.sample.bytes.len()) as u64 + u64::from(offset));
        assert_eq!((piece.start_lsn, piece.end_lsn), (lsn(start), lsn(end)));
        let wal = header.wal.unwrap();
        assert_eq!((wal.timeline, wal.start_lsn), (Timeline(1), lsn(start)));
        if matches!(piece.object, WalObject::Piece { .. }) {
            assert_eq!(wal.end_lsn, lsn(end));
        }
        let last_record =
            wal.last_record_lsn.map(|found| u32::try_from(found.0 - lsn(0).0).unwrap());
        self.opened.push(Opened { start, end, xacts: wal.xacts, last_record });
    }

    fn open_all(&mut self, pieces: &[SealedPiece]) {
        for piece in pieces {
            self.open(piece);
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Wait => {}
            Act::Cut => {
                let pieces = self.assembly.cut().unwrap();
                self.cuts.extend(pieces.iter().map(|piece| offsets(piece).1));
                self.open_all(&pieces);
            }
            Act::Merge(first, count) => {
                let first = first % self.cuts.len();
                let last = (first + count).min(self.cuts.len() - 1);
                // Others lie in two units, or in one that is gone.
                if let Ok(unsealed) = self.assembly.to_merge(self.cuts[first], self.cuts[last]) {
                    let merged = unsealed.seal().unwrap();
                    self.assembly.adopt(&merged);
                    self.open(&merged);
                }
            }
            Act::TakeUnits => {
                let units = units(&mut self.assembly);
                self.open_all(&units);
            }
        }
    }

    /// Ends the timeline at `end`, and looks at everything that is stored then.
    fn finish(mut self, end: u32, is_border: bool) {
        let (position, cut_before) = (self.assembly.position(), self.assembly.cut_position());
        let before = self.opened.len();
        let last = self.assembly.cut_until(end).unwrap();
        assert!(self.assembly.push(&[0], &mut |_| {}).is_err(), "nothing can come any more");
        self.open_all(&last);
        let mut at = cut_before;
        for piece in &self.opened[before..] {
            assert_eq!(piece.start, at, "pieces follow each other");
            assert_eq!(piece.start / PIECE_BYTES, (piece.end - 1) / PIECE_BYTES);
            at = piece.end;
        }
        let (end, known) = (end.min(position), cut_before.max(self.stored));
        assert_eq!(at, end.max(known));
        // All of it, joined.
        let mut joined = self.stored;
        self.opened.sort_by_key(|one| (one.start, one.end));
        for one in &self.opened {
            assert!(one.start <= joined, "a hole from {joined} to {}", one.start);
            joined = joined.max(one.end);
            assert!(one.end <= end.max(known), "bytes behind {end} up to {}", one.end);
            self.check_records(one, end, is_border);
        }
        assert_eq!(joined, end.max(known));
        assert!(self.store.keys().len() <= self.opened.len());
    }

    /// The header tells the commits and the last record of what it stands before, and of nothing else.
    fn check_records(&self, one: &Opened, end: u32, is_border: bool) {
        let (start, records) = (one.start, &self.sample.records);
        if let Some(lsn) = one.last_record {
            assert!((start..one.end).contains(&lsn), "{lsn} of {start} to {}", one.end);
        }
        let (least, most) = self.sample.commits(start, one.end);
        assert!(one.xacts >= least, "{} of {least} from {start} to {}", one.xacts, one.end);
        // A timeline ends with a record; where it does not, what was behind is told too.
        if !is_border && one.end == end {
            return;
        }
        assert!(one.xacts <= most, "{} of {most} from {start} to {}", one.xacts, one.end);
        if (one.end as usize) < self.sample.bytes.len() {
            let last = |limit: u32| {
                let last = records.iter().rev().find(|record| record.end <= limit);
                last.map(|record| record.start).filter(|lsn| *lsn >= start)
            };
            let expected = [last(one.end), last(one.end + 7)];
            assert!(expected.contains(&one.last_record), "{:?}: {expected:?}", one.last_record);
        }
    }
}

fn go(sample: &'static Sample, way: &Way) {
    let segment_bytes = sample.bytes.len();
    let (end, pushed) = if let Some(index) = &way.last_record {
        // What came behind the end is part of one record.
        let number = index.index(sample.records.len() - 1);
        let (last, next) = (sample.records[number], sample.records[number + 1]);
        let more = way.pushed.index((next.end - last.end) as usize - 7);
        (last.end as usize, last.end as usize + more)
    } else {
        let pushed = 1 + way.pushed.index(segment_bytes);
        (1 + way.end.index(pushed), pushed)
    };
    let stored = way.stored.map_or(0, |index| index.index(pushed));
    let mut trial = Trial::begin(sample, way, stored);
    let mut rest = &sample.bytes[..pushed];
    // The last step takes what is left.
    for (bytes, act) in way.steps.iter().copied().chain([(pushed, Act::Wait)]) {
        let (now, later) = rest.split_at(bytes.min(rest.len()));
        push(&mut trial.assembly, now);
        rest = later;
        let is_behind = trial.assembly.position() as usize > end;
        let unit_is_behind = matches!(act, Act::TakeUnits) && is_behind;
        if !unit_is_behind && (way.overruns || !is_behind || matches!(act, Act::Merge(..))) {
            trial.act(act);
        }
    }
    trial.finish(u32::try_from(end).unwrap(), way.last_record.is_some());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn at_the_end_of_a_timeline_what_is_stored_is_its_bytes_up_to_there_and_no_others(
        way in ways(60_000, 40),
    ) {
        go(Sample::small(), &way);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    #[test]
    fn at_the_end_of_a_timeline_in_a_large_segment_units_and_pieces_end_there_too(
        way in ways(6 << 20, 16),
    ) {
        go(Sample::large(), &way);
    }
}

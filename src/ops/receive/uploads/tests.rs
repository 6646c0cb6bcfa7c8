//! What is on its way is counted until it is stored, or has failed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;
use tokio::sync::Semaphore;

use super::*;
use crate::format::Codec;
use crate::pg::Timeline;
use crate::pg::wal_build::{RecordSpec, WalBuilder};
use crate::plan::receive::{Cut, CutPolicy, MERGE_COUNT, Merges, Uncut, when_to_cut};
use crate::repo::SegmentAssembly;
use crate::store::faults::{Call, Fault, FaultStore, Symptom};
use crate::store::memory::MemoryStore;
use crate::store::{Body, Key, Level, Listed, Reading, Store, StoreError};

const SYSTEM: SystemId = SystemId(7_710_829_501_534_534_359);

fn size() -> SegmentSize {
    SegmentSize::new(1 << 20).unwrap()
}

fn segment() -> SegmentName {
    SegmentName::new(Timeline(1), 2, size())
}

/// A complete segment in the hands of a receiver, cut after every kilobyte of its first half.
fn received(repository: &Repository, filler: usize) -> (SegmentAssembly, Vec<SealedPiece>) {
    let mut builder = WalBuilder::new(Timeline(1), 2, size(), SYSTEM);
    while builder.lsn() < Lsn(3 << 20) {
        builder.add(&RecordSpec::filler(filler));
    }
    let bytes = builder.into_segments().swap_remove(0);
    let (codec, half) = (Codec::DEFAULT, bytes.len() / 2);
    let begun = SegmentAssembly::begin(repository, SYSTEM, segment(), size(), codec, None, None);
    let mut assembly = begun.unwrap();
    let mut pieces = Vec::new();
    for block in bytes[..half].chunks(1024) {
        assembly.push(block, &mut |_| {}).unwrap();
        pieces.extend(assembly.cut().unwrap());
    }
    assembly.push(&bytes[half..], &mut |_| {}).unwrap();
    (assembly, pieces)
}

fn repository(memory: &MemoryStore) -> Repository {
    Repository::new(Arc::new(memory.clone()), "main".parse().unwrap())
}

fn unit_of(assembly: &mut SegmentAssembly) -> Unsealed {
    assembly.take_units().remove(0)
}

#[tokio::test]
async fn a_unit_counts_with_what_is_made_of_it_until_it_is_sealed_then_as_it_is_until_it_is_stored()
{
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let (mut assembly, _) = received(&place, 700);
    let held_before = assembly.held_bytes();
    let unit = unit_of(&mut assembly);
    let promised = unit.held_bytes();
    assert!(promised > held_before - assembly.held_bytes(), "sealing takes room as well");
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    uploads.put_unit(segment(), unit);
    assert_eq!(uploads.held_bytes(), promised);
    assert!(!uploads.is_settled());

    let Settled::Sealed(piece) = uploads.next().await.unwrap() else { unreachable!() };
    let stored_bytes = piece.sealed.header.stored_bytes;
    assert_eq!(uploads.held_bytes(), stored_bytes);
    assert!(!uploads.is_settled(), "sealed is not stored");

    let Settled::Stored(stored) = uploads.next().await.unwrap() else { unreachable!() };
    assert_eq!((stored.purpose, stored.object_bytes), (Purpose::Unit, stored_bytes));
    assert_eq!((stored.start_lsn, stored.end_lsn), (Lsn(2 << 20), Lsn(3 << 20)));
    assert_eq!(uploads.held_bytes(), 0);
    assert!(uploads.is_settled() && uploads.is_empty());
    assert!(memory.bytes(piece.key.as_str()).is_some());
}

#[tokio::test]
async fn merged_pieces_are_one_object_first_and_gone_then() {
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let (mut assembly, pieces) = received(&place, 700);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    let mut merges = Merges::default();
    for (n, piece) in (0u32..).zip(&pieces[..MERGE_COUNT]) {
        uploads.put_piece(segment(), piece.clone());
        merges.store(n * 1024, (n + 1) * 1024);
    }
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    assert_eq!(memory.keys().len(), MERGE_COUNT);
    let merge = merges.next_merge().unwrap();
    uploads.put_merge(segment(), merge, assembly.to_merge(merge.start, merge.end).unwrap());
    assert!(uploads.is_tidying() && uploads.is_settled());
    let Settled::Sealed(piece) = uploads.next().await.unwrap() else { unreachable!() };
    assert_eq!(memory.keys().len(), MERGE_COUNT, "sealing stores nothing");
    assert!(uploads.is_tidying());
    assert!(matches!(uploads.next().await.unwrap(), Settled::Stored(_)));
    assert!(!uploads.is_tidying());
    assert_eq!(memory.keys(), [piece.key.as_str()]);
}

#[tokio::test]
async fn what_was_refused_is_waited_for_no_longer() {
    let memory = MemoryStore::new();
    let place = repository(&memory);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    uploads.put_unit(segment(), unit_of(&mut received(&place, 700).0));
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    // Another server's segment of the same name.
    uploads.put_unit(segment(), unit_of(&mut received(&place, 900).0));
    assert!(matches!(uploads.next().await.unwrap(), Settled::Sealed(_)));
    let failure = uploads.next().await.err().unwrap();
    assert_eq!(failure.kind, Kind::Conflict);
    assert!(uploads.is_settled(), "else whoever drains would wait for ever");
}

/// The Nth call fails, or it and the next two: before its effect, or after it.
fn faults_at(n: u64, mode: u32) -> Vec<Fault> {
    let fault = |n| Fault::anywhere().nth(n);
    let after = |n| fault(n).after_effect();
    match mode {
        0 => vec![fault(n)],
        1 => vec![after(n)],
        2 => (n..n + 3).map(fault).collect(),
        _ => (n..n + 3).map(after).collect(),
    }
}

#[tokio::test]
async fn what_counts_as_stored_is_stored_whatever_fails_and_all_is_stored_in_the_end() {
    for mode in 0..4 {
        for n in 1.. {
            let memory = MemoryStore::new();
            let faults = FaultStore::new(Arc::new(memory.clone()));
            let place = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
            let (mut assembly, pieces) = received(&place, 700);
            for fault in faults_at(n, mode) {
                faults.inject(fault);
            }
            let mut uploads = Uploads::new(&place, SYSTEM, size());
            let mut keys: Vec<(Lsn, Lsn, String)> = Vec::new();
            let key_of = |piece: &SealedPiece| {
                (piece.start_lsn, piece.end_lsn, piece.key.as_str().to_owned())
            };
            for piece in &pieces[..3] {
                keys.push(key_of(piece));
                uploads.put_piece(segment(), piece.clone());
            }
            uploads.put_unit(segment(), unit_of(&mut assembly));
            let mut told = 0;
            while !uploads.is_empty() {
                match uploads.next().await.unwrap() {
                    Settled::Sealed(piece) => keys.push(key_of(&piece)),
                    Settled::Stored(stored) => {
                        told += 1;
                        let is_it = |one: &&(Lsn, Lsn, String)| {
                            (one.0, one.1) == (stored.start_lsn, stored.end_lsn)
                        };
                        let (_, _, key) = keys.iter().find(is_it).unwrap();
                        assert!(memory.bytes(key).is_some(), "call {n}: `{key}` was told");
                    }
                    Settled::Tidied(_) => {}
                }
            }
            assert_eq!((told, memory.keys().len()), (4, 4), "call {n}");
            // What is left over after a failure is left to retention, and the whole segment stays.
            uploads.tidy(segment(), None);
            assert!(matches!(uploads.next().await.unwrap(), Settled::Tidied(_)));
            let struck = faults.calls().len() as u64 >= n;
            faults.heal();
            let none = BTreeSet::new();
            place.drop_redundant_pieces(SYSTEM, segment(), size(), &none).await.unwrap();
            assert_eq!(memory.keys(), [keys[3].2.clone()], "call {n}");
            if !struck {
                assert!(n > 6, "the fault never struck");
                break;
            }
        }
    }
}

/// Longer than any test here takes.
const LIMIT: Duration = Duration::from_mins(1);

/// What a store may say that does not take an object.
const SYMPTOMS: [Symptom; 4] =
    [Symptom::Unavailable, Symptom::Denied, Symptom::NoRoom, Symptom::Refused];

/// A store with faults, and the pieces of a segment for it.
struct Failing {
    memory: MemoryStore,
    faults: FaultStore,
    uploads: Uploads,
    pieces: Vec<SealedPiece>,
}

impl Failing {
    fn new() -> Self {
        let memory = MemoryStore::new();
        let faults = FaultStore::new(Arc::new(memory.clone()));
        let place = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
        let pieces = received(&place, 700).1;
        let uploads = Uploads::new(&place, SYSTEM, size());
        Self { memory, faults, uploads, pieces }
    }

    fn key(&self, n: usize) -> String {
        self.pieces[n].key.as_str().to_owned()
    }

    /// Waits until the store was asked `count` times to create an object, and sees that nothing ended by then.
    async fn tried(&mut self, count: usize) {
        let waited = async {
            while self.faults.count(Call::Create) < count {
                let ended = tokio::time::timeout(AGAIN_FIRST / 10, self.uploads.next()).await;
                assert!(ended.is_err(), "it ended while the store refuses");
                assert_eq!((self.uploads.pieces(), self.uploads.is_settled()), (1, false));
            }
        };
        tokio::time::timeout(LIMIT, waited).await.unwrap();
    }
}

#[tokio::test]
async fn whatever_the_store_says_once_a_piece_is_tried_again_until_it_is_stored() {
    let once = SYMPTOMS.into_iter().flat_map(|symptom| [(symptom, false), (symptom, true)]);
    futures_util::future::join_all(once.map(async |(symptom, is_late)| {
        let mut failing = Failing::new();
        let fault = Fault::on(Call::Create).symptom(symptom);
        failing.faults.inject(if is_late { fault.after_effect() } else { fault });
        failing.uploads.put_piece(segment(), failing.pieces[0].clone());
        let stored = tokio::time::timeout(LIMIT, failing.uploads.next()).await.unwrap().unwrap();
        assert!(matches!(stored, Settled::Stored(_)), "{symptom:?}");
        assert_eq!(failing.faults.count(Call::Create), 2, "{symptom:?}");
        assert_eq!(failing.memory.keys(), [failing.key(0)], "{symptom:?}");
        assert!(failing.uploads.is_settled() && failing.uploads.is_empty());
    }))
    .await;
}

#[tokio::test]
async fn whatever_the_store_says_for_a_while_nothing_counts_as_stored_before_it_is() {
    futures_util::future::join_all(SYMPTOMS.map(async |symptom| {
        let mut failing = Failing::new();
        failing.faults.inject(Fault::on(Call::Create).symptom(symptom).for_ever());
        failing.uploads.put_piece(segment(), failing.pieces[0].clone());
        failing.tried(4).await;
        assert_eq!(failing.memory.keys().len(), 0, "{symptom:?}");
        failing.faults.heal();
        let stored = tokio::time::timeout(LIMIT, failing.uploads.next()).await.unwrap().unwrap();
        let Settled::Stored(stored) = stored else { unreachable!("{symptom:?}") };
        let piece = &failing.pieces[0];
        assert_eq!((stored.start_lsn, stored.end_lsn), (piece.start_lsn, piece.end_lsn));
        assert_eq!(failing.memory.keys(), [failing.key(0)], "{symptom:?}");
        assert!(failing.uploads.is_settled());
    }))
    .await;
}

#[tokio::test]
async fn a_piece_whose_doubtful_answer_cannot_be_looked_at_is_not_stored_yet() {
    futures_util::future::join_all(SYMPTOMS.map(async |symptom| {
        let mut failing = Failing::new();
        failing.faults.inject(Fault::on(Call::Create).symptom(symptom).after_effect());
        failing.faults.inject(Fault::on(Call::Read).symptom(symptom).for_ever());
        failing.uploads.put_piece(segment(), failing.pieces[0].clone());
        // It is there; nobody can tell yet that it is ours.
        failing.tried(4).await;
        failing.faults.heal();
        let stored = tokio::time::timeout(LIMIT, failing.uploads.next()).await.unwrap().unwrap();
        assert!(matches!(stored, Settled::Stored(_)), "{symptom:?}");
        assert_eq!(failing.memory.keys(), [failing.key(0)], "{symptom:?}");
    }))
    .await;
}

#[tokio::test]
async fn another_object_of_that_name_ends_it_also_while_the_store_refuses() {
    futures_util::future::join_all(SYMPTOMS.map(async |symptom| {
        // What another server stores under the same name.
        let memory = MemoryStore::new();
        let other = repository(&memory);
        let foreign = received(&other, 900).1.swap_remove(0);
        other.put_sealed(&foreign.key, &foreign.sealed).await.unwrap();
        let foreign_bytes = memory.bytes(foreign.key.as_str()).unwrap();

        let mut failing = Failing::new();
        assert_eq!(foreign.key, failing.pieces[0].key);
        let (stored, bytes) = (failing.memory.clone(), foreign_bytes.clone());
        let rival = move |_: Call, key: &Key| stored.overwrite(key.as_str(), bytes.clone());
        failing.faults.inject(Fault::on(Call::Create).symptom(symptom));
        failing.faults.inject(Fault::on(Call::Create).nth(2).symptom(symptom).hook(rival));
        failing.uploads.put_piece(segment(), failing.pieces[0].clone());
        let ended = tokio::time::timeout(LIMIT, failing.uploads.next()).await.unwrap();
        assert_eq!(ended.err().unwrap().kind, Kind::Conflict, "{symptom:?}");
        assert_eq!(failing.faults.count(Call::Create), 3, "{symptom:?}");
        assert_eq!(failing.memory.bytes(&failing.key(0)), Some(foreign_bytes), "untouched");
        assert!(failing.uploads.is_settled(), "else whoever drains would wait for ever");
    }))
    .await;
}

/// A store that lets a create go on only when it is told to, and counts those that wait.
#[derive(Debug, Clone)]
struct Gated {
    memory: MemoryStore,
    gate: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    waiting_most: Arc<AtomicUsize>,
}

#[async_trait::async_trait]
impl Store for Gated {
    async fn create(&self, key: &Key, body: Body) -> Result<(), StoreError> {
        let waiting = self.waiting.fetch_add(1, Ordering::SeqCst) + 1;
        self.waiting_most.fetch_max(waiting, Ordering::SeqCst);
        self.gate.acquire().await.unwrap().forget();
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.memory.create(key, body).await
    }

    async fn read(
        &self,
        key: &Key,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<Reading, StoreError> {
        self.memory.read(key, range).await
    }

    fn list(
        &self,
        prefix: &Key,
    ) -> futures_util::stream::BoxStream<'static, Result<Listed, StoreError>> {
        self.memory.list(prefix)
    }

    async fn list_level(&self, prefix: &Key) -> Result<Level, StoreError> {
        self.memory.list_level(prefix).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.memory.delete(key).await
    }

    fn describe(&self) -> String {
        self.memory.describe()
    }
}

#[tokio::test]
async fn with_four_at_a_time_a_slow_store_has_four_puts_at_once_and_never_a_fifth() {
    let memory = MemoryStore::new();
    let gate = Arc::new(Semaphore::new(0));
    let (waiting, waiting_most) = (Arc::default(), Arc::default());
    let store = Gated { memory: memory.clone(), gate, waiting, waiting_most };
    let place = Repository::new(Arc::new(store.clone()), "main".parse().unwrap());
    let (_, pieces) = received(&place, 700);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    let policy = CutPolicy { rpo: Duration::ZERO, synchronous: true, uploads_max: 4 };
    let uncut = Uncut { since: Some(Duration::ZERO), commits: 1, hurry: true };
    let may_cut = |uploads: &Uploads| {
        when_to_cut(&policy, &uncut, uploads.pieces(), Duration::ZERO) == Cut::Now
    };
    let mut waits = pieces[..40].iter();
    for told in 0..40 {
        // As whoever streams: a piece is cut whenever an upload is free.
        while may_cut(&uploads)
            && let Some(piece) = waits.next()
        {
            uploads.put_piece(segment(), piece.clone());
        }
        let expected = 4.min(40 - told);
        assert_eq!(uploads.pieces(), expected);
        // All of them come to the store without one having ended.
        let all_are_there = async {
            while store.waiting.load(Ordering::SeqCst) < expected {
                assert!(uploads.next().now_or_never().is_none(), "nothing is stored yet");
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(LIMIT, all_are_there).await.unwrap();
        assert_eq!(memory.keys().len(), told);
        store.gate.add_permits(1);
        let stored = tokio::time::timeout(LIMIT, uploads.next()).await.unwrap().unwrap();
        assert!(matches!(stored, Settled::Stored(_)));
        assert_eq!(memory.keys().len(), told + 1);
    }
    assert!(uploads.is_empty());
    assert_eq!(store.waiting_most.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn pieces_are_waited_for_only_until_their_unit_is_stored_and_kept_only_until_the_next_is() {
    let memory = MemoryStore::new();
    let faults = FaultStore::new(Arc::new(memory.clone()));
    let place = Repository::new(Arc::new(faults.clone()), "main".parse().unwrap());
    let (mut assembly, pieces) = received(&place, 700);
    let mut uploads = Uploads::new(&place, SYSTEM, size());
    faults.inject(Fault::anywhere().key_contains(".parts/").for_ever());
    for piece in &pieces[..2] {
        uploads.put_piece(segment(), piece.clone());
    }
    uploads.put_unit(segment(), unit_of(&mut assembly));
    while !uploads.is_settled() {
        uploads.next().await.unwrap();
    }
    assert_eq!(memory.keys().len(), 1, "the unit alone is stored");
    assert_eq!(uploads.pieces(), 0, "they are in nobody's way");
    assert!(uploads.has_piece_of(segment()), "tidying now would miss what arrives yet");
    let next = SegmentName::new(Timeline(1), 3, size());
    let stored = Stored {
        purpose: Purpose::Unit,
        segment: next,
        start_lsn: Lsn(3 << 20),
        end_lsn: Lsn(4 << 20),
        object_bytes: 0,
    };
    uploads.unit_bytes += 1;
    uploads.forget(&stored);
    assert!(!uploads.has_piece_of(segment()), "given up");
    assert!(matches!(uploads.next().await.unwrap(), Settled::Tidied(_)));
    assert!(uploads.is_empty());
}

#[tokio::test]
async fn a_segment_of_somebody_else_over_acknowledged_pieces_is_said_with_both_names() {
    for has_pieces in [true, false] {
        let memory = MemoryStore::new();
        let place = repository(&memory);
        let mut uploads = Uploads::new(&place, SYSTEM, size());
        uploads.put_unit(segment(), unit_of(&mut received(&place, 900).0));
        while !uploads.is_empty() {
            uploads.next().await.unwrap();
        }
        let theirs = memory.keys().remove(0);
        let (mut assembly, pieces) = received(&place, 700);
        if has_pieces {
            uploads.put_piece(segment(), pieces[0].clone());
            assert!(matches!(uploads.next().await.unwrap(), Settled::Stored(_)));
        }
        uploads.put_unit(segment(), unit_of(&mut assembly));
        assert!(matches!(uploads.next().await.unwrap(), Settled::Sealed(_)));
        let failure = uploads.next().await.err().unwrap();
        assert_eq!(failure.kind, Kind::Conflict);
        if has_pieces {
            let stem = pieces[0].key.as_str().rsplit_once('/').unwrap().0;
            assert!(failure.unharmed.contains(stem) && failure.unharmed.contains(&theirs));
            assert!(failure.next.contains(&theirs), "{}", failure.next);
        } else {
            assert_eq!(failure.unharmed, UNHARMED);
        }
    }
}

/// Two servers write one timeline, and each has a receiver: whoever completes the segment leaves the other's pieces.
#[tokio::test]
async fn of_two_receivers_neither_removes_what_the_other_was_acknowledged_unless_it_is_the_same() {
    for is_same in [true, false] {
        let memory = MemoryStore::new();
        let place = repository(&memory);
        let mut theirs = Uploads::new(&place, SYSTEM, size());
        let (_, pieces) = received(&place, if is_same { 700 } else { 900 });
        let acknowledged: Vec<String> =
            pieces[7..12].iter().map(|piece| piece.key.to_string()).collect();
        for piece in &pieces[7..12] {
            theirs.put_piece(segment(), piece.clone());
            theirs.next().await.unwrap();
        }
        let mut uploads = Uploads::new(&place, SYSTEM, size());
        let (mut assembly, pieces) = received(&place, 700);
        for piece in &pieces[..7] {
            uploads.put_piece(segment(), piece.clone());
            uploads.next().await.unwrap();
        }
        uploads.put_unit(segment(), unit_of(&mut assembly));
        while !uploads.is_empty() {
            uploads.next().await.unwrap();
        }
        assert!(uploads.take_pieced(segment()));
        uploads.tidy(segment(), None);
        let tidied = uploads.next().await;
        let left: Vec<String> =
            memory.keys().into_iter().filter(|key| key.contains(".parts/")).collect();
        if is_same {
            assert!(matches!(tidied, Ok(Settled::Tidied(Some(named))) if named == segment()));
            assert_eq!(left, Vec::<String>::new());
        } else {
            let failure = tidied.err().unwrap();
            assert_eq!(failure.kind, Kind::Conflict);
            assert!(failure.to_string().contains(&acknowledged[0]), "{failure}");
            assert_eq!(left, acknowledged);
        }
    }
}

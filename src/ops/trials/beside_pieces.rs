//! A complete segment that comes where pieces of it stand: it holds the same WAL, or another server has written it.

use std::time::Duration;

use futures_util::FutureExt;

use super::archive::{Archive, MODES, SIZE_BYTES, SYSTEM};
use crate::failure::Kind;
use crate::format::WalObject;
use crate::pg::wal_build::{RecordSpec, build_segment};
use crate::pg::{SegmentName, Timeline, WalFileName};
use crate::repo::{Comparison, Put, Rival};
use crate::store::faults::{Call, Fault, Symptom};
use crate::store::{Key, Store};

const NUMBER: u64 = 2;

fn name(archive: &Archive) -> SegmentName {
    SegmentName::new(Timeline(1), NUMBER, archive.size)
}

/// Two segments of one name that are the same up to the middle: both are sound.
fn two_histories(archive: &Archive) -> [Vec<u8>; 2] {
    let bytes = u32::from(archive.size) as usize;
    [1, 2].map(|last| {
        let mut records = vec![RecordSpec::filler(bytes / 20); 10];
        records.extend(vec![RecordSpec::filler(bytes / 20 + last * 800); 6]);
        build_segment(Timeline(1), NUMBER, archive.size, SYSTEM, &records)
    })
}

/// The offsets of pieces: one in the part that is the same, then some that differ.
fn cuts(archive: &Archive) -> Vec<u32> {
    let end = u32::from(archive.size);
    // No piece crosses from one unit to the next.
    let units = (0..=end).step_by(end.min(16 << 20) as usize);
    let mut cuts: Vec<u32> =
        units.chain([end / 8, end / 8 * 5 + 4321, end / 8 * 5 + 4322]).collect();
    cuts.sort_unstable();
    cuts
}

#[tokio::test]
async fn a_segment_over_pieces_of_another_server_is_refused_and_nothing_is_stored() {
    for segment_bytes in [SIZE_BYTES, 16 << 20, 64 << 20] {
        let archive = Archive::claimed(segment_bytes).await;
        let [ours, theirs] = two_histories(&archive);
        let mut cuts = cuts(&archive);
        // Of a large segment, the last unit came without pieces inside.
        cuts.truncate(cuts.len() - 1);
        archive.put_pieces(NUMBER, &ours, &cuts).await;
        let (before, name) = (archive.memory.keys(), name(&archive).to_string());
        let refused = archive.push(&name, &theirs).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Conflict);
        let told = format!("{refused} {}", refused.next);
        assert!(told.contains(&name) && told.contains(".parts/"), "both are named: {told}");
        let stored = archive.memory.keys();
        let is_large = segment_bytes > 16 << 20;
        assert!(is_large || stored == before, "nothing is stored");
        assert!(before.iter().all(|key| stored.contains(key)));

        let report = archive.push(&name, &ours).await.unwrap();
        assert_eq!(report.outcome, Put::Stored);
        assert!(archive.get(&name).await.1.unwrap() == ours);
        let compared = archive.calm.compare_pieces(SYSTEM, self::name(&archive), archive.size);
        let compared = compared.await.unwrap();
        // One of them is a unit itself.
        let mut inside =
            cuts.windows(2).map(|at| (at[0], at[1])).filter(|(start, end)| end - start < 16 << 20);
        assert!(compared.rival.is_none() && inside.all(|at| compared.same.contains(&at)));
    }
}

/// They came in the moment in which the other was stored, and their receiver died.
#[tokio::test]
async fn pieces_that_hold_other_wal_than_the_object_around_them_are_found() {
    for segment_bytes in [SIZE_BYTES, 64 << 20] {
        let archive = Archive::claimed(segment_bytes).await;
        let [ours, theirs] = two_histories(&archive);
        let segment = name(&archive);
        archive.push(&segment.to_string(), &theirs).await.unwrap();
        let compare = || archive.calm.compare_pieces(SYSTEM, segment, archive.size);
        let same = u32::from(archive.size) / 8;
        archive.put_pieces(NUMBER, &ours, &[0, same]).await;
        assert_eq!(compare().await.unwrap(), Comparison { rival: None, same: [(0, same)].into() });
        let at = same * 5 + 4321;
        archive.put_pieces(NUMBER, &ours, &[at, at + 60_000]).await;
        let Rival { piece, complete } = compare().await.unwrap().rival.unwrap();
        let start = format!(".parts/{at:08X}-");
        assert!(piece.as_str().contains(&start), "{piece}");
        let is_large = segment_bytes > 16 << 20;
        assert_eq!(complete.as_str().contains(".parts/"), is_large, "{complete}");
        let inventory = archive.calm.wal_inventory(SYSTEM, archive.size).await.unwrap();
        assert_eq!(inventory.timelines[&Timeline(1)].beside, [segment]);
    }
}

/// A receiver merges them meanwhile, or completes the segment, of the same WAL or of other.
#[tokio::test]
async fn pieces_that_go_while_they_are_compared_are_looked_for_again() {
    let end = SIZE_BYTES;
    for (merged, other) in [(true, false), (true, true), (false, false), (false, true)] {
        let archive = Archive::claimed(SIZE_BYTES).await;
        let [ours, theirs] = two_histories(&archive);
        let (segment, stored) = (name(&archive), if other { &theirs } else { &ours });
        let name = segment.to_string();
        // What will stand in their place.
        if merged {
            archive.put_pieces(NUMBER, stored, &[0, end]).await;
        } else {
            archive.push(&name, stored).await.unwrap();
        }
        let (larger, at) = {
            let object = if merged {
                WalObject::Piece { segment, start: 0, end }
            } else {
                WalObject::File(WalFileName::Segment(segment))
            };
            let key = archive.calm.wal_key(SYSTEM, object);
            (archive.memory.bytes(key.as_str()).unwrap(), key)
        };
        archive.calm.store().delete(&at).await.unwrap();
        archive.put_pieces(NUMBER, &ours, &[0, end / 8, end / 4]).await;
        let memory = archive.memory.clone();
        let pieces = archive.keys_below(".parts/");
        let is_piece = pieces.clone();
        let fault = Fault::on(Call::Read).for_ever().symptom(Symptom::Slow(Duration::ZERO));
        archive.faults.inject(fault.hook(move |_, key: &Key| {
            if is_piece.iter().any(|piece| piece == key.as_str()) {
                memory.overwrite(at.as_str(), larger.clone());
                for piece in &pieces {
                    memory.delete(&Key::new(piece.clone())).now_or_never().unwrap().unwrap();
                }
            }
        }));
        let pushed = archive.push(&name, &ours).await;
        if other {
            assert_eq!(pushed.unwrap_err().kind, Kind::Conflict, "merged: {merged}");
        } else {
            let expected = if merged { Put::Stored } else { Put::AlreadyThere };
            assert_eq!(pushed.unwrap().outcome, expected);
        }
    }
}

/// A piece that lost its bits would else keep the server from ever archiving the segment.
#[tokio::test]
async fn a_piece_that_cannot_be_read_keeps_no_segment_from_being_stored() {
    let archive = Archive::claimed(SIZE_BYTES).await;
    let [ours, theirs] = two_histories(&archive);
    archive.put_pieces(NUMBER, &ours, &cuts(&archive)).await;
    let pieces = archive.keys_below(".parts/");
    archive.memory.overwrite(&pieces[0], "no header");
    let name = name(&archive).to_string();
    assert_eq!(archive.push(&name, &theirs).await.unwrap_err().kind, Kind::Conflict);
    archive.push(&name, &ours).await.unwrap();
    assert!(archive.get(&name).await.1.unwrap() == ours);
}

/// Every call that fails on the way is the store's failure, and the next push settles it.
#[tokio::test]
async fn a_push_over_pieces_that_fails_anywhere_succeeds_when_repeated() {
    for mode in MODES {
        for n in 1.. {
            let archive = Archive::claimed(SIZE_BYTES).await;
            let [ours, theirs] = two_histories(&archive);
            archive.put_pieces(NUMBER, &ours, &cuts(&archive)).await;
            let name = name(&archive).to_string();
            archive.faults.inject(mode(n));
            let outcome = archive.push(&name, &theirs).await;
            let struck = archive.faults.calls().len() as u64 >= n;
            archive.faults.heal();
            let kind = outcome.unwrap_err().kind;
            assert!(matches!(kind, Kind::Conflict | Kind::Store), "call {n}: {kind:?}");
            assert!(!archive.memory.keys().iter().any(|key| key.ends_with(&name)), "call {n}");
            archive.push(&name, &ours).await.unwrap();
            if !struck {
                assert!(kind == Kind::Conflict && n > 3, "the fault never struck");
                break;
            }
        }
    }
}

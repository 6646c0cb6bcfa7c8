//! Segments above 16 MiB, which are stored as pieces only.

use super::archive::{Archive, SYSTEM};
use crate::failure::Kind;
use crate::pg::wal_build::{RecordSpec, build_segment};
use crate::pg::{Lsn, SegmentName, Timeline};
use crate::repo::{PIECE_BYTES, Put, SegmentSource};
use crate::store::Key;
use crate::store::faults::{Call, Fault};

const SEGMENT_BYTES: u32 = 64 << 20;
const PIECE: usize = PIECE_BYTES as usize;

#[tokio::test]
async fn a_large_segment_is_pieces_and_comes_back_as_far_as_they_are_unbroken() {
    let archive = Archive::claimed(SEGMENT_BYTES).await;
    let records = vec![RecordSpec::filler(1 << 20); 52];
    let bytes = build_segment(Timeline(1), 3, archive.size, SYSTEM, &records);
    let name = SegmentName::new(Timeline(1), 3, archive.size).to_string();

    // The third piece cannot be stored: the push fails, and what is stored is a prefix.
    archive.faults.inject(Fault::on(Call::Create).nth(3));
    assert_eq!(archive.push(&name, &bytes).await.unwrap_err().kind, Kind::Store);
    archive.faults.heal();
    assert_eq!(archive.keys_below(".parts/").len(), 2);
    assert_prefix(&archive, &name, &bytes, 2 * PIECE).await;

    assert_eq!(archive.push(&name, &bytes).await.unwrap().outcome, Put::Stored);
    assert_eq!(archive.push(&name, &bytes).await.unwrap().outcome, Put::AlreadyThere);
    let pieces = archive.keys_below(".parts/");
    assert_eq!(pieces.len(), 4);
    assert_prefix(&archive, &name, &bytes, 4 * PIECE).await;

    // A hole ends what is handed out, and what counts as stored; pieces behind it do not count.
    archive.calm.store().delete(&Key::new(pieces[1].clone())).await.unwrap();
    assert_prefix(&archive, &name, &bytes, PIECE).await;
    archive.calm.store().delete(&Key::new(pieces[0].clone())).await.unwrap();
    let (outcome, handed_out) = archive.get(&name).await;
    assert_eq!((outcome.unwrap_err().kind, handed_out), (Kind::Absent, None));
}

async fn assert_prefix(archive: &Archive, name: &str, bytes: &[u8], valid: usize) {
    let (outcome, handed_out) = archive.get(name).await;
    let source = Some(SegmentSource::Pieces { valid_bytes: valid as u64 });
    assert_eq!(outcome.unwrap().source, source);
    let handed_out = handed_out.unwrap();
    assert_eq!(handed_out.len(), bytes.len());
    assert!(handed_out[..valid] == bytes[..valid], "the valid part differs");
    assert!(handed_out[valid..].iter().all(|byte| *byte == 0), "zeros behind it");
    let inventory = archive.calm.wal_inventory(SYSTEM, archive.size).await.unwrap();
    let start = archive.size.start_of(3);
    let stored = &inventory.timelines[&Timeline(1)].ranges;
    assert_eq!(*stored, [(start, Lsn(start.0 + valid as u64))]);
}

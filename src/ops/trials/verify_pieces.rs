//! `verify` on pieces that stand beside the complete segment.

use super::archive::Archive;
use crate::format::Depth;
use crate::ops::verify::Report;

fn told(report: &Report) -> Vec<(&str, &str)> {
    let told = report.findings.iter();
    told.map(|one| (one.fault, one.object.as_deref().unwrap_or_default())).collect()
}

/// A copy of the cluster has stored a complete segment of which this cluster's pieces stand there.
#[tokio::test]
async fn pieces_that_hold_other_wal_than_the_complete_segment_are_found() {
    let (archive, _) = Archive::with_backups().await;
    let (name, bytes) = archive.segment(5);
    archive.push(&name, &bytes).await.unwrap();
    archive.put_pieces(5, &bytes, &[0, 1 << 18, 1 << 19]).await;
    let report = archive.verify(Depth::Whole).await;
    assert_eq!((told(&report), report.failed().is_some()), (vec![], false), "they are the same");

    let mut theirs = bytes.clone();
    *theirs.last_mut().unwrap() ^= 1;
    archive.put_pieces(5, &theirs, &[1 << 19, 1 << 20]).await;
    let piece = archive.keys_below(".parts/00080000-00100000").remove(0);
    let report = archive.verify(Depth::Whole).await;
    assert_eq!(told(&report), [("differs", piece.as_str())]);
    assert!(report.failed().is_some());
    let finding = &report.findings[0];
    assert!(finding.what.contains(&format!("/{name}`")), "both are named: {finding:?}");
    assert!(finding.consequence.contains(&name) && !finding.remedy.is_empty(), "{finding:?}");
    // The header of each says what its name says.
    assert_eq!(told(&archive.verify(Depth::Header).await), []);
}

//! Segments too large for one object: walked once whole, then once more piece by piece.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::damaged::settle;
use super::{
    Push, READ_BYTES, ReadError, Report, Request, UNHARMED, each_block, expectation,
    read_until_whole, refusal, unreadable,
};
use crate::failure::{Failure, Kind};
use crate::format::{Codec, Header, Identity, Kind as ObjectKind, SummaryBuilder, WalObject};
use crate::ops::failures::of_repo;
use crate::pg::{Extent, Lsn, SegmentExpectation, SegmentName, SegmentWalk, Timeline, WalFileName};
use crate::repo::{PIECE_BYTES, Put, SealedObject, WalSealer};

/// What a segment was when it was walked whole.
struct Walked {
    /// The digest of each piece.
    pieces: Vec<blake3::Hash>,
    /// The digest of all of it.
    whole: blake3::Hash,
}

/// Stores a large segment.
pub(super) async fn push_segment(
    push: Push<'_>,
    segment: SegmentName,
    identity: &Identity,
    expectation: SegmentExpectation,
) -> Result<Report, Failure> {
    let walk = {
        let request = push.request.clone();
        move || walk_pieces(&request, expectation)
    };
    match read_until_whole(push, walk).await? {
        Ok(walked) => push_pieces(push, segment, identity, walked).await,
        Err(damage) => settle(push.repository, push.request, segment, identity, damage).await,
    }
}

/// Walks a large segment and hashes it, as a whole and piece by piece.
fn walk_pieces(request: &Request, expectation: SegmentExpectation) -> Result<Walked, ReadError> {
    let mut walk = SegmentWalk::new(expectation);
    let mut pieces = Vec::new();
    let mut whole = blake3::Hasher::new();
    let mut hasher = blake3::Hasher::new();
    let mut in_piece = 0;
    each_block(&request.path, expectation.segment_size.bytes(), |mut block| {
        walk.feed(block)?;
        whole.update(block);
        while !block.is_empty() {
            let (now, later) = block.split_at(block.len().min(PIECE_BYTES as usize - in_piece));
            hasher.update(now);
            in_piece += now.len();
            block = later;
            if in_piece == PIECE_BYTES as usize {
                pieces.push(std::mem::take(&mut hasher).finalize());
                in_piece = 0;
            }
        }
        Ok(())
    })?;
    walk.finish()?;
    Ok(Walked { pieces, whole: whole.finalize() })
}

/// Stores a large segment piece by piece; each must be what the walk has seen.
async fn push_pieces(
    push: Push<'_>,
    segment: SegmentName,
    identity: &Identity,
    walked: Walked,
) -> Result<Report, Failure> {
    let Push { repository, request, .. } = push;
    let expectation = expectation(request, segment, identity, Extent::Whole)?;
    let mut walk = SegmentWalk::new(expectation);
    let mut report = Report {
        name: WalFileName::Segment(segment),
        outcome: Put::AlreadyThere,
        plain_bytes: identity.segment_size.bytes(),
        stored_bytes: 0,
        blake3: Some(walked.whole.to_hex().to_string()),
    };
    let mut file = File::open(&request.path).map_err(|error| unreadable(&request.path, error))?;
    for (number, digest) in (0u32..).zip(walked.pieces) {
        let start = number * PIECE_BYTES;
        let piece = WalObject::Piece { segment, start, end: start + PIECE_BYTES };
        let key = repository.wal_key(identity.system_identifier, piece);
        let mut header = Header::new(
            ObjectKind::Piece,
            repository.below(&key),
            identity.system_identifier,
            request.codec.packing(),
        );
        let piece_lsn = Lsn(expectation.start_lsn.0 + u64::from(start));
        let sealed = seal_piece(&mut file, &mut walk, &mut header, request.codec, piece_lsn)
            .map_err(|error| match error {
                ReadError::Damage(damage) => refusal(&request.path, damage),
                ReadError::Io(error) => unreadable(&request.path, error),
            })?;
        if sealed.header.blake3.as_deref() != Some(digest.to_hex().as_str()) {
            return Err(changed_while_read(&request.path));
        }
        report.stored_bytes += sealed.header.stored_bytes;
        let what = format!("could not store a piece of `{segment}`");
        match repository.put_complete(piece, sealed).await {
            Ok((Put::Stored, _)) => report.outcome = Put::Stored,
            Ok((Put::AlreadyThere, _)) => {}
            Err(error) => return Err(of_repo(error, what, UNHARMED)),
        }
    }
    Ok(report)
}

fn seal_piece(
    file: &mut File,
    walk: &mut SegmentWalk,
    header: &mut Header,
    codec: Codec,
    start_lsn: Lsn,
) -> Result<SealedObject, ReadError> {
    let mut sealer = WalSealer::new(codec, Some(u64::from(PIECE_BYTES)))?;
    let mut summary = SummaryBuilder::new(Timeline::FIRST, start_lsn);
    let mut block = vec![0; READ_BYTES];
    let mut left = PIECE_BYTES as usize;
    while left > 0 {
        let n = file.read(&mut block[..left.min(READ_BYTES)])?;
        if n == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
        walk.feed_with(&block[..n], &mut |mark| summary.add(mark))?;
        sealer.push(&block[..n])?;
        left -= n;
    }
    summary.reach(walk, Lsn(start_lsn.0 + u64::from(PIECE_BYTES)));
    header.wal = Some(summary.finish_piece());
    Ok(sealer.finish(header.clone())?)
}

fn changed_while_read(path: &Path) -> Failure {
    Failure::new(
        Kind::Integrity,
        format!("`{}` changed while it was read", path.display()),
        UNHARMED,
        "PostgreSQL tries again by itself. If this goes on, something else writes into pg_wal.",
    )
}

//! Moving past a segment that the server itself has damaged.
//!
//! Such a segment is refused, which stops archiving. The operator who has seen that `pg_waldump`
//! refuses it as well accepts it: it is stored as `<segment>.damaged`, which no recovery
//! ever asks for, so that the hole stays visible. From then on PostgreSQL's own
//! attempts with the very same bytes succeed, and archiving goes on behind it.

use super::{ReadError, Report, Request, UNHARMED, each_block, refusal, unreadable};
use crate::failure::Failure;
use crate::format::{Header, Identity, Kind as ObjectKind, SummaryBuilder, WalObject, WalSummary};
use crate::ops::failures::of_repo;
use crate::pg::{Extent, SegmentExpectation, SegmentName, SegmentWalk, WalDamage, WalFileName};
use crate::repo::{Put, Repository, SealedObject, WHOLE_SEGMENT_BYTES_MAX, WalSealer};

/// Decides about a segment whose damage was found: refused, stored as damaged, or accepted before.
pub(super) async fn settle(
    repository: &Repository,
    request: &Request,
    segment: SegmentName,
    identity: &Identity,
    damage: WalDamage,
) -> Result<Report, Failure> {
    if damage.is_wrong_identity() {
        return Err(refusal(&request.path, damage));
    }
    let key = repository.wal_key(identity.system_identifier, WalObject::Damaged(segment));
    let header = Header::new(
        ObjectKind::Damaged,
        repository.below(&key),
        identity.system_identifier,
        request.codec.packing(),
    );
    let sealed = seal(request, segment, identity, header).map_err(|error| match error {
        ReadError::Damage(damage) => refusal(&request.path, damage),
        ReadError::Io(error) => unreadable(&request.path, error),
    })?;
    let failed = |error| {
        of_repo(error, format!("could not settle the damaged segment `{segment}`"), UNHARMED)
    };
    let outcome = if request.accept_damaged {
        repository.put_sealed(&key, &sealed).await.map_err(failed)?
    } else {
        match repository.header(&key).await {
            Ok(accepted) if accepted.blake3 == sealed.header.blake3 => Put::AlreadyThere,
            Ok(_) => return Err(refusal(&request.path, damage)),
            Err(error) if error.is_absent() => return Err(refusal(&request.path, damage)),
            Err(error) => return Err(failed(error)),
        }
    };
    tracing::warn!(
        "`{segment}` is stored as damaged: no recovery can pass it ({damage}). Take a new base backup now"
    );
    Ok(Report {
        name: WalFileName::Segment(segment),
        outcome,
        plain_bytes: sealed.header.plain_bytes,
        stored_bytes: sealed.header.stored_bytes,
        blake3: None,
    })
}

/// Seals the file as it is; of one too large for a single object only its digest is kept.
fn seal(
    request: &Request,
    segment: SegmentName,
    identity: &Identity,
    mut header: Header,
) -> Result<SealedObject, ReadError> {
    let is_small = identity.segment_size.bytes() <= WHOLE_SEGMENT_BYTES_MAX;
    let mut sealer = WalSealer::new(request.codec, None)?;
    let mut hasher = blake3::Hasher::new();
    let mut valid = Prefix::new(segment, identity);
    each_block(&request.path, identity.segment_size.bytes(), |block| {
        valid.feed(block);
        hasher.update(block);
        if is_small { Ok(sealer.push(block)?) } else { Ok(()) }
    })?;
    if !is_small {
        sealer.push(format!("blake3 {}\n", hasher.finalize().to_hex()).as_bytes())?;
    }
    header.wal = valid.finish();
    Ok(sealer.finish(header)?)
}

/// The walk over what is still valid at the segment's start.
struct Prefix {
    walk: Option<(SegmentWalk, SummaryBuilder)>,
}

impl Prefix {
    fn new(segment: SegmentName, identity: &Identity) -> Self {
        let system_id = Some(identity.system_identifier);
        let size = identity.segment_size;
        let expectation = SegmentExpectation::of(segment, size, system_id, Extent::Prefix);
        let walk = expectation.map(|expectation| {
            let summary = SummaryBuilder::new(segment.timeline, expectation.start_lsn);
            (SegmentWalk::new(expectation), summary)
        });
        Self { walk }
    }

    fn feed(&mut self, block: &[u8]) {
        if let Some((walk, summary)) = &mut self.walk
            && walk.feed_with(block, &mut |mark| summary.add(mark)).is_err()
        {
            self.walk = None;
        }
    }

    fn finish(self) -> Option<WalSummary> {
        let (walk, summary) = self.walk?;
        walk.finish().ok().map(|facts| summary.finish(&facts))
    }
}

/// What to tell an operator who has a damaged segment before him.
pub(super) fn advice(path: &std::path::Path) -> String {
    let file = path.display();
    format!(
        "Archiving stops here until this is settled. Run `pg_waldump {file}`. If it reads to the end, please report this as a defect. If it complains as well, the server's WAL is damaged: look at the disk, run `highwater archive-push --accept-damaged {file}` in the data directory, which stores the file as damaged so that archiving goes on behind it, and take a new base backup at once, since no recovery can pass this segment."
    )
}

//! Reading one segment: fetched, walked and folded as it streams by.

use std::io;
use std::sync::Arc;

use crate::format::WalObject;
use crate::pg::{
    Extent, Lsn, SegmentExpectation, SegmentName, SegmentSize, SegmentWalk, SystemId, WalCarry,
    WalFileName, WalRecord,
};
use crate::plan::log::filter::{Filter, Outside, SegmentTimes};
use crate::plan::log::fold::{Keep, Pass, SegmentFold};
use crate::plan::log::route::SegmentStop;
use crate::repo::{RepoError, Repository};
use crate::store::Key;

/// How much of a segment's beginning is held, for the record that began in the one before. A longer
/// record makes the segment be read a second time.
const HEAD_BYTES_MAX: usize = 1 << 20;

/// What every read needs.
#[derive(Debug, Clone)]
pub(super) struct Source {
    pub(super) repository: Repository,
    pub(super) system_id: SystemId,
    pub(super) size: SegmentSize,
    pub(super) filter: Arc<Filter>,
    pub(super) order: Keep,
}

/// What became of a segment.
pub(super) enum Scanned {
    /// It was read.
    Read(Box<SegmentRead>),
    /// Nothing in it is wanted, so it was not read.
    Skipped(Skipped),
    /// It is not there, or cannot be read.
    Lost(String),
}

/// Why a segment was not read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Skipped {
    pub(super) outside: Outside,
    /// Whether its place alone says so, and so of every segment beyond.
    pub(super) is_by_place: bool,
}

/// A segment that was read.
pub(super) struct SegmentRead {
    pub(super) fold: SegmentFold,
    pub(super) pass: Pass,
    /// What a walk of the next segment goes on with; `None` where valid WAL ended before the segment did.
    pub(super) carry: Option<WalCarry>,
    /// Whether a record goes on into the next segment.
    pub(super) is_open: bool,
    /// The end of valid WAL in it.
    pub(super) valid_end: Lsn,
    /// Its beginning up to its first record.
    pub(super) head: Head,
}

/// The beginning of a segment up to its first record.
#[derive(Debug, Clone, Default)]
pub(super) struct Head {
    bytes: Vec<u8>,
    /// Whether the first record was found before the bytes were too many.
    is_whole: bool,
    is_ended: bool,
}

impl Head {
    fn take(&mut self, block: &[u8], first_record: Option<Lsn>, start: Lsn) {
        if self.is_ended {
            return;
        }
        self.bytes.extend_from_slice(block);
        if let Some(first) = first_record {
            self.bytes.truncate(usize::try_from(first.0 - start.0).unwrap_or(usize::MAX));
            (self.is_whole, self.is_ended) = (true, true);
        } else if self.bytes.len() > HEAD_BYTES_MAX {
            (self.bytes, self.is_ended) = (Vec::new(), true);
        }
    }
}

impl Source {
    /// Reads a segment, or says why not. `is_needed`: read it even if nothing that ends in it is wanted.
    ///
    /// # Errors
    /// The store's; damage of this segment is [`Scanned::Lost`].
    pub(super) async fn scan(
        &self,
        stop: SegmentStop,
        is_needed: bool,
    ) -> Result<Scanned, RepoError> {
        if !is_needed && let Some(skipped) = self.skipped(stop).await? {
            return Ok(Scanned::Skipped(skipped));
        }
        let behind = self.size.start_of(stop.number + 1);
        let end_max = if stop.end_lsn < behind { stop.end_lsn } else { Lsn(u64::MAX) };
        let pass = Pass::whole(self.order, end_max);
        self.read(stop, pass).await
    }

    /// Reads a segment for one pass.
    pub(super) async fn read(&self, stop: SegmentStop, pass: Pass) -> Result<Scanned, RepoError> {
        let start = self.size.start_of(stop.number);
        let mut fold = SegmentFold::new(pass.clone());
        let mut head = Head::default();
        let mut first_record = None;
        let walked = self
            .walk(stop.name, None, &mut |block, walk| {
                let fed = walk.feed_records(block, &mut |record| {
                    if record.lsn >= start {
                        first_record.get_or_insert(record.lsn);
                    }
                    fold.add(record, &self.filter);
                });
                head.take(block, first_record, start);
                fed.map_err(io::Error::other)
            })
            .await;
        let walk = match walked {
            Ok(Some(walk)) => walk,
            Ok(None) => return Ok(Scanned::Lost("it is not in the repository any more".into())),
            Err(error @ RepoError::Damaged { .. }) => {
                return Ok(Scanned::Lost(crate::causes::in_one_line(&error)));
            }
            Err(error) => return Err(error),
        };
        let ended = walk.finish_with_carry().map_err(|damage| self.damaged(stop.name, damage));
        let (facts, carry) = match ended {
            Ok(ended) => ended,
            Err(error) => return Ok(Scanned::Lost(crate::causes::in_one_line(&error))),
        };
        Ok(Scanned::Read(Box::new(SegmentRead {
            fold,
            pass,
            carry,
            is_open: facts.incomplete.is_some_and(|open| open.start_lsn.is_some()),
            valid_end: facts.valid_end,
            head,
        })))
    }

    /// Shows the record that goes on from `read` into the next segment to its fold. `head` is that segment's
    /// beginning, if it was read already.
    pub(super) async fn join(
        &self,
        read: &mut SegmentRead,
        stop: SegmentStop,
        head: Option<&Head>,
    ) -> Result<(), RepoError> {
        let (Some(mut carry), Some(mut next)) = (read.carry.take(), stop.next) else {
            return Ok(());
        };
        if !read.is_open {
            return Ok(());
        }
        if let Some(head) = head.filter(|head| head.is_whole) {
            let Some(expectation) = self.expectation(next) else { return Ok(()) };
            let mut walk = SegmentWalk::after(carry, expectation);
            // Damage here is found where that segment itself is read.
            let _ =
                walk.feed_records(&head.bytes, &mut |record| read.fold.add(record, &self.filter));
            return Ok(());
        }
        let start = self.size.start_of(stop.number + 1);
        loop {
            let mut is_done = false;
            let walked = self
                .walk(next, Some(carry), &mut |block, walk| {
                    let fed = walk.feed_records(block, &mut |record| {
                        if !is_done && record.lsn < start {
                            read.fold.add(record, &self.filter);
                        }
                        is_done = true;
                    });
                    fed.map_err(io::Error::other)
                })
                .await;
            let walk = match walked {
                Ok(Some(walk)) => walk,
                Ok(None) | Err(RepoError::Damaged { .. }) => return Ok(()),
                Err(error) => return Err(error),
            };
            let Ok((_, Some(left))) = walk.finish_with_carry() else { return Ok(()) };
            if is_done {
                return Ok(());
            }
            // A record longer than a segment.
            carry = left;
            let number = start_number(next, self.size) + 1;
            next = SegmentName::new(next.timeline, number, self.size);
        }
    }

    /// Walks a segment as it streams by; `feed` gives each block to the walk. `None` if it is not there.
    pub(super) async fn walk(
        &self,
        name: SegmentName,
        carry: Option<WalCarry>,
        feed: &mut (dyn FnMut(&[u8], &mut SegmentWalk) -> io::Result<()> + Send),
    ) -> Result<Option<SegmentWalk>, RepoError> {
        let expectation = self
            .expectation(name)
            .ok_or_else(|| self.damaged(name, "its name does not fit the segment size"))?;
        let mut walk = match carry {
            Some(carry) => SegmentWalk::after(carry, expectation),
            None => SegmentWalk::new(expectation),
        };
        let sink = |block: &[u8]| feed(block, &mut walk);
        match self.repository.fetch_segment(self.system_id, name, self.size, sink).await {
            Ok(Some(_)) => Ok(Some(walk)),
            Ok(None) => Ok(None),
            // Our own refusal of what the store gave.
            Err(RepoError::Sink { cause, .. }) => Err(self.damaged(name, cause)),
            Err(error) => Err(error),
        }
    }

    fn expectation(&self, name: SegmentName) -> Option<SegmentExpectation> {
        SegmentExpectation::of(name, self.size, Some(self.system_id), Extent::Prefix)
    }

    fn damaged(&self, name: SegmentName, why: impl std::fmt::Display) -> RepoError {
        RepoError::Damaged {
            key: Key::new(self.repository.place().wal_group_dir(self.system_id, &name.group())),
            why: format!("segment {name}: {why}"),
        }
    }

    /// Returns why a segment needs not be read, from its place or from what its header and that of the next one say.
    async fn skipped(&self, stop: SegmentStop) -> Result<Option<Skipped>, RepoError> {
        let start = self.size.start_of(stop.number);
        let behind = self.size.start_of(stop.number + 1);
        if let Some(outside) = self.filter.outside_by_place(start, behind) {
            return Ok(Some(Skipped { outside, is_by_place: true }));
        }
        if !self.filter.has_time() {
            return Ok(None);
        }
        let Some(own) = self.times(stop.name).await? else { return Ok(None) };
        // Most often one header is enough.
        let by_own = self.filter.outside_by_time(own, None);
        let outside = match (by_own, stop.next) {
            (Some(outside), _) => Some(outside),
            (None, Some(next)) if self.filter.outside_by_time(own, own.or(NEVER)).is_some() => {
                let next = self.times(next).await?.flatten();
                self.filter.outside_by_time(own, next)
            }
            _ => None,
        };
        Ok(outside.map(|outside| Skipped { outside, is_by_place: false }))
    }

    /// Reads which times a segment's header tells; the inner `None` without any commit or abort. `None` where
    /// no complete segment stands for it, or restore points are wanted that may lie elsewhere.
    async fn times(&self, name: SegmentName) -> Result<Option<Option<SegmentTimes>>, RepoError> {
        let object = WalObject::File(WalFileName::Segment(name));
        let key = self.repository.wal_key(self.system_id, object);
        let header = match self.repository.header(&key).await {
            Ok(header) => header,
            Err(error) if error.is_absent() => return Ok(None),
            Err(RepoError::Damaged { .. } | RepoError::NotReadable { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Some(wal) = header.wal else { return Ok(None) };
        if wal.restore_points_unlisted > 0 {
            return Ok(None);
        }
        let points = wal.restore_points.iter().map(|point| point.time);
        let first = points.clone().chain(wal.first_xact_time).min();
        let last = points.chain(wal.last_xact_time).max();
        Ok(Some(first.zip(last).map(|(first, last)| SegmentTimes { first, last })))
    }
}

/// Stands for a next segment that lies before everything: whether it is worth asking for its header.
const NEVER: Option<SegmentTimes> = Some(SegmentTimes {
    first: crate::pg::PgTimestamp(i64::MIN),
    last: crate::pg::PgTimestamp(i64::MIN),
});

fn start_number(name: SegmentName, size: SegmentSize) -> u64 {
    name.start_lsn(size).map_or(0, |start| size.segment_of(start))
}

/// Shows each record of the segments of a route to `on_record`, oldest first. Records cut by a gap are not seen.
///
/// # Errors
/// The store's; a segment that is damaged or not there is a gap, which `on_gap` is told.
pub(super) async fn each_record(
    source: &Source,
    stops: impl Iterator<Item = SegmentStop>,
    mut on_record: impl FnMut(&WalRecord<'_>) + Send,
    mut on_gap: impl FnMut(SegmentStop, String),
) -> Result<(), RepoError> {
    let mut carry = None;
    for stop in stops {
        let walked = source
            .walk(stop.name, carry.take(), &mut |block, walk| {
                let fed = walk.feed_records(block, &mut |record| {
                    if record.lsn < stop.end_lsn {
                        on_record(record);
                    }
                });
                fed.map_err(io::Error::other)
            })
            .await;
        match walked {
            Ok(Some(walk)) => carry = walk.finish_with_carry().ok().and_then(|(_, carry)| carry),
            Ok(None) => on_gap(stop, "it is not in the repository any more".to_owned()),
            Err(error @ RepoError::Damaged { .. }) => {
                on_gap(stop, crate::causes::in_one_line(&error));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

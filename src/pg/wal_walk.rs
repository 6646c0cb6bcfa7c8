//! Walking a WAL segment as it streams by: is every byte what PostgreSQL wrote,
//! and what does the segment hold?
//!
//! Owns the pages: headers, addresses, flags, timelines. Records are
//! `record_walk`'s part. Takes blocks of any size and holds at most one page
//! header and the beginning of one record. The checks are those of PostgreSQL's
//! `src/backend/access/transam/xlogreader.c`; what `pg_waldump` reads cleanly passes.
//!
//! ```text
//! page 0                    page 1                        page 2
//! [long header|rec|rec|rec..][header|..rec|rec|rec|switch][zeros: never looked at]
//! ```

use super::record_walk::{RecordWalk, Report};
use super::wal_blocks::WalRecord;
use super::wal_damage::WalDamage;
use super::wal_facts::{SegmentFacts, WalMarks, WalkEnd};
use super::wal_page::{
    ClusterFacts, LONG_PAGE_HEADER_BYTES, PageHeader, PageHeaderError, SHORT_PAGE_HEADER_BYTES,
};
use super::wal_record::Mark;
use super::{Lsn, MajorVersion, SegmentName, SegmentSize, SystemId, Timeline};

/// How much of a segment the input is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it: valid WAL reaches to the end or to a switch record, or it is damage.
    Whole,
    /// Its beginning: a `.partial` file, or a piece with what comes before it. Valid
    /// WAL may end anywhere; the facts say where and why.
    Prefix,
}

/// What the caller knows of the segment before it is walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentExpectation {
    /// The timeline in the file's name.
    pub timeline: Timeline,
    /// The LSN of the segment's first byte.
    pub start_lsn: Lsn,
    /// The cluster's segment size.
    pub segment_size: SegmentSize,
    /// The cluster's system identifier, or `None` to take any.
    pub system_id: Option<SystemId>,
    /// How much of the segment the input is.
    pub extent: Extent,
}

impl SegmentExpectation {
    /// Returns the expectation for the file `name`, or `None` when the name's
    /// last part is too large for `segment_size`.
    pub fn of(
        name: SegmentName,
        segment_size: SegmentSize,
        system_id: Option<SystemId>,
        extent: Extent,
    ) -> Option<Self> {
        let start_lsn = name.start_lsn(segment_size)?;
        // The last segment of the number space has no LSN after it.
        start_lsn.checked_add(segment_size.bytes())?;
        Some(Self { timeline: name.timeline, start_lsn, segment_size, system_id, extent })
    }
}

/// The state of the record walk at the end of a segment, to go on with in the next.
///
/// With it a record that spans the border is checked and its marks are seen; without
/// it the bytes at the start of the next segment are passed over.
#[derive(Debug, Clone)]
pub struct WalCarry {
    end: Lsn,
    records: RecordWalk,
}

/// What the first page header fixed for the whole segment.
#[derive(Debug, Clone)]
struct Opened {
    cluster: ClusterFacts,
    first_timeline: Timeline,
    last_timeline: Timeline,
    continued_bytes: Option<u32>,
    continued_is_joined: bool,
    records: RecordWalk,
}

/// Who is told of what is found.
struct Watch<'a> {
    on_mark: &'a mut dyn FnMut(&Mark),
    on_record: &'a mut dyn FnMut(&WalRecord<'_>),
    sees_records: bool,
}

/// A walk over one segment.
#[derive(Debug, Clone)]
pub struct SegmentWalk {
    expectation: SegmentExpectation,
    carry: Option<WalCarry>,
    /// Bytes given so far; may exceed a segment.
    fed: u64,
    /// Bytes walked so far, from the segment's start.
    position: u64,
    /// The page header in the making.
    head: [u8; LONG_PAGE_HEADER_BYTES],
    head_filled: usize,
    /// Payload bytes left in the current page.
    page_left: usize,
    opened: Option<Opened>,
    stopped: Option<WalDamage>,
    first_record_lsn: Option<Lsn>,
    valid_end: Lsn,
    marks: WalMarks,
}

impl SegmentWalk {
    /// Starts a walk that knows nothing of the segment before.
    pub fn new(expectation: SegmentExpectation) -> Self {
        Self {
            expectation,
            carry: None,
            fed: 0,
            position: 0,
            head: [0; LONG_PAGE_HEADER_BYTES],
            head_filled: 0,
            page_left: 0,
            opened: None,
            stopped: None,
            first_record_lsn: None,
            valid_end: expectation.start_lsn,
            marks: WalMarks::default(),
        }
    }

    /// Starts a walk that goes on from the segment before. A carry that does not
    /// end where this segment begins is not used
    /// ([`SegmentFacts::continued_is_joined`] tells).
    pub fn after(carry: WalCarry, expectation: SegmentExpectation) -> Self {
        let adjacent = carry.end == expectation.start_lsn;
        Self { carry: adjacent.then_some(carry), ..Self::new(expectation) }
    }

    /// Takes in the next bytes of the segment, in blocks of any size.
    ///
    /// An error is final: every later call answers the same. A prefix walk fails only for what the
    /// first page header says; after the end of valid WAL it takes and ignores the rest.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), WalDamage> {
        self.feed_with(bytes, &mut |_| {})
    }

    /// As [`Self::feed`], and shows every mark in WAL order as it is found.
    pub fn feed_with(
        &mut self,
        bytes: &[u8],
        on_mark: &mut dyn FnMut(&Mark),
    ) -> Result<(), WalDamage> {
        self.feed_watched(bytes, Watch { on_mark, on_record: &mut |_| {}, sees_records: false })
    }

    /// As [`Self::feed`], and shows every record in WAL order as it is found.
    pub fn feed_records(
        &mut self,
        bytes: &[u8],
        on_record: &mut dyn FnMut(&WalRecord<'_>),
    ) -> Result<(), WalDamage> {
        self.feed_watched(bytes, Watch { on_mark: &mut |_| {}, on_record, sees_records: true })
    }

    fn feed_watched(&mut self, bytes: &[u8], mut watch: Watch<'_>) -> Result<(), WalDamage> {
        self.fed = self.fed.saturating_add(bytes.len() as u64);
        if self.stopped.is_none() {
            self.stopped = self.walk(bytes, &mut watch).err();
        }
        match &self.stopped {
            Some(damage) if !self.may_stop_here() => Err(damage.clone()),
            _ => Ok(()),
        }
    }

    /// Returns the end of the last complete record so far, as [`SegmentFacts::valid_end`].
    pub fn valid_end(&self) -> Lsn {
        self.valid_end
    }

    /// Returns where the last whole record so far begins; it may be in an earlier segment.
    pub fn last_record_lsn(&self) -> Option<Lsn> {
        self.opened.as_ref().and_then(|opened| opened.records.last_record())
    }

    /// Returns the timeline of the last page so far.
    pub fn timeline(&self) -> Option<Timeline> {
        self.opened.as_ref().map(|opened| opened.last_timeline)
    }

    /// Returns the version that wrote the segment, once its first page was seen.
    pub fn version(&self) -> Option<MajorVersion> {
        self.opened.as_ref().map(|opened| opened.records.version())
    }

    /// Ends the input and returns what was found.
    pub fn finish(self) -> Result<SegmentFacts, WalDamage> {
        self.finish_with_carry().map(|(facts, _)| facts)
    }

    /// As [`Self::finish`], and returns what a walk of the next segment goes on
    /// with: `None` when the walk did not reach the segment's end.
    pub fn finish_with_carry(self) -> Result<(SegmentFacts, Option<WalCarry>), WalDamage> {
        if let Some(damage) = &self.stopped
            && !self.may_stop_here()
        {
            return Err(damage.clone());
        }
        let expected = self.expectation.segment_size.bytes();
        let size_fits = match self.expectation.extent {
            Extent::Whole => self.fed == expected,
            Extent::Prefix => self.fed <= expected,
        };
        let wrong_size = WalDamage::WrongSize { expected, found: self.fed };
        let Some(opened) = self.opened else { return Err(wrong_size) };
        if !size_fits {
            return Err(wrong_size);
        }
        let end = match self.stopped {
            Some(damage) => WalkEnd::Stopped(damage),
            None if opened.records.is_switched() => WalkEnd::Switched,
            None if self.position == expected => WalkEnd::Full,
            None => WalkEnd::Cut,
        };
        let facts = SegmentFacts {
            system_id: opened.cluster.system_id,
            version: opened.records.version(),
            segment_size: self.expectation.segment_size,
            block_size: opened.cluster.block_size,
            start_lsn: self.expectation.start_lsn,
            first_timeline: opened.first_timeline,
            last_timeline: opened.last_timeline,
            continued_bytes: opened.continued_bytes,
            continued_is_joined: opened.continued_is_joined,
            first_record_lsn: self.first_record_lsn,
            last_record_lsn: opened.records.last_record(),
            valid_end: self.valid_end,
            incomplete: opened.records.incomplete(),
            marks: self.marks,
            end,
        };
        let reached_end = matches!(facts.end, WalkEnd::Full | WalkEnd::Switched);
        let mut records = opened.records;
        records.leave_switch();
        let end = Lsn(self.expectation.start_lsn.0 + expected);
        Ok((facts, reached_end.then_some(WalCarry { end, records })))
    }

    /// Returns whether the end of valid WAL is no error here: in a prefix, once
    /// the first page header was accepted.
    fn may_stop_here(&self) -> bool {
        self.expectation.extent == Extent::Prefix && self.opened.is_some()
    }

    fn walk(&mut self, mut bytes: &[u8], watch: &mut Watch<'_>) -> Result<(), WalDamage> {
        while !bytes.is_empty() && self.position < self.expectation.segment_size.bytes() {
            let taken = if self.page_left == 0 {
                self.take_page_header(bytes)?
            } else {
                let payload = &bytes[..bytes.len().min(self.page_left)];
                let lsn = self.lsn();
                let Some(opened) = &mut self.opened else { return Ok(()) };
                let mut report = Report {
                    marks: &mut self.marks,
                    first_record: &mut self.first_record_lsn,
                    valid_end: &mut self.valid_end,
                    on_mark: &mut *watch.on_mark,
                    on_record: &mut *watch.on_record,
                    sees_records: watch.sees_records,
                };
                opened.records.consume(lsn, payload, &mut report)?;
                if opened.records.is_switched() {
                    return Ok(());
                }
                self.page_left -= payload.len();
                payload.len()
            };
            self.position += taken as u64;
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    /// The LSN of the next byte to walk.
    fn lsn(&self) -> Lsn {
        Lsn(self.expectation.start_lsn.0.saturating_add(self.position))
    }

    fn take_page_header(&mut self, bytes: &[u8]) -> Result<usize, WalDamage> {
        let filled = self.head_filled;
        let wanted = PageHeader::size_of(&self.head[..filled]).unwrap_or(SHORT_PAGE_HEADER_BYTES);
        let taken = bytes.len().min(wanted - filled);
        self.head[filled..filled + taken].copy_from_slice(&bytes[..taken]);
        self.head_filled += taken;
        let head = &self.head[..self.head_filled];
        if PageHeader::size_of(head) == Some(head.len()) {
            let page_lsn = Lsn(self.lsn().0 - filled as u64);
            let page = PageHeader::parse(head).map_err(|error| header_damage(error, page_lsn))?;
            let block_size = self.enter_page(&page, page_lsn)?;
            self.page_left = (block_size as usize).saturating_sub(page.size());
            self.head_filled = 0;
        }
        Ok(taken)
    }

    /// Checks a page header and returns the page size in bytes.
    fn enter_page(&mut self, page: &PageHeader, lsn: Lsn) -> Result<u32, WalDamage> {
        let Some(opened) = &mut self.opened else {
            let opened = self.open(page, lsn)?;
            let block_size = opened.cluster.block_size;
            self.opened = Some(opened);
            return Ok(block_size);
        };
        let (expected, found) = (opened.records.version(), page.version);
        if found != expected {
            return Err(WalDamage::VersionChanged { lsn, expected, found });
        }
        check_place(page, lsn, opened.last_timeline, self.expectation.timeline)?;
        if page.cluster.is_some_and(|cluster| cluster != opened.cluster) {
            return Err(WalDamage::BadPageFlags { lsn, found: page.flags.bits() });
        }
        opened.records.enter_page(page, lsn)?;
        opened.last_timeline = page.timeline;
        Ok(opened.cluster.block_size)
    }

    /// Checks the first page header and fixes what it says for the segment.
    fn open(&mut self, page: &PageHeader, lsn: Lsn) -> Result<Opened, WalDamage> {
        let expectation = &self.expectation;
        let cluster =
            page.cluster.ok_or(WalDamage::BadPageFlags { lsn, found: page.flags.bits() })?;
        if let Some(expected) = expectation.system_id.filter(|id| *id != cluster.system_id) {
            return Err(WalDamage::WrongSystemId { expected, found: cluster.system_id });
        }
        let (expected, found) = (expectation.segment_size.bytes(), cluster.segment_size);
        if u64::from(found) != expected {
            return Err(WalDamage::WrongSegmentSize { expected, found });
        }
        let size = cluster.block_size;
        if !(size.is_power_of_two() && (1 << 10..=1 << 16).contains(&size)) {
            return Err(WalDamage::BadBlockSize { found: size });
        }
        check_place(page, lsn, Timeline::FIRST, expectation.timeline)?;
        let continued = page.flags.first_is_contrecord();
        if continued && page.remaining == 0 {
            return Err(WalDamage::BadPageFlags { lsn, found: page.flags.bits() });
        }
        let carried = self.carry.take().filter(|carry| carry.records.version() == page.version);
        let joined = carried.is_some();
        let mut records = match carried {
            Some(carry) => carry.records,
            None => RecordWalk::new(page.version, expectation.segment_size),
        };
        if joined {
            records.enter_page(page, lsn)?;
        } else if continued {
            records.begin_unseen(page.remaining);
        }
        Ok(Opened {
            cluster,
            first_timeline: page.timeline,
            last_timeline: page.timeline,
            continued_bytes: continued.then_some(page.remaining),
            continued_is_joined: continued && joined && records.knows_start(),
            records,
        })
    }
}

/// Checks what a page says of its place in WAL.
fn check_place(
    page: &PageHeader,
    lsn: Lsn,
    at_least: Timeline,
    at_most: Timeline,
) -> Result<(), WalDamage> {
    let found = page.address;
    if found != lsn {
        return Err(WalDamage::WrongPageAddress { lsn, found });
    }
    let found = page.timeline;
    if found < at_least || found > at_most {
        return Err(WalDamage::WrongTimeline { lsn, found, at_least, at_most });
    }
    Ok(())
}

fn header_damage(error: PageHeaderError, lsn: Lsn) -> WalDamage {
    match error {
        PageHeaderError::Zeroed | PageHeaderError::Cut { .. } => WalDamage::ZeroedPage { lsn },
        PageHeaderError::UnknownMagic { found } => WalDamage::UnknownMagic { lsn, found },
        PageHeaderError::UnknownFlags { found } => WalDamage::BadPageFlags { lsn, found },
    }
}

#[cfg(test)]
mod tests;

//! Walking from record to record over the payload of WAL pages.
//!
//! Owns the state of one record in the making: its header, its running
//! CRC-32C and, for the few kinds that carry an event, the beginning of its body. Records
//! are never held whole: one may be 1020 MiB long. Page headers are `wal_walk`'s part.

use super::crc32c::Crc32c;
use super::wal_blocks::{OBSERVED_BODY_MAX, WalRecord};
use super::wal_damage::ExpectedLink;
use super::wal_facts::{IncompleteRecord, WalMarks};
use super::wal_page::PageHeader;
use super::wal_record::{Mark, RECORD_HEADER_BYTES, RecordHeader, WalEvent, decode_event};
use super::{Lsn, MajorVersion, SegmentSize, WalDamage};

/// How much of the body of a record with an event is kept. A commit of thousands
/// of dropped relations fits; of a longer one the time and the first parts are known.
const BODY_KEPT_MAX: usize = 256 << 10;

/// Records and record positions start at multiples of this (`MAXALIGN`).
const RECORD_ALIGNMENT: u64 = 8;

/// Where in a record the walk stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// In a record whose beginning was not seen: its bytes are passed over.
    Unseen { left: u64 },
    /// At or inside a header; `filled` bytes of it are there.
    Header { filled: usize },
    /// In the body.
    Body { left: u64 },
    /// Between two records.
    Padding { left: u64 },
    /// After a switch record.
    Switched,
}

/// What the walk reports to.
pub(super) struct Report<'a> {
    pub(super) marks: &'a mut WalMarks,
    pub(super) first_record: &'a mut Option<Lsn>,
    pub(super) valid_end: &'a mut Lsn,
    pub(super) on_mark: &'a mut dyn FnMut(&Mark),
    /// Sees every record, if `sees_records`: otherwise their bodies are not kept.
    pub(super) on_record: &'a mut dyn FnMut(&WalRecord<'_>),
    pub(super) sees_records: bool,
}

/// The walk over records; lives from segment to segment.
#[derive(Debug, Clone)]
pub(super) struct RecordWalk {
    version: MajorVersion,
    segment_size: SegmentSize,
    stage: Stage,
    /// Where the record in the making begins.
    start: Lsn,
    /// Where the last complete record begins.
    previous: Option<Lsn>,
    head: [u8; RECORD_HEADER_BYTES],
    header: RecordHeader,
    crc: Crc32c,
    /// The beginning of the body, of a record with an event only.
    body: Vec<u8>,
    /// How much of the body is kept.
    body_kept_max: usize,
    /// Whether the unseen bytes can be the end of a record header and nothing else.
    unseen_is_header_part: bool,
    /// Where an unseen record ended that may have been a switch.
    unseen_switch_end: Option<Lsn>,
}

impl RecordWalk {
    pub(super) fn new(version: MajorVersion, segment_size: SegmentSize) -> Self {
        let head = [0; RECORD_HEADER_BYTES];
        Self {
            version,
            segment_size,
            stage: Stage::Header { filled: 0 },
            start: Lsn::INVALID,
            previous: None,
            head,
            header: RecordHeader::parse(&head),
            crc: Crc32c::new(),
            body: Vec::new(),
            body_kept_max: 0,
            unseen_is_header_part: false,
            unseen_switch_end: None,
        }
    }

    pub(super) fn version(&self) -> MajorVersion {
        self.version
    }

    /// Returns where the last complete record begins.
    pub(super) fn last_record(&self) -> Option<Lsn> {
        self.previous
    }

    pub(super) fn is_switched(&self) -> bool {
        self.stage == Stage::Switched
    }

    /// Returns whether the record in the making, if any, was seen from its beginning.
    pub(super) fn knows_start(&self) -> bool {
        !matches!(self.stage, Stage::Unseen { .. })
    }

    /// Starts a segment after a switch ended the one before.
    pub(super) fn leave_switch(&mut self) {
        if self.is_switched() {
            self.stage = Stage::Header { filled: 0 };
        }
    }

    /// Passes over `left` bytes of a record whose beginning was not seen.
    pub(super) fn begin_unseen(&mut self, left: u32) {
        self.unseen_is_header_part = matches!(left, 8 | 16);
        self.stage = Stage::Unseen { left: u64::from(left) };
    }

    /// Returns the record that is not whole, or `None` between records.
    pub(super) fn incomplete(&self) -> Option<IncompleteRecord> {
        let (start_lsn, missing_bytes) = match self.stage {
            Stage::Unseen { left } if left > 0 => (None, left),
            // Cut inside the length itself, as only an input cut anywhere can be:
            // what is known to be missing is the rest of the header.
            Stage::Header { filled: filled @ 1..4 } => (Some(self.start), 24 - filled as u64),
            Stage::Header { filled: filled @ 4.. } => {
                (Some(self.start), u64::from(self.total_bytes()) - filled as u64)
            }
            Stage::Body { left } => (Some(self.start), left),
            _ => return None,
        };
        Some(IncompleteRecord { start_lsn, missing_bytes })
    }

    /// Checks that `page`, which stands at `lsn`, goes on where the page before left off.
    pub(super) fn enter_page(&mut self, page: &PageHeader, lsn: Lsn) -> Result<(), WalDamage> {
        let left = self.incomplete().map_or(0, |record| record.missing_bytes);
        let continued = page.flags.first_is_contrecord();
        if left > 0 && !continued && page.flags.first_is_overwrite_contrecord() {
            // A crash lost the rest of that record. The link of the next one
            // leads past it, so `previous` stays.
            self.stage = Stage::Header { filled: 0 };
            return Ok(());
        }
        let found = if continued { page.remaining } else { 0 };
        let fits = if left > 0 { u64::from(found) == left } else { !continued };
        fits.then_some(()).ok_or(WalDamage::BadContinuation { lsn, expected: left, found })
    }

    /// Takes in payload of one page, which begins at `lsn`. Stops early at a switch record.
    pub(super) fn consume(
        &mut self,
        mut lsn: Lsn,
        mut payload: &[u8],
        report: &mut Report<'_>,
    ) -> Result<(), WalDamage> {
        while !payload.is_empty() && !self.is_switched() {
            let taken = match self.stage {
                Stage::Unseen { left } => self.pass_unseen(lsn, payload, left, report),
                Stage::Header { filled } => self.take_header(lsn, payload, filled, report)?,
                Stage::Body { left } => self.take_body(lsn, payload, left, report)?,
                Stage::Padding { left } => {
                    let taken = at_most(payload.len(), left);
                    let left = left - taken as u64;
                    self.stage = match left {
                        0 => Stage::Header { filled: 0 },
                        _ => Stage::Padding { left },
                    };
                    taken
                }
                Stage::Switched => 0,
            };
            lsn.0 += taken as u64;
            payload = payload.get(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Passes over bytes of a record whose beginning was not seen.
    ///
    /// A switch record can be split by the segment border like any other: 16 or 8 bytes of
    /// its header are then all that the segment holds, and the rest is padding. Refusing
    /// such a segment would stop archiving for ever.
    fn pass_unseen(
        &mut self,
        lsn: Lsn,
        payload: &[u8],
        left: u64,
        report: &mut Report<'_>,
    ) -> usize {
        let taken = at_most(payload.len(), left);
        if self.unseen_is_header_part {
            let at = RECORD_HEADER_BYTES - at_most(RECORD_HEADER_BYTES, left);
            self.head[at..at + taken].copy_from_slice(&payload[..taken]);
        }
        let left = left - taken as u64;
        self.stage = Stage::Unseen { left };
        if left == 0 {
            let end = Lsn(lsn.0 + taken as u64);
            let may_be_switch = RecordHeader::parse(&self.head).is_switch();
            self.unseen_switch_end = (self.unseen_is_header_part && may_be_switch).then_some(end);
            self.end_record(end, report);
        }
        taken
    }

    fn take_header(
        &mut self,
        lsn: Lsn,
        payload: &[u8],
        filled: usize,
        report: &mut Report<'_>,
    ) -> Result<usize, WalDamage> {
        if filled == 0 {
            self.start = lsn;
        }
        let taken = payload.len().min(RECORD_HEADER_BYTES - filled);
        self.head[filled..filled + taken].copy_from_slice(&payload[..taken]);
        let now_filled = filled + taken;
        if filled < 4 && now_filled >= 4 {
            if self.total_bytes() == 0 && self.unseen_switch_end == Some(self.start) {
                self.end_at_switch(self.start, report);
                return Ok(taken);
            }
            self.stage = Stage::Header { filled: 0 };
            self.check_length()?;
            report.first_record.get_or_insert(self.start);
        }
        self.stage = Stage::Header { filled: now_filled };
        if now_filled == RECORD_HEADER_BYTES {
            self.begin_body(report.sees_records)?;
            if self.header.total_bytes as usize == RECORD_HEADER_BYTES {
                self.finish_record(Lsn(lsn.0 + taken as u64), report)?;
            }
        }
        Ok(taken)
    }

    fn total_bytes(&self) -> u32 {
        super::bytes::u32_at(&self.head, 0).unwrap_or_default()
    }

    fn check_length(&self) -> Result<(), WalDamage> {
        let length = self.total_bytes();
        if length == 0 {
            return Err(WalDamage::EndInside { lsn: self.start });
        }
        let legal = RecordHeader::length_is_legal(length, self.version);
        legal.then_some(()).ok_or(WalDamage::BadRecordLength { lsn: self.start, length })
    }

    /// Checks the complete header, before anything relies on it.
    fn begin_body(&mut self, is_seen: bool) -> Result<(), WalDamage> {
        let lsn = self.start;
        let header = RecordHeader::parse(&self.head);
        if !header.resource_manager_is_legal(self.version) {
            return Err(WalDamage::BadResourceManager { lsn, found: header.resource_manager });
        }
        let (linked, expected) = match self.previous {
            Some(previous) => (header.previous == previous, ExpectedLink::Record(previous)),
            None => (header.previous < lsn, ExpectedLink::Earlier),
        };
        if !linked {
            return Err(WalDamage::BadPreviousLink { lsn, expected, found: header.previous });
        }
        self.header = header;
        self.crc.reset();
        self.body.clear();
        self.body_kept_max = match (header.has_event() && !header.is_switch(), is_seen) {
            (true, _) => BODY_KEPT_MAX,
            (false, true) => OBSERVED_BODY_MAX,
            (false, false) => 0,
        };
        self.stage = Stage::Body { left: u64::from(header.total_bytes) - 24 };
        Ok(())
    }

    fn take_body(
        &mut self,
        lsn: Lsn,
        payload: &[u8],
        left: u64,
        report: &mut Report<'_>,
    ) -> Result<usize, WalDamage> {
        let taken = at_most(payload.len(), left);
        let bytes = &payload[..taken];
        self.crc.update(bytes);
        if self.body_kept_max > 0 {
            let room = self.body_kept_max.saturating_sub(self.body.len());
            self.body.extend_from_slice(&bytes[..taken.min(room)]);
        }
        let left = left - taken as u64;
        self.stage = Stage::Body { left };
        if left == 0 {
            self.finish_record(Lsn(lsn.0 + taken as u64), report)?;
        }
        Ok(taken)
    }

    /// Checks the checksum of the record that ends at `end`, and reports its event.
    fn finish_record(&mut self, end: Lsn, report: &mut Report<'_>) -> Result<(), WalDamage> {
        // PostgreSQL puts the header last, so that it can be filled in last.
        self.crc.update(&self.head[..20]);
        let (stored, computed) = (self.header.crc, self.crc.value());
        if stored != computed {
            return Err(WalDamage::BadChecksum { lsn: self.start, stored, computed });
        }
        report.marks.records += 1;
        self.previous = Some(self.start);
        self.end_record(end, report);
        let event = decode_event(&self.header, &self.body, self.version);
        if let Ok(Some(WalEvent::Switch)) = event {
            self.end_at_switch(end, report);
        }
        let (lsn, end_lsn) = (self.start, *report.valid_end);
        if report.sees_records {
            let event = event.as_ref().ok().and_then(Option::as_ref);
            let (header, body, version) = (self.header, &self.body[..], self.version);
            (report.on_record)(&WalRecord { lsn, end_lsn, header, event, body, version });
        }
        match event {
            Ok(Some(event)) => {
                let mark = Mark { lsn, end_lsn, event };
                report.marks.add(&mark);
                (report.on_mark)(&mark);
            }
            Ok(None) => {}
            Err(_) => report.marks.unread_count += 1,
        }
        Ok(())
    }

    /// Ends the segment at the switch record that ends at `end`: it stands for
    /// all the rest of the segment that holds its last byte.
    fn end_at_switch(&mut self, end: Lsn, report: &mut Report<'_>) {
        self.stage = Stage::Switched;
        let number = self.segment_size.segment_before(end);
        *report.valid_end = self.segment_size.start_of(number + 1);
    }

    fn end_record(&mut self, end: Lsn, report: &mut Report<'_>) {
        let aligned = end.0.next_multiple_of(RECORD_ALIGNMENT);
        *report.valid_end = Lsn(aligned);
        self.stage = match aligned - end.0 {
            0 => Stage::Header { filled: 0 },
            left => Stage::Padding { left },
        };
    }
}

/// Returns how much of `have` bytes to take when `left` are wanted.
fn at_most(have: usize, left: u64) -> usize {
    usize::try_from(left).map_or(have, |left| have.min(left))
}

//! Builds WAL for tests: pages and records with right checksums, as PostgreSQL 17 lays them out.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::crc32c::Crc32c;
use super::{Lsn, MajorVersion, PgTimestamp, SegmentSize, SystemId, Timeline};

/// WAL page size of everything built here.
pub(crate) const PAGE_BYTES: usize = 8192;

/// One record to build.
#[derive(Debug, Clone)]
pub(crate) struct RecordSpec {
    pub(crate) resource_manager: u8,
    pub(crate) info: u8,
    pub(crate) xid: u32,
    pub(crate) main_data: Vec<u8>,
}

impl RecordSpec {
    pub(crate) fn new(resource_manager: u8, info: u8, main_data: Vec<u8>) -> Self {
        Self { resource_manager, info, xid: 0, main_data }
    }

    /// A record of `bytes` main data without an event (a logical message).
    pub(crate) fn filler(bytes: usize) -> Self {
        Self::new(21, 0, (0..bytes).map(|at| (at * 7 % 251) as u8 | 1).collect())
    }

    pub(crate) fn commit(xid: u32, time: PgTimestamp) -> Self {
        Self { xid, ..Self::new(1, 0, time.0.to_le_bytes().to_vec()) }
    }

    pub(crate) fn abort(xid: u32, time: PgTimestamp) -> Self {
        Self { xid, ..Self::new(1, 0x20, time.0.to_le_bytes().to_vec()) }
    }

    /// A commit that drops relation files `(tablespace, database, relation)`.
    pub(crate) fn drop(xid: u32, time: PgTimestamp, relations: &[(u32, u32, u32)]) -> Self {
        let mut main = time.0.to_le_bytes().to_vec();
        main.extend(0x0000_0005u32.to_le_bytes()); // xinfo: database, relations
        main.extend(5u32.to_le_bytes());
        main.extend(1663u32.to_le_bytes());
        main.extend((relations.len() as u32).to_le_bytes());
        for (tablespace, database, relation) in relations {
            for part in [tablespace, database, relation] {
                main.extend(part.to_le_bytes());
            }
        }
        Self { xid, ..Self::new(1, 0x80, main) }
    }

    pub(crate) fn restore_point(name: &str, time: PgTimestamp) -> Self {
        let mut main = time.0.to_le_bytes().to_vec();
        main.extend(name.as_bytes());
        main.resize(72, 0);
        Self::new(0, 0x70, main)
    }

    pub(crate) fn end_of_recovery(time: PgTimestamp, to: Timeline, from: Timeline) -> Self {
        let mut main = time.0.to_le_bytes().to_vec();
        main.extend(to.0.to_le_bytes());
        main.extend(from.0.to_le_bytes());
        main.extend(1u32.to_le_bytes());
        Self::new(0, 0x90, main)
    }

    pub(crate) fn overwrite_contrecord(abandoned: Lsn) -> Self {
        let mut main = abandoned.0.to_le_bytes().to_vec();
        main.extend(0u64.to_le_bytes());
        Self::new(0, 0xD0, main)
    }

    pub(crate) fn switch() -> Self {
        Self::new(0, 0x40, Vec::new())
    }

    fn bytes(&self, previous: Lsn) -> Vec<u8> {
        let mut body = Vec::new();
        match self.main_data.len() {
            0 => {}
            short @ 1..=255 => body.extend([255, short as u8]),
            long => {
                body.push(254);
                body.extend((long as u32).to_le_bytes());
            }
        }
        body.extend(&self.main_data);
        let mut head = ((24 + body.len()) as u32).to_le_bytes().to_vec();
        head.extend(self.xid.to_le_bytes());
        head.extend(previous.0.to_le_bytes());
        head.extend([self.info, self.resource_manager, 0, 0]);
        let mut crc = Crc32c::new();
        crc.update(&body);
        crc.update(&head);
        head.extend(crc.value().to_le_bytes());
        head.extend(body);
        head
    }
}

/// A run of WAL that starts at a segment's first byte and may fill several.
#[derive(Debug, Clone)]
pub(crate) struct WalBuilder {
    pub(crate) version: MajorVersion,
    pub(crate) timeline: Timeline,
    system_id: SystemId,
    segment_size: SegmentSize,
    start: Lsn,
    pub(crate) previous: Lsn,
    bytes: Vec<u8>,
}

impl WalBuilder {
    pub(crate) fn new(
        timeline: Timeline,
        number: u64,
        segment_size: SegmentSize,
        system_id: SystemId,
    ) -> Self {
        let start = segment_size.start_of(number);
        let previous = Lsn(start.0.saturating_sub(0x28));
        let version = MajorVersion(17);
        Self { version, timeline, system_id, segment_size, start, previous, bytes: Vec::new() }
    }

    /// Where the next byte goes.
    pub(crate) fn lsn(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    /// Adds a record and returns where it begins.
    pub(crate) fn add(&mut self, spec: &RecordSpec) -> Lsn {
        self.open_page(0, false);
        let lsn = self.lsn();
        let record = spec.bytes(self.previous);
        self.write(&record, 0);
        self.previous = lsn;
        let is_switch = spec.resource_manager == 0 && spec.info == 0x40;
        let segment = self.segment_size.bytes() as usize;
        let unit = if is_switch { segment } else { 8 };
        self.bytes.resize(self.bytes.len().next_multiple_of(unit), 0);
        lsn
    }

    /// Writes only the first `bytes` of a record, fills its page with zeros and
    /// opens the next one as a server does that restarts after that crash.
    pub(crate) fn add_cut(&mut self, spec: &RecordSpec, bytes: usize) -> Lsn {
        self.open_page(0, false);
        let lsn = self.lsn();
        let record = spec.bytes(self.previous);
        self.write(&record[..bytes], record.len() - bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(PAGE_BYTES), 0);
        self.open_page(0, true);
        lsn
    }

    /// Writes `record` over as many pages as it takes, as if `never_written` more bytes followed.
    fn write(&mut self, mut record: &[u8], never_written: usize) {
        let mut first = true;
        while !record.is_empty() {
            let remaining = (record.len() + never_written) as u32;
            self.open_page(if first { 0 } else { remaining }, false);
            first = false;
            let room = PAGE_BYTES - self.bytes.len() % PAGE_BYTES;
            let (now, later) = record.split_at(room.min(record.len()));
            self.bytes.extend(now);
            record = later;
        }
    }

    fn open_page(&mut self, remaining: u32, overwrite: bool) {
        if !self.bytes.len().is_multiple_of(PAGE_BYTES) {
            return;
        }
        let address = self.lsn();
        let long = self.segment_size.offset_of(address) == 0;
        let flags = u16::from(remaining > 0) | u16::from(long) << 1 | u16::from(overwrite) << 3;
        self.bytes.extend(self.version.page_magic().unwrap().to_le_bytes());
        self.bytes.extend(flags.to_le_bytes());
        self.bytes.extend(self.timeline.0.to_le_bytes());
        self.bytes.extend(address.0.to_le_bytes());
        self.bytes.extend(u64::from(remaining).to_le_bytes());
        if long {
            self.bytes.extend(self.system_id.0.to_le_bytes());
            self.bytes.extend(u32::from(self.segment_size).to_le_bytes());
            self.bytes.extend((PAGE_BYTES as u32).to_le_bytes());
        }
    }

    /// Returns all segments begun, the last one filled with zeros.
    pub(crate) fn into_segments(mut self) -> Vec<Vec<u8>> {
        let segment = self.segment_size.bytes() as usize;
        self.bytes.resize(self.bytes.len().next_multiple_of(segment), 0);
        self.bytes.chunks_exact(segment).map(<[u8]>::to_vec).collect()
    }
}

/// Builds one whole segment holding `records`, ended by a switch record unless they fill it.
pub(crate) fn build_segment(
    timeline: Timeline,
    number: u64,
    size: SegmentSize,
    system_id: SystemId,
    records: &[RecordSpec],
) -> Vec<u8> {
    let mut builder = WalBuilder::new(timeline, number, size, system_id);
    for record in records {
        builder.add(record);
    }
    if size.offset_of(builder.lsn()) != 0 || records.is_empty() {
        builder.add(&RecordSpec::switch());
    }
    builder.into_segments().swap_remove(0)
}

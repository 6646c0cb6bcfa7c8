//! Following a table through made-up WAL.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use super::*;
use crate::pg::{RecordHeader, RelFileLocator};

const DATABASE: u32 = 5;
const CLASS: RelFileLocator =
    RelFileLocator { tablespace: 1663, database: DATABASE, relation: 1259 };

fn columns(oid: u32, name: &str, file: u32) -> Vec<u8> {
    let mut columns = vec![0; 160];
    columns[0..4].copy_from_slice(&oid.to_le_bytes());
    columns[4..4 + name.len()].copy_from_slice(name.as_bytes());
    columns[68..72].copy_from_slice(&2200u32.to_le_bytes());
    columns[88..92].copy_from_slice(&file.to_le_bytes());
    columns[115] = b'r';
    columns
}

/// A watch, and the WAL that it is given.
struct Story {
    watch: TableWatch,
    lsn: u64,
}

impl Story {
    fn new(schema: Option<&str>) -> Self {
        let wanted =
            WantedTable { database: None, schema: schema.map(Into::into), name: "orders".into() };
        let mut watch = TableWatch::new(wanted, MajorVersion(17));
        watch.add_database(DATABASE, "shop".into(), 1259, 2615);
        watch.add_namespace(DATABASE, 2200, "public".into());
        Self { watch, lsn: 1000 }
    }

    fn heap(&mut self, xid: u32, info: u8, main: &[u8], data: &[u8]) {
        let has_data = if data.is_empty() { 0 } else { 0x20 };
        let mut body = vec![0, has_data];
        body.extend((data.len() as u16).to_le_bytes());
        for word in [CLASS.tablespace, CLASS.database, CLASS.relation, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend([255, main.len() as u8]);
        body.extend(data);
        body.extend(main);
        self.record(xid, 10, info, &body, None);
    }

    /// The first change of a page after a checkpoint: the page stands whole in the record, the row alone does not.
    fn heap_with_image(&mut self, xid: u32, info: u8, main: &[u8], rows: &[(u16, Vec<u8>)]) {
        let mut page = vec![0; 8192];
        let (mut upper, last) = (8192, rows.iter().map(|row| row.0).max().unwrap());
        for (offset, columns) in rows {
            upper = (upper - 24 - columns.len()) & !7;
            page[upper + 22] = 24;
            page[upper + 24..upper + 24 + columns.len()].copy_from_slice(columns);
            let pointer = upper as u32 | 1 << 15 | ((24 + columns.len()) as u32) << 17;
            let at = 20 + 4 * usize::from(*offset);
            page[at..at + 4].copy_from_slice(&pointer.to_le_bytes());
        }
        page[12..14].copy_from_slice(&(24 + 4 * last).to_le_bytes());
        page[14..16].copy_from_slice(&(upper as u16).to_le_bytes());
        let mut body = vec![0, 0x10, 0, 0, 0, 0x20, 0, 0, 0];
        for word in [CLASS.tablespace, CLASS.database, CLASS.relation, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend([255, main.len() as u8]);
        body.extend(page);
        body.extend(main);
        self.record(xid, 10, info, &body, None);
    }

    fn record(&mut self, xid: u32, manager: u8, info: u8, body: &[u8], event: Option<&WalEvent>) {
        let header = RecordHeader {
            total_bytes: 24 + body.len() as u32,
            xid,
            previous: Lsn(0),
            info,
            resource_manager: manager,
            crc: 0,
        };
        let place = (Lsn(self.lsn), Lsn(self.lsn + 8));
        self.watch.add(&WalRecord::for_test(place, header, event, body));
        self.lsn += 8;
    }

    fn insert(&mut self, xid: u32, offset: u16, columns: &[u8]) {
        let mut data = vec![0, 0, 0, 0, 24, 0];
        data.extend(columns);
        self.heap(xid, 0, &[&offset.to_le_bytes()[..], &[0]].concat(), &data);
    }

    fn delete(&mut self, xid: u32, offset: u16) {
        let main = [&xid.to_le_bytes()[..], &offset.to_le_bytes(), &[0, 0]].concat();
        self.heap(xid, 0x10, &main, &[]);
    }

    fn update(&mut self, xid: u32, old: u16, new: u16, columns: &[u8]) {
        let mut data = vec![0, 0, 0, 0, 24, 0];
        data.extend(columns);
        let mut main = xid.to_le_bytes().to_vec();
        main.extend(old.to_le_bytes());
        main.extend([0, 0, 0, 0, 0, 0]);
        main.extend(new.to_le_bytes());
        self.heap(xid, 0x20, &main, &data);
    }

    /// Ends a transaction; returns where.
    fn end(&mut self, xid: u32, committed: bool, dropped: &[u32]) -> Lsn {
        let at = Lsn(self.lsn);
        let dropped: Vec<RelFileLocator> = dropped
            .iter()
            .map(|relation| RelFileLocator { relation: *relation, ..CLASS })
            .collect();
        let end = TransactionEnd {
            committed,
            prepared: false,
            xid: Some(xid),
            time: PgTimestamp(7),
            database: Some(DATABASE),
            subtransactions: Vec::new(),
            subtransaction_count: 0,
            dropped_count: dropped.len() as u32,
            dropped,
        };
        self.record(xid, 1, 0, &[], Some(&WalEvent::Transaction(end)));
        at
    }

    fn last(&self) -> Option<Lsn> {
        self.watch.last_end().map(|end| end.lsn)
    }
}

fn row(offset: u16) -> (u32, RowPlace) {
    (DATABASE, RowPlace { block: 0, offset })
}

#[test]
fn the_drop_is_the_commit_of_the_transaction_that_deleted_the_row() {
    let mut story = Story::new(Some("public"));
    story.watch.add_row(row(1), RowState::Live, 0, &columns(16385, "orders", 16385));
    story.watch.add_row(row(2), RowState::Live, 0, &columns(16390, "others", 16390));
    story.delete(10, 1);
    story.end(10, false, &[]);
    story.delete(11, 2);
    story.end(11, true, &[16390]);
    assert_eq!(story.last(), None, "one aborted, one was another table");
    story.delete(12, 1);
    let at = story.end(12, true, &[16385]);
    assert_eq!(story.last(), Some(at));
    let end = story.watch.last_end().unwrap();
    let schema = Some("public".to_owned());
    let kind = RelationKind::Table;
    assert_eq!(end.dropped, Dropped::Relation { oid: 16385, schema, kind });
    assert!(!story.watch.is_standing());
}

#[test]
fn a_table_is_followed_through_new_versions_of_its_row() {
    let mut story = Story::new(None);
    story.insert(10, 1, &columns(16385, "orders", 16385));
    story.end(10, true, &[]);
    // TRUNCATE: a new file under the same name.
    story.update(11, 1, 2, &columns(16385, "orders", 16400));
    story.end(11, true, &[16385]);
    assert_eq!(story.last(), None);
    story.update(12, 2, 3, &columns(16385, "orders_old", 16400));
    let renamed = story.end(12, true, &[]);
    assert_eq!(story.watch.last_rename(), Some(&(renamed, "orders_old".to_owned())));
    story.update(13, 3, 4, &columns(16385, "orders", 16400));
    story.end(13, true, &[]);
    story.delete(14, 4);
    let at = story.end(14, true, &[16400]);
    assert_eq!(story.last(), Some(at));
}

#[test]
fn a_table_that_never_stood_for_others_is_no_drop() {
    let mut story = Story::new(None);
    story.insert(10, 1, &columns(16385, "orders", 16385));
    story.update(10, 1, 2, &columns(16385, "orders", 16385));
    story.delete(10, 2);
    story.end(10, true, &[16385]);
    assert_eq!(story.last(), None);
}

#[test]
fn rows_that_stand_in_page_images_only_are_known() {
    let mut story = Story::new(None);
    let orders = columns(16385, "orders", 16385);
    story.heap_with_image(10, 0, &[1, 0, 0], &[(1, orders.clone())]);
    story.end(10, true, &[]);
    // Another version of the row, made in the transaction that drops the table: it stood before all the same.
    let mut main = 11u32.to_le_bytes().to_vec();
    main.extend([1, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    story.heap_with_image(11, 0x20, &main, &[(1, orders.clone()), (2, orders.clone())]);
    story.delete(11, 2);
    let at = story.end(11, true, &[16385]);
    assert_eq!((story.last(), story.watch.unknown_deletions()), (Some(at), 0));
    // Made and dropped at once.
    let mut story = Story::new(None);
    story.heap_with_image(10, 0, &[1, 0, 0], &[(1, orders)]);
    story.delete(10, 1);
    story.end(10, true, &[16385]);
    assert_eq!(story.last(), None);
}

#[test]
fn a_page_that_is_newer_than_the_wal_is_believed() {
    // The backup copied the page after `orders` was dropped and its place taken by another table.
    let mut story = Story::new(None);
    story.watch.add_page(DATABASE, 0, Lsn(5000));
    story.watch.add_row(row(1), RowState::Live, 0, &columns(16390, "orders", 16390));
    story.delete(10, 1);
    story.end(10, true, &[16385]);
    assert_eq!(story.last(), None, "what was deleted is not what stands there now");
    // Of a row that the page knows to be deleted by that transaction, it is certain.
    story.watch.add_row(row(2), RowState::Gone, 11, &columns(16391, "orders", 16391));
    story.delete(11, 2);
    let at = story.end(11, true, &[16391]);
    assert_eq!(story.last(), Some(at));
}

#[test]
fn a_row_that_was_not_seen_is_known_by_its_file() {
    let mut story = Story::new(None);
    story.watch.add_row(row(1), RowState::Live, 0, &columns(16385, "orders", 16385));
    story.delete(10, 9);
    story.end(10, true, &[16999]);
    assert_eq!(story.last(), None);
    story.delete(11, 9);
    let at = story.end(11, true, &[16385]);
    assert_eq!((story.last(), story.watch.unknown_deletions()), (Some(at), 2));
}

#[test]
fn a_dropped_database_takes_its_tables_at_its_own_record() {
    let mut story = Story::new(None);
    story.watch.add_row(row(1), RowState::Live, 0, &columns(16385, "orders", 16385));
    let mut body = vec![255, 12];
    for word in [DATABASE, 1, 1663] {
        body.extend(word.to_le_bytes());
    }
    let at = Lsn(story.lsn);
    story.record(10, 4, 0x20, &body, None);
    story.record(10, 4, 0x20, &body, None);
    story.end(10, true, &[]);
    let end = story.watch.last_end().unwrap();
    assert_eq!((end.lsn, end.time, end.with_database), (at, Some(PgTimestamp(7)), true));
}

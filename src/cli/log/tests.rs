//! What lines read like.

use super::*;
use crate::ops::log::{DroppedDatabase, RemovedLine, TableName};
use crate::pg::{Lsn, Timeline};

fn relation(name: Option<&str>, kind: Option<&'static str>, file: u32) -> RelationName {
    RelationName {
        tablespace: 1663,
        database: 5,
        file,
        name: name.map(Into::into),
        relation_kind: kind,
    }
}

fn touched(relation: RelationName, deleted_rows: u64) -> RelationLine {
    RelationLine { relation, records: 2, deleted_rows }
}

fn commit() -> TransactionLine {
    TransactionLine {
        time: PgTimestamp::from_unix_micros(1_795_307_367_243_882),
        lsn: Lsn(0x300_0028),
        end_lsn: Lsn(0x300_0060),
        timeline: Timeline(1),
        xid: Some(738),
        prepared: false,
        subtransactions: 0,
        database: Some(DatabaseName { oid: 5, name: Some("shop".into()) }),
        records: 12,
        records_exact: true,
        relations: vec![
            touched(relation(Some("pg_catalog.pg_class"), Some("table"), 1259), 3),
            touched(relation(Some("public.orders"), Some("table"), 16385), 0),
            touched(relation(Some("public.orders_pkey"), Some("index"), 16390), 0),
            touched(relation(None, None, 16400), 0),
        ],
        more_relations: false,
        deleted_rows: 3,
        large_delete: false,
        removed: Vec::new(),
        removed_files: 0,
        dropped_relations: 0,
        truncated: Vec::new(),
        dropped_databases: Vec::new(),
        dropped_tablespaces: Vec::new(),
    }
}

fn text_of(end: TransactionLine) -> String {
    text(&Line::Commit(Box::new(end)), &TimeZone::UTC)
}

#[test]
fn a_commit_names_the_tables_that_people_know() {
    assert_eq!(
        text_of(commit()),
        "2026-11-22 00:29:27.243882+00:00  0/3000028  commit 738 in shop, 12 records: \
         public.orders, file 1663/5/16400"
    );
}

#[test]
fn what_was_removed_stands_out() {
    let removed = [
        relation(Some("public.old"), Some("table"), 16500),
        relation(Some("public.old_pkey"), Some("index"), 16501),
    ];
    let removed = removed.into_iter().map(|relation| RemovedLine { relation }).collect();
    let drop = TransactionLine { removed, removed_files: 3, relations: Vec::new(), ..commit() };
    let told = text_of(drop.clone());
    assert!(
        told.ends_with("; REPLACES (by TRUNCATE, VACUUM FULL or the like) public.old and 2 more"),
        "{told}"
    );
    let told =
        text_of(TransactionLine { relations: commit().relations, dropped_relations: 2, ..drop });
    assert!(told.contains("; DROPS public.old and 2 more: public.orders"), "{told}");
    let database = DatabaseName { oid: 9, name: None };
    let told = text_of(TransactionLine {
        dropped_databases: vec![DroppedDatabase { database, lsn: Lsn(0x28) }],
        truncated: vec![TableName { oid: 7, name: None }],
        large_delete: true,
        ..commit()
    });
    assert!(
        told.contains("; DROPS DATABASE database 9 at 0/28; TRUNCATES the table with OID 7"),
        "{told}"
    );
    assert!(told.contains("; DELETES 3 rows from pg_catalog.pg_class"), "{told}");
}

#[test]
fn a_count_that_is_not_whole_says_so() {
    let told = text_of(TransactionLine { records_exact: false, prepared: true, ..commit() });
    assert!(told.contains("commit prepared 738 in shop, at least 12 records"), "{told}");
}

#[test]
fn names_from_wal_cannot_forge_lines() {
    let point = Line::RestorePoint {
        time: PgTimestamp(0),
        lsn: Lsn(1),
        end_lsn: Lsn(2),
        timeline: Timeline(1),
        name: "a\nb\x1b[2J".into(),
    };
    let told = text(&point, &TimeZone::UTC);
    assert_eq!(told, "2000-01-01 00:00:00.000000+00:00  0/1  restore point `a b [2J`");
}

#[test]
fn the_json_of_a_line_has_the_fields_of_the_contract() {
    insta::assert_json_snapshot!(Line::Commit(Box::new(commit())));
    let gap = Line::Gap { start_lsn: Lsn(1), end_lsn: Lsn(2), why: None };
    let json = serde_json::to_string(&gap).unwrap_or_default();
    assert_eq!(json, r#"{"kind":"gap","start_lsn":"0/1","end_lsn":"0/2"}"#);
}

#[test]
fn words_are_quoted_for_a_shell() {
    assert_eq!(quoted("file:///repo"), "file:///repo");
    assert_eq!(quoted("it's here"), r"'it'\''s here'");
    assert_eq!(quoted(""), "''");
}

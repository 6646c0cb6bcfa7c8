//! Only what is proven to be the cluster's is taken over, and its control file goes first.

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::*;
use crate::pgdata::restore_marker::HeldMarker;
use crate::pgdata::{
    Access, FileAttributes, NewTree, Owner, RESTORE_MARKER_NAME, RestoreMarker, TreePlan,
};

const CONTROL: &[u8] = include_bytes!("../../../tests/fixtures/pg/pg_control.18");
const OTHER: &[u8] = include_bytes!("../../../tests/fixtures/pg/pg_control.15");

fn ours() -> SystemId {
    ControlFile::parse(CONTROL).unwrap().system_id
}

fn plan(pgdata: &Path, tablespace: Option<&Path>) -> TreePlan {
    let target = |path: &Path| TablespaceTarget {
        oid: 16400,
        original: "/mnt/old".into(),
        target: path.to_owned(),
    };
    TreePlan {
        pgdata: pgdata.to_owned(),
        tablespaces: tablespace.map(target).into_iter().collect(),
        access: Access::Owner,
        owner: rustix::process::geteuid().is_root().then_some(Owner { uid: 65534, gid: 65534 }),
        take_over: Some(ours()),
    }
}

/// A data directory with this control file.
fn cluster(directory: &Path, control: Option<&[u8]>) -> PathBuf {
    let pgdata = directory.join("data");
    for part in ["global", "pg_wal/archive_status", "pg_tblspc", "base/1"] {
        fs::create_dir_all(pgdata.join(part)).unwrap();
    }
    if let Some(control) = control {
        fs::write(pgdata.join(CONTROL_FILE), control).unwrap();
    }
    fs::write(pgdata.join("base/1/2"), "rows").unwrap();
    pgdata
}

fn refused(plan: &TreePlan) -> TreeError {
    plan.check().unwrap_err()
}

#[test]
fn the_cluster_itself_is_taken_over_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    plan(&pgdata, None).check().unwrap();
    let others = TreePlan { take_over: None, ..plan(&pgdata, None) };
    assert!(matches!(others.check(), Err(TreeError::NotEmpty { .. })), "only if asked for");

    fs::write(pgdata.join(CONTROL_FILE), OTHER).unwrap();
    assert!(matches!(refused(&plan(&pgdata, None)), TreeError::OtherCluster { .. }));
    let mut torn = CONTROL.to_vec();
    torn[40] ^= 1;
    for unreadable in [torn, Vec::new()] {
        fs::write(pgdata.join(CONTROL_FILE), unreadable).unwrap();
        assert!(matches!(refused(&plan(&pgdata, None)), TreeError::NotProven { .. }));
    }
    fs::remove_file(pgdata.join(CONTROL_FILE)).unwrap();
    assert!(matches!(refused(&plan(&pgdata, None)), TreeError::NotEmpty { .. }));
    plan(&dir.path().join("missing"), None).check().unwrap();
}

#[test]
fn a_server_that_runs_or_may_be_starting_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    let file = pgdata.join("postmaster.pid");
    fs::write(&file, format!("{}\n", std::os::unix::process::parent_id())).unwrap();
    assert!(matches!(refused(&plan(&pgdata, None)), TreeError::ServerRunning { .. }));
    fs::write(&file, "").unwrap();
    assert!(matches!(refused(&plan(&pgdata, None)), TreeError::PidFileUnreadable { .. }));
    fs::write(&file, "4194321\n").unwrap();
    plan(&pgdata, None).check().unwrap();
}

#[test]
fn a_restore_that_died_is_gone_on_with_by_its_cluster_only() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), None);
    let marker = |took_over| RestoreMarker { took_over, ..RestoreMarker::default() };
    for (took_over, is_taken) in
        [(None, true), (Some(ours()), true), (Some(SystemId(ours().0 + 1)), false)]
    {
        let held = HeldMarker::take(&pgdata, &marker(took_over), None).unwrap();
        assert!(matches!(refused(&plan(&pgdata, None)), TreeError::RestoreRunning { .. }));
        drop(held);
        assert_eq!(plan(&pgdata, None).check().is_ok(), is_taken, "{took_over:?}");
    }
    // A cluster is told by its control file, whatever a marker says.
    fs::write(pgdata.join(CONTROL_FILE), OTHER).unwrap();
    drop(HeldMarker::take(&pgdata, &marker(Some(ours())), None).unwrap());
    assert!(matches!(refused(&plan(&pgdata, None)), TreeError::OtherCluster { .. }));
}

#[test]
fn wal_that_waits_for_the_archive_is_not_removed() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    let wal = pgdata.join("pg_wal");
    let ready = wal.join("archive_status/000000010000000000000007.ready");
    fs::write(&ready, "").unwrap();
    plan(&pgdata, None).check().unwrap();
    fs::write(wal.join("000000010000000000000007"), "wal").unwrap();
    let error = refused(&plan(&pgdata, None));
    assert!(error.to_string().ends_with("`000000010000000000000007`"), "{error}");
    fs::rename(&ready, ready.with_extension("done")).unwrap();
    plan(&pgdata, None).check().unwrap();
    // Behind a link it is safe.
    fs::rename(ready.with_extension("done"), &ready).unwrap();
    fs::rename(&wal, dir.path().join("wal")).unwrap();
    symlink(dir.path().join("wal"), &wal).unwrap();
    plan(&pgdata, None).check().unwrap();
}

#[test]
fn a_tablespace_is_the_clusters_only_where_its_link_or_a_marker_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    let space = dir.path().join("space");
    let plan = plan(&pgdata, Some(&space));
    plan.check().unwrap();
    fs::create_dir_all(space.join("PG_18_1")).unwrap();
    assert!(matches!(refused(&plan), TreeError::NotEmpty { .. }));
    let link = pgdata.join("pg_tblspc/16400");
    symlink(dir.path(), &link).unwrap();
    assert!(matches!(refused(&plan), TreeError::NotEmpty { .. }));
    fs::remove_file(&link).unwrap();
    symlink(&space, &link).unwrap();
    plan.check().unwrap();
    fs::remove_file(&link).unwrap();
    let marker = RestoreMarker { took_over: Some(SystemId(1)), ..RestoreMarker::default() };
    drop(HeldMarker::take(&space, &marker, None).unwrap());
    assert!(matches!(refused(&plan), TreeError::OtherCluster { .. }));
    drop(HeldMarker::take(&space, &RestoreMarker::default(), None).unwrap());
    plan.check().unwrap();
}

#[test]
fn the_control_file_goes_first_and_comes_back_last() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    let marker = RestoreMarker { took_over: Some(ours()), ..RestoreMarker::default() };
    let tree = NewTree::open(&plan(&pgdata, None), &marker).unwrap();
    assert!(!pgdata.join(CONTROL_FILE).exists());
    assert!(pgdata.join(RESTORE_MARKER_NAME).exists());
    // Given up here: the next one goes on, and only one with `take_over` does.
    drop(tree);
    let others = TreePlan { take_over: None, ..plan(&pgdata, None) };
    let error = others.check().unwrap_err();
    assert!(
        matches!(error, TreeError::DeadRestore { marker, .. } if marker.took_over == Some(ours()))
    );
    let tree = NewTree::open(&plan(&pgdata, None), &marker).unwrap();
    let attributes = FileAttributes { size_bytes: 2, mode: 0o600, mtime_unix: 1_000_000_000 };
    let file = tree.create_file(Path::new("base/1/2"), attributes).unwrap();
    assert!(file.is_kept());
    file.finish().unwrap();
    assert_eq!(fs::read(pgdata.join("base/1/2")).unwrap(), b"ro", "as far as the size goes");
    for name in ["backup_label", "recovery.signal"] {
        tree.write_file(Path::new(name), b"", 0o600, 0).unwrap();
    }
    tree.sync_all().unwrap().publish_control(CONTROL).unwrap();
    assert_eq!(fs::read(pgdata.join(CONTROL_FILE)).unwrap(), CONTROL);
    assert!(!pgdata.join(RESTORE_MARKER_NAME).exists());
}

#[test]
fn a_global_that_leads_elsewhere_loses_its_link_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    let elsewhere = dir.path().join("elsewhere");
    fs::rename(pgdata.join("global"), &elsewhere).unwrap();
    symlink(&elsewhere, pgdata.join("global")).unwrap();
    drop(NewTree::open(&plan(&pgdata, None), &RestoreMarker::default()).unwrap());
    assert!(pgdata.join("global").is_dir() && !pgdata.join("global").is_symlink());
    assert_eq!(fs::read(elsewhere.join("pg_control")).unwrap(), CONTROL);
}

#[test]
fn bytes_that_are_cleared_are_zeros() {
    let dir = tempfile::tempdir().unwrap();
    let pgdata = cluster(dir.path(), Some(CONTROL));
    fs::write(pgdata.join("base/1/2"), vec![7; 300_000]).unwrap();
    let tree = NewTree::open(&plan(&pgdata, None), &RestoreMarker::default()).unwrap();
    let attributes = FileAttributes { size_bytes: 300_000, mode: 0o600, mtime_unix: 0 };
    let file = tree.create_file(Path::new("base/1/2"), attributes).unwrap();
    file.clear(65_536, 131_072).unwrap();
    file.clear(299_999, 1).unwrap();
    file.finish().unwrap();
    let mut expected = vec![7; 300_000];
    expected[65_536..65_536 + 131_072].fill(0);
    expected[299_999] = 0;
    assert!(fs::read(pgdata.join("base/1/2")).unwrap() == expected);
}

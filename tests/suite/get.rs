//! `archive-get`: only whole files, and "absent" only where that is certain.

use crate::harness::{
    Archived, NEWEST, NO_SMALL_DISK, Running, files_below, flip_bit, not_run, on_small_disk,
};
use highwater::format::{Codec, Header, Kind, encode_header};
use highwater::repo::WalSealer;
use std::path::Path;
use std::time::Duration;

/// Nothing is left at or beside the target.
#[track_caller]
fn assert_nothing_left(directory: &Path) {
    assert_eq!(files_below(directory), Vec::<std::path::PathBuf>::new());
}

#[test]
fn what_is_missing_is_certainly_absent_quickly_and_leaves_nothing() {
    let place = Archived::by_hand(NEWEST, 16);
    let directory = place.lab.directory("target");
    for name in ["00000001000000000000003C", "00000002.history", "00000007000000000000003C"] {
        let run = place.highwater.get(name, &directory.join("RECOVERYXLOG")).ends_with(1);
        assert!(run.elapsed < Duration::from_secs(5), "{:?}", run.elapsed);
        assert_nothing_left(&directory);
    }
}

#[test]
fn asking_for_the_next_segment_again_and_again_finds_it_when_it_comes() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    for _ in 0..5 {
        place.fetch(&name).0.ends_with(1);
    }
    place.highwater.push(&place.cluster.wal(&name)).done();
    place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
}

#[test]
fn an_unreachable_store_is_never_the_end_of_the_archive() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    place.highwater.push(&place.cluster.wal(&name)).done();
    let repo = place.highwater.repo_directory();
    let directory = place.lab.directory("target");
    let target = directory.join("RECOVERYXLOG");
    let highwater = place.highwater.with_retries(2);
    let away = repo.with_extension("away");
    std::fs::rename(&repo, &away).unwrap();
    for asked in [name.as_str(), "00000001000000000000003C", "00000002.history"] {
        highwater.get(asked, &target).ends_with(133);
        assert_nothing_left(&directory);
    }
    std::fs::rename(&away, &repo).unwrap();
    place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
}

#[test]
fn a_standby_may_take_an_outage_as_not_yet_there() {
    let place = Archived::by_hand(NEWEST, 16);
    let repo = place.highwater.repo_directory();
    std::fs::rename(&repo, repo.with_extension("away")).unwrap();
    let directory = place.lab.directory("standby");
    place.lab.write("standby/standby.signal", b"");
    let highwater = place.highwater.with_env("HIGHWATER_ARCHIVE_GET_DEADLINE", "3s");
    let highwater = highwater.in_directory(&directory);
    highwater.get("00000001000000000000003C", Path::new("pg_wal_target")).ends_with(1);
}

#[test]
fn a_damaged_object_is_never_handed_out() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(1);
    let name = &names[0];
    place.highwater.push(&place.cluster.wal(name)).done();
    let objects = place.objects_of(name);
    assert_eq!(objects.len(), 1);
    let whole = std::fs::read(&objects[0]).unwrap();
    let directory = place.lab.directory("target");
    let target = directory.join("RECOVERYXLOG");
    let last = whole.len() - 1;
    for offset in [0, 9, 60, whole.len() / 3, whole.len() / 2, last - 4, last] {
        flip_bit(&objects[0], offset);
        let run = place.highwater.get(name, &target);
        assert_eq!(run.code(), 132, "bit flipped at {offset}: {run}");
        assert_nothing_left(&directory);
        std::fs::write(&objects[0], &whole).unwrap();
    }
    for length in [0, 1, 20, whole.len() / 2, last] {
        std::fs::write(&objects[0], &whole[..length]).unwrap();
        let run = place.highwater.get(name, &target);
        assert_eq!(run.code(), 132, "cut to {length} bytes: {run}");
        assert_nothing_left(&directory);
    }
    std::fs::write(&objects[0], &whole).unwrap();
    place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
}

#[test]
fn an_object_under_the_name_of_another_is_never_handed_out() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(2);
    for name in &names {
        place.highwater.push(&place.cluster.wal(name)).done();
    }
    let first = place.objects_of(&names[0]);
    let second = place.objects_of(&names[1]);
    std::fs::copy(&first[0], &second[0]).unwrap();
    place.fetch(&names[1]).0.ends_with(132);
}

#[test]
fn a_full_disk_ends_recovery_instead_of_leaving_a_short_file() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    place.highwater.push(&place.cluster.wal(&name)).done();
    let directory = place.lab.directory("full");
    let listing = place.lab.path().join("listing");
    // What the command left there is listed before the file system goes away.
    let script = "\"$@\"; code=$?; ls -A \"$0\" > \"$LISTING\"; exit $code";
    let Some(mut command) = on_small_disk(&directory, script) else {
        return not_run("get::a_full_disk_ends_recovery", NO_SMALL_DISK);
    };
    place.highwater.settings_for(&mut command);
    command.env("LISTING", &listing).arg(place.highwater.command().get_program());
    command.args(["archive-get", &name]).arg(directory.join("RECOVERYXLOG"));
    let run = Running::start(command, "archive-get on a full disk".into()).wait();
    assert_eq!(run.code(), 135, "{run}");
    assert_eq!(std::fs::read_to_string(&listing).unwrap(), "", "something was left");
}

#[test]
fn a_target_directory_that_cannot_be_written_ends_recovery() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    place.highwater.push(&place.cluster.wal(&name)).done();
    let missing = place.lab.path().join("no/such/directory/RECOVERYXLOG");
    place.highwater.get(&name, &missing).ends_with(135);
}

#[test]
fn a_segment_is_given_as_often_as_asked_and_in_any_order() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(3);
    for name in &names {
        place.highwater.push(&place.cluster.wal(name)).done();
    }
    for name in names.iter().chain(names.iter().rev()).chain([&names[1], &names[1]]) {
        place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
    }
}

#[test]
fn an_old_file_at_the_target_is_replaced_only_by_a_whole_one() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    let directory = place.lab.directory("target");
    let target = place.lab.write("target/RECOVERYXLOG", b"what was there before");
    place.highwater.get(&name, &target).ends_with(1);
    place.highwater.push(&place.cluster.wal(&name)).done();
    place.highwater.get(&name, &target).done();
    let wanted = std::fs::read(place.cluster.wal(&name)).unwrap();
    assert!(std::fs::read(&target).unwrap() == wanted);
    assert_eq!(files_below(&directory).len(), 1);
}

#[test]
fn wrong_use_is_never_taken_for_the_end_of_the_archive() {
    let place = Archived::by_hand(NEWEST, 16);
    let target = place.lab.path().join("target");
    let target = target.to_str().unwrap();
    let wrong: [&[&str]; 5] = [
        &["archive-get", "nonsense", target],
        &["archive-get", "000000010000000000000001"],
        &["archive-get", "--no-such-flag", "000000010000000000000001", target],
        &["archive-get"],
        &["--repo", "ftp://nowhere", "archive-get", "000000010000000000000001", target],
    ];
    for arguments in wrong {
        place.highwater.run(arguments).ends_with(130);
    }
}

#[test]
fn a_place_that_was_never_claimed_is_not_an_empty_archive() {
    let place = Archived::by_hand(NEWEST, 16);
    let run = place.highwater.for_cluster("mistyped");
    let run = run.get("000000010000000000000001", &place.lab.path().join("target"));
    assert_eq!(run.code(), 133, "a mistyped cluster name must stop recovery: {run}");
}

#[test]
fn an_empty_mount_point_is_not_an_empty_archive() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    place.highwater.push(&place.cluster.wal(&name)).done();
    let repo = place.highwater.repo_directory();
    std::fs::rename(&repo, repo.with_extension("away")).unwrap();
    place.lab.directory("repo");
    let highwater = place.highwater.with_retries(2);
    // From a data directory, as a server asks, and from one that says nothing of the cluster.
    for directory in [place.cluster.pgdata.clone(), place.lab.directory("elsewhere")] {
        let highwater = highwater.in_directory(&directory);
        for asked in [name.as_str(), "00000001000000000000003C", "00000002.history"] {
            highwater.get(asked, &place.lab.path().join("target")).ends_with(133);
        }
    }
    assert!(!place.lab.path().join("target").exists());
}

#[test]
fn an_outage_in_the_midst_of_a_recovery_stops_the_server_and_never_promotes_it() {
    let place = Archived::by_server(NEWEST);
    place.cluster.sql("create table t (n int)");
    place.highwater.run(&["backup", "--fast"]).done();
    let row_and_segment = |n: u32| {
        place.cluster.sql(&format!("insert into t values ({n})"));
        place.cluster.archive_now()
    };
    let names: Vec<_> = (1..=4).map(row_and_segment).collect();
    let mut copy = place.restore("copy", &[]);
    // A short deadline, for the retries must end within the test.
    let settings = copy.pgdata.join("postgresql.auto.conf");
    let text = std::fs::read_to_string(&settings).unwrap();
    let hasty = "restore_command = 'HIGHWATER_ARCHIVE_GET_DEADLINE=3s ";
    let text = text.replace("restore_command = '", hasty);
    assert!(text.contains(hasty), "{text}");
    std::fs::write(&settings, text).unwrap();
    let object = place.objects_of(&names[2]).remove(0);
    let mode = |mode| {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(&object, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(0o000);
    let log = copy.try_start().expect_err("the server must not go on without that segment");
    assert!(log.contains(&format!("restored log file \"{}\"", names[1])), "{log}");
    assert!(log.contains("FATAL") && log.contains("exit code 133"), "{log}");
    assert!(!log.contains("selected new timeline"), "it was promoted:\n{log}");
    assert!(log.contains("highwater: error:") && log.contains("highwater:   next:"), "{log}");
    mode(0o640);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select string_agg(n::text, ',' order by n) from t"), "1,2,3,4");
}

#[test]
fn an_empty_history_in_the_archive_is_not_handed_out() {
    let place = Archived::by_hand(NEWEST, 16);
    let system_id = place.cluster.control("Database system identifier");
    place.lab.directory("target");
    for (timeline, text) in [(2, ""), (3, "2\t0/3000000\tno recovery target specified\n")] {
        // Sealed as `archive-push` would, had it not refused it.
        let name = format!("{timeline:08X}.history");
        let below = format!("wal/{system_id}/{name}");
        let id = system_id.parse().unwrap();
        let header = Header::new(Kind::TimelineHistory, below, id, Codec::None.packing());
        let mut sealer = WalSealer::new(Codec::None, Some(text.len() as u64)).unwrap();
        sealer.push(text.as_bytes()).unwrap();
        let sealed = sealer.finish(header).unwrap();
        let mut object = encode_header(&sealed.header).unwrap();
        sealed.body.pieces().iter().for_each(|piece| object.extend_from_slice(piece));
        std::fs::create_dir_all(place.highwater.repo_directory().join("main/wal").join(&system_id))
            .unwrap();
        place.lab.write(&format!("repo/main/wal/{system_id}/{name}"), &object);
        let target = place.lab.path().join("target/RECOVERYHISTORY");
        let run = place.highwater.get(&name, &target);
        let wanted = if text.is_empty() { 132 } else { 0 };
        assert_eq!(run.code(), wanted, "{run}");
        assert_eq!(target.exists(), wanted == 0, "the test's own object must be readable");
    }
}

#[test]
fn a_repository_of_a_newer_format_is_refused_whole() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    let identities = place.highwater.repo_directory().join("main/identity");
    let identity = identities.join(files_below(&identities).remove(0));
    let text = std::fs::read_to_string(&identity).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["format"] = 9.into();
    std::fs::write(&identity, json.to_string()).unwrap();
    place.highwater.push(&place.cluster.wal(&name)).ends_with(2).says("newer");
    assert!(place.objects_of(&name).is_empty());
    place.fetch(&name).0.ends_with(130).says("newer");
}

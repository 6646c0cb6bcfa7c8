//! `archive-push`: what is stored, what is refused, and what a server sees.

use crate::harness::{
    Archived, NEWEST, NO_SMALL_DISK, Running, as_server_user, fingerprint, finish, flip_bit,
    not_run, on_small_disk, wait_for,
};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(90);

/// A failure that PostgreSQL counts and tries again: 1 to 125.
#[track_caller]
fn assert_counted(code: i32) {
    assert!((1..=125).contains(&code), "exit code {code} would hide the failure");
}

#[test]
fn pushing_the_same_segment_twice_succeeds_and_writes_nothing_more() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = &place.segments(1)[0];
    place.highwater.push(&place.cluster.wal(name)).done();
    let stored = fingerprint(&place.highwater.repo_directory());
    place.highwater.push(&place.cluster.wal(name)).done();
    assert_eq!(fingerprint(&place.highwater.repo_directory()), stored);
    place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
}

#[test]
fn other_content_under_a_stored_name_is_refused_and_the_stored_copy_stays() {
    let mut place = Archived::by_hand(NEWEST, 16);
    let twin = place.twin();
    place.assert_keeps_its_own_against(&twin);
}

#[test]
fn an_outage_of_the_store_is_counted_and_everything_arrives_in_order_later() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    let hasty = place.highwater.with_retries(2);
    place.cluster.archive_into(&hasty);
    let repo = place.highwater.repo_directory();
    let away = repo.with_extension("away");
    std::fs::rename(&repo, &away).unwrap();
    let waiting = place.segments(3);
    place.cluster.wait_until("select failed_count >= 3 from pg_stat_archiver", "t");
    assert_eq!(
        place.cluster.sql("select last_failed_wal from pg_stat_archiver"),
        waiting[0],
        "the first segment blocks the later ones"
    );
    assert_counted(hasty.push(&place.cluster.wal(&waiting[0])).code());
    assert!(!repo.exists(), "a missing repository must not be made anew");
    std::fs::rename(&away, &repo).unwrap();
    place.cluster.wake_archiver();
    for name in &waiting {
        place.cluster.wait_archived(name);
        place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
    }
}

#[test]
fn a_repository_that_cannot_be_written_is_an_unavailable_store() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(2);
    place.highwater.push(&place.cluster.wal(&names[0])).done();
    let repo = place.highwater.repo_directory();
    let mode = |mode: &str| {
        let mut chmod = std::process::Command::new("chmod");
        assert!(chmod.args(["-R", mode]).arg(&repo).status().unwrap().success());
    };
    mode("a-w");
    place.highwater.push(&place.cluster.wal(&names[1])).ends_with(5);
    mode("u+w");
    place.highwater.push(&place.cluster.wal(&names[1])).done();
}

#[test]
fn a_full_repository_is_an_unavailable_store_and_shows_no_half_object() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = place.segments(1).remove(0);
    let listing = place.lab.path().join("listing");
    let repo = place.highwater.repo_directory();
    let kept = repo.with_extension("kept");
    let mut copy = as_server_user("/bin/cp");
    copy.arg("-a").args([&repo, &kept]);
    finish(copy);
    let script = "cp -a \"$KEPT/.\" \"$0\" || exit 98; \"$@\"; code=$?; \
                  (cd \"$0\" && find . -type f -size +64k) > \"$LISTING\"; exit $code";
    let Some(mut command) = on_small_disk(&repo, script) else {
        return not_run("archive::a_full_repository_is_an_unavailable_store", NO_SMALL_DISK);
    };
    place.highwater.settings_for(&mut command);
    command.env("KEPT", &kept).env("LISTING", &listing).env("HIGHWATER_COMPRESSION", "none");
    command.env("HIGHWATER_ARCHIVE_PUSH_DEADLINE", "10s");
    command.arg(place.highwater.command().get_program());
    command.arg("archive-push").arg(place.cluster.wal(&name));
    let run = Running::start(command, "archive-push into a full repository".into()).wait();
    let run = run.ends_with(5);
    assert_eq!(std::fs::read_to_string(&listing).unwrap(), "", "something was left: {run}");
    run.says("room");
}

#[test]
fn other_content_of_a_large_segment_is_refused_and_the_stored_pieces_stay() {
    let mut place = Archived::by_hand(NEWEST, 64);
    let twin = place.twin();
    let ours = place.assert_keeps_its_own_against(&twin);
    assert!(place.objects_of(&ours).len() > 1, "stored as pieces");
}

#[test]
fn the_servers_log_tells_what_failed_and_what_to_do_in_plain_lines() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    // Enough repetitions to see that they are not told one by one.
    place.cluster.archive_into(&place.highwater.with_retries(4));
    let repo = place.highwater.repo_directory();
    std::fs::rename(&repo, repo.with_extension("away")).unwrap();
    let name = place.segments(1).remove(0);
    place.cluster.wait_until("select failed_count >= 1 from pg_stat_archiver", "t");
    let log = place.cluster.log();
    let ours: Vec<_> = log.lines().filter(|line| line.starts_with("highwater:")).collect();
    for part in ["error: ", "  unharmed: ", "  next: "] {
        let said = |line: &&str| line.starts_with(&format!("highwater: {part}"));
        assert!(ours.iter().any(said), "{part:?} is missing:\n{log}");
    }
    assert!(ours.iter().any(|line| line.contains(&name)), "the file is not named:\n{log}");
    assert!(ours.iter().all(|line| line.len() < 600), "a line too long to read:\n{log}");
    let strange = |c: char| c.is_control() && c != '\t' && c != '\n';
    assert!(!log.contains(strange), "control characters:\n{log}");
    let warnings = ours.iter().filter(|line| line.starts_with("highwater: warning:")).count();
    let errors = ours.iter().filter(|line| line.starts_with("highwater: error:")).count();
    assert!(warnings <= errors + 1, "each repetition is said again:\n{log}");
    // Nothing else, such as a panic or a progress bar, from the archiver.
    let other = |line: &&str| !line.starts_with("highwater:") && !line.contains(" UTC [");
    let other: Vec<_> = log.lines().filter(other).collect();
    assert!(other.iter().all(|line| line.starts_with('\t')), "{other:?}");
}

#[test]
fn a_repository_that_does_not_exist_is_not_made_by_a_push() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = &place.segments(1)[0];
    let nowhere = place.lab.path().join("nowhere");
    let highwater = place.highwater.for_repo(&format!("file://{}", nowhere.display()));
    let highwater = highwater.with_retries(2);
    assert_counted(highwater.push(&place.cluster.wal(name)).code());
    assert!(!nowhere.exists());
}

#[test]
fn a_segment_of_wrong_size_is_refused() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = &place.segments(1)[0];
    let bytes = std::fs::read(place.cluster.wal(name)).unwrap();
    let directory = place.lab.directory("cut");
    for wrong in [&bytes[..bytes.len() - 8192], &bytes[..100], &[], &[&*bytes, &[0; 8192]].concat()]
    {
        let path = place.lab.write(&format!("cut/{name}"), wrong);
        place.highwater.push(&path).ends_with(4);
        assert!(place.objects_of(name).is_empty());
    }
    drop(directory);
}

#[test]
fn a_file_that_is_not_there_is_a_failure() {
    let place = Archived::by_hand(NEWEST, 16);
    let missing = place.cluster.wal("0000000100000000000000AA");
    assert_counted(place.highwater.push(&missing).code());
    assert!(place.objects_of("0000000100000000000000AA").is_empty());
}

#[test]
fn a_malformed_name_is_wrong_use() {
    let place = Archived::by_hand(NEWEST, 16);
    for name in ["nonsense", "00000001000000000000001", "00000001000000000000000g", "backup_label"]
    {
        let path = place.lab.write(name, b"anything");
        place.highwater.push(&path).ends_with(2).says(name);
    }
}

#[test]
fn a_segment_of_another_cluster_is_refused() {
    let place = Archived::by_hand(NEWEST, 16);
    let other = place.lab.cluster(NEWEST).named("other").start();
    let name = other.switch_wal();
    let sysid = other.control("Database system identifier");
    place.highwater.push(&other.wal(&name)).ends_with(3).says(&sysid);
    assert!(place.objects_of(&name).is_empty());
}

#[test]
fn a_cluster_made_anew_cannot_take_the_place_of_the_old_one() {
    let place = Archived::by_hand(NEWEST, 16);
    let old = place.cluster.control("Database system identifier");
    let anew = place.lab.cluster(NEWEST).named("anew").start();
    let stored = fingerprint(&place.highwater.repo_directory());
    place.highwater.on(&anew).run(&["init"]).ends_with(3).says(&old);
    assert_eq!(fingerprint(&place.highwater.repo_directory()), stored);
}

#[test]
fn init_again_for_the_same_cluster_changes_nothing() {
    let place = Archived::by_hand(NEWEST, 16);
    let stored = fingerprint(&place.highwater.repo_directory());
    place.highwater.run(&["init"]).done();
    assert_eq!(fingerprint(&place.highwater.repo_directory()), stored);
}

#[test]
fn segments_of_every_size_come_back_byte_for_byte() {
    for mib in [1, 64] {
        let place = Archived::by_hand(NEWEST, mib);
        for name in place.segments(3) {
            place.highwater.push(&place.cluster.wal(&name)).done();
            place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
        }
    }
}

#[test]
fn a_segment_of_one_gibibyte_comes_back_byte_for_byte() {
    let place = Archived::by_hand(NEWEST, 1024);
    let name = &place.segments(1)[0];
    place.highwater.push(&place.cluster.wal(name)).done();
    let (run, fetched) = place.fetch(name);
    run.done();
    let digest = |path: &std::path::Path| {
        let mut hasher = blake3::Hasher::new();
        std::io::copy(&mut std::fs::File::open(path).unwrap(), &mut hasher).unwrap();
        hasher.finalize()
    };
    assert_eq!(digest(&fetched), digest(&place.cluster.wal(name)));
}

#[test]
fn a_switch_in_the_first_page_leaves_a_valid_segment() {
    let place = Archived::by_hand(NEWEST, 16);
    place.cluster.switch_wal();
    let name = place.cluster.switch_wal();
    let bytes = std::fs::read(place.cluster.wal(&name)).unwrap();
    assert!(bytes[8192..].iter().all(|b| *b == 0), "only the first page was written");
    place.highwater.push(&place.cluster.wal(&name)).done();
    place.assert_gives_back(&name, &bytes);
}

#[test]
fn records_across_segments_and_longer_than_one_are_valid() {
    let place = Archived::by_hand(NEWEST, 1);
    let first = place.cluster.switch_wal();
    place.cluster.sql("select pg_logical_emit_message(false, 'long', repeat('x', 3500000))");
    let last = place.cluster.switch_wal();
    let names: Vec<_> = place.cluster.finished_segments();
    let names: Vec<_> = names.iter().filter(|name| **name >= first && **name <= last).collect();
    assert!(names.len() >= 5, "the record fills whole segments: {names:?}");
    for name in names {
        place.highwater.push(&place.cluster.wal(name)).done();
        place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
    }
}

/// As PostgreSQL's own test 026_overwrite_contrecord: a record runs into the
/// next segment, the server crashes, and that next segment is lost.
#[test]
fn a_record_abandoned_by_a_crash_leaves_valid_segments() {
    let mut place = Archived::by_hand(NEWEST, 16);
    place.cluster.switch_wal();
    // Fill until less than 100 kB are left, then write a longer record.
    place.cluster.sql(
        "do $$ begin loop \
           perform pg_logical_emit_message(false, 'fill', repeat('x', 8000)); \
           exit when pg_walfile_name_offset(pg_current_wal_insert_lsn()) is null \
             or (pg_walfile_name_offset(pg_current_wal_insert_lsn())).file_offset > 16777216 - 100000; \
         end loop; end $$",
    );
    let cut = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    place.cluster.sql("select pg_logical_emit_message(true, 'cut', repeat('y', 400000))");
    let lost = place.cluster.sql("select pg_walfile_name(pg_current_wal_insert_lsn())");
    assert!(lost > cut);
    place.cluster.immediate_stop();
    std::fs::remove_file(place.cluster.wal(&lost)).unwrap();
    place.cluster.start();
    let after = place.cluster.switch_wal();
    assert_eq!(after, lost, "the segment is written anew");
    let mut waldump = place.cluster.tool("pg_waldump");
    let output = waldump.arg(place.cluster.wal(&after)).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("OVERWRITE_CONTRECORD"));
    for name in [cut, after] {
        place.highwater.push(&place.cluster.wal(&name)).done();
        place.assert_gives_back(&name, &std::fs::read(place.cluster.wal(&name)).unwrap());
    }
}

/// Where records begin in a segment, as pg_waldump says; only those whose header
/// of 24 bytes lies within one page.
fn record_offsets(place: &Archived, name: &str) -> Vec<usize> {
    let path = place.cluster.wal(name);
    let size = usize::try_from(std::fs::metadata(&path).unwrap().len()).unwrap();
    let mut waldump = place.cluster.tool("pg_waldump");
    let output = finish({
        waldump.arg(path);
        waldump
    });
    let text = String::from_utf8(output.stdout).unwrap();
    let offset = |line: &str| {
        let (_, low) = line.split_once("lsn: ")?.1.split(',').next()?.split_once('/')?;
        Some(usize::from_str_radix(low, 16).unwrap() % size)
    };
    text.lines().filter_map(offset).filter(|at| at % 8192 + 24 <= 8192).collect()
}

#[test]
fn a_damaged_segment_is_refused_with_its_reason_and_nothing_is_stored() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(3);
    let bytes = std::fs::read(place.cluster.wal(&names[1])).unwrap();
    let records = record_offsets(&place, &names[1]);
    place.lab.directory("damaged");
    let refuse = |what: &str, bytes: &[u8]| {
        let path = place.lab.write(&format!("damaged/{}", names[1]), bytes);
        let run = place.highwater.push(&path).ends_with(4);
        assert!(!run.stderr.is_empty(), "{what} is refused without a reason");
        assert!(place.objects_of(&names[1]).is_empty(), "{what} was stored");
    };
    refuse("zeros", &vec![0; bytes.len()]);
    // The magic, the page address, and checksums of records early, amid and late.
    let middle = records[records.len() * 3 / 4];
    for offset in [0, 8, records[2] + 20, middle + 20, records[records.len() - 2] + 20] {
        let mut flipped = bytes.clone();
        flipped[offset] ^= 4;
        refuse(&format!("a bit flipped at {offset}"), &flipped);
    }
    let mut torn = bytes.clone();
    torn[middle..].fill(0);
    refuse("a segment that ends in zeros", &torn);
    refuse("a recycled segment", &std::fs::read(place.cluster.wal(&names[0])).unwrap());
    place.highwater.push(&place.cluster.wal(&names[1])).done();
}

#[test]
fn archiving_goes_on_behind_a_damaged_segment_only_once_an_operator_accepts_the_hole() {
    let place = Archived::by_hand(NEWEST, 16);
    let names = place.segments(3);
    pass_a_damaged_segment(&place, &names);
}

/// The damage is behind the first piece, which is good by itself and must not be stored.
#[test]
fn a_damaged_segment_of_several_pieces_is_accepted_as_a_whole() {
    let place = Archived::by_hand(NEWEST, 64);
    let names = place.segments_with(3, 300_000);
    pass_a_damaged_segment(&place, &names);
    // One that was damaged after a part of it had been stored: the part stays what it was.
    let name = &place.segments_with(1, 300_000)[0];
    place.highwater.push(&place.cluster.wal(name)).done();
    let pieces = place.objects_of(name);
    std::fs::remove_file(&pieces[1]).unwrap();
    let mut torn = std::fs::read(place.cluster.wal(name)).unwrap();
    let records = record_offsets(&place, name);
    let middle = records[records.len() * 3 / 4];
    assert!(middle > 16 << 20);
    torn[middle..].fill(0);
    let path = place.lab.write(&format!("damaged/{name}"), &torn);
    place.highwater.push(&path).ends_with(4);
    place.highwater.run(&["archive-push", "--accept-damaged", path.to_str().unwrap()]).done();
    place.highwater.push(&path).done();
    torn[16 << 20..].fill(0);
    place.assert_gives_back(name, &torn);
    place.highwater.push(&place.cluster.wal(name)).done();
    place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
}

/// Refused, accepted by hand, mended: from the first push to the hole that closes.
fn pass_a_damaged_segment(place: &Archived, names: &[String]) {
    let whole = |name: &str| std::fs::read(place.cluster.wal(name)).unwrap();
    place.highwater.push(&place.cluster.wal(&names[0])).done();
    let mut torn = whole(&names[1]);
    let records = record_offsets(place, &names[1]);
    let middle = records[records.len() * 3 / 4];
    torn[middle..].fill(0);
    place.lab.directory("damaged");
    let path = place.lab.write(&format!("damaged/{}", names[1]), &torn);
    place.highwater.push(&path).ends_with(4).says("--accept-damaged");
    assert!(place.objects_of(&names[1]).is_empty(), "a part of it was stored");
    let path_text = path.to_str().unwrap();
    place.highwater.run(&["archive-push", "--accept-damaged", path_text]).done();
    // PostgreSQL's own attempt with the same bytes succeeds from now on; other bytes do not.
    place.highwater.push(&path).done();
    torn[middle - 1] ^= 1;
    place.lab.write(&format!("damaged/{}", names[1]), &torn);
    place.highwater.push(&path).ends_with(4);
    place.highwater.push(&place.cluster.wal(&names[2])).done();
    // Recovery never gets it, and everybody is told.
    place.highwater.get(&names[1], &place.lab.path().join("got")).ends_with(1);
    let wal = &place.highwater.info()["wal"][0];
    assert_eq!(wal["damaged"][0], names[1].as_str());
    assert_eq!(wal["gaps"].as_array().unwrap().len(), 1);
    // The good file, if it turns up, closes the hole.
    place.highwater.push(&place.cluster.wal(&names[1])).done();
    place.assert_gives_back(&names[1], &whole(&names[1]));
    assert!(place.highwater.info()["wal"][0]["gaps"].as_array().unwrap().is_empty());
}

#[test]
fn an_empty_or_garbled_history_file_is_refused() {
    let place = Archived::by_hand(NEWEST, 16);
    for text in ["", "\n", "nonsense\n", "2\t0/3000000\tits own child\n"] {
        let path = place.lab.write("00000002.history", text.as_bytes());
        place.highwater.push(&path).ends_with(4);
    }
    let good = "1\t0/3000000\tno recovery target specified\n";
    let path = place.lab.write("00000002.history", good.as_bytes());
    place.highwater.push(&path).done();
    place.assert_gives_back("00000002.history", good.as_bytes());
}

#[test]
fn every_compression_gives_the_same_bytes_back() {
    let place = Archived::by_hand(NEWEST, 16);
    let choices = ["zstd", "lz4", "none"];
    for (name, choice) in place.segments(3).iter().zip(choices) {
        let highwater = place.highwater.with_env("HIGHWATER_COMPRESSION", choice);
        highwater.push(&place.cluster.wal(name)).done();
        place.assert_gives_back(name, &std::fs::read(place.cluster.wal(name)).unwrap());
        // The same segment under another codec is still the same content.
        place.highwater.push(&place.cluster.wal(name)).done();
    }
}

#[test]
fn a_bit_flipped_in_the_file_between_two_pushes_is_noticed() {
    let place = Archived::by_hand(NEWEST, 16);
    let name = &place.segments(1)[0];
    place.lab.directory("copy");
    let bytes = std::fs::read(place.cluster.wal(name)).unwrap();
    let copy = place.lab.write(&format!("copy/{name}"), &bytes);
    place.highwater.push(&copy).done();
    flip_bit(&copy, 5000);
    assert_counted(place.highwater.push(&copy).code());
    place.assert_gives_back(name, &bytes);
}

#[test]
fn a_killed_archiver_leads_to_a_second_push_that_succeeds() {
    let place = Archived::by_server(NEWEST);
    let name = place.cluster.archive_now();
    // What a crash of the machine after PostgreSQL 16 can do: the file is
    // marked as not archived again.
    let status = place.cluster.pgdata.join("pg_wal/archive_status");
    std::fs::rename(status.join(format!("{name}.done")), status.join(format!("{name}.ready")))
        .unwrap();
    place.cluster.switch_wal();
    wait_for("the same segment is archived again", LIMIT, || {
        status.join(format!("{name}.done")).exists()
    });
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
}

//! Commands that change a repository or the local disk, and every one again on what the power left of it.

use super::disk::Image;
use super::{Recording, trace};
use crate::harness::{
    Archived, Cluster, Highwater, Lab, NEWEST, Run, Running, as_server_user, files_below,
    reachable_binary,
};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A command that strace watches, not started yet.
fn watched(highwater: &Highwater, trace: &Path, with_content: bool, arguments: &[&str]) -> Running {
    let mut command = trace::strace(as_server_user("/usr/bin/strace"), trace, with_content);
    highwater.settings_for(&mut command);
    command.arg(reachable_binary()).args(arguments);
    Running::start(command, arguments.join(" "))
}

/// Runs a command to its end, which must be a good one, and watches what it does to the repository.
fn watch(lab: &Lab, highwater: &Highwater, arguments: &[&str]) -> (Recording, Run) {
    let trace = lab.path().join("trace");
    let recording = Recording::begin(&[highwater.repo_directory()]);
    let run = watched(highwater, &trace, true, arguments).wait().done();
    (recording.finish(&trace), run)
}

/// The repository of an image, and the binary set up for it.
struct Revived {
    highwater: Highwater,
    directory: PathBuf,
}

impl Revived {
    fn new(lab: &Lab, highwater: &Highwater, image: &Image) -> Self {
        let directory = lab.path().join("image");
        std::fs::remove_dir_all(&directory).ok();
        image.write(&highwater.repo_directory(), &directory);
        let highwater = highwater.for_repo(&format!("file://{}", directory.display()));
        Self { highwater, directory }
    }

    fn is_clean(&self, image: &Image) {
        let run = self.highwater.run(&["verify", "--deep", "--all"]);
        assert_eq!(run.code(), 0, "{}: {run}", image.how);
    }

    /// The objects, but for what `verify` remembers.
    fn objects(&self) -> BTreeSet<PathBuf> {
        objects(&self.directory)
    }
}

fn objects(repository: &Path) -> BTreeSet<PathBuf> {
    let is_own = |path: &Path| path.iter().any(|part| part == "verify" || part == ".staging");
    files_below(repository).into_iter().filter(|path| !is_own(path)).collect()
}

/// Fails unless the repository gives back these bytes, or says for certain that it has none.
#[track_caller]
fn assert_whole_or_absent(
    highwater: &Highwater,
    cluster: &Cluster,
    name: &str,
    is_confirmed: bool,
    how: &str,
) {
    let target = highwater.repo_directory().with_extension("target");
    std::fs::remove_file(&target).ok();
    let run = highwater.get(name, &target);
    match run.code() {
        0 => assert!(
            std::fs::read(&target).unwrap() == std::fs::read(cluster.wal(name)).unwrap(),
            "{name} is not what was stored: {how}"
        ),
        1 => assert!(!is_confirmed, "{name} was confirmed and is gone: {how}: {run}"),
        _ => panic!("{how}: {run}"),
    }
}

#[test]
fn a_place_is_claimed_and_wal_is_stored_whatever_the_power_leaves() {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).segment_mib(1).conf("archive_mode = on").start();
    let highwater = lab.highwater().on(&cluster);
    let mut names = Vec::new();
    for _ in 0..4 {
        names.push(cluster.switch_wal());
    }
    let push = |highwater: &Highwater, name: &str| highwater.push(&cluster.wal(name)).done();
    let (recording, _) = watch(&lab, &highwater, &["init"]);
    for image in recording.some_images("init", 12) {
        let revived = Revived::new(&lab, &highwater, &image);
        revived.highwater.run(&["init"]).done();
        push(&revived.highwater, &names[0]);
        assert_whole_or_absent(&revived.highwater, &cluster, &names[0], true, &image.how);
        revived.is_clean(&image);
    }
    // Three others wait, and are stored beside the one that is asked for.
    let in_pgdata = highwater.in_directory(&cluster.pgdata);
    let first = format!("pg_wal/{}", names[0]);
    let (recording, _) = watch(&lab, &in_pgdata, &["archive-push", &first]);
    assert!(objects(&highwater.repo_directory()).len() > 4, "the others were not pushed ahead");
    let end = recording.disk.end();
    for image in recording.some_images("archive-push", 15) {
        let revived = Revived::new(&lab, &highwater, &image);
        for name in &names {
            let is_confirmed = image.moment == end && *name == names[0];
            assert_whole_or_absent(&revived.highwater, &cluster, name, is_confirmed, &image.how);
        }
        for name in &names {
            push(&revived.highwater, name);
            assert_whole_or_absent(&revived.highwater, &cluster, name, true, &image.how);
        }
        revived.is_clean(&image);
    }
}

/// A cluster that archives, with something in it.
fn with_rows() -> Archived {
    let place = Archived::by_server_with(NEWEST, |cluster| cluster.segment_mib(1));
    place.cluster.sql("create table t as select g, md5(g::text) from generate_series(1, 3000) g");
    place
}

fn back_up(highwater: &Highwater, source: &str) -> String {
    let made = highwater.run(&["backup", "--fast", "--json", "--source", source]).done().json();
    made["id"].as_str().unwrap().to_owned()
}

fn backups(highwater: &Highwater) -> Vec<String> {
    let info = highwater.info();
    let ids = info["backups"].as_array().unwrap().iter();
    ids.map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_backup_is_wholly_there_or_not_at_all_whatever_the_power_leaves() {
    for source in ["stream", "files"] {
        let place = with_rows();
        let first = back_up(&place.highwater, source);
        place.cluster.sql("update t set md5 = md5(md5) where g % 7 = 0; checkpoint");
        let arguments = ["backup", "--fast", "--json", "--source", source];
        let (mut recording, run) = watch(&place.lab, &place.highwater, &arguments);
        // The server has archived meanwhile.
        recording.disk.add_from_others();
        let made = run.json()["id"].as_str().unwrap().to_owned();
        let end = recording.disk.end();
        let images = recording.some_images("backup", 12);
        for (number, image) in images.iter().enumerate() {
            let revived = Revived::new(&place.lab, &place.highwater, image);
            let listed = backups(&revived.highwater);
            assert!(listed.contains(&first), "{}", image.how);
            assert!(image.moment < end || listed.contains(&made), "{}", image.how);
            revived.is_clean(image);
            if number % 4 == 0 {
                place.cluster.archive_into(&revived.highwater);
                let again = back_up(&revived.highwater, source);
                let pgdata = place.lab.path().join(format!("restored-{number}"));
                let pgdata = pgdata.to_str().unwrap();
                let arguments =
                    ["restore", "--pgdata", pgdata, "--backup", &again, "--to-immediate"];
                revived.highwater.run(&arguments).done();
            }
        }
    }
}

#[test]
fn expire_takes_nothing_that_is_needed_and_is_ended_by_the_next_whatever_the_power_leaves() {
    let place = with_rows();
    for _ in 0..3 {
        back_up(&place.highwater, "files");
        place.cluster.sql("update t set md5 = md5(md5) where g % 5 = 0; checkpoint");
    }
    place.cluster.archive_now();
    let newest = backups(&place.highwater).pop().unwrap();
    let arguments = ["expire", "--retain-backups", "1"];
    let (recording, _) = watch(&place.lab, &place.highwater, &arguments);
    let finished = objects(&place.highwater.repo_directory());
    let mut ended = 0;
    for image in recording.some_images("expire", 20) {
        let revived = Revived::new(&place.lab, &place.highwater, &image);
        assert!(backups(&revived.highwater).contains(&newest), "{}", image.how);
        revived.is_clean(&image);
        revived.highwater.run(&arguments).done();
        // Between its two documents, a backup that goes may be one that runs: that is left alone, with its WAL.
        let info = revived.highwater.info();
        let unfinished = info["unfinished_backups"].as_array().unwrap().iter();
        if unfinished.into_iter().any(|one| !one["begun_at"].is_null()) {
            assert!(revived.objects().is_superset(&finished), "{}", image.how);
        } else {
            assert_eq!(revived.objects(), finished, "{}", image.how);
            ended += 1;
        }
        revived.is_clean(&image);
    }
    assert!(ended > 5, "{ended}");
}

#[test]
fn somebody_can_read_everything_whatever_the_power_leaves_of_a_change_of_keys() {
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).segment_mib(1).start();
    let highwater = lab.highwater().on(&cluster);
    let trace = lab.path().join("trace");
    // A key that was made is there, or every object under it is lost.
    let keys = lab.directory("keys");
    let recording = Recording::begin(std::slice::from_ref(&keys));
    let first = keys.join("first");
    watched(&highwater, &trace, true, &["key", "new", first.to_str().unwrap()]).wait().done();
    let recording = recording.finish(&trace);
    assert_eq!(recording.disk.not_durable(recording.disk.end()), Vec::<PathBuf>::new());

    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let [second, third] = ["second", "third"].map(|name| highwater.new_key(name));
    let highwater = highwater.with_key(&first);
    let names = [cluster.switch_wal(), cluster.switch_wal()];
    let works = |revived: &Revived, key: &Path, image: &Image| {
        Revived {
            highwater: revived.highwater.with_key(key),
            directory: revived.directory.clone(),
        }
        .is_clean(image);
    };
    let id = |key: &Path| {
        let keys = highwater.with_key(key).run(&["--json", "key", "list"]).done().json();
        let keys = keys["user_keys"].as_array().unwrap().clone();
        let ours = keys.into_iter().find(|key| key["in_hand"] == true).unwrap();
        ours["user_key"].as_str().unwrap().to_owned()
    };

    let (recording, _) = watch(&lab, &highwater, &["init"]);
    for image in recording.some_images("init with a key", 10) {
        let revived = Revived::new(&lab, &highwater, &image);
        revived.highwater.run(&["init"]).done();
        revived.highwater.push(&cluster.wal(&names[0])).done();
        works(&revived, &first, &image);
    }
    highwater.push(&cluster.wal(&names[0])).done();

    let (second_text, third_text) = (text(&second), text(&third));
    let (recording, _) = watch(&lab, &highwater, &["key", "add", &second_text]);
    let end = recording.disk.end();
    for image in recording.some_images("key add", 10) {
        let revived = Revived::new(&lab, &highwater, &image);
        works(&revived, &first, &image);
        if image.moment == end {
            works(&revived, &second, &image);
        }
        revived.highwater.run(&["key", "add", &second_text]).done();
        works(&revived, &second, &image);
    }

    let rotate = ["key", "rotate", "--also", &second_text];
    let (recording, _) = watch(&lab, &highwater, &rotate);
    for image in recording.some_images("key rotate", 10) {
        let revived = Revived::new(&lab, &highwater, &image);
        revived.highwater.push(&cluster.wal(&names[1])).done();
        works(&revived, &first, &image);
        works(&revived, &second, &image);
        revived.highwater.run(&rotate).done();
        works(&revived, &second, &image);
    }
    highwater.push(&cluster.wal(&names[1])).done();

    let first_id = id(&first);
    let by_second = highwater.with_key(&second);
    let rewrap = ["key", "rewrap", &third_text];
    let (recording, _) = watch(&lab, &by_second, &rewrap);
    let end = recording.disk.end();
    for image in recording.some_images("key rewrap", 10) {
        let revived = Revived::new(&lab, &by_second, &image);
        works(&revived, &first, &image);
        let by_third = revived.highwater.with_key(&third);
        if image.moment == end {
            works(&revived, &third, &image);
            revived.highwater.run(&["verify"]).ends_with(2);
        } else if by_third.run(&["verify"]).code() != 0 {
            // The new one opens nothing yet, or not everything: the old one does.
            works(&revived, &second, &image);
            revived.highwater.run(&rewrap).done();
        }
        works(&revived, &third, &image);
    }

    let by_third = highwater.with_key(&third);
    let remove = ["key", "remove", &first_id];
    let (recording, _) = watch(&lab, &by_third, &remove);
    let end = recording.disk.end();
    for image in recording.some_images("key remove", 10) {
        let revived = Revived::new(&lab, &by_third, &image);
        works(&revived, &third, &image);
        if image.moment < end {
            let code = revived.highwater.run(&remove).code();
            assert!([0, 1].contains(&code), "{}", image.how);
        }
        revived.highwater.with_key(&first).run(&["verify"]).ends_with(2);
        works(&revived, &third, &image);
    }
}

#[test]
fn what_was_proven_pinned_and_acknowledged_survives_and_half_of_it_harms_nothing() {
    let place = with_rows();
    let id = back_up(&place.highwater, "stream");
    let gone = place.segments(1).remove(0);
    place.segments(1);
    place.cluster.archive_now();
    for arguments in [&["verify", "--deep"][..], &["pin", &id, "--reason", "kept"], &["unpin", &id]]
    {
        let (recording, _) = watch(&place.lab, &place.highwater, arguments);
        let end = recording.disk.end();
        for image in recording.some_images(arguments[0], 8) {
            let revived = Revived::new(&place.lab, &place.highwater, &image);
            let info = revived.highwater.info();
            let pinned = info["backups"][0].to_string().contains("kept");
            match (arguments[0], image.moment == end) {
                ("verify", true) => assert!(info["verification"].is_object(), "{info}"),
                ("pin", true) => assert!(pinned, "{info}"),
                ("unpin", true) => assert!(!pinned, "{info}"),
                _ => {
                    let code = revived.highwater.run(arguments).code();
                    // A pin that was gone already is no pin.
                    assert!(code == 0 || (code == 1 && arguments[0] == "unpin"), "{}", image.how);
                }
            }
            revived.is_clean(&image);
        }
    }
    for object in place.objects_of(&gone) {
        std::fs::remove_file(object).unwrap();
    }
    let found = place.highwater.run(&["verify", "--json"]).ends_with(4).json();
    let finding = found["findings"][0]["id"].as_str().unwrap();
    let arguments = ["verify", "--acknowledge", finding, "--reason", "a test took it"];
    let (recording, _) = watch(&place.lab, &place.highwater, &arguments);
    let end = recording.disk.end();
    for image in recording.some_images("acknowledge", 3) {
        let revived = Revived::new(&place.lab, &place.highwater, &image);
        if image.moment < end && revived.highwater.run(&["verify"]).code() == 4 {
            revived.highwater.run(&arguments).done();
        }
        revived.is_clean(&image);
    }
}

/// The flush position that was told to the server, at most, in what was sent: a standby status update of the streaming
/// replication protocol ("r", then the positions written, flushed and applied, and a time) in a message of copied data.
fn acknowledged<'a>(sent: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut most = 0;
    for bytes in sent {
        for at in 0..bytes.len().saturating_sub(38) {
            if bytes[at..at + 6] == [b'd', 0, 0, 0, 38, b'r'] {
                let flushed = bytes[at + 14..at + 22].try_into().unwrap();
                most = most.max(u64::from_be_bytes(flushed));
            }
        }
    }
    most
}

#[test]
fn what_was_acknowledged_to_the_server_is_stored_whatever_the_power_leaves() {
    let place = Archived::by_hand(NEWEST, 1);
    let trace = place.lab.path().join("trace");
    let recording = Recording::begin(&[place.highwater.repo_directory()]);
    let streaming = "select count(*) > 0 from pg_stat_replication where state = 'streaming'";
    let receiver = watched(&place.highwater, &trace, true, &["-v", "receive"]);
    place.cluster.wait_until(streaming, "t");
    place.cluster.sql("create table t (n int, m text)");
    for n in 0..12 {
        place.cluster.sql(&format!(
            "insert into t select g, md5((g * {n})::text) from generate_series(1, 1500) g"
        ));
    }
    let last = place.cluster.switch_wal();
    let lsn = place.cluster.sql("select pg_current_wal_flush_lsn()");
    let done =
        format!("select coalesce(max(flush_lsn) >= '{lsn}', false) from pg_stat_replication");
    place.cluster.wait_until(&done, "t");
    terminate(&receiver);
    receiver.wait().done();
    let recording = recording.finish(&trace);

    let first = place.highwater.info()["wal"][0]["start_lsn"].as_str().unwrap().to_owned();
    let (mut mid_segment, mut segments) = (0, BTreeSet::new());
    for image in recording.some_images("receive", 40) {
        let revived = Revived::new(&place.lab, &place.highwater, &image);
        let acknowledged = acknowledged(recording.disk.sent_until(image.moment));
        let mut at = crate::harness::parse_lsn(&first);
        while at < acknowledged {
            let segment = at >> 20;
            let (name, end) = (
                format!("00000001{:08X}{:08X}", segment >> 12, segment & 0xFFF),
                (segment + 1) << 20,
            );
            let target = place.lab.path().join("target");
            std::fs::remove_file(&target).ok();
            let run = revived.highwater.get(&name, &target);
            assert_eq!(
                run.code(),
                0,
                "{name}, acknowledged {acknowledged:X}: {}: {run}",
                image.how
            );
            let (found, truth) =
                (std::fs::read(&target).unwrap(), std::fs::read(place.cluster.wal(&name)).unwrap());
            let told = usize::try_from(acknowledged.min(end) - (segment << 20)).unwrap();
            assert!(found[..told] == truth[..told], "{name} up to {told}: {}", image.how);
            mid_segment += u32::from(acknowledged < end);
            segments.insert(name);
            at = end;
        }
        // It goes on where the disk stands, and ends with all of it. (At earlier moments the server's slot would not
        // yet stand where it stands now.)
        if image.moment == recording.disk.end() {
            let again =
                crate::harness::Receiver::streaming(&revived.highwater, &place.cluster, &[]);
            again.wait_acknowledged(&place.cluster);
            again.terminate().done();
            for name in segments.iter().filter(|name| **name <= last) {
                assert_whole_or_absent(&revived.highwater, &place.cluster, name, true, &image.how);
            }
            revived.is_clean(&image);
        }
    }
    eprintln!("{} segments, {mid_segment} times acknowledged in the middle of one", segments.len());
    assert!(segments.len() > 2 && mid_segment > 0, "nothing was acknowledged");
}

/// Asks what strace watches to end; strace itself takes no signal then.
fn terminate(strace: &Running) {
    let id = strace.id();
    let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
    let child: i32 = children.split_whitespace().next().unwrap().parse().unwrap();
    let child = rustix::process::Pid::from_raw(child).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::TERM).unwrap();
}

#[test]
fn a_restored_cluster_can_start_only_when_all_of_it_is_durable() {
    let place = with_rows();
    back_up(&place.highwater, "stream");
    place.cluster.archive_now();
    let above = place.lab.directory("restored");
    let pgdata = above.join("data");
    let trace = place.lab.path().join("trace");
    let recording = Recording::begin(std::slice::from_ref(&above));
    watched(&place.highwater, &trace, false, &["restore", "--pgdata", pgdata.to_str().unwrap()])
        .wait()
        .done();
    let disk = recording.finish(&trace).disk;
    let control = pgdata.join("global/pg_control");
    assert_eq!(disk.not_durable(disk.end()), Vec::<PathBuf>::new());
    let (mut before, mut after) = (0, 0);
    for moment in disk.moments() {
        if !disk.may_exist(&control, moment) {
            before += 1;
            continue;
        }
        after += 1;
        let loose = disk.not_durable(moment);
        // Its own name, and what is there only while a restore runs.
        let is_last = |path: &PathBuf| {
            let name = path.file_name().unwrap().to_string_lossy();
            *path == control || name.contains("highwater")
        };
        assert!(loose.iter().all(is_last), "line {moment}: {loose:?}");
    }
    assert!(before > 1000 && after > 2, "{before} moments before, {after} after");
}

#[test]
fn recovery_gets_its_wal_again_whatever_the_power_leaves_of_it() {
    let place = Archived::by_hand(NEWEST, 1);
    let name = place.segments(1).remove(0);
    place.highwater.push(&place.cluster.wal(&name)).done();
    let wanted = std::fs::read(place.cluster.wal(&name)).unwrap();
    let directory = place.lab.directory("wal");
    let target = directory.join("RECOVERYXLOG");
    let trace = place.lab.path().join("trace");
    let recording = Recording::begin(std::slice::from_ref(&directory));
    watched(&place.highwater, &trace, true, &["archive-get", &name, target.to_str().unwrap()])
        .wait()
        .done();
    let recording = recording.finish(&trace);
    let images = recording.all_images(4);
    assert!(images.len() > 4);
    for (image, _) in images {
        let copy = place.lab.path().join("image");
        std::fs::remove_dir_all(&copy).ok();
        image.write(&directory, &copy);
        // The name that PostgreSQL chooses is its own to keep; what was written beside it is not.
        let target = copy.join("RECOVERYXLOG");
        place.highwater.get(&name, &target).done();
        assert!(std::fs::read(&target).unwrap() == wanted, "{}", image.how);
        assert_eq!(files_below(&copy).len(), 1, "{}: what was left is swept", image.how);
    }
}

//! Encrypted clusters: everything works as in plain ones, nothing that is stored can be read without the key, and
//! nobody stores or reads by mistake what is not encrypted.

use crate::harness::{
    Archived, Cluster, ClusterBuilder, Highwater, Lab, NEWEST, Receiver, Run, Stored, fingerprint,
};
use std::path::{Path, PathBuf};

/// Words that are in the cluster, its backups and its commands, and must be nowhere in the store.
const WORDS: [&str; 9] = [
    "zanzibar_table",
    "zanzibar_row",
    "zanzibar_point",
    "zanzibar_label",
    "zanzibar_note",
    "zanzibar_reason",
    "PG_VERSION",
    "pg_catalog",
    "plain_bytes",
];

/// Marks of our own formats and of the codec, which stand at the beginning of what is not encrypted.
const MARKS: [&[u8]; 6] =
    [b"HWS1", b"HWM1", b"HWP1", b"HWI1", &[0x5A, 0x2A, 0x4D, 0x18], &[0x28, 0xB5, 0x2F, 0xFD]];

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Fails if anything that is stored, or any name, tells a word of the cluster.
pub(crate) fn assert_nothing_can_be_read(place: &Archived) {
    let stored = Stored::of(&place.highwater);
    let names = stored.names();
    assert!(names.len() > 10, "{names:?}");
    let of_keys = |path: &Path| path.iter().any(|part| part == "key" || part == "identity");
    for path in &names {
        let (bytes, name) = (stored.read(path), path.to_string_lossy());
        for word in WORDS {
            assert!(!holds(&bytes, word.as_bytes()) && !name.contains(word), "{word} in {name}");
        }
        if !of_keys(path) {
            assert_eq!(bytes[..4], *b"HWE1", "{name}");
            // The four-byte marks come about by chance in some gigabytes.
            for mark in MARKS {
                assert!(!holds(&bytes[..bytes.len().min(8192)], mark), "{mark:?} in {name}");
            }
        }
    }
}

/// The secrets themselves: no run may show them.
fn assert_shows_no_secret(run: &Run, keys: &[&Path]) {
    for key in keys {
        let secret = std::fs::read_to_string(key).unwrap();
        let told = format!("{}{}", run.stdout, run.stderr);
        assert!(!told.contains(&secret.trim()[..16]), "{run}");
    }
}

fn write_more(cluster: &Cluster, round: u32) {
    cluster.sql(&format!(
        "insert into zanzibar_table select g, 'zanzibar_row ' || g || ' of {round}', md5((g * {round})::text) \
         from generate_series(1, 20000) g"
    ));
    cluster.sql(&format!("select pg_create_restore_point('zanzibar_point_{round}')"));
}

fn back_up(place: &Archived, source: &str) -> serde_json::Value {
    let arguments = [
        "backup",
        "--fast",
        "--json",
        "--source",
        source,
        "--label",
        "zanzibar_label",
        "--annotate",
        "why=zanzibar_note",
    ];
    let made = place.highwater.run(&arguments).done();
    assert_shows_no_secret(&made, &[&place.lab.path().join("key")]);
    made.json()
}

/// A whole life: archived, backed up, streamed, rotated, expired, and brought back.
fn a_life(place: &Archived) {
    place.cluster.sql("create table zanzibar_table (n int, zanzibar_row text, t text)");
    write_more(&place.cluster, 1);
    let first = back_up(place, "stream");
    write_more(&place.cluster, 2);
    let id = first["id"].as_str().unwrap();
    place.highwater.run(&["pin", id, "--reason", "zanzibar_reason"]).done();

    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    write_more(&place.cluster, 3);
    receiver.wait_acknowledged(&place.cluster);
    // A process that runs goes on under the old key; all others take the new one.
    let rotated = place.highwater.run(&["--json", "key", "rotate"]).done().json();
    assert_eq!(rotated["repository_keys"].as_array().unwrap().len(), 2, "{rotated}");
    write_more(&place.cluster, 4);
    place.cluster.archive_now();
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();

    // What was stored under the old key is found again by digest.
    let second = back_up(place, "files");
    let number = |name: &str| second[name].as_u64().unwrap();
    assert_eq!(second["parent"], first["id"]);
    assert!(number("referenced_bytes") > number("size_bytes") / 2, "{second}");
    write_more(&place.cluster, 5);
    place.cluster.sql("drop table if exists nothing; create table zanzibar_late (n int)");
    let dump = place.cluster.dump();
    place.cluster.archive_now();

    place.highwater.run(&["unpin", id]).done();
    place.highwater.run(&["expire", "--retain-backups", "1"]).done();
    let info = place.highwater.info();
    assert_eq!(info["encryption"]["repository_keys"], 2, "{info}");
    assert_eq!(info["encryption"]["user_keys"][0], info["encryption"]["in_hand"], "{info}");
    assert_eq!(info["encryption"]["user_keys"].as_array().unwrap().len(), 1, "{info}");
    place.highwater.run(&["info"]).done().says("encrypted under repository key");
    assert_eq!(info["backups"].as_array().unwrap().len(), 1, "{info}");
    assert_eq!(info["wal"][0]["gaps"].as_array().unwrap().len(), 0, "{info}");
    assert_nothing_can_be_read(place);
    place.assert_copy_equals("copy", &dump);
    let settings = std::fs::read_to_string(place.lab.path().join("copy/postgresql.auto.conf"));
    let settings = settings.unwrap();
    assert!(settings.contains("--key-file"), "{settings}");
    let secret = std::fs::read_to_string(place.lab.path().join("key")).unwrap();
    assert!(!settings.contains(secret.trim()), "the key is in the recovery settings");
}

#[test]
fn a_whole_life_on_the_oldest_major() {
    a_life(&Archived::by_server_encrypted(14, Lab::highwater, |builder| builder));
}

#[test]
fn a_whole_life_on_postgresql_15() {
    a_life(&Archived::by_server_encrypted(15, Lab::highwater, |builder| builder));
}

#[test]
fn a_whole_life_on_postgresql_16() {
    a_life(&Archived::by_server_encrypted(16, Lab::highwater, |builder| builder));
}

#[test]
fn a_whole_life_on_postgresql_17() {
    a_life(&Archived::by_server_encrypted(17, Lab::highwater, |builder| builder));
}

#[test]
fn a_whole_life_on_the_newest_major() {
    a_life(&Archived::by_server_encrypted(NEWEST, Lab::highwater, |builder| builder));
}

#[test]
fn a_whole_life_on_s3() {
    a_life(&Archived::by_server_encrypted(NEWEST, Lab::highwater_on_s3, |builder| builder));
}

#[test]
fn an_agent_stores_and_fetches_with_the_key_and_commands_need_none_for_what_it_did() {
    let with_small = |builder: ClusterBuilder| builder.segment_mib(1);
    let place = Archived::by_server_encrypted(NEWEST, Lab::highwater, with_small);
    place.cluster.sql("create table zanzibar_table (n int, zanzibar_row text, t text)");
    let agent = Receiver::agent(&place.highwater, &place.cluster.pgdata, &[]);
    write_more(&place.cluster, 1);
    back_up(&place, "stream");
    // The command alone could not store: it would say that a key is missing.
    place.cluster.archive_into(&place.highwater.without_env("HIGHWATER_KEY_FILE"));
    let names = place.segments_with(6, 2000);
    place.cluster.wait_archived(names.last().unwrap());
    assert_eq!(place.cluster.sql("select failed_count from pg_stat_archiver"), "0");
    let report = agent.terminate().done().json();
    assert!(report["answered"].as_u64().unwrap() >= 6, "{report}");
    place.cluster.sql("create table zanzibar_last (n int)");
    place.cluster.switch_wal();
    place.cluster.wait_until("select failed_count > 0 from pg_stat_archiver", "t");
    assert!(place.cluster.log().contains("no key is set"), "{}", place.cluster.log());
    assert_nothing_can_be_read(&place);
    place.cluster.archive_into(&place.highwater);
    place.cluster.archive_now();
    place.assert_copy_equals("copy", &place.cluster.dump());
}

fn repo_of(place: &Archived) -> PathBuf {
    place.highwater.repo_directory()
}

#[test]
fn a_missing_or_wrong_key_is_told_before_anything_is_written() {
    let place = Archived::by_server_encrypted(NEWEST, Lab::highwater, |builder| builder);
    place.highwater.run(&["backup", "--fast"]).done();
    let name = place.cluster.archive_now();
    place.cluster.set("archive_command = ''");
    place.cluster.reload();
    let next = place.segments(1).remove(0);
    let before = fingerprint(&repo_of(&place));
    let none = place.highwater.without_env("HIGHWATER_KEY_FILE");
    let wrong = place.highwater.with_key(&place.highwater.new_key("wrong"));
    let pgdata = place.lab.path().join("never");
    let pgdata = pgdata.to_str().unwrap();
    for (highwater, says) in [(&none, "no key is set"), (&wrong, "opens nothing of cluster `main`")]
    {
        highwater.push(&place.cluster.wal(&next)).ends_with(2).says(says);
        highwater.run(&["backup", "--fast"]).ends_with(2).says(says);
        highwater.run(&["backup", "--fast", "--source", "files"]).ends_with(2).says(says);
        highwater.run(&["init"]).ends_with(2).says(says);
        highwater.run(&["info"]).ends_with(2).says(says);
        highwater.run(&["expire", "--retain-backups", "1"]).ends_with(2).says(says);
        highwater.run(&["receive", "--slot", "none"]).ends_with(2).says(says);
        highwater.run(&["restore", "--pgdata", pgdata]).ends_with(2).says(says);
        highwater.get(&name, &place.lab.path().join("got")).ends_with(130).says(says);
        // Nor is what is not there told as absent.
        let absent = "0000000100000000000000FF";
        highwater.get(absent, &place.lab.path().join("got")).ends_with(130).says(says);
        assert!(!place.lab.path().join("got").exists() && !Path::new(pgdata).exists());
    }
    none.run(&["key", "list"]).ends_with(2).says("no key is set");
    assert!(fingerprint(&repo_of(&place)) == before, "something was written");
    place.highwater.push(&place.cluster.wal(&next)).done();
    place.assert_gives_back(&next, &std::fs::read(place.cluster.wal(&next)).unwrap());

    // Its neighbour in the same repository is plain, and takes no key.
    let plain = none.for_cluster("plain");
    plain.run(&["init"]).done();
    plain.push(&place.cluster.wal(&next)).done();
    let before = fingerprint(&repo_of(&place));
    let keyed = place.highwater.for_cluster("plain");
    let says = "was set up without encryption";
    keyed.push(&place.cluster.wal(&next)).ends_with(2).says(says);
    keyed.run(&["init"]).ends_with(2).says(says);
    keyed.run(&["backup", "--fast"]).ends_with(2).says(says);
    assert!(fingerprint(&repo_of(&place)) == before, "something was written");
}

#[test]
fn keys_come_and_go_and_one_that_went_opens_nothing() {
    let place = Archived::by_server_encrypted(NEWEST, Lab::highwater, |builder| builder);
    let key = place.lab.path().join("key");
    let name = place.cluster.archive_now();
    let bytes = std::fs::read(place.cluster.wal(&name)).unwrap();
    let comes_back = |highwater: &Highwater| {
        let target = place.lab.path().join("got");
        std::fs::remove_file(&target).ok();
        let run = highwater.get(&name, &target);
        run.code() == 0 && std::fs::read(&target).unwrap() == bytes
    };
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let id_of = |highwater: &Highwater| {
        let keys = highwater.run(&["--json", "key", "list"]).done().json();
        let keys = keys["user_keys"].as_array().unwrap().clone();
        let ours = keys.iter().find(|key| key["in_hand"] == true).unwrap();
        ours["user_key"].as_str().unwrap().to_owned()
    };
    let first = id_of(&place.highwater);

    // A second key: as a file, as what a command prints, and in the environment.
    let second = place.highwater.new_key("second");
    place.highwater.run(&["key", "new", &text(&second)]).ends_with(3);
    place.highwater.run(&["key", "add", &text(&second)]).done().says("opens everything");
    let by_file = place.highwater.with_key(&second);
    let none = place.highwater.without_env("HIGHWATER_KEY_FILE");
    let by_command = none.with_env("HIGHWATER_KEY_COMMAND", &format!("cat {}", text(&second)));
    let secret = std::fs::read_to_string(&second).unwrap();
    let by_variable = none.with_env("HIGHWATER_KEY", secret.trim());
    for highwater in [&by_file, &by_command, &by_variable] {
        assert!(comes_back(highwater));
        let shown = highwater.run(&["config"]).done();
        assert_shows_no_secret(&shown, &[&key, &second]);
        let listed = highwater.run(&["-v", "-v", "key", "list"]).done();
        assert_shows_no_secret(&listed, &[&key, &second]);
    }
    none.with_env("HIGHWATER_KEY_COMMAND", "exit 3")
        .run(&["info"])
        .ends_with(2)
        .says("key_command");
    let both = by_file.with_env("HIGHWATER_KEY", secret.trim());
    let both = both.run(&["info"]).ends_with(2).says("two places");
    assert_shows_no_secret(&both, &[&second]);

    // A rotation forgets nobody.
    place.highwater.run(&["key", "rotate"]).ends_with(2).says(&id_of(&by_file));
    place.highwater.run(&["key", "rotate", "--also", &text(&second)]).done();
    assert!(comes_back(&place.highwater) && comes_back(&by_file));

    // The first goes; the second, which opens everything, takes it away.
    place.highwater.run(&["key", "remove", &first]).ends_with(3);
    by_file.run(&["key", "remove", &first]).done();
    by_file.run(&["key", "remove", &first]).ends_with(1);
    assert!(!comes_back(&place.highwater) && comes_back(&by_file));
    place.highwater.run(&["info"]).ends_with(2).says("opens nothing");

    // And a third in the place of the second.
    let third = place.highwater.new_key("third");
    by_file.run(&["key", "rewrap", &text(&third)]).done();
    let by_third = place.highwater.with_key(&third);
    assert!(comes_back(&by_third) && !comes_back(&by_file));
    place.cluster.archive_into(&by_third);
    place.cluster.archive_now();
    let keys = by_third.run(&["--json", "key", "list"]).done().json();
    assert_eq!(keys["user_keys"].as_array().unwrap().len(), 1, "{keys}");
    assert_eq!(keys["repository_keys"].as_array().unwrap().len(), 2, "{keys}");
}

#[test]
fn a_key_file_that_others_can_read_draws_a_warning() {
    use std::os::unix::fs::PermissionsExt;
    let place = Archived::by_server_encrypted(NEWEST, Lab::highwater, |builder| builder);
    let quiet = place.highwater.run(&["key", "list"]).done();
    assert!(!quiet.stderr.contains("chmod"), "{quiet}");
    let key = place.lab.path().join("key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    place.highwater.run(&["key", "list"]).done().says("chmod 600");
}

/// What the guide tells to do, with its own lines.
#[test]
fn the_guides_chapter_works_as_it_is_printed() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let chapter = page.split("\n## ").find(|part| part.contains("Encrypt what is stored")).unwrap();
    let block = chapter.split("```sh\n").nth(1).unwrap().split("```").next().unwrap();
    let lab = Lab::open();
    let cluster = lab.cluster(NEWEST).start();
    let highwater = lab.highwater().on(&cluster);
    let keys = lab.directory("keys");
    let mut made = Vec::new();
    for line in block.lines().filter(|line| line.starts_with("highwater ")) {
        let line = line.replace("/etc/highwater", keys.to_str().unwrap());
        let line = line.replace("/mnt/safe", keys.to_str().unwrap());
        let words: Vec<&str> = line.split('#').next().unwrap().split_whitespace().skip(1).collect();
        made.push(highwater.with_key(&keys.join("main.key")).run(&words).done());
    }
    assert!(made.len() >= 4, "{block}");
    let list = made.last().unwrap();
    assert_eq!(list.stdout.matches("opens everything").count(), 2, "{list}");
}

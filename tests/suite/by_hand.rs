//! The page `docs/restore-by-hand.md`, run as it is printed: a cluster comes
//! back with `zstd`, `python3` and PostgreSQL alone.

use crate::harness::{Archived, Cluster, Lab, NEWEST, as_server_user, finish, remove_tree};

/// The code blocks of the page with their languages, in order.
fn blocks() -> Vec<(String, String)> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/restore-by-hand.md");
    let page = std::fs::read_to_string(page).unwrap();
    let mut blocks: Vec<(String, String)> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        match line.strip_prefix("```") {
            Some(language) if !inside => {
                blocks.push((language.to_owned(), String::new()));
                inside = true;
            }
            Some(_) => inside = false,
            None if inside => {
                let text = &mut blocks.last_mut().unwrap().1;
                text.push_str(line);
                text.push('\n');
            }
            None => {}
        }
    }
    blocks
}

/// Returns the one block that holds this text.
fn block_with<'a>(blocks: &'a [(String, String)], text: &str) -> &'a str {
    let mut found = blocks.iter().filter(|(_, block)| block.contains(text));
    let block = found.next().unwrap_or_else(|| panic!("no block of the page holds {text:?}"));
    assert!(found.next().is_none(), "several blocks of the page hold {text:?}");
    &block.1
}

/// Runs what the page tells to run, after its own scripts were saved; the
/// server is started by the harness, which stops it again.
fn follow_the_page(place: &Archived, backup: &str, pgdata: &std::path::Path) {
    follow_the_page_in(place, &place.highwater.repo_directory().join("main"), backup, pgdata);
}

/// Makes the copy in plain that the page begins with where a cluster is encrypted; returns its place.
fn decrypt_by_the_page(place: &Archived, key: &std::path::Path) -> std::path::PathBuf {
    let blocks = blocks();
    let directory = place.lab.directory("decrypted");
    place.lab.write("decrypted/decrypt.py", block_with(&blocks, "# decrypt.py PLACE").as_bytes());
    let new_place = directory.join("main");
    let mut shell = as_server_user("/bin/sh");
    let command = block_with(&blocks, "python3 decrypt.py \"$PLACE\"");
    shell.args(["-e", "-c", command]).current_dir(&directory);
    shell.env("PLACE", place.highwater.repo_directory().join("main"));
    shell.env("KEY_FILE", key).env("NEW_PLACE", &new_place);
    finish(shell);
    new_place
}

fn follow_the_page_in(
    place: &Archived,
    place_of_repo: &std::path::Path,
    backup: &str,
    pgdata: &std::path::Path,
) {
    let blocks = blocks();
    let rebuild = block_with(&blocks, "# rebuild.py PLACE");
    let get_wal = block_with(&blocks, "# get-wal WAL_DIRECTORY");
    let directory = place.lab.directory("by-hand");
    place.lab.write("by-hand/rebuild.py", rebuild.as_bytes());
    place.lab.write("by-hand/get-wal", get_wal.as_bytes());
    let commands = [
        block_with(&blocks, "python3 rebuild.py \"$PLACE\""),
        block_with(&blocks, "pg_verifybackup --no-parse-wal"),
        block_with(&blocks, "recovery.signal"),
    ];
    let shells = blocks.iter().filter(|(language, _)| language == "sh").count();
    assert_eq!(
        shells, 7,
        "a new shell block on the page must be run here, or be left out knowingly"
    );
    let tools = place.cluster.tool("pg_verifybackup");
    for command in commands {
        let mut shell = as_server_user("/bin/sh");
        shell.args(["-e", "-c", command]).current_dir(&directory);
        for (name, value) in tools.get_envs() {
            shell.env(name, value.unwrap_or_default());
        }
        shell.env("PLACE", place_of_repo).env("BACKUP", backup).env("PGDATA", pgdata);
        finish(shell);
    }
}

fn content(cluster: &Cluster) -> String {
    let digest = |table: &str| {
        cluster.sql(&format!(
            "select '{table}', count(*), md5(string_agg(t::text, ',' order by t::text)) from {table} t"
        ))
    };
    ["pgbench_accounts", "pgbench_history", "moved"].map(digest).join("\n")
}

#[test]
fn the_page_brings_a_cluster_back_without_highwater() {
    let mut place = Archived::by_server_with(NEWEST, |builder| builder.tablespace("aside"));
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    place.cluster.sql(
        "create table moved tablespace aside as select g n, md5(g::text) t \
         from generate_series(1, 20000) g",
    );
    place.highwater.run(&["backup", "--fast"]).done();
    place.cluster.pgbench(&["-c", "2", "-t", "200"]);
    place.cluster.sql("update moved set t = 'changed' where n % 7 = 0");
    // The second backup leans on packs of the first, and on its chunk maps.
    let second = place.highwater.run(&["backup", "--fast", "--json"]).done().json();
    place.cluster.pgbench(&["-c", "2", "-t", "100"]);
    let wanted = content(&place.cluster);
    place.cluster.archive_now();
    let aside = place.cluster.tablespace("aside");
    place.cluster.kill9();
    for directory in [&place.cluster.pgdata, &aside] {
        remove_tree(directory);
    }

    let pgdata = place.lab.path().join("copy");
    follow_the_page(&place, second["id"].as_str().unwrap(), &pgdata);
    let mut copy = Cluster::adopt(&place.lab, NEWEST, &pgdata);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(content(&copy), wanted);
    assert_eq!(copy.sql("show archive_mode"), "off");
    copy.amcheck();
}

#[test]
fn the_page_brings_an_encrypted_cluster_back_with_its_key() {
    let mut place = Archived::by_server_encrypted(NEWEST, Lab::highwater, |builder| builder);
    place
        .cluster
        .sql("create table t as select g n, md5(g::text) t from generate_series(1, 20000) g");
    place.highwater.run(&["backup", "--fast"]).done();
    place.highwater.run(&["key", "rotate"]).done();
    place.cluster.sql("update t set t = 'changed' where n % 7 = 0");
    let second = place.highwater.run(&["backup", "--fast", "--json"]).done().json();
    place.cluster.sql("delete from t where n % 11 = 0");
    let wanted = place.cluster.dump();
    place.cluster.archive_now();
    place.cluster.kill9();
    let plain = decrypt_by_the_page(&place, &place.lab.path().join("key"));
    std::fs::remove_dir_all(place.highwater.repo_directory()).unwrap();

    let pgdata = place.lab.path().join("copy");
    follow_the_page_in(&place, &plain, second["id"].as_str().unwrap(), &pgdata);
    let mut copy = Cluster::adopt(&place.lab, NEWEST, &pgdata);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert!(copy.dump() == wanted, "the copy differs");
    copy.amcheck();
}

#[test]
fn get_wal_says_absent_only_while_the_archive_is_there() {
    let place = Archived::by_server(NEWEST);
    let name = place.cluster.archive_now();
    let script =
        place.lab.write("get-wal", block_with(&blocks(), "# get-wal WAL_DIRECTORY").as_bytes());
    let id = place.cluster.control("Database system identifier");
    let wal = place.highwater.repo_directory().join("main/wal").join(id);
    let target = place.lab.path().join("fetched");
    let get = |wal: &std::path::Path, name: &str| {
        let mut shell = as_server_user("/bin/sh");
        shell.arg(&script).arg(wal).arg(name).arg(&target);
        shell.status().unwrap().code()
    };
    assert_eq!(get(&wal, &name), Some(0));
    assert_eq!(std::fs::read(&target).unwrap(), std::fs::read(place.cluster.wal(&name)).unwrap());
    assert_eq!(get(&wal, "00000001000000FF000000FF"), Some(1));
    assert_eq!(get(&wal, "00000002.history"), Some(1));
    assert_eq!(get(&wal.join("unmounted"), &name), Some(200));
}

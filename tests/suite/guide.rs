//! `docs/guide.md` and `README.md`, with their own lines: a cluster that is set up, archived, backed up, brought back,
//! upgraded and kept as they say. Only places, times and names of this host stand in the place of those in print.
//!
//! Some chapters are followed beside the feature that they are about: the last test here knows by which test each
//! command is run, and fails for one that nobody runs.

use crate::harness::{
    Archived, Cluster, Lab, NEWEST, Run, Running, as_server_user, reachable_binary, wait_for,
};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A service has begun its work within this.
const LIMIT: Duration = Duration::from_mins(1);

const GUIDE: &str = "docs/guide.md";
const README: &str = "README.md";

/// What stands between two fences of a page.
struct Block {
    /// The line of the chapter's heading, without its marks.
    chapter: String,
    text: String,
}

fn read(page: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap()
}

/// Returns the blocks of a page, in order.
fn blocks(page: &str) -> Vec<Block> {
    let text = read(page);
    let (mut blocks, mut chapter, mut inside) = (Vec::<Block>::new(), "", false);
    for line in text.lines() {
        if line.starts_with("```") {
            inside = !inside;
            if inside {
                blocks.push(Block { chapter: chapter.to_owned(), text: String::new() });
            }
        } else if inside {
            blocks.last_mut().unwrap().text.push_str(&format!("{line}\n"));
        } else {
            chapter = line.strip_prefix("## ").unwrap_or(chapter);
        }
    }
    blocks
}

/// Returns the block of this chapter that holds this text.
fn block(page: &str, chapter: &str, part: &str) -> String {
    let is_it = |block: &Block| block.chapter.contains(chapter) && block.text.contains(part);
    let found = blocks(page).into_iter().find(is_it);
    found.unwrap_or_else(|| panic!("no block with {part:?} below {chapter:?} of {page}")).text
}

/// Returns the lines of a block that are commands, without their comments.
fn commands_in(block: &Block) -> Vec<String> {
    let is_command = |line: &&str| {
        let programs = ["highwater ", "pg_ctl ", "psql "];
        programs.iter().any(|program| line.starts_with(program))
    };
    let without_comment = |line: &str| line.split("  #").next().unwrap().trim_end().to_owned();
    block.text.lines().filter(is_command).map(without_comment).collect()
}

/// Returns the commands of a chapter, in order.
fn commands(page: &str, chapter: &str) -> Vec<String> {
    let of_chapter = blocks(page).into_iter().filter(|block| block.chapter.contains(chapter));
    of_chapter.flat_map(|block| commands_in(&block)).collect()
}

/// Fails unless what is printed is what was said, line by line, but for numbers and times.
pub(crate) fn assert_says_what_is_printed<'a>(
    printed: impl IntoIterator<Item = &'a str>,
    said: &str,
) {
    let shape = |line: &str| -> String {
        let is_word = |word: &&str| {
            !word.chars().any(|c| c.is_ascii_digit())
                && !["B", "KiB", "MiB", "GiB"].contains(&word.trim_end_matches(','))
        };
        line.split_whitespace().filter(is_word).collect::<Vec<_>>().join(" ")
    };
    let shapes: Vec<String> = said.lines().map(shape).collect();
    for line in printed.into_iter().filter(|line| !line.trim().is_empty()) {
        assert!(shapes.contains(&shape(line)), "{line:?} is not what it says:\n{said}");
    }
}

/// Somebody who does what is printed, on one host.
struct Reader {
    lab: Lab,
    /// PostgreSQL's programs.
    bin: PathBuf,
    /// What is printed, and what stands for it here.
    swaps: Vec<(String, String)>,
    env: Vec<(String, String)>,
}

impl Reader {
    /// A reader on the host of this cluster, whose settings file is the one that is shown in the first chapter.
    fn new(lab: &Lab, cluster: &Cluster) -> Self {
        let env = vec![
            ("HOME".to_owned(), lab.path().display().to_string()),
            ("PGUSER".to_owned(), "postgres".to_owned()),
            ("PGDATABASE".to_owned(), "postgres".to_owned()),
        ];
        let postgres = cluster.tool("postgres");
        let bin = Path::new(postgres.get_program()).parent().unwrap().to_path_buf();
        let mut reader = Self { lab: lab.clone(), bin, swaps: Vec::new(), env };
        let dsn = cluster.dsn();
        let socket = dsn.split_once("host=").unwrap().1.split(' ').next().unwrap();
        reader.swap("/run/postgresql", socket);
        reader.swap("/var/lib/postgresql/18/main", cluster.pgdata.to_str().unwrap());
        reader.swap("/srv/highwater", lab.path().join("repo").to_str().unwrap());
        reader.write_settings(&settings_of_the_guide());
        reader.set("HIGHWATER_CONFIG", lab.path().join("highwater.toml").to_str().unwrap());
        reader.set("PGHOST", socket);
        reader
    }

    /// The same as the superuser, without a role for Highwater.
    fn superuser(lab: &Lab, cluster: &Cluster) -> Self {
        let mut reader = Self::new(lab, cluster);
        reader.swap("user=highwater", "user=postgres");
        reader.write_settings(&settings_of_the_guide());
        reader
    }

    fn swap(&mut self, printed: &str, here: &str) {
        self.swaps.push((printed.to_owned(), here.to_owned()));
    }

    fn set(&mut self, name: &str, value: &str) {
        self.env.push((name.to_owned(), value.to_owned()));
    }

    /// Returns what is printed with the places of this host.
    fn here(&self, printed: &str) -> String {
        let swapped = |text: String, (from, to): &(String, String)| text.replace(from, to);
        self.swaps.iter().fold(printed.to_owned(), swapped)
    }

    fn write_settings(&self, printed: &str) {
        self.lab.write("highwater.toml", self.here(printed).as_bytes());
    }

    /// Adds settings that are printed to the file, above its tables.
    fn add_settings(&self, printed: &str) {
        let file = self.lab.path().join("highwater.toml");
        let before = std::fs::read_to_string(file).unwrap();
        self.write_settings(&format!("{printed}\n{before}"));
    }

    fn command(&self, printed: &str) -> Command {
        let mut command = as_server_user("/bin/sh");
        let ours = reachable_binary().parent().unwrap().display();
        command.env("PATH", format!("{ours}:{}:/usr/bin:/bin", self.bin.display()));
        command.env("LD_LIBRARY_PATH", self.bin.parent().unwrap().join("lib"));
        command.envs(self.env.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.lab.path()).arg("-ec").arg(self.here(printed));
        command
    }

    /// Runs what is printed to its end.
    fn run(&self, printed: &str) -> Run {
        Running::start(self.command(printed), printed.to_owned()).wait()
    }

    /// Runs a service that is printed until it does its work, then while `work` does, and stops it.
    fn serve(&self, printed: &str, works: impl FnMut() -> bool, work: impl FnOnce()) {
        // In the place of the shell, so that the signal reaches it.
        let command = self.command(&format!("exec {printed}"));
        let running = Running::start(command, printed.to_owned());
        wait_for(printed, LIMIT, works);
        work();
        running.signal(rustix::process::Signal::TERM);
        running.wait().done();
    }
}

/// The settings file that holds for all later chapters.
fn settings_of_the_guide() -> String {
    block(GUIDE, "1. Choose the repository", "dsn = ")
}

/// True while this server streams to `receive`.
fn is_streamed(cluster: &Cluster) -> bool {
    let query = "select count(*) from pg_stat_replication \
                 where application_name = 'highwater' and state = 'streaming'";
    cluster.try_sql(query).as_deref() == Ok("1")
}

/// True once an agent answers for this data directory.
fn is_served(cluster: &Cluster) -> bool {
    cluster.wal("highwater.spool/agent.sock").exists()
}

/// Runs statements that are printed, one a line.
fn run_sql(cluster: &Cluster, printed: &str) {
    for statement in printed.lines() {
        cluster.sql(statement);
    }
}

/// Puts settings of PostgreSQL that are printed into force.
fn configure(reader: &Reader, cluster: &mut Cluster, printed: &str) {
    for line in reader.here(printed).lines() {
        cluster.set(line);
    }
    cluster.fast_stop();
    cluster.start();
}

#[test]
fn the_guide_leads_from_nothing_to_archiving_and_backups() {
    let lab = Lab::open();
    let mut cluster = lab.cluster(NEWEST).start();
    let mut reader = Reader::new(&lab, &cluster);
    reader.swap("'…'", "'s3cret'");
    let (binary, place) = (reachable_binary().display(), lab.path().display());
    let binary = format!("{binary} --config {place}/highwater.toml");
    reader.swap("/usr/local/bin/highwater", &binary);

    // 2: the role, which comes in by its password.
    run_sql(&cluster, &reader.here(&block(GUIDE, "2. Prepare PostgreSQL", "CREATE ROLE")));
    let lines = block(GUIDE, "2. Prepare PostgreSQL", "scram-sha-256");
    let hba = format!("{lines}local all postgres trust\n");
    std::fs::write(cluster.pgdata.join("pg_hba.conf"), hba).unwrap();
    let password = lab.write(".pgpass", b"*:*:*:highwater:s3cret\n");
    std::fs::set_permissions(password, PermissionsExt::from_mode(0o600)).unwrap();
    cluster.reload();

    // 3: the place, archiving, the agent.
    let chapter = commands(GUIDE, "3. Claim the place");
    assert_eq!(chapter.len(), 3, "{chapter:?}");
    let identifier = cluster.control("Database system identifier");
    reader.run(&chapter[0]).done().says(&identifier);
    configure(&reader, &mut cluster, &block(GUIDE, "3. Claim the place", "archive_command"));
    reader.run(&chapter[1]).done().says("segment arrives");
    reader.serve(&chapter[2], || is_served(&cluster), || drop(cluster.archive_now()));

    // 4: a backup, and what is kept; 6 shows it.
    let chapter = commands(GUIDE, "4. Back up");
    assert_eq!(chapter, ["highwater backup", "highwater backup --source files"]);
    reader.run(&chapter[0]).done();
    cluster.sql("create table orders as select generate_series(1, 500) n");
    cluster.archive_now();
    reader.add_settings(&block(GUIDE, "4. Back up", "retain_window"));
    let info = reader.run("highwater info").done();
    let sample = reader.here(&block(GUIDE, "6. Look at what you have", "recovery window on"));
    assert_says_what_is_printed(sample.lines(), &info.stdout);
    let cron = block(GUIDE, "4. Back up", "* * *");
    reader.run(cron.split("postgres  ").nth(1).unwrap()).done();
    for part in ["GRANT EXECUTE ON FUNCTION pg_backup_start", "summarize_wal"] {
        run_sql(&cluster, &block(GUIDE, "4. Back up", part));
    }
    reader.run(&chapter[1]).done();
    for line in block(GUIDE, "4. Back up", "highwater expire").lines() {
        reader.run(line.strip_prefix("ExecStart=").unwrap()).done();
    }
    let info = reader.run("highwater info --json").done().json();
    assert_eq!(info["backups"].as_array().map(Vec::len), Some(4), "{info}");

    // 5: what is streamed.
    let chapter = commands(GUIDE, "5. Lose less than a segment");
    assert_eq!(chapter, ["highwater receive"]);
    reader.serve(&chapter[0], || is_streamed(&cluster), || ());
    let names = block(GUIDE, "5. Lose less than a segment", "synchronous_standby_names");
    cluster.set(&names);
    cluster.reload();
    let before = reader.run("highwater info --json").done().json()["recovery_window"].clone();
    let commit = || drop(cluster.sql("create table acknowledged as select 1 n"));
    reader.serve(&format!("{} --synchronous", chapter[0]), || is_streamed(&cluster), commit);
    let after = reader.run("highwater info --json").done().json()["recovery_window"].clone();
    assert!(after["latest_time"].as_str() > before["latest_time"].as_str(), "{before} {after}");
}

/// Returns the options with which `pg_ctl` starts a server that only this reader's commands reach from now on.
fn private_server(reader: &mut Reader) -> String {
    let socket = reader.lab.directory("private-socket").display().to_string();
    reader.set("PGHOST", &socket);
    let log = reader.lab.path().join("private.log").display().to_string();
    let settings = format!("-c listen_addresses= -c unix_socket_directories={socket}");
    format!("-l {log} -o '-p 5433 {settings}'")
}

#[test]
fn the_guides_chapter_on_recovery_brings_a_dropped_table_back_beside_and_in_place() {
    let mut place = Archived::by_server(NEWEST);
    let mut reader = Reader::superuser(&place.lab, &place.cluster);
    place.cluster.sql("create table orders as select generate_series(1, 500) n");
    place.highwater.run(&["backup", "--fast"]).done();
    place.pass_earliest_time();
    reader.swap("2026-11-22 02:59:00+00", &place.now());
    // Others go on writing.
    place.cluster.sql("create table others as select 1 n");
    place.cluster.sql("drop table orders");
    place.cluster.archive_now();

    let chapter = commands(GUIDE, "7. Point-in-time recovery");
    assert_eq!(chapter.len(), 9, "{chapter:?}");
    let restored = place.lab.path().join("restored");
    reader.swap("/var/lib/postgresql/18/restored", restored.to_str().unwrap());
    let private = private_server(&mut reader);
    reader.swap("-o '-p 5433'", &private);
    reader.run(&chapter[0]).done().says("timeline");
    assert!(!restored.exists());
    reader.run(&chapter[1]).done();
    reader.run(&chapter[2]).done();
    reader.run(&chapter[3]).done().says(" 500\n");
    reader.run("pg_ctl -D /var/lib/postgresql/18/restored stop -m immediate").done();

    reader.run(&chapter[4]).done();
    place.cluster.wait_for_end();
    reader.run(&chapter[5]).done();
    reader.run(&chapter[6]).done();
    place.cluster.start();
    place.cluster.wait_until("select pg_get_wal_replay_pause_state()", "paused");
    place.cluster.sql("SELECT pg_wal_replay_resume()");
    place.cluster.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(place.cluster.sql("select count(*) from orders"), "500");
    place.cluster.archive_now();

    let directory = |name: &str| place.lab.path().join(name);
    let in_directory = |line: &str, name: &str| {
        reader.here(line).replace("DIR", directory(name).to_str().unwrap())
    };
    reader.run(&in_directory(&chapter[8], "standby")).done();
    let mut standby = Cluster::adopt(&place.lab, NEWEST, &directory("standby"));
    standby.start();
    standby.wait_until("select count(*) from orders", "500");
    assert_eq!(standby.sql("select pg_is_in_recovery()"), "t");
    standby.fast_stop();

    let fast = place.lab.directory("fast");
    place.cluster.sql(&format!("create tablespace fast location '{}'", fast.display()));
    place.cluster.sql("create table moved tablespace fast as select generate_series(1, 70) n");
    place.highwater.run(&["backup", "--fast"]).done();
    let line = in_directory(&chapter[7], "with-map");
    let line = line.replace("/mnt/restored-fast", directory("restored-fast").to_str().unwrap());
    reader.run(&line.replace("/mnt/fast", fast.to_str().unwrap())).done();
    let mut copy = Cluster::adopt(&place.lab, NEWEST, &directory("with-map"));
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql("select count(*) from moved"), "70");
    assert!(directory("restored-fast").read_dir().unwrap().next().is_some());
}

#[test]
fn the_guides_chapter_on_upgrades_claims_the_place_anew() {
    let lab = Lab::open();
    let mut old = lab.cluster(NEWEST - 1).start();
    lab.highwater().on(&old).run(&["init"]).done();
    old.fast_stop();
    let upgraded = lab.cluster(NEWEST).named("upgraded").conf("archive_mode = on").start();
    let reader = Reader::superuser(&lab, &upgraded);
    let name = upgraded.switch_wal();
    lab.highwater().push(&upgraded.wal(&name)).ends_with(3).says("--successor");
    let chapter = commands(GUIDE, "9. After `pg_upgrade`");
    assert_eq!(chapter.len(), 3, "{chapter:?}");
    reader.run(&chapter[0]).done();
    upgraded.archive_into(&lab.highwater());
    for command in &chapter[1..] {
        reader.run(command).done();
    }
    let info = reader.run("highwater info --json").done().json();
    assert_eq!(info["backups"][0]["usable"], true, "{info}");
    assert_eq!(
        info["system_identifier"],
        upgraded.control("Database system identifier").as_str(),
        "{info}"
    );
}

#[test]
fn the_guides_chapter_on_retention_keeps_what_it_says() {
    let place = Archived::by_server(NEWEST);
    let mut reader = Reader::superuser(&place.lab, &place.cluster);
    let backup = || {
        let made = place.highwater.run(&["backup", "--fast", "--json"]).done().json();
        place.segments(1);
        made["id"].as_str().unwrap().to_owned()
    };
    let ids = [backup(), backup()];
    place.cluster.archive_now();
    let chapter = commands(GUIDE, "11. Keep what you need");
    assert_eq!(chapter.len(), 4, "{chapter:?}");
    let [dry_run, keep_until, pin, unpin] = &chapter[..] else { panic!("{chapter:?}") };
    // Without any setting, and with all that the table shows.
    reader.run("highwater expire").ends_with(2).says("no retention is set");
    let page = read(GUIDE);
    let table = page.lines().filter(|line| line.starts_with("| `retain_"));
    let shown: Vec<String> = table
        .flat_map(|line| line.split('|').nth(1).unwrap().split('`').skip(1).step_by(2))
        .map(ToOwned::to_owned)
        .collect();
    assert_eq!(shown.len(), 5, "{shown:?}");
    let settings = std::fs::read_to_string(place.lab.path().join("highwater.toml")).unwrap();
    reader.add_settings(&shown.join("\n"));
    let kept = reader.run(dry_run).done();
    kept.says("30 d").says("7 newest").says("14 daily").says("8 weekly").says("12 monthly");

    // As in chapter 4, all moments of 30 days are kept; where one backup is enough, the first goes.
    reader.write_settings(&settings);
    reader.add_settings(&block(GUIDE, "4. Back up", "retain_window"));
    let all = reader.run(dry_run).done();
    reader.write_settings(&settings);
    reader.add_settings("retain_backups = 1");
    let first_goes = reader.run(dry_run).done();
    let sample = reader.here(&block(GUIDE, "11. Keep what you need", "would be deleted"));
    // What takes months to come about.
    let is_young = |line: &&str| !["alone", "until", "…"].iter().any(|word| line.contains(word));
    let young = sample.lines().filter(is_young).filter(|line| !line.contains("stays  0/A2"));
    assert_says_what_is_printed(young, &format!("{}\n{}", all.stdout, first_goes.stdout));
    assert_eq!(ids_of(&reader), ids, "nothing was touched");

    // Two that are pinned stay, until they are not.
    reader.run(keep_until).done();
    let kept_until = ids_of(&reader).pop().unwrap();
    reader.swap("20261122T021503Z", &ids[0]);
    reader.run(pin).done();
    let newest = backup();
    reader.run("highwater info").done().says("before the migration");
    reader.run("highwater expire").done();
    assert_eq!(ids_of(&reader), [ids[0].clone(), kept_until.clone(), newest.clone()]);
    reader.run(unpin).done();
    reader.run("highwater expire").done();
    assert_eq!(ids_of(&reader), [kept_until, newest]);
    let dump = place.cluster.dump();
    place.cluster.archive_now();
    place.assert_copy_equals("copy", &dump);
}

fn ids_of(reader: &Reader) -> Vec<String> {
    let info = reader.run("highwater info --json").done().json();
    let backups = info["backups"].as_array().unwrap().iter();
    backups.map(|backup| backup["id"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_readme_leads_to_a_first_backup_and_back() {
    let lab = Lab::open();
    let mut cluster = lab.cluster(NEWEST).start();
    let mut reader = Reader::new(&lab, &cluster);
    reader.env.retain(|(name, _)| name != "HIGHWATER_CONFIG");
    let first = block(README, "Five minutes to a first backup", "export ");
    reader.run(&first).done();
    let exported = first.lines().next().unwrap().strip_prefix("export ").unwrap();
    for (name, value) in exported.split(' ').filter_map(|one| one.split_once('=')) {
        let here = reader.here(value);
        reader.set(name, &here);
    }
    reader.swap("'highwater ", &format!("'{} ", reachable_binary().display()));
    configure(&reader, &mut cluster, &block(README, "Five minutes", "archive_command"));
    let highwater = lab.highwater();
    let place = Archived { cluster, highwater, lab };
    let cluster = &place.cluster;

    cluster.sql("create table orders as select generate_series(1, 500) n");
    reader.swap("DIR", cluster.pgdata.to_str().unwrap());
    let chapter = commands(README, "Five minutes to a first backup");
    let [_, check, backup, receive, agent, info, log] = &chapter[..] else { panic!("{chapter:?}") };
    reader.run(check).done();
    reader.run(backup).done();
    reader.serve(receive, || is_streamed(cluster), || ());
    reader.serve(agent, || is_served(cluster), || drop(cluster.archive_now()));
    place.pass_earliest_time();
    let moment = place.now();
    cluster.sql("create table others as select 1 n");
    cluster.sql("drop table orders");
    cluster.archive_now();
    reader.run(info).done().says("recovery window on timeline 1");
    reader.run(log).done().says("commit");

    reader.swap("2026-11-22 02:59:59+00", &moment);
    let private = private_server(&mut reader);
    let printed = "/var/lib/postgresql/18/restored";
    let restored = place.lab.path().join("restored");
    let restored = restored.to_str().unwrap();
    reader.swap(&format!("{printed} start"), &format!("{restored} {private} start"));
    reader.swap(printed, restored);
    let chapter = commands(README, "Bring it back");
    assert_eq!(chapter.len(), 2, "{chapter:?}");
    for command in &chapter {
        reader.run(command).done();
    }
    reader.run("psql -p 5433 -c 'select count(*) from orders'").done().says(" 500\n");
    reader.run(&format!("pg_ctl -D {printed} stop")).done();
}

/// Which test runs the commands of a chapter that begin with these words.
const RUN_BY: [(&str, &str, &str, &str); 16] = [
    (GUIDE, "3. ", "highwater ", "guide::the_guide_leads_from_nothing_to_archiving_and_backups"),
    (GUIDE, "4. ", "highwater ", "guide::the_guide_leads_from_nothing_to_archiving_and_backups"),
    (GUIDE, "5. ", "highwater ", "guide::the_guide_leads_from_nothing_to_archiving_and_backups"),
    (
        GUIDE,
        "6. ",
        "highwater info",
        "guide::the_guide_leads_from_nothing_to_archiving_and_backups",
    ),
    (GUIDE, "6. ", "highwater log ", "log::the_commands_of_the_guide_do_what_it_says"),
    (
        GUIDE,
        "7. ",
        "",
        "guide::the_guides_chapter_on_recovery_brings_a_dropped_table_back_beside_and_in_place",
    ),
    (GUIDE, "8. ", "highwater verify", "verify::the_guides_chapter_works_as_it_is_printed"),
    (
        GUIDE,
        "8. ",
        "highwater drill",
        "drill::the_guides_commands_pass_from_s3_and_from_an_encrypted_cluster",
    ),
    (GUIDE, "9. ", "highwater ", "guide::the_guides_chapter_on_upgrades_claims_the_place_anew"),
    (GUIDE, "11. ", "highwater ", "guide::the_guides_chapter_on_retention_keeps_what_it_says"),
    (GUIDE, "12. ", "highwater ", "encryption::the_guides_chapter_works_as_it_is_printed"),
    (GUIDE, "13. ", "highwater ", "two_repos::the_guides_chapter_works_as_it_is_printed"),
    (GUIDE, "14. ", "highwater ", "stall::the_guides_example_does_what_it_says"),
    (README, "Five minutes", "highwater ", "guide::the_readme_leads_to_a_first_backup_and_back"),
    (README, "Bring it back", "highwater ", "guide::the_readme_leads_to_a_first_backup_and_back"),
    (README, "Bring it back", "pg_ctl ", "guide::the_readme_leads_to_a_first_backup_and_back"),
];

#[test]
fn every_printed_command_is_run_by_a_test() {
    let mut used = [0; RUN_BY.len()];
    for page in [GUIDE, README] {
        for block in blocks(page) {
            for command in commands_in(&block) {
                let runs = |(of, chapter, words, _): &(&str, &str, &str, &str)| {
                    *of == page && block.chapter.starts_with(chapter) && command.starts_with(words)
                };
                let row = RUN_BY.iter().position(runs);
                used[row.unwrap_or_else(|| panic!("no test runs `{command}` of {page}"))] += 1;
            }
        }
    }
    for ((page, chapter, words, test), used) in RUN_BY.iter().zip(used) {
        assert!(used > 0, "no `{words}` below {chapter} of {page}");
        let (file, name) = test.split_once("::").unwrap();
        let text = read(&format!("tests/suite/{file}.rs"));
        assert!(text.contains(&format!("fn {name}(")), "there is no test {test}");
    }
}

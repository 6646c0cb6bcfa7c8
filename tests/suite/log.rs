//! `log` against `pg_waldump` on every major version, and a table that comes back by the printed command.

use crate::harness::{
    Archived, Cluster, MAJORS, NEWEST, Receiver, Run, as_server_user, files_below, parse_lsn,
    rounds, switch_lsn,
};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::Stdio;

/// The end of a transaction, or a restore point, told the same way by `log` and by `pg_waldump`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Told {
    lsn: u64,
    what: String,
    /// Files removed, records of the transaction with its end.
    counts: (u64, u64),
}

/// What `pg_waldump` says of all WAL from a segment to another.
fn dumped(cluster: &Cluster, first: &str, last: &str) -> Vec<Told> {
    let mut command = cluster.tool("pg_waldump");
    command.arg("-p").arg(cluster.pgdata.join("pg_wal")).args([first, last]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut records: BTreeMap<u32, u64> = BTreeMap::new();
    let mut told = Vec::new();
    for line in BufReader::new(child.stdout.take().unwrap()).split(b'\n') {
        let line = String::from_utf8_lossy(&line.unwrap()).into_owned();
        let after = |key: &str| line.split_once(key).map(|(_, rest)| rest);
        let Some(lsn) = after("lsn: ").and_then(|rest| rest.split(',').next()) else { continue };
        let lsn = parse_lsn(lsn);
        let xid: u32 = after("tx:").unwrap().split(',').next().unwrap().trim().parse().unwrap();
        let manager = line.split_whitespace().nth(1).unwrap();
        let (verb, rest) = after("desc: ").unwrap().split_once(' ').unwrap_or_default();
        let is_end =
            manager == "Transaction" && (verb.contains("COMMIT") || verb.contains("ABORT"));
        if is_end {
            // `COMMIT_PREPARED 742: 2026-11-22 …`
            let (xid, rest) = match rest.split_once(": ") {
                Some((xid, rest)) if verb.ends_with("_PREPARED") => (xid.parse().unwrap(), rest),
                _ => (xid, rest),
            };
            let list = |name: &str| {
                let list = rest.split_once(name).map_or("", |(_, rest)| rest);
                let list = list.split(';').next().unwrap().split_whitespace();
                list.map(ToOwned::to_owned).collect::<Vec<_>>()
            };
            let subtransactions = list("subxacts: ");
            let subtransactions = subtransactions.iter().map(|xid| xid.parse::<u32>().unwrap());
            let all = std::iter::once(xid).chain(subtransactions);
            let counted: u64 = all.map(|xid| records.get(&xid).copied().unwrap_or(0)).sum();
            let verb = verb.trim_end_matches("_PREPARED").to_lowercase();
            let what = format!("{verb} {xid} {}", moment(rest));
            told.push(Told { lsn, what, counts: (list("rels: ").len() as u64, counted + 1) });
        } else if xid != 0 {
            *records.entry(xid).or_default() += 1;
        }
        if manager == "XLOG" && verb == "RESTORE_POINT" {
            let what = format!("restore-point {}", rest.trim());
            told.push(Told { lsn, what, counts: (0, 0) });
        }
    }
    child.wait().unwrap();
    told
}

/// `2026-11-22 03:00:00.12 UTC; more` as `log` writes it.
fn moment(text: &str) -> String {
    let (stamp, _) = text.split_once(" UTC").unwrap_or_else(|| panic!("no time in {text:?}"));
    let civil: jiff::civil::DateTime = stamp.parse().unwrap();
    civil.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

/// The lines of `log --json`.
pub(crate) fn lines(run: &Run) -> Vec<serde_json::Value> {
    run.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn kind(line: &serde_json::Value) -> &str {
    line["kind"].as_str().unwrap()
}

fn told(lines: &[serde_json::Value]) -> Vec<Told> {
    let told = lines.iter().filter_map(|line| {
        let text = |name: &str| line[name].as_str().unwrap().to_owned();
        let number = |name: &str| line[name].as_u64().unwrap();
        let (what, counts) = match kind(line) {
            verb @ ("commit" | "abort") => (
                format!("{verb} {} {}", line["xid"], text("time")),
                (number("removed_files"), number("records")),
            ),
            "restore-point" => (format!("restore-point {}", text("name")), (0, 0)),
            _ => return None,
        };
        Some(Told { lsn: parse_lsn(&text("lsn")), what, counts })
    });
    told.collect()
}

/// Transactions of every kind, over several segments.
fn mixed_life(cluster: &Cluster, round: u64) {
    cluster.pgbench(&["-n", "-c", "4", "-t", "250"]);
    let bulk = format!(
        "create table bulk_{round} (n int primary key, t text); \
         insert into bulk_{round} select g, repeat(md5(g::text), 3) from generate_series(1, 40000) g"
    );
    cluster.sql(&bulk);
    let statements = [
        "begin; create table gone (n int primary key, t text); rollback",
        "create table kept (n int primary key, t text)",
        // More subtransactions than a backend keeps in shared memory.
        "do $$ begin for n in 1..150 loop begin insert into kept values (n, 'sub'); \
         if n % 7 = 0 then raise exception 'no'; end if; exception when raise_exception then null; \
         end; end loop; end $$",
        "begin; insert into kept values (1001); savepoint s; insert into kept values (1002); \
         rollback to s; insert into kept values (1003); commit",
        "begin; insert into kept values (2001); savepoint p; insert into kept values (2002); \
         release p; prepare transaction 'taken'",
        "begin; insert into kept values (2003); create table half (n int); prepare transaction 'left'",
        "commit prepared 'taken'",
        "rollback prepared 'left'",
        "delete from pgbench_history",
        "truncate kept",
        "vacuum full pgbench_tellers",
        "drop table kept",
        "create database other",
        "drop database other",
    ];
    for statement in statements {
        cluster.sql(statement);
    }
    cluster.sql(&format!("select pg_create_restore_point('round {round}, 2026; done')"));
    // Open over the border of a segment, with a record on each side.
    cluster.sql(&format!(
        "begin; delete from bulk_{round} where n <= 20000; select pg_switch_wal(); \
         delete from bulk_{round} where n > 20000; drop table bulk_{round}; commit"
    ));
    cluster.sql("checkpoint");
}

/// Compares everything that is archived, in both orders.
fn compare(place: &Archived) -> Vec<serde_json::Value> {
    let last = place.cluster.archive_now();
    let expected = dumped(&place.cluster, "000000010000000000000001", &last);
    let log = ["log", "--json", "--aborts"];
    let run = place.highwater.run(&[&log[..], &["--oldest-first", "--names", "none"]].concat());
    let oldest = lines(&run.done());
    let found = told(&oldest);
    let major = place.cluster.major;
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected, "PostgreSQL {major}");
    }
    assert_eq!(found.len(), expected.len(), "PostgreSQL {major}");
    let end = oldest.last().unwrap();
    assert_eq!(
        (kind(end), end["complete"].as_bool(), end["gaps"].as_u64()),
        ("end", Some(true), Some(0))
    );
    let newest = lines(&place.highwater.run(&log).done());
    let mut turned = told(&newest);
    turned.reverse();
    for (found, expected) in turned.iter().zip(&expected) {
        assert_eq!(found, expected, "PostgreSQL {major}, newest first");
    }
    assert_eq!(turned.len(), expected.len());
    newest
}

#[test]
fn log_tells_what_pg_waldump_tells_on_every_major() {
    // `make soak`: more than a gigabyte.
    let rounds = rounds(2);
    for major in MAJORS {
        let place = Archived::by_server_with(major, |cluster| {
            let cluster = cluster.conf("max_prepared_transactions = 5");
            cluster.conf("wal_keep_size = 4GB").conf("max_wal_size = 4GB")
        });
        place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
        for round in 0..rounds {
            mixed_life(&place.cluster, round);
        }
        let newest = compare(&place);
        let exact = newest.iter().filter(|line| line["records_exact"] == true).count();
        assert!(exact > 1000, "{exact} of {}", newest.len());
        let large: Vec<_> = newest.iter().filter(|line| line["large_delete"] == true).collect();
        // Of the table itself; with it went rows of catalogs.
        let of_table = |line: &&&serde_json::Value| {
            let mut relations = line["relations"].as_array().unwrap().iter();
            relations.any(|relation| relation["deleted_rows"] == 40_000)
        };
        assert_eq!(large.iter().filter(of_table).count() as u64, rounds, "PostgreSQL {major}");
        let drops = newest.iter().filter(|line| line["dropped_databases"].is_array()).count();
        assert_eq!(drops as u64, rounds, "PostgreSQL {major}");
    }
}

#[test]
fn log_reads_streamed_wal_from_s3() {
    let place = Archived::by_hand_on_s3(NEWEST, 16);
    let receiver = Receiver::streaming(&place.highwater, &place.cluster, &[]);
    place.cluster.pgbench(&["-i", "-q", "-s", "2"]);
    place.cluster.sql("create table stays (n int)");
    place.cluster.sql("select pg_create_restore_point('streamed')");
    place.cluster.sql("drop table stays");
    receiver.wait_acknowledged(&place.cluster);
    receiver.terminate().done();
    let first = &place.highwater.info()["wal"][0]["start_lsn"];
    let segment = parse_lsn(first.as_str().unwrap()) >> 24;
    let first = format!("00000001{segment:016X}");
    let last = place.cluster.switch_wal();
    let expected = dumped(&place.cluster, &first, &last);
    let run =
        place.highwater.run(&["log", "--json", "--aborts", "--oldest-first", "--names", "none"]);
    let found = told(&lines(&run.done()));
    // The server's own end is not in the repository.
    assert!(found.iter().any(|told| told.what == "restore-point streamed"));
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!((found.lsn, &found.what), (expected.lsn, &expected.what));
    }
    assert!(found.len() + 3 > expected.len(), "{} of {}", found.len(), expected.len());
}

/// Runs a command line that was printed, in a shell.
fn run_printed(place: &Archived, command: &str) {
    let mut shell = as_server_user("/bin/sh");
    place.highwater.settings_for(&mut shell);
    let output = shell.arg("-c").arg(command).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
}

/// Drops a table among other commits; returns the number of rows that it had.
pub(crate) fn drop_among_others(cluster: &Cluster, table: &str) -> String {
    let rows = cluster.sql(&format!("select count(*) from {table}"));
    cluster.sql(&format!(
        "create table if not exists marks (t text); insert into marks values ('before {table}')"
    ));
    cluster.sql(&format!("drop table {table}"));
    cluster.sql(&format!("insert into marks values ('after {table}')"));
    rows
}

/// Brings the cluster to before the drop by the command that `log` prints.
pub(crate) fn assert_comes_back(place: &Archived, table: &str, rows: &str) {
    let name = table.replace('.', "-");
    let pgdata = place.lab.path().join(format!("before-{name}"));
    let arguments = ["log", "--before-drop", table, "--pgdata", pgdata.to_str().unwrap(), "--json"];
    let found = place.highwater.run(&arguments).done().json();
    run_printed(place, found["command"].as_str().unwrap());
    let mut copy = Cluster::adopt(&place.lab, place.cluster.major, &pgdata);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    assert_eq!(copy.sql(&format!("select count(*) from {table}")), rows, "{found}");
    let marks = copy.sql(&format!("select t from marks where t like '%{table}'"));
    assert_eq!(marks, format!("before {table}"), "{found}");
    copy.fast_stop();
}

#[test]
fn a_dropped_table_comes_back_by_the_printed_command() {
    for major in MAJORS {
        let place = Archived::by_server(major);
        let cluster = &place.cluster;
        cluster.sql("create schema shop; create table shop.orders (n int primary key, t text)");
        cluster.sql("insert into shop.orders select g, 'x' from generate_series(1, 500) g");
        place.highwater.run(&["backup", "--fast"]).done();
        // Another file under the same name, and rows that only WAL has.
        cluster.sql("truncate shop.orders");
        cluster.sql("insert into shop.orders select g, 'y' from generate_series(1, 300) g");
        let orders = drop_among_others(cluster, "shop.orders");
        cluster.sql("create table born_later (n int); insert into born_later values (1), (2)");
        cluster.sql(
            "alter table born_later rename to grown_up; alter table grown_up add m int default 5",
        );
        cluster.sql("vacuum full grown_up");
        let later = drop_among_others(cluster, "public.grown_up");
        cluster.archive_now();
        assert_comes_back(&place, "shop.orders", &orders);
        assert_comes_back(&place, "public.grown_up", &later);
        let before = |name: &str| place.highwater.run(&["log", "--before-drop", name]);
        before("shop.marks").ends_with(1).says("no drop of `shop.marks`");
        before("marks").ends_with(1).says("stands at the end");
        before("born_later").ends_with(1).says("renamed to `grown_up`");
    }
}

#[test]
fn drops_are_found_in_the_stretch_between_the_right_backups() {
    let place = Archived::by_server(NEWEST);
    let cluster = &place.cluster;
    cluster.sql("create database side");
    cluster.sql("create table early (n int)");
    place.highwater.run(&["backup", "--fast"]).done();
    let early = drop_among_others(cluster, "early");
    // pg_class has other files from here on.
    cluster.sql("vacuum full pg_class");
    cluster.sql("create table middle (n int); insert into middle values (7)");
    place.highwater.run(&["backup", "--fast"]).done();
    let middle = drop_among_others(cluster, "middle");
    cluster.sql("create table early (n int)");
    place.highwater.run(&["backup", "--fast", "--source", "files"]).done();
    cluster.sql("drop database side");
    cluster.archive_now();
    assert_comes_back(&place, "middle", &middle);
    assert_comes_back(&place, "early", &early);
    let side = place.highwater.run(&["log", "--before-drop", "side", "--json"]).done().json();
    assert_eq!((&side["dropped"], &side["name"]), (&"database".into(), &"side".into()), "{side}");
    let pgdata = place.lab.path().join("with-side");
    let command =
        side["command"].as_str().unwrap().replace("NEW_DIRECTORY", pgdata.to_str().unwrap());
    run_printed(&place, &command);
    let mut copy = Cluster::adopt(&place.lab, NEWEST, &pgdata);
    copy.start();
    copy.wait_until("select pg_is_in_recovery()", "f");
    let mut psql = copy.client("psql");
    psql.env("PGDATABASE", "side").args(["-XAtqc", "select 1"]);
    assert!(psql.output().unwrap().status.success(), "the database can be connected to");
}

#[test]
fn names_filters_and_gaps() {
    let place = Archived::by_server(NEWEST);
    let cluster = &place.cluster;
    cluster.sql("create table first_one (n int primary key); create table second_one (n int)");
    place.highwater.run(&["backup", "--fast"]).done();
    cluster.sql("insert into first_one select generate_series(1, 20)");
    cluster.sql("insert into second_one values (1)");
    let middle = cluster.archive_now();
    let noted = place.now();
    cluster.sql("delete from first_one where n > 5");
    cluster.sql("truncate second_one");
    cluster.archive_now();
    cluster.sql("select pg_create_restore_point('last')");
    cluster.sql("drop table first_one");
    cluster.archive_now();
    let log = |more: &[&str]| place.highwater.run(&[&["log", "--json"], more].concat());
    let of = |more: &[&str]| lines(&log(more).done());

    let only = of(&["--relation", "public.first_one"]);
    let commits: Vec<_> = only.iter().filter(|line| kind(line) == "commit").collect();
    assert_eq!(commits.len(), 3, "{only:?}");
    let names = |line: &serde_json::Value, list: &str| -> Vec<String> {
        let list = line[list].as_array().cloned().unwrap_or_default();
        list.iter().map(|one| one["name"].as_str().unwrap_or("?").to_owned()).collect()
    };
    assert!(names(commits[0], "removed").contains(&"public.first_one".to_owned()), "{only:?}");
    assert!(names(commits[0], "removed").contains(&"public.first_one_pkey".to_owned()));
    assert_eq!(commits[1]["deleted_rows"], 15);
    assert_eq!(commits[1]["database"]["name"], "postgres");
    assert!(names(commits[2], "relations").contains(&"public.first_one".to_owned()));

    let drops = of(&["--kinds", "drops", "--since", &noted, "--oldest-first"]);
    assert_eq!(drops.iter().filter(|line| kind(line) == "commit").count(), 2, "{drops:?}");
    let text = place.highwater.run(&["log", "--kinds", "drops"]).done();
    text.says("DROPS public.first_one").says("second_one").says("REPLACES");
    let early = of(&["--until", &noted, "--relation", "first_one"]);
    assert_eq!(early.iter().filter(|line| kind(line) == "commit").count(), 1, "{early:?}");
    let limited = of(&["--limit", "1", "--kinds", "restore-points"]);
    assert_eq!((limited.len(), &limited[0]["name"]), (2, &"last".into()));
    let lsn = commits[1]["lsn"].as_str().unwrap();
    let since = of(&["--since", lsn, "--relation", "first_one"]);
    assert_eq!(since.iter().filter(|line| kind(line) == "commit").count(), 2);
    let until = of(&["--until", lsn, "--relation", "first_one", "--oldest-first"]);
    assert_eq!(until.iter().filter(|line| kind(line) == "commit").count(), 1);
    let xid = commits[1]["xid"].to_string();
    let one = of(&["--xid", &xid]);
    assert_eq!((one.len(), &one[0]["lsn"]), (2, &commits[1]["lsn"]));
    let own = of(&["--database", "postgres", "--kinds", "commits"]);
    let is_own =
        |line: &serde_json::Value| kind(line) == "end" || line["database"]["name"] == "postgres";
    assert!(own.len() > 4 && own.iter().all(is_own), "{own:?}");

    // As it is now, the server knows one of the two.
    let now = of(&["--names", "server", "--relation", "second_one"]);
    assert!(!now.is_empty());

    // A hole is told where it is, and what lies on both sides of it as well.
    let all = of(&[]).iter().filter(|line| kind(line) == "commit").count();
    let object = place.objects_of(&middle).remove(0);
    std::fs::remove_file(&object).unwrap();
    for order in [&[][..], &["--oldest-first"]] {
        let holed = lines(&log(order).ends_with(4));
        let gaps: Vec<_> = holed.iter().filter(|line| kind(line) == "gap").collect();
        assert_eq!(gaps.len(), 1, "{holed:?}");
        assert_eq!(parse_lsn(gaps[0]["end_lsn"].as_str().unwrap()) % (16 << 20), 0);
        let told = holed.iter().filter(|line| kind(line) == "commit").count();
        assert!(told < all && told > 3, "{told} of {all}");
    }
    // It may hold commits of after that moment.
    log(&["--since", &noted]).ends_with(4);
    assert!(files_below(&place.highwater.repo_directory()).len() > 3);
}

#[test]
fn a_promotion_and_what_only_a_partial_segment_holds_are_told() {
    let place = Archived::by_server(NEWEST);
    place.cluster.archive_now();
    let standby = place.cluster.standby("standby", &["archive_mode = on"]);
    place.cluster.sql("select pg_create_restore_point('before_the_fork')");
    place.cluster.sql("create table last_of_the_old (n int)");
    let seen = "select count(*) from pg_class where relname = 'last_of_the_old'";
    standby.wait_until(seen, "1");
    let open = place.cluster.sql("select pg_walfile_name(pg_current_wal_lsn())");
    standby.promote();
    standby.sql("create table first_of_the_new (n int)");
    let fork = standby.archive_now();
    let partial = format!("{open}.partial");
    for name in ["00000002.history", &partial, &fork] {
        standby.wait_archived(name);
    }
    let history = standby.wal("00000002.history");
    let switch = switch_lsn(&history);
    let tell = |more: &[&str]| {
        let run = place.highwater.run(&[&["log", "--json"], more].concat());
        lines(&run.done())
    };
    let is_point = |line: &&serde_json::Value| line["name"] == "before_the_fork";
    // The way to the new timeline: the old one up to the fork, the promotion, and what came after it.
    let new = tell(&["--oldest-first"]);
    assert_eq!(new.iter().filter(is_point).count(), 1, "{new:?}");
    let place_of = |wanted: &dyn Fn(&serde_json::Value) -> bool| new.iter().position(wanted);
    let point = place_of(&|line| line["name"] == "before_the_fork").unwrap();
    let promotion = place_of(&|line| kind(line) == "promotion").unwrap();
    let after = |line: &serde_json::Value| {
        kind(line) == "commit" && parse_lsn(line["lsn"].as_str().unwrap()) > parse_lsn(&switch)
    };
    let commit = place_of(&after).unwrap();
    assert!(point < promotion && promotion < commit, "{new:?}");
    assert_eq!(new.iter().filter(|line| kind(line) == "promotion").count(), 1, "{new:?}");
    let text = place.highwater.run(&["log"]).done();
    text.says("before_the_fork").says("timeline 2");
    // Of the old timeline, nobody but the partial segment holds its end; nothing of the new one is told there.
    assert!(place.objects_of(&open).iter().all(|path| path.ends_with(&partial)));
    let old = tell(&["--timeline", "1", "--oldest-first"]);
    assert_eq!(old.iter().filter(is_point).count(), 1, "{old:?}");
    assert!(!old.iter().any(|line| kind(line) == "promotion" || after(line)), "{old:?}");
    let last = old.iter().rfind(|line| kind(line) == "commit").unwrap();
    let same = new.iter().find(|line| line["lsn"] == last["lsn"]).unwrap();
    assert_eq!(last["xid"], same["xid"], "the commit before the fork");
}

/// The commands that `docs/guide.md` shows for `log`.
fn commands_of_the_guide() -> Vec<String> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/guide.md");
    let page = std::fs::read_to_string(page).unwrap();
    let commands = page.lines().filter(|line| line.starts_with("highwater log "));
    commands.map(ToOwned::to_owned).collect()
}

#[test]
fn the_commands_of_the_guide_do_what_it_says() {
    let place = Archived::by_server(NEWEST);
    let cluster = &place.cluster;
    cluster.sql("create table orders (n int); create table events (n int)");
    cluster.sql("insert into events select generate_series(1, 15000)");
    place.highwater.run(&["backup", "--fast"]).done();
    cluster.sql("select pg_create_restore_point('before_release')");
    cluster.sql("delete from events");
    cluster.sql("drop table orders");
    cluster.archive_now();
    let program = place.highwater.archive_command();
    let program = program.strip_suffix("archive-push %p").unwrap();
    let told = |command: &str| {
        let mut shell = as_server_user("/bin/sh");
        place.highwater.settings_for(&mut shell);
        let output =
            shell.arg("-c").arg(command.replacen("highwater ", program, 1)).output().unwrap();
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let commands = commands_of_the_guide();
    assert_eq!(commands.len(), 5, "{commands:?}");
    for command in &commands {
        let text = told(command);
        if command.contains("--before-drop") {
            assert!(
                text.contains("table `public.orders` of database `postgres` was dropped"),
                "{text}"
            );
            assert!(text.contains("--exclusive --timeline 1"), "{text}");
        } else if !command.contains("--since") {
            assert!(text.contains("DROPS public.orders"), "{command}: {text}");
        }
        if command.contains("large-deletes") {
            assert!(text.contains("DELETES 15000 rows from public.events"), "{text}");
        }
    }
}

//! What the binary says: help, failures, settings, exit codes.
//!
//! Each run has an empty environment but for what the test sets, a working
//! directory of its own and a pinned zone. A changed snapshot is a changed
//! contract: look at it as such. To accept one: `INSTA_UPDATE=always cargo test --test cli_snapshots`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A directory with a settings file, in which the binary runs.
struct Bench {
    dir: TempDir,
}

impl Bench {
    /// Without a named file the machine's own /etc could be read, so there is always one.
    fn new(settings_file: &str) -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        std::fs::write(bench.file(), settings_file).unwrap();
        std::fs::set_permissions(bench.file(), std::fs::Permissions::from_mode(0o600)).unwrap();
        bench
    }

    fn file(&self) -> PathBuf {
        self.dir.path().join("h.toml")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_highwater"));
        command
            .args(args)
            .env_clear()
            .env("HIGHWATER_CONFIG", self.file())
            .env("HOME", self.dir.path())
            .env("TZ", "Europe/Helsinki")
            .current_dir(self.dir.path())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Everything that a run shows, with the directory's name taken out.
    fn seen(&self, output: &Output) -> String {
        let text = |bytes: &[u8]| {
            let text = String::from_utf8(bytes.to_vec()).unwrap();
            text.replace(&self.dir.path().display().to_string(), "[DIR]")
        };
        let mut seen = format!("exit code {}\n", code(output));
        for (name, text) in [("stdout", text(&output.stdout)), ("stderr", text(&output.stderr))] {
            if !text.is_empty() {
                seen = format!("{seen}--- {name}\n{text}");
            }
        }
        seen
    }

    fn show(&self, args: &[&str]) -> String {
        format!("$ highwater {}\n{}", args.join(" "), self.seen(&self.run(args)))
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

const COMMANDS: [&str; 18] = [
    "init",
    "check",
    "archive-push",
    "archive-get",
    "agent",
    "backup",
    "restore",
    "info",
    "verify",
    "drill",
    "log",
    "spool",
    "expire",
    "pin",
    "unpin",
    "copy",
    "key",
    "config",
];

#[test]
fn help_reads_well() {
    let bench = Bench::new("");
    insta::assert_snapshot!("help", bench.show(&["--help"]));
    for command in COMMANDS {
        insta::assert_snapshot!(format!("help_{command}"), bench.show(&[command, "--help"]));
    }
}

#[test]
fn version_is_the_crates() {
    let output = Bench::new("").run(&["--version"]);
    let expected = format!("highwater {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

#[test]
fn commands_that_do_not_exist_yet_are_not_offered() {
    let bench = Bench::new("");
    let help = String::from_utf8(bench.run(&["--help"]).stdout).unwrap();
    for command in ["extract", "man"] {
        let offered = |line: &str| line.trim_start().starts_with(&format!("{command} "));
        assert!(!help.lines().any(offered), "{command}");
        if command != "man" {
            assert_eq!(code(&bench.run(&[command])), 2, "{command}");
        }
    }
}

#[test]
fn mistakes_in_arguments_are_told_with_a_remedy() {
    let bench = Bench::new("");
    let restore = |more: &[&str]| {
        let args: Vec<&str> = ["restore", "--pgdata", "d"].iter().chain(more).copied().collect();
        bench.show(&args)
    };
    let shown = [
        bench.show(&["bakup"]),
        bench.show(&["info", "--clustr", "a"]),
        bench.show(&["archive-push"]),
        bench.show(&["archive-get", "00000002.history"]),
        bench.show(&["info", "-q", "-v"]),
        bench.show(&["backup", "--source", "files"]),
        bench.show(&["backup", "--annotate", "why"]),
        bench.show(&["backup", "--annotate", "a=1", "--annotate", "a=2"]),
        bench.show(&["backup", "--max-rate", "10"]),
        bench.show(&["check", "--wait-seconds", "0"]),
        bench.show(&["restore"]),
        restore(&["--to-time", "2026-11-22 03:00:00", "--to-lsn", "0/28"]),
        restore(&["--to-immediate", "--exclusive"]),
        restore(&["--target-action", "promote"]),
        restore(&["--tablespace-map", "/a"]),
        restore(&["--tablespace-map", "/a=/b", "--tablespace-map", "/a=/c"]),
    ];
    insta::assert_snapshot!("mistakes_in_arguments", shown.join("\n"));
}

#[test]
fn mistakes_in_targets_are_told_with_a_remedy() {
    let bench = Bench::new("");
    let long_name = "x".repeat(64);
    let shown: Vec<String> = [
        ["--to-time", "now"],
        ["--to-time", "yesterday"],
        ["--to-time", "22.11.2026"],
        ["--to-time", "2026-11-22 03:00:00 EET"],
        ["--to-time", "2026-03-29 03:30:00"],
        ["--to-time", "2026-10-25 03:30:00"],
        ["--to-lsn", "16"],
        ["--to-xid", "2"],
        ["--to-name", &long_name],
        ["--timeline", "newest"],
    ]
    .iter()
    .map(|[flag, text]| bench.show(&["restore", "--pgdata", "d", flag, text]))
    .collect();
    insta::assert_snapshot!("mistakes_in_targets", shown.join("\n"));
}

#[test]
fn mistakes_in_settings_are_told_with_place_and_remedy() {
    let mut shown = Vec::new();
    for file in [
        "compresion = \"lz4\"\n",
        "cluster = \"a\"\njobs = \"4\"\n",
        "[repo]\nurl = \"s3://b/p\"\n[repo.options]\nregion = [\"a\"]\n",
        "cluster = main\n",
        "wal_timeout = \"5m\"\n",
    ] {
        let lines: Vec<String> = file.lines().map(|line| format!("| {line}")).collect();
        let seen = Bench::new(file).show(&["config"]);
        shown.push(format!("{}\n{seen}", lines.join("\n")));
    }
    let bench = Bench::new("");
    for (name, value) in [
        ("HIGHWATER_COMPRESSION", "gzip"),
        ("HIGHWATER_MEMORY_MAX", "1MB"),
        ("HIGHWATER_CLUSTER", "a/b"),
        ("HIGHWATER_CLUSTR", "a"),
        ("HIGHWATER_CONFIG", "/nonexistent/highwater.toml"),
    ] {
        let output = bench.command(&["info"]).env(name, value).output().unwrap();
        shown.push(format!("$ {name}={value} highwater info\n{}", bench.seen(&output)));
    }
    shown.push(bench.show(&["--repo", "file:///r", "info"]));
    shown.push(bench.show(&["--repo", "/r", "info"]));
    insta::assert_snapshot!("mistakes_in_settings", shown.join("\n"));
}

#[test]
fn a_failure_in_json_is_the_one_document_on_stdout() {
    let bench = Bench::new("");
    for args in [&["info", "--json"][..], &["--json", "info"], &["info", "--json", "--nonsense"]] {
        let output = bench.run(args);
        assert_eq!(code(&output), 2, "{args:?}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(json["error"]["kind"], "usage");
        assert_eq!(json["error"]["exit_code"], 2);
        assert!(output.stderr.is_empty(), "{args:?}");
    }
    insta::assert_snapshot!("failure_json", bench.show(&["info", "--json"]));
}

const SETTINGS: &str = "\
cluster = \"from-file\"
compression = \"lz4\"
memory_max = 536870912
standby_fallback = false
jobs = 3

[repo]
url = \"s3://from-file/prefix\"

[repo.options]
region = \"eu-north-1\"
access_key_id = \"AKIA\"
secret_access_key = \"geheim\"
";

#[test]
fn config_shows_each_value_with_its_origin_and_no_secret() {
    let bench = Bench::new(SETTINGS);
    let run = |args: &[&str]| {
        let mut command = bench.command(args);
        command
            .env("HIGHWATER_CLUSTER", "from-variable")
            .env("HIGHWATER_DSN", "host=/run user=hw password='geheim'")
            .env("HIGHWATER_REPO_SESSION_TOKEN", "geheim")
            .env("HIGHWATER_WAL_TIMEOUT", "90")
            .env("PGPASSWORD", "geheim")
            .env("AWS_SECRET_ACCESS_KEY", "geheim");
        let output = command.output().unwrap();
        let seen = bench.seen(&output);
        assert!(!seen.contains("geheim"), "{seen}");
        seen
    };
    insta::assert_snapshot!("config_text", run(&["config", "--repo", "file:///from-flag"]));
    insta::assert_snapshot!("config_json", run(&["--repo", "file:///flag", "config", "--json"]));
}

#[test]
fn config_alone_shows_the_defaults() {
    // The number of workers depends on the machine.
    let bench = Bench::new("jobs = 2\n");
    insta::assert_snapshot!("config_defaults", bench.show(&["config"]));
}

#[test]
fn a_settings_file_with_a_secret_that_others_can_read_draws_a_warning() {
    let bench = Bench::new(SETTINGS);
    std::fs::set_permissions(bench.file(), std::fs::Permissions::from_mode(0o644)).unwrap();
    let output = bench.run(&["config"]);
    assert_eq!(code(&output), 0);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.starts_with("highwater: warning: "), "{stderr}");
    assert!(stderr.contains("can be read by other users"), "{stderr}");
    assert!(bench.run(&["config", "-q"]).stderr.is_empty());
}

#[test]
fn flags_are_taken_before_and_after_the_command() {
    let bench = Bench::new("jobs = 2\n");
    let before = bench.run(&["--cluster", "a", "--json", "config"]);
    let after = bench.run(&["config", "--cluster", "a", "--json"]);
    assert_eq!(code(&before), 0);
    assert_eq!(before.stdout, after.stdout);
}

#[test]
fn no_mistake_in_a_restore_command_looks_like_the_end_of_the_archive() {
    let wal = "000000010000000A000000FE";
    let cases: [(&str, &[&str]); 12] = [
        ("", &["archive-get"]),
        ("", &["archive-get", wal]),
        ("", &["archive-get", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["archive-get", wal, "pg_wal/RECOVERYXLOG", "more"]),
        ("", &["archive-get", "--no-such-flag", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["archive-gte", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["--clustr", "a", "archive-get", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["archive-push", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["archive-get", "--help", wal, "pg_wal/RECOVERYXLOG"]),
        ("", &["--config", "/nonexistent", "archive-get", wal, "pg_wal/RECOVERYHISTORY"]),
        ("jobs = 0\n", &["archive-get", wal, "x"]),
        ("cluster = = \n", &["archive-get", wal, "x"]),
    ];
    for (file, args) in cases {
        let output = Bench::new(file).run(args);
        assert_eq!(code(&output), 130, "{args:?}");
    }
    let bench = Bench::new("");
    let json = bench.run(&["--json", "archive-get", wal, "pg_wal/RECOVERYXLOG"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["error"]["exit_code"], 130);
}

#[test]
fn every_failure_of_archive_push_is_counted_by_postgresql() {
    let cases: [(&str, &[&str]); 4] = [
        ("", &["archive-push"]),
        ("", &["archive-push", "pg_wal/000000010000000A000000FE"]),
        ("", &["archive-push", "--no-such-flag", "x"]),
        ("jobs = 0\n", &["archive-push", "x"]),
    ];
    for (file, args) in cases {
        assert_eq!(code(&Bench::new(file).run(args)), 2, "{args:?}");
    }
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    for args in [&["config"][..], &["config", "--json"], &["--help"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = Bench::new("").command(args).stdout(writer).output().unwrap();
        assert_eq!(code(&output), 0, "{args:?}");
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_closed_stderr_does_not_change_the_exit_code() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let bench = Bench::new("");
    let mut command = bench.command(&["-vv", "archive-get", "x", "y"]);
    let status = command.stderr(writer).env("HIGHWATER_UNKNOWN", "1").status().unwrap();
    assert_eq!(status.code(), Some(130));
}

#[test]
fn manual_pages_are_written_where_asked() {
    let bench = Bench::new("");
    let pages = bench.dir.path().join("pages");
    std::fs::create_dir(&pages).unwrap();
    assert_eq!(code(&bench.run(&["man", "pages"])), 0);
    let page = std::fs::read_to_string(pages.join("highwater-restore.1")).unwrap();
    assert!(page.contains("to\\-time"), "{page}");
    assert_eq!(code(&bench.run(&["man", "nowhere"])), 7);
}

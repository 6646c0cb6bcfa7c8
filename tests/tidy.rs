//! Keeps the house tidy: which room may import which, how long files and
//! functions may be, and which calls are banned where.
//!
//! The rules are those of `docs/architecture.md`. Where one fails, the message
//! names the file, the line and the rule; change the code, not the rule. The
//! scanners below know just enough of Rust for this, and are tested themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::path::{Path, PathBuf};

/// Rooms and their floors; a file may import from floors below its own, and
/// from its own room.
const FLOORS: [(&str, u32); 16] = [
    ("main", 5),
    ("cli", 4),
    ("agent", 3),
    ("drill", 3),
    ("ops", 3),
    ("plan", 2),
    ("repo", 2),
    ("format", 1),
    ("store", 1),
    ("walsender", 1),
    ("pgdata", 1),
    ("pg", 0),
    ("failure", 1),
    ("causes", 0),
    ("spelling", 0),
    ("lib", 6),
];

/// Imports against the floors that are meant: the agent runs the use cases, a drill runs `restore`.
const ALLOWED: [(&str, &str); 2] = [("agent", "ops"), ("drill", "ops")];

/// The rooms that may make or pass on a `Failure`; those below have error enums.
const FAILURE_ROOMS: [&str; 6] = ["ops", "agent", "drill", "cli", "main", "lib"];

/// Files of `ops` that every use case may import; others stay strangers.
const SHARED_IN_OPS: [&str; 9] = [
    "ahead",
    "failures",
    "progress",
    "server_facts",
    "slot_view",
    "stall",
    "stock",
    "stop",
    "wal_times",
];

/// Lines of a file without its tests.
const FILE_LINES_MAX: usize = 600;
const FILE_LINES_WARN: usize = 500;

/// Lines of a function, from `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;

/// Names that say nothing about an owner.
const EMPTY_NAMES: [&str; 7] =
    ["utils", "util", "helpers", "helper", "common", "manager", "handler"];

/// Calls banned in production code: what, and in which rooms it is allowed.
const BANNED: [(&str, &[&str]); 13] = [
    (".unwrap()", &["cli"]),
    (".expect(", &["cli"]),
    ("panic!", &["cli"]),
    ("todo!", &[]),
    ("unimplemented!", &[]),
    ("println!", &["cli"]),
    ("eprintln!", &["cli"]),
    ("print!", &["cli"]),
    ("eprint!", &["cli"]),
    ("dbg!", &[]),
    ("process::exit", &["cli", "main"]),
    ("env::var", &["cli"]),
    ("env::temp_dir", &[]),
];

/// Calls banned in single rooms: decisions and facts are values only.
const BANNED_IN: [(&str, &[&str]); 3] = [
    (
        "plan",
        &[
            "async fn",
            ".await",
            "std::fs",
            "std::net",
            "SystemTime::now",
            "Instant::now",
            "Timestamp::now",
            "rand::",
            "tracing::",
            "tokio::",
        ],
    ),
    ("pg", &["async fn", "std::fs", "std::net", "SystemTime::now", "Timestamp::now", "tokio::"]),
    (
        "format",
        &["async fn", "std::fs", "std::net", "SystemTime::now", "Timestamp::now", "tokio::"],
    ),
];

// ---------------------------------------------------------------- the rules

#[test]
fn imports_go_down_only() {
    check(|file| {
        let own = floor(&file.room);
        let mut wrong = Vec::new();
        for (line, path) in file.imports() {
            let room = path.split("::").next().unwrap_or_default();
            let Some(other) = FLOORS.iter().find(|(name, _)| *name == room) else { continue };
            let allowed = room == file.room
                || other.1 < own
                || ALLOWED.contains(&(file.room.as_str(), other.0));
            if !allowed {
                wrong.push(format!("{line}: {} must not import {room}", file.room));
            }
            if room == "failure" && !FAILURE_ROOMS.contains(&file.room.as_str()) {
                wrong.push(format!("{line}: {} has errors of its own, not Failure", file.room));
            }
        }
        wrong
    });
}

#[test]
fn use_cases_do_not_import_each_other() {
    let siblings = files_in_ops();
    check(|file| {
        let Some(own) = use_case(&file.path) else { return Vec::new() };
        let mut wrong = Vec::new();
        for (line, path) in file.imports() {
            let Some(other) = path.strip_prefix("ops::").and_then(|p| p.split("::").next()) else {
                continue;
            };
            let stranger = siblings.iter().any(|name| name == other) && other != own;
            if stranger && !SHARED_IN_OPS.contains(&other) {
                wrong.push(format!("{line}: use case {own} must not import use case {other}"));
            }
        }
        wrong
    });
}

#[test]
fn every_room_has_a_floor() {
    check(|file| {
        let known = FLOORS.iter().any(|(name, _)| *name == file.room);
        if known { Vec::new() } else { vec![format!("1: {} is on no floor", file.room)] }
    });
}

#[test]
fn files_stay_short() {
    check(|file| {
        let lines = file.production_lines;
        if lines > FILE_LINES_WARN && lines <= FILE_LINES_MAX {
            eprintln!("{}: {lines} lines, the limit is {FILE_LINES_MAX}", file.path.display());
        }
        let long = lines > FILE_LINES_MAX;
        long.then(|| format!("1: {lines} lines without tests, more than {FILE_LINES_MAX}"))
            .into_iter()
            .collect()
    });
}

#[test]
fn functions_stay_short() {
    check(|file| {
        let long = |f: &Function| f.lines() > FUNCTION_LINES_MAX;
        let told = |f: Function| {
            format!(
                "{}: {} has {} lines, more than {FUNCTION_LINES_MAX}",
                f.first,
                f.name,
                f.lines()
            )
        };
        functions(&file.production).into_iter().filter(long).map(told).collect()
    });
}

#[test]
fn banned_calls_are_absent() {
    check(|file| {
        let everywhere = BANNED
            .iter()
            .filter(|(_, rooms)| !rooms.contains(&file.room.as_str()))
            .map(|(call, _)| *call);
        let here = BANNED_IN
            .iter()
            .filter(|(room, _)| *room == file.room)
            .flat_map(|(_, calls)| calls.iter().copied());
        let mut wrong = Vec::new();
        for call in everywhere.chain(here) {
            for line in lines_with(&file.production, call) {
                wrong.push(format!("{line}: {call} is banned in {}", file.room));
            }
        }
        wrong
    });
}

#[test]
fn every_file_begins_with_what_it_is_for() {
    check(|file| {
        let begins = file.text.starts_with("//!");
        if begins { Vec::new() } else { vec!["1: begin with //! and what it owns".into()] }
    });
}

#[test]
fn names_say_what_a_thing_owns() {
    check(|file| {
        let parts = file.path.iter().map(|part| part.to_string_lossy());
        let empty =
            |part: &std::borrow::Cow<'_, str>| EMPTY_NAMES.contains(&part.trim_end_matches(".rs"));
        parts.filter(empty).map(|part| format!("1: {part} names no owner")).collect()
    });
}

#[test]
fn tests_are_named_by_what_must_hold_and_none_is_ignored() {
    let mut wrong = Vec::new();
    for file in rust_files(&["src", "tests", "benches"]) {
        let masked = mask(&read(&file));
        for line in lines_with(&masked, concat!("#[", "ignore")) {
            wrong.push(format!("{}:{line}: no test may be ignored", file.display()));
        }
        for (line, name) in test_names(&masked) {
            if name.starts_with("test_") {
                wrong.push(format!("{}:{line}: {name} says nothing", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn tests_wait_for_conditions_and_never_sleep_for_luck() {
    let mut wrong = Vec::new();
    for file in rust_files(&["tests", "benches"]) {
        let masked = mask(&read(&file));
        let functions = functions(&masked);
        for line in lines_with(&masked, "thread::sleep") {
            let mut inside = functions.iter().filter(|f| (f.first..=f.last).contains(&line));
            if !inside
                .next_back()
                .is_some_and(|f| f.name.contains("wait") || f.name == "passes_within")
            {
                wrong.push(format!("{}:{line}: wait for a condition instead", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn nothing_is_left_for_later_and_no_path_of_one_machine_is_written_down() {
    let words =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("HA", "CK")];
    let places = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/opt/", "highwater")];
    let mut wrong = Vec::new();
    for file in text_files() {
        for (number, line) in read(&file).lines().enumerate() {
            let at = format!("{}:{}", file.display(), number + 1);
            if words.iter().any(|word| contains_word(line, word)) {
                wrong.push(format!("{at}: finish it, or open an issue: {line}"));
            }
            if places.iter().any(|place| line.contains(place)) {
                wrong.push(format!("{at}: a path of one machine: {line}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

// ------------------------------------------------------------- the scanners

/// One source file below `src/`, ready for the rules.
struct Source {
    /// Relative to the crate, for messages.
    path: PathBuf,
    room: String,
    text: String,
    /// The text with comments, strings and test items blanked out, line for line.
    production: String,
    production_lines: usize,
}

impl Source {
    fn new(path: PathBuf, text: String) -> Self {
        let (production, test_lines) = without_tests(&mask(&text));
        let production_lines = text.lines().count() - test_lines;
        let room = path.iter().nth(1).unwrap().to_string_lossy();
        let room = room.trim_end_matches(".rs").to_owned();
        Self { path, room, text, production, production_lines }
    }

    fn imports(&self) -> Vec<(usize, String)> {
        imports(&self.production, self.levels_to_root(), &self.room)
    }

    /// How many `super` lead from this file's module to the crate's root:
    /// `src/plan/mod.rs` and `src/plan.rs` 1, `src/plan/restore.rs` 2.
    fn levels_to_root(&self) -> usize {
        let parts = self.path.iter().count() - 1;
        if self.path.ends_with("mod.rs") { parts - 1 } else { parts }
    }
}

/// Applies a rule to every production file and fails with all findings at once.
fn check(rule: impl Fn(&Source) -> Vec<String>) {
    let files = rust_files(&["src"]);
    assert!(files.len() > 10, "the sources were not found");
    let mut test_only = Vec::new();
    for file in &files {
        let directory = if file.ends_with("mod.rs") || file.ends_with("lib.rs") {
            file.parent().unwrap().to_path_buf()
        } else {
            file.with_extension("")
        };
        for name in test_modules(&mask(&read(file))) {
            test_only.push(directory.join(&name));
        }
    }
    let is_test = |file: &PathBuf| {
        test_only.iter().any(|name| file.starts_with(name) || *file == name.with_extension("rs"))
    };
    let mut wrong = Vec::new();
    for file in files.iter().filter(|file| !is_test(file)) {
        let source = Source::new(file.clone(), read(file));
        wrong.extend(rule(&source).into_iter().map(|w| format!("{}:{w}", file.display())));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn floor(room: &str) -> u32 {
    FLOORS.iter().find(|(name, _)| *name == room).map_or(0, |(_, floor)| *floor)
}

/// Returns the use case a file of `ops` belongs to: `src/ops/backup/pack.rs`
/// belongs to `backup`; `mod.rs` to none.
fn use_case(path: &Path) -> Option<String> {
    let mut parts = path.iter().map(|part| part.to_string_lossy().into_owned());
    (parts.nth(1)? == "ops").then_some(())?;
    let name = parts.next()?.trim_end_matches(".rs").to_owned();
    (name != "mod").then_some(name)
}

fn files_in_ops() -> Vec<String> {
    rust_files(&["src/ops"]).iter().filter_map(|path| use_case(path)).collect()
}

#[test]
fn the_tables_of_reliability_name_every_use_case_and_tests_that_exist() {
    let page = read(Path::new("docs/reliability.md"));
    let section = |title: &str| {
        let (_, rest) = page.split_once(title).unwrap();
        rest.split("\n## ").next().unwrap().to_owned()
    };
    let faults = section("## Faults of the store, command by command");
    let damage = section("## Damage, kind by kind");
    let seen = section("## What is seen on which major and store");
    let rows = |text: &str| -> Vec<Vec<String>> {
        let lines = text.lines().filter(|line| line.starts_with('|') && !line.starts_with("|-"));
        lines
            .skip(1)
            .map(|line| line.split('|').map(|cell| cell.trim().to_owned()).collect())
            .collect()
    };
    // Every public file of `ops` that others do not share is a use case, and so is `drill` upstairs.
    let mut uses: Vec<String> = read(Path::new("src/ops/mod.rs"))
        .lines()
        .filter_map(|line| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned()))
        .filter(|name| !SHARED_IN_OPS.contains(&name.as_str()))
        .collect();
    assert!(uses.len() > 10, "{uses:?}");
    uses.push("drill".to_owned());
    for name in &uses {
        let has_row = rows(&faults).iter().any(|row| row[2] == format!("`{name}`"));
        assert!(has_row, "no row of docs/reliability.md tells how `{name}` stands a failing store");
    }
    let all: Vec<String> = rust_files(&["src", "tests"])
        .iter()
        .flat_map(|file| test_names(&mask(&read(file))).into_iter().map(|(_, name)| name))
        .collect();
    let mut named = 0;
    for row in rows(&faults).iter().chain(&rows(&damage)).chain(&rows(&seen)) {
        let tests = row[row.len() - 2].split('`').skip(1).step_by(2);
        let tests: Vec<&str> = tests.filter(|name| name.matches('_').count() > 2).collect();
        assert!(!tests.is_empty(), "{row:?} names no test");
        for name in tests {
            assert!(all.iter().any(|known| known == name), "there is no test `{name}`");
            named += 1;
        }
    }
    assert!(named > 25, "{named}");
}

/// Replaces comments and the insides of strings and characters by spaces, so
/// that searches see code only. Lines stay where they are.
fn mask(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' if !follows_name(bytes, at) => raw_string_end(bytes, at).unwrap_or(at),
            b'b' if bytes[at..].starts_with(b"br") && !follows_name(bytes, at) => {
                raw_string_end(bytes, at + 1).unwrap_or(at)
            }
            b'\'' => character_end(bytes, at),
            _ => at,
        };
        if end > at {
            out.extend(bytes[at..end].iter().map(|b| if *b == b'\n' { b'\n' } else { b' ' }));
            at = end;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    // Multi-byte characters stand only in comments and strings, but if one were
    // elsewhere it would be kept whole.
    String::from_utf8(out).expect("masking keeps or blanks whole characters")
}

fn follows_name(bytes: &[u8], at: usize) -> bool {
    at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_')
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|b| *b == b'\n').map_or(bytes.len(), |n| at + n)
}

fn block_comment_end(bytes: &[u8], at: usize) -> usize {
    let (mut depth, mut next) = (0, at);
    while next < bytes.len() {
        if bytes[next..].starts_with(b"/*") {
            depth += 1;
            next += 2;
        } else if bytes[next..].starts_with(b"*/") {
            depth -= 1;
            next += 2;
            if depth == 0 {
                return next;
            }
        } else {
            next += 1;
        }
    }
    next
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut next = at + 1;
    while next < bytes.len() && bytes[next] != b'"' {
        next += if bytes[next] == b'\\' { 2 } else { 1 };
    }
    (next + 1).min(bytes.len())
}

fn raw_string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let hashes = bytes[at + 1..].iter().take_while(|b| **b == b'#').count();
    let open = at + 1 + hashes;
    (bytes.get(open) == Some(&b'"')).then_some(())?;
    let close = [b"\"".as_slice(), "#".repeat(hashes).as_bytes()].concat();
    let found = bytes[open + 1..].windows(close.len()).position(|w| w == close);
    Some(found.map_or(bytes.len(), |n| open + 1 + n + close.len()))
}

/// Returns the end of a character literal, or `at` for a lifetime.
fn character_end(bytes: &[u8], at: usize) -> usize {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes.iter().skip(at + 3).position(|b| *b == b'\'');
        return close.map_or(bytes.len(), |n| at + 3 + n + 1);
    }
    // One character of one to four bytes and then a quote; else a lifetime.
    (2..=5).find(|n| bytes.get(at + n) == Some(&b'\'')).map_or(at, |n| {
        let inside = std::str::from_utf8(&bytes[at + 1..at + n]);
        if inside.is_ok_and(|c| c.chars().count() == 1) { at + n + 1 } else { at }
    })
}

/// Returns where the braces that open first after `from` close (excluded end),
/// or the place after a semicolon that comes before them.
fn item_end(masked: &str, from: usize) -> usize {
    let bytes = masked.as_bytes();
    let (mut braces, mut round) = (0_usize, 0_usize);
    for (at, byte) in bytes.iter().enumerate().skip(from) {
        match byte {
            b'(' | b'[' => round += 1,
            b')' | b']' => round = round.saturating_sub(1),
            b'{' => braces += 1,
            b'}' if braces == 1 => return at + 1,
            b'}' => braces = braces.saturating_sub(1),
            b';' if braces == 0 && round == 0 => return at + 1,
            _ => {}
        }
    }
    bytes.len()
}

/// Returns the byte ranges of the items that carry `#[cfg(test)]`.
fn test_items(masked: &str) -> Vec<(usize, usize)> {
    const MARK: &str = "#[cfg(test)]";
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = masked[from..].find(MARK).map(|n| from + n) {
        let end = item_end(masked, at + MARK.len());
        found.push((at, end));
        from = end;
    }
    found
}

/// Blanks the items that carry `#[cfg(test)]`; also returns how many lines they had.
fn without_tests(masked: &str) -> (String, usize) {
    let mut bytes = masked.as_bytes().to_vec();
    let mut lines = 0;
    for (start, end) in test_items(masked) {
        lines += masked[start..end].lines().count();
        bytes[start..end].iter_mut().filter(|b| **b != b'\n').for_each(|b| *b = b' ');
    }
    (String::from_utf8(bytes).expect("whole items are blanked"), lines)
}

/// Returns the names of files that a `#[cfg(test)] mod name;` makes test-only.
fn test_modules(masked: &str) -> Vec<String> {
    let name = |(start, end): (usize, usize)| {
        let item = masked[start..end].strip_suffix(';')?;
        let (_, name) = item.rsplit_once("mod ")?;
        Some(name.trim().to_owned())
    };
    test_items(masked).into_iter().filter_map(name).collect()
}

/// Returns paths from the crate's root with their line: every `crate::a::b`,
/// `highwater::a`, and every `super` chain that reaches the root or the room,
/// with groups taken apart.
fn imports(masked: &str, levels_to_root: usize, room: &str) -> Vec<(usize, String)> {
    let to_root = "super::".repeat(levels_to_root);
    let to_own_room = "super::".repeat(levels_to_root.saturating_sub(1));
    let inside = format!("{room}::");
    let starts = [("crate::", ""), ("highwater::", ""), (&*to_root, ""), (&*to_own_room, &*inside)];
    let mut found = Vec::new();
    for (start, base) in starts.into_iter().filter(|(start, _)| !start.is_empty()) {
        for (at, _) in masked.match_indices(start) {
            if follows_name(masked.as_bytes(), at) || masked[..at].ends_with("::") {
                continue;
            }
            let heads = path_heads(&masked[at + start.len()..]).into_iter();
            let heads = heads.filter(|head| !head.starts_with("super"));
            found.extend(heads.map(|head| (line_of(masked, at), format!("{base}{head}"))));
        }
    }
    found
}

/// Splits `{a::b, c}` into `a::b` and `c`, and ends a plain path where it ends.
fn path_heads(text: &str) -> Vec<String> {
    let path = |text: &str| -> String {
        text.chars().take_while(|c| c.is_alphanumeric() || matches!(c, '_' | ':')).collect()
    };
    let Some(group) = text.strip_prefix('{') else { return vec![path(text)] };
    let mut heads = vec![String::new()];
    let mut depth = 0;
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(String::new()),
            c if depth == 0 && !c.is_whitespace() => heads.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    heads.iter().map(|head| path(head)).filter(|head| !head.is_empty()).collect()
}

/// One function: its name and its lines, both included.
struct Function {
    name: String,
    first: usize,
    last: usize,
}

impl Function {
    fn lines(&self) -> usize {
        self.last - self.first + 1
    }
}

fn functions(masked: &str) -> Vec<Function> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(at) = masked[from..].find("fn ").map(|n| from + n) {
        from = at + 3;
        let name: String =
            masked[from..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() || follows_name(masked.as_bytes(), at) {
            continue;
        }
        let end = item_end(masked, from);
        found.push(Function { name, first: line_of(masked, at), last: line_of(masked, end - 1) });
    }
    found
}

/// Returns the names of the functions under `#[test]` or `#[tokio::test…]`.
fn test_names(masked: &str) -> Vec<(usize, String)> {
    let marks: Vec<usize> = lines_with(masked, "#[test]")
        .into_iter()
        .chain(lines_with(masked, "#[tokio::test"))
        .collect();
    let functions = functions(masked);
    let after = |mark: usize| functions.iter().find(|f| f.first > mark);
    marks.into_iter().filter_map(|mark| after(mark).map(|f| (f.first, f.name.clone()))).collect()
}

/// Returns the lines (from 1) on which `call` stands as a word of its own.
fn lines_with(masked: &str, call: &str) -> Vec<usize> {
    let mut found = Vec::new();
    for (at, _) in masked.match_indices(call) {
        let begins_with_name = call.starts_with(|c: char| c.is_alphanumeric());
        if !(begins_with_name && follows_name(masked.as_bytes(), at)) {
            found.push(line_of(masked, at));
        }
    }
    found
}

fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let after = line.as_bytes().get(at + word.len());
        !follows_name(line.as_bytes(), at)
            && !after.is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_')
    })
}

fn rust_files(directories: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for directory in directories {
        walk(Path::new(directory), &mut found);
    }
    found.retain(|path| path.extension().is_some_and(|extension| extension == "rs"));
    found.sort();
    found
}

/// Every text file of the project: sources, scripts, pages, settings.
fn text_files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(".").expect("tests run in the crate's directory") {
        let path = entry.unwrap().path();
        let path = path.strip_prefix("./").unwrap_or(&path).to_path_buf();
        let hidden = path.to_string_lossy().starts_with('.') && path != Path::new(".ci");
        if path != Path::new("target") && path != Path::new("Cargo.lock") && !hidden {
            walk(&path, &mut found);
        }
    }
    found.retain(|path| std::fs::read_to_string(path).is_ok());
    found
}

fn walk(path: &Path, found: &mut Vec<PathBuf>) {
    if !path.is_dir() {
        if path.is_file() {
            found.push(path.to_path_buf());
        }
        return;
    }
    for entry in std::fs::read_dir(path).unwrap() {
        walk(&entry.unwrap().path(), found);
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

// -------------------------------------------- the scanners' own small tests

#[test]
fn masking_blanks_comments_strings_and_characters_but_not_lifetimes() {
    let text = "a // x\nb /* y /* z */ */ c \"s\\\"t\" d r#\"u\"v\"# e '\"' f '\\'' g 'h i<'j>\n";
    let masked = mask(text);
    assert_eq!(masked.len(), text.len());
    let code: String = masked.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(code, "a b c d e f g 'h i<'j>");
}

#[test]
fn items_for_tests_are_cut_out_wherever_they_stand() {
    let text = "fn a() {}\n#[cfg(test)]\nuse x::{y, z};\n#[cfg(test)]\npub mod build;\nfn b() {}\n\
                #[cfg(test)]\n#[allow(x)]\nmod tests {\n fn c() { d() }\n}\nfn e() {}\n";
    let (production, lines) = without_tests(text);
    let names: Vec<_> = functions(&production).into_iter().map(|f| f.name).collect();
    assert_eq!(names, ["a", "b", "e"]);
    assert_eq!(lines, 9);
    assert_eq!(test_modules(text), ["build"]);
}

#[test]
fn imports_are_found_in_paths_groups_and_super_chains() {
    let text = "use crate::pg::{Lsn, x::Y};\nuse crate::{repo, store::{Key, Store}, plan::a};\n\
                fn f() { crate::failure::Failure::new(); mycrate::not(); }\nuse super::super::ops::g;\n\
                use super::sibling::Thing;\n";
    let found: Vec<_> =
        imports(text, 2, "ops").into_iter().map(|(l, p)| format!("{l} {p}")).collect();
    for wanted in [
        "1 pg::",
        "2 repo",
        "2 store::",
        "2 plan::a",
        "3 failure::Failure::new",
        "4 ops::g",
        "5 ops::sibling::Thing",
    ] {
        assert!(found.iter().any(|f| f == wanted), "{wanted} not in {found:?}");
    }
    assert!(!found.iter().any(|f| f.contains("not")));
}

#[test]
fn function_lengths_count_from_fn_to_the_closing_brace() {
    let text = "trait T { fn declared(&self) -> [u8; 4]; }\nfn long(\n a: u8,\n) -> u8 {\n if a {\n }\n 1\n}\n";
    let found: Vec<_> = functions(text).into_iter().map(|f| (f.name.clone(), f.lines())).collect();
    assert_eq!(found, [("declared".to_owned(), 1), ("long".to_owned(), 7)]);
}

#[test]
fn banned_words_are_whole_words() {
    assert_eq!(lines_with("eprintln!()\nprintln!()\n", "println!"), [2]);
    assert_eq!(lines_with("x.unwrap_or(1);\ny.unwrap();\n", ".unwrap()"), [2]);
    assert!(contains_word("see TASK here", "TASK") && !contains_word("TASKS", "TASK"));
}

#[test]
fn names_of_tests_are_found_under_their_attributes() {
    let text = "#[test]\nfn a_thing_holds() {}\nfn other() {}\n#[tokio::test(start_paused = true)]\n\
                async fn test_x() {}\n";
    let names: Vec<_> = test_names(text).into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, ["a_thing_holds", "test_x"]);
}

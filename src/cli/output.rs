//! What is printed: reports and failures, as text or as JSON.
//!
//! Data goes to stdout, talk to stderr. With `--json`, stdout holds exactly one
//! JSON document, whether the command succeeded or failed. Never here: what
//! a report says; each command brings its own text.
//!
//! A failure for people has every line marked, because PostgreSQL writes what
//! `archive_command` says into its own log without a prefix of its own:
//!
//! ```text
//! highwater: error: could not store 000000010000000A000000FE
//! highwater:   cause: connection refused
//! highwater:   unharmed: PostgreSQL keeps the file
//! highwater:   next: nothing; PostgreSQL tries again
//! ```
//!
//! ```json
//! {"error": {"kind": "store", "exit_code": 5, "what": "…", "causes": ["…"], "unharmed": "…", "next": "…"}}
//! ```

use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::failure::{Failure, Kind};

/// Lines for a terminal are broken at this column; a log gets whole lines.
const TERMINAL_COLUMNS: usize = 100;

/// How this run prints.
#[derive(Debug, Clone, Copy, Default)]
pub struct Output {
    /// `--json`.
    pub json: bool,
    /// `--quiet`.
    pub quiet: bool,
    /// Whether stderr is a terminal.
    pub stderr_is_terminal: bool,
}

impl Output {
    /// Prints a command's report on stdout: `value` as JSON, or what `text` makes of it.
    ///
    /// A reader that went away (`… | head`) is no failure.
    ///
    /// # Errors
    /// [`Kind::Disk`] when stdout cannot be written to.
    pub fn report<T: Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<(), Failure> {
        let page = if self.json { Self::json_of(value)? } else { text(value) };
        self.page(&page)
    }

    /// Makes the JSON of a report.
    ///
    /// # Errors
    /// [`Kind::Bug`] for what cannot be JSON.
    pub fn json_of<T: Serialize>(value: &T) -> Result<String, Failure> {
        serde_json::to_string_pretty(value).map_err(|error| {
            Failure::new(
                Kind::Bug,
                "could not make JSON of the report",
                "the command itself has done its work",
                "please report this",
            )
            .because(error)
        })
    }

    /// Prints a page on stdout that was made already; an empty one is not printed.
    ///
    /// # Errors
    /// As [`Self::report`].
    #[allow(clippy::unused_self)] // it is this run's stdout
    pub fn page(&self, page: &str) -> Result<(), Failure> {
        if page.is_empty() {
            return Ok(());
        }
        write_page(&mut std::io::stdout().lock(), page)
    }

    /// Prints one line of a report that comes line by line. Returns `false` once nobody reads it any more.
    ///
    /// # Errors
    /// [`Kind::Disk`] when stdout cannot be written to.
    pub fn line(&self, line: &str) -> Result<bool, Failure> {
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(line.as_bytes()).and_then(|()| stdout.write_all(b"\n")) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
            Err(error) => Err(Failure::new(
                Kind::Disk,
                "could not write to stdout",
                "Nothing was changed.",
                "look at where stdout goes, then run the command again",
            )
            .because(error)),
        }
    }

    /// Says a line on stderr, unless `--quiet`.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            let mark = "highwater: ";
            say_lines(mark, &self.broken(mark, line));
        }
    }

    /// Prints a failure: on stdout with `--json`, else (or if stdout is gone) on stderr.
    pub fn failure(&self, failure: &Failure, exit_code: u8) {
        if self.json {
            let page = failure_json(failure, exit_code);
            if write_page(&mut std::io::stdout().lock(), &page).is_ok() {
                return;
            }
        }
        self.failure_on_stderr(failure);
    }

    /// Prints a failure beside a report that stands on stdout.
    pub fn failure_on_stderr(&self, failure: &Failure) {
        for (mark, text) in failure_parts(failure) {
            say_lines(&mark, &self.broken(&mark, &text));
        }
    }

    fn broken(self, mark: &str, text: &str) -> Vec<String> {
        let columns = if self.stderr_is_terminal { TERMINAL_COLUMNS } else { usize::MAX };
        wrap(&one_line(text), columns.saturating_sub(mark.len()))
    }
}

/// Writes lines to stderr, the first behind its mark (which begins with
/// `highwater:`), the others indented under it. What cannot be said is not said: stderr may be closed.
fn say_lines(mark: &str, lines: &[String]) {
    let mut text = String::new();
    for (i, line) in lines.iter().enumerate() {
        let indent = format!("highwater:{}", " ".repeat(mark.len() - "highwater:".len()));
        text.push_str(if i == 0 { mark } else { &indent });
        text.push_str(line);
        text.push('\n');
    }
    // One write, so that lines of parallel processes do not mix.
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Returns the marks and texts of a failure's lines.
fn failure_parts(failure: &Failure) -> Vec<(String, String)> {
    let mut parts = vec![("highwater: error: ".to_owned(), failure.what.clone())];
    let causes = failure.causes();
    if !causes.is_empty() {
        parts.push(("highwater:   cause: ".to_owned(), causes.join(": ")));
    }
    parts.push(("highwater:   unharmed: ".to_owned(), failure.unharmed.clone()));
    parts.push(("highwater:   next: ".to_owned(), failure.next.clone()));
    parts
}

/// The fields of a failure in JSON, in the order in which they are printed.
#[derive(Serialize)]
struct ErrorDocument<'a> {
    kind: &'static str,
    exit_code: u8,
    what: &'a str,
    causes: Vec<String>,
    unharmed: &'a str,
    next: &'a str,
}

/// Returns a failure as the JSON document that `--json` prints.
pub fn failure_json(failure: &Failure, exit_code: u8) -> String {
    let error = ErrorDocument {
        kind: failure.kind.word(),
        exit_code,
        what: &failure.what,
        causes: failure.causes(),
        unharmed: &failure.unharmed,
        next: &failure.next,
    };
    // Only texts and a number: serde_json cannot refuse them.
    serde_json::to_string_pretty(&std::collections::BTreeMap::from([("error", error)]))
        .unwrap_or_default()
}

/// Writes a page and a line end; a reader that went away is success.
fn write_page(to: &mut impl Write, page: &str) -> Result<(), Failure> {
    let written = to
        .write_all(page.trim_end_matches('\n').as_bytes())
        .and_then(|()| to.write_all(b"\n"))
        .and_then(|()| to.flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::new(
            Kind::Disk,
            "could not write the report to stdout",
            "the command itself has done its work",
            "look at where stdout goes, then run the command again",
        )
        .because(error)),
        _ => Ok(()),
    }
}

/// Makes one harmless line of text that may come from a server: control
/// characters, which could forge log lines or drive a terminal, become spaces.
pub fn one_line(text: &str) -> String {
    let spaced: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    spaced.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Breaks text at spaces into lines of at most `columns` characters; a longer word
/// keeps a line of its own. Never returns an empty list.
fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if used > 0 && used + 1 + length > columns {
            lines.push(String::new());
            used = 0;
        }
        if let Some(line) = lines.last_mut() {
            if used > 0 {
                line.push(' ');
                used += 1;
            }
            line.push_str(word);
        }
        used += length;
    }
    lines
}

/// Lays out rows in columns, two spaces apart, each as wide as its longest cell.
/// The last column is not padded. Rows may be of different lengths.
pub fn columns(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        for (i, cell) in row.iter().enumerate() {
            let width = cell.chars().count();
            match widths.get_mut(i) {
                Some(widest) => *widest = width.max(*widest),
                None => widths.push(width),
            }
        }
    }
    let mut page = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths);
        let line: Vec<String> = cells
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width - cell.chars().count())))
            .collect();
        page += line.join("  ").trim_end();
        page.push('\n');
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Gone(ErrorKind);

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_went_away_is_no_failure_but_a_full_disk_is() {
        assert!(write_page(&mut Gone(ErrorKind::BrokenPipe), "x").is_ok());
        let failure = write_page(&mut Gone(ErrorKind::StorageFull), "x").err();
        assert_eq!(failure.map(|failure| failure.kind), Some(Kind::Disk));
    }

    #[test]
    fn server_text_cannot_forge_lines() {
        assert_eq!(one_line("a\nhighwater: done\x1b[2J\r b"), "a highwater: done [2J b");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".into(), "bb".into()], vec!["ccc".into(), "d".into(), "e".into()]];
        assert_eq!(columns(&rows), "a    bb\nccc  d   e\n");
    }

    #[test]
    fn a_failure_in_json_has_the_fields_of_the_contract() {
        let failure = Failure::new(Kind::Store, "w", "u", "n").because("c");
        let json: serde_json::Value =
            serde_json::from_str(&failure_json(&failure, 133)).unwrap_or_default();
        let expected = serde_json::json!({"error": {
            "kind": "store", "exit_code": 133, "what": "w", "causes": ["c"], "unharmed": "u", "next": "n"
        }});
        assert_eq!(json, expected);
    }

    proptest! {
        #[test]
        fn wrapping_loses_no_word(text in "[a-z ]{0,200}", columns in 5_usize..40) {
            let text = one_line(&text);
            let lines = wrap(&text, columns);
            prop_assert_eq!(lines.join(" "), text);
            for line in lines {
                prop_assert!(line.len() <= columns || !line.contains(' '));
            }
        }
    }
}

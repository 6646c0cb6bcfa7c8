//! What a test does where the system forbids what it needs: it says so, and
//! `make test` repeats it at its end. A missing tool is no such case: that fails.

use std::io::Write as _;

/// Reports a test that could not be run on this system, and why.
pub fn not_run(test: &str, why: &str) {
    let line = format!("{test}: {why}\n");
    eprint!("NOT RUN: {line}");
    // The Makefile names a file that it shows after the last test.
    if let Some(path) = std::env::var_os("HIGHWATER_TEST_NOT_RUN") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the report is writable");
    }
}

//! Text inside commands, so that it cannot become part of them.
//!
//! Both forms mean the same in SQL and in the walsender's own grammar
//! (`src/backend/replication/repl_scanner.l`), in which a backslash is an
//! ordinary character and `E''` does not exist.

/// Returns `text` as a string constant, with its quotes doubled.
///
/// In SQL this holds with `standard_conforming_strings = on`, the default
/// since 9.1. A NUL byte cannot be sent; sending reports it.
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// Returns `name` as a quoted identifier.
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_are_doubled() {
        assert_eq!(quote_literal(r"it's \ 'x'"), r"'it''s \ ''x'''");
        assert_eq!(quote_identifier(r#"a"b"#), r#""a""b""#);
    }
}

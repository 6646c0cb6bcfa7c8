//! The two texts a connection can be given as: `key = value` words and URIs.
//!
//! ```text
//! host=db1,db2 port=5432 user=backup sslrootcert='/etc/my ca.pem'
//! postgresql://backup@db1:5432,[2001:db8::7]:5433/postgres?sslmode=verify-full
//! ```
//!
//! Only the text is taken apart here; what a value means is decided by
//! `ConnInfo`. Errors name a place in the text, never a piece of it, because
//! what looks like a keyword may be the tail of a password with a space.
//!
//! Source: manual, "Connection Strings";
//! `src/interfaces/libpq/fe-connect.c` (`conninfo_parse`, `conninfo_uri_parse_options`).

use std::iter::Peekable;
use std::str::Chars;

use super::keywords::{self, Fate};
use super::{SettingsError, Values};

/// The longest connection string that is read, in bytes.
pub(super) const TEXT_BYTES_MAX: usize = 64 << 10;

/// Takes a connection string apart; an empty one gives no values.
///
/// Of a keyword given twice, the last counts, as in libpq.
pub(super) fn parse(text: &str) -> Result<Values, SettingsError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(SettingsError::Syntax { at: TEXT_BYTES_MAX, problem: "the text is too long" });
    }
    let rest = text.strip_prefix("postgresql://").or_else(|| text.strip_prefix("postgres://"));
    match rest {
        Some(rest) => Uri { text, rest }.parse(),
        None => Words { text, chars: text.chars().peekable() }.parse(),
    }
}

/// Stores one value, unless the keyword is unknown or refused.
pub(super) fn store(values: &mut Values, name: &str, value: String) -> Result<(), SettingsError> {
    let Some(keyword) = keywords::find(name) else {
        return Err(SettingsError::unknown_keyword(name));
    };
    if let Fate::Refused(why) = keyword.fate
        && !value.is_empty()
    {
        return Err(SettingsError::Unsupported { keyword: keyword.name, why });
    }
    values.insert(keyword.name, value);
    Ok(())
}

/// `key = value key='quoted value'`; a backslash takes the next character as it is.
struct Words<'a> {
    text: &'a str,
    chars: Peekable<Chars<'a>>,
}

impl Words<'_> {
    fn parse(mut self) -> Result<Values, SettingsError> {
        let mut values = Values::new();
        loop {
            self.skip_spaces();
            if self.chars.peek().is_none() {
                return Ok(values);
            }
            let start = self.position();
            let mut name = String::new();
            while let Some(c) = self.chars.next_if(|c| *c != '=' && !is_space(*c)) {
                name.push(c);
            }
            self.skip_spaces();
            if self.chars.next_if_eq(&'=').is_none() {
                return Err(SettingsError::Syntax {
                    at: start,
                    problem: "a keyword is not followed by `=` (a value with a space needs \
                              single quotes)",
                });
            }
            self.skip_spaces();
            let value = self.value()?;
            store(&mut values, &name, value)?;
        }
    }

    fn value(&mut self) -> Result<String, SettingsError> {
        let start = self.position();
        let quoted = self.chars.next_if_eq(&'\'').is_some();
        let mut value = String::new();
        while let Some(c) = self.chars.next_if(|c| quoted || !is_space(*c)) {
            match c {
                '\'' if quoted => return Ok(value),
                '\\' => value.extend(self.chars.next()),
                _ => value.push(c),
            }
        }
        if quoted {
            return Err(SettingsError::Syntax { at: start, problem: "a quote is not closed" });
        }
        Ok(value)
    }

    fn skip_spaces(&mut self) {
        while self.chars.next_if(|c| is_space(*c)).is_some() {}
    }

    /// Returns the offset in bytes of the next character.
    fn position(&self) -> usize {
        let rest: usize = self.chars.clone().map(char::len_utf8).sum();
        self.text.len() - rest
    }
}

/// C's `isspace` in the C locale.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// `postgresql://[user[:password]@][host[:port]][,...][/dbname][?key=value[&...]]`
struct Uri<'a> {
    text: &'a str,
    rest: &'a str,
}

impl<'a> Uri<'a> {
    fn parse(mut self) -> Result<Values, SettingsError> {
        let mut values = Values::new();
        // A slash ends the search, so one in a password must be written `%2F`.
        let authority_end = self.rest.find('/').unwrap_or(self.rest.len());
        if let Some(at) = self.rest[..authority_end].find('@') {
            let user_info = self.take(at);
            self.rest = &self.rest[1..];
            let (user, password) = match user_info.split_once(':') {
                Some((user, password)) => (user, Some(password)),
                None => (user_info, None),
            };
            if !user.is_empty() {
                store(&mut values, "user", self.decode(user)?)?;
            }
            if let Some(password) = password.filter(|password| !password.is_empty()) {
                store(&mut values, "password", self.decode(password)?)?;
            }
        }
        self.hosts(&mut values)?;
        if let Some(path) = self.rest.strip_prefix('/') {
            self.rest = path;
            let dbname = self.take(path.find('?').unwrap_or(path.len()));
            if !dbname.is_empty() {
                store(&mut values, "dbname", self.decode(dbname)?)?;
            }
        }
        if let Some(query) = self.rest.strip_prefix('?') {
            self.rest = query;
            self.parameters(&mut values)?;
        }
        Ok(values)
    }

    /// Reads the list of hosts; IPv6 addresses stand in brackets.
    fn hosts(&mut self, values: &mut Values) -> Result<(), SettingsError> {
        let mut hosts: Vec<String> = Vec::new();
        let mut ports: Vec<String> = Vec::new();
        loop {
            let host = if let Some(rest) = self.rest.strip_prefix('[') {
                self.rest = rest;
                let Some(end) = rest.find(']').filter(|end| *end > 0) else {
                    return Err(self.syntax("an IPv6 address in brackets does not end"));
                };
                let host = self.take(end);
                self.rest = &self.rest[1..];
                if !self.rest.is_empty() && !self.rest.starts_with([':', '/', '?', ',']) {
                    return Err(self.syntax("unexpected character after an IPv6 address"));
                }
                host
            } else {
                self.take_until(&[':', '/', '?', ','])
            };
            hosts.push(self.decode(host)?);
            let port = if let Some(rest) = self.rest.strip_prefix(':') {
                self.rest = rest;
                self.take_until(&['/', '?', ','])
            } else {
                ""
            };
            ports.push(self.decode(port)?);
            match self.rest.strip_prefix(',') {
                Some(rest) => self.rest = rest,
                None => break,
            }
        }
        for (name, list) in [("host", hosts), ("port", ports)] {
            let joined = list.join(",");
            if !joined.is_empty() {
                store(values, name, joined)?;
            }
        }
        Ok(())
    }

    fn parameters(&mut self, values: &mut Values) -> Result<(), SettingsError> {
        while !self.rest.is_empty() {
            let pair = self.take_until(&['&']);
            let Some((name, value)) = pair.split_once('=') else {
                return Err(self.syntax("a URI parameter has no `=`"));
            };
            if value.contains('=') {
                return Err(self.syntax("a URI parameter has a second `=` (write it `%3D`)"));
            }
            let (name, value) = (self.decode(name)?, self.decode(value)?);
            // JDBC's spelling, which libpq accepts too.
            if name == "ssl" && value == "true" {
                store(values, "sslmode", "require".to_owned())?;
            } else {
                store(values, &name, value)?;
            }
            self.rest = self.rest.strip_prefix('&').unwrap_or(self.rest);
        }
        Ok(())
    }

    fn take(&mut self, length: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(length);
        self.rest = rest;
        taken
    }

    fn take_until(&mut self, ends: &[char]) -> &'a str {
        self.take(self.rest.find(ends).unwrap_or(self.rest.len()))
    }

    fn syntax(&self, problem: &'static str) -> SettingsError {
        SettingsError::Syntax { at: self.text.len() - self.rest.len(), problem }
    }

    fn decode(&self, text: &str) -> Result<String, SettingsError> {
        percent_decode(text).map_err(|problem| self.syntax(problem))
    }
}

/// Replaces `%XX` by the byte it stands for; `+` stays a plus.
fn percent_decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let digit = |at: usize| {
            let digit = char::from(*after.get(at)?).to_digit(16)?;
            u8::try_from(digit).ok()
        };
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err("`%` is not followed by two hexadecimal digits");
        };
        let decoded = high << 4 | low;
        if decoded == 0 {
            return Err("`%00` is not allowed");
        }
        bytes.push(decoded);
        rest = &after[2..];
    }
    String::from_utf8(bytes).map_err(|_| "a percent-encoded value is not UTF-8")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn values(text: &str) -> Vec<(String, String)> {
        parse(text).unwrap().into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
    }

    fn expect(text: &str, pairs: &[(&str, &str)]) {
        let mut pairs: Vec<_> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        pairs.sort();
        assert_eq!(values(text), pairs, "{text}");
    }

    #[test]
    fn words_take_spaces_quotes_and_backslashes_as_libpq_does() {
        expect("", &[]);
        expect("  host = db   port=5433\n", &[("host", "db"), ("port", "5433")]);
        expect(r"password='it\'s \\ a=b' user=x", &[("password", r"it's \ a=b"), ("user", "x")]);
        expect(r"password=a\ b", &[("password", "a b")]);
        expect("host= user=x", &[("host", "user=x")]);
        expect("host='' user=x", &[("host", ""), ("user", "x")]);
        expect("host=a host=b", &[("host", "b")]);
    }

    /// The examples are those of the manual, "Connection URIs".
    #[test]
    fn uris_of_the_manual_are_understood() {
        expect("postgresql://", &[]);
        expect("postgresql://localhost", &[("host", "localhost")]);
        expect("postgresql://localhost:5433", &[("host", "localhost"), ("port", "5433")]);
        expect("postgresql://localhost/mydb", &[("host", "localhost"), ("dbname", "mydb")]);
        expect("postgresql://user@localhost", &[("host", "localhost"), ("user", "user")]);
        expect(
            "postgresql://user:secret@localhost",
            &[("host", "localhost"), ("user", "user"), ("password", "secret")],
        );
        expect(
            "postgresql://other@localhost/otherdb?connect_timeout=10&application_name=myapp",
            &[
                ("host", "localhost"),
                ("user", "other"),
                ("dbname", "otherdb"),
                ("connect_timeout", "10"),
                ("application_name", "myapp"),
            ],
        );
        expect(
            "postgresql://host1:123,host2:456/somedb?target_session_attrs=any",
            &[
                ("host", "host1,host2"),
                ("port", "123,456"),
                ("dbname", "somedb"),
                ("target_session_attrs", "any"),
            ],
        );
        expect(
            "postgresql://user@localhost:5433/mydb?options=-c%20synchronous_commit%3Doff",
            &[
                ("user", "user"),
                ("host", "localhost"),
                ("port", "5433"),
                ("dbname", "mydb"),
                ("options", "-c synchronous_commit=off"),
            ],
        );
        expect(
            "postgresql:///mydb?host=localhost&port=5433",
            &[("dbname", "mydb"), ("host", "localhost"), ("port", "5433")],
        );
        expect(
            "postgresql://[2001:db8::1234]/database",
            &[("host", "2001:db8::1234"), ("dbname", "database")],
        );
        expect(
            "postgres://%2Fvar%2Flib%2Fpostgresql/dbname",
            &[("host", "/var/lib/postgresql"), ("dbname", "dbname")],
        );
        expect("postgresql://h/?ssl=true", &[("host", "h"), ("sslmode", "require")]);
        expect("postgresql://a,b", &[("host", "a,b"), ("port", ",")]);
        expect(
            "postgresql://p%40q:r%2Fs@h",
            &[("user", "p@q"), ("password", "r/s"), ("host", "h")],
        );
    }

    #[test]
    fn broken_texts_are_refused() {
        for text in [
            "mydb",
            "host",
            "host=a port",
            "password='open",
            "postgresql://[::1",
            "postgresql://[]/x",
            "postgresql://[::1]x",
            "postgresql://h?user",
            "postgresql://h?user=a=b",
            "postgresql://h/%zz",
            "postgresql://h/%4",
            "postgresql://h/%00",
            "postgresql://h/%ff",
        ] {
            assert!(matches!(parse(text), Err(SettingsError::Syntax { .. })), "{text}");
        }
    }

    #[test]
    fn an_unknown_keyword_is_named_with_the_nearest_known_one() {
        for text in ["hots=db", "postgresql://h?hots=db"] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains("`hots`") && message.contains("`host`"), "{message}");
        }
    }

    #[test]
    fn a_setting_that_cannot_be_obeyed_is_refused_with_the_reason() {
        let message = parse("sslcrl=/x").unwrap_err().to_string();
        assert!(message.contains("sslcrl") && message.contains("revocation"), "{message}");
        assert!(parse("requirepeer=postgres").is_err());
        expect("sslcrl=''", &[("sslcrl", "")]);
    }

    #[test]
    fn the_tail_of_a_password_with_a_space_is_not_repeated() {
        let message = parse("password=correct Horse7").unwrap_err().to_string();
        assert!(!message.contains("Horse7"), "{message}");
        let message = parse("password=correct Horse7=staple").unwrap_err().to_string();
        assert!(!message.contains("Horse7"), "{message}");
    }

    proptest! {
        #[test]
        fn any_value_survives_quoting(value in "[^\0]{0,40}") {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let parsed = parse(&format!("user='{quoted}' host=h")).unwrap();
            prop_assert_eq!(&parsed["user"], &value);
        }

        #[test]
        fn any_value_survives_percent_encoding(value in "[^\0]{1,40}") {
            let encoded: Vec<String> = value.bytes().map(|byte| format!("%{byte:02x}")).collect();
            let encoded = encoded.concat();
            let parsed = parse(&format!("postgresql://{encoded}:{encoded}@h/{encoded}")).unwrap();
            prop_assert_eq!(&parsed["user"], &value);
            prop_assert_eq!(&parsed["password"], &value);
            prop_assert_eq!(&parsed["dbname"], &value);
        }

        #[test]
        fn no_text_makes_the_parser_fall(text in "(postgres://)?[ -~é]{0,60}") {
            let _ = parse(&text);
        }
    }
}

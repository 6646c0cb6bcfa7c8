//! Taking secrets out of text that is shown.
//!
//! Owns where a connection string or URL can hold a secret. Anything that cannot be
//! read with certainty is hidden whole: showing too little is safe.
//!
//! Source: PostgreSQL manual, "Connection Strings" (`doc/src/sgml/libpq.sgml`) and
//! `src/interfaces/libpq/fe-connect.c` (`conninfo_parse`).

/// What stands where a secret stood.
pub const HIDDEN: &str = "(hidden)";

/// Keywords of libpq whose value is a secret.
const SECRET_KEYWORDS: [&str; 5] =
    ["password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"];

/// Returns a libpq connection string without its secrets, and whether any was hidden.
pub fn conninfo(text: &str) -> (String, bool) {
    if text.starts_with("postgresql://") || text.starts_with("postgres://") {
        return url(text);
    }
    let Some(pairs) = keyword_pairs(text) else { return (HIDDEN.to_owned(), true) };
    let mut hidden = false;
    let shown: Vec<String> = pairs
        .into_iter()
        .map(|(keyword, value)| {
            if SECRET_KEYWORDS.contains(&keyword.to_ascii_lowercase().as_str()) {
                hidden = true;
                return format!("{keyword}={HIDDEN}");
            }
            let plain = !value.is_empty() && !value.contains([' ', '\'', '\\', '\t', '\n']);
            if plain {
                format!("{keyword}={value}")
            } else {
                let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
                format!("{keyword}='{quoted}'")
            }
        })
        .collect();
    (shown.join(" "), hidden)
}

/// Reads `keyword = value` pairs as libpq does: values may be quoted with `'`, a
/// backslash takes the next character as it is. `None` if it is not that.
fn keyword_pairs(text: &str) -> Option<Vec<(String, String)>> {
    let mut pairs = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (keyword, after) = rest.split_once('=')?;
        let keyword = keyword.trim_end();
        if keyword.is_empty() || keyword.contains(char::is_whitespace) {
            return None;
        }
        let after = after.trim_start();
        let (value, left) = match after.strip_prefix('\'') {
            Some(quoted) => take_value(quoted, |c| c == '\'', true)?,
            None => take_value(after, char::is_whitespace, false)?,
        };
        pairs.push((keyword.to_owned(), value));
        rest = left.trim_start();
    }
    Some(pairs)
}

/// Takes characters up to the first that `ends`; a quoted value must have one.
fn take_value(text: &str, ends: impl Fn(char) -> bool, quoted: bool) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        if ends(c) {
            return Some((value, &text[at + c.len_utf8()..]));
        }
        value.push(if c == '\\' { chars.next()?.1 } else { c });
    }
    (!quoted).then_some((value, ""))
}

/// Returns a URL without the password of its user part and without secret query
/// values, and whether any was hidden.
pub fn url(text: &str) -> (String, bool) {
    let Some((scheme, rest)) = text.split_once("://") else {
        // Not a URL at all; a secret can only stand before an `@` or in a query.
        let suspicious = text.contains('@') || text.contains('?');
        return if suspicious { (HIDDEN.to_owned(), true) } else { (text.to_owned(), false) };
    };
    let (before_query, query) = match rest.split_once('?') {
        Some((before, query)) => (before, Some(query)),
        None => (rest, None),
    };
    // A password may itself hold `@` or `/`: everything up to the last `@` is the user part.
    let (user_part, place) = match before_query.rsplit_once('@') {
        Some((user, place)) => (Some(user), place),
        None => (None, before_query),
    };
    let mut hidden = false;
    let mut shown = format!("{scheme}://");
    if let Some(user_part) = user_part {
        match user_part.split_once(':') {
            Some((user, _)) => {
                hidden = true;
                shown.extend([user, ":", HIDDEN, "@"]);
            }
            None => shown.extend([user_part, "@"]),
        }
    }
    shown += place;
    if let Some(query) = query {
        let parts: Vec<String> = query
            .split('&')
            .map(|part| match part.split_once('=') {
                Some((name, _)) if is_secret_parameter(name) => {
                    hidden = true;
                    format!("{name}={HIDDEN}")
                }
                _ => part.to_owned(),
            })
            .collect();
        shown = format!("{shown}?{}", parts.join("&"));
    }
    (shown, hidden)
}

/// A percent-encoded parameter name could spell `password`, so it counts as secret.
/// `sig` is the signature of an Azure SAS.
fn is_secret_parameter(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    SECRET_KEYWORDS.contains(&lower.as_str())
        || lower == "sig"
        || lower.contains('%')
        || super::settings_table::is_secret_option(&lower)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn passwords_are_hidden_in_every_form_of_conninfo() {
        let cases = [
            ("host=a user=b", "host=a user=b", false),
            ("host=a password=geheim user=b", "host=a password=(hidden) user=b", true),
            ("password = 'ge h\\'eim' host=a", "password=(hidden) host=a", true),
            ("PASSWORD=geheim", "PASSWORD=(hidden)", true),
            ("sslpassword=geheim", "sslpassword=(hidden)", true),
            ("password='geheim", "(hidden)", true),
            ("host a", "(hidden)", true),
            ("application_name='two words'", "application_name='two words'", false),
            ("postgresql://u:geheim@h:5432/db", "postgresql://u:(hidden)@h:5432/db", true),
            ("postgres://u:ge@h/eim@h/db", "postgres://u:(hidden)@h/db", true),
            (
                "postgresql://h/db?password=geheim&a=b",
                "postgresql://h/db?password=(hidden)&a=b",
                true,
            ),
            ("postgresql://h/db?pass%77ord=geheim", "postgresql://h/db?pass%77ord=(hidden)", true),
            ("postgresql://u@h/db?sslmode=require", "postgresql://u@h/db?sslmode=require", false),
        ];
        for (given, shown, hidden) in cases {
            assert_eq!(conninfo(given), (shown.to_owned(), hidden), "{given}");
        }
    }

    #[test]
    fn repository_urls_lose_their_secrets() {
        assert_eq!(url("s3://bucket/p"), ("s3://bucket/p".to_owned(), false));
        assert_eq!(url("s3://AK:geheim@bucket/p"), ("s3://AK:(hidden)@bucket/p".to_owned(), true));
        assert_eq!(url("az://c/p?sig=geheim"), ("az://c/p?sig=(hidden)".to_owned(), true));
    }

    proptest! {
        #[test]
        fn a_password_never_shows(password in "[a-zA-Z0-9@/:?&=' \\\\]{12,20}") {
            let quoted = password.replace('\\', "\\\\").replace('\'', "\\'");
            let (shown, hidden) = conninfo(&format!("host=h password='{quoted}' user=u"));
            prop_assert!(hidden && !shown.contains(&password), "{}", shown);
        }

        #[test]
        fn no_text_makes_redaction_stumble(text: String) {
            let _ = conninfo(&text);
            let _ = url(&text);
        }
    }
}

//! The settings that choose from a fixed list of words.
//!
//! Source: manual, "Parameter Key Words".

/// `sslmode`, weakest first, so that `>=` compares strength.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum SslMode {
    /// Never TLS.
    Disable,
    /// TLS only if the server refuses without it.
    Allow,
    /// TLS if the server has it.
    Prefer,
    /// TLS, whoever the server is (but see `RootCertificates`).
    Require,
    /// TLS, with a certificate signed by a trusted authority.
    VerifyCa,
    /// TLS, and the certificate must name the host.
    VerifyFull,
}

/// `channel_binding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChannelBinding {
    Disable,
    Prefer,
    Require,
}

/// `target_session_attrs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SessionTarget {
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    /// A standby if any host is one, else any.
    PreferStandby,
}

/// A way in which a server may ask who we are (`require_auth`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AuthMethod {
    Password,
    Md5,
    Gss,
    Sspi,
    ScramSha256,
    Oauth,
    /// The server does not ask (`trust`, `peer`, `cert`).
    None,
}

/// A setting whose values are a fixed list of words.
pub(super) trait Choice: Sized + Copy + PartialEq + 'static {
    /// Each word with its meaning, in the manual's order.
    const WORDS: &'static [(&'static str, Self)];

    /// Returns the meaning of `word`.
    fn of_word(word: &str) -> Option<Self> {
        Self::WORDS.iter().find(|(known, _)| *known == word).map(|(_, value)| *value)
    }

    /// Returns the word for this value.
    fn word(self) -> &'static str {
        Self::WORDS.iter().find(|(_, value)| *value == self).map_or("", |(word, _)| word)
    }

    /// Returns all words, for a message.
    fn all_words() -> String {
        Self::WORDS.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ")
    }
}

impl Choice for SslMode {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("disable", Self::Disable),
        ("allow", Self::Allow),
        ("prefer", Self::Prefer),
        ("require", Self::Require),
        ("verify-ca", Self::VerifyCa),
        ("verify-full", Self::VerifyFull),
    ];
}

impl Choice for ChannelBinding {
    const WORDS: &'static [(&'static str, Self)] =
        &[("disable", Self::Disable), ("prefer", Self::Prefer), ("require", Self::Require)];
}

impl Choice for SessionTarget {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("any", Self::Any),
        ("read-write", Self::ReadWrite),
        ("read-only", Self::ReadOnly),
        ("primary", Self::Primary),
        ("standby", Self::Standby),
        ("prefer-standby", Self::PreferStandby),
    ];
}

impl SessionTarget {
    /// Returns the value as it is written in a connection string.
    pub(crate) fn name(self) -> &'static str {
        self.word()
    }
}

impl Choice for AuthMethod {
    const WORDS: &'static [(&'static str, Self)] = &[
        ("password", Self::Password),
        ("md5", Self::Md5),
        ("gss", Self::Gss),
        ("sspi", Self::Sspi),
        ("scram-sha-256", Self::ScramSha256),
        ("oauth", Self::Oauth),
        ("none", Self::None),
    ];
}

/// `require_auth`: the methods that are acceptable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AcceptedAuth(Vec<AuthMethod>);

impl AcceptedAuth {
    /// Reads a list such as `scram-sha-256,md5` or `!password,!md5`.
    ///
    /// Returns `None` for an unknown word, or if some have `!` and some do not.
    pub(super) fn parse(list: &str) -> Option<Self> {
        let words: Vec<&str> = list.split(',').map(str::trim).collect();
        let refused: Vec<&str> = words.iter().filter_map(|word| word.strip_prefix('!')).collect();
        if refused.is_empty() {
            return words.into_iter().map(AuthMethod::of_word).collect::<Option<_>>().map(Self);
        }
        if refused.len() != words.len() {
            return None;
        }
        let refused: Vec<_> =
            refused.into_iter().map(AuthMethod::of_word).collect::<Option<_>>()?;
        let all = AuthMethod::WORDS.iter().map(|(_, method)| *method);
        Some(Self(all.filter(|method| !refused.contains(method)).collect()))
    }

    /// Returns whether the server may use `method`.
    pub(crate) fn accepts(&self, method: AuthMethod) -> bool {
        self.0.contains(&method)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn require_auth_lists_what_is_accepted_or_what_is_not() {
        let only = AcceptedAuth::parse("scram-sha-256, none").unwrap();
        assert!(only.accepts(AuthMethod::ScramSha256) && only.accepts(AuthMethod::None));
        assert!(!only.accepts(AuthMethod::Password));
        let except = AcceptedAuth::parse("!password,!md5").unwrap();
        assert!(!except.accepts(AuthMethod::Password) && !except.accepts(AuthMethod::Md5));
        assert!(except.accepts(AuthMethod::ScramSha256) && except.accepts(AuthMethod::None));
        for bad in ["scram", "", "!password,md5", "md5,!password", "!"] {
            assert_eq!(AcceptedAuth::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn ssl_modes_are_ordered_by_strength() {
        assert!(SslMode::WORDS.is_sorted_by_key(|(_, mode)| *mode));
    }
}

//! The table of libpq's connection keywords, and what becomes of each here.
//!
//! One row per keyword of PostgreSQL 14 to 18. Nothing libpq knows is dropped
//! without a word: a keyword is used, or ignored for the reason in its row, or
//! refused with that reason.
//!
//! Source: `src/interfaces/libpq/fe-connect.c` (`PQconninfoOptions`) and the
//! manual, "Parameter Key Words" and "Environment Variables".

use crate::spelling::distance;

/// What becomes of a keyword.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Read by `ConnInfo`.
    Used,
    /// Accepted and without effect; the reason why that is right.
    Ignored,
    /// Setting it is an error that says this, because obeying is not possible
    /// and ignoring would weaken or change what the user asked for.
    Refused(&'static str),
}

/// One keyword.
#[derive(Debug)]
pub(super) struct Keyword {
    pub(super) name: &'static str,
    /// The variable that gives its default; empty if there is none.
    pub(super) variable: &'static str,
    pub(super) fate: Fate,
}

const fn used(name: &'static str, variable: &'static str) -> Keyword {
    Keyword { name, variable, fate: Fate::Used }
}

const fn ignored(name: &'static str, variable: &'static str) -> Keyword {
    Keyword { name, variable, fate: Fate::Ignored }
}

const fn refused(name: &'static str, variable: &'static str, why: &'static str) -> Keyword {
    Keyword { name, variable, fate: Fate::Refused(why) }
}

const NO_REVOCATION_LISTS: &str = "certificate revocation lists are not checked here";
const NO_SCRAM_KEYS: &str = "SCRAM pass-through keys are not supported; give the password";
const NO_OAUTH: &str = "OAuth is not supported";

/// Every keyword, in the order of the manual.
pub(super) const KEYWORDS: &[Keyword] = &[
    used("host", "PGHOST"),
    used("hostaddr", "PGHOSTADDR"),
    used("port", "PGPORT"),
    used("dbname", "PGDATABASE"),
    used("user", "PGUSER"),
    used("password", "PGPASSWORD"),
    used("passfile", "PGPASSFILE"),
    used("require_auth", "PGREQUIREAUTH"),
    used("channel_binding", "PGCHANNELBINDING"),
    used("connect_timeout", "PGCONNECT_TIMEOUT"),
    // Messages are read as UTF-8, so that is what is asked for.
    ignored("client_encoding", "PGCLIENTENCODING"),
    used("options", "PGOPTIONS"),
    used("application_name", "PGAPPNAME"),
    used("fallback_application_name", ""),
    used("keepalives", ""),
    used("keepalives_idle", ""),
    used("keepalives_interval", ""),
    used("keepalives_count", ""),
    used("tcp_user_timeout", ""),
    // Whether a connection replicates is the command's choice, not the user's.
    ignored("replication", ""),
    // Only `require` matters, see `ConnInfo`: GSS encryption is never offered.
    used("gssencmode", "PGGSSENCMODE"),
    used("sslmode", "PGSSLMODE"),
    used("sslnegotiation", "PGSSLNEGOTIATION"),
    // Off in every server since 14, and unsafe.
    ignored("sslcompression", "PGSSLCOMPRESSION"),
    used("sslcert", "PGSSLCERT"),
    used("sslkey", "PGSSLKEY"),
    refused(
        "sslpassword",
        "",
        "encrypted key files are not supported; use an unencrypted key with mode 0600",
    ),
    used("sslcertmode", "PGSSLCERTMODE"),
    used("sslrootcert", "PGSSLROOTCERT"),
    refused("sslcrl", "PGSSLCRL", NO_REVOCATION_LISTS),
    refused("sslcrldir", "PGSSLCRLDIR", NO_REVOCATION_LISTS),
    used("sslsni", "PGSSLSNI"),
    refused("sslkeylogfile", "", "TLS keys are never written to a file here"),
    refused("requirepeer", "PGREQUIREPEER", "the peer's operating system user is not checked here"),
    used("ssl_min_protocol_version", "PGSSLMINPROTOCOLVERSION"),
    used("ssl_max_protocol_version", "PGSSLMAXPROTOCOLVERSION"),
    used("min_protocol_version", "PGMINPROTOCOLVERSION"),
    // Protocol 3.0 is below every maximum that can be set.
    ignored("max_protocol_version", "PGMAXPROTOCOLVERSION"),
    // All of GSSAPI: a server that insists on it gets a clear refusal at login.
    ignored("krbsrvname", "PGKRBSRVNAME"),
    ignored("gsslib", "PGGSSLIB"),
    ignored("gssdelegation", "PGGSSDELEGATION"),
    refused("scram_client_key", "", NO_SCRAM_KEYS),
    refused("scram_server_key", "", NO_SCRAM_KEYS),
    used("service", "PGSERVICE"),
    used("servicefile", "PGSERVICEFILE"),
    used("target_session_attrs", "PGTARGETSESSIONATTRS"),
    // Hosts are tried in the order given: spreading load means nothing for one
    // connection that prefers the first.
    ignored("load_balance_hosts", "PGLOADBALANCEHOSTS"),
    refused("oauth_issuer", "", NO_OAUTH),
    refused("oauth_client_id", "", NO_OAUTH),
    refused("oauth_client_secret", "", NO_OAUTH),
    refused("oauth_scope", "", NO_OAUTH),
    // Obsolete; libpq accepts and ignores both.
    ignored("authtype", "PGAUTHTYPE"),
    ignored("tty", "PGTTY"),
];

/// Returns the row of `name`, which libpq compares with case.
pub(super) fn find(name: &str) -> Option<&'static Keyword> {
    KEYWORDS.iter().find(|keyword| keyword.name == name)
}

/// Returns the keyword nearest to a misspelt one; of equals, the first. One
/// that is only too long, such as `username`, means what it begins with.
pub(super) fn nearest(name: &str) -> &'static str {
    KEYWORDS
        .iter()
        .map(|keyword| keyword.name)
        .min_by_key(|known| (!name.starts_with(known), distance(name.as_bytes(), known.as_bytes())))
        .unwrap_or("host")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_keyword_finds_its_neighbour() {
        for (typo, meant) in [
            ("hots", "host"),
            ("ssl_mode", "sslmode"),
            ("username", "user"),
            ("pasword", "password"),
            ("target_session_attr", "target_session_attrs"),
        ] {
            assert_eq!(nearest(typo), meant);
        }
    }

    #[test]
    fn no_keyword_and_no_variable_stands_twice() {
        for (number, keyword) in KEYWORDS.iter().enumerate() {
            let later = &KEYWORDS[number + 1..];
            assert!(later.iter().all(|other| other.name != keyword.name), "{}", keyword.name);
            assert!(
                keyword.variable.is_empty()
                    || later.iter().all(|other| other.variable != keyword.variable),
                "{}",
                keyword.variable
            );
        }
    }
}

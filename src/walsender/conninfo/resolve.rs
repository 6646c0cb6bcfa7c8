//! From text values to typed ones: defaults, ranges, and what contradicts what.
//!
//! Source: manual, "Parameter Key Words"; `src/interfaces/libpq/fe-connect.c`
//! (`pqConnectOptions2`).

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::choices::Choice;
use super::{
    AcceptedAuth, AuthMethod, ChannelBinding, ConnInfo, Host, HostName, Keepalives, Password,
    PgEnvironment, RootCertificates, SessionTarget, SettingsError, SslMode, TlsSettings,
    TlsVersion, Values,
};

/// The port of a server that does not say (`DEF_PGPORT`).
pub(super) const PORT_DEFAULT: u16 = 5432;

/// The most hosts that one connection string may name.
pub(super) const HOSTS_MAX: usize = 64;

/// The limit for one attempt to connect where `connect_timeout` is not set.
pub(super) const CONNECT_LIMIT_DEFAULT: Duration = Duration::from_secs(30);

/// The limit that stands for libpq's "wait for ever", since nothing here may hang.
pub(super) const CONNECT_LIMIT_MAX: Duration = Duration::from_hours(1);

/// The text values, on their way to typed ones.
pub(super) struct Settings<'a>(pub(super) &'a Values);

impl Settings<'_> {
    pub(super) fn conninfo(&self, environment: &PgEnvironment) -> Result<ConnInfo, SettingsError> {
        let user =
            self.text("user").or(environment.user.as_deref()).ok_or(SettingsError::NoUser)?;
        let in_home = |name: &str| environment.home.as_ref().map(|home| home.join(name));
        let application_name =
            self.text("application_name").or(self.text("fallback_application_name"));
        self.refuse_the_impossible()?;
        Ok(ConnInfo {
            hosts: self.hosts()?,
            user: user.to_owned(),
            dbname: self.text("dbname").unwrap_or(user).to_owned(),
            password: self.text("password").map(|secret| Password(secret.to_owned())),
            passfile: self.text("passfile").map(PathBuf::from).or_else(|| in_home(".pgpass")),
            connect_limit: self.connect_limit()?,
            application_name: application_name.unwrap_or("highwater").to_owned(),
            options: self.text("options").map(ToOwned::to_owned),
            tls: self.tls(in_home(".postgresql"))?,
            channel_binding: self.choice("channel_binding", ChannelBinding::Prefer)?,
            accepted_auth: match self.text("require_auth") {
                Some(list) => Some(AcceptedAuth::parse(list).ok_or_else(|| {
                    let words = AuthMethod::all_words();
                    invalid(
                        "require_auth",
                        list,
                        &format!("a list of {words}, or of the same each with `!`"),
                    )
                })?),
                None => None,
            },
            target: self.choice("target_session_attrs", SessionTarget::Any)?,
            keepalives: Keepalives {
                enabled: self.number("keepalives")? != Some(0),
                idle: self.duration("keepalives_idle", Duration::from_secs(1))?,
                interval: self.duration("keepalives_interval", Duration::from_secs(1))?,
                count: self.number("keepalives_count")?.filter(|count| *count > 0),
                user_timeout: self.duration("tcp_user_timeout", Duration::from_millis(1))?,
            },
        })
    }

    /// Refuses values that ask for more safety than can be given here.
    fn refuse_the_impossible(&self) -> Result<(), SettingsError> {
        let refusals = [
            ("gssencmode", "require", "GSSAPI encryption is not supported; use TLS (`sslmode`)"),
            ("sslcertmode", "require", "whether the server asked for a certificate is not checked"),
            ("min_protocol_version", "3.2", "protocol 3.0 is spoken here"),
            ("min_protocol_version", "latest", "protocol 3.0 is spoken here"),
        ];
        for (keyword, value, why) in refusals {
            if self.text(keyword) == Some(value) {
                return Err(SettingsError::Unsupported { keyword, why });
            }
        }
        for (keyword, expected) in [
            ("gssencmode", &["disable", "prefer"][..]),
            ("sslcertmode", &["disable", "allow"]),
            ("min_protocol_version", &["3.0"]),
        ] {
            if let Some(value) = self.text(keyword).filter(|value| !expected.contains(value)) {
                return Err(invalid(keyword, value, &expected.join(", ")));
            }
        }
        Ok(())
    }

    /// Pairs the lists `host`, `hostaddr` and `port`.
    fn hosts(&self) -> Result<Vec<Host>, SettingsError> {
        let list = |name| self.text(name).map(|text| text.split(',').collect::<Vec<_>>());
        let (names, addresses, ports) = (list("host"), list("hostaddr"), list("port"));
        let hosts = addresses.as_ref().or(names.as_ref()).map_or(1, Vec::len);
        if hosts > HOSTS_MAX {
            return Err(SettingsError::Count { keyword: "host", count: hosts, hosts: HOSTS_MAX });
        }
        for (keyword, values, one_for_all) in
            [("host", &names, false), ("hostaddr", &addresses, false), ("port", &ports, true)]
        {
            let count = values.as_ref().map_or(hosts, Vec::len);
            if count != hosts && !(one_for_all && count == 1) {
                return Err(SettingsError::Count { keyword, count, hosts });
            }
        }
        let pick = |values: &Option<Vec<&str>>, number: usize| -> Option<String> {
            let values = values.as_ref()?;
            // One port stands for all hosts.
            let value = values.get(number).or_else(|| values.first())?.trim();
            (!value.is_empty()).then(|| value.to_owned())
        };
        (0..hosts)
            .map(|number| {
                let address = pick(&addresses, number)
                    .map(|text| {
                        text.parse().map_err(|_| invalid("hostaddr", &text, "a numeric IP address"))
                    })
                    .transpose()?;
                let port = pick(&ports, number).map_or(Ok(PORT_DEFAULT), |text| {
                    let port = text.parse().ok().filter(|port| *port > 0);
                    port.ok_or_else(|| invalid("port", &text, "a number from 1 to 65535"))
                })?;
                Ok(Host { name: host_name(pick(&names, number), address)?, address, port })
            })
            .collect()
    }

    fn tls(&self, directory: Option<PathBuf>) -> Result<TlsSettings, SettingsError> {
        let roots = match self.text("sslrootcert") {
            None => RootCertificates::Default(directory.as_ref().map(|home| home.join("root.crt"))),
            Some("system") => RootCertificates::System,
            Some(path) => RootCertificates::File(PathBuf::from(path)),
        };
        // Public authorities vouch for anybody's name, so the name must be checked.
        let from_system = roots == RootCertificates::System;
        let mode_default = if from_system { SslMode::VerifyFull } else { SslMode::Prefer };
        let mode = self.choice("sslmode", mode_default)?;
        if from_system && mode != SslMode::VerifyFull {
            return Err(SettingsError::Contradiction(
                "sslrootcert=system needs sslmode=verify-full",
            ));
        }
        let direct = match self.text("sslnegotiation") {
            None | Some("postgres") => false,
            Some("direct") => true,
            Some(other) => return Err(invalid("sslnegotiation", other, "postgres, direct")),
        };
        if direct && mode < SslMode::Require {
            return Err(SettingsError::Contradiction(
                "sslnegotiation=direct needs sslmode=require or stronger",
            ));
        }
        let version_min = self.tls_version("ssl_min_protocol_version", TlsVersion::Tls12)?;
        let version_max = self.tls_version("ssl_max_protocol_version", TlsVersion::Tls13)?;
        if version_min > version_max {
            return Err(SettingsError::Contradiction(
                "ssl_min_protocol_version is above ssl_max_protocol_version",
            ));
        }
        Ok(TlsSettings {
            mode,
            direct,
            roots,
            certificate: self.text("sslcert").map(PathBuf::from),
            key: self.text("sslkey").map(PathBuf::from),
            directory,
            show_certificate: self.text("sslcertmode") != Some("disable"),
            server_name_indication: self.text("sslsni") != Some("0"),
            version_min,
            version_max,
        })
    }

    fn tls_version(
        &self,
        keyword: &'static str,
        default: TlsVersion,
    ) -> Result<TlsVersion, SettingsError> {
        match self.text(keyword).map(str::to_ascii_lowercase).as_deref() {
            None => Ok(default),
            Some("tlsv1.2") => Ok(TlsVersion::Tls12),
            Some("tlsv1.3") => Ok(TlsVersion::Tls13),
            // A lower minimum allows what is done here anyway.
            Some("tlsv1" | "tlsv1.1") if keyword == "ssl_min_protocol_version" => Ok(default),
            Some(other) => Err(invalid(keyword, other, "TLSv1.2, TLSv1.3")),
        }
    }

    fn connect_limit(&self) -> Result<Duration, SettingsError> {
        let Some(text) = self.text("connect_timeout") else { return Ok(CONNECT_LIMIT_DEFAULT) };
        let seconds: i32 = text
            .trim()
            .parse()
            .map_err(|_| invalid("connect_timeout", text, "a whole number of seconds"))?;
        Ok(match u64::try_from(seconds) {
            Ok(seconds) if seconds > 0 => Duration::from_secs(seconds).min(CONNECT_LIMIT_MAX),
            _ => CONNECT_LIMIT_MAX,
        })
    }

    /// Returns the value unless it is missing or empty.
    fn text(&self, keyword: &str) -> Option<&str> {
        self.0.get(keyword).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn choice<T: Choice>(&self, keyword: &'static str, default: T) -> Result<T, SettingsError> {
        let Some(word) = self.text(keyword) else { return Ok(default) };
        T::of_word(word)
            .ok_or_else(|| invalid(keyword, word, &format!("one of {}", T::all_words())))
    }

    fn number(&self, keyword: &'static str) -> Result<Option<u32>, SettingsError> {
        let number =
            |text: &str| text.trim().parse().ok().filter(|number| i32::try_from(*number).is_ok());
        self.text(keyword)
            .map(|text| number(text).ok_or_else(|| invalid(keyword, text, "a whole number")))
            .transpose()
    }

    /// Reads a number of `unit`s; 0 means the system's default.
    fn duration(
        &self,
        keyword: &'static str,
        unit: Duration,
    ) -> Result<Option<Duration>, SettingsError> {
        Ok(self.number(keyword)?.filter(|number| *number > 0).map(|number| unit * number))
    }
}

fn host_name(name: Option<String>, address: Option<IpAddr>) -> Result<HostName, SettingsError> {
    match name {
        None if address.is_some() => Ok(HostName::AddressOnly),
        None => Ok(HostName::DefaultSocket),
        Some(name) if name.starts_with('/') && address.is_none() => {
            Ok(HostName::SocketDirectory(PathBuf::from(name)))
        }
        Some(name) if name.starts_with('@') => Err(invalid(
            "host",
            &name,
            "a name, an address or a directory (abstract sockets are not supported)",
        )),
        Some(name) => Ok(HostName::Name(name)),
    }
}

fn invalid(keyword: &'static str, value: &str, expected: &str) -> SettingsError {
    SettingsError::Invalid { keyword, value: value.to_owned(), expected: expected.to_owned() }
}

//! Where a server is and how to get in: libpq's connection settings.
//!
//! A setting comes from the connection string, else from the service that is
//! named, else from the environment, else it has libpq's default. This room
//! never looks at the process environment itself: [`PgEnvironment`] brings it.
//! The password is kept in a type that cannot be printed.
//!
//! Source: manual, "Database Connection Control Functions" and "Environment
//! Variables"; `src/interfaces/libpq/fe-connect.c`.

mod choices;
mod grammar;
mod keywords;
mod service;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use choices::Choice;
pub(crate) use choices::{AcceptedAuth, AuthMethod, ChannelBinding, SessionTarget, SslMode};

/// The port of a server that does not say (`DEF_PGPORT`).
const PORT_DEFAULT: u16 = 5432;

/// The most hosts that one connection string may name.
const HOSTS_MAX: usize = 64;

/// The limit for one attempt to connect where `connect_timeout` is not set.
const CONNECT_LIMIT_DEFAULT: Duration = Duration::from_secs(30);

/// The limit that stands for libpq's "wait for ever", since nothing here may hang.
const CONNECT_LIMIT_MAX: Duration = Duration::from_secs(3600);

/// Settings by keyword, as text. An empty value means: set, to the default.
type Values = BTreeMap<&'static str, String>;

/// What libpq would read from the process, given as a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PgEnvironment {
    /// The environment variables; only those whose names begin with `PG` are looked at.
    pub vars: BTreeMap<String, String>,
    /// The home directory, for `~/.pgpass`, `~/.pg_service.conf` and `~/.postgresql`.
    pub home: Option<PathBuf>,
    /// The operating system user, the default for `user`.
    pub user: Option<String>,
}

/// The connection settings are wrong or contradict each other. Never worth a retry.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The text is neither a URI nor `key=value` words.
    #[error("the connection string is malformed at byte {at}: {problem}")]
    Syntax {
        /// Offset in bytes from the start of the text.
        at: usize,
        /// What is wrong there.
        problem: &'static str,
    },
    /// libpq has no such keyword.
    #[error("`{name}` is not a connection setting; the nearest one is `{nearest}`")]
    UnknownKeyword {
        /// The word given; dots if it does not look like a keyword.
        name: String,
        /// The most similar keyword.
        nearest: &'static str,
    },
    /// libpq has this setting, and obeying it is not possible here.
    #[error("the connection setting `{keyword}` cannot be used: {why}")]
    Unsupported {
        /// The keyword.
        keyword: &'static str,
        /// Why, and what to do instead.
        why: &'static str,
    },
    /// The value is none of those the setting takes.
    #[error("`{value}` is not a value of the connection setting `{keyword}`: expected {expected}")]
    Invalid {
        /// The keyword.
        keyword: &'static str,
        /// The value given.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// Two settings contradict each other.
    #[error("the connection settings contradict each other: {0}")]
    Contradiction(&'static str),
    /// The lists of hosts, addresses and ports do not fit together.
    #[error("{count} values of `{keyword}` do not fit {hosts} hosts")]
    Count {
        /// The keyword with the wrong number of values.
        keyword: &'static str,
        /// How many values it has.
        count: usize,
        /// How many hosts there are.
        hosts: usize,
    },
    /// No user was given and the operating system user is unknown.
    #[error("no database user: give `user` or PGUSER, since the operating system user is unknown")]
    NoUser,
    /// There is no host to try.
    #[error("no host to connect to")]
    NoHost,
    /// No service file has the section asked for.
    #[error("service `{name}` is not defined in: {looked_in}")]
    ServiceNotFound {
        /// The service.
        name: String,
        /// The files that were looked for, whether they exist or not.
        looked_in: String,
    },
    /// A service file is malformed.
    #[error("{}, line {line}: {problem}", path.display())]
    ServiceFile {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// A file that the settings name could not be read.
    #[error("could not read {}: {cause}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

impl SettingsError {
    /// Names an unknown keyword, unless it might be the tail of a password with a space.
    fn unknown_keyword(name: &str) -> Self {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        if name.len() <= 32 && name.bytes().all(plain) {
            Self::UnknownKeyword { name: name.to_owned(), nearest: keywords::nearest(name) }
        } else {
            Self::Syntax {
                at: 0,
                problem: "a word before `=` is not a keyword (a value with a space needs \
                          single quotes)",
            }
        }
    }
}

/// A secret that `Debug` does not show; it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Password(String);

impl Password {
    pub(crate) fn new(secret: String) -> Self {
        Self(secret)
    }

    /// Returns the secret, for the wire only.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

/// What a host of the list is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum HostName {
    /// Nothing given: the socket in one of the usual directories.
    DefaultSocket,
    /// A Unix socket in this directory.
    SocketDirectory(PathBuf),
    /// A DNS name or an IP address in text.
    Name(String),
    /// Only `hostaddr` was given.
    AddressOnly,
}

/// One server to try.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) name: HostName,
    /// `hostaddr`: connect here without asking DNS; `name` is still what TLS checks.
    pub(crate) address: Option<IpAddr>,
    pub(crate) port: u16,
}

/// Which certificate authorities vouch for the server (`sslrootcert`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RootCertificates {
    /// `~/.postgresql/root.crt`, if there is one.
    Default(Option<PathBuf>),
    /// This file; it must exist.
    File(PathBuf),
    /// Those that the operating system trusts.
    System,
}

/// The TLS protocol versions that both PostgreSQL and rustls speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TlsVersion {
    Tls12,
    Tls13,
}

/// All that concerns TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TlsSettings {
    pub(crate) mode: SslMode,
    /// `sslnegotiation=direct`: TLS from the first byte (PostgreSQL 17+).
    pub(crate) direct: bool,
    pub(crate) roots: RootCertificates,
    /// `sslcert` and `sslkey`, where given.
    pub(crate) certificate: Option<PathBuf>,
    pub(crate) key: Option<PathBuf>,
    /// `~/.postgresql`, where the defaults of both are.
    pub(crate) directory: Option<PathBuf>,
    /// `sslcertmode`: whether a certificate of ours may be shown.
    pub(crate) show_certificate: bool,
    pub(crate) server_name_indication: bool,
    pub(crate) version_min: TlsVersion,
    pub(crate) version_max: TlsVersion,
}

/// How the kernel finds out that a TCP peer is gone; `None` leaves it its default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keepalives {
    pub(crate) enabled: bool,
    pub(crate) idle: Option<Duration>,
    pub(crate) interval: Option<Duration>,
    pub(crate) count: Option<u32>,
    pub(crate) user_timeout: Option<Duration>,
}

/// Everything needed to connect; read once, used for any number of connections.
///
/// `Debug` and [`ConnInfo::without_password`] are safe to log.
#[derive(Clone, PartialEq, Eq)]
pub struct ConnInfo {
    pub(crate) hosts: Vec<Host>,
    pub(crate) user: String,
    pub(crate) dbname: String,
    pub(crate) password: Option<Password>,
    /// `passfile`, else `~/.pgpass`; need not exist.
    pub(crate) passfile: Option<PathBuf>,
    /// The limit for one address, from opening the socket to the end of the login.
    pub(crate) connect_limit: Duration,
    pub(crate) application_name: String,
    pub(crate) options: Option<String>,
    pub(crate) tls: TlsSettings,
    pub(crate) channel_binding: ChannelBinding,
    pub(crate) accepted_auth: Option<AcceptedAuth>,
    pub(crate) target: SessionTarget,
    pub(crate) keepalives: Keepalives,
}

impl ConnInfo {
    /// Reads the settings from a connection string (`None` or empty: none), the
    /// service it names, and the environment.
    ///
    /// The service file is read here; password and certificate files are read
    /// anew at each connection. Errors: any [`SettingsError`].
    pub fn read(dsn: Option<&str>, environment: &PgEnvironment) -> Result<Self, SettingsError> {
        let mut values = grammar::parse(dsn.unwrap_or_default())?;
        let setting = |values: &Values, name: &str, variable: &str| {
            values.get(name).or_else(|| environment.vars.get(variable)).cloned()
        };
        let service = setting(&values, "service", "PGSERVICE").filter(|name| !name.is_empty());
        if let Some(service) = service {
            let file = setting(&values, "servicefile", "PGSERVICEFILE");
            let file = file.as_deref().filter(|file| !file.is_empty());
            for (name, value) in service::load(&service, file, environment)? {
                values.entry(name).or_insert(value);
            }
        }
        for keyword in keywords::KEYWORDS {
            if let Some(value) = environment.vars.get(keyword.variable)
                && !values.contains_key(keyword.name)
            {
                grammar::store(&mut values, keyword.name, value.clone())?;
            }
        }
        Settings(&values).conninfo(environment)
    }

    /// Returns the settings as text for messages and logs: where, who, which
    /// database, which TLS mode; never the password.
    pub fn without_password(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(Host::label).collect();
        format!(
            "{} user={} dbname={} sslmode={}",
            hosts.join(","),
            self.user,
            self.dbname,
            self.tls.mode.word()
        )
    }

    /// Returns the database user.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Returns the database that SQL connections go to.
    pub fn dbname(&self) -> &str {
        &self.dbname
    }

    /// Returns how many servers the settings name.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// Splits a list of hosts into one `ConnInfo` for each, in the order given,
    /// for a caller that wants to look at every server. Each takes whatever
    /// server is there (`target_session_attrs=any`).
    pub fn each_host(&self) -> Vec<Self> {
        let alone = |host: &Host| Self {
            hosts: vec![host.clone()],
            target: SessionTarget::Any,
            ..self.clone()
        };
        self.hosts.iter().map(alone).collect()
    }

    /// Returns the same settings with another `application_name`, which is the
    /// key for `synchronous_standby_names`.
    #[must_use]
    pub fn with_application_name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.application_name);
        self
    }
}

impl fmt::Debug for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ConnInfo({})", self.without_password())
    }
}

impl Host {
    /// Returns the host as text, before DNS: `db:5432`, `[::1]:5432` or `/run/pg:5432`.
    pub(crate) fn label(&self) -> String {
        let name = match (&self.name, self.address) {
            (HostName::DefaultSocket, _) => "(local socket)".to_owned(),
            (HostName::SocketDirectory(directory), _) => directory.display().to_string(),
            (HostName::Name(name), _) => name.clone(),
            (HostName::AddressOnly, Some(address)) => address.to_string(),
            (HostName::AddressOnly, None) => String::new(),
        };
        if name.contains(':') {
            format!("[{name}]:{}", self.port)
        } else {
            format!("{name}:{}", self.port)
        }
    }
}

/// The text values, on their way to typed ones.
struct Settings<'a>(&'a Values);

impl Settings<'_> {
    fn conninfo(&self, environment: &PgEnvironment) -> Result<ConnInfo, SettingsError> {
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
            |text: &str| text.trim().parse().ok().filter(|number| *number <= i32::MAX as u32);
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

/// Reads a small text file; a missing one is `None` unless it `must_exist`.
fn read_text(
    path: &Path,
    bytes_max: u64,
    must_exist: bool,
) -> Result<Option<String>, SettingsError> {
    let failed = |cause| SettingsError::File { path: path.to_owned(), cause };
    let file = match std::fs::File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    let mut text = String::new();
    file.take(bytes_max + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > bytes_max {
        return Err(failed(io::Error::other(format!("it is larger than {bytes_max} bytes"))));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests;

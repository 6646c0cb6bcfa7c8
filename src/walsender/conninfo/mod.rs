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
mod error;
mod grammar;
mod keywords;
mod resolve;
mod service;

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use choices::Choice;
pub(crate) use choices::{AcceptedAuth, AuthMethod, ChannelBinding, SessionTarget, SslMode};
pub use error::SettingsError;
use resolve::Settings;

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

    /// Returns where the servers are, for messages: `db1:5432,db2:5432`, before DNS.
    pub fn place(&self) -> String {
        let hosts: Vec<String> = self.hosts.iter().map(Host::label).collect();
        hosts.join(",")
    }

    /// Returns the settings as text for messages and logs: where, who, which
    /// database, which TLS mode; never the password.
    pub fn without_password(&self) -> String {
        format!(
            "{} user={} dbname={} sslmode={}",
            self.place(),
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

    /// Returns the `application_name`, which is the key for `synchronous_standby_names`;
    /// `highwater` unless the settings say otherwise.
    pub fn application_name(&self) -> &str {
        &self.application_name
    }

    /// The same server, another database.
    #[must_use]
    pub fn with_dbname(mut self, name: &str) -> Self {
        name.clone_into(&mut self.dbname);
        self
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

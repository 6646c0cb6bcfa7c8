//! Logging in: what the server asks, and what we are willing to answer.
//!
//! The order matters as much as the arithmetic. The server's "you are in" is
//! believed only if every step that was begun was finished, so a server in
//! the middle cannot cut a SCRAM exchange short and leave out the proof that
//! it knows the password too.
//!
//! Source: manual, "Start-up" and "SASL Authentication" in the protocol;
//! `src/interfaces/libpq/fe-auth.c`.

use bytes::{Buf, Bytes};
use postgres_protocol::authentication;
use postgres_protocol::authentication::sasl::{ChannelBinding as Binding, ScramSha256};
use postgres_protocol::message::frontend;

use super::connection::Mode;
use super::conninfo::{AuthMethod, ChannelBinding, ConnInfo, Host, HostName, Password};
use super::error::PgError;
use super::passfile::{self, Wanted};
use super::wire::Wire;

const SCRAM: &str = "SCRAM-SHA-256";
const SCRAM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// The directories whose sockets count as `localhost` in the password file.
pub(super) const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

/// One login.
pub(super) struct Login<'a> {
    pub(super) info: &'a ConnInfo,
    pub(super) host: &'a Host,
    pub(super) mode: Mode,
    /// Whether the connection is encrypted.
    pub(super) encrypted: bool,
    /// The `tls-server-end-point` data, where TLS gave some.
    pub(super) end_point: Option<Vec<u8>>,
}

/// How far a SCRAM exchange has come.
enum Exchange {
    None,
    Begun(Box<ScramSha256>),
    Answered(Box<ScramSha256>),
    /// The server has proved that it knows the password.
    Proved,
}

impl Login<'_> {
    /// Answers the server until it lets us in.
    ///
    /// Errors: `Server` if it does not, `Auth` if we would not or could not
    /// answer, and whatever breaks a connection.
    pub(super) async fn run(self, wire: &mut Wire) -> Result<(), PgError> {
        let mut exchange = Exchange::None;
        let mut bound = false;
        let mut asked = false;
        loop {
            let frame = wire.next().await?;
            let mut body = frame.body;
            match frame.tag {
                b'R' if body.len() >= 4 => {}
                b'E' => return Err(PgError::Server(Box::new(wire.server_error(&body)))),
                b'v' => {
                    return Err(wire.broken("the server does not speak protocol 3.0"));
                }
                tag => {
                    return Err(wire.broken(format!(
                        "a message of kind {} during the login",
                        tag.escape_ascii()
                    )));
                }
            }
            match (body.get_u32(), exchange) {
                (0, Exchange::None | Exchange::Proved) => {
                    return self.welcome(wire, asked, bound);
                }
                (3, Exchange::None) => {
                    self.accept(wire, AuthMethod::Password)?;
                    let password = self.password(wire)?;
                    answer(wire, |out| {
                        frontend::password_message(password.reveal().as_bytes(), out)
                    })
                    .await?;
                    exchange = Exchange::None;
                }
                (5, Exchange::None) => {
                    self.accept(wire, AuthMethod::Md5)?;
                    let hash = self.md5(wire, &body)?;
                    answer(wire, |out| frontend::password_message(hash.as_bytes(), out)).await?;
                    exchange = Exchange::None;
                }
                (10, Exchange::None) => {
                    self.accept(wire, AuthMethod::ScramSha256)?;
                    let (name, scram) = self.begin_scram(wire, &body)?;
                    bound = name == SCRAM_PLUS;
                    answer(wire, |out| frontend::sasl_initial_response(name, scram.message(), out))
                        .await?;
                    exchange = Exchange::Begun(Box::new(scram));
                }
                (11, Exchange::Begun(mut scram)) => {
                    scram.update(&body).map_err(|error| scram_failure(wire, &error))?;
                    answer(wire, |out| frontend::sasl_response(scram.message(), out)).await?;
                    exchange = Exchange::Answered(scram);
                }
                (12, Exchange::Answered(mut scram)) => {
                    scram.finish(&body).map_err(|error| scram_failure(wire, &error))?;
                    exchange = Exchange::Proved;
                }
                (0 | 3 | 5 | 10 | 11 | 12, _) => {
                    return Err(refuse(wire, "the server left out a step of the login"));
                }
                (method, _) => return Err(self.unknown_method(wire, method)),
            }
            asked = true;
        }
    }

    /// The server let us in: is that good enough for the settings?
    fn welcome(&self, wire: &Wire, asked: bool, bound: bool) -> Result<(), PgError> {
        if !asked {
            self.accept(wire, AuthMethod::None)?;
        }
        if self.info.channel_binding == ChannelBinding::Require && !bound {
            return Err(refuse(
                wire,
                "channel_binding=require, but the server let us in without channel binding",
            ));
        }
        Ok(())
    }

    /// Refuses a method that `require_auth` or `channel_binding` rules out,
    /// before anything secret is sent.
    fn accept(&self, wire: &Wire, method: AuthMethod) -> Result<(), PgError> {
        if let Some(accepted) = &self.info.accepted_auth
            && !accepted.accepts(method)
        {
            let reason = format!(
                "require_auth does not allow the method `{method:?}`, which the server wants"
            );
            return Err(refuse(wire, &reason));
        }
        let binds = matches!(method, AuthMethod::ScramSha256);
        if self.info.channel_binding == ChannelBinding::Require && !binds {
            return Err(refuse(
                wire,
                "channel_binding=require, but the server wants a method that has none \
                 (needed: scram-sha-256 over TLS)",
            ));
        }
        Ok(())
    }

    fn begin_scram(
        &self,
        wire: &Wire,
        mechanisms: &Bytes,
    ) -> Result<(&'static str, ScramSha256), PgError> {
        let offered =
            |name: &str| mechanisms.split(|byte| *byte == 0).any(|m| m == name.as_bytes());
        let wish = self.info.channel_binding;
        let end_point =
            self.end_point.as_ref().filter(|_| wish != ChannelBinding::Disable && self.encrypted);
        let (name, binding) = match end_point {
            Some(data) if offered(SCRAM_PLUS) => {
                (SCRAM_PLUS, Binding::tls_server_end_point(data.clone()))
            }
            _ if wish == ChannelBinding::Require => {
                let reason = if self.encrypted {
                    "channel_binding=require, but the server, or its certificate, has none"
                } else {
                    "channel_binding=require, but the connection is not encrypted"
                };
                return Err(refuse(wire, reason));
            }
            // Says that we could have bound: a server that can, but whose
            // offer someone took out on the way, will then refuse.
            Some(_) => (SCRAM, Binding::unrequested()),
            None => (SCRAM, Binding::unsupported()),
        };
        if !offered(name) {
            return Err(refuse(wire, "the server offers no SASL mechanism that is known here"));
        }
        let password = self.password(wire)?;
        Ok((name, ScramSha256::new(password.reveal().as_bytes(), binding)))
    }

    fn md5(&self, wire: &Wire, salt: &Bytes) -> Result<String, PgError> {
        let Ok(salt) = <[u8; 4]>::try_from(salt.as_ref()) else {
            return Err(wire.broken("the salt for md5 does not have four bytes"));
        };
        let password = self.password(wire)?;
        let user = self.info.user.as_bytes();
        Ok(authentication::md5_hash(user, password.reveal().as_bytes(), salt))
    }

    /// Finds the password, or says where it was looked for.
    fn password(&self, wire: &Wire) -> Result<Password, PgError> {
        if let Some(password) = &self.info.password {
            return Ok(password.clone());
        }
        let address = self.host.address.map(|address| address.to_string());
        let host = match &self.host.name {
            HostName::Name(name) => name.clone(),
            HostName::AddressOnly => address.unwrap_or_default(),
            HostName::DefaultSocket => "localhost".to_owned(),
            HostName::SocketDirectory(directory) => {
                let usual = SOCKET_DIRECTORIES.iter().any(|usual| directory.as_os_str() == *usual);
                if usual { "localhost".to_owned() } else { directory.display().to_string() }
            }
        };
        let dbname = match self.mode {
            Mode::Sql => self.info.dbname.as_str(),
            Mode::Replication => "replication",
        };
        let wanted = Wanted { host: &host, port: self.host.port, dbname, user: &self.info.user };
        let found = match &self.info.passfile {
            Some(path) => passfile::look_up(path, &wanted),
            None => Err("there is no home directory to look for .pgpass in".to_owned()),
        };
        found.map_err(|why| {
            let reason = format!(
                "the server wants a password for user `{}`, and there is none: not in the \
                 connection settings, not in PGPASSWORD, and {why}",
                self.info.user
            );
            refuse(wire, &reason)
        })
    }

    fn unknown_method(&self, wire: &Wire, method: u32) -> PgError {
        let name = match method {
            2 => "Kerberos V5",
            6 => "SCM credentials",
            7 | 8 => "GSSAPI",
            9 => "SSPI",
            _ => "an unknown method",
        };
        let reason = format!(
            "the server wants {name} ({method}), which is not supported; give user `{}` a \
             pg_hba.conf line with scram-sha-256, cert or peer",
            self.info.user
        );
        refuse(wire, &reason)
    }
}

fn scram_failure(wire: &Wire, error: &std::io::Error) -> PgError {
    refuse(wire, &format!("the SCRAM exchange failed: {error}"))
}

fn refuse(wire: &Wire, reason: &str) -> PgError {
    PgError::Auth { place: wire.place().to_owned(), reason: reason.to_owned() }
}

/// Puts one message together and sends it.
async fn answer(
    wire: &mut Wire,
    write: impl FnOnce(&mut bytes::BytesMut) -> std::io::Result<()>,
) -> Result<(), PgError> {
    write(&mut wire.output).map_err(|error| PgError::Auth {
        place: wire.place().to_owned(),
        reason: format!("the password cannot be sent: {error}"),
    })?;
    wire.flush().await
}

//! Opening a socket to each place a host may be, in order.
//!
//! A host is one or more addresses: what DNS says, or the usual socket
//! directories. For each there are one or more ways, by `sslmode`. Which
//! failure leads to which next attempt is decided in [`next_step`]; all else
//! here only carries it out.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpStream, UnixStream, lookup_host};

use super::auth::SOCKET_DIRECTORIES;
use super::conninfo::{ChannelBinding, ConnInfo, Host, HostName, Keepalives, SslMode};
use super::error::PgError;
use super::tls;
use super::wire::Socket;

/// The most addresses of one host name that are tried.
const ADDRESSES_MAX: usize = 16;

/// One place to open a socket to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// How to go about encryption in one attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Plain,
    /// Go on without if the server has no TLS.
    TlsIfOffered,
    Tls,
}

/// An open connection on which nothing was said yet but TLS.
pub(super) struct Opened {
    pub(super) socket: Box<dyn Socket>,
    pub(super) encrypted: bool,
    pub(super) end_point: Option<Vec<u8>>,
}

/// What to do after a failed attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NextStep {
    /// The same address in the next way; if there is none, as `NextAddress`.
    NextWay,
    NextAddress,
    NextHost,
    /// Another host would not help: the settings or the login are wrong.
    GiveUp,
}

/// Decides as libpq does: a server that cannot be reached, or cannot serve
/// now, is passed over; one that turns *us* down ends the search.
pub(super) fn next_step(way: Way, error: &PgError) -> NextStep {
    match error {
        // No line of pg_hba.conf for this kind of connection: the other kind
        // may have one. Never after a wrong password (28P01).
        PgError::Server(error) if error.sqlstate == "28000" && way != Way::Tls => NextStep::NextWay,
        PgError::Tls { .. } | PgError::Closed { .. } if way == Way::TlsIfOffered => {
            NextStep::NextWay
        }
        PgError::Server(_) if error.is_transient() => NextStep::NextHost,
        PgError::Connect { .. } | PgError::Timeout { .. } | PgError::Closed { .. } => {
            NextStep::NextAddress
        }
        // A certificate is the host's own; another host may have a good one.
        PgError::Unsuitable { .. } | PgError::Tls { .. } => NextStep::NextHost,
        PgError::Server(_)
        | PgError::Auth { .. }
        | PgError::Settings(_)
        | PgError::Request(_)
        | PgError::Protocol { .. }
        | PgError::AllFailed(_) => NextStep::GiveUp,
    }
}

/// Returns the ways to try at one address, in order.
pub(super) fn ways(info: &ConnInfo, address: &Address) -> &'static [Way] {
    // As in libpq, TLS settings say nothing about Unix sockets.
    if matches!(address, Address::Unix(_)) {
        return &[Way::Plain];
    }
    match info.tls.mode {
        SslMode::Disable => &[Way::Plain],
        // Channel binding exists in TLS only.
        _ if info.channel_binding == ChannelBinding::Require => &[Way::Tls],
        SslMode::Allow => &[Way::Plain, Way::Tls],
        SslMode::Prefer => &[Way::TlsIfOffered, Way::Plain],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Way::Tls],
    }
}

/// Returns the addresses of a host; never empty.
pub(super) async fn addresses(info: &ConnInfo, host: &Host) -> Result<Vec<Address>, PgError> {
    let socket =
        |directory: PathBuf| Address::Unix(directory.join(format!(".s.PGSQL.{}", host.port)));
    let tcp = |ip: IpAddr| Address::Tcp(SocketAddr::new(ip, host.port));
    if let Some(ip) = host.address {
        return Ok(vec![tcp(ip)]);
    }
    let name = match &host.name {
        HostName::SocketDirectory(directory) => return Ok(vec![socket(directory.clone())]),
        HostName::DefaultSocket | HostName::AddressOnly => {
            return Ok(SOCKET_DIRECTORIES.map(|usual| socket(PathBuf::from(usual))).to_vec());
        }
        HostName::Name(name) => name,
    };
    if let Ok(ip) = name.parse() {
        return Ok(vec![tcp(ip)]);
    }
    let found = limited(info, &host.label(), "looking up the host name", async {
        let found = lookup_host((name.as_str(), host.port)).await;
        found.map_err(|cause| PgError::Connect { place: host.label(), cause })
    })
    .await?;
    let mut addresses = Vec::new();
    for address in found.map(Address::Tcp).take(ADDRESSES_MAX) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() {
        let cause = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
        return Err(PgError::Connect { place: host.label(), cause });
    }
    Ok(addresses)
}

/// Returns how messages call a place: the host as given, and the address where that adds something.
pub(super) fn place(host: &Host, address: &Address) -> String {
    match (address, &host.name) {
        (Address::Unix(path), _) => path.display().to_string(),
        (Address::Tcp(address), HostName::Name(name)) if name.parse::<IpAddr>().is_err() => {
            format!("{} ({})", host.label(), address.ip())
        }
        _ => host.label(),
    }
}

/// Opens a socket and sets up TLS as `way` says.
pub(super) async fn open(
    info: &ConnInfo,
    host: &Host,
    address: &Address,
    way: Way,
    place: &str,
) -> Result<Opened, PgError> {
    let failed = |cause| PgError::Connect { place: place.to_owned(), cause };
    let mut stream = match address {
        Address::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(failed)?;
            return Ok(Opened { socket: Box::new(stream), encrypted: false, end_point: None });
        }
        Address::Tcp(address) => TcpStream::connect(address).await.map_err(failed)?,
    };
    tune(&stream, &info.keepalives).map_err(failed)?;
    let encrypt = match way {
        Way::Plain => false,
        Way::Tls if info.tls.direct => true,
        Way::Tls | Way::TlsIfOffered => tls::is_offered(&mut stream, place).await?,
    };
    if encrypt {
        let secured = tls::secure(stream, &info.tls, host, place).await?;
        return Ok(Opened {
            socket: secured.stream,
            encrypted: true,
            end_point: secured.end_point,
        });
    }
    if way == Way::Tls {
        return Err(PgError::Tls {
            place: place.to_owned(),
            reason: "the server does not have TLS, and the settings demand it".to_owned(),
        });
    }
    Ok(Opened { socket: Box::new(stream), encrypted: false, end_point: None })
}

/// Lets the kernel find out that the peer is gone, and small messages leave at once.
fn tune(stream: &TcpStream, settings: &Keepalives) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if settings.enabled {
        let mut keepalive = TcpKeepalive::new();
        if let Some(idle) = settings.idle {
            keepalive = keepalive.with_time(idle);
        }
        if let Some(interval) = settings.interval {
            keepalive = keepalive.with_interval(interval);
        }
        if let Some(count) = settings.count {
            keepalive = keepalive.with_retries(count);
        }
        socket.set_tcp_keepalive(&keepalive)?;
    }
    #[cfg(target_os = "linux")]
    socket.set_tcp_user_timeout(settings.user_timeout)?;
    Ok(())
}

/// Runs `work` within the limit for one attempt.
pub(super) async fn limited<T>(
    info: &ConnInfo,
    place: &str,
    activity: &'static str,
    work: impl Future<Output = Result<T, PgError>>,
) -> Result<T, PgError> {
    let limit = info.connect_limit;
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(PgError::Timeout { place: place.to_owned(), activity, limit }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walsender::error::ServerError;

    fn server(sqlstate: &str) -> PgError {
        PgError::Server(Box::new(ServerError {
            sqlstate: sqlstate.to_owned(),
            ..ServerError::default()
        }))
    }

    #[test]
    fn a_wrong_password_is_never_tried_again_without_encryption_or_elsewhere() {
        for way in [Way::Plain, Way::TlsIfOffered, Way::Tls] {
            assert_eq!(next_step(way, &server("28P01")), NextStep::GiveUp);
        }
    }

    #[test]
    fn a_refused_kind_of_connection_leads_to_the_other_kind_unless_tls_is_demanded() {
        assert_eq!(next_step(Way::Plain, &server("28000")), NextStep::NextWay);
        assert_eq!(next_step(Way::TlsIfOffered, &server("28000")), NextStep::NextWay);
        assert_eq!(next_step(Way::Tls, &server("28000")), NextStep::GiveUp);
    }

    #[test]
    fn a_server_that_cannot_serve_now_is_passed_over() {
        for sqlstate in ["57P03", "53300"] {
            assert_eq!(next_step(Way::Plain, &server(sqlstate)), NextStep::NextHost);
        }
    }

    #[test]
    fn a_bad_certificate_never_leads_to_an_unencrypted_connection_where_tls_is_demanded() {
        let bad = PgError::Tls { place: String::new(), reason: String::new() };
        assert_eq!(next_step(Way::Tls, &bad), NextStep::NextHost);
    }
}

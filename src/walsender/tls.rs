//! TLS with a PostgreSQL server, with libpq's modes over rustls.
//!
//! ```text
//! client                                server
//! 00 00 00 08 04 D2 16 2F  ---------->           SSLRequest
//!                          <----------  'S'      TLS handshake follows
//!                                       'N'      no TLS here
//! ```
//!
//! Exactly one byte is read before the handshake, so nothing that arrives
//! early can be taken for a reply inside TLS (CVE-2021-23222): the handshake
//! meets it and fails. The crypto provider is always passed by hand, never
//! the process-wide default, so that no other crate can change it.
//!
//! Source: manual, "SSL Support" in libpq and "SSL Session Encryption" in the
//! protocol; `src/interfaces/libpq/fe-secure-openssl.c`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::certificate::{self, ServerVerifier, Trust};
use super::conninfo::{Host, HostName, RootCertificates, SslMode, TlsSettings, TlsVersion};
use super::error::PgError;

/// PostgreSQL 17+ checks this protocol name; older servers ignore it.
const ALPN: &[u8] = b"postgresql";

/// The most certificates that a root file may hold.
const ROOTS_MAX: usize = 4096;

/// An encrypted stream, and what identifies the server for channel binding.
#[derive(Debug)]
pub(super) struct Secured {
    pub(super) stream: Box<TlsStream<TcpStream>>,
    /// The `tls-server-end-point` data; `None` if the certificate's signature
    /// algorithm defines none.
    pub(super) end_point: Option<Vec<u8>>,
}

/// Asks whether the server has TLS. On `false` the connection is as it was.
pub(super) async fn is_offered(stream: &mut TcpStream, place: &str) -> Result<bool, PgError> {
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    let closed = |error: io::Error| PgError::Closed {
        place: place.to_owned(),
        reason: format!("it ended when asked for TLS: {error}"),
    };
    stream.write_all(&request).await.map_err(closed)?;
    match stream.read_u8().await.map_err(closed)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        // The text of an error here is unauthenticated, so it is not repeated
        // (CVE-2024-10977).
        b'E' => Err(refused(place, "the server answered the request for TLS with an error")),
        _ => Err(PgError::Protocol {
            place: place.to_owned(),
            reason: "the answer to the request for TLS is neither yes nor no".to_owned(),
        }),
    }
}

/// Does the handshake on a connection where the server awaits one.
///
/// Errors: `Tls` for anything about certificates or versions, `Settings`-like
/// problems with files among them; `Closed` if the connection broke.
pub(super) async fn secure(
    stream: TcpStream,
    settings: &TlsSettings,
    host: &Host,
    place: &str,
) -> Result<Secured, PgError> {
    let config = client_config(settings).map_err(|reason| refused(place, &reason))?;
    let name = server_name(host, &stream).map_err(|reason| refused(place, &reason))?;
    let stream = TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| handshake_failure(&error, settings, place))?;
    let session = stream.get_ref().1;
    if settings.direct && session.alpn_protocol() != Some(ALPN) {
        return Err(refused(place, "the server did not agree on the protocol name `postgresql`"));
    }
    let end_point =
        session.peer_certificates().and_then(<[_]>::first).and_then(certificate::server_end_point);
    Ok(Secured { stream: Box::new(stream), end_point })
}

/// Turns a broken read or write into our error: rustls reports refusals that
/// come after the handshake (as those of a client certificate do) this way.
pub(super) fn stream_failure(error: &io::Error, place: &str) -> PgError {
    match rustls_error(error) {
        Some(rustls::Error::AlertReceived(alert)) => refused(
            place,
            &format!(
                "the server ended TLS with the alert {alert:?} (was a client certificate \
                      missing or not accepted?)"
            ),
        ),
        Some(other) => refused(place, &other.to_string()),
        None => PgError::Closed {
            place: place.to_owned(),
            reason: match error.kind() {
                io::ErrorKind::UnexpectedEof => "it ended without a goodbye".to_owned(),
                _ => error.to_string(),
            },
        },
    }
}

fn refused(place: &str, reason: &str) -> PgError {
    PgError::Tls { place: place.to_owned(), reason: reason.to_owned() }
}

fn rustls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

fn handshake_failure(error: &io::Error, settings: &TlsSettings, place: &str) -> PgError {
    let Some(cause) = rustls_error(error) else {
        return PgError::Closed {
            place: place.to_owned(),
            reason: format!("it ended during the TLS handshake: {error}"),
        };
    };
    let advice = match cause {
        rustls::Error::InvalidCertificate(problem) => {
            certificate::advice(problem, &roots_label(settings))
        }
        _ => String::new(),
    };
    refused(place, &format!("{cause}{advice}"))
}

fn roots_label(settings: &TlsSettings) -> String {
    match &settings.roots {
        RootCertificates::File(path) | RootCertificates::Default(Some(path)) => {
            path.display().to_string()
        }
        RootCertificates::Default(None) => "the root certificates".to_owned(),
        RootCertificates::System => "the system's trusted certificates".to_owned(),
    }
}

/// The name that the certificate must bear, and that SNI announces if it is no address.
fn server_name(host: &Host, stream: &TcpStream) -> Result<ServerName<'static>, String> {
    match &host.name {
        HostName::Name(name) => ServerName::try_from(name.clone())
            .map_err(|_| format!("`{name}` is not a host name that a certificate can bear")),
        _ => stream
            .peer_addr()
            .map(|address| ServerName::IpAddress(address.ip().into()))
            .map_err(|error| error.to_string()),
    }
}

/// Builds the configuration, reading the certificate files anew: they may have been renewed.
fn client_config(settings: &TlsSettings) -> Result<ClientConfig, String> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> =
        Arc::new(ServerVerifier::new(&provider, trust(settings)?));
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions(settings))
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match client_certificate(settings)? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("the client certificate cannot be used: {error}"))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = settings.server_name_indication;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn versions(settings: &TlsSettings) -> Vec<&'static SupportedProtocolVersion> {
    [(TlsVersion::Tls12, &rustls::version::TLS12), (TlsVersion::Tls13, &rustls::version::TLS13)]
        .into_iter()
        .filter(|(version, _)| (settings.version_min..=settings.version_max).contains(version))
        .map(|(_, supported)| supported)
        .collect()
}

/// Decides whom to trust; like libpq, `require` checks the chain where a root file exists.
fn trust(settings: &TlsSettings) -> Result<Trust, String> {
    let verifies = settings.mode >= SslMode::VerifyCa;
    let certificates = match &settings.roots {
        RootCertificates::System => system_roots()?,
        RootCertificates::File(path) if settings.mode >= SslMode::Require => certificates(path)?,
        RootCertificates::Default(Some(path)) if verifies && !path.exists() => {
            return Err(format!(
                "the root certificate file {} does not exist; provide it, name another with \
                 sslrootcert (or `system`), or choose a mode that does not verify",
                path.display()
            ));
        }
        RootCertificates::Default(None) if verifies => {
            return Err(
                "no root certificates: name a file with sslrootcert, or `system`".to_owned()
            );
        }
        RootCertificates::Default(Some(path))
            if settings.mode >= SslMode::Require && path.exists() =>
        {
            certificates(path)?
        }
        _ => return Ok(Trust::Anyone),
    };
    let mut roots = RootCertStore::empty();
    // System stores hold odd certificates; a few that do not parse are no harm.
    let (usable, _) = roots.add_parsable_certificates(certificates.iter().cloned());
    if usable == 0 {
        return Err(format!("{} holds no usable certificate", roots_label(settings)));
    }
    let pinned = if settings.roots == RootCertificates::System { Vec::new() } else { certificates };
    Ok(Trust::Authorities {
        roots: Arc::new(roots),
        pinned,
        check_name: settings.mode == SslMode::VerifyFull,
    })
}

fn system_roots() -> Result<Vec<CertificateDer<'static>>, String> {
    let found = rustls_native_certs::load_native_certs();
    match found.errors.first() {
        Some(error) if found.certs.is_empty() => {
            Err(format!("the system's trusted certificates could not be read: {error}"))
        }
        _ => Ok(found.certs),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(|error| file_failure(path, &error))?
        .take(ROOTS_MAX)
        .collect::<Result<_, _>>()
        .map_err(|error| file_failure(path, &error))?;
    if certificates.is_empty() {
        return Err(format!("{} holds no PEM certificate", path.display()));
    }
    Ok(certificates)
}

type ClientCertificate = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Reads our certificate and its key: those named, else `~/.postgresql/postgresql.{crt,key}`.
fn client_certificate(settings: &TlsSettings) -> Result<Option<ClientCertificate>, String> {
    if !settings.show_certificate {
        return Ok(None);
    }
    let default = |name: &str| settings.directory.as_ref().map(|directory| directory.join(name));
    let default_certificate = default("postgresql.crt").filter(|path| path.exists());
    let Some(certificate) = settings.certificate.clone().or(default_certificate) else {
        return Ok(None);
    };
    let Some(key) = settings.key.clone().or_else(|| default("postgresql.key")) else {
        return Err("a client certificate is given but no key: name it with sslkey".to_owned());
    };
    let chain = certificates(&certificate)?;
    Ok(Some((chain, private_key(&key)?)))
}

fn private_key(path: &PathBuf) -> Result<PrivateKeyDer<'static>, String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path)
        .map_err(|error| format!("could not read the key {}: {error}", path.display()))?;
    // The rule of libpq: root may lend a key to a group, a user may not.
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(format!(
            "the key {} may be read by others; give it mode 0600 (or 0640 if root owns it)",
            path.display()
        ));
    }
    PrivateKeyDer::from_pem_file(path).map_err(|error| match error {
        pem::Error::NoItemsFound => format!(
            "{} holds no unencrypted PEM key (encrypted keys are not supported)",
            path.display()
        ),
        other => file_failure(path, &other),
    })
}

fn file_failure(path: &Path, error: &pem::Error) -> String {
    format!("could not read {}: {error}", path.display())
}

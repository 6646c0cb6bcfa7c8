//! Judging a server's certificate the way libpq does, over rustls.
//!
//! Chains are checked by webpki. Three things that PostgreSQL's manual tells
//! people to make, and that webpki alone refuses, are allowed for here:
//! a self-signed server certificate that *is* the root file; a host name in
//! the common name where there is no subjectAltName; and, in the modes that
//! verify nothing, a certificate of X.509 version 1.
//!
//! Never here: opening files or sockets.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::client::verify_server_name;
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
    verify_tls13_signature_with_raw_key,
};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_cert::Certificate;
use x509_cert::der::asn1::{PrintableStringRef, Utf8StringRef};
use x509_cert::der::{Decode, Encode};

/// `id-ce-subjectAltName` and `id-at-commonName` (RFC 5280).
const SUBJECT_ALT_NAME: &str = "2.5.29.17";
const COMMON_NAME: &str = "2.5.4.3";

/// Whom to believe.
#[derive(Debug)]
pub(super) enum Trust {
    /// Whoever answers: encryption without identity.
    Anyone,
    /// A certificate signed by one of `roots`, or equal to one of `pinned`.
    Authorities {
        roots: Arc<RootCertStore>,
        pinned: Vec<CertificateDer<'static>>,
        /// Whether the certificate must also bear the host's name.
        check_name: bool,
    },
}

/// The judge of one handshake.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    algorithms: WebPkiSupportedAlgorithms,
    trust: Trust,
}

impl ServerVerifier {
    pub(super) fn new(provider: &CryptoProvider, trust: Trust) -> Self {
        Self { algorithms: provider.signature_verification_algorithms, trust }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Trust::Authorities { roots, pinned, check_name } = &self.trust else {
            return Ok(ServerCertVerified::assertion());
        };
        // webpki never takes a certificate marked as an authority for a
        // server's own, which is what `openssl req -x509` makes.
        if pinned.iter().any(|known| known == end_entity) {
            check_validity(end_entity, now)?;
        } else {
            verify_server_cert_signed_by_trust_anchor(
                &ParsedCertificate::try_from(end_entity)?,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )?;
        }
        if *check_name {
            check_server_name(end_entity, server_name)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    // Signatures are verified in every mode: they prove that the server holds
    // the key of the certificate it shows, and channel binding rests on that.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if ParsedCertificate::try_from(cert).is_ok() {
            return verify_tls13_signature(message, cert, dss, &self.algorithms);
        }
        // Version 1 certificates: webpki does not parse them, their key is fine.
        let key = parse(cert)?
            .tbs_certificate
            .subject_public_key_info
            .to_der()
            .map_err(|_| Error::from(CertificateError::BadEncoding))?;
        let key = SubjectPublicKeyInfoDer::from(key);
        verify_tls13_signature_with_raw_key(message, &key, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn parse(certificate: &CertificateDer<'_>) -> Result<Certificate, Error> {
    Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding.into())
}

fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), Error> {
    let validity = parse(certificate)?.tbs_certificate.validity;
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    Ok(())
}

/// Checks the subjectAltName; only where there is none, the common name.
fn check_server_name(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> Result<(), Error> {
    let by_webpki =
        ParsedCertificate::try_from(certificate).and_then(|cert| verify_server_name(&cert, name));
    let Err(refusal) = by_webpki else { return Ok(()) };
    let parsed = parse(certificate)?;
    let extensions = parsed.tbs_certificate.extensions.as_deref().unwrap_or_default();
    if extensions.iter().any(|extension| extension.extn_id.to_string() == SUBJECT_ALT_NAME) {
        return Err(refusal);
    }
    let wanted = name.to_str();
    let fits = common_name(&parsed).is_some_and(|presented| match name {
        ServerName::DnsName(_) => name_fits(&presented, &wanted),
        _ => presented == wanted,
    });
    if fits { Ok(()) } else { Err(CertificateError::NotValidForName.into()) }
}

/// Returns the last common name of the subject, as OpenSSL's callers take it.
fn common_name(certificate: &Certificate) -> Option<String> {
    let mut parts = certificate.tbs_certificate.subject.0.iter().flat_map(|part| part.0.iter());
    let value = &parts.rfind(|part| part.oid.to_string() == COMMON_NAME)?.value;
    let text = match value.decode_as::<Utf8StringRef<'_>>() {
        Ok(text) => text.as_str().to_owned(),
        Err(_) => value.decode_as::<PrintableStringRef<'_>>().ok()?.as_str().to_owned(),
    };
    Some(text)
}

/// Compares as libpq's `wildcard_certificate_match`: no case, and a leading
/// `*.` stands for exactly one label.
fn name_fits(presented: &str, wanted: &str) -> bool {
    let presented = presented.to_ascii_lowercase();
    let wanted = wanted.to_ascii_lowercase();
    match presented.strip_prefix("*.") {
        Some(parent) => {
            wanted.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == parent)
        }
        None => presented == wanted,
    }
}

/// Returns the `tls-server-end-point` channel binding of a certificate: its
/// digest, by the hash of its own signature, with MD5 and SHA-1 raised to
/// SHA-256 (RFC 5929 section 4.1).
///
/// `None` where the RFC defines nothing (Ed25519), and for RSA-PSS, whose hash
/// stands in parameters that are not looked into.
pub(super) fn server_end_point(certificate: &CertificateDer<'static>) -> Option<Vec<u8>> {
    use aws_lc_rs::digest;
    let algorithm = Certificate::from_der(certificate).ok()?.signature_algorithm.oid.to_string();
    let hash = match algorithm.as_str() {
        // md5, sha1 and sha256 WithRSAEncryption; ecdsa-with-SHA1 and -SHA256
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => &digest::SHA256,
        // sha384WithRSAEncryption, ecdsa-with-SHA384
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => &digest::SHA384,
        // sha512WithRSAEncryption, ecdsa-with-SHA512
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => &digest::SHA512,
        _ => return None,
    };
    Some(digest::digest(hash, certificate).as_ref().to_vec())
}

/// Returns what to do about a refused certificate, or nothing.
pub(super) fn advice(problem: &CertificateError, roots: &str) -> String {
    match problem {
        CertificateError::UnknownIssuer => {
            format!(" (no authority in {roots} signed the server's certificate)")
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            " (the certificate does not bear the name given as `host`)".to_owned()
        }
        CertificateError::Other(other) if other.to_string().contains("UnsupportedCertVersion") => {
            " (the certificate is of X.509 version 1, which cannot be verified here; issue it \
             as version 3, with a subjectAltName)"
                .to_owned()
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_stands_for_exactly_one_label() {
        for (presented, wanted, fits) in [
            ("db.example.com", "DB.example.com", true),
            ("*.example.com", "db.example.com", true),
            ("*.example.com", "a.b.example.com", false),
            ("*.example.com", "example.com", false),
            ("*.example.com", ".example.com", false),
            ("db", "db2", false),
            ("*", "db", false),
        ] {
            assert_eq!(name_fits(presented, wanted), fits, "{presented} {wanted}");
        }
    }

    #[test]
    fn what_is_no_certificate_has_no_end_point() {
        assert_eq!(server_end_point(&CertificateDer::from(vec![0x30, 0x00])), None);
    }
}

//! Where a plane is, and how to be sure that it is the right one.
//!
//! On one machine: a unix socket, guarded by its file mode. Between machines: TLS 1.3 with the plane's own
//! certificate, whose BLAKE3 fingerprint every token carries, so that no certificate authority is needed.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use collective_model::Digest;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// The BLAKE3 of a certificate in DER form.
pub type Fingerprint = Digest;

/// The fingerprint of a certificate.
pub fn fingerprint(certificate: &CertificateDer) -> Fingerprint {
    Digest::of(certificate.as_ref())
}

/// Where a plane is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// On this machine.
    Unix(PathBuf),
    /// On another machine.
    Tls {
        /// `host:port`.
        address: String,
        /// The only certificate that is accepted.
        fingerprint: Fingerprint,
    },
}

/// What a token lets its bearer do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// Join once as a host.
    Join,
    /// Be a host.
    Host,
    /// Be a user.
    User,
}

/// A secret with the way to the plane: `KIND1_SECRET_FINGERPRINT_ADDRESS`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What it lets its bearer do.
    pub kind: TokenKind,
    /// 64 hexadecimal digits.
    pub secret: String,
    /// The plane's certificate.
    pub fingerprint: Fingerprint,
    /// `host:port`.
    pub address: String,
}

/// Why the plane cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// Nobody listens.
    #[error("cannot reach the plane at {endpoint}: {source}; is `collective up` running?")]
    Connect {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else listens, or TLS fails.
    #[error("cannot talk to the plane at {endpoint} securely: {source}")]
    Tls {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: std::io::Error,
    },
    /// Not a token.
    #[error("this is not a token: expected join1_..., host1_... or user1_..., as `collective token` prints it")]
    Token,
}

pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Endpoint {
    pub(crate) async fn connect(&self) -> Result<Box<dyn Stream>, EndpointError> {
        let connect = |source| EndpointError::Connect { endpoint: self.clone(), source };
        match self {
            Self::Unix(path) => Ok(Box::new(UnixStream::connect(path).await.map_err(connect)?)),
            Self::Tls { address, fingerprint } => {
                let tcp = TcpStream::connect(address).await.map_err(connect)?;
                let tls = |source| EndpointError::Tls { endpoint: self.clone(), source };
                tcp.set_nodelay(true).map_err(tls)?;
                notice_death(&tcp).map_err(tls)?;
                let config = client_config(*fingerprint).map_err(|e| tls(std::io::Error::other(e)))?;
                let name = ServerName::try_from("collective").map_err(|e| tls(std::io::Error::other(e)))?;
                let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
                Ok(Box::new(connector.connect(name, tcp).await.map_err(tls)?))
            }
        }
    }
}

/// Lets a connection fail within two minutes of its peer vanishing without a word, however long nothing is said: a tunnel
/// may be silent for days.
pub fn notice_death(tcp: &TcpStream) -> std::io::Result<()> {
    use rustix::net::sockopt;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(tcp, Duration::from_secs(15))?;
    Ok(sockopt::set_tcp_keepcnt(tcp, 4)?)
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tls { address, .. } => f.write_str(address),
        }
    }
}

impl FromStr for Token {
    type Err = EndpointError;
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let mut parts = text.trim().splitn(4, '_');
        let mut next = || parts.next().ok_or(EndpointError::Token);
        let kind = match next()? {
            "join1" => TokenKind::Join,
            "host1" => TokenKind::Host,
            "user1" => TokenKind::User,
            _ => return Err(EndpointError::Token),
        };
        let secret: Digest = next()?.parse().map_err(|_| EndpointError::Token)?;
        let fingerprint = next()?.parse().map_err(|_| EndpointError::Token)?;
        let address = next()?.to_owned();
        Ok(Self { kind, secret: secret.to_string(), fingerprint, address })
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            TokenKind::Join => "join1",
            TokenKind::Host => "host1",
            TokenKind::User => "user1",
        };
        write!(f, "{kind}_{}_{}_{}", self.secret, self.fingerprint, self.address)
    }
}

impl fmt::Debug for Token {
    /// Never the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} token for {}", self.kind, self.address)
    }
}

impl Token {
    /// The endpoint it leads to.
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::Tls { address: self.address.clone(), fingerprint: self.fingerprint }
    }
}

fn client_config(fingerprint: Fingerprint) -> Result<ClientConfig, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Pinned { fingerprint, provider: provider.clone() };
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok(builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth())
}

/// Accepts exactly one certificate.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = fingerprint(end_entity);
        if found == self.fingerprint {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(Error::General(format!(
                "its certificate has the fingerprint {}, and the token names {}: it is another plane, or somebody \
                 listens in between",
                found.short(),
                self.fingerprint.short()
            )))
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens() {
        let token = Token {
            kind: TokenKind::Join,
            secret: "ab".repeat(32),
            fingerprint: Digest::of(b"certificate"),
            address: "plane_1.example:7443".into(),
        };
        assert_eq!(token.to_string().parse::<Token>().unwrap(), token);
        assert!(!format!("{token:?}").contains("abab"));
        for bad in ["", "join1_x_y_z", "root1_a_b_c", &token.to_string()[..70]] {
            assert!(bad.parse::<Token>().is_err(), "{bad}");
        }
    }
}

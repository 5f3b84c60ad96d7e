//! Listening: the unix socket for this machine, TLS for all others. There is no plain TCP.

use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use collective_api::Fingerprint;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio_rustls::TlsAcceptor;

use crate::access::Way;
use crate::{Plane, PlaneError, http};

/// A peer that does not finish its TLS handshake in this time is dropped.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// The plane's own certificate. Its name means nothing: clients know its fingerprint.
pub struct Tls {
    certificate: CertificateDer<'static>,
    acceptor: TlsAcceptor,
}

impl Tls {
    /// Reads the certificate in `folder`, or makes one there.
    pub(crate) fn load_or_create(folder: &Path) -> Result<Self, PlaneError> {
        let error = |e: &dyn std::fmt::Display| PlaneError::Certificate(e.to_string());
        let (certificate_path, key_path) = (folder.join("certificate.pem"), folder.join("certificate.key"));
        if !certificate_path.exists() {
            let made = rcgen::generate_simple_self_signed(vec!["collective".into()]).map_err(|e| error(&e))?;
            write_private(&key_path, made.signing_key.serialize_pem().as_bytes()).map_err(|e| error(&e))?;
            write_private(&certificate_path, made.cert.pem().as_bytes()).map_err(|e| error(&e))?;
        }
        let certificate = CertificateDer::from_pem_file(&certificate_path).map_err(|e| error(&e))?;
        let key = PrivateKeyDer::from_pem_file(&key_path).map_err(|e| error(&e))?;
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| error(&e))?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key)
            .map_err(|e| error(&e))?;
        Ok(Self { certificate, acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// What tokens carry.
    pub fn fingerprint(&self) -> Fingerprint {
        collective_api::fingerprint(&self.certificate)
    }
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let part = path.with_extension("part");
    let mut file = std::fs::OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(part, path)
}

/// What a plane listens on.
pub struct Listening {
    /// The unix socket; an old one of a dead plane is replaced.
    pub socket: PathBuf,
    /// A TCP listener that is bound already.
    pub tcp: Option<TcpListener>,
}

/// Serves until the future is dropped.
pub async fn serve(plane: Plane, tls: Tls, listening: Listening) -> Result<(), PlaneError> {
    let at = |source| PlaneError::Listen { at: listening.socket.display().to_string(), source };
    let _ = std::fs::remove_file(&listening.socket);
    let unix = UnixListener::bind(&listening.socket).map_err(at)?;
    std::fs::set_permissions(&listening.socket, std::fs::Permissions::from_mode(0o600)).map_err(at)?;
    let routes = http::router(plane);
    let local = routes.clone().layer(Extension(Way::Local));
    let remote = routes.layer(Extension(Way::Remote));
    let over_unix = async {
        loop {
            match unix.accept().await {
                Ok((stream, _)) => converse(stream, local.clone()),
                Err(error) => pause(&error).await,
            }
        }
    };
    let over_tls = async {
        let Some(tcp) = &listening.tcp else { return std::future::pending().await };
        loop {
            match tcp.accept().await {
                Ok((stream, peer)) => {
                    let (acceptor, remote) = (tls.acceptor.clone(), remote.clone());
                    tokio::spawn(async move {
                        let _ = stream.set_nodelay(true).and_then(|()| collective_api::notice_death(&stream));
                        match tokio::time::timeout(HANDSHAKE_LIMIT, acceptor.accept(stream)).await {
                            Ok(Ok(stream)) => converse(stream, remote),
                            Ok(Err(error)) => refused(peer, &error.to_string()),
                            Err(_) => refused(peer, "it did not finish the handshake"),
                        }
                    });
                }
                Err(error) => pause(&error).await,
            }
        }
    };
    tokio::join!(over_unix, over_tls);
    Ok(())
}

fn refused(peer: SocketAddr, why: &str) {
    tracing::debug!(%peer, why, "a TLS connection was refused");
}

/// Out of descriptors, most likely: connections end, and then it goes on.
async fn pause(error: &std::io::Error) {
    tracing::warn!(%error, "cannot take a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn converse(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, routes: Router) {
    tokio::spawn(async move {
        let service = TowerToHyperService::new(routes);
        let builder = auto::Builder::new(TokioExecutor::new()).http1_only();
        if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
            tracing::debug!(error, "a connection ended");
        }
    });
}

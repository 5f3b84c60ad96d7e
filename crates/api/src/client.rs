//! A typed HTTP/1.1 client with a few kept connections.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HOST, RANGE, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Endpoint, EndpointError, Problem, TUNNEL_PROTOCOL};

/// An answer is at most this long, in bytes: a whole pack.
const MAX_ANSWER: usize = 80 << 20;
/// Connections kept for later.
const KEPT: usize = 8;
/// Longer than any long poll.
const LIMIT: Duration = Duration::from_secs(120);

/// A stream of bytes to the other end of a tunnel.
pub type Tunnel = TokioIo<Upgraded>;

/// A way to a plane. Requests may run side by side.
pub struct Client {
    endpoint: Endpoint,
    secret: Option<String>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The plane is not there.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The connection broke, or no answer came.
    #[error("the connection to the plane at {endpoint} failed: {why}")]
    Broken {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        why: String,
    },
    /// The plane says no; the text is for the user.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// Why.
        message: String,
    },
    /// The answer is not what the contract says.
    #[error("the plane's answer to {path} cannot be read: {why}; are its version and ours the same?")]
    Answer {
        /// What was asked.
        path: String,
        /// Why.
        why: String,
    },
}

impl ClientError {
    /// Whether asking again later may help.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Endpoint(_) | Self::Broken { .. } => true,
            Self::Refused { status, .. } => *status == 502 || *status == 503 || *status == 507,
            Self::Answer { .. } => false,
        }
    }

    /// The HTTP status, where the plane answered.
    pub fn status(&self) -> Option<u16> {
        if let Self::Refused { status, .. } = self { Some(*status) } else { None }
    }
}

impl Client {
    /// To `endpoint`, showing `secret` with every request.
    pub fn new(endpoint: Endpoint, secret: Option<String>) -> Self {
        Self { endpoint, secret, idle: Mutex::default() }
    }

    /// Another client to the same plane with the same rights, and connections of its own.
    pub fn another(&self) -> Self {
        Self::new(self.endpoint.clone(), self.secret.clone())
    }

    /// Where it leads.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// GET, JSON back.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(path, self.send(Method::GET, path, None, Bytes::new()).await?)
    }

    /// POST, JSON both ways.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.with_body(Method::POST, path, body).await
    }

    /// PUT, JSON both ways.
    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.with_body(Method::PUT, path, body).await
    }

    /// PATCH, JSON both ways.
    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.with_body(Method::PATCH, path, body).await
    }

    /// DELETE.
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(path, self.send(Method::DELETE, path, None, Bytes::new()).await?)
    }

    /// PUT of raw bytes.
    pub async fn put_bytes(&self, path: &str, body: Bytes) -> Result<(), ClientError> {
        self.send(Method::PUT, path, None, body).await.map(drop)
    }

    /// GET of some raw bytes.
    pub async fn get_range(&self, path: &str, range: std::ops::Range<u64>) -> Result<Bytes, ClientError> {
        let header = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        let bytes = self.send(Method::GET, path, Some(header), Bytes::new()).await?;
        if bytes.len() as u64 != range.end - range.start {
            let why = format!("asked for {} bytes, got {}", range.end - range.start, bytes.len());
            return Err(ClientError::Answer { path: path.to_owned(), why });
        }
        Ok(bytes)
    }

    /// POST that becomes a stream of bytes, on a connection of its own.
    pub async fn tunnel(&self, path: &str, body: &impl Serialize) -> Result<Tunnel, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.broken(e))?;
        let mut request = self.request(Method::POST, path).header(CONTENT_TYPE, "application/json");
        request = request.header(CONNECTION, "upgrade").header(UPGRADE, TUNNEL_PROTOCOL);
        let request = request.body(Full::new(body.into())).map_err(|e| self.broken(e))?;
        let exchange = async {
            let response = self.connect().await?.send_request(request).await.map_err(|e| self.broken(cause(&e)))?;
            if response.status() == StatusCode::SWITCHING_PROTOCOLS {
                return hyper::upgrade::on(response).await.map(TokioIo::new).map_err(|e| self.broken(cause(&e)));
            }
            let status = response.status();
            let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            Err(refused(path, status, &bytes.map_err(|e| self.broken(e))?.to_bytes()))
        };
        tokio::time::timeout(LIMIT, exchange).await.map_err(|_| self.broken("no answer within two minutes"))?
    }

    fn request(&self, method: Method, path: &str) -> hyper::http::request::Builder {
        let request = Request::builder().method(method).uri(path).header(HOST, "collective");
        match &self.secret {
            Some(secret) => request.header(AUTHORIZATION, format!("Bearer {secret}")),
            None => request,
        }
    }

    async fn with_body<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body =
            serde_json::to_vec(body).map_err(|e| ClientError::Answer { path: path.to_owned(), why: e.to_string() })?;
        self.json(path, self.send(method, path, None, body.into()).await?)
    }

    fn json<T: DeserializeOwned>(&self, path: &str, bytes: Bytes) -> Result<T, ClientError> {
        serde_json::from_slice(&bytes).map_err(|e| ClientError::Answer { path: path.to_owned(), why: e.to_string() })
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        ClientError::Broken { endpoint: self.endpoint.clone(), why: why.to_string() }
    }

    async fn send(&self, method: Method, path: &str, range: Option<String>, body: Bytes) -> Result<Bytes, ClientError> {
        let mut request = self.request(method, path);
        if !body.is_empty() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(range) = range {
            request = request.header(RANGE, range);
        }
        let request = request.body(Full::new(body)).map_err(|e| self.broken(e))?;
        let exchange = tokio::time::timeout(LIMIT, self.exchange(request));
        let (status, bytes) = exchange.await.map_err(|_| self.broken("no answer within two minutes"))??;
        if status.is_success() {
            return Ok(bytes);
        }
        Err(refused(path, status, &bytes))
    }

    async fn exchange(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), ClientError> {
        let mut connection = self.connection().await?;
        let response = connection.send_request(request).await.map_err(|e| self.broken(cause(&e)))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
        let bytes = body.map_err(|e| self.broken(e))?.to_bytes();
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(connection);
        }
        Ok((status, bytes))
    }

    async fn connection(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        loop {
            let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(mut kept) = kept else { break };
            if kept.ready().await.is_ok() {
                return Ok(kept);
            }
        }
        self.connect().await
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = self.endpoint.connect().await?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(cause(&e)))?;
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection to the plane ended");
            }
        });
        Ok(sender)
    }
}

fn refused(path: &str, status: StatusCode, body: &[u8]) -> ClientError {
    let message = match serde_json::from_slice::<Problem>(body) {
        Ok(problem) => problem.error,
        Err(_) => format!("the plane answered {status} to {path}"),
    };
    ClientError::Refused { status: status.as_u16(), message }
}

/// hyper's own words hide the reason one level down.
fn cause(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

//! Who is asking: the local socket is its owner's, everyone else shows a token.

use axum::extract::FromRequestParts;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use collective_model::{Digest, Name};

use crate::Plane;
use crate::problem::{Answer, Failure};

/// How the request came; attached to each connection's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// By the unix socket, which only its owner can open.
    Local,
    /// By TLS.
    Remote,
}

/// Who is asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The owner of the plane, or a user with a token.
    User,
    /// A host.
    Host(Name),
    /// Somebody who may become a host; with the hash of the token that allows it, if one was needed.
    Joiner(Option<Digest>),
}

impl FromRequestParts<Plane> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, plane: &Plane) -> Result<Self, Failure> {
        let way = parts.extensions.get::<Way>().copied().unwrap_or(Way::Remote);
        let header = parts.headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(secret) = header.and_then(|value| value.strip_prefix("Bearer ")) else {
            return match way {
                Way::Local => Ok(Self::User),
                Way::Remote => Err(Failure::forbidden("this needs a token; see `collective token create`")),
            };
        };
        let hash = Digest::of(secret.as_bytes());
        match plane.database().token_kind(&hash).await?.as_deref() {
            Some("user") => Ok(Self::User),
            Some("join") => Ok(Self::Joiner(Some(hash))),
            Some(kind) => match kind.strip_prefix("host:").map(str::parse) {
                Some(Ok(name)) => Ok(Self::Host(name)),
                _ => Err(Failure::forbidden("this token is of an unknown kind")),
            },
            None => Err(Failure::forbidden("this token is not known here, was used up, or was revoked")),
        }
    }
}

/// The plane's owner on its own machine: by the unix socket and without a token. A user's token, which may lie on many
/// machines, does not give away the owner's key.
pub struct AtHome;

impl FromRequestParts<Plane> for AtHome {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut Parts, _: &Plane) -> Result<Self, Failure> {
        let local = parts.extensions.get::<Way>() == Some(&Way::Local);
        match local && !parts.headers.contains_key(AUTHORIZATION) {
            true => Ok(Self),
            false => Err(Failure::forbidden(
                "the owner's key is for the plane's owner: run this on the plane's machine, by its local socket",
            )),
        }
    }
}

impl Caller {
    /// Users only.
    pub fn user(&self) -> Answer<()> {
        match self {
            Self::User => Ok(()),
            _ => Err(Failure::forbidden("this is for users, and the token is a host's")),
        }
    }

    /// Whoever may read what is published.
    pub fn reader(&self) -> Answer<()> {
        match self {
            Self::User | Self::Host(_) => Ok(()),
            Self::Joiner(_) => Err(Failure::forbidden("this token is for joining only")),
        }
    }

    /// Hosts only.
    pub fn host(&self) -> Answer<&Name> {
        match self {
            Self::Host(name) => Ok(name),
            _ => Err(Failure::forbidden("this is for hosts, and the token is not a host's")),
        }
    }

    /// Whoever may make a host: a joiner with the token that is used up, or the owner on this machine.
    pub fn joiner(&self) -> Answer<Option<Digest>> {
        match self {
            Self::Joiner(token) => Ok(*token),
            Self::User => Ok(None),
            Self::Host(_) => Err(Failure::forbidden("this host has joined already")),
        }
    }
}

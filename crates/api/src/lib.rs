//! The contract of the service plane: wire types, and a typed client over a unix socket or pinned TLS.
//!
//! The plane serves it, hosts and the command line use it, and nothing else is shared between them.

#![forbid(unsafe_code)]

mod client;
mod endpoint;
mod store;
mod wire;
mod wire_backup;
mod wire_operations;
mod wire_store;

pub use client::{Client, ClientError, Tunnel};
pub use endpoint::{Endpoint, EndpointError, Fingerprint, Token, TokenKind, fingerprint, notice_death};
pub use store::{PlaneStore, PrivateStore, StoreError};
pub use wire::*;
pub use wire_backup::*;
pub use wire_operations::*;
pub use wire_store::*;

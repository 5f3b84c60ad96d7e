//! Where packs come from, as a trait: the plane by HTTP, a directory, or a test that fails on purpose.

use std::ops::Range;

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

/// A pack as a version's pack list names it. The list is not signed: frames prove themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackInfo {
    /// Its name.
    pub digest: Digest,
    /// All of it, in bytes.
    pub size: u64,
    /// Its directory and trailer, its last bytes; 0 where this is not known.
    #[serde(default)]
    pub directory: u64,
}

/// Why a source does not give what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// It cannot be reached now; asking again later may help.
    #[error("the store cannot be reached: {0}")]
    Away(String),
    /// It answered, and the answer will not change by itself.
    #[error("the store refuses: {0}")]
    Refused(String),
}

/// A reader's view of a store.
pub trait Source: Send + Sync {
    /// The packs that hold a version's frames and pages.
    fn packs<'a>(
        &'a self,
        appliance: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>>;

    /// The same, asked for anew where lists are kept: packs are written again without what is not used any more.
    fn packs_anew<'a>(
        &'a self,
        appliance: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        self.packs(appliance, version)
    }

    /// Some bytes of a pack; exactly as many as asked for.
    fn read<'a>(
        &'a self,
        appliance: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>>;
}

/// Where the private packs of one instance are: its host puts them there and reads them back.
pub trait Vault: Source {
    /// Stores a pack; returning means that it is durable.
    fn put<'a>(&'a self, pack: &'a Digest, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>>;
}

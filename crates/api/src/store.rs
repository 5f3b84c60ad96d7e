//! The plane as a store: what a host reads, and where a maker puts packs.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use collective_model::{ApplianceName, Digest, InstanceId};
use collective_store::{PackInfo, Source, SourceError, Vault};
use futures_util::future::{BoxFuture, FutureExt};

use crate::{Client, ClientError, VersionDetail};

/// Reads versions through a plane, and keeps what never changes, so that a host goes on without it.
pub struct PlaneStore {
    client: Arc<Client>,
    kept: PathBuf,
}

/// Why a version is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The plane does not give it, and it was never seen here.
    #[error("cannot get version {version}: {source}")]
    Client {
        /// Which.
        version: Digest,
        /// Why.
        source: ClientError,
    },
    /// It cannot be kept.
    #[error("cannot keep version {version} in {}: {source}", path.display())]
    Keep {
        /// Which.
        version: Digest,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl PlaneStore {
    /// Through `client`, keeping versions in the folder `kept`.
    pub fn new(client: Arc<Client>, kept: &Path) -> Self {
        Self { client, kept: kept.to_owned() }
    }

    /// A version, from what was kept or from the plane. The caller verifies the manifest.
    pub async fn version(&self, version: &Digest) -> Result<VersionDetail, StoreError> {
        let path = self.kept.join(format!("{version}.json"));
        if let Ok(bytes) = std::fs::read(&path) {
            match serde_json::from_slice::<VersionDetail>(&bytes) {
                Ok(detail) if detail.manifest.digest() == *version => return Ok(detail),
                // A power cut may leave it cut short; the plane has it.
                _ => tracing::warn!(%version, "a kept version is damaged and is fetched again"),
            }
        }
        self.version_anew(version).await
    }

    /// The same from the plane in any case; what was kept stays if the plane does not answer.
    pub async fn version_anew(&self, version: &Digest) -> Result<VersionDetail, StoreError> {
        let path = self.kept.join(format!("{version}.json"));
        let detail: VersionDetail = self
            .client
            .get(&format!("/v1/versions/{version}"))
            .await
            .map_err(|source| StoreError::Client { version: *version, source })?;
        let keep = |source| StoreError::Keep { version: *version, path: path.clone(), source };
        let bytes = serde_json::to_vec(&detail).map_err(|e| keep(e.into()))?;
        std::fs::create_dir_all(&self.kept).map_err(keep)?;
        let part = path.with_extension(format!("part{}", std::process::id()));
        std::fs::write(&part, bytes).and_then(|()| std::fs::rename(&part, &path)).map_err(keep)?;
        Ok(detail)
    }
}

impl Source for PlaneStore {
    fn packs<'a>(
        &'a self,
        _: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async move { packs_of(self.version(version).await) }.boxed()
    }

    fn packs_anew<'a>(
        &'a self,
        _: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async move { packs_of(self.version_anew(version).await) }.boxed()
    }

    fn read<'a>(
        &'a self,
        appliance: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            let path = format!("/v1/appliances/{appliance}/packs/{pack}");
            self.client.get_range(&path, range).await.map_err(Into::into)
        }
        .boxed()
    }
}

fn packs_of(detail: Result<VersionDetail, StoreError>) -> Result<Vec<PackInfo>, SourceError> {
    match detail {
        Ok(detail) => Ok(detail.packs),
        Err(StoreError::Client { source, .. }) => Err(source.into()),
        Err(error) => Err(SourceError::Away(error.to_string())),
    }
}

/// The private packs of one instance, through a plane, with its host's rights.
pub struct PrivateStore {
    client: Arc<Client>,
    instance: InstanceId,
    packs: Vec<PackInfo>,
}

impl PrivateStore {
    /// `packs` are those that are read.
    pub fn new(client: Arc<Client>, instance: InstanceId, packs: Vec<PackInfo>) -> Self {
        Self { client, instance, packs }
    }

    fn path(&self, pack: &Digest) -> String {
        format!("/v1/private/{}/packs/{pack}", self.instance)
    }
}

impl Source for PrivateStore {
    /// Of whatever version: there is one list.
    fn packs<'a>(&'a self, _: &'a ApplianceName, _: &'a Digest) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async move { Ok(self.packs.clone()) }.boxed()
    }

    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move { self.client.get_range(&self.path(pack), range).await.map_err(Into::into) }.boxed()
    }
}

impl Vault for PrivateStore {
    fn put<'a>(&'a self, pack: &'a Digest, bytes: Bytes) -> BoxFuture<'a, Result<(), SourceError>> {
        async move { self.client.put_bytes(&self.path(pack), bytes).await.map_err(Into::into) }.boxed()
    }
}

impl From<ClientError> for SourceError {
    fn from(error: ClientError) -> Self {
        if error.is_away() { Self::Away(error.to_string()) } else { Self::Refused(error.to_string()) }
    }
}

//! The plane's side: packs kept in any object store, durable before they are acknowledged, never replaced.
//!
//! Objects: `packs/<publisher>/<appliance>/<digest>`. Packs lie below their appliance, because reading is granted by
//! appliance and never by knowing a digest.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use futures_util::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use crate::PackInfo;
use crate::pack::{self, PackError};

/// The persistent store behind a plane.
#[derive(Clone)]
pub struct Depot {
    objects: Arc<dyn ObjectStore>,
}

/// Why the store does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    /// The pack's bytes are not what its name says.
    #[error("pack {expected} is refused: its bytes have the digest {got}; send it again")]
    Name {
        /// As named.
        expected: Digest,
        /// As found.
        got: Digest,
    },
    /// The pack or a frame in it is not sound.
    #[error("pack {pack} is refused: {source}")]
    Unsound {
        /// Which.
        pack: Digest,
        /// Why.
        source: PackError,
    },
    /// There is no such pack.
    #[error("there is no pack {0} of this appliance")]
    Missing(Digest),
    /// The range is not within the pack.
    #[error("bytes {}-{} are not within the pack", .0.start, .0.end)]
    Range(Range<u64>),
    /// The backend failed.
    #[error("the object store failed: {0}")]
    Backend(#[source] object_store::Error),
    /// The backend has no space.
    #[error("the object store is full: {0}; free space and repeat the command")]
    Full(#[source] object_store::Error),
}

impl From<object_store::Error> for DepotError {
    fn from(error: object_store::Error) -> Self {
        let mut cause: Option<&dyn std::error::Error> = Some(&error);
        while let Some(inner) = cause {
            let io = inner.downcast_ref::<std::io::Error>();
            if io.is_some_and(|e| e.kind() == std::io::ErrorKind::StorageFull) {
                return Self::Full(error);
            }
            cause = inner.source();
        }
        Self::Backend(error)
    }
}

impl Depot {
    /// Over a local directory. Everything acknowledged is synced.
    pub fn local(root: &Path) -> Result<Self, DepotError> {
        let full = |source: std::io::Error| {
            DepotError::Backend(object_store::Error::Generic { store: "local", source: Box::new(source) })
        };
        std::fs::create_dir_all(root).map_err(full)?;
        let files = object_store::local::LocalFileSystem::new_with_prefix(root)?.with_fsync(true);
        Ok(Self { objects: Arc::new(files) })
    }

    fn key(appliance: &ApplianceName, pack: &Digest) -> Key {
        Key::from(format!("packs/{}/{}/{pack}", appliance.publisher, appliance.name))
    }

    /// Takes a pack after checking every frame in it that stands for itself. A pack that is there already stays as it
    /// is, unless it is damaged: then it is replaced.
    pub async fn put_pack(&self, appliance: &ApplianceName, pack: Digest, bytes: Bytes) -> Result<(), DepotError> {
        let checked = bytes.clone();
        let check = tokio::task::spawn_blocking(move || {
            let got = Digest::of(&checked);
            if got != pack {
                return Err(DepotError::Name { expected: pack, got });
            }
            pack::verify(&checked).map_err(|source| DepotError::Unsound { pack, source })
        });
        check.await.map_err(|panic| DepotError::Backend(object_store::Error::JoinError { source: panic }))??;
        let options = PutOptions { mode: PutMode::Create, ..Default::default() };
        let (key, payload) = (Self::key(appliance, &pack), PutPayload::from_bytes(bytes));
        match self.objects.put_opts(&key, payload.clone(), options).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => {
                let there = self.objects.get(&key).await?.bytes().await?;
                if Digest::of(&there) != pack {
                    self.objects.put(&key, payload).await?;
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// A pack's size in bytes.
    pub async fn pack_size(&self, appliance: &ApplianceName, pack: &Digest) -> Result<u64, DepotError> {
        match self.objects.head(&Self::key(appliance, pack)).await {
            Ok(meta) => Ok(meta.size),
            Err(object_store::Error::NotFound { .. }) => Err(DepotError::Missing(*pack)),
            Err(error) => Err(error.into()),
        }
    }

    /// A pack as lists name it.
    pub async fn pack_info(&self, appliance: &ApplianceName, digest: &Digest) -> Result<PackInfo, DepotError> {
        let size = self.pack_size(appliance, digest).await?;
        let unsound = |source| DepotError::Unsound { pack: *digest, source };
        let trailer = self.read(appliance, digest, size.saturating_sub(pack::TRAILER)..size).await?;
        let directory = pack::directory_range(&trailer, size).map_err(unsound)?;
        Ok(PackInfo { digest: *digest, size, directory: size - directory.start })
    }

    /// Some bytes of a pack.
    pub async fn read(&self, appliance: &ApplianceName, pack: &Digest, range: Range<u64>) -> Result<Bytes, DepotError> {
        let size = self.pack_size(appliance, pack).await?;
        if range.start >= range.end || range.end > size {
            return Err(DepotError::Range(range));
        }
        Ok(self.objects.get_range(&Self::key(appliance, pack), range).await?)
    }

    /// All packs, with their sizes in bytes. What is not named like a pack is passed over.
    pub async fn list(&self) -> Result<Vec<(ApplianceName, Digest, u64)>, DepotError> {
        let objects: Vec<object_store::ObjectMeta> = self.objects.list(Some(&Key::from("packs"))).try_collect().await?;
        let pack = |meta: object_store::ObjectMeta| {
            let parts: Vec<_> = meta.location.parts().map(|part| part.as_ref().to_owned()).collect();
            let [_, publisher, name, digest] = parts.as_slice() else { return None };
            Some((format!("{publisher}/{name}").parse().ok()?, digest.parse().ok()?, meta.size))
        };
        Ok(objects.into_iter().filter_map(pack).collect())
    }

    /// Removes a pack.
    pub async fn remove_pack(&self, appliance: &ApplianceName, pack: &Digest) -> Result<(), DepotError> {
        match self.objects.delete(&Self::key(appliance, pack)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

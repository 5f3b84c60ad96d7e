//! What a version is compared with: blocks of the one before, and its frames.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use collective_api::{Client, PlaneStore, VersionDetail};
use collective_model::{ApplianceName, Digest, Manifest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes};
use tokio::runtime::Handle;

use crate::connect::cache_dir;
use crate::ui::Ui;

/// What a version has, as a rule the newest, read back and verified, or remembered from when it was; and a way to its
/// frames.
pub(super) async fn known_blocks(
    ui: &Ui,
    client: &Client,
    appliance: &ApplianceName,
    base: Digest,
) -> Result<(KnownBlocks, Option<Bases>)> {
    let detail: VersionDetail = client.get(&format!("/v1/versions/{base}")).await?;
    let bases = Bases::of(client, appliance, &detail).await?;
    let mut known = KnownBlocks::new(bases.frames.clone());
    let bar = ui.bytes("comparing", detail.packs.iter().map(|pack| pack.size).sum());
    for pack in &detail.packs {
        let path = hashes_path(&pack.digest);
        let remembered = std::fs::read(&path).ok().and_then(|bytes| PackHashes::decode(&bytes));
        let hashes = match remembered {
            Some(hashes) => hashes,
            None => {
                let url = format!("/v1/appliances/{appliance}/packs/{}", pack.digest);
                let bytes = client.get_range(&url, 0..pack.size).await?;
                if Digest::of(&bytes) != pack.digest {
                    bail!("pack {} came back damaged from the store; run `collective verify {appliance}`", pack.digest);
                }
                let hashes = PackHashes::of(&bytes).with_context(|| format!("pack {}", pack.digest))?;
                remember(&path, &hashes);
                hashes
            }
        };
        known.learn(&pack.digest, &hashes);
        bar.inc(pack.size);
    }
    bar.finish_and_clear();
    Ok((known, Some(bases)))
}

/// The frames and pages of the newest version, read from the store through a cache of the maker's own.
pub(super) struct Bases {
    frames: HashSet<Digest>,
    store: FrameStore,
    runtime: Handle,
}

impl Bases {
    /// Bytes of frames that stay for the next publish.
    const KEPT: u64 = 1 << 30;

    async fn of(client: &Client, appliance: &ApplianceName, detail: &VersionDetail) -> Result<Self> {
        let manifest = Manifest::parse(detail.manifest.payload.as_bytes())?;
        let source = PlaneStore::new(Arc::new(client.another()), &cache_dir().join("versions"));
        let cache = Cache::open(&cache_dir()).context("cannot open the maker's cache")?;
        let store = FrameStore::new(cache, Arc::new(source));
        store.add_version(appliance, &detail.manifest.digest()).await;
        let mut frames = HashSet::new();
        // A host that updates has the disks of the version before, but not what ran on them.
        for disk in manifest.disk_images() {
            let map = ImageMap::load(&store, disk.image).await?;
            frames.extend(map.frames().chain(map.pages().iter().copied()));
        }
        Ok(Self { frames, store, runtime: Handle::current() })
    }
}

impl BaseReader for Bases {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        let read = self.runtime.block_on(self.store.read_all(frames));
        read.map_err(|error| io::Error::other(format!("cannot compare with the version before: {error}")))
    }
}

impl Drop for Bases {
    fn drop(&mut self) {
        if let Err(error) = self.store.cache().evict(Self::KEPT, &HashSet::new()) {
            tracing::debug!(%error, "the maker's cache cannot be trimmed");
        }
    }
}

pub(super) fn hashes_path(pack: &Digest) -> PathBuf {
    cache_dir().join("blocks").join(pack.to_string())
}

/// Only saves time later, so a failure is no failure.
pub(super) fn remember(path: &Path, hashes: &PackHashes) {
    let part = path.with_extension(format!("part{}", std::process::id()));
    let write = || -> io::Result<()> {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        std::fs::write(&part, hashes.encode())?;
        std::fs::rename(&part, path)
    };
    if let Err(error) = write() {
        tracing::debug!(%error, "block hashes cannot be remembered");
    }
}

//! A disk of a machine that is off, as a stream: only this process knows how images and layers become a disk.

use std::io;
use std::sync::Arc;

use collective_model::Name;
use collective_model::run::{RunConfig, RunDisk, RunImage};
use collective_store::cache::Cache;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::ImageMap;
use collective_store::sparse;
use collective_volume::Disk;
use tokio::io::AsyncWrite;

use crate::OpenSource;

/// Writes disk `name` of the machine that `config` describes to `out`, as [`sparse`] says. Nothing may run on it.
pub(crate) async fn send(
    config: &RunConfig,
    name: &Name,
    open_source: &OpenSource,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), String> {
    let found = config.disks.iter().find(|disk| disk.name == *name);
    let found = found.ok_or_else(|| format!("it has no disk \"{name}\""))?;
    let cache = Cache::open(&config.cache).map_err(|e| format!("cannot open the host's cache: {e}"))?;
    let store = Arc::new(FrameStore::new(cache, open_source(config)?));
    let disk = open(found, store).await.map_err(|e| format!("disk \"{name}\" cannot be opened: {e}"))?;
    copy(&disk, out).await.map_err(|e| format!("disk \"{name}\" cannot be sent: {e}"))
}

pub(crate) async fn open(disk: &RunDisk, store: Arc<FrameStore>) -> io::Result<Disk> {
    let image = image(disk.image.as_ref(), &store).await.map_err(io::Error::other)?;
    // A top layer that was never needed does not exist, and holds nothing.
    let missing = disk.layers.last().is_some_and(|top| disk.create_top && !top.exists());
    let layers = &disk.layers[..disk.layers.len() - usize::from(missing)];
    Disk::open(disk.size, image, store, layers).map_err(io::Error::other)
}

/// The index of an image.
pub(crate) async fn image(of: Option<&RunImage>, store: &Arc<FrameStore>) -> Result<Option<Arc<ImageMap>>, FetchError> {
    let Some(of) = of else { return Ok(None) };
    store.add_version(&of.appliance, &of.version).await;
    Ok(Some(Arc::new(ImageMap::load(store, of.root).await?)))
}

async fn copy(disk: &Disk, out: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut offset = 0;
    while offset < disk.size() {
        let length = (disk.size() - offset).min(sparse::MAX_RECORD_BYTES as u64);
        let part = disk.read(offset, length as usize).await?;
        sparse::write_part(out, offset, &part).await?;
        offset += length;
    }
    sparse::write_end(out, disk.size()).await
}

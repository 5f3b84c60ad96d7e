//! `collective mount`: the disks of a published version as files, without a machine, for whoever wants to look or to check.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use collective_api::{Client, PlaneStore};
use collective_model::{ByteSize, Manifest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_volume::{Disk, File, Layer, Mount as Volume};
use tokio::runtime::Handle;

use super::catalogue::{resolve, trusted};
use super::up::stop_signal;
use crate::connect::cache_dir;
use crate::ui::Ui;

/// Show the disks of a version as files
///
/// Each disk is a raw file in DIR, which any program can read: fsck, qemu-img, mount -o loop. What is read is fetched, once, and
/// verified. What is written goes into a folder of its own, and is gone in the end. Ends on Ctrl-C or SIGTERM.
///
/// Example: collective mount demo/notes:1 /mnt
#[derive(Debug, clap::Args)]
pub struct Mount {
    /// demo/notes, demo/notes:2, demo/notes:beta or demo/notes@DIGEST
    #[arg(value_name = "REF")]
    reference: String,
    /// An empty folder
    dir: PathBuf,
    /// Where writes go until the end [default: the folder for temporary files]
    #[arg(long, value_name = "FOLDER")]
    scratch: Option<PathBuf>,
}

impl Mount {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let stop = stop_signal()?;
        let (detail, manifest) = resolve(client, &self.reference.parse()?).await?;
        trusted(client, &detail, &manifest).await?;
        let mut entries = std::fs::read_dir(&self.dir).with_context(|| format!("cannot use {}", self.dir.display()))?;
        if entries.next().is_some() {
            bail!("{} is not empty; name another folder", self.dir.display());
        }
        let scratch = self.scratch.clone().unwrap_or_else(std::env::temp_dir);
        let scratch = tempfile::Builder::new().prefix("collective-mount-").tempdir_in(&scratch);
        let scratch = scratch.context("cannot make a folder for what is written")?;
        let cache = Cache::open(&cache_dir()).context("cannot open the cache")?;
        let source = PlaneStore::new(Arc::new(client.another()), &cache_dir().join("versions"));
        let store = Arc::new(FrameStore::new(cache, Arc::new(source)));
        store.add_version(&manifest.appliance, &detail.manifest.digest()).await;
        let files = open(&manifest, &store, scratch.path()).await?;
        let names: Vec<_> = files.iter().map(|file| (file.name.clone(), file.disk.size())).collect();
        let volume = Volume::new(&self.dir, files, None, Handle::current())?;
        let value = serde_json::json!({
            "dir": self.dir,
            "disks": names.iter().map(|(name, size)| serde_json::json!({ "name": name, "size": size }))
                .collect::<Vec<_>>(),
        });
        ui.data(&value, |ui| {
            for (name, size) in &names {
                ui.line(format!("{} ({})", self.dir.join(name).display(), ByteSize(*size)));
            }
        });
        ui.hint("Ctrl-C ends it");
        stop.await;
        let dir = self.dir.display();
        volume.unmount().with_context(|| {
            format!("{dir} was in use: unmount what was opened from there, then run `umount {dir}`, for nothing can be read there now")
        })
    }
}

async fn open(manifest: &Manifest, store: &Arc<FrameStore>, scratch: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    for disk in &manifest.disks {
        let wrong = || format!("cannot open disk \"{}\"", disk.name);
        let layer = scratch.join(disk.name.as_str());
        Layer::create(&layer, disk.size.0).with_context(wrong)?;
        let image = match disk.image {
            Some(root) => Some(Arc::new(ImageMap::load(store, root).await.with_context(wrong)?)),
            None => None,
        };
        let opened = Disk::open(disk.size.0, image, store.clone(), &[layer]).with_context(wrong)?;
        files.push(File { name: disk.name.to_string(), disk: Arc::new(opened), backing: None, waits: None });
    }
    Ok(files)
}

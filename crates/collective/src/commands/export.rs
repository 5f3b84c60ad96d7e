//! `collective export`: a published disk as an ordinary file, so that nobody is locked in.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use collective_api::{Client, PlaneStore};
use collective_model::{ByteSize, Disk, DiskRole, Manifest, Name, Reference};
use collective_store::BLOCK;
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};

use super::catalogue::{resolve, trusted};
use crate::ui::Ui;

/// Write a published disk into a file that other hypervisors take
///
/// FILE ends in .raw or .img (raw, with holes) or .qcow2. Every frame is verified, and FILE appears when it is whole.
///
/// Example: collective export demo/notes:1 notes.qcow2
#[derive(Debug, clap::Args)]
pub struct Export {
    /// demo/notes, demo/notes:2, demo/notes:beta or demo/notes@DIGEST
    reference: String,
    /// The file to write; it must not exist
    file: PathBuf,
    /// Which disk [default: the first system disk, else the first disk]
    #[arg(long, value_name = "NAME")]
    disk: Option<Name>,
}

impl Export {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let reference = reference(&self.reference)?;
        let qcow2 = is_qcow2(&self.file)?;
        if self.file.symlink_metadata().is_ok() {
            bail!("{} is there already; remove it or name another file", self.file.display());
        }
        let (detail, manifest) = resolve(client, &reference).await?;
        let disk = choose(&manifest, self.disk.as_ref())?;
        trusted(client, &detail, &manifest).await?;
        // Beside the file, so that the last step is a rename.
        let beside = match self.file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = tempfile::Builder::new().prefix(".export-").tempdir_in(beside);
        let folder = folder.with_context(|| format!("cannot write beside {}", self.file.display()))?;
        let source = PlaneStore::new(Arc::new(client.another()), &folder.path().join("versions"));
        let store = FrameStore::new(Cache::open(folder.path())?, Arc::new(source));
        store.add_version(&manifest.appliance, &detail.manifest.digest()).await;
        let raw = folder.path().join("disk.raw");
        write_disk(ui, &store, disk, &raw).await.with_context(|| format!("cannot export disk \"{}\"", disk.name))?;
        let whole = if qcow2 { folder.path().join("disk.qcow2") } else { raw.clone() };
        if qcow2 {
            collective_maker::raw_to_qcow2(&raw, &whole)?;
        }
        let finish = || File::open(&whole)?.sync_all().and_then(|()| std::fs::rename(&whole, &self.file));
        finish().with_context(|| format!("cannot finish {}", self.file.display()))?;
        let value = serde_json::json!({
            "reference": reference.to_string(), "digest": detail.manifest.digest(), "disk": disk.name,
            "size": disk.size, "file": self.file,
        });
        ui.data(&value, |ui| {
            let size = ByteSize(disk.size.0);
            ui.line(format!("disk \"{}\" of {reference} ({size}) is in {}", disk.name, self.file.display()));
        });
        Ok(())
    }
}

fn reference(text: &str) -> Result<Reference> {
    if !text.contains('/') {
        bail!(
            "cannot export \"{text}\": it is the name of an instance, and only published versions can be exported yet; \
             write publisher/name, such as demo/notes:1"
        );
    }
    Ok(text.parse()?)
}

fn is_qcow2(file: &Path) -> Result<bool> {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("qcow2") => Ok(true),
        Some("raw" | "img") => Ok(false),
        _ => bail!("cannot tell the format of {}: end its name in .raw, .img or .qcow2", file.display()),
    }
}

fn choose<'a>(manifest: &'a Manifest, wanted: Option<&Name>) -> Result<&'a Disk> {
    let disks = &manifest.disks;
    let found = match wanted {
        Some(name) => disks.iter().find(|disk| disk.name == *name),
        None => disks.iter().find(|disk| disk.role == DiskRole::System).or(disks.first()),
    };
    let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
    found.ok_or_else(|| anyhow!("{} has no such disk; it has: {}", manifest.appliance, names.join(", ")))
}

/// The disk as a raw file with holes where it has zeros.
async fn write_disk(ui: &Ui, store: &FrameStore, disk: &Disk, path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    file.set_len(disk.size.0)?;
    let Some(image) = disk.image else { return Ok(()) };
    let map = ImageMap::load(store, image).await?;
    let frames: Vec<_> = map.frames().collect();
    let bar = ui.bytes("fetching", store.lack(&frames).await?.bytes);
    store.prefetch(&frames, &|bytes| bar.inc(bytes)).await?;
    bar.finish_and_clear();
    let mut block = 0;
    while block < map.blocks() {
        match map.run_at(block) {
            Run::Zeros(blocks) => block += blocks,
            Run::Frame { digest, length, offset, blocks } => {
                let content = store.frame(&digest, length).await?;
                let from = usize::from(offset) * BLOCK as usize;
                // The last block may reach beyond the end of the disk.
                let end = disk.size.0.min(map.size).saturating_sub(block * BLOCK).min(blocks * BLOCK);
                let part = content.get(from..from + end as usize);
                file.write_all_at(part.context("the index points beyond a frame")?, block * BLOCK)?;
                block += blocks;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_cannot_be_exported() {
        assert!(reference("notes").unwrap_err().to_string().contains("instance"));
        assert!(reference("demo/notes:1").is_ok());
        assert!(is_qcow2(Path::new("a.qcow2")).unwrap() && !is_qcow2(Path::new("a.img")).unwrap());
        assert!(is_qcow2(Path::new("a.vmdk")).is_err());
    }
}

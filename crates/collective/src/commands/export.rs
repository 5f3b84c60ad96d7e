//! `collective export`: a published version or an instance as an ordinary file, so that nobody is locked in.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use collective_api::{Client, PlaneStore, TunnelTarget};
use collective_maker::{Export as Machine, ExportDisk, ExportFormat};
use collective_model::{ByteSize, Digest, Disk, DiskRole, Name};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};
use collective_store::{BLOCK, sparse};

use super::catalogue::{manifest_of, resolve, trusted};
use crate::ui::Ui;

/// Write a published version or an instance into a file that other hypervisors take
///
/// FILE ends in .ova (the machine with all its disks, for VirtualBox, VMware and others), or, for one disk, in .raw or
/// .img (raw, with holes) or .qcow2. Every frame is verified, and FILE appears when it is whole. An instance has to be
/// off; its disks come with all that it wrote.
///
/// Example: collective export demo/notes:1 notes.qcow2
#[derive(Debug, clap::Args)]
pub struct Export {
    /// demo/notes, demo/notes:2, demo/notes:beta or demo/notes@DIGEST; or the name of an instance
    #[arg(value_name = "INSTANCE_OR_VERSION")]
    what: String,
    /// The file to write; it must not exist
    file: PathBuf,
    /// Which disk, if FILE is to have one [default: the first system disk, else the first disk]
    #[arg(long, value_name = "NAME")]
    disk: Option<Name>,
}

impl Export {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let format = format(&self.file, self.disk.as_ref())?;
        if self.file.symlink_metadata().is_ok() {
            bail!("{} is there already; remove it or name another file", self.file.display());
        }
        // Beside the file, so that the disks are where there has to be room for them anyway.
        let beside = match self.file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder = tempfile::Builder::new().prefix(".export-").tempdir_in(beside);
        let folder = folder.with_context(|| format!("cannot write beside {}", self.file.display()))?;
        let machine = if self.what.contains('/') {
            self.version(ui, client, format, folder.path()).await?
        } else {
            self.instance(ui, client, format, folder.path()).await?
        };
        let disks: Vec<_> = machine.disks.iter().map(|disk| (disk.name.clone(), size_of(&disk.raw))).collect();
        collective_maker::export(&machine, &self.file, format, &mut |line| ui.hint(line))?;
        let value = serde_json::json!({
            "from": self.what, "file": self.file,
            "disks": disks.iter().map(|(name, size)| serde_json::json!({ "name": name, "size": size }))
                .collect::<Vec<_>>(),
        });
        ui.data(&value, |ui| {
            let named = disks.iter().map(|(name, size)| format!("disk \"{name}\" ({})", ByteSize(*size)));
            let named = named.collect::<Vec<_>>().join(", ");
            ui.line(format!("{} is in {}: {named}", self.what, self.file.display()));
        });
        Ok(())
    }

    /// Fetches the disks of a published version.
    async fn version(&self, ui: &Ui, client: &Client, format: ExportFormat, folder: &Path) -> Result<Machine> {
        let (detail, manifest) = resolve(client, &self.what.parse()?).await?;
        trusted(client, &detail, &manifest).await?;
        let source = PlaneStore::new(Arc::new(client.another()), &folder.join("versions"));
        let store = FrameStore::new(Cache::open(folder)?, Arc::new(source));
        store.add_version(&manifest.appliance, &detail.manifest.digest()).await;
        let known: Vec<_> = manifest.disks.iter().map(|disk| (disk.name.clone(), disk.role)).collect();
        let mut disks = Vec::new();
        for index in choose(&known, format, self.disk.as_ref())? {
            let disk = &manifest.disks[index];
            let raw = folder.join(format!("{}.raw", disk.name));
            let written = write_disk(ui, &store, disk, &raw).await;
            written.with_context(|| format!("cannot export disk \"{}\"", disk.name))?;
            disks.push(ExportDisk { name: disk.name.clone(), role: disk.role, raw });
        }
        Ok(Machine { name: manifest.appliance.name, summary: manifest.summary, hardware: manifest.hardware, disks })
    }

    /// Takes the disks of an instance from its host.
    async fn instance(&self, ui: &Ui, client: &Client, format: ExportFormat, folder: &Path) -> Result<Machine> {
        let name: Name = self.what.parse()?;
        let view = super::instance(client, &name).await?;
        let seen = view.observed.as_ref().filter(|seen| !seen.disks.is_empty());
        let seen = seen.with_context(|| format!("{name} was never started, and has no disks yet"))?;
        let manifest = manifest_of(client, &seen.version).await?;
        let mut hardware = manifest.hardware;
        hardware.cpus = view.spec.cpus.unwrap_or(hardware.cpus);
        hardware.memory = view.spec.memory.unwrap_or(hardware.memory);
        let known: Vec<_> = seen.disks.iter().map(|disk| (disk.name.clone(), disk.role)).collect();
        let mut disks = Vec::new();
        for index in choose(&known, format, self.disk.as_ref())? {
            let disk = &seen.disks[index];
            let raw = folder.join(format!("{}.raw", disk.name));
            let taken = take_disk(ui, client, &name, &disk.name, disk.size, &raw).await;
            taken.with_context(|| format!("cannot export disk \"{}\" of {name}", disk.name))?;
            disks.push(ExportDisk { name: disk.name.clone(), role: disk.role, raw });
        }
        Ok(Machine { name, summary: manifest.summary, hardware, disks })
    }
}

fn size_of(raw: &Path) -> u64 {
    raw.metadata().map_or(0, |meta| meta.len())
}

fn format(file: &Path, disk: Option<&Name>) -> Result<ExportFormat> {
    match ExportFormat::of(file) {
        Some(ExportFormat::Ova) if disk.is_some() => {
            bail!("an OVA has all disks of the machine; leave out --disk, or end the file's name in .raw or .qcow2")
        }
        Some(format) => Ok(format),
        None => bail!("cannot tell the format of {}: end its name in .ova, .qcow2, .raw or .img", file.display()),
    }
}

/// Which of the disks the file gets.
fn choose(known: &[(Name, DiskRole)], format: ExportFormat, wanted: Option<&Name>) -> Result<Vec<usize>> {
    if format == ExportFormat::Ova {
        return Ok((0..known.len()).collect());
    }
    let found = match wanted {
        Some(wanted) => known.iter().position(|(name, _)| name == wanted),
        None => known.iter().position(|(_, role)| *role == DiskRole::System).or(Some(0)),
    };
    let names: Vec<_> = known.iter().map(|(name, _)| name.as_str()).collect();
    Ok(vec![found.ok_or_else(|| anyhow!("there is no such disk; there are: {}", names.join(", ")))?])
}

/// A disk of an instance as a raw file with holes where it has zeros.
async fn take_disk(ui: &Ui, client: &Client, name: &Name, disk: &Name, size: u64, path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    file.set_len(size)?;
    let mut stream = super::reach::tunnel(client, name, &TunnelTarget::Disk { disk: disk.clone() }).await?;
    let bar = ui.bytes("fetching", 0);
    sparse::read_into(&mut stream, &file, size, &|bytes| bar.inc(bytes)).await?;
    bar.finish_and_clear();
    Ok(())
}

/// The disk as a raw file with holes where it has zeros.
async fn write_disk(ui: &Ui, store: &FrameStore, disk: &Disk, path: &Path) -> Result<()> {
    let file = File::create_new(path)?;
    file.set_len(disk.size.0)?;
    let Some(image) = disk.image else { return Ok(()) };
    let map = ImageMap::load(store, image).await?;
    let frames: Vec<_> = map.frames().collect();
    let places = places(&map);
    // The last block may reach beyond the end of the disk.
    let end = disk.size.0.min(map.size);
    let take = move |frame: &Digest, content: &[u8]| {
        for (at, from, length) in places.get(frame).into_iter().flatten() {
            let part = content.get(*from..from + (*length).min(end.saturating_sub(*at)) as usize);
            let part = part.ok_or_else(|| io::Error::other("the index points beyond a frame"))?;
            file.write_all_at(part, *at)?;
        }
        Ok(())
    };
    let bar = ui.bytes("fetching", store.lack(&frames).await?.bytes);
    store.deliver(&frames, Arc::new(take), &|bytes| bar.inc(bytes)).await?;
    bar.finish_and_clear();
    Ok(())
}

/// Where a disk has the content of each frame: offset on the disk, offset in the frame, length, in bytes.
fn places(map: &ImageMap) -> HashMap<Digest, Vec<(u64, usize, u64)>> {
    let mut places: HashMap<Digest, Vec<_>> = HashMap::new();
    let mut block = 0;
    while block < map.blocks() {
        block += match map.run_at(block) {
            Run::Zeros(blocks) => blocks,
            Run::Frame { digest, offset, blocks, .. } => {
                let place = (block * BLOCK, usize::from(offset) * BLOCK as usize, blocks * BLOCK);
                places.entry(digest).or_default().push(place);
                blocks
            }
        };
    }
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_cannot_be_exported() {
        assert_eq!(format(Path::new("a.ova"), None).unwrap(), ExportFormat::Ova);
        let disk = "system".parse().unwrap();
        assert_eq!(format(Path::new("a.img"), Some(&disk)).unwrap(), ExportFormat::Raw);
        assert!(format(Path::new("a.ova"), Some(&disk)).unwrap_err().to_string().contains("--disk"));
        assert!(format(Path::new("a.vmdk"), None).unwrap_err().to_string().contains(".ova"));
        let known = [("data".parse().unwrap(), DiskRole::Data), (disk.clone(), DiskRole::System)];
        assert_eq!(choose(&known, ExportFormat::Raw, None).unwrap(), [1]);
        assert_eq!(choose(&known[..1], ExportFormat::Raw, None).unwrap(), [0]);
        assert_eq!(choose(&known, ExportFormat::Ova, None).unwrap(), [0, 1]);
        assert!(choose(&known[..1], ExportFormat::Raw, Some(&disk)).unwrap_err().to_string().contains("data"));
    }
}

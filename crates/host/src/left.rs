//! What this host keeps of instances that went elsewhere, so that only what changed has to come when they come back.
//!
//! ```text
//! left/ID/left.json       which layers were what, and when it left
//! left/ID/layers/         the layers of its disks and its memory, as they were
//! left/ID/backup-hashes/  keyed names of the blocks of its packs, if it was in the store
//! ```
//! It is cache. It has no record, so it can never be started or taken for the instance: the folder of an instance becomes this
//! in one rename, from which on no daemon takes it up. It is as readable as it was, by root alone. It goes before anything else
//! of the cache where room is needed, when the instance is deleted or back, and after [`KEEP_FOR`].

use std::collections::HashSet;
use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_model::kept::{KeptCopy, KeptPart};
use collective_model::run::RunImage;
use collective_model::run_live::MEMORY;
use collective_model::{InstanceId, Name, Timestamp};
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::files::{create_folder, read_json, write_json};
use crate::instance::Instance;
use crate::leaving::Hello;
use crate::private::HASHES;
use crate::record::{DiskRecord, Record, layer_path};

/// Who did not come back by then has changed too much.
const KEEP_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// Nothing is kept where the file system has less space left, in bytes: guests need it to write.
const SPACE_FOR_OTHERS: u64 = 1 << 30;
/// The plane is asked for so many of them.
const MOST: usize = 64;
const DESCRIPTION: &str = "left.json";

/// What is kept of one instance.
#[derive(Debug, Serialize, Deserialize)]
struct Left {
    at: Timestamp,
    disks: Vec<LeftDisk>,
    memory: Option<LeftDisk>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct LeftDisk {
    /// None: the memory.
    name: Option<Name>,
    size: u64,
    image: Option<RunImage>,
    layers: Vec<u64>,
}

impl Left {
    /// Of an instance that leaves now; `memory` has what its machine had of its own as it left running.
    fn of(record: &Record, memory: Option<(u64, u64)>) -> Self {
        let rests = record.suspended.as_ref();
        let disk = |disk: &DiskRecord| LeftDisk {
            name: Some(disk.name.clone()),
            size: disk.size,
            image: None,
            layers: disk.layers.clone(),
        };
        let at_rest = rests.map(|suspended| LeftDisk {
            name: None,
            size: suspended.machine.memory_mib << 20,
            image: suspended.machine.image.clone(),
            layers: suspended.machine.memory.clone(),
        });
        let running = memory.map(|(layer, size)| {
            let below = record.memory.iter().position(|layer| Some(*layer) == record.base).map_or(0, |base| base + 1);
            let layers = record.memory[..below].iter().copied().chain([layer]).collect();
            LeftDisk { name: None, size, image: record.memory_image.clone(), layers }
        });
        Self {
            at: Timestamp::now(),
            disks: rests.map_or(&record.disks, |suspended| &suspended.disks).iter().map(disk).collect(),
            memory: at_rest.or(running),
        }
    }

    fn parts(&self) -> impl Iterator<Item = &LeftDisk> {
        self.disks.iter().chain(&self.memory)
    }

    fn layers(&self) -> HashSet<u64> {
        self.parts().flat_map(|part| &part.layers).copied().collect()
    }
}

impl Instance {
    /// It is elsewhere: what was it here becomes what is kept of it. Nothing of it is an instance any more when this returns
    /// well. `memory`: the layer with the memory of a machine that left running, and its size.
    pub(crate) fn leave_behind(&self, memory: Option<(u64, u64)>) -> io::Result<()> {
        let record = &self.record;
        let was_whole = record.arriving.is_none() && record.visiting.is_none() && !record.disks.is_empty();
        if !was_whole || self.context.config.cache_budget == 0 {
            // What is kept of an earlier time is more than what never was all here.
            return std::fs::remove_dir_all(&self.folder);
        }
        let is_there = |layer: &u64| layer_path(&self.folder, *layer).exists();
        let mut left = Left::of(record, memory.filter(|(layer, _)| is_there(layer)));
        // One that no runner needed was never created.
        left.disks.iter_mut().chain(&mut left.memory).for_each(|disk| disk.layers.retain(is_there));
        let home = home(&self.context.config.data, &record.spec.id);
        let keep = || {
            write_json(&self.folder.join(DESCRIPTION), &left)?;
            create_folder(home.parent().unwrap_or(Path::new(".")), 0o700)?;
            forget(&self.context.config.data, &record.spec.id);
            std::fs::rename(&self.folder, &home)
        };
        if let Err(error) = keep() {
            tracing::warn!(%error, instance = %record.spec.name, "nothing is kept of an instance that moved away");
            return std::fs::remove_dir_all(&self.folder);
        }
        if let Err(error) = prune(&home, &left) {
            tracing::warn!(%error, "what was kept in {} cannot be tidied; it is tried again", home.display());
        }
        Ok(())
    }

    /// It is back, or gone for good.
    pub(crate) fn forget_left(&self) {
        forget(&self.context.config.data, &self.record.spec.id);
    }

    /// What this host has of it already: since it was here, and of the memory that its version came with.
    pub(crate) fn kept_for(&self, hello: &Hello) -> Vec<KeptPart> {
        let names: Vec<&Name> = hello.disks.iter().map(|disk| &disk.name).collect();
        let mut parts = self.kept_copy(&names).parts;
        if let Some(image) = &hello.memory_image {
            match parts.iter_mut().find(|part| part.which == MEMORY) {
                Some(memory) => memory.image = Some(image.clone()),
                None => {
                    let (size, image) = (hello.memory_mib << 20, Some(image.clone()));
                    parts.push(KeptPart { which: MEMORY, size, image, layers: Vec::new() });
                }
            }
        }
        parts
    }

    /// What is kept of it, for disks in this order.
    pub(crate) fn kept_copy(&self, disks: &[&Name]) -> KeptCopy {
        let home = home(&self.context.config.data, &self.record.spec.id);
        let left = match read_json::<Left>(&home.join(DESCRIPTION)) {
            Ok(Some(left)) => left,
            Ok(None) => return KeptCopy::default(),
            Err(error) => {
                tracing::warn!(%error, "what was kept of an instance that comes back is not used");
                return KeptCopy::default();
            }
        };
        let numbered = |part: &LeftDisk| {
            let number = match &part.name {
                Some(name) => disks.iter().position(|disk| *disk == name).and_then(|at| u16::try_from(at).ok())?,
                None => MEMORY,
            };
            let layers = part.layers.iter().map(|layer| layer_path(&home, *layer)).collect();
            Some(KeptPart { which: number, size: part.size, image: part.image.clone(), layers })
        };
        KeptCopy { parts: left.parts().filter_map(numbered).collect(), hashes: Some(home.join(HASHES)) }
    }
}

fn place(data: &Path) -> PathBuf {
    data.join("left")
}

fn home(data: &Path, id: &InstanceId) -> PathBuf {
    place(data).join(id.as_str())
}

/// Removes what is kept of an instance.
pub(crate) fn forget(data: &Path, id: &InstanceId) {
    remove(&home(data, id));
}

fn remove(home: &Path) {
    match std::fs::remove_dir_all(home) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "what was kept in {} cannot be removed; it is tried again", home.display());
        }
        _ => {}
    }
}

/// The instances of which something is kept.
pub(crate) fn list(data: &Path) -> Vec<InstanceId> {
    let entries = std::fs::read_dir(place(data)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).take(MOST).collect()
}

/// Removes all that is of no use without the instance: its identity first.
fn prune(home: &Path, left: &Left) -> io::Result<()> {
    let layers = left.layers();
    for entry in std::fs::read_dir(home)? {
        let entry = entry?;
        let name = entry.file_name();
        match name.to_str() {
            Some(DESCRIPTION | HASHES | "layers") => {}
            _ if entry.file_type()?.is_dir() => std::fs::remove_dir_all(entry.path())?,
            _ => std::fs::remove_file(entry.path())?,
        }
    }
    for entry in std::fs::read_dir(home.join("layers"))? {
        let path = entry?.path();
        let number = path.file_stem().and_then(OsStr::to_str).and_then(|stem| stem.parse().ok());
        let is_layer = path.extension().is_none_or(|suffix| suffix == "map");
        if !is_layer || number.is_none_or(|number: u64| !layers.contains(&number)) {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// One that is kept.
struct Kept {
    home: PathBuf,
    at: Timestamp,
    bytes: u64,
}

fn bytes_in(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => bytes_in(&entry.path()),
        found => found.map_or(0, |meta| meta.blocks() * 512),
    };
    entries.map(bytes).sum()
}

/// Keeps what is kept within its limits; `room`: bytes that it may take. Gives the bytes that it takes.
pub(crate) fn tidy(context: &Context, room: u64) -> u64 {
    let has_space = || context.cache.space().is_ok_and(|space| space >= SPACE_FOR_OTHERS);
    tidy_in(&place(&context.config.data), Timestamp::now(), room, &has_space)
}

fn tidy_in(place: &Path, now: Timestamp, room: u64, has_space: &dyn Fn() -> bool) -> u64 {
    let mut kept = Vec::new();
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        let home = entry.path();
        match read_json::<Left>(&home.join(DESCRIPTION)) {
            Ok(Some(left)) if now.since_ms(left.at) < KEEP_FOR.as_millis() as u64 => {
                // A daemon that died may not have come to it.
                if let Err(error) = prune(&home, &left) {
                    tracing::warn!(%error, "what was kept in {} cannot be tidied", home.display());
                }
                kept.push(Kept { at: left.at, bytes: bytes_in(&home), home });
            }
            _ => remove(&home),
        }
    }
    kept.sort_by_key(|kept| kept.at);
    let mut bytes: u64 = kept.iter().map(|kept| kept.bytes).sum();
    let mut count = kept.len();
    for Kept { home, bytes: own, .. } in kept {
        if bytes <= room && count <= MOST && has_space() {
            break;
        }
        tracing::info!(bytes = own, "what was kept in {} goes: the room is needed", home.display());
        remove(&home);
        (bytes, count) = (bytes.saturating_sub(own), count - 1);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(place: &Path, name: &str, at: u64) -> PathBuf {
        let home = place.join(name);
        std::fs::create_dir_all(home.join("layers")).unwrap();
        let disk = LeftDisk { name: None, size: 1 << 20, image: None, layers: vec![3] };
        write_json(&home.join(DESCRIPTION), &Left { at: Timestamp(at), disks: Vec::new(), memory: Some(disk) })
            .unwrap();
        for file in ["layers/3", "layers/3.map", "layers/3.part", "layers/4", "instance.json", "ssh_host_key.json"] {
            std::fs::write(home.join(file), vec![1; 100_000]).unwrap();
        }
        home
    }

    #[test]
    fn the_oldest_go_first_and_all_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let homes = [1000, 2000, 3000].map(|at| keep(folder.path(), &at.to_string(), at));
        let there = || homes.each_ref().map(|home| home.exists());
        let yes = || true;
        let all = tidy_in(folder.path(), Timestamp(4000), u64::MAX, &yes);
        assert!((600_000..700_000).contains(&all), "{all}");
        for file in ["instance.json", "ssh_host_key.json", "layers/4", "layers/3.part"] {
            assert!(!homes[0].join(file).exists(), "{file} is of no use");
        }
        assert!(homes[0].join("layers/3").exists() && homes[0].join("layers/3.map").exists());
        assert_eq!(tidy_in(folder.path(), Timestamp(4000), all, &yes), all);
        assert!(tidy_in(folder.path(), Timestamp(4000), all - 1, &yes) < all);
        assert_eq!(there(), [false, true, true], "room for two");
        let late = Timestamp(2000 + KEEP_FOR.as_millis() as u64);
        tidy_in(folder.path(), late, u64::MAX, &yes);
        assert_eq!(there(), [false, false, true], "a week is over");
        std::fs::write(homes[1].with_file_name("stray"), b"").unwrap();
        assert_eq!(tidy_in(folder.path(), Timestamp(4000), u64::MAX, &|| false), 0);
        assert_eq!(there(), [false; 3], "guests need the space");
    }

    #[test]
    fn what_cannot_be_read_goes() {
        let folder = tempfile::tempdir().unwrap();
        let home = keep(folder.path(), "one", 1000);
        std::fs::write(home.join(DESCRIPTION), b"{").unwrap();
        assert_eq!(tidy_in(folder.path(), Timestamp(2000), u64::MAX, &|| true), 0);
        assert!(!home.exists());
        assert_eq!(tidy_in(&folder.path().join("nothing"), Timestamp(0), 0, &|| true), 0);
    }
}

//! A machine that was suspended on this host, to be read: its disks and its memory, by whoever makes a version of it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use collective_disk::ReadAt;
use collective_model::run::{RunConfig, RunResume};
use collective_store::BLOCK;
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::publish::DiskReader;
use collective_store::trace::Trace;
use collective_volume::Disk;
use tokio::runtime::Handle;

use crate::send::{image, open};
use crate::{Layout, MEMORY, OpenSource, ahead, read_config};

/// Memory and disks of one instant.
pub struct SavedMachine {
    /// What it is made of.
    pub config: RunConfig,
    /// The memory's place, and where the rest of the machine is.
    pub resume: RunResume,
    /// Its disks, in the order of the configuration.
    pub disks: Vec<Reader>,
    /// Its memory.
    pub memory: Reader,
    touched: BTreeMap<String, Trace>,
}

impl SavedMachine {
    /// What of a disk is read first when the machine goes on; nothing if that is not known.
    pub fn first_of_disk(&self, name: &str) -> Trace {
        self.touched.get(name).cloned().unwrap_or_default()
    }

    /// What of its memory is read first.
    pub fn first_of_memory(&self) -> Trace {
        self.first_of_disk(MEMORY)
    }
}

/// Opens the machine that `run.json` in `dir` goes on with. Nothing may run on it. To be called in a runtime of several
/// threads: the readers wait in it.
pub async fn open_saved(dir: &Path, open_source: &OpenSource) -> Result<SavedMachine, String> {
    let layout = Layout { dir: dir.to_owned() };
    let config = read_config(&layout)?;
    let resume = config.resume.clone().ok_or("it has no saved machine")?;
    let cache = Cache::open(&config.cache).map_err(|e| format!("cannot open the host's cache: {e}"))?;
    let store = Arc::new(FrameStore::new(cache, open_source(&config)?));
    let reader = |disk| Reader { disk, handle: Handle::current() };
    let mut disks = Vec::new();
    for disk in &config.disks {
        let opened = open(disk, store.clone()).await;
        disks.push(reader(opened.map_err(|e| format!("disk \"{}\" cannot be opened: {e}", disk.name))?));
    }
    let failed = |e: &dyn std::fmt::Display| format!("its memory cannot be opened: {e}");
    let image = image(resume.image.as_ref(), &store).await.map_err(|e| failed(&e))?;
    let memory = Disk::open_frozen(config.memory_mib << 20, image, store, &resume.memory).map_err(|e| failed(&e))?;
    Ok(SavedMachine { touched: ahead::read_touched(&layout.touched()), memory: reader(memory), disks, resume, config })
}

/// A disk for whoever may block.
pub struct Reader {
    pub(crate) disk: Disk,
    pub(crate) handle: Handle,
}

impl Reader {
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = match self.disk.try_read(offset, buffer.len())? {
            Some(read) => read,
            None => self.handle.block_on(self.disk.read(offset, buffer.len()))?,
        };
        if read.len() != buffer.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer.copy_from_slice(&read);
        Ok(())
    }
}

impl DiskReader for Reader {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.fill(offset, buffer)
    }
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.disk.next_data(offset))
    }
}

impl ReadAt for Reader {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.fill(offset, buffer)
    }
    fn size(&self) -> u64 {
        self.disk.size()
    }
}

/// A file as an image has it: whole blocks, at least one.
pub fn as_image(path: &Path) -> io::Result<(Vec<u8>, u64)> {
    let mut content = std::fs::read(path)?;
    let size = content.len() as u64;
    content.resize(content.len().next_multiple_of(BLOCK as usize).max(BLOCK as usize), 0);
    Ok((content, size))
}

//! Private data of a machine that is off: its disks, encrypted, into the store and back.
//!
//! Only this process knows how images and layers become a disk, so it is here that the disks are read, cut and sealed.
//! Nothing readable leaves it, and what comes back is believed only as far as the owner's key proves it.

mod known;
mod restore;

use std::collections::BTreeMap;
use std::io::{self, BufRead, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use collective_keys::OwnerKey;
use collective_model::run::{Arriving, RunConfig, RunImage};
use collective_model::run_private::{
    PrivateNews, PrivateOrder, RunPack, StoredDisk, StoredFile, StoredMemory, WholeOrder,
};
use collective_model::{Digest, InstanceId, Name};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::pack::Pack;
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Progress, Publisher};
use collective_store::seal::Seal;
use collective_store::trace::Trace;
use collective_store::{PackInfo, SourceError, Vault};
use collective_volume::Disk;
use rayon::prelude::*;
use tokio::runtime::Handle;
use zeroize::Zeroizing;

use crate::kept::KeptFrames;
use crate::saved::{Reader, as_image};
use crate::send::{image, open};
use crate::{MEMORY, OpenSource, ahead};
use known::{recall, remember};
use restore::{Memory, Trouble, restore};

pub(crate) use restore::Arrival;

/// An order is at most this long, in bytes.
const MAX_ORDER: u64 = 16 << 20;
/// The line with the key is at most this long, in bytes.
const MAX_KEY: u64 = 1024;
/// A store that is away is tried again this often, after a second and then after twice the pause each time.
const ATTEMPTS: u32 = 6;
/// Pause before a store that is away is asked again.
const AWAY: Duration = Duration::from_secs(1);
/// The daemon is told after so many bytes.
const TELL_EVERY: u64 = 4 << 20;

/// Opens the private packs of an instance.
pub type OpenVault = dyn Fn(&RunConfig, &InstanceId, Vec<PackInfo>) -> Result<Arc<dyn Vault>, String> + Send + Sync;

/// What the daemon wants, and the key for it.
pub(crate) struct Wanted {
    seal: Arc<Seal>,
    order: PrivateOrder,
}

impl Wanted {
    /// Reads the two lines that the daemon writes.
    pub fn read(from: &mut impl BufRead) -> Result<Self, String> {
        let mut from = from.take(MAX_ORDER);
        let seal = read_key(&mut from)?;
        let mut order = String::new();
        from.read_line(&mut order).map_err(|e| broken(&e))?;
        let order = serde_json::from_str(&order).map_err(|e| broken(&e))?;
        Ok(Self { seal, order })
    }
}

fn broken(error: &dyn std::fmt::Display) -> String {
    format!("the daemon's order cannot be read: {error}")
}

/// Reads the line with the owner's key.
pub(crate) fn read_key(from: &mut impl BufRead) -> Result<Arc<Seal>, String> {
    let mut line = Zeroizing::new(String::with_capacity(128));
    from.take(MAX_KEY).read_line(&mut line).map_err(|e| broken(&e))?;
    let key = OwnerKey::try_from(line.trim().to_owned()).map_err(|_| broken(&"it begins with no key"))?;
    Ok(Arc::new(Seal::new(key.bytes())))
}

/// Ends this process when the daemon does, whose order comes again: two must not work on the same instance.
pub(crate) fn end_with(mut daemon: impl Read + Send + 'static) {
    std::thread::spawn(move || {
        let _ = io::copy(&mut daemon, &mut io::sink());
        std::process::exit(1);
    });
}

/// Carries it out, telling how it is going on `out`; what is told last is the outcome.
pub(crate) async fn carry_out(
    config: &RunConfig,
    wanted: Wanted,
    open_source: &OpenSource,
    open_vault: &OpenVault,
    out: &Teller,
) -> Result<PrivateNews, String> {
    let Wanted { seal, order } = wanted;
    match order {
        PrivateOrder::Backup { home, known, hashes, disks, whole } => {
            let vault = open_vault(config, &home, infos(&known))?;
            let cache = Cache::open(&config.cache).map_err(|e| format!("cannot open the host's cache: {e}"))?;
            let store = Arc::new(FrameStore::new(cache, open_source(config)?));
            let disks = open_disks(config, &disks, &store).await?;
            let mut known = recall(vault.as_ref(), &known, &hashes, &seal).await?;
            let memory = match &whole {
                Some(whole) => open_memory(whole, &store).await?,
                None => None,
            };
            let (out, handle) = (out.clone(), Handle::current());
            let is_theirs = |image: Option<&RunImage>| {
                image.is_some() && image.map(|image| image.version) == whole.as_ref().map(|whole| whole.version)
            };
            let theirs = config.disks.iter().filter(|disk| is_theirs(disk.image.as_ref()));
            let theirs: Vec<Name> = theirs.map(|disk| disk.name.clone()).collect();
            let memory_is_theirs = is_theirs(whole.as_ref().and_then(|whole| whole.memory_image.as_ref()));
            let back_up = move || {
                let theirs = disks.iter().filter(|(name, _)| theirs.contains(name)).map(|(_, disk)| disk);
                let theirs: Vec<&Disk> = theirs.chain(memory.as_ref().filter(|_| memory_is_theirs)).collect();
                if !theirs.is_empty() {
                    let images = theirs.iter().filter_map(|disk| disk.image());
                    let frames: Vec<Digest> = images.flat_map(|image| image.frames()).collect();
                    known.learn_elsewhere(&at_hand(store.cache(), &frames, &seal).map_err(|e| e.to_string())?);
                }
                let touched = whole.as_ref().and_then(|whole| whole.touched.as_deref()).map(ahead::read_touched);
                let files = whole.map(|whole| whole.files);
                let what = What { disks, memory, touched: touched.unwrap_or_default(), files };
                back_up(what, known, seal, Sink { vault, hashes, handle }, &out)
            };
            tokio::task::spawn_blocking(back_up).await.map_err(|e| e.to_string())?
        }
        PrivateOrder::Restore { home, packs, scratch, disks, files, begin, kept, hashes } => {
            let vault = open_vault(config, &home, infos(&packs))?;
            let cache = Cache::open(&config.cache).map_err(|e| format!("cannot open the host's cache: {e}"))?;
            let public = Arc::new(FrameStore::new(cache, open_source(config)?));
            let near = KeptFrames::open(&kept, &seal, &public).await;
            let private = open_private(&scratch, seal.clone(), vault, near)?;
            let memory = hashes.map(|folder| Memory { folder, seal });
            let what = restore::What { disks, files: &files, begin, memory };
            Ok(restore(private, public, what, out).await?)
        }
    }
}

/// The owner's frames, kept in `scratch` as they come.
fn open_private(
    scratch: &Path,
    seal: Arc<Seal>,
    vault: Arc<dyn Vault>,
    near: Option<KeptFrames>,
) -> Result<FrameStore, String> {
    let cache = Cache::open(scratch).map_err(|e| format!("cannot use {}: {e}", scratch.display()))?;
    let store = FrameStore::new(cache.sealed(seal), vault);
    Ok(match near {
        Some(near) => store.beside(Arc::new(near)),
        None => store,
    })
}

/// Opens what arrives while the machine runs, waiting for a store that is away.
pub(crate) async fn open_arrival(
    config: &RunConfig,
    arriving: &Arriving,
    seal: &Arc<Seal>,
    public: &Arc<FrameStore>,
    open_vault: &OpenVault,
) -> Result<Arrival, String> {
    loop {
        let vault = open_vault(config, &arriving.home, infos(&arriving.packs))?;
        let near = KeptFrames::open(&arriving.kept, seal, public).await;
        let private = open_private(&arriving.scratch, seal.clone(), vault, near)?;
        let memory = arriving.hashes.clone().map(|folder| Memory { folder, seal: seal.clone() });
        match Arrival::open(private, public.clone(), arriving.layers.clone(), memory).await {
            Err(Trouble::Away(why)) => {
                tracing::warn!(why, "what is to arrive is not to be had yet");
                tokio::time::sleep(AWAY).await;
            }
            opened => return Ok(opened?),
        }
    }
}

async fn open_memory(whole: &WholeOrder, store: &Arc<FrameStore>) -> Result<Option<Disk>, String> {
    if whole.memory.is_empty() {
        return Ok(None);
    }
    let failed = |e: &dyn std::fmt::Display| format!("its memory cannot be opened: {e}");
    let image = image(whole.memory_image.as_ref(), store).await.map_err(|e| failed(&e))?;
    let opened = Disk::open_frozen(whole.memory_size, image, store.clone(), &whole.memory);
    opened.map(Some).map_err(|e| failed(&e))
}

/// Names of the blocks of those frames that are in the host's cache, in the owner's words.
fn at_hand(cache: &Cache, frames: &[Digest], seal: &Seal) -> io::Result<Vec<(Digest, Vec<[u8; 32]>)>> {
    let names = |frame: &Digest| {
        let cached = cache.get(frame)?;
        Ok(cached.map(|cached| (*frame, seal.block_names(&cached.content))))
    };
    let named: io::Result<Vec<_>> = frames.par_iter().map(names).collect();
    Ok(named?.into_iter().flatten().collect())
}

fn infos(packs: &[RunPack]) -> Vec<PackInfo> {
    let info = |pack: &RunPack| PackInfo { digest: pack.digest, size: pack.size, directory: pack.directory };
    packs.iter().map(info).collect()
}

/// Tells the daemon.
#[derive(Clone)]
pub(crate) struct Teller(Arc<std::sync::Mutex<Box<dyn Write + Send>>>);

impl Teller {
    pub fn new(out: impl Write + Send + 'static) -> Self {
        Self(Arc::new(std::sync::Mutex::new(Box::new(out))))
    }

    /// A daemon that does not listen any more has died, and the order comes again.
    pub fn tell(&self, news: &PrivateNews) {
        let mut out = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let written = serde_json::to_writer(&mut *out, news).map_err(io::Error::from);
        if let Err(error) = written.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
            tracing::debug!(%error, "the daemon does not listen");
        }
    }
}

async fn open_disks(config: &RunConfig, names: &[Name], store: &Arc<FrameStore>) -> Result<Vec<(Name, Disk)>, String> {
    let mut disks = Vec::new();
    for name in names {
        let found = config.disks.iter().find(|disk| disk.name == *name);
        let found = found.ok_or_else(|| format!("it has no disk \"{name}\""))?;
        let opened = open(found, store.clone()).await.map_err(|e| format!("disk \"{name}\" cannot be opened: {e}"))?;
        disks.push((name.clone(), opened));
    }
    Ok(disks)
}

/// What is stored.
struct What {
    disks: Vec<(Name, Disk)>,
    memory: Option<Disk>,
    /// What of disks and memory was read first when they were last gone on with.
    touched: BTreeMap<String, Trace>,
    /// The whole instance, with these files.
    files: Option<Vec<(String, PathBuf)>>,
}

fn back_up(
    what: What,
    known: KnownBlocks,
    seal: Arc<Seal>,
    mut sink: Sink,
    out: &Teller,
) -> Result<PrivateNews, String> {
    let sizes = what.disks.iter().map(|(_, disk)| disk).chain(&what.memory).map(Disk::size);
    let total: u64 = sizes.sum();
    let (before, told) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |done: u64| {
        let done = before.load(Ordering::Relaxed) + done;
        if done >= told.load(Ordering::Relaxed) + TELL_EVERY {
            told.store(done, Ordering::Relaxed);
            out.tell(&PrivateNews::Progress { done, total });
        }
    };
    let handle = sink.handle.clone();
    let mut publisher = Publisher::new(known, &mut sink).sealing(seal);
    if what.files.is_some() {
        // It is gone on with before it has arrived.
        publisher = publisher.finely();
    }
    let mut disks = Vec::new();
    for (name, disk) in what.disks {
        let failed = |e: &dyn std::fmt::Display| format!("disk \"{name}\" cannot be stored: {e}");
        let size = disk.size();
        let reader = Reader { disk, handle: handle.clone() };
        // A machine that goes on may know of its disk what the disk does not say yet.
        let unused = match what.files {
            Some(_) => Vec::new(),
            None => {
                let survey = collective_disk::unused(&reader).map_err(|e| failed(&e))?;
                survey.notes.iter().for_each(|note| tracing::info!(disk = %name, note, "what is stored of it"));
                survey.unused
            }
        };
        let first = what.touched.get(name.as_str());
        let (root, boot) = add(&mut publisher, &reader, &unused, first, &progress).map_err(|e| failed(&e))?;
        before.fetch_add(size, Ordering::Relaxed);
        disks.push(StoredDisk { name, size, root, boot });
    }
    let failed = |e: io::Error| format!("the instance cannot be stored: {e}");
    let add = |disk| {
        let first = what.touched.get(MEMORY);
        let (root, boot) = add(&mut publisher, &Reader { disk, handle }, &[], first, &progress)?;
        Ok(StoredMemory { root, boot })
    };
    let memory = what.memory.map(add).transpose().map_err(failed)?;
    let mut files = Vec::new();
    for (name, path) in what.files.into_iter().flatten() {
        let (content, size) = as_image(&path).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
        let root = publisher.add(&content, &[], &Trace::default(), &|_| {}).map_err(failed)?;
        files.push(StoredFile { name, size, root });
    }
    let (packs, summary) = publisher.finish().map_err(failed)?;
    Ok(PrivateNews::Stored { disks, packs, used_bytes: summary.used_bytes, memory, files })
}

/// Adds an image, what is read first of it in front. Returns its name, and that of the page that says what this is.
fn add(
    publisher: &mut Publisher,
    reader: &Reader,
    unused: &[Range<u64>],
    first: Option<&Trace>,
    progress: Progress,
) -> io::Result<(Digest, Option<Digest>)> {
    let nothing = Trace::default();
    let root = publisher.add(reader, unused, first.unwrap_or(&nothing), progress)?;
    Ok((root, first.map(|first| publisher.add_trace(first)).transpose()?))
}

/// Sends packs, and remembers what is in them.
struct Sink {
    vault: Arc<dyn Vault>,
    hashes: PathBuf,
    handle: Handle,
}

impl PackSink for Sink {
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> io::Result<()> {
        let bytes = bytes::Bytes::from(pack.bytes);
        let send = async {
            for attempt in 0.. {
                match self.vault.put(&pack.digest, bytes.clone()).await {
                    Err(error @ SourceError::Away(_)) if attempt < ATTEMPTS => {
                        tracing::warn!(%error, "a pack cannot be stored now; it is tried again");
                        tokio::time::sleep(Duration::from_secs(1 << attempt)).await;
                    }
                    done => return done,
                }
            }
            Ok(())
        };
        self.handle.block_on(send).map_err(io::Error::other)?;
        remember(&self.hashes, &pack.digest, &hashes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_that_are_none_are_refused_and_keys_are_not_shown() {
        let key = "0f".repeat(32);
        let order = format!(
            "{key}\n{{\"do\":\"restore\",\"home\":\"{}\",\"packs\":[],\"scratch\":\"/x\",\"disks\":[]}}\n",
            "1".repeat(32)
        );
        assert!(matches!(Wanted::read(&mut order.as_bytes()).unwrap().order, PrivateOrder::Restore { .. }));
        let long = "0".repeat(66);
        for wrong in ["", "\n", "0f0f\n{}", &key, &format!("{key}\n{{}}\n"), &long, &"é".repeat(32), &"zz".repeat(32)]
        {
            let Err(why) = Wanted::read(&mut wrong.as_bytes()) else { panic!("{wrong}") };
            assert!(why.contains("order cannot be read") && !why.contains("0f0f"), "{why}");
        }
    }
}

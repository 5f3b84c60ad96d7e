//! Private data from the store: disks into layers, at once or while they are read, and files; each from wherever its
//! frames are.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use collective_model::run_private::{PrivateNews, RestoreDisk, RestoreFile};
use collective_model::{Digest, Name};
use collective_store::BLOCK;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::{ImageMap, Run};
use collective_store::publish::PackHashes;
use collective_store::seal::Seal;
use collective_volume::Layer;

use super::{TELL_EVERY, Teller};

/// Files of an instance are far below it, in bytes.
const MAX_FILE: u64 = 1 << 30;

/// Disks and memory that are in the store: their indexes are here, their content may not be.
pub(crate) struct Arrival {
    /// All frames: those of the owner, and those of the versions that the instance is made of.
    pub store: Arc<FrameStore>,
    parts: Vec<Part>,
    memory: Option<Memory>,
}

/// Where what is in the packs is remembered, so that the next backup need not read them back.
pub(crate) struct Memory {
    pub folder: PathBuf,
    pub seal: Arc<Seal>,
}

struct Part {
    disk: RestoreDisk,
    map: Arc<ImageMap>,
    pieces: Vec<Piece>,
}

impl Arrival {
    /// Reads the indexes of `disks`; `private` has the owner's packs.
    pub async fn open(
        private: FrameStore,
        public: Arc<FrameStore>,
        disks: Vec<RestoreDisk>,
        memory: Option<Memory>,
    ) -> Result<Self, Trouble> {
        let nowhere = "private/data".parse().map_err(|e| Trouble::Lasting(format!("{e}")))?;
        if let Some(disk) = disks.first() {
            private.add_version(&nowhere, &disk.root).await;
        }
        let mut parts = Vec::new();
        for disk in disks {
            let map = ImageMap::load(&private, disk.root).await.map_err(|e| not_there(&disk.name, &e))?;
            if map.size != disk.size || disk.size > disk.becomes {
                let why = format!("disk \"{}\" has another size in the backup than the plane recorded", disk.name);
                return Err(Trouble::Lasting(why));
            }
            let below = match &disk.image {
                Some(image) => {
                    public.add_version(&image.appliance, &image.version).await;
                    let below = ImageMap::load(&public, image.root).await;
                    Some(below.map_err(|e| Trouble::of(&e, format!("its version's image is not to be had: {e}")))?)
                }
                None => None,
            };
            let pieces = pieces(&map, below.as_ref());
            parts.push(Part { disk, map: Arc::new(map), pieces });
        }
        let store = private.above(public).await;
        let store = store.map_err(|e| Trouble::of(&e, format!("its packs cannot be read: {e}")))?;
        Ok(Self { store: Arc::new(store), parts, memory })
    }

    /// The image that a layer is made of, whole, with all that is below it.
    pub fn image(&self, layer: &Path) -> Option<Arc<ImageMap>> {
        self.parts.iter().find(|part| part.disk.layer == layer).map(|part| part.map.clone())
    }

    /// The page that says what of it is read first.
    pub fn first(&self, layer: &Path) -> Option<Digest> {
        self.parts.iter().find(|part| part.disk.layer == layer)?.disk.boot
    }

    /// Frames that the layers are made of, each once.
    pub fn frames(&self) -> Vec<Digest> {
        let pieces = self.parts.iter().flat_map(|part| &part.pieces);
        let mut frames: Vec<Digest> = pieces.filter_map(|piece| piece.frame).collect();
        frames.sort_unstable();
        frames.dedup();
        frames
    }

    /// Makes the layers, fetching what is not here; durable when it returns. Returns bytes that are not zeros.
    pub async fn write_layers(&self) -> Result<u64, Trouble> {
        let mut bytes = 0;
        for part in &self.parts {
            bytes += write(&self.store, part).await?;
        }
        if let Some(memory) = &self.memory {
            self.remember(memory).await;
        }
        Ok(bytes)
    }

    /// Remembers what of the packs was read.
    async fn remember(&self, memory: &Memory) {
        let frames: HashMap<Digest, u32> = self.parts.iter().flat_map(|part| &part.pieces).filter_map(length).collect();
        let frames: Vec<(Digest, u32)> = frames.into_iter().collect();
        let pages: Vec<Digest> = self.parts.iter().flat_map(|part| part.map.pages()).copied().collect();
        let names: Vec<Digest> = frames.iter().map(|(digest, _)| *digest).collect();
        let mut packs: HashMap<Digest, (Vec<_>, Vec<Digest>)> = HashMap::new();
        for ((digest, length), pack) in frames.iter().zip(self.store.packs_of(&names).await) {
            // Those of the version are in none.
            let Some(pack) = pack else { continue };
            let Ok(content) = self.store.frame(digest, *length).await else { continue };
            packs.entry(pack).or_default().0.push((*digest, memory.seal.block_names(&content)));
        }
        for (page, pack) in pages.iter().zip(self.store.packs_of(&pages).await) {
            pack.into_iter().for_each(|pack| packs.entry(pack).or_default().1.push(*page));
        }
        for (pack, (frames, pages)) in packs {
            super::known::remember(&memory.folder, &pack, &PackHashes::of_parts(frames, pages));
        }
    }
}

fn length(piece: &Piece) -> Option<(Digest, u32)> {
    piece.frame.map(|frame| (frame, piece.length))
}

/// What is restored.
pub(super) struct What<'a> {
    pub disks: Vec<RestoreDisk>,
    pub files: &'a [RestoreFile],
    /// Only what a machine needs to begin with them.
    pub begin: bool,
    pub memory: Option<Memory>,
}

/// Brings disks and files.
pub(super) async fn restore(
    private: FrameStore,
    public: Arc<FrameStore>,
    what: What<'_>,
    out: &Teller,
) -> Result<PrivateNews, Trouble> {
    let What { disks, files, begin, memory } = what;
    let name = disks.first().ok_or_else(|| Trouble::Lasting("there are no disks in it".into()))?.name.clone();
    let arrival = Arrival::open(private, public, disks, memory).await?;
    let store = &arrival.store;
    let gone = |e: &FetchError| not_there(&name, e);
    let mut maps = Vec::new();
    for file in files {
        maps.push(ImageMap::load(store, file.root).await.map_err(|e| gone(&e))?);
    }
    let layers = arrival.frames();
    let mut frames: Vec<Digest> = maps.iter().flat_map(ImageMap::frames).collect();
    if !begin {
        frames.extend(&layers);
        frames.sort_unstable();
        frames.dedup();
    }
    let total = store.lack(&frames).await.map_err(|e| gone(&e))?.bytes;
    let (done, told) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if done >= told.load(Ordering::Relaxed) + TELL_EVERY {
            told.store(done, Ordering::Relaxed);
            out.tell(&PrivateNews::Progress { done, total });
        }
    };
    store.prefetch(&frames, &progress).await.map_err(|e| gone(&e))?;
    let bytes = if begin { 0 } else { arrival.write_layers().await? };
    for (file, map) in files.iter().zip(&maps) {
        let written = write_file(store, file, map).await;
        written.map_err(|e| Trouble::Lasting(format!("{} cannot be written: {e}", file.path.display())))?;
    }
    let lack = store.lack(&layers).await.map_err(|e| gone(&e))?;
    let [data, index, _] = store.moved();
    Ok(PrivateNews::Restored { bytes, fetched: data + index, missing: lack.bytes, kept: lack.near })
}

/// Why private data is not to be had.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The store is away.
    Away(String),
    /// Trying again does not help.
    Lasting(String),
}

impl Trouble {
    fn of(error: &FetchError, why: String) -> Self {
        if error.is_away() { Self::Away(why) } else { Self::Lasting(why) }
    }
}

impl From<Trouble> for String {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Away(why) | Trouble::Lasting(why) => why,
        }
    }
}

/// Blocks that differ from what is below.
struct Piece {
    first: u64,
    blocks: u64,
    /// None: zeros.
    frame: Option<Digest>,
    /// The frame's length in bytes.
    length: u32,
    /// The first block's place in the frame.
    offset: u16,
}

/// What of an image is not the same, by name, in the image below.
fn pieces(map: &ImageMap, below: Option<&ImageMap>) -> Vec<Piece> {
    let mut found = Vec::new();
    let mut block = 0;
    while block < map.blocks() {
        let run = map.run_at(block);
        let under = below.filter(|below| block < below.blocks()).map(|below| below.run_at(block));
        let length = |run: &Run| match run {
            Run::Zeros(blocks) | Run::Frame { blocks, .. } => *blocks,
        };
        let blocks = under.as_ref().map_or(u64::MAX, length).min(length(&run)).min(map.blocks() - block);
        let same = match (&run, &under) {
            (Run::Zeros(_), None | Some(Run::Zeros(_))) => true,
            (Run::Frame { digest: a, offset: x, .. }, Some(Run::Frame { digest: b, offset: y, .. })) => {
                a == b && x == y
            }
            _ => false,
        };
        if !same {
            let (frame, length, offset) = match run {
                Run::Zeros(_) => (None, 0, 0),
                Run::Frame { digest, length, offset, .. } => (Some(digest), length, offset),
            };
            found.push(Piece { first: block, blocks, frame, length, offset });
        }
        block += blocks;
    }
    found
}

/// What a store that lost, changed or rolled back an object is found out by.
fn not_there(disk: &Name, error: &FetchError) -> Trouble {
    if error.is_away() {
        return Trouble::Away(format!("disk \"{disk}\" cannot be fetched now: {error}"));
    }
    Trouble::Lasting(format!(
        "the store does not have disk \"{disk}\" as the plane recorded it: an object is missing, was damaged, or another or \
         an older one is in its place ({error}). Bring back the store's objects below private/ from a copy of that time, or \
         restore another backup"
    ))
}

/// Writes what of a disk differs from what is below into a new layer; durable when it returns.
async fn write(store: &FrameStore, part: &Part) -> Result<u64, Trouble> {
    let Part { disk, map, pieces } = part;
    let failed = |e: &dyn std::fmt::Display| Trouble::Lasting(format!("disk \"{}\" cannot be written: {e}", disk.name));
    // What was begun before is begun anew.
    Layer::remove(&disk.layer).and_then(|()| Layer::create(&disk.layer, disk.becomes)).map_err(|e| failed(&e))?;
    let layer = Layer::open(&disk.layer, disk.becomes, true).map_err(|e| failed(&e))?;
    let mut written = 0;
    for piece in pieces {
        let Some(frame) = &piece.frame else {
            layer.discard(piece.first, piece.blocks).map_err(|e| failed(&e))?;
            continue;
        };
        let content = store.frame(frame, piece.length).await.map_err(|e| not_there(&disk.name, &e))?;
        let from = usize::from(piece.offset) * BLOCK as usize;
        let end = (piece.blocks * BLOCK).min(map.size - piece.first * BLOCK) as usize;
        let part = content.get(from..from + end).ok_or_else(|| failed(&"its index points beyond a frame"))?;
        layer.write(piece.first * BLOCK, part).map_err(|e| failed(&e))?;
        written += part.len() as u64;
    }
    layer.flush().map_err(|e| failed(&e))?;
    Ok(written)
}

/// Writes a file; durable when it returns.
async fn write_file(store: &FrameStore, file: &RestoreFile, map: &ImageMap) -> Result<(), String> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    if file.size > map.size || map.size > MAX_FILE {
        return Err("it has another size than the plane recorded".into());
    }
    let io = |e: io::Error| e.to_string();
    let mut options = std::fs::File::options();
    let out = options.write(true).create(true).truncate(true).mode(0o600).open(&file.path).map_err(io)?;
    out.set_len(file.size).map_err(io)?;
    let written = map.read_into(store, file.size, |at, part| out.write_all_at(part, at)).await;
    written.map_err(|e| e.to_string())?;
    out.sync_all().map_err(io)
}

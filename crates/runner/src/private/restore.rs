//! Private data from the store: disks into layers, files, each from wherever its frames are.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use collective_model::run_private::{PrivateNews, RestoreDisk, RestoreFile};
use collective_model::{Digest, Name};
use collective_store::BLOCK;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::{ImageMap, Run};
use collective_volume::Layer;

use super::{TELL_EVERY, Teller};

/// Files of an instance are far below it, in bytes.
const MAX_FILE: u64 = 1 << 30;

/// Where frames come from: those of the owner, and those of the versions that the instance is made of.
pub(super) struct Stores {
    pub private: FrameStore,
    pub public: FrameStore,
}

/// Brings disks and files.
pub(super) async fn restore(
    stores: &Stores,
    disks: &[RestoreDisk],
    files: &[RestoreFile],
    out: &Teller,
) -> Result<PrivateNews, String> {
    let nowhere = "private/data".parse().map_err(|e| format!("{e}"))?;
    let name = &disks.first().ok_or("there are no disks in it")?.name;
    let gone = |e: &FetchError| not_there(name, e);
    let (mut maps, mut frames) = (Vec::new(), Vec::new());
    for disk in disks {
        stores.private.add_version(&nowhere, &disk.root).await;
        let map = ImageMap::load(&stores.private, disk.root).await.map_err(|e| not_there(&disk.name, &e))?;
        if map.size != disk.size || disk.size > disk.becomes {
            return Err(format!("disk \"{}\" has another size in the backup than the plane recorded", disk.name));
        }
        let below = match &disk.image {
            Some(image) => {
                stores.public.add_version(&image.appliance, &image.version).await;
                let below = ImageMap::load(&stores.public, image.root).await;
                Some(below.map_err(|e| format!("its version's image is not to be had: {e}"))?)
            }
            None => None,
        };
        let pieces = pieces(&map, below.as_ref());
        frames.extend(pieces.iter().filter_map(|piece| piece.frame));
        maps.push((map, pieces));
    }
    for file in files {
        let map = ImageMap::load(&stores.private, file.root).await.map_err(|e| gone(&e))?;
        frames.extend(map.frames());
    }
    frames.sort_unstable();
    frames.dedup();
    let own: HashSet<Digest> = stores.private.known(&frames).await.map_err(|e| gone(&e))?.into_iter().collect();
    let (own, others): (Vec<Digest>, Vec<Digest>) = frames.into_iter().partition(|frame| own.contains(frame));
    let lacks = [stores.private.lack(&own).await, stores.public.lack(&others).await];
    let mut total = 0;
    for lack in lacks {
        total += lack.map_err(|e| gone(&e))?.bytes;
    }
    let (done, told) = (AtomicU64::new(0), AtomicU64::new(0));
    let progress = |bytes: u64| {
        let done = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if done >= told.load(Ordering::Relaxed) + TELL_EVERY {
            told.store(done, Ordering::Relaxed);
            out.tell(&PrivateNews::Progress { done, total });
        }
    };
    stores.private.prefetch(&own, &progress).await.map_err(|e| gone(&e))?;
    stores.public.prefetch(&others, &progress).await.map_err(|e| gone(&e))?;
    let own: HashSet<Digest> = own.into_iter().collect();
    let mut bytes = 0;
    for (disk, (map, pieces)) in disks.iter().zip(&maps) {
        bytes += write(stores, &own, disk, map.size, pieces).await?;
    }
    for file in files {
        write_file(stores, &own, file).await.map_err(|e| format!("{} cannot be written: {e}", file.path.display()))?;
    }
    Ok(PrivateNews::Restored { bytes, fetched: done.into_inner() })
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
fn not_there(disk: &Name, error: &FetchError) -> String {
    if error.is_away() {
        return format!("disk \"{disk}\" cannot be fetched now: {error}");
    }
    format!(
        "the store does not have disk \"{disk}\" as the plane recorded it: an object is missing, was damaged, or another or \
         an older one is in its place ({error}). Bring back the store's objects below private/ from a copy of that time, or \
         restore another backup"
    )
}

/// Content of a frame, from wherever it is.
async fn content(
    stores: &Stores,
    own: &HashSet<Digest>,
    frame: &Digest,
    length: u32,
) -> Result<Arc<Vec<u8>>, FetchError> {
    let store = if own.contains(frame) { &stores.private } else { &stores.public };
    store.frame(frame, length).await
}

/// Writes what of a disk differs from what is below into a new layer; durable when it returns.
async fn write(
    stores: &Stores,
    own: &HashSet<Digest>,
    disk: &RestoreDisk,
    size: u64,
    pieces: &[Piece],
) -> Result<u64, String> {
    let failed = |e: &dyn std::fmt::Display| format!("disk \"{}\" cannot be written: {e}", disk.name);
    Layer::create(&disk.layer, disk.becomes).map_err(|e| failed(&e))?;
    let layer = Layer::open(&disk.layer, disk.becomes, true).map_err(|e| failed(&e))?;
    let mut written = 0;
    for piece in pieces {
        let Some(frame) = &piece.frame else {
            layer.discard(piece.first, piece.blocks).map_err(|e| failed(&e))?;
            continue;
        };
        let content = content(stores, own, frame, piece.length).await.map_err(|e| not_there(&disk.name, &e))?;
        let from = usize::from(piece.offset) * BLOCK as usize;
        let end = (piece.blocks * BLOCK).min(size - piece.first * BLOCK) as usize;
        let part = content.get(from..from + end).ok_or_else(|| failed(&"its index points beyond a frame"))?;
        layer.write(piece.first * BLOCK, part).map_err(|e| failed(&e))?;
        written += part.len() as u64;
    }
    layer.flush().map_err(|e| failed(&e))?;
    Ok(written)
}

/// Writes a file; durable when it returns.
async fn write_file(stores: &Stores, own: &HashSet<Digest>, file: &RestoreFile) -> Result<(), String> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    let map = ImageMap::load(&stores.private, file.root).await.map_err(|e| e.to_string())?;
    if file.size > map.size || map.size > MAX_FILE {
        return Err("it has another size than the plane recorded".into());
    }
    let io = |e: io::Error| e.to_string();
    let mut options = std::fs::File::options();
    let out = options.write(true).create(true).truncate(true).mode(0o600).open(&file.path).map_err(io)?;
    out.set_len(file.size).map_err(io)?;
    for Piece { first, blocks, frame, length, offset } in pieces(&map, None) {
        let Some(frame) = frame else { continue };
        let content = content(stores, own, &frame, length).await.map_err(|e| e.to_string())?;
        let from = usize::from(offset) * BLOCK as usize;
        let end = (blocks * BLOCK).min(file.size.saturating_sub(first * BLOCK)) as usize;
        let part = content.get(from..from + end).ok_or("its index points beyond a frame")?;
        out.write_all_at(part, first * BLOCK).map_err(io)?;
    }
    out.sync_all().map_err(io)
}

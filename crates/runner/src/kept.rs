//! What this host keeps of an instance since it was here: its disks and its memory as they were, to be looked into before
//! anything is brought over a network. Nothing of it is believed that its hash does not prove.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use collective_model::Digest;
use collective_model::kept::{KeptCopy, KeptPart};
use collective_store::BLOCK;
use collective_store::fetch::{FrameStore, Near};
use collective_store::publish::PackHashes;
use collective_store::seal::Seal;
use collective_volume::Disk;
use rayon::prelude::*;

use crate::send::image;

/// It is looked through in steps of so many bytes.
const STEP: u64 = 1 << 20;

/// Opens a part; none where that is not possible. Then more is brought, and that is all.
pub(crate) async fn open(part: &KeptPart, store: &Arc<FrameStore>) -> Option<Disk> {
    let image = image(part.image.as_ref(), store).await;
    let image = image.unwrap_or_else(|error| {
        tracing::info!(%error, "what a version has of a machine that comes is not looked at");
        None
    });
    if image.is_none() && part.layers.is_empty() {
        return None;
    }
    let opened = Disk::open_frozen(part.size, image.clone(), store.clone(), &part.layers);
    match opened {
        Ok(disk) => Some(disk),
        Err(error) => {
            tracing::warn!(%error, "a part of what was kept of an instance cannot be used, and is brought again");
            image.and_then(|image| Disk::open_frozen(part.size, Some(image), store.clone(), &[]).ok())
        }
    }
}

/// The first 16 bytes of a block's name: the name of the frame that is made of blocks proves them.
type ShortName = [u8; 16];

fn short(name: &[u8; 32]) -> ShortName {
    let mut short = [0; 16];
    short.copy_from_slice(&name[..16]);
    short
}

/// Frames of private packs, as far as the blocks that they are made of are kept.
pub(crate) struct KeptFrames {
    disks: Vec<Disk>,
    frames: HashMap<Digest, Vec<ShortName>>,
    seal: Arc<Seal>,
    /// Where which block is; made when the first frame is wanted, by all cores.
    places: OnceLock<HashMap<ShortName, (usize, u64)>>,
}

impl KeptFrames {
    /// None: nothing is kept.
    pub async fn open(kept: &KeptCopy, seal: &Arc<Seal>, store: &Arc<FrameStore>) -> Option<Self> {
        let mut disks = Vec::new();
        for part in &kept.parts {
            // Blocks of the version are in frames of the version.
            let own = KeptPart { image: None, ..part.clone() };
            disks.extend(open(&own, store).await);
        }
        let frames = kept.hashes.as_deref().map(remembered).unwrap_or_default();
        (!disks.is_empty() && !frames.is_empty()).then(|| Self {
            disks,
            frames,
            seal: seal.clone(),
            places: OnceLock::new(),
        })
    }

    fn find_places(&self) -> HashMap<ShortName, (usize, u64)> {
        let steps = |disk: &Disk| -> Vec<Range<u64>> {
            let bytes = disk.own_blocks().into_iter().map(|blocks| blocks.start * BLOCK..blocks.end * BLOCK);
            bytes
                .flat_map(|range| range.clone().step_by(STEP as usize).map(move |at| at..range.end.min(at + STEP)))
                .collect()
        };
        let all = self.disks.iter().enumerate();
        let all: Vec<(usize, Range<u64>)> =
            all.flat_map(|(number, disk)| steps(disk).into_iter().map(move |step| (number, step))).collect();
        let names = |(number, step): (usize, Range<u64>)| {
            let content = self.read(number, step.start, (step.end - step.start) as usize).unwrap_or_default();
            let names = self.seal.block_names(&content);
            (step.start / BLOCK..).zip(names).map(|(block, name)| (short(&name), (number, block))).collect::<Vec<_>>()
        };
        let found: HashMap<_, _> = all.into_par_iter().flat_map_iter(names).collect();
        tracing::info!(blocks = found.len(), frames = self.frames.len(), "looked through what was kept");
        found
    }

    fn read(&self, number: usize, offset: u64, length: usize) -> Option<Vec<u8>> {
        match self.disks.get(number)?.try_read(offset, length) {
            Ok(content) => content,
            Err(error) => {
                tracing::warn!(%error, "a part of what was kept cannot be read, and is brought again");
                None
            }
        }
    }
}

impl Near for KeptFrames {
    fn may_have(&self, digest: &Digest) -> bool {
        self.frames.contains_key(digest)
    }

    fn prepare(&self) {
        self.places.get_or_init(|| self.find_places());
    }

    fn content(&self, digest: &Digest) -> Option<Vec<u8>> {
        let (blocks, places) = (self.frames.get(digest)?, self.places.get()?);
        let mut content = Vec::with_capacity(blocks.len() * BLOCK as usize);
        for name in blocks {
            let (number, block) = places.get(name)?;
            content.extend(self.read(*number, block * BLOCK, BLOCK as usize)?);
        }
        Some(content)
    }
}

/// Of each frame the names of its blocks, as they were remembered when it was made or read.
fn remembered(folder: &Path) -> HashMap<Digest, Vec<ShortName>> {
    let mut frames = HashMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Some(hashes) = std::fs::read(entry.path()).ok().and_then(|bytes| PackHashes::decode(&bytes)) else {
            continue;
        };
        frames.extend(hashes.frames().map(|(digest, blocks)| (*digest, blocks.iter().map(short).collect())));
    }
    frames
}

//! An image's index, read into memory: which frame holds which block.

use std::collections::HashMap;
use std::io;

use collective_model::Digest;

use crate::BLOCK;
use crate::fetch::{FetchError, FrameStore};
use crate::page::{FANOUT, LEAF_BLOCKS, Leaf, Node, PageError, Root};

/// Where every block of an image lies. About 20 bytes per frame and 16 per extent in memory.
#[derive(Clone, Debug)]
pub struct ImageMap {
    /// The image's name.
    pub root: Digest,
    /// In bytes.
    pub size: u64,
    frames: Vec<(Digest, u16)>,
    extents: Vec<Extent>,
    pages: Vec<Digest>,
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    first: u64,
    blocks: u16,
    offset: u16,
    frame: u32,
}

/// A run of blocks that are alike in where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// This many blocks of zeros.
    Zeros(u64),
    /// Blocks that lie side by side in a frame.
    Frame {
        /// The frame.
        digest: Digest,
        /// The frame's length in bytes.
        length: u32,
        /// The first block within the frame.
        offset: u16,
        /// How many.
        blocks: u64,
    },
}

impl ImageMap {
    /// Reads the index of the image `root` through `store`, level by level.
    pub async fn load(store: &FrameStore, root: Digest) -> Result<Self, FetchError> {
        let bad = |source| FetchError::Page { page: root, source };
        let page = Root::decode(&store.page(&root).await?).map_err(bad)?;
        let mut map = Self { root, size: page.size, frames: Vec::new(), extents: Vec::new(), pages: vec![root] };
        let mut level: Vec<(u64, Digest)> = page.top.into_iter().map(|top| (0, top)).collect();
        for remaining in (1..page.height).rev() {
            map.pages.extend(level.iter().map(|(_, digest)| *digest));
            let pages = map.fetch_level(store, &level).await?;
            let mut below = Vec::new();
            for ((index, digest), bytes) in level.iter().zip(pages) {
                let node =
                    Node::decode(&bytes, remaining).map_err(|e| FetchError::Page { page: *digest, source: e })?;
                below.extend(node.children.iter().map(|(slot, child)| (index * FANOUT + u64::from(*slot), *child)));
            }
            level = below;
        }
        map.pages.extend(level.iter().map(|(_, digest)| *digest));
        let leaves = map.fetch_level(store, &level).await?;
        let mut known = HashMap::new();
        for ((index, digest), bytes) in level.iter().zip(leaves) {
            let added = Leaf::decode(&bytes).and_then(|leaf| map.add_leaf(*index, &leaf, &mut known));
            added.map_err(|e| FetchError::Page { page: *digest, source: e })?;
        }
        Ok(map)
    }

    async fn fetch_level(&self, store: &FrameStore, level: &[(u64, Digest)]) -> Result<Vec<Vec<u8>>, FetchError> {
        let digests: Vec<Digest> = level.iter().map(|(_, digest)| *digest).collect();
        store.read_all(&digests).await
    }

    fn add_leaf(&mut self, index: u64, leaf: &Leaf, known: &mut HashMap<(Digest, u16), u32>) -> Result<(), PageError> {
        let base = index * LEAF_BLOCKS;
        // Its extents ascend.
        let end = leaf.extents.last().map(|extent| base + u64::from(extent.first) + u64::from(extent.blocks));
        if end.is_some_and(|end| end > self.blocks()) {
            return Err(PageError("it holds blocks beyond the end of the image"));
        }
        let frame_ids: Vec<u32> = leaf
            .frames
            .iter()
            .map(|frame| {
                *known.entry(*frame).or_insert_with(|| {
                    self.frames.push(*frame);
                    (self.frames.len() - 1) as u32
                })
            })
            .collect();
        self.extents.extend(leaf.extents.iter().map(|extent| Extent {
            first: base + u64::from(extent.first),
            blocks: extent.blocks,
            offset: extent.offset,
            frame: frame_ids[usize::from(extent.frame)],
        }));
        Ok(())
    }

    /// Gives the first `size` bytes of what it is of to `put`, in order and in parts with their offsets, but for zeros.
    pub async fn read_into(
        &self,
        store: &FrameStore,
        size: u64,
        mut put: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), FetchError> {
        let mut block = 0;
        while block < self.blocks() && block * BLOCK < size {
            let run = self.run_at(block);
            let (Run::Zeros(blocks) | Run::Frame { blocks, .. }) = run;
            if let Run::Frame { digest, length, offset, .. } = run {
                let frame = store.frame(&digest, length).await?;
                let from = usize::from(offset) * BLOCK as usize;
                let part = frame.get(from..from + (blocks * BLOCK).min(size - block * BLOCK) as usize);
                put(block * BLOCK, part.ok_or_else(|| io::Error::other("its index points beyond a frame"))?)?;
            }
            block += blocks;
        }
        Ok(())
    }

    /// What begins at `block`; the run ends at the next change, or at the image's end.
    pub fn run_at(&self, block: u64) -> Run {
        let after = self.extents.partition_point(|extent| extent.first <= block);
        if let Some(extent) = after.checked_sub(1).and_then(|i| self.extents.get(i)) {
            let skip = block - extent.first;
            if skip < u64::from(extent.blocks) {
                let (digest, blocks) = self.frames[extent.frame as usize];
                return Run::Frame {
                    digest,
                    length: u32::from(blocks) * BLOCK as u32,
                    offset: extent.offset + skip as u16,
                    blocks: u64::from(extent.blocks) - skip,
                };
            }
        }
        let next = self.extents.get(after).map_or(u64::MAX, |extent| extent.first);
        Run::Zeros(next.min(self.blocks().max(block + 1)) - block)
    }

    /// Blocks in all; the last one may reach beyond the size.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// All data frames, each once, in the order of the disk.
    pub fn frames(&self) -> impl Iterator<Item = Digest> + '_ {
        self.frames.iter().map(|(digest, _)| *digest)
    }

    /// All pages of the index, the root first.
    pub fn pages(&self) -> &[Digest] {
        &self.pages
    }

    /// Bytes that are not zeros.
    pub fn used_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| u64::from(extent.blocks)).sum::<u64>() * BLOCK
    }
}

//! The index of an image being made: extents of blocks, and the tree of pages over them.

use std::collections::{BTreeMap, HashMap};
use std::io;

use collective_model::Digest;

use super::{Publisher, Which, is_worth};
use crate::frame::{LEVEL, encode_delta};
use crate::known::{PageHashes, PartAnchors};
use crate::pack::{EntryKind, TARGET_PACK_BYTES};
use crate::page::{self, FANOUT, LEAF_BLOCKS, Leaf, LeafExtent, Node, Root};

#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub first: u64,
    pub blocks: u64,
    pub frame: u32,
    pub offset: u8,
}

impl Publisher<'_> {
    pub(super) fn add_pages(&mut self, size: u64, extents: &[Extent]) -> io::Result<Digest> {
        let mut level: Vec<(u64, Digest)> = Vec::new();
        for (index, leaf) in leaves(extents, &self.known.frames) {
            for (digest, _) in &leaf.frames {
                self.used_packs.extend(self.known.packs_of(digest));
            }
            level.push((index, self.add_page(leaf.encode())?));
        }
        let height = page::height(size);
        for depth in 1..height {
            let mut nodes: BTreeMap<u64, Node> = BTreeMap::new();
            for (index, digest) in level {
                let node = nodes.entry(index / FANOUT).or_default();
                node.level = depth;
                node.children.push(((index % FANOUT) as u16, digest));
            }
            level = Vec::new();
            for (index, node) in nodes {
                level.push((index, self.add_page(node.encode())?));
            }
        }
        let root = Root { size, height, top: level.first().map(|(_, digest)| *digest) };
        self.add_page(root.encode())
    }

    pub(super) fn add_page(&mut self, content: Vec<u8>) -> io::Result<Digest> {
        let digest = self.form.name(&content);
        if self.known.pages.insert(digest) {
            let stored = self.form.encode(&digest, EntryKind::Page, &content, LEVEL)?;
            self.summary.index_bytes += stored.bytes.len() as u64;
            self.pack.builder.add(stored.kind, digest, stored.encoding, &stored.bytes, stored.length);
            let anchors = self.form.anchors(&content);
            self.add_page_delta(digest, &content, &anchors, stored.bytes.len())?;
            self.pack.hashes.pages.push(PageHashes { digest, anchors });
            self.close_pack_if(Which::Plain, TARGET_PACK_BYTES)?;
        } else {
            self.used_packs.extend(self.known.packs_of(&digest));
        }
        Ok(digest)
    }

    fn add_page_delta(
        &mut self,
        digest: Digest,
        content: &[u8],
        anchors: &PartAnchors,
        plain: usize,
    ) -> io::Result<()> {
        let (Some(reader), [anchors]) = (self.bases, anchors.as_slice()) else { return Ok(()) };
        let bases = self.known.bases(anchors);
        if bases.is_empty() {
            return Ok(());
        }
        let frames: Vec<Digest> = bases.iter().map(|base| base.frame).collect();
        let contents = reader.read(&frames)?;
        let parts: Vec<&[u8]> = bases.iter().zip(&contents).map(|(base, content)| base.of(content)).collect();
        let delta = encode_delta(content, &parts.concat())?;
        if is_worth(delta.len(), plain) {
            self.delta_pack.builder.add_delta(EntryKind::Page, digest, &delta, content.len() as u32, bases);
            self.delta_pack.hashes.deltas.push(digest);
        }
        Ok(())
    }
}

pub(super) fn push_extent(extents: &mut Vec<Extent>, block: u64, frame: u32, offset: u8) {
    if let Some(last) = extents.last_mut() {
        let follows = last.first + last.blocks == block
            && last.frame == frame
            && u64::from(last.offset) + last.blocks == u64::from(offset)
            && !block.is_multiple_of(LEAF_BLOCKS);
        if follows {
            last.blocks += 1;
            return;
        }
    }
    extents.push(Extent { first: block, blocks: 1, frame, offset });
}

fn leaves(extents: &[Extent], frames: &[(Digest, u16)]) -> Vec<(u64, Leaf)> {
    let mut leaves: Vec<(u64, Leaf)> = Vec::new();
    let mut local: HashMap<u32, u16> = HashMap::new();
    for extent in extents {
        let index = extent.first / LEAF_BLOCKS;
        if leaves.last().is_none_or(|(last, _)| *last != index) {
            leaves.push((index, Leaf::default()));
            local.clear();
        }
        let Some((_, leaf)) = leaves.last_mut() else { continue };
        let frame = *local.entry(extent.frame).or_insert_with(|| {
            leaf.frames.push(frames[extent.frame as usize]);
            (leaf.frames.len() - 1) as u16
        });
        leaf.extents.push(LeafExtent {
            first: (extent.first % LEAF_BLOCKS) as u16,
            blocks: extent.blocks as u16,
            frame,
            offset: u16::from(extent.offset),
        });
    }
    leaves
}

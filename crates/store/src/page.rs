//! Pages: an image's index, a tree of content-addressed pieces, so that versions share what did not change.
//!
//! ```text
//! root   "CLIR" u16 version=1 u16 height  u64 size in bytes  digest[32] of the top page (zeros: nothing but zeros)
//! node   "CLIN" u16 version=1 u16 level   u32 count  count x { u16 slot  digest[32] }
//! leaf   "CLIL" u16 version=1 u16 0       u32 frames u32 extents
//!        frames x { digest[32] u16 blocks }   extents x { u16 first block  u16 blocks  u16 frame  u16 first block in it }
//! ```
//! A leaf covers 2048 blocks (8 MiB), a node of level n 256 children. Slots and extents ascend; what no extent covers
//! is zeros. Integers are little-endian. The same content always gives the same bytes.

use collective_model::Digest;

use crate::{BLOCK, FRAME_BLOCKS};

/// Blocks that one leaf covers.
pub const LEAF_BLOCKS: u64 = 2048;
/// Children of a node.
pub const FANOUT: u64 = 256;
/// The tallest tree: 256^3 leaves are 128 TiB.
pub const MAX_HEIGHT: u16 = 4;

/// The page that names an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Root {
    /// Of the image, in bytes; a multiple of 512.
    pub size: u64,
    /// 1: the top page is a leaf; n + 1: a node of level n.
    pub height: u16,
    /// None: all zeros.
    pub top: Option<Digest>,
}

/// Pointers to pages of the level below; slots without one are zeros.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Distance to the leaves, from 1.
    pub level: u16,
    /// Slot (below [`FANOUT`]) and page.
    pub children: Vec<(u16, Digest)>,
}

/// Where 2048 blocks lie.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    /// Frames and their lengths in blocks.
    pub frames: Vec<(Digest, u16)>,
    /// Runs of blocks.
    pub extents: Vec<LeafExtent>,
}

/// A run of blocks within one leaf that lie side by side in one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeafExtent {
    /// The first block, counted from the leaf's first.
    pub first: u16,
    /// How many.
    pub blocks: u16,
    /// Index in [`Leaf::frames`].
    pub frame: u16,
    /// The first block within the frame.
    pub offset: u16,
}

/// Why a page is refused.
#[derive(Debug, thiserror::Error)]
#[error("page of the image's index is not sound: {0}")]
pub struct PageError(pub(crate) &'static str);

/// How tall the tree of an image of `size` bytes is.
pub fn height(size: u64) -> u16 {
    let mut covered = LEAF_BLOCKS * BLOCK;
    let mut height = 1;
    while covered < size {
        covered = covered.saturating_mul(FANOUT);
        height += 1;
    }
    height
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], PageError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(PageError("it is cut short"))?;
        self.0 = rest;
        Ok(*head)
    }
    fn u16(&mut self) -> Result<u16, PageError> {
        self.take().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Result<u32, PageError> {
        self.take().map(u32::from_le_bytes)
    }
    fn header(&mut self, magic: &[u8; 4]) -> Result<u16, PageError> {
        if self.take::<4>()? != *magic {
            return Err(PageError("it is not the kind of page expected here"));
        }
        if self.u16()? != 1 {
            return Err(PageError("it has another format version"));
        }
        self.u16()
    }
    /// `count` items of `size` bytes must be exactly the rest.
    fn rest_is(&self, bytes: usize) -> Result<(), PageError> {
        if self.0.len() == bytes { Ok(()) } else { Err(PageError("its length does not fit its counts")) }
    }
}

impl Root {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = b"CLIR\x01\0".to_vec();
        out.extend(self.height.to_le_bytes());
        out.extend(self.size.to_le_bytes());
        out.extend(self.top.map_or([0; 32], |digest| digest.0));
        out
    }

    /// Reads it.
    pub fn decode(bytes: &[u8]) -> Result<Self, PageError> {
        let mut reader = Reader(bytes);
        let tall = reader.header(b"CLIR")?;
        let size = u64::from_le_bytes(reader.take()?);
        let top = reader.take::<32>()?;
        reader.rest_is(0)?;
        if size == 0 || !size.is_multiple_of(512) || size > 64 << 40 {
            return Err(PageError("impossible image size"));
        }
        if tall != height(size) || tall > MAX_HEIGHT {
            return Err(PageError("its height does not fit its size"));
        }
        Ok(Self { size, height: tall, top: (top != [0; 32]).then_some(Digest(top)) })
    }
}

impl Node {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = b"CLIN\x01\0".to_vec();
        out.extend(self.level.to_le_bytes());
        out.extend((self.children.len() as u32).to_le_bytes());
        for (slot, digest) in &self.children {
            out.extend(slot.to_le_bytes());
            out.extend(digest.0);
        }
        out
    }

    /// Reads it; `level` is what the page above says.
    pub fn decode(bytes: &[u8], level: u16) -> Result<Self, PageError> {
        let mut reader = Reader(bytes);
        if reader.header(b"CLIN")? != level {
            return Err(PageError("it is of another level"));
        }
        let count = reader.u32()? as usize;
        if count > FANOUT as usize {
            return Err(PageError("too many children"));
        }
        reader.rest_is(count * 34)?;
        let mut children: Vec<(u16, Digest)> = Vec::with_capacity(count);
        for _ in 0..count {
            let slot = reader.u16()?;
            if u64::from(slot) >= FANOUT || children.last().is_some_and(|(last, _)| *last >= slot) {
                return Err(PageError("its slots do not ascend"));
            }
            children.push((slot, Digest(reader.take()?)));
        }
        Ok(Self { level, children })
    }
}

impl Leaf {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = b"CLIL\x01\0\0\0".to_vec();
        out.extend((self.frames.len() as u32).to_le_bytes());
        out.extend((self.extents.len() as u32).to_le_bytes());
        for (digest, blocks) in &self.frames {
            out.extend(digest.0);
            out.extend(blocks.to_le_bytes());
        }
        for extent in &self.extents {
            for field in [extent.first, extent.blocks, extent.frame, extent.offset] {
                out.extend(field.to_le_bytes());
            }
        }
        out
    }

    /// Reads it, and refuses extents that overlap, leave the leaf, or leave their frame.
    pub fn decode(bytes: &[u8]) -> Result<Self, PageError> {
        let mut reader = Reader(bytes);
        if reader.header(b"CLIL")? != 0 {
            return Err(PageError("it is of another level"));
        }
        let (frame_count, extent_count) = (reader.u32()? as usize, reader.u32()? as usize);
        if frame_count > LEAF_BLOCKS as usize || extent_count > LEAF_BLOCKS as usize {
            return Err(PageError("too many frames or extents"));
        }
        reader.rest_is(frame_count * 34 + extent_count * 8)?;
        let mut frames = Vec::with_capacity(frame_count);
        for _ in 0..frame_count {
            let (digest, blocks) = (Digest(reader.take()?), reader.u16()?);
            if blocks == 0 || usize::from(blocks) > FRAME_BLOCKS {
                return Err(PageError("impossible frame length"));
            }
            frames.push((digest, blocks));
        }
        let mut extents = Vec::with_capacity(extent_count);
        let mut free_from = 0;
        for _ in 0..extent_count {
            let extent =
                LeafExtent { first: reader.u16()?, blocks: reader.u16()?, frame: reader.u16()?, offset: reader.u16()? };
            let frame_blocks = frames.get(usize::from(extent.frame)).ok_or(PageError("an extent without a frame"))?.1;
            let end = u32::from(extent.first) + u32::from(extent.blocks);
            if extent.blocks == 0 || u32::from(extent.first) < free_from || u64::from(end) > LEAF_BLOCKS {
                return Err(PageError("its extents overlap or leave it"));
            }
            if u32::from(extent.offset) + u32::from(extent.blocks) > u32::from(frame_blocks) {
                return Err(PageError("an extent leaves its frame"));
            }
            free_from = end;
            extents.push(extent);
        }
        Ok(Self { frames, extents })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf() -> Leaf {
        Leaf {
            frames: vec![(Digest::of(b"a"), 32), (Digest::of(b"b"), 3)],
            extents: vec![
                LeafExtent { first: 0, blocks: 32, frame: 0, offset: 0 },
                LeafExtent { first: 40, blocks: 2, frame: 1, offset: 1 },
            ],
        }
    }

    #[test]
    fn round_trips_and_exact_bytes() {
        assert_eq!(Leaf::decode(&leaf().encode()).unwrap(), leaf());
        let node = Node { level: 2, children: vec![(0, Digest::of(b"x")), (255, Digest::of(b"y"))] };
        assert_eq!(Node::decode(&node.encode(), 2).unwrap(), node);
        assert!(Node::decode(&node.encode(), 1).is_err());
        let root = Root { size: 2 << 30, height: 2, top: Some(Digest([9; 32])) };
        assert_eq!(Root::decode(&root.encode()).unwrap(), root);
        let expected = [b"CLIR\x01\0\x02\0\0\0\0\x80\0\0\0\0".as_slice(), &[9; 32]].concat();
        assert_eq!(root.encode(), expected, "the format is fixed");
    }

    #[test]
    fn heights() {
        for (size, tall) in [(512, 1), (8 << 20, 1), ((8 << 20) + 512, 2), (2 << 30, 2), (3 << 30, 3), (64 << 40, 4)] {
            assert_eq!(height(size), tall, "{size}");
        }
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..200, value: u8, cut in 0usize..200) {
            for mut bytes in [leaf().encode(), Root { size: 4096, height: 1, top: None }.encode()] {
                let length = bytes.len();
                bytes[at % length] = value;
                let _ = (Leaf::decode(&bytes), Root::decode(&bytes), Node::decode(&bytes, 1));
                let _ = (Leaf::decode(&bytes[..cut % length]), Root::decode(&bytes[..cut % length]));
            }
        }
    }
}

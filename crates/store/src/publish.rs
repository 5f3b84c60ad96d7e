//! The maker's side: cut a disk into blocks, keep the new ones, and describe the image.
//!
//! Blocks are compared with those of the versions that the maker already published and read back verified (see
//! [`KnownBlocks`]). New blocks go into frames in the order of the disk, so that neighbours stay neighbours and
//! compress together. The same disk against the same known blocks gives the same packs, byte for byte: that is what
//! makes an interrupted publish resumable.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::ops::Range;

use collective_model::Digest;
use rayon::prelude::*;

use crate::pack::{self, EntryKind, Pack, PackBuilder, PackError, TARGET_PACK_BYTES};
use crate::page::{self, FANOUT, LEAF_BLOCKS, Leaf, LeafExtent, Node, Root};
use crate::{BLOCK, FRAME_BLOCKS, encode};

/// Read at once: two leaves' worth.
const STEP_BLOCKS: u64 = 4096;
/// Frames compressed at once.
const BATCH_FRAMES: usize = 128;

/// A disk to publish.
pub trait DiskReader: Sync {
    /// Fills `buffer` from `offset`; the last block is padded with zeros by the caller.
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// In bytes.
    fn size(&self) -> u64;
    /// The first range at or after `offset` that may hold something else than zeros, as a hint.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

impl DiskReader for std::fs::File {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |meta| meta.len())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::SeekFrom;
        match rustix::fs::seek(self, SeekFrom::Data(offset)) {
            Ok(start) => Ok(Some(start..rustix::fs::seek(self, SeekFrom::Hole(start))?)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            // A file system without holes: everything may be data.
            Err(rustix::io::Errno::INVAL) => Ok((offset < self.size()).then(|| offset..self.size())),
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes finished packs away, in order.
pub trait PackSink {
    /// Stores a pack; returning means that it is durable.
    fn put(&mut self, pack: Pack) -> io::Result<()>;
}

/// Blocks that published frames hold, and pages that exist.
#[derive(Default)]
pub struct KnownBlocks {
    frames: Vec<(Digest, u16)>,
    by_hash: HashMap<[u8; 32], (u32, u8)>,
    pages: HashSet<Digest>,
    home: HashMap<Digest, Digest>,
}

/// What a maker remembers of a pack that it verified: names and block hashes, without the content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackHashes {
    pages: Vec<Digest>,
    frames: Vec<(Digest, Vec<[u8; 32]>)>,
}

impl PackHashes {
    /// Verifies every frame of a pack and takes its blocks' hashes.
    pub fn of(bytes: &[u8]) -> Result<Self, PackError> {
        let entries = pack::entries(bytes)?;
        let contents: Result<Vec<_>, _> = entries.par_iter().map(|entry| pack::contents(bytes, entry)).collect();
        let mut found = Self { pages: Vec::new(), frames: Vec::new() };
        for (entry, content) in entries.iter().zip(contents?) {
            match entry.kind {
                EntryKind::Page => found.pages.push(entry.digest),
                EntryKind::Data => found.frames.push((entry.digest, hashes(&content))),
            }
        }
        Ok(found)
    }

    /// For a file: `u32 pages, u32 frames, pages x digest, frames x { digest, u16 blocks, blocks x hash }`, and the
    /// BLAKE3 of all that, because a damaged memory would damage what is published.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = (self.pages.len() as u32).to_le_bytes().to_vec();
        out.extend((self.frames.len() as u32).to_le_bytes());
        self.pages.iter().for_each(|digest| out.extend(digest.0));
        for (digest, hashes) in &self.frames {
            out.extend(digest.0);
            out.extend((hashes.len() as u16).to_le_bytes());
            hashes.iter().for_each(|hash| out.extend(hash));
        }
        let check = Digest::of(&out);
        out.extend(check.0);
        out
    }

    /// `None`: damaged; make it anew from the pack.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        fn take<'a>(rest: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
            let (head, tail) = rest.split_at_checked(count)?;
            *rest = tail;
            Some(head)
        }
        let (mut rest, check) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Digest::of(rest).0 != *check {
            return None;
        }
        let hash = |rest: &mut &[u8]| take(rest, 32)?.try_into().ok();
        let pages = u32::from_le_bytes(take(&mut rest, 4)?.try_into().ok()?);
        let frames = u32::from_le_bytes(take(&mut rest, 4)?.try_into().ok()?);
        let pages = (0..pages).map(|_| hash(&mut rest).map(Digest)).collect::<Option<_>>()?;
        let mut found = Self { pages, frames: Vec::new() };
        for _ in 0..frames {
            let digest = Digest(hash(&mut rest)?);
            let blocks = u16::from_le_bytes(take(&mut rest, 2)?.try_into().ok()?);
            found.frames.push((digest, (0..blocks).map(|_| hash(&mut rest)).collect::<Option<_>>()?));
        }
        rest.is_empty().then_some(found)
    }
}

impl KnownBlocks {
    /// Takes up a pack.
    pub fn learn(&mut self, pack: &Digest, hashes: &PackHashes) {
        for digest in &hashes.pages {
            self.home.insert(*digest, *pack);
            self.pages.insert(*digest);
        }
        for (digest, blocks) in &hashes.frames {
            self.home.insert(*digest, *pack);
            let frame = self.frames.len() as u32;
            self.frames.push((*digest, blocks.len() as u16));
            for (offset, hash) in blocks.iter().enumerate() {
                self.by_hash.entry(*hash).or_insert((frame, offset as u8));
            }
        }
    }
}

fn hashes(content: &[u8]) -> Vec<[u8; 32]> {
    content.chunks_exact(BLOCK as usize).map(|block| *blake3::hash(block).as_bytes()).collect()
}

#[derive(Clone, Copy)]
struct Extent {
    first: u64,
    blocks: u64,
    frame: u32,
    offset: u8,
}

/// One publish: images go in, packs come out.
pub struct Publisher<'a> {
    known: KnownBlocks,
    sink: &'a mut dyn PackSink,
    pack: PackBuilder,
    /// The frame being filled is `known.frames.last()` as long as this is not empty.
    open: Vec<u8>,
    waiting: Vec<(u32, Vec<u8>)>,
    used_packs: HashSet<Digest>,
    summary: Summary,
}

/// What a publish was made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bytes of all disks.
    pub disk_bytes: u64,
    /// Bytes of blocks that are not zeros.
    pub used_bytes: u64,
    /// Bytes of blocks that no earlier version had.
    pub new_bytes: u64,
    /// Their stored form in packs.
    pub stored_bytes: u64,
    /// Stored bytes of index pages.
    pub index_bytes: u64,
}

/// Told of every step with the bytes of the disk that are done.
pub type Progress<'a> = &'a dyn Fn(u64);

impl<'a> Publisher<'a> {
    /// Compares with `known`, gives packs to `sink`.
    pub fn new(known: KnownBlocks, sink: &'a mut dyn PackSink) -> Self {
        Self {
            known,
            sink,
            pack: PackBuilder::default(),
            open: Vec::new(),
            waiting: Vec::new(),
            used_packs: HashSet::new(),
            summary: Summary::default(),
        }
    }

    /// Takes up one disk and returns the image's name. `unused` are ranges (ascending) that no file system needs:
    /// they become zeros.
    pub fn add(&mut self, disk: &dyn DiskReader, unused: &[Range<u64>], progress: Progress) -> io::Result<Digest> {
        let size = disk.size();
        let blocks = size.div_ceil(BLOCK);
        let mut extents: Vec<Extent> = Vec::new();
        let mut block = 0;
        while block < blocks {
            let Some(data) = disk.next_data(block * BLOCK)? else { break };
            block = block.max(data.start / BLOCK);
            let end = data.end.div_ceil(BLOCK).min(blocks).min(block + STEP_BLOCKS).max(block + 1);
            self.add_step(disk, block..end, unused, &mut extents)?;
            block = end;
            progress(block * BLOCK);
        }
        progress(size);
        self.close_frame();
        self.flush_frames()?;
        self.summary.disk_bytes += size;
        self.add_pages(size, &extents)
    }

    fn add_step(
        &mut self,
        disk: &dyn DiskReader,
        blocks: Range<u64>,
        unused: &[Range<u64>],
        extents: &mut Vec<Extent>,
    ) -> io::Result<()> {
        let mut bytes = vec![0; ((blocks.end - blocks.start) * BLOCK) as usize];
        let start = blocks.start * BLOCK;
        let wanted = bytes.len().min((disk.size() - start) as usize);
        disk.read_exact_at(start, &mut bytes[..wanted])?;
        blank(&mut bytes, start, unused);
        let digests: Vec<Option<[u8; 32]>> = bytes
            .par_chunks_exact(BLOCK as usize)
            .map(|block| block.iter().any(|byte| *byte != 0).then(|| *blake3::hash(block).as_bytes()))
            .collect();
        for ((index, content), hash) in (blocks.start..).zip(bytes.chunks_exact(BLOCK as usize)).zip(digests) {
            let Some(hash) = hash else { continue };
            self.summary.used_bytes += BLOCK;
            let (frame, offset) = match self.known.by_hash.get(&hash) {
                Some(place) => *place,
                None => self.add_block(hash, content)?,
            };
            push_extent(extents, index, frame, offset);
        }
        Ok(())
    }

    fn add_block(&mut self, hash: [u8; 32], content: &[u8]) -> io::Result<(u32, u8)> {
        if self.open.is_empty() {
            // Its name is known when it is full.
            self.known.frames.push((Digest([0; 32]), 0));
        }
        let frame = (self.known.frames.len() - 1) as u32;
        let offset = (self.open.len() / BLOCK as usize) as u8;
        self.open.extend_from_slice(content);
        self.known.by_hash.insert(hash, (frame, offset));
        self.summary.new_bytes += BLOCK;
        if self.open.len() == FRAME_BLOCKS * BLOCK as usize {
            self.close_frame();
            if self.waiting.len() >= BATCH_FRAMES {
                self.flush_frames()?;
            }
        }
        Ok((frame, offset))
    }

    fn close_frame(&mut self) {
        if !self.open.is_empty() {
            let content = std::mem::take(&mut self.open);
            self.waiting.push(((self.known.frames.len() - 1) as u32, content));
        }
    }

    /// Compresses the frames that wait, on all cores, and packs them in their order.
    fn flush_frames(&mut self) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        let done: Vec<_> = waiting.par_iter().map(|(_, content)| (Digest::of(content), encode(content))).collect();
        for ((frame, content), (digest, (encoding, stored))) in waiting.iter().zip(done) {
            self.known.frames[*frame as usize] = (digest, (content.len() / BLOCK as usize) as u16);
            self.summary.stored_bytes += stored.len() as u64;
            self.pack.add(EntryKind::Data, digest, encoding, &stored, content.len() as u32);
            self.close_pack_if(TARGET_PACK_BYTES)?;
        }
        Ok(())
    }

    fn close_pack_if(&mut self, limit: usize) -> io::Result<()> {
        if self.pack.is_empty() || self.pack.len() < limit {
            return Ok(());
        }
        let pack = std::mem::take(&mut self.pack).finish();
        self.used_packs.insert(pack.digest);
        for entry in &pack.entries {
            self.known.home.insert(entry.digest, pack.digest);
        }
        self.sink.put(pack)
    }

    fn add_pages(&mut self, size: u64, extents: &[Extent]) -> io::Result<Digest> {
        let mut level: Vec<(u64, Digest)> = Vec::new();
        for (index, leaf) in leaves(extents, &self.known.frames) {
            for (digest, _) in &leaf.frames {
                self.use_home(digest);
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

    fn use_home(&mut self, digest: &Digest) {
        if let Some(pack) = self.known.home.get(digest) {
            self.used_packs.insert(*pack);
        }
    }

    fn add_page(&mut self, content: Vec<u8>) -> io::Result<Digest> {
        let digest = Digest::of(&content);
        if self.known.pages.insert(digest) {
            let (encoding, stored) = encode(&content);
            self.summary.index_bytes += stored.len() as u64;
            self.pack.add(EntryKind::Page, digest, encoding, &stored, content.len() as u32);
            self.close_pack_if(TARGET_PACK_BYTES)?;
        } else {
            self.use_home(&digest);
        }
        Ok(digest)
    }

    /// Closes the last pack. Returns the names of all packs that the images need, sorted.
    pub fn finish(mut self) -> io::Result<(Vec<Digest>, Summary)> {
        self.close_pack_if(0)?;
        let mut packs: Vec<Digest> = self.used_packs.into_iter().collect();
        packs.sort_unstable();
        Ok((packs, self.summary))
    }
}

/// Zeros what lies in `unused`; `start` is the disk offset of `bytes`.
fn blank(bytes: &mut [u8], start: u64, unused: &[Range<u64>]) {
    let end = start + bytes.len() as u64;
    let first = unused.partition_point(|range| range.end <= start);
    for range in unused[first..].iter().take_while(|range| range.start < end) {
        let from = range.start.max(start) - start;
        let to = range.end.min(end) - start;
        bytes[from as usize..to as usize].fill(0);
    }
}

fn push_extent(extents: &mut Vec<Extent>, block: u64, frame: u32, offset: u8) {
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

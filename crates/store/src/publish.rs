//! The maker's side: cut a disk into blocks, keep the new ones, and describe the image.
//!
//! Blocks are compared with those of the versions that the maker already published and read back verified (see
//! [`KnownBlocks`]). New blocks go into frames in the order of the disk, so that neighbours stay neighbours and
//! compress together; they are stored as differences to similar published frames too, for hosts that have these
//! (docs/adr/0008). The same disk against the same known blocks gives the same packs, byte for byte: that is what
//! makes an interrupted publish resumable.

mod disk;
mod index;

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::Arc;

use collective_model::Digest;
use rayon::prelude::*;

use crate::frame::{LEVEL, SMALL_LEVEL, encode_delta};
use crate::known::{BlockHash, FrameHashes, PartAnchors};
use crate::pack::{Base, EntryKind, Pack, PackBuilder, TARGET_PACK_BYTES};
use crate::seal::{Form, Seal, Stored};
use crate::trace::Trace;
use crate::{BLOCK, FRAME_BLOCKS, PART_BLOCKS};

use index::{Extent, push_extent};

pub use crate::known::{KnownBlocks, PackHashes};
pub use disk::DiskReader;

/// Read at once: two leaves' worth.
const STEP_BLOCKS: u64 = 4096;
/// Bytes of frames that are compressed at once.
const BATCH_BYTES: usize = 16 << 20;
/// Frames that become differences at once: their bases are in memory, at most 48 MiB.
const DELTA_FRAMES: usize = 16;

/// Takes finished packs away, in order.
pub trait PackSink {
    /// Stores a pack; returning means that it is durable. `hashes` are what to remember of it.
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> io::Result<()>;
}

/// Gives the content of frames that are published, verified.
pub trait BaseReader: Sync {
    /// The content of each of `frames`, in their order.
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>>;
}

/// One publish: images go in, packs come out.
pub struct Publisher<'a> {
    known: KnownBlocks,
    sink: &'a mut dyn PackSink,
    bases: Option<&'a dyn BaseReader>,
    pack: OpenPack,
    /// Differences have packs of their own, so that plain frames stay neighbours in theirs.
    delta_pack: OpenPack,
    /// The frame being filled is `known.frames.last()` as long as this is not empty.
    open: NewFrame,
    waiting: Vec<NewFrame>,
    waiting_bytes: usize,
    level: i32,
    form: Form,
    frame_blocks: usize,
    used_packs: HashSet<Digest>,
    summary: Summary,
}

#[derive(Default)]
struct OpenPack {
    builder: PackBuilder,
    hashes: PackHashes,
}

#[derive(Default)]
struct NewFrame {
    /// Its place in `known.frames`.
    index: u32,
    content: Vec<u8>,
    blocks: Vec<BlockHash>,
}

/// A frame on its way into packs.
struct Encoded {
    digest: Digest,
    plain: Stored,
    anchors: PartAnchors,
    /// What it resembles, and what it is as a difference to that.
    bases: Vec<Base>,
    delta: Option<Vec<u8>>,
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
    /// New frames.
    pub frames: u64,
    /// New frames that are stored as differences too.
    pub delta_frames: u64,
    /// The stored bytes of these differences.
    pub delta_bytes: u64,
}

/// Told of every step with the bytes of the disk that are done.
pub type Progress<'a> = &'a dyn Fn(u64);

impl<'a> Publisher<'a> {
    /// Compares with `known`, gives packs to `sink`.
    pub fn new(mut known: KnownBlocks, sink: &'a mut dyn PackSink) -> Self {
        known.ready();
        Self {
            known,
            sink,
            bases: None,
            pack: OpenPack::default(),
            delta_pack: OpenPack::default(),
            open: NewFrame::default(),
            waiting: Vec::new(),
            waiting_bytes: 0,
            level: LEVEL,
            form: Form::default(),
            frame_blocks: FRAME_BLOCKS,
            used_packs: HashSet::new(),
            summary: Summary::default(),
        }
    }

    /// New frames are stored as differences too, where that is worth it; the frames they differ from come from
    /// `bases`.
    pub fn with_bases(mut self, bases: &'a dyn BaseReader) -> Self {
        self.bases = Some(bases);
        // What an update brings is cut as finely as it is compared with the old.
        self.finely()
    }

    /// Cuts what is new into shorter frames, for whoever reads a few blocks here and there and waits for each.
    pub fn finely(mut self) -> Self {
        self.frame_blocks = PART_BLOCKS;
        self
    }

    /// Compresses harder: fewer bytes for many times the work.
    pub fn small(mut self) -> Self {
        self.level = SMALL_LEVEL;
        self
    }

    /// Everything is sealed for an owner, who knows `known` by the same key; there are no differences.
    pub fn sealing(mut self, seal: Arc<Seal>) -> Self {
        self.form = Form(Some(seal));
        self.bases = None;
        self
    }

    /// Takes up a boot trace and returns the name of its page.
    pub fn add_trace(&mut self, trace: &Trace) -> io::Result<Digest> {
        self.add_page(trace.encode())
    }

    /// Takes up one disk and returns the image's name. `unused` are ranges (ascending) that no file system needs:
    /// they become zeros. New blocks of `boot` come first, in its order, so that a cold host fetches little else.
    pub fn add(
        &mut self,
        disk: &dyn DiskReader,
        unused: &[Range<u64>],
        boot: &Trace,
        progress: Progress,
    ) -> io::Result<Digest> {
        let size = disk.size();
        let blocks = size.div_ceil(BLOCK);
        let used_before = self.summary.used_bytes;
        for range in boot.ranges(blocks) {
            for start in range.clone().step_by(STEP_BLOCKS as usize) {
                self.add_step(disk, start..range.end.min(start + STEP_BLOCKS), unused, &mut Vec::new())?;
            }
        }
        // They share no frame with what follows; the pass over the whole disk finds them known.
        self.close_frame();
        self.summary.used_bytes = used_before;
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
        let digests: Vec<Option<BlockHash>> = bytes
            .par_chunks_exact(BLOCK as usize)
            .map(|block| block.iter().any(|byte| *byte != 0).then(|| self.form.block(block)))
            .collect();
        for ((index, content), hash) in (blocks.start..).zip(bytes.chunks_exact(BLOCK as usize)).zip(digests) {
            let Some(hash) = hash else { continue };
            self.summary.used_bytes += BLOCK;
            let (frame, offset) = match self.known.by_hash.find(&hash)? {
                Some(place) => place,
                None => self.add_block(hash, content)?,
            };
            push_extent(extents, index, frame, offset);
        }
        Ok(())
    }

    fn add_block(&mut self, hash: BlockHash, content: &[u8]) -> io::Result<(u32, u8)> {
        if self.open.content.is_empty() {
            // Its name is known when it is full.
            self.open.index = self.known.frames.len() as u32;
            self.known.frames.push((Digest([0; 32]), 0));
            self.known.by_hash.begin_frame(self.open.index);
        }
        let (frame, offset) = (self.open.index, self.open.blocks.len() as u8);
        self.open.content.extend_from_slice(content);
        self.open.blocks.push(hash);
        self.known.by_hash.add(&hash);
        self.summary.new_bytes += BLOCK;
        if self.open.blocks.len() == self.frame_blocks {
            self.close_frame();
            if self.waiting_bytes >= BATCH_BYTES {
                self.flush_frames()?;
            }
        }
        Ok((frame, offset))
    }

    fn close_frame(&mut self) {
        if !self.open.content.is_empty() {
            self.waiting_bytes += self.open.content.len();
            self.waiting.push(std::mem::take(&mut self.open));
        }
    }

    /// Compresses the frames that wait, on all cores, and packs them in their order.
    fn flush_frames(&mut self) -> io::Result<()> {
        let waiting = std::mem::take(&mut self.waiting);
        self.waiting_bytes = 0;
        let known = self.bases.map(|_| &self.known);
        let encode = |frame: &NewFrame| Encoded::of(&frame.content, self.level, &self.form, known);
        let mut encoded = waiting.par_iter().map(encode).collect::<io::Result<Vec<Encoded>>>()?;
        if let Some(bases) = self.bases {
            for (frames, encoded) in waiting.chunks(DELTA_FRAMES).zip(encoded.chunks_mut(DELTA_FRAMES)) {
                add_deltas(frames, encoded, bases)?;
            }
        }
        for (frame, encoded) in waiting.into_iter().zip(encoded) {
            self.pack_frame(frame, encoded)?;
        }
        Ok(())
    }

    fn pack_frame(&mut self, frame: NewFrame, encoded: Encoded) -> io::Result<()> {
        let Encoded { digest, plain, anchors, bases, delta } = encoded;
        let length = frame.content.len() as u32;
        self.known.frames[frame.index as usize] = (digest, frame.blocks.len() as u16);
        self.summary.frames += 1;
        self.summary.stored_bytes += plain.bytes.len() as u64;
        self.pack.builder.add(plain.kind, digest, plain.encoding, &plain.bytes, plain.length);
        self.pack.hashes.frames.push(FrameHashes { digest, blocks: frame.blocks, anchors });
        self.close_pack_if(Which::Plain, TARGET_PACK_BYTES)?;
        if let Some(delta) = delta {
            self.summary.delta_frames += 1;
            self.summary.delta_bytes += delta.len() as u64;
            self.delta_pack.builder.add_delta(EntryKind::Data, digest, &delta, length, bases);
            self.delta_pack.hashes.deltas.push(digest);
            self.close_pack_if(Which::Delta, TARGET_PACK_BYTES)?;
        }
        Ok(())
    }

    fn close_pack_if(&mut self, which: Which, limit: usize) -> io::Result<()> {
        let open = match which {
            Which::Plain => &mut self.pack,
            Which::Delta => &mut self.delta_pack,
        };
        if open.builder.is_empty() || open.builder.len() < limit {
            return Ok(());
        }
        let OpenPack { builder, hashes } = std::mem::take(open);
        let pack = builder.finish();
        self.used_packs.insert(pack.digest);
        self.known.home.extend(pack.directory.entries.iter().map(|entry| (entry.digest, pack.digest)));
        self.sink.put(pack, hashes)
    }

    /// Closes the last packs. Returns the names of all packs that the images need, sorted.
    pub fn finish(mut self) -> io::Result<(Vec<Digest>, Summary)> {
        self.close_pack_if(Which::Plain, 0)?;
        self.close_pack_if(Which::Delta, 0)?;
        let mut packs: Vec<Digest> = self.used_packs.into_iter().collect();
        packs.sort_unstable();
        Ok((packs, self.summary))
    }
}

#[derive(Clone, Copy)]
enum Which {
    Plain,
    Delta,
}

impl Encoded {
    /// Compared with `known`, if it is given; then the content is one part long at most.
    fn of(content: &[u8], level: i32, form: &Form, known: Option<&KnownBlocks>) -> io::Result<Self> {
        let anchors = form.anchors(content);
        let bases = known.zip(anchors.first()).map_or_else(Vec::new, |(known, anchors)| known.bases(anchors));
        let digest = form.name(content);
        let plain = form.encode(&digest, EntryKind::Data, content, level)?;
        Ok(Self { digest, plain, anchors, bases, delta: None })
    }
}

/// Makes the differences that are worth keeping, on all cores. A frame that resembles nothing costs nothing here.
fn add_deltas(frames: &[NewFrame], encoded: &mut [Encoded], reader: &dyn BaseReader) -> io::Result<()> {
    let mut wanted: Vec<Digest> = encoded.iter().flat_map(|frame| &frame.bases).map(|base| base.frame).collect();
    wanted.sort_unstable();
    wanted.dedup();
    let contents: HashMap<Digest, Vec<u8>> = wanted.iter().copied().zip(reader.read(&wanted)?).collect();
    frames.par_iter().zip(encoded).try_for_each(|(frame, encoded)| {
        if encoded.bases.is_empty() {
            return Ok(());
        }
        let bases: Vec<&[u8]> = encoded.bases.iter().map(|base| base.of(&contents[&base.frame])).collect();
        let delta = encode_delta(&frame.content, &bases.concat())?;
        encoded.delta = is_worth(delta.len(), encoded.plain.bytes.len()).then_some(delta);
        Ok(())
    })
}

/// A directory has some 200 bytes for a difference, which hosts read as well.
fn is_worth(delta: usize, plain: usize) -> bool {
    delta + 256 < plain / 16 * 15
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

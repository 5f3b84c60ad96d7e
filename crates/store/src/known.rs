//! What a maker knows of what is published: blocks, pages and resemblances of packs that it made or read back verified.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use collective_model::Digest;
use rayon::prelude::*;

use crate::blocks::BlockIndex;
use crate::pack::{self, Base, EntryKind, PART_BYTES, PackError};
use crate::seal::{Form, Seal};
use crate::similar::{Similar, anchors};
use crate::{BLOCK, FRAME_BLOCKS};

const MAGIC: &[u8; 4] = b"CLH3";
/// A part's number within its frame or page takes this many bits.
const PART_BITS: u32 = 3;

/// The BLAKE3 of one block.
pub(crate) type BlockHash = [u8; 32];

/// The anchors of each part of a frame or page.
pub(crate) type PartAnchors = Vec<Vec<u32>>;

pub(crate) fn part_anchors(content: &[u8]) -> PartAnchors {
    content.chunks(PART_BYTES).map(anchors).collect()
}

/// What a maker remembers of a pack: names, block hashes and anchors, without the content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackHashes {
    pub(crate) pages: Vec<PageHashes>,
    pub(crate) frames: Vec<FrameHashes>,
    /// Frames and pages that the pack has as differences.
    pub(crate) deltas: Vec<Digest>,
}

/// What a maker remembers of a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PageHashes {
    pub digest: Digest,
    pub anchors: PartAnchors,
}

/// What a maker remembers of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FrameHashes {
    pub digest: Digest,
    pub blocks: Vec<BlockHash>,
    pub anchors: PartAnchors,
}

impl PackHashes {
    /// Verifies every frame of a pack that stands for itself, and takes its blocks' hashes.
    pub fn of(bytes: &[u8]) -> Result<Self, PackError> {
        Self::in_form(bytes, &Form::default())
    }

    /// The same of a private pack, for its owner.
    pub fn of_sealed(bytes: &[u8], seal: &Arc<Seal>) -> Result<Self, PackError> {
        Self::in_form(bytes, &Form(Some(seal.clone())))
    }

    fn in_form(bytes: &[u8], form: &Form) -> Result<Self, PackError> {
        let directory = pack::directory(bytes)?;
        let contents: Result<Vec<_>, _> =
            directory.entries.par_iter().map(|entry| pack::opened(bytes, entry, form)).collect();
        let mut found =
            Self { deltas: directory.deltas.iter().map(|delta| delta.entry.digest).collect(), ..Self::default() };
        for (entry, opened) in directory.entries.iter().zip(contents?) {
            let anchors = form.anchors(&opened.content);
            match opened.kind {
                EntryKind::Page => found.pages.push(PageHashes { digest: entry.digest, anchors }),
                EntryKind::Data => found.frames.push(FrameHashes {
                    digest: entry.digest,
                    blocks: opened.content.chunks_exact(BLOCK as usize).map(|block| form.block(block)).collect(),
                    anchors,
                }),
            }
        }
        Ok(found)
    }

    /// What is known of a private pack to somebody who read some of it: frames, with the names of their blocks, and pages. What
    /// else is in it is not compared with.
    pub fn of_parts(frames: Vec<(Digest, Vec<[u8; 32]>)>, pages: Vec<Digest>) -> Self {
        Self {
            pages: pages.into_iter().map(|digest| PageHashes { digest, anchors: Vec::new() }).collect(),
            frames: frames
                .into_iter()
                .map(|(digest, blocks)| FrameHashes { digest, blocks, anchors: Vec::new() })
                .collect(),
            deltas: Vec::new(),
        }
    }

    /// Its frames, and the hashes of their blocks.
    pub fn frames(&self) -> impl Iterator<Item = (&Digest, &[[u8; 32]])> {
        self.frames.iter().map(|frame| (&frame.digest, frame.blocks.as_slice()))
    }

    /// For a file: `"CLH3", u32 deltas, u32 pages, u32 frames, deltas x digest, pages x { digest, anchors }, frames x {
    /// digest, anchors, u16 blocks, blocks x hash }`, where anchors are `u8 parts, parts x { u16 count, count x u32 }`, and
    /// the BLAKE3 of all that, because a damaged memory would damage what is published.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        for count in [self.deltas.len(), self.pages.len(), self.frames.len()] {
            out.extend((count as u32).to_le_bytes());
        }
        self.deltas.iter().for_each(|digest| out.extend(digest.0));
        let put = |out: &mut Vec<u8>, digest: &Digest, parts: &[Vec<u32>]| {
            out.extend(digest.0);
            out.push(parts.len() as u8);
            for anchors in parts {
                out.extend((anchors.len() as u16).to_le_bytes());
                anchors.iter().for_each(|anchor| out.extend(anchor.to_le_bytes()));
            }
        };
        self.pages.iter().for_each(|page| put(&mut out, &page.digest, &page.anchors));
        for frame in &self.frames {
            put(&mut out, &frame.digest, &frame.anchors);
            out.extend((frame.blocks.len() as u16).to_le_bytes());
            frame.blocks.iter().for_each(|hash| out.extend(hash));
        }
        let check = Digest::of(&out);
        out.extend(check.0);
        out
    }

    /// `None`: damaged, or of another program; make it anew from the pack.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, check) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
        if Digest::of(body).0 != *check {
            return None;
        }
        let rest = &mut body.strip_prefix(MAGIC)?;
        let [deltas, pages, frames] = [number(rest)?, number(rest)?, number(rest)?];
        let mut found = Self::default();
        for _ in 0..deltas {
            found.deltas.push(Digest(take(rest)?));
        }
        let named = |rest: &mut &[u8]| {
            let digest = Digest(take(rest)?);
            let [parts] = take(rest).filter(|[parts]| *parts <= 1 << PART_BITS)?;
            let anchors = |rest: &mut &[u8]| {
                let count = u16::from_le_bytes(take(rest)?);
                (0..count).map(|_| number(rest)).collect::<Option<Vec<_>>>()
            };
            Some((digest, (0..parts).map(|_| anchors(rest)).collect::<Option<PartAnchors>>()?))
        };
        for _ in 0..pages {
            let (digest, anchors) = named(rest)?;
            found.pages.push(PageHashes { digest, anchors });
        }
        for _ in 0..frames {
            let (digest, anchors) = named(rest)?;
            let blocks = Some(u16::from_le_bytes(take(rest)?)).filter(|blocks| usize::from(*blocks) <= FRAME_BLOCKS)?;
            let blocks = (0..blocks).map(|_| take(rest)).collect::<Option<_>>()?;
            found.frames.push(FrameHashes { digest, blocks, anchors });
        }
        rest.is_empty().then_some(found)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

fn number(rest: &mut &[u8]) -> Option<u32> {
    take(rest).map(u32::from_le_bytes)
}

/// Blocks that published frames hold, frames that new ones may be compared with, and pages that exist.
#[derive(Default)]
pub struct KnownBlocks {
    /// The name of each frame, and of each page that may be a base, and its count of blocks.
    pub(crate) frames: Vec<(Digest, u16)>,
    pub(crate) by_hash: BlockIndex,
    pub(crate) pages: HashSet<Digest>,
    /// The pack of each frame and page that stands for itself.
    pub(crate) home: HashMap<Digest, Digest>,
    /// The packs that have a frame as a difference.
    pub(crate) deltas: HashMap<Digest, Vec<Digest>>,
    at_hosts: HashSet<Digest>,
    similar: Similar,
}

impl KnownBlocks {
    /// `at_hosts` are the frames and pages that a host of the newest version has: new ones may become differences to
    /// these.
    pub fn new(at_hosts: HashSet<Digest>) -> Self {
        Self { at_hosts, ..Self::default() }
    }

    /// Takes up a pack.
    pub fn learn(&mut self, pack: &Digest, hashes: &PackHashes) {
        for PageHashes { digest, anchors } in &hashes.pages {
            self.home.insert(*digest, *pack);
            self.pages.insert(*digest);
            self.resembles(digest, 0, anchors);
        }
        for digest in &hashes.deltas {
            self.deltas.entry(*digest).or_default().push(*pack);
        }
        for FrameHashes { digest, blocks, anchors } in &hashes.frames {
            self.home.insert(*digest, *pack);
            let frame = self.resembles(digest, blocks.len() as u16, anchors);
            self.by_hash.begin_frame(frame);
            blocks.iter().for_each(|hash| self.by_hash.add(hash));
        }
    }

    /// Takes up frames that are kept elsewhere, by whoever will read: what is like them refers to them, and no pack of
    /// ours has to have it. `blocks` are [`Seal::block_names`](crate::seal::Seal::block_names) of each one's content.
    pub fn learn_elsewhere(&mut self, frames: &[(Digest, Vec<[u8; 32]>)]) {
        for (digest, blocks) in frames {
            let frame = self.frames.len() as u32;
            self.frames.push((*digest, blocks.len() as u16));
            self.by_hash.begin_frame(frame);
            blocks.iter().for_each(|hash| self.by_hash.add(hash));
        }
    }

    fn resembles(&mut self, digest: &Digest, blocks: u16, parts: &[Vec<u32>]) -> u32 {
        let number = self.frames.len() as u32;
        self.frames.push((*digest, blocks));
        if self.at_hosts.contains(digest) {
            for (part, anchors) in (0..).zip(parts) {
                self.similar.learn(number << PART_BITS | part, anchors);
            }
        }
        number
    }

    /// Has to be called after the last pack was learned, before [`bases`](Self::bases).
    pub(crate) fn ready(&mut self) {
        self.similar.sort();
    }

    /// The parts of frames and pages at hosts that resemble a part with these anchors, the best first.
    pub(crate) fn bases(&self, anchors: &[u32]) -> Vec<Base> {
        let base = |number: u32| Base {
            frame: self.frames[(number >> PART_BITS) as usize].0,
            part: (number & ((1 << PART_BITS) - 1)) as u8,
        };
        self.similar.best(anchors).into_iter().map(base).collect()
    }

    /// All packs that have a frame or page, in any form.
    pub(crate) fn packs_of<'a>(&'a self, digest: &Digest) -> impl Iterator<Item = &'a Digest> + use<'a> {
        self.home.get(digest).into_iter().chain(self.deltas.get(digest).into_iter().flatten())
    }
}

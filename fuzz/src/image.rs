//! The pages of an image's index, alone and put together.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};
use collective_store::page::{FANOUT, Leaf, Node, Root, height};
use collective_store::{BLOCK, Encoding, FRAME_BLOCKS, PackInfo, Source, SourceError};
use futures_util::future::{BoxFuture, FutureExt};

use super::{block_on, folder, number};

/// One page of any kind. What is read is written as the same bytes.
pub fn page(data: &[u8]) {
    assert!(Root::decode(data).is_ok_and(|root| root.encode() == data) || Root::decode(data).is_err());
    assert!(Leaf::decode(data).is_ok_and(|leaf| leaf.encode() == data) || Leaf::decode(data).is_err());
    for level in 0..3 {
        let Ok(node) = Node::decode(data, level) else { continue };
        assert!(node.encode() == data);
    }
}

/// A store that has nothing: all there is, is in the cache.
struct Nothing;

impl Source for Nothing {
    fn packs<'a>(&'a self, _: &'a ApplianceName, _: &'a Digest) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async { Ok(Vec::new()) }.boxed()
    }

    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        _: &'a Digest,
        _: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async { Err(SourceError::Refused("there is nothing".into())) }.boxed()
    }
}

/// An image of up to four leaves: its size in units of 512 bytes, how tall it says it is (0: as it should be), four slots,
/// the length of each leaf, and the leaves. Names are made right, so that what the pages say is what is put together.
pub fn image(data: &[u8]) {
    let rest = &mut { data };
    let size = number(rest, 5) * 512;
    let tall = number(rest, 1) as u16;
    let slots: Vec<u16> = (0..4).map(|_| number(rest, 2) as u16).collect();
    let lengths: Vec<usize> = (0..4).map(|_| number(rest, 2) as usize).collect();
    let folder = folder();
    let cache = Cache::open(folder.path()).expect("a cache");
    let keep = |page: &[u8]| {
        let digest = Digest::of(page);
        cache.put(&digest, Encoding::Plain, page, page.len() as u32).expect("a page in the cache");
        digest
    };
    let mut children = Vec::new();
    for (slot, length) in slots.into_iter().zip(lengths) {
        let (leaf, after) = rest.split_at(length.min(rest.len()));
        *rest = after;
        if !leaf.is_empty() {
            children.push((slot, keep(leaf)));
        }
    }
    let tall = if tall == 0 { height(size) } else { tall };
    let mut top = children.first().map(|(_, leaf)| *leaf);
    for level in 1..tall.min(5) {
        // Only the lowest level has more than one child.
        let children =
            if level == 1 { std::mem::take(&mut children) } else { top.map(|top| (0, top)).into_iter().collect() };
        top = Some(keep(&Node { level, children }.encode()));
    }
    let root = keep(&Root { size, height: tall, top }.encode());
    let store = FrameStore::new(cache, Arc::new(Nothing));
    if let Ok(map) = block_on(ImageMap::load(&store, root)) {
        holds_together(&map);
    }
}

fn holds_together(map: &ImageMap) {
    assert!(map.used_bytes() <= map.blocks() * BLOCK);
    assert!(map.blocks() <= FANOUT.pow(3) * 2048);
    let (mut block, mut used) = (0, 0);
    while block < map.blocks() {
        let blocks = match map.run_at(block) {
            Run::Zeros(blocks) => blocks,
            Run::Frame { length, offset, blocks, .. } => {
                assert!(u64::from(offset) + blocks <= u64::from(length) / BLOCK && blocks <= FRAME_BLOCKS as u64);
                used += blocks;
                blocks
            }
        };
        assert!(blocks > 0 && block + blocks <= map.blocks(), "a run leaves the image");
        block += blocks;
    }
    assert_eq!(used * BLOCK, map.used_bytes());
}

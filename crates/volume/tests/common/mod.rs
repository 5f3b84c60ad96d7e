//! What the tests of this crate share: a store in memory that can be slow or away, and disks published to it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_store::pack::Pack;
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;
use collective_store::{PackInfo, Source, SourceError};
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

/// A store in memory.
pub struct Shelf {
    packs: Mutex<HashMap<Digest, Bytes>>,
    /// What was read, in order.
    pub reads: Mutex<Vec<(Digest, Range<u64>)>>,
    /// Nobody answers.
    pub away: AtomicBool,
    /// Reads wait for a permit each; a test that wants a slow store takes them all away.
    pub permits: Semaphore,
}

impl Default for Shelf {
    fn default() -> Self {
        let permits = Semaphore::new(1 << 16);
        Self { packs: Mutex::default(), reads: Mutex::default(), away: AtomicBool::new(false), permits }
    }
}

struct ShelfSink<'a>(&'a Shelf);

impl PackSink for ShelfSink<'_> {
    fn put(&mut self, pack: Pack, _: PackHashes) -> io::Result<()> {
        self.0.packs.lock().unwrap().insert(pack.digest, pack.bytes.into());
        Ok(())
    }
}

impl Shelf {
    fn present(&self) -> Result<(), SourceError> {
        if self.away.load(Ordering::SeqCst) { Err(SourceError::Away("unplugged".into())) } else { Ok(()) }
    }
}

impl Source for Shelf {
    fn packs<'a>(&'a self, _: &'a ApplianceName, _: &'a Digest) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        Box::pin(async move {
            self.present()?;
            let packs = self.packs.lock().unwrap();
            Ok(packs
                .iter()
                .map(|(digest, bytes)| PackInfo { digest: *digest, size: bytes.len() as u64, directory: 0 })
                .collect())
        })
    }

    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            self.present()?;
            self.reads.lock().unwrap().push((*pack, range.clone()));
            let _permit = self.permits.acquire().await;
            Ok(self.packs.lock().unwrap()[pack].slice(range.start as usize..range.end as usize))
        })
    }
}

/// A store over an empty cache in `folder`.
pub async fn store_of(folder: &Path, shelf: &Arc<Shelf>) -> Arc<FrameStore> {
    let store = FrameStore::new(Cache::open(folder).unwrap(), shelf.clone());
    store.add_version(&"demo/notes".parse().unwrap(), &Digest::of(b"1")).await;
    Arc::new(store)
}

/// Publishes `content`, and loads its index.
pub async fn image_of(shelf: &Shelf, store: &FrameStore, content: &[u8]) -> Arc<ImageMap> {
    let mut sink = ShelfSink(shelf);
    let mut publisher = Publisher::new(KnownBlocks::default(), &mut sink);
    let root = publisher.add(&content.to_vec(), &[], &Trace::default(), &|_| {}).unwrap();
    publisher.finish().unwrap();
    Arc::new(ImageMap::load(store, root).await.unwrap())
}

/// Bytes that repeat nowhere and are told apart by `seed`.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend(state.to_le_bytes());
    }
    out.truncate(length);
    out
}

/// Waits for something that has to come.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < limit, "in vain: {what}");
        std::thread::yield_now();
    }
}

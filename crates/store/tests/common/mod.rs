//! Two versions in a store, and cases that can be repeated.

#![allow(dead_code)]

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::pack::{self, Pack};
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;
use collective_store::{PackInfo, Source, SourceError};
use collective_testkit::Dice;
use futures_util::future::{BoxFuture, FutureExt, pending};

/// A store whose process never answers from some request on, as when the host dies while it waits.
pub struct Shelf {
    pub packs: Arc<HashMap<Digest, Bytes>>,
    pub lists: Arc<HashMap<Digest, Vec<PackInfo>>>,
    pub left: AtomicU64,
    pub died: tokio::sync::Notify,
}

impl Source for Shelf {
    fn packs<'a>(
        &'a self,
        _: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async move { Ok(self.lists[version].clone()) }.boxed()
    }

    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            if self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
                self.died.notify_one();
                return pending().await;
            }
            Ok(self.packs[pack].slice(range.start as usize..range.end as usize))
        }
        .boxed()
    }
}

pub struct Version {
    pub name: Digest,
    pub image: Digest,
    pub disk: Vec<u8>,
}

/// Two versions, the second with differences to the first.
pub struct Published {
    pub packs: Arc<HashMap<Digest, Bytes>>,
    pub lists: Arc<HashMap<Digest, Vec<PackInfo>>>,
    pub versions: [Version; 2],
}

#[derive(Default)]
pub struct Sink(pub Vec<Pack>);

impl PackSink for Sink {
    fn put(&mut self, pack: Pack, _: PackHashes) -> io::Result<()> {
        self.0.push(pack);
        Ok(())
    }
}

pub struct Contents(pub HashMap<Digest, Vec<u8>>);

impl BaseReader for Contents {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        Ok(frames.iter().map(|frame| self.0[frame].clone()).collect())
    }
}

pub fn info(pack: &Digest, bytes: &Bytes) -> PackInfo {
    let size = bytes.len() as u64;
    let trailer = &bytes[bytes.len() - pack::TRAILER as usize..];
    PackInfo { digest: *pack, size, directory: size - pack::directory_range(trailer, size).unwrap().start }
}

pub fn published() -> &'static Published {
    static PUBLISHED: OnceLock<Published> = OnceLock::new();
    PUBLISHED.get_or_init(|| {
        // More than one leaf, and frames of every length.
        let old = [Dice::new(1).bytes(300 << 12), vec![0; 1800 << 12], Dice::new(2).bytes(90 << 12)].concat();
        let mut new = old.clone();
        new[40 << 12..200 << 12].copy_from_slice(&old[(40 << 12) + 1033..(200 << 12) + 1033]);
        new[250 << 12..270 << 12].copy_from_slice(&Dice::new(3).bytes(20 << 12));
        let (mut packs, mut lists): (HashMap<Digest, Bytes>, HashMap<Digest, Vec<PackInfo>>) = Default::default();
        let versions = [(b"1", old), (b"2", new)].map(|(name, disk)| {
            let mut contents = HashMap::new();
            for bytes in packs.values() {
                for entry in pack::directory(bytes).unwrap().entries {
                    contents.insert(entry.digest, pack::contents(bytes, &entry).unwrap());
                }
            }
            let mut known = KnownBlocks::new(contents.keys().copied().collect());
            packs.iter().for_each(|(digest, bytes)| known.learn(digest, &PackHashes::of(bytes).unwrap()));
            let (mut sink, contents) = (Sink::default(), Contents(contents));
            let mut publisher = Publisher::new(known, &mut sink).with_bases(&contents);
            let image = publisher.add(&disk, &[], &Trace::default(), &|_| {}).unwrap();
            let (needed, _) = publisher.finish().unwrap();
            packs.extend(sink.0.into_iter().map(|pack| (pack.digest, Bytes::from(pack.bytes))));
            let name = Digest::of(name);
            lists.insert(name, needed.iter().map(|pack| info(pack, &packs[pack])).collect());
            Version { name, image, disk }
        });
        Published { packs: Arc::new(packs), lists: Arc::new(lists), versions }
    })
}

/// Names the seed if the test ends in a panic.
pub struct Seed(pub u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was seed {0}: run this test again with SEED={0}", self.0);
        }
    }
}

pub fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

pub fn seeds(count: u64) -> Range<u64> {
    number("SEED").map_or(0..number("SEEDS").unwrap_or(count), |seed| seed..seed + 1)
}

/// In memory where that can be: syncs are part of the cases, and would wait for everybody else's data.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A process of the host: it has a view of the cache of its own.
pub async fn process(folder: &Path, requests: u64) -> (Arc<Shelf>, FrameStore) {
    let Published { packs, lists, versions } = published();
    let (left, died) = (AtomicU64::new(requests), tokio::sync::Notify::new());
    let shelf = Arc::new(Shelf { packs: packs.clone(), lists: lists.clone(), left, died });
    let store = FrameStore::new(Cache::open(folder).unwrap(), shelf.clone());
    for version in versions {
        store.add_version(&"p/app".parse().unwrap(), &version.name).await;
    }
    (shelf, store)
}

/// Two files of the folders below change places: a name that leads to the bytes of another file.
pub fn cross(folder: &Path, dice: &mut Dice) {
    let mut files: Vec<_> = Vec::new();
    for prefix in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        files.extend(std::fs::read_dir(prefix.path()).unwrap().map(|entry| entry.unwrap().path()));
    }
    files.sort();
    if files.len() > 1 {
        let (one, other) = (dice.pick(&files).clone(), dice.pick(&files).clone());
        let bytes = (std::fs::read(&one).unwrap(), std::fs::read(&other).unwrap());
        std::fs::write(one, bytes.1).unwrap();
        std::fs::write(other, bytes.0).unwrap();
    }
}

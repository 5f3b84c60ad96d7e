//! A host's cache through interrupted fetches, power cuts and disks that age: everything is read right afterwards, what is
//! damaged comes again, and the plan stays what moves.
//!
//! `SEED=17` repeats a case, `SEEDS=5000` runs so many.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};
use collective_store::pack::{self, Pack};
use collective_store::publish::{BaseReader, DiskReader, KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;
use collective_store::{BLOCK, PackInfo, Source, SourceError};
use collective_testkit::{Damage, Dice, damage_files};
use futures_util::future::{BoxFuture, FutureExt, pending};

/// A store whose process never answers from some request on, as when the host dies while it waits.
struct Shelf {
    packs: Arc<HashMap<Digest, Bytes>>,
    lists: Arc<HashMap<Digest, Vec<PackInfo>>>,
    left: AtomicU64,
    died: tokio::sync::Notify,
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

struct Version {
    name: Digest,
    image: Digest,
    disk: Vec<u8>,
}

/// Two versions, the second with differences to the first.
struct Published {
    packs: Arc<HashMap<Digest, Bytes>>,
    lists: Arc<HashMap<Digest, Vec<PackInfo>>>,
    versions: [Version; 2],
}

struct Memory<'a>(&'a [u8]);

impl DiskReader for Memory<'_> {
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[offset as usize..offset as usize + buffer.len()]);
        Ok(())
    }
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok((offset < self.size()).then(|| offset..self.size()))
    }
}

#[derive(Default)]
struct Sink(Vec<Pack>);

impl PackSink for Sink {
    fn put(&mut self, pack: Pack, _: PackHashes) -> io::Result<()> {
        self.0.push(pack);
        Ok(())
    }
}

struct Contents(HashMap<Digest, Vec<u8>>);

impl BaseReader for Contents {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        Ok(frames.iter().map(|frame| self.0[frame].clone()).collect())
    }
}

fn info(pack: &Digest, bytes: &Bytes) -> PackInfo {
    let size = bytes.len() as u64;
    let trailer = &bytes[bytes.len() - pack::TRAILER as usize..];
    PackInfo { digest: *pack, size, directory: size - pack::directory_range(trailer, size).unwrap().start }
}

fn published() -> &'static Published {
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
            let image = publisher.add(&Memory(&disk), &[], &Trace::default(), &|_| {}).unwrap();
            let (needed, _) = publisher.finish().unwrap();
            packs.extend(sink.0.into_iter().map(|pack| (pack.digest, Bytes::from(pack.bytes))));
            let name = Digest::of(name);
            lists.insert(name, needed.iter().map(|pack| info(pack, &packs[pack])).collect());
            Version { name, image, disk }
        });
        Published { packs: Arc::new(packs), lists: Arc::new(lists), versions }
    })
}

/// A process of the host: it has a view of the cache of its own.
async fn process(folder: &Path, requests: u64) -> (Arc<Shelf>, FrameStore) {
    let Published { packs, lists, versions } = published();
    let (left, died) = (AtomicU64::new(requests), tokio::sync::Notify::new());
    let shelf = Arc::new(Shelf { packs: packs.clone(), lists: lists.clone(), left, died });
    let store = FrameStore::new(Cache::open(folder).unwrap(), shelf.clone());
    for version in versions {
        store.add_version(&"p/app".parse().unwrap(), &version.name).await;
    }
    (shelf, store)
}

/// The host at work: it plans, fetches and reads, in any order.
async fn work(store: &FrameStore, dice: &mut Dice) {
    for _ in 0..4 {
        let version = dice.pick(&published().versions);
        let map = ImageMap::load(store, version.image).await.unwrap();
        let frames: Vec<Digest> = map.frames().filter(|_| dice.percent(70)).collect();
        match dice.roll(3) {
            0 => _ = store.prefetch(&frames, &|_| {}).await.unwrap(),
            1 => store.cache().sync().unwrap(),
            _ => read_some(store, &map, dice).await,
        }
    }
}

/// As a guest reads: a block here and there, twice, so that frames are kept decoded.
async fn read_some(store: &FrameStore, map: &ImageMap, dice: &mut Dice) {
    for _ in 0..12 {
        let Run::Frame { digest, length, offset, .. } = map.run_at(dice.roll(map.blocks())) else { continue };
        store.frame(&digest, length).await.unwrap();
        let from = usize::from(offset) * BLOCK as usize;
        let mut block = vec![0; BLOCK as usize];
        assert!(store.read_at_hand(&digest, length, from, &mut block).unwrap());
    }
}

/// All of a version, half of it in the way guests read.
async fn read_all(store: &FrameStore, map: &ImageMap, dice: &mut Dice) -> Vec<u8> {
    let mut disk = vec![0; map.size as usize];
    let mut block = 0;
    while block < map.blocks() {
        block += match map.run_at(block) {
            Run::Zeros(blocks) => blocks,
            Run::Frame { digest, length, offset, blocks } => {
                let from = usize::from(offset) * BLOCK as usize;
                let part = &mut disk[(block * BLOCK) as usize..((block + blocks) * BLOCK) as usize];
                if dice.percent(50) || !store.read_at_hand(&digest, length, from, part).unwrap() {
                    let frame = store.frame(&digest, length).await.unwrap();
                    part.copy_from_slice(&frame[from..from + part.len()]);
                }
                blocks
            }
        };
    }
    disk
}

/// Two files change places: a name that leads to the bytes of another file.
fn cross(folder: &Path, dice: &mut Dice) {
    let mut files: Vec<_> = Vec::new();
    for prefix in std::fs::read_dir(folder.join("frames")).unwrap().map(Result::unwrap) {
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

/// What is fetched is what was planned.
async fn plan_and_fetch(store: &FrameStore, map: &ImageMap) {
    let frames: Vec<Digest> = map.frames().collect();
    let before = store.counters.fetched.load(Ordering::Relaxed);
    let lack = store.lack(&frames).await.unwrap();
    let told = Mutex::new(0);
    let moved = store.prefetch(&frames, &|bytes| *told.lock().unwrap() += bytes).await.unwrap();
    assert_eq!((moved, *told.lock().unwrap()), (lack.bytes, lack.bytes));
    assert_eq!(store.counters.fetched.load(Ordering::Relaxed) - before, lack.bytes);
}

struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was seed {0}: run this test again with SEED={0}", self.0);
        }
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn seeds() -> Range<u64> {
    number("SEED").map_or(0..number("SEEDS").unwrap_or(250), |seed| seed..seed + 1)
}

/// In memory where that can be: syncs are part of the cases, and would wait for everybody else's data.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A fetch that is killed somewhere, and what is left in the cache damaged; then the machine is up again.
fn interrupted(seed: u64, folder: &Path, reboots: bool) -> Dice {
    let mut dice = Dice::new(seed);
    for _ in 0..1 + dice.roll(2) {
        let requests = dice.roll(24);
        run(async {
            let (shelf, store) = process(folder, requests).await;
            tokio::select! {
                () = shelf.died.notified() => {}
                () = work(&store, &mut dice) => {}
            }
        });
        // A process that died while it wrote.
        if dice.percent(30) {
            std::fs::write(folder.join("packs").join(".part-1-1"), dice.bytes(100)).unwrap();
        }
        if dice.percent(70) {
            let percent = 1 + dice.roll(60);
            let ways: &[Damage] = if reboots { &Damage::POWER_CUT } else { &Damage::AGE };
            damage_files(folder, percent, ways, &mut dice).unwrap();
            if dice.percent(20) {
                cross(folder, &mut dice);
            }
            if reboots {
                std::fs::write(folder.join("boot"), "another boot").unwrap();
            }
        }
    }
    dice
}

#[test]
fn after_any_power_cut_all_is_read_right_and_the_plan_is_what_moves() {
    for seed in seeds() {
        let _named = Seed(seed);
        let folder = folder();
        let mut dice = interrupted(seed, folder.path(), true);
        run(async {
            let (_, store) = process(folder.path(), u64::MAX).await;
            let version = dice.pick(&published().versions);
            let map = ImageMap::load(&store, version.image).await.unwrap();
            plan_and_fetch(&store, &map).await;
            let moved = store.counters.fetched.load(Ordering::Relaxed);
            assert!(read_all(&store, &map, &mut dice).await == version.disk);
            assert_eq!(store.counters.fetched.load(Ordering::Relaxed), moved, "all of it was here");
        });
    }
}

/// Without a reboot nobody looks at what is damaged: it is found when it is read.
#[test]
fn a_disk_that_ages_costs_time_and_never_right_bytes() {
    for seed in seeds() {
        let _named = Seed(seed);
        let folder = folder();
        let mut dice = interrupted(seed, folder.path(), false);
        run(async {
            let (_, one) = process(folder.path(), u64::MAX).await;
            let (_, other) = process(folder.path(), u64::MAX).await;
            for store in [&one, &other] {
                let version = dice.pick(&published().versions);
                let map = ImageMap::load(store, version.image).await.unwrap();
                if dice.percent(50) {
                    store.prefetch(&map.frames().collect::<Vec<_>>(), &|_| {}).await.unwrap();
                }
                assert!(read_all(store, &map, &mut dice).await == version.disk);
            }
            // By now everything was read once, and is sound: plans are exact again.
            for version in &published().versions {
                let map = ImageMap::load(&one, version.image).await.unwrap();
                assert!(read_all(&one, &map, &mut dice).await == version.disk);
                plan_and_fetch(&one, &map).await;
            }
        });
    }
}

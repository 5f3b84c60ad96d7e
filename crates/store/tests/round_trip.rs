//! A disk goes in, the same disk comes out; what versions share moves once; nothing damaged ever comes out.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::depot::Depot;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::{ImageMap, Run};
use collective_store::pack::{self, Pack};
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes, PackSink, Publisher, Summary};
use collective_store::trace::Trace;
use collective_store::{BLOCK, PackInfo, Source, SourceError};
use futures_util::future::BoxFuture;
use proptest::prelude::*;

/// A store in memory that can be made to misbehave.
#[derive(Default)]
struct Shelf {
    packs: Mutex<HashMap<Digest, Bytes>>,
    lists: Mutex<HashMap<Digest, Vec<PackInfo>>>,
    requests: AtomicUsize,
    away: AtomicBool,
    lying: AtomicBool,
    /// The next answer has another bit in this byte.
    spoilt: Mutex<Option<usize>>,
}

struct ShelfSink<'a>(&'a Shelf);

impl PackSink for ShelfSink<'_> {
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> io::Result<()> {
        assert_eq!(PackHashes::of(&pack.bytes).unwrap(), hashes, "as if it were read back");
        assert_eq!(PackHashes::decode(&hashes.encode()), Some(hashes));
        self.0.packs.lock().unwrap().insert(pack.digest, pack.bytes.into());
        Ok(())
    }
}

impl Source for Shelf {
    fn packs<'a>(
        &'a self,
        _: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        Box::pin(async move {
            if self.away.load(Ordering::SeqCst) {
                return Err(SourceError::Away("unplugged".into()));
            }
            Ok(self.lists.lock().unwrap()[version].clone())
        })
    }

    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            self.requests.fetch_add(1, Ordering::SeqCst);
            if self.away.load(Ordering::SeqCst) {
                return Err(SourceError::Away("unplugged".into()));
            }
            let bytes = self.packs.lock().unwrap()[pack].slice(range.start as usize..range.end as usize);
            if let Some(at) = self.spoilt.lock().unwrap().take() {
                let mut bytes = bytes.to_vec();
                bytes[at] ^= 1;
                return Ok(bytes.into());
            }
            if self.lying.load(Ordering::SeqCst) {
                let mut bytes = bytes.to_vec();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                return Ok(bytes.into());
            }
            Ok(bytes)
        })
    }
}

fn appliance() -> ApplianceName {
    "demo/notes".parse().unwrap()
}

/// The content of all frames of the shelf.
struct Contents(HashMap<Digest, Vec<u8>>);

impl BaseReader for Contents {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        Ok(frames.iter().map(|frame| self.0[frame].clone()).collect())
    }
}

/// Publishes `disk` as `version`, knowing the packs of `base`, to whose frames there may be differences.
fn publish(shelf: &Shelf, disk: &[u8], version: Digest, base: Option<Digest>) -> (Digest, Summary) {
    let packs = base.map(|base| shelf.lists.lock().unwrap()[&base].clone()).unwrap_or_default();
    let packs: Vec<(Digest, Bytes)> =
        packs.iter().map(|info| (info.digest, shelf.packs.lock().unwrap()[&info.digest].clone())).collect();
    let mut contents = HashMap::new();
    for (_, bytes) in &packs {
        for entry in pack::directory(bytes).unwrap().entries {
            contents.insert(entry.digest, pack::contents(bytes, &entry).unwrap());
        }
    }
    let mut known = KnownBlocks::new(contents.keys().copied().collect());
    packs.iter().for_each(|(digest, bytes)| known.learn(digest, &PackHashes::of(bytes).unwrap()));
    let mut sink = ShelfSink(shelf);
    let contents = Contents(contents);
    let mut publisher = Publisher::new(known, &mut sink).with_bases(&contents);
    let image = publisher.add(&disk.to_vec(), &[], &Trace::default(), &|_| {}).unwrap();
    let (packs, summary) = publisher.finish().unwrap();
    let infos = packs.into_iter().map(|digest| info(shelf, digest)).collect();
    shelf.lists.lock().unwrap().insert(version, infos);
    (image, summary)
}

fn info(shelf: &Shelf, digest: Digest) -> PackInfo {
    let bytes = shelf.packs.lock().unwrap()[&digest].clone();
    let size = bytes.len() as u64;
    let trailer = &bytes[bytes.len() - pack::TRAILER as usize..];
    PackInfo { digest, size, directory: size - pack::directory_range(trailer, size).unwrap().start }
}

async fn open(shelf: &Arc<Shelf>, folder: &std::path::Path, version: Digest) -> FrameStore {
    let store = FrameStore::new(Cache::open(folder).unwrap(), shelf.clone());
    store.add_version(&appliance(), &version).await;
    store
}

async fn read_all(store: &FrameStore, image: Digest) -> Result<Vec<u8>, FetchError> {
    let map = ImageMap::load(store, image).await?;
    let mut out = Vec::new();
    let mut block = 0;
    while block < map.blocks() {
        block += match map.run_at(block) {
            Run::Zeros(blocks) => {
                out.resize(out.len() + (blocks * BLOCK) as usize, 0);
                blocks
            }
            Run::Frame { digest, length, offset, blocks } => {
                let frame = store.frame(&digest, length).await?;
                let from = usize::from(offset) * BLOCK as usize;
                out.extend_from_slice(&frame[from..from + (blocks * BLOCK) as usize]);
                blocks
            }
        };
    }
    out.truncate(map.size as usize);
    Ok(out)
}

/// `blocks` blocks whose content depends on the numbers given; 0 is a block of zeros.
fn disk_of(blocks: &[u16]) -> Vec<u8> {
    blocks
        .iter()
        .flat_map(|n| (0..BLOCK).map(move |i| if *n == 0 { 0 } else { (u64::from(*n) * 31 + i / 7) as u8 | 1 }))
        .collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_disk_and_its_successor(
        first in proptest::collection::vec(0u16..40, 1..300),
        changes in proptest::collection::vec((0usize..300, 0u16..80), 0..40),
        odd in 0usize..8,
    ) {
        let shelf = Arc::new(Shelf::default());
        let mut old = disk_of(&first);
        old.truncate(old.len() - odd * 512);
        let mut second = first.clone();
        for (at, value) in changes {
            let at = at % second.len();
            second[at] = value;
        }
        let mut new = disk_of(&second);
        new.truncate(new.len() - odd * 512);
        let (v1, v2) = (Digest::of(b"1"), Digest::of(b"2"));
        let (image1, _) = publish(&shelf, &old, v1, None);
        let (image2, summary) = publish(&shelf, &new, v2, Some(v1));
        let fresh: std::collections::HashSet<_> = new.chunks(4096).filter(|b| b.iter().any(|x| *x != 0)).collect();
        let known: std::collections::HashSet<_> = old.chunks(4096).collect();
        let expected = fresh.difference(&known).count() as u64 * BLOCK;
        // Only a last block shorter than 4 KiB may differ between the two ways to count.
        prop_assert!(summary.new_bytes.abs_diff(expected) <= BLOCK);
        let folder = tempfile::tempdir().unwrap();
        run(async {
            let store = open(&shelf, folder.path(), v2).await;
            store.add_version(&appliance(), &v1).await;
            prop_assert_eq!(read_all(&store, image2).await.unwrap(), new);
            prop_assert_eq!(read_all(&store, image1).await.unwrap(), old);
            Ok(())
        })?;
    }
}

fn random_disk(blocks: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; (blocks * BLOCK) as usize];
    let mut reader = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    reader.fill(&mut bytes);
    bytes
}

#[test]
fn what_lack_says_is_what_prefetch_moves_and_nothing_twice() {
    let shelf = Arc::new(Shelf::default());
    let (v1, v2) = (Digest::of(b"1"), Digest::of(b"2"));
    let old = random_disk(5000, 1);
    let mut new = old.clone();
    new[40 << 12..900 << 12].copy_from_slice(&random_disk(860, 2));
    let (image1, _) = publish(&shelf, &old, v1, None);
    let (image2, _) = publish(&shelf, &new, v2, Some(v1));
    let folder = tempfile::tempdir().unwrap();
    run(async {
        let store = open(&shelf, folder.path(), v1).await;
        let map = ImageMap::load(&store, image1).await.unwrap();
        let frames: Vec<_> = map.frames().collect();
        let lack = store.lack(&frames).await.unwrap();
        assert_eq!(lack.frames, frames.len() as u64);
        assert_eq!(store.prefetch(&frames, &|_| {}).await.unwrap(), lack.bytes);
        assert_eq!(store.prefetch(&frames, &|_| {}).await.unwrap(), 0);

        store.add_version(&appliance(), &v2).await;
        let map = ImageMap::load(&store, image2).await.unwrap();
        let frames: Vec<_> = map.frames().collect();
        let before = store.counters.fetched.load(Ordering::Relaxed);
        let lack = store.lack(&frames).await.unwrap();
        assert!(lack.bytes >= 860 * BLOCK && lack.bytes < 900 * BLOCK, "{lack:?}");
        let requests = shelf.requests.load(Ordering::SeqCst);
        assert_eq!(store.prefetch(&frames, &|_| {}).await.unwrap(), lack.bytes);
        assert!(shelf.requests.load(Ordering::SeqCst) - requests <= 3, "neighbours travel together");
        assert_eq!(store.counters.fetched.load(Ordering::Relaxed) - before, lack.bytes);
        shelf.away.store(true, Ordering::SeqCst);
        assert_eq!(read_all(&store, image2).await.unwrap(), new, "all of it is here");
    });
}

/// A disk whose blocks are those of `old` from `from` on, shifted by a few bytes, as recompiled programs are.
fn shifted(old: &[u8], from: usize, blocks: usize) -> Vec<u8> {
    let at = from * BLOCK as usize;
    let mut new = old.to_vec();
    new[at..at + blocks * BLOCK as usize].copy_from_slice(&old[at + 1033..at + 1033 + blocks * BLOCK as usize]);
    new
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    /// Whatever a host has of the old version, the plan is what moves, and what comes out is right.
    #[test]
    fn the_plan_is_exact_with_any_cache(
        has in proptest::collection::vec(any::<bool>(), 15),
        from in 0usize..300,
        blocks in 1usize..160,
        has_pages: bool,
    ) {
        let shelf = Arc::new(Shelf::default());
        let (v1, v2) = (Digest::of(b"1"), Digest::of(b"2"));
        let old = random_disk(480, 1);
        let new = shifted(&old, from, blocks);
        let (image1, _) = publish(&shelf, &old, v1, None);
        let (image2, summary) = publish(&shelf, &new, v2, Some(v1));
        prop_assert!(summary.delta_frames as usize >= blocks / 32);
        let folder = tempfile::tempdir().unwrap();
        run(async {
            let store = open(&shelf, folder.path(), v1).await;
            let map = ImageMap::load(&store, image1).await.unwrap();
            let some: Vec<_> = map.frames().zip(&has).filter(|(_, has)| **has).map(|(digest, _)| digest).collect();
            store.prefetch(&some, &|_| {}).await.unwrap();
            if !has_pages {
                map.pages().iter().for_each(|page| store.cache().remove(page).unwrap());
            }
            let store = open(&shelf, folder.path(), v2).await;
            let frames: Vec<_> = ImageMap::load(&store, image2).await.unwrap().frames().collect();
            let before = store.counters.fetched.load(Ordering::Relaxed);
            let lack = store.lack(&frames).await.unwrap();
            let told = AtomicUsize::new(0);
            let progress = |bytes| { told.fetch_add(bytes as usize, Ordering::Relaxed); };
            prop_assert_eq!(store.prefetch(&frames, &progress).await.unwrap(), lack.bytes);
            prop_assert_eq!(store.counters.fetched.load(Ordering::Relaxed) - before, lack.bytes);
            prop_assert_eq!(told.load(Ordering::Relaxed) as u64, lack.bytes);
            if has.iter().all(|has| *has) {
                prop_assert!(lack.bytes < 160 * BLOCK / 4, "{:?}", lack);
            }
            shelf.away.store(true, Ordering::SeqCst);
            prop_assert_eq!(read_all(&store, image2).await.unwrap(), new);
            Ok(())
        })?;
    }
}

#[test]
fn differences_serve_readers_too_and_bad_ones_are_passed_over() {
    let (v1, v2) = (Digest::of(b"1"), Digest::of(b"2"));
    let shelf = Arc::new(Shelf::default());
    let old = random_disk(320, 1);
    let new = shifted(&old, 64, 200);
    let (image1, _) = publish(&shelf, &old, v1, None);
    let (image2, summary) = publish(&shelf, &new, v2, Some(v1));
    assert!(summary.delta_frames == 7 && summary.delta_bytes < 10_000, "{summary:?}");
    let moved = |prefetch: bool| {
        let folder = tempfile::tempdir().unwrap();
        let (shelf, new) = (shelf.clone(), new.clone());
        run(async move {
            let store = open(&shelf, folder.path(), v1).await;
            let frames: Vec<_> = ImageMap::load(&store, image1).await.unwrap().frames().collect();
            store.prefetch(&frames, &|_| {}).await.unwrap();
            let store = open(&shelf, folder.path(), v2).await;
            if prefetch {
                let frames: Vec<_> = ImageMap::load(&store, image2).await.unwrap().frames().collect();
                store.prefetch(&frames, &|_| {}).await.unwrap();
            }
            assert_eq!(read_all(&store, image2).await.unwrap(), new);
            store.counters.fetched.load(Ordering::Relaxed)
        })
    };
    assert_eq!(moved(true), summary.delta_bytes);
    assert_eq!(moved(false), summary.delta_bytes);
    for bytes in shelf.packs.lock().unwrap().values_mut() {
        let mut damaged = bytes.to_vec();
        let deltas = pack::directory(bytes).unwrap().deltas;
        deltas.iter().for_each(|delta| damaged[delta.entry.offset as usize] ^= 1);
        *bytes = damaged.into();
    }
    assert_eq!(moved(true), 200 * BLOCK);
    assert_eq!(moved(false), 200 * BLOCK);
}

#[test]
fn each_content_is_delivered_once_and_little_is_kept() {
    let shelf = Arc::new(Shelf::default());
    let (v1, v2) = (Digest::of(b"1"), Digest::of(b"2"));
    let old = random_disk(480, 1);
    let (image1, _) = publish(&shelf, &old, v1, None);
    let (image2, _) = publish(&shelf, &shifted(&old, 100, 90), v2, Some(v1));
    let folder = tempfile::tempdir().unwrap();
    run(async {
        let store = open(&shelf, folder.path(), v1).await;
        let some: Vec<_> = ImageMap::load(&store, image1).await.unwrap().frames().take(7).collect();
        store.prefetch(&some, &|_| {}).await.unwrap();
        let store = open(&shelf, folder.path(), v2).await;
        let frames: Vec<_> = ImageMap::load(&store, image2).await.unwrap().frames().collect();
        let lack = store.lack(&frames).await.unwrap();
        let got = Arc::new(Mutex::new(Vec::new()));
        let taker = got.clone();
        let take = move |digest: &Digest, content: &[u8]| {
            assert_eq!(Digest::of(content), *digest);
            taker.lock().unwrap().push(*digest);
            Ok(())
        };
        let twice = [frames.clone(), frames.clone()].concat();
        assert_eq!(store.deliver(&twice, Arc::new(take), &|_| {}).await.unwrap(), lack.bytes);
        let (mut got, mut wanted) = (got.lock().unwrap().clone(), frames.clone());
        got.sort_unstable();
        wanted.sort_unstable();
        assert_eq!(got, wanted);
        assert!(store.lack(&frames).await.unwrap().bytes > lack.bytes / 2, "they are not kept");
        // Whoever takes may fail, and that ends it.
        let full = |_: &Digest, _: &[u8]| Err(io::Error::other("no space"));
        let error = store.deliver(&frames, Arc::new(full), &|_| {}).await.unwrap_err();
        assert!(error.to_string().contains("no space"), "{error}");
    });
}

#[test]
fn many_readers_one_fetch() {
    let shelf = Arc::new(Shelf::default());
    let v1 = Digest::of(b"1");
    let (image, _) = publish(&shelf, &random_disk(32, 1), v1, None);
    let folder = tempfile::tempdir().unwrap();
    run(async {
        let store = Arc::new(open(&shelf, folder.path(), v1).await);
        let map = ImageMap::load(&store, image).await.unwrap();
        let digest = map.frames().next().unwrap();
        let before = shelf.requests.load(Ordering::SeqCst);
        let readers = (0..20).map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.frame(&digest, 32 * 4096).await.unwrap().len() })
        });
        for reader in readers.collect::<Vec<_>>() {
            assert_eq!(reader.await.unwrap(), 32 * 4096);
        }
        assert_eq!(shelf.requests.load(Ordering::SeqCst) - before, 1);
    });
}

#[test]
fn a_lying_store_is_refused_and_an_absent_one_is_waited_for() {
    let shelf = Arc::new(Shelf::default());
    let v1 = Digest::of(b"1");
    let (image, _) = publish(&shelf, &random_disk(64, 1), v1, None);
    let folder = tempfile::tempdir().unwrap();
    run(async {
        let store = Arc::new(open(&shelf, folder.path(), v1).await);
        let map = ImageMap::load(&store, image).await.unwrap();
        let digest = map.frames().next().unwrap();
        shelf.lying.store(true, Ordering::SeqCst);
        let error = store.frame(&digest, 32 * 4096).await.unwrap_err();
        assert!(matches!(error, FetchError::Damaged { .. }), "{error}");
        assert!(error.to_string().contains(&digest.to_string()), "the frame is named: {error}");
        assert!(!store.cache().has(&digest));
        shelf.lying.store(false, Ordering::SeqCst);

        shelf.away.store(true, Ordering::SeqCst);
        assert!(store.frame(&digest, 32 * 4096).await.unwrap_err().is_away());
        let waiter = tokio::spawn({
            let store = store.clone();
            async move { store.frame_patiently(&digest, 32 * 4096).await.map(|frame| frame.len()) }
        });
        while store.waiting().is_none() {
            tokio::task::yield_now().await;
        }
        shelf.away.store(false, Ordering::SeqCst);
        assert_eq!(waiter.await.unwrap().unwrap(), 32 * 4096);
        assert!(store.waiting().is_none());
    });
}

#[test]
fn the_same_publish_twice_gives_the_same_packs() {
    let disk = random_disk(20_000, 3);
    let packs = || {
        let shelf = Shelf::default();
        publish(&shelf, &disk, Digest::of(b"1"), None);
        let mut digests: Vec<_> = shelf.packs.lock().unwrap().keys().copied().collect();
        digests.sort();
        digests
    };
    let first = packs();
    assert!(first.len() > 1);
    assert_eq!(first, packs());
}

#[test]
fn unused_ranges_become_zeros() {
    let shelf = Arc::new(Shelf::default());
    let disk = random_disk(100, 4);
    let mut sink = ShelfSink(&shelf);
    let mut publisher = Publisher::new(KnownBlocks::default(), &mut sink);
    let unused = [10 * BLOCK..20 * BLOCK, 50 * BLOCK..51 * BLOCK];
    let image = publisher.add(&disk, &unused, &Trace::default(), &|_| {}).unwrap();
    let (packs, summary) = publisher.finish().unwrap();
    assert_eq!(summary.used_bytes, 89 * BLOCK);
    let list = vec![info(&shelf, packs[0])];
    shelf.lists.lock().unwrap().insert(Digest::of(b"1"), list);
    let mut expected = disk;
    for range in unused {
        expected[range.start as usize..range.end as usize].fill(0);
    }
    let folder = tempfile::tempdir().unwrap();
    run(async {
        let store = open(&shelf, folder.path(), Digest::of(b"1")).await;
        assert_eq!(read_all(&store, image).await.unwrap(), expected);
    });
}

#[test]
fn the_depot_refuses_what_is_not_a_pack_and_serves_ranges() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = Shelf::default();
    publish(&shelf, &random_disk(40, 5), Digest::of(b"1"), None);
    let (digest, bytes) = shelf.packs.lock().unwrap().iter().next().map(|(d, b)| (*d, b.clone())).unwrap();
    run(async {
        let depot = Depot::local(folder.path()).unwrap();
        let name = appliance();
        let mut damaged = bytes.to_vec();
        damaged[100] ^= 1;
        assert!(depot.put_pack(&name, digest, damaged.clone().into()).await.is_err());
        let renamed = Digest::of(&damaged);
        let error = depot.put_pack(&name, renamed, damaged.into()).await.unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
        assert!(depot.pack_size(&name, &digest).await.is_err());
        depot.put_pack(&name, digest, bytes.clone()).await.unwrap();
        depot.put_pack(&name, digest, bytes.clone()).await.unwrap();
        assert_eq!(depot.read(&name, &digest, 8..90).await.unwrap(), bytes.slice(8..90));
        assert!(depot.read(&name, &digest, 8..u64::MAX).await.is_err());
        let other: ApplianceName = "demo/other".parse().unwrap();
        assert!(depot.read(&other, &digest, 8..90).await.is_err(), "a digest alone grants nothing");
    });
}

/// No signature covers a directory, and it is kept: whichever bit of it came wrong, the host gets over it.
#[test]
fn a_directory_that_came_with_a_wrong_bit_is_not_believed_for_ever() {
    let shelf = Arc::new(Shelf::default());
    let disk = random_disk(40, 6);
    let version = Digest::of(b"1");
    let (image, _) = publish(&shelf, &disk, version, None);
    let [info] = shelf.lists.lock().unwrap()[&version][..] else { panic!("one pack") };
    for at in 0..info.directory as usize {
        let folder = tempfile::tempdir().unwrap();
        run(async {
            let store = open(&shelf, folder.path(), version).await;
            *shelf.spoilt.lock().unwrap() = Some(at);
            let _ = ImageMap::load(&store, image).await;
            let refetched = match read_all(&store, image).await {
                Ok(content) => content,
                // Another process of the same host, later.
                Err(_) => read_all(&open(&shelf, folder.path(), version).await, image).await.unwrap(),
            };
            assert!(refetched == disk, "byte {at}");
        });
    }
}

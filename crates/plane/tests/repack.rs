//! Packs of which little is used are written again, and who still has the old lists reads on.

mod common;

use std::path::Path;
use std::sync::Arc;

use collective_api::{PackWaste, PlaneStore, Repacked, StoreView};
use collective_keys::SigningKey;
use collective_model::{ByteSize, Digest, Manifest};
use collective_store::cache::Cache;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::{ImageMap, Run};
use collective_store::pack::{self, Pack};
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;
use collective_store::{BLOCK, FRAME_BLOCKS};

use common::crowd::collect;
use common::{Site, manifest, sign};

const FRAME: usize = FRAME_BLOCKS * BLOCK as usize;

#[derive(Default)]
struct Collected(Vec<(Pack, PackHashes)>);

impl PackSink for Collected {
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> std::io::Result<()> {
        self.0.push((pack, hashes));
        Ok(())
    }
}

fn noise(frames: usize, seed: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; frames * FRAME];
    blake3::Hasher::new().update(seed).finalize_xof().fill(&mut bytes);
    bytes
}

/// Publishes a disk, knowing the packs of earlier ones.
async fn publish(
    site: &Site,
    key: &SigningKey,
    version: &str,
    disk: &[u8],
    known: &mut Vec<(Digest, PackHashes)>,
) -> Manifest {
    let mut blocks = KnownBlocks::default();
    known.iter().for_each(|(pack, hashes)| blocks.learn(pack, hashes));
    let mut sink = Collected::default();
    let (image, packs) = {
        let mut publisher = Publisher::new(blocks, &mut sink);
        let image = publisher.add(&disk.to_vec(), &[], &Trace::default(), &|_| {}).unwrap();
        (image, publisher.finish().unwrap().0)
    };
    for (pack, hashes) in sink.0 {
        known.push((pack.digest, hashes));
        let path = format!("/v1/appliances/p/app/packs/{}", pack.digest);
        site.user.put_bytes(&path, pack.bytes.into()).await.unwrap();
    }
    let mut manifest = manifest(version, image);
    manifest.disks[0].size = ByteSize(disk.len() as u64);
    site.publish(sign(&manifest, key), packs).await.unwrap();
    manifest
}

fn reader(site: &Site, folder: &Path, frames: &str) -> FrameStore {
    let source = PlaneStore::new(Arc::new(site.user.another()), &folder.join("versions"));
    FrameStore::new(Cache::open(&folder.join(frames)).unwrap(), Arc::new(source))
}

async fn read(store: &FrameStore, manifest: &Manifest, key: &SigningKey) -> Result<Vec<u8>, FetchError> {
    store.add_version(&manifest.appliance, &sign(manifest, key).digest()).await;
    let map = ImageMap::load(store, manifest.disks[0].image.unwrap()).await?;
    let mut out = vec![0; map.size as usize];
    let mut block = 0;
    while block < map.blocks() {
        block += match map.run_at(block) {
            Run::Zeros(blocks) => blocks,
            Run::Frame { digest, length, offset, blocks } => {
                let (from, at) = (usize::from(offset) * BLOCK as usize, (block * BLOCK) as usize);
                let count = (blocks * BLOCK) as usize;
                out[at..at + count].copy_from_slice(&store.frame(&digest, length).await?[from..from + count]);
                blocks
            }
        };
    }
    Ok(out)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_used_of_an_old_pack_stays_and_the_rest_goes() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let mut known = Vec::new();
    let first = noise(16, b"first");
    let second = [&first[..3 * FRAME], &noise(2, b"second")].concat();
    let v1 = publish(&site, &key, "1", &first, &mut known).await;
    let v2 = publish(&site, &key, "2", &second, &mut known).await;
    let wasted = async || site.user.get::<Vec<PackWaste>>("/v1/store/repack").await.unwrap();
    assert!(wasted().await.is_empty(), "the first version uses all of it");
    let folder = tempfile::tempdir().unwrap();
    assert!(read(&reader(&site, folder.path(), "a"), &v2, &key).await.unwrap() == second);

    site.user.delete::<()>(&format!("/v1/versions/{}", sign(&v1, &key).digest())).await.unwrap();
    assert_eq!(collect(&site).await.removed.len(), 0, "a version refers to each pack");
    let before: u64 = site.user.get::<StoreView>("/v1/store").await.unwrap().packs.iter().map(|pack| pack.size).sum();
    let waste = wasted().await;
    assert_eq!((waste.len(), waste[0].digest), (1, known[0].0));
    assert!((3 * FRAME as u64..4 * FRAME as u64).contains(&waste[0].used_bytes), "{waste:?}");

    let repacked: Repacked = site.user.post("/v1/store/repack", &()).await.unwrap();
    assert_eq!(repacked.packs, waste);
    assert!(repacked.bytes_written < 4 * FRAME as u64);
    assert!(wasted().await.is_empty());
    assert_eq!(site.user.post::<Repacked>("/v1/store/repack", &()).await.unwrap().packs, []);
    // A publisher that knows the old pack still gets its version in: the pack is there until it is collected.
    let third = [&second[..2 * FRAME], &noise(1, b"third")].concat();
    let v3 = publish(&site, &key, "3", &third, &mut known).await;
    assert_eq!(collect(&site).await.removed.len(), 0);
    site.user.delete::<()>(&format!("/v1/versions/{}", sign(&v3, &key).digest())).await.unwrap();
    let removed: Vec<Digest> = collect(&site).await.removed.iter().map(|pack| pack.digest).collect();
    assert!(removed.contains(&known[0].0), "{removed:?}");
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    assert!(view.missing.is_empty());
    assert_eq!(view.packs.iter().map(|pack| pack.size).sum::<u64>(), before - waste[0].size + repacked.bytes_written);

    // With the list of packs from before, with and without directories in the cache.
    for frames in ["a", "b"] {
        let store = reader(&site, folder.path(), frames);
        let map = ImageMap::load(&reader(&site, folder.path(), "a"), v2.disks[0].image.unwrap()).await.unwrap();
        map.frames().for_each(|frame| store.cache().remove(&frame).unwrap());
        assert!(read(&store, &v2, &key).await.unwrap() == second, "{frames}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pack_with_a_damaged_directory_is_left_alone() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let mut known = Vec::new();
    let first = noise(8, b"first");
    let second = first[..2 * FRAME].to_vec();
    let v1 = publish(&site, &key, "1", &first, &mut known).await;
    let v2 = publish(&site, &key, "2", &second, &mut known).await;
    site.user.delete::<()>(&format!("/v1/versions/{}", sign(&v1, &key).digest())).await.unwrap();

    let path = site.pack(&known[0].0);
    let sound = std::fs::read(&path).unwrap();
    let needed = pack::directory(&sound).unwrap().entries[0].digest;
    let mut damaged = sound.clone();
    let at = sound.windows(32).rposition(|bytes| bytes == needed.0).unwrap();
    damaged[at] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let refused = site.user.post::<Repacked>("/v1/store/repack", &()).await.unwrap_err().to_string();
    assert!(refused.contains("is damaged") && refused.contains("store check --repair"), "{refused}");
    std::fs::write(&path, sound).unwrap();
    assert_eq!(site.user.post::<Repacked>("/v1/store/repack", &()).await.unwrap().packs.len(), 1);
    collect(&site).await;
    let folder = tempfile::tempdir().unwrap();
    assert!(read(&reader(&site, folder.path(), "a"), &v2, &key).await.unwrap() == second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_pack_that_is_mostly_directory_is_left_alone() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let mut known = Vec::new();
    let first = noise(1, b"first");
    let second = [&[7; BLOCK as usize], &first[BLOCK as usize..]].concat();
    let v1 = publish(&site, &key, "1", &first, &mut known).await;
    let v2 = publish(&site, &key, "2", &second, &mut known).await;
    let repacked: Repacked = site.user.post("/v1/store/repack", &()).await.unwrap();
    let collected = collect(&site).await;
    let folder = tempfile::tempdir().unwrap();
    for (manifest, disk) in [(v1, first), (v2, second)] {
        assert!(read(&reader(&site, folder.path(), "a"), &manifest, &key).await.unwrap() == disk);
    }
    assert_eq!((repacked.packs, collected.removed.len()), (vec![], 0));
}

/// A file that cannot be removed, as in a store that is away.
struct Held<'a>(&'a Path);

impl<'a> Held<'a> {
    fn new(path: &'a Path) -> Self {
        rustix::mount::mount_bind(path, path).unwrap();
        Self(path)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_pack_is_named_like_one_whose_removal_was_broken_off() {
    if !rustix::process::geteuid().is_root() {
        return println!("SKIPPED: holding a file takes root");
    }
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (first, folder) = (noise(8, b"first"), tempfile::tempdir().unwrap());
    let second = first[..2 * FRAME].to_vec();
    let withdraw = async |manifest: &Manifest| {
        site.user.delete::<()>(&format!("/v1/versions/{}", sign(manifest, &key).digest())).await.unwrap();
    };
    // Versions with the same content each time, so that the same pack comes of it.
    let repack = async |versions: [&str; 2]| {
        let mut known = Vec::new();
        let whole = publish(&site, &key, versions[0], &first, &mut known).await;
        let part = publish(&site, &key, versions[1], &second, &mut known).await;
        withdraw(&whole).await;
        assert_eq!(site.user.post::<Repacked>("/v1/store/repack", &()).await.unwrap().packs.len(), 1);
        part
    };
    let v2 = repack(["1", "2"]).await;
    collect(&site).await;
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    let new = view.packs.iter().max_by_key(|pack| pack.size).unwrap().digest;
    let path = site.pack(&new);
    withdraw(&v2).await;
    {
        let _held = Held::new(&path);
        site.user.post::<()>("/v1/store/collect", &()).await.unwrap_err();
    }
    assert!(path.exists());

    let v4 = repack(["3", "4"]).await;
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    assert!(
        view.packs.iter().any(|pack| pack.digest == new && pack.versions.len() == 1),
        "it is the same pack: {view:?}"
    );
    collect(&site).await;
    assert!(read(&reader(&site, folder.path(), "a"), &v4, &key).await.unwrap() == second);
    // Nobody takes it for one that goes.
    let packs = view.packs.iter().filter(|pack| !pack.versions.is_empty()).map(|pack| pack.digest).collect();
    let mut v5 = v4.clone();
    v5.version = "5".parse().unwrap();
    site.publish(sign(&v5, &key), packs).await.unwrap();
}

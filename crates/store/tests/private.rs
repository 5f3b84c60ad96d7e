//! Private data: what its owner stored comes back, others learn nothing from it, and nothing older or other passes.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::{FetchError, FrameStore, Near, Pace};
use collective_store::image::{ImageMap, Run};
use collective_store::pack::{self, Pack};
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher, Summary};
use collective_store::seal::{self, Seal};
use collective_store::trace::Trace;
use collective_store::{BLOCK, PackInfo, Source, SourceError};
use futures_util::future::BoxFuture;
use proptest::prelude::*;

/// Objects by name, as any store keeps them: it may give another one under a name.
#[derive(Default)]
struct Objects(Mutex<HashMap<Digest, Bytes>>);

impl Objects {
    fn get(&self, pack: &Digest) -> Bytes {
        self.0.lock().unwrap()[pack].clone()
    }
    fn infos(&self, packs: &[Digest]) -> Vec<PackInfo> {
        packs.iter().map(|pack| PackInfo { digest: *pack, size: self.get(pack).len() as u64, directory: 0 }).collect()
    }
}

struct Sink<'a>(&'a Objects, &'a Arc<Seal>);

impl PackSink for Sink<'_> {
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> io::Result<()> {
        assert_eq!(seal::verify_sealed(&pack.bytes).unwrap(), pack.directory);
        assert!(pack::verify(&pack.bytes).is_err(), "nobody takes it for a public pack");
        assert_eq!(PackHashes::of_sealed(&pack.bytes, self.1).unwrap(), hashes, "as if it were read back");
        assert_eq!(PackHashes::decode(&hashes.encode()), Some(hashes));
        self.0.0.lock().unwrap().insert(pack.digest, pack.bytes.into());
        Ok(())
    }
}

struct View(Arc<Objects>, Vec<PackInfo>);

impl Source for View {
    fn packs<'a>(&'a self, _: &'a ApplianceName, _: &'a Digest) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        Box::pin(async move { Ok(self.1.clone()) })
    }
    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        Box::pin(async move {
            let bytes = self.0.get(pack);
            let range = range.start as usize..range.end as usize;
            if range.end > bytes.len() {
                return Err(SourceError::Refused("it is shorter than that".into()));
            }
            Ok(bytes.slice(range))
        })
    }
}

fn seal(owner: u8) -> Arc<Seal> {
    Arc::new(Seal::new(&[owner; 32]))
}

/// Stores `disk`, knowing the packs of an earlier state.
fn store(objects: &Objects, disk: &[u8], seal: &Arc<Seal>, before: &[Digest]) -> (Digest, Vec<Digest>, Summary) {
    let mut known = KnownBlocks::new(HashSet::new());
    for pack in before {
        known.learn(pack, &PackHashes::of_sealed(&objects.get(pack), seal).unwrap());
    }
    let mut sink = Sink(objects, seal);
    let mut publisher = Publisher::new(known, &mut sink).sealing(seal.clone());
    let image = publisher.add(&disk.to_vec(), &[], &Trace::default(), &|_| {}).unwrap();
    let (packs, summary) = publisher.finish().unwrap();
    (image, packs, summary)
}

async fn load(
    objects: &Arc<Objects>,
    packs: &[PackInfo],
    image: Digest,
    seal: &Arc<Seal>,
) -> Result<Vec<u8>, FetchError> {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::open(folder.path()).unwrap().sealed(seal.clone());
    let frames = FrameStore::new(cache, Arc::new(View(objects.clone(), packs.to_vec())));
    frames.add_version(&"a/b".parse().unwrap(), &image).await;
    let map = ImageMap::load(&frames, image).await?;
    let mut out = vec![0; map.size as usize];
    let mut block = 0;
    while block < map.blocks() {
        block += match map.run_at(block) {
            Run::Zeros(blocks) => blocks,
            Run::Frame { digest, length, offset, blocks } => {
                let frame = frames.frame(&digest, length).await?;
                let (from, to) = (usize::from(offset) * BLOCK as usize, (block * BLOCK) as usize);
                let bytes = ((blocks * BLOCK) as usize).min(out.len() - to);
                out[to..to + bytes].copy_from_slice(&frame[from..from + bytes]);
                blocks
            }
        };
    }
    Ok(out)
}

/// Blocks that are all different, with some text in them.
fn disk(blocks: usize, seed: u8) -> Vec<u8> {
    let mut disk = vec![0; blocks * BLOCK as usize];
    for (index, block) in disk.chunks_mut(BLOCK as usize).enumerate() {
        blake3::Hasher::new().update(&[seed]).update(&index.to_le_bytes()).finalize_xof().fill(&mut block[..500]);
        block[600..617].copy_from_slice(b"a note to no-one!");
    }
    disk
}

#[tokio::test]
async fn a_second_state_sends_what_changed_and_both_come_back() {
    let (objects, key) = (Arc::new(Objects::default()), seal(1));
    let first = disk(3000, 0);
    let (image, packs, summary) = store(&objects, &first, &key, &[]);
    assert_eq!(load(&objects, &objects.infos(&packs), image, &key).await.unwrap(), first);
    let mut second = first.clone();
    second[1_000_000..1_000_010].fill(9);
    let (image2, packs2, summary2) = store(&objects, &second, &key, &packs);
    assert_eq!(summary2.new_bytes, BLOCK);
    assert!((summary2.stored_bytes + summary2.index_bytes) * 10 < summary.stored_bytes, "{summary2:?} {summary:?}");
    assert_eq!(load(&objects, &objects.infos(&packs2), image2, &key).await.unwrap(), second);
    assert_eq!(load(&objects, &objects.infos(&packs), image, &key).await.unwrap(), first);
    // Without what is remembered it is the same image, and the same packs: equal content gives equal bytes.
    assert_eq!(store(&objects, &first, &key, &[]).0, image);
    assert_eq!(store(&objects, &first, &key, &[]).1, packs);
    // Another owner's share nothing with it.
    let (theirs, their_packs, _) = store(&objects, &first, &seal(2), &[]);
    assert_ne!(theirs, image);
    assert!(their_packs.iter().all(|pack| !packs.contains(pack)));
    let names = |packs: &[Digest]| -> HashSet<Digest> {
        let entries = packs.iter().flat_map(|pack| pack::directory(&objects.get(pack)).unwrap().entries);
        entries.map(|entry| entry.digest).collect()
    };
    assert!(names(&packs).is_disjoint(&names(&their_packs)));
    assert!(load(&objects, &objects.infos(&packs), image, &seal(2)).await.is_err());
}

/// A store over these packs, and the map of the image in them.
async fn opened(
    folder: &std::path::Path,
    objects: &Arc<Objects>,
    packs: &[Digest],
    image: Digest,
    seal: &Arc<Seal>,
) -> (FrameStore, ImageMap) {
    let cache = Cache::open(folder).unwrap().sealed(seal.clone());
    let frames = FrameStore::new(cache, Arc::new(View(objects.clone(), objects.infos(packs))));
    frames.add_version(&"a/b".parse().unwrap(), &image).await;
    let map = ImageMap::load(&frames, image).await.unwrap();
    (frames, map)
}

#[tokio::test]
async fn what_a_store_has_not_comes_from_the_one_below() {
    let (objects, folder) = (Arc::new(Objects::default()), tempfile::tempdir().unwrap());
    let mut opened_ones = Vec::new();
    for (name, key) in [("own", seal(1)), ("below", seal(2))] {
        let (image, packs, _) = store(&objects, &disk(600, 0), &key, &[]);
        opened_ones.push(opened(&folder.path().join(name), &objects, &packs, image, &key).await);
    }
    let (below, theirs) = opened_ones.pop().unwrap();
    let (own, ours) = opened_ones.pop().unwrap();
    let both = own.above(Arc::new(below)).await.unwrap();
    let all: Vec<Digest> = ours.frames().chain(theirs.frames()).collect();
    assert!(all.iter().all(|frame| !both.has(frame)));
    let lack = both.lack(&all).await.unwrap();
    assert_eq!(lack.frames as usize, all.len());
    // Directories, and pages, which are as sealed as frames are.
    let before = both.moved()[0];
    // One of each because somebody waits for it, the others ahead.
    for map in [&ours, &theirs] {
        let Run::Frame { digest, length, .. } = map.run_at(0) else { panic!("it is not zeros") };
        assert_eq!(both.frame(&digest, length).await.unwrap()[..4096], disk(1, 0));
        let mut part = [0; 100];
        assert!(both.read_at_hand(&digest, length, 4096, &mut part).unwrap());
        assert_eq!(part, disk(2, 0)[4096..4196]);
    }
    let waited_for = both.moved()[0] - before;
    assert_eq!(both.fetch_ahead(&all, Pace::AHEAD, &|_| {}).await.unwrap(), lack.bytes - waited_for);
    assert!(all.iter().all(|frame| both.has(frame)));
    assert_eq!(both.moved()[0], before + lack.bytes);
    for page in ours.pages().iter().chain(theirs.pages()) {
        both.page(page).await.unwrap();
    }
    assert!(matches!(both.frame(&Digest([7; 32]), 4096).await, Err(FetchError::Nowhere(_))));
}

/// Some frames in another form; of a few of them it is wrong.
struct Kept(HashMap<Digest, Option<Vec<u8>>>);

impl Near for Kept {
    fn may_have(&self, digest: &Digest) -> bool {
        self.0.contains_key(digest)
    }
    fn prepare(&self) {}
    fn content(&self, digest: &Digest) -> Option<Vec<u8>> {
        self.0.get(digest)?.clone()
    }
}

#[tokio::test]
async fn what_is_near_by_is_not_fetched_unless_it_is_wrong() {
    let (objects, key) = (Arc::new(Objects::default()), seal(1));
    let (image, packs, _) = store(&objects, &disk(3000, 0), &key, &[]);
    let [there, here] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (other, map) = opened(there.path(), &objects, &packs, image, &key).await;
    let all: Vec<Digest> = map.frames().collect();
    let stored = other.lack(&all).await.unwrap();
    let contents: Vec<Vec<u8>> = other.read_all(&all).await.unwrap();
    let mut kept = HashMap::new();
    for (index, (digest, content)) in all.iter().zip(&contents).enumerate() {
        let wrong = [content[1..].to_vec(), vec![7; content.len()], Vec::new()];
        _ = match index % 8 {
            0 => None,
            1 => kept.insert(*digest, None),
            2 => kept.insert(*digest, Some(wrong[index / 8 % 3].clone())),
            _ => kept.insert(*digest, Some(content.clone())),
        };
    }
    let (frames, _) = opened(here.path(), &objects, &packs, image, &key).await;
    let frames = frames.beside(Arc::new(Kept(kept)));
    let lack = frames.lack(&all).await.unwrap();
    assert_eq!(lack.bytes + lack.near, stored.bytes);
    assert_eq!(lack.frames as usize, all.len().div_ceil(8));
    // One because somebody waits for it, the others ahead.
    let Run::Frame { digest, length, .. } = map.run_at(0) else { panic!("it is not zeros") };
    frames.frame(&digest, length).await.unwrap();
    frames.fetch_ahead(&all, Pace::AHEAD, &|_| {}).await.unwrap();
    let fetched = frames.moved()[0];
    assert!((lack.bytes..stored.bytes / 2).contains(&fetched), "{fetched} of {}, {lack:?}", stored.bytes);
    assert_eq!(frames.read_all(&all).await.unwrap(), contents);
    assert_eq!(frames.moved()[0], fetched, "all of it is in the cache");
}

#[tokio::test]
async fn the_store_learns_nothing_that_it_could_look_for() {
    let (objects, key) = (Arc::new(Objects::default()), seal(1));
    let content = disk(200, 0);
    let (_, packs, _) = store(&objects, &content, &key, &[]);
    let mut wanted: Vec<Vec<u8>> = vec![b"a note to no-one!".to_vec(), b"CLIL".to_vec(), b"CLIR".to_vec()];
    // The names that public frames of the same content have, block by block and frame by frame.
    wanted.extend(content.chunks(4096).chain(content.chunks(128 * 4096)).map(|part| Digest::of(part).0.to_vec()));
    wanted.extend(content.chunks(4096).map(|block| key.name(block).0.to_vec()));
    for pack in packs {
        let bytes = objects.get(&pack);
        let windows: HashSet<&[u8]> = [4, 17, 32].iter().flat_map(|length| bytes.windows(*length)).collect();
        let found = wanted.iter().find(|wanted| windows.contains(wanted.as_slice()));
        assert_eq!(found.map(|found| String::from_utf8_lossy(found)), None, "it is readable in a pack");
        let kinds: HashSet<_> =
            pack::directory(&bytes).unwrap().entries.iter().map(|e| format!("{:?}", e.kind)).collect();
        assert_eq!(kinds.len(), 1, "what is a page is not to be seen");
    }
}

#[tokio::test]
async fn older_and_damaged_objects_are_refused() {
    let (objects, key) = (Arc::new(Objects::default()), seal(1));
    let (_, old, _) = store(&objects, &disk(300, 0), &key, &[]);
    let (image, new, _) = store(&objects, &disk(300, 1), &key, &[]);
    let infos = objects.infos(&new);
    let sound = objects.get(&new[0]);
    // The old object under the new name, as long as it is, or the length that is listed.
    let older = objects.get(&old[0]);
    objects.0.lock().unwrap().insert(new[0], older);
    assert!(load(&objects, &infos, image, &key).await.is_err());
    assert!(load(&objects, &objects.infos(&new), image, &key).await.is_err());
    for at in (0..sound.len()).step_by(sound.len() / 40) {
        let mut damaged = sound.to_vec();
        damaged[at] ^= 4;
        objects.0.lock().unwrap().insert(new[0], damaged.into());
        // A bit of the header or of what no reader looks at does no harm.
        if let Ok(content) = load(&objects, &infos, image, &key).await {
            assert_eq!(content, disk(300, 1), "{at}");
        }
    }
    objects.0.lock().unwrap().insert(new[0], sound);
    assert_eq!(load(&objects, &infos, image, &key).await.unwrap(), disk(300, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn damaged_packs_never_panic(at: prop::sample::Index, value: u8, cut: prop::sample::Index) {
        let (objects, key) = (Objects::default(), seal(1));
        let (_, packs, _) = store(&objects, &disk(20, 0), &key, &[]);
        let mut bytes = objects.get(&packs[0]).to_vec();
        prop_assert!(seal::verify_sealed(&bytes[..cut.index(bytes.len())]).is_err());
        let at = at.index(bytes.len());
        bytes[at] = value;
        if let Ok(directory) = seal::verify_sealed(&bytes) {
            for entry in directory.entries {
                if let Ok(opened) = seal::unsealed(&bytes, &entry, &key) {
                    prop_assert_eq!(key.name(&opened.content), entry.digest);
                }
            }
        }
    }
}

//! What a maker remembers only saves time: whatever becomes of it, the same is published.

mod common;

use std::collections::HashSet;
use std::io;
use std::path::Path;

use collective_model::Digest;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes, Publisher};
use collective_store::trace::Trace;
use collective_testkit::{Damage, Dice, damage_files};

use common::{Published, Seed, Sink, cross, folder, process, published, run, seeds};

/// Frames of the first version, through the maker's cache.
struct Bases(FrameStore);

impl BaseReader for Bases {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        run(self.0.read_all(frames)).map_err(io::Error::other)
    }
}

/// The hashes of a pack, remembered or taken from the pack.
fn remembered(blocks: &Path, pack: &Digest) -> (PackHashes, bool) {
    let known = std::fs::read(blocks.join(pack.to_string())).ok().and_then(|bytes| PackHashes::decode(&bytes));
    match known {
        Some(hashes) => (hashes, true),
        None => (PackHashes::of(&published().packs[pack]).unwrap(), false),
    }
}

#[test]
fn damaged_memory_changes_nothing_that_is_published() {
    let Published { packs, lists, versions: [first, second] } = published();
    let (mut believed, mut made_anew) = (0, 0);
    for seed in seeds(40) {
        let _named = Seed(seed);
        let (mut dice, folder) = (Dice::new(seed), folder());
        let blocks = folder.path().join("blocks");
        std::fs::create_dir_all(&blocks).unwrap();
        for info in &lists[&first.name] {
            let hashes = PackHashes::of(&packs[&info.digest]).unwrap();
            std::fs::write(blocks.join(info.digest.to_string()), hashes.encode()).unwrap();
        }
        let at_hosts: HashSet<Digest> = run(async {
            let (_, store) = process(folder.path(), u64::MAX).await;
            let map = ImageMap::load(&store, first.image).await.unwrap();
            store.prefetch(&map.frames().collect::<Vec<_>>(), &|_| {}).await.unwrap();
            map.frames().chain(map.pages().iter().copied()).collect()
        });
        let ways: &[Damage] = if dice.percent(50) { &Damage::POWER_CUT } else { &Damage::AGE };
        damage_files(folder.path(), 1 + dice.roll(60), ways, &mut dice).unwrap();
        cross(&folder.path().join("frames"), &mut dice);

        let mut known = KnownBlocks::new(at_hosts);
        for info in &lists[&first.name] {
            let (hashes, is_remembered) = remembered(&blocks, &info.digest);
            *(if is_remembered { &mut believed } else { &mut made_anew }) += 1;
            known.learn(&info.digest, &hashes);
        }
        let bases = Bases(run(process(folder.path(), u64::MAX)).1);
        let mut sink = Sink::default();
        let mut publisher = Publisher::new(known, &mut sink).with_bases(&bases);
        let image = publisher.add(&second.disk, &[], &Trace::default(), &|_| {}).unwrap();
        let (needed, _) = publisher.finish().unwrap();
        assert_eq!(image, second.image);
        assert!(needed.iter().eq(lists[&second.name].iter().map(|info| &info.digest)));
        assert!(sink.0.iter().all(|pack| packs[&pack.digest] == pack.bytes));
    }
    assert!(believed > 0 && made_anew > 0 || seeds(40).count() == 1, "the test itself: {believed}, {made_anew}");
}

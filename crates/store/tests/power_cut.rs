//! A host's cache through interrupted fetches, power cuts and disks that age: everything is read right afterwards, what is
//! damaged comes again, and the plan stays what moves.
//!
//! `SEED=17` repeats a case, `SEEDS=5000` runs so many.

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use collective_model::Digest;
use collective_store::BLOCK;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};
use collective_testkit::{Damage, Dice, damage_files};

use common::{Seed, cross, folder, process, published, run, seeds};

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
                cross(&folder.join("frames"), &mut dice);
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
    for seed in seeds(200) {
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
    for seed in seeds(200) {
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

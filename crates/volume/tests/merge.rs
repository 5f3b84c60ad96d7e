//! Layers become one while the disk is in use, and only the work that has to be done is done.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use collective_volume::{Disk, Layer, LayerError};
use common::{Shelf, noise, store_of, until};

const BLOCKS: u64 = 600;
const SIZE: u64 = BLOCKS * 4096;

fn layer(folder: &Path, name: &str, size: u64) -> (PathBuf, Layer) {
    let path = folder.join(name);
    Layer::create(&path, size).unwrap();
    let layer = Layer::open(&path, size, true).unwrap();
    (path, layer)
}

fn eager(_: u64) -> std::io::Result<()> {
    Ok(())
}

/// Each block of the guest counts up; whoever reads must never see it go back.
#[test]
fn guests_read_and_write_while_layers_are_merged() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = runtime.block_on(store_of(&folder.path().join("cache"), &Arc::new(Shelf::default())));
    let (first, _) = layer(folder.path(), "0", SIZE);
    let disk = Arc::new(Disk::open(SIZE, None, store.clone(), std::slice::from_ref(&first)).unwrap());
    let counts: Arc<Vec<AtomicU64>> = Arc::new((0..BLOCKS).map(|_| AtomicU64::new(0)).collect());
    let done = Arc::new(AtomicBool::new(false));
    let guest = |seed: u64| {
        let (disk, counts, done) = (disk.clone(), counts.clone(), done.clone());
        std::thread::spawn(move || {
            let mut turn = seed;
            while !done.load(Ordering::Relaxed) {
                turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // Each guest has blocks of its own to write, and reads all.
                let block = (turn >> 33) % (BLOCKS / 2) * 2 + seed;
                let next = counts[block as usize].load(Ordering::Acquire) + 1;
                let bytes: Vec<u8> = next.to_le_bytes().repeat(512);
                assert!(disk.try_write(block * 4096, &bytes).unwrap());
                counts[block as usize].store(next, Ordering::Release);
                let other = (turn >> 13) % BLOCKS;
                let least = counts[other as usize].load(Ordering::Acquire);
                let found = disk.try_read(other * 4096, 4096).unwrap().unwrap();
                let found = u64::from_le_bytes(found[..8].try_into().unwrap());
                assert!(found >= least, "block {other} has {found}, and {least} was there");
            }
        })
    };
    let guests = [guest(0), guest(1)];
    let mut chain = vec![first];
    for round in 1..60 {
        let before = counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>();
        until("the guests write", || {
            counts.iter().map(|count| count.load(Ordering::Relaxed)).sum::<u64>() > before + 200
        });
        let (path, next) = layer(folder.path(), &format!("{round}"), SIZE);
        disk.freeze(next).unwrap();
        chain.push(path);
        if chain.len() > 3 {
            let target = folder.path().join(format!("merged-{round}"));
            let old: Vec<PathBuf> = chain.drain(..3).collect();
            let layers = disk.frozen_layers(&old).unwrap();
            let merged = Layer::merge(&layers, &target, false, &mut eager).unwrap();
            old.iter().for_each(|path| std::fs::remove_file(path).unwrap());
            assert!(disk.replace(&layers, merged));
            chain.insert(0, target);
        }
    }
    done.store(true, Ordering::Relaxed);
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    disk.flush().unwrap();
    let found = disk.try_read(0, SIZE as usize).unwrap().unwrap();
    drop(disk);
    let reopened = Disk::open(SIZE, None, store, &chain).unwrap();
    assert!(reopened.try_read(0, SIZE as usize).unwrap().unwrap() == found, "as it was, from its files");
    for (block, count) in counts.iter().enumerate() {
        let bytes = count.load(Ordering::Relaxed).to_le_bytes();
        assert_eq!(found[block * 4096..][..8], bytes, "block {block}");
    }
}

#[test]
fn only_what_is_seen_is_read_and_holes_take_no_work() {
    const LARGE: u64 = 16 << 30;
    let folder = tempfile::tempdir().unwrap();
    let (one, lower) = layer(folder.path(), "1", LARGE);
    let (two, upper) = layer(folder.path(), "2", LARGE);
    lower.discard(0, LARGE / 4096).unwrap();
    lower.write(0, &noise(1 << 20, 1)).unwrap();
    lower.write(LARGE - 4096, &noise(4096, 2)).unwrap();
    upper.write(0, &noise(1 << 20, 3)).unwrap();
    upper.discard(8, 8).unwrap();
    lower.flush().unwrap();
    upper.flush().unwrap();
    let layers = [one, two].map(|path| Arc::new(Layer::open_frozen(&path).unwrap()));
    let merge = |name: &str, keep_zeros| {
        let mut moved = 0;
        let mut pace = |bytes| {
            moved += bytes;
            Ok(())
        };
        let merged = Layer::merge(&layers, &folder.path().join(name), keep_zeros, &mut pace).unwrap();
        (moved, merged)
    };
    let (moved, merged) = merge("whole", true);
    assert_eq!(moved, (1 << 20) - 8 * 4096 + 4096, "the hidden part of the lower layer is not read, nor any hole");
    assert_eq!(merged.held().len() as u64, LARGE / 4096, "what is below must not be seen through it");
    let (_, lowest) = merge("lowest", false);
    assert_eq!(lowest.held().len(), 256 - 8 + 1, "nothing is below, so zeros need not be kept");
    let mut found = vec![0; 1 << 20];
    lowest.read(0, &mut found).unwrap();
    let mut expected = noise(1 << 20, 3);
    expected[8 * 4096..16 * 4096].fill(0);
    assert!(found == expected);
}

#[test]
fn a_merge_that_fails_leaves_nothing_and_takes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (one, lower) = layer(folder.path(), "1", SIZE);
    let (two, upper) = layer(folder.path(), "2", SIZE);
    lower.write(0, &noise(4 << 20 >> 1, 1)).unwrap();
    upper.write(4096, &noise(4096, 2)).unwrap();
    lower.flush().unwrap();
    upper.flush().unwrap();
    let layers = [&one, &two].map(|path| Arc::new(Layer::open_frozen(path).unwrap()));
    let target = folder.path().join("3");
    let mut pieces = 0;
    let mut pace = |_| {
        pieces += 1;
        if pieces > 2 { Err(std::io::Error::other("enough")) } else { Ok(()) }
    };
    let error = Layer::merge(&layers, &target, true, &mut pace).unwrap_err().to_string();
    assert!(error.contains("cannot merge layers into") && error.contains("enough"), "{error}");
    let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");
    // Where something is already, it stays.
    let error = Layer::merge(&layers, &one, true, &mut eager).unwrap_err();
    assert!(matches!(error, LayerError::Io { attempt: "create", .. }), "{error}");
    assert_eq!(Layer::open_frozen(&one).unwrap().held().len(), 512);
    Layer::merge(&layers, &target, true, &mut eager).unwrap();
    assert_eq!(Layer::open_frozen(&target).unwrap().held().len(), 512);
}

#[test]
fn what_takes_writes_or_is_not_there_is_not_replaced() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = runtime.block_on(store_of(&folder.path().join("cache"), &Arc::new(Shelf::default())));
    let paths: Vec<PathBuf> = (0..4).map(|number| layer(folder.path(), &number.to_string(), SIZE).0).collect();
    let disk = Disk::open(SIZE, None, store.clone(), &paths).unwrap();
    let pick = |indices: &[usize]| indices.iter().map(|index| paths[*index].clone()).collect::<Vec<_>>();
    for wrong in [&[][..], &[3], &[2, 3], &[0, 2], &[1, 0]] {
        assert!(disk.frozen_layers(&pick(wrong)).is_none(), "{wrong:?}");
    }
    let layers = disk.frozen_layers(&pick(&[1, 2])).unwrap();
    assert!(disk.is_over_something(&layers[0]));
    assert!(!disk.is_over_something(&disk.frozen_layers(&pick(&[0])).unwrap()[0]));
    let merged = |name: &str| Layer::merge(&layers, &folder.path().join(name), true, &mut eager).unwrap();
    assert!(disk.replace(&layers, merged("a")));
    assert!(!disk.replace(&layers, merged("b")), "they are gone");
    // Of what is only read, all may go.
    let saved = Disk::open_frozen(SIZE, None, store, &paths).unwrap();
    let layers = saved.frozen_layers(&paths).unwrap();
    assert!(saved.replace(&layers, merged("c")));
    assert!(saved.try_write(0, &[1; 4096]).is_err());
}

/// A layer made of what the image showed comes below, and is a layer as any other from then on.
#[test]
fn a_layer_comes_below_a_disk_in_use() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let store = runtime.block_on(store_of(&folder.path().join("cache"), &Arc::new(Shelf::default())));
    let (top, _) = layer(folder.path(), "top", SIZE);
    let disk = Disk::open(SIZE, None, store, std::slice::from_ref(&top)).unwrap();
    assert!(disk.try_write(4096, &[2; 4096]).unwrap());
    let (lowest, arrived) = layer(folder.path(), "lowest", SIZE);
    for block in [0, 1, 5] {
        arrived.write(block * 4096, &[1; 4096]).unwrap();
    }
    arrived.flush().unwrap();
    drop(arrived);
    disk.put_below(Layer::open(&lowest, SIZE, false).unwrap()).unwrap();
    let byte = |block: u64| disk.try_read(block * 4096, 1).unwrap().unwrap()[0];
    assert_eq!([0, 1, 5, 6].map(byte), [1, 2, 1, 0]);
    assert_eq!(disk.own_bytes(), 3 * 4096);
    assert!(disk.try_write(0, &[3; 4096]).unwrap());
    // Kept, and merged with what came above it.
    let (_, next) = layer(folder.path(), "next", SIZE);
    disk.freeze(next).unwrap();
    let layers = disk.frozen_layers(&[lowest, top]).unwrap();
    let merged = Layer::merge(&layers, &folder.path().join("merged"), false, &mut eager).unwrap();
    assert!(disk.replace(&layers, merged));
    assert_eq!([0, 1, 5, 6].map(byte), [3, 2, 1, 0]);
}

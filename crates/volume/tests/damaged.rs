//! Layers that are damaged, hostile or of another disk are refused with a reason, and never read.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use collective_volume::{Disk, DiskError, Layer, LayerError, MAX_LAYERS};
use common::{Shelf, store_of};
use proptest::prelude::*;

/// More than one page of map, and no whole number of bytes in it.
const SIZE: u64 = 32_781 * 4096;

/// Behind the disk's own bytes.
const LOG: u64 = 64 * 4096;

fn map_of(path: &Path) -> PathBuf {
    path.with_extension("map")
}

/// A layer that holds the first and the last block.
fn layer(folder: &Path) -> PathBuf {
    let path = folder.join("layer");
    Layer::create(&path, SIZE).unwrap();
    let layer = Layer::open(&path, SIZE, true).unwrap();
    layer.write(0, &[1; 4096]).unwrap();
    layer.write(SIZE - 4096, &[2; 4096]).unwrap();
    layer.flush().unwrap();
    assert_eq!(layer.held(), [0, 32_780]);
    path
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

fn cut(path: &Path, length: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

/// The reason why the layer is refused after `damage`.
fn refusal(damage: impl Fn(&Path)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = layer(folder.path());
    damage(&path);
    let error = Layer::open(&path, SIZE, false).unwrap_err();
    assert!(error.to_string().contains(path.to_str().unwrap()), "it names the layer: {error}");
    assert_eq!(Layer::open(&path, SIZE, true).unwrap_err().to_string(), error.to_string());
    match error {
        LayerError::Content { why, .. } => why,
        LayerError::Io { attempt, source, .. } => format!("{attempt}: {:?}", source.kind()),
    }
}

#[test]
fn each_damage_has_its_reason() {
    for length in [0, 7, 15, 16, 4096, 4097, 4096 + 4097] {
        assert_eq!(refusal(|path| cut(&map_of(path), length)), "its map is cut short", "{length}");
    }
    assert_eq!(refusal(|path| patch(&map_of(path), 0, b"CLLX")), "its map has another format");
    assert_eq!(refusal(|path| patch(&map_of(path), 4, &[3])), "its map has another format");
    for size in [0, SIZE + 1, u64::MAX] {
        let why = refusal(|path| patch(&map_of(path), 8, &size.to_le_bytes()));
        assert!(why.starts_with(&format!("it was made for a disk of {size} bytes")), "{why}");
    }
    let beyond = refusal(|path| patch(&map_of(path), 4096 + 32_781 / 8, &[0b0010_0000]));
    assert_eq!(beyond, "its map names blocks beyond the end of the disk");
    for length in [SIZE - 1, SIZE, SIZE + LOG - 1] {
        assert_eq!(refusal(|path| cut(path, length)), "its data file is cut short", "{length}");
    }
    assert_eq!(refusal(|path| std::fs::remove_file(path).unwrap()), "open: NotFound");
    assert_eq!(refusal(|path| std::fs::remove_file(map_of(path)).unwrap()), "open: NotFound");
}

#[test]
fn a_layer_of_a_smaller_disk_grows_only_when_it_takes_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = layer(folder.path());
    let larger = SIZE + 100 * 4096;
    assert_eq!(Layer::open(&path, larger, false).unwrap().held(), [0, 32_780]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE + LOG);
    assert_eq!(Layer::open(&path, larger, true).unwrap().held(), [0, 32_780]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), larger + LOG);
    let used = Layer::open(&path, larger, false).unwrap();
    let mut bytes = vec![1; 100 * 4096];
    used.read(SIZE, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0), "the old log is gone");
    assert!(Layer::open(&path, SIZE, true).is_err(), "a disk never shrinks");
}

#[test]
fn a_layer_of_version_1_gets_a_log_when_it_takes_writes() {
    let folder = tempfile::tempdir().unwrap();
    let path = layer(folder.path());
    // All is in the map afterwards.
    Layer::open(&path, SIZE, true).unwrap();
    patch(&map_of(&path), 4, &[1]);
    cut(&path, SIZE);
    assert_eq!(Layer::open(&path, SIZE, false).unwrap().held(), [0, 32_780]);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
    let opened = Layer::open(&path, SIZE, true).unwrap();
    opened.write(4096, &[3; 4096]).unwrap();
    opened.flush().unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE + LOG);
    assert_eq!(Layer::open(&path, SIZE, false).unwrap().held(), [0, 1, 32_780]);
}

#[test]
fn the_log_of_a_frozen_layer_is_read_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = layer(folder.path());
    let files = || (std::fs::read(&path).unwrap(), std::fs::read(map_of(&path)).unwrap());
    let before = files();
    assert!(before.1[4096..].iter().all(|byte| *byte == 0), "one sync: nothing is in the map");
    let frozen = Layer::open(&path, SIZE, false).unwrap();
    assert_eq!(frozen.held(), [0, 32_780]);
    assert!(files() == before);
    // Another content than the record says: that flush was not through.
    patch(&path, 5, &[77]);
    assert!(Layer::open(&path, SIZE, false).unwrap().held().is_empty());
}

#[test]
fn creating_never_touches_what_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let path = layer(folder.path());
    let exists = |path: &Path| match Layer::create(path, SIZE).unwrap_err() {
        LayerError::Io { source, .. } => assert_eq!(source.kind(), std::io::ErrorKind::AlreadyExists),
        error @ LayerError::Content { .. } => panic!("{error}"),
    };
    exists(&path);
    assert_eq!(Layer::open(&path, SIZE, true).unwrap().held(), [0, 32_780]);
    // With a fresh map beside old data the layer would look empty: a silent loss.
    std::fs::remove_file(map_of(&path)).unwrap();
    exists(&path);
    assert!(!map_of(&path).exists());
}

#[test]
fn what_an_interrupted_creation_left_is_no_obstacle() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer");
    std::fs::write(map_of(&path), vec![0xff; 100_000]).unwrap();
    std::fs::write(folder.path().join("layer.part"), b"half").unwrap();
    Layer::create(&path, SIZE).unwrap();
    assert!(Layer::open(&path, SIZE, true).unwrap().held().is_empty());
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(names.len(), 2, "{names:?}");
}

#[test]
fn a_chain_has_its_limits() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(store_of(folder.path(), &Arc::new(Shelf::default())));
    for count in [0, MAX_LAYERS + 1] {
        let layers = vec![folder.path().join("none"); count];
        assert!(matches!(Disk::open(4096, None, store.clone(), &layers), Err(DiskError::Layers(n)) if n == count));
    }
    let layers: Vec<_> = (0..MAX_LAYERS).map(|i| folder.path().join(format!("layer-{i}"))).collect();
    layers.iter().for_each(|path| Layer::create(path, 4096).unwrap());
    let disk = Disk::open(4096, None, store.clone(), &layers).unwrap();
    assert!(disk.try_write(0, &[3; 4096]).unwrap());
    disk.flush().unwrap();
    drop(disk);
    let disk = Disk::open(4096, None, store, &layers).unwrap();
    assert_eq!(disk.try_read(0, 4096).unwrap().unwrap(), [3; 4096]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn a_damaged_log_is_whole_or_nothing(at in 0u64..3 * 4096, bytes in proptest::collection::vec(any::<u8>(), 1..40)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer");
        Layer::create(&path, 100 * 4096).unwrap();
        let layer = Layer::open(&path, 100 * 4096, true).unwrap();
        for block in [7, 90] {
            layer.write(block * 4096, &[block as u8; 4096]).unwrap();
            layer.flush().unwrap();
        }
        patch(&path, 100 * 4096 + at, &bytes);
        for writable in [false, true] {
            let held = Layer::open(&path, 100 * 4096, writable).unwrap().held();
            prop_assert!(held.iter().all(|block| [7, 90].contains(block)), "{held:?}");
        }
    }

    #[test]
    fn no_map_makes_it_panic(at in 0usize..4200, bytes in proptest::collection::vec(any::<u8>(), 1..40), length: u16) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("layer");
        Layer::create(&path, 100 * 4096).unwrap();
        patch(&map_of(&path), at as u64, &bytes);
        if length < 8192 {
            cut(&map_of(&path), u64::from(length));
        }
        if let Ok(layer) = Layer::open(&path, 100 * 4096, false) {
            prop_assert!(layer.held().iter().all(|block| *block < 100));
        }
    }
}

//! A process that had a disk open has died, and another one goes on with it: nothing that was written is lost, flushed or not.

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use collective_store::fetch::FrameStore;
use collective_volume::{Disk, DiskError, Layer};
use common::{Shelf, store_of};
use futures_util::FutureExt;
use proptest::prelude::*;

const SIZE: u64 = 300 * 4096 + 512;

struct Place {
    folder: tempfile::TempDir,
    store: Arc<FrameStore>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = store_of(&folder.path().join("cache"), &Arc::new(Shelf::default())).now_or_never().unwrap();
        let place = Self { folder, store };
        Layer::create(&place.layer(0), SIZE).unwrap();
        place
    }

    fn layer(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("layer{number}"))
    }

    fn chain(&self, count: usize) -> Vec<PathBuf> {
        (0..count).map(|number| self.layer(number)).collect()
    }

    fn new_layer(&self, number: usize) -> Layer {
        Layer::create(&self.layer(number), SIZE).unwrap();
        Layer::open(&self.layer(number), SIZE, true).unwrap()
    }

    fn open(&self, count: usize) -> Disk {
        Disk::open(SIZE, None, self.store.clone(), &self.chain(count)).unwrap()
    }

    fn take_over(&self, count: usize) -> Result<Disk, DiskError> {
        Disk::take_over(SIZE, None, self.store.clone(), &self.chain(count))
    }
}

fn content(disk: &Disk) -> Vec<u8> {
    disk.try_read(0, SIZE as usize).unwrap().unwrap()
}

fn write(disk: &Disk, block: u64, byte: u8) {
    assert!(disk.try_write(block * 4096, &[byte; 4096]).unwrap());
}

/// As if the host had been booted since.
fn another_boot(layer: &Path) {
    let mut notes = layer.as_os_str().to_owned();
    notes.push(".held");
    OpenOptions::new().write(true).open(notes).unwrap().write_all_at(b"deadbeef", 16).unwrap();
}

#[test]
fn what_was_not_flushed_is_there_and_only_during_the_same_boot() {
    let place = Place::new();
    let disk = place.open(1);
    write(&disk, 3, 1);
    disk.flush().unwrap();
    write(&disk, 4, 2);
    let before = content(&disk);
    drop(disk);
    assert_eq!(content(&place.take_over(1).unwrap()), before);
    // It is durable now, and needs no notes any more.
    another_boot(&place.layer(0));
    let disk = place.open(1);
    assert_eq!(content(&disk), before);
    write(&disk, 5, 3);
    drop(disk);
    another_boot(&place.layer(0));
    assert!(matches!(place.take_over(1), Err(DiskError::NotNoted)));
    let disk = place.open(1);
    assert_eq!(content(&disk), before, "what was not flushed need not survive a power cut");
}

#[test]
fn a_checkpoint_that_was_not_made_durable_is_taken_over_whole() {
    let place = Place::new();
    let disk = place.open(1);
    write(&disk, 3, 1);
    disk.freeze(place.new_layer(1)).unwrap();
    write(&disk, 3, 2);
    write(&disk, 9, 2);
    let before = content(&disk);
    // Made for the next checkpoint, and not used yet.
    drop(place.new_layer(2));
    drop(disk);
    let disk = place.take_over(3).unwrap();
    assert_eq!(content(&disk), before);
    write(&disk, 10, 4);
    disk.flush().unwrap();
    let before = content(&disk);
    drop(disk);
    (0..3).for_each(|number| another_boot(&place.layer(number)));
    assert_eq!(content(&place.open(3)), before);
}

#[test]
fn nobody_goes_on_over_a_layer_of_which_a_flush_had_failed() {
    let place = Place::new();
    let disk = place.open(1);
    write(&disk, 3, 1);
    disk.freeze(place.new_layer(1)).unwrap();
    write(&disk, 4, 1);
    drop(disk);
    // As a flush that fails leaves it, whatever came above it since.
    let notes = OpenOptions::new().write(true).open(place.layer(0).with_extension("held")).unwrap();
    notes.write_all_at(&[0; 64], 0).unwrap();
    assert!(matches!(place.take_over(2), Err(DiskError::NotNoted)));
    // Opened after a power cut it is what it shows, and may be taken over from then on.
    let disk = place.open(2);
    write(&disk, 5, 1);
    let before = content(&disk);
    drop(disk);
    assert_eq!(content(&place.take_over(2).unwrap()), before);
}

#[test]
fn a_layer_that_took_writes_and_has_no_notes_is_not_believed() {
    let place = Place::new();
    let disk = place.open(1);
    write(&disk, 3, 1);
    disk.flush().unwrap();
    disk.freeze(place.new_layer(1)).unwrap();
    write(&disk, 4, 1);
    disk.flush().unwrap();
    drop(disk);
    assert!(!place.folder.path().join("layer0.held").exists(), "a frozen layer has none");
    std::fs::remove_file(place.folder.path().join("layer1.held")).unwrap();
    assert!(matches!(place.take_over(2), Err(DiskError::NotNoted)));
}

#[test]
fn notes_that_are_damaged_are_no_notes() {
    for (offset, bytes) in [(0, &b"XXXX"[..]), (8, &[0xff; 8]), (16, b"00000000")] {
        let place = Place::new();
        drop(place.open(1));
        let notes = OpenOptions::new().write(true).open(place.folder.path().join("layer0.held")).unwrap();
        notes.write_all_at(bytes, offset).unwrap();
        assert!(matches!(place.take_over(1), Err(DiskError::NotNoted)), "{offset}");
    }
    let place = Place::new();
    drop(place.open(1));
    let notes = OpenOptions::new().write(true).open(place.folder.path().join("layer0.held")).unwrap();
    // Blocks beyond the end of the disk.
    notes.write_all_at(&[0xff; 4096], 4096).unwrap();
    drop(place.take_over(1).unwrap());
    drop(place.open(1));
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Flush,
    Freeze,
    Die,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || (0..SIZE, 1..3 * 4096u64).prop_map(|(at, length)| (at, length.min(SIZE - at)));
    prop_oneof![
        6 => (place(), 1u8..).prop_map(|((at, length), byte)| Step::Write(at, length, byte)),
        2 => place().prop_map(|(at, length)| Step::Zero(at, length)),
        2 => Just(Step::Flush),
        1 => Just(Step::Freeze),
        2 => Just(Step::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nobody_notices_that_the_process_is_another(steps in proptest::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let place = Place::new();
        let (mut disk, mut layers) = (place.open(1), 1);
        let mut expected = vec![0; SIZE as usize];
        for step in steps.into_iter().chain([Step::Die]) {
            match step {
                Step::Write(at, length, byte) => {
                    runtime.block_on(disk.write(at, &vec![byte; length as usize])).unwrap();
                    expected[at as usize..(at + length) as usize].fill(byte);
                }
                Step::Zero(at, length) => {
                    runtime.block_on(disk.zero(at, length)).unwrap();
                    expected[at as usize..(at + length) as usize].fill(0);
                }
                Step::Flush => disk.flush().unwrap(),
                Step::Freeze => {
                    disk.freeze(place.new_layer(layers)).unwrap();
                    layers += 1;
                }
                Step::Die => {
                    drop(disk);
                    disk = place.take_over(layers).unwrap();
                    prop_assert!(content(&disk) == expected);
                }
            }
        }
    }
}

//! Disks as files, through the real kernel.

mod common;

use std::collections::HashSet;
use std::fs::{File as StdFile, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use collective_store::fetch::FrameStore;
use collective_volume::{Disk, File, Layer, Mount};
use common::{Shelf, image_of, noise, store_of, until};
use rustix::fs::FallocateFlags;
use rustix::mount::UnmountFlags;
use tokio::runtime::Runtime;

const FRAME: usize = collective_store::FRAME_BLOCKS * 4096;

/// A disk over an image of noise, mounted.
struct Rig {
    mount: Option<Mount>,
    shelf: Arc<Shelf>,
    store: Arc<FrameStore>,
    content: Vec<u8>,
    disk: Arc<Disk>,
    /// Answers what has to wait; ends after the mount.
    _runtime: Runtime,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(size: usize) -> Option<Self> {
        if !Path::new("/dev/fuse").exists() {
            println!("SKIPPED: there is no /dev/fuse here");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let shelf = Arc::new(Shelf::default());
        let content = noise(size, 1);
        let (store, image) = runtime.block_on(async {
            let store = store_of(&folder.path().join("cache"), &shelf).await;
            let image = image_of(&shelf, &store, &content).await;
            (store, image)
        });
        let layer = folder.path().join("layer");
        Layer::create(&layer, size as u64).unwrap();
        let disk = Arc::new(Disk::open(size as u64, Some(image), store.clone(), &[layer]).unwrap());
        let at = folder.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let files = vec![File { name: "system".into(), disk: disk.clone(), backing: None, waits: None }];
        let mount = Some(Mount::new(&at, files, None, runtime.handle().clone()).unwrap());
        shelf.reads.lock().unwrap().clear();
        Some(Self { mount, shelf, store, content, disk, _runtime: runtime, folder })
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("mnt/system")
    }

    fn open(&self) -> StdFile {
        OpenOptions::new().read(true).write(true).open(self.file()).unwrap()
    }

    /// Past the kernel's cache: each read reaches us.
    fn open_direct(&self) -> StdFile {
        let direct = rustix::fs::OFlags::DIRECT.bits() as i32;
        OpenOptions::new().read(true).custom_flags(direct).open(self.file()).unwrap()
    }

    fn layer(&self) -> PathBuf {
        self.folder.path().join("layer")
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // After a panic, readers may still wait and files be open.
        self.shelf.away.store(false, Ordering::SeqCst);
        self.shelf.permits.add_permits(1 << 20);
        let Some(mount) = self.mount.take() else { return };
        if thread::panicking() {
            let _ = rustix::mount::unmount(self.folder.path().join("mnt"), UnmountFlags::DETACH);
            std::mem::forget(mount);
        } else {
            mount.unmount().unwrap();
            assert!(!self.file().exists());
        }
    }
}

fn read_at(file: &StdFile, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn it_is_a_plain_file() {
    let Some(rig) = Rig::new(3 * FRAME + 1536) else { return };
    let names: Vec<_> = std::fs::read_dir(rig.folder.path().join("mnt")).unwrap().map(|e| e.unwrap()).collect();
    assert_eq!(names.iter().map(|e| e.file_name()).collect::<Vec<_>>(), ["system"]);
    let meta = std::fs::metadata(rig.file()).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o7777), (rig.content.len() as u64, 0o600));
    assert!(std::fs::read(rig.file()).unwrap() == rig.content);
    assert!(StdFile::create(rig.folder.path().join("mnt/other")).is_err());
    assert!(StdFile::open(rig.folder.path().join("mnt/other")).is_err());
}

#[test]
fn at_the_end_it_is_over() {
    let Some(rig) = Rig::new(FRAME + 1536) else { return };
    let file = rig.open();
    let size = rig.content.len() as u64;
    let mut buffer = [0; 4096];
    assert_eq!(file.read_at(&mut buffer, size).unwrap(), 0);
    assert_eq!(file.read_at(&mut buffer, size - 100).unwrap(), 100);
    assert!(buffer[..100] == rig.content[rig.content.len() - 100..]);
    let direct = rig.open_direct();
    assert_eq!(direct.read_at(&mut buffer, size - 1536).unwrap(), 1536);
    let big = Some(rustix::io::Errno::FBIG.raw_os_error());
    assert_eq!(file.write_at(&[1; 4096], size + 4096).unwrap_err().raw_os_error(), big);
    let zero = rustix::fs::fallocate(&file, FallocateFlags::ZERO_RANGE, size - 512, 4096);
    assert_eq!(zero.unwrap_err(), rustix::io::Errno::FBIG, "it cannot grow");
    // A hole beyond the end is as good as made, and must not take the last, short block along.
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, hole, size, 4096).unwrap();
    rustix::fs::fallocate(&file, hole, size + 8192, 4096).unwrap();
    assert!(read_at(&rig.open_direct(), size - 1536, 1536) == rig.content[rig.content.len() - 1536..]);
    assert_eq!(file.metadata().unwrap().len(), size);
    assert_eq!(rig.disk.own_bytes(), 0);
}

#[test]
fn many_readers_and_a_slow_store_and_each_frame_comes_once() {
    const FRAMES: usize = 24;
    let Some(rig) = Rig::new(FRAMES * FRAME) else { return };
    rig.shelf.permits.forget_permits(usize::MAX);
    thread::scope(|scope| {
        let rig = &rig;
        let readers: Vec<_> = (0..8usize)
            .map(|reader| {
                scope.spawn(move || {
                    let file = if reader % 2 == 0 { rig.open() } else { rig.open_direct() };
                    for i in 0..FRAMES * 2 {
                        let at = (i + reader / 4 * 11) % (FRAMES * 2) * FRAME / 2;
                        assert!(read_at(&file, at as u64, FRAME / 2) == rig.content[at..at + FRAME / 2], "at {at}");
                    }
                })
            })
            .collect();
        until("both halves of the readers crowd", || rig.shelf.reads.lock().unwrap().len() >= 2);
        // From now on one read goes through at a time.
        rig.shelf.permits.add_permits(1);
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    let reads = rig.shelf.reads.lock().unwrap();
    let distinct: HashSet<_> = reads.iter().collect();
    assert_eq!((reads.len(), distinct.len()), (FRAMES, FRAMES), "some frame was fetched twice");
}

#[test]
fn who_waits_for_an_absent_store_stands_in_nobodys_way() {
    let Some(rig) = Rig::new(8 * FRAME) else { return };
    let file = rig.open_direct();
    assert!(read_at(&file, 0, FRAME) == rig.content[..FRAME]);
    let writer = rig.open();
    writer.write_all_at(&[5; 4096], 7 * FRAME as u64).unwrap();
    rig.shelf.away.store(true, Ordering::SeqCst);
    thread::scope(|scope| {
        let rig = &rig;
        // More of them than threads that serve.
        let waiting: Vec<_> = (1..6)
            .map(|frame| {
                scope.spawn(move || {
                    let at = frame * FRAME;
                    read_at(&rig.open_direct(), at as u64, 4096) == rig.content[at..at + 4096]
                })
            })
            .collect();
        until("they wait", || rig.store.waiting().is_some());
        for _ in 0..50 {
            assert!(read_at(&file, 4096, 8192) == rig.content[4096..4096 + 8192]);
            assert_eq!(read_at(&file, 7 * FRAME as u64, 4096), [5; 4096]);
            writer.write_all_at(&[6; 4096], 7 * FRAME as u64 + 4096).unwrap();
        }
        writer.sync_all().unwrap();
        assert!(waiting.iter().all(|reader| !reader.is_finished()), "nothing is faked");
        rig.shelf.away.store(false, Ordering::SeqCst);
        until("they come back", || waiting.iter().all(|reader| reader.is_finished()));
        assert!(waiting.into_iter().all(|reader| reader.join().unwrap()));
    });
}

#[test]
fn fsync_is_durable_and_a_hole_gives_space_back() {
    let Some(rig) = Rig::new(16 * FRAME) else { return };
    let file = rig.open();
    let bytes = noise(8 * FRAME, 2);
    file.write_all_at(&bytes, 1000).unwrap();
    file.sync_all().unwrap();
    // As another process sees it after a power cut: only what the map on the disk says.
    let held = Layer::open(&rig.layer(), rig.content.len() as u64, false).unwrap().held();
    assert_eq!(held, (0..=8 * FRAME as u64 / 4096).collect::<Vec<_>>());
    let mut expected = rig.content.clone();
    expected[1000..1000 + bytes.len()].copy_from_slice(&bytes);
    assert!(std::fs::read(rig.file()).unwrap() == expected);

    let used = || std::fs::metadata(rig.layer()).unwrap().blocks() * 512;
    let before = used();
    assert!(before >= bytes.len() as u64);
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (from, to) = (FRAME + 700, 9 * FRAME + 100);
    rustix::fs::fallocate(&file, hole, from as u64, (to - from) as u64).unwrap();
    expected[from..to].fill(0);
    assert!(std::fs::read(rig.file()).unwrap() == expected);
    assert!(read_at(&rig.open_direct(), 0, expected.len()) == expected, "not only in the kernel's cache");
    file.sync_all().unwrap();
    assert!(used() <= before - 7 * FRAME as u64 + 8192, "{} of {before}", used());
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, zero, 12 * FRAME as u64 + 3, 10).unwrap();
    expected[12 * FRAME + 3..12 * FRAME + 13].fill(0);
    assert!(read_at(&rig.open_direct(), 0, expected.len()) == expected);
    let plain = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, 4096);
    assert_eq!(plain.unwrap_err(), rustix::io::Errno::OPNOTSUPP);
}

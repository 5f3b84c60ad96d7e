//! The host's disk is full: writes fail and say so, nothing else is lost, and it goes on when there is room again.
//! Needs root for a small file system of its own.

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use collective_volume::{Disk, Layer};
use common::{Shelf, noise, store_of};
use rustix::mount::{MountFlags, UnmountFlags};

const SIZE: u64 = 64 << 20;

struct SmallFs(PathBuf);

impl SmallFs {
    fn new(path: &Path) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let mounted = rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::empty(), Some(c"size=2m"));
        match mounted {
            Ok(()) => Some(Self(path.to_owned())),
            Err(rustix::io::Errno::PERM) => {
                println!("SKIPPED: mounting a small file system needs root");
                None
            }
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for SmallFs {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_fails_writes_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(small) = SmallFs::new(&folder.path().join("small")) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let store = runtime.block_on(store_of(&folder.path().join("cache"), &Arc::new(Shelf::default())));
    let path = small.0.join("layer");
    Layer::create(&path, SIZE).unwrap();
    let disk = Disk::open(SIZE, None, store.clone(), std::slice::from_ref(&path)).unwrap();
    let step = 64 << 10;
    let chunk = |i: u64| noise(step as usize, i);
    let failed = (0..SIZE / step).find_map(|i| disk.try_write(i * step, &chunk(i)).err().map(|error| (i, error)));
    let (written, error) = failed.expect("2 MiB do not hold 64");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NOSPC.raw_os_error()), "QEMU pauses the guest at this");
    assert!(written > 20, "{written}");
    // What a flush needs was taken when the layer was made: QEMU gives a disk up whose flush has failed once.
    disk.flush().unwrap();
    let check = |disk: &Disk, from: u64| {
        for i in from..written {
            assert!(disk.try_read(i * step, step as usize).unwrap().unwrap() == chunk(i), "chunk {i}");
        }
    };
    check(&disk, 0);
    // What failed is as before, not half done.
    assert!(disk.try_read((written + 1) * step, 4096).unwrap().unwrap().iter().all(|byte| *byte == 0));

    runtime.block_on(disk.zero(0, 4 * step)).unwrap();
    disk.flush().unwrap();
    assert!(disk.try_write(written * step, &chunk(written)).unwrap(), "there is room again");
    disk.flush().unwrap();
    drop(disk);
    let disk = Disk::open(SIZE, None, store, std::slice::from_ref(&path)).unwrap();
    check(&disk, 4);
    assert!(disk.try_read(written * step, step as usize).unwrap().unwrap() == chunk(written));
    assert!(disk.try_read(0, 4 * step as usize).unwrap().unwrap().iter().all(|byte| *byte == 0));
}

//! A disk is brought elsewhere while its guest writes and punches holes: in the end both are the same.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use collective_volume::{Disk, Layer};
use common::{Shelf, image_of, noise, store_of, until};

const BLOCKS: u64 = 500;
/// The last block is not whole.
const SIZE: u64 = BLOCKS * 4096 - 1024;

fn bring(from: &Disk, to: &Disk, blocks: impl IntoIterator<Item = std::ops::Range<u64>>) {
    for range in blocks {
        let (start, end) = (range.start * 4096, (range.end * 4096).min(SIZE));
        let content = from.try_read(start, (end - start) as usize).unwrap().expect("all of it is at hand");
        match content.iter().all(|byte| *byte == 0) {
            true => to.zero_received(start, end - start).unwrap(),
            false => to.put_received(start, &content).unwrap(),
        }
    }
}

#[test]
fn what_is_written_meanwhile_is_brought_along() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let shelf = Arc::new(Shelf::default());
    let store = runtime.block_on(store_of(&folder.path().join("cache"), &shelf));
    let image = runtime.block_on(image_of(&shelf, &store, &noise(SIZE as usize, 1)));
    let open = |name: &str| {
        let path = folder.path().join(name);
        Layer::create(&path, SIZE).unwrap();
        Disk::open(SIZE, Some(image.clone()), store.clone(), &[path]).unwrap()
    };
    let (here, there) = (Arc::new(open("here")), open("there").frozen());
    // Both have the image at hand, as after a prefetch.
    let all = runtime.block_on(here.read(0, SIZE as usize)).unwrap();
    assert!(there.try_write(0, &all[..4096]).is_err(), "it takes nothing but what was sent");
    runtime.block_on(here.zero(0, 5 * 4096)).unwrap();
    here.try_write(7 * 4096, &noise(4096, 7)).unwrap();

    let (done, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let guest = {
        let (here, done, writes, handle) = (here.clone(), done.clone(), writes.clone(), runtime.handle().clone());
        std::thread::spawn(move || {
            let mut turn: u64 = 1;
            while !done.load(Ordering::Relaxed) {
                turn = turn.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let offset = (turn >> 33) % (SIZE - 9000);
                match turn >> 60 {
                    0 => handle.block_on(here.zero(offset, 9000)).unwrap(),
                    _ => handle.block_on(here.write(offset, &noise(100 + (turn >> 50) as usize % 8000, turn))).unwrap(),
                }
                writes.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    here.follow();
    bring(&here, &there, here.own_blocks());
    for _ in 0..20 {
        let before = writes.load(Ordering::Relaxed);
        until("the guest writes", || writes.load(Ordering::Relaxed) > before + 3);
        assert!(here.unsent() > 0);
        bring(&here, &there, here.written());
    }
    done.store(true, Ordering::Relaxed);
    guest.join().unwrap();
    bring(&here, &there, here.written());
    assert_eq!((here.written(), here.unsent()), (vec![], 0));
    let [here_now, there_now] = [&*here, &there].map(|disk| runtime.block_on(disk.read(0, SIZE as usize)).unwrap());
    assert!(here_now == there_now, "both are the same");
    assert!(here_now != all);
    // Nobody follows any more, so nothing is noted.
    here.unfollow();
    here.try_write(0, &noise(4096, 3)).unwrap();
    assert_eq!(here.written(), []);
    // What this disk has not got is refused.
    for (offset, length) in [(SIZE - SIZE % 4096, 4096), (1, 4096), (0, 100), (u64::MAX - 4095, 4096)] {
        assert!(there.put_received(offset, &noise(length, 5)).is_err(), "{length} at {offset}");
        assert!(there.zero_received(offset, length as u64).is_err(), "{length} at {offset}");
    }
    there.put_received(SIZE - SIZE % 4096, &noise((SIZE % 4096) as usize, 5)).unwrap();
}

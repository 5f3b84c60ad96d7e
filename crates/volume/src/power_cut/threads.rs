//! The same with real threads: writers do not wait for each other, nor for flushes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::sim::{Dice, Plug, SECTOR, SimFile};
use super::{SIZES, fresh_data, fresh_map};
use crate::Layer;
use crate::layer::Files;

/// Each has a block of its own in between the others'.
const WRITERS: u64 = 4;
const BLOCKS: u64 = 12;

/// Writes version after version of each block until the power goes, from several threads, while others flush.
/// Each sector has the version in it that was promised last, or a newer one that was written.
fn life(seed: u64) {
    let mut dice = Dice(seed);
    let plug = Arc::new(Plug(Mutex::new(20 + dice.roll(400))));
    let (data, map) = (SimFile::new(&plug, true, fresh_data(2)), SimFile::new(&plug, true, fresh_map(2)));
    let open = |data: &Arc<SimFile>, map: &Arc<SimFile>| {
        let files = Files { data: Box::new(data.clone()), map: Box::new(map.clone()), held: None };
        Layer::over(Path::new("top"), files, SIZES[0], true).unwrap()
    };
    let layer = open(&data, &map);
    let counters = || (0..BLOCKS).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    let (begun, done, promised) = (counters(), counters(), counters());
    thread::scope(|scope| {
        for writer in 0..WRITERS {
            let (layer, begun, done) = (&layer, &begun, &done);
            let mut dice = Dice(seed ^ (writer + 1) << 32);
            scope.spawn(move || {
                loop {
                    let block = dice.roll(BLOCKS / WRITERS) * WRITERS + writer;
                    let version = 1 + begun[block as usize].fetch_add(1, Ordering::SeqCst);
                    let bytes = version.to_le_bytes().repeat(512);
                    if layer.write(block * 4096, &bytes).is_err() {
                        return;
                    }
                    done[block as usize].store(version, Ordering::SeqCst);
                    if dice.roll(3) == 0 {
                        thread::yield_now();
                    }
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                while !plug.gone() {
                    let before: Vec<_> = done.iter().map(|version| version.load(Ordering::SeqCst)).collect();
                    if layer.flush().is_ok() && !plug.gone() {
                        for (promised, version) in promised.iter().zip(before) {
                            promised.fetch_max(version, Ordering::SeqCst);
                        }
                    }
                }
            });
        }
    });
    *plug.0.lock().unwrap() = u64::MAX;
    let (data, map) = (data.crash(&mut dice), map.crash(&mut dice));
    let layer = open(&SimFile::new(&plug, true, data), &SimFile::new(&plug, true, map));
    let held = layer.held();
    for block in 0..BLOCKS {
        let mut bytes = [0; 4096];
        if held.contains(&block) {
            layer.read(block * 4096, &mut bytes).unwrap();
        }
        let [begun, promised] = [&begun, &promised].map(|counter| counter[block as usize].load(Ordering::SeqCst));
        for sector in bytes.chunks_exact(SECTOR as usize) {
            let version = u64::from_le_bytes(sector[..8].try_into().unwrap());
            assert!(sector.chunks_exact(8).all(|word| word == &sector[..8]), "seed {seed}: a torn sector");
            assert!(
                (promised..=begun).contains(&version),
                "seed {seed}: block {block} is {version}, not {promised}..={begun}"
            );
        }
    }
}

#[test]
fn what_a_flush_promised_survives_though_others_write() {
    (0..200).for_each(life);
}

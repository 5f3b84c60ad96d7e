//! Disks whose versions share most of their blocks, and of whose first packs less and less is used.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use collective_store::{BLOCK, FRAME_BLOCKS};
use collective_testkit::Dice;

/// Blocks of every disk: some frames, so that of a pack only a part may be used.
const BLOCKS: u64 = 3 * REGION;
/// Blocks that are written together now and then.
const REGION: u64 = FRAME_BLOCKS as u64;

/// What the version with this number has on its disk.
pub fn disk(version: u64) -> Arc<Vec<u8>> {
    static MADE: Mutex<BTreeMap<u64, Arc<Vec<u8>>>> = Mutex::new(BTreeMap::new());
    let make = || Arc::new((0..BLOCKS).flat_map(|block| content(block, changed(block, version))).collect());
    MADE.lock().unwrap().entry(version).or_insert_with(make).clone()
}

/// The last version, not after this one, that changed a block, alone or with all of its region.
fn changed(block: u64, version: u64) -> u64 {
    let region = BLOCKS + block / REGION;
    let by = |version: u64, what: u64, percent| Dice::new(version * 2 * BLOCKS + what).percent(percent);
    (1..=version).rev().find(|version| by(*version, block, 2) || by(*version, region, 50)).unwrap_or(0)
}

/// Alike over its versions, so that differences are worth it; some blocks are zeros.
fn content(block: u64, version: u64) -> Vec<u8> {
    if Dice::new(block + 7 * version).percent(10) {
        return vec![0; BLOCK as usize];
    }
    let mut bytes = Dice::new(1000 + block).bytes(BLOCK as usize);
    bytes[100..140].copy_from_slice(&Dice::new(block ^ version << 20).bytes(40));
    bytes
}

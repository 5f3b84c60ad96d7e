//! Disks whose versions share most of their blocks.

use collective_store::BLOCK;
use collective_testkit::Dice;

/// Blocks of every disk.
const BLOCKS: u64 = 40;

/// What the version with this number has on its disk.
pub fn disk(version: u64) -> Vec<u8> {
    (0..BLOCKS).flat_map(|block| content(block, changed(block, version))).collect()
}

/// The last version, not after this one, that changed a block.
fn changed(block: u64, version: u64) -> u64 {
    (1..=version).rev().find(|version| Dice::new(version * BLOCKS + block).percent(15)).unwrap_or(0)
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

//! The log of a layer on its disk: whether its newest record counts, and what is to be done about it.

use std::io;

use collective_model::Digest;
use collective_store::BLOCK;

use crate::backing::{Backing, read_full};
use crate::log::{self, Blocks, SLOT, SLOTS};
use crate::map::{self, Bits};
use crate::rules::{Rule, keeps};

/// What is in blocks, one after the other.
pub(crate) fn content(data: &dyn Backing, blocks: &Blocks) -> io::Result<Digest> {
    let mut bytes = Vec::new();
    for run in blocks.runs() {
        let from = bytes.len();
        bytes.resize(from + ((run.end - run.start) * BLOCK) as usize, 0);
        read_full(data, &mut bytes[from..], run.start * BLOCK)?;
    }
    Ok(Digest::of(&bytes))
}

/// What was found in a log.
#[derive(Debug, Default)]
pub(crate) struct Replay {
    /// The number after the newest record's.
    pub next: u64,
    /// Where the newest record is, if it does not count.
    dropped: Option<u64>,
}

/// Adds to the bits what the log of a disk of `size` bytes knows.
pub(crate) fn replay(data: &dyn Backing, size: u64, bits: &mut Bits) -> io::Result<Replay> {
    let mut bytes = vec![0; SLOTS as usize * SLOT];
    read_full(data, &mut bytes, log::start(size))?;
    let mut records = log::records(&bytes, size.div_ceil(BLOCK));
    let mut found = Replay::default();
    if let Some(newest) = records.last() {
        found.next = newest.number + 1;
        if content(data, &newest.blocks)? != newest.content && keeps(Rule::DoubtIsResolved) {
            found.dropped = Some(log::place(size, newest.number));
            records.pop();
        }
    }
    for block in records.iter().flat_map(|record| record.blocks.runs()).cloned().flatten() {
        bits.set(block);
    }
    Ok(found)
}

/// Makes durable what was found, so that what the log says is in the map.
pub(crate) fn settle(data: &dyn Backing, map: &dyn Backing, found: &Replay, bits: &mut Bits) -> io::Result<()> {
    // If only the process died, none of it may have been synced: neither what a guest reads now, nor the map.
    if keeps(Rule::DataBeforeMap) {
        data.sync()?;
    }
    map::write(map, &bits.take_changed())?;
    match found.dropped.filter(|_| keeps(Rule::DroppedIsErased)) {
        // With a successor it would count.
        Some(place) => data.write_at(&[0; SLOT], place).and_then(|()| data.sync()),
        None => Ok(()),
    }
}

//! Notes which blocks are read, in the order of the first time.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use collective_store::trace::{MAX_RANGES, Trace};

/// Takes notes until it is stopped.
pub(crate) struct Recorder {
    blocks: u64,
    on: AtomicBool,
    notes: Mutex<Notes>,
}

struct Notes {
    /// One bit for each block.
    seen: Vec<u64>,
    trace: Trace,
}

impl Recorder {
    pub fn new(blocks: u64) -> Self {
        let notes = Notes { seen: vec![0; blocks.div_ceil(64) as usize], trace: Trace::default() };
        Self { blocks, on: AtomicBool::new(true), notes: Mutex::new(notes) }
    }

    /// These blocks are read.
    pub fn note(&self, blocks: Range<u64>) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        let Notes { seen, trace } = &mut *notes;
        for block in blocks.start..blocks.end.min(self.blocks) {
            let Some(word) = seen.get_mut((block / 64) as usize) else { return };
            let bit = 1 << (block % 64);
            let Ok(block) = u32::try_from(block) else { return };
            if *word & bit != 0 {
                continue;
            }
            *word |= bit;
            let full = trace.0.len() >= MAX_RANGES;
            match trace.0.last_mut() {
                Some((first, count)) if *first + *count == block => *count += 1,
                _ if !full => trace.0.push((block, 1)),
                _ => self.on.store(false, Ordering::Relaxed),
            }
        }
    }

    /// Stops, and gives what was noted.
    pub fn stop(&self) -> Trace {
        self.on.store(false, Ordering::Relaxed);
        let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
        notes.seen = Vec::new();
        std::mem::take(&mut notes.trace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_block_once_in_the_order_of_the_first_time() {
        let recorder = Recorder::new(100);
        for blocks in [10..12, 12..14, 50..51, 11..15, 9..11, 99..200] {
            recorder.note(blocks);
        }
        assert_eq!(recorder.stop().0, [(10, 4), (50, 1), (14, 1), (9, 1), (99, 1)]);
        recorder.note(1..2);
        assert_eq!(recorder.stop(), Trace::default());
    }
}

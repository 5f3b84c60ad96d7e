//! Brings a disk that is in use elsewhere: what it has of its own, what was written since, and taking that at the other end.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use collective_store::BLOCK;

use crate::Disk;

/// Notes which blocks are written, while somebody follows.
#[derive(Default)]
pub(crate) struct Follower {
    on: AtomicBool,
    /// One bit for each block.
    written: Mutex<Vec<u64>>,
}

impl Follower {
    /// These blocks were written.
    pub fn note(&self, blocks: Range<u64>) {
        if !self.on.load(Ordering::Relaxed) {
            return;
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        for block in blocks {
            if let Some(word) = written.get_mut((block / 64) as usize) {
                *word |= 1 << (block % 64);
            }
        }
    }

    fn begin(&self, blocks: u64) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = vec![0; blocks.div_ceil(64) as usize];
        self.on.store(true, Ordering::Relaxed);
    }

    fn end(&self) {
        self.on.store(false, Ordering::Relaxed);
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
    }

    fn take(&self) -> Vec<Range<u64>> {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let found = runs((0u64..).zip(written.iter().copied()));
        written.fill(0);
        found
    }

    fn count(&self) -> u64 {
        let written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

fn runs(words: impl Iterator<Item = (u64, u64)>) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    for (index, word) in words.filter(|(_, word)| *word != 0) {
        for block in (0..64).filter(|bit| word >> bit & 1 == 1).map(|bit| index * 64 + bit) {
            match found.last_mut() {
                Some(last) if last.end == block => last.end += 1,
                _ => found.push(block..block + 1),
            }
        }
    }
    found
}

impl Disk {
    /// From here on what is written is noted, until [`unfollow`](Self::unfollow).
    pub fn follow(&self) {
        let _alone = self.alone();
        self.follower.begin(self.chain.blocks());
    }

    /// Nobody follows any more.
    pub fn unfollow(&self) {
        self.follower.end();
    }

    /// The blocks that were written since the last answer. What is written meanwhile is in this answer or in the next.
    pub fn written(&self) -> Vec<Range<u64>> {
        let _alone = self.alone();
        self.follower.take()
    }

    /// How many bytes the next answer of [`written`](Self::written) would have.
    pub fn unsent(&self) -> u64 {
        self.follower.count() * BLOCK
    }

    /// The blocks that differ from the image.
    pub fn own_blocks(&self) -> Vec<Range<u64>> {
        let (mut found, mut at): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
        while at < self.chain.blocks() {
            let (owner, alike) = self.chain.run_at(at, self.chain.blocks() - at);
            match found.last_mut() {
                _ if owner.is_none() => {}
                Some(last) if last.end == at => last.end += alike,
                _ => found.push(at..at + alike),
            }
            at += alike;
        }
        found
    }

    /// From here on it takes no writes but those of [`put_received`](Self::put_received).
    pub fn frozen(mut self) -> Self {
        self.frozen = true;
        self
    }

    /// Takes content that was sent: whole blocks, but for the disk's last one. Nothing in this disk is overtaken by it.
    pub fn put_received(&self, offset: u64, content: &[u8]) -> io::Result<()> {
        self.check_received(offset, content.len() as u64)?;
        match self.put(offset, content)? {
            true => Ok(()),
            false => Err(io::Error::other("a part of a block was sent")),
        }
    }

    /// Takes zeros that were sent.
    pub fn zero_received(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_received(offset, length)?;
        self.punch(offset / BLOCK..(offset + length).div_ceil(BLOCK))
    }

    fn check_received(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size());
        match end {
            Some(end) if offset.is_multiple_of(BLOCK) && (end.is_multiple_of(BLOCK) || end == self.size()) => Ok(()),
            _ => Err(io::Error::other(format!("{length} bytes at {offset} were sent, which this disk has not got"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_told_once() {
        let follower = Follower::default();
        follower.note(1..2);
        follower.begin(200);
        for blocks in [5..6, 63..66, 190..200, 5..7] {
            follower.note(blocks);
        }
        assert_eq!(follower.count(), 2 + 3 + 10);
        assert_eq!(follower.take(), [5..7, 63..66, 190..200]);
        assert_eq!(follower.take(), []);
        follower.note(70..71);
        follower.end();
        assert_eq!(follower.take(), []);
    }
}

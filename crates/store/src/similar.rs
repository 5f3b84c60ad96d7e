//! Which old frames a new frame resembles, by content alone: any operating system and any file system profits.
//!
//! A few places of each frame are chosen by what stands there (content-defined sampling, as in the chunking of
//! Muthitacharoen et al., LBFS, SOSP 2001; the rolling hash is the gear hash of Xia et al., Ddelta, 2014). The hash of
//! the bytes before such a place is an *anchor*. Two frames that share an anchor almost certainly share these bytes,
//! wherever they lie in them; the old frames with which a new one shares most are the best dictionary for it.

use std::collections::HashMap;

/// One place in 512 is an anchor: eight for a block.
const SAMPLE: u64 = ((1 << 9) - 1) << 40;
/// The bits of the rolling hash that an anchor is made of; they depend on the last 49 bytes.
const WINDOW: u64 = (1 << 49) - 1;
const WINDOW_BYTES: usize = 49;
/// An anchor that more old frames have says little, and is not looked at.
const COMMON: usize = 8;
/// A new frame resembles an old one from this many common anchors on.
const ENOUGH: u32 = 2;
/// No more than this many old frames serve a new one.
pub(crate) const MAX_BASES: usize = 6;
/// The index takes eight bytes for each; when there are more, every second anchor is forgotten (128 MiB).
const MAX_ENTRIES: usize = 16 << 20;

/// Pseudo-random numbers, one for each value of a byte (SplitMix64).
const GEAR: [u64; 256] = gear();

const fn gear() -> [u64; 256] {
    let mut table = [0; 256];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut index = 0;
    while index < 256 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[index] = mixed ^ (mixed >> 31);
        index += 1;
    }
    table
}

/// The anchors of a frame, each once, ascending.
pub(crate) fn anchors(content: &[u8]) -> Vec<u32> {
    let mut hash = 0_u64;
    let mut found = Vec::with_capacity(content.len() >> 9);
    for (index, byte) in content.iter().enumerate() {
        hash = (hash << 1).wrapping_add(GEAR[usize::from(*byte)]);
        if hash & SAMPLE == 0 && index >= WINDOW_BYTES {
            found.push(((hash & WINDOW).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32);
        }
    }
    found.sort_unstable();
    found.dedup();
    found
}

/// The anchors of old frames.
pub(crate) struct Similar {
    entries: Vec<(u32, u32)>,
    limit: usize,
    sorted: bool,
    /// Anchors with one of these bits are left out.
    thinned: u32,
}

impl Default for Similar {
    fn default() -> Self {
        Self { entries: Vec::new(), limit: MAX_ENTRIES, sorted: true, thinned: 0 }
    }
}

impl Similar {
    /// Takes up a frame by its number.
    pub fn learn(&mut self, frame: u32, anchors: &[u32]) {
        let kept = anchors.iter().filter(|anchor| **anchor & self.thinned == 0);
        self.entries.extend(kept.map(|anchor| (*anchor, frame)));
        self.sorted = false;
        while self.entries.len() > self.limit {
            self.thinned = self.thinned << 1 | 1;
            let thinned = self.thinned;
            self.entries.retain(|(anchor, _)| anchor & thinned == 0);
        }
    }

    /// Has to be called after the last frame was learned, before [`best`](Self::best).
    pub fn sort(&mut self) {
        if !self.sorted {
            self.entries.sort_unstable();
            self.sorted = true;
        }
    }

    /// The old frames that share most with a frame of these anchors, the best first.
    pub fn best(&self, anchors: &[u32]) -> Vec<u32> {
        let mut common: HashMap<u32, u32> = HashMap::new();
        for anchor in anchors {
            let start = self.entries.partition_point(|(known, _)| known < anchor);
            let same = self.entries[start..].iter().take_while(|(known, _)| known == anchor).take(COMMON + 1);
            if same.clone().count() <= COMMON {
                same.for_each(|(_, frame)| *common.entry(*frame).or_default() += 1);
            }
        }
        let mut best: Vec<(u32, u32)> = common.into_iter().filter(|(_, count)| *count >= ENOUGH).collect();
        best.sort_unstable_by_key(|(frame, count)| (std::cmp::Reverse(*count), *frame));
        best.into_iter().take(MAX_BASES).map(|(frame, _)| frame).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(length: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn what_was_shifted_and_mixed_is_found() {
        let old: Vec<Vec<u8>> = (0..50).map(|seed| random(131_072, seed)).collect();
        let mut similar = Similar::default();
        for (index, frame) in old.iter().enumerate() {
            similar.learn(index as u32, &anchors(frame));
        }
        similar.sort();
        // Two thirds of one frame, shifted by a few bytes, and a third of another.
        let new = [&random(77, 1000)[..], &old[7][..80_000], &old[31][90_000..]].concat();
        assert_eq!(similar.best(&anchors(&new)), [7, 31]);
        assert!(similar.best(&anchors(&random(131_072, 2000))).is_empty());
        assert!(similar.best(&anchors(&vec![7; 131_072])).is_empty());
    }

    #[test]
    fn the_index_stays_bounded_and_still_finds() {
        let mut similar = Similar { limit: 10_000, ..Default::default() };
        let anchor = |frame: u32, i: u32| (i + frame * 1000).wrapping_mul(0x9e37_79b1);
        for frame in 0..300 {
            similar.learn(frame, &(0..1000).map(|i| anchor(frame, i)).collect::<Vec<_>>());
        }
        assert!(similar.entries.len() <= 10_000);
        similar.sort();
        let some: Vec<u32> = (0..500).map(|i| anchor(17, i)).collect();
        assert_eq!(similar.best(&some), [17]);
    }
}

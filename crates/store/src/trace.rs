//! Which blocks a guest reads while it boots, in order: what a cold host fetches first.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use collective_model::Digest;
use serde::{Deserialize, Serialize};

use crate::image::{ImageMap, Run};
use crate::page::PageError;

const MAGIC: &[u8; 8] = b"CLTR\x01\0\0\0";
/// No trace has more ranges.
pub const MAX_RANGES: usize = 65_536;

/// Ranges of 4 KiB blocks, `[first, count]`, in the order in which they were first read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Trace(pub Vec<(u32, u32)>);

impl Trace {
    /// As a page: `"CLTR" u16 version=1 u16 0, u32 count, count x { u32 first, u32 blocks }`, little-endian. What is
    /// more than [`MAX_RANGES`] is left out.
    pub fn encode(&self) -> Vec<u8> {
        let ranges = &self.0[..self.0.len().min(MAX_RANGES)];
        let mut out = MAGIC.to_vec();
        out.extend((ranges.len() as u32).to_le_bytes());
        for (first, blocks) in ranges {
            out.extend(first.to_le_bytes());
            out.extend(blocks.to_le_bytes());
        }
        out
    }

    /// Reads a page.
    pub fn decode(bytes: &[u8]) -> Result<Self, PageError> {
        let body = bytes.strip_prefix(MAGIC).ok_or(PageError("it is not a boot trace"))?;
        let (count, rest) = body.split_first_chunk().ok_or(PageError("a boot trace is cut short"))?;
        let (ranges, left) = rest.as_chunks::<8>();
        if !left.is_empty() || ranges.len() != u32::from_le_bytes(*count) as usize || ranges.len() > MAX_RANGES {
            return Err(PageError("a boot trace has another length than it says"));
        }
        let number = |raw: &[u8; 8], at: usize| u32::from_le_bytes([raw[at], raw[at + 1], raw[at + 2], raw[at + 3]]);
        Ok(Self(ranges.iter().map(|raw| (number(raw, 0), number(raw, 4))).collect()))
    }

    /// The ranges of blocks on a disk of `blocks` blocks.
    pub fn ranges(&self, blocks: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        self.0.iter().filter_map(move |(first, count)| {
            let first = u64::from(*first);
            let range = first..(first + u64::from(*count)).min(blocks);
            (range.start < range.end).then_some(range)
        })
    }

    /// The frames of an image that hold these blocks, each once, in order.
    pub fn frames(&self, image: &ImageMap) -> Vec<Digest> {
        let mut seen = HashSet::new();
        let mut frames = Vec::new();
        let mut walked = Walked::default();
        for range in self.ranges(image.blocks()).flat_map(|range| walked.add(range)) {
            let mut block = range.start;
            while block < range.end {
                block += match image.run_at(block) {
                    Run::Zeros(blocks) => blocks,
                    Run::Frame { digest, blocks, .. } => {
                        if seen.insert(digest) {
                            frames.push(digest);
                        }
                        blocks
                    }
                };
            }
        }
        frames
    }
}

/// Blocks that were walked through: a trace that names the same ones again and again would take hours otherwise.
#[derive(Default)]
struct Walked(BTreeMap<u64, u64>);

impl Walked {
    /// The parts of a range that are new.
    fn add(&mut self, range: Range<u64>) -> Vec<Range<u64>> {
        let touches = |(_, end): &(&u64, &u64)| **end >= range.start;
        let mut old: Vec<Range<u64>> =
            self.0.range(..=range.end).rev().take_while(touches).map(|(start, end)| *start..*end).collect();
        old.reverse();
        let (mut whole, mut at, mut new) = (range.clone(), range.start, Vec::new());
        for known in old {
            if at < known.start {
                new.push(at..known.start);
            }
            at = at.max(known.end);
            whole = whole.start.min(known.start)..whole.end.max(known.end);
            self.0.remove(&known.start);
        }
        if at < range.end {
            new.push(at..range.end);
        }
        self.0.insert(whole.start, whole.end);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_block_is_walked_once(ranges in proptest::collection::vec((0u64..100, 1u64..30), 0..30)) {
            let (mut walked, mut seen) = (Walked::default(), HashSet::new());
            for (first, count) in ranges {
                let expected: Vec<u64> = (first..first + count).filter(|block| seen.insert(*block)).collect();
                let new = walked.add(first..first + count);
                prop_assert!(new.iter().all(|range| range.start < range.end));
                prop_assert_eq!(new.into_iter().flatten().collect::<Vec<_>>(), expected);
            }
        }

        #[test]
        fn round_trip(ranges in proptest::collection::vec((any::<u32>(), any::<u32>()), 0..50), cut in 0usize..400) {
            let trace = Trace(ranges);
            let bytes = trace.encode();
            prop_assert_eq!(Trace::decode(&bytes).unwrap(), trace.clone());
            prop_assert!(Trace::decode(&bytes[..cut % bytes.len()]).is_err());
            prop_assert!(trace.ranges(1000).all(|range| range.end <= 1000 && range.start < range.end));
        }
    }
}

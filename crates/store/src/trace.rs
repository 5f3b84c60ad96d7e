//! Which blocks a guest reads while it boots, in order: what a cold host fetches first.

use std::collections::HashSet;
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
        for range in self.ranges(image.blocks()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
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

//! What a host keeps of an instance that went elsewhere, and what of it need not be sent when the instance comes back.
//!
//! The host that has the machine offers blocks: where they are, and a hash of each. The other one looks at the same places of
//! what it keeps, takes what has the same hash, and answers which it lacks: a bit for each block, in the order of the offers.

use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::run::RunImage;

/// The hash of an offered block. 16 bytes: whoever wants two blocks with one hash has to know the key before the move.
pub type OfferHash = [u8; 16];

const CONTEXT: &str = "collective 2026 live move 1: hashes of offered blocks";

/// What is kept of an instance, for the runner that gets it back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptCopy {
    /// Disks and memory.
    pub parts: Vec<KeptPart>,
    /// The folder where hashes of blocks of private packs are remembered.
    #[serde(default)]
    pub hashes: Option<PathBuf>,
}

/// A disk or the memory, as it was when the instance left. What is wrong with it costs bytes and nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptPart {
    /// Its number, as in [`crate::run_live`].
    pub which: u16,
    /// In bytes.
    pub size: u64,
    /// What is below its layers, if that helps.
    #[serde(default)]
    pub image: Option<RunImage>,
    /// Its layers, oldest first.
    pub layers: Vec<PathBuf>,
}

/// Makes the hashes of one move.
#[derive(Clone, Debug)]
pub struct OfferHasher([u8; 32]);

impl OfferHasher {
    /// For the move that ends in this instant, whose name nobody knew before.
    pub fn of(epoch: &str) -> Self {
        Self(blake3::derive_key(CONTEXT, epoch.as_bytes()))
    }

    /// The hash of one block.
    pub fn hash(&self, block: &[u8]) -> OfferHash {
        let mut hash = [0; 16];
        hash.copy_from_slice(&blake3::keyed_hash(&self.0, block).as_bytes()[..16]);
        hash
    }
}

/// Runs of blocks that were offered and not yet answered. `T` says what each belongs to.
#[derive(Debug)]
pub struct Offers<T> {
    runs: Vec<(T, Range<u64>)>,
    blocks: u64,
}

impl<T> Default for Offers<T> {
    fn default() -> Self {
        Self { runs: Vec::new(), blocks: 0 }
    }
}

impl<T: Clone + PartialEq> Offers<T> {
    /// These blocks are offered.
    pub fn add(&mut self, of: T, blocks: Range<u64>) {
        self.blocks += blocks.end.saturating_sub(blocks.start);
        match self.runs.last_mut() {
            Some((last, run)) if *last == of && run.end == blocks.start => run.end = blocks.end,
            _ => self.runs.push((of, blocks)),
        }
    }

    /// How many were offered.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// What has to be sent, in the order of the offers.
    pub fn lacking(self, answer: &[u8]) -> Result<Vec<(T, Range<u64>)>, String> {
        if answer.len() as u64 != self.blocks.div_ceil(8) {
            return Err(format!("{} blocks were offered, and the answer has {} bytes", self.blocks, answer.len()));
        }
        let mut lacking = Offers::default();
        let mut bit = 0usize;
        for (of, blocks) in self.runs {
            for block in blocks {
                if answer[bit / 8] >> (bit % 8) & 1 == 1 {
                    lacking.add(of.clone(), block..block + 1);
                }
                bit += 1;
            }
        }
        Ok(lacking.runs)
    }
}

/// The answer to offers, as it grows.
#[derive(Debug, Default)]
pub struct OfferAnswer {
    bits: Vec<u8>,
    count: usize,
}

impl OfferAnswer {
    /// The next block.
    pub fn push(&mut self, lacks: bool) {
        if self.count.is_multiple_of(8) {
            self.bits.push(0);
        }
        if let (true, Some(last)) = (lacks, self.bits.last_mut()) {
            *last |= 1 << (self.count % 8);
        }
        self.count += 1;
    }

    /// The answer to all so far; what comes next begins another one.
    pub fn take(&mut self) -> Vec<u8> {
        self.count = 0;
        std::mem::take(&mut self.bits)
    }
}

/// What of `ranges` is in none of `others`; both ascend.
pub fn without(ranges: &[Range<u64>], others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    let mut others = others.iter().peekable();
    for range in ranges {
        let mut at = range.start;
        while others.next_if(|other| other.end <= at).is_some() {}
        while let Some(other) = others.peek().filter(|other| other.start < range.end) {
            if at < other.start {
                left.push(at..other.start);
            }
            at = at.max(other.end);
            if other.end > range.end {
                break;
            }
            others.next();
        }
        if at < range.end {
            left.push(at..range.end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[test]
    fn hashes_are_of_one_move() {
        let (one, other) = (OfferHasher::of("1-live"), OfferHasher::of("2-live"));
        assert_eq!(one.hash(&[7; 4096]), OfferHasher::of("1-live").hash(&[7; 4096]));
        assert_ne!(one.hash(&[7; 4096]), other.hash(&[7; 4096]));
        assert_ne!(one.hash(&[7; 4096]), one.hash(&[8; 4096]));
    }

    #[test]
    fn an_answer_of_another_length_is_refused() {
        let mut offers = Offers::default();
        offers.add(1u16, 0..9);
        assert!(offers.lacking(&[0]).unwrap_err().contains("9 blocks"));
        assert_eq!(Offers::<u16>::default().lacking(&[]), Ok(Vec::new()));
    }

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec((0u64..6, 1u64..9), 0..20).prop_map(|steps| {
            let mut at = 0;
            let range = |(gap, length)| {
                at += gap + length;
                at - length..at
            };
            steps.into_iter().map(range).collect()
        })
    }

    fn members(ranges: &[Range<u64>]) -> Vec<u64> {
        ranges.iter().cloned().flatten().collect()
    }

    proptest! {
        /// Whatever changes at one host while the other keeps something old or damaged: what is taken there and what is
        /// sent make exactly what was offered.
        #[test]
        fn what_is_taken_and_what_is_sent_are_all_of_it(
            runs in proptest::collection::vec((0u16..3, 0u64..40, 1u64..20), 0..12),
            now in proptest::collection::vec(0u8..4, 60),
            kept in proptest::collection::vec(0u8..4, 60),
        ) {
            let hasher = OfferHasher::of("an instant");
            let (mut offers, mut answer) = (Offers::default(), OfferAnswer::default());
            let mut there = BTreeMap::new();
            for (which, first, count) in &runs {
                offers.add(*which, *first..first + count);
                for block in *first..first + count {
                    let (here, old) = (now[block as usize], kept[block as usize]);
                    let same = hasher.hash(&[here]) == hasher.hash(&[old]);
                    if same {
                        there.insert((*which, block), old);
                    }
                    answer.push(!same);
                }
            }
            let all = offers.blocks();
            let lacking = offers.lacking(&answer.take()).unwrap();
            let sent: u64 = lacking.iter().map(|(_, blocks)| blocks.end - blocks.start).sum();
            prop_assert!(sent <= all);
            for (which, block) in lacking.into_iter().flat_map(|(which, blocks)| blocks.map(move |block| (which, block))) {
                prop_assert_ne!(now[block as usize], kept[block as usize], "nothing that is there is sent");
                there.insert((which, block), now[block as usize]);
            }
            for (which, first, count) in runs {
                for block in first..first + count {
                    prop_assert_eq!(there.get(&(which, block)), Some(&now[block as usize]));
                }
            }
        }

        #[test]
        fn without_leaves_what_is_in_none_of_the_others(one in ranges(), others in ranges()) {
            let left = without(&one, &others);
            let expected: Vec<u64> = members(&one).into_iter().filter(|at| !members(&others).contains(at)).collect();
            prop_assert_eq!(members(&left), expected);
            prop_assert!(left.iter().all(|range| !range.is_empty()));
        }
    }
}

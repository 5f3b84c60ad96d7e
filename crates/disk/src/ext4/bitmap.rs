//! Runs of clear bits in a bitmap, least significant bit first.

use std::ops::Range;

/// Calls `found` for every run of clear bits among the first `bits`, in order; `bitmap` has at least as many.
pub(super) fn clear_runs(bitmap: &[u8], bits: usize, mut found: impl FnMut(Range<usize>)) {
    let mut start = None;
    let mut bit = 0;
    while bit < bits {
        let byte = bitmap[bit / 8];
        // Whole bytes that continue what there is: most of a bitmap.
        let continues = if start.is_some() { 0 } else { 0xff };
        if bit.is_multiple_of(8) && byte == continues && bit + 8 <= bits {
            bit += 8;
            continue;
        }
        let is_clear = byte >> (bit % 8) & 1 == 0;
        match start {
            None if is_clear => start = Some(bit),
            Some(first) if !is_clear => {
                found(first..bit);
                start = None;
            }
            _ => {}
        }
        bit += 1;
    }
    if let Some(first) = start {
        found(first..bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_cover_exactly_the_clear_bits(bitmap in proptest::collection::vec(prop_oneof![Just(0), Just(0xff), any::<u8>()], 0..40), cut in 0usize..8) {
            let bits = (bitmap.len() * 8).saturating_sub(cut);
            let mut covered = vec![false; bits];
            let mut last = None;
            clear_runs(&bitmap, bits, |run| {
                assert!(run.start < run.end && last.is_none_or(|last| last < run.start));
                last = Some(run.end);
                covered[run].fill(true);
            });
            for (bit, is_covered) in covered.into_iter().enumerate() {
                prop_assert_eq!(is_covered, bitmap[bit / 8] >> (bit % 8) & 1 == 0);
            }
        }
    }
}

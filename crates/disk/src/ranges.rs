//! Sets of bytes as sorted, disjoint ranges.

use std::ops::Range;

/// Sorts, drops empty ranges, and joins what touches or overlaps.
pub(crate) fn normalise(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.retain(|range| range.start < range.end);
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What is in `from` but not in `holes`; both normalised.
pub(crate) fn subtract(from: Vec<Range<u64>>, holes: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut rest = Vec::with_capacity(from.len());
    let mut holes = holes.iter().peekable();
    for range in from {
        let mut start = range.start;
        while holes.next_if(|hole| hole.end <= start).is_some() {}
        // A hole may reach into the next range too, so it is only looked at.
        for hole in holes.clone().take_while(|hole| hole.start < range.end) {
            if hole.start > start {
                rest.push(start..hole.start);
            }
            start = start.max(hole.end);
        }
        if start < range.end {
            rest.push(start..range.end);
        }
    }
    rest
}

/// Whole blocks only; normalised ranges stay so.
pub(crate) fn aligned(ranges: Vec<Range<u64>>, block: u64) -> Vec<Range<u64>> {
    ranges
        .into_iter()
        .map(|range| range.start.div_ceil(block) * block..range.end / block * block)
        .filter(|range| range.start < range.end)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(ranges: &[Range<u64>]) -> Vec<bool> {
        (0..64).map(|byte| ranges.iter().any(|range| range.contains(&byte))).collect()
    }

    fn any_ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        proptest::collection::vec(
            (0u64..64, 0u64..12).prop_map(|(start, length)| start..(start + length).min(64)),
            0..8,
        )
    }

    proptest! {
        #[test]
        fn they_are_the_sets_they_stand_for(a in any_ranges(), b in any_ranges()) {
            let (first, second) = (normalise(a.clone()), normalise(b.clone()));
            prop_assert_eq!(set(&first), set(&a));
            prop_assert!(first.windows(2).all(|pair| pair[0].end < pair[1].start));
            let rest = subtract(first, &second);
            let expected: Vec<bool> = set(&a).into_iter().zip(set(&b)).map(|(a, b)| a && !b).collect();
            prop_assert_eq!(set(&rest), expected);
            prop_assert!(rest.windows(2).all(|pair| pair[0].end <= pair[1].start));
        }
    }

    #[test]
    fn alignment_only_shrinks() {
        assert_eq!(aligned(vec![1..4096, 4097..16385, 20000..20480], 4096), [8192..16384]);
        assert_eq!(aligned(vec![0..4096], 4096), [0..4096]);
    }
}

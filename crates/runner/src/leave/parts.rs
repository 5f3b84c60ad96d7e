//! What of a machine is sent, and in which portions.

use std::ops::Range;

use collective_store::BLOCK;
use collective_volume::Disk;

/// So many bytes are sent before they are acknowledged.
pub(super) const PART: u64 = 16 << 20;

/// Bytes of a disk, or of memory as it is or as it was gone on with.
pub(super) struct Part {
    pub which: u16,
    pub range: Range<u64>,
    pub from: Origin,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Origin {
    Disk,
    Base,
    Memory {
        /// Nothing was sent for these pages before, and zeros need not be either.
        first: bool,
    },
}

/// Ranges in which there may be something else than zeros.
pub(super) fn data(disk: &Disk) -> Vec<Range<u64>> {
    let align = |range: Range<u64>| range.start / BLOCK * BLOCK..range.end.next_multiple_of(BLOCK).min(disk.size());
    let first = disk.next_data(0);
    std::iter::successors(first, |last| disk.next_data(last.end)).map(align).collect()
}

/// Groups of parts: the first one has about `first` bytes, all others about [`PART`]. There is at least one.
pub(super) fn cut(parts: Vec<Part>, first: u64) -> Vec<Vec<Part>> {
    let mut groups = vec![Vec::new()];
    let mut room = first.max(BLOCK);
    for mut part in parts {
        loop {
            let bytes = part.range.end - part.range.start;
            let fits = bytes.min(room.next_multiple_of(BLOCK));
            let rest = part.range.start + fits..part.range.end;
            let Part { which, from, .. } = part;
            if let Some(group) = groups.last_mut() {
                group.push(Part { which, range: part.range.start..rest.start, from });
            }
            room = room.saturating_sub(fits);
            if room == 0 {
                groups.push(Vec::new());
                room = PART;
            }
            if rest.is_empty() {
                break;
            }
            part = Part { which, range: rest, from };
        }
    }
    if groups.len() > 1 && groups.last().is_some_and(Vec::is_empty) {
        groups.pop();
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::save::length;

    #[test]
    fn groups_have_everything_once_and_in_order() {
        let part = |range| Part { which: 0, range, from: Origin::Disk };
        let groups = cut(vec![part(0..PART * 2), part(PART * 3..PART * 3 + BLOCK)], 2 * BLOCK);
        assert_eq!(groups[0].iter().map(|part| part.range.end).collect::<Vec<_>>(), [2 * BLOCK]);
        let all: Vec<_> = groups.iter().flatten().map(|part| part.range.clone()).collect();
        assert_eq!(length(&all), 2 * PART + BLOCK);
        assert!(all.windows(2).all(|pair| pair[0].end <= pair[1].start));
        assert_eq!(cut(Vec::new(), 0).len(), 1, "an empty one is acknowledged as well");
    }
}

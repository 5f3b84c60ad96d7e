//! Which layers may become one, and which of these are worth it. No I/O.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

/// A layer that has more bytes than so many times all above it stays for itself: it would be copied for little. So what is
/// copied in all grows hardly faster than what is written.
const MUCH_LARGER: u64 = 4;
/// Above so many layers whatever may become one does, the least work first.
const MANY: usize = 160;

/// Layers as they lie on each other in a state that is kept, or is the present; oldest first.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a> {
    /// By number.
    pub layers: &'a [u64],
    /// There may be an image below, which zeros hide.
    pub over_image: bool,
}

/// Layers that may become one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Oldest first.
    pub layers: Vec<u64>,
    /// Whether its zeros hide something.
    pub keep_zeros: bool,
}

/// What is below a layer, or above it, in all chains that have it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Neighbour {
    Always(u64),
    Nobody,
    Differs,
}

#[derive(Default)]
struct Neighbours(BTreeMap<u64, Neighbour>);

impl Neighbours {
    fn note(&mut self, layer: u64, neighbour: Option<&u64>) {
        let here = neighbour.map_or(Neighbour::Nobody, |other| Neighbour::Always(*other));
        self.0
            .entry(layer)
            .and_modify(|known| *known = if *known == here { here } else { Neighbour::Differs })
            .or_insert(here);
    }

    fn of(&self, layer: u64) -> Neighbour {
        self.0.get(&layer).copied().unwrap_or(Neighbour::Nobody)
    }
}

/// All longest runs of two layers or more between which no chain begins, ends or turns off. Layers that are `alone` are
/// in none.
fn runs(chains: &[Chain], alone: &BTreeSet<u64>) -> Vec<Merge> {
    let (mut below, mut above) = (Neighbours::default(), Neighbours::default());
    for chain in chains {
        for (index, layer) in chain.layers.iter().enumerate() {
            below.note(*layer, index.checked_sub(1).and_then(|index| chain.layers.get(index)));
            above.note(*layer, chain.layers.get(index + 1));
        }
    }
    let joins = |lower: u64, upper: u64| {
        let are_one = above.of(lower) == Neighbour::Always(upper) && below.of(upper) == Neighbour::Always(lower);
        are_one && !alone.contains(&lower) && !alone.contains(&upper)
    };
    let over_image: BTreeSet<u64> =
        chains.iter().filter(|chain| chain.over_image).filter_map(|chain| chain.layers.first().copied()).collect();
    let mut found = Vec::new();
    for first in below.0.keys().copied() {
        if matches!(below.of(first), Neighbour::Always(lower) if joins(lower, first)) {
            continue;
        }
        let mut layers = vec![first];
        let mut last = first;
        while let Neighbour::Always(next) = above.of(last)
            && joins(last, next)
        {
            layers.push(next);
            last = next;
        }
        if layers.len() > 1 {
            let keep_zeros = below.of(first) != Neighbour::Nobody || over_image.contains(&first);
            found.push(Merge { layers, keep_zeros });
        }
    }
    found
}

/// Without the lowest layers, as long as they are much larger than all above them; none if nothing is left to merge.
fn worth(run: &Merge, bytes: &dyn Fn(u64) -> u64) -> Option<Merge> {
    let sizes: Vec<u64> = run.layers.iter().map(|layer| bytes(*layer)).collect();
    let is_fine = |from: &usize| sizes[*from] <= MUCH_LARGER.saturating_mul(sizes[from + 1..].iter().sum());
    let from = (0..run.layers.len() - 1).find(is_fine)?;
    Some(Merge { layers: run.layers[from..].to_vec(), keep_zeros: run.keep_zeros || from > 0 })
}

/// What to merge, that first by which most layers go. `bytes` is what a layer takes.
pub fn choose(chains: &[Chain], alone: &BTreeSet<u64>, bytes: &dyn Fn(u64) -> u64) -> Vec<Merge> {
    let mut runs = runs(chains, alone);
    let mut worth: Vec<Merge> = runs.iter().filter_map(|run| worth(run, bytes)).collect();
    worth.sort_by_key(|run| Reverse(run.layers.len()));
    if !worth.is_empty() || longest(chains) <= MANY {
        return worth;
    }
    runs.sort_by_key(|run| run.layers.iter().map(|layer| bytes(*layer)).sum::<u64>());
    runs
}

/// The layers of the longest chain.
pub fn longest(chains: &[Chain]) -> usize {
    chains.iter().map(|chain| chain.layers.len()).max().unwrap_or(0)
}

/// Where in a chain a run lies; the error: only a part of it is there, or it is in pieces.
pub fn find(chain: &[u64], run: &[u64]) -> Result<Option<usize>, ()> {
    match chain.windows(run.len().max(1)).position(|window| window == run) {
        Some(at) => Ok(Some(at)),
        None if chain.iter().any(|layer| run.contains(layer)) => Err(()),
        None => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(chains: &[&[u64]], over_image: bool, alone: &[u64]) -> Vec<(Vec<u64>, bool)> {
        let chains: Vec<Chain> = chains.iter().map(|layers| Chain { layers, over_image }).collect();
        let all = choose(&chains, &alone.iter().copied().collect(), &|_| 1);
        all.into_iter().map(|merge| (merge.layers, merge.keep_zeros)).collect()
    }

    #[test]
    fn between_what_is_kept() {
        assert_eq!(chosen(&[&[1, 2, 3]], false, &[3]), [(vec![1, 2], false)]);
        assert_eq!(chosen(&[&[1, 2, 3]], true, &[3]), [(vec![1, 2], true)], "zeros hide the image");
        assert_eq!(chosen(&[&[1, 2, 3, 4, 5], &[1, 2]], false, &[5]), [(vec![1, 2], false), (vec![3, 4], true)]);
        assert_eq!(chosen(&[&[1, 2, 3], &[1, 2], &[1]], false, &[3]), [], "each is the end of something");
        assert_eq!(chosen(&[&[1, 2, 3], &[1, 2, 4]], false, &[3, 4]), [(vec![1, 2], false)], "a branch");
        assert_eq!(chosen(&[&[1, 2, 3], &[2, 3]], false, &[]), [(vec![2, 3], true)], "below the one is something");
        assert_eq!(chosen(&[&[1, 2, 3, 4]], false, &[2]), [(vec![3, 4], true)]);
        assert_eq!(chosen(&[&[1], &[], &[7]], false, &[]), []);
    }

    #[test]
    fn a_large_layer_is_not_copied_for_little() {
        let sizes = [0, 2000, 300, 20, 20, 1];
        let layers = [1, 2, 3, 4, 5];
        let chain = [Chain { layers: &layers, over_image: false }];
        let choose = |sizes: &[u64]| choose(&chain, &BTreeSet::new(), &|layer| sizes[layer as usize]);
        assert_eq!(choose(&sizes), [Merge { layers: vec![3, 4, 5], keep_zeros: true }]);
        assert_eq!(choose(&[0, 2000, 300, 20, 4, 0]), [], "each is much larger than all above it");
        assert_eq!(choose(&[0, 1000, 300, 50, 4, 0])[0].layers, [1, 2, 3, 4, 5], "not any more");
    }

    #[test]
    fn when_there_are_too_many_the_least_work_comes_first() {
        // Pairs of a large and a small layer, with a state that ends after each.
        let layers: Vec<u64> = (0..2 * MANY as u64).collect();
        let mut chains: Vec<Chain> =
            (1..=MANY).map(|pairs| Chain { layers: &layers[..2 * pairs], over_image: false }).collect();
        let bytes = |layer: u64| if layer.is_multiple_of(2) { 1000 - layer } else { 1 };
        let first = choose(&chains, &BTreeSet::new(), &bytes).remove(0);
        assert_eq!(first.layers, [2 * MANY as u64 - 2, 2 * MANY as u64 - 1]);
        chains.truncate(MANY / 2);
        assert_eq!(choose(&chains, &BTreeSet::new(), &bytes), [], "there is room");
    }

    #[test]
    fn what_was_merged_is_found_whole_or_not_at_all() {
        assert_eq!(find(&[1, 2, 3, 4], &[2, 3]), Ok(Some(1)));
        assert_eq!(find(&[1, 4], &[2, 3]), Ok(None));
        assert_eq!(find(&[1, 2], &[2, 3]), Err(()));
        assert_eq!(find(&[2, 9, 3], &[2, 3]), Err(()));
    }
}

//! The layers of a record, as they lie on each other: what may become one layer, and what that changes.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::{DiskRecord, Record};
use crate::merging::plan::{self, Chain};

/// Layers that are being merged. None of them changes, and nothing names the new one until it is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeJournal {
    /// The layer that they become, which also names the order to the runner.
    pub number: u64,
    /// Oldest first.
    pub layers: Vec<u64>,
    /// Whether zeros hide what is below them.
    pub keep_zeros: bool,
    /// The runner of the machine does it, which then goes on with the new one.
    pub live: bool,
}

fn chain_of(disk: &DiskRecord) -> Chain<'_> {
    Chain { layers: &disk.layers, over_image: disk.image.is_some() }
}

/// Zeros in a layer of memory cost nothing, and what is below may be an image.
fn chain_of_memory(layers: &[u64]) -> Chain<'_> {
    Chain { layers, over_image: true }
}

impl Record {
    /// Everything that something keeps, and the present.
    pub fn chains(&self) -> Vec<Chain<'_>> {
        let disks = self.disks.iter().chain(self.kept_disks()).map(chain_of);
        let machines = self.machines().map(|machine| chain_of_memory(&machine.memory));
        // A save that fails begins again with what the machine went on with.
        let base = self.base.and_then(|base| self.memory.iter().position(|layer| *layer == base));
        let base = base.map(|last| chain_of_memory(&self.memory[..=last]));
        disks.chain(machines).chain([chain_of_memory(&self.memory)]).chain(base).collect()
    }

    /// Layers that stay for themselves: those that take writes, and those that may not be there yet.
    pub fn unmergeable(&self) -> BTreeSet<u64> {
        let tops = self.disks.iter().filter_map(|disk| disk.layers.last());
        let saved = self.save.iter().map(|save| &save.number);
        tops.chain(&self.fresh).chain(saved).copied().collect()
    }

    /// Whether the machine that runs has one of these.
    pub fn are_in_use(&self, layers: &[u64]) -> bool {
        self.disks.iter().flat_map(|disk| &disk.layers).chain(&self.memory).any(|used| layers.contains(used))
    }

    /// Names `number` wherever all of `layers` are named; false, and nothing is changed, where only some of them are.
    pub fn put_merged(&mut self, layers: &[u64], number: u64) -> bool {
        if self.chains().iter().any(|chain| plan::find(chain.layers, layers).is_err()) {
            return false;
        }
        let put = |chain: &mut Vec<u64>| {
            if let Ok(Some(at)) = plan::find(chain, layers) {
                chain.splice(at..at + layers.len(), [number]);
            }
        };
        let checkpoints = self.checkpoints.iter_mut().map(|kept| (&mut kept.disks, kept.machine.as_mut()));
        let suspended = self.suspended.iter_mut().map(|kept| (&mut kept.disks, Some(&mut kept.machine)));
        for (disks, machine) in checkpoints.chain(suspended) {
            disks.iter_mut().for_each(|disk| put(&mut disk.layers));
            machine.into_iter().for_each(|machine| put(&mut machine.memory));
        }
        let saved = self.save.iter_mut().flat_map(|save| &mut save.disks);
        // What is in the store is the same as before.
        let stored = self.stored.iter_mut().flat_map(|stored| &mut stored.disks);
        self.disks.iter_mut().chain(saved).chain(stored).for_each(|disk| put(&mut disk.layers));
        put(&mut self.memory);
        if self.base.is_some_and(|base| layers.last() == Some(&base)) {
            self.base = Some(number);
        }
        true
    }
}

#[cfg(test)]
mod tests;

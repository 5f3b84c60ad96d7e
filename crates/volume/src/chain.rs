//! The layers of an open disk, and which of them holds each block.
//!
//! A block names its layer by a *slot*, a number that the layer has for as long as it is in the disk. So layers in the
//! middle can be replaced while the disk is read and written: first the slots of the old ones all lead to the new one,
//! then the blocks are renamed to one of these slots one by one, then the others are free. Whichever of them a reader
//! meets, it leads to the block's content. A slot is given to another layer only when nobody can have it in hand any
//! more: it is looked up under the same lock under which it was read.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use collective_store::BLOCK;

use crate::disk::MAX_LAYERS;
use crate::held;
use crate::layer::Layer;

/// Nothing has slot 0: what no layer holds is the image's.
const IMAGE: u8 = 0;

/// Layers, and who has which block.
pub(crate) struct Chain {
    owner: Vec<AtomicU8>,
    /// The slot of the last layer.
    top: AtomicU8,
    /// Blocks with an owner other than the image.
    own: AtomicU64,
    table: RwLock<Table>,
}

struct Table {
    /// Oldest first.
    order: Vec<Link>,
    /// By slot.
    layers: Vec<Option<Arc<Layer>>>,
}

#[derive(Clone, Copy)]
struct Link {
    slot: u8,
    /// Since the disk was opened.
    took_writes: bool,
}

impl Table {
    fn layer(&self, slot: u8) -> Option<&Arc<Layer>> {
        self.layers[usize::from(slot)].as_ref()
    }

    fn in_order(&self) -> impl Iterator<Item = &Arc<Layer>> {
        self.order.iter().filter_map(|link| self.layer(link.slot))
    }
}

impl Chain {
    /// For a disk of so many blocks; at most [`MAX_LAYERS`] layers, oldest first. The last one takes writes.
    pub fn new(blocks: u64, layers: Vec<Layer>) -> Self {
        let owner: Vec<AtomicU8> = (0..blocks).map(|_| AtomicU8::new(IMAGE)).collect();
        let mut own = 0;
        let mut table = Table { order: Vec::new(), layers: vec![None; MAX_LAYERS + 1] };
        let count = layers.len();
        for (index, layer) in layers.into_iter().enumerate() {
            let slot = index as u8 + 1;
            for block in layer.held() {
                let Some(place) = owner.get(block as usize) else { continue };
                own += u64::from(place.swap(slot, Ordering::Relaxed) == IMAGE);
            }
            table.order.push(Link { slot, took_writes: usize::from(slot) == count });
            table.layers[usize::from(slot)] = Some(Arc::new(layer));
        }
        let top = AtomicU8::new(count as u8);
        Self { owner, top, own: AtomicU64::new(own), table: RwLock::new(table) }
    }

    fn table(&self) -> RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn table_mut(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn top(&self) -> u8 {
        self.top.load(Ordering::Acquire)
    }

    fn owner(&self, block: u64) -> u8 {
        self.owner[block as usize].load(Ordering::Acquire)
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.owner.len() as u64
    }

    /// Bytes in blocks that layers hold.
    pub fn own_bytes(&self) -> u64 {
        self.own.load(Ordering::Relaxed) * BLOCK
    }

    pub fn len(&self) -> usize {
        self.table().order.len()
    }

    /// Who holds `block`, none for the image, and for how many of the next `most` blocks that is so.
    pub fn run_at(&self, block: u64, most: u64) -> (Option<Arc<Layer>>, u64) {
        let table = self.table();
        let owner = self.owner(block);
        let alike = (1..most).find(|i| self.owner(block + i) != owner).unwrap_or(most);
        (table.layer(owner).cloned(), alike)
    }

    /// Whether it was noted, when the layers were opened, what the one held that took the writes: the newest that holds
    /// anything, or an empty one above it.
    pub fn is_known(&self) -> bool {
        let layers: Vec<Arc<Layer>> = self.table().in_order().cloned().collect();
        if layers.iter().any(|layer| layer.is_void()) {
            return false;
        }
        let mut newest = layers.iter().rev();
        newest.find(|layer| layer.was_noted() || !layer.held().is_empty()).is_some_and(|layer| layer.was_noted())
    }

    /// Forgets that it is not known what layers held: what they show now is what they are.
    pub fn forget_void(&self) {
        let top = self.top_layer();
        let is_top = |layer: &Arc<Layer>| top.as_ref().is_some_and(|top| Arc::ptr_eq(top, layer));
        let table = self.table();
        let void = table.in_order().filter(|layer| layer.is_void() && !is_top(layer));
        void.for_each(|layer| held::forget(layer.path()));
    }

    /// The layer that takes the writes.
    pub fn top_layer(&self) -> Option<Arc<Layer>> {
        self.table().layer(self.top()).cloned()
    }

    pub fn is_in_top(&self, block: u64) -> bool {
        self.owner(block) == self.top()
    }

    /// The top layer holds these blocks from now on.
    pub fn take(&self, blocks: Range<u64>) {
        for block in blocks {
            let before = self.owner[block as usize].swap(self.top(), Ordering::AcqRel);
            self.own.fetch_add(u64::from(before == IMAGE), Ordering::Relaxed);
        }
    }

    /// Adds a layer, which takes the writes from now on; false if there is no room for it.
    pub fn push(&self, next: Layer) -> bool {
        let mut table = self.table_mut();
        let free = (1..=MAX_LAYERS).find(|slot| table.layers[*slot].is_none());
        let Some(slot) = free.and_then(|slot| u8::try_from(slot).ok()) else { return false };
        table.layers[usize::from(slot)] = Some(Arc::new(next));
        table.order.push(Link { slot, took_writes: true });
        self.top.store(slot, Ordering::Release);
        true
    }

    /// Adds a layer below all others, which holds what the image has in these blocks; false if there is no room for it.
    pub fn push_below(&self, layer: Layer) -> bool {
        let held = layer.held();
        let slot = {
            let mut table = self.table_mut();
            let free = (1..=MAX_LAYERS).find(|slot| table.layers[*slot].is_none());
            let Some(slot) = free.and_then(|slot| u8::try_from(slot).ok()) else { return false };
            table.layers[usize::from(slot)] = Some(Arc::new(layer));
            table.order.insert(0, Link { slot, took_writes: false });
            slot
        };
        for block in held {
            let Some(owner) = self.owner.get(block as usize) else { continue };
            // Unless a layer above holds it.
            let now = owner.compare_exchange(IMAGE, slot, Ordering::AcqRel, Ordering::Relaxed);
            self.own.fetch_add(u64::from(now.is_ok()), Ordering::Relaxed);
        }
        true
    }

    /// The layers at these paths, if they are next to each other in this order.
    pub fn find(&self, paths: &[PathBuf]) -> Option<Vec<Arc<Layer>>> {
        let all: Vec<Arc<Layer>> = self.table().in_order().cloned().collect();
        let is_at = |(layer, path): (&Arc<Layer>, &PathBuf)| layer.path() == path;
        let found = all.windows(paths.len().max(1)).find(|window| window.iter().zip(paths).all(is_at));
        found.filter(|_| !paths.is_empty()).map(<[_]>::to_vec)
    }

    /// Whether one of them takes writes.
    pub fn has_top(&self, layers: &[Arc<Layer>]) -> bool {
        self.top_layer().is_some_and(|top| layers.iter().any(|layer| Arc::ptr_eq(layer, &top)))
    }

    /// Whether there are layers below this one.
    pub fn is_lowest(&self, layer: &Arc<Layer>) -> bool {
        self.table().in_order().next().is_some_and(|lowest| Arc::ptr_eq(lowest, layer))
    }

    /// Puts `merged` in place of layers that are next to each other, none of which takes writes; false if they are not
    /// there.
    pub fn replace(&self, layers: &[Arc<Layer>], merged: Layer) -> bool {
        let Some((left, stays)) = self.lead_to(layers, Arc::new(merged)) else { return false };
        let mut is_left = [false; MAX_LAYERS + 1];
        left.iter().for_each(|slot| is_left[usize::from(*slot)] = true);
        for owner in &self.owner {
            let now = owner.load(Ordering::Relaxed);
            if is_left[usize::from(now)] {
                // Unless it was written to meanwhile: then it is the top's.
                let _ = owner.compare_exchange(now, stays, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
        let mut table = self.table_mut();
        left.iter().for_each(|slot| table.layers[usize::from(*slot)] = None);
        true
    }

    /// Lets all slots of these layers lead to `merged`; gives those that are to be left, and the one that stays.
    fn lead_to(&self, layers: &[Arc<Layer>], merged: Arc<Layer>) -> Option<(Vec<u8>, u8)> {
        let mut table = self.table_mut();
        let first = table.in_order().position(|layer| layers.first().is_some_and(|first| Arc::ptr_eq(layer, first)))?;
        let range = first..first + layers.len();
        let there = table.in_order().skip(first).zip(layers).filter(|(one, other)| Arc::ptr_eq(one, other)).count();
        if there != layers.len() {
            return None;
        }
        let slots: Vec<u8> = table.order[range.clone()].iter().map(|link| link.slot).collect();
        let (stays, left) = slots.split_last()?;
        slots.iter().for_each(|slot| table.layers[usize::from(*slot)] = Some(merged.clone()));
        // It is durable.
        table.order.splice(range, [Link { slot: *stays, took_writes: false }]);
        Some((left.to_vec(), *stays))
    }

    /// Makes durable what the layers took.
    pub fn flush(&self) -> std::io::Result<()> {
        let table = self.table();
        let written = table.order.iter().filter(|link| link.took_writes);
        let layers: Vec<Arc<Layer>> = written.filter_map(|link| table.layer(link.slot).cloned()).collect();
        drop(table);
        let top = self.top_layer();
        layers.iter().try_for_each(|layer| {
            layer.flush()?;
            if top.as_ref().is_some_and(|top| !Arc::ptr_eq(top, layer)) {
                layer.forget_held();
            }
            Ok(())
        })
    }
}

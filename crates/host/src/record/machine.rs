//! What a record keeps of machines: suspended, kept, being saved.

use collective_model::run::RunImage;
use collective_model::{BackupId, Checkpoint, CheckpointId, CheckpointMachine, Digest, OperationId, Timestamp};
use serde::{Deserialize, Serialize};

use super::{CheckpointRecord, DiskRecord, Record};

/// A machine that stands still, and its disks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SuspendedRecord {
    /// Memory and devices.
    pub machine: MachineRecord,
    /// The disks as they were; all layers in it are frozen.
    pub disks: Vec<DiskRecord>,
}

/// Memory and devices of one instant.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineRecord {
    /// What is below the layers of its memory: one that came with its version.
    #[serde(default)]
    pub image: Option<RunImage>,
    /// Layers of its memory, oldest first. The file with the rest has the number of the last one.
    pub memory: Vec<u64>,
    /// That file's digest.
    pub digest: Digest,
    /// Names the instant, for ever.
    pub epoch: String,
    /// MiB of memory.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// What users see of it.
    pub info: CheckpointMachine,
}

/// What was put into the store, and as what.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredRecord {
    backup: BackupId,
    pub(super) disks: Vec<DiskRecord>,
    epoch: Option<String>,
}

/// An order to save the machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SaveJournal {
    /// The order it is part of; none: the clock wants it.
    pub operation: Option<OperationId>,
    /// Names the instant, for ever.
    pub epoch: String,
    /// The layer of memory, which also names the order to the runner.
    pub number: u64,
    /// Why, in the timeline; none: it ends the machine.
    pub why: Option<String>,
    /// The disks as they are at that instant; the present ones have a new layer each.
    pub disks: Vec<DiskRecord>,
}

impl Record {
    /// Where in the store what the instance is now lies. Whatever else was done to its disks or its memory since, it does not.
    pub fn in_store(&self) -> Option<&BackupId> {
        if self.arrived != self.spec.arrival {
            return self.spec.arrival.as_ref();
        }
        let same = |stored: &&StoredRecord| stored.disks == self.disks && stored.epoch.as_ref() == self.epoch();
        self.stored.as_ref().filter(same).map(|stored| &stored.backup)
    }

    /// What it is now is in the store.
    pub fn note_stored(&mut self, backup: BackupId) {
        self.stored = Some(StoredRecord { backup, disks: self.disks.clone(), epoch: self.epoch().cloned() });
    }

    fn epoch(&self) -> Option<&String> {
        self.suspended.as_ref().map(|suspended| &suspended.machine.epoch)
    }

    /// A layer over a memory that came with a version; its runner creates it.
    pub fn layer_for_memory(&mut self) -> u64 {
        self.new_layer()
    }

    /// What is saved next does not come over what was saved before.
    pub fn forget_memory(&mut self) {
        self.memory.clear();
        (self.base, self.memory_image) = (None, None);
    }

    /// A new layer on each disk; they are created by whoever is told of them.
    pub fn push_layers(&mut self) -> Vec<u64> {
        let first = self.next_layer;
        self.next_layer += self.disks.len() as u64;
        let new: Vec<u64> = (first..self.next_layer).collect();
        self.disks.iter_mut().zip(&new).for_each(|(disk, layer)| disk.layers.push(*layer));
        new
    }

    /// Takes layers away that nobody created.
    pub fn drop_layers(&mut self, is_there: &dyn Fn(u64) -> bool, among: &[u64]) {
        for disk in &mut self.disks {
            disk.layers.retain(|layer| !among.contains(layer) || is_there(*layer));
        }
    }

    /// The disks of the saved machine, each under a new layer.
    pub fn prepare_resume(&mut self) {
        let Some(suspended) = &self.suspended else { return };
        self.disks = suspended.disks.clone();
        for index in 0..self.disks.len() {
            let layer = self.new_layer();
            self.disks[index].layers.push(layer);
        }
    }

    /// Keeps a machine that was saved, because somebody or (`scheduled`) the clock wanted it, with the disks of that instant.
    pub fn keep_machine(
        &mut self,
        why: String,
        scheduled: bool,
        disks: Vec<DiskRecord>,
        machine: MachineRecord,
        own_bytes: u64,
    ) -> CheckpointId {
        let id = CheckpointId(self.next_checkpoint);
        self.next_checkpoint += 1;
        let info = Checkpoint {
            id,
            taken: Timestamp::now(),
            why,
            version: self.version,
            version_name: self.version_name(),
            own_bytes,
            machine: Some(machine.info.clone()),
            scheduled,
        };
        self.keep(CheckpointRecord { info, before_update: false, disks, machine: Some(machine) });
        id
    }
}

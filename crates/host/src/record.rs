//! What a host keeps of an instance: one file, replaced whole, so that every step of an update is all or nothing.
//!
//! Disks are chains of layers. A checkpoint is a copy of the chains: from then on these layers are frozen, and each
//! disk goes on with a new one. Going back is putting an old chain, with a new layer on top, in place of the present.

mod chains;
mod machine;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use collective_model::run::{Arriving, RunImage};
use collective_model::{
    BackupId, Checkpoint, CheckpointId, Digest, Disk, DiskRole, Manifest, Name, OperationId, OperationState, Spec,
    State, SystemWrites, Timestamp, VersionName,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use chains::MergeJournal;
pub use machine::{MachineRecord, SaveJournal, StoredRecord, SuspendedRecord};

/// Finished operations that are remembered, so that a repeated order is answered and not carried out again.
const REMEMBERED: usize = 32;
/// Checkpoints that are kept, beside those that the clock took, which are thinned by their age.
const KEPT_CHECKPOINTS: usize = 32;

/// Everything about an instance on this host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The last orders.
    pub spec: Spec,
    /// Where it is in its life.
    pub state: State,
    /// The version it has.
    pub version: Digest,
    /// That version's name, once known.
    pub version_name: Option<VersionName>,
    /// The present disks; empty before the first start.
    pub disks: Vec<DiskRecord>,
    /// Earlier states, oldest first.
    pub checkpoints: Vec<CheckpointRecord>,
    /// An update whose outcome is open.
    pub update: Option<UpdateJournal>,
    /// The machine that was saved, while the instance is suspended or about to go on.
    #[serde(default)]
    pub suspended: Option<SuspendedRecord>,
    /// What of it was put into the store last; none while it runs. See [`Record::in_store`].
    #[serde(default)]
    pub stored: Option<StoredRecord>,
    /// What of [`Spec::arrival`] was brought here.
    #[serde(default)]
    pub arrived: Option<BackupId>,
    /// Layers that are still in the store.
    #[serde(default)]
    pub arriving: Option<Arriving>,
    /// Layers of memory over which the present machine is saved next.
    #[serde(default)]
    pub memory: Vec<u64>,
    /// The last one of these with which the present machine went on; none: it was booted.
    #[serde(default)]
    pub base: Option<u64>,
    /// An order to bring the running machine elsewhere, whose outcome is open: another host may have it.
    #[serde(default)]
    pub leaving: Option<OperationId>,
    /// The machine comes here while it runs elsewhere, and is not ours before the plane says so.
    #[serde(default)]
    pub visiting: Option<Visiting>,
    /// For how long it stood still when it came, in microseconds.
    #[serde(default)]
    pub moved_pause_us: Option<u64>,
    /// What is below all of them.
    #[serde(default)]
    pub memory_image: Option<RunImage>,
    /// An order to save the machine whose outcome is open.
    #[serde(default)]
    pub save: Option<SaveJournal>,
    /// Layers that are being merged.
    #[serde(default)]
    pub merge: Option<MergeJournal>,
    /// Finished operations.
    pub done: Vec<(OperationId, OperationState)>,
    /// Layers that no run has created yet; any other that is missing is damage.
    pub fresh: BTreeSet<u64>,
    /// Numbers used up.
    pub next_layer: u64,
    /// Numbers used up.
    pub next_checkpoint: u64,
    /// Numbers used up.
    pub next_event: u64,
    /// Distinguishes the instance's user on this host.
    pub user_index: u32,
    /// The highest order to start or stop that was carried out.
    pub power_serial: u64,
    /// The runner, to recognise a dead one.
    pub runner_pid: Option<u32>,
    /// QEMU, to make sure that it is gone.
    pub qemu_pid: Option<u32>,
    /// Why it last failed.
    pub last_error: Option<String>,
    /// How it last stopped.
    pub last_stop: Option<String>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name.
    pub name: Name,
    /// Its role.
    pub role: DiskRole,
    /// How long its own writes last.
    pub writes: SystemWrites,
    /// In bytes.
    pub size: u64,
    /// Its base.
    pub image: Option<RunImage>,
    /// Layers over it, oldest first.
    pub layers: Vec<u64>,
}

/// A kept state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// What users see of it.
    pub info: Checkpoint,
    /// Whether `rollback` goes here.
    pub before_update: bool,
    /// The disks as they were; all layers in it are frozen.
    pub disks: Vec<DiskRecord>,
    /// The machine that ran on them at that instant.
    #[serde(default)]
    pub machine: Option<MachineRecord>,
}

/// A machine that comes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Visiting {
    /// The order.
    pub operation: OperationId,
    /// All of it is here and durable: the machine that is suspended here is the one that came.
    pub whole: Option<Value>,
}

/// An update between its point of no return and its outcome.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct UpdateJournal {
    /// The order.
    pub operation: OperationId,
    /// The state to come back to.
    pub before: CheckpointId,
    /// Bytes fetched for it.
    pub bytes_fetched: u64,
    /// When the ports were closed.
    pub closed: Timestamp,
}

impl DiskRecord {
    /// Whether its own writes go at every start.
    fn is_forgetful(&self) -> bool {
        self.role == DiskRole::Scratch || (self.role == DiskRole::System && self.writes == SystemWrites::Discard)
    }
}

impl Record {
    /// A new instance.
    pub fn new(spec: Spec, user_index: u32) -> Self {
        Self {
            version: spec.version,
            spec,
            state: State::Stopped,
            version_name: None,
            disks: Vec::new(),
            checkpoints: Vec::new(),
            update: None,
            suspended: None,
            stored: None,
            arrived: None,
            arriving: None,
            memory: Vec::new(),
            base: None,
            leaving: None,
            visiting: None,
            moved_pause_us: None,
            memory_image: None,
            save: None,
            merge: None,
            done: Vec::new(),
            fresh: BTreeSet::new(),
            next_layer: 1,
            next_checkpoint: 1,
            next_event: 1,
            user_index,
            power_serial: 0,
            runner_pid: None,
            qemu_pid: None,
            last_error: None,
            last_stop: None,
        }
    }

    /// The number of a layer that somebody else creates.
    pub fn reserve_layer(&mut self) -> u64 {
        let layer = self.next_layer;
        self.next_layer += 1;
        layer
    }

    /// Puts restored data in place of the present of a data disk: one layer over zeros.
    pub fn put_data(&mut self, name: &Name, size: u64, layer: u64) {
        for disk in self.disks.iter_mut().filter(|disk| disk.name == *name && disk.role == DiskRole::Data) {
            disk.size = size;
            disk.image = None;
            disk.layers = vec![layer];
        }
    }

    pub(super) fn new_layer(&mut self) -> u64 {
        let layer = self.next_layer;
        self.next_layer += 1;
        self.fresh.insert(layer);
        layer
    }

    /// Disks that are kept as they are.
    fn kept_disks(&self) -> impl Iterator<Item = &DiskRecord> {
        let suspended = self.suspended.iter().flat_map(|suspended| &suspended.disks);
        let saving = self.save.iter().flat_map(|save| &save.disks);
        self.checkpoints.iter().flat_map(|checkpoint| &checkpoint.disks).chain(suspended).chain(saving)
    }

    /// Whether something keeps this layer as it is.
    fn is_frozen(&self, layer: u64) -> bool {
        self.kept_disks().any(|disk| disk.layers.contains(&layer))
    }

    /// Disks for a version: its system disks anew, data disks as they are or created, in the version's order.
    pub fn adopt_version(&mut self, manifest: &Manifest, version: Digest) {
        let old = std::mem::take(&mut self.disks);
        for disk in &manifest.disks {
            let kept = old.iter().find(|old| old.name == disk.name && old.role == DiskRole::Data);
            let record = match kept {
                Some(kept) if disk.role == DiskRole::Data => kept.clone(),
                _ => self.disk_from(disk, manifest, version),
            };
            self.disks.push(record);
        }
        // A data disk that the new version does not know is the user's all the same.
        let dropped = old.into_iter().filter(|old| old.role == DiskRole::Data);
        let unknown: Vec<_> = dropped.filter(|old| manifest.disks.iter().all(|disk| disk.name != old.name)).collect();
        self.disks.extend(unknown);
        self.version = version;
        self.version_name = Some(manifest.version.clone());
    }

    fn disk_from(&self, disk: &Disk, manifest: &Manifest, version: Digest) -> DiskRecord {
        let appliance = manifest.appliance.clone();
        DiskRecord {
            name: disk.name.clone(),
            role: disk.role,
            writes: disk.writes,
            size: disk.size.0,
            image: disk.image.map(|root| RunImage { root, appliance, version, boot: disk.boot }),
            layers: Vec::new(),
        }
    }

    /// Disks that forget begin as the version says, also where its running machine had them in its own way.
    pub fn forget_warm(&mut self, manifest: &Manifest) {
        let version = self.version;
        for disk in manifest.disks.iter() {
            let fresh = self.disk_from(disk, manifest, version);
            let own = self.disks.iter_mut().find(|own| own.name == disk.name && own.is_forgetful());
            if let Some(own) = own {
                own.image = fresh.image;
            }
        }
    }

    /// Gives every disk a top layer that nothing else holds, forgets what is not to be kept, and grows what was
    /// enlarged.
    /// A layer that `is_shared` with another instance stays as it is too.
    pub fn prepare_start(&mut self, is_shared: &dyn Fn(u64) -> bool) {
        for index in 0..self.disks.len() {
            let disk = &mut self.disks[index];
            if disk.is_forgetful() {
                disk.layers.clear();
            }
            if let Some(size) = self.spec.disk_sizes.get(&disk.name) {
                disk.size = disk.size.max(size.0);
            }
            let top = disk.layers.last().copied();
            if top.is_none_or(|top| self.is_frozen(top) || is_shared(top)) {
                let layer = self.new_layer();
                self.disks[index].layers.push(layer);
            }
        }
    }

    /// The version's name, or the first digits of its digest before the name is known.
    pub fn version_name(&self) -> VersionName {
        // Twelve hexadecimal digits are always a version name.
        let digits = || self.version.short().parse().unwrap_or_else(|_| unreachable!("a digest's digits are a name"));
        self.version_name.clone().unwrap_or_else(digits)
    }

    /// Freezes the present under a name. `own_bytes` tells what a layer takes.
    pub fn checkpoint(&mut self, why: String, before_update: bool, own_bytes: &dyn Fn(u64) -> u64) -> CheckpointId {
        let id = CheckpointId(self.next_checkpoint);
        self.next_checkpoint += 1;
        let layers = self.disks.iter().flat_map(|disk| &disk.layers);
        let info = Checkpoint {
            id,
            taken: Timestamp::now(),
            why,
            version: self.version,
            version_name: self.version_name(),
            own_bytes: layers.map(|layer| own_bytes(*layer)).sum(),
            machine: None,
            scheduled: false,
        };
        self.keep(CheckpointRecord { info, before_update, disks: self.disks.clone(), machine: None });
        id
    }

    /// Adds a checkpoint; the oldest go, if there are too many.
    pub(super) fn keep(&mut self, checkpoint: CheckpointRecord) {
        self.checkpoints.push(checkpoint);
        let journaled = self.update.as_ref().map(|update| update.before);
        while self.checkpoints.iter().filter(|kept| !kept.info.scheduled).count() > KEPT_CHECKPOINTS {
            let goes = |old: &CheckpointRecord| !old.info.scheduled && Some(old.info.id) != journaled;
            let Some(oldest) = self.checkpoints.iter().position(goes) else { break };
            self.checkpoints.remove(oldest);
        }
    }

    /// The checkpoint that `rollback` goes to: the newest taken before an update away from it. Where only the system
    /// went back, its data can still follow.
    pub fn rollback_target(&self, with_data: bool) -> Option<&CheckpointRecord> {
        let useful = |checkpoint: &&CheckpointRecord| {
            checkpoint.before_update && (with_data || checkpoint.info.version != self.version)
        };
        self.checkpoints.iter().rev().find(useful)
    }

    /// Puts a checkpoint's disks in place of the present: all of them, or all but the data disks.
    pub fn restore(&mut self, checkpoint: &CheckpointRecord, with_data: bool) {
        let present = std::mem::replace(&mut self.disks, checkpoint.disks.clone());
        if !with_data {
            for disk in &mut self.disks {
                let now = present.iter().find(|now| now.name == disk.name && now.role == DiskRole::Data);
                if let (DiskRole::Data, Some(now)) = (disk.role, now) {
                    *disk = now.clone();
                }
            }
        }
        let names: Vec<Name> = self.disks.iter().map(|disk| disk.name.clone()).collect();
        self.disks.extend(present.into_iter().filter(|d| d.role == DiskRole::Data && !names.contains(&d.name)));
        self.version = checkpoint.info.version;
        self.version_name = Some(checkpoint.info.version_name.clone());
    }

    /// All layers that something holds.
    pub fn held_layers(&self) -> BTreeSet<u64> {
        let disks = self.disks.iter().chain(self.kept_disks()).flat_map(|disk| &disk.layers);
        let memory = self.machines().flat_map(|machine| &machine.memory).chain(&self.memory);
        let begun = self.save.iter().map(|save| save.number).chain(self.merge.iter().map(|merge| merge.number));
        disks.chain(memory).copied().chain(begun).collect()
    }

    /// Machines that stand still.
    pub fn machines(&self) -> impl Iterator<Item = &MachineRecord> {
        let kept = self.checkpoints.iter().filter_map(|checkpoint| checkpoint.machine.as_ref());
        kept.chain(self.suspended.as_ref().map(|suspended| &suspended.machine))
    }

    /// The outcome of an operation that was carried out before.
    pub fn outcome(&self, id: &OperationId) -> Option<&OperationState> {
        self.done.iter().find(|(done, _)| done == id).map(|(_, state)| state)
    }

    /// Remembers an outcome.
    pub fn remember(&mut self, id: OperationId, state: OperationState) {
        self.done.retain(|(done, _)| *done != id);
        self.done.push((id, state));
        let excess = self.done.len().saturating_sub(REMEMBERED);
        self.done.drain(..excess);
    }
}

/// Where the rest of a machine is whose memory ends with this layer.
pub fn state_path(folder: &Path, layer: u64) -> PathBuf {
    folder.join("layers").join(format!("{layer}.state"))
}

/// Where the picture of the screen of that machine is.
pub fn screen_path(folder: &Path, layer: u64) -> PathBuf {
    folder.join("layers").join(format!("{layer}.png"))
}

/// Where a layer is.
pub fn layer_path(folder: &Path, layer: u64) -> PathBuf {
    folder.join("layers").join(layer.to_string())
}

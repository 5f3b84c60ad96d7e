//! Whatever is kept, forgotten, gone back to and merged: every state that is kept reads as it was, from real layers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use collective_model::run::Platform;
use collective_model::{CheckpointId, CheckpointMachine};
use collective_volume::Layer;
use proptest::prelude::*;

use super::*;
use crate::merging::plan::choose;
use crate::record::{CheckpointRecord, MachineRecord, SuspendedRecord, layer_path};

/// Of each disk and of the memory.
const BLOCKS: u64 = 24;
const SIZE: u64 = 1 << 20;
/// What each block of an image has, and of what is below a memory.
const IMAGE: u8 = 99;

#[derive(Clone, Debug)]
enum Step {
    /// Disk or memory, first block, how many; 0 is a discard.
    Write(usize, u64, u64, u8),
    Checkpoint,
    Suspend,
    Restart,
    Forget(usize),
    GoBack(usize, bool),
    Merge,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let write = (0..4usize, 0..BLOCKS, 1..8u64, prop_oneof![Just(0u8), 1..90u8]);
    let step = prop_oneof![
        6 => write.prop_map(|(what, first, count, tag)| Step::Write(what, first, count, tag)),
        3 => Just(Step::Checkpoint),
        2 => Just(Step::Suspend),
        1 => Just(Step::Restart),
        3 => any::<usize>().prop_map(Step::Forget),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, whole)| Step::GoBack(which, whole)),
        5 => Just(Step::Merge),
    ];
    proptest::collection::vec(step, 1..50)
}

type Content = Vec<u8>;

/// What the guest has: a byte for each block of each disk, and of the memory.
#[derive(Clone, Debug, PartialEq)]
struct State {
    disks: BTreeMap<String, Content>,
    memory: Content,
}

/// A machine that always runs.
struct Rig {
    folder: tempfile::TempDir,
    record: Record,
    now: State,
    /// Pages of memory that no layer has.
    dirty: BTreeSet<u64>,
    kept: BTreeMap<u64, State>,
    merges: usize,
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("layers")).unwrap();
        let record = crate::record::tests::record();
        let empty = |disk: &DiskRecord| vec![if disk.image.is_some() { IMAGE } else { 0 }; BLOCKS as usize];
        let disks = record.disks.iter().map(|disk| (disk.name.to_string(), empty(disk))).collect();
        let now = State { disks, memory: vec![IMAGE; BLOCKS as usize] };
        let mut rig = Self { folder, record, now, dirty: BTreeSet::new(), kept: BTreeMap::new(), merges: 0 };
        rig.create_tops();
        rig
    }

    fn path(&self, layer: u64) -> PathBuf {
        layer_path(self.folder.path(), layer)
    }

    fn create_tops(&mut self) {
        for layer in self.record.disks.iter().filter_map(|disk| disk.layers.last()) {
            if !self.path(*layer).exists() {
                Layer::create(&self.path(*layer), SIZE).unwrap();
            }
        }
        self.record.fresh.clear();
    }

    fn put(&self, layer: u64, block: u64, tag: u8) {
        let layer = Layer::open(&self.path(layer), SIZE, true).unwrap();
        match tag {
            0 => layer.discard(block, 1).unwrap(),
            tag => layer.write(block * 4096, &[tag; 4096]).unwrap(),
        }
        layer.flush().unwrap();
    }

    fn read(&self, layers: &[u64], below: u8) -> Content {
        let open = |layer: &u64| Layer::open_frozen(&self.path(*layer)).unwrap();
        let layers: Vec<(Layer, Vec<u64>)> =
            layers.iter().map(open).map(|layer| (layer.held(), layer)).map(|(held, layer)| (layer, held)).collect();
        let block = |block: u64| {
            let Some((layer, _)) = layers.iter().rev().find(|(_, held)| held.contains(&block)) else { return below };
            let mut bytes = [0; 4096];
            layer.read(block * 4096, &mut bytes).unwrap();
            assert!(bytes.iter().all(|byte| *byte == bytes[0]));
            bytes[0]
        };
        (0..BLOCKS).map(block).collect()
    }

    fn read_disks(&self, disks: &[DiskRecord]) -> BTreeMap<String, Content> {
        let below = |disk: &DiskRecord| if disk.image.is_some() { IMAGE } else { 0 };
        disks.iter().map(|disk| (disk.name.to_string(), self.read(&disk.layers, below(disk)))).collect()
    }

    /// As the runner does it: a layer of memory over what there is.
    fn save(&mut self) -> MachineRecord {
        let number = self.record.reserve_layer();
        Layer::create(&self.path(number), SIZE).unwrap();
        for page in std::mem::take(&mut self.dirty) {
            self.put(number, page, self.now.memory[page as usize]);
        }
        let platform =
            Platform { qemu: String::new(), accelerator: String::new(), cpu: String::new(), portable: Vec::new() };
        MachineRecord {
            image: None,
            memory: [self.record.memory.clone(), vec![number]].concat(),
            digest: collective_model::Digest::of(b""),
            epoch: number.to_string(),
            memory_mib: 1,
            cpus: 1,
            info: CheckpointMachine { bytes: 0, pause_us: None, platform, screen: false },
        }
    }

    fn suspend(&mut self) {
        let machine = self.save();
        self.record.suspended = Some(SuspendedRecord { machine, disks: self.record.disks.clone() });
        self.record.memory.clear();
        self.record.base = None;
    }

    fn resume(&mut self) {
        self.record.prepare_resume();
        self.create_tops();
        let memory = self.record.suspended.take().unwrap().machine.memory;
        self.record.base = memory.last().copied();
        self.record.memory = memory;
    }

    /// The memory begins anew.
    fn boot(&mut self) {
        self.record.memory.clear();
        self.record.base = None;
        self.record.prepare_start(&|_| false);
        self.create_tops();
        self.now.disks = self.read_disks(&self.record.disks);
        self.now.memory = vec![IMAGE; BLOCKS as usize];
        self.dirty.clear();
    }

    fn keep_suspended(&mut self) {
        let SuspendedRecord { machine, disks } = self.record.suspended.clone().unwrap();
        let id = self.record.keep_machine("suspended".into(), false, disks, machine, 0);
        self.kept.insert(id.0, self.now.clone());
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Write(what, first, count, tag) => {
                for block in first..BLOCKS.min(first + count) {
                    if what == 3 {
                        self.now.memory[block as usize] = tag;
                        self.dirty.insert(block);
                        continue;
                    }
                    let disk = &self.record.disks[what];
                    self.put(*disk.layers.last().unwrap(), block, tag);
                    self.now.disks.get_mut(disk.name.as_str()).unwrap()[block as usize] = tag;
                }
            }
            Step::Checkpoint => {
                let disks = self.record.disks.clone();
                let machine = self.save();
                self.record.push_layers();
                self.create_tops();
                self.record.memory.clone_from(&machine.memory);
                let id = self.record.keep_machine("by hand".into(), false, disks, machine, 0);
                self.kept.insert(id.0, self.now.clone());
            }
            Step::Suspend => {
                self.suspend();
                self.merge();
                self.resume();
            }
            Step::Restart => self.boot(),
            Step::Forget(which) => {
                if let Some(id) = self.pick(which) {
                    self.record.checkpoints.retain(|kept| kept.info.id != id);
                    self.kept.remove(&id.0);
                }
            }
            Step::GoBack(which, whole) => {
                let Some(id) = self.pick(which) else { return };
                let target = self.record.checkpoints.iter().find(|kept| kept.info.id == id).cloned().unwrap();
                self.suspend();
                self.keep_suspended();
                self.go_to(target, whole);
            }
            Step::Merge => self.merge(),
        }
    }

    fn go_to(&mut self, target: CheckpointRecord, whole: bool) {
        self.now = self.kept[&target.info.id.0].clone();
        self.record.disks.clone_from(&target.disks);
        self.dirty.clear();
        match (target.machine, whole) {
            (Some(machine), true) => {
                self.record.suspended = Some(SuspendedRecord { machine, disks: target.disks });
                self.resume();
            }
            _ => {
                self.record.suspended = None;
                self.boot();
            }
        }
    }

    fn pick(&self, which: usize) -> Option<CheckpointId> {
        let count = self.record.checkpoints.len();
        (count > 0).then(|| self.record.checkpoints[which % count].info.id)
    }

    fn merge(&mut self) {
        let chosen = choose(&self.record.chains(), &self.record.unmergeable(), &|layer| 1 + layer % 7);
        let Some(merge) = chosen.first() else { return };
        let number = self.record.reserve_layer();
        let open = |layer: &u64| Arc::new(Layer::open_frozen(&self.path(*layer)).unwrap());
        let layers: Vec<_> = merge.layers.iter().map(open).collect();
        Layer::merge(&layers, &self.path(number), merge.keep_zeros, &mut |_| Ok(())).unwrap();
        assert!(self.record.put_merged(&merge.layers, number));
        for layer in &merge.layers {
            std::fs::remove_file(self.path(*layer)).unwrap();
        }
        self.merges += 1;
    }

    fn check(&self) {
        assert_eq!(self.read_disks(&self.record.disks), self.now.disks, "the present");
        for kept in &self.record.checkpoints {
            let then = &self.kept[&kept.info.id.0];
            assert_eq!(self.read_disks(&kept.disks), then.disks, "disks of {:?}", kept.info.id);
            let memory = kept.machine.as_ref().map(|machine| self.read(&machine.memory, IMAGE));
            assert_eq!(memory.as_ref(), Some(&then.memory), "memory of {:?}", kept.info.id);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn every_state_that_is_kept_stays_what_it_was(steps in steps()) {
        let mut rig = Rig::new();
        for step in &steps {
            rig.take(step);
        }
        rig.check();
        // Until nothing is left to do.
        loop {
            let before = rig.merges;
            rig.merge();
            rig.check();
            if rig.merges == before {
                break;
            }
        }
    }
}

/// Hundreds of suspends and checkpoints, of which the last ten are kept: neither disks nor memory grow without end, and
/// what is copied stays near to what was written.
#[test]
fn chains_stay_short() {
    let mut record = crate::record::tests::record();
    let mut sizes: BTreeMap<u64, u64> = (1..=3).map(|layer| (layer, 1000)).collect();
    let (mut written, mut copied, mut longest) = (3000, 0, 0);
    for round in 0..600u64 {
        let disks = record.disks.clone();
        let number = record.reserve_layer();
        let new: Vec<u64> = record.push_layers().into_iter().chain([number]).collect();
        written += new.len() as u64 * 10;
        sizes.extend(new.iter().map(|layer| (*layer, 10)));
        record.memory.push(number);
        if round % 2 == 0 {
            record.checkpoint("by hand".into(), false, &|_| 0);
            record.checkpoints.last_mut().unwrap().disks = disks;
            record.checkpoints.drain(..record.checkpoints.len().saturating_sub(10));
        } else {
            // It was suspended and goes on.
            record.base = Some(number);
        }
        while let Some(merge) = choose(&record.chains(), &record.unmergeable(), &|layer| sizes[&layer]).first() {
            let bytes: u64 = merge.layers.iter().map(|layer| sizes[layer]).sum();
            copied += bytes;
            let number = record.reserve_layer();
            // Half of it was written again.
            sizes.insert(number, bytes / 2 + 1);
            assert!(record.put_merged(&merge.layers, number));
        }
        longest = longest.max(crate::merging::plan::longest(&record.chains()));
    }
    assert!(longest <= 32, "{longest} layers");
    assert!(copied < 10 * written, "{copied} bytes copied, {written} written");
}

#[test]
fn what_is_in_the_store_is_so_after_a_merge_too() {
    let mut record = crate::record::tests::record();
    record.push_layers();
    record.push_layers();
    record.note_stored("7".repeat(32).parse().unwrap());
    let run = record.disks[1].layers[..2].to_vec();
    assert!(record.put_merged(&run, 77));
    assert_eq!(record.disks[1].layers.len(), 2);
    assert!(record.in_store().is_some());
    let cut = vec![77, 4];
    assert!(!record.put_merged(&cut, 78), "77 is not followed by 4");
    assert_eq!(record.disks[1].layers[0], 77);
}

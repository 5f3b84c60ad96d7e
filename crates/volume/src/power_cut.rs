//! A test: the power goes between any two steps of a layer, and what a flush promised is still there.
//!
//! The layer's files are simulated. What was written since a file's last sync made it to the disk or not, each sector
//! for itself, in any version that it had since; nothing else orders the two files but their syncs. Sometimes only the
//! process dies: then all is there that anybody was told of, and may still be lost later.

mod sim;
mod threads;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use collective_model::{ApplianceName, Digest};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::{PackInfo, Source, SourceError};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::backing::Backing;
use crate::layer::Files;
use crate::log;
use crate::rules::{BROKEN, Rule};
use crate::{Disk, Layer};
use sim::{Content, Dice, Plug, SECTOR, Sector, SimFile, patch};

/// Where it all happens: the map bits of these blocks lie in three sectors and two pages of the map, and the last block
/// is short until the disk grows.
const HOT: [Range<u64>; 3] = [0..12, 4090..4102, 32760..32776];
const SIZES: [u64; 2] = [32770 * 4096 + 1536, 32776 * 4096];

/// What each sector may be after a power cut: what the last flush promised, and all that was written since.
#[derive(Default)]
struct Model(HashMap<u64, Vec<Sector>>, Told);

/// What each sector may be after the death of the process: what was told last, and all that was begun since.
#[derive(Default)]
struct Told(HashMap<u64, Vec<Sector>>);

impl Model {
    fn write(&mut self, offset: u64, length: u64, new: Option<&[u8]>) {
        for sector in offset / SECTOR..(offset + length).div_ceil(SECTOR) {
            let versions = self.0.entry(sector).or_insert_with(|| vec![[0; SECTOR as usize]]);
            let mut bytes = versions[versions.len() - 1];
            patch(sector, &mut bytes, offset, length, new);
            let told = self.1.0.entry(sector).or_insert_with(|| versions[versions.len() - 1..].to_vec());
            told.push(bytes);
            versions.push(bytes);
        }
    }

    /// Whoever wrote there was told that it is done.
    fn done(&mut self, offset: u64, length: u64) {
        for sector in offset / SECTOR..(offset + length).div_ceil(SECTOR) {
            if let Some(told) = self.1.0.get_mut(&sector) {
                told.drain(..told.len() - 1);
            }
        }
    }

    /// To be handed to [`flushed`](Self::flushed) when a flush that begins now has succeeded.
    fn flushing(&self) -> HashMap<u64, usize> {
        self.0.iter().map(|(sector, versions)| (*sector, versions.len() - 1)).collect()
    }

    fn flushed(&mut self, before: HashMap<u64, usize>) {
        for (sector, last) in before {
            self.0.get_mut(&sector).unwrap().drain(..last);
        }
    }

    /// Checks what is on the disk now, and goes on from there. After a power cut it is there to stay.
    fn check(&mut self, disk: &Disk, to_stay: bool) -> Result<(), String> {
        for block in HOT.into_iter().flatten().chain([2000, 20_000]) {
            let bytes = ready(disk.read(block * 4096, 4096)).unwrap();
            for (sector, found) in (block * 8..).zip(bytes.chunks_exact(512)) {
                let found: Sector = found.try_into().unwrap();
                let versions = self.0.entry(sector).or_insert_with(|| vec![[0; SECTOR as usize]]);
                if !versions.contains(&found) {
                    let zeros = if found == [0; 512] { "zeros" } else { "something else" };
                    return Err(format!("sector {sector} is {zeros}, not one of {} versions", versions.len()));
                }
                let told = self.1.0.remove(&sector).unwrap_or_default();
                if to_stay {
                    versions.clear();
                } else if !told.is_empty() && !told.contains(&found) {
                    return Err(format!("sector {sector} is not what was told before the process died"));
                }
                versions.push(found);
            }
        }
        Ok(())
    }
}

fn ready<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("nothing here waits for a network")
}

struct Nowhere;

impl Source for Nowhere {
    fn packs<'a>(&'a self, _: &'a ApplianceName, _: &'a Digest) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        unreachable!("these disks have no image")
    }
    fn read<'a>(
        &'a self,
        _: &'a ApplianceName,
        _: &'a Digest,
        _: Range<u64>,
    ) -> BoxFuture<'a, Result<bytes::Bytes, SourceError>> {
        unreachable!("these disks have no image")
    }
}

fn place(dice: &mut Dice, size: u64) -> (u64, u64) {
    let hot = HOT[dice.roll(3) as usize].clone();
    let grain = [1, SECTOR, 4096][dice.roll(3) as usize];
    let bytes = hot.start * 4096..(hot.end * 4096).min(size);
    let offset = (bytes.start + dice.roll(bytes.end - bytes.start)) / grain * grain;
    let length = (1 + dice.roll(4 * 4096)).next_multiple_of(grain).min(bytes.end - offset);
    (offset, length)
}

struct Rig {
    store: Arc<FrameStore>,
    plug: Arc<Plug>,
    honest: bool,
    base: Content,
    base_map: Content,
    model: Arc<Mutex<Model>>,
    /// Blocks that somebody wanted to write during a flush and that had to wait for its end.
    waiting: Arc<Mutex<HashMap<u64, Vec<u8>>>>,
    /// Blocks that are being changed: which of two changes is the later one, nobody can say.
    changing: Arc<Mutex<Range<u64>>>,
}

impl Rig {
    /// A frozen layer below holds every other hot block; some of them are only in its log, unless it has none.
    fn new(store: &Arc<FrameStore>, dice: &mut Dice, honest: bool) -> Self {
        let store = store.clone();
        let plug = Arc::new(Plug(Mutex::new(u64::MAX)));
        let (data, map) = (SimFile::new(&plug, true, fresh_data(2)), SimFile::new(&plug, true, fresh_map(2)));
        let files = || Files { data: Box::new(data.clone()), map: Box::new(map.clone()), held: None };
        let open = || Layer::over(Path::new("base"), files(), SIZES[0], true);
        let layer = open().unwrap();
        let mut model = Model::default();
        for block in HOT.into_iter().flatten().filter(|block| block % 2 == 0 && (block + 1) * 4096 <= SIZES[0]) {
            let bytes = dice.bytes(4096);
            layer.write(block * 4096, &bytes).unwrap();
            model.write(block * 4096, 4096, Some(&bytes));
            layer.flush().unwrap();
        }
        model.flushed(model.flushing());
        let version = 1 + dice.roll(2) as u8;
        if version == 1 {
            // It is all in the map then.
            open().unwrap();
            data.medium().durable.length = SIZES[0];
            map.medium().durable.sectors.insert(0, fresh_map(1).sectors[&0]);
        }
        let (base, base_map) = (data.medium().durable.clone(), map.medium().durable.clone());
        let model = Arc::new(Mutex::new(model));
        Self { store, plug, honest, base, base_map, model, waiting: Arc::default(), changing: Arc::default() }
    }

    /// Opens the chain over the given top; the power holds for `steps`.
    fn open(&self, top: &mut Top, size: u64, steps: u64) -> Option<Arc<Disk>> {
        let powered = Arc::new(Plug(Mutex::new(u64::MAX)));
        let base = Box::new(SimFile::new(&powered, true, self.base.clone()));
        let base_map = Box::new(SimFile::new(&powered, true, self.base_map.clone()));
        let base =
            Layer::over(Path::new("base"), Files { data: base, map: base_map, held: None }, size, false).unwrap();
        *self.plug.0.lock().unwrap() = steps;
        let opened = Layer::over(Path::new("top"), top.files(), size, true).map_err(|error| error.to_string());
        // It appears at one instant, as a whole.
        let held = SimFile::new(&self.plug, true, Content::default());
        let begun = opened.and_then(|top_layer| {
            top_layer.note_held_in(Box::new(held.clone()), &top.boot()).map_err(|error| error.to_string())
        });
        top.held = if begun.is_ok() { held } else { top.held.clone() };
        match begun {
            Ok(top) => Some(Arc::new(Disk::over(size, None, self.store.clone(), vec![base, top]))),
            Err(error) => {
                assert!(self.plug.gone(), "a power cut left a layer that cannot be opened: {error}");
                None
            }
        }
    }

    /// The files of the top layer, found at this boot.
    fn top(&self, data: Content, map: Content, held: Content, boots: u8) -> Top {
        let (data, map) = (SimFile::new(&self.plug, self.honest, data), SimFile::new(&self.plug, true, map));
        Top { data, map, held: SimFile::new(&self.plug, true, held), boots }
    }

    /// Somebody writes whole blocks at the worst moment of each flush: when the data is synced, before the map is.
    fn write_during_flushes(&self, disk: &Arc<Disk>, data: &SimFile, seed: u64) {
        let (disk, model, mut dice) = (Arc::downgrade(disk), self.model.clone(), Dice(seed));
        let (waiting, changing) = (self.waiting.clone(), self.changing.clone());
        *data.after_sync.lock().unwrap() = Some(Box::new(move || {
            let Some(disk) = disk.upgrade() else { return };
            let (block, bytes) = (HOT[dice.roll(3) as usize].start + dice.roll(8), dice.bytes(4096));
            if changing.lock().unwrap().contains(&block) {
                return;
            }
            if disk.top_layer().unwrap().would_wait(block) {
                waiting.lock().unwrap().insert(block, bytes);
                return;
            }
            model.lock().unwrap().write(block * 4096, 4096, Some(&bytes));
            if disk.try_write(block * 4096, &bytes).is_ok() {
                model.lock().unwrap().done(block * 4096, 4096);
            }
        }));
    }

    /// Those who had to wait go on.
    fn write_waiting(&self, disk: &Disk) {
        let waiting = std::mem::take(&mut *self.waiting.lock().unwrap());
        for (block, bytes) in waiting {
            self.model.lock().unwrap().write(block * 4096, 4096, Some(&bytes));
            if disk.try_write(block * 4096, &bytes).is_ok() {
                self.model.lock().unwrap().done(block * 4096, 4096);
            }
        }
    }

    /// Uses the disk until the power goes.
    fn work(&self, disk: &Disk, dice: &mut Dice) {
        for _ in 0..200 {
            // A flush that has nothing to do succeeds without power, and would settle a write that failed.
            if self.plug.gone() {
                return;
            }
            let (offset, length) = place(dice, disk.size());
            *self.changing.lock().unwrap() = offset / 4096..(offset + length).div_ceil(4096);
            let result = match dice.roll(10) {
                0..6 => {
                    let bytes = dice.bytes(length as usize);
                    self.model.lock().unwrap().write(offset, length, Some(&bytes));
                    ready(disk.write(offset, &bytes)).map(|()| self.model.lock().unwrap().done(offset, length))
                }
                6 | 7 => {
                    self.model.lock().unwrap().write(offset, length, None);
                    ready(disk.zero(offset, length)).map(|()| self.model.lock().unwrap().done(offset, length))
                }
                _ => {
                    *self.changing.lock().unwrap() = 0..0;
                    let before = self.model.lock().unwrap().flushing();
                    disk.flush().map(|()| self.model.lock().unwrap().flushed(before))
                }
            };
            if result.is_err() {
                assert!(self.plug.gone(), "{result:?}");
                return;
            }
            self.write_waiting(disk);
        }
    }
}

/// The files of a layer that takes writes, and how often the host was booted.
struct Top {
    data: Arc<SimFile>,
    map: Arc<SimFile>,
    held: Arc<SimFile>,
    boots: u8,
}

impl Top {
    fn boot(&self) -> [u8; 36] {
        [self.boots; 36]
    }

    fn files(&self) -> Files {
        let held = Some((Box::new(self.held.clone()) as Box<dyn Backing>, self.boot()));
        Files { data: Box::new(self.data.clone()), map: Box::new(self.map.clone()), held }
    }
}

fn fresh_data(version: u8) -> Content {
    let length = if version == 1 { SIZES[0] } else { log::end(SIZES[0]) };
    Content { length, sectors: BTreeMap::new() }
}

fn fresh_map(version: u8) -> Content {
    let mut header = [0; SECTOR as usize];
    header[..8].copy_from_slice(&[b'C', b'L', b'L', b'M', version, 0, 0, 0]);
    header[8..16].copy_from_slice(&SIZES[0].to_le_bytes());
    Content { length: 3 * 4096, sectors: BTreeMap::from([(0, header)]) }
}

/// One that is never asked for anything.
fn no_store() -> Arc<FrameStore> {
    let folder = tempfile::tempdir().unwrap();
    Arc::new(FrameStore::new(Cache::open(folder.path()).unwrap(), Arc::new(Nowhere)))
}

/// Several power cuts in a row; the disk grows on the way.
fn life(store: &Arc<FrameStore>, seed: u64, honest: bool) -> Result<(), String> {
    let mut dice = Dice(seed);
    let rig = Rig::new(store, &mut dice, honest);
    let version = 1 + dice.roll(2) as u8;
    let mut top = rig.top(fresh_data(version), fresh_map(version), Content::default(), 0);
    for cycle in 0..8 {
        let size = SIZES[usize::from(cycle >= 3)];
        let steps = dice.roll(120);
        if let Some(disk) = rig.open(&mut top, size, steps) {
            rig.write_during_flushes(&disk, &top.data, seed ^ cycle);
            rig.work(&disk, &mut dice);
        }
        rig.waiting.lock().unwrap().clear();
        let cuts = dice.roll(3);
        for _ in 0..cuts {
            let left = [&top.data, &top.map, &top.held].map(|file| file.crash(&mut dice));
            let [data, map, held] = left;
            top = rig.top(data, map, held, top.boots + 1);
            // It may go again while the layer is opened.
            rig.open(&mut top, size, dice.roll(9));
        }
        let disk = rig.open(&mut top, size, u64::MAX).unwrap();
        let checked = rig.model.lock().unwrap().check(&disk, cuts > 0);
        checked.map_err(|why| format!("seed {seed}, cycle {cycle}: {why}"))?;
    }
    Ok(())
}

#[test]
fn what_a_flush_promised_survives_any_power_cut() {
    let store = no_store();
    for seed in 0..200 {
        life(&store, seed, true).unwrap();
    }
}

#[test]
fn the_check_notices_data_that_was_not_synced_before_the_map() {
    let store = no_store();
    assert!((0..50).any(|seed| life(&store, seed, false).is_err()), "a data file that ignores syncs goes unnoticed");
}

#[test]
fn the_check_notices_each_broken_rule() {
    use Rule::*;
    let store = no_store();
    let rules = [FixedBlocksStay, DoubtIsResolved, DroppedIsErased, DataBeforeMap, FullLogIsFolded];
    for rule in rules.into_iter().chain([HeldIsNoted, NotesAreOfThisBoot]) {
        BROKEN.set(Some(rule));
        let found = (0..500).find(|seed| life(&store, *seed, true).is_err());
        BROKEN.set(None);
        assert!(found.is_some(), "{rule:?} can be broken unnoticed");
    }
}

#[test]
fn after_a_failed_sync_no_flush_succeeds() {
    let plug = Arc::new(Plug(Mutex::new(u64::MAX)));
    let (data, map) = (SimFile::new(&plug, true, fresh_data(2)), SimFile::new(&plug, true, fresh_map(2)));
    let files = || Files { data: Box::new(data.clone()), map: Box::new(map.clone()), held: None };
    let open = || Layer::over(Path::new("top"), files(), SIZES[0], true).unwrap();
    let layer = open();
    layer.write(0, &[1; 4096]).unwrap();
    layer.flush().unwrap();
    layer.write(4096, &[1; 4096]).unwrap();
    data.syncs_fail.store(true, Ordering::SeqCst);
    assert!(layer.flush().is_err());
    data.syncs_fail.store(false, Ordering::SeqCst);
    layer.write(8192, &[1; 4096]).unwrap();
    assert!(layer.flush().is_err(), "what the failed sync dropped is not durable, whatever the next one says");
    assert!(layer.write(0, &[2; 4096]).is_err(), "nothing can confirm the record of what the first flush promised");
    assert_eq!(open().held(), [0], "the kernel shows what the disk does not have");
}

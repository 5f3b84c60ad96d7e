//! Saving the machine, and going on with a saved one: memory, devices and disks of one instant.
//!
//! Memory is kept as disks are: a layer for each instant, with the pages that the guest wrote since the one before. Most of
//! them are copied while the guest runs. Then it stands still for as long as its devices take and the pages that are left;
//! what they are goes to a buffer, and to the layer when the guest goes on. So the pause does not grow with the memory.
//!
//! State and memory are of one instant, its epoch, and useless apart: layers of memory are never changed once they are
//! whole, and the file of the state has the epoch in it and is known by its digest.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use collective_model::Digest;
use collective_model::run::{Platform, RunResume, SaveOrder, Saved};
use collective_store::BLOCK;
use collective_vmm::{GuestMemory, MachineState, RunState, Vm};
use collective_volume::{Disk, Layer};
use serde_json::{Value, json};

use crate::state::Shared;

const MAGIC: &[u8; 8] = b"CLSM\x01\0\0\0";
/// zstd's level for the state, which is written while the guest goes on.
const LEVEL: i32 = 3;
/// Memory is copied in pieces of so many bytes.
const STEP: u64 = 4 << 20;
/// The guest is stopped when so many bytes are left to copy,
const FEW: u64 = 2 << 20;
/// or after so many rounds.
const ROUNDS: u32 = 6;
/// While the guest stands still its pages are copied to memory, up to so many bytes; more go to the layer at once.
const BUFFER: u64 = 256 << 20;
/// A layer that stands for itself is made when there are so many below it.
const MAX_CHAIN: usize = 12;
/// The drive that tells the guest who it is.
pub(crate) const SEED: &str = "seed";
/// States are far below it.
const MAX_STATE: usize = 512 << 20;

/// What the runner keeps between two saves.
pub(crate) struct Saver {
    platform: Platform,
    /// Layers that the machine went on with.
    pub(crate) base: Vec<PathBuf>,
    /// Layers that the next one comes over.
    pub(crate) chain: Vec<PathBuf>,
    memory: Option<GuestMemory>,
}

impl Saver {
    pub fn new(platform: Platform, resume: Option<&RunResume>) -> Self {
        let base = resume.map(|resume| resume.memory.clone()).unwrap_or_default();
        Self { platform, chain: base.clone(), base, memory: None }
    }

    /// Saves the machine. It goes on afterwards if it ran before, unless the order ends it and it could be saved: then it
    /// stands still for good.
    pub async fn save(&mut self, vm: &Vm, shared: &Shared, order: &SaveOrder) -> Result<Saved, String> {
        let was_running = vm.status().await.map_err(|e| e.to_string())? == RunState::Running;
        let saved = self.try_save(vm, shared, order, was_running).await;
        if saved.is_err() {
            // What was copied so far is of no use; nothing may be missing next time.
            if let Some(memory) = &mut self.memory {
                memory.forget();
            }
            self.chain = self.base.clone();
            for path in [&order.memory, &order.state] {
                let _ = std::fs::remove_file(path);
            }
            if was_running && vm.status().await.is_ok_and(|status| status != RunState::Running) {
                let _ = vm.cont().await;
            }
        }
        saved
    }

    /// The guest's memory for whoever sends it elsewhere. What is saved next begins again with what the machine went on with.
    pub async fn lend(&mut self, vm: &Vm) -> Result<(&mut GuestMemory, &Platform), String> {
        self.chain = self.base.clone();
        let memory = attach(&mut self.memory, vm).await?;
        memory.forget();
        Ok((memory, &self.platform))
    }

    async fn try_save(
        &mut self,
        vm: &Vm,
        shared: &Shared,
        order: &SaveOrder,
        was_running: bool,
    ) -> Result<Saved, String> {
        let disks = shared.disks().clone();
        let tops = new_layers(&disks, &order.tops)?;
        let memory = attach(&mut self.memory, vm).await?;
        if self.chain.len() >= self.base.len() + MAX_CHAIN {
            memory.forget();
            self.chain = self.base.clone();
        }
        let cannot = |e: &dyn std::fmt::Display| format!("the guest's memory cannot be saved: {e}");
        Layer::create(&order.memory, memory.size()).map_err(|e| cannot(&e))?;
        let layer = Layer::open(&order.memory, memory.size(), true).map_err(|e| cannot(&e))?;
        let mut writer = Writer { layer, zeros_below: self.chain.is_empty(), written: 0, shared };
        if was_running && !order.ends() && memory.untracked().is_none() {
            copy_ahead(memory, &mut writer).map_err(|e| cannot(&e))?;
        }
        let mut buffer = Vec::with_capacity(FEW as usize * 4);
        let begun = Instant::now();
        if was_running {
            vm.pause().await.map_err(|e| e.to_string())?;
        }
        let state = vm.save_state().await.map_err(|e| e.to_string())?;
        for (disk, top) in disks.iter().zip(tops) {
            disk.freeze(top).map_err(|e| format!("a disk cannot be kept as it is: {e}"))?;
        }
        let left = memory.changed().map_err(|e| cannot(&e))?;
        let buffered = length(&left) <= BUFFER && !order.ends();
        if buffered {
            buffer.resize(length(&left) as usize, 0);
            memory.read(&left, &mut buffer).map_err(|e| cannot(&e))?;
        } else {
            writer.copy(memory, &left).map_err(|e| cannot(&e))?;
        }
        let goes_on = was_running && !order.ends();
        if goes_on {
            vm.cont().await.map_err(|e| e.to_string())?;
        }
        let pause = begun.elapsed();
        if buffered {
            writer.write(&left, &buffer).map_err(|e| cannot(&e))?;
        }
        self.chain.push(order.memory.clone());
        let untracked = memory.untracked().map(ToOwned::to_owned);
        let (digest, state_bytes) = self.make_durable(order, writer.layer, &disks, state).await?;
        let mut screen = false;
        if let (true, Some(path)) = (shared.config.display, &order.screen) {
            // Only something to recognise it by.
            let taken = vm.screendump(path).await;
            screen = taken.inspect_err(|error| tracing::warn!(%error, "there is no picture of the screen")).is_ok();
        }
        Ok(Saved {
            screen,
            memory: self.chain.clone(),
            digest,
            memory_bytes: writer.written,
            state_bytes,
            pause_us: goes_on.then_some(pause.as_micros() as u64),
            platform: self.platform.clone(),
            untracked,
        })
    }

    /// Everything that belongs to the instant survives a power cut when this returns.
    async fn make_durable(
        &self,
        order: &SaveOrder,
        layer: Layer,
        disks: &[Arc<Disk>],
        state: MachineState,
    ) -> Result<(Digest, u64), String> {
        let (disks, path, epoch, platform) =
            (disks.to_vec(), order.state.clone(), order.epoch.clone(), self.platform.clone());
        let work = move || -> io::Result<(Digest, u64)> {
            layer.flush()?;
            disks.iter().try_for_each(|disk| disk.flush())?;
            let bytes = encode(&state, &epoch, &platform)?;
            write_durably(&path, &bytes)?;
            Ok((Digest::of(&bytes), bytes.len() as u64))
        };
        let done = tokio::task::spawn_blocking(work).await.map_err(|e| e.to_string())?;
        done.map_err(|e| format!("what was saved cannot be made durable: {e}"))
    }
}

async fn attach<'a>(memory: &'a mut Option<GuestMemory>, vm: &Vm) -> Result<&'a mut GuestMemory, String> {
    if memory.is_none() {
        *memory = Some(vm.memory().await.map_err(|e| e.to_string())?);
    }
    memory.as_mut().ok_or_else(|| "the guest's memory is not to be had".into())
}

/// Copies what the guest wrote while it goes on, until little is left or it writes faster than that.
fn copy_ahead(memory: &mut GuestMemory, writer: &mut Writer) -> io::Result<()> {
    let mut before = u64::MAX;
    for _ in 0..ROUNDS {
        let ranges = memory.changed()?;
        let bytes = length(&ranges);
        writer.copy(memory, &ranges)?;
        if bytes <= FEW || bytes > before / 4 * 3 {
            break;
        }
        before = bytes;
    }
    Ok(())
}

fn new_layers(disks: &[Arc<Disk>], tops: &[PathBuf]) -> Result<Vec<Layer>, String> {
    if !tops.is_empty() && tops.len() != disks.len() {
        return Err(format!("it has {} disks, and {} new layers came for them", disks.len(), tops.len()));
    }
    let make = |(disk, path): (&Arc<Disk>, &PathBuf)| {
        Layer::create(path, disk.size())?;
        Layer::open(path, disk.size(), true)
    };
    let made: Result<Vec<Layer>, _> = disks.iter().zip(tops).map(make).collect();
    made.map_err(|e| format!("new layers for its disks cannot be made: {e}"))
}

pub(crate) fn length(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// Puts pages into a layer of memory.
struct Writer<'a> {
    layer: Layer,
    /// Nothing is below it, so that zeros need not be noted.
    zeros_below: bool,
    written: u64,
    shared: &'a Shared,
}

impl Writer<'_> {
    fn copy(&mut self, memory: &GuestMemory, ranges: &[Range<u64>]) -> io::Result<()> {
        let mut buffer = vec![0; STEP as usize];
        let steps = ranges.iter().flat_map(|range| {
            let end = range.end;
            range.clone().step_by(STEP as usize).map(move |start| start..end.min(start + STEP))
        });
        for step in steps {
            let part = &mut buffer[..(step.end - step.start) as usize];
            memory.read(std::slice::from_ref(&step), part)?;
            self.write(std::slice::from_ref(&step), part)?;
        }
        Ok(())
    }

    /// `content` has the ranges one after the other.
    fn write(&mut self, ranges: &[Range<u64>], mut content: &[u8]) -> io::Result<()> {
        for range in ranges {
            let (part, rest) = content.split_at((range.end - range.start) as usize);
            content = rest;
            let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
            let mut at = range.start;
            for run in runs(part, is_zero) {
                let blocks = run.len() as u64 / BLOCK;
                if !is_zero(&run[..BLOCK as usize]) {
                    self.layer.write(at, run)?;
                    self.written += run.len() as u64;
                } else if !self.zeros_below || self.written > 0 {
                    self.layer.discard(at / BLOCK, blocks)?;
                }
                at += run.len() as u64;
            }
        }
        if let Some(save) = &mut self.shared.status().save {
            save.written = self.written;
        }
        Ok(())
    }
}

/// Cuts whole pages into runs that are all zeros or have none.
pub(crate) fn runs(mut pages: &[u8], is_zero: impl Fn(&[u8]) -> bool) -> Vec<&[u8]> {
    let mut found = Vec::new();
    while !pages.is_empty() {
        let zeros = is_zero(&pages[..BLOCK as usize]);
        let alike = pages.chunks(BLOCK as usize).take_while(|page| is_zero(page) == zeros).count();
        let (run, rest) = pages.split_at((alike * BLOCK as usize).min(pages.len()));
        found.push(run);
        pages = rest;
    }
    found
}

pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let part = path.with_extension("part");
    let mut file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&part, path)?;
    std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// `"CLSM"`, `u16` version 1, `u16` 0, `u32` length of a JSON header, the header, and the machine's state in zstd.
pub(crate) fn encode(state: &MachineState, epoch: &str, platform: &Platform) -> io::Result<Vec<u8>> {
    let state = state.encode();
    let stored = zstd::bulk::compress(&state, LEVEL)?;
    let header = json!({
        "epoch": epoch, "platform": platform, "bytes": state.len(),
        "digest": Digest::of(&state),
    });
    let header = header.to_string();
    let mut out = MAGIC.to_vec();
    out.extend((header.len() as u32).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(stored);
    Ok(out)
}

/// Tells a guest that has just gone on that its seed disk is another one now.
pub(crate) async fn tell_guest(vm: &Vm) {
    if let Err(error) = vm.tell_of_content(SEED).await {
        tracing::warn!(%error, "the guest is not told that its seed disk has changed; it learns at its next boot");
    }
}

/// The state in a file, if it is the one that belongs to this memory and goes on here.
pub(crate) fn load(resume: &RunResume, here: &Platform) -> Result<MachineState, String> {
    let bytes = std::fs::read(&resume.state).map_err(|e| format!("{}: {e}", resume.state.display()))?;
    if Digest::of(&bytes) != resume.digest {
        return Err(format!("{} is damaged, or of another instant", resume.state.display()));
    }
    decode(&bytes, &resume.epoch, here)
}

pub(crate) fn decode(bytes: &[u8], epoch: &str, here: &Platform) -> Result<MachineState, String> {
    let broken = || "its state is cut short, or of another format".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or_else(broken)?;
    let (length, rest) = rest.split_first_chunk().ok_or_else(broken)?;
    let (header, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or_else(broken)?;
    let header: Value = serde_json::from_slice(header).map_err(|_| broken())?;
    if header["epoch"] != json!(epoch) {
        return Err("state and memory are of different instants".into());
    }
    let there: Platform = serde_json::from_value(header["platform"].clone()).map_err(|_| broken())?;
    there.goes_on_at(Some(here))?;
    let length = header["bytes"].as_u64().and_then(|length| usize::try_from(length).ok());
    let length = length.filter(|length| *length <= MAX_STATE).ok_or_else(broken)?;
    let state = zstd::bulk::decompress(rest, length).map_err(|_| broken())?;
    if header["digest"] != json!(Digest::of(&state)) {
        return Err(broken());
    }
    MachineState::decode(&state).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn here() -> Platform {
        Platform { qemu: "10.0.2".into(), accelerator: "tcg".into(), cpu: "max".into(), portable: Vec::new() }
    }

    fn state() -> MachineState {
        let header = r#"{"blocks":[{"name":"pc.bios","length":3}],"devices":2}"#;
        let text = [b"CLMS\x01\0\0\0", &(header.len() as u32).to_le_bytes()[..], header.as_bytes(), b"12345"].concat();
        MachineState::decode(&text).unwrap()
    }

    #[test]
    fn a_state_goes_on_only_with_its_own_memory_and_where_it_was() {
        let bytes = encode(&state(), "now", &here()).unwrap();
        assert_eq!(decode(&bytes, "now", &here()), Ok(state()));
        assert!(decode(&bytes, "then", &here()).unwrap_err().contains("different instants"));
        let there = Platform { qemu: "9.2.0".into(), ..here() };
        let why = decode(&bytes, "now", &there).unwrap_err();
        assert!(why.contains("QEMU 10.0.2") && why.contains("9.2.0"), "{why}");
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut], "now", &here()).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn a_file_that_was_changed_is_not_believed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("7.state");
        let bytes = encode(&state(), "now", &here()).unwrap();
        write_durably(&path, &bytes).unwrap();
        let (memory, digest) = (vec![temp.path().join("7")], Digest::of(&bytes));
        let resume = RunResume {
            image: None,
            memory,
            create: false,
            copy: None,
            state: path.clone(),
            digest,
            epoch: "now".into(),
        };
        assert_eq!(load(&resume, &here()), Ok(state()));
        let mut other = bytes.clone();
        *other.last_mut().unwrap() ^= 1;
        std::fs::write(&path, other).unwrap();
        assert!(load(&resume, &here()).unwrap_err().contains("damaged"));
    }

    #[test]
    fn pages_in_runs() {
        let mut pages = vec![0; 5 * BLOCK as usize];
        pages[BLOCK as usize] = 1;
        pages[2 * BLOCK as usize + 9] = 1;
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let lengths: Vec<u64> = runs(&pages, is_zero).iter().map(|run| run.len() as u64 / BLOCK).collect();
        assert_eq!(lengths, [1, 2, 2]);
    }
}

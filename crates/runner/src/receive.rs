//! The machine comes from elsewhere while it runs there ([`collective_model::run_live`]): this is the end that gets it.
//!
//! QEMU is started before anything comes, with disks and memory that are written behind its back; it looks at them when it
//! loads the devices, which come last. What came is durable before the daemon hears that it is all here, and goes on when the
//! daemon says that it is ours. If the daemon dies before that, so do we: it finds what came in the layers.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use collective_model::Digest;
use collective_model::kept::{OfferAnswer, OfferHash, OfferHasher};
use collective_model::run::{Platform, RunResume};
use collective_model::run_live::{MEMORY, Piece, Receiving, Word};
use collective_store::BLOCK;
use collective_volume::{Disk, Layer};
use tokio::sync::mpsc;

use crate::kept;
use crate::line::Line;
use crate::machine::{self, Running};
use crate::save::{self, Saver};
use crate::state::{NotStarted, Order, Shared};
use crate::{Layout, ahead};

/// So many offered blocks are compared at once.
const COMPARED: usize = 32;
/// States are far below it, in bytes.
const MAX_STATE: usize = 512 << 20;

/// Waits for the machine, and returns when it goes on.
pub(crate) async fn receive(
    layout: &Layout,
    shared: Arc<Shared>,
    receiving: &Receiving,
    inbox: &mut mpsc::Receiver<Order>,
) -> Result<Running, NotStarted> {
    let not_made = NotStarted::step("the layers for what comes cannot be made");
    let disks = shared.disks().clone();
    let (memory, tops) = make_layers(&shared, &disks, receiving).map_err(not_made)?;
    shared.memory().clone_from(&Some(memory.clone()));
    let mount =
        machine::mount(layout, &shared.config, &disks, Some((memory.clone(), None)), shared.memory_waits.clone())?;
    let arrived = async {
        let waiting = |_: &Platform| Ok(Some(collective_vmm::Resume { memory: layout.memory(), state: None }));
        let (vm, events, platform) = machine::create(layout, &shared, waiting).await?;
        // What its disks have in common with others comes from the store meanwhile.
        tokio::spawn(ahead::fetch(shared.clone(), disks.clone(), None));
        let taken = NotStarted::step("the machine did not arrive");
        let mut line = wait(inbox).await.map_err(NotStarted::step("no machine came"))?;
        let mut keeps = BTreeMap::new();
        for part in &receiving.kept {
            keeps.extend(kept::open(part, &shared.store).await.map(|disk| (part.which, disk)));
        }
        let mut taker = Taker {
            vm: &vm,
            disks: &disks,
            memory: &memory,
            mount: &mount,
            receiving,
            platform: &platform,
            state: Vec::new(),
            stopped: None,
            keeps,
            hasher: OfferHasher::of(&receiving.epoch),
            answer: OfferAnswer::default(),
        };
        let came = taker.take(&mut line, tops).await;
        if let Err(why) = &came {
            // The other end may be there, and wait.
            let _ = line.say(Word::Failed { why: why.clone() }).await;
        }
        came.map_err(taken)?;
        machine::it_runs(&shared, &vm, true);
        if let Err(error) = vm.announce().await {
            tracing::warn!(%error, "the network is not told where the guest is now");
        }
        save::tell_guest(&vm).await;
        // It reads memory and disks that are all here, so there is nothing to learn from what it reads first.
        disks.iter().chain([&memory]).for_each(|disk| _ = disk.stop_recording());
        let resume = RunResume {
            image: None,
            copy: None,
            create: false,
            memory: vec![receiving.memory.clone()],
            state: receiving.state.clone(),
            digest: Digest::of(&[]),
            epoch: receiving.epoch.clone(),
        };
        Ok((vm, events, Saver::new(platform, Some(&resume))))
    };
    match arrived.await {
        Ok((vm, events, saver)) => Ok(Running { shared, vm, events, saver, mount, layout: layout.clone() }),
        Err(error) => {
            let _ = mount.unmount();
            Err(error)
        }
    }
}

fn make_layers(shared: &Shared, disks: &[Arc<Disk>], receiving: &Receiving) -> Result<(Arc<Disk>, Vec<Layer>), String> {
    if receiving.tops.len() != disks.len() {
        return Err(format!("it has {} disks, and {} layers for them", disks.len(), receiving.tops.len()));
    }
    let size = shared.config.memory_mib << 20;
    Layer::create(&receiving.memory, size).map_err(|e| e.to_string())?;
    let memory = Disk::open(size, None, shared.store.clone(), std::slice::from_ref(&receiving.memory));
    let memory = memory.map_err(|e| e.to_string())?.frozen();
    let top = |(disk, path): (&Arc<Disk>, &PathBuf)| {
        Layer::create(path, disk.size())?;
        Layer::open(path, disk.size(), true)
    };
    let tops: Result<Vec<Layer>, _> = disks.iter().zip(&receiving.tops).map(top).collect();
    Ok((Arc::new(memory), tops.map_err(|e| e.to_string())?))
}

async fn wait(inbox: &mut mpsc::Receiver<Order>) -> Result<Line, String> {
    loop {
        match inbox.recv().await {
            Some(Order::Arrive { line }) => return Ok(line),
            Some(Order::Stop { .. } | Order::PowerOff) | None => return Err("it is not wanted any more".into()),
            // There is no machine to do it with.
            Some(_) => {}
        }
    }
}

struct Taker<'a> {
    vm: &'a collective_vmm::Vm,
    disks: &'a [Arc<Disk>],
    memory: &'a Arc<Disk>,
    mount: &'a collective_volume::Mount,
    receiving: &'a Receiving,
    platform: &'a Platform,
    state: Vec<u8>,
    /// When it was heard that the guest is being stopped, and how long that was on its way, in microseconds.
    stopped: Option<(Instant, u64)>,
    /// What is kept here of disks and memory.
    keeps: BTreeMap<u16, Disk>,
    hasher: OfferHasher,
    answer: OfferAnswer,
}

impl Taker<'_> {
    /// Takes the machine, and lets it go on.
    async fn take(&mut self, line: &mut Line, tops: Vec<Layer>) -> Result<(), String> {
        let keeps = self.keeps.keys().copied().collect();
        line.say(Word::Ready { keeps }).await.map_err(|e| e.to_string())?;
        loop {
            match line.hear().await? {
                Piece::Content { which, offset, bytes } => {
                    self.disk(which)?.put_received(offset, &bytes).map_err(|e| not_kept(&e))?;
                }
                Piece::Zeros { which, offset, length } => {
                    self.disk(which)?.zero_received(offset, length).map_err(|e| not_kept(&e))?;
                }
                Piece::State(bytes) if self.state.len() + bytes.len() <= MAX_STATE => self.state.extend(bytes),
                Piece::State(_) => return Err("its state is too long".into()),
                Piece::Offer { which, offset, hashes } => self.compare(which, offset, &hashes)?,
                Piece::Word(Word::Offered) => {
                    let answer = self.answer.take();
                    line.send(&Piece::Lacks(answer)).await.map_err(|e| e.to_string())?;
                }
                Piece::Lacks(_) => return Err("the other host answered what nobody asked".into()),
                Piece::Word(Word::Round { number, durable }) => {
                    if durable {
                        self.flush(None).await?;
                    }
                    line.say(Word::Took { number }).await.map_err(|e| e.to_string())?;
                }
                Piece::Word(Word::Stopping { round_trip_us }) => {
                    self.stopped = Some((Instant::now(), round_trip_us / 2));
                }
                Piece::Word(Word::Final { state_bytes, bytes, rounds, kept, .. }) => {
                    if self.state.len() as u64 != state_bytes {
                        return Err("its state came cut short".into());
                    }
                    return self.finish(line, tops, (bytes, rounds, kept)).await;
                }
                Piece::Word(Word::Better { .. } | Word::Measured(_)) => return Err("it stays where it is".into()),
                Piece::Word(word) => return Err(format!("the other host said something out of order: {word:?}")),
            }
        }
    }

    fn disk(&self, which: u16) -> Result<&Arc<Disk>, String> {
        let disk = if which == MEMORY { Some(self.memory) } else { self.disks.get(usize::from(which)) };
        disk.ok_or_else(|| format!("the other host sent content of disk {which}, and there is none"))
    }

    /// Takes those of the offered blocks that are kept here, and notes which are not.
    fn compare(&mut self, which: u16, offset: u64, hashes: &[OfferHash]) -> Result<(), String> {
        let to = self.disk(which)?.clone();
        for (index, hashes) in (0..).zip(hashes.chunks(COMPARED)) {
            let offset = offset.saturating_add(index * COMPARED as u64 * BLOCK);
            let found = self.kept_at(which, offset, hashes.len() * BLOCK as usize);
            let same = |(block, hash): (&[u8], &OfferHash)| self.hasher.hash(block) == *hash;
            let mut same: Vec<bool> = found.chunks(BLOCK as usize).zip(hashes).map(same).collect();
            same.resize(hashes.len(), false);
            same.iter().for_each(|same| self.answer.push(!same));
            let mut at = 0;
            for run in same.chunk_by(|a, b| a == b) {
                let end = at + run.len() * BLOCK as usize;
                if run[0] {
                    let rest = to.size().saturating_sub(offset);
                    let within = end.min(usize::try_from(rest).unwrap_or(usize::MAX)).max(at);
                    to.put_received(offset + at as u64, &found[at..within]).map_err(|e| not_kept(&e))?;
                }
                at = end;
            }
        }
        Ok(())
    }

    /// What is kept at a place, filled up to whole blocks; it may be short.
    fn kept_at(&self, which: u16, offset: u64, length: usize) -> Vec<u8> {
        let read = self.keeps.get(&which).map_or(Ok(None), |kept| kept.try_read(offset, length));
        let read = read.unwrap_or_else(|error| {
            tracing::warn!(%error, "a part of what was kept cannot be read, and is sent again");
            None
        });
        let mut found = read.unwrap_or_default();
        found.resize(found.len().next_multiple_of(BLOCK as usize), 0);
        found
    }

    /// Makes durable what came, and with it the file of the state.
    async fn flush(&self, state: Option<(PathBuf, Vec<u8>)>) -> Result<(), String> {
        let disks = self.disks.iter().chain([self.memory]).cloned().map(|disk| {
            let flush = move || disk.flush();
            Box::new(flush) as Box<dyn FnOnce() -> io::Result<()> + Send>
        });
        let file = state.map(|(path, bytes)| {
            let write = move || save::write_durably(&path, &bytes);
            Box::new(write) as Box<dyn FnOnce() -> io::Result<()> + Send>
        });
        let all: Vec<_> = disks.chain(file).map(tokio::task::spawn_blocking).collect();
        for one in all {
            one.await.map_err(|e| e.to_string())?.map_err(|e| not_kept(&e))?;
        }
        Ok(())
    }

    async fn finish(
        &mut self,
        line: &mut Line,
        tops: Vec<Layer>,
        (bytes, rounds, kept_bytes): (u64, u64, u64),
    ) -> Result<(), String> {
        let begun = Instant::now();
        let encoded = std::mem::take(&mut self.state);
        let digest = Digest::of(&encoded);
        let state = save::decode(&encoded, &self.receiving.epoch, self.platform)?;
        let load = async {
            self.mount.forget_cached().map_err(|e| format!("the kernel does not forget what it read before: {e}"))?;
            self.vm.bring(&state).await.map_err(|e| e.to_string())?;
            Ok::<_, String>(begun.elapsed())
        };
        let keep = async {
            self.flush(Some((self.receiving.state.clone(), encoded))).await?;
            Ok::<_, String>(begun.elapsed())
        };
        let (loaded, kept) = tokio::join!(load, keep);
        let (loaded, kept) = (loaded?, kept?);
        // From here on nothing is in the way of its going on here.
        let memory_bytes = self.memory.own_bytes();
        let all = Word::Kept { digest, memory_bytes, bytes, rounds, kept: kept_bytes };
        line.say(all).await.map_err(|e| e.to_string())?;
        match line.hear().await? {
            Piece::Word(Word::GoOn) => {}
            other => return Err(format!("the daemon said something else than that it is ours: {other:?}")),
        }
        let ours = begun.elapsed();
        for (disk, top) in self.disks.iter().zip(tops) {
            disk.freeze(top).map_err(|e| format!("a disk cannot go on: {e}"))?;
        }
        self.vm.cont().await.map_err(|e| e.to_string())?;
        let since = self.stopped.map_or(0, |(at, way)| at.elapsed().as_micros() as u64 + way);
        tracing::info!(pause_us = since, ?loaded, ?kept, ?ours, runs = ?begun.elapsed(), "the machine goes on here");
        // Whoever hears it only shows it.
        let _ = line.say(Word::Gone { pause_us: since }).await;
        Ok(())
    }
}

fn not_kept(error: &io::Error) -> String {
    format!("what came cannot be kept: {error}")
}

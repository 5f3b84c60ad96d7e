//! The machine goes elsewhere while it runs ([`collective_model::run_live`]): this is the end that has it.
//!
//! Memory and disks are sent in rounds, each with what the guest wrote since the one before; nothing is written here for
//! that. Then it is stopped, and the last round and its devices follow. From the moment at which all was sent it does not go on
//! by itself: the other host may have it, and only the daemon can find out.

mod keep;
mod offer;
mod parts;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use collective_model::kept::{OfferHasher, without};
use collective_model::live::{self, Estimate, FIRST, Next, Sent};
use collective_model::run::{Leave, Platform};
use collective_model::run_live::{MEMORY, Piece, STEP, Word};
use collective_store::BLOCK;
use collective_vmm::{GuestMemory, RunState, Vm};
use collective_volume::Disk;

use crate::line::Line;
use crate::save::{Saver, encode, runs};
use crate::state::Shared;
use parts::{Origin, PART, Part, cut, data};

/// What to send.
#[derive(Debug)]
pub(crate) struct What {
    pub epoch: String,
    /// Numbers of disks that are sent whole.
    pub whole: Vec<u16>,
    pub only_measure: bool,
    /// The layer to create with its memory, once it goes on there.
    pub keep: Option<PathBuf>,
}

/// Why it was not sent.
enum Stays {
    /// In these words it is told to whoever wanted it.
    Told(Word),
    /// It does not work.
    Failed(String),
}

impl From<String> for Stays {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

impl From<io::Error> for Stays {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Sends the machine. What the status says of it afterwards is what holds.
pub(crate) async fn leave(vm: &Vm, shared: &Shared, saver: &mut Saver, what: &What, line: &mut Line) {
    shared.status().leave = Leave::Busy;
    let disks = shared.disks().clone();
    let sent = match saver.lend(vm).await {
        Ok((memory, platform)) => {
            let base = shared.memory().clone();
            let mut sender = Sender {
                vm,
                memory,
                platform,
                disks: &disks,
                base,
                line,
                sent: Vec::new(),
                rounds: 0,
                round_trip: u64::MAX,
                hasher: OfferHasher::of(&what.epoch),
                kept: 0,
            };
            sender.send_all(what).await
        }
        Err(why) => Err(Stays::Failed(why)),
    };
    disks.iter().for_each(|disk| disk.unfollow());
    let Err(stays) = sent else {
        shared.status().leave = Leave::Sent;
        if let Some(path) = &what.keep
            && let Err(why) = keep::keep(vm, &disks, saver, path, line).await
        {
            tracing::info!(why, "nothing is kept of the memory of a machine that left");
        }
        // It may stay all the same; then nothing may be missing in what is saved next.
        let _ = saver.lend(vm).await;
        return;
    };
    if vm.status().await.is_ok_and(|status| status != RunState::Running) {
        let _ = vm.cont().await;
    }
    // Nothing may be missing in what is saved next.
    let _ = saver.lend(vm).await;
    shared.status().leave = Leave::No;
    let word = match stays {
        Stays::Told(word) => word,
        Stays::Failed(why) => Word::Failed { why },
    };
    if let Err(error) = line.say(word).await {
        tracing::info!(%error, "nobody hears that the machine stays");
    }
}

struct Sender<'a> {
    vm: &'a Vm,
    memory: &'a mut GuestMemory,
    platform: &'a Platform,
    disks: &'a [Arc<Disk>],
    /// What the machine went on with here.
    base: Option<Arc<Disk>>,
    line: &'a mut Line,
    /// What was acknowledged.
    sent: Vec<Sent>,
    rounds: u64,
    /// In microseconds.
    round_trip: u64,
    hasher: OfferHasher,
    /// Bytes that were there already.
    kept: u64,
}

impl Sender<'_> {
    async fn send_all(&mut self, what: &What) -> Result<(), Stays> {
        if self.vm.status().await.map_err(|e| e.to_string())? != RunState::Running {
            return Err(Stays::Failed("the machine does not run".into()));
        }
        if let Some(why) = self.memory.untracked() {
            let why = format!("what it writes cannot be followed: {why}");
            return Err(Stays::Told(Word::Better { why }));
        }
        let keeps = match self.line.hear().await? {
            Piece::Word(Word::Ready { keeps }) => keeps,
            other => {
                return Err(Stays::Failed(format!(
                    "the other host said something else than that it is ready: {other:?}"
                )));
            }
        };
        let parts = self.everything(&what.whole)?;
        let parts = self.offer(parts, &keeps).await?;
        let total: u64 = parts.iter().map(|part| part.range.end - part.range.start).sum();
        let groups = cut(parts, FIRST);
        let last = groups.len() - 1;
        for (index, group) in groups.iter().enumerate() {
            self.round(group, false).await?;
            if !live::is_known(&self.sent) && index < last {
                continue;
            }
            let rate = live::rate(&self.sent).unwrap_or(u64::MAX);
            if what.only_measure {
                return Err(Stays::Told(Word::Measured(Estimate::of(total, rate, self.kept))));
            }
            let left = total.saturating_sub(self.sent.iter().map(|sent| sent.bytes).sum());
            live::is_worth_it(left, rate).map_err(|why| Stays::Told(Word::Better { why }))?;
        }
        self.follow_up().await?;
        self.last_round(what).await
    }

    /// Sends what was written meanwhile until little is.
    async fn follow_up(&mut self) -> Result<(), Stays> {
        let mut left = Vec::new();
        loop {
            let parts = self.changed()?;
            for group in cut(parts, PART) {
                self.round(&group, false).await?;
            }
            // Then only little has to be made durable while the guest stands still.
            self.acknowledged(0, Instant::now(), true).await?;
            left.push(self.memory.unsent()? + self.disks.iter().map(|disk| disk.unsent()).sum::<u64>());
            match live::next(&left, self.rate()) {
                Next::Again => {}
                Next::Stop => return Ok(()),
                Next::Suspend(why) => return Err(Stays::Told(Word::Better { why })),
            }
        }
    }

    async fn last_round(&mut self, what: &What) -> Result<(), Stays> {
        self.line.say(Word::Stopping { round_trip_us: self.round_trip }).await?;
        let begun = Instant::now();
        self.vm.pause().await.map_err(|e| e.to_string())?;
        let stopped = begun.elapsed();
        let state = self.vm.save_state().await.map_err(|e| e.to_string())?;
        let saved = begun.elapsed();
        let parts = self.changed()?;
        let last_bytes: u64 = parts.iter().map(|part| part.range.end - part.range.start).sum();
        for part in &parts {
            self.send_part(part).await?;
        }
        let pages = begun.elapsed();
        let state = encode(&state, &what.epoch, self.platform)?;
        for piece in state.chunks(STEP) {
            self.line.send(&Piece::State(piece.to_vec())).await?;
        }
        let bytes = self.sent.iter().map(|sent| sent.bytes).sum::<u64>() + last_bytes;
        let (state_bytes, rounds) = (state.len() as u64, self.rounds);
        self.line.say(Word::Final { state_bytes, bytes, rounds, last_bytes, kept: self.kept }).await?;
        tracing::info!(?stopped, ?saved, ?pages, all = ?begun.elapsed(), bytes, kept = self.kept, rounds, last_bytes, state_bytes, "all of the machine was sent");
        Ok(())
    }

    fn rate(&self) -> u64 {
        // The last ones count, and those that say little are not alone.
        let recent = &self.sent[self.sent.len().saturating_sub(8)..];
        live::rate(recent).or_else(|| live::rate(&self.sent)).unwrap_or(u64::MAX)
    }

    /// All that there is. From here on what is written is noted.
    fn everything(&mut self, whole: &[u16]) -> io::Result<Vec<Part>> {
        let mut parts = Vec::new();
        for (which, disk) in (0u16..).zip(self.disks) {
            disk.follow();
            let end = |blocks: Range<u64>| blocks.start * BLOCK..(blocks.end * BLOCK).min(disk.size());
            let ranges: Vec<Range<u64>> = match whole.contains(&which) {
                true => data(disk),
                false => disk.own_blocks().into_iter().map(end).collect(),
            };
            parts.extend(ranges.into_iter().map(|range| Part { which, range, from: Origin::Disk }));
        }
        let own = self.memory.changed()?;
        if let Some(base) = &self.base {
            let others = without(&data(base), &own);
            parts.extend(others.into_iter().map(|range| Part { which: MEMORY, range, from: Origin::Base }));
        }
        let from = Origin::Memory { first: self.base.is_none() };
        parts.extend(own.into_iter().map(|range| Part { which: MEMORY, range, from }));
        Ok(parts)
    }

    /// What was written since it was last looked at.
    fn changed(&mut self) -> io::Result<Vec<Part>> {
        let from = Origin::Memory { first: false };
        let memory = self.memory.changed()?.into_iter().map(|range| Part { which: MEMORY, range, from });
        let mut parts: Vec<Part> = memory.collect();
        for (which, disk) in (0u16..).zip(self.disks) {
            let end = |blocks: Range<u64>| blocks.start * BLOCK..(blocks.end * BLOCK).min(disk.size());
            parts.extend(disk.written().into_iter().map(|blocks| Part {
                which,
                range: end(blocks),
                from: Origin::Disk,
            }));
        }
        Ok(parts)
    }

    async fn round(&mut self, parts: &[Part], durable: bool) -> Result<(), Stays> {
        let begun = Instant::now();
        for part in parts {
            self.send_part(part).await?;
        }
        let bytes = parts.iter().map(|part| part.range.end - part.range.start).sum();
        self.acknowledged(bytes, begun, durable).await
    }

    /// Waits until all that was sent is there.
    async fn acknowledged(&mut self, bytes: u64, begun: Instant, durable: bool) -> Result<(), Stays> {
        self.rounds += 1;
        let number = self.rounds;
        let asked = Instant::now();
        self.line.say(Word::Round { number, durable }).await?;
        match self.line.hear().await? {
            Piece::Word(Word::Took { number: took }) if took == number => {}
            other => {
                return Err(Stays::Failed(format!(
                    "the other host does not say that it has round {number}: {other:?}"
                )));
            }
        }
        self.round_trip = self.round_trip.min(asked.elapsed().as_micros() as u64);
        if bytes > 0 {
            self.sent.push(Sent { bytes, took_us: begun.elapsed().as_micros() as u64 });
        }
        Ok(())
    }

    async fn send_part(&mut self, part: &Part) -> Result<(), Stays> {
        let Part { which, range, from } = part;
        for start in range.clone().step_by(STEP) {
            let step = start..range.end.min(start + STEP as u64);
            let content = self.read(*which, &step, *from).await?;
            self.send_content(*which, start, content, *from == (Origin::Memory { first: true })).await?;
        }
        Ok(())
    }

    async fn read(&self, which: u16, range: &Range<u64>, from: Origin) -> io::Result<Vec<u8>> {
        let length = (range.end - range.start) as usize;
        match (from, &self.base) {
            (Origin::Memory { .. }, _) => {
                let mut content = vec![0; length];
                self.memory.read(std::slice::from_ref(range), &mut content)?;
                Ok(content)
            }
            (Origin::Base, Some(base)) => base.read(range.start, length).await,
            (Origin::Base, None) => Ok(Vec::new()),
            (Origin::Disk, _) => match self.disks.get(usize::from(which)) {
                Some(disk) => disk.read(range.start, length).await,
                None => Err(io::Error::other("there is no such disk")),
            },
        }
    }

    async fn send_content(
        &mut self,
        which: u16,
        mut offset: u64,
        mut content: Vec<u8>,
        no_zeros: bool,
    ) -> io::Result<()> {
        let length = content.len();
        content.resize(length.next_multiple_of(BLOCK as usize), 0);
        let mut left = length;
        for run in runs(&content, is_zero) {
            let bytes = run.len().min(left);
            left -= bytes;
            if !is_zero(&run[..BLOCK as usize]) {
                self.line.send(&Piece::Content { which, offset, bytes: run[..bytes].to_vec() }).await?;
            } else if !no_zeros {
                self.line.send(&Piece::Zeros { which, offset, length: bytes as u64 }).await?;
            }
            offset += bytes as u64;
        }
        Ok(())
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

//! A runner's death is not its guest's: this daemon holds what keeps the machine going, and gives it to another runner.
//!
//! ```text
//! the machine runs     the runner gives duplicates of its descriptors, hears that we have them, and unties QEMU from itself
//! the runner dies      the guest stands still where it wants something of its disks, its memory or its guard
//! another one          opens the disks as they are by the record, serves on, and lets it go on
//! ```
//! The record says what the disks and the memory are, whatever the dead runner was about: a layer that it made and did not write to
//! is empty, and layers that it merged have the content of those that the record names. Where nobody holds the descriptors, or
//! the machine is not to go on, QEMU is killed: a power cut, as when the host dies.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use collective_keys::OwnerKey;
use collective_model::run::{Phase, Request, RunConfig, RunResume, RunStatus};
use collective_model::run_lifeline::{Orphan, Part};
use collective_model::{Digest, State};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::arriving::NoKey;
use crate::files::{read_json, write_json};
use crate::instance::Instance;
use crate::link::{self, Parts};
use crate::record::layer_path;

/// Runners that die this often,
const MOST: usize = 5;
/// within this time, are not followed by another one.
const WITHIN: Duration = Duration::from_secs(600);
/// How often a runner that takes over is asked how far it is: the guest waits.
pub(crate) const ASK_EVERY: Duration = Duration::from_millis(20);
/// Within this time a runner says that its machine may outlive it, or it cannot.
const SOON: Duration = Duration::from_secs(5);
/// A plane that is away is asked again for a key after this time.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// A runner that refuses so often to give what keeps its machine going is an old one, or cannot.
const MOST_REFUSALS: u32 = 20;

/// What a task holds of its runner; nothing of it outlives the daemon, which asks again.
#[derive(Default)]
pub(crate) struct Holding {
    held: Option<Held>,
    refusals: u32,
    /// When runners died that were followed by another one.
    deaths: VecDeque<Instant>,
    /// Another one takes over since then.
    since: Option<Instant>,
    /// There was no key before.
    again: Option<Instant>,
}

struct Held {
    parts: Parts,
    taken: Instant,
    /// The runner has heard that it is held.
    told: bool,
    /// Open until its runner dies, and that was noticed.
    line: Option<UnixStream>,
    /// What that runner said last.
    status: RunStatus,
}

impl Holding {
    /// Returns when the runner has died; that is seen otherwise too, only later.
    pub async fn death(&mut self) {
        let line = self.held.as_mut().and_then(|held| held.line.as_mut());
        let Some(line) = line else { return std::future::pending().await };
        // It says nothing there.
        while line.readable().await.is_ok() {
            match line.try_read(&mut [0]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                _ => break,
            }
        }
        self.held.iter_mut().for_each(|held| held.line = None);
    }

    /// Whether the runner is certainly dead, with all its threads.
    fn is_over(&mut self) -> bool {
        let Some(held) = self.held.as_mut() else { return true };
        let over = held.line.as_ref().is_none_or(|line| match line.try_read(&mut [0]) {
            Err(error) => error.kind() != std::io::ErrorKind::WouldBlock,
            Ok(_) => true,
        });
        if over {
            held.line = None;
        }
        over
    }

    /// Whether another runner is taking over.
    pub fn is_between(&self) -> bool {
        self.since.is_some()
    }

    /// How long to wait before the runner is asked again.
    pub fn pause(&self, otherwise: Duration) -> Duration {
        let waits = |held: &Held| !held.status.outlives && held.taken.elapsed() < SOON;
        let hurry = self.since.is_some() || self.held.as_ref().is_some_and(waits);
        if hurry { ASK_EVERY } else { otherwise }
    }

    /// Nobody is to go on with the machine.
    fn let_go(&mut self) {
        (self.held, self.since, self.refusals) = (None, None, 0);
    }
}

fn has_ended(process: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&now)) != Ok(0)
}

impl Instance {
    /// Takes hold of what keeps the machine going, once it runs and is ours.
    pub(crate) async fn hold(&mut self, status: &RunStatus) {
        let settled = matches!(self.record.state, State::Running | State::Paused) && self.record.visiting.is_none();
        if status.phase != Phase::Running || !settled {
            return;
        }
        if let Some(held) = self.holding.held.as_mut().filter(|held| held.status.pid == status.pid) {
            held.status = status.clone();
        } else if self.holding.refusals < MOST_REFUSALS {
            match link::lifeline(&self.run_dir).await {
                Ok((parts, line)) => {
                    let (line, taken) = (Some(line), Instant::now());
                    self.holding.held = Some(Held { parts, taken, told: false, line, status: status.clone() });
                }
                Err(error) => {
                    self.holding.refusals += 1;
                    if self.holding.refusals == MOST_REFUSALS {
                        tracing::warn!(%error, instance = %self.record.spec.name, "the guest dies with its runner");
                    }
                    return;
                }
            }
        }
        if let Some(held) = self.holding.held.as_mut().filter(|held| !held.told) {
            // It says in its status whether that worked.
            held.told = link::ask(&self.run_dir, &Request::Hold).await.is_ok();
        }
        if let Some(since) = self.holding.since.take() {
            let ms = since.elapsed().as_millis();
            self.event(
                "taken-over",
                format!("its runner died; another one took over, and the guest went on after {ms} ms"),
            );
        }
    }

    /// The runner has died: starts another one that goes on with the machine. False if that cannot be, or is not to be.
    pub(crate) async fn replace_runner(&mut self) -> bool {
        let goes_on = matches!(self.record.state, State::Running | State::Paused | State::Suspending);
        let Some(held) = &self.holding.held else { return false };
        let process = held.parts.iter().find(|(part, _)| *part == Part::Process).map(|(_, process)| process);
        if !goes_on || !held.status.outlives || process.is_none_or(has_ended) {
            return false;
        }
        self.holding.since.get_or_insert_with(Instant::now);
        if !self.holding.is_over() {
            // Two must not serve the same disks.
            return true;
        }
        if self.holding.again.is_some_and(|again| again > Instant::now()) {
            return true;
        }
        self.holding.deaths.retain(|death| death.elapsed() < WITHIN);
        if self.holding.deaths.len() >= MOST {
            tracing::error!(instance = %self.record.spec.name, "its runners die again and again");
            return false;
        }
        let key = match self.arrival_key().await {
            Err(error) if error.is_away() => {
                // The guest has what is here meanwhile, and waits for what is not.
                self.holding.again = Some(Instant::now() + ASK_AGAIN);
                return true;
            }
            asked => asked,
        };
        self.holding.again = None;
        self.holding.deaths.push_back(Instant::now());
        match self.start_heir(key).await {
            Ok(()) => true,
            Err(why) => {
                tracing::error!(why, instance = %self.record.spec.name, "no other runner takes over");
                false
            }
        }
    }

    async fn start_heir(&mut self, key: Result<Option<OwnerKey>, NoKey>) -> Result<(), String> {
        if self.record.merge.as_ref().is_some_and(|merge| merge.live) {
            // What the dead one merged is merged anew.
            self.end_merge();
        }
        let Some(Held { parts, status, .. }) = &self.holding.held else { return Err("nothing is held of it".into()) };
        let config = self.config_for_heir(status)?;
        let key = key?;
        write_json(&self.run_dir.join("run.json"), &config).map_err(|e| format!("cannot write run.json: {e}"))?;
        let started = link::spawn_heir(&self.context.config.runner, &self.run_dir, parts, key).await;
        let pid = started.map_err(|e| format!("cannot start another runner: {e}"))?;
        tracing::warn!(instance = %self.record.spec.name, pid, "its runner died, and another one takes over");
        self.record.runner_pid = Some(pid);
        self.record.last_error = None;
        self.status = None;
        self.save().map_err(|e| format!("cannot keep its record: {e}"))
    }

    /// The machine as it was started, with what became of its disks and its memory since.
    fn config_for_heir(&self, status: &RunStatus) -> Result<RunConfig, String> {
        let config: Option<RunConfig> = read_json(&self.run_dir.join("run.json")).ok().flatten();
        let mut config = config.ok_or("what the machine is made of is not known any more")?;
        let record = &self.record;
        let paths = |layers: &[u64]| layers.iter().map(|layer| layer_path(&self.folder, *layer)).collect::<Vec<_>>();
        for disk in &mut config.disks {
            let now = record.disks.iter().find(|now| now.name == disk.name);
            let now = now.ok_or_else(|| format!("it has no disk \"{}\" any more", disk.name))?;
            disk.layers = paths(&now.layers);
            // That for a checkpoint that was not begun is not there.
            while disk.layers.len() > 1 && disk.layers.last().is_some_and(|top| !top.exists()) {
                disk.layers.pop();
            }
            disk.create_top = false;
        }
        config.resume = match record.base {
            None => None,
            Some(base) => {
                let last = record.memory.iter().position(|layer| *layer == base);
                let last = last.ok_or("what its memory is made of is not known any more")?;
                let memory = paths(&record.memory[..=last]);
                let (image, epoch, digest) = (record.memory_image.clone(), String::new(), Digest::of(&[]));
                // Only what is shown to QEMU counts: it has the rest.
                let state = self.run_dir.join("run.json");
                Some(RunResume { image, memory, copy: None, create: false, state, digest, epoch })
            }
        };
        config.arriving.clone_from(&record.arriving);
        (config.receiving, config.open_ports) = (None, true);
        config.orphan = Some(Box::new(Orphan { status: status.clone(), sent: record.leaving.is_some() }));
        Ok(config)
    }

    /// Makes sure that there is neither a runner nor a QEMU of this instance any more.
    pub(crate) async fn end_machine(&mut self) {
        if let Some(pid) = self.record.runner_pid.take() {
            link::kill(pid, &self.run_dir.to_string_lossy()).await;
        }
        // One that waits for an answer cannot die before nobody can give it.
        self.holding.let_go();
        if let Some(pid) = self.record.qemu_pid.take() {
            link::kill(pid, &self.record.spec.id.uuid()).await;
        }
    }
}

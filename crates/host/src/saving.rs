//! The instance's machine as data: suspend, resume, checkpoints of a running machine, and going back to them.
//!
//! ```text
//! one write of the record: a new layer for each disk (and one of memory) + journal
//! the runner saves: pages, pause, devices, disks go on in the new layers, pages, everything durable
//! one write of the record: the checkpoint, or the suspended machine; the journal is gone
//! ```
//! Layers are in the record before anybody writes to them, and one that is empty changes nothing. So it does not matter at
//! which step a daemon dies: the next one asks the runner how it went, or finds how it ended, and drops what was not
//! created. An order is given until it was taken or refused: one that is merely late must not find its layers forgotten. A machine that goes on leaves what was saved as it is, and users are let in only after the record says that it
//! runs: what is saved is gone on with once, or again if nobody has seen it run.

use std::path::PathBuf;
use std::time::Duration;

use collective_model::run::{Request, RunConfig, RunResume, SaveOrder, Saved};
use collective_model::{CheckpointId, CheckpointMachine, Name, OperationId, OperationState, State, Trigger};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::instance::Instance;
use crate::link::{self, LinkError};
use crate::record::{MachineRecord, SaveJournal, SuspendedRecord, layer_path, screen_path, state_path};

/// How often the runner is asked how it goes.
const ASK_EVERY: Duration = Duration::from_millis(20);
/// Checkpoints leave room for the layers that starts and updates need (a disk has 255).
const MOST_LAYERS: usize = 240;
/// A machine that is brought back runs within this time, or its host or the link to the store is far too busy.
const RESUME_LIMIT: Duration = Duration::from_secs(900);

/// What to do with a machine that cannot go on.
const WAY_OUT: &str = "`collective stop` gives its memory up and keeps its disks, and `collective start` boots it then";

impl Instance {
    /// Saves the machine and ends it.
    pub(crate) async fn suspend(&mut self, id: &OperationId) -> Result<Value, String> {
        match self.record.state {
            State::Suspended => {}
            State::Running | State::Paused => {
                self.trigger(Trigger::Suspend);
                self.save_machine(id, None).await?;
            }
            state => return Err(format!("only a running machine can be suspended, and it is {state}")),
        }
        // It is durable here; that the store has it as well lets it go on elsewhere.
        let mut result = self.described();
        match self.push(id).await {
            Ok(pushed) => result["store"] = pushed,
            Err(why) => {
                self.event("not-stored", format!("it is suspended, on this host only: {why}"));
                result["not_stored"] = why.into();
            }
        }
        Ok(result)
    }

    fn described(&self) -> Value {
        let machine = self.record.suspended.as_ref().map(|suspended| &suspended.machine.info);
        json!({ "state": self.record.state, "bytes": machine.map(|machine| machine.bytes) })
    }

    /// Has the runner save the machine: as a checkpoint for this reason, or to end it.
    async fn save_machine(&mut self, id: &OperationId, why: Option<String>) -> Result<(), String> {
        self.begin_save(Some(id.clone()), why).await
    }

    /// Keeps the running machine as a checkpoint that the clock wants.
    pub(crate) async fn save_scheduled(&mut self, why: String) -> Result<(), String> {
        self.begin_save(None, Some(why)).await
    }

    /// Without an order it is the clock that wants it.
    async fn begin_save(&mut self, order: Option<OperationId>, why: Option<String>) -> Result<(), String> {
        let ends = why.is_none();
        if !ends && let Some(full) = self.record.disks.iter().find(|disk| disk.layers.len() >= MOST_LAYERS) {
            let name = &full.name;
            return Err(format!(
                "disk \"{name}\" has {MOST_LAYERS} layers, and more are not kept. What lies between checkpoints becomes one \
                 layer by itself, so forget some (`collective checkpoint NAME --forget NUMBER`), and try again in a minute"
            ));
        }
        let number = self.record.reserve_layer();
        let named = match &order {
            Some(id) => id.clone(),
            None => OperationId::from_random(collective_keys::random_id().map_err(|e| e.to_string())?),
        };
        let epoch = format!("{named}-{number}");
        let disks = self.record.disks.clone();
        if !ends {
            self.record.push_layers();
        }
        self.record.save = Some(SaveJournal { operation: order, epoch, number, why, disks });
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.await_save().await
    }

    /// What the runner is to do for the journal. Told again it does nothing more.
    fn order_of(&self, journal: &SaveJournal) -> SaveOrder {
        let tops = self.record.disks.iter().filter_map(|disk| disk.layers.last());
        let tops = tops.map(|layer| layer_path(&self.folder, *layer));
        SaveOrder {
            number: journal.number,
            epoch: journal.epoch.clone(),
            memory: layer_path(&self.folder, journal.number),
            state: state_path(&self.folder, journal.number),
            tops: if journal.why.is_some() { tops.collect() } else { Vec::new() },
            screen: Some(screen_path(&self.folder, journal.number)),
        }
    }

    /// Tells the runner what the journal says, and waits for the outcome.
    async fn await_save(&mut self) -> Result<(), String> {
        let runner = self.record.runner_pid;
        loop {
            let Some(journal) = self.record.save.clone() else { return Ok(()) };
            self.observe().await;
            if self.record.runner_pid.is_some() && self.record.runner_pid != runner {
                return self.not_saved("its runner died meanwhile, and another one took over".into());
            }
            self.publish();
            // Its end, and what that means, was noted just now.
            if self.record.save.is_none() {
                return match self.record.state {
                    State::Suspended => Ok(()),
                    _ => Err(self.record.last_error.clone().unwrap_or_else(|| "its machine ended".into())),
                };
            }
            if self.record.runner_pid.is_none() {
                return self.not_saved("its machine ended meanwhile".into());
            }
            let save = self.status.as_ref().and_then(|status| status.save.clone());
            match save.filter(|save| save.number == journal.number) {
                Some(save) => match save.outcome {
                    None => {
                        let (doing, done) = ("saving memory".to_owned(), save.written);
                        let progress = OperationState::Running { doing, done, total: done };
                        journal.operation.iter().for_each(|id| self.context.tell(id, progress.clone()));
                    }
                    Some(Err(why)) => return self.not_saved(why),
                    Some(Ok(saved)) if journal.why.is_some() => return self.checkpointed(saved),
                    // Its end comes next.
                    Some(Ok(_)) => {}
                },
                // An order that was lost, or was not given before we died, is given again; it may also just be slow to read.
                None => {
                    let order = Request::Save(self.order_of(&journal));
                    if let Err(LinkError::Refused(why)) = link::ask(&self.run_dir, &order).await {
                        return self.not_saved(why);
                    }
                }
            }
            sleep(ASK_EVERY).await;
        }
    }

    /// After a restart of the daemon while the machine was being saved.
    pub(crate) async fn finish_save(&mut self) {
        let Some(journal) = self.record.save.clone() else { return };
        let outcome = match self.await_save().await {
            Ok(()) => OperationState::Done { result: self.described() },
            Err(error) => OperationState::Failed { error },
        };
        match (journal.operation, outcome) {
            (Some(id), outcome) => self.conclude(id, outcome),
            (None, OperationState::Failed { error }) => tracing::warn!(error, "a checkpoint by the clock failed"),
            (None, _) => {}
        }
    }

    fn not_saved(&mut self, why: String) -> Result<(), String> {
        let Some(journal) = self.record.save.take() else { return Err(why) };
        let kept: Vec<u64> = journal.disks.iter().flat_map(|disk| disk.layers.clone()).collect();
        let new = self.record.disks.iter().flat_map(|disk| &disk.layers).filter(|layer| !kept.contains(layer));
        let new: Vec<u64> = new.copied().collect();
        let folder = self.folder.clone();
        self.record.drop_layers(&|layer| layer_path(&folder, layer).exists(), &new);
        if self.record.state == State::Suspending {
            self.trigger(if self.record.runner_pid.is_some() { Trigger::Continue } else { Trigger::Crash });
        }
        self.save_or_log();
        Err(format!("its machine could not be saved: {why}; nothing was lost"))
    }

    fn numbers(&self, saved: &Saved) -> Result<Vec<u64>, String> {
        let number = |path: &PathBuf| path.file_name()?.to_str()?.parse().ok();
        saved.memory.iter().map(number).collect::<Option<_>>().ok_or_else(|| "layers without numbers".into())
    }

    fn machine_of(&self, saved: Saved) -> Result<MachineRecord, String> {
        let config: RunConfig = crate::files::read_json(&self.run_dir.join("run.json"))
            .ok()
            .flatten()
            .ok_or("what the machine is made of is not known any more")?;
        if let Some(why) = &saved.untracked {
            tracing::warn!(why, "the whole memory had to be copied");
        }
        Ok(MachineRecord {
            image: self.record.memory_image.clone(),
            memory: self.numbers(&saved)?,
            digest: saved.digest,
            epoch: self.record.save.as_ref().map(|save| save.epoch.clone()).ok_or("no order is known for it")?,
            memory_mib: config.memory_mib,
            cpus: config.cpus,
            info: CheckpointMachine {
                bytes: saved.memory_bytes + saved.state_bytes,
                pause_us: saved.pause_us,
                platform: saved.platform,
                screen: saved.screen,
            },
        })
    }

    fn checkpointed(&mut self, saved: Saved) -> Result<(), String> {
        let machine = match self.machine_of(saved) {
            Ok(machine) => machine,
            Err(why) => return self.not_saved(why),
        };
        let Some(journal) = self.record.save.take() else { return Err("no order is known for it".into()) };
        let layers = journal.disks.iter().filter_map(|disk| disk.layers.last());
        let own = layers.map(|layer| self.layer_bytes(*layer)).sum::<u64>() + machine.info.bytes;
        let why = journal.why.unwrap_or_default();
        // What comes next is saved over these.
        self.record.memory.clone_from(&machine.memory);
        let scheduled = journal.operation.is_none();
        let id = self.record.keep_machine(why, scheduled, journal.disks, machine, own);
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        tracing::info!(checkpoint = id.0, "checkpoint of a running machine");
        Ok(())
    }

    /// The runner has ended with the machine saved.
    pub(crate) fn suspended(&mut self, saved: Option<Saved>) {
        let machine =
            saved.ok_or_else(|| "its runner did not say where".to_owned()).and_then(|saved| self.machine_of(saved));
        let journal = self.record.save.take();
        let disks = journal.map_or_else(|| self.record.disks.clone(), |journal| journal.disks);
        match machine {
            Ok(machine) => {
                let bytes = collective_model::ByteSize(machine.info.bytes);
                self.record.forget_memory();
                self.record.suspended = Some(SuspendedRecord { machine, disks });
                self.set_state(State::Suspended);
                self.event("suspended", format!("suspended; its memory and devices took {bytes} more"));
            }
            Err(why) => self.give_up(format!("it was suspended, but what was saved cannot be found: {why}")),
        }
    }

    /// Goes on with the saved machine, and waits until it runs.
    pub(crate) async fn go_on(&mut self) -> Result<Value, String> {
        match self.record.state {
            State::Running | State::Paused => return Ok(self.described()),
            State::Suspended => {}
            state => return Err(format!("only what is suspended can be resumed, and it is {state}")),
        }
        self.record.last_error = None;
        self.trigger(Trigger::Resume);
        self.resume().await
    }

    /// From the state `resuming` on.
    async fn resume(&mut self) -> Result<Value, String> {
        self.publish();
        if let Err(why) = self.try_start(false).await {
            self.set_state(State::Suspended);
            return Err(format!("it cannot go on: {why}. It is suspended still; {WAY_OUT}"));
        }
        let begun = Instant::now();
        let mut unwanted = false;
        while self.record.state == State::Resuming && begun.elapsed() < RESUME_LIMIT && !unwanted {
            sleep(ASK_EVERY).await;
            self.observe().await;
            unwanted = self.is_unwanted();
        }
        self.publish();
        match self.record.state {
            State::Running => {}
            State::Resuming => {
                self.clear_leftovers().await;
                self.status = None;
                self.set_state(State::Suspended);
                if unwanted {
                    return Err("it was told otherwise before it ran, and is suspended still".into());
                }
                return Err("its machine did not run in time; it is suspended still".into());
            }
            _ => {
                let why = self.record.last_error.clone().unwrap_or_else(|| "its machine ended".into());
                return Err(format!("{why}. It is {} now; {WAY_OUT}", self.record.state));
            }
        }
        self.let_users_in().await.map_err(|why| format!("it goes on, but {why}"))?;
        self.publish();
        let started = self.status.as_ref().and_then(|status| status.started_in_ms);
        Ok(json!({ "state": self.record.state, "started_in_ms": started }))
    }

    /// Opens the ports of a machine that went on, now that the record says that it runs.
    pub(crate) async fn let_users_in(&mut self) -> Result<(), String> {
        let closed = self.status.as_ref().is_some_and(|status| status.resumed && !status.ports_open);
        if self.record.state != State::Running || !closed {
            return Ok(());
        }
        let opened = link::ask(&self.run_dir, &Request::OpenPorts).await;
        self.status = Some(opened.map_err(|e| format!("its ports cannot be opened: {e}"))?);
        Ok(())
    }

    pub(crate) async fn resume_or_log(&mut self) {
        if let Err(why) = self.go_on().await {
            self.event("not-resumed", why.clone());
            self.record.last_error = Some(why);
            self.save_or_log();
        }
    }

    /// The machine runs: what was saved is not gone on with again.
    pub(crate) fn went_on(&mut self) {
        if let Some(suspended) = self.record.suspended.take() {
            self.record.base = suspended.machine.memory.last().copied();
            self.record.memory = suspended.machine.memory;
            self.record.memory_image = suspended.machine.image;
        }
        // From here on it is more than the store has.
        self.record.stored = None;
        self.trigger(Trigger::Up);
        self.event("resumed", "it goes on where it was".into());
    }

    /// Somebody wants it off: the memory goes, as in a power cut.
    pub(crate) fn discard_suspended(&mut self) {
        self.record.suspended = None;
        let how = "it was suspended, and its memory was given up: a power cut to the guest";
        self.record.last_stop = Some(how.into());
        self.set_state(State::Stopped);
        self.event("stopped", how.into());
    }

    /// What the runner needs to go on.
    pub(crate) fn resume_config(&self, config: &mut RunConfig) -> Result<(), String> {
        let suspended = self.record.suspended.as_ref().ok_or("nothing was saved")?;
        let MachineRecord { image, memory, digest, epoch, memory_mib, cpus, info } = &suspended.machine;
        let last = memory.last().ok_or("it has no memory")?;
        // Settings that were changed meanwhile count at the next boot.
        (config.memory_mib, config.cpus) = (*memory_mib, *cpus);
        config.processor = self.context.config.platform.as_ref().and_then(|here| here.to_go_on(&info.platform));
        let create = self.record.fresh.contains(last);
        config.resume = Some(RunResume {
            image: image.clone(),
            create,
            copy: image.as_ref().filter(|_| create).map(|image| self.context.config.copy_of(&image.root)),
            memory: memory.iter().map(|layer| layer_path(&self.folder, *layer)).collect(),
            state: state_path(&self.folder, *last),
            digest: *digest,
            epoch: epoch.clone(),
        });
        Ok(())
    }

    /// Keeps what the instance is now.
    pub(crate) async fn keep_present(&mut self, id: &OperationId, why: Option<String>) -> Result<Value, String> {
        let why = why.unwrap_or_else(|| "by hand".into());
        if self.record.disks.is_empty() {
            return Err("it was never started, and there is nothing to keep".into());
        }
        match self.record.state {
            State::Running | State::Paused => self.save_machine(id, Some(why)).await?,
            State::Suspended => self.keep_suspended(why)?,
            State::Stopped | State::Failed => {
                self.freeze(why, false);
                self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
            }
            state => return Err(format!("it is {state}; try again when that is over")),
        }
        let kept = self.record.checkpoints.last().map(|checkpoint| checkpoint.info.clone());
        let kept = kept.ok_or("the checkpoint is not there")?;
        self.event("checkpoint", format!("checkpoint {}: {}", kept.id.0, kept.why));
        serde_json::to_value(kept).map_err(|e| e.to_string())
    }

    /// Keeps the suspended machine as a checkpoint as well.
    fn keep_suspended(&mut self, why: String) -> Result<(), String> {
        let SuspendedRecord { machine, disks } = self.record.suspended.clone().ok_or("nothing was saved")?;
        let bytes = machine.info.bytes;
        self.record.keep_machine(why, false, disks, machine, bytes);
        self.save().map_err(|e| format!("cannot keep its record: {e}"))
    }

    /// Puts a checkpoint in place of the present, which is kept.
    pub(crate) async fn go_back(
        &mut self,
        id: &OperationId,
        to: CheckpointId,
        disks_only: bool,
        keep: &[Name],
    ) -> Result<Value, String> {
        let target = self.record.checkpoints.iter().find(|checkpoint| checkpoint.info.id == to).cloned();
        let target =
            target.ok_or_else(|| format!("there is no checkpoint {}; `collective timeline` lists them", to.0))?;
        let known = |name: &Name| target.disks.iter().any(|disk| disk.name == *name);
        if let Some(unknown) = keep.iter().find(|name| !known(name)) {
            return Err(format!("checkpoint {} has no disk \"{unknown}\"", to.0));
        }
        let was_on = matches!(self.record.state, State::Running | State::Paused | State::Starting | State::Suspended);
        let why = format!("before going back to {}", to.0);
        match self.record.state {
            State::Running | State::Paused => {
                self.trigger(Trigger::Suspend);
                self.save_machine(id, None).await?;
                self.keep_suspended(why)?;
            }
            State::Suspended => self.keep_suspended(why)?,
            State::Stopped | State::Failed => _ = self.freeze(why, false),
            state => return Err(format!("it is {state}; try again when that is over")),
        }
        let kept = self.record.checkpoints.last().map(|checkpoint| checkpoint.info.id);
        self.trigger(Trigger::Restore);
        let present = std::mem::replace(&mut self.record.disks, target.disks.clone());
        for disk in self.record.disks.iter_mut().filter(|disk| keep.contains(&disk.name)) {
            if let Some(now) = present.iter().find(|now| now.name == disk.name) {
                *disk = now.clone();
            }
        }
        self.record.version = target.info.version;
        self.record.version_name = Some(target.info.version_name.clone());
        let machine = target.machine.filter(|_| !disks_only);
        self.record.suspended = machine.map(|machine| SuspendedRecord { machine, disks: self.record.disks.clone() });
        let whole = self.record.suspended.is_some();
        let result = json!({
            "to": to, "taken": target.info.taken, "why": target.info.why, "memory": whole, "kept_as_checkpoint": kept,
        });
        // In the same write as the disks: an order that comes again must not throw away what was done since.
        self.record.remember(id.clone(), OperationState::Done { result: result.clone() });
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        let how = if whole { "memory and disks" } else { "disks" };
        let kept = kept.map_or(0, |kept| kept.0);
        self.event("went-back", format!("{how} are as in checkpoint {}; checkpoint {kept} keeps what was", to.0));
        if whole {
            self.trigger(Trigger::Resume);
            self.resume().await.map_err(|why| format!("checkpoint {} is in place, but {why}", to.0))?;
        } else if was_on {
            self.start(true).await;
        } else {
            self.set_state(State::Stopped);
        }
        Ok(result)
    }
}

//! One instance: the task that alone changes its record, starts and stops its runner, and carries out its orders.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use collective_model::run::{Request, RunStatus};
use collective_model::{Generation, Name, Operation, OperationId, OperationKind, OperationState, Spec, State, Trigger};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

use crate::context::{Context, lock};
use crate::files::{create_folder, read_json, write_json};
use crate::holding::Holding;
use crate::link;
use crate::merging::Merging;
use crate::record::Record;
use crate::timeline::Clock;
use crate::tunnel::Dial;

/// How often a runner is asked.
const POLL: Duration = Duration::from_millis(250);
/// A plane that is away is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long a guest may take to shut down.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What the daemon tells an instance.
#[derive(Debug)]
pub(crate) enum Command {
    Spec(Box<Spec>),
    Operate(Operation),
    /// Another host has it since this ownership.
    Moved(Generation),
    /// Take the machine that comes through a tunnel while it runs elsewhere.
    Visit {
        operation: OperationId,
        spec: Box<Spec>,
        tunnel: Dial,
    },
    /// Send a disk through a tunnel that opens once the sender is at work.
    SendDisk {
        disk: Name,
        tunnel: Dial,
    },
}

/// The task's state.
pub(crate) struct Instance {
    pub context: Arc<Context>,
    pub record: Record,
    pub folder: PathBuf,
    pub run_dir: PathBuf,
    pub status: Option<RunStatus>,
    inbox: mpsc::Receiver<Command>,
    /// What came while something else was done.
    waiting: VecDeque<Command>,
    /// In a row.
    pub crashes: u32,
    pub started: Instant,
    /// It is started again then.
    pub retry_at: Option<Instant>,
    pub merging: Merging,
    pub holding: Holding,
    pub clock: Clock,
    pub host_key: std::sync::OnceLock<String>,
    /// A machine is about to come for it.
    pub expects: bool,
    pub gone: bool,
}

/// Where the record of an instance is.
pub(crate) fn record_path(folder: &Path) -> PathBuf {
    folder.join("instance.json")
}

impl Instance {
    /// Takes up the instance in `folder`, or creates it.
    pub fn open(
        context: Arc<Context>,
        folder: PathBuf,
        run_dir: PathBuf,
        new: impl FnOnce() -> Option<Record>,
        inbox: mpsc::Receiver<Command>,
    ) -> std::io::Result<Option<Self>> {
        create_folder(&folder.join("layers"), 0o700)?;
        create_folder(&run_dir, 0o711)?;
        let record = match read_json(&record_path(&folder))? {
            Some(record) => record,
            None => match new() {
                Some(record) => record,
                None => return Ok(None),
            },
        };
        let instance = Self {
            context,
            record,
            folder,
            run_dir,
            status: None,
            inbox,
            waiting: VecDeque::new(),
            crashes: 0,
            started: Instant::now(),
            retry_at: None,
            merging: Merging::default(),
            holding: Holding::default(),
            clock: Clock::default(),
            host_key: std::sync::OnceLock::new(),
            expects: false,
            gone: false,
        };
        instance.save()?;
        Ok(Some(instance))
    }

    /// Lives until the instance is deleted or the daemon ends.
    pub async fn run(mut self) {
        self.resend_events();
        self.wake_up().await;
        self.live().await;
        while self.gone
            && let Some((operation, spec, tunnel)) = self.next_visit()
        {
            // It had hardly gone, and comes back.
            (self.crashes, self.retry_at) = (0, None);
            self.begin_anew(*spec, &operation);
            self.visit(operation, tunnel).await;
            self.live().await;
        }
        // What is sent from here on, the daemon notices.
        self.inbox.close();
        while let Some((_, _, tunnel)) = self.next_visit() {
            tunnel.refuse("what was there before is being cleared away; try again".into()).await;
        }
    }

    async fn live(&mut self) {
        while !self.gone {
            self.publish();
            let pause = self.holding.pause(POLL);
            let command = match self.waiting.pop_front() {
                Some(command) => Some(command),
                None => tokio::select! {
                    command = self.inbox.recv() => match command {
                        Some(command) => Some(command),
                        None => return,
                    },
                    () = sleep(pause) => None,
                    () = self.holding.death() => None,
                },
            };
            self.observe().await;
            match command {
                Some(Command::Spec(spec)) => self.take_spec(*spec).await,
                Some(Command::Operate(operation)) => self.operate(operation).await,
                Some(Command::Moved(generation)) => self.moved_away(generation, None).await,
                Some(Command::Visit { operation, tunnel, .. }) => self.visit(operation, tunnel).await,
                Some(Command::SendDisk { disk, tunnel }) => self.send_disk(&disk, tunnel).await,
                None => {}
            }
            if self.gone {
                break;
            }
            self.restart_if_due().await;
            if let Err(why) = self.let_users_in().await {
                tracing::warn!(why, "the ports of a machine that went on stay closed for now");
            }
            self.checkpoint_if_due().await;
            self.merge_on().await;
        }
    }

    fn next_visit(&mut self) -> Option<(OperationId, Box<Spec>, Dial)> {
        loop {
            // Whatever else was wanted was wanted of what has gone.
            let next = self.waiting.pop_front().or_else(|| self.inbox.try_recv().ok());
            if let Command::Visit { operation, spec, tunnel } = next? {
                return Some((operation, spec, tunnel));
            }
        }
    }

    /// Whether somebody wants what is being resumed to be suspended, off or gone: that is done next.
    pub(crate) fn is_unwanted(&mut self) -> bool {
        while let Ok(command) = self.inbox.try_recv() {
            self.waiting.push_back(command);
        }
        let record = &self.record;
        self.waiting.iter().any(|command| match command {
            Command::Spec(spec) => {
                !spec.on && spec.power_serial > record.power_serial && spec.generation >= record.spec.generation
            }
            Command::Operate(order) => {
                // One that is over comes again if the plane has not heard of it.
                let is_new = record.outcome(&order.id).is_none();
                is_new && matches!(order.kind, OperationKind::Suspend | OperationKind::Delete { .. })
            }
            Command::Moved(_) | Command::Visit { .. } | Command::SendDisk { .. } => false,
        })
    }

    /// After a start of the daemon: adopt the runner, or find out what its death left.
    async fn wake_up(&mut self) {
        self.observe().await;
        if self.record.leaving.is_some() {
            self.finish_leaving().await;
        }
        if self.record.visiting.is_some() && !self.expects {
            self.finish_visit().await;
        }
        if self.gone {
            return;
        }
        if self.record.save.is_some() {
            self.finish_save().await;
        }
        if self.record.update.is_some() {
            self.finish_update().await;
        } else if self.record.state == State::Restoring && self.record.suspended.is_some() {
            // The machine to go on with is in place.
            self.set_state(State::Suspended);
            if self.record.spec.on {
                self.resume_or_log().await;
            }
        } else if self.record.state == State::Moving {
            // The order comes again.
            self.set_state(State::Stopped);
        } else if self.record.state == State::Suspending {
            // It was not begun: the runner goes on, or has ended, which was noticed.
            self.set_state(State::Running);
        } else if self.record.state == State::Resuming && self.record.runner_pid.is_none() {
            self.set_state(State::Suspended);
        } else if self.record.state == State::Updating || self.record.state == State::Restoring {
            // Before the point of no return: nothing has changed, and the order comes again.
            self.set_state(if self.status.is_some() { State::Running } else { State::Stopped });
            if self.status.is_none() && self.record.spec.on {
                self.start(true).await;
            }
        } else if self.record.state == State::Starting && self.record.runner_pid.is_none() && self.retry_at.is_none() {
            self.start(true).await;
        } else if self.record.state == State::Stopping {
            self.stop(STOP_LIMIT).await;
        }
    }

    async fn take_spec(&mut self, spec: Spec) {
        if spec.generation < self.record.spec.generation {
            tracing::warn!(instance = %spec.id, "orders of an older generation are refused");
            return;
        }
        let (on, serial) = (spec.on, spec.power_serial);
        let first = self.record.power_serial == 0;
        if self.record.spec != spec {
            self.record.spec = spec;
            self.save_or_log();
        }
        if serial <= self.record.power_serial || self.record.arrived != self.record.spec.arrival {
            return;
        }
        let origin = self.record.spec.origin.clone().filter(|_| self.record.disks.is_empty());
        let begun = origin.map_or(Ok(()), |origin| self.begin_as(&origin));
        match (on, self.record.state) {
            _ if let Err(why) = &begun => self.give_up(format!("it cannot be copied: {why}")),
            (true, State::Stopped | State::Failed) => {
                if first {
                    self.event("created", format!("created from {}", self.record.spec.appliance));
                }
                self.crashes = 0;
                if self.record.disks.is_empty() {
                    self.start_first().await;
                } else {
                    self.start(true).await;
                }
            }
            (true, State::Suspended) => self.resume_or_log().await,
            (false, State::Suspended) => self.discard_suspended(),
            (false, state) if state.is_live() || state == State::Failed => self.stop(STOP_LIMIT).await,
            _ => {}
        }
        // Last, so that an order interrupted by our death is carried out when it comes again.
        self.record.power_serial = serial;
        self.save_or_log();
    }

    async fn operate(&mut self, operation: Operation) {
        if let Some(outcome) = self.record.outcome(&operation.id) {
            self.context.tell(&operation.id, outcome.clone());
            return;
        }
        let id = operation.id.clone();
        let has_arrived = self.record.arrived == self.record.spec.arrival;
        let result = match operation.kind {
            OperationKind::Receive { backup, cold } => self.receive(&id, &backup, cold).await,
            OperationKind::Delete { data } => self.delete(&id, data).await,
            _ if !has_arrived => Err("it has not arrived on this host yet; move it again, here or elsewhere".into()),
            OperationKind::Update { .. } | OperationKind::Rollback { .. } | OperationKind::Restart
                if self.record.state == State::Suspended =>
            {
                Err("it is suspended; resume it first, or stop it, which gives its memory up".into())
            }
            OperationKind::Plan { to } => self.plan(to).await,
            OperationKind::Update { to } => self.update(&id, to).await,
            OperationKind::Rollback { with_data } => self.roll_back(&id, with_data).await,
            OperationKind::Restart => self.restart().await,
            OperationKind::Trace => self.boot_trace(),
            OperationKind::Describe => self.describe_machine().await,
            OperationKind::Logs { lines } => self.logs(lines),
            OperationKind::Backup => self.back_up(&id).await,
            OperationKind::Restore { backup } => self.restore_backup(&id, &backup).await,
            OperationKind::Suspend => self.suspend(&id).await,
            OperationKind::Push => self.push(&id).await,
            OperationKind::Resume => self.go_on().await,
            OperationKind::Live { only_measure, .. } => self.leave(&id, only_measure).await,
            OperationKind::Checkpoint { why } => self.keep_present(&id, why).await,
            OperationKind::GoBack { to, disks_only, keep } => self.go_back(&id, to, disks_only, &keep).await,
            OperationKind::Screen { checkpoint } => self.screen(checkpoint),
            OperationKind::Forget { checkpoint } => self.forget(checkpoint),
        };
        if self.gone && self.record.leaving.is_some() {
            // Whoever has it tells how it went.
            return;
        }
        let state = match result {
            Ok(result) => OperationState::Done { result },
            Err(error) => OperationState::Failed { error },
        };
        self.conclude(id, state);
    }

    /// The outcome is durable here before the plane hears of it.
    pub(crate) fn conclude(&mut self, id: OperationId, state: OperationState) {
        self.record.remember(id.clone(), state.clone());
        if !self.gone {
            self.save_or_log();
            self.publish();
        }
        self.context.tell(&id, state);
    }

    async fn restart(&mut self) -> Result<serde_json::Value, String> {
        if self.record.state.is_live() {
            self.stop(STOP_LIMIT).await;
        }
        self.crashes = 0;
        self.start(true).await;
        Ok(serde_json::json!({ "stopped": self.record.last_stop }))
    }

    /// Starts the runner. What fails is in `last_error`, and the state says so.
    pub(crate) async fn start(&mut self, open_ports: bool) {
        self.retry_at = None;
        if self.record.state != State::Updating && self.record.state != State::Starting {
            self.trigger(Trigger::Start);
        }
        self.publish();
        if self.record.state == State::Starting && self.awaits_key().await {
            self.retry_at = Some(Instant::now() + ASK_AGAIN);
            return self.publish();
        }
        if let Err(why) = self.try_start(open_ports).await {
            self.give_up(format!("cannot start: {why}"));
        }
    }

    pub(crate) fn give_up(&mut self, why: String) {
        self.event("failed", why.clone());
        self.record.last_error = Some(why);
        self.status = None;
        self.set_state(State::Failed);
    }

    /// Shuts the guest down, cleanly if it can within the limit.
    pub(crate) async fn stop(&mut self, limit: Duration) {
        self.retry_at = None;
        if !matches!(self.record.state, State::Updating | State::Restoring | State::Stopping) {
            self.trigger(Trigger::Stop);
        }
        self.publish();
        let patience = Instant::now() + limit + Duration::from_secs(15);
        let order = Request::Stop { limit_ms: limit.as_millis() as u64 };
        let mut asked = link::ask(&self.run_dir, &order).await;
        // A runner that takes over from one that died does not answer yet.
        while asked.is_err() && self.holding.is_between() && Instant::now() < patience {
            sleep(Duration::from_millis(50)).await;
            asked = link::ask(&self.run_dir, &order).await;
        }
        while asked.is_ok() && self.record.runner_pid.is_some() && Instant::now() < patience {
            self.observe().await;
            self.publish();
            sleep(Duration::from_millis(50)).await;
        }
        if self.record.runner_pid.is_some() {
            // It is still opening disks, or hangs.
            self.clear_leftovers().await;
            self.status = None;
            self.record.last_stop = Some("it did not react; its runner was killed, as a power cut".into());
        }
        if self.record.state == State::Stopping {
            self.set_state(State::Stopped);
        }
        let how = self.record.last_stop.clone().unwrap_or_default();
        self.event("stopped", how);
    }

    async fn delete(&mut self, id: &OperationId, data: bool) -> Result<serde_json::Value, String> {
        if self.record.state.is_live() {
            // What is thrown away need not be shut down with care.
            self.stop(if data { Duration::from_secs(1) } else { STOP_LIMIT }).await;
        }
        self.clear_leftovers().await;
        self.set_state(State::Deleting);
        let failed = |e: std::io::Error| format!("cannot remove it: {e}");
        let has_data = self.record.disks.iter().any(|disk| disk.role == collective_model::DiskRole::Data);
        let mut kept = None;
        if has_data && !data {
            self.bring_rest(Some(id)).await?;
            let home = self.context.config.data.join("kept");
            create_folder(&home, 0o700).map_err(failed)?;
            let home = home.join(format!("{}-{}", self.record.spec.name, &self.record.spec.id.as_str()[..8]));
            std::fs::rename(&self.folder, &home).map_err(failed)?;
            kept = Some(home.display().to_string());
        } else {
            std::fs::remove_dir_all(&self.folder).map_err(failed)?;
        }
        let _ = std::fs::remove_dir_all(&self.run_dir);
        self.forget_left();
        self.forget_here();
        Ok(serde_json::json!({ "kept": kept }))
    }

    /// There is no such instance on this host any more.
    pub(crate) fn forget_here(&mut self) {
        lock(&self.context.outbox.observed).remove(&self.record.spec.id);
        lock(&self.context.used_images).remove(&self.record.spec.id);
        self.gone = true;
    }

    /// Follows the table of transitions; one that is not in it is a mistake of ours.
    pub(crate) fn trigger(&mut self, trigger: Trigger) {
        match self.record.state.after(trigger) {
            Some(state) => self.set_state(state),
            None => tracing::error!(state = %self.record.state, ?trigger, "a transition that cannot be was asked for"),
        }
    }

    pub(crate) fn set_state(&mut self, state: State) {
        if self.record.state != state {
            tracing::info!(instance = %self.record.spec.name, from = %self.record.state, to = %state, "state");
            self.record.state = state;
        }
        self.save_or_log();
        self.publish();
    }

    pub(crate) fn save(&self) -> std::io::Result<()> {
        write_json(&record_path(&self.folder), &self.record)
    }

    pub(crate) fn save_or_log(&self) {
        if let Err(error) = self.save() {
            tracing::error!(%error, instance = %self.record.spec.name, "the instance's record cannot be kept");
        }
    }
}

//! What an instance sees of its runner: how the machine is, that it ended, and what that means.

use std::time::Duration;

use collective_model::run::{EndKind, Phase, Request, RunEnd, RunStatus};
use collective_model::{State, Trigger};
use tokio::time::Instant;

use crate::instance::Instance;
use crate::link;

/// A guest that crashes this often in a row is given up.
const MAX_CRASHES: u32 = 5;
/// A guest that ran this long before it crashed starts counting anew.
const STEADY: Duration = Duration::from_secs(600);

impl Instance {
    /// Asks the runner how it is, and notices its end.
    pub(crate) async fn observe(&mut self) {
        if self.record.runner_pid.is_none() {
            self.status = None;
            return;
        }
        match link::ask(&self.run_dir, &Request::Status).await {
            Ok(status) => {
                self.note_status(status.clone());
                self.hold(&status).await;
            }
            Err(link::LinkError::Refused(why)) => tracing::warn!(why, "the runner refuses to tell its status"),
            Err(link::LinkError::Silent(_)) => {
                let alive =
                    self.record.runner_pid.is_some_and(|pid| link::is_alive(pid, &self.run_dir.to_string_lossy()));
                if alive {
                    return;
                }
                let end = link::end(&self.run_dir);
                if end.is_none() && self.replace_runner().await {
                    return;
                }
                let died = || RunEnd::now(EndKind::Crashed, "the runner or the host died: a power cut to the guest");
                self.ended(end.unwrap_or_else(died)).await;
            }
        }
    }

    fn note_status(&mut self, status: RunStatus) {
        self.note_arrival(&status);
        if status.qemu_pid.is_some() && self.record.qemu_pid != status.qemu_pid {
            self.record.qemu_pid = status.qemu_pid;
            // The machine exists, so its disks do.
            self.record.fresh.clear();
            self.save_or_log();
        }
        let state = self.record.state;
        match (state, status.phase, &status.paused) {
            (State::Resuming, Phase::Running, _) => self.went_on(),
            (State::Starting, Phase::Running, None) => {
                self.trigger(Trigger::Up);
                let how = status.accelerator.clone().unwrap_or_default();
                self.event("started", format!("started with {how}"));
            }
            (State::Running, Phase::Running, Some(why)) => {
                self.trigger(Trigger::Pause);
                self.event("paused", why.clone());
            }
            (State::Paused, Phase::Running, None) => {
                self.trigger(Trigger::Continue);
                self.event("continued", "the guest goes on".into());
            }
            _ => {}
        }
        self.status = Some(status);
    }

    /// The runner is gone.
    async fn ended(&mut self, mut end: RunEnd) {
        if self.holding.is_between() && end.kind == EndKind::NotStarted {
            end = RunEnd { kind: EndKind::Crashed, message: format!("its runner died, and {}", end.message), ..end };
        }
        self.end_machine().await;
        self.status = None;
        self.record.last_stop = Some(end.message.clone());
        let state = self.record.state;
        if matches!(state, State::Updating | State::Restoring | State::Stopping) {
            // Whoever does this waits for the end and knows what it means.
            if end.kind == EndKind::NotStarted {
                self.record.last_error = Some(end.message);
            }
            if state == State::Stopping {
                self.set_state(State::Stopped);
            }
            self.save_or_log();
            return;
        }
        match end.kind {
            EndKind::Clean | EndKind::Forced if self.record.spec.on => {
                self.trigger(Trigger::Crash);
                self.event("stopped", format!("{}; nobody asked for it here, so it starts again", end.message));
                self.retry_at = Some(Instant::now());
            }
            EndKind::Clean | EndKind::Forced | EndKind::GuestOff => {
                self.set_state(State::Stopped);
                self.event("stopped", end.message);
            }
            EndKind::NotStarted | EndKind::Crashed if state == State::Resuming => {
                // What was saved is as it was.
                self.record.last_error = Some(format!("it could not go on: {}", end.message));
                self.set_state(State::Suspended);
            }
            EndKind::NotStarted => self.give_up(format!("cannot start: {}", end.message)),
            EndKind::Crashed => self.crashed(end.message),
            EndKind::Suspended => self.suspended(end.saved),
        }
    }

    fn crashed(&mut self, message: String) {
        if self.started.elapsed() > STEADY {
            self.crashes = 0;
        }
        self.crashes += 1;
        if self.crashes > MAX_CRASHES {
            self.event("crashed", message.clone());
            self.give_up(format!(
                "it crashed {} times in a row and is not started again by itself: {message}",
                self.crashes
            ));
            return;
        }
        self.record.last_error = Some(message.clone());
        // The state first: who reads of the crash must not see a machine that still runs.
        self.trigger(Trigger::Crash);
        self.event("crashed", message);
        let pause = Duration::from_secs(1 << (self.crashes - 1));
        self.retry_at = Some(Instant::now() + pause);
    }

    /// Starts it again after a crash, when the pause is over.
    pub(crate) async fn restart_if_due(&mut self) {
        if self.retry_at.is_some_and(|at| at <= Instant::now()) && self.record.state == State::Starting {
            self.start(true).await;
        }
    }
}

//! A machine that runs: waits for what happens to it and for what the daemon wants, until QEMU has ended.

use std::time::Duration;

use collective_model::run::{EndKind, Leave, Phase, RunEnd, SaveStatus, Saved};
use collective_vmm as vmm;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::machine::{Running, read_singly};
use crate::state::{Order, Shared};
use crate::{leave, lifeline, probe, save};

/// A guest that was paused because the host's disk was full is tried again after this time.
const RETRY_PAUSED: Duration = Duration::from_secs(5);
/// How often the log of the serial line is looked at. A guest under emulation wrote 0.4 MB a second to it.
const TIDY_EVERY: Duration = Duration::from_secs(10);
/// Some guests miss the first press of the power button while they boot.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// A guest whose processor waits for a page over the network stands still as a whole, and its clocks with it: otherwise all
/// that was due meanwhile would be done at once, and touch more pages that are not here. QEMU stops its clocks at once, and
/// its processors when the page has come.
async fn stand_still(vm: &vmm::Vm) {
    let stood = match vm.pause().await {
        Ok(()) => vm.cont().await,
        failed => failed,
    };
    if let Err(error) = stood {
        tracing::warn!(%error, "the guest's clocks run on while it waits for its memory");
    }
}

/// Waits for what was begun, if it was; it is gone then. What is dropped before is still to be waited for.
async fn end_of<F: Future<Output = ()> + Unpin>(begun: &mut Option<F>) {
    if let Some(future) = begun {
        future.await;
        *begun = None;
    }
}

/// From here on the machine may outlive us.
async fn hold(vm: &vmm::Vm, shared: &Shared) {
    let is_tied = !shared.status().outlives;
    if is_tied {
        match vm.untie().await {
            Ok(()) => shared.status().outlives = true,
            Err(error) => tracing::warn!(%error, "the machine dies with this process"),
        }
    }
}

/// Makes one more port reachable.
async fn forward_port(vm: &vmm::Vm, shared: &Shared, port: u16) -> Result<(), String> {
    // Two may have asked for the same one.
    if !shared.status().forwards.iter().any(|(guest, _)| *guest == port) {
        let at = vm.forward(0, port).await.map_err(|e| format!("cannot reach the guest's port {port}: {e}"))?;
        shared.status().forwards.push((port, at));
    }
    Ok(())
}

impl Running {
    pub(crate) async fn see_to_its_end(mut self, mut inbox: mpsc::Receiver<Order>) -> RunEnd {
        let config = &self.shared.config;
        let health = config.health.clone().and_then(|check| {
            let status = self.shared.status();
            let (_, at) = *status.forwards.iter().find(|(port, _)| *port == check.http.port)?;
            Some((check, at))
        });
        if !config.rehearsal {
            match lifeline::parts(&self.mount, &self.vm) {
                Ok(parts) => *self.shared.lifeline() = parts,
                Err(error) => tracing::warn!(%error, "the machine dies with this process"),
            }
        }
        let prober = health.map(|(check, at)| tokio::spawn(probe::watch(self.shared.clone(), check, at)));
        let (kind, message, saved) = self.watch(&mut inbox).await;
        if let Some(prober) = prober {
            prober.abort();
        }
        self.shared.status().phase = Phase::Ended;
        self.shared.lifeline().clear();
        RunEnd { saved, ..self.close(kind, message) }
    }

    /// Waits for events and orders until QEMU has ended.
    async fn watch(&mut self, inbox: &mut mpsc::Receiver<Order>) -> (EndKind, String, Option<Saved>) {
        let Self { vm, events, shared, saver, .. } = self;
        let mut suspended = None;
        // Its end would say that we have given up.
        let mut sent_over = None;
        let mut asked = false;
        let mut forced = false;
        let mut deadline: Option<Instant> = None;
        let mut press: Option<Instant> = None;
        let mut retry: Option<Instant> = None;
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
        let mut tidy = tokio::time::interval(TIDY_EVERY);
        let never = || Instant::now() + Duration::from_secs(86_400);
        let exit = vm.wait();
        tokio::pin!(exit);
        let mut still = None;
        let exit = loop {
            tokio::select! {
                exit = &mut exit => break exit,
                _ = tidy.tick() => if let Err(error) = vm.trim_serial_log() {
                    tracing::warn!(%error, "the log of the serial line cannot be kept short");
                },
                Some(event) = events.recv() => retry = note(shared, event, retry),
                () = shared.memory_waits.notified(), if still.is_none() && sent_over.is_none() && shared.arrival.is_some() => {
                    still = Some(Box::pin(stand_still(vm)));
                }
                () = end_of(&mut still), if still.is_some() => {}
                Some(order) = inbox.recv() => {
                    if !matches!(order, Order::PowerOff) {
                        end_of(&mut still).await;
                    }
                    match order {
                        Order::Stop { limit_ms } => {
                            asked = true;
                            press = Some(Instant::now());
                            deadline.get_or_insert(Instant::now() + Duration::from_millis(limit_ms));
                        }
                        Order::PowerOff => {
                            asked = true;
                            deadline = Some(Instant::now());
                        }
                        Order::ReadOn => {
                            read_singly(vm, false).await;
                            if shared.arrival.is_some() {
                                save::tell_guest(vm).await;
                            }
                        }
                        Order::Leave { what, mut line } => {
                            let mut later = Vec::new();
                            let mut leaving = Box::pin(leave::leave(vm, shared, saver, &what, &mut line));
                            loop {
                                tokio::select! {
                                    () = &mut leaving => break,
                                    Some(event) = events.recv() => retry = note(shared, event, retry),
                                    Some(order) = inbox.recv() => match order {
                                        Order::Forward { port, done } => _ = done.send(forward_port(vm, shared, port).await),
                                        other => later.push(other),
                                    },
                                }
                            }
                            drop(leaving);
                            // Only if it was sent: one that stays is nobody else's.
                            let leave = shared.status().leave;
                            sent_over = (leave == Leave::Sent).then_some(line);
                            for order in later {
                                // They fit: the channel had them.
                                let _ = shared.orders.try_send(order);
                            }
                        }
                        Order::Arrive { .. } => tracing::warn!("a machine came where there is one"),
                        Order::Stay => {
                            drop(sent_over.take());
                            shared.status().leave = Leave::No;
                            let _ = vm.cont().await;
                        }
                        Order::Hold => hold(vm, shared).await,
                        Order::Merged { layers, target, done } => _ = done.send(saver.replace(&layers, &target)),
                        Order::Forward { port, done } => _ = done.send(forward_port(vm, shared, port).await),
                        Order::Save(order) => {
                            let outcome = saver.save(vm, shared, &order).await;
                            if let (Ok(saved), true) = (&outcome, order.ends()) {
                                suspended = Some(saved.clone());
                                vm.kill().await;
                            }
                            shared.status().save =
                                Some(SaveStatus { number: order.number, written: 0, outcome: Some(outcome) });
                        }
                    }
                }
                // The host shuts down.
                Some(()) = async { match &mut terminate { Some(signal) => signal.recv().await, None => None } } => {
                    asked = true;
                    press = Some(Instant::now());
                    deadline.get_or_insert(Instant::now() + Duration::from_secs(60));
                }
                () = sleep_until(deadline.unwrap_or_else(never)), if deadline.is_some() => {
                    (forced, deadline, press) = (true, None, None);
                    vm.kill().await;
                }
                () = sleep_until(press.unwrap_or_else(never)), if press.is_some() => {
                    press = Some(Instant::now() + PRESS_AGAIN);
                    end_of(&mut still).await;
                    // A paused guest cannot react. One that another host may have does not go on.
                    go_on(vm, shared).await;
                    if let Err(error) = vm.power_button().await {
                        tracing::warn!(%error, "the power button does not work");
                    }
                }
                () = sleep_until(retry.unwrap_or_else(never)), if retry.is_some() => {
                    retry = None;
                    end_of(&mut still).await;
                    go_on(vm, shared).await;
                }
            }
        };
        let (kind, message) = match exit.reason {
            _ if suspended.is_some() => (EndKind::Suspended, "it is suspended".into()),
            _ if forced => (EndKind::Forced, "it did not shut down within the limit; the power was cut".into()),
            vmm::ExitReason::GuestShutdown if asked => (EndKind::Clean, "it shut itself down".into()),
            vmm::ExitReason::GuestShutdown => (EndKind::GuestOff, "the guest powered itself off".into()),
            vmm::ExitReason::Killed => (EndKind::Crashed, "QEMU was told to end by somebody else".into()),
            vmm::ExitReason::Crashed { stderr_tail } => {
                let how = match (exit.code, exit.signal) {
                    (_, Some(signal)) => format!("QEMU was killed by signal {signal}"),
                    (Some(code), _) => format!("QEMU ended with code {code}"),
                    // The child of a runner that died.
                    (None, None) => "QEMU ended, and nobody saw how".into(),
                };
                let tail = stderr_tail.trim();
                (EndKind::Crashed, if tail.is_empty() { how } else { format!("{how}; it said: {tail}") })
            }
        };
        (kind, message, suspended)
    }

    /// Makes what the guest wrote durable and takes the disks away.
    fn close(self, kind: EndKind, mut message: String) -> RunEnd {
        for disk in self.shared.disks().iter() {
            if let Err(error) = disk.flush() {
                message = format!("{message}; the last writes could not be made durable: {error}");
            }
        }
        drop(self.vm);
        if let Err(error) = self.mount.unmount() {
            tracing::warn!(%error, "the disks cannot be unmounted");
        }
        let _ = std::fs::remove_file(self.layout.socket());
        RunEnd::now(kind, message)
    }
}

async fn go_on(vm: &vmm::Vm, shared: &Shared) {
    let leave = shared.status().leave;
    if leave == Leave::No {
        let _ = vm.cont().await;
    }
}

fn note(shared: &Shared, event: vmm::Event, retry: Option<Instant>) -> Option<Instant> {
    match event {
        vmm::Event::BlockError { device, nospace, reason, .. } => {
            let (what, hint) = match nospace {
                true => ("the host's disk is full", "free space, and the guest goes on by itself"),
                false => ("a disk request failed", "it is tried again every few seconds; the runner's log says more"),
            };
            shared.status().paused = Some(format!("{what} ({device}: {reason}); {hint}"));
            Some(Instant::now() + RETRY_PAUSED)
        }
        vmm::Event::Resumed => {
            shared.status().paused = None;
            retry
        }
        vmm::Event::Panicked => {
            tracing::warn!("the guest's kernel panicked");
            retry
        }
        _ => retry,
    }
}

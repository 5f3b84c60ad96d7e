//! Changing the version of an instance: the plan, the update with its gate, the way back.
//!
//! ```text
//! fetch and pin all frames of the new version   the guest runs
//! stop the guest                                ports close
//! one write of the record: checkpoint + new system disks + journal      <- point of no return
//! start with closed ports, wait for the health check
//!   healthy in time: open the ports, drop the journal
//!   otherwise:       stop, one write: keep the failed side as a checkpoint, old disks back, drop the journal; start
//! ```
//! A crash before the write leaves the old version, and the plane's order comes again. A crash after it finds the
//! journal at the next start, and the gate is held then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use collective_api::{Plan, UpdateResult};
use collective_model::run::{Phase, Request, RunImage};
use collective_model::{
    Digest, DiskRole, HealthState, Manifest, OperationId, OperationState, State, StoredImage, Timestamp, Trigger,
    VersionName,
};
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use serde_json::Value;
use tokio::time::{Instant, sleep};

use crate::context::lock;
use crate::instance::{Instance, STOP_LIMIT};
use crate::link;
use crate::record::{CheckpointRecord, UpdateJournal};

/// A version without a health check is taken for good when its machine has run this long.
const GATE_WITHOUT_CHECK: Duration = Duration::from_secs(5);
/// A broken version is not given long to shut down.
const STOP_BROKEN: Duration = Duration::from_secs(10);
/// The machine itself must exist this soon, apart from a store that is away.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How often progress is told, in bytes.
const TELL_EVERY: u64 = 1 << 20;

/// What a version needs that this host may not have.
struct Needs {
    manifest: Manifest,
    frames: FrameStore,
    /// Data frames of system disks (and of data disks that the instance does not have yet).
    digests: Vec<Digest>,
    system_bytes: u64,
    lack: collective_store::fetch::Lack,
}

impl Instance {
    async fn needs(&self, to: Digest) -> Result<Needs, String> {
        let manifest = self.manifest(&to).await?;
        let frames = self.context.frames(&[]).await;
        frames.add_version(&manifest.appliance, &to).await;
        let mut digests = Vec::new();
        let mut system_bytes = 0;
        for disk in &manifest.disks {
            let has = self.record.disks.iter().any(|own| own.name == disk.name && own.role == DiskRole::Data);
            let Some(image) = disk.image.filter(|_| disk.role != DiskRole::Data || !has) else { continue };
            let map = ImageMap::load(&frames, image).await.map_err(|e| e.to_string())?;
            digests.extend(map.frames());
            system_bytes += if disk.role == DiskRole::System { map.used_bytes() } else { 0 };
        }
        let lack = frames.lack(&digests).await.map_err(|e| e.to_string())?;
        Ok(Needs { manifest, frames, digests, system_bytes, lack })
    }

    fn version_name(&self) -> VersionName {
        self.record.version_name()
    }

    /// What an update would fetch, exactly.
    pub(crate) async fn plan(&self, to: Digest) -> Result<Value, String> {
        let needs = self.needs(to).await.map_err(|e| format!("cannot plan the update: {e}"))?;
        let own = self.status.as_ref().map(|status| status.own_bytes.clone()).unwrap_or_default();
        let disks = self.record.disks.iter().enumerate().filter(|(_, disk)| disk.role == DiskRole::System);
        let left = disks.map(|(index, disk)| {
            let at_rest = || disk.layers.iter().map(|layer| self.layer_bytes(*layer)).sum();
            own.get(index).copied().unwrap_or_else(at_rest)
        });
        let changes = to != self.record.version;
        let plan = Plan {
            from: self.version_name(),
            to: needs.manifest.version,
            to_digest: to,
            bytes_to_fetch: needs.lack.bytes,
            frames_to_fetch: needs.lack.frames,
            index_bytes: needs.frames.counters.index_fetched.load(Ordering::Relaxed),
            bytes_total: needs.system_bytes,
            own_system_bytes_left_behind: if changes { left.sum() } else { 0 },
            restart_required: changes,
            checkpoint_before: changes,
        };
        serde_json::to_value(plan).map_err(|e| e.to_string())
    }

    /// Updates, and comes back by itself if the new version does not prove itself.
    pub(crate) async fn update(&mut self, id: &OperationId, to: Digest) -> Result<Value, String> {
        let from = self.version_name();
        if self.record.disks.is_empty() {
            return Err("it has never been started; start it first".into());
        }
        self.bring_rest(Some(id)).await?;
        let needs = self.needs(to).await.map_err(|e| format!("cannot update: {e}"))?;
        let target = needs.manifest.version.clone();
        if to == self.record.version {
            let result = UpdateResult { updated: true, from, to: target, bytes_fetched: 0, closed_ms: 0, why: None };
            return serde_json::to_value(result).map_err(|e| e.to_string());
        }
        self.pin_images(&needs.manifest, to);
        let bytes_fetched = self.fetch(id, &needs).await?;
        self.event("updating", format!("updating from {from} to {target}, {bytes_fetched} bytes fetched"));
        self.trigger(Trigger::Update);
        let closed = Timestamp::now();
        if self.record.runner_pid.is_some() {
            self.stop(STOP_LIMIT).await;
        }
        let before = self.freeze(format!("before update to {target}"), true);
        self.record.adopt_version(&needs.manifest, to);
        let journal = UpdateJournal { operation: id.clone(), before, bytes_fetched, closed };
        self.record.update = Some(journal.clone());
        self.save().map_err(|e| format!("cannot record the update, so it was not begun: {e}"))?;
        let result = self.gate(&journal).await?;
        serde_json::to_value(result).map_err(|e| e.to_string())
    }

    /// Keeps the cache from dropping what is about to be fetched.
    fn pin_images(&self, manifest: &Manifest, version: Digest) {
        let image = |disk: StoredImage| RunImage {
            root: disk.image,
            appliance: manifest.appliance.clone(),
            version,
            boot: None,
        };
        let mut used = lock(&self.context.used_images);
        let mine = used.entry(self.record.spec.id.clone()).or_default();
        mine.extend(manifest.disk_images().map(image));
    }

    /// Fetches everything that the version lacks here and makes it durable, while the guest goes on.
    async fn fetch(&self, id: &OperationId, needs: &Needs) -> Result<u64, String> {
        let (done, told) = (AtomicU64::new(0), AtomicU64::new(0));
        let total = needs.lack.bytes;
        let tell = |done: u64| {
            let doing = format!("fetching version {}", needs.manifest.version);
            self.context.tell(id, OperationState::Running { doing, done, total });
        };
        tell(0);
        let progress = |bytes: u64| {
            let now = done.fetch_add(bytes, Ordering::Relaxed) + bytes;
            if now - told.load(Ordering::Relaxed) >= TELL_EVERY {
                told.store(now, Ordering::Relaxed);
                tell(now);
            }
        };
        let fetched = needs.frames.prefetch(&needs.digests, &progress).await;
        let fetched = fetched
            .map_err(|e| format!("cannot fetch version {}: {e}; nothing was changed", needs.manifest.version))?;
        self.context
            .cache
            .sync()
            .map_err(|e| format!("cannot make the fetched frames durable: {e}; nothing was changed"))?;
        tell(total);
        Ok(fetched)
    }

    pub(crate) fn freeze(&mut self, why: String, before_update: bool) -> collective_model::CheckpointId {
        let sizes: std::collections::HashMap<u64, u64> =
            self.record.held_layers().into_iter().map(|layer| (layer, self.layer_bytes(layer))).collect();
        self.record.checkpoint(why, before_update, &|layer| sizes.get(&layer).copied().unwrap_or(0))
    }

    /// After a restart of the daemon in the middle of an update: hold the gate, and answer the order.
    pub(crate) async fn finish_update(&mut self) {
        let Some(journal) = self.record.update.clone() else { return };
        self.event("resumed-update", "the host was interrupted in the middle of an update and goes on with it".into());
        if self.record.state != State::Updating {
            self.set_state(State::Updating);
        }
        let result =
            self.gate(&journal).await.and_then(|result| serde_json::to_value(result).map_err(|e| e.to_string()));
        let state = match result {
            Ok(result) => OperationState::Done { result },
            Err(error) => OperationState::Failed { error },
        };
        self.conclude(journal.operation, state);
    }

    /// Starts the new version with closed ports and decides by its health. The error: the record is damaged.
    async fn gate(&mut self, journal: &UpdateJournal) -> Result<UpdateResult, String> {
        let before = self.record.checkpoints.iter().find(|checkpoint| checkpoint.info.id == journal.before).cloned();
        let Some(before) = before else {
            // Never dropped by us, but the record is a file: without the way back the new version is not tried.
            let why = format!("its record names checkpoint {} to come back to, and has none such", journal.before.0);
            self.give_up(format!("an update cannot be finished: {why}; restore the record from a backup"));
            return Err(why);
        };
        let (from, to) = (before.info.version_name.clone(), self.version_name());
        let mut result = UpdateResult {
            updated: true,
            from: from.clone(),
            to: to.clone(),
            bytes_fetched: journal.bytes_fetched,
            closed_ms: 0,
            why: None,
        };
        if self.record.runner_pid.is_none() {
            self.start(false).await;
        }
        match self.prove().await {
            Ok(()) => {
                self.record.update = None;
                self.trigger(Trigger::Up);
                self.event("updated", format!("updated from {from} to {to}"));
            }
            Err(why) => {
                self.come_back(&before, &to, &why).await;
                result.updated = false;
                result.why = Some(why);
            }
        }
        result.closed_ms = Timestamp::now().since_ms(journal.closed);
        if !self.record.spec.on {
            self.stop(STOP_LIMIT).await;
        }
        Ok(result)
    }

    /// Waits until the new version has proved itself, and lets users in. The error says why it has not.
    async fn prove(&mut self) -> Result<(), String> {
        let begun = Instant::now();
        loop {
            if self.record.state == State::Failed {
                // The way back begins from a machine that does not run.
                self.set_state(State::Updating);
                return Err(self.record.last_error.clone().unwrap_or_else(|| "it did not start".into()));
            }
            if self.record.runner_pid.is_none() {
                let how = self.record.last_error.take().or(self.record.last_stop.clone()).unwrap_or_default();
                return Err(format!("its machine ended: {how}"));
            }
            if let Some(status) = &self.status {
                let running = status.phase == Phase::Running;
                let probe = status.probe_output.clone().unwrap_or_else(|| "no probe was answered".into());
                match status.health {
                    HealthState::Healthy => break,
                    HealthState::Unhealthy => {
                        return Err(format!("it did not become healthy within its limit: {probe}"));
                    }
                    HealthState::Unknown if running && begun.elapsed() > GATE_WITHOUT_CHECK => break,
                    _ if !running && status.waiting.is_none() && begun.elapsed() > START_LIMIT => {
                        return Err("its machine did not start in time".into());
                    }
                    _ => {}
                }
            }
            sleep(Duration::from_millis(100)).await;
            self.observe().await;
            self.publish();
        }
        match link::ask(&self.run_dir, &Request::OpenPorts).await {
            Ok(status) => {
                self.status = Some(status);
                Ok(())
            }
            Err(error) => Err(format!("its ports cannot be opened: {error}")),
        }
    }

    /// The version failed: what it left is kept to be looked at, and the state before the update is put back.
    async fn come_back(&mut self, before: &CheckpointRecord, failed: &VersionName, why: &str) {
        if self.record.runner_pid.is_some() {
            self.stop(STOP_BROKEN).await;
        }
        self.freeze(format!("failed update to {failed}"), false);
        self.record.restore(before, true);
        self.record.checkpoints.retain(|checkpoint| checkpoint.info.id != before.info.id);
        self.record.update = None;
        let from = &before.info.version_name;
        self.event("update-failed", format!("the update to {failed} failed and {from} is back, data as before: {why}"));
        let error = format!("the update to {failed} failed: {why}");
        self.set_state(State::Stopped);
        self.start(true).await;
        // Starting clears it, and this is what the user should see.
        self.record.last_error.get_or_insert(error);
        self.wait_until_up().await;
    }

    async fn wait_until_up(&mut self) {
        let begun = Instant::now();
        while self.record.state == State::Starting && begun.elapsed() < START_LIMIT {
            sleep(Duration::from_millis(100)).await;
            self.observe().await;
            self.publish();
        }
    }

    /// Goes back to the state before the last update.
    pub(crate) async fn roll_back(&mut self, id: &OperationId, with_data: bool) -> Result<Value, String> {
        let target = self.record.rollback_target(with_data).cloned();
        let target = target.ok_or("there is nothing to go back to: no update was made, or it went back already")?;
        let (from, to) = (self.version_name(), target.info.version_name.clone());
        let from_digest = self.record.version;
        self.trigger(Trigger::Restore);
        if self.record.runner_pid.is_some() {
            self.stop(STOP_LIMIT).await;
        }
        let kept = self.freeze(format!("before rollback to {to}"), false);
        self.record.restore(&target, with_data);
        let what = if with_data { "system and data" } else { "the system; data stays as it is" };
        self.event(
            "rolled-back",
            format!("went back from {from} to {to}: {what}; checkpoint {} keeps what was", kept.0),
        );
        let result = serde_json::json!({
            "from": from, "from_digest": from_digest, "to": to, "with_data": with_data, "kept_as_checkpoint": kept,
        });
        // In the same write as the disks: an order that comes again must not go back further.
        self.record.remember(id.clone(), OperationState::Done { result: result.clone() });
        self.set_state(State::Stopped);
        if self.record.spec.on {
            self.start(true).await;
            self.wait_until_up().await;
        }
        Ok(result)
    }
}

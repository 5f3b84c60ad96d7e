//! What an instance tells the plane: how it is, what happened, what its guest wrote to the console.

use std::io::{Read, Seek, Write};
use std::path::Path;

use collective_api::Event;
use collective_model::run::Phase;
use collective_model::{Observed, ObservedDisk, Timestamp};

use crate::context::lock;
use crate::instance::Instance;
use crate::record::DiskRecord;

/// No more than this of a console's log is sent, in bytes.
const MAX_LOG_BYTES: u64 = 256 << 10;

impl Instance {
    /// The end of the guest's serial console.
    pub(crate) fn logs(&self, lines: u32) -> Result<serde_json::Value, String> {
        let path = self.run_dir.join("q/serial.log");
        let (text, _) = read_end(&path, MAX_LOG_BYTES).map_err(|e| format!("cannot read the console's log: {e}"))?;
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        let shown = &all[all.len().saturating_sub(lines as usize)..];
        Ok(serde_json::json!({ "lines": shown }))
    }

    /// Which blocks the guest read until it was up.
    pub(crate) fn boot_trace(&self) -> Result<serde_json::Value, String> {
        let path = self.run_dir.join("trace.json");
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(
                    "it is not known yet: it is noted some seconds after the instance became healthy, or after a \
                            minute where the version has no health check"
                        .into(),
                );
            }
            Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
        };
        serde_json::from_slice(&bytes).map_err(|e| format!("{} is damaged: {e}", path.display()))
    }

    /// Something happened that belongs into the history.
    pub(crate) fn event(&mut self, what: &str, message: String) {
        let event = Event {
            instance: self.record.spec.id.clone(),
            serial: self.record.next_event,
            at: Timestamp::now(),
            what: what.to_owned(),
            message,
        };
        tracing::info!(instance = %self.record.spec.name, what, message = event.message, "event");
        self.record.next_event += 1;
        let append = || -> std::io::Result<()> {
            let path = self.folder.join("events.jsonl");
            let mut file = std::fs::File::options().create(true).append(true).open(path)?;
            let mut line = serde_json::to_vec(&event)?;
            line.push(b'\n');
            file.write_all(&line)
        };
        if let Err(error) = append() {
            tracing::warn!(%error, "an event cannot be kept");
        }
        lock(&self.context.outbox.events).push(event);
        self.context.outbox.filled.notify_one();
    }

    /// The plane may have missed some; it knows which it has. The file is ahead of the record after a crash.
    pub(crate) fn resend_events(&mut self) {
        let text = std::fs::read_to_string(self.folder.join("events.jsonl")).unwrap_or_default();
        let events: Vec<Event> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        let used = events.iter().map(|event| event.serial + 1).max().unwrap_or(1);
        self.record.next_event = self.record.next_event.max(used);
        lock(&self.context.outbox.events).extend(events);
    }

    /// Tells the plane what there is to see, if it changed.
    pub(crate) fn publish(&self) {
        // Of what is not ours the plane takes no reports.
        if self.record.visiting.is_some() {
            return;
        }
        let observed = self.observed();
        let mut all = lock(&self.context.outbox.observed);
        let same = all
            .get(&observed.id)
            .is_some_and(|old| Observed { observed_at: observed.observed_at, ..old.clone() } == observed);
        all.insert(observed.id.clone(), observed);
        if !same {
            self.context.outbox.filled.notify_one();
        }
    }

    fn observed(&self) -> Observed {
        let record = &self.record;
        let status = self.status.clone().unwrap_or_default();
        let disk = |(index, disk): (usize, &DiskRecord)| ObservedDisk {
            name: disk.name.clone(),
            role: disk.role,
            size: disk.size,
            own_bytes: status
                .own_bytes
                .get(index)
                .copied()
                .unwrap_or_else(|| disk.layers.iter().map(|layer| self.layer_bytes(*layer)).sum()),
        };
        Observed {
            id: record.spec.id.clone(),
            generation: record.spec.generation,
            state: record.state,
            version: record.version,
            version_name: record.version_name.clone(),
            accelerator: status.accelerator,
            processor: status.processor,
            addresses: if status.phase == Phase::Running { vec!["10.0.2.15".into()] } else { Vec::new() },
            ports: record.spec.ports.clone(),
            ports_open: status.ports_open,
            disks: record.disks.iter().enumerate().map(disk).collect(),
            bytes_fetched: status.bytes_fetched,
            index_bytes_fetched: status.index_bytes_fetched,
            bytes_from_cache: status.bytes_from_cache,
            started_in_ms: status.started_in_ms,
            first_answer_ms: status.first_answer_ms,
            frames_missing: status.frames_missing,
            waiting: status.waiting,
            health: status.health,
            probe_output: status.probe_output,
            last_error: record.last_error.clone(),
            last_stop: record.last_stop.clone(),
            power_serial: record.power_serial,
            checkpoints: record.checkpoints.iter().map(|checkpoint| checkpoint.info.clone()).collect(),
            suspended: record.suspended.as_ref().map(|suspended| suspended.machine.info.clone()),
            in_store: record.in_store().cloned(),
            arrived: record.arrived.clone(),
            resumed: status.resumed,
            moved_pause_us: record.moved_pause_us,
            arrival: self.arrival(),
            ssh_host_key: self.public_host_key(),
            observed_at: Timestamp::now(),
        }
    }
}

/// The last bytes of a file, and the offset after them; nothing if there is no such file yet.
pub(crate) fn read_end(path: &Path, most: u64) -> std::io::Result<(Vec<u8>, u64)> {
    let mut file = match std::fs::File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Vec::new(), 0)),
        opened => opened?,
    };
    let start = file.metadata()?.len().saturating_sub(most);
    file.seek(std::io::SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(most).read_to_end(&mut bytes)?;
    let end = start + bytes.len() as u64;
    Ok((bytes, end))
}

//! Checkpoints by the clock, and how checkpoints go.

use collective_model::schedule::{is_due, surplus};
use collective_model::{CheckpointId, State, Timestamp};
use serde_json::{Value, json};

use crate::instance::Instance;
use crate::record::screen_path;

/// What the timeline says of a checkpoint by the clock.
const WHY: &str = "schedule";

/// What a task remembers of its schedule; nothing of it has to outlive the daemon.
#[derive(Default)]
pub(crate) struct Clock {
    /// When the last one was begun, whatever became of it.
    tried: Option<Timestamp>,
    /// The last one failed, and the history says so.
    failing: bool,
}

impl Instance {
    /// Takes a checkpoint if it is time for one. Called all the time.
    pub(crate) async fn checkpoint_if_due(&mut self) {
        if !self.is_checkpoint_due() {
            return;
        }
        self.clock.tried = Some(Timestamp::now());
        match self.save_scheduled(WHY.into()).await {
            Ok(()) => {
                self.clock.failing = false;
                self.thin();
            }
            // The history is for what is out of the ordinary, and that once.
            Err(why) if !std::mem::replace(&mut self.clock.failing, true) => {
                self.event("not-kept", format!("the checkpoint that was due could not be taken: {why}"));
            }
            Err(why) => tracing::warn!(why, "again, the checkpoint that was due could not be taken"),
        }
    }

    fn is_checkpoint_due(&self) -> bool {
        let Some(every) = self.record.spec.checkpoint_every else { return false };
        if self.record.state != State::Running || self.status.is_none() {
            return false;
        }
        let newest = self.record.checkpoints.iter().rev().find(|kept| kept.info.scheduled);
        match newest.map(|kept| kept.info.taken).max(self.clock.tried) {
            Some(last) => is_due(every, last, Timestamp::now()),
            None => self.started.elapsed() >= every.0,
        }
    }

    /// Lets those go that the clock took and that are not needed any more.
    fn thin(&mut self) {
        let scheduled = self.record.checkpoints.iter().filter(|kept| kept.info.scheduled);
        let taken: Vec<_> = scheduled.map(|kept| (kept.info.id, kept.info.taken)).collect();
        let gone = surplus(&taken, Timestamp::now());
        if gone.is_empty() {
            return;
        }
        self.record.checkpoints.retain(|kept| !gone.contains(&kept.info.id));
        let done = self.save().and_then(|()| self.drop_unheld_layers());
        if let Err(error) = done {
            tracing::warn!(%error, "files of old checkpoints are there still; they go with the next start");
        }
    }

    /// The picture of the screen at a checkpoint, as PNG in hexadecimal digits.
    pub(crate) fn screen(&self, checkpoint: CheckpointId) -> Result<Value, String> {
        let kept = self.record.checkpoints.iter().find(|kept| kept.info.id == checkpoint);
        let kept = kept.ok_or_else(|| format!("there is no checkpoint {}", checkpoint.0))?;
        let last = kept.machine.as_ref().filter(|machine| machine.info.screen).and_then(|m| m.memory.last());
        let path = screen_path(&self.folder, *last.ok_or("there is no picture of it")?);
        let picture = std::fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
        let digits: String = picture.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(json!({ "png": digits }))
    }

    /// Forgets a checkpoint.
    pub(crate) fn forget(&mut self, checkpoint: CheckpointId) -> Result<Value, String> {
        if self.record.update.as_ref().is_some_and(|update| update.before == checkpoint) {
            return Err("an update under way may have to come back to it".into());
        }
        let before = self.record.checkpoints.len();
        self.record.checkpoints.retain(|kept| kept.info.id != checkpoint);
        if self.record.checkpoints.len() == before {
            return Err(format!("there is no checkpoint {}; `collective timeline` lists them", checkpoint.0));
        }
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.drop_unheld_layers().map_err(|e| format!("it is forgotten, but its files are there still: {e}"))?;
        Ok(json!({ "forgotten": checkpoint }))
    }
}

//! An instance that begins as another one was at a checkpoint, on the same host.
//!
//! What is kept in a checkpoint is never changed, so a copy has the same files under names of its own (hard links), and takes space only for
//! what it writes itself. Its identity is its own: id, name, seed disk, SSH host key; a guest that goes on is told that it has another seed disk.

use std::path::{Path, PathBuf};

use collective_model::{Checkpoint, Origin, State};

use crate::files::read_json;
use crate::instance::{Instance, record_path};
use crate::record::{CheckpointRecord, Record, SuspendedRecord, layer_path, screen_path, state_path};

impl Instance {
    /// Takes over what the other instance was. Repeated, it does the same again.
    pub(crate) fn begin_as(&mut self, origin: &Origin) -> Result<(), String> {
        let home = self.folder.parent().ok_or("there is no folder of instances")?.join(origin.instance.as_str());
        let mut tried = None;
        loop {
            let other: Option<Record> = read_json(&record_path(&home)).map_err(|e| e.to_string())?;
            let other = other.ok_or("the instance it is a copy of is not on this host any more")?;
            if other.arriving.is_some() {
                let why = "a part of that instance is in the store still; copy it when `collective info` says that it depends on nobody";
                return Err(why.into());
            }
            let kept = other.checkpoints.iter().find(|kept| kept.info.id == origin.checkpoint);
            let kept = kept.ok_or("that checkpoint is not kept any more")?;
            let layers = layers_of(kept);
            match self.take_over(&home, kept, &layers) {
                Ok(()) => return self.begin_with(&other, kept),
                Err(why) if tried.as_ref() == Some(&layers) => return Err(why),
                // Some of them may have become one just then, and its record says so.
                Err(_) => tried = Some(layers),
            }
        }
    }

    fn take_over(&self, home: &Path, kept: &CheckpointRecord, layers: &[u64]) -> Result<(), String> {
        for layer in layers {
            self.link(&layer_path(home, *layer), &layer_path(&self.folder, *layer))?;
            let map = |path: PathBuf| path.with_file_name(format!("{layer}.map"));
            self.link(&map(layer_path(home, *layer)), &map(layer_path(&self.folder, *layer)))?;
        }
        if let Some(last) = kept.machine.as_ref().and_then(|machine| machine.memory.last()) {
            self.link(&state_path(home, *last), &state_path(&self.folder, *last))?;
            if kept.info.machine.as_ref().is_some_and(|machine| machine.screen) {
                self.link(&screen_path(home, *last), &screen_path(&self.folder, *last))?;
            }
        }
        Ok(())
    }

    fn begin_with(&mut self, other: &Record, kept: &CheckpointRecord) -> Result<(), String> {
        let CheckpointRecord { info, disks, machine, .. } = kept;
        let record = &mut self.record;
        (record.version, record.version_name) = (info.version, Some(info.version_name.clone()));
        record.next_layer = record.next_layer.max(other.next_layer);
        record.disks.clone_from(disks);
        record.suspended = machine.clone().map(|machine| SuspendedRecord { machine, disks: disks.clone() });
        // Otherwise nothing would keep the layers as they are, and other instances have them too.
        let info = Checkpoint { scheduled: false, ..info.clone() };
        record.next_checkpoint = info.id.0 + 1;
        record.checkpoints = vec![CheckpointRecord { before_update: false, info, ..kept.clone() }];
        self.set_state(if self.record.suspended.is_some() { State::Suspended } else { State::Stopped });
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.event("cloned", format!("a copy of {} as it was at checkpoint {}", other.spec.name, kept.info.id.0));
        Ok(())
    }

    /// Another name for a file; it is fine if that is there.
    pub(crate) fn link(&self, from: &Path, to: &Path) -> Result<(), String> {
        match std::fs::hard_link(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(format!("cannot take over {}: {error}", from.display()))
            }
            _ => Ok(()),
        }
    }
}

/// All layers of a checkpoint.
fn layers_of(kept: &CheckpointRecord) -> Vec<u64> {
    let memory = kept.machine.iter().flat_map(|machine| &machine.memory);
    kept.disks.iter().flat_map(|disk| &disk.layers).chain(memory).copied().collect()
}

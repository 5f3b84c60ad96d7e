//! An instance that begins as another one was at a checkpoint, on the same host.
//!
//! What is kept in a checkpoint is never changed, so a copy has the same files under names of its own (hard links), and takes space only for
//! what it writes itself. Its identity is its own: id, name, seed disk, SSH host key; a guest that goes on is told that it has another seed disk.

use collective_model::{Origin, State};

use crate::files::read_json;
use crate::instance::{Instance, record_path};
use crate::record::{CheckpointRecord, Record, SuspendedRecord, layer_path, screen_path, state_path};

impl Instance {
    /// Takes over what the other instance was. Repeated, it does the same again.
    pub(crate) fn begin_as(&mut self, origin: &Origin) -> Result<(), String> {
        let home = self.folder.parent().ok_or("there is no folder of instances")?.join(origin.instance.as_str());
        let other: Option<Record> = read_json(&record_path(&home)).map_err(|e| e.to_string())?;
        let other = other.ok_or("the instance it is a copy of is not on this host any more")?;
        if other.arriving.is_some() {
            return Err(
                "a part of that instance is in the store still; copy it when `collective info` says that it depends \
                        on nobody"
                    .into(),
            );
        }
        let kept = other.checkpoints.iter().find(|kept| kept.info.id == origin.checkpoint);
        let kept = kept.ok_or("that checkpoint is not kept any more")?;
        let CheckpointRecord { info, disks, machine, .. } = kept;
        let layers = disks.iter().flat_map(|disk| &disk.layers);
        let memory = machine.iter().flat_map(|machine| &machine.memory);
        for layer in layers.chain(memory) {
            self.link(&layer_path(&home, *layer), &layer_path(&self.folder, *layer))?;
            let map = |path: std::path::PathBuf| path.with_file_name(format!("{layer}.map"));
            self.link(&map(layer_path(&home, *layer)), &map(layer_path(&self.folder, *layer)))?;
        }
        if let Some(last) = machine.as_ref().and_then(|machine| machine.memory.last()) {
            self.link(&state_path(&home, *last), &state_path(&self.folder, *last))?;
            if info.machine.as_ref().is_some_and(|machine| machine.screen) {
                self.link(&screen_path(&home, *last), &screen_path(&self.folder, *last))?;
            }
        }
        let record = &mut self.record;
        (record.version, record.version_name) = (info.version, Some(info.version_name.clone()));
        record.next_layer = record.next_layer.max(other.next_layer);
        record.disks.clone_from(disks);
        record.suspended = machine.clone().map(|machine| SuspendedRecord { machine, disks: disks.clone() });
        // Otherwise nothing would keep the layers as they are, and other instances have them too.
        record.checkpoints = vec![CheckpointRecord { before_update: false, ..kept.clone() }];
        record.next_checkpoint = info.id.0 + 1;
        self.set_state(if self.record.suspended.is_some() { State::Suspended } else { State::Stopped });
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.event("cloned", format!("a copy of {} as it was at checkpoint {}", other.spec.name, info.id.0));
        Ok(())
    }

    fn link(&self, from: &std::path::Path, to: &std::path::Path) -> Result<(), String> {
        match std::fs::hard_link(from, to) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(format!("cannot take over {}: {error}", from.display()))
            }
            _ => Ok(()),
        }
    }
}

//! The whole instance into the store, and from there onto another host.
//!
//! ```text
//! push      key from the plane; the runner seals and sends disks, memory and files; the plane records it
//! receive   key and list from the plane; the runner brings indexes and files
//!           POINT OF NO RETURN, one write of the record: what it was there is what it is here, with layers that arrive
//!           while it runs (`arriving.rs`)
//! ```
//! Between the two the plane makes another host the owner (`plane/src/movement.rs`). What does not run stays so until its
//! owner is told; so the old host needs not be asked again, and what it has left is no instance any more when the new one has
//! it (`left.rs`).

use std::time::Duration;

use collective_api::{Backup, BackupDisk, PrivateGrant, Whole, WholeDisk, WholeFile, WholeMachine};
use collective_model::run::Arriving;
use collective_model::run_private::{PrivateNews, PrivateOrder, RestoreDisk, RestoreFile, StoredDisk, WholeOrder};
use collective_model::{BackupId, ByteSize, CheckpointMachine, Generation, OperationId, State, Timestamp, Trigger};
use collective_store::PackInfo;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::arriving::ARRIVING;
use crate::instance::Instance;
use crate::private::{HASHES, run_pack};
use crate::record::{DiskRecord, MachineRecord, SuspendedRecord, layer_path, state_path};

/// A plane that is away is asked again after this time.
const AWAY_PAUSE: Duration = Duration::from_secs(1);
/// The rest of the machine, by its name among the files.
const STATE: &str = "state";
/// The instance's SSH host key.
pub(crate) const SSH_KEY: &str = "ssh-host-key";
/// Its UEFI variables.
pub(crate) const UEFI_VARS: &str = "uefi-vars";

impl Instance {
    /// Puts what the instance is, at rest, into the store, unless it is there.
    pub(crate) async fn push(&mut self, id: &OperationId) -> Result<Value, String> {
        if !matches!(self.record.state, State::Suspended | State::Stopped) {
            return Err(format!("only what does not run is put into the store, and it is {}", self.record.state));
        }
        if self.record.disks.is_empty() {
            return Err("it was never started, and has no disks yet; delete it, and launch it where you want it".into());
        }
        if self.record.in_store().is_none() {
            self.bring_rest(Some(id)).await?;
            let backup = self.store_whole(id).await?;
            self.record.note_stored(backup.id.clone());
            self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
            return Ok(json!({
                "in_store": backup.id, "new_bytes": backup.new_bytes, "stored_bytes": backup.stored_bytes,
            }));
        }
        Ok(json!({ "in_store": self.record.in_store(), "new_bytes": 0 }))
    }

    async fn store_whole(&mut self, id: &OperationId) -> Result<Backup, String> {
        let taken = Timestamp::now();
        let PrivateGrant { key, backup: before } = self.grant(id).await?;
        let machine = self.record.suspended.as_ref().map(|suspended| suspended.machine.clone());
        let hashes = self.folder.join(HASHES);
        let touched = self.learn_what_is_read_first().await;
        let order = PrivateOrder::Backup {
            home: self.record.spec.id.clone(),
            known: before.iter().flat_map(|backup| &backup.packs).map(run_pack).collect(),
            hashes: hashes.clone(),
            disks: self.record.disks.iter().map(|disk| disk.name.clone()).collect(),
            whole: Some(Box::new(WholeOrder {
                version: self.record.version,
                memory_image: machine.as_ref().and_then(|machine| machine.image.clone()),
                memory: machine.iter().flat_map(|m| &m.memory).map(|layer| layer_path(&self.folder, *layer)).collect(),
                memory_size: machine.as_ref().map_or(0, |machine| machine.memory_mib << 20),
                touched,
                files: self.files(machine.as_ref()),
            })),
        };
        let news = self.run_private(Some(id), &key, &order, "encrypting and storing").await?;
        let PrivateNews::Stored { disks, packs, used_bytes, memory, files } = news else {
            return Err(format!("its runner answered something else: {news:?}"));
        };
        let version = self.record.version;
        let machine = machine.zip(memory).map(|(machine, memory)| WholeMachine {
            memory: memory.root,
            boot: memory.boot,
            image: machine.image.filter(|image| image.version == version),
            state: machine.digest,
            epoch: machine.epoch,
            memory_mib: machine.memory_mib,
            cpus: machine.cpus,
            info: machine.info,
        });
        let what = |(disk, stored): (&DiskRecord, &StoredDisk)| WholeDisk {
            role: disk.role,
            writes: disk.writes,
            boot: stored.boot,
            // A data disk may have begun with an image of an older version, which is not kept for its sake.
            image: disk.image.clone().filter(|image| image.version == version),
        };
        let whole = Whole {
            disks: self.record.disks.iter().zip(&disks).map(what).collect(),
            machine,
            files: files.into_iter().map(|f| WholeFile { name: f.name, size: f.size, root: f.root }).collect(),
            next_event: self.record.next_event + 8,
        };
        let backup = Backup {
            id: id.as_str().parse()?,
            instance: self.record.spec.id.clone(),
            name: self.record.spec.name.clone(),
            generation: self.record.spec.generation,
            appliance: self.record.spec.appliance.clone(),
            version: self.record.version,
            version_name: self.record.version_name(),
            taken,
            key: key.id(),
            disks: disks.into_iter().map(|d| BackupDisk { name: d.name, size: d.size, root: d.root }).collect(),
            packs: packs.into_iter().map(|digest| PackInfo { digest, size: 0, directory: 0 }).collect(),
            used_bytes,
            stored_bytes: 0,
            new_bytes: 0,
            whole: Some(whole),
        };
        self.record_backup(id, &backup, &hashes).await
    }

    pub(crate) fn files(&self, machine: Option<&MachineRecord>) -> Vec<(String, std::path::PathBuf)> {
        let state = machine.and_then(|machine| machine.memory.last()).map(|layer| state_path(&self.folder, *layer));
        let mut files: Vec<_> = state.into_iter().map(|path| (STATE.to_owned(), path)).collect();
        let others = [(SSH_KEY, self.folder.join("ssh_host_key.json")), (UEFI_VARS, self.uefi_vars_path())];
        files.extend(others.into_iter().filter(|(_, path)| path.exists()).map(|(name, path)| (name.to_owned(), path)));
        files
    }

    /// Brings the instance from the store. A machine that stood still goes on.
    pub(crate) async fn receive(&mut self, id: &OperationId, wanted: &BackupId, cold: bool) -> Result<Value, String> {
        let mut kept_bytes = 0;
        if self.record.arrived.as_ref() != Some(wanted) {
            if !matches!(self.record.state, State::Stopped | State::Suspended | State::Failed) {
                return Err(format!("it is {} here", self.record.state));
            }
            self.plane_was_away(id).await;
            let PrivateGrant { key, backup } = self.grant(id).await?;
            let backup = backup.filter(|backup| backup.id == *wanted).ok_or("the plane gave another one")?;
            self.set_state(State::Stopped);
            self.trigger(Trigger::Move);
            let mut received = self.fetch_whole(id, &key, &backup, cold).await;
            // What the plane wants is the same when it is back, and until then nobody could order anything else.
            while received.is_err() && self.plane_was_away(id).await {
                received = self.fetch_whole(id, &key, &backup, cold).await;
            }
            kept_bytes = match received {
                Ok(bytes) => bytes,
                Err(why) => {
                    self.set_state(State::Stopped);
                    return Err(format!("{why}. It is in the store; move it again when that is mended"));
                }
            };
        }
        let mut result = match self.record.state {
            State::Suspended => self.go_on().await?,
            _ => json!({ "state": self.record.state }),
        };
        result["kept_bytes"] = kept_bytes.into();
        Ok(result)
    }

    /// Whether the plane, which has the key for this operation, is away; then waits until it is back.
    async fn plane_was_away(&self, id: &OperationId) -> bool {
        let mut was_away = false;
        while let Err(error) = self.ask_grant(id).await
            && error.is_away()
        {
            was_away = true;
            sleep(AWAY_PAUSE).await;
        }
        was_away
    }

    async fn fetch_whole(
        &mut self,
        id: &OperationId,
        key: &collective_keys::OwnerKey,
        backup: &Backup,
        cold: bool,
    ) -> Result<u64, String> {
        let whole = backup.whole.as_ref().filter(|whole| whole.disks.len() == backup.disks.len());
        let whole = whole.ok_or("it is not a whole instance")?;
        let manifest = self.manifest(&backup.version).await?;
        let mut disks = Vec::new();
        let mut restore = Vec::new();
        for (disk, what) in backup.disks.iter().zip(&whole.disks) {
            let layer = self.record.reserve_layer();
            restore.push(RestoreDisk {
                name: disk.name.clone(),
                root: disk.root,
                size: disk.size,
                becomes: disk.size,
                layer: layer_path(&self.folder, layer),
                image: what.image.clone(),
                boot: what.boot,
            });
            disks.push(DiskRecord {
                name: disk.name.clone(),
                role: what.role,
                writes: what.writes,
                size: disk.size,
                image: what.image.clone(),
                layers: vec![layer],
            });
        }
        let memory = self.record.reserve_layer();
        let machine = whole.machine.as_ref().filter(|_| !cold);
        if let Some(machine) = machine {
            let size = machine.memory_mib << 20;
            let layer = layer_path(&self.folder, memory);
            let name = "memory".parse().map_err(|e| format!("{e}"))?;
            restore.push(RestoreDisk {
                name,
                root: machine.memory,
                size,
                becomes: size,
                layer,
                image: machine.image.clone(),
                boot: machine.boot,
            });
        }
        let place = |file: &WholeFile| {
            let path = match file.name.as_str() {
                STATE => state_path(&self.folder, memory),
                SSH_KEY => self.folder.join("ssh_host_key.json"),
                UEFI_VARS => self.uefi_vars_path(),
                _ => return None,
            };
            Some(RestoreFile { root: file.root, size: file.size, path })
        };
        let files: Vec<RestoreFile> = whole.files.iter().filter_map(place).collect();
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        crate::files::create_folder(&self.run_dir.join("v"), 0o700).map_err(|e| format!("cannot prepare it: {e}"))?;
        let arriving = Arriving {
            home: backup.instance.clone(),
            packs: backup.packs.iter().map(run_pack).collect(),
            scratch: self.folder.join(ARRIVING),
            layers: restore,
            kept: self.kept_copy(&backup.disks.iter().map(|disk| &disk.name).collect::<Vec<_>>()),
            hashes: Some(self.folder.join(HASHES)),
        };
        let Arriving { home, packs, scratch, layers, kept, hashes } = arriving.clone();
        let order = PrivateOrder::Restore { home, packs, scratch, disks: layers, files, begin: true, kept, hashes };
        self.record.version = backup.version;
        let PrivateNews::Restored { fetched, missing, kept, .. } =
            self.run_private(Some(id), key, &order, "fetching").await?
        else {
            return Err("its runner answered something else".into());
        };
        let suspended = machine.map(|machine| MachineRecord {
            image: machine.image.clone(),
            memory: vec![memory],
            digest: machine.state,
            epoch: machine.epoch.clone(),
            memory_mib: machine.memory_mib,
            cpus: machine.cpus,
            // The picture stays behind.
            info: CheckpointMachine { screen: false, ..machine.info.clone() },
        });
        let record = &mut self.record;
        record.suspended = suspended.map(|machine| SuspendedRecord { machine, disks: disks.clone() });
        record.disks = disks;
        record.version_name = Some(manifest.version.clone());
        record.checkpoints.clear();
        record.forget_memory();
        record.next_event = record.next_event.max(whole.next_event);
        record.arrived = Some(backup.id.clone());
        record.arriving = Some(arriving);
        record.note_stored(backup.id.clone());
        record.power_serial = record.spec.power_serial;
        self.set_state(if self.record.suspended.is_some() { State::Suspended } else { State::Stopped });
        let [missing, kept_here] = [missing, kept].map(ByteSize);
        let mut how = format!("it is here: {fetched} bytes fetched, and {missing} come while it runs");
        if kept > 0 {
            how += &format!("; {kept_here} were kept here");
        }
        self.event("arrived", how);
        self.note_images();
        Ok(kept)
    }

    /// Another host has it since `generation`: it is no instance here any more.
    pub(crate) async fn moved_away(&mut self, generation: Generation, memory: Option<(u64, u64)>) {
        if generation <= self.record.spec.generation {
            return;
        }
        if self.record.runner_pid.is_some() {
            tracing::error!(instance = %self.record.spec.name, "it ran here while another host owns it; it is ended");
        }
        self.clear_leftovers().await;
        // First: the seed disk has secrets, and nobody would look there again.
        let removed = std::fs::remove_dir_all(&self.run_dir).and_then(|()| self.leave_behind(memory));
        if let Err(error) = removed {
            tracing::warn!(%error, "what is left of an instance that moved away cannot be removed");
        }
        self.forget_here();
    }
}

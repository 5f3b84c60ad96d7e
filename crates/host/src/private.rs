//! Backups: the data disks of an instance that is off, encrypted into the store and back.
//!
//! ```text
//! backup    key from the plane; the runner seals and sends; the plane records it: from here on it is there
//! restore   key and list from the plane; the runner writes new layers, synced
//!           POINT OF NO RETURN, one write of the record: the present as a checkpoint, the new layers, the outcome
//! ```
//! A crash before the last write leaves layers that nothing holds; they go with the next start, and the order comes again.

use std::path::Path;

use collective_api::{Backup, ClientError, PrivateGrant};
use collective_keys::OwnerKey;
use collective_model::kept::KeptCopy;
use collective_model::run_private::{PrivateNews, PrivateOrder, RestoreDisk, RunPack};
use collective_model::{BackupId, DiskRole, Name, OperationId, OperationState, State, Timestamp, Trigger};
use collective_store::PackInfo;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use zeroize::Zeroizing;

use crate::instance::Instance;
use crate::link;
use crate::record::layer_path;

/// Where hashes of blocks of private packs are remembered, in the instance's folder.
pub(crate) const HASHES: &str = "backup-hashes";
/// Where what is fetched to restore lies meanwhile, still encrypted.
pub(crate) const SCRATCH: &str = "restore";

impl Instance {
    /// Encrypts the data disks and puts what is new of them into the store.
    pub(crate) async fn back_up(&mut self, id: &OperationId) -> Result<Value, String> {
        self.is_off("a backup is made of an instance that is off, so that its data is whole")?;
        self.bring_rest(Some(id)).await?;
        let disks = self.data_disks();
        if disks.is_empty() {
            return Err("it has no data disks: all that it has comes with its version".into());
        }
        let taken = Timestamp::now();
        let PrivateGrant { key, backup: before } = self.grant(id).await?;
        let known = before.iter().flat_map(|backup| &backup.packs).map(run_pack).collect();
        let home = self.record.spec.id.clone();
        let hashes = self.folder.join(HASHES);
        let order = PrivateOrder::Backup { home: home.clone(), known, hashes: hashes.clone(), disks, whole: None };
        let (disks, packs, used_bytes) =
            match self.run_private(Some(id), &key, &order, "encrypting and storing").await? {
                PrivateNews::Stored { disks, packs, used_bytes, .. } => (disks, packs, used_bytes),
                other => return Err(format!("its runner answered something else: {other:?}")),
            };
        let backup = Backup {
            id: id.as_str().parse()?,
            instance: home,
            name: self.record.spec.name.clone(),
            generation: self.record.spec.generation,
            appliance: self.record.spec.appliance.clone(),
            version: self.record.version,
            version_name: self.record.version_name(),
            taken,
            key: key.id(),
            disks: disks
                .into_iter()
                .map(|disk| collective_api::BackupDisk { name: disk.name, size: disk.size, root: disk.root })
                .collect(),
            packs: packs.into_iter().map(|digest| PackInfo { digest, size: 0, directory: 0 }).collect(),
            used_bytes,
            stored_bytes: 0,
            new_bytes: 0,
            whole: None,
        };
        let recorded = self.record_backup(id, &backup, &hashes).await?;
        let (stored, new) = (recorded.stored_bytes, recorded.new_bytes);
        self.event("backed-up", format!("backup {}: {new} bytes new, {stored} stored", short(&recorded.id)));
        serde_json::to_value(recorded).map_err(|e| e.to_string())
    }

    /// Puts the data of a backup in place of the present, which is kept as a checkpoint.
    pub(crate) async fn restore_backup(&mut self, id: &OperationId, wanted: &BackupId) -> Result<Value, String> {
        self.is_off("a backup is restored into an instance that is off")?;
        self.bring_rest(Some(id)).await?;
        let PrivateGrant { key, backup } = self.grant(id).await?;
        let backup = backup.filter(|backup| backup.id == *wanted).ok_or("the plane gave another backup")?;
        let before = self.record.state;
        let disks = self.places_for(&backup)?;
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.trigger(Trigger::Restore);
        let restored = self.fetch_backup(id, &key, &backup, &disks).await;
        let (bytes, fetched) = match restored {
            Ok(done) => done,
            Err(why) => {
                disks.iter().for_each(|disk| remove_layer(&disk.layer));
                self.set_state(before);
                return Err(format!("{why}. Nothing was changed"));
            }
        };
        let kept = self.freeze(format!("before restore of backup {}", short(&backup.id)), false);
        for disk in &disks {
            let number = disk.layer.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            self.record.put_data(&disk.name, disk.becomes, number.ok_or("a layer without a number")?);
        }
        let result = serde_json::json!({
            "backup": backup.id, "of": backup.name, "taken": backup.taken, "bytes": bytes, "bytes_fetched": fetched,
            "kept_as_checkpoint": kept,
        });
        self.event(
            "restored",
            format!(
                "data is as in backup {} of {}; checkpoint {} keeps what was",
                short(&backup.id),
                backup.name,
                kept.0
            ),
        );
        // In the same write as the disks: an order that comes again must not throw away what was written since.
        self.record.remember(id.clone(), OperationState::Done { result: result.clone() });
        self.set_state(State::Stopped);
        Ok(result)
    }

    /// Has the plane record what is in the store; from here on it is there.
    pub(crate) async fn record_backup(
        &self,
        id: &OperationId,
        backup: &Backup,
        hashes: &Path,
    ) -> Result<Backup, String> {
        let path = format!("/v1/hosts/self/operations/{id}/backup");
        let recorded: Result<Backup, _> = self.context.client.post(&path, backup).await;
        let recorded = recorded.map_err(|e| format!("the plane did not record it, so repeat the command: {e}"))?;
        forget_others(hashes, &recorded.packs);
        Ok(recorded)
    }

    fn is_off(&self, rule: &str) -> Result<(), String> {
        if self.record.disks.is_empty() {
            return Err("it was never started, and has no disks yet; start it once, and stop it".into());
        }
        match self.record.state {
            State::Stopped | State::Failed => Ok(()),
            state => Err(format!("{rule}, and it is {state}; stop it first")),
        }
    }

    fn data_disks(&self) -> Vec<Name> {
        let data = self.record.disks.iter().filter(|disk| disk.role == DiskRole::Data);
        data.map(|disk| disk.name.clone()).collect()
    }

    /// The owner's key, for this operation only. It stays in memory.
    pub(crate) async fn grant(&self, id: &OperationId) -> Result<PrivateGrant, String> {
        self.ask_grant(id).await.map_err(|e| format!("the plane gives no key for its data: {e}"))
    }

    pub(crate) async fn ask_grant(&self, id: &OperationId) -> Result<PrivateGrant, ClientError> {
        self.context.client.post(&format!("/v1/hosts/self/operations/{id}/private"), &()).await
    }

    /// A new layer for each disk of a backup. Each has to be there already, as a data disk of this instance.
    fn places_for(&mut self, backup: &Backup) -> Result<Vec<RestoreDisk>, String> {
        let mut places = Vec::new();
        for disk in &backup.disks {
            let own = self.record.disks.iter().find(|own| own.name == disk.name && own.role == DiskRole::Data);
            let Some(size) = own.map(|own| own.size) else {
                let names: Vec<_> = self.data_disks().iter().map(ToString::to_string).collect();
                let has =
                    if names.is_empty() { "has no data disks".into() } else { format!("has {}", names.join(", ")) };
                return Err(format!(
                    "the backup has a data disk \"{}\", and this instance {has}: restore into an instance of {}",
                    disk.name, backup.appliance
                ));
            };
            let layer = layer_path(&self.folder, self.record.reserve_layer());
            let becomes = size.max(disk.size);
            let (name, root, size) = (disk.name.clone(), disk.root, disk.size);
            places.push(RestoreDisk { name, root, size, becomes, layer, image: None, boot: None });
        }
        Ok(places)
    }

    async fn fetch_backup(
        &mut self,
        id: &OperationId,
        key: &OwnerKey,
        backup: &Backup,
        disks: &[RestoreDisk],
    ) -> Result<(u64, u64), String> {
        let scratch = self.folder.join(SCRATCH);
        let order = PrivateOrder::Restore {
            home: backup.instance.clone(),
            packs: backup.packs.iter().map(run_pack).collect(),
            scratch: scratch.clone(),
            disks: disks.to_vec(),
            files: Vec::new(),
            begin: false,
            kept: KeptCopy::default(),
            hashes: None,
        };
        let news = self.run_private(Some(id), key, &order, "fetching").await;
        let _ = std::fs::remove_dir_all(scratch);
        match news? {
            PrivateNews::Restored { bytes, fetched, .. } => Ok((bytes, fetched)),
            other => Err(format!("its runner answered something else: {other:?}")),
        }
    }

    /// Has a runner carry out an order; until its end the instance does nothing else, so that nothing changes its disks.
    pub(crate) async fn run_private(
        &mut self,
        id: Option<&OperationId>,
        key: &OwnerKey,
        order: &PrivateOrder,
        doing: &str,
    ) -> Result<PrivateNews, String> {
        self.describe_disks().await?;
        let failed = |e: std::io::Error| format!("its runner failed: {e}; {} says more", "runner.log");
        let mut runner = link::spawn_private(&self.context.config.runner, &self.run_dir).map_err(failed)?;
        let (Some(mut input), Some(output)) = (runner.stdin.take(), runner.stdout.take()) else {
            return Err("its runner cannot be spoken to".into());
        };
        let order = serde_json::to_vec(order).map_err(|e| e.to_string())?;
        let digits = Zeroizing::new(String::from(key.clone()));
        let text = Zeroizing::new([digits.as_bytes(), b"\n", &order, b"\n"].concat());
        input.write_all(&text).await.map_err(failed)?;
        // The runner ends when this is closed, which our death does too.
        let _held = input;
        let mut lines = BufReader::new(output).lines();
        while let Some(line) = lines.next_line().await.map_err(failed)? {
            match serde_json::from_str(&line).map_err(|e| format!("its runner cannot be understood: {e}"))? {
                PrivateNews::Progress { done, total } => {
                    let doing = doing.to_owned();
                    if let Some(id) = id {
                        self.context.tell(id, OperationState::Running { doing, done, total });
                    }
                }
                PrivateNews::Failed { why } => return Err(why),
                outcome => {
                    let _ = runner.wait().await;
                    return Ok(outcome);
                }
            }
        }
        Err("its runner ended without an answer; its log, runner.log, says more".into())
    }
}

pub(crate) fn run_pack(pack: &PackInfo) -> RunPack {
    RunPack { digest: pack.digest, size: pack.size, directory: pack.directory }
}

/// The first digits of a backup's id, for people.
fn short(id: &BackupId) -> &str {
    &id.as_str()[..8]
}

/// A layer that an interrupted restore left.
pub(crate) fn remove_layer(path: &Path) {
    for suffix in ["", ".map", ".part"] {
        let mut name = path.as_os_str().to_owned();
        name.push(suffix);
        let _ = std::fs::remove_file(Path::new(&name));
    }
}

/// Only the newest backup is compared with.
fn forget_others(hashes: &Path, packs: &[PackInfo]) {
    let needed: std::collections::HashSet<String> = packs.iter().map(|pack| pack.digest.to_string()).collect();
    for entry in std::fs::read_dir(hashes).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_none_or(|name| !needed.contains(name)) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

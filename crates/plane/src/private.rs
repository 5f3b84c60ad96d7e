//! Private data: who may put it into the store and take it from there, what backups there are, and their owner's keys.
//!
//! A host is given the owner's key, and reads and writes packs, only for an operation that it was told to carry out on an
//! instance that it owns. The plane cannot look into what comes; it checks that it is sealed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use bytes::Bytes;
use collective_api::{Backup, KeyCopy, KeyNeed, KeyView, KeyWanted, PrivateGrant, PrivatePack};
use collective_keys::{KeyId, OwnerKey, OwnerKeyError};
use collective_model::{BackupId, Digest, InstanceId, Name, Operation, OperationId, OperationKind};

use crate::Plane;
use crate::access::Caller;
use crate::database::InstanceRow;
use crate::problem::{Answer, Failure};

impl From<OwnerKeyError> for Failure {
    fn from(error: OwnerKeyError) -> Self {
        match error {
            OwnerKeyError::Missing(_) | OwnerKeyError::Unwrap { .. } => Self::conflict(error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

/// Whether a host stores private data to carry this out.
fn stores(kind: &OperationKind) -> bool {
    matches!(kind, OperationKind::Backup | OperationKind::Suspend | OperationKind::Push)
}

impl Plane {
    /// The operation `id`, if it is open and `host` has to carry it out.
    async fn ordered(&self, host: &Name, id: &OperationId) -> Answer<(Operation, InstanceRow)> {
        let not_yours = || Failure::forbidden("no such operation is to be carried out by this host");
        let (operation, state) = self.database().operation(id).await?.ok_or_else(not_yours)?;
        let row = self.database().instance(&operation.instance).await?.ok_or_else(not_yours)?;
        if row.host != *host || state.is_final() {
            return Err(not_yours());
        }
        Ok((operation, row))
    }

    /// What a host needs for a backup or a restore that it was told to make.
    pub(crate) async fn private_grant(&self, host: &Name, id: &OperationId) -> Answer<PrivateGrant> {
        if self.comes_to(host, id).await? {
            return Ok(PrivateGrant { key: self.current_key().await?, backup: None });
        }
        let (operation, _) = self.ordered(host, id).await?;
        match operation.kind {
            OperationKind::Live { .. } => Ok(PrivateGrant { key: self.current_key().await?, backup: None }),
            OperationKind::Backup | OperationKind::Suspend | OperationKind::Push => {
                let key = self.current_key().await?;
                let newest = self.database().backups(Some(&operation.instance)).await?.into_iter().next();
                // What another key sealed cannot be shared with it.
                Ok(PrivateGrant { backup: newest.filter(|backup| backup.key == key.id()), key })
            }
            OperationKind::Restore { backup } | OperationKind::Receive { backup, .. } => {
                let backup = self.backup(&backup).await?;
                Ok(PrivateGrant { key: self.inner.keys.lock().await.get(&backup.key)?, backup: Some(backup) })
            }
            _ => Err(Failure::forbidden("this operation needs no private data")),
        }
    }

    /// What the owner of an instance needs for what of it has not arrived.
    pub(crate) async fn arrival_grant(&self, host: &Name, id: &InstanceId) -> Answer<PrivateGrant> {
        let not_yours = || Failure::forbidden("nothing of such an instance is to arrive at this host");
        let row = self.database().instance(id).await?.filter(|row| row.host == *host).ok_or_else(not_yours)?;
        let backup = self.backup(&row.spec.arrival.ok_or_else(not_yours)?).await?;
        Ok(PrivateGrant { key: self.inner.keys.lock().await.get(&backup.key)?, backup: Some(backup) })
    }

    /// Whether an instance is being brought somewhere from this backup, or goes on somewhere before all of it has come.
    async fn arrives(&self, id: &BackupId) -> Answer<bool> {
        let rows = self.database().instances().await?;
        let needs = |row: &InstanceRow| {
            let seen = row.observed.as_ref().filter(|seen| seen.generation == row.spec.generation);
            let is_whole = |seen: &collective_model::Observed| {
                seen.arrived == row.spec.arrival && seen.arrival.is_none_or(|arrival| arrival.complete)
            };
            row.spec.arrival.as_ref() == Some(id) && !seen.is_some_and(is_whole)
        };
        Ok(rows.iter().any(needs))
    }

    pub(crate) async fn backup(&self, id: &BackupId) -> Answer<Backup> {
        let found = self.database().backup(id).await?;
        found.ok_or_else(|| Failure::missing(format!("there is no backup {id}; `collective backup list` shows all")))
    }

    /// What a restore of an instance goes to.
    pub(crate) async fn backup_for(&self, row: &InstanceRow, wanted: Option<BackupId>) -> Answer<BackupId> {
        if let Some(wanted) = wanted {
            let wanted = self.backup(&wanted).await?;
            if wanted.whole.is_some() {
                return Err(Failure::invalid("this is a whole instance at rest, and not a backup of data"));
            }
            return Ok(wanted.id);
        }
        let backups = self.database().backups(Some(&row.spec.id)).await?;
        let newest = backups.into_iter().find(|backup| backup.whole.is_none());
        let newest = newest.ok_or_else(|| {
            Failure::missing(format!(
                "there is no backup of {}; `collective backup list` shows those of others, for --backup",
                row.spec.name
            ))
        })?;
        Ok(newest.id)
    }

    /// Takes a pack of a backup that is being made by a host, or a sound copy of one that a backup needs from a user.
    pub(crate) async fn put_private(
        &self,
        caller: &Caller,
        instance: &InstanceId,
        pack: Digest,
        bytes: Bytes,
    ) -> Answer<()> {
        let _stays = self.inner.private.read().await;
        let may = match caller {
            Caller::User => self.database().private_packs(instance).await?.contains(&pack),
            Caller::Joiner(_) => false,
            Caller::Host(host) => self.has_order(host, instance, stores).await?,
        };
        if !may {
            return Err(Failure::forbidden(
                "private data is taken from the host that was told to make a backup of its instance, and from users to \
                 repair a backup",
            ));
        }
        Ok(self.depot().put_pack(instance, pack, bytes).await?)
    }

    async fn has_order(
        &self,
        host: &Name,
        instance: &InstanceId,
        wanted: impl Fn(&OperationKind) -> bool,
    ) -> Answer<bool> {
        let owns = self.database().instance(instance).await?.is_some_and(|row| row.host == *host);
        let open = self.database().open_operations().await?;
        Ok(owns && open.iter().any(|(operation, _)| operation.instance == *instance && wanted(&operation.kind)))
    }

    /// Some bytes of a pack: for users, for the host that owns the instance, and for one that was told to restore a
    /// backup which the pack belongs to.
    pub(crate) async fn read_private(
        &self,
        caller: &Caller,
        instance: &InstanceId,
        pack: &Digest,
        range: Range<u64>,
    ) -> Answer<Bytes> {
        let may = match caller {
            Caller::User => true,
            Caller::Joiner(_) => false,
            Caller::Host(host) => {
                self.database().instance(instance).await?.is_some_and(|row| row.host == *host)
                    || self.restores(host, instance, pack).await?
            }
        };
        if !may {
            return Err(Failure::forbidden("this private data belongs to an instance that this host does not own"));
        }
        Ok(self.depot().read(instance, pack, range).await?)
    }

    async fn restores(&self, host: &Name, instance: &InstanceId, pack: &Digest) -> Answer<bool> {
        for (operation, _) in self.database().open_operations().await? {
            let OperationKind::Restore { backup } = &operation.kind else { continue };
            let owner = self.database().instance(&operation.instance).await?;
            let Some(backup) = self.database().backup(backup).await? else { continue };
            let holds = backup.instance == *instance && backup.packs.iter().any(|info| info.digest == *pack);
            if holds && owner.is_some_and(|row| row.host == *host) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes a backup visible whose packs are all here.
    pub(crate) async fn record_backup(&self, host: &Name, id: &OperationId, mut backup: Backup) -> Answer<Backup> {
        let _stays = self.inner.private.read().await;
        let (operation, row) = self.ordered(host, id).await?;
        let refused = |why: &str| Failure::invalid(format!("this backup of {} is refused: {why}", row.spec.name));
        if !stores(&operation.kind) || backup.id.as_str() != id.as_str() {
            return Err(refused("no such backup was ordered"));
        }
        if backup.instance != operation.instance || backup.generation != row.spec.generation {
            return Err(refused("it is of another instance or of another owner's time"));
        }
        if backup.disks.is_empty() || backup.disks.len() > 16 {
            return Err(refused("it has an impossible number of disks"));
        }
        let mut infos = Vec::new();
        for pack in &backup.packs {
            infos.push(self.depot().pack_info(&backup.instance, &pack.digest).await?);
        }
        let before = self.database().private_packs(&backup.instance).await?;
        backup.stored_bytes = infos.iter().map(|pack| pack.size).sum();
        backup.new_bytes = infos.iter().filter(|pack| !before.contains(&pack.digest)).map(|pack| pack.size).sum();
        backup.packs = infos;
        backup.name = row.spec.name.clone();
        if backup.whole.is_some() != (operation.kind != OperationKind::Backup) {
            return Err(refused("it is of another kind than was ordered"));
        }
        self.database().insert_backup(&backup).await?;
        if backup.whole.is_some() {
            // Only the newest is gone on with. One that is being brought somewhere stays.
            let others = self.database().backups(Some(&backup.instance)).await?;
            for old in others.iter().filter(|old| old.whole.is_some() && old.id != backup.id) {
                if !self.arrives(&old.id).await? {
                    self.database().delete_backup(&old.id).await?;
                }
            }
        }
        self.state_changed();
        self.backup(&backup.id).await
    }

    /// Forgets a backup. Its packs go with the next collection.
    pub(crate) async fn delete_backup(&self, id: &BackupId) -> Answer<()> {
        let backup = self.backup(id).await?;
        if self.arrives(id).await? || !self.database().delete_backup(id).await? {
            let name = backup.name;
            return Err(Failure::conflict(format!(
                "the backup of {name} is being restored; try again when that ended"
            )));
        }
        self.state_changed();
        Ok(())
    }

    /// All private packs and what needs them.
    pub(crate) async fn private_view(&self) -> Answer<Vec<PrivatePack>> {
        let mut users: BTreeMap<(InstanceId, Digest), Vec<BackupId>> = BTreeMap::new();
        for backup in self.database().backups(None).await? {
            for pack in &backup.packs {
                users.entry((backup.instance.clone(), pack.digest)).or_default().push(backup.id.clone());
            }
        }
        let mut packs = Vec::new();
        for (instance, digest, size) in self.depot().list_private().await? {
            let backups = users.remove(&(instance.clone(), digest)).unwrap_or_default();
            packs.push(PrivatePack { instance, digest, size, backups });
        }
        let missing = |((instance, digest), backups)| PrivatePack { instance, digest, size: 0, backups };
        packs.extend(users.into_iter().map(missing));
        Ok(packs)
    }

    /// Removes packs that no backup refers to, but none of instances of which a backup is being made: nothing is put
    /// there, and no backup recorded, while it decides and removes.
    pub(crate) async fn collect_private(&self) -> Answer<Vec<PrivatePack>> {
        let mut by_instance: HashMap<InstanceId, Vec<(Digest, u64)>> = HashMap::new();
        for (instance, digest, size) in self.depot().list_private().await? {
            by_instance.entry(instance).or_default().push((digest, size));
        }
        let mut removed = Vec::new();
        for (instance, packs) in by_instance {
            let _alone = self.inner.private.write().await;
            let exists = self.database().instance(&instance).await?.is_some();
            let open = self.database().open_operations().await?;
            let backs_up = |operation: &Operation| stores(&operation.kind) && operation.instance == instance;
            if exists && open.iter().any(|(operation, _)| backs_up(operation)) {
                continue;
            }
            let needed: HashSet<Digest> = self.database().private_packs(&instance).await?;
            for (digest, size) in packs.into_iter().filter(|(digest, _)| !needed.contains(digest)) {
                self.depot().remove_pack(&instance, &digest).await?;
                removed.push(PrivatePack { instance: instance.clone(), digest, size, backups: Vec::new() });
            }
        }
        Ok(removed)
    }

    /// The key that is used from now on. Made at first use; never where backups need another that was lost, because
    /// nobody should notice that only when it is too late.
    async fn current_key(&self) -> Answer<OwnerKey> {
        let ring = self.inner.keys.lock().await;
        if let Some(id) = ring.current()? {
            return Ok(ring.get(&id)?);
        }
        if let Some(backup) = self.database().backups(None).await?.first() {
            return Err(Failure::conflict(format!(
                "the owner's key is not here, and there are backups that were encrypted with key {}: bring it back with \
                 `collective key import FILE`, or go on with a new one by `collective key new`. Without the key the data in \
                 these backups is lost",
                backup.key
            )));
        }
        let key = OwnerKey::generate()?;
        ring.add(&key)?;
        tracing::info!(key = %key.id(), "made the owner's key for private data");
        Ok(key)
    }

    /// Which keys there are and which are needed.
    pub(crate) async fn key_view(&self) -> Answer<KeyView> {
        let mut counts: BTreeMap<KeyId, u64> = BTreeMap::new();
        for backup in self.database().backups(None).await? {
            *counts.entry(backup.key).or_default() += 1;
        }
        let ring = self.inner.keys.lock().await;
        let needed = counts.into_iter().map(|(key, backups)| KeyNeed { here: ring.get(&key).is_ok(), key, backups });
        Ok(KeyView { current: ring.current()?, needed: needed.collect() })
    }

    /// A copy of a key, to keep elsewhere.
    pub(crate) async fn export_key(&self, wanted: KeyWanted) -> Answer<KeyCopy> {
        let key = match wanted.key {
            Some(id) => self.inner.keys.lock().await.get(&id)?,
            None => self.current_key().await?,
        };
        Ok(KeyCopy { key })
    }

    /// Takes a key and uses it from now on; those that are here stay.
    pub(crate) async fn import_key(&self, copy: KeyCopy) -> Answer<KeyView> {
        self.inner.keys.lock().await.add(&copy.key)?;
        self.key_view().await
    }

    /// Makes another key and uses it from now on; those that are here stay.
    pub(crate) async fn new_key(&self) -> Answer<KeyView> {
        self.import_key(KeyCopy { key: OwnerKey::generate()? }).await
    }
}

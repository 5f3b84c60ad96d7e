//! Backups of private data, and the keys they are encrypted with.

use collective_keys::{KeyId, OwnerKey};
use collective_model::run::RunImage;
use collective_model::{
    ApplianceName, BackupId, CheckpointMachine, Digest, DiskRole, Generation, InstanceId, Name, SystemWrites,
    Timestamp, VersionName,
};
use collective_store::PackInfo;
use serde::{Deserialize, Serialize};

/// A backup: all that the plane keeps of it. What is in it is known to its owner's key only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backup {
    /// Names it.
    pub id: BackupId,
    /// Whose data it is; its packs are stored under this.
    pub instance: InstanceId,
    /// The instance's name then.
    pub name: Name,
    /// Which ownership of the instance it was made under.
    pub generation: Generation,
    /// What the instance is an instance of.
    pub appliance: ApplianceName,
    /// The version it had.
    pub version: Digest,
    /// That version's name.
    pub version_name: VersionName,
    /// When the data was as it is in here.
    pub taken: Timestamp,
    /// The key it is encrypted with.
    pub key: KeyId,
    /// Its disks.
    pub disks: Vec<BackupDisk>,
    /// The packs that hold them.
    pub packs: Vec<PackInfo>,
    /// Bytes of the disks that are not zeros.
    pub used_bytes: u64,
    /// Bytes of all its packs, those that it shares with earlier backups among them.
    pub stored_bytes: u64,
    /// Bytes of the packs that it added.
    pub new_bytes: u64,
    /// It is the whole instance, to go on elsewhere, and not a backup of its data.
    #[serde(default)]
    pub whole: Option<Whole>,
}

/// What an instance is beside the content of its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    /// What each of the disks is, in their order.
    pub disks: Vec<WholeDisk>,
    /// The machine that stood still; none: it was off.
    pub machine: Option<WholeMachine>,
    /// Files of the instance.
    pub files: Vec<WholeFile>,
    /// The number of its next event.
    pub next_event: u64,
}

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeDisk {
    /// Its role.
    pub role: DiskRole,
    /// How long its own writes last.
    pub writes: SystemWrites,
    /// What it is made from.
    pub image: Option<RunImage>,
    /// The keyed name of the page that says what of it is read first when the machine goes on.
    #[serde(default)]
    pub boot: Option<Digest>,
}

/// A machine that stood still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeMachine {
    /// The keyed name of its memory's root page.
    pub memory: Digest,
    /// The keyed name of the page that says what of it is read first when the machine goes on.
    #[serde(default)]
    pub boot: Option<Digest>,
    /// What of its memory is in its version already.
    #[serde(default)]
    pub image: Option<RunImage>,
    /// The digest of the file with the rest of it.
    pub state: Digest,
    /// The instant that both are of.
    pub epoch: String,
    /// MiB of memory.
    pub memory_mib: u64,
    /// Virtual CPUs.
    pub cpus: u32,
    /// What users see of it.
    pub info: CheckpointMachine,
}

/// A file of an instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeFile {
    /// Its name among such files.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// The keyed name of its root page.
    pub root: Digest,
}

/// A data disk in a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupDisk {
    /// Its name.
    pub name: Name,
    /// In bytes.
    pub size: u64,
    /// The keyed name of its root page. A store that gives an older state cannot give one of this name.
    pub root: Digest,
}

/// The answer to `POST /v1/hosts/self/operations/ID/private`: what a host needs for a backup or restore that it was told
/// to make; and to `POST /v1/hosts/self/instances/ID/private`: what it needs for an instance that is arriving. Never logged, and kept in memory only.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PrivateGrant {
    /// The owner's key.
    pub key: OwnerKey,
    /// For a backup: the one before, which need not be sent again. To restore: that backup.
    pub backup: Option<Backup>,
}

/// `GET /v1/key`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyView {
    /// The key that backups are encrypted with from now on; none was needed yet, or it was lost.
    pub current: Option<KeyId>,
    /// The keys that backups which are there were encrypted with.
    pub needed: Vec<KeyNeed>,
}

/// A key that backups need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyNeed {
    /// Which.
    pub key: KeyId,
    /// How many backups need it.
    pub backups: u64,
    /// Whether it is here and can be used.
    pub here: bool,
}

/// `POST /v1/key/export` gives, and `POST /v1/key/import` takes, a key. Only by the local socket.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyCopy {
    /// The key.
    pub key: OwnerKey,
}

/// `POST /v1/key/export`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KeyWanted {
    /// Which; none: the one in use, made now if there is none and no backup needs another.
    #[serde(default)]
    pub key: Option<KeyId>,
}

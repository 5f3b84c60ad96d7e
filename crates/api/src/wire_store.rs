//! What is in a plane's store, what needs it, and what was removed.

use collective_model::{ApplianceName, BackupId, Digest, InstanceId, Name, VersionName};
use serde::{Deserialize, Serialize};

/// `GET /v1/store`
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StoreView {
    /// All packs that are there.
    pub packs: Vec<PackView>,
    /// Packs that versions refer to and that are not there.
    pub missing: Vec<PackView>,
    /// All versions, newest first for each appliance.
    pub versions: Vec<VersionUse>,
    /// All packs of private data, those that are missing with a size of 0.
    #[serde(default)]
    pub private: Vec<PrivatePack>,
}

/// A pack of private data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivatePack {
    /// Whose.
    pub instance: InstanceId,
    /// Its name.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// The backups that refer to it.
    pub backups: Vec<BackupId>,
}

/// A pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackView {
    /// Whose.
    pub appliance: ApplianceName,
    /// Its name.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// The versions that refer to it.
    pub versions: Vec<Digest>,
}

/// A version and what needs it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionUse {
    /// Of what.
    pub appliance: ApplianceName,
    /// Its name.
    pub version: VersionName,
    /// Its digest.
    pub digest: Digest,
    /// Channels that point to it.
    pub channels: Vec<Name>,
    /// Instances that have it, or a checkpoint of it.
    pub instances: Vec<Name>,
    /// The packs it refers to.
    pub packs: Vec<Digest>,
}

/// The answer to `POST /v1/store/collect`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Collected {
    /// Packs that were removed.
    pub removed: Vec<PackView>,
    /// Packs that no version refers to, kept until publishers at work have ended.
    pub waiting: Vec<PackView>,
    /// Packs of private data that were removed.
    #[serde(default)]
    pub private: Vec<PrivatePack>,
}

/// A pack of which versions use less than half; `GET /v1/store/repack` lists them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackWaste {
    /// Whose.
    pub appliance: ApplianceName,
    /// Its name.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// Bytes of it that a version uses.
    pub used_bytes: u64,
}

/// The answer to `POST /v1/store/repack`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Repacked {
    /// Packs that no version refers to any more.
    pub packs: Vec<PackWaste>,
    /// Bytes of the new packs that have what is used of them.
    pub bytes_written: u64,
}

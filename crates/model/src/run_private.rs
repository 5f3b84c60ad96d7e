//! What a host daemon and a runner of the same program say to each other about private data.
//!
//! The daemon starts `runner DIR --private` and writes two lines to its standard input: the owner's key in hexadecimal
//! digits, and a [`PrivateOrder`]. The runner writes [`PrivateNews`] to its standard output, one per line; the last one is
//! the outcome. When its standard input ends before that, it ends. The key is in no argument, no environment and no file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::kept::KeptCopy;
use crate::run::RunImage;
use crate::{Digest, InstanceId, Name};

/// What to do with the disks of a machine that is off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum PrivateOrder {
    /// Encrypt disks and send what is new.
    Backup {
        /// Whose packs they become.
        home: InstanceId,
        /// Packs of the backup before.
        known: Vec<RunPack>,
        /// Where hashes of blocks of packs are remembered.
        hashes: PathBuf,
        /// Which disks of `run.json`.
        disks: Vec<Name>,
        /// The whole instance: what else belongs to it. Then what its disks and memory have of its version's image is
        /// not stored again.
        #[serde(default)]
        whole: Option<Box<WholeOrder>>,
    },
    /// Fetch disks into layers.
    Restore {
        /// Whose packs they are.
        home: InstanceId,
        /// The backup's packs.
        packs: Vec<RunPack>,
        /// A folder for what is fetched, still encrypted; the daemon removes it.
        scratch: PathBuf,
        /// Where each disk goes, and the memory.
        disks: Vec<RestoreDisk>,
        /// Where each file goes.
        #[serde(default)]
        files: Vec<RestoreFile>,
        /// Bring only files and indexes, which stay in the scratch folder: the layers come when the machine runs.
        #[serde(default)]
        begin: bool,
        /// What this host keeps of it since it was here.
        #[serde(default)]
        kept: KeptCopy,
        /// Where hashes of blocks of these packs are to be remembered.
        #[serde(default)]
        hashes: Option<PathBuf>,
    },
}

/// What belongs to an instance beside its disks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeOrder {
    /// The version that the instance has. What disks have of its images stays there: no other version is sure to be kept.
    pub version: Digest,
    /// What is below the layers of its memory.
    #[serde(default)]
    pub memory_image: Option<RunImage>,
    /// Layers of its memory, oldest first; empty: it has none.
    pub memory: Vec<PathBuf>,
    /// The memory's size in bytes.
    pub memory_size: u64,
    /// What was read first when it last went on, as the runner left it; none: it is not known.
    #[serde(default)]
    pub touched: Option<PathBuf>,
    /// Files, by a name that whoever restores them knows.
    pub files: Vec<(String, PathBuf)>,
}

/// A file to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreFile {
    /// The keyed name of its root page.
    pub root: Digest,
    /// In bytes.
    pub size: u64,
    /// The file to create.
    pub path: PathBuf,
}

/// A file that was stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredFile {
    /// Its name.
    pub name: String,
    /// In bytes.
    pub size: u64,
    /// The keyed name of its root page.
    pub root: Digest,
}

/// A pack, as lists name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunPack {
    /// Its name.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// Bytes of its directory and trailer.
    pub directory: u64,
}

/// A disk to restore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreDisk {
    /// Its name.
    pub name: Name,
    /// The keyed name of its root page.
    pub root: Digest,
    /// Its size in the backup, in bytes.
    pub size: u64,
    /// The size of the disk that it becomes, in bytes; not less.
    pub becomes: u64,
    /// The layer to create.
    pub layer: PathBuf,
    /// What is below the layer; only what differs from it goes into the layer.
    #[serde(default)]
    pub image: Option<RunImage>,
    /// The keyed name of the page that says what of it is read first when it is gone on with.
    #[serde(default)]
    pub boot: Option<Digest>,
}

/// How it is going, and what came out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrivateNews {
    /// So many bytes of so many.
    Progress {
        /// Done.
        done: u64,
        /// Of.
        total: u64,
    },
    /// A backup is in the store; nobody refers to it yet.
    Stored {
        /// Its disks.
        disks: Vec<StoredDisk>,
        /// The packs that hold them.
        packs: Vec<Digest>,
        /// Bytes of the disks that are not zeros.
        used_bytes: u64,
        /// The memory, where that was stored.
        #[serde(default)]
        memory: Option<StoredMemory>,
        /// Files that were stored.
        #[serde(default)]
        files: Vec<StoredFile>,
    },
    /// What was ordered is there, durable.
    Restored {
        /// Bytes of blocks that are not zeros.
        bytes: u64,
        /// Stored bytes that were fetched.
        fetched: u64,
        /// Stored bytes that are still to come.
        #[serde(default)]
        missing: u64,
        /// Stored bytes that need not come: they are kept here.
        #[serde(default)]
        kept: u64,
    },
    /// It did not work.
    Failed {
        /// Why.
        why: String,
    },
}

/// A memory that was stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredMemory {
    /// The keyed name of its root page.
    pub root: Digest,
    /// The page that says what of it is read first.
    pub boot: Option<Digest>,
}

/// A disk that was stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredDisk {
    /// Its name.
    pub name: Name,
    /// In bytes.
    pub size: u64,
    /// The keyed name of its root page.
    pub root: Digest,
    /// The page that says what of it is read first when the machine goes on.
    #[serde(default)]
    pub boot: Option<Digest>,
}

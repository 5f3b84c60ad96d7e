//! What is asked of an instance once, and how far it is.

use serde::{Deserialize, Serialize};

use crate::{BackupId, CheckpointId, Digest, InstanceId, Name, OperationId};

/// Something asked of one instance that has a beginning and an end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Names it.
    pub id: OperationId,
    /// Which instance.
    pub instance: InstanceId,
    /// What.
    pub kind: OperationKind,
}

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum OperationKind {
    /// Say what an update to this version would fetch.
    Plan {
        /// The version.
        to: Digest,
    },
    /// Update to this version, and come back by itself if it does not become healthy.
    Update {
        /// The version.
        to: Digest,
    },
    /// Go back to the state before the last update.
    Rollback {
        /// Whether data disks go back too.
        with_data: bool,
    },
    /// Stop and start.
    Restart,
    /// Say which blocks the guest read while it booted.
    Trace,
    /// Say of what the machine is made that is suspended, for whoever makes a version of it on this host.
    Describe,
    /// Read the end of the guest's serial console.
    Logs {
        /// At most this many lines.
        lines: u32,
    },
    /// Encrypt the data disks and put them into the store.
    Backup,
    /// Put a backup's data in place of the present.
    Restore {
        /// Which, of this instance or another.
        backup: BackupId,
    },
    /// Put what the instance is, which does not run, into the store.
    Push,
    /// Bring the instance from the store, and let its machine go on if it has one.
    Receive {
        /// What it was.
        backup: BackupId,
        /// Without its memory: it is booted.
        cold: bool,
    },
    /// Save the running machine, put it into the store, and end it.
    Suspend,
    /// Go on with the machine that was saved.
    Resume,
    /// Bring the running machine to another host, which owns it from then on.
    Live {
        /// Where to.
        to: Name,
        /// Only say how long that would take.
        only_measure: bool,
    },
    /// Keep what the instance is now, its running machine included.
    Checkpoint {
        /// In the user's words.
        why: Option<String>,
    },
    /// Put a checkpoint in place of the present, which is kept as a checkpoint.
    GoBack {
        /// Which.
        to: CheckpointId,
        /// Only disks go back, and the machine is booted.
        disks_only: bool,
        /// Disks that stay as they are; only with `disks_only`.
        keep: Vec<Name>,
    },
    /// Give the picture of the screen at a checkpoint.
    Screen {
        /// Which.
        checkpoint: CheckpointId,
    },
    /// Forget a checkpoint.
    Forget {
        /// Which.
        checkpoint: CheckpointId,
    },
    /// Remove the instance from the host.
    Delete {
        /// Whether its data disks go as well.
        data: bool,
    },
}

impl OperationKind {
    /// The verb, as on the command line.
    pub fn verb(&self) -> &'static str {
        match self {
            Self::Plan { .. } => "plan",
            Self::Update { .. } => "update",
            Self::Rollback { .. } => "rollback",
            Self::Restart => "restart",
            Self::Trace => "trace",
            Self::Describe => "describe",
            Self::Logs { .. } => "logs",
            Self::Backup => "backup",
            Self::Restore { .. } => "restore",
            Self::Push => "push",
            Self::Receive { .. } => "move",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Live { .. } => "move",
            Self::Checkpoint { .. } => "checkpoint",
            Self::GoBack { .. } => "restore",
            Self::Screen { .. } => "screen",
            Self::Forget { .. } => "forget",
            Self::Delete { .. } => "delete",
        }
    }
}

/// How far an operation is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum OperationState {
    /// The host has not taken it up.
    Pending,
    /// Under way.
    Running {
        /// What is being done.
        doing: String,
        /// Bytes fetched so far.
        done: u64,
        /// Bytes to fetch, where known.
        total: u64,
    },
    /// Finished.
    Done {
        /// What came out; its shape depends on the kind.
        result: serde_json::Value,
    },
    /// It did not work.
    Failed {
        /// What was attempted, why it failed, what to do.
        error: String,
    },
}

impl OperationState {
    /// Whether it will not change any more.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. })
    }
}

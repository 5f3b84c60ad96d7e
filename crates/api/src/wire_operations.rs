//! What users ask of one instance that has a beginning and an end.

use collective_model::{BackupId, CheckpointId, Name, PublishedPort, VersionName};
use serde::{Deserialize, Serialize};

/// `POST /v1/instances/NAME/operations`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum OperationRequest {
    /// Plan an update.
    Plan {
        /// A version or channel label; none: the head of the followed channel, else of `stable`.
        to: Option<VersionName>,
    },
    /// Update.
    Update {
        /// As for `plan`.
        to: Option<VersionName>,
    },
    /// Go back.
    Rollback {
        /// Data too.
        with_data: bool,
    },
    /// Stop and start.
    Restart,
    /// Say which blocks the guest read while it booted.
    Trace,
    /// Say of what the machine is made that is suspended.
    Describe,
    /// Read the end of the serial console.
    Logs {
        /// At most this many lines.
        lines: u32,
    },
    /// Encrypt the data disks and put them into the store.
    Backup,
    /// Put a backup's data in place of the present.
    Restore {
        /// Which; none: the newest of this instance.
        backup: Option<BackupId>,
    },
    /// Put what the instance is, which does not run, into the store.
    Push,
    /// Save the running machine, put it into the store, and end it.
    Suspend,
    /// Go on with the machine that was saved.
    Resume,
    /// Bring the running machine to another host.
    Live {
        /// Where to.
        to: Name,
        /// Only say how long that would take.
        #[serde(default)]
        only_measure: bool,
    },
    /// Keep what the instance is now, its running machine included.
    Checkpoint {
        /// In the user's words.
        #[serde(default)]
        why: Option<String>,
    },
    /// Put a checkpoint in place of the present, which is kept as a checkpoint.
    GoBack {
        /// Which.
        to: CheckpointId,
        /// Only disks go back, and the machine is booted.
        #[serde(default)]
        disks_only: bool,
        /// Disks that stay as they are; only with `disks_only`.
        #[serde(default)]
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
    /// Remove.
    Delete {
        /// Data too.
        data: bool,
    },
}

/// `POST /v1/instances/NAME/clone`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CloneRequest {
    /// As it was then.
    pub checkpoint: CheckpointId,
    /// The clones' names.
    pub names: Vec<Name>,
    /// Published ports; only for a single clone.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
}

/// `POST /v1/instances/NAME/move`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MoveRequest {
    /// Where to.
    pub host: Name,
    /// Without its memory: it is booted there.
    #[serde(default)]
    pub cold: bool,
}

//! The words of Collective as types: what makers, hosts and the plane say to each other.
//!
//! Everything depends on this crate, and it depends on none of ours. It does no I/O: what it decides (is a
//! manifest sound, may an instance go from one state to another, should an update happen now) it decides from
//! its arguments alone, so that every decision can be tested without a machine.

#![forbid(unsafe_code)]

mod digest;
mod health;
mod images;
mod instance;
pub mod kept;
mod lifecycle;
pub mod live;
mod manifest;
mod names;
mod operation;
mod platform;
mod recipe;
pub mod run;
pub mod run_lifeline;
pub mod run_live;
pub mod run_merge;
pub mod run_private;
pub mod schedule;
mod units;
mod update;
mod warm;

pub use digest::{Digest, ParseDigestError};
pub use health::{HealthCheck, HealthState, HttpProbe};
pub use images::StoredImage;
pub use instance::{
    BackupId, Checkpoint, CheckpointId, CheckpointMachine, Generation, InstanceId, Observed, ObservedDisk, OperationId,
    Origin, PublishedPort, Spec, TunnelId,
};
pub use lifecycle::{State, Trigger};
pub use manifest::{
    CloudInit, Cpu, Disk, DiskRole, Firmware, Hardware, MANIFEST_FORMAT, MAX_MANIFEST_BYTES, Manifest, ManifestError,
    Port, Protocol, Setting, SettingType, Ssh, SystemWrites,
};
pub use names::{ApplianceName, Name, ParseNameError, Reference, Selector, VersionName};
pub use operation::{Operation, OperationKind, OperationState};
pub use recipe::{BuildRecipe, Recipe, RecipeDisk, RecipeError, RecipeHardware};
pub use units::{ByteSize, ParseUnitError, Span, Timestamp};
pub use update::{UpdateDecision, UpdateFacts, decide_update};
pub use warm::{Warm, WarmFile, WarmImage};

//! Layers that become one: what a host daemon orders, and what it is told. Part of the runner's protocol ([`crate::run`]).
//!
//! A runner does it for layers of its own machine while that runs. For those of a machine that is off the daemon starts
//! `runner DIR --merge`, writes one [`MergeOrder`] to its standard input, and reads one [`MergeStatus`]; when its standard
//! input ends, that process ends.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Make one layer of several, which are only read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeOrder {
    /// Names this order, for [`MergeStatus::number`].
    pub number: u64,
    /// Layers that lie on each other, oldest first.
    pub layers: Vec<PathBuf>,
    /// The layer to create.
    pub target: PathBuf,
    /// Whether blocks of zeros are kept: they hide what is below the lowest one.
    pub keep_zeros: bool,
    /// Whether somebody waits for it. Otherwise it leaves the host's disk to others for most of the time.
    #[serde(default)]
    pub hurry: bool,
}

/// How an order to merge is going.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergeStatus {
    /// Which order.
    pub number: u64,
    /// Bytes copied so far.
    pub copied: u64,
    /// What came out, once it did: the layer is durable, and a machine that runs has it in place of the old ones; or why not.
    pub outcome: Option<Result<(), String>>,
}

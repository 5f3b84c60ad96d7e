//! The host daemon: keeps instances as the plane wants them, and tells the plane what it sees.
//!
//! It owns one folder: the cache of the store, and for each instance a record, its layers, and a runner that outlives
//! the daemon. Every instance is one task ([`instance`]) that alone changes its record. Nothing here needs the plane to
//! be there: orders that came are carried out to their end, and reports wait.

#![forbid(unsafe_code)]

mod arriving;
mod clone;
mod context;
mod daemon;
mod files;
mod holding;
mod instance;
mod leaving;
mod left;
mod link;
mod merging;
mod observe;
mod private;
mod record;
mod rehearsal;
mod report;
mod saving;
mod sealed;
mod seed;
mod start;
mod timeline;
mod travel;
mod tunnel;
mod update;
mod visiting;
mod warm;

use std::ffi::OsString;
use std::path::PathBuf;

pub use context::trust;
pub use daemon::{HostError, first_closed_folder, run};
pub use files::{create_folder, read_json, write_json};

/// What a host needs to know of itself.
#[derive(Clone, Debug)]
pub struct HostConfig {
    /// Its folder.
    pub data: PathBuf,
    /// The program and arguments of a runner; its directory is added.
    pub runner: Vec<OsString>,
    /// How a runner reaches the store: a file in the folder, readable by its owner only.
    pub credentials: PathBuf,
    /// Addresses of the plane, which no guest may reach.
    pub plane: Vec<std::net::SocketAddr>,
    /// Never use KVM.
    pub force_tcg: bool,
    /// What machines run on here.
    pub platform: Option<collective_model::run::Platform>,
    /// The portable processor that machines are booted with; none: the best there is.
    pub processor: Option<String>,
    /// What KVM detection found, for people.
    pub accelerator: String,
    /// What is worse than it could be, for people.
    pub warnings: Vec<String>,
    /// The cache is kept below this, in bytes, but for what instances need.
    pub cache_budget: u64,
    /// Bytes of memory that instances may claim together; none: all of the machine's.
    pub memory: Option<u64>,
}

impl HostConfig {
    /// Where all of a memory is that comes with a version, for all instances that begin with it.
    pub(crate) fn copy_of(&self, image: &collective_model::Digest) -> PathBuf {
        self.warm().join(image.to_string())
    }

    /// The folder of these files.
    pub(crate) fn warm(&self) -> PathBuf {
        self.data.join("warm")
    }

    /// The portable processor for a machine of this version that is booted; none: the host's own.
    pub(crate) fn processor_for(&self, manifest: &collective_model::Manifest) -> Option<String> {
        self.platform.as_ref()?.to_boot(manifest.hardware.cpu, self.processor.as_deref())
    }
}

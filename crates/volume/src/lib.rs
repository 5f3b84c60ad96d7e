//! Bytes on demand: a machine's disks as plain files, each an image of the store under private copy-on-write layers.
//!
//! A [`Disk`] is a base image (or zeros) and a chain of [`Layer`]s; the last layer takes the writes. Freezing the
//! chain and going on with a new layer is a checkpoint, and costs nothing. What lies between two states that are kept is
//! merged into one layer ([`Layer::merge`]), while the disk is in use too. [`Mount`] shows disks through FUSE.

#![deny(unsafe_code)]

mod backing;
mod chain;
mod disk;
mod follow;
mod fuse;
mod held;
mod layer;
mod log;
mod make;
mod map;
mod merge;
mod mount;
mod recorder;
mod replay;
mod rules;

#[cfg(test)]
mod power_cut;

pub use disk::{Disk, DiskError, MAX_LAYERS};
pub use layer::{Layer, LayerError};
pub use mount::{File, Mount, MountError};

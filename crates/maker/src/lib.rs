//! The maker's workshop: recipes become disk files, disk files become what is published.

#![forbid(unsafe_code)]

mod build;
mod disks;

pub use build::{BuildError, BuiltVersion, build, read_recipe};
pub use disks::{DiskFile, DisksError, PreparedDisk, open_disks};

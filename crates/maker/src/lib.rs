//! The maker's workshop: recipes become disk files, disk files become what is published.

#![forbid(unsafe_code)]

mod build;
mod disks;
mod import;
mod ova;
mod ovf;

pub use build::{BuildError, BuiltVersion, build, read_recipe};
pub use disks::{DiskFile, DisksError, PreparedDisk, open_disks, raw_to_qcow2};
pub use import::{Import, ImportError, Imported, import};

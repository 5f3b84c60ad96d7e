//! The maker's workshop: recipes become disk files, disk files become what is published.

#![forbid(unsafe_code)]

mod build;
mod checksums;
mod disks;
mod envelope;
mod export;
mod guest;
mod import;
mod ova;
mod ovf;

pub use build::{BuildError, BuiltVersion, build, read_recipe};
pub use disks::{DiskFile, DisksError, PreparedDisk, open_disks};
pub use export::{Export, ExportDisk, ExportError, ExportFormat, export};
pub use import::{Import, ImportError, Imported, import};

/// Reads an OVF descriptor and imports nothing; says what is wrong with it.
pub fn check_ovf(text: &str) -> Result<(), String> {
    ovf::parse(text).map(drop)
}

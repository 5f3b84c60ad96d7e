//! Which clusters of a FAT12, FAT16 or FAT32 file system nobody needs, as on an EFI system partition.
//! Layout: Microsoft, "FAT32 File System Specification", version 1.03; what is not written there (the byte that says
//! whether a volume was unmounted): Linux, fs/fat.
//!
//! FAT has no checksums, and a clean mark that many programs do not keep. So the table is believed only after
//! everything that can be reached from the root directory was followed through it: each file and directory has a
//! chain of its own, long enough, of clusters that are in use. One that does not, and nothing is unused.

mod boot;
mod table;
mod tree;

use std::ops::Range;

use crate::read::{Part, Stop};
use boot::Geometry;
use table::Table;

/// A file system whose boot sector is sound.
pub(crate) struct FileSystem<'a> {
    part: Part<'a>,
    geometry: Geometry,
}

pub(crate) fn open<'a>(part: &Part<'a>) -> Result<FileSystem<'a>, Stop> {
    Ok(FileSystem { part: part.clone(), geometry: Geometry::read(part)? })
}

impl FileSystem<'_> {
    pub(crate) fn label(&self) -> Option<String> {
        self.geometry.label.clone()
    }

    /// Bytes of the part that nobody needs: sorted, disjoint, not aligned.
    pub(crate) fn unused(&self) -> Result<Vec<Range<u64>>, Stop> {
        self.geometry.check_clean()?;
        let table = Table::read(&self.part, &self.geometry)?;
        tree::check(&self.part, &self.geometry, &table)?;
        let free = table.free_runs();
        Ok(free.into_iter().map(|run| self.geometry.offset_of(run.start)..self.geometry.offset_of(run.end)).collect())
    }
}

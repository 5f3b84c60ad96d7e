//! What lies on a raw disk.
//!
//! A published image need not carry what its file systems do not use, and more than half of the blocks that change
//! in a security update are such (the measurement is why this crate exists). [`unused`] finds them by reading the
//! partition table, the block bitmaps of ext2/3/4 and the contents of an empty journal, the allocation tables of FAT, the
//! B-trees of free space of XFS, and the headers of Linux swap space.
//!
//! The rule throughout is: *any doubt means used*. A file system that was not cleanly unmounted, whose checksums or
//! counts do not agree, or that has a feature not known here gives no unused ranges and a note that says why.
//! Nothing here writes, allocates by numbers read from the disk without a bound, or trusts an offset.

#![forbid(unsafe_code)]
// Lists of ranges are what this crate is about, and some have one element.
#![allow(clippy::single_range_in_vec_init)]

mod checksum;
mod ext4;
mod fat;
mod gpt;
mod mbr;
mod ranges;
mod read;
mod signature;
mod survey;
mod swap;
mod xfs;

pub use read::ReadAt;
pub use survey::{BLOCK, DiskError, Found, Survey, unused};

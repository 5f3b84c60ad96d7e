//! The table that gives the file system its name: for each cluster whether it is free, or which one follows it.

use std::ops::Range;

use super::boot::{Geometry, Kind};
use crate::read::{Fields, Part, Stop, doubt};

/// What the table says about one cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Free,
    /// The medium is damaged there; nothing is known about its content.
    Bad,
    /// The last one of a chain.
    Last,
    Next(u32),
}

/// A table all of whose copies agree, and whose entries make sense on their own.
pub(super) struct Table {
    kind: Kind,
    bytes: Vec<u8>,
    /// One more than the highest number of a cluster; the lowest is 2.
    end: u32,
}

impl Table {
    pub(super) fn read(part: &Part<'_>, geometry: &Geometry) -> Result<Table, Stop> {
        let mut copies = geometry.tables.iter();
        let first = *copies.next().unwrap_or(&0);
        let bytes = part.read(first, geometry.entry_bytes, "reading a file allocation table")?;
        for copy in copies {
            if part.read(*copy, geometry.entry_bytes, "reading a file allocation table")? != bytes {
                return doubt("the copies of its table differ; run fsck.fat on it");
            }
        }
        let table = Table { kind: geometry.kind, bytes, end: geometry.cluster_count + 2 };
        table.check_marks(geometry.media)?;
        table.check_entries()?;
        Ok(table)
    }

    /// The first two entries are no clusters.
    fn check_marks(&self, media: u8) -> Result<(), Stop> {
        let (last, clean) = match self.kind {
            Kind::Fat12 => (0xff8, 0),
            Kind::Fat16 => (0xfff8, 0xc000),
            Kind::Fat32 => (0x0fff_fff8, 0x0c00_0000),
        };
        if self.raw(0) != (last & !0xff) | u32::from(media) {
            return doubt("its table does not begin as one does");
        }
        let marks = self.raw(1);
        if marks & clean != clean {
            return doubt("it was not cleanly unmounted or has known errors; run fsck.fat on it");
        }
        if marks < last {
            return doubt("its table does not begin as one does");
        }
        Ok(())
    }

    /// No chain leads into what is free, damaged, or in another chain.
    fn check_entries(&self) -> Result<(), Stop> {
        let mut has_predecessor = vec![false; self.end as usize];
        for cluster in 2..self.end {
            if let Entry::Next(next) = self.get(cluster)? {
                let is_used = matches!(self.get(next)?, Entry::Last | Entry::Next(_));
                if !is_used || std::mem::replace(&mut has_predecessor[next as usize], true) {
                    return doubt(format!("the chain through its cluster {cluster} is broken; run fsck.fat on it"));
                }
            }
        }
        Ok(())
    }

    /// What is said about a cluster; a number that is none is a doubt.
    pub(super) fn get(&self, cluster: u32) -> Result<Entry, Stop> {
        if !(2..self.end).contains(&cluster) {
            return doubt(format!("it refers to a cluster {cluster}, which it does not have"));
        }
        let (raw, top) = (self.raw(cluster), self.top());
        Ok(match raw {
            0 => Entry::Free,
            _ if raw == top - 8 => Entry::Bad,
            _ if raw > top - 8 => Entry::Last,
            _ if (2..self.end).contains(&raw) => Entry::Next(raw),
            _ => return doubt(format!("its cluster {cluster} is followed by one that it does not have")),
        })
    }

    /// The largest value of an entry.
    fn top(&self) -> u32 {
        match self.kind {
            Kind::Fat12 => 0xfff,
            Kind::Fat16 => 0xffff,
            Kind::Fat32 => 0x0fff_ffff,
        }
    }

    fn raw(&self, cluster: u32) -> u32 {
        let index = cluster as usize;
        match self.kind {
            // Two entries in three bytes.
            Kind::Fat12 => {
                let pair = self.bytes.u16_at(index + index / 2);
                u32::from(if index.is_multiple_of(2) { pair & 0xfff } else { pair >> 4 })
            }
            Kind::Fat16 => self.bytes.u16_at(2 * index).into(),
            // The upper four bits are kept, but mean nothing.
            Kind::Fat32 => self.bytes.u32_at(4 * index) & 0x0fff_ffff,
        }
    }

    /// Runs of free clusters, in order.
    pub(super) fn free_runs(&self) -> Vec<Range<u32>> {
        let mut runs: Vec<Range<u32>> = Vec::new();
        for cluster in (2..self.end).filter(|cluster| self.raw(*cluster) == 0) {
            match runs.last_mut() {
                Some(run) if run.end == cluster => run.end += 1,
                _ => runs.push(cluster..cluster + 1),
            }
        }
        runs
    }

    pub(super) fn end(&self) -> u32 {
        self.end
    }
}

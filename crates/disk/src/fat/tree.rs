//! Follows every file and directory from the root, to see that the table calls in use what they refer to.

use super::boot::{Geometry, Kind, Root};
use super::table::{Entry, Table};
use crate::read::{Fields, Part, Stop, doubt};

/// Bytes of directories that are read, two million entries: time is bounded whatever the disk says.
const DIRECTORY_LIMIT: u64 = 64 << 20;
const ENTRY: usize = 32;

const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
/// Read-only, hidden, system and label at once: a piece of a long name.
const ATTRIBUTES_LONG_NAME: u8 = 0x0f;
const ATTRIBUTES_KNOWN: u8 = 0x3f;

const MARK_END: u8 = 0;
const MARK_DELETED: u8 = 0xe5;

pub(super) fn check(part: &Part<'_>, geometry: &Geometry, table: &Table) -> Result<(), Stop> {
    let seen = vec![false; table.end() as usize];
    let mut walk = Walk { part, geometry, table, seen, read: 0, waiting: Vec::new() };
    match &geometry.root {
        Root::Fixed(range) => {
            // 65535 entries at most.
            let entries = part.read(range.start, (range.end - range.start) as usize, "reading a root directory")?;
            walk.entries(&entries, &mut Place { own: 0, parent: None, index: 0, has_ended: false })?;
        }
        Root::Chain(first) => walk.directory(*first, None)?,
    }
    while let Some((first, parent)) = walk.waiting.pop() {
        walk.directory(first, Some(parent))?;
    }
    Ok(())
}

struct Walk<'a> {
    part: &'a Part<'a>,
    geometry: &'a Geometry,
    table: &'a Table,
    /// Clusters that belong to something already.
    seen: Vec<bool>,
    read: u64,
    /// Directories found and not read yet: their first clusters, and those of what they are in.
    waiting: Vec<(u32, u32)>,
}

/// How far a directory was read.
struct Place {
    /// Its first cluster; 0 is the root, as in the entries that refer to it.
    own: u32,
    parent: Option<u32>,
    index: usize,
    has_ended: bool,
}

impl Walk<'_> {
    fn directory(&mut self, first: u32, parent: Option<u32>) -> Result<(), Stop> {
        let clusters = self.chain(first)?;
        let mut place = Place { own: if parent.is_some() { first } else { 0 }, parent, index: 0, has_ended: false };
        let size = self.geometry.cluster_size;
        self.read += size * clusters.len() as u64;
        if self.read > DIRECTORY_LIMIT {
            return doubt(format!("its directories have more than {} MiB", DIRECTORY_LIMIT >> 20));
        }
        for cluster in clusters {
            let entries = self.part.read(self.geometry.offset_of(cluster), size as usize, "reading a directory")?;
            self.entries(&entries, &mut place)?;
        }
        Ok(())
    }

    fn entries(&mut self, entries: &[u8], place: &mut Place) -> Result<(), Stop> {
        for entry in entries.chunks_exact(ENTRY) {
            let index = place.index;
            place.index += 1;
            match entry[0] {
                MARK_END | MARK_DELETED if index < 2 && place.parent.is_some() => return no_beginning(),
                MARK_END => place.has_ended = true,
                MARK_DELETED => {}
                // Linux goes on behind the end and shows what others do not.
                _ if place.has_ended => return doubt("a directory goes on behind its end; run fsck.fat on it"),
                _ => self.entry(entry, index, place)?,
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: &[u8], index: usize, place: &Place) -> Result<(), Stop> {
        let attributes = entry[11] & ATTRIBUTES_KNOWN;
        let high = if self.geometry.kind == Kind::Fat32 { u32::from(entry.u16_at(20)) << 16 } else { 0 };
        let first = high | u32::from(entry.u16_at(26));
        if let (Some(parent), 0 | 1) = (place.parent, index) {
            let (name, target) = if index == 0 { (b".          ", place.own) } else { (b"..         ", parent) };
            let is_right = &entry[..11] == name && attributes & ATTRIBUTE_DIRECTORY != 0 && first == target;
            return if is_right { Ok(()) } else { no_beginning() };
        }
        if attributes == ATTRIBUTES_LONG_NAME || attributes & ATTRIBUTE_LABEL != 0 {
            return Ok(());
        }
        if attributes & ATTRIBUTE_DIRECTORY != 0 {
            self.waiting.push((first, place.own));
            return Ok(());
        }
        let size = u64::from(entry.u32_at(28));
        // Nothing but an empty file has no clusters.
        let clusters = if first == 0 { 0 } else { self.chain(first)?.len() as u64 };
        if clusters * self.geometry.cluster_size < size {
            return doubt("a file has fewer clusters than its size needs; run fsck.fat on it");
        }
        Ok(())
    }

    /// All clusters of a chain; none of them may be in another. Ends, because every cluster is seen once.
    fn chain(&mut self, first: u32) -> Result<Vec<u32>, Stop> {
        let mut clusters = Vec::new();
        let mut next = first;
        loop {
            let entry = self.table.get(next)?;
            if matches!(entry, Entry::Free | Entry::Bad) || std::mem::replace(&mut self.seen[next as usize], true) {
                return doubt(format!(
                    "a file or directory has a cluster {next} that is not its own; run fsck.fat on it"
                ));
            }
            clusters.push(next);
            match entry {
                Entry::Next(cluster) => next = cluster,
                _ => return Ok(clusters),
            }
        }
    }
}

/// Every directory but the root begins with itself and what it is in.
fn no_beginning() -> Result<(), Stop> {
    doubt("a directory does not begin as one does; run fsck.fat on it")
}

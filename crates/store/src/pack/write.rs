//! Packs being made.

use std::collections::HashMap;

use collective_model::Digest;

use super::{Base, Delta, Directory, END_MAGIC, Entry, EntryKind, MAGIC, Pack};
use crate::Encoding;

/// A pack being filled.
pub struct PackBuilder {
    bytes: Vec<u8>,
    directory: Directory,
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self { bytes: MAGIC.to_vec(), directory: Directory::default() }
    }
}

impl PackBuilder {
    /// Appends one frame or page.
    pub fn add(&mut self, kind: EntryKind, digest: Digest, encoding: Encoding, stored: &[u8], length: u32) {
        let entry = self.append(kind, digest, encoding, stored, length);
        self.directory.entries.push(entry);
    }

    /// Appends a frame or page as a difference to others.
    pub fn add_delta(&mut self, kind: EntryKind, digest: Digest, stored: &[u8], length: u32, bases: Vec<Base>) {
        let entry = self.append(kind, digest, Encoding::Delta, stored, length);
        self.directory.deltas.push(Delta { entry, bases });
    }

    fn append(&mut self, kind: EntryKind, digest: Digest, encoding: Encoding, stored: &[u8], length: u32) -> Entry {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(stored);
        Entry { digest, kind, encoding, stored: stored.len() as u32, length, offset }
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was added.
    pub fn is_empty(&self) -> bool {
        self.bytes.len() == MAGIC.len()
    }

    /// Writes directory and trailer.
    pub fn finish(mut self) -> Pack {
        let start = self.bytes.len() as u64;
        let Directory { entries, deltas } = &self.directory;
        entries.iter().for_each(|entry| write_entry(&mut self.bytes, entry, 0));
        deltas.iter().for_each(|delta| write_entry(&mut self.bytes, &delta.entry, delta.bases.len() as u8));
        let mut table: HashMap<Digest, u32> = HashMap::new();
        let mut references = Vec::new();
        for base in deltas.iter().flat_map(|delta| &delta.bases) {
            let next = table.len() as u32;
            let index = *table.entry(base.frame).or_insert(next);
            if index == next {
                self.bytes.extend_from_slice(&base.frame.0);
            }
            references.extend_from_slice(&(index | u32::from(base.part) << 24).to_le_bytes());
        }
        self.bytes.extend_from_slice(&references);
        self.bytes.extend_from_slice(&start.to_le_bytes());
        self.bytes.extend_from_slice(&((entries.len() + deltas.len()) as u32).to_le_bytes());
        self.bytes.extend_from_slice(&(table.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(END_MAGIC);
        Pack { digest: Digest::of(&self.bytes), bytes: self.bytes, directory: self.directory }
    }
}

fn write_entry(out: &mut Vec<u8>, entry: &Entry, bases: u8) {
    out.extend_from_slice(&entry.digest.0);
    out.extend_from_slice(&[entry.kind as u8, entry.encoding as u8, bases, 0]);
    out.extend_from_slice(&entry.stored.to_le_bytes());
    out.extend_from_slice(&entry.length.to_le_bytes());
    out.extend_from_slice(&entry.offset.to_le_bytes());
}

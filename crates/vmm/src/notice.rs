//! A guest that goes on is told that a read-only disk has other content than when it was saved.
//!
//! Nothing but another length makes Linux tell its programs about a disk (udev's `change` with `RESIZE=1`). So the disk
//! is made a step longer than the guest knows, and after [`LENGTHS`] steps as long as its content again: a guest that
//! was saved before it had looked is told of a length that it has not heard of either. Which one it was told of last
//! belongs to the saved machine.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use crate::machine::Machine;
use crate::state::MachineState;
use crate::vm::{Vm, VmError};

/// A step of the length, in bytes; a whole number of blocks for every guest.
const STEP: u64 = 4096;
/// So many lengths there are.
const LENGTHS: u64 = 256;

/// The read-only disks of a machine, and what its guest was told of them.
pub(crate) struct Notices(Mutex<Vec<Notice>>);

struct Notice {
    drive: String,
    path: PathBuf,
    /// Length of the content, in bytes.
    content: u64,
    /// The length that the guest was told of last.
    told: u64,
}

impl Notices {
    /// Before QEMU starts; `saved` is what the machine goes on with, if it does.
    pub(crate) fn new(machine: &Machine, saved: Option<&MachineState>) -> Self {
        let told = |drive: &str| saved?.lengths.iter().find(|(name, _)| name == drive).map(|(_, length)| *length);
        let read_only = machine.drives.iter().filter(|drive| drive.read_only);
        let notice = read_only.map(|drive| {
            // A file that is not there is QEMU's to report.
            let content = std::fs::metadata(&drive.path).map_or(0, |found| found.len());
            let told = told(&drive.name).unwrap_or(content);
            Notice { drive: drive.name.clone(), path: drive.path.clone(), content, told }
        });
        Self(Mutex::new(notice.collect()))
    }

    /// What the guest of a saved machine was told of last.
    pub(crate) fn recall(&self, saved: &MachineState) {
        for notice in self.lock().iter_mut() {
            let known = saved.lengths.iter().find(|(name, _)| *name == notice.drive);
            notice.told = known.map_or(notice.content, |(_, length)| *length);
        }
    }

    /// What is saved with the machine.
    pub(crate) fn lengths(&self) -> Vec<(String, u64)> {
        self.lock().iter().map(|notice| (notice.drive.clone(), notice.told)).collect()
    }

    /// The next length of a disk, from now on the one that the guest was told of; and its file.
    fn advance(&self, drive: &str) -> Option<(u64, PathBuf)> {
        let mut all = self.lock();
        let notice = all.iter_mut().find(|notice| notice.drive == drive)?;
        notice.told = next(notice.content, notice.told);
        Some((notice.told, notice.path.clone()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Notice>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn next(content: u64, told: u64) -> u64 {
    content + (told.saturating_sub(content) / STEP + 1) % LENGTHS * STEP
}

impl Vm {
    /// Tells a guest that goes on that the content of this read-only disk is another one. It must run: QEMU changes no
    /// disk of a machine that has not gone on yet.
    ///
    /// QEMU lengthens only what may be written to, so the disk is that for a moment. For the guest it is read-only all
    /// the time; one that writes to it in this moment ends its own QEMU.
    pub async fn tell_of_content(&self, drive: &str) -> Result<(), VmError> {
        let Some((length, path)) = self.notices().advance(drive) else {
            return Err(VmError::NoSuchDisk { drive: drive.to_owned() });
        };
        let reopen = async |read_only| {
            let node = json!({
                "driver": "file", "filename": path.to_string_lossy(), "node-name": drive, "aio": "threads",
                "cache": { "direct": false, "no-flush": false }, "read-only": read_only,
            });
            self.qmp().execute("blockdev-reopen", json!({ "options": [node] })).await
        };
        reopen(false).await?;
        let resized: Result<Value, _> =
            self.qmp().execute("block_resize", json!({ "node-name": drive, "size": length })).await;
        reopen(true).await?;
        resized?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::example;

    #[test]
    fn no_length_is_told_twice_in_a_row_nor_soon_again() {
        const MIB: u64 = 1 << 20;
        let lengths: Vec<u64> =
            std::iter::successors(Some(MIB), |told| Some(next(MIB, *told))).take(LENGTHS as usize).collect();
        let different: std::collections::BTreeSet<_> = lengths.iter().collect();
        assert_eq!((different.len() as u64, lengths[1]), (LENGTHS, MIB + STEP));
        assert_eq!(next(MIB, lengths[255]), MIB);
        // The content may have had another length when the machine was saved.
        for told in [0, MIB / 2, MIB + 7, 9 * MIB, u64::MAX] {
            assert_ne!(next(MIB, told), told);
        }
    }

    #[test]
    fn what_was_told_last_is_known_again() {
        let machine = example();
        let boot = Notices::new(&machine, None);
        assert_eq!(boot.lengths(), [("seed".to_owned(), 0)], "only read-only disks; this one has no file");
        assert_eq!(boot.advance("seed").unwrap().0, STEP);
        assert!(boot.advance("system").is_none());
        let saved = MachineState { devices: vec![], blocks: vec![], lengths: boot.lengths() };
        assert_eq!(Notices::new(&machine, Some(&saved)).advance("seed").unwrap().0, 2 * STEP);
        // One that was saved by a program that told nobody.
        let saved = MachineState { lengths: vec![], ..saved };
        assert_eq!(Notices::new(&machine, Some(&saved)).advance("seed").unwrap().0, STEP);
    }
}

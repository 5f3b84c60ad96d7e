//! A power cut, as files that nobody synced live through it.

use std::fs;
use std::io;
use std::path::Path;

use crate::Dice;

/// What a file may be afterwards that was written and renamed into place without a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Damage {
    /// It was never there.
    Absent,
    /// Its name reached the disk, and none of its bytes.
    Empty,
    /// Its first bytes only.
    CutShort,
    /// It has its length, and zeros where bytes did not reach the disk.
    LostTail,
    /// It has its length, and nothing but zeros.
    Zeros,
    /// One bit is another: not by a power cut, but by a disk that ages.
    Rot,
}

impl Damage {
    /// What a power cut does.
    pub const POWER_CUT: [Self; 5] = [Self::Absent, Self::Empty, Self::CutShort, Self::LostTail, Self::Zeros];
    /// What years do.
    pub const AGE: [Self; 3] = [Self::Absent, Self::Zeros, Self::Rot];
}

/// Damages so many of a hundred files in a folder and below, each in one of these ways. Returns how many.
pub fn damage_files(folder: &Path, percent: u64, ways: &[Damage], dice: &mut Dice) -> io::Result<usize> {
    let mut entries = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    // The order in which a folder lists its files must not decide what happens to them.
    entries.sort_by_key(fs::DirEntry::file_name);
    let mut damaged = 0;
    for entry in entries {
        if entry.file_type()?.is_dir() {
            damaged += damage_files(&entry.path(), percent, ways, dice)?;
        } else if dice.percent(percent) {
            apply(*dice.pick(ways), &entry.path(), dice)?;
            damaged += 1;
        }
    }
    Ok(damaged)
}

/// Does this to a file. It becomes another file under the same name: after a power cut nobody has it open.
fn apply(damage: Damage, path: &Path, dice: &mut Dice) -> io::Result<()> {
    let mut bytes = fs::read(path)?;
    let at = dice.roll(bytes.len() as u64) as usize;
    match damage {
        Damage::Absent => {}
        Damage::Empty => bytes.clear(),
        Damage::CutShort => bytes.truncate(at),
        Damage::LostTail => bytes[at..].fill(0),
        Damage::Zeros => bytes.fill(0),
        Damage::Rot => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << dice.roll(8)),
    }
    fs::remove_file(path)?;
    if damage == Damage::Absent { Ok(()) } else { fs::write(path, bytes) }
}

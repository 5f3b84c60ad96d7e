//! A layer's files on a medium that forgets: what was not synced made it to the disk or not, sector by sector.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::backing::Backing;

pub(super) const SECTOR: u64 = 512;

pub(super) type Sector = [u8; SECTOR as usize];

/// Small and repeatable.
#[derive(Debug)]
pub(super) struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            // None of them is zero.
            bytes.extend((self.roll(u64::MAX) | 0x0101_0101_0101_0101).to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// The part of a change at `offset` that hits a sector. Without bytes it becomes zeros.
pub(super) fn patch(number: u64, sector: &mut Sector, offset: u64, length: u64, bytes: Option<&[u8]>) {
    let start = number * SECTOR;
    let (from, to) = (offset.max(start), (offset + length).min(start + SECTOR));
    let part = &mut sector[(from - start) as usize..(to - start) as usize];
    match bytes {
        Some(bytes) => part.copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]),
        None => part.fill(0),
    }
}

/// Steps until the power goes; both files of a layer hang on it.
#[derive(Debug)]
pub(super) struct Plug(pub Mutex<u64>);

impl Plug {
    fn step(&self) -> io::Result<()> {
        let mut left = self.0.lock().unwrap();
        *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the power is gone"))?;
        Ok(())
    }

    /// Many ways to fail begin with a sync that did not come to its end, so the power often goes just there.
    fn step_of_sync(&self) -> io::Result<()> {
        let mut left = self.0.lock().unwrap();
        if *left < 12 && *left % 2 == 1 {
            *left = 0;
        }
        drop(left);
        self.step()
    }

    pub fn gone(&self) -> bool {
        *self.0.lock().unwrap() == 0
    }
}

#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pub length: u64,
    /// Sectors that are not there are zeros.
    pub sectors: BTreeMap<u64, Sector>,
}

#[derive(Debug, Default)]
pub(super) struct Medium {
    pub durable: Content,
    pub current: Content,
    /// What each sector was since the last sync.
    since: BTreeMap<u64, Vec<Sector>>,
}

pub(super) struct SimFile {
    plug: Arc<Plug>,
    /// A disk that lies answers a sync and does nothing.
    honest: bool,
    /// A sync fails, and what it should have made durable counts as clean from then on.
    pub syncs_fail: AtomicBool,
    medium: Mutex<Medium>,
    /// Called when a sync is through: the moment for somebody else to write.
    pub after_sync: Mutex<Option<Box<dyn FnMut() + Send>>>,
}

impl std::fmt::Debug for SimFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimFile")
    }
}

impl SimFile {
    pub fn new(plug: &Arc<Plug>, honest: bool, content: Content) -> Arc<Self> {
        let medium = Medium { durable: content.clone(), current: content, since: BTreeMap::new() };
        let (plug, medium) = (plug.clone(), Mutex::new(medium));
        Arc::new(Self { plug, honest, syncs_fail: AtomicBool::new(false), medium, after_sync: Mutex::default() })
    }

    pub fn medium(&self) -> MutexGuard<'_, Medium> {
        self.medium.lock().unwrap()
    }

    fn change(&self, offset: u64, length: u64, new: Option<&[u8]>) {
        let mut medium = self.medium();
        for sector in offset / SECTOR..(offset + length).div_ceil(SECTOR) {
            let mut bytes = medium.current.sectors.get(&sector).copied().unwrap_or([0; SECTOR as usize]);
            patch(sector, &mut bytes, offset, length, new);
            medium.current.sectors.insert(sector, bytes);
            medium.since.entry(sector).or_default().push(bytes);
        }
        medium.current.length = medium.current.length.max(offset + length);
    }

    /// What is found when the power is back.
    pub fn crash(&self, dice: &mut Dice) -> Content {
        let medium = self.medium();
        let mut left = medium.durable.clone();
        for (sector, versions) in &medium.since {
            let chosen = dice.roll(versions.len() as u64 + 1) as usize;
            if let Some(version) = chosen.checked_sub(1) {
                left.sectors.insert(*sector, versions[version]);
            }
        }
        if dice.roll(2) == 0 {
            left.length = medium.current.length;
        }
        left
    }
}

impl Backing for Arc<SimFile> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let medium = self.medium();
        let count = (buffer.len() as u64).min(medium.current.length.saturating_sub(offset)) as usize;
        let mut done = 0;
        while done < count {
            let (sector, within) = ((offset + done as u64) / SECTOR, ((offset + done as u64) % SECTOR) as usize);
            let part = (SECTOR as usize - within).min(count - done);
            match medium.current.sectors.get(&sector) {
                Some(bytes) => buffer[done..done + part].copy_from_slice(&bytes[within..within + part]),
                None => buffer[done..done + part].fill(0),
            }
            done += part;
        }
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.plug.step()?;
        self.change(offset, bytes.len() as u64, Some(bytes));
        Ok(())
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        self.plug.step()?;
        self.change(offset, length, None);
        Ok(())
    }

    fn next_data(&self, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
        Ok(Some(range))
    }

    fn length(&self) -> io::Result<u64> {
        Ok(self.medium().current.length)
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.plug.step()?;
        self.medium().current.length = length;
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.plug.step_of_sync()?;
        if self.syncs_fail.load(Ordering::SeqCst) {
            self.medium().since.clear();
            return Err(io::Error::other("the medium is broken"));
        }
        if self.honest {
            let mut medium = self.medium();
            let Medium { durable, current, since } = &mut *medium;
            let now =
                |(sector, mut versions): (u64, Vec<Sector>)| (sector, versions.pop().unwrap_or([0; SECTOR as usize]));
            durable.sectors.extend(std::mem::take(since).into_iter().map(now));
            durable.length = current.length;
        }
        if let Some(hook) = self.after_sync.lock().unwrap().as_mut() {
            hook();
        }
        Ok(())
    }
}

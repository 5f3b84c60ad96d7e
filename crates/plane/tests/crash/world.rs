//! What the makers of a world were told: the measure of what must be there after a death.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use collective_keys::SigningKey;
use collective_model::ApplianceName;
use tempfile::TempDir;

/// One lock for all that was told.
pub type Shared = Arc<Mutex<World>>;

/// A version of an appliance, by its number.
pub type Version = (ApplianceName, u64);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Withdrawal {
    #[default]
    No,
    /// Asked for, without an answer.
    Tried,
    /// Acknowledged.
    Done,
}

/// What is known of a version.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// Acknowledged.
    pub published: bool,
    pub withdrawal: Withdrawal,
}

/// All that was asked for and told.
pub struct World {
    pub key: Arc<SigningKey>,
    pub records: BTreeMap<Version, Record>,
    /// The newest acknowledged pointer of the channel: its serial, and where it leads.
    pub heads: BTreeMap<ApplianceName, (u64, u64)>,
    /// Serials and versions that were asked for.
    pub pointed: BTreeSet<(ApplianceName, u64, u64)>,
    /// Leases of makers that may be dead.
    pub leases: BTreeSet<(ApplianceName, String)>,
    /// Sound copies of packs, by their keys in the store.
    pub packs: BTreeMap<String, Bytes>,
    /// Packs that were damaged and whose repair was not acknowledged.
    pub damaged: BTreeSet<String>,
    /// Versions that somebody is publishing, who would bring them back.
    pub at_work: BTreeSet<Version>,
    /// Repacks under way, packs that were written again, and deaths in the middle of it.
    pub repacking: u64,
    pub repacked: usize,
    pub deaths_repacking: u64,
    /// What a host has that was there from the beginning: lists and directories of packs, which may be old.
    pub host: TempDir,
    /// Answers that came after the death do not count.
    pub dead: bool,
    next: u64,
}

impl World {
    pub fn new() -> Shared {
        Arc::new(Mutex::new(Self {
            key: Arc::new(SigningKey::generate().unwrap()),
            records: BTreeMap::new(),
            heads: BTreeMap::new(),
            pointed: BTreeSet::new(),
            leases: BTreeSet::new(),
            packs: BTreeMap::new(),
            damaged: BTreeSet::new(),
            at_work: BTreeSet::new(),
            repacking: 0,
            repacked: 0,
            deaths_repacking: 0,
            host: in_memory(),
            dead: false,
            next: 0,
        }))
    }

    /// A new process, and makers that have nothing under way.
    pub fn begin(&mut self) {
        self.dead = false;
        self.at_work.clear();
        self.repacking = 0;
    }

    /// The process dies at this instant.
    pub fn die(&mut self) {
        self.dead = true;
        self.deaths_repacking += self.repacking.min(1);
    }

    /// A number that no version has.
    pub fn next(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Whether a maker of this world may take a version away: a channel must not lead to it, now or after what was asked.
    pub fn may_withdraw(&self, version: &Version) -> bool {
        let record = self.records.get(version).copied().unwrap_or_default();
        let pointed = self.pointed.iter().any(|(appliance, _, to)| (appliance, to) == (&version.0, &version.1));
        record.published && record.withdrawal == Withdrawal::No && !pointed && !self.at_work.contains(version)
    }
}

/// A folder in memory where that can be: who dies here is the plane, and syncs would wait for everybody else's data.
pub fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Notes an answer, unless the process had died before it came.
pub fn answered(world: &Shared, note: impl FnOnce(&mut World)) {
    let world = &mut *world.lock().unwrap();
    if !world.dead {
        note(world);
    }
}

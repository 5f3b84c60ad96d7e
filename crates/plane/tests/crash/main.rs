//! The plane dies at any instant, over a store that fails before and after: what was acknowledged is there, byte for byte,
//! and what was not is there as a whole or not at all. No machine is started.
//!
//! Each seed is a chain of lives of one plane. In each life several makers publish, versions are withdrawn, packs are
//! written again, collected, damaged and repaired, and hosts read, with new lists of packs and with old ones, until the
//! process dies in the middle of an operation of the store. The next one finds the files and objects that survived. `SEED=17` repeats a seed, `SEEDS=1000` runs so many.

mod disk;
mod life;
mod maker;
mod proof;
mod world;

use std::collections::BTreeMap;

use collective_testkit::{Damage, Dice, ObjectFault, Objects, damage_files};

use world::World;

/// Lives of one plane.
const LIVES: u64 = 3;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Names the seed if the test ends in a panic.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was seed {0}: run this test again with SEED={0}", self.0);
        }
    }
}

/// What was seen, over all seeds: a test in which nothing happens proves nothing.
#[derive(Default)]
struct Seen {
    deaths_at_work: u64,
    published: usize,
    unanswered: usize,
    whole_without_answer: usize,
    withdrawn: usize,
    removed: usize,
    repacked: usize,
    deaths_repacking: u64,
    faults: BTreeMap<ObjectFault, u64>,
}

fn chain(seed: u64, kind: &'static str, seen: &mut Seen) {
    let _named = Seed(seed);
    let folder = world::in_memory();
    let mut dice = Dice::new(seed);
    let objects = Objects::new(seed, kind);
    let world = World::new();
    // Small packs in one request, or in parts.
    let part = dice.percent(40).then_some(64 << 10);
    let mut data = folder.path().join("0");
    for number in 1..=LIVES {
        let (left, power) = (folder.path().join(number.to_string()), dice.percent(50));
        let early = life::life(&data, &objects, part, &world, &mut dice, (left.clone(), power));
        seen.deaths_at_work += u64::from(early);
        data = left;
        if power {
            // The database is as it was at that instant; the plane's cache is not synced, and may be anything.
            damage_files(&data.join("cache"), 40, &Damage::POWER_CUT, &mut dice).unwrap();
        }
        proof::prove(&data, &objects, part, &world, seen);
    }
    let world = world.lock().unwrap();
    seen.repacked += world.repacked;
    seen.deaths_repacking += world.deaths_repacking;
    seen.published += world.records.values().filter(|record| record.published).count();
    seen.withdrawn += world.records.values().filter(|record| record.withdrawal == world::Withdrawal::Done).count();
    for (fault, count) in objects.happened() {
        *seen.faults.entry(fault).or_default() += count;
    }
}

fn seeds(kind: &'static str, from: u64) {
    let count = number("SEEDS").unwrap_or(30);
    let chosen = number("SEED").map_or(from..from + count, |seed| seed..seed + 1);
    let mut seen = Seen::default();
    let all = chosen.end - chosen.start;
    chosen.for_each(|seed| chain(seed, kind, &mut seen));
    eprintln!(
        "{all} seeds: {} of {} deaths at work, {} while packs were written again, {} published, {} unanswered of which {} became visible as a whole, \
         {} withdrawn, {} packs written again, {} removed, faults {:?}",
        seen.deaths_at_work,
        all * LIVES,
        seen.deaths_repacking,
        seen.published,
        seen.unanswered,
        seen.whole_without_answer,
        seen.withdrawn,
        seen.repacked,
        seen.removed,
        seen.faults
    );
    if all >= 30 {
        let happened = seen.unanswered > 0 && seen.withdrawn > 0 && seen.removed > 0 && seen.faults.len() == 5;
        let repacked = seen.repacked > 0 && seen.deaths_repacking > 0;
        assert!(happened && repacked && seen.deaths_at_work > all, "the test itself");
    }
}

#[test]
fn a_plane_that_dies_at_any_instant_over_a_store_that_goes_away() {
    seeds("S3", 0);
}

#[test]
fn a_plane_that_dies_at_any_instant_over_a_folder_that_fails() {
    seeds("LocalFileSystem", 10_000);
}

//! Every format that comes from outside, with damaged bytes: what is in `fuzz/corpus`, and changes of it by chance, the same
//! ones in every run. `make fuzz` looks for longer and deeper. `SEEDS=100` gives a hundred times as many inputs.

mod corpus;
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use collective_testkit::Dice;

use targets::{TARGETS, Target};

/// No changed input is longer.
const LONGEST: usize = 1 << 16;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(name)
}

/// What is known to lead far into a format, and what once led into an error.
fn inputs(name: &str) -> Vec<Vec<u8>> {
    let entries = std::fs::read_dir(folder(name)).unwrap_or_else(|error| panic!("no corpus for {name}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// One change.
fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], dice: &mut Dice) {
    let at = dice.roll(bytes.len() as u64 + 1) as usize;
    match dice.roll(8) {
        0 => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 1 << dice.roll(8)),
        1 => bytes.get_mut(at).into_iter().for_each(|byte| *byte = *dice.pick(&[0, 1, 0x7f, 0x80, 0xff])),
        2 => bytes.truncate(at),
        3 => edit_number(bytes, at, dice),
        4 => {
            let other = dice.pick(corpus);
            let from = dice.roll(other.len() as u64 + 1) as usize;
            bytes.truncate(at);
            bytes.extend(&other[from..]);
        }
        5 => {
            let end = (at + 1 + dice.roll(64) as usize).min(bytes.len());
            let copy = bytes[at.min(end)..end].to_vec();
            let to = dice.roll(bytes.len() as u64 + 1) as usize;
            bytes.splice(to..to, copy);
        }
        6 => _ = bytes.drain(at..(at + 1 + dice.roll(16) as usize).min(bytes.len()).max(at)),
        _ => {
            let length = 1 + dice.roll(8) as usize;
            bytes.splice(at..at, dice.bytes(length));
        }
    }
    bytes.truncate(LONGEST);
}

/// A number becomes a neighbour, an end of its range, or anything.
fn edit_number(bytes: &mut [u8], at: usize, dice: &mut Dice) {
    let width = *dice.pick(&[1usize, 2, 4, 8]);
    let Some(place) = bytes.get_mut(at..at + width) else { return };
    let mut value = [0; 8];
    value[..width].copy_from_slice(place);
    let old = u64::from_le_bytes(value);
    let new = match dice.roll(6) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => u64::MAX,
        3 => old << 1,
        4 => 1 << dice.roll(64),
        _ => dice.roll(u64::MAX),
    };
    place.copy_from_slice(&new.to_le_bytes()[..width]);
}

fn give(name: &str, target: Target, bytes: &[u8], which: &str) {
    if catch_unwind(AssertUnwindSafe(|| target(bytes))).is_err() {
        let path =
            std::env::temp_dir().join(format!("collective-{name}-{}", collective_model::Digest::of(bytes).short()));
        std::fs::write(&path, bytes).unwrap();
        panic!("the format \"{name}\" fails with {which}; the bytes are in {}", path.display());
    }
}

fn run(name: &str) {
    let (_, target, count) = TARGETS.iter().find(|(known, ..)| *known == name).expect("a target");
    let corpus = inputs(name);
    assert!(corpus.len() > 1, "more than one example of {name}");
    for (index, bytes) in corpus.iter().enumerate() {
        give(name, *target, bytes, &format!("file {index} of its corpus"));
    }
    let times = std::env::var("SEEDS").ok().and_then(|times| times.parse().ok()).unwrap_or(1);
    for seed in 0..count * times {
        let mut dice = Dice::new(seed);
        let mut bytes = dice.pick(&corpus).clone();
        for _ in 0..*dice.pick(&[1, 1, 1, 2, 3, 6]) {
            change(&mut bytes, &corpus, &mut dice);
        }
        give(name, *target, &bytes, &format!("seed {seed}"));
    }
}

macro_rules! formats {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                run(stringify!($name));
            }
        )*

        #[test]
        fn every_target_is_run() {
            let named = [$(stringify!($name)),*];
            assert!(TARGETS.iter().map(|(name, ..)| *name).eq(named), "{named:?}");
        }
    };
}

formats!(delta disk frame hashes image layer machine manifest ovf pack page recipe signed sparse tail trace);

/// `cargo test -p collective --test formats -- --ignored` after a format has changed. What was found by fuzzing stays.
#[test]
#[ignore = "writes the corpus anew"]
fn the_corpus_is_made() {
    for (format, name, bytes) in corpus::examples() {
        std::fs::create_dir_all(folder(format)).unwrap();
        std::fs::write(folder(format).join(name), bytes).unwrap();
    }
}

//! User stories with real processes and real guests in QEMU. They are one program, so that they run beside each other to the
//! end: most of them wait most of the time.

mod any_sequence;
mod arrival;
mod backup;
mod bad_input;
mod bad_luck;
mod boot_order;
mod bucket;
mod clones;
mod deaths;
mod formats;
mod house;
mod import_export;
mod keeping;
mod layers;
mod live;
mod main_job;
mod mount;
mod network;
mod no_space;
mod reach;
mod returning;
mod runner_death;
mod settings;
mod soak;
mod suspend;
mod warm;

use std::ops::Range;
use std::path::PathBuf;

const PROGRAM: &str = env!("CARGO_BIN_EXE_collective");
const SCRATCH: &str = env!("CARGO_TARGET_TMPDIR");

/// The folder of a built version of the tiny guest.
fn tiny(version: &str) -> PathBuf {
    collective_testkit::tiny(PROGRAM, SCRATCH, version)
}

/// The same of a Debian with cloud-init.
fn cloud(version: &str) -> PathBuf {
    collective_testkit::cloud(PROGRAM, SCRATCH, version)
}

/// So many seeds, or as many as SEEDS says, from SEED on.
fn seeds(count: u64) -> Range<u64> {
    let number =
        |name| std::env::var(name).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{name} is a number")));
    let first: u64 = number("SEED").unwrap_or(0);
    first..first + number("SEEDS").unwrap_or(count)
}

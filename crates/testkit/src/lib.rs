//! For tests only: whole fleets in a temporary directory, links that can be slowed and cut, a real S3 server and a proxy
//! that spoils its answers, an object store whose process dies at any instant, power cuts, and a guest that boots in
//! seconds. Every process a fleet starts is ended by its own pid when the fleet is dropped.

#![forbid(unsafe_code)]

mod deaths;
mod dice;
mod disks;
mod faults;
mod fleet;
mod guest;
mod link;
mod objects;
mod power;
mod seaweed;
mod talk;

pub use deaths::kill;
pub use dice::Dice;
pub use faults::{Fault, FaultyProxy, Weather};
pub use fleet::{Fleet, Outcome, free_port};
pub use guest::{Guest, cloud, tiny};
pub use link::Link;
pub use objects::{ObjectFault, Objects};
pub use power::{Damage, damage_files};
pub use seaweed::Seaweed;
pub use talk::Talk;

use std::time::{Duration, Instant};

/// Waits until `condition` gives something; panics with `what` when `limit` is over.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(begun.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::park_timeout(Duration::from_millis(30));
    }
}

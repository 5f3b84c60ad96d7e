//! A machine that moves while it runs: when to stop it, and whether to move it so at all. Pure.
//!
//! What it has is sent in rounds, each with what was written since the one before. The guest stands still for the last one
//! only. So what counts is how fast it writes, beside how fast the link is: where it writes faster than the link carries, no
//! number of rounds helps, and it is better suspended.

use serde::{Deserialize, Serialize};

/// The guest is stopped when what is left takes so long, in milliseconds. The rest of the pause is what devices and ownership
/// take, and is the same for all.
const SHORT_MS: u64 = 10;
/// Left with so many bytes it is stopped on any link.
const FEW: u64 = 64 << 10;
/// A guest that stands still for longer than this, in milliseconds, is better suspended: that takes about as long where the
/// store has most of it, and does not keep two hosts busy.
const LONG_MS: u64 = 3_000;
/// Sending all of it should not take longer, in milliseconds.
const TOTAL_MS: u64 = 900_000;
/// After so many rounds it will not get better.
const ROUNDS: usize = 30;
/// Rounds that do not shrink, in a row.
const STUBBORN: usize = 3;
/// What is sent first, in bytes: little, because the link may be thin.
pub const FIRST: u64 = 512 << 10;
/// The link is known when so many bytes were sent,
const SAMPLE: u64 = 16 << 20;
/// or when sending took so long, in microseconds: what came before may only show how far away the other host is.
const SAMPLE_US: u64 = 1_000_000;

/// What was sent in one go, and acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of pages and blocks.
    pub bytes: u64,
    /// Until it was acknowledged, in microseconds.
    pub took_us: u64,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another round, while the guest runs.
    Again,
    /// The guest is stopped for the last one.
    Stop,
    /// It is not moved so, for this reason.
    Suspend(String),
}

/// Bytes a second, from what was sent in a while; none: nothing to tell it from.
pub fn rate(sent: &[Sent]) -> Option<u64> {
    let (bytes, took) = sent.iter().fold((0, 0), |(bytes, took), one| (bytes + one.bytes, took + one.took_us));
    (bytes > 0).then(|| (u128::from(bytes) * 1_000_000 / u128::from(took.max(1))).min(u128::from(u64::MAX)) as u64)
}

/// Whether enough was sent to know what the link carries.
pub fn is_known(sent: &[Sent]) -> bool {
    let (bytes, took) = sent.iter().fold((0, 0), |(bytes, took), one| (bytes + one.bytes, took + one.took_us));
    bytes >= SAMPLE || took >= SAMPLE_US
}

fn millis(bytes: u64, rate: u64) -> u64 {
    (u128::from(bytes) * 1000 / u128::from(rate.max(1))).min(u128::from(u64::MAX)) as u64
}

/// Whether so many bytes can be sent while it runs; the error says why it is better suspended.
pub fn is_worth_it(bytes: u64, rate: u64) -> Result<(), String> {
    match millis(bytes, rate) {
        ms if ms <= TOTAL_MS => Ok(()),
        ms => Err(format!(
            "to bring {} over this link, which carries {} a second, would take {} minutes",
            size(bytes),
            size(rate),
            ms / 60_000
        )),
    }
}

fn size(bytes: u64) -> crate::ByteSize {
    // Whole MiB read better.
    crate::ByteSize(if bytes >= 8 << 20 { bytes >> 20 << 20 } else { bytes })
}

/// After a round: `left` bytes were written while each of the rounds was sent, the last one at the end; `rate` is in bytes a second.
pub fn next(left: &[u64], rate: u64) -> Next {
    let Some((last, before)) = left.split_last() else { return Next::Again };
    let ms = millis(*last, rate);
    if *last <= FEW || ms <= SHORT_MS {
        return Next::Stop;
    }
    let smallest = before.iter().rev().skip(STUBBORN - 1).min();
    let recent = left.iter().rev().take(STUBBORN).min();
    let is_stuck = smallest.zip(recent).is_some_and(|(smallest, recent)| *recent > smallest / 4 * 3);
    match is_stuck || left.len() >= ROUNDS {
        false => Next::Again,
        true if ms <= LONG_MS => Next::Stop,
        true => Next::Suspend(format!(
            "it writes faster than the link carries, {} a second: it would stand still for {} s all the same",
            size(rate),
            ms.div_ceil(1000)
        )),
    }
}

/// How an instance would move, as far as can be told before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Estimate {
    /// Bytes of memory and disks to be sent.
    pub bytes: u64,
    /// Bytes a second, as measured.
    pub rate: u64,
    /// Until it goes on there, in milliseconds, of which it runs nearly all.
    pub total_ms: u64,
    /// Why it would not move while it runs.
    pub why_not: Option<String>,
    /// Bytes that need not be sent: the other host keeps them since it was there.
    #[serde(default)]
    pub kept: u64,
}

impl Estimate {
    /// From what was measured.
    pub fn of(bytes: u64, rate: u64, kept: u64) -> Self {
        Self { bytes, rate, total_ms: millis(bytes, rate), why_not: is_worth_it(bytes, rate).err(), kept }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn it_is_stopped_when_little_is_left_for_this_link() {
        assert_eq!(next(&[], MIB), Next::Again);
        assert_eq!(next(&[FEW], 1), Next::Stop, "on any link");
        assert_eq!(next(&[5 * MIB], 1000 * MIB), Next::Stop, "5 ms");
        assert_eq!(next(&[50 * MIB], 1000 * MIB), Next::Again, "50 ms, and it may get better");
        assert_eq!(next(&[50 * MIB, 20 * MIB, 9 * MIB], 1000 * MIB), Next::Stop);
    }

    #[test]
    fn rounds_that_do_not_shrink_end() {
        let stuck = [40 * MIB, 41 * MIB, 39 * MIB, 40 * MIB, 42 * MIB];
        assert_eq!(next(&stuck, 100 * MIB), Next::Stop, "0.4 s is less than a suspend takes");
        let Next::Suspend(why) = next(&stuck, 2 * MIB) else { panic!("21 s of standing still") };
        assert!(why.contains("21 s"), "{why}");
        // One long round in between says nothing.
        assert_eq!(next(&[90 * MIB, 40 * MIB, 80 * MIB, 30 * MIB], 100 * MIB), Next::Again);
    }

    #[test]
    fn a_thin_link_is_told_before() {
        assert_eq!(is_worth_it(4 << 30, 100 * MIB), Ok(()));
        let why = is_worth_it(4 << 30, MIB).unwrap_err();
        assert!(why.contains("68 minutes"), "{why}");
        let estimate = Estimate::of(200 * MIB, 100 * MIB, MIB);
        assert_eq!((estimate.total_ms, estimate.why_not), (2000, None));
    }

    #[test]
    fn rates() {
        assert_eq!(rate(&[]), None);
        assert_eq!(rate(&[Sent { bytes: 0, took_us: 5 }]), None);
        assert_eq!(
            rate(&[Sent { bytes: MIB, took_us: 500_000 }, Sent { bytes: MIB, took_us: 500_000 }]),
            Some(2 * MIB)
        );
        assert_eq!(rate(&[Sent { bytes: 7, took_us: 0 }]), Some(7_000_000));
        assert!(!is_known(&[]) && !is_known(&[Sent { bytes: MIB, took_us: 500_000 }]));
        assert!(is_known(&[Sent { bytes: MIB, took_us: 500_000 }; 2]), "a second");
        assert!(is_known(&[Sent { bytes: 8 * MIB, took_us: 10 }; 2]), "much at once");
    }

    proptest! {
        /// Whatever a guest writes, there is an end.
        #[test]
        fn it_ends(left in proptest::collection::vec(0u64..1 << 40, ROUNDS..ROUNDS + 3), rate: u64) {
            prop_assert_ne!(next(&left, rate), Next::Again);
        }
    }
}

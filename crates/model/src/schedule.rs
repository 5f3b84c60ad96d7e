//! Checkpoints by the clock: when one is due, and which of them go. Pure decisions; the host acts on them.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::{CheckpointId, Span, Timestamp};

/// Checkpoints are not taken more often than this: those of an hour have to fit onto a disk.
pub const SHORTEST: Duration = Duration::from_secs(60);
/// What is older than this goes, so that a longer interval would keep one at most.
pub const LONGEST: Duration = Duration::from_millis(WEEK);

const HOUR: u64 = 3_600_000;
const DAY: u64 = 24 * HOUR;
const WEEK: u64 = 7 * DAY;

/// Whether this interval can be kept; the error says what can.
pub fn check_interval(every: Span) -> Result<(), String> {
    match (SHORTEST..=LONGEST).contains(&every.0) {
        true => Ok(()),
        false => Err(format!("checkpoints are taken every 1m to every 7d, or not at all (off), and not every {every}")),
    }
}

/// Whether a checkpoint is due at `now`, if the last one was taken at `last`.
pub fn is_due(every: Span, last: Timestamp, now: Timestamp) -> bool {
    // A clock that was set back must not put an end to it.
    now < last || u128::from(now.since_ms(last)) >= every.0.as_millis()
}

/// Which of these checkpoints, all taken by the clock, go at `now`. All of the last hour stay, the first in each hour (UTC) of the last
/// day, and the first in each day of the last week.
pub fn surplus(taken: &[(CheckpointId, Timestamp)], now: Timestamp) -> Vec<CheckpointId> {
    let mut sorted = taken.to_vec();
    sorted.sort_by_key(|(id, at)| (*at, *id));
    let (mut hours, mut days) = (BTreeSet::new(), BTreeSet::new());
    let goes = |(id, at): (CheckpointId, Timestamp)| {
        let (first_in_hour, first_in_day) = (hours.insert(at.0 / HOUR), days.insert(at.0 / DAY));
        let stays = match now.since_ms(at) {
            age if age <= HOUR => true,
            age if age <= DAY => first_in_hour,
            age => age <= WEEK && first_in_day,
        };
        (!stays).then_some(id)
    };
    sorted.into_iter().filter_map(goes).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MINUTE: u64 = 60_000;
    /// Some noon.
    const NOW: u64 = 20_000 * DAY + 12 * HOUR;

    fn left(taken: &[(CheckpointId, Timestamp)], now: Timestamp) -> Vec<(CheckpointId, Timestamp)> {
        let gone = surplus(taken, now);
        taken.iter().copied().filter(|(id, _)| !gone.contains(id)).collect()
    }

    #[test]
    fn when_one_is_due() {
        let due = |last, now| is_due(Span(Duration::from_secs(600)), Timestamp(last), Timestamp(now));
        assert!(!due(NOW, NOW) && !due(NOW, NOW + 10 * MINUTE - 1) && due(NOW, NOW + 10 * MINUTE));
        assert!(due(NOW, NOW - 1), "the clock was set back");
        for (text, fine) in
            [("1m", true), ("7d", true), ("59s", false), ("0s", false), ("8d", false), ("1000000y", false)]
        {
            let checked = check_interval(text.parse().unwrap());
            assert_eq!(checked.is_ok(), fine, "{text}");
            assert!(checked.err().is_none_or(|why| why.contains("every 1m to every 7d")));
        }
    }

    #[test]
    fn one_each_minute_for_ten_days() {
        let all: Vec<_> = (0..10 * 24 * 60).map(|n| (CheckpointId(n), Timestamp(NOW - n * MINUTE))).collect();
        let ages: Vec<u64> = left(&all, Timestamp(NOW)).iter().map(|(_, at)| (NOW - at.0) / MINUTE).collect();
        let minutes = 0..=60;
        let hours = (2..=24).map(|hour| hour * 60);
        let days = (1..7).map(|day| (day * 24 + 12) * 60);
        assert_eq!(ages, minutes.chain(hours).chain(days).collect::<Vec<_>>());
    }

    /// Ages in minutes, most of them young.
    fn ages() -> impl Strategy<Value = Vec<u64>> {
        let age = prop_oneof![0..90u64, 0..26 * 60u64, 0..9 * 24 * 60u64];
        proptest::collection::vec(age, 0..200)
    }

    proptest! {
        #[test]
        fn what_stays(ages in ages()) {
            let now = Timestamp(NOW);
            let all: Vec<_> = (0..).zip(&ages).map(|(n, age)| (CheckpointId(n), Timestamp(NOW - age * MINUTE))).collect();
            let left = left(&all, now);
            let young = |(_, at): &&(CheckpointId, Timestamp)| now.since_ms(*at) <= HOUR;
            prop_assert_eq!(left.iter().filter(young).count(), all.iter().filter(young).count());
            prop_assert!(left.len() - left.iter().filter(young).count() <= 25 + 8, "{} stay", left.len());
            prop_assert!(left.iter().all(|(_, at)| now.since_ms(*at) <= WEEK));
            // Wherever there was one, there is one: of the same hour, or of the same day.
            for (_, at) in all.iter().filter(|(_, at)| now.since_ms(*at) <= WEEK - DAY) {
                let length = if now.since_ms(*at) <= DAY { HOUR } else { DAY };
                prop_assert!(left.iter().any(|(_, other)| other.0 / length == at.0 / length));
            }
        }

        #[test]
        fn it_does_not_matter_how_often_they_are_thinned(ages in ages(), between in proptest::collection::vec(0..8 * 24 * 60u64, 0..6)) {
            let all: Vec<_> = (0..).zip(&ages).map(|(n, age)| (CheckpointId(n), Timestamp(NOW - age * MINUTE))).collect();
            let mut times = between;
            times.sort_unstable();
            let last = times.last().copied().unwrap_or(0);
            let mut thinned = all.clone();
            for time in times {
                thinned = left(&thinned, Timestamp(NOW + time * MINUTE));
            }
            let end = Timestamp(NOW + last * MINUTE);
            prop_assert_eq!(left(&thinned, end), left(&all, end));
        }

        #[test]
        fn a_clock_that_was_set_back_takes_nothing(ages in ages()) {
            let all: Vec<_> = (0..).zip(&ages).map(|(n, age)| (CheckpointId(n), Timestamp(NOW + age * MINUTE))).collect();
            prop_assert_eq!(surplus(&all, Timestamp(NOW)), vec![]);
        }
    }
}

//! What is fetched before the guest asks for it, and what is noted of what it asks for.
//!
//! A version may say in which order its guests read while they boot. Then this comes first, in that order, and the rest
//! waits until the guest is up, so that over a thin link nothing competes with the boot. Without it, everything
//! comes at once in the order of the packs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use collective_model::run::Phase;
use collective_model::{Digest, HealthState};
use collective_store::fetch::{FetchError, Pace};
use collective_store::trace::Trace;
use collective_volume::Disk;
use tokio::time::{Instant, sleep};

use crate::state::Shared;

/// A guest without a health check is taken to be up after this time.
const UP_WITHOUT_CHECK: Duration = Duration::from_secs(60);
/// Whoever is not up by then is not followed.
const RECORD_FOR: Duration = Duration::from_secs(3600);
/// A guest reads on after its first healthy answer.
const RECORD_ON: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(3);

/// Fetches what the guest did not ask for yet, so that it soon depends on nobody.
pub(crate) async fn fetch(shared: Arc<Shared>, disks: Vec<Arc<Disk>>) {
    let all: Vec<Digest> = disks.iter().filter_map(|disk| disk.image()).flat_map(|image| image.frames()).collect();
    let mut boot = Vec::new();
    for (disk, run) in disks.iter().zip(&shared.config.disks) {
        let (Some(image), Some(page)) = (disk.image(), run.image.as_ref().and_then(|image| image.boot)) else {
            continue;
        };
        match boot_trace(&shared, &page).await {
            Ok(trace) => boot.extend(trace.frames(image)),
            // Only a hint.
            Err(error) => tracing::warn!(%error, "the version's boot trace cannot be used"),
        }
    }
    if !boot.is_empty() {
        until_here(&shared, &boot, Pace::AHEAD, &all).await;
        // With all of that here, it is as fast as from a disk, or needs something that nobody foresaw.
        let limit = shared.config.health.as_ref().map_or(UP_WITHOUT_CHECK, |check| check.limit.0);
        until_up(&shared, limit).await;
    }
    until_here(&shared, &all, Pace::BESIDE, &all).await;
}

async fn boot_trace(shared: &Shared, page: &Digest) -> Result<Trace, FetchError> {
    loop {
        match shared.store.page(page).await {
            Err(error) if error.is_away() => sleep(PAUSE).await,
            Err(error) => return Err(error),
            Ok(bytes) => return Trace::decode(&bytes).map_err(|source| FetchError::Page { page: *page, source }),
        }
    }
}

async fn until_here(shared: &Shared, frames: &[Digest], pace: Pace, all: &[Digest]) {
    loop {
        let missing = all.iter().filter(|frame| !shared.store.cache().has(frame)).count();
        shared.status().frames_missing = Some(missing as u64);
        if missing == 0 || frames.iter().all(|frame| shared.store.cache().has(frame)) {
            return;
        }
        let progress = |_| {
            if let Some(missing) = shared.status().frames_missing.as_mut() {
                *missing = missing.saturating_sub(1);
            }
        };
        match shared.store.fetch_ahead(frames, pace, &progress).await {
            Ok(0) => sleep(LOOK_EVERY).await, // what is missing is on its way to readers
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "fetching ahead pauses");
                sleep(PAUSE).await;
            }
        }
    }
}

/// Waits until the guest is healthy, for up to `limit`; says whether it is.
async fn until_up(shared: &Shared, limit: Duration) -> bool {
    let begun = Instant::now();
    loop {
        let (health, running) = {
            let status = shared.status();
            (status.health, status.phase == Phase::Running)
        };
        if health == HealthState::Healthy {
            return true;
        }
        if begun.elapsed() > limit {
            return false;
        }
        if shared.config.health.is_none() && running && begun.elapsed() >= UP_WITHOUT_CHECK {
            return true;
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Writes into `to` which blocks the guest read until it was up, for whoever publishes the next version.
pub(crate) async fn record(shared: Arc<Shared>, disks: Vec<Arc<Disk>>, to: PathBuf) {
    let up = until_up(&shared, RECORD_FOR).await;
    sleep(RECORD_ON).await;
    let names = shared.config.disks.iter().map(|disk| disk.name.to_string());
    let traces: BTreeMap<String, Trace> = names.zip(disks.iter().map(|disk| disk.stop_recording())).collect();
    if !up {
        return;
    }
    let part = to.with_extension("part");
    let written = serde_json::to_vec(&traces).map_err(std::io::Error::from);
    let written = written.and_then(|bytes| std::fs::write(&part, bytes)).and_then(|()| std::fs::rename(&part, &to));
    if let Err(error) = written {
        tracing::warn!(%error, "what the guest read while it booted cannot be noted");
    }
}

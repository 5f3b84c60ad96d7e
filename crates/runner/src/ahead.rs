//! What is fetched before the guest asks for it, and what is noted of what it asks for.
//!
//! A version may say in which order its guests read while they boot. Then this comes first, in that order, and the rest
//! waits until the guest is up, so that over a thin link nothing competes with the boot. Without it, everything
//! comes at once in the order of the packs.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use collective_model::run::{Phase, RunDisk};
use collective_model::{Digest, HealthState};
use collective_store::fetch::{FetchError, Pace};
use collective_store::trace::Trace;
use collective_volume::{Disk, Layer};
use tokio::time::{Instant, sleep};

use crate::MEMORY;
use crate::private::Arrival;
use crate::state::{Order, Shared};

/// A guest without a health check is taken to be up after this time.
const UP_WITHOUT_CHECK: Duration = Duration::from_secs(60);
/// Whoever is not up by then is not followed.
const RECORD_FOR: Duration = Duration::from_secs(3600);
/// A guest reads on after its first healthy answer.
const RECORD_ON: Duration = Duration::from_secs(5);
/// A rehearsal is not worth more.
const REHEARSE_FOR: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What is fetched at once beside a guest that may wait for something else should take about so long.
const PART: Duration = Duration::from_millis(500);
/// The version's memory is copied in steps of so many bytes,
const COPY_STEP: u64 = 1 << 20;
/// if so many are free still afterwards.
const SPACE_FOR_OTHERS: u64 = 1 << 30;
/// After a failure.
const PAUSE: Duration = Duration::from_secs(3);

/// Fetches what the guest did not ask for yet, so that it soon depends on nobody.
pub(crate) async fn fetch(shared: Arc<Shared>, disks: Vec<Arc<Disk>>, memory: Option<Arc<Disk>>) {
    let images = disks.iter().chain(&memory).filter_map(|disk| disk.image());
    let all: Vec<Digest> = images.flat_map(|image| image.frames()).collect();
    // With what is read first here, it is as fast as from a disk, or needs something that nobody foresaw.
    let limit = shared.config.health.as_ref().map_or(UP_WITHOUT_CHECK, |check| check.limit.0);
    if let Some(arrival) = &shared.arrival {
        until_up(&shared, limit).await;
        gently(&shared, &all).await;
        return settle(&shared, arrival).await;
    }
    let first = wanted_first(&shared, &disks, memory.as_ref()).await;
    if !first.is_empty() {
        until_here(&shared, &first, Pace::AHEAD, &all).await;
        until_up(&shared, limit).await;
    }
    until_here(&shared, &all, Pace::BESIDE, &all).await;
    let copy = shared.config.resume.as_ref().and_then(|resume| resume.copy.as_ref()).filter(|copy| !copy.exists());
    if let (Some(copy), Some(memory)) = (copy, &memory) {
        let kept = keep_copy(&shared, memory, copy).await;
        // The next one reads it as this one did.
        kept.unwrap_or_else(|error| tracing::warn!(%error, "the version's memory cannot be kept for others"));
    }
}

/// Puts the memory of a version into a file, for the next ones that go on with it.
async fn keep_copy(shared: &Shared, memory: &Disk, copy: &Path) -> std::io::Result<()> {
    // What this machine reads is noted at its own disk.
    let image = Disk::open_frozen(memory.size(), memory.image().cloned(), shared.store.clone(), &[]);
    let image = image.map_err(std::io::Error::other)?;
    std::fs::create_dir_all(copy.parent().unwrap_or(Path::new(".")))?;
    if shared.store.cache().space()? < image.size() + SPACE_FOR_OTHERS {
        return Ok(());
    }
    let part = copy.with_extension(shared.config.instance.as_str());
    let file = std::fs::File::options().write(true).create(true).truncate(true).mode(0o600).open(&part)?;
    file.set_len(image.size())?;
    let mut at = 0;
    while let Some(range) = image.next_data(at) {
        let length = (range.end - range.start).min(COPY_STEP);
        let content = image.read(range.start, length as usize).await?;
        file.write_all_at(&content, range.start)?;
        at = range.start + length;
    }
    tokio::task::spawn_blocking(move || file.sync_all()).await.map_err(std::io::Error::other)??;
    std::fs::rename(&part, copy)
}

/// Fetches what a machine that arrives reads first, before it goes on. A guest whose processor waits for a page cannot do
/// anything else, while its clocks run on: all its timers are due at once, and touch what nobody foresaw.
pub(crate) async fn before_it_goes_on(shared: &Shared, disks: &[Arc<Disk>], memory: Option<&Arc<Disk>>) {
    let is_warm = shared.config.resume.as_ref().is_some_and(|resume| resume.image.is_some());
    if shared.arrival.is_some() || is_warm {
        let images = disks.iter().chain(memory).filter_map(|disk| disk.image());
        let all: Vec<Digest> = images.flat_map(|image| image.frames()).collect();
        count(shared, &all).await;
        let first = wanted_first(shared, disks, memory).await;
        tracing::info!(frames = first.len(), of = all.len(), "what is read first comes first");
        until_here(shared, &first, Pace::AHEAD, &all).await;
    }
}

/// Frames that guests read first, in their order.
async fn wanted_first(shared: &Shared, disks: &[Arc<Disk>], memory: Option<&Arc<Disk>>) -> Vec<Digest> {
    let lowest = |layers: &[PathBuf]| shared.arrival.as_ref()?.first(layers.first()?);
    let of_disk = |run: &RunDisk| lowest(&run.layers).or_else(|| run.image.as_ref()?.boot);
    let resume = shared.config.resume.as_ref();
    let traces = shared.config.disks.iter().map(of_disk);
    let memory = memory
        .map(|disk| (disk, resume.and_then(|resume| lowest(&resume.memory).or_else(|| resume.image.as_ref()?.boot))));
    let mut frames = Vec::new();
    // Without its memory a machine does not even come to its disks.
    for (disk, page) in memory.into_iter().chain(disks.iter().zip(traces)) {
        let (Some(image), Some(page)) = (disk.image(), page) else { continue };
        match boot_trace(shared, &page).await {
            Ok(trace) => frames.extend(trace.frames(image)),
            // Only a hint.
            Err(error) => tracing::warn!(%error, "what is read first is not known"),
        }
    }
    frames
}

/// Notes how much is to come.
async fn count(shared: &Shared, all: &[Digest]) {
    loop {
        match shared.store.lack(all).await {
            Err(error) if error.is_away() => sleep(PAUSE).await,
            Err(error) => return tracing::warn!(%error, "how much is to come is not known"),
            Ok(lack) => {
                if let Some(arrival) = shared.status().arrival.as_mut() {
                    arrival.bytes = lack.bytes;
                }
                return;
            }
        }
    }
}

/// From here on disks and memory are read from the layers that were made of what they stood on.
fn go_on_with_layers(shared: &Shared, arrival: &Arrival) -> Result<(), String> {
    let chains = shared.config.disks.iter().map(|disk| &disk.layers);
    let chains = chains.chain(shared.config.resume.iter().map(|resume| &resume.memory));
    let disks = shared.disks().clone().into_iter().chain(shared.memory().clone());
    for (disk, lowest) in disks.zip(chains).filter_map(|(disk, chain)| Some((disk, chain.first()?))) {
        if arrival.image(lowest).is_some() {
            let layer = Layer::open(lowest, disk.size(), false).map_err(|e| e.to_string())?;
            disk.put_below(layer).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

/// Makes layers of what has come, tried again for as long as that does not work: the disk may be full.
async fn settle(shared: &Shared, arrival: &Arrival) {
    loop {
        let written = arrival.write_layers().await.map_err(String::from);
        match written.and_then(|bytes| go_on_with_layers(shared, arrival).map(|()| bytes)) {
            Ok(bytes) => {
                tracing::info!(bytes, "all has arrived");
                // What this host kept is removed now, and its space is free only when nobody has it open.
                arrival.store.leave_near();
                let mut status = shared.status();
                status.waiting = None;
                if let Some(arrival) = status.arrival.as_mut() {
                    arrival.complete = true;
                }
                return;
            }
            Err(why) => {
                tracing::warn!(why, "what has arrived cannot be kept yet");
                shared.status().waiting = Some(why);
                sleep(PAUSE).await;
            }
        }
    }
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

/// As [`until_here`], in parts that take about half a second each: whatever the link, a guest that waits for something else
/// does not wait long.
async fn gently(shared: &Shared, all: &[Digest]) {
    let (mut rest, mut count) = (all, 1);
    while !rest.is_empty() {
        let (part, others) = rest.split_at(count.min(rest.len()));
        let begun = Instant::now();
        until_here(shared, part, Pace::AHEAD, all).await;
        count = match begun.elapsed() {
            took if took < PART / 2 => count * 2,
            took if took > PART * 2 => (count / 2).max(1),
            _ => count,
        };
        rest = others;
    }
}

async fn until_here(shared: &Shared, frames: &[Digest], pace: Pace, all: &[Digest]) {
    loop {
        let missing = all.iter().filter(|frame| !shared.store.has(frame)).count();
        shared.status().frames_missing = Some(missing as u64);
        if missing == 0 || frames.iter().all(|frame| shared.store.has(frame)) {
            return;
        }
        let progress = |bytes| {
            shared.ahead.fetch_add(bytes, Ordering::Relaxed);
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

/// Of a machine that was taken over nobody notes what it reads; its memory is read as any other once it is up.
pub(crate) async fn read_on(shared: Arc<Shared>) {
    until_up(&shared, RECORD_FOR).await;
    // One that is over has no reader.
    let _ = shared.orders.send(Order::ReadOn).await;
}

/// Writes into `to` which blocks the guest read until it was up, for whoever publishes the next version; of a machine that
/// went on also which pages, for whoever brings it elsewhere the next time.
pub(crate) async fn record(shared: Arc<Shared>, disks: Vec<Arc<Disk>>, memory: Option<Arc<Disk>>, to: PathBuf) {
    let up = if shared.config.rehearsal {
        until_up(&shared, REHEARSE_FOR).await;
        true
    } else {
        let up = until_up(&shared, RECORD_FOR).await;
        sleep(RECORD_ON).await;
        up
    };
    if memory.is_some() {
        // One that is over has no reader.
        let _ = shared.orders.send(Order::ReadOn).await;
    }
    let names = shared.config.disks.iter().map(|disk| disk.name.to_string()).chain([MEMORY.to_owned()]);
    let traces = disks.iter().chain(&memory).map(|disk| disk.stop_recording());
    let traces: BTreeMap<String, Trace> = names.zip(traces).collect();
    // Pages that are shared with others are read without anybody noting it.
    let unseen = memory.is_some() && traces.get(MEMORY).is_none_or(|trace| trace.0.is_empty());
    if !up || unseen {
        return;
    }
    let blocks: u32 = traces.values().flat_map(|trace| &trace.0).map(|(_, count)| count).sum();
    tracing::info!(blocks, healthy = shared.status().health == HealthState::Healthy, "noted what was read first");
    let part = to.with_extension("part");
    let written = serde_json::to_vec(&traces).map_err(std::io::Error::from);
    let written = written.and_then(|bytes| std::fs::write(&part, bytes)).and_then(|()| std::fs::rename(&part, &to));
    if let Err(error) = written {
        tracing::warn!(%error, "what the guest read until it was up cannot be noted");
    }
    if shared.config.rehearsal {
        let _ = shared.orders.send(Order::PowerOff).await;
    }
}

/// Reads what [`record`] wrote; nothing where it did not. It is only a hint.
pub(crate) fn read_touched(from: &Path) -> BTreeMap<String, Trace> {
    let bytes = match std::fs::read(from) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeMap::new(),
        read => read,
    };
    let read = bytes.and_then(|bytes| serde_json::from_slice(&bytes).map_err(std::io::Error::from));
    read.unwrap_or_else(|error| {
        tracing::warn!(%error, "what was read first is not known");
        BTreeMap::new()
    })
}

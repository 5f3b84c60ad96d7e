//! What the machine was stays here when it has gone, for when it comes back: its disks are in their layers, and its memory is
//! written into one. Nothing waits for that, and what of it is missing or wrong is sent again.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective_model::run_live::{Piece, Word};
use collective_store::BLOCK;
use collective_vmm::{GuestMemory, Vm};
use collective_volume::{Disk, Layer};

use super::is_zero;
use crate::line::Line;
use crate::save::{Saver, runs};

/// What is not written by then is not kept: the machine may come back at once.
const LIMIT: Duration = Duration::from_secs(5);
/// Memory is copied in pieces of so many bytes.
const STEP: u64 = 4 << 20;
/// So much of the disk stays free, in bytes, for those who are here.
const LEFT_FREE: u64 = 1 << 30;
/// After so many bytes they are made durable, so that the end does not take long.
const DURABLE: u64 = 64 << 20;

/// Waits until it is known that the machine goes on elsewhere, and keeps its memory in the layer at `path`.
pub(super) async fn keep(
    vm: &Vm,
    disks: &[Arc<Disk>],
    saver: &mut Saver,
    path: &Path,
    line: &mut Line,
) -> Result<(), String> {
    match line.hear().await? {
        Piece::Word(Word::Keep) => {}
        other => return Err(format!("the daemon said something else than that it has gone: {other:?}")),
    }
    let (memory, _) = saver.lend(vm).await?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let space = rustix::fs::statvfs(folder).map(|found| found.f_bavail * found.f_frsize);
    if space.is_ok_and(|space| space < memory.size() + LEFT_FREE) {
        return Err("the disk has no room for it".into());
    }
    let layer = Layer::create(path, memory.size()).and_then(|()| Layer::open(path, memory.size(), true));
    let layer = layer.map_err(|e| e.to_string())?;
    let bytes = copy(memory, &layer).map_err(|e| format!("it cannot be written: {e}"))?;
    let disks = disks.to_vec();
    let flush = move || layer.flush().and_then(|()| disks.iter().try_for_each(|disk| disk.flush()));
    let flushed = tokio::task::spawn_blocking(flush).await.map_err(|e| e.to_string())?;
    flushed.map_err(|e| format!("it cannot be written: {e}"))?;
    tracing::info!(bytes, "the memory of the machine that left is kept");
    line.say(Word::Left).await.map_err(|e| e.to_string())
}

fn copy(memory: &mut GuestMemory, layer: &Layer) -> io::Result<u64> {
    let begun = Instant::now();
    let (mut written, mut durable) = (0, 0);
    let mut buffer = vec![0; STEP as usize];
    for range in memory.changed()? {
        for start in range.clone().step_by(STEP as usize) {
            if begun.elapsed() > LIMIT {
                tracing::info!("the rest of the memory of the machine that left is not kept: it takes too long");
                return Ok(written);
            }
            let step = start..range.end.min(start + STEP);
            let part = &mut buffer[..(step.end - step.start) as usize];
            memory.read(std::slice::from_ref(&step), part)?;
            let mut at = start;
            for run in runs(part, is_zero) {
                // Zeros are never offered.
                if !is_zero(&run[..BLOCK as usize]) {
                    layer.write(at, run)?;
                    written += run.len() as u64;
                }
                at += run.len() as u64;
            }
            if written - durable >= DURABLE {
                layer.flush()?;
                durable = written;
            }
        }
    }
    Ok(written)
}

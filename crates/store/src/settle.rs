//! After the machine was cut off: what nobody synced is compared with its name before anybody counts on it.
//!
//! A damaged frame never reaches a guest without this either, but it would be counted as present until it is read, and
//! the plan of an update would promise fewer bytes than then move. Two files beside the frames keep this cheap: `boot` has
//! the id of the boot for which it was done, and `synced` a time: everything older is durable.

use std::fs;
use std::io;
use std::time::{Duration, SystemTime};

use rayon::prelude::*;

use crate::cache::{Cache, write_whole};
use crate::pack;

const BOOT: &str = "boot";
const SYNCED: &str = "synced";
/// What the kernel calls this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The times of files are taken from a clock that ticks a few milliseconds late.
const MARGIN: Duration = Duration::from_secs(1);

/// Everything that was in the cache at this time is durable.
pub(crate) fn note_synced(cache: &Cache, at: SystemTime) -> io::Result<()> {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(MARGIN);
    write_whole(&cache.root().join(SYNCED), &[since.as_millis().to_string().as_bytes()])
}

/// What is not older than this may not be durable. A mark that is cut short is an earlier time, and a damaged one none.
fn synced(cache: &Cache) -> SystemTime {
    let noted = fs::read_to_string(cache.root().join(SYNCED)).ok().and_then(|text| text.parse().ok());
    let since = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(noted.unwrap_or(0)));
    // The clock may have been wrong then, or be wrong now.
    since.filter(|since| *since <= SystemTime::now()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Looks at what was not synced before this boot, once.
pub(crate) fn after_boot(cache: &Cache) -> io::Result<()> {
    // Without /proc there is nothing to compare with, and damage is found when it is read.
    let Ok(boot) = fs::read(BOOT_ID) else { return Ok(()) };
    let noted = cache.root().join(BOOT);
    if fs::read(&noted).is_ok_and(|known| known == boot) {
        return Ok(());
    }
    let looked_at = look(cache, synced(cache))?;
    if looked_at > 0 {
        tracing::info!(files = looked_at, "looked at what was not synced in the cache before this boot");
        cache.sync()?;
    }
    write_whole(&noted, &[&boot])
}

/// Removes damaged frames and directories that are as young as this, and says how many were looked at.
fn look(cache: &Cache, since: SystemTime) -> io::Result<usize> {
    let young = cache.young(since)?;
    young.par_iter().for_each(|digest| {
        if let Err(error) = cache.look_at(digest) {
            tracing::warn!(frame = %digest, %error, "a cached frame cannot be read");
        }
    });
    let mut directories = 0;
    for entry in fs::read_dir(cache.root().join("packs"))? {
        let entry = entry?;
        let is_young = entry.metadata().and_then(|meta| meta.modified()).is_ok_and(|at| at >= since);
        if is_young {
            directories += 1;
            // They are short, and their packs have them.
            let is_sound = fs::read(entry.path()).is_ok_and(|tail| pack::is_tail(&tail));
            if !is_sound {
                fs::remove_file(entry.path())?;
            }
        }
    }
    Ok(young.len() + directories)
}

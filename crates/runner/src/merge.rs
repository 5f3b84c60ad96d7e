//! Layers that become one, while the machine runs on them or while it is off.
//!
//! The new layer is durable before anybody goes on with it, and has the content of the old ones, which stay as they are.
//! So it does not matter when this process dies: the daemon's record names the old ones until it was told that the new
//! one is there.

use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective_model::run::Phase;
use collective_model::run_merge::{MergeOrder, MergeStatus};
use collective_volume::{Disk, Layer};
use tokio::sync::oneshot;

use crate::private::end_with;
use crate::save::Saver;
use crate::state::{Order, Shared};

/// Bytes that a merge copies in a second when nobody waits for it.
const RATE: u64 = 32 << 20;
/// An order is at most this long, in bytes.
const MAX_ORDER: u64 = 1 << 20;

/// Begins to merge layers of the machine; the status says how it goes. The same order again changes nothing.
pub(crate) fn begin(shared: &Arc<Shared>, order: MergeOrder) -> Result<(), String> {
    {
        let mut status = shared.status();
        if status.phase != Phase::Running {
            return Err("there is no running machine whose layers could be merged".into());
        }
        match &status.merge {
            Some(merge) if merge.number == order.number => return Ok(()),
            Some(merge) if merge.outcome.is_none() => return Err("other layers are being merged".into()),
            _ => {}
        }
        status.merge = Some(MergeStatus { number: order.number, copied: 0, outcome: None });
    }
    let shared = shared.clone();
    tokio::spawn(async move {
        let outcome = merge_live(&shared, &order).await;
        if let Err(why) = &outcome {
            tracing::warn!(why, "layers stay as they are");
        }
        if let Some(merge) = &mut shared.status().merge {
            merge.outcome = Some(outcome);
        }
    });
    Ok(())
}

/// Whose layers they are.
enum Place {
    Disk(Arc<Disk>),
    /// Of the memory, as far as it is mapped.
    Mapped(Arc<Disk>),
    /// Of the memory, saved since the machine began.
    Saved,
}

async fn merge_live(shared: &Arc<Shared>, order: &MergeOrder) -> Result<(), String> {
    let (place, layers) = find(shared, order)?;
    let keep_zeros = match &place {
        Place::Disk(disk) | Place::Mapped(disk) => order.keep_zeros || disk.is_over_something(&layers[0]),
        Place::Saved => order.keep_zeros,
    };
    let (target, hurry) = (order.target.clone(), order.hurry);
    let copy = {
        let (shared, layers) = (shared.clone(), layers.clone());
        move || {
            let mut pace = Pace::new(hurry);
            Layer::merge(&layers, &target, keep_zeros, &mut |bytes| {
                let mut status = shared.status();
                if status.phase == Phase::Ended {
                    return Err(io::Error::other("the machine has ended"));
                }
                if let Some(merge) = &mut status.merge {
                    merge.copied += bytes;
                }
                drop(status);
                pace.wait(bytes);
                Ok(())
            })
        }
    };
    let merged = tokio::task::spawn_blocking(copy).await.map_err(|e| e.to_string())?.map_err(|e| e.to_string())?;
    let is_in_place = match place {
        Place::Disk(disk) => disk.replace(&layers, merged),
        // First for what is saved next, then for what is mapped: a layer that is only mapped is in nobody's way.
        Place::Mapped(memory) => tell_saver(shared, order).await? && memory.replace(&layers, merged),
        Place::Saved => tell_saver(shared, order).await?,
    };
    is_in_place.then_some(()).ok_or_else(|| "the layers were not next to each other any more".into())
}

fn find(shared: &Shared, order: &MergeOrder) -> Result<(Place, Vec<Arc<Layer>>), String> {
    if order.layers.len() < 2 {
        return Err("it takes two layers to merge".into());
    }
    for disk in shared.disks().iter() {
        if let Some(layers) = disk.frozen_layers(&order.layers) {
            return Ok((Place::Disk(disk.clone()), layers));
        }
    }
    if let Some(memory) = shared.memory().as_ref()
        && let Some(layers) = memory.frozen_layers(&order.layers)
    {
        return Ok((Place::Mapped(memory.clone()), layers));
    }
    Ok((Place::Saved, open(&order.layers)?))
}

fn open(paths: &[PathBuf]) -> Result<Vec<Arc<Layer>>, String> {
    let opened: Result<Vec<_>, _> = paths.iter().map(|path| Layer::open_frozen(path).map(Arc::new)).collect();
    opened.map_err(|e| e.to_string())
}

/// What is saved next must not name the old layers.
async fn tell_saver(shared: &Shared, order: &MergeOrder) -> Result<bool, String> {
    let (done, answer) = oneshot::channel();
    let merged = Order::Merged { layers: order.layers.clone(), target: order.target.clone(), done };
    let ended = || "the machine has ended".to_owned();
    shared.orders.send(merged).await.map_err(|_| ended())?;
    answer.await.map_err(|_| ended())
}

impl Saver {
    /// Names `target` in place of `layers` from now on; false if they are not all there, next to each other.
    pub(crate) fn replace(&mut self, layers: &[PathBuf], target: &Path) -> bool {
        let place = |list: &[PathBuf]| list.windows(layers.len()).position(|window| window == layers);
        let in_base = place(&self.base);
        // What the machine went on with must not end among them: a save that fails goes back to it.
        let is_cut = in_base.is_none() && self.base.iter().any(|layer| layers.contains(layer));
        let Some(in_chain) = place(&self.chain).filter(|_| !is_cut) else { return false };
        self.chain.splice(in_chain..in_chain + layers.len(), [target.to_owned()]);
        if let Some(at) = in_base {
            self.base.splice(at..at + layers.len(), [target.to_owned()]);
        }
        true
    }
}

/// Merges layers that no machine runs on, as the order says that comes from `order`, whose end ends this process; how it
/// went goes to `news`. False if it failed.
pub(crate) fn merge_alone(order: impl Read + Send + 'static, mut news: impl Write) -> bool {
    let mut order = io::BufReader::new(order);
    let wanted = read_order(&mut order);
    end_with(order);
    let (number, outcome) = match wanted {
        Ok(wanted) => (wanted.number, merge_files(&wanted)),
        Err(why) => (0, Err(why)),
    };
    let done = outcome.is_ok();
    let (copied, outcome) = outcome.map_or_else(|why| (0, Err(why)), |copied| (copied, Ok(())));
    let status = MergeStatus { number, copied, outcome: Some(outcome) };
    let written = serde_json::to_writer(&mut news, &status).map_err(io::Error::from);
    if let Err(error) = written.and_then(|()| news.write_all(b"\n")).and_then(|()| news.flush()) {
        tracing::debug!(%error, "the daemon does not listen");
    }
    done
}

fn read_order(from: &mut impl BufRead) -> Result<MergeOrder, String> {
    let mut line = String::new();
    let broken = |error: &dyn std::fmt::Display| format!("the daemon's order cannot be read: {error}");
    from.take(MAX_ORDER).read_line(&mut line).map_err(|e| broken(&e))?;
    serde_json::from_str(&line).map_err(|e| broken(&e))
}

fn merge_files(order: &MergeOrder) -> Result<u64, String> {
    let layers = open(&order.layers)?;
    let (mut pace, mut copied) = (Pace::new(order.hurry), 0);
    let mut wait = |bytes| {
        copied += bytes;
        pace.wait(bytes);
        Ok(())
    };
    Layer::merge(&layers, &order.target, order.keep_zeros, &mut wait).map_err(|e| e.to_string())?;
    Ok(copied)
}

/// Keeps a merge from taking the host's disk for itself.
struct Pace {
    begun: Instant,
    bytes: u64,
    hurry: bool,
}

impl Pace {
    fn new(hurry: bool) -> Self {
        Self { begun: Instant::now(), bytes: 0, hurry }
    }

    fn wait(&mut self, bytes: u64) {
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / RATE as f64);
        if let Some(left) = due.checked_sub(self.begun.elapsed()).filter(|_| !self.hurry) {
            std::thread::sleep(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use collective_model::run::Platform;

    fn paths(text: &str) -> Vec<PathBuf> {
        text.chars().map(|name| name.to_string().into()).collect()
    }

    #[test]
    fn what_is_saved_next_names_the_new_layer() {
        let platform =
            Platform { qemu: "10.0.2".into(), accelerator: "tcg".into(), cpu: "max".into(), portable: Vec::new() };
        let saver = |base, chain| {
            let mut saver = Saver::new(platform.clone(), None);
            (saver.base, saver.chain) = (paths(base), paths(chain));
            saver
        };
        for (base, chain, layers, result) in [
            ("abcd", "abcd", "bc", Some(("aNd", "aNd"))),
            ("abcd", "abcdef", "cd", Some(("abN", "abNef"))),
            ("ab", "abcdef", "cde", Some(("ab", "abNf"))),
            ("", "abc", "abc", Some(("", "N"))),
            ("ab", "abcd", "bc", None),
            ("ab", "abcd", "bd", None),
            ("ab", "ab", "xy", None),
        ] {
            let mut saver = saver(base, chain);
            let done = saver.replace(&paths(layers), Path::new("N"));
            let (base, chain) = result.unwrap_or((base, chain));
            assert_eq!((done, &saver.base, &saver.chain), (result.is_some(), &paths(base), &paths(chain)), "{layers}");
        }
    }

    #[test]
    fn orders_that_are_none_are_refused() {
        for wrong in ["", "\n", "{}\n", "{\"number\":1}\n"] {
            assert!(read_order(&mut wrong.as_bytes()).unwrap_err().contains("order cannot be read"), "{wrong}");
        }
        let order = r#"{"number":3,"layers":["1","2"],"target":"3","keep_zeros":true}"#;
        assert!(!read_order(&mut order.as_bytes()).unwrap().hurry);
        let missing = MergeOrder { number: 3, layers: paths("xy"), target: "N".into(), keep_zeros: true, hurry: true };
        let why = merge_files(&missing).unwrap_err();
        assert!(why.contains("cannot open the layer x"), "{why}");
    }
}

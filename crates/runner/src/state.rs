//! What the tasks of a runner share: its status, and the orders that come in.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collective_model::run::{Leave, PROTOCOL, Phase, RunConfig, RunStatus, SaveOrder};
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_volume::Disk;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::gate::Gate;
use crate::lifeline::Parts;
use crate::line::Line;
use crate::private::Arrival;

/// Why a machine was not started; trying again as it is would not help.
#[derive(Debug, thiserror::Error)]
pub enum NotStarted {
    /// Disks.
    #[error("disk \"{disk}\" cannot be opened: {why}")]
    Disk {
        /// Which.
        disk: String,
        /// Why.
        why: String,
    },
    /// Anything else that was attempted.
    #[error("{attempt}: {why}")]
    Step {
        /// What.
        attempt: &'static str,
        /// Why.
        why: String,
    },
}

impl NotStarted {
    pub(crate) fn step<E: std::fmt::Display>(attempt: &'static str) -> impl FnOnce(E) -> Self {
        move |error| Self::Step { attempt, why: error.to_string() }
    }
}

/// What a daemon may order.
#[derive(Debug)]
pub(crate) enum Order {
    Stop {
        limit_ms: u64,
    },
    PowerOff,
    /// The machine that went on is up: its memory is read as any other.
    ReadOn,
    Forward {
        port: u16,
        done: oneshot::Sender<Result<(), String>>,
    },
    Save(SaveOrder),
    /// Send it to whoever is at the other end.
    Leave {
        what: crate::leave::What,
        line: Line,
    },
    /// It comes from whoever is at the other end.
    Arrive {
        line: Line,
    },
    /// Nobody else has it.
    Stay,
    /// The daemon has what keeps it going.
    Hold,
    /// These layers of memory are one now.
    Merged {
        layers: Vec<PathBuf>,
        target: PathBuf,
        done: oneshot::Sender<bool>,
    },
}

/// Shared by all tasks.
pub(crate) struct Shared {
    pub config: RunConfig,
    pub store: Arc<FrameStore>,
    pub disks: Mutex<Vec<Arc<Disk>>>,
    /// The memory that the machine went on with.
    pub memory: Mutex<Option<Arc<Disk>>>,
    /// A page of it is waited for.
    pub memory_waits: Arc<Notify>,
    pub gate: Gate,
    pub orders: mpsc::Sender<Order>,
    /// What comes while the machine runs.
    pub arrival: Option<Arrival>,
    /// Bytes of frames that came before anybody waited for them.
    pub ahead: AtomicU64,
    status: Mutex<RunStatus>,
    /// What keeps the machine going without us, for as long as it runs.
    lifeline: Mutex<Parts>,
}

impl Shared {
    pub fn new(
        config: RunConfig,
        store: Arc<FrameStore>,
        gate: Gate,
        orders: mpsc::Sender<Order>,
        arrival: Option<Arrival>,
    ) -> Self {
        let arrives = arrival.as_ref().map(|_| Default::default());
        // Before anybody asks whether it may go on.
        let leave = if config.orphan.as_ref().is_some_and(|orphan| orphan.sent) { Leave::Sent } else { Leave::No };
        let (protocol, pid) = (PROTOCOL, std::process::id());
        let status = RunStatus { protocol, pid, leave, arrival: arrives, ..Default::default() };
        Self {
            config,
            store,
            disks: Mutex::default(),
            memory: Mutex::default(),
            memory_waits: Arc::default(),
            gate,
            orders,
            arrival,
            ahead: AtomicU64::new(0),
            status: Mutex::new(status),
            lifeline: Mutex::default(),
        }
    }

    pub fn lifeline(&self) -> MutexGuard<'_, Parts> {
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a chain of layers stands on whose lowest one is to arrive, and the layers above that.
    pub fn arrives<'a>(&self, layers: &'a [PathBuf]) -> (Option<Arc<ImageMap>>, &'a [PathBuf]) {
        let arrives = self.arrival.as_ref().zip(layers.split_first());
        let found = arrives.and_then(|(arrival, (lowest, above))| Some((arrival.image(lowest)?, above)));
        found.map_or((None, layers), |(image, above)| (Some(image), above))
    }

    pub fn status(&self) -> MutexGuard<'_, RunStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn disks(&self) -> MutexGuard<'_, Vec<Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn memory(&self) -> MutexGuard<'_, Option<Arc<Disk>>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The status with everything that is counted elsewhere.
    pub fn snapshot(&self) -> RunStatus {
        let mut status = self.status().clone();
        [status.bytes_fetched, status.index_bytes_fetched, status.bytes_from_cache] = self.store.moved();
        if let Some(arrival) = status.arrival.as_mut() {
            arrival.on_demand = status.bytes_fetched.saturating_sub(self.ahead.load(Ordering::Relaxed));
            arrival.bytes = arrival.bytes.saturating_sub(status.bytes_fetched);
        }
        status.waiting = self.store.waiting().or(status.waiting);
        status.own_bytes = self.disks().iter().map(|disk| disk.own_bytes()).collect();
        status.ports_open = self.gate.is_open();
        if status.phase == Phase::Ended {
            status.ports_open = false;
        }
        status
    }
}

//! The runner's local protocol: how the host daemon tells a runner what to keep alive, and asks it how it is.
//!
//! A runner outlives the daemon that started it, so an old runner meets newer daemons: within one [`PROTOCOL`] fields
//! are only added, with defaults. Both sides send one JSON document per line over the runner's unix socket; a daemon
//! sends a [`Request`], the runner answers with a [`Reply`].

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::kept::KeptCopy;
use crate::run_lifeline::{Orphan, Part};
use crate::run_live::Receiving;
use crate::run_merge::{MergeOrder, MergeStatus};
use crate::run_private::{RestoreDisk, RunPack};
use crate::{ApplianceName, Digest, Firmware, HealthCheck, HealthState, InstanceId, Name, PublishedPort, Timestamp};

pub use crate::platform::Platform;

/// The version of this protocol.
pub const PROTOCOL: u32 = 1;
/// The file in a run's directory that says what was read first when its machine went on, by the names of its disks.
pub const TOUCHED: &str = "touched.json";
/// A message is at most this long, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// All that a runner needs; the daemon writes it to `run.json` in the instance's run directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunConfig {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// Whose machine.
    pub instance: InstanceId,
    /// Its name, for people who list processes.
    pub name: Name,
    /// When the order to start came: times are counted from here.
    pub ordered: Timestamp,
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Firmware.
    pub firmware: Firmware,
    /// UEFI variables of this instance, where the firmware is UEFI.
    #[serde(default)]
    pub uefi_vars: Option<PathBuf>,
    /// Whether there is a VGA display.
    pub display: bool,
    /// In the guest's order.
    pub disks: Vec<RunDisk>,
    /// The seed disk, a raw file, attached read-only after the others.
    pub seed: PathBuf,
    /// Published ports.
    pub ports: Vec<PublishedPort>,
    /// Whether they open at once, or only when the daemon says so.
    pub open_ports: bool,
    /// Health check.
    pub health: Option<HealthCheck>,
    /// Whether the guest reaches the outside.
    pub outbound: bool,
    /// Addresses that the guest must not reach, beside the host's own: the plane's.
    #[serde(default)]
    pub deny: Vec<SocketAddr>,
    /// Never use KVM.
    pub force_tcg: bool,
    /// Under KVM, the portable processor that the guest sees, by name; none: the host's own.
    #[serde(default)]
    pub processor: Option<String>,
    /// User and group id for QEMU; none: the same as the runner's.
    pub user: Option<(u32, u32)>,
    /// The host's cache.
    pub cache: PathBuf,
    /// How to reach the store, a file only the host's user can read.
    pub credentials: PathBuf,
    /// Go on with this saved machine in place of booting.
    #[serde(default)]
    pub resume: Option<RunResume>,
    /// Layers that are not here yet. The key for them is the first line of the runner's standard input.
    #[serde(default)]
    pub arriving: Option<Arriving>,
    /// Only learn what is read first, and end; also when standard input does.
    #[serde(default)]
    pub rehearsal: bool,
    /// Go on with a machine that comes while it runs elsewhere, once all of it is here.
    #[serde(default)]
    pub receiving: Option<Receiving>,
    /// Take over the machine, which runs: its runner has died.
    #[serde(default)]
    pub orphan: Option<Box<Orphan>>,
}

/// Layers that come from the owner's data in the store while the machine runs, and what is needed for that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arriving {
    /// Whose packs they are in.
    pub home: InstanceId,
    /// These packs.
    pub packs: Vec<RunPack>,
    /// A folder for what is fetched, still encrypted. All indexes are in it.
    pub scratch: PathBuf,
    /// The layers, each the lowest of its disk or of the memory.
    pub layers: Vec<RestoreDisk>,
    /// What this host keeps of it since it was here.
    #[serde(default)]
    pub kept: KeptCopy,
    /// Where hashes of blocks of these packs are to be remembered.
    #[serde(default)]
    pub hashes: Option<PathBuf>,
}

/// How much of [`Arriving`] has arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Bytes still to come, as they are stored.
    pub bytes: u64,
    /// Bytes that came because the guest waited for them.
    pub on_demand: u64,
    /// The layers are there, durable, and the store is not needed any more.
    pub complete: bool,
}

/// A saved machine, on this host. Its disks are those of the run, each under a new layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunResume {
    /// What is below the layers: a memory that came with the version.
    #[serde(default)]
    pub image: Option<RunImage>,
    /// Layers of its memory, oldest first; never written to.
    pub memory: Vec<PathBuf>,
    /// Where all of the image may be, and is put when it has come, as a file that others go on with too. Only where nothing was
    /// written over it yet.
    #[serde(default)]
    pub copy: Option<PathBuf>,
    /// Whether the last one may be missing, and is then created, empty.
    #[serde(default)]
    pub create: bool,
    /// The file with the rest of it.
    pub state: PathBuf,
    /// That file's digest.
    pub digest: Digest,
    /// The instant that state and memory are of; they are useless apart.
    pub epoch: String,
}

/// Save the machine: memory, devices and disks of one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveOrder {
    /// Names this order, for [`RunStatus::save`].
    pub number: u64,
    /// Names the instant, for ever.
    pub epoch: String,
    /// The layer of memory to create.
    pub memory: PathBuf,
    /// The file to create with the rest of the machine.
    pub state: PathBuf,
    /// New layers for the disks, in their order, which take the writes from that instant on. Empty: the machine ends when
    /// it is saved.
    pub tops: Vec<PathBuf>,
    /// Where to put a picture of the screen, if it has one.
    #[serde(default)]
    pub screen: Option<PathBuf>,
}

impl SaveOrder {
    /// Whether the machine ends when it is saved.
    pub fn ends(&self) -> bool {
        self.tops.is_empty()
    }
}

/// How an order to save is going.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveStatus {
    /// Which order.
    pub number: u64,
    /// Bytes of memory written so far.
    pub written: u64,
    /// What came out, once it did.
    pub outcome: Option<Result<Saved, String>>,
}

/// A machine that was saved; durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    /// All layers of its memory, oldest first.
    pub memory: Vec<PathBuf>,
    /// The digest of the file with the rest of it.
    pub digest: Digest,
    /// Bytes of memory that this instant added.
    pub memory_bytes: u64,
    /// Bytes of the file with the rest.
    pub state_bytes: u64,
    /// For how long the guest stood still, in microseconds; none: it does not go on.
    pub pause_us: Option<u64>,
    /// What it ran on.
    pub platform: Platform,
    /// Why its whole memory has to be copied each time, if that is so.
    pub untracked: Option<String>,
    /// Whether there is a picture of the screen.
    #[serde(default)]
    pub screen: bool,
}

/// One disk of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunDisk {
    /// Its name and serial number.
    pub name: Name,
    /// In bytes.
    pub size: u64,
    /// Its base content.
    pub image: Option<RunImage>,
    /// Copy-on-write layers over it, oldest first; the last one takes the writes.
    pub layers: Vec<PathBuf>,
    /// Whether the last layer may be missing, and is then created.
    #[serde(default)]
    pub create_top: bool,
}

/// An image and where its frames are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunImage {
    /// The root page.
    pub root: Digest,
    /// The appliance whose packs hold it.
    pub appliance: ApplianceName,
    /// The version that listed these packs.
    pub version: Digest,
    /// The page of its boot trace.
    #[serde(default)]
    pub boot: Option<Digest>,
}

/// What a daemon asks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// How are you?
    Status,
    /// Let users in.
    OpenPorts,
    /// Make a TCP port of the guest reachable from this host; the answer's `forwards` say where.
    Forward {
        /// The guest's port.
        port: u16,
    },
    /// Press the power button; cut the power after this many milliseconds.
    Stop {
        /// The limit.
        limit_ms: u64,
    },
    /// Cut the power.
    PowerOff,
    /// Begin to save the machine; how it goes is in the status.
    Save(SaveOrder),
    /// Bring the machine elsewhere while it runs: the connection carries it from the answer on ([`crate::run_live`]).
    Leave {
        /// Names the instant at which it leaves.
        epoch: String,
        /// Disks that are sent whole, by their numbers: the other host has no image for them.
        whole: Vec<u16>,
        /// Only measure how long it would take.
        only_measure: bool,
        /// The layer to create with its memory, once it goes on there.
        #[serde(default)]
        keep: Option<PathBuf>,
    },
    /// Take the machine that comes on this connection.
    Arrive,
    /// Nobody else has the machine: go on, if it stands still for having been sent.
    Stay,
    /// Begin to merge layers of the machine, which goes on with the new one; how it goes is in the status.
    Merge(MergeOrder),
    /// Give what keeps the machine going when you die ([`crate::run_lifeline`]).
    Lifeline,
    /// I have it: the machine may outlive you.
    Hold,
}

/// What a runner answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// The answer to everything that worked.
    Status(Box<RunStatus>),
    /// What was asked for comes with the message, as descriptors in this order.
    Lifeline {
        /// What they are.
        parts: Vec<Part>,
    },
    /// It did not work.
    Error {
        /// Why.
        message: String,
    },
}

/// How a run is going.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The runner.
    pub pid: u32,
    /// QEMU, once it exists.
    pub qemu_pid: Option<u32>,
    /// Where it is.
    pub phase: Phase,
    /// `kvm`, or `tcg` and why.
    pub accelerator: Option<String>,
    /// The processor that the guest sees, as in [`Platform::cpu`].
    #[serde(default)]
    pub processor: Option<String>,
    /// Milliseconds from the order to the machine's first instruction.
    pub started_in_ms: Option<u64>,
    /// Milliseconds from the order to the first healthy answer.
    pub first_answer_ms: Option<u64>,
    /// Health.
    pub health: HealthState,
    /// What the last failed probe said.
    pub probe_output: Option<String>,
    /// Whether published ports are open.
    pub ports_open: bool,
    /// For each disk, bytes that differ from its image.
    pub own_bytes: Vec<u64>,
    /// Bytes fetched from the store, compressed data frames.
    pub bytes_fetched: u64,
    /// Index pages and directories fetched.
    pub index_bytes_fetched: u64,
    /// Compressed bytes that the cache had.
    pub bytes_from_cache: u64,
    /// Data frames of the images not in the cache yet; none: not known.
    pub frames_missing: Option<u64>,
    /// Why reads are waiting, where the store is away.
    pub waiting: Option<String>,
    /// Where the guest's ports can be reached from this host, by guest port.
    #[serde(default)]
    pub forwards: Vec<(u16, SocketAddr)>,
    /// Paused because the host's disk is full, or another device error.
    pub paused: Option<String>,
    /// How the last order to save is going.
    #[serde(default)]
    pub save: Option<SaveStatus>,
    /// How the last order to merge is going.
    #[serde(default)]
    pub merge: Option<MergeStatus>,
    /// Whether it is being sent elsewhere.
    #[serde(default)]
    pub leave: Leave,
    /// Whether it went on with a saved machine.
    #[serde(default)]
    pub resumed: bool,
    /// What it runs on.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// Whether the machine goes on when its runner dies, as long as somebody has what [`Request::Lifeline`] gave.
    #[serde(default)]
    pub outlives: bool,
    /// How much of what was not here has come; none: all was here.
    #[serde(default)]
    pub arrival: Option<Arrival>,
    /// How it ended, in [`Phase::Ended`].
    pub end: Option<RunEnd>,
}

/// Whether a machine is being sent elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Leave {
    /// No.
    #[default]
    No,
    /// It is, and runs.
    Busy,
    /// All of it was sent. It stands still until it is known who has it.
    Sent,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Disks are opened, QEMU is started.
    #[default]
    Starting,
    /// The guest runs.
    Running,
    /// QEMU has ended; the runner is about to.
    Ended,
}

/// How a run ended; the runner leaves it in `end.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEnd {
    /// What happened.
    pub kind: EndKind,
    /// In words, QEMU's own included.
    pub message: String,
    /// When.
    pub at: Timestamp,
    /// The machine, in [`EndKind::Suspended`].
    #[serde(default)]
    pub saved: Option<Saved>,
}

impl RunEnd {
    /// An end now.
    pub fn now(kind: EndKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), at: Timestamp::now(), saved: None }
    }
}

/// What ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EndKind {
    /// Asked to stop, the guest shut itself down.
    Clean,
    /// Asked to stop, it did not within the limit, and the power was cut.
    Forced,
    /// The guest powered itself off without being asked.
    GuestOff,
    /// The machine could not be started; trying again would not help.
    NotStarted,
    /// QEMU, the guest or the runner died.
    Crashed,
    /// It was saved, and is durable.
    Suspended,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An old runner meets a new daemon: the words on the wire must not change by accident.
    #[test]
    fn wire_words() {
        let text = serde_json::to_string(&Request::Stop { limit_ms: 5 }).unwrap();
        assert_eq!(text, r#"{"op":"stop","limit_ms":5}"#);
        let reply = Reply::Error { message: "x".into() };
        assert_eq!(serde_json::to_string(&reply).unwrap(), r#"{"reply":"error","message":"x"}"#);
        assert_eq!(serde_json::to_string(&EndKind::GuestOff).unwrap(), r#""guest-off""#);
    }
}

//! Requests and answers, as JSON. Fields are only added; a reader ignores what it does not know.

use std::collections::BTreeMap;

use collective_keys::{PublicKey, Signed};
use collective_model::{
    ApplianceName, ByteSize, Digest, Generation, InstanceId, Name, Observed, Operation, OperationId, OperationState,
    PublishedPort, Span, Spec, Timestamp, TunnelId, VersionName,
};
use collective_store::PackInfo;
use serde::{Deserialize, Serialize};

/// The body of every answer that is not a success.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    /// What was attempted, why it failed, what to do.
    pub error: String,
}

/// `GET /v1/status`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PlaneStatus {
    /// The program's version.
    pub version: String,
    /// Where hosts and users of other machines reach it.
    pub listen: Option<String>,
    /// Known hosts.
    pub hosts: Vec<HostView>,
    /// Instances, by count.
    pub instances: u64,
    /// Where it keeps packs. Older planes do not say.
    #[serde(default)]
    pub store: StoreStatus,
}

/// A plane's store, as `status` shows it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct StoreStatus {
    /// A folder, or `s3://BUCKET/PREFIX`.
    pub place: String,
    /// What was wrong when it was last used.
    pub trouble: Option<String>,
}

/// A host as the plane sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: Name,
    /// Whether it was heard of lately.
    pub reachable: bool,
    /// When it was last heard of.
    pub seen: Option<Timestamp>,
    /// What it said of itself.
    pub facts: Option<HostFacts>,
    /// Instances it owns.
    pub instances: u64,
}

/// What a host says of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The program's version.
    pub version: String,
    /// CPUs that the process may use.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// `kvm`, or `tcg` and why.
    pub accelerator: String,
    /// Whether the daemon is root.
    pub root: bool,
    /// Bytes in its cache.
    pub cache_bytes: u64,
    /// What is worse than it could be, in words.
    pub warnings: Vec<String>,
    /// What machines run on there.
    #[serde(default)]
    pub platform: Option<collective_model::run::Platform>,
}

/// An appliance in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ApplianceView {
    /// Its name.
    pub appliance: ApplianceName,
    /// The newest version's summary.
    pub summary: String,
    /// The publisher's key.
    pub key: PublicKey,
    /// Channels, and the name of the version they point to.
    pub channels: BTreeMap<Name, VersionName>,
    /// Versions, newest first.
    pub versions: Vec<VersionView>,
}

/// A version in a list.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VersionView {
    /// The maker's name of it.
    pub version: VersionName,
    /// Its digest.
    pub digest: Digest,
    /// When it was published.
    pub created: Timestamp,
}

/// All that a host needs to run a version.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VersionDetail {
    /// The signed manifest.
    pub manifest: Signed,
    /// Where its frames are.
    pub packs: Vec<PackInfo>,
    /// How the publisher's key changed, oldest first.
    pub key_changes: Vec<Signed>,
}

/// `POST /v1/appliances/P/N/versions`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PublishVersion {
    /// The signed manifest.
    pub manifest: Signed,
    /// All packs that its images need.
    pub packs: Vec<Digest>,
}

/// `GET /v1/appliances/P/N/channels/C`: a channel's head with its proof.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ChannelHead {
    /// The signed pointer.
    pub pointer: Signed,
}

/// `POST /v1/publishers/P/key`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KeyUpdate {
    /// The old key says so.
    Change(Signed),
    /// A person says so.
    Trust(PublicKey),
}

/// `POST /v1/tokens`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewToken {
    /// `join` or `user`.
    pub kind: String,
}

/// The answer: shown once, kept only as a hash.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TokenView {
    /// The token, with the plane's address and fingerprint.
    pub token: String,
}

/// `POST /v1/hosts/join`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The name the host wants.
    pub name: Name,
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct JoinAnswer {
    /// The host's own secret from now on.
    pub secret: String,
}

/// `POST /v1/instances`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LaunchRequest {
    /// Which version: `demo/notes`, `demo/notes:2`, ...
    pub reference: String,
    /// The instance's name; made from the appliance's if absent.
    #[serde(default)]
    pub name: Option<Name>,
    /// On which host; the plane chooses if absent.
    #[serde(default)]
    pub host: Option<Name>,
    /// The channel to follow.
    #[serde(default)]
    pub follow: Option<Name>,
    /// Published ports.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
    /// Settings.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// False: the guest reaches nothing outside.
    pub outbound: bool,
    /// In place of the version's.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// In place of the version's.
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// SSH public keys.
    #[serde(default)]
    pub authorized_keys: Vec<String>,
}

/// An instance as the plane sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InstanceView {
    /// What is wanted. Values of secret settings are left out.
    pub spec: Spec,
    /// Which host owns it.
    pub host: Name,
    /// Whether that host was heard of lately.
    pub reachable: bool,
    /// The channel it follows.
    pub follow: Option<Name>,
    /// No updates by themselves before.
    pub hold_until: Option<Timestamp>,
    /// What the host last said of it.
    pub observed: Option<Observed>,
    /// Operations that are not finished.
    pub operations: Vec<OperationView>,
    /// Grows with every change of the plane; for `?after=`.
    pub revision: u64,
}

/// An operation and how far it is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OperationView {
    /// What was asked.
    #[serde(flatten)]
    pub operation: Operation,
    /// How far.
    pub progress: OperationState,
    /// For `?after=`.
    pub revision: u64,
}

/// `POST /v1/instances/NAME/power`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PowerRequest {
    /// Whether it should run.
    pub on: bool,
}

/// `PATCH /v1/instances/NAME`; absent fields stay as they are.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct InstancePatch {
    /// Follow this channel, or (empty) none.
    #[serde(default)]
    pub follow: Option<String>,
    /// Hold updates until then; 0 ends the hold.
    #[serde(default)]
    pub hold_until: Option<Timestamp>,
    /// A new name.
    #[serde(default)]
    pub name: Option<Name>,
    /// Settings to change.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// CPUs.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Memory.
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// Disks to enlarge.
    #[serde(default)]
    pub disk_sizes: BTreeMap<Name, ByteSize>,
    /// Take a checkpoint of the running machine this often, or (0) none by itself.
    #[serde(default)]
    pub checkpoint_every: Option<Span>,
}

/// What a connection is upgraded to when it becomes a tunnel.
pub const TUNNEL_PROTOCOL: &str = "collective-tunnel";

/// `POST /v1/instances/NAME/tunnel`, which becomes a stream of bytes: where in the instance it leads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "to", rename_all = "kebab-case")]
pub enum TunnelTarget {
    /// A TCP port of the guest, published or not; refused while an update has closed the published ports.
    Port {
        /// Which.
        port: u16,
    },
    /// The serial console, after the end of what it said already; for one at a time.
    Console {
        /// Whether whoever is there is thrown out.
        force: bool,
    },
    /// What the guest writes to its serial console, from now on and without an end.
    Log {
        /// How many lines from before come first.
        lines: u32,
    },
    /// To a host that gets an instance while it runs: for hosts only.
    Arrival {
        /// The order to move it, which the host that has it carries out.
        operation: OperationId,
        /// The instance, as the other host has it.
        spec: Box<Spec>,
    },
    /// The content of a disk of an instance that is off, as [`collective_store::sparse`] says.
    Disk {
        /// Which.
        disk: Name,
    },
}

/// A tunnel that a host should open: it connects to the target, then to `POST /v1/hosts/self/tunnels/ID`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelOrder {
    /// Names it.
    pub id: TunnelId,
    /// Into which instance.
    pub instance: InstanceId,
    /// Where it leads.
    pub target: TunnelTarget,
}

/// The body of a host's `POST /v1/hosts/self/tunnels/ID`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelAnswer {
    /// Why the target cannot be reached; none: it is, and the bytes follow.
    pub refused: Option<String>,
}

/// The body of a host's `POST /v1/hosts/self/operations/ID/stay`, which asks for whether an instance that was to move, and may have,
/// is its own. If it is, it stays so: the order has failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StayRequest {
    /// By which ownership it has been its own.
    pub generation: Generation,
    /// Why it did not move, as far as is known.
    pub why: String,
}

/// Whose it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StayAnswer {
    /// Another host has it, since this ownership.
    pub moved: Option<Generation>,
}

/// Something that happened to an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// Which instance.
    pub instance: InstanceId,
    /// Counts the events of the instance on its host.
    pub serial: u64,
    /// When.
    pub at: Timestamp,
    /// `started`, `updated`, `update-failed`, `rolled-back`, `crashed`, ...
    pub what: String,
    /// In words.
    pub message: String,
}

/// `POST /v1/hosts/self/report`: what a host sees.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostReport {
    /// Of itself.
    pub facts: HostFacts,
    /// All instances it owns.
    pub observed: Vec<Observed>,
    /// Operations whose state changed.
    pub operations: Vec<(OperationId, OperationState)>,
    /// Events that the plane may not have yet.
    pub events: Vec<Event>,
}

/// `GET /v1/hosts/self/orders?seen=REVISION&wait_ms=N&left=ID,ID`: everything the host should know, as soon as it differs from
/// what it was at `seen`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostOrders {
    /// For the next request's `seen`.
    pub revision: u64,
    /// Who the plane thinks the host is.
    pub host: Name,
    /// All instances it owns.
    pub specs: Vec<Spec>,
    /// Operations that are not finished.
    pub operations: Vec<Operation>,
    /// Tunnels that users wait for.
    #[serde(default)]
    pub tunnels: Vec<TunnelOrder>,
    /// Instances that another host has now, and since which ownership: what is left of them here can go.
    #[serde(default)]
    pub moved: Vec<(InstanceId, Generation)>,
    /// Of those that the host asked for (`left`, instances that it had once) the ones that are no more.
    #[serde(default)]
    pub deleted: Vec<InstanceId>,
}

/// What an operation's `result` holds after `plan`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The version's name now.
    pub from: VersionName,
    /// The version's name afterwards.
    pub to: VersionName,
    /// The digest of the latter.
    pub to_digest: Digest,
    /// Stored bytes of the frames that the host lacks; index pages apart.
    pub bytes_to_fetch: u64,
    /// How many frames that are.
    pub frames_to_fetch: u64,
    /// Bytes of index pages and directories that were fetched for this plan; they are kept.
    #[serde(default)]
    pub index_bytes: u64,
    /// Bytes of the new version's system disks that are not zeros.
    pub bytes_total: u64,
    /// Bytes of the system disks' own writes that the update leaves behind.
    pub own_system_bytes_left_behind: u64,
    /// Whether the guest restarts.
    pub restart_required: bool,
    /// Whether data disks are checkpointed first.
    pub checkpoint_before: bool,
}

/// What an operation's `result` holds after `update`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UpdateResult {
    /// Whether the new version is in place.
    pub updated: bool,
    /// The version's name before.
    pub from: VersionName,
    /// The version that was asked for.
    pub to: VersionName,
    /// Stored bytes fetched for it, index pages apart.
    pub bytes_fetched: u64,
    /// Milliseconds during which published ports were closed.
    pub closed_ms: u64,
    /// Why it came back, with what the probe said.
    pub why: Option<String>,
}

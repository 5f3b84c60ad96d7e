//! An instance as the plane wants it ([`Spec`]) and as its host sees it ([`Observed`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{ApplianceName, ByteSize, Digest, DiskRole, HealthState, Name, Span, State, Timestamp, VersionName};

/// Counts the owners of an instance. A report or write that carries an older generation than the plane's is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// Numbers the checkpoints of one instance, from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CheckpointId(pub u64);

/// 16 random bytes as 32 hexadecimal digits.
macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// From 16 random bytes.
            pub fn from_random(bytes: [u8; 16]) -> Self {
                Self(bytes.iter().map(|b| format!("{b:02x}")).collect())
            }
            /// 32 hexadecimal digits.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(text: String) -> Result<Self, String> {
                let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
                if text.len() == 32 && text.bytes().all(hex) {
                    Ok(Self(text))
                } else {
                    Err(format!("{:?} is not an id", text.chars().take(40).collect::<String>()))
                }
            }
        }
        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                text.to_owned().try_into()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}
random_id!(
    /// Names an instance for ever, across renames and moves. It is also the guest's machine id.
    InstanceId
);
random_id!(
    /// Names an operation. A host carries out each id at most once, however often it is told.
    OperationId
);
random_id!(
    /// Names a backup.
    BackupId
);
random_id!(
    /// Names a tunnel, for as long as somebody waits for it.
    TunnelId
);

impl InstanceId {
    /// The id as a UUID, which the guest sees as its SMBIOS product UUID.
    pub fn uuid(&self) -> String {
        let s = &self.0;
        format!("{}-{}-{}-{}-{}", &s[..8], &s[8..12], &s[12..16], &s[16..20], &s[20..])
    }

    /// The MAC address of the instance's NIC number `index`: locally administered, the same wherever it runs.
    pub fn mac(&self, index: u8) -> String {
        let hash = Digest::of(format!("{self} mac {index}").as_bytes()).0;
        format!("52:{:02x}:{:02x}:{:02x}:{:02x}:{:02x}", hash[0], hash[1], hash[2], hash[3], hash[4])
    }
}

/// A guest port made reachable on an address of the host.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PublishedPort {
    /// The host's address; 127.0.0.1 unless given.
    pub address: IpAddr,
    /// The host's port.
    pub host: u16,
    /// The guest's port.
    pub guest: u16,
}

impl FromStr for PublishedPort {
    type Err = String;
    /// Reads `[ADDR:]HOSTPORT:GUESTPORT`; an IPv6 address stands in brackets.
    fn from_str(text: &str) -> Result<Self, String> {
        let error = || format!("\"{text}\" is not [ADDR:]HOSTPORT:GUESTPORT, such as 8080:80 or 0.0.0.0:8080:80");
        let port = |text: &str| text.parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(error);
        let (rest, guest) = text.rsplit_once(':').ok_or_else(error)?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (address.parse().map_err(|_| error())?, host)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        Ok(Self { address, host: port(host)?, guest: port(guest)? })
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(a) => write!(f, "{a}:{}:{}", self.host, self.guest),
            IpAddr::V6(a) => write!(f, "[{a}]:{}:{}", self.host, self.guest),
        }
    }
}

/// What the plane wants of an instance. Only the plane writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its identity.
    pub id: InstanceId,
    /// Its name, which is also its hostname.
    pub name: Name,
    /// Which ownership this is.
    pub generation: Generation,
    /// What it is an instance of.
    pub appliance: ApplianceName,
    /// The version it starts with. Later versions come by operations, and the host says which one it has.
    pub version: Digest,
    /// Whether it should run.
    pub on: bool,
    /// Counts the start and stop commands, so that starting a failed instance again is something new.
    pub power_serial: u64,
    /// Published ports.
    pub ports: Vec<PublishedPort>,
    /// Settings the user gave; the version's defaults are not repeated.
    pub settings: BTreeMap<String, String>,
    /// Whether the guest reaches the outside.
    pub outbound: bool,
    /// In place of the version's number of CPUs.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// In place of the version's memory.
    #[serde(default)]
    pub memory: Option<ByteSize>,
    /// Disks made larger by the user, in bytes.
    #[serde(default)]
    pub disk_sizes: BTreeMap<Name, ByteSize>,
    /// SSH public keys that may log in, one per line.
    #[serde(default)]
    pub authorized_keys: Vec<String>,
    /// What it was on the host that had it before; it is brought from the store before anything else happens to it.
    #[serde(default)]
    pub arrival: Option<BackupId>,
    /// What it is a copy of; it begins as that was.
    #[serde(default)]
    pub origin: Option<Origin>,
    /// How often a checkpoint of the running machine is taken by itself; none: never. See [`crate::schedule`].
    #[serde(default)]
    pub checkpoint_every: Option<Span>,
}

/// A checkpoint of another instance on the same host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The other instance.
    pub instance: InstanceId,
    /// Its checkpoint.
    pub checkpoint: CheckpointId,
}

/// What a host says about an instance it owns. Only the host writes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// Which instance.
    pub id: InstanceId,
    /// Under which ownership this was seen.
    pub generation: Generation,
    /// Where it is in its life.
    pub state: State,
    /// The version it has.
    pub version: Digest,
    /// The maker's name of that version.
    pub version_name: Option<VersionName>,
    /// `kvm`, or `tcg` and why.
    pub accelerator: Option<String>,
    /// The processor that the guest sees, as in [`Platform::cpu`](crate::run::Platform::cpu).
    #[serde(default)]
    pub processor: Option<String>,
    /// The guest's addresses, as far as the host knows.
    pub addresses: Vec<String>,
    /// Published ports, and whether they are open.
    pub ports: Vec<PublishedPort>,
    /// Ports stay closed until an update has proved itself.
    pub ports_open: bool,
    /// Disks.
    pub disks: Vec<ObservedDisk>,
    /// Bytes fetched from the store for this instance, compressed, data frames only.
    pub bytes_fetched: u64,
    /// Bytes of index pages and pack directories fetched.
    pub index_bytes_fetched: u64,
    /// Bytes that were in the host's cache already, compressed, counted once per frame and run.
    pub bytes_from_cache: u64,
    /// Milliseconds from the order to start to the machine's first instruction.
    pub started_in_ms: Option<u64>,
    /// Milliseconds from the order to start to the first healthy answer.
    pub first_answer_ms: Option<u64>,
    /// Frames of the version that the host does not have yet.
    pub frames_missing: Option<u64>,
    /// What the guest is waiting for, where the store is away.
    pub waiting: Option<String>,
    /// Health.
    pub health: HealthState,
    /// What the last failed probe said.
    pub probe_output: Option<String>,
    /// Why it last failed.
    pub last_error: Option<String>,
    /// How it last stopped.
    pub last_stop: Option<String>,
    /// The highest [`Spec::power_serial`] that the host has acted on.
    pub power_serial: u64,
    /// Checkpoints on the host, oldest first.
    pub checkpoints: Vec<Checkpoint>,
    /// The machine that was saved, while it is suspended.
    #[serde(default)]
    pub suspended: Option<CheckpointMachine>,
    /// Where in the store what it is now lies, if it does not run.
    #[serde(default)]
    pub in_store: Option<BackupId>,
    /// The [`Spec::arrival`] that was brought here.
    #[serde(default)]
    pub arrived: Option<BackupId>,
    /// Whether the running machine went on with a saved one.
    #[serde(default)]
    pub resumed: bool,
    /// For how long the machine stood still when it came here running, in microseconds.
    #[serde(default)]
    pub moved_pause_us: Option<u64>,
    /// How much of it has come to this host; none: all was here when it was started.
    #[serde(default)]
    pub arrival: Option<crate::run::Arrival>,
    /// The public SSH host key on its seed disk, in OpenSSH's format.
    #[serde(default)]
    pub ssh_host_key: Option<String>,
    /// When the host saw this.
    pub observed_at: Timestamp,
}

/// One disk of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObservedDisk {
    /// Its name.
    pub name: Name,
    /// Its role.
    pub role: DiskRole,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes in which it differs from its image.
    pub own_bytes: u64,
}

/// A kept state of an instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Its number.
    pub id: CheckpointId,
    /// When it was taken.
    pub taken: Timestamp,
    /// Why: `before update to 2`, `failed update to 3`, `before rollback`.
    pub why: String,
    /// The version whose system disk it holds.
    pub version: Digest,
    /// That version's name.
    pub version_name: VersionName,
    /// Bytes of the instance's own that it keeps.
    pub own_bytes: u64,
    /// Its running machine, if it has that.
    #[serde(default)]
    pub machine: Option<CheckpointMachine>,
    /// Whether it was taken by the clock, and goes by itself.
    #[serde(default)]
    pub scheduled: bool,
}

/// The running machine of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMachine {
    /// Bytes of memory and devices that it added to what was kept before.
    pub bytes: u64,
    /// For how long the guest stood still for it, in microseconds; none: it was suspended.
    pub pause_us: Option<u64>,
    /// What it goes on with: only there.
    pub platform: crate::run::Platform,
    /// Whether there is a picture of its screen.
    #[serde(default)]
    pub screen: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_ports() {
        for (text, ok) in
            [("8080:80", "127.0.0.1:8080:80"), ("0.0.0.0:80:80", "0.0.0.0:80:80"), ("[::1]:8080:80", "[::1]:8080:80")]
        {
            assert_eq!(text.parse::<PublishedPort>().unwrap().to_string(), ok);
        }
        for bad in ["80", "0:80", "80:0", "x:80:80", "70000:80", ""] {
            assert!(bad.parse::<PublishedPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn identity_is_stable() {
        let id = InstanceId::from_random([7; 16]);
        assert_eq!(id.uuid(), "07070707-0707-0707-0707-070707070707");
        assert_eq!(id.mac(0), id.mac(0));
        assert_ne!(id.mac(0), id.mac(1));
        assert!("../../etc".parse::<InstanceId>().is_err());
    }
}

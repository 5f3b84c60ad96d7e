//! The manifest: one version of an appliance as its maker signed it.
//!
//! Its bytes are JSON (`docs/formats/manifest.md`). The version is named by the BLAKE3 of exactly those bytes, so
//! nothing here is ever serialised again to check a signature.

use std::collections::{BTreeMap, HashSet};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ApplianceName, ByteSize, Digest, HealthCheck, Name, Timestamp, VersionName, Warm};

/// The manifest format that this program writes.
pub const MANIFEST_FORMAT: u32 = 1;
/// A manifest is at most this long, in bytes.
pub const MAX_MANIFEST_BYTES: usize = 1 << 20;
/// A disk is at most this large: 64 TiB.
const MAX_DISK_BYTES: u64 = 64 << 40;
/// A machine has at most this many disks beside its seed disk.
const MAX_DISKS: usize = 16;

/// One immutable version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: u32,
    /// Whose and which appliance this is a version of.
    pub appliance: ApplianceName,
    /// The maker's name of the version.
    pub version: VersionName,
    /// When it was published.
    pub created: Timestamp,
    /// One line for people.
    #[serde(default)]
    pub summary: String,
    /// What the machine is made of.
    pub hardware: Hardware,
    /// In the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// Guest ports that a user may publish.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// How to tell that it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// What a user may set.
    #[serde(default)]
    pub settings: BTreeMap<String, Setting>,
    /// Present if the guest runs cloud-init and wants user data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Present if `collective ssh` can log in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<Ssh>,
    /// Its machine as it was when it was up, if it ships that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,
}

/// The machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory in bytes, a multiple of 1 MiB.
    pub memory: ByteSize,
    /// What starts the boot loader.
    #[serde(default)]
    pub firmware: Firmware,
    /// Whether there is a VGA display (nobody looks at it unless asked).
    #[serde(default)]
    pub display: bool,
    /// Which processor the guest sees.
    #[serde(default, skip_serializing_if = "Cpu::is_portable")]
    pub cpu: Cpu,
}

/// Which processor the guest sees, where it is not emulated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cpu {
    /// The best that other hosts have as well, so that a running machine goes on at these.
    #[default]
    Portable,
    /// All that the host's own has; a running machine goes on only where it is the same.
    Host,
}

impl Cpu {
    /// Manifests and hosts of before know no other.
    pub(crate) fn is_portable(&self) -> bool {
        *self == Self::Portable
    }
}

/// What starts the boot loader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Firmware {
    /// SeaBIOS.
    #[default]
    Bios,
    /// OVMF.
    Uefi,
}

/// What becomes of a disk when the version changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskRole {
    /// Comes from the version and is replaced with it.
    System,
    /// The user's: created once, survives every version.
    Data,
    /// Empty at every start.
    Scratch,
}

/// What becomes of an instance's own writes to a system disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SystemWrites {
    /// Kept until the next version.
    #[default]
    Keep,
    /// Forgotten at every start.
    Discard,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Also the disk's serial number in the guest.
    pub name: Name,
    /// What becomes of it when the version changes.
    pub role: DiskRole,
    /// For a system disk: how long the instance's own writes last.
    #[serde(default)]
    pub writes: SystemWrites,
    /// In bytes, a multiple of 512.
    pub size: ByteSize,
    /// The root page of its content; none: all zeros.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Digest>,
    /// The page with the order in which a guest reads it while it boots; a hint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Digest>,
}

/// A guest port that the appliance offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// What it is for.
    pub name: Name,
    /// The guest's port number.
    pub guest: u16,
    /// TCP unless said otherwise.
    #[serde(default)]
    pub protocol: Protocol,
}

/// A transport.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
}

/// A setting that a user may give with `launch --set` or `set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// What values it takes.
    #[serde(rename = "type", default)]
    pub kind: SettingType,
    /// Used when the user sets nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default: Option<String>,
    /// Never shown, logged or put into a manifest's default.
    #[serde(default)]
    pub secret: bool,
    /// One line for people.
    #[serde(default)]
    pub description: String,
}

/// The type of a setting's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SettingType {
    /// Any text without line breaks.
    #[default]
    String,
    /// A decimal integer.
    Integer,
    /// `true` or `false`.
    Boolean,
}

/// Of `#cloud-config`: what the seed disk says itself.
const INSTANCE_KEYS: [&str; 2] = ["ssh_keys", "ssh_authorized_keys"];

/// The guest runs cloud-init.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CloudInit {
    /// The maker's `#cloud-config`, without the first line; the instance's own keys are added to it.
    #[serde(default)]
    pub user_data: String,
}

/// How to log in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ssh {
    /// The account that takes the keys of the seed disk.
    pub user: Name,
    /// The guest's port.
    #[serde(default = "default_ssh_port")]
    pub port: u16,
}

fn default_ssh_port() -> u16 {
    22
}

/// Why a manifest is refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Longer than [`MAX_MANIFEST_BYTES`].
    #[error("the manifest is {0} bytes long; the limit is {MAX_MANIFEST_BYTES}")]
    TooLong(usize),
    /// Not the JSON it should be.
    #[error("the manifest cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// Written by a newer program.
    #[error("the manifest has format {0}, and this program knows {MANIFEST_FORMAT}: update Collective")]
    Format(u32),
    /// It contradicts itself or asks for what cannot be.
    #[error("the manifest is not sound: {0}")]
    Unsound(String),
}

impl Manifest {
    /// Reads and checks manifest bytes.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        if bytes.len() > MAX_MANIFEST_BYTES {
            return Err(ManifestError::TooLong(bytes.len()));
        }
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let head: Head = serde_json::from_slice(bytes)?;
        if head.format != MANIFEST_FORMAT {
            return Err(ManifestError::Format(head.format));
        }
        let manifest: Self = serde_json::from_slice(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Refuses what no host could run or what would be ambiguous.
    pub fn check(&self) -> Result<(), ManifestError> {
        let unsound = |why: String| Err(ManifestError::Unsound(why));
        let hardware = &self.hardware;
        if !(1..=255).contains(&hardware.cpus) {
            return unsound(format!("{} cpus; 1 to 255 are possible", hardware.cpus));
        }
        let memory = hardware.memory.0;
        if !(1 << 20..=16 << 40).contains(&memory) || !memory.is_multiple_of(1 << 20) {
            return unsound(format!("memory of {memory} bytes; it must be whole MiB, up to 16 TiB"));
        }
        if self.disks.is_empty() || self.disks.len() > MAX_DISKS {
            return unsound(format!("{} disks; 1 to {MAX_DISKS} are possible", self.disks.len()));
        }
        let mut names = HashSet::new();
        for disk in &self.disks {
            if !names.insert(&disk.name) || disk.name.as_str() == "seed" {
                return unsound(format!("the disk name \"{}\" is taken", disk.name));
            }
            // It becomes a virtio serial number, which ends after 20 bytes, and a node name in QEMU.
            if disk.name.as_str().len() > 20 || !disk.name.as_str().as_bytes()[0].is_ascii_lowercase() {
                return unsound(format!("the disk name \"{}\" is not a letter and at most 19 more", disk.name));
            }
            if disk.size.0 == 0 || disk.size.0 > MAX_DISK_BYTES || disk.size.0 % 512 != 0 {
                return unsound(format!("disk \"{}\" has an impossible size of {} bytes", disk.name, disk.size.0));
            }
            if disk.role == DiskRole::System && disk.image.is_none() {
                return unsound(format!("system disk \"{}\" has no image", disk.name));
            }
        }
        let mut ports = HashSet::new();
        for port in &self.ports {
            if port.guest == 0 || !ports.insert(port.guest) {
                return unsound(format!("guest port {} is listed twice or is 0", port.guest));
            }
        }
        if let Some(health) = &self.health {
            let path = &health.http.path;
            if !path.starts_with('/') || path.chars().any(|c| c.is_whitespace() || c.is_control()) {
                return unsound(format!("the health check's path {path:?} is not a path"));
            }
            if health.interval.0.is_zero() || health.timeout.0.is_zero() || health.limit.0.is_zero() {
                return unsound("a span of the health check is zero".into());
            }
        }
        if let Some(cloud_init) = &self.cloud_init {
            // A second one would take the place of the instance's own.
            let own = |line: &&str| {
                INSTANCE_KEYS.iter().any(|key| line.strip_prefix(key).is_some_and(|r| r.starts_with(':')))
            };
            if let Some(line) = cloud_init.user_data.lines().find(own) {
                return unsound(format!("cloud_init.user_data has {line:?}, which every instance gets of its own"));
            }
        }
        if self.ssh.as_ref().is_some_and(|ssh| ssh.port == 0) {
            return unsound("the port of ssh is 0".into());
        }
        if let Some(warm) = &self.warm {
            warm.check(&self.disks).map_err(ManifestError::Unsound)?;
        }
        for (key, setting) in &self.settings {
            check_key(key).map_err(ManifestError::Unsound)?;
            if setting.secret && setting.default.is_some() {
                return unsound(format!("the secret setting \"{key}\" has a default, which everybody could read"));
            }
            if let Some(value) = &setting.default {
                setting.check(key, value).map_err(ManifestError::Unsound)?;
            }
        }
        Ok(())
    }

    /// The settings that the guest gets: defaults overlaid with `chosen`, each checked. The error is for the user.
    pub fn settings_with(&self, chosen: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>, String> {
        for (key, value) in chosen {
            let Some(setting) = self.settings.get(key) else {
                let known: Vec<_> = self.settings.keys().map(String::as_str).collect();
                return Err(format!("{} has no setting \"{key}\"; it has: {}", self.appliance, known.join(", ")));
            };
            setting.check(key, value)?;
        }
        let defaults = self.settings.iter().filter_map(|(k, s)| Some((k.clone(), s.default.clone()?)));
        let mut all: BTreeMap<_, _> = defaults.collect();
        all.extend(chosen.iter().map(|(k, v)| (k.clone(), v.clone())));
        Ok(all)
    }
}

/// Keys become shell variables and file content in the guest.
fn check_key(key: &str) -> Result<(), String> {
    let fine = (1..=63).contains(&key.len())
        && key.as_bytes()[0].is_ascii_lowercase()
        && key.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if fine { Ok(()) } else { Err(format!("\"{key}\" is not a setting's key: use a-z, 0-9 and _")) }
}

impl Setting {
    fn check(&self, key: &str, value: &str) -> Result<(), String> {
        if value.len() > 4096 || value.chars().any(char::is_control) {
            return Err(format!("the value of \"{key}\" must be one line of at most 4096 bytes"));
        }
        let fine = match self.kind {
            SettingType::String => true,
            SettingType::Integer => value.parse::<i64>().is_ok(),
            SettingType::Boolean => value == "true" || value == "false",
        };
        let kind = format!("{:?}", self.kind).to_lowercase();
        let shown = if self.secret { "its value" } else { value };
        if fine { Ok(()) } else { Err(format!("setting \"{key}\" takes a {kind}, and {shown} is none")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn sample() -> Manifest {
        serde_json::from_value(serde_json::json!({
            "format": 1, "appliance": "demo/notes", "version": "1", "created": "2026-11-22T00:00:00Z",
            "hardware": { "cpus": 1, "memory": 536870912 },
            "disks": [
                { "name": "system", "role": "system", "size": 1048576, "image": Digest::of(b"a") },
                { "name": "data", "role": "data", "size": 1048576 }
            ],
            "ports": [{ "name": "http", "guest": 80 }],
            "health": { "http": { "port": 80, "path": "/health" } },
            "settings": { "title": { "default": "Notes" }, "limit": { "type": "integer", "secret": true } }
        }))
        .unwrap()
    }

    #[test]
    fn a_default_processor_is_not_written() {
        let mut manifest = sample();
        assert_eq!(manifest.hardware.cpu, Cpu::Portable, "what older manifests mean");
        assert!(
            !serde_json::to_string(&manifest).unwrap().contains("\"cpu\""),
            "older hosts refuse what they do not know"
        );
        manifest.hardware.cpu = Cpu::Host;
        let bytes = serde_json::to_vec(&manifest).unwrap();
        assert_eq!(Manifest::parse(&bytes).unwrap().hardware.cpu, Cpu::Host);
    }

    #[test]
    fn sound_and_unsound() {
        sample().check().unwrap();
        let spoil: [fn(&mut Manifest); 11] = [
            |m| m.hardware.cpus = 0,
            |m| m.hardware.memory = ByteSize(1),
            |m| m.disks.clear(),
            |m| m.disks[1].name = m.disks[0].name.clone(),
            |m| m.disks[0].image = None,
            |m| m.disks[0].size = ByteSize(u64::MAX),
            |m| m.health.as_mut().unwrap().http.path = "/a b".into(),
            |m| m.ports[0].guest = 0,
            |m| m.ssh = Some(Ssh { user: m.disks[0].name.clone(), port: 0 }),
            |m| m.cloud_init = Some(CloudInit { user_data: "locale: C\nssh_keys:\n  rsa_private: x\n".into() }),
            |m| m.cloud_init = Some(CloudInit { user_data: "ssh_authorized_keys: []".into() }),
        ];
        for (i, spoil) in spoil.iter().enumerate() {
            let mut manifest = sample();
            spoil(&mut manifest);
            assert!(manifest.check().is_err(), "case {i}");
        }
    }

    #[test]
    fn settings() {
        let set = |k: &str, v: &str| sample().settings_with(&BTreeMap::from([(k.to_owned(), v.to_owned())]));
        assert_eq!(set("limit", "5").unwrap()["title"], "Notes");
        assert!(set("limit", "hidden").is_err_and(|e| !e.contains("hidden")));
        assert!(set("nope", "1").is_err_and(|e| e.contains("title")));
        assert!(set("title", "a\nb").is_err());
    }

    #[test]
    fn unknown_fields_and_formats_are_refused() {
        let mut value = serde_json::to_value(sample()).unwrap();
        value["surprise"] = 1.into();
        assert!(Manifest::parse(&serde_json::to_vec(&value).unwrap()).is_err());
        value["format"] = 9.into();
        let error = Manifest::parse(&serde_json::to_vec(&value).unwrap()).unwrap_err();
        assert!(matches!(error, ManifestError::Format(9)), "{error}");
    }

    proptest! {
        #[test]
        fn damaged_bytes_never_panic(position in 0usize..600, byte: u8) {
            let mut bytes = serde_json::to_vec(&sample()).unwrap();
            let position = position % bytes.len();
            bytes[position] = byte;
            let _ = Manifest::parse(&bytes);
            let _ = Manifest::parse(&bytes[..position]);
        }
    }
}

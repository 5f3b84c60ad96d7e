//! `appliance.toml`: what a maker writes. `publish` turns it and its disk files into a [`Manifest`](crate::Manifest).

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    ApplianceName, ByteSize, CloudInit, Cpu, DiskRole, Firmware, HealthCheck, Name, Port, Setting, Ssh, SystemWrites,
    VersionName,
};

/// The whole file.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Who publishes it.
    pub publisher: Name,
    /// The appliance's name.
    pub name: Name,
    /// The version that the disk files beside this file are; written by `build`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<VersionName>,
    /// One line for people.
    #[serde(default)]
    pub summary: String,
    /// The machine.
    #[serde(default)]
    pub hardware: RecipeHardware,
    /// In the order in which the guest sees them.
    #[serde(rename = "disk")]
    pub disks: Vec<RecipeDisk>,
    /// Guest ports that a user may publish.
    #[serde(rename = "port", default)]
    pub ports: Vec<Port>,
    /// How to tell that it works.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<HealthCheck>,
    /// What a user may set.
    #[serde(default)]
    pub settings: BTreeMap<String, Setting>,
    /// Present if the guest runs cloud-init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cloud_init: Option<CloudInit>,
    /// Present if `collective ssh` can log in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh: Option<Ssh>,
    /// How `collective build` makes the disk files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<BuildRecipe>,
}

/// The machine as a maker describes it.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecipeHardware {
    /// Virtual CPUs.
    pub cpus: u32,
    /// Memory.
    pub memory: ByteSize,
    /// What starts the boot loader.
    pub firmware: Firmware,
    /// Whether there is a VGA display.
    pub display: bool,
    /// Which processor the guest sees.
    #[serde(skip_serializing_if = "Cpu::is_portable")]
    pub cpu: Cpu,
}

impl Default for RecipeHardware {
    fn default() -> Self {
        Self { cpus: 1, memory: ByteSize(512 << 20), firmware: Firmware::Bios, display: false, cpu: Cpu::Portable }
    }
}

/// One disk.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecipeDisk {
    /// Also the disk's serial number in the guest.
    pub name: Name,
    /// What becomes of it when the version changes.
    pub role: DiskRole,
    /// For a system disk: how long the instance's own writes last.
    #[serde(default)]
    pub writes: SystemWrites,
    /// Its content: a file beside this one (raw, qcow2, vmdk, vdi or vhdx).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Its size, where there is no file or it should be larger than the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
}

/// How the disk files are made.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildRecipe {
    /// A program beside this file, run once for each version.
    pub script: PathBuf,
    /// The versions it can make, in the order in which they derive from each other.
    pub versions: Vec<VersionName>,
}

/// Why an `appliance.toml` is refused.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// Not the TOML it should be; the message has the line.
    #[error("{0}")]
    Toml(#[from] toml::de::Error),
    /// A disk that is neither a file nor has a size.
    #[error("disk \"{0}\" needs a file or a size")]
    EmptyDisk(Name),
    /// A path that leaves the recipe's folder.
    #[error("\"{}\" must be a relative path without \"..\"", .0.display())]
    Path(PathBuf),
}

impl Recipe {
    /// Reads an `appliance.toml`.
    pub fn parse(text: &str) -> Result<Self, RecipeError> {
        let recipe: Self = toml::from_str(text)?;
        for disk in &recipe.disks {
            if disk.file.is_none() && disk.size.is_none() {
                return Err(RecipeError::EmptyDisk(disk.name.clone()));
            }
        }
        let files = recipe.disks.iter().filter_map(|disk| disk.file.as_ref());
        for path in files.chain(recipe.build.iter().map(|build| &build.script)) {
            let inside = |part| matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir);
            if !path.components().all(inside) {
                return Err(RecipeError::Path(path.clone()));
            }
        }
        Ok(recipe)
    }

    /// `publisher/name`.
    pub fn appliance(&self) -> ApplianceName {
        ApplianceName { publisher: self.publisher.clone(), name: self.name.clone() }
    }

    /// The JSON Schema of `appliance.toml`, for editors.
    pub fn json_schema() -> serde_json::Value {
        schemars::schema_for!(Recipe).to_value()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_makers_write() {
        let recipe = Recipe::parse(
            r#"
            publisher = "demo"
            name = "notes"
            [hardware]
            memory = "256M"
            cpu = "host"
            [[disk]]
            name = "system"
            role = "system"
            file = "system.raw"
            [[disk]]
            name = "data"
            role = "data"
            size = "1G"
            [health]
            http = { port = 80, path = "/health" }
            limit = "90s"
            "#,
        )
        .unwrap();
        assert_eq!((recipe.hardware.memory, recipe.hardware.cpu), (ByteSize(256 << 20), Cpu::Host));
        assert_eq!(recipe.appliance().to_string(), "demo/notes");
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        let base = "publisher='a'\nname='b'\n";
        for bad in [
            "[[disk]]\nname='x'\nrole='system'\nfile='../x'\n",
            "[[disk]]\nname='x'\nrole='system'\nfile='/etc/shadow'\n",
            "[[disk]]\nname='x'\nrole='data'\n",
            "[[disk]]\nname='x'\nrole='other'\nsize='1G'\n",
            "typo = 1\n[[disk]]\nname='x'\nrole='data'\nsize='1G'\n",
        ] {
            assert!(Recipe::parse(&format!("{base}{bad}")).is_err(), "{bad}");
        }
    }
}

//! `collective import`: disk images and virtual machines from elsewhere become appliances.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::ValueEnum;
use collective_model::{ApplianceName, ByteSize, DiskRole, Firmware, VersionName};

use crate::ui::Ui;

/// Make an appliance of a disk image or of a virtual machine from elsewhere
///
/// FILE is a raw, qcow2, vmdk, vdi or vhdx image, an OVA, or an OVF with its disks beside it. Makes a folder with
/// appliance.toml and raw disks, which `collective publish` takes. CPUs, memory, disks and firmware come from the OVF
/// where there is one.
///
/// Example: collective import wiki.ova --name me/wiki --port 80
#[derive(Debug, clap::Args)]
pub struct Import {
    /// The image, OVA or OVF
    file: PathBuf,
    /// The appliance it becomes
    #[arg(long, value_name = "PUBLISHER/NAME")]
    name: ApplianceName,
    /// The version it becomes
    #[arg(long = "as", value_name = "VERSION", default_value = "1")]
    version: VersionName,
    /// The folder to make [default: ./NAME]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// What its disks are: the user's, which survive every version, or the system, which comes with the version
    #[arg(long, value_enum, default_value_t = Role::Data)]
    role: Role,
    /// Virtual CPUs
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,
    /// Memory, such as 512M
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// What starts the boot loader
    #[arg(long, value_enum)]
    firmware: Option<Starter>,
    /// A guest port that users may publish; may be repeated
    #[arg(long = "port", value_name = "GUESTPORT")]
    ports: Vec<u16>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Role {
    Data,
    System,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Starter {
    Bios,
    Uefi,
}

impl Import {
    pub fn run(self, ui: &Ui) -> Result<()> {
        if self.out.as_ref().is_some_and(|out| out.file_name().is_none()) {
            bail!("--out must name a folder to make, such as ./{}", self.name.name);
        }
        let order = collective_maker::Import {
            out: self.out.unwrap_or_else(|| PathBuf::from(self.name.name.as_str())),
            file: self.file,
            appliance: self.name,
            version: self.version,
            role: match self.role {
                Role::Data => DiskRole::Data,
                Role::System => DiskRole::System,
            },
            cpus: self.cpus,
            memory: self.memory,
            firmware: self.firmware.map(|firmware| match firmware {
                Starter::Bios => Firmware::Bios,
                Starter::Uefi => Firmware::Uefi,
            }),
            ports: self.ports,
        };
        let imported = collective_maker::import(&order, &mut |line| ui.hint(line))?;
        let recipe = &imported.recipe;
        let value = serde_json::json!({
            "appliance": recipe.appliance(), "version": recipe.version, "folder": imported.folder,
            "hardware": recipe.hardware, "disks": recipe.disks, "ports": recipe.ports,
        });
        ui.data(&value, |ui| {
            let (hardware, folder) = (&recipe.hardware, imported.folder.display());
            ui.line(format!("imported {} into {folder}", recipe.appliance()));
            let firmware = format!("{:?}", hardware.firmware).to_lowercase();
            ui.line(format!(
                "  {} cpus, {} MiB, {firmware}, {} disks",
                hardware.cpus,
                hardware.memory.0 >> 20,
                recipe.disks.len()
            ));
        });
        ui.hint(format!("next: collective publish {}", imported.folder.display()));
        Ok(())
    }
}

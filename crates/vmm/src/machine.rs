//! What a machine is made of, as the caller says it, and the check that keeps bad input off QEMU's command line.
//!
//! QEMU's options are comma-separated text: a comma or a line break in a name would become another option.
//! So every text is checked here, once, before an argument vector is built from it.

use std::path::{Path, PathBuf};

/// One machine to run. Names, MAC and UUID are checked by [`Vm::launch`](crate::Vm::launch).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Shown in the process list; 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// SMBIOS UUID of the machine, `8-4-4-4-12` hexadecimal digits. Guests derive identities from it.
    pub uuid: String,
    /// Virtual processors, 1 to 255.
    pub cpus: u32,
    /// Memory of the guest in MiB, at least 1.
    pub memory_mib: u64,
    /// What the machine starts from.
    pub firmware: Firmware,
    /// Disks, in the order in which the guest sees them.
    pub drives: Vec<Drive>,
    /// Network cards, in the order in which the guest sees them.
    pub nics: Vec<Nic>,
    /// The screen.
    pub display: Display,
}

/// The firmware of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Firmware {
    /// SeaBIOS, as it comes with QEMU.
    Bios,
    /// UEFI from two flash images.
    Uefi {
        /// The firmware's code, shared and read-only.
        code: PathBuf,
        /// The machine's own variables, written by the guest.
        vars: PathBuf,
    },
}

/// One virtio disk over a raw file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drive {
    /// Node name in QEMU and the disk's serial in the guest (`/dev/disk/by-id/virtio-NAME`). It starts with a
    /// letter and has at most 20 of `A-Z a-z 0-9 . _ -`: virtio-blk cuts serials at 20 bytes.
    pub name: String,
    /// The raw file; it may lie on FUSE.
    pub path: PathBuf,
    /// The guest can not write to it.
    pub read_only: bool,
    /// Place in the firmware's boot order; lower is earlier, `None` is never booted from by name.
    pub boot_index: Option<u32>,
}

/// One virtio network card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// `xx:xx:xx:xx:xx:xx`, unicast.
    pub mac: String,
    /// Where the guest may go.
    pub outbound: Outbound,
}

/// What a guest reaches through its network card. Ports forwarded to the guest work in both cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// The network behind the host, but not the host itself (see [`GuardPolicy`](crate::GuardPolicy)).
    Internet,
    /// Nothing.
    None,
}

/// The screen of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Display {
    /// No graphics card; the serial console is all there is.
    None,
    /// A standard VGA card, of which [`Vm::screendump`](crate::Vm::screendump) takes pictures.
    Vga,
}

/// Why a machine was refused before QEMU was started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the machine description can not be run: {field} is {value:?}, but must be {expected}; correct it and launch again"
)]
pub struct InvalidMachine {
    /// The part of the description.
    pub field: String,
    /// What it says.
    pub value: String,
    /// What it may say.
    pub expected: &'static str,
}

impl Machine {
    /// Checks everything that reaches QEMU's command line as text.
    pub(crate) fn validate(&self) -> Result<(), InvalidMachine> {
        let refuse =
            |field: &str, value: String, expected| Err(InvalidMachine { field: field.into(), value, expected });
        if !is_name(&self.name, 64) {
            return refuse("name", self.name.clone(), "1 to 64 letters, digits, '.', '_' or '-'");
        }
        if !is_uuid(&self.uuid) {
            return refuse("uuid", self.uuid.clone(), "hexadecimal digits in groups of 8-4-4-4-12");
        }
        if !(1..=255).contains(&self.cpus) {
            return refuse("cpus", self.cpus.to_string(), "1 to 255");
        }
        if !(1..=16 << 20).contains(&self.memory_mib) {
            return refuse("memory_mib", self.memory_mib.to_string(), "1 MiB to 16 TiB");
        }
        if let Firmware::Uefi { code, vars } = &self.firmware {
            check_path("firmware code", code)?;
            check_path("firmware vars", vars)?;
        }
        self.validate_drives()?;
        for (index, nic) in self.nics.iter().enumerate() {
            if !is_unicast_mac(&nic.mac) {
                return refuse(
                    &format!("nics[{index}].mac"),
                    nic.mac.clone(),
                    "a unicast address like 52:54:00:12:34:56",
                );
            }
        }
        Ok(())
    }

    fn validate_drives(&self) -> Result<(), InvalidMachine> {
        for (index, drive) in self.drives.iter().enumerate() {
            let field = format!("drives[{index}].name");
            let value = drive.name.clone();
            if !is_name(&drive.name, 20) || !drive.name.starts_with(|first: char| first.is_ascii_alphabetic()) {
                let expected = "a letter, then up to 19 letters, digits, '.', '_' or '-'";
                return Err(InvalidMachine { field, value, expected });
            }
            let is_repeated = self.drives[..index].iter().any(|other| other.name == drive.name);
            if is_repeated || drive.name.starts_with("firmware-") {
                let expected = "different from other drives' names and not begin with 'firmware-'";
                return Err(InvalidMachine { field, value, expected });
            }
            check_path(&format!("drives[{index}].path"), &drive.path)?;
        }
        Ok(())
    }
}

/// A path may hold anything but what can not be written in one QEMU option (commas are doubled later).
pub(crate) fn check_path(field: &str, path: &Path) -> Result<(), InvalidMachine> {
    let refuse = |expected| {
        Err(InvalidMachine { field: field.to_owned(), value: path.to_string_lossy().into_owned(), expected })
    };
    match path.to_str() {
        None => refuse("valid UTF-8"),
        Some(text) if text.chars().any(char::is_control) => refuse("free of control characters"),
        // A relative path would be searched by QEMU in our working directory, or taken for a protocol ("nbd:...").
        Some(text) if !text.starts_with('/') => refuse("an absolute path"),
        Some(_) => Ok(()),
    }
}

fn is_name(text: &str, limit: usize) -> bool {
    (1..=limit).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

fn is_uuid(text: &str) -> bool {
    let lengths = [8, 4, 4, 4, 12];
    let groups: Vec<&str> = text.split('-').collect();
    groups.len() == lengths.len()
        && groups
            .iter()
            .zip(lengths)
            .all(|(group, length)| group.len() == length && group.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn is_unicast_mac(text: &str) -> bool {
    let groups: Vec<&str> = text.split(':').collect();
    let well_formed = groups.len() == 6
        && groups.iter().all(|group| group.len() == 2 && group.bytes().all(|b| b.is_ascii_hexdigit()));
    // The lowest bit of the first byte marks a group address; a card can not have one.
    well_formed && u8::from_str_radix(groups[0], 16).is_ok_and(|first| first & 1 == 0) && text != "00:00:00:00:00:00"
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn example() -> Machine {
        Machine {
            name: "wiki-1".into(),
            uuid: "0f3c1b2a-1111-2222-3333-444455556666".into(),
            cpus: 2,
            memory_mib: 512,
            firmware: Firmware::Bios,
            drives: vec![
                Drive { name: "system".into(), path: "/v/a,b.raw".into(), read_only: false, boot_index: Some(0) },
                Drive { name: "seed".into(), path: "/v/seed.raw".into(), read_only: true, boot_index: None },
            ],
            nics: vec![Nic { mac: "52:54:00:12:34:56".into(), outbound: Outbound::Internet }],
            display: Display::None,
        }
    }

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Machine), field: &str) {
        let mut machine = example();
        change(&mut machine);
        assert_eq!(machine.validate().map_err(|error| error.field), Err(field.to_owned()));
    }

    #[test]
    fn a_good_machine_passes() {
        assert_eq!(example().validate(), Ok(()));
    }

    #[test]
    fn text_that_could_become_another_option_is_refused() {
        refused(|m| m.name = "a,debug-threads=on".into(), "name");
        refused(|m| m.name = String::new(), "name");
        refused(|m| m.uuid = "0f3c1b2a-1111-2222-3333-44445555666g".into(), "uuid");
        refused(|m| m.cpus = 0, "cpus");
        refused(|m| m.memory_mib = 0, "memory_mib");
        refused(|m| m.drives[0].name = "a=b".into(), "drives[0].name");
        refused(|m| m.drives[1].name = "system".into(), "drives[1].name");
        refused(|m| m.drives[1].name = "a23456789012345678901".into(), "drives[1].name");
        refused(|m| m.drives[0].path = "/a\nb".into(), "drives[0].path");
        refused(|m| m.drives[0].path = "nbd:host".into(), "drives[0].path");
        refused(|m| m.nics[0].mac = "53:54:00:12:34:56".into(), "nics[0].mac");
        refused(|m| m.nics[0].mac = "52:54:00:12:34".into(), "nics[0].mac");
        refused(|m| m.firmware = Firmware::Uefi { code: "/c".into(), vars: "v".into() }, "firmware vars");
    }
}

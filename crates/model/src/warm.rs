//! The machine of a version as it was when it was up, which hosts go on with in place of booting.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::run::Platform;
use crate::{Digest, Disk};

/// A file of a machine is at most this long, in bytes: a state without memory has some 100 KB, UEFI's variables 528 KiB.
const MAX_FILE_BYTES: u64 = 512 << 20;

/// A running machine that comes with a version: it was booted once by the maker until it was healthy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Warm {
    /// What it ran on: it goes on only where this is the same.
    pub platform: Platform,
    /// All settings that it was booted with. One with others has to be booted.
    pub settings: BTreeMap<String, String>,
    /// The instant that all of it is of.
    pub epoch: String,
    /// Its memory.
    pub memory: WarmImage,
    /// Its disks at that instant, in the version's order, each as long as the version says.
    pub disks: Vec<WarmImage>,
    /// Its devices.
    pub state: WarmFile,
    /// The variables of UEFI, if that is its firmware.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uefi_vars: Option<WarmFile>,
}

/// Memory, or a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmImage {
    /// The root page of its content.
    pub image: Digest,
    /// The page that says what of it is read first when the machine goes on; a hint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<Digest>,
}

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmFile {
    /// The root page of an image that begins with its content; what follows are zeros.
    pub image: Digest,
    /// In bytes.
    pub size: u64,
    /// The BLAKE3 of its content.
    pub digest: Digest,
}

impl Warm {
    /// The error says what contradicts the disks of the version or cannot be.
    pub(crate) fn check(&self, disks: &[Disk]) -> Result<(), String> {
        if self.disks.len() != disks.len() {
            return Err(format!("{} disks, and its running machine has {}", disks.len(), self.disks.len()));
        }
        let files = [Some(&self.state), self.uefi_vars.as_ref()];
        if let Some(file) = files.into_iter().flatten().find(|file| !(1..=MAX_FILE_BYTES).contains(&file.size)) {
            return Err(format!(
                "a file of its running machine has {} bytes; 1 to {MAX_FILE_BYTES} are possible",
                file.size
            ));
        }
        Ok(())
    }

    /// Whether a machine with these settings may go on with it at a host that has `here`; the error says why it is booted.
    pub fn goes_on(&self, here: Option<&Platform>, settings: &BTreeMap<String, String>) -> Result<(), String> {
        self.platform.goes_on_at(here)?;
        if *settings != self.settings {
            let differs = |(key, value): &(&String, &String)| self.settings.get(*key) != Some(value);
            let keys: Vec<_> = settings.iter().filter(differs).map(|(key, _)| key.as_str()).collect();
            return Err(format!("it was booted with other settings ({})", keys.join(", ")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on_only_as_it_was_booted() {
        let settings = BTreeMap::from([("title".to_owned(), "a".to_owned())]);
        let platform =
            Platform { qemu: "10".into(), accelerator: "tcg".into(), cpu: "max".into(), portable: Vec::new() };
        let image = WarmImage { image: Digest::of(b"x"), boot: None };
        let state = WarmFile { image: Digest::of(b"y"), size: 9, digest: Digest::of(b"z") };
        let warm = Warm {
            platform: platform.clone(),
            settings: settings.clone(),
            epoch: "e".into(),
            memory: image,
            disks: vec![image],
            state,
            uefi_vars: None,
        };
        assert_eq!(warm.goes_on(Some(&platform), &settings), Ok(()));
        assert!(warm.goes_on(None, &settings).is_err());
        let other = Platform { qemu: "11".into(), ..platform.clone() };
        assert!(warm.goes_on(Some(&other), &settings).unwrap_err().contains("QEMU 11"));
        let others = BTreeMap::from([("title".to_owned(), "b".to_owned())]);
        assert!(warm.goes_on(Some(&platform), &others).unwrap_err().contains("(title)"));
        assert!(warm.check(&[]).is_err());
    }
}

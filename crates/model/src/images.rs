//! Which images a version is made of.

use crate::{Digest, Disk, Manifest, WarmFile};

/// A file becomes an image of whole blocks.
const WHOLE: u64 = 4096;

/// An image that a version needs, with what it is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredImage {
    /// In words.
    pub what: String,
    /// The root page.
    pub image: Digest,
    /// The page that says what of it is read first.
    pub boot: Option<Digest>,
    /// It has at most so many bytes.
    pub most: u64,
}

impl Manifest {
    /// The images of its disks, as they are at a boot.
    pub fn disk_images(&self) -> impl Iterator<Item = StoredImage> {
        let of_disk = |disk: &Disk| {
            let what = format!("disk \"{}\"", disk.name);
            disk.image.map(|image| StoredImage { what, image, boot: disk.boot, most: disk.size.0 })
        };
        self.disks.iter().filter_map(of_disk)
    }

    /// All that the store has to have for it.
    pub fn images(&self) -> Vec<StoredImage> {
        let mut all: Vec<_> = self.disk_images().collect();
        let Some(warm) = &self.warm else { return all };
        for (disk, warm) in self.disks.iter().zip(&warm.disks) {
            let what = format!("disk \"{}\" of the running machine", disk.name);
            all.push(StoredImage { what, image: warm.image, boot: warm.boot, most: disk.size.0 });
        }
        let (image, boot) = (warm.memory.image, warm.memory.boot);
        all.push(StoredImage { what: "the memory".into(), image, boot, most: self.hardware.memory.0 });
        let of_file = |(what, file): (&str, &WarmFile)| {
            let most = file.size.next_multiple_of(WHOLE);
            StoredImage { what: what.into(), image: file.image, boot: None, most }
        };
        let vars = warm.uefi_vars.as_ref().map(|vars| ("the variables of UEFI", vars));
        all.extend([("the devices", &warm.state)].into_iter().chain(vars).map(of_file));
        all
    }
}

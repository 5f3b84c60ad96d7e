//! Recognises formats by their marks. One mark alone is believed: what is left of an older format can look whole, and
//! says nothing about the one that is there now.

use crate::read::{Part, Stop};
use crate::{ext4, swap};

/// Name, offset, magic; the offsets are those of each format's documentation and of util-linux' libblkid.
const SIGNATURES: [(&str, u64, &[u8]); 16] = [
    ("luks", 0, b"LUKS\xba\xbe"),
    ("lvm", 512, b"LABELONE"),
    ("mdraid", 0, b"\xfc\x4e\x2b\xa9"),
    ("mdraid", 4096, b"\xfc\x4e\x2b\xa9"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("vfat", 82, b"FAT32   "),
    ("vfat", 54, b"FAT16   "),
    ("vfat", 54, b"FAT12   "),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 32769, b"CD001"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("bcache", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
    ("bcachefs", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
];

/// The names of all formats whose marks are there; `ext4` stands for its elders too.
pub(crate) fn marks(part: &Part<'_>) -> Result<Vec<&'static str>, Stop> {
    let mut names = Vec::new();
    for (name, offset, magic) in SIGNATURES {
        if offset + (magic.len() as u64) <= part.len()
            && part.read(offset, magic.len(), "looking for a known format")? == magic
        {
            names.push(name);
        }
    }
    if ext4::has_magic(part)? {
        names.push("ext4");
    }
    if swap::find(part)?.is_some() {
        names.push("swap");
    }
    names.dedup();
    Ok(names)
}

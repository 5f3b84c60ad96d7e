//! Recognises what we do not look into, so that notes can name it and ext4's magic is not believed beside another.

use crate::read::{Part, Stop};

/// Name, offset, magic; the offsets are those of each format's documentation and of util-linux' libblkid.
const SIGNATURES: [(&str, u64, &[u8]); 14] = [
    ("luks", 0, b"LUKS\xba\xbe"),
    ("lvm", 512, b"LABELONE"),
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("vfat", 82, b"FAT32   "),
    ("vfat", 54, b"FAT16   "),
    ("vfat", 54, b"FAT12   "),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 32769, b"CD001"),
    ("f2fs", 1024, b"\x10\x20\xf5\xf2"),
    ("bcache", 4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca"),
];

/// The name of the first format whose mark is there.
pub(crate) fn recognise(part: &Part<'_>) -> Result<Option<&'static str>, Stop> {
    for (name, offset, magic) in SIGNATURES {
        if offset + (magic.len() as u64) <= part.len()
            && part.read(offset, magic.len(), "looking for a known format")? == magic
        {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

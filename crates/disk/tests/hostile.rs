//! Real images with random damage: never a panic, never a long time, never a range outside of the disk.

mod common;

use std::fs;
use std::sync::OnceLock;

use collective_disk::{BLOCK, ReadAt, Survey, unused};
use common::{make_image, make_tree, run};
use proptest::collection::vec;
use proptest::prelude::*;

/// Small images of several kinds; those without checksums let damage through to the parsers behind them.
fn images() -> &'static [Vec<u8>] {
    static IMAGES: OnceLock<Vec<Vec<u8>>> = OnceLock::new();
    IMAGES.get_or_init(|| {
        let kinds: [&[&str]; 4] = [
            &["-t", "ext4", "-b", "1024"],
            &["-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^uninit_bg"],
            &["-t", "ext3", "-b", "1024"],
            &["-t", "ext4", "-O", "^metadata_csum,^uninit_bg,meta_bg,^resize_inode", "-g", "256"],
        ];
        kinds
            .into_iter()
            .map(|options| {
                let temp = tempfile::tempdir().unwrap();
                fs::read(make_image(temp.path(), 8, options)).unwrap()
            })
            .collect()
    })
}

/// Small FATs of every width and swap space, with where the boot sector, tables and directories end.
fn others() -> &'static [(Vec<u8>, usize)] {
    static OTHERS: OnceLock<Vec<(Vec<u8>, usize)>> = OnceLock::new();
    OTHERS.get_or_init(|| {
        let kinds: [(usize, &[&str], usize); 4] = [
            (2 << 20, &["mkfs.vfat", "-F", "12", "-s", "4"], 32 << 10),
            (5 << 20, &["mkfs.vfat", "-F", "16", "-s", "1"], 128 << 10),
            (34 << 20, &["mkfs.vfat", "-F", "32", "-s", "1"], 600 << 10),
            (1 << 20, &["mkswap"], 4096),
        ];
        let make = |(size, make, front): (usize, &[&str], usize)| {
            let temp = tempfile::tempdir().unwrap();
            let image = temp.path().join("image");
            fs::write(&image, vec![0; size]).unwrap();
            let path = image.to_str().unwrap();
            run(make[0], &[&make[1..], &[path]].concat());
            if make[0] == "mkfs.vfat" {
                let tree = make_tree(temp.path());
                run("mcopy", &["-i", path, "-s", tree.to_str().unwrap(), "::"]);
            }
            (fs::read(&image).unwrap(), front)
        };
        kinds.into_iter().map(make).collect()
    })
}

fn check(survey: &Survey, disk: &[u8]) {
    assert!(survey.unused.iter().all(|range| range.start < range.end && range.end <= disk.size()));
    assert!(survey.unused.iter().all(|range| range.start % BLOCK == 0 && range.end % BLOCK == 0));
    assert!(survey.unused.windows(2).all(|pair| pair[0].end < pair[1].start));
}

/// Places that matter: superblock, descriptors, bitmaps, inodes and the journal's head are all in front.
fn places() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1024usize..2048, 3 => 2048usize..16384, 2 => 0usize..(300 << 10), 1 => 0usize..(8 << 20)]
}

fn values() -> impl Strategy<Value = u8> {
    prop_oneof![Just(0u8), Just(0xffu8), any::<u8>()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_file_systems(kind in 0usize..4, damage in vec((places(), values()), 1..6)) {
        let mut disk = images()[kind].clone();
        for (place, value) in damage {
            disk[place] = value;
        }
        check(&unused(&disk).unwrap(), &disk);
    }

    #[test]
    fn damaged_words_of_the_superblock(kind in 1usize..4, word in 0usize..256, value in any::<u32>(), shift in 0u32..32) {
        let mut disk = images()[kind].clone();
        disk[1024 + 4 * word..1028 + 4 * word].copy_from_slice(&(value >> shift).to_le_bytes());
        check(&unused(&disk).unwrap(), &disk);
    }

    #[test]
    fn damaged_journal_inodes(kind in 1usize..4, damage in vec((0usize..128, values()), 1..8)) {
        let mut disk = images()[kind].clone();
        // The inode's own signature: a regular file without a name, whose map begins at a fixed place.
        let table = 8 << 10;
        let found = (table..300 << 10).step_by(128).find(|at| disk[*at..at + 2] == [0x80, 0x81] && disk[at + 0x1a] == 1);
        if let Some(at) = found {
            for (place, value) in damage {
                disk[at + place] = value;
            }
        }
        check(&unused(&disk).unwrap(), &disk);
    }

    #[test]
    fn random_tables(entries in vec((0usize..512, values()), 0..40), rest in vec((512usize..8192, values()), 0..40)) {
        let mut disk = vec![0; 64 << 10];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        disk[512..520].copy_from_slice(b"EFI PART");
        for (place, value) in entries.into_iter().chain(rest) {
            disk[place] = value;
        }
        check(&unused(&disk).unwrap(), &disk);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_fats_and_swap_spaces(kind in 0usize..4, damage in vec((any::<usize>(), 0u8..3, values()), 1..6)) {
        let (image, front) = &others()[kind];
        let mut disk = image.clone();
        for (place, region, value) in damage {
            disk[place % [512, 4096, *front][usize::from(region)]] = value;
        }
        check(&unused(&disk).unwrap(), &disk);
    }

    #[test]
    fn damaged_fields_of_boot_sectors_and_headers(kind in 0usize..4, place in 0usize..96, value in any::<u32>(), shift in 0u32..32) {
        let (image, _) = &others()[kind];
        let mut disk = image.clone();
        let place = if kind == 3 { 1024 + place } else { place };
        disk[place..place + 4].copy_from_slice(&(value >> shift).to_le_bytes());
        check(&unused(&disk).unwrap(), &disk);
    }

    #[test]
    fn truncated_fats_and_swap_spaces(kind in 0usize..4, length in any::<usize>(), is_short in any::<bool>()) {
        let (image, front) = &others()[kind];
        let disk = &image[..length % if is_short { *front } else { image.len() }];
        check(&unused(&disk).unwrap(), disk);
        // All of them reach to the end of what they are on, so none of them is whole.
        prop_assert!(unused(&disk).unwrap().unused.is_empty() || image.len() - disk.len() < 4096);
    }

    #[test]
    fn random_bytes_behind_a_mark(mark in 0usize..4, start in vec(any::<u8>(), 512..8192), size in 0usize..65536) {
        let mut disk = start;
        disk.resize(disk.len() + size, 0xff);
        let (at, text): (usize, &[u8]) = [(82, &b"FAT32   "[..]), (54, b"FAT16   "), (54, b"FAT12   "), (4086, b"SWAPSPACE2")][mark];
        if disk.len() >= 4096 {
            disk[at..at + text.len()].copy_from_slice(text);
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        }
        check(&unused(&disk).unwrap(), &disk);
    }
}

/// CRC-32C as XFS stores it, over bytes in which the checksum itself is zero.
fn sign(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    let sum = bytes.iter().fold(!0u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step));
    bytes[at..at + 4].copy_from_slice(&(!sum).to_le_bytes());
}

/// The front of a small XFS up to its log's first block, and where its log is; the log is all behind it.
fn xfs() -> &'static (Vec<u8>, usize) {
    static XFS: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    XFS.get_or_init(|| {
        let temp = tempfile::tempdir().unwrap();
        let image = temp.path().join("image");
        fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let options = ["--unsupported", "-q", "-f", "-K", "-d", "agcount=1", "-l", "size=6m"];
        run("mkfs.xfs", &[&options[..], &[image.to_str().unwrap()]].concat());
        let image = fs::read(image).unwrap();
        let log = (4096..image.len()).step_by(4096).find(|at| image[*at..at + 4] == [0xfe, 0xed, 0xba, 0xbe]).unwrap();
        (image, log)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// With checksums made right again, damage reaches what is behind them.
    #[test]
    fn damaged_xfs(damage in vec((0usize..4, 0usize..512, values()), 1..5), word in any::<u32>(), shift in 0u32..32, field in 0usize..64) {
        let (image, log) = xfs();
        let mut disk = image.clone();
        let starts = [0, 512, 4096, *log];
        for (place, at, value) in &damage {
            disk[starts[*place] + at] = *value;
        }
        let at = starts[damage[0].0] + 4 * field;
        disk[at..at + 4].copy_from_slice(&(word >> shift).to_be_bytes());
        sign(&mut disk[..512], 224);
        sign(&mut disk[512..1024], 216);
        sign(&mut disk[4096..8192], 52);
        check(&unused(&disk).unwrap(), &disk);
    }
}

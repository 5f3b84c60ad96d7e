//! Partition tables made by sfdisk, with file systems in the partitions; and disks that can not be read.

mod common;

use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use collective_disk::{BLOCK, ReadAt, unused};
use common::make_image;

const MIB: u64 = 1 << 20;

fn partitioned(directory: &Path, mebibytes: u64, script: &str) -> PathBuf {
    let disk = directory.join("disk");
    fs::File::create(&disk).unwrap().set_len(mebibytes * MIB).unwrap();
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut child =
        Command::new("sfdisk").arg("-q").arg(&disk).env("PATH", path).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    disk
}

fn put(disk: &Path, offset: u64, content: &[u8]) {
    use std::os::unix::fs::FileExt;
    fs::File::options().write(true).open(disk).unwrap().write_all_at(content, offset).unwrap();
}

fn file_system(directory: &Path, options: &[&str]) -> Vec<u8> {
    fs::read(make_image(directory, 16, options)).unwrap()
}

fn shifted(ranges: &[Range<u64>], by: u64) -> Vec<Range<u64>> {
    ranges.iter().map(|range| range.start + by..range.end + by).collect()
}

#[test]
fn partitions_of_a_gpt() {
    let temp = tempfile::tempdir().unwrap();
    let system = file_system(temp.path(), &["-t", "ext4"]);
    let alone = unused(&system).unwrap().unused;
    let script = "label: gpt\nstart=2048, size=32768, name=root\nstart=40960, size=2048, name=other\n";
    let disk = partitioned(temp.path(), 32, script);
    put(&disk, MIB, &system);
    let survey = unused(&fs::File::open(&disk).unwrap()).unwrap();
    let what: Vec<_> = survey.found.iter().map(|found| (found.what, found.partition, found.label.as_deref())).collect();
    assert_eq!(what, [("gpt", None, None), ("ext4", Some(1), Some("label")), ("unknown", Some(2), Some("other"))]);
    assert_eq!(survey.unused, shifted(&alone, MIB));
    assert!(
        survey.notes.iter().any(|note| note.contains("partition 2") && note.contains("no known file system")),
        "{survey:?}"
    );

    let mut damaged = fs::read(&disk).unwrap();
    damaged[1024 + 40] ^= 1;
    let survey = unused(&damaged).unwrap();
    assert!(survey.unused.is_empty() && survey.notes[0].contains("checksum of its GPT's entries"), "{survey:?}");
    damaged[512 + 40] ^= 1;
    assert!(unused(&damaged).unwrap().notes[0].contains("checksum of its GPT header"));
}

#[test]
fn partitions_of_an_mbr_and_logical_ones() {
    let temp = tempfile::tempdir().unwrap();
    let system = file_system(temp.path(), &["-t", "ext3", "-b", "1024"]);
    // The old way of starting at sector 63 lies across 4 KiB blocks.
    let script = "label: dos\nunit: sectors\nstart=63, size=32768, type=83\nstart=34816, size=90112, type=5\n\
                  start=36864, size=32768, type=83\nstart=71680, size=2048, type=82\n";
    let disk = partitioned(temp.path(), 64, script);
    put(&disk, 63 * 512, &system);
    put(&disk, 36864 * 512, &system);
    put(&disk, 71680 * 512 + 4086, b"SWAPSPACE2");
    let survey = unused(&fs::File::open(&disk).unwrap()).unwrap();
    let what: Vec<_> = survey.found.iter().map(|found| (found.what, found.partition)).collect();
    assert_eq!(what, [("mbr", None), ("ext3", Some(1)), ("ext3", Some(5)), ("swap", Some(6))]);
    let alone = unused(&system).unwrap().unused;
    let in_second: Vec<_> = survey.unused.iter().filter(|range| range.start >= 36864 * 512).cloned().collect();
    assert_eq!(in_second, shifted(&alone, 36864 * 512));
    let in_first = survey.unused.iter().filter(|range| range.end <= 34816 * 512);
    let (first_total, alone_total): (u64, u64) =
        (in_first.map(|range| range.end - range.start).sum(), alone.iter().map(|range| range.end - range.start).sum());
    assert!(first_total > alone_total * 9 / 10 && survey.unused.iter().all(|range| range.start % BLOCK == 0));
}

#[test]
fn what_partitions_share_is_used() {
    let temp = tempfile::tempdir().unwrap();
    let system = file_system(temp.path(), &["-t", "ext4"]);
    let disk =
        partitioned(temp.path(), 32, "label: dos\nstart=2048, size=32768, type=83\nstart=40960, size=2048, type=83\n");
    put(&disk, MIB, &system);
    // The second entry is moved into the first.
    put(&disk, 446 + 16 + 8, &20480u32.to_le_bytes());
    let survey = unused(&fs::File::open(&disk).unwrap()).unwrap();
    let shared = 20480 * 512..22528 * 512;
    assert!(!survey.unused.is_empty());
    assert!(survey.unused.iter().all(|range| range.end <= shared.start || shared.end <= range.start));
    assert!(survey.notes.iter().any(|note| note.contains("overlap")));
}

#[test]
fn odd_disks_are_left_alone() {
    for disk in [Vec::new(), vec![0; 100], vec![0; 512], vec![0; 1 << 20], vec![0xff; 1 << 20]] {
        let survey = unused(&disk).unwrap();
        assert!(survey.unused.is_empty() && survey.notes.len() == 1, "{survey:?}");
    }
    // A logical partition whose record names itself as the next one.
    let mut disk = vec![0; 1 << 20];
    for (at, kind, start) in [(446, 5u8, 100u32), (100 * 512 + 446, 0x83, 1), (100 * 512 + 462, 5, 0)] {
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&100u32.to_le_bytes());
    }
    for sector in [0, 100] {
        disk[sector * 512 + 510..sector * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
    }
    let survey = unused(&disk).unwrap();
    assert!(survey.notes[0].contains("more than 256 links"), "{survey:?}");
}

/// A disk with a hole that can not be read.
struct Broken(Vec<u8>, Range<u64>);

impl ReadAt for Broken {
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset < self.1.end && self.1.start < offset + buf.len() as u64 {
            return Err(io::Error::other("bad sector"));
        }
        self.0.read_exact_at(offset, buf)
    }

    fn size(&self) -> u64 {
        self.0.size()
    }
}

#[test]
fn a_disk_that_can_not_be_read_is_an_error() {
    let temp = tempfile::tempdir().unwrap();
    let broken = Broken(file_system(temp.path(), &["-t", "ext4", "-b", "4096"]), 4200..4201);
    let error = unused(&broken).unwrap_err();
    assert_eq!(error.offset, 4096);
    assert!(
        error.to_string().contains("reading group descriptors") && error.to_string().contains("bad sector"),
        "{error}"
    );
}

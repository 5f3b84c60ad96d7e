//! The proof that leaving out what is called unused changes no file: real file systems are made, filled and worn by the
//! real kernel, what is unused is overwritten, and everything a program can see of each file is compared.
//!
//! Mounting needs root and loop devices; without them the tests say so and prove nothing.

// Lists of ranges, and some have one element.
#![allow(clippy::single_range_in_vec_init)]

#[path = "../common/mod.rs"]
mod common;
mod compare;
mod fat;
mod fill;

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use collective_disk::{Survey, unused};
use common::mount::{Mount, can_mount, turn};
use common::{OLD_BYTE, run};
use compare::differences;
use fill::Random;

/// A system that the kernel can mount, and the program that checks it without changing it.
struct Kind {
    make: &'static [&'static str],
    check: &'static [&'static str],
    mebibytes: usize,
}

const CHECK_EXT: &[&str] = &["e2fsck", "-fn"];

fn ext(make: &'static [&'static str]) -> Kind {
    Kind { make, check: CHECK_EXT, mebibytes: 64 }
}

/// A file full of old bytes with a new file system.
fn make(directory: &Path, kind: &Kind) -> PathBuf {
    let image = directory.join("original");
    fs::write(&image, vec![OLD_BYTE; kind.mebibytes << 20]).unwrap();
    run(kind.make[0], &[&kind.make[1..], &[image.to_str().unwrap()]].concat());
    image
}

fn survey(image: &Path) -> Survey {
    unused(&fs::File::open(image).unwrap()).unwrap()
}

fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// What the unused bytes of a copy are overwritten with.
#[derive(Clone, Copy, Debug)]
enum Filling {
    /// As published images have them.
    Zeros,
    /// What is in no file system: it shows that nobody looks there, and not only that zeros do no harm.
    Garbage,
}

fn overwrite(image: &Path, to: &Path, ranges: &[Range<u64>], filling: Filling) {
    let mut bytes = fs::read(image).unwrap();
    let mut random = Random(7);
    for range in ranges {
        let part = &mut bytes[range.start as usize..range.end as usize];
        match filling {
            Filling::Zeros => part.fill(0),
            Filling::Garbage => {
                part.chunks_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()[..word.len()]))
            }
        }
    }
    fs::write(to, bytes).unwrap();
}

fn check_file_system(kind: &Kind, image: &Path) {
    run(kind.check[0], &[&kind.check[1..], &[image.to_str().unwrap()]].concat());
}

/// All that can be seen of both, mounted read-only. Returns how many files were compared.
fn assert_same(directory: &Path, original: &Path, result: &Path) -> usize {
    let (first, second) = (Mount::read_only(directory, original), Mount::read_only(directory, result));
    let (count, found) = differences(first.path(), second.path());
    assert!(found.is_empty(), "{} differences, as {:?}", found.len(), &found[..found.len().min(5)]);
    count
}

/// Overwrites what is unused in copies of an unmounted image, and compares. Returns the unused bytes.
fn prove(directory: &Path, kind: &Kind, image: &Path) -> u64 {
    check_file_system(kind, image);
    let survey = survey(image);
    assert!(!survey.unused.is_empty(), "{:?}", survey.notes);
    let result = directory.join("result");
    for filling in [Filling::Zeros, Filling::Garbage] {
        overwrite(image, &result, &survey.unused, filling);
        check_file_system(kind, &result);
        let count = assert_same(directory, image, &result);
        assert!(count > 100, "only {count} files were compared");
        // Written to, the result goes on as a sound file system.
        let mounted = Mount::writable(directory, &result);
        fill::wear(mounted.path(), &mut Random(11), 100);
        drop(mounted);
        check_file_system(kind, &result);
    }
    total(&survey.unused)
}

fn prove_kind(kind: &Kind) {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    if !can_mount(temp.path()) {
        return;
    }
    let image = make(temp.path(), kind);
    let mounted = Mount::writable(temp.path(), &image);
    fill::every_kind(mounted.path());
    drop(mounted);
    let mut unused = vec![prove(temp.path(), kind, &image)];
    // A large one takes long.
    for round in 0..if kind.mebibytes > 100 { 1 } else { 3 } {
        let mounted = Mount::writable(temp.path(), &image);
        fill::wear(mounted.path(), &mut Random(round), 400);
        drop(mounted);
        unused.push(prove(temp.path(), kind, &image));
    }
    println!(
        "{:?}: unused KiB in each round: {:?}",
        kind.make,
        unused.iter().map(|bytes| bytes >> 10).collect::<Vec<_>>()
    );
}

#[test]
fn ext4() {
    prove_kind(&ext(&["mkfs.ext4", "-q", "-E", "nodiscard", "-b", "4096"]));
    prove_kind(&ext(&["mkfs.ext4", "-q", "-E", "nodiscard", "-b", "1024", "-O", "inline_data,ea_inode", "-I", "256"]));
}

#[test]
fn ext2_and_ext3() {
    prove_kind(&ext(&["mkfs.ext2", "-q", "-E", "nodiscard", "-I", "256"]));
    prove_kind(&ext(&["mkfs.ext3", "-q", "-E", "nodiscard", "-I", "256", "-b", "2048"]));
}

const fn xfs(make: &'static [&'static str], mebibytes: usize) -> Kind {
    Kind { make, check: &["xfs_repair", "-n"], mebibytes }
}

#[test]
fn xfs_as_it_is_made_today() {
    prove_kind(&xfs(&["mkfs.xfs", "-q", "-f", "-K", "-L", "label"], 320));
}

/// Small ones, which mkfs.xfs makes for tests only, wear sooner: their logs go round, and their B-trees are deep.
#[test]
fn xfs_of_other_geometries() {
    for options in [
        &["mkfs.xfs", "--unsupported", "-q", "-f", "-K", "-b", "size=1024", "-d", "agcount=5", "-m", "rmapbt=1"][..],
        &["mkfs.xfs", "--unsupported", "-q", "-f", "-K", "-s", "size=4096", "-l", "su=32k"],
        &["mkfs.xfs", "--unsupported", "-q", "-f", "-K", "-m", "reflink=0,bigtime=0,finobt=0", "-i", "size=1024"],
    ] {
        prove_kind(&xfs(options, 96));
    }
}

/// The comparison itself must see it when a block with content is lost.
#[test]
fn a_lost_block_is_seen() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    if !can_mount(temp.path()) {
        return;
    }
    let image = make(temp.path(), &ext(&["mkfs.ext4", "-q", "-E", "nodiscard", "-b", "4096"]));
    let mounted = Mount::writable(temp.path(), &image);
    fill::every_kind(mounted.path());
    let mark = [0xc3; 4096];
    fs::write(mounted.path().join("marked"), mark).unwrap();
    drop(mounted);
    let bytes = fs::read(&image).unwrap();
    let at = bytes.chunks(4096).position(|block| block == mark).unwrap() as u64 * 4096;
    let survey = survey(&image);
    assert!(survey.unused.iter().all(|range| range.end <= at || at + 4096 <= range.start));
    let result = temp.path().join("result");
    overwrite(&image, &result, &[at..at + 4096], Filling::Zeros);
    let (first, second) = (Mount::read_only(temp.path(), &image), Mount::read_only(temp.path(), &result));
    let (_, found) = differences(first.path(), second.path());
    assert_eq!(found, ["marked: content"]);
}

/// Partitions as installers make them: for the firmware, the system, and swap.
#[test]
fn whole_disks() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    if !can_mount(temp.path()) {
        return;
    }
    let tables = [
        "label: gpt\nstart=2048, size=81920, type=uefi\nstart=83968, size=131072, type=linux\nstart=215040, size=16384, type=swap\n",
        "label: dos\nstart=2048, size=81920, type=ef\nstart=83968, size=131072, type=83\nstart=215040, size=16384, type=82\n",
    ];
    for table in tables {
        prove_disk(temp.path(), table);
    }
}

/// Where the partitions of [`whole_disks`] are, in bytes.
const PARTITIONS: [Range<u64>; 3] = [2048 * 512..83968 * 512, 83968 * 512..215040 * 512, 215040 * 512..231424 * 512];

fn prove_disk(directory: &Path, table: &str) {
    let kind = ext(&["mkfs.ext4", "-q", "-E", "nodiscard"]);
    let system = make(directory, &kind);
    let mounted = Mount::writable(directory, &system);
    fill::every_kind(mounted.path());
    fill::wear(mounted.path(), &mut Random(1), 200);
    drop(mounted);
    let esp = fat::make(directory, 40, &["-F", "32", "-s", "1"]);
    fat::wear(&esp, &mut Random(1), 200);
    let swap = directory.join("swap");
    fs::write(&swap, vec![OLD_BYTE; 8 << 20]).unwrap();
    run("mkswap", &["-L", "swap", swap.to_str().unwrap()]);

    let disk = directory.join("disk");
    let mut bytes = vec![OLD_BYTE; 128 << 20];
    for (range, part) in PARTITIONS.iter().zip([&esp, &system, &swap]) {
        bytes[range.start as usize..range.end as usize].copy_from_slice(&fs::read(part).unwrap());
    }
    fs::write(&disk, bytes).unwrap();
    common::run_with("sfdisk", &["-q", "--wipe", "never", "--wipe-partitions", "never", disk.to_str().unwrap()], table);

    let survey = survey(&disk);
    let what: Vec<_> = survey.found.iter().skip(1).map(|found| found.what).collect();
    assert_eq!(what, ["vfat", "ext4", "swap"], "{:?}", survey.notes);
    for filling in [Filling::Zeros, Filling::Garbage] {
        let result = directory.join("disk-result");
        overwrite(&disk, &result, &survey.unused, filling);
        compare_disks(directory, &kind, &disk, &result);
    }
}

fn compare_disks(directory: &Path, kind: &Kind, disk: &Path, result: &Path) {
    let (before, after) = (fs::read(disk).unwrap(), fs::read(result).unwrap());
    // All between and around the partitions, the tables among it.
    let mut end = 0;
    for range in PARTITIONS.iter().cloned().chain([before.len() as u64..before.len() as u64]) {
        assert!(before[end..range.start as usize] == after[end..range.start as usize], "before {range:?}");
        end = range.end as usize;
    }
    run("sfdisk", &["--verify", result.to_str().unwrap()]);
    let part = |bytes: &[u8], index: usize, name: &str| {
        let path = directory.join(name);
        fs::write(&path, &bytes[PARTITIONS[index].start as usize..PARTITIONS[index].end as usize]).unwrap();
        path
    };
    fat::assert_same(directory, &part(&before, 0, "first"), &part(&after, 0, "second"));
    let (first, second) = (part(&before, 1, "first"), part(&after, 1, "second"));
    check_file_system(kind, &second);
    assert_same(directory, &first, &second);
    let (first, second) = (part(&before, 2, "first"), part(&after, 2, "second"));
    assert_eq!(fs::read(&first).unwrap()[..4096], fs::read(&second).unwrap()[..4096]);
    let tags = |image: &Path| {
        run("blkid", &["-p", "-o", "export", image.to_str().unwrap()])
            .lines()
            .skip(1)
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(tags(&first), tags(&second));
}

#[test]
fn fat_of_every_width() {
    let kinds: [(usize, &[&str]); 6] = [
        (4, &["-F", "12"]),
        (32, &["-F", "16"]),
        (64, &["-F", "16", "-s", "8", "-f", "1"]),
        (40, &["-F", "32", "-s", "1"]),
        (300, &["-F", "32", "-S", "4096", "-s", "1"]),
        (64, &["-F", "12", "-s", "64", "-S", "1024"]),
    ];
    let _turn = turn();
    for (mebibytes, options) in kinds {
        let temp = tempfile::tempdir().unwrap();
        let image = fat::make(temp.path(), mebibytes, options);
        for round in 0..3 {
            fat::wear(&image, &mut Random(round), 150);
            let survey = survey(&image);
            assert!(!survey.unused.is_empty(), "{options:?}: {:?}", survey.notes);
            for filling in [Filling::Zeros, Filling::Garbage] {
                let result = temp.path().join("result");
                overwrite(&image, &result, &survey.unused, filling);
                let count = fat::assert_same(temp.path(), &image, &result);
                assert!(count > 10, "only {count} files were compared");
            }
        }
    }
}

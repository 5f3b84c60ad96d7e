//! XFS, made by xfsprogs and used by the kernel: what is called unused is what xfs_db calls free.

mod common;

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};

use collective_disk::{BLOCK, Survey, unused};
use common::mount::{Mount, can_mount, turn};
use common::{OLD_BYTE, run};

fn make(directory: &Path, options: &[&str]) -> PathBuf {
    let image = directory.join("image");
    fs::write(&image, vec![OLD_BYTE; 96 << 20]).unwrap();
    let path = image.to_str().unwrap();
    run("mkfs.xfs", &[&["--unsupported", "-q", "-f", "-K", "-L", "label"], options, &[path]].concat());
    image
}

fn survey(image: &Path) -> Survey {
    unused(&File::open(image).unwrap()).unwrap()
}

/// Whole blocks of images in the extents that xfs_db lists: group, place in the group, length.
fn free_by_xfs_db(image: &Path) -> Vec<Range<u64>> {
    let image = image.to_str().unwrap();
    let fields = run("xfs_db", &["-r", "-c", "sb 0", "-c", "p blocksize agblocks", image]);
    let field = |name: &str| -> u64 {
        fields.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim_start_matches(" = ").parse().unwrap()
    };
    let (size, per_group) = (field("blocksize"), field("agblocks"));
    let list = run("xfs_db", &["-r", "-c", "freesp -d", image]);
    let numbers =
        |line: &str| line.split_ascii_whitespace().map(|word| word.parse().ok()).collect::<Option<Vec<u64>>>();
    let rows = list.lines().map_while(|line| if line.contains("from") { None } else { Some(line) });
    let mut extents: Vec<Range<u64>> = rows
        .filter_map(numbers)
        .filter(|row| row.len() == 3)
        .map(|row| (row[0] * per_group + row[1]) * size..(row[0] * per_group + row[1] + row[2]) * size)
        .collect();
    extents.sort_by_key(|extent| extent.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        match joined.last_mut() {
            Some(last) if last.end == extent.start => last.end = extent.end,
            _ => joined.push(extent),
        }
    }
    let whole = joined.into_iter().map(|extent| extent.start.div_ceil(BLOCK) * BLOCK..extent.end / BLOCK * BLOCK);
    whole.filter(|extent| extent.start < extent.end).collect()
}

/// The blocks that are set aside for B-trees are free to xfs_db, and used to us: some are called used, none unused.
#[track_caller]
fn check(image: &Path) {
    let (survey, free) = (survey(image), free_by_xfs_db(image));
    assert_eq!((survey.found[0].what, survey.found[0].label.as_deref()), ("xfs", Some("label")));
    assert_eq!(survey.notes, [""; 0]);
    let is_free = |range: &Range<u64>| free.iter().any(|free| free.start <= range.start && range.end <= free.end);
    assert!(survey.unused.iter().all(is_free));
    let total = |ranges: &[Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
    let missing = total(&free) - total(&survey.unused);
    assert!(missing <= 200 << 10, "{missing} bytes are free and not reported");
}

#[test]
fn new_ones() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    let all: [&[&str]; 6] = [
        &[],
        &["-b", "size=1024"],
        &["-b", "size=4096", "-s", "size=4096"],
        &["-b", "size=16384", "-s", "size=4096"],
        &["-m", "rmapbt=1"],
        &["-d", "agcount=1"],
    ];
    all.into_iter().for_each(|options| check(&make(temp.path(), options)));
}

/// Free space in thousands of pieces makes B-trees with more than one level.
#[test]
fn deep_trees_and_logs_that_went_round() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    if !can_mount(temp.path()) {
        return;
    }
    let image = make(temp.path(), &["-b", "size=1024", "-d", "agcount=2"]);
    let mounted = Mount::writable(temp.path(), &image);
    let name = |index: usize| mounted.path().join(format!("f{index}"));
    (0..16_000).for_each(|index| fs::write(name(index), vec![1; 2000]).unwrap());
    (0..16_000).step_by(2).for_each(|index| fs::remove_file(name(index)).unwrap());
    drop(mounted);
    let level = run("xfs_db", &["-r", "-c", "agf 0", "-c", "p bnolevel", image.to_str().unwrap()]);
    assert!(!level.contains("= 1\n"), "{level}");
    let head = run("xfs_logprint", &["-t", image.to_str().unwrap()]);
    assert!(head.contains("<CLEAN>"), "{head}");
    check(&image);
    let mut rounds = 0;
    // Each turn writes some 3 MiB of log; all turns more than the log has.
    for turn in 0..8 {
        let mounted = Mount::writable(temp.path(), &image);
        for index in 0..4000 {
            let name = mounted.path().join(format!("turn{index}"));
            if turn % 2 == 0 { fs::write(name, vec![2; 1500]).unwrap() } else { fs::remove_file(name).unwrap() }
        }
        drop(mounted);
        check(&image);
        rounds = rounds.max(round_of_log(&image));
    }
    assert!(rounds > 1, "the log did not go round");
}

/// The newest round in the log's first block.
fn round_of_log(image: &Path) -> u32 {
    let fields = run("xfs_logprint", &["-t", image.to_str().unwrap()]);
    let at = fields.split("daddr: ").nth(1).unwrap().split(' ').next().unwrap().parse::<usize>().unwrap() * 512;
    let bytes = fs::read(image).unwrap();
    let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
    if word(at) == 0xfeed_babe { word(at + 4) } else { word(at) }
}

#[track_caller]
fn assert_nothing(survey: &Survey, reason: &str) {
    assert!(survey.unused.is_empty(), "{reason}");
    assert!(survey.notes.len() == 1 && survey.notes[0].contains(reason), "{reason}: {:?}", survey.notes);
}

/// As after a power cut, and as while it is frozen for a snapshot.
#[test]
fn one_that_is_in_use_is_left_alone() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    if !can_mount(temp.path()) {
        return;
    }
    let image = make(temp.path(), &[]);
    let mounted = Mount::writable(temp.path(), &image);
    let copy = temp.path().join("copy");
    for index in 0..20 {
        fs::write(mounted.path().join(format!("file{index}")), vec![3; 50_000]).unwrap();
        run("sync", &["-f", mounted.path().to_str().unwrap()]);
        fs::copy(&image, &copy).unwrap();
        assert_nothing(&survey(&copy), "log");
    }
    run("fsfreeze", &["-f", mounted.path().to_str().unwrap()]);
    let copied = fs::copy(&image, &copy);
    run("fsfreeze", &["-u", mounted.path().to_str().unwrap()]);
    copied.unwrap();
    assert_nothing(&survey(&copy), "log");
    drop(mounted);
    check(&image);
}

#[test]
fn damage_is_found_by_checksums() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    let image = fs::read(make(temp.path(), &["-d", "agcount=4"])).unwrap();
    let with = |at: usize| {
        let mut damaged = image.clone();
        damaged[at] ^= 0x10;
        unused(&damaged).unwrap()
    };
    let group = 96 << 18;
    assert_nothing(&with(40), "checksum of its superblock");
    assert_nothing(&with(512 + 52), "checksum of the header of group 0");
    assert_nothing(&with(3 * group + 512 + 300), "checksum of the header of group 3");
    let tree = group + 4096;
    assert_eq!(image[tree..tree + 4], *b"AB3B");
    assert_nothing(&with(tree + 60), "checksum of a B-tree of free space in group 1");
    assert_nothing(&unused(&&image[..50 << 20]).unwrap(), "cut off");
}

#[test]
fn older_ones_and_parts_elsewhere_are_left_alone() {
    let _turn = turn();
    let temp = tempfile::tempdir().unwrap();
    assert_nothing(
        &survey(&make(temp.path(), &["-m", "crc=0,finobt=0,reflink=0,rmapbt=0,bigtime=0,inobtcount=0"])),
        "version 4",
    );
    let log = temp.path().join("log");
    fs::write(&log, vec![0; 16 << 20]).unwrap();
    let elsewhere = format!("logdev={},size=10m", log.display());
    assert_nothing(&survey(&make(temp.path(), &["-l", &elsewhere])), "on another disk");
}

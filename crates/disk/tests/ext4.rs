//! Real ext2, ext3 and ext4 file systems: what is called unused can be zeroed without harm, and is all that can be.

mod common;

use std::fs;
use std::ops::Range;
use std::path::Path;

use collective_disk::{BLOCK, Survey, unused};
use common::{OLD_BYTE, make_image, run};

/// Smallest block of ext4, in which tests count.
const UNIT: usize = 1024;

fn survey(image: &Path) -> Survey {
    unused(&fs::File::open(image).unwrap()).unwrap()
}

fn zero(image: &Path, ranges: &[Range<u64>]) {
    let mut bytes = fs::read(image).unwrap();
    for range in ranges {
        bytes[range.start as usize..range.end as usize].fill(0);
    }
    fs::write(image, bytes).unwrap();
}

/// Marks ranges of blocks in a map of the image.
fn mark(map: &mut [bool], blocks: impl Iterator<Item = Range<usize>>, block_size: usize) {
    let scale = block_size / UNIT;
    for run in blocks {
        map[run.start * scale..run.end * scale].fill(true);
    }
}

/// Reads `1-5, 8, 10-12`.
fn parse_runs(text: &str) -> impl Iterator<Item = Range<usize>> {
    text.split(',').filter(|run| !run.trim().is_empty()).map(|run| {
        let (first, last) = run.trim().split_once('-').unwrap_or((run.trim(), run.trim()));
        first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
    })
}

/// What dumpe2fs calls free, outside of groups without a bitmap; and the blocks of the journal.
fn expected(image: &Path, units: usize) -> (Vec<bool>, Vec<bool>) {
    let image = image.to_str().unwrap();
    let text = run("dumpe2fs", &[image]);
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).unwrap_or("0");
    let block_size: usize = field("Block size:").parse().unwrap();
    let mut free = vec![false; units];
    for group in text.split("\nGroup ").filter(|group| group.contains("(Blocks ")) {
        if !group.contains("BLOCK_UNINIT") {
            let list = group.lines().find_map(|line| line.strip_prefix("  Free blocks: ")).unwrap();
            mark(&mut free, parse_runs(list), block_size);
        }
    }
    let mut journal = vec![false; units];
    if field("Journal inode:") == "8" {
        let blocks = run("debugfs", &["-R", "blocks <8>", image]);
        let numbers =
            blocks.lines().last().unwrap().split_ascii_whitespace().map(|word| word.parse::<usize>().unwrap());
        mark(&mut journal, numbers.map(|block| block..block + 1), block_size);
    }
    (free, journal)
}

/// Whether every file of the tree is in the image with its content.
fn assert_holds_tree(image: &Path, directory: &Path) {
    let out = directory.join("out");
    fs::create_dir(&out).unwrap();
    run("debugfs", &["-R", &format!("rdump / {}", out.display()), image.to_str().unwrap()]);
    assert_same(&directory.join("tree"), &out);
    fs::remove_dir_all(&out).unwrap();
}

fn assert_same(expected: &Path, found: &Path) {
    for entry in fs::read_dir(expected).unwrap() {
        let entry = entry.unwrap();
        let other = found.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            assert_same(&entry.path(), &other);
        } else {
            assert!(fs::read(entry.path()).unwrap() == fs::read(&other).unwrap(), "{} differs", other.display());
        }
    }
}

/// The whole check of one kind of file system.
#[track_caller]
fn check(name: &str, mebibytes: usize, options: &[&str]) -> Survey {
    let temp = tempfile::tempdir().unwrap();
    let image = make_image(temp.path(), mebibytes, options);
    let survey = survey(&image);
    assert_eq!(survey.found.len(), 1);
    assert_eq!((survey.found[0].what, survey.found[0].label.as_deref()), (name, Some("label")), "{:?}", survey.notes);

    let units = mebibytes << 10;
    let (free, journal) = expected(&image, units);
    let mut reported = vec![false; units];
    mark(&mut reported, survey.unused.iter().map(|range| range.start as usize / UNIT..range.end as usize / UNIT), UNIT);
    let per_block = BLOCK as usize / UNIT;
    let mut taken_of_journal = 0;
    for block in 0..units / per_block {
        let part = block * per_block..(block + 1) * per_block;
        let is_free = free[part.clone()].iter().all(|free| *free);
        let may_be = part.clone().all(|unit| free[unit] || journal[unit]);
        assert!(!is_free || reported[part.start], "block {block} is free, but not reported");
        assert!(may_be || !reported[part.start], "block {block} is used, but reported");
        taken_of_journal += usize::from(reported[part.start] && !is_free) * per_block;
    }
    let journal_units = journal.iter().filter(|unit| **unit).count();
    let least = if survey.notes.iter().any(|note| note.contains("fast")) { 0 } else { journal_units * 7 / 10 };
    assert!(taken_of_journal >= least, "{taken_of_journal} of {journal_units} KiB of the journal");

    let before = fs::read(&image).unwrap();
    let has_old = |range: &Range<u64>| before[range.start as usize..range.end as usize].contains(&OLD_BYTE);
    assert!(survey.unused.iter().any(has_old), "nothing that was reported had content");
    zero(&image, &survey.unused);
    run("e2fsck", &["-fn", image.to_str().unwrap()]);
    assert_holds_tree(&image, temp.path());
    survey
}

#[test]
fn ext4_as_mke2fs_makes_it() {
    let survey = check("ext4", 64, &["-t", "ext4"]);
    assert!(survey.unused.iter().map(|range| range.end - range.start).sum::<u64>() > 16 << 20, "{survey:?}");
}

#[test]
fn block_sizes() {
    check("ext4", 32, &["-t", "ext4", "-b", "1024"]);
    check("ext4", 32, &["-t", "ext4", "-b", "2048"]);
    check("ext4", 64, &["-t", "ext4", "-b", "16384"]);
    check("ext4", 64, &["-t", "ext4", "-b", "65536", "-O", "^has_journal"]);
}

#[test]
fn checksums_of_every_age() {
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "metadata_csum,metadata_csum_seed"]);
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "^metadata_csum,uninit_bg"]);
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "^metadata_csum,^uninit_bg"]);
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "^64bit"]);
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "^metadata_csum,uninit_bg,64bit"]);
    check("ext4", 32, &["-t", "ext4", "-b", "1024", "-I", "128"]);
}

#[test]
fn layouts_of_groups() {
    check("ext4", 32, &["-t", "ext4", "-g", "2048", "-O", "^flex_bg"]);
    check("ext4", 32, &["-t", "ext4", "-g", "1024", "-O", "meta_bg,^resize_inode"]);
    check("ext4", 64, &["-t", "ext4", "-b", "1024", "-g", "1024", "-O", "meta_bg,^resize_inode,^sparse_super"]);
    check("ext4", 32, &["-t", "ext4", "-g", "1024", "-O", "sparse_super2,^resize_inode"]);
    check("ext4", 32, &["-t", "ext4", "-g", "1024", "-O", "meta_bg,sparse_super2,^resize_inode"]);
}

#[test]
fn journals_of_every_age() {
    check("ext2", 32, &["-t", "ext2"]);
    check("ext2", 32, &["-t", "ext2", "-b", "1024", "-O", "^sparse_super,^resize_inode"]);
    check("ext3", 32, &["-t", "ext3"]);
    check("ext3", 32, &["-t", "ext3", "-b", "1024", "-J", "size=8"]);
    check("ext4", 32, &["-t", "ext4", "-O", "^extents,^64bit", "-b", "1024"]);
    check("ext4", 32, &["-t", "ext4", "-O", "^has_journal"]);
    check("ext4", 32, &["-t", "ext4", "-O", "fast_commit,orphan_file", "-J", "size=8,fast_commit_size=1"]);
}

/// A journal that was added to a nearly full file system lies in hundreds of pieces, so its extents need a tree.
#[test]
fn a_journal_in_many_pieces() {
    let temp = tempfile::tempdir().unwrap();
    let (tree, image, script) = (temp.path().join("tree"), temp.path().join("image"), temp.path().join("script"));
    fs::create_dir(&tree).unwrap();
    for index in 0..800 {
        fs::write(tree.join(format!("f{index:04}")), vec![index as u8 | 1; 8192]).unwrap();
    }
    fs::write(&image, vec![OLD_BYTE; 8 << 20]).unwrap();
    let [tree_path, image_path, script_path] = [&tree, &image, &script].map(|path| path.to_str().unwrap());
    let options = "-q -F -t ext4 -b 1024 -N 2000 -m 0 -E nodiscard -O ^has_journal -d";
    let words: Vec<&str> = options.split(' ').chain([tree_path, image_path]).collect();
    run("mke2fs", &words);
    let doomed: Vec<String> = (0..800).step_by(2).map(|index| format!("f{index:04}")).collect();
    fs::write(&script, doomed.iter().map(|name| format!("rm /{name}\n")).collect::<String>()).unwrap();
    run("debugfs", &["-w", "-f", script_path, image_path]);
    doomed.iter().for_each(|name| fs::remove_file(tree.join(name)).unwrap());
    run("tune2fs", &["-J", "size=2", image_path]);
    let stat = run("debugfs", &["-R", "ex <8>", image_path]);
    assert!(stat.lines().count() > 100, "the journal is in few pieces: {stat}");

    let survey = survey(&image);
    assert!(survey.notes.is_empty(), "{:?}", survey.notes);
    let (free, journal) = expected(&image, 8 << 10);
    let may_be = |unit: usize| free[unit] || journal[unit];
    let reported = || survey.unused.iter().flat_map(|range| range.start as usize / UNIT..range.end as usize / UNIT);
    assert!(reported().all(may_be));
    let (taken, all) = (reported().filter(|unit| journal[*unit]).count(), journal.iter().filter(|unit| **unit).count());
    assert!(taken > all / 3, "{taken} of {all} KiB of the journal");
    zero(&image, &survey.unused);
    run("e2fsck", &["-fn", image_path]);
    assert_holds_tree(&image, temp.path());
}

#[track_caller]
fn nothing_after(options: &[&str], command: &str, reason: &str) {
    let temp = tempfile::tempdir().unwrap();
    let image = make_image(temp.path(), 16, options);
    assert!(!survey(&image).unused.is_empty());
    run("debugfs", &["-w", "-R", command, image.to_str().unwrap()]);
    let survey = survey(&image);
    assert!(survey.unused.is_empty(), "{command}");
    assert!(survey.notes.iter().any(|note| note.contains(reason)), "{:?}", survey.notes);
}

#[test]
fn a_file_system_in_doubt_has_nothing_unused_and_says_so() {
    for options in [&["-t", "ext4"][..], &["-t", "ext3", "-b", "1024"]] {
        nothing_after(options, "feature needs_recovery", "needs recovery");
        nothing_after(options, "ssv state 0", "not cleanly unmounted");
        nothing_after(options, "ssv state 3", "known errors");
        nothing_after(options, "ssv last_orphan 12", "deleted files");
    }
    nothing_after(&["-t", "ext3"], "set_bg 0 free_blocks_count 5", "by its bitmap, but 5 by its descriptor");
    nothing_after(&["-t", "ext4"], "set_bg 0 checksum 1", "checksum of the descriptor of group 0");
    nothing_after(
        &["-t", "ext4", "-O", "^metadata_csum,uninit_bg"],
        "set_bg 0 checksum 1",
        "checksum of the descriptor",
    );
    nothing_after(&["-t", "ext4"], "set_inode_field <8> mode 0", "inode 8 is no regular file");
    nothing_after(&["-t", "ext4", "-O", "^metadata_csum"], "set_inode_field <8> flags 0", "");
}

#[test]
fn flipped_bits_are_found_by_checksums() {
    let temp = tempfile::tempdir().unwrap();
    let image = make_image(temp.path(), 16, &["-t", "ext4", "-b", "4096"]);
    let whole = fs::read(&image).unwrap();
    let text = run("dumpe2fs", &[image.to_str().unwrap()]);
    let block_of = |what: &str| {
        let rest = &text[text.find(what).unwrap() + what.len()..];
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<usize>().unwrap() * 4096
    };
    let inode_8 = block_of("Inode table at ") + 7 * 256;
    for (offset, reason) in [
        (1024 + 0x28, "checksum of its superblock"),
        (4096 + 4, "checksum of the descriptor"),
        (block_of("Block bitmap at ") + 100, "checksum of the block bitmap"),
        (inode_8 + 0x40, "checksum of inode 8"),
    ] {
        let mut damaged = whole.clone();
        damaged[offset] ^= 0x10;
        let survey = unused(&damaged).unwrap();
        assert!(survey.unused.is_empty());
        assert!(survey.notes.iter().any(|note| note.contains(reason)), "{reason}: {:?}", survey.notes);
    }
    // Cut off in the middle, as by a download that broke.
    let survey = unused(&&whole[..8 << 20]).unwrap();
    assert!(survey.unused.is_empty() && survey.notes[0].contains("cut off"), "{survey:?}");
}

#[test]
fn clusters_are_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    fs::write(&image, vec![0; 32 << 20]).unwrap();
    run("mke2fs", &["-q", "-F", "-t", "ext4", "-O", "bigalloc", image.to_str().unwrap()]);
    let survey = survey(&image);
    assert!(survey.unused.is_empty() && survey.notes[0].contains("bigalloc"), "{survey:?}");
}

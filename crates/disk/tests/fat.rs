//! FAT of every width, made by dosfstools and filled by mtools: what is called unused is what is free, and no more.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use collective_disk::{BLOCK, Survey, unused};
use common::{OLD_BYTE, make_tree, run};

/// A file system in whose free space are old bytes, and from which some files were deleted.
fn make_fat(directory: &Path, mebibytes: usize, options: &[&str]) -> PathBuf {
    let image = directory.join("image");
    let tree = make_tree(directory);
    fs::write(&image, vec![OLD_BYTE; mebibytes << 20]).unwrap();
    let path = image.to_str().unwrap();
    run("mkfs.vfat", &[&["-n", "LABEL"], options, &[path]].concat());
    let mut names: Vec<PathBuf> = fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    let names: Vec<&str> = names.iter().map(|name| name.to_str().unwrap()).collect();
    run("mcopy", &[&["-i", path, "-s", "-m"], &names[..], &["::"]].concat());
    for index in 0..6 {
        run("mdel", &["-i", path, &format!("::sub/doomed{index}")]);
        fs::remove_file(tree.join(format!("sub/doomed{index}"))).unwrap();
    }
    image
}

fn assert_holds_tree(image: &Path, directory: &Path) {
    let out = directory.join("out");
    fs::create_dir(&out).unwrap();
    run("mcopy", &["-i", image.to_str().unwrap(), "-s", "::", out.to_str().unwrap()]);
    run("diff", &["-r", directory.join("tree").to_str().unwrap(), out.to_str().unwrap()]);
    fs::remove_dir_all(&out).unwrap();
}

/// Bytes of free clusters, by fsck.fat: `6 files, 120/8167 clusters`, and `4096 bytes per cluster`.
fn free_by_fsck(image: &Path) -> u64 {
    let text = run("fsck.vfat", &["-n", "-v", image.to_str().unwrap()]);
    let number = |words: &str| {
        words.split(|c: char| !c.is_ascii_digit()).rfind(|word| !word.is_empty()).unwrap().parse::<u64>().unwrap()
    };
    let before = |mark: &str| number(&text[..text.find(mark).unwrap()]);
    let all = before(" clusters\n");
    let used = number(&text[..text.rfind(&format!("/{all} clusters")).unwrap()]);
    (all - used) * before(" bytes per cluster")
}

#[track_caller]
fn check(mebibytes: usize, options: &[&str]) {
    let temp = tempfile::tempdir().unwrap();
    let image = make_fat(temp.path(), mebibytes, options);
    let mut bytes = fs::read(&image).unwrap();
    let survey = unused(&bytes).unwrap();
    assert_eq!((survey.found[0].what, survey.found[0].label.as_deref()), ("vfat", Some("LABEL")));
    assert!(survey.notes.is_empty(), "{:?}", survey.notes);

    let (free, found) = (free_by_fsck(&image), survey.unused.iter().map(|range| range.end - range.start).sum::<u64>());
    // Not more, and less only at the edges, which are not where the blocks of images are.
    let edges = 2 * BLOCK * survey.unused.len() as u64 + 40 * BLOCK;
    assert!(found <= free && free <= found + edges, "{found} of {free} free bytes");
    let has_old = |range: &std::ops::Range<u64>| bytes[range.start as usize..range.end as usize].contains(&OLD_BYTE);
    assert!(survey.unused.iter().any(has_old), "nothing that was reported had content");
    for range in &survey.unused {
        bytes[range.start as usize..range.end as usize].fill(0);
    }
    fs::write(&image, bytes).unwrap();
    run("fsck.vfat", &["-n", image.to_str().unwrap()]);
    assert_holds_tree(&image, temp.path());
}

#[test]
fn widths_and_sizes_of_clusters() {
    check(4, &["-F", "12"]);
    check(16, &["-F", "12", "-s", "16"]);
    check(32, &["-F", "16"]);
    check(64, &["-F", "16", "-s", "8"]);
    check(64, &["-F", "32"]);
    check(40, &["-F", "16", "-f", "1", "-R", "7"]);
    check(64, &[]);
}

/// Too few clusters for FAT32 by the specification, so mtools refuses it; and yet what an EFI system partition often is.
#[test]
fn a_small_fat32() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    fs::write(&image, vec![OLD_BYTE; 34 << 20]).unwrap();
    run("mkfs.vfat", &["-F", "32", "-s", "8", image.to_str().unwrap()]);
    let mut bytes = fs::read(&image).unwrap();
    let survey = unused(&bytes).unwrap();
    assert!(survey.notes.is_empty() && survey.unused[0].end - survey.unused[0].start > 33 << 20, "{survey:?}");
    bytes[survey.unused[0].start as usize..survey.unused[0].end as usize].fill(0);
    fs::write(&image, bytes).unwrap();
    run("fsck.vfat", &["-n", image.to_str().unwrap()]);
}

/// The survey of the image after bytes were changed.
fn changed(image: &[u8], change: impl FnOnce(&mut [u8])) -> Survey {
    let mut image = image.to_vec();
    change(&mut image);
    unused(&image).unwrap()
}

#[track_caller]
fn nothing_after(image: &[u8], reason: &str, change: impl FnOnce(&mut [u8])) {
    let survey = changed(image, change);
    assert!(survey.unused.is_empty(), "{reason}");
    assert!(survey.notes.len() == 1 && survey.notes[0].contains(reason), "{reason}: {:?}", survey.notes);
}

struct Fat {
    image: Vec<u8>,
    /// Offsets of both copies of the table, which has entries of this many bytes.
    tables: [usize; 2],
    width: usize,
    /// Of the first entry of `SUB`, the directory, in the root.
    sub: usize,
    sub_content: usize,
}

impl Fat {
    fn make(width: usize) -> Fat {
        let temp = tempfile::tempdir().unwrap();
        let image = fs::read(make_fat(temp.path(), 64, &["-F", if width == 2 { "16" } else { "32" }])).unwrap();
        let u16_at = |at: usize| usize::from(u16::from_le_bytes([image[at], image[at + 1]]));
        let sector = u16_at(11);
        let table = if width == 2 { u16_at(22) } else { u16_at(36) } * sector;
        let first = u16_at(14) * sector;
        let sub = (0..image.len()).step_by(32).find(|at| image[*at..at + 12] == *b"SUB        \x10").unwrap();
        let data = first + 2 * table + u16_at(17) * 32;
        let sub_content = data + (u16_at(sub + 26) - 2) * usize::from(image[13]) * sector;
        assert_eq!(image[sub_content..sub_content + 2], *b". ");
        Fat { tables: [first, first + table], width, sub, sub_content, image }
    }

    /// Sets an entry in both copies.
    fn set(&self, image: &mut [u8], cluster: usize, value: u32) {
        for table in self.tables {
            let at = table + cluster * self.width;
            image[at..at + self.width].copy_from_slice(&value.to_le_bytes()[..self.width]);
        }
    }
}

#[test]
fn a_table_in_doubt_has_nothing_unused_and_says_so() {
    for (width, top, clean, sound) in [(2, 0xffffu32, 0x8000, 0x4000), (4, 0x0fff_ffff, 0x0800_0000, 0x0400_0000)] {
        let fat = Fat::make(width);
        let nothing = |reason: &str, change: &dyn Fn(&mut [u8])| nothing_after(&fat.image, reason, change);
        let state = if width == 2 { 37 } else { 65 };
        nothing("not cleanly unmounted", &|image| image[state] = 1);
        nothing("not cleanly unmounted", &|image| fat.set(image, 1, top ^ clean));
        nothing("not cleanly unmounted", &|image| fat.set(image, 1, top ^ sound));
        nothing("copies of its table differ", &|image| image[fat.tables[1] + 200] ^= 1);
        nothing("does not begin as one does", &|image| fat.set(image, 0, top & !0xff | 0xf0));
        // A free cluster, one beyond the end, and the reserved number 1 as successors of the first file's.
        nothing("is broken", &|image| fat.set(image, 5, 30_000));
        nothing("does not have", &|image| fat.set(image, 5, top - 0x20));
        nothing("does not have", &|image| fat.set(image, 5, 1));
        // Two chains join.
        nothing("is broken", &|image| {
            fat.set(image, 20_000, 30_001);
            fat.set(image, 20_001, 30_001);
            fat.set(image, 30_001, top);
        });
        nothing("is not its own", &|image| image[fat.sub + 26..fat.sub + 28].copy_from_slice(&30_000u16.to_le_bytes()));
        nothing("does not begin as one does", &|image| image[fat.sub_content + 26] ^= 1);
        nothing("does not begin as one does", &|image| image[fat.sub_content] = 0);
        nothing("goes on behind its end", &|image| image[fat.sub_content + 64] = 0);
        nothing("impossible on this disk", &|image| image[13] = 3);
        nothing("impossible on this disk", &|image| image[16] = 3);
    }
}

#[test]
fn a_file_that_the_table_knows_nothing_of_is_not_lost() {
    let fat = Fat::make(4);
    let file = (0..fat.image.len()).step_by(32).find(|at| fat.image[*at..at + 11] == *b"FILE5      ").unwrap();
    let first = usize::from(u16::from_le_bytes([fat.image[file + 26], fat.image[file + 27]]));
    nothing_after(&fat.image, "is not its own", |image| {
        for cluster in first..first + 587 {
            fat.set(image, cluster, 0);
        }
    });
    nothing_after(&fat.image, "fewer clusters than its size", |image| image[file + 31] = 1);
}

#[test]
fn damaged_clusters_and_those_nobody_refers_to_are_used() {
    let fat = Fat::make(4);
    let before = unused(&fat.image).unwrap().unused;
    let after = changed(&fat.image, |image| {
        (60_000..60_064).for_each(|cluster| fat.set(image, cluster, 0x0fff_fff7));
        (70_000..70_064).for_each(|cluster| fat.set(image, cluster, 0x0fff_ffff));
        // The upper four bits say nothing.
        fat.set(image, 80_000, 0xf000_0000);
    });
    let sum = |ranges: &[std::ops::Range<u64>]| ranges.iter().map(|range| range.end - range.start).sum::<u64>();
    assert_eq!(after.notes, [""; 0]);
    let taken = sum(&before) - sum(&after.unused);
    assert!((2 * 64 * 512..=2 * 64 * 512 + 4 * BLOCK).contains(&taken), "{taken}");
}

#[test]
fn counts_of_clusters_on_which_programs_differ_are_left_alone() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    fs::write(&image, vec![0; 4 << 20]).unwrap();
    run("mkfs.vfat", &["-F", "12", "-s", "1", "-r", "16", image.to_str().unwrap(), "2036"]);
    let mut bytes = fs::read(&image).unwrap();
    assert!(!unused(&bytes).unwrap().unused.is_empty());
    // A volume one sector larger has one cluster more; the table has room for some.
    let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let front = u16_at(14) + 2 * u16_at(22) + 1;
    let mut at_most = None;
    for clusters in 4030..4080u16 {
        bytes[19..21].copy_from_slice(&(front + clusters).to_le_bytes());
        if !unused(&bytes).unwrap().unused.is_empty() {
            at_most = Some(clusters);
        }
    }
    assert_eq!(at_most, Some(4069));
    assert!(unused(&bytes).unwrap().notes[0].contains("do not fit"), "{:?}", unused(&bytes).unwrap());
}

#[test]
fn other_systems_are_not_taken_for_fat() {
    let temp = tempfile::tempdir().unwrap();
    let image = fs::read(make_fat(temp.path(), 64, &["-F", "32"])).unwrap();
    nothing_after(&image, "exfat", |image| image[3..11].copy_from_slice(b"EXFAT   "));
    nothing_after(&image, "marks of both", |image| image[4086..4096].copy_from_slice(b"SWAPSPACE2"));
    nothing_after(&image, "luks", |image| image[..6].copy_from_slice(b"LUKS\xba\xbe"));
    nothing_after(&image, "no known", |image| image[82] = b'X');
    nothing_after(&image, "both a partition table and vfat", |image| {
        image[446..462].copy_from_slice(&[0, 0, 0, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0]);
    });
    let survey = unused(&&image[..32 << 20]).unwrap();
    assert!(survey.unused.is_empty() && survey.notes[0].contains("cut off"), "{survey:?}");
}

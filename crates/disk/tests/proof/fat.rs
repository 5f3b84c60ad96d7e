//! FAT, filled and read by a program (the crate `fatfs`) that has nothing in common with ours, because not every kernel
//! can mount it; where the kernel can, it compares too.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use fatfs::{Dir, FileSystem, FsOptions};

use crate::common::mount::Mount;
use crate::common::{OLD_BYTE, run};
use crate::compare::differences;
use crate::fill::Random;

/// An image full of old bytes with a new file system.
pub fn make(directory: &Path, mebibytes: usize, options: &[&str]) -> PathBuf {
    let image = directory.join("fat");
    fs::write(&image, vec![OLD_BYTE; mebibytes << 20]).unwrap();
    let path = image.to_str().unwrap();
    run("mkfs.vfat", &[options, &[path]].concat());
    // Directories are made by mtools, because the crate gives theirs long names for "." that fsck does not take. mtools
    // knows no other sectors than of 512 bytes.
    if !options.contains(&"-S") {
        FOLDERS.iter().for_each(|folder| drop(run("mmd", &["-i", path, &format!("::{folder}")])));
    }
    image
}

const FOLDERS: [&str; 3] = ["EFI", "EFI/BOOT", "EFI/a directory with a long name"];

fn open(image: &Path) -> FileSystem<File> {
    FileSystem::new(File::options().read(true).write(true).open(image).unwrap(), FsOptions::new()).unwrap()
}

/// Creates, grows, cuts, renames and deletes files at random. A full file system is no failure.
pub fn wear(image: &Path, random: &mut Random, steps: usize) {
    let system = open(image);
    let root = system.root_dir();
    let has_folders = root.open_dir(FOLDERS[0]).is_ok();
    // Few enough for one cluster of the root: the crate does not clear the next one.
    let names = if has_folders { 30 } else { 12 };
    for _ in 0..steps {
        let folder = if has_folders { FOLDERS[random.below(3) as usize] } else { "" };
        let mut name = || {
            format!("{folder}/{}{}", ["F", "a file with a long name "][random.below(2) as usize], random.below(names))
        };
        let (name, other) = (name(), name());
        let length = 1usize << random.below(17);
        let _ = match random.below(5) {
            0 => root.remove(&name),
            1 if root.open_file(&other).is_err() => root.rename(&name, &root, &other),
            2 => root.open_file(&name).and_then(|mut file| file.truncate()),
            _ => root.create_file(&name).and_then(|mut file| file.write_all(&random.bytes(length))),
        };
    }
    drop(root);
    system.unmount().unwrap();
    // The crate leaves what it could not finish on a full volume; what is true is for fsck to say.
    run("fsck.vfat", &["-n", image.to_str().unwrap()]);
}

/// Every field of every entry, and every byte of every file.
fn list(of: &Dir<'_, File>, path: &str, entries: &mut Vec<(String, Vec<u8>)>) {
    for entry in of.iter().map(|entry| entry.unwrap()) {
        let name = format!("{path}/{}", entry.file_name());
        let fields = format!(
            "{name} {} {:?} {} {:?} {:?} {:?}",
            entry.short_file_name(),
            entry.attributes(),
            entry.len(),
            entry.created(),
            entry.modified(),
            entry.accessed()
        );
        let mut content = Vec::new();
        if entry.is_file() {
            entry.to_file().read_to_end(&mut content).unwrap();
        } else if !matches!(entry.file_name().as_str(), "." | "..") {
            list(&entry.to_dir(), &name, entries);
        }
        entries.push((fields, content));
    }
}

/// Returns how many entries were compared.
pub fn assert_same(directory: &Path, original: &Path, result: &Path) -> usize {
    run("fsck.vfat", &["-n", result.to_str().unwrap()]);
    let entries = |image: &Path| {
        // Reading must not change what is compared, not even a time of access.
        let copy = directory.join("copy");
        fs::copy(image, &copy).unwrap();
        let mut entries = Vec::new();
        list(&open(&copy).root_dir(), "", &mut entries);
        entries
    };
    let (first, second) = (entries(original), entries(result));
    for (one, other) in first.iter().zip(&second) {
        assert!(one == other, "{} differs", one.0);
    }
    assert_eq!(first.len(), second.len());
    let mounts = [original, result].map(|image| Mount::with(directory, image, "loop,ro"));
    if let [Ok(one), Ok(other)] = &mounts {
        let (_, found) = differences(one.path(), other.path());
        assert!(found.is_empty(), "{found:?}");
    }
    first.len()
}

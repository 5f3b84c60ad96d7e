//! Everything a program can see of a tree of files, compared with another tree.

use std::ffi::{CStr, CString};
use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{ioctl_getflags, lgetxattr, llistxattr};

/// How many files were compared, and for each difference a line with the file and the field.
pub fn differences(first: &Path, second: &Path) -> (usize, Vec<String>) {
    let mut comparison = Comparison { first, second, count: 0, found: Vec::new() };
    comparison.compare(Path::new(""));
    (comparison.count, comparison.found)
}

struct Comparison<'a> {
    first: &'a Path,
    second: &'a Path,
    count: usize,
    found: Vec<String>,
}

impl Comparison<'_> {
    fn compare(&mut self, name: &Path) {
        self.count += 1;
        // The root's own name is empty, and must not end in a slash.
        let of = |root: &Path| if name.as_os_str().is_empty() { root.to_owned() } else { root.join(name) };
        let (first, second) = (of(self.first), of(self.second));
        let Ok(other) = fs::symlink_metadata(&second) else { return self.note(name, "existence") };
        let one = fs::symlink_metadata(&first).unwrap();
        let fields = fields(&one).into_iter().zip(fields(&other));
        fields.filter(|(one, other)| one != other).for_each(|((field, _), _)| self.note(name, field));
        if attributes(&first) != attributes(&second) {
            self.note(name, "extended attributes");
        }
        let kind = one.file_type();
        if kind.is_symlink() && fs::read_link(&first).ok() != fs::read_link(&second).ok() {
            self.note(name, "target");
        }
        if (kind.is_file() || kind.is_dir()) && flags(&first) != flags(&second) {
            self.note(name, "flags");
        }
        if kind.is_file() && other.is_file() && !has_same_content(&first, &second) {
            self.note(name, "content");
        }
        if kind.is_dir() {
            self.directory(name, &first, &second);
        }
    }

    fn directory(&mut self, name: &Path, first: &Path, second: &Path) {
        let names = |path: &Path| {
            fs::read_dir(path).map(|list| list.flatten().map(|entry| entry.file_name()).collect::<Vec<_>>())
        };
        let (one, other) = (names(first).unwrap(), names(second).unwrap_or_default());
        // The order is a property of the directory's own blocks.
        if one != other {
            self.note(name, "entries");
        }
        one.iter().for_each(|entry| self.compare(&name.join(entry)));
    }

    fn note(&mut self, name: &Path, field: &str) {
        self.found.push(format!("{}: {field}", name.display()));
    }
}

fn fields(of: &Metadata) -> Vec<(&'static str, i128)> {
    let kind = of.file_type();
    let special = [kind.is_fifo(), kind.is_socket(), kind.is_char_device(), kind.is_block_device()];
    let born = of.created().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    vec![
        ("inode", of.ino().into()),
        ("mode", of.mode().into()),
        ("kind", special.iter().fold(0, |sum, is| sum * 2 + i128::from(*is))),
        ("owner", of.uid().into()),
        ("group", of.gid().into()),
        ("size", of.size().into()),
        ("links", of.nlink().into()),
        ("device", of.rdev().into()),
        ("blocks", of.blocks().into()),
        ("block size", of.blksize().into()),
        ("time of change", of.mtime().into()),
        ("time of change, ns", of.mtime_nsec().into()),
        ("time of inode's change", of.ctime().into()),
        ("time of inode's change, ns", of.ctime_nsec().into()),
        ("time of access", of.atime().into()),
        ("time of access, ns", of.atime_nsec().into()),
        ("time of birth", born.map_or(-1, |born| born.as_nanos() as i128)),
    ]
}

/// Names and values; access control lists are among them.
fn attributes(path: &Path) -> Vec<(CString, Vec<u8>)> {
    let mut names = vec![0u8; 64 << 10];
    let Ok(length) = llistxattr(path, &mut names[..]) else { return Vec::new() };
    let names = names[..length].split_inclusive(|byte| *byte == 0);
    let names = names.map(|name| CStr::from_bytes_with_nul(name).unwrap().to_owned());
    let value = |name: &CString| {
        let mut value = vec![0u8; 64 << 10];
        let length = lgetxattr(path, name.as_c_str(), &mut value[..]).unwrap_or(0);
        value[..length].to_vec()
    };
    names
        .map(|name| {
            let value = value(&name);
            (name, value)
        })
        .collect()
}

fn flags(path: &Path) -> Option<u32> {
    ioctl_getflags(File::open(path).ok()?).ok().map(|flags| flags.bits())
}

fn has_same_content(first: &Path, second: &Path) -> bool {
    let (Ok(mut first), Ok(mut second)) = (File::open(first), File::open(second)) else { return false };
    let (mut one, mut other) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let read = |file: &mut File, buffer: &mut [u8]| -> std::io::Result<usize> {
            let mut length = 0;
            while length < buffer.len() {
                match file.read(&mut buffer[length..])? {
                    0 => break,
                    more => length += more,
                }
            }
            Ok(length)
        };
        match (read(&mut first, &mut one), read(&mut second, &mut other)) {
            (Ok(length), Ok(same)) if length == same && one[..length] == other[..length] => {
                if length == 0 {
                    return true;
                }
            }
            _ => return false,
        }
    }
}

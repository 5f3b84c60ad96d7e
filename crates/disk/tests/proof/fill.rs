//! Files of every kind that Linux has, and the wear of use.

use std::fs::{self, File, FileTimes};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, IFlags, Mode, Timespec, Timestamps, XattrFlags, fallocate, ioctl_getflags,
    ioctl_setflags, lsetxattr, makedev, mknodat, utimensat,
};

/// Numbers that are the same in every run (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).take(length).collect()
    }
}

/// One or more of everything, and what was deleted between.
pub fn every_kind(root: &Path) {
    let mut random = Random(42);
    for length in [0usize, 1, 50, 150, 1023, 1024, 4095, 4096, 4097, 100_000, 3_000_000] {
        fs::write(root.join(format!("regular{length}")), random.bytes(length)).unwrap();
        fs::write(root.join(format!("doomed{length}")), random.bytes(length)).unwrap();
    }
    sparse(root, &mut random);
    links(root);
    special(root);
    names(root);
    attributes(root, &mut random);
    owners_and_times(root);
    for length in [0usize, 1, 50, 150, 1023, 1024, 4095, 4096, 4097, 100_000, 3_000_000] {
        fs::remove_file(root.join(format!("doomed{length}"))).unwrap();
    }
}

fn sparse(root: &Path, random: &mut Random) {
    let mut file = File::create(root.join("holes")).unwrap();
    for at in [5000, 1 << 20, (1 << 20) + 70_000, 30 << 20] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&random.bytes(5000)).unwrap();
    }
    File::create(root.join("only-a-hole")).unwrap().set_len(5 << 20).unwrap();
    let mut cut = File::create(root.join("cut")).unwrap();
    cut.write_all(&random.bytes(200_000)).unwrap();
    cut.set_len(77_777).unwrap();
    // What follows is not in every file system.
    let reserved = File::create(root.join("reserved")).unwrap();
    let _ = fallocate(&reserved, FallocateFlags::empty(), 0, 300_000);
    let mut beyond = File::create(root.join("reserved-beyond-its-end")).unwrap();
    beyond.write_all(&random.bytes(10_000)).unwrap();
    let _ = fallocate(&beyond, FallocateFlags::KEEP_SIZE, 0, 400_000);
    let mut punched = File::create(root.join("punched")).unwrap();
    punched.write_all(&random.bytes(500_000)).unwrap();
    let _ = fallocate(&punched, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 100_000, 200_000);
}

fn links(root: &Path) {
    fs::write(root.join("linked"), "one content, many names").unwrap();
    fs::create_dir(root.join("links")).unwrap();
    for index in 0..20 {
        fs::hard_link(root.join("linked"), root.join(format!("links/hard{index}"))).unwrap();
    }
    // Short targets lie in the inode, long ones in a block.
    for length in [1, 20, 59, 60, 61, 900] {
        symlink("t".repeat(length), root.join(format!("links/soft{length}"))).unwrap();
    }
}

fn special(root: &Path) {
    let all = [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("character-device", FileType::CharacterDevice, makedev(1, 3)),
        ("block-device", FileType::BlockDevice, makedev(259, 70_000)),
    ];
    for (name, kind, device) in all {
        mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
}

fn names(root: &Path) {
    fs::write(root.join("n".repeat(255)), "a long name").unwrap();
    fs::write(root.join("Ünïcode — 名前"), "not of ASCII").unwrap();
    let deep: PathBuf = (0..40).map(|level| format!("level{level}")).collect();
    fs::create_dir_all(root.join(&deep)).unwrap();
    fs::write(root.join(deep).join("bottom"), "deep").unwrap();
    // Enough for an index, and with holes in it.
    let many = root.join("many");
    fs::create_dir(&many).unwrap();
    for index in 0..1200 {
        File::create(many.join(format!("an entry with a name of some length {index}"))).unwrap();
    }
    for index in (0..1200).step_by(3) {
        fs::remove_file(many.join(format!("an entry with a name of some length {index}"))).unwrap();
    }
}

fn attributes(root: &Path, random: &mut Random) {
    let path = root.join("attributes");
    fs::write(&path, "has attributes").unwrap();
    fs::create_dir(root.join("attributes-of-a-directory")).unwrap();
    let set = |path: &Path, name: &str, value: &[u8]| lsetxattr(path, name, value, XattrFlags::empty()).unwrap();
    for length in [0usize, 1, 40, 500] {
        set(&path, &format!("user.of-{length}"), &random.bytes(length));
    }
    set(&path, "trusted.for-root", b"seen by root only");
    set(&path, "security.capability", &[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    // Of two files, in a block that they share where the file system can.
    for name in ["attribute-shared-1", "attribute-shared-2"] {
        fs::write(root.join(name), "").unwrap();
        set(&root.join(name), "user.shared", &[0x77; 600]);
    }
    set(&path, "system.posix_acl_access", &access_list());
    set(&root.join("attributes-of-a-directory"), "system.posix_acl_access", &access_list());
    set(&root.join("attributes-of-a-directory"), "system.posix_acl_default", &access_list());
    let flagged = File::create(root.join("flagged")).unwrap();
    if let Ok(flags) = ioctl_getflags(&flagged) {
        let _ = ioctl_setflags(&flagged, flags | IFlags::NODUMP | IFlags::NOATIME);
    }
}

/// An access control list with a named user, as the kernel takes it (include/uapi/linux/posix_acl_xattr.h).
fn access_list() -> Vec<u8> {
    let (nobody, user) = (u32::MAX, 1234);
    let entries = [(1u16, 6u16, nobody), (2, 4, user), (4, 4, nobody), (16, 4, nobody), (32, 0, nobody)];
    let entries = entries.into_iter().flat_map(|(tag, permissions, id)| {
        [&tag.to_le_bytes()[..], &permissions.to_le_bytes(), &id.to_le_bytes()].concat()
    });
    2u32.to_le_bytes().into_iter().chain(entries).collect()
}

fn owners_and_times(root: &Path) {
    for (index, mode) in [0o000, 0o400, 0o4755, 0o2711, 0o1777, 0o7777].into_iter().enumerate() {
        let path = root.join(format!("mode{mode:o}"));
        fs::write(&path, "modes and owners").unwrap();
        lchown(&path, Some(1000 + index as u32 * 100_000), Some(70_000 + index as u32)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }
    for (name, seconds, nanoseconds) in
        [("old", 1u64, 1), ("new", 1_700_000_000, 123_456_789), ("late", 2_147_483_000, 999_999_999)]
    {
        let file = File::create(root.join(name)).unwrap();
        let at = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        file.set_times(FileTimes::new().set_modified(at).set_accessed(at + Duration::from_nanos(7))).unwrap();
    }
    let time = |tv_nsec| Timespec { tv_sec: 1_600_000_000, tv_nsec };
    let times = Timestamps { last_access: time(5), last_modification: time(987_654_321) };
    utimensat(CWD, root.join("links/soft20"), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Creates, grows, cuts, renames and deletes files at random. A full file system is no failure.
pub fn wear(root: &Path, random: &mut Random, steps: usize) {
    let folder = root.join("worn");
    fs::create_dir_all(&folder).unwrap();
    for _ in 0..steps {
        let name = folder.join(format!("file{}", random.below(80)));
        let other = folder.join(format!("file{}", random.below(80)));
        let (length, odd) = (1usize << random.below(19), random.below(3000) as usize);
        let _ = match random.below(8) {
            0 => fs::remove_file(&name),
            1 => fs::rename(&name, &other),
            2 => fs::hard_link(&name, &other),
            3 => File::options()
                .append(true)
                .create(true)
                .open(&name)
                .and_then(|mut file| file.write_all(&random.bytes(length))),
            4 => File::options().write(true).open(&name).and_then(|file| file.set_len(random.below(100_000))),
            5 => fs::create_dir_all(folder.join(format!("folder{}/of/{length}", random.below(9)))),
            6 => fs::remove_dir_all(folder.join(format!("folder{}", random.below(9)))),
            _ => fs::write(&name, random.bytes(length + odd)),
        };
    }
}

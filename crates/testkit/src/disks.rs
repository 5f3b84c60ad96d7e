//! Disks of a fleet that are small, or that forget what was not synced when the power goes; for tests that run as root.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::Fleet;

impl Fleet {
    /// Mounts a file system of this many bytes at a folder of the fleet, such as a host's before it joins.
    pub fn small_disk(&self, folder: &str, bytes: u64) {
        std::fs::create_dir(self.file(folder)).expect("a folder");
        let options = std::ffi::CString::new(format!("size={bytes},mode=711")).expect("no zero byte");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", self.file(folder), "tmpfs", flags, options.as_c_str()).expect("a small disk");
    }

    /// Mounts an ext4 of this many bytes, kept in a file, at a folder of the fleet, such as a host's before it joins: a
    /// disk for [`cut_power`](Self::cut_power).
    pub fn real_disk(&self, folder: &str, bytes: u64) {
        std::fs::create_dir(self.file(folder)).expect("a folder");
        let image = self.disk_image(folder);
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("a file for the disk");
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        self.mount_disk(folder);
    }

    fn disk_image(&self, folder: &str) -> PathBuf {
        self.file(&format!("{folder}.disk"))
    }

    fn mount_disk(&self, folder: &str) {
        // The journal is not committed just because time passes: what is not synced is lost.
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop,commit=300"]).arg(self.disk_image(folder)).arg(self.file(folder)));
        std::fs::set_permissions(self.file(folder), std::fs::Permissions::from_mode(0o711)).expect("its mode");
    }

    /// The machine of a host that joined on a [`real_disk`](Self::real_disk) loses power: all its processes die, and
    /// what none of them synced is gone. The host has to be run again.
    pub fn cut_power(&mut self, host: &str) {
        self.kill_host(host);
        self.end_processes(&format!("{}/", self.file(host).display()));
        // The file has what reached the disk; the rest is in the kernel's cache of the mounted file system.
        let (image, copy) = (self.disk_image(host), self.file("copy.disk"));
        run(Command::new("cp").arg("--sparse=always").args([&image, &copy]));
        run(Command::new("umount").args(["-R", "-l"]).arg(self.file(host)));
        std::fs::rename(copy, image).expect("the disk as it was");
        self.mount_disk(host);
    }

    /// Makes a small file system larger or smaller.
    pub fn resize_disk(&self, folder: &str, bytes: u64) {
        let options = std::ffi::CString::new(format!("size={bytes}")).expect("no zero byte");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount_remount(self.file(folder), flags, options.as_c_str()).expect("the file system is resized");
    }

    /// Bytes in use on a small file system.
    pub fn used_space(&self, folder: &str) -> u64 {
        let found = rustix::fs::statvfs(self.file(folder)).expect("the file system is there");
        (found.f_blocks - found.f_bfree) * found.f_frsize
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

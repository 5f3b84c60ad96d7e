//! Files that the kernel reads in place of asking: they are named by an ioctl of the connection (`linux/fuse.h`).

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    descriptor: i32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`.
struct BackingOpen(BackingMap);

// SAFETY: the opcode is that of a write of a `BackingMap`, to which the pointer leads; the kernel only reads it, and its
// number is what the call returns.
unsafe impl Ioctl for BackingOpen {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<BackingMap>(229, 1)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(number: IoctlOutput, _: *mut c_void) -> rustix::io::Result<u32> {
        Ok(number as u32)
    }
}

/// The kernel's number of `file`, which it keeps open as long as the connection is.
pub(super) fn open(device: &OwnedFd, file: &File) -> io::Result<u32> {
    let map = BackingMap { descriptor: file.as_raw_fd(), flags: 0, padding: 0 };
    // SAFETY: see `BackingOpen`; on something that is no connection the call fails.
    Ok(unsafe { rustix::ioctl::ioctl(device, BackingOpen(map)) }?)
}

//! Disks as files, through FUSE. Reads that need the network are answered later, out of order; all others at once.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BackingId, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::Disk;

/// Attributes never change while mounted.
const TTL: Duration = Duration::from_secs(3600);
/// Answer the kernel. One of them may wait for the host's disk; two are left for all who read and write.
const THREADS: usize = 3;
const PUNCH_HOLE: i32 = 0x02;
const ZERO_RANGE: i32 = 0x10;
const KEEP_SIZE: i32 = 0x01;

/// A disk and the name of its file.
pub struct File {
    /// The file's name.
    pub name: String,
    /// What is in it.
    pub disk: Arc<Disk>,
    /// A local file that begins with exactly that and never changes. Then the kernel reads this one without asking, and keeps
    /// its pages once for all who are shown it. That takes root and Linux 6.9; else it asks as for others.
    pub backing: Option<std::fs::File>,
    /// Told when a read begins to wait for what is not here.
    pub waits: Option<Arc<Notify>>,
}

impl File {
    /// One that is read and written through this process.
    pub fn new(name: impl Into<String>, disk: Arc<Disk>) -> Self {
        Self { name: name.into(), disk, backing: None, waits: None }
    }
}

/// Why disks cannot be shown.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot mount the instance's disks at {}: {source}; check that /dev/fuse exists and, for an ordinary user, \
     that fusermount3 (package fuse3) is installed", path.display()
)]
pub struct MountError {
    path: PathBuf,
    source: io::Error,
}

/// The files, for as long as this value lives.
pub struct Mount {
    session: Option<BackgroundSession>,
    files: usize,
}

impl Mount {
    /// Mounts at the empty folder `path`. `owner` (user and group) may open the files; where it is another user than
    /// ours, only root can mount, and the folder above `path` has to keep everybody else out.
    pub fn new(path: &Path, files: Vec<File>, owner: Option<(u32, u32)>, runtime: Handle) -> Result<Self, MountError> {
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("collective".into()), MountOption::NoSuid, MountOption::NoDev];
        config.acl = if owner.is_some() { SessionACL::All } else { SessionACL::Owner };
        config.n_threads = Some(THREADS);
        let ours = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let count = files.len();
        let backings = files.iter().map(|_| OnceLock::new()).collect();
        let owner = owner.unwrap_or(ours);
        let disks = Disks { files, backings, owner, runtime, flushing: AtomicBool::new(false) };
        let session = Session::new(disks, path, &config).and_then(Session::spawn);
        let session = session.map_err(|source| MountError { path: path.to_owned(), source })?;
        Ok(Self { session: Some(session), files: count })
    }

    /// What the kernel has read of the files is read anew: it changed behind its back.
    pub fn forget_cached(&self) -> io::Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        let notifier = session.notifier();
        for index in 0..self.files {
            match notifier.inval_inode(INodeNo(index as u64 + 2), 0, 0) {
                // Nobody has looked at it yet.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    /// Unmounts and waits until it is done. Nothing may have a file open any more.
    pub fn unmount(mut self) -> io::Result<()> {
        self.session.take().map_or(Ok(()), BackgroundSession::umount_and_join)
    }
}

struct Disks {
    files: Vec<File>,
    /// What the kernel calls their backing files; none: it does not take it.
    backings: Vec<OnceLock<Option<BackingId>>>,
    owner: (u32, u32),
    runtime: Handle,
    /// One of the threads waits for a flush.
    flushing: AtomicBool,
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_i32(error.raw_os_error().unwrap_or(rustix::io::Errno::IO.raw_os_error()))
}

impl Disks {
    fn disk(&self, ino: INodeNo) -> Option<&Arc<Disk>> {
        let index = u64::from(ino).checked_sub(2)?;
        self.files.get(index as usize).map(|file| &file.disk)
    }

    fn waits(&self, ino: INodeNo) -> Option<&Arc<Notify>> {
        let index = u64::from(ino).checked_sub(2)?;
        self.files.get(index as usize)?.waits.as_ref()
    }

    /// The file that the kernel reads in place of asking.
    fn backing(&self, ino: INodeNo, reply: &ReplyOpen) -> Option<&BackingId> {
        let index = u64::from(ino).checked_sub(2)? as usize;
        let file = self.files.get(index)?.backing.as_ref()?;
        let take = || {
            let taken = reply.open_backing(file);
            taken.inspect_err(|error| tracing::info!(%error, "the kernel's pages are not shared with others")).ok()
        };
        self.backings.get(index)?.get_or_init(take).as_ref()
    }

    fn attr(&self, ino: u64) -> Option<FileAttr> {
        let (kind, perm, size) = match ino {
            1 => (FileType::Directory, 0o500, 0),
            _ => (FileType::RegularFile, 0o600, self.disk(INodeNo(ino))?.size()),
        };
        Some(FileAttr {
            ino: INodeNo(ino),
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }
}

impl Filesystem for Disks {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Larger requests, and more of them at once; each is only an upper bound.
        let _ = config.set_max_write(1 << 20);
        let _ = config.set_max_background(64);
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        if self.files.iter().any(|file| file.backing.is_some()) {
            let _ = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH);
            // The backing file may be on a file system that lies on another one itself, as those of containers do.
            let _ = config.set_max_stack_depth(2);
        }
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let index = self.files.iter().position(|file| name == file.name.as_str());
        let attr = index.filter(|_| u64::from(parent) == 1).and_then(|i| self.attr(i as u64 + 2));
        match attr {
            Some(attr) => reply.entry(&TTL, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(ino.into()) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if let Some(backing) = self.backing(ino, &reply) {
            return reply.opened_passthrough(FileHandle(0), FopenFlags::empty(), backing);
        }
        match self.disk(ino) {
            // All changes come through this mount, so what the kernel has cached stays right.
            Some(_) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let Some(disk) = self.disk(ino) else { return reply.error(Errno::ENOENT) };
        match disk.try_read(offset, size as usize) {
            Ok(Some(bytes)) => reply.data(&bytes),
            Err(error) => reply.error(errno(&error)),
            Ok(None) => {
                self.waits(ino).inspect(|waits| waits.notify_one());
                let disk = disk.clone();
                self.runtime.spawn(async move {
                    match disk.read(offset, size as usize).await {
                        Ok(bytes) => reply.data(&bytes),
                        Err(error) => reply.error(errno(&error)),
                    }
                });
            }
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let Some(disk) = self.disk(ino) else { return reply.error(Errno::ENOENT) };
        match disk.try_write(offset, data) {
            Ok(true) => reply.written(data.len() as u32),
            Err(error) => reply.error(errno(&error)),
            Ok(false) => {
                let (disk, data) = (disk.clone(), data.to_vec());
                self.runtime.spawn(async move {
                    match disk.write(offset, &data).await {
                        Ok(()) => reply.written(data.len() as u32),
                        Err(error) => reply.error(errno(&error)),
                    }
                });
            }
        }
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        let Some(disk) = self.disk(ino).cloned() else { return reply.error(Errno::ENOENT) };
        let flush = move || match disk.flush() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(&error)),
        };
        // Handing it to another thread takes as long as many a flush.
        if self.flushing.swap(true, Ordering::AcqRel) {
            self.runtime.spawn_blocking(flush);
        } else {
            flush();
            self.flushing.store(false, Ordering::Release);
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // Called when a descriptor is closed; durability is asked for by fsync.
        reply.ok();
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some(disk) = self.disk(ino).cloned() else { return reply.error(Errno::ENOENT) };
        if mode & !KEEP_SIZE != PUNCH_HOLE && mode & !KEEP_SIZE != ZERO_RANGE {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let inside = length.min(disk.size().saturating_sub(offset));
        if inside < length && mode & KEEP_SIZE == 0 {
            // The kernel would take the file for larger from then on.
            return reply.error(Errno::EFBIG);
        }
        // A machine that frees memory punches holes into what it is mapped from. That stays as it is, for others.
        if inside == 0 || disk.is_frozen() {
            return reply.ok();
        }
        self.runtime.spawn(async move {
            match disk.zero(offset, inside).await {
                Ok(()) => reply.ok(),
                Err(error) => reply.error(errno(&error)),
            }
        });
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if u64::from(ino) != 1 {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [(1, FileType::Directory, "."), (1, FileType::Directory, "..")].into_iter();
        let files = self.files.iter().enumerate();
        let files = files.map(|(i, file)| (i as u64 + 2, FileType::RegularFile, file.name.as_str()));
        for (i, (ino, kind, name)) in dots.chain(files).enumerate().skip(offset as usize) {
            if reply.add(INodeNo(ino), i as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

//! Disks as files, through FUSE. Reads that need the network are answered later, out of order; all others at once.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use crate::Disk;
use crate::fuse::wire::{self, Ask, Attributes};
use crate::fuse::{Connection, Reply, Serve};

/// Attributes never change while mounted.
const LIFETIME: Duration = Duration::from_secs(3600);
/// Answer the kernel. One of them may wait for the host's disk; two are left for all who read and write.
const THREADS: usize = 3;
/// The folder; files follow in their order.
const FOLDER: u64 = 1;
const FIRST: u64 = 2;
/// Kinds and permissions, as of stat(2).
const FOLDER_MODE: u32 = 0o040_500;
const FILE_MODE: u32 = 0o100_600;
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
    connection: Connection,
    files: usize,
}

impl Mount {
    /// Mounts at the empty folder `path`. `owner` (user and group) may open the files; where it is another user than
    /// ours, only root can mount, and the folder above `path` has to keep everybody else out.
    pub fn new(path: &Path, files: Vec<File>, owner: Option<(u32, u32)>, runtime: Handle) -> Result<Self, MountError> {
        let count = files.len();
        let disks = Disks::new(files, owner, runtime);
        let connection = Connection::mount(path, owner.is_some(), THREADS, disks);
        let connection = connection.map_err(|source| MountError { path: path.to_owned(), source })?;
        Ok(Self { connection, files: count })
    }

    /// Serves what a process that died had mounted at `path` and shown as the same files in the same order: `descriptor` is a
    /// duplicate of its [`descriptor`](Self::descriptor). Who had asked it for something only waited. Needs Linux 6.9.
    pub fn adopt(
        descriptor: OwnedFd,
        path: &Path,
        files: Vec<File>,
        owner: Option<(u32, u32)>,
        runtime: Handle,
    ) -> Result<Self, MountError> {
        let count = files.len();
        let disks = Disks::new(files, owner, runtime);
        let connection = Connection::adopt(descriptor, path, THREADS, disks);
        let connection = connection.map_err(|source| MountError { path: path.to_owned(), source })?;
        Ok(Self { connection, files: count })
    }

    /// A duplicate of the connection to the kernel: as long as somebody has one, the death of this process lets the files'
    /// users wait, for [`adopt`](Self::adopt), and not fail.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.connection.descriptor()
    }

    /// What the kernel has read of the files is read anew: it changed behind its back.
    pub fn forget_cached(&self) -> io::Result<()> {
        (0..self.files).try_for_each(|index| self.connection.forget(index as u64 + FIRST))
    }

    /// Unmounts and waits until it is done. Nothing may have a file open any more.
    pub fn unmount(self) -> io::Result<()> {
        self.connection.unmount()
    }
}

struct Disks {
    files: Vec<File>,
    /// The kernel's numbers of their backing files; none: it does not take it.
    backings: Vec<OnceLock<Option<u32>>>,
    owner: (u32, u32),
    runtime: Handle,
    /// One of the threads waits for a flush.
    flushing: AtomicBool,
}

/// Says how it went to who waits for it.
fn answer<T>(reply: Reply, outcome: io::Result<T>, with: impl FnOnce(Reply, T)) {
    match outcome {
        Ok(done) => with(reply, done),
        Err(error) => reply.failed(&error),
    }
}

impl Disks {
    fn new(files: Vec<File>, owner: Option<(u32, u32)>, runtime: Handle) -> Self {
        let backings = files.iter().map(|_| OnceLock::new()).collect();
        let ours = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Self { files, backings, owner: owner.unwrap_or(ours), runtime, flushing: AtomicBool::new(false) }
    }

    fn attributes(&self, node: u64) -> Option<Attributes> {
        let (mode, size) = match node.checked_sub(FIRST) {
            None => (FOLDER_MODE, 0),
            Some(index) => (FILE_MODE, self.files.get(index as usize)?.disk.size()),
        };
        Some(Attributes { node, size, mode, owner: self.owner })
    }

    fn lookup(&self, node: u64, name: &std::ffi::OsStr) -> Option<Attributes> {
        let index = self.files.iter().position(|file| name == file.name.as_str()).filter(|_| node == FOLDER)?;
        self.attributes(index as u64 + FIRST)
    }

    fn open(&self, index: usize, reply: Reply) {
        let take = |file: &std::fs::File| {
            let taken = reply.open_backing(file);
            taken.inspect_err(|error| tracing::info!(%error, "the kernel's pages are not shared with others")).ok()
        };
        let backing = self.files[index].backing.as_ref();
        let backing = backing.and_then(|file| *self.backings[index].get_or_init(|| take(file)));
        // All changes come through this mount, so what the kernel has cached stays right.
        reply.data(&wire::opened(backing));
    }

    fn read(&self, file: &File, offset: u64, size: usize, reply: Reply) {
        match file.disk.try_read(offset, size) {
            Ok(Some(bytes)) => reply.data(&bytes),
            Err(error) => reply.failed(&error),
            Ok(None) => {
                file.waits.iter().for_each(|waits| waits.notify_one());
                let disk = file.disk.clone();
                self.runtime.spawn(async move {
                    let bytes = disk.read(offset, size).await;
                    answer(reply, bytes, |reply, bytes| reply.data(&bytes));
                });
            }
        }
    }

    fn write(&self, disk: &Arc<Disk>, offset: u64, data: &[u8], reply: Reply) {
        match disk.try_write(offset, data) {
            Ok(true) => reply.data(&wire::written(data.len())),
            Err(error) => reply.failed(&error),
            Ok(false) => {
                let (disk, data) = (disk.clone(), data.to_vec());
                self.runtime.spawn(async move {
                    let done = disk.write(offset, &data).await;
                    answer(reply, done, |reply, ()| reply.data(&wire::written(data.len())));
                });
            }
        }
    }

    fn sync(&self, disk: &Arc<Disk>, reply: Reply) {
        let disk = disk.clone();
        let flush = move || answer(reply, disk.flush(), |reply, ()| reply.done());
        // Handing it to another thread takes as long as many a flush.
        if self.flushing.swap(true, Ordering::AcqRel) {
            self.runtime.spawn_blocking(flush);
        } else {
            flush();
            self.flushing.store(false, Ordering::Release);
        }
    }

    fn allocate(&self, disk: &Arc<Disk>, offset: u64, length: u64, mode: i32, reply: Reply) {
        if mode & !KEEP_SIZE != PUNCH_HOLE && mode & !KEEP_SIZE != ZERO_RANGE {
            return reply.refuse(Errno::OPNOTSUPP);
        }
        let inside = length.min(disk.size().saturating_sub(offset));
        if inside < length && mode & KEEP_SIZE == 0 {
            // The kernel would take the file for larger from then on.
            return reply.refuse(Errno::FBIG);
        }
        // A machine that frees memory punches holes into what it is mapped from. That stays as it is, for others.
        if inside == 0 || disk.is_frozen() {
            return reply.done();
        }
        let disk = disk.clone();
        self.runtime.spawn(async move {
            answer(reply, disk.zero(offset, inside).await, |reply, ()| reply.done());
        });
    }

    fn read_folder(&self, offset: u64, size: usize, reply: Reply) {
        let dots = [".", ".."].map(|name| (FOLDER, FOLDER_MODE, name));
        let files = (FIRST..).zip(&self.files).map(|(node, file)| (node, FILE_MODE, file.name.as_str()));
        let entries: Vec<_> = dots.into_iter().chain(files).collect();
        reply.data(&wire::folder(&entries, offset, size));
    }
}

impl Serve for Disks {
    fn wants_backing(&self) -> bool {
        self.files.iter().any(|file| file.backing.is_some())
    }

    fn serve(&self, node: u64, ask: Ask<'_>, reply: Reply) {
        let index = node.wrapping_sub(FIRST) as usize;
        let file = self.files.get(index);
        match (ask, file) {
            (Ask::Lookup(name), _) => match self.lookup(node, name) {
                Some(found) => reply.data(&wire::entry(&found, LIFETIME)),
                None => reply.refuse(Errno::NOENT),
            },
            (Ask::Attributes, _) => match self.attributes(node) {
                Some(found) => reply.data(&wire::attributes(&found, LIFETIME)),
                None => reply.refuse(Errno::NOENT),
            },
            (Ask::OpenFolder, _) => reply.data(&wire::opened(None)),
            (Ask::ReadFolder { offset, size }, None) => self.read_folder(offset, size as usize, reply),
            (Ask::Space, _) => reply.data(&wire::space()),
            // Durability is asked for by a sync of its own.
            (Ask::Release, _) => reply.done(),
            (Ask::Open, Some(_)) => self.open(index, reply),
            (Ask::Read { offset, size }, Some(file)) => self.read(file, offset, size as usize, reply),
            (Ask::Write { offset, data }, Some(file)) => self.write(&file.disk, offset, data, reply),
            (Ask::Sync, Some(file)) => self.sync(&file.disk, reply),
            (Ask::Allocate { offset, length, mode }, Some(file)) => {
                self.allocate(&file.disk, offset, length, mode, reply);
            }
            (Ask::Other, _) => reply.refuse(Errno::NOSYS),
            (_, None) => reply.refuse(Errno::NOENT),
            (_, Some(_)) => reply.refuse(Errno::NOTDIR),
        }
    }
}

//! The directory of one running machine: its sockets, the log of its serial line and of QEMU itself.
//!
//! QEMU may run as a user of its own and owns the directory then. So nothing in it is trusted by us: links are not
//! followed, and only regular files are read.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Uid, fchmod, fchown, openat, unlinkat};

use crate::machine::{InvalidMachine, check_path};

const QMP_SOCKET: &str = "qmp.sock";
const SERIAL_SOCKET: &str = "serial.sock";
const SERIAL_LOG: &str = "serial.log";
const QEMU_LOG: &str = "qemu.log";
const SCREEN: &str = "screen.png";
const DEVICES: &str = "devices";
/// Room of a unix socket's name in the kernel, with its end (sockaddr_un).
const SOCKET_NAME_ROOM: usize = 108;
/// A log of QEMU longer than this is started anew.
const LOG_LIMIT: u64 = 1 << 20;
/// What a guest writes to its serial line is begun anew when it is longer than this.
const SERIAL_LIMIT: u64 = 16 << 20;
const TAIL: u64 = 4096;
/// A picture of the largest screen is far below.
const SCREEN_LIMIT: u64 = 256 << 20;
/// The devices of usual machines take some 100 KiB.
const DEVICES_LIMIT: u64 = 256 << 20;

/// Why a machine's directory can not be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Its path can not be put on QEMU's command line.
    #[error(transparent)]
    Path(#[from] InvalidMachine),
    /// Sockets in it would have too long names.
    #[error("the run directory {path} is too long for unix sockets (at most {limit} bytes); choose a shorter one", path = path.display())]
    TooLong {
        /// The directory.
        path: PathBuf,
        /// Longest possible path, in bytes.
        limit: usize,
    },
    /// The system refused something.
    #[error("could not {doing} in the run directory {path}: {source}; check that it is ours and that the disk has room", path = path.display())]
    Io {
        /// What was attempted.
        doing: &'static str,
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A directory that is ready for QEMU.
pub(crate) struct RunDir {
    path: PathBuf,
    directory: OwnedFd,
    log: File,
    log_start: u64,
}

impl RunDir {
    /// Makes the directory if it is missing (not its parents), private to `user` or to us, and removes old sockets.
    pub(crate) fn prepare(path: &Path, user: Option<(u32, u32)>) -> Result<RunDir, RunDirError> {
        check_path("run_dir", path)?;
        let limit = SOCKET_NAME_ROOM - 1 - SERIAL_SOCKET.len() - 1;
        if path.as_os_str().len() > limit {
            return Err(RunDirError::TooLong { path: path.to_owned(), limit });
        }
        let io = |doing| move |source: io::Error| RunDirError::Io { doing, path: path.to_owned(), source };
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(io("make the directory")(error)),
            _ => {}
        }
        let RunDir { directory, log, log_start, .. } = Self::open(path, &[QMP_SOCKET, SERIAL_SOCKET, SCREEN, DEVICES])?;
        fchmod(&directory, Mode::RWXU).map_err(|errno| io("set the rights")(errno.into()))?;
        if let Some((uid, gid)) = user {
            fchown(&directory, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(|errno| io("give the directory to the machine's user")(errno.into()))?;
        }
        Ok(RunDir { path: path.to_owned(), directory, log, log_start })
    }

    /// The directory of a machine that runs, whose launcher died and may have left something half-way.
    pub(crate) fn adopt(path: &Path) -> Result<RunDir, RunDirError> {
        Self::open(path, &[SCREEN, DEVICES])
    }

    fn open(path: &Path, without: &[&str]) -> Result<RunDir, RunDirError> {
        let io = |doing| move |source: io::Error| RunDirError::Io { doing, path: path.to_owned(), source };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory =
            openat(CWD, path, flags, Mode::empty()).map_err(|errno| io("open it as a directory")(errno.into()))?;
        for name in without {
            match unlinkat(&directory, *name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(errno) => return Err(io("remove what an earlier machine left")(errno.into())),
            }
        }
        let log = open_log(&directory).map_err(io("open the log of QEMU"))?;
        let log_start = log.metadata().map_err(io("look at the log of QEMU"))?.len();
        Ok(RunDir { path: path.to_owned(), directory, log, log_start })
    }

    pub(crate) fn qmp_socket(&self) -> PathBuf {
        self.path.join(QMP_SOCKET)
    }

    pub(crate) fn serial_socket(&self) -> PathBuf {
        self.path.join(SERIAL_SOCKET)
    }

    pub(crate) fn serial_log(&self) -> PathBuf {
        self.path.join(SERIAL_LOG)
    }

    pub(crate) fn screen(&self) -> PathBuf {
        self.path.join(SCREEN)
    }

    /// Where QEMU writes its devices to, and reads them from.
    pub(crate) fn devices(&self) -> PathBuf {
        self.path.join(DEVICES)
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.path.join(QEMU_LOG)
    }

    /// The log, for QEMU's standard output and error.
    pub(crate) fn log(&self) -> io::Result<File> {
        self.log.try_clone()
    }

    /// The end of what QEMU wrote since this launch.
    pub(crate) fn log_tail(&self) -> String {
        let end = self.log.metadata().map_or(0, |metadata| metadata.len());
        let start = self.log_start.max(end.saturating_sub(TAIL));
        let mut tail = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0)];
        match self.log.read_exact_at(&mut tail, start) {
            Ok(()) => String::from_utf8_lossy(&tail).trim().to_owned(),
            Err(error) => format!("(its log could not be read: {error})"),
        }
    }

    /// Begins the log of the serial line anew if it is too long: a guest must not fill the host's disk with words. QEMU
    /// appends, so it goes on at the new end.
    pub(crate) fn trim_serial_log(&self) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let log = match openat(&self.directory, SERIAL_LOG, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(()),
            opened => File::from(opened?),
        };
        let metadata = log.metadata()?;
        if !metadata.is_file() || metadata.nlink() != 1 {
            return Err(io::Error::other(format!("{SERIAL_LOG} is not a plain file")));
        }
        if metadata.len() > SERIAL_LIMIT { log.set_len(0) } else { Ok(()) }
    }

    /// Takes the picture that QEMU wrote out of the directory.
    pub(crate) fn take_screen(&self, target: &Path) -> io::Result<()> {
        let picture = self.open_left(SCREEN, SCREEN_LIMIT)?;
        let copied = io::copy(&mut io::Read::take(&picture, SCREEN_LIMIT), &mut File::create(target)?)?;
        tracing::trace!(copied, "took a picture of the screen");
        unlinkat(&self.directory, SCREEN, AtFlags::empty())?;
        Ok(())
    }

    /// Takes the devices that QEMU wrote out of the directory.
    pub(crate) fn take_devices(&self) -> io::Result<Vec<u8>> {
        let file = self.open_left(DEVICES, DEVICES_LIMIT)?;
        let mut devices = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(&file, DEVICES_LIMIT), &mut devices)?;
        unlinkat(&self.directory, DEVICES, AtFlags::empty())?;
        Ok(devices)
    }

    /// Leaves devices for QEMU to read, which may run as `user`.
    pub(crate) fn leave_devices(&self, devices: &[u8], user: Option<(u32, u32)>) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(&self.directory, DEVICES, flags, Mode::RUSR)?);
        if let Some((uid, gid)) = user {
            fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        file.write_all_at(devices, 0)
    }

    /// Opens what QEMU left, if it is a plain file of a sensible length.
    fn open_left(&self, name: &str, limit: u64) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.directory, name, flags, Mode::empty())?);
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() > limit {
            return Err(io::Error::other(format!("QEMU left something else than \"{name}\"")));
        }
        Ok(file)
    }
}

fn open_log(directory: &OwnedFd) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let log = File::from(openat(directory, QEMU_LOG, flags, Mode::RUSR | Mode::WUSR)?);
    let metadata = log.metadata()?;
    // A second name could be one of a file outside that QEMU's user may not write.
    if !metadata.is_file() || metadata.nlink() != 1 {
        return Err(io::Error::other(format!("{QEMU_LOG} is not a plain file; remove it")));
    }
    if metadata.len() > LOG_LIMIT {
        log.set_len(0)?;
    }
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn it_is_made_private_and_keeps_the_log() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("run");
        let first = RunDir::prepare(&path, None).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o700);
        first.log().unwrap().write_all(b"old words\n").unwrap();
        assert_eq!(first.log_tail(), "old words");
        std::fs::write(path.join("qmp.sock"), "").unwrap();
        let second = RunDir::prepare(&path, None).unwrap();
        assert!(!second.qmp_socket().exists());
        assert_eq!(second.log_tail(), "");
        second.log().unwrap().write_all(b"new words\n").unwrap();
        assert_eq!(second.log_tail(), "new words");
        assert_eq!(std::fs::read_to_string(path.join("qemu.log")).unwrap(), "old words\nnew words\n");
    }

    #[test]
    fn the_serial_log_does_not_grow_without_end() {
        let temp = tempfile::tempdir().unwrap();
        let run = RunDir::prepare(&temp.path().join("run"), None).unwrap();
        run.trim_serial_log().unwrap();
        let mut guest = File::options().create(true).append(true).open(run.serial_log()).unwrap();
        guest.write_all(b"kept").unwrap();
        run.trim_serial_log().unwrap();
        assert_eq!(std::fs::read(run.serial_log()).unwrap(), b"kept");
        guest.set_len(SERIAL_LIMIT).unwrap();
        guest.write_all(b"too much").unwrap();
        run.trim_serial_log().unwrap();
        guest.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(run.serial_log()).unwrap(), b"new");
        let precious = temp.path().join("precious");
        File::create(&precious).unwrap().set_len(SERIAL_LIMIT + 1).unwrap();
        std::fs::remove_file(run.serial_log()).unwrap();
        symlink(&precious, run.serial_log()).unwrap();
        assert!(run.trim_serial_log().is_err());
        std::fs::remove_file(run.serial_log()).unwrap();
        std::fs::hard_link(&precious, run.serial_log()).unwrap();
        assert!(run.trim_serial_log().is_err());
        assert_eq!(std::fs::metadata(precious).unwrap().len(), SERIAL_LIMIT + 1);
    }

    #[test]
    fn links_and_bad_paths_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let target = temp.path().join("precious");
        std::fs::write(&target, "x").unwrap();
        let path = temp.path().join("run");
        std::fs::create_dir(&path).unwrap();
        symlink(&target, path.join("qemu.log")).unwrap();
        assert!(matches!(RunDir::prepare(&path, None), Err(RunDirError::Io { doing: "open the log of QEMU", .. })));
        std::fs::remove_file(path.join("qemu.log")).unwrap();
        std::fs::hard_link(&target, path.join("qemu.log")).unwrap();
        assert!(RunDir::prepare(&path, None).is_err());
        symlink(&path, temp.path().join("link")).unwrap();
        assert!(RunDir::prepare(&temp.path().join("link"), None).is_err());
        assert!(matches!(RunDir::prepare(Path::new("relative"), None), Err(RunDirError::Path(_))));
        let long = temp.path().join("x".repeat(100));
        assert!(matches!(RunDir::prepare(&long, None), Err(RunDirError::TooLong { .. })));
        assert!(matches!(RunDir::prepare(&temp.path().join("no/parent"), None), Err(RunDirError::Io { .. })));
    }
}

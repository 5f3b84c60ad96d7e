//! Images mounted by the kernel, until dropped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Every test of a program that mounts takes its turn: a process that another thread starts meanwhile would have the files
/// that are open here for a moment, and what has open files cannot be unmounted.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mounted image.
pub struct Mount {
    at: tempfile::TempDir,
}

impl Mount {
    /// As somebody who works with it.
    pub fn writable(directory: &Path, image: &Path) -> Mount {
        Self::with(directory, image, "loop").unwrap_or_else(|reason| panic!("{}: {reason}", image.display()))
    }

    /// As somebody who only compares; times of access stay as they are.
    pub fn read_only(directory: &Path, image: &Path) -> Mount {
        // The original and the result have the same identity, which XFS refuses to mount twice.
        let options = if is_xfs(image) { "loop,ro,nouuid" } else { "loop,ro" };
        Self::with(directory, image, options).unwrap_or_else(|reason| panic!("{}: {reason}", image.display()))
    }

    pub fn with(directory: &Path, image: &Path, options: &str) -> Result<Mount, String> {
        let at = tempfile::Builder::new().prefix("mount").tempdir_in(directory).unwrap();
        let output = command("mount").args(["-o", options]).args([image, at.path()]).output();
        told(output).map(|()| Mount { at })
    }

    pub fn path(&self) -> &Path {
        self.at.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = told(command("umount").arg(self.at.path()).output());
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

/// Whether images can be mounted here; if not, says why.
pub fn can_mount(directory: &Path) -> bool {
    let image: PathBuf = directory.join("try");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    super::run("mkfs.ext2", &["-q", image.to_str().unwrap()]);
    let result = Mount::with(directory, &image, "loop");
    if let Err(reason) = &result {
        eprintln!("skipped: only root with loop devices can mount images ({reason})");
    }
    result.is_ok()
}

fn is_xfs(image: &Path) -> bool {
    use std::io::Read;
    let mut mark = [0; 4];
    fs::File::open(image).and_then(|mut file| file.read_exact(&mut mark)).is_ok() && &mark == b"XFSB"
}

fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env("LC_ALL", "C");
    command
}

fn told(output: std::io::Result<Output>) -> Result<(), String> {
    let output = output.map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

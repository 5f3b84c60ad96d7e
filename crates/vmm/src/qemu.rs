//! Which QEMU this host has, and whether it will do.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

/// The program that runs machines of the only architecture we have tried.
const PROGRAM: &str = "qemu-system-x86_64";
/// Oldest release that was tried; see docs on how suspend relies on it.
const TESTED: (u32, u32, u32) = (10, 0, 0);
/// Oldest release that has all options used here, by its release notes only.
const OLDEST: (u32, u32, u32) = (8, 2, 0);
const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// A QEMU that was found and asked for its version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QemuInfo {
    /// Absolute path of the program.
    pub path: PathBuf,
    /// Major, minor, micro.
    pub version: (u32, u32, u32),
    /// What the user should know about this version, if anything.
    pub warning: Option<String>,
}

/// Why no usable QEMU was found.
#[derive(Debug, thiserror::Error)]
pub enum QemuError {
    /// There is no such program.
    #[error(
        "looked for {PROGRAM} in {searched:?} and did not find it; install QEMU 10.0 or newer (Debian: apt-get install qemu-system-x86, from backports on Debian 12)"
    )]
    Missing {
        /// The directories of `PATH`.
        searched: String,
    },
    /// It could not be run, or said something else than a version.
    #[error("asked {path} for its version, but {reason}; run it by hand with --version to see why, or reinstall qemu-system-x86", path = path.display())]
    Unusable {
        /// The program.
        path: PathBuf,
        /// What went wrong, in the system's or QEMU's own words.
        reason: String,
    },
    /// It is too old.
    #[error("{path} is QEMU {}.{}.{}, but 10.0 or newer is needed (8.2 at the least); install a newer one (Debian 12: apt-get install -t bookworm-backports qemu-system-x86)", version.0, version.1, version.2, path = path.display())]
    TooOld {
        /// The program.
        path: PathBuf,
        /// What it says it is.
        version: (u32, u32, u32),
    },
}

/// Looks for QEMU on `PATH` and in the usual directories, and asks it for its version.
pub async fn find_qemu() -> Result<QemuInfo, QemuError> {
    let path = search().ok_or_else(|| QemuError::Missing { searched: search_path() })?;
    let unusable = |reason: String| QemuError::Unusable { path: path.clone(), reason };
    let ask = Command::new(&path).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(VERSION_LIMIT, ask)
        .await
        .map_err(|_| unusable(format!("it did not answer in {} s", VERSION_LIMIT.as_secs())))?
        .map_err(|error| unusable(format!("it could not be run: {error}")))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&text).ok_or_else(|| {
        unusable(format!(
            "it answered {:?} and {:?}",
            first_line(&text),
            first_line(&String::from_utf8_lossy(&output.stderr))
        ))
    })?;
    judge(&path, version)
}

fn search_path() -> String {
    format!("{}:/usr/bin:/usr/local/bin", std::env::var("PATH").unwrap_or_default())
}

fn search() -> Option<PathBuf> {
    let candidates = std::env::split_paths(&search_path()).map(|dir| dir.join(PROGRAM)).collect::<Vec<_>>();
    // Absolute only: what a relative entry of PATH means depends on where we stand.
    candidates.into_iter().find(|path| path.is_absolute() && path.is_file())
}

fn judge(path: &Path, version: (u32, u32, u32)) -> Result<QemuInfo, QemuError> {
    if version < OLDEST {
        return Err(QemuError::TooOld { path: path.to_owned(), version });
    }
    let warning = (version < TESTED).then(|| {
        format!(
            "QEMU {}.{}.{} is untested; 10.0 or newer is what this program is tested with",
            version.0, version.1, version.2
        )
    });
    Ok(QemuInfo { path: path.to_owned(), version, warning })
}

/// `QEMU emulator version 10.0.2 (Debian ...)`.
fn parse_version(text: &str) -> Option<(u32, u32, u32)> {
    let rest = text.split_once("version ")?.1;
    let numbers = rest.split(|c: char| !(c.is_ascii_digit() || c == '.')).next()?;
    let mut parts = numbers.split('.').map(|part| part.parse::<u32>().ok());
    Some((parts.next()??, parts.next()??, parts.next().flatten().unwrap_or(0)))
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_what_qemu_prints() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright"), Some((10, 0, 2)));
        assert_eq!(parse_version("QEMU emulator version 8.2.0"), Some((8, 2, 0)));
        assert_eq!(parse_version("QEMU emulator version 9.1"), Some((9, 1, 0)));
        assert_eq!(parse_version("command not found"), None);
        assert_eq!(parse_version("version x.y"), None);
        assert_eq!(parse_version("version 99999999999999.1"), None);
    }

    #[test]
    fn old_versions_are_refused_and_untested_ones_named() {
        let path = Path::new("/q");
        let refused = judge(path, (7, 2, 22)).map_err(|error| error.to_string());
        assert!(refused.is_err_and(|text| text.contains("QEMU 7.2.22") && text.contains("install a newer one")));
        assert!(judge(path, (8, 2, 1)).is_ok_and(|info| info.warning.is_some_and(|text| text.contains("untested"))));
        assert!(judge(path, (10, 0, 2)).is_ok_and(|info| info.warning.is_none()));
    }

    #[tokio::test]
    async fn the_qemu_of_this_host_is_found() {
        let info = find_qemu().await.unwrap();
        assert!(info.path.is_absolute() && info.version >= OLDEST, "{info:?}");
    }
}

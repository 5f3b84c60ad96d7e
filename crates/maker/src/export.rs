//! `collective export`: a machine's disks become files that other hypervisors take.
//!
//! Knows raw disk files and a description of the machine, and not where they are from: a published version, or an
//! instance. Everything is made in a folder beside the target, which appears by one rename, so what is there is whole.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use collective_model::{DiskRole, Hardware, Name};

use crate::checksums;
use crate::disks::raw_to;
use crate::envelope::{DiskMember, envelope};

/// What is exported.
#[derive(Clone, Debug)]
pub struct Export {
    /// What the machine is called there.
    pub name: Name,
    /// One line for people, maybe empty.
    pub summary: String,
    /// What it is made of.
    pub hardware: Hardware,
    /// In the order in which the guest sees them.
    pub disks: Vec<ExportDisk>,
}

/// A disk of what is exported.
#[derive(Clone, Debug)]
pub struct ExportDisk {
    /// Its name.
    pub name: Name,
    /// What becomes of it; for people, as no other hypervisor knows of it.
    pub role: DiskRole,
    /// Its content, all of it: as long as the disk is large. The export uses the file up.
    pub raw: PathBuf,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// One disk, as it is.
    Raw,
    /// One disk for QEMU.
    Qcow2,
    /// The machine with all its disks.
    Ova,
}

impl ExportFormat {
    /// By the end of the file's name.
    pub fn of(file: &Path) -> Option<Self> {
        match file.extension()?.to_str()? {
            "raw" | "img" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "ova" => Some(Self::Ova),
            _ => None,
        }
    }
}

/// Why an export fails.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file system says no.
    #[error("cannot {attempt} {}: {source}", path.display())]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A disk cannot be written in the format.
    #[error("cannot convert disk \"{disk}\" to {format}: {why}")]
    Convert {
        /// Which.
        disk: Name,
        /// To what.
        format: &'static str,
        /// Why.
        why: String,
    },
    /// The format has room for one disk.
    #[error("{} can hold one disk, and {count} were to be written; choose one, or end its name in .ova", path.display())]
    OneDisk {
        /// The target.
        path: PathBuf,
        /// How many.
        count: usize,
    },
    /// There is something already.
    #[error("{} is there already; remove it or name another file", .0.display())]
    Occupied(PathBuf),
}

fn io_error(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    let path = path.to_owned();
    move |source| ExportError::Io { attempt, path, source }
}

/// Writes the machine into `to`, which must not exist; tells `progress` what it is at.
pub fn export(
    machine: &Export,
    to: &Path,
    format: ExportFormat,
    progress: &mut dyn FnMut(&str),
) -> Result<(), ExportError> {
    if to.symlink_metadata().is_ok() {
        return Err(ExportError::Occupied(to.to_owned()));
    }
    let beside = to.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = tempfile::Builder::new().prefix(".export-").suffix(".part").tempdir_in(beside);
    let folder = folder.map_err(io_error("write beside", to))?;
    let whole = match (format, machine.disks.as_slice()) {
        (ExportFormat::Ova, _) => ova(machine, folder.path(), progress)?,
        (ExportFormat::Raw, [disk]) => bring(disk, &folder.path().join("disk.raw"))?,
        (ExportFormat::Qcow2, [disk]) => convert(disk, "qcow2", &["qcow2"], &folder.path().join("disk.qcow2"))?,
        (_, disks) => return Err(ExportError::OneDisk { path: to.to_owned(), count: disks.len() }),
    };
    File::open(&whole).and_then(|file| file.sync_all()).map_err(io_error("finish", to))?;
    let whole = tempfile::TempPath::try_from_path(&whole).map_err(io_error("finish", to))?;
    // What somebody else wrote there meanwhile stays.
    whole.persist_noclobber(to).map_err(|e| match e.error.kind() {
        io::ErrorKind::AlreadyExists => ExportError::Occupied(to.to_owned()),
        _ => io_error("finish", to)(e.error),
    })
}

fn convert(disk: &ExportDisk, format: &'static str, options: &[&str], to: &Path) -> Result<PathBuf, ExportError> {
    let failed = |why| ExportError::Convert { disk: disk.name.clone(), format, why };
    raw_to(options, &disk.raw, to).map_err(failed)?;
    // There would be three copies of every disk.
    std::fs::remove_file(&disk.raw).map_err(io_error("remove", &disk.raw))?;
    Ok(to.to_owned())
}

/// Moves the disk, or copies it from another file system.
fn bring(disk: &ExportDisk, to: &Path) -> Result<PathBuf, ExportError> {
    match std::fs::rename(&disk.raw, to) {
        Ok(()) => Ok(to.to_owned()),
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => convert(disk, "raw", &["raw"], to),
        Err(error) => Err(io_error("read", &disk.raw)(error)),
    }
}

/// An archive as DSP0243 has it: the descriptor, the manifest, and the disks in the order of the descriptor.
fn ova(machine: &Export, folder: &Path, progress: &mut dyn FnMut(&str)) -> Result<PathBuf, ExportError> {
    let mut members = Vec::new();
    let mut sums = String::new();
    for (index, disk) in machine.disks.iter().enumerate() {
        progress(&format!("compressing disk {} of {}", index + 1, machine.disks.len()));
        let capacity = disk.raw.metadata().map_err(io_error("read", &disk.raw))?.len();
        let file = format!("{}-disk{}.vmdk", machine.name, index + 1);
        let vmdk = folder.join(&file);
        convert(disk, "vmdk", &["vmdk", "-o", "subformat=streamOptimized"], &vmdk)?;
        let length = vmdk.metadata().map_err(io_error("read", &vmdk))?.len();
        let (line, sum) = checksums::line(&file, &vmdk).map_err(io_error("read", &vmdk))?;
        sums += &line;
        members.push(DiskMember { file, length, capacity, sum });
    }
    progress("packing");
    let path = folder.join("whole.ova");
    let written = pack(machine, folder, &members, &sums, &path);
    written.map_err(io_error("write", &path))?;
    Ok(path)
}

fn pack(machine: &Export, folder: &Path, members: &[DiskMember], sums: &str, to: &Path) -> io::Result<()> {
    let name = &machine.name;
    let (ovf, mf) = (format!("{name}.ovf"), format!("{name}.mf"));
    std::fs::write(folder.join(&ovf), envelope(machine, members))?;
    let (line, _) = checksums::line(&ovf, &folder.join(&ovf))?;
    std::fs::write(folder.join(&mf), line + sums)?;
    let mut archive = tar::Builder::new(File::create_new(to)?);
    for name in [&ovf, &mf].into_iter().chain(members.iter().map(|member| &member.file)) {
        let path = folder.join(name);
        let file = File::open(&path)?;
        let length = file.metadata()?.len();
        // Nothing of this host gets into the archive. A file of more than 8 GiB gets GNU's length: ustar has none.
        let mut header = tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_mode(0o644);
        header.set_size(length);
        header.set_cksum();
        archive.append(&header, file.take(length))?;
        std::fs::remove_file(&path)?;
    }
    archive.into_inner()?.sync_all()
}

#[cfg(test)]
#[path = "export_tests.rs"]
mod tests;

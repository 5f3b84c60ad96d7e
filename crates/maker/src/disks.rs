//! Disk files as they are published: any format that qemu-img reads, looked into for what need not be stored.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use collective_model::{Recipe, RecipeDisk};

/// A disk ready to be published.
pub struct PreparedDisk {
    /// As the recipe describes it.
    pub disk: RecipeDisk,
    /// Its content, if it has any.
    pub content: Option<DiskFile>,
    /// In bytes.
    pub size: u64,
}

/// Raw content.
pub struct DiskFile {
    /// Open for reading.
    pub file: std::fs::File,
    /// Ranges that no file system needs.
    pub unused: Vec<Range<u64>>,
    /// What could not be looked into, for people.
    pub notes: Vec<String>,
    /// A raw copy of another format lives as long as this.
    _converted: Option<tempfile::TempPath>,
}

/// Why a disk file cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum DisksError {
    /// The file cannot be read.
    #[error("cannot read the disk file {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no disk.
    #[error("{} is not a disk image: {why}", path.display())]
    NotADisk {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// The recipe says something impossible about it.
    #[error("disk \"{0}\" has {1} bytes in its file and {2} in appliance.toml; a disk can be made larger, not smaller")]
    TooLarge(String, u64, u64),
}

/// Opens all disks of the appliance in `folder`.
pub fn open_disks(folder: &Path, recipe: &Recipe) -> Result<Vec<PreparedDisk>, DisksError> {
    recipe.disks.iter().map(|disk| open_disk(folder, disk)).collect()
}

fn open_disk(folder: &Path, disk: &RecipeDisk) -> Result<PreparedDisk, DisksError> {
    let wanted = disk.size.map(|size| size.0);
    let Some(file) = &disk.file else {
        return Ok(PreparedDisk { disk: disk.clone(), content: None, size: wanted.unwrap_or(0) });
    };
    let content = open_file(&folder.join(file))?;
    let path = folder.join(file);
    let has = content.file.metadata().map_err(|source| DisksError::Read { path, source })?.len();
    let size = wanted.unwrap_or(has);
    if size < has {
        return Err(DisksError::TooLarge(disk.name.to_string(), has, size));
    }
    Ok(PreparedDisk { disk: disk.clone(), content: Some(content), size })
}

fn open_file(path: &Path) -> Result<DiskFile, DisksError> {
    let read = |source| DisksError::Read { path: path.to_owned(), source };
    let not = |why: String| DisksError::NotADisk { path: path.to_owned(), why };
    let mut file = std::fs::File::open(path).map_err(read)?;
    let meta = file.metadata().map_err(read)?;
    if !meta.is_file() {
        return Err(not("it is not a file".into()));
    }
    if meta.len() == 0 {
        return Err(not("it is empty".into()));
    }
    let converted = convert(path)?;
    if let Some(raw) = &converted {
        file = std::fs::File::open(raw).map_err(read)?;
    }
    let size = file.metadata().map_err(read)?.len();
    if !size.is_multiple_of(512) {
        return Err(not(format!("its length of {size} bytes is not a multiple of 512")));
    }
    let survey = collective_disk::unused(&file).map_err(|e| not(e.to_string()))?;
    Ok(DiskFile { file, unused: survey.unused, notes: survey.notes, _converted: converted })
}

/// A raw copy of a disk in another format; `None` if it is raw.
fn convert(path: &Path) -> Result<Option<tempfile::TempPath>, DisksError> {
    let Some(format) = format_of(path).map_err(|source| DisksError::Read { path: path.to_owned(), source })? else {
        return Ok(None);
    };
    let folder = path.parent().unwrap_or(Path::new("."));
    let raw = tempfile::Builder::new().prefix(".converted-").tempfile_in(folder);
    let raw = raw.map_err(|source| DisksError::Read { path: path.to_owned(), source })?.into_temp_path();
    raw_copy(path, format, &raw, u64::MAX)?;
    Ok(Some(raw))
}

/// Writes the disk in `path` as raw into `to`; it must refer to no other file and have at most `limit` bytes.
pub(crate) fn raw_copy(path: &Path, format: &str, to: &Path, limit: u64) -> Result<(), DisksError> {
    let not = |why: String| DisksError::NotADisk { path: path.to_owned(), why };
    let read = |source| DisksError::Read { path: path.to_owned(), source };
    let elsewhere = || not("it refers to another file; convert it to a file of its own with qemu-img".into());
    // The format is named, never guessed, and what refers to another file is refused, before qemu-img opens it too: a
    // disk file must not be able to pull /etc/shadow into an appliance.
    if refers(path, format).map_err(read)? {
        return Err(elsewhere());
    }
    // A full path is never taken for an option or a protocol.
    let path = path.canonicalize().map_err(read)?;
    let info = qemu_img(&["info", "--output=json", "-f", format], &path, None).map_err(&not)?;
    let info: serde_json::Value = serde_json::from_slice(&info).map_err(|e| not(e.to_string()))?;
    let extents = info.pointer("/format-specific/data/extents").and_then(|extents| extents.as_array());
    let own = |extent: &serde_json::Value| {
        let name = extent.get("filename").and_then(serde_json::Value::as_str);
        name.is_some_and(|name| Path::new(name) == path)
    };
    if info.get("backing-filename").is_some()
        || info.pointer("/format-specific/data/data-file").is_some()
        || !extents.is_none_or(|extents| extents.iter().all(own))
    {
        return Err(elsewhere());
    }
    let size = info.get("virtual-size").and_then(serde_json::Value::as_u64).unwrap_or(u64::MAX);
    if size > limit {
        return Err(not(format!(
            "it holds a disk of {size} bytes, more than the {limit} that are declared or possible"
        )));
    }
    qemu_img(&["convert", "-f", format, "-O", "raw"], &path, Some(to)).map_err(not)?;
    Ok(())
}

/// Writes the raw disk `raw` in another format, with the arguments of qemu-img that name it, into `to`.
pub(crate) fn raw_to(format: &[&str], raw: &Path, to: &Path) -> Result<(), String> {
    // A full path is never taken for an option or a protocol.
    let full = |path: &Path| std::path::absolute(path).map_err(|e| e.to_string());
    qemu_img(&[&["convert", "-f", "raw", "-O"], format].concat(), &full(raw)?, Some(&full(to)?)).map(drop)
}

/// Whether the image's own header says that its content is elsewhere.
fn refers(path: &Path, format: &str) -> std::io::Result<bool> {
    let head = head_of(path)?;
    let number = |at: usize| head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_be_bytes);
    Ok(match format {
        // A backing file, or a data file (incompatible feature 2, since version 3).
        "qcow2" => number(8) != 0 || (head.get(7).is_some_and(|version| *version >= 3) && number(72) & 4 != 0),
        // A text is about other files, and so is a header without a capacity.
        "vmdk" => !head.starts_with(b"KDMV") || number(12) == 0,
        _ => false,
    })
}

fn head_of(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read;
    let mut head = Vec::new();
    std::fs::File::open(path)?.take(4096).read_to_end(&mut head)?;
    Ok(head)
}

fn qemu_img(arguments: &[&str], path: &Path, to: Option<&Path>) -> Result<Vec<u8>, String> {
    let output = Command::new("qemu-img").args(arguments).arg(path).args(to).output();
    let output = output.map_err(|e| format!("qemu-img cannot be run ({e}); install the package qemu-utils"))?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(format!("qemu-img says: {}", String::from_utf8_lossy(&output.stderr).trim()))
    }
}

/// The format by its magic number; `None` is raw.
pub(crate) fn format_of(path: &Path) -> std::io::Result<Option<&'static str>> {
    let head = head_of(path)?;
    let has = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    Ok(match () {
        () if has(0, b"QFI\xfb") => Some("qcow2"),
        () if has(0, b"KDMV") || has(0, b"# Disk DescriptorFile") => Some("vmdk"),
        () if has(0x40, &[0x7f, 0x10, 0xda, 0xbe]) => Some("vdi"),
        () if has(0, b"vhdxfile") => Some("vhdx"),
        () => None,
    })
}

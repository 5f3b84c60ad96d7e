//! `collective import`: a disk image or a virtual machine from elsewhere becomes a folder that `publish` takes.
//!
//! Everything is made in `DIR.part` and appears by one rename, so what is there is whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use collective_model::{
    ApplianceName, ByteSize, DiskRole, Firmware, Name, Port, Protocol, Recipe, RecipeDisk, RecipeHardware,
    SystemWrites, VersionName,
};

use crate::checksums::{Checksums, MAX_MF_BYTES};
use crate::disks::{DisksError, format_of, raw_copy};
use crate::ova;
use crate::ovf::{self, MAX_OVF_BYTES, Ovf, OvfDisk};

/// As the manifest has it.
const MAX_DISKS: usize = 16;
const MAX_DISK_BYTES: u64 = 64 << 40;

/// What to import, and what the maker says about it; what is `None` is taken from the file.
#[derive(Clone, Debug)]
pub struct Import {
    /// A disk image, an OVA or an OVF.
    pub file: PathBuf,
    /// The appliance it becomes.
    pub appliance: ApplianceName,
    /// The version it becomes.
    pub version: VersionName,
    /// The folder to make.
    pub out: PathBuf,
    /// What its disks are.
    pub role: DiskRole,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory.
    pub memory: Option<ByteSize>,
    /// What starts the boot loader.
    pub firmware: Option<Firmware>,
    /// Guest ports that users may publish.
    pub ports: Vec<u16>,
}

/// What was made.
#[derive(Clone, Debug)]
pub struct Imported {
    /// Where it is.
    pub folder: PathBuf,
    /// As `appliance.toml` has it.
    pub recipe: Recipe,
}

/// Why an import fails.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
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
    /// A disk cannot be read.
    #[error(transparent)]
    Disk(#[from] DisksError),
    /// The file is not something to import.
    #[error("cannot import {}: {why}", path.display())]
    Refused {
        /// Which file.
        path: PathBuf,
        /// Why, and what to do.
        why: String,
    },
    /// There is something already.
    #[error("{} is there already; name another folder with --out, or remove it", .0.display())]
    Occupied(PathBuf),
}

fn io_error(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImportError {
    let path = path.to_owned();
    move |source| ImportError::Io { attempt, path, source }
}

fn refused(path: &Path, why: impl Into<String>) -> ImportError {
    ImportError::Refused { path: path.to_owned(), why: why.into() }
}

/// The folder while it is being made; it goes away unless it is finished.
struct Part(PathBuf);

const MARK: &str = ".collective-import";

impl Part {
    /// Makes `OUT.part`, in place of what an interrupted import left there.
    fn create(out: &Path) -> Result<Self, ImportError> {
        let free = match std::fs::read_dir(out) {
            Ok(mut entries) => entries.next().is_none(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if !free {
            return Err(ImportError::Occupied(out.to_owned()));
        }
        let mut name = out.file_name().ok_or_else(|| refused(out, "it is no name of a folder to make"))?.to_owned();
        name.push(".part");
        let path = out.with_file_name(name);
        if path.join(MARK).is_file() {
            std::fs::remove_dir_all(&path).map_err(io_error("clear", &path))?;
        }
        std::fs::create_dir_all(out.parent().unwrap_or(Path::new("."))).map_err(io_error("create", out))?;
        std::fs::create_dir(&path).map_err(io_error("create", &path))?;
        let part = Self(path);
        File::create(part.0.join(MARK)).map_err(io_error("write into", &part.0))?;
        for folder in [part.folder(), part.unpacked()] {
            std::fs::create_dir(&folder).map_err(io_error("create", &folder))?;
        }
        Ok(part)
    }

    /// What becomes the result.
    fn folder(&self) -> PathBuf {
        self.0.join("appliance")
    }

    fn unpacked(&self) -> PathBuf {
        self.0.join("unpacked")
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // What stays is marked, and cleared by the next import.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Makes the folder; tells `progress` what it is at.
pub fn import(import: &Import, progress: &mut dyn FnMut(&str)) -> Result<Imported, ImportError> {
    let meta = std::fs::metadata(&import.file).map_err(io_error("read", &import.file))?;
    if !meta.is_file() || meta.len() == 0 {
        return Err(refused(&import.file, "it is empty or no file; give a disk image, an OVA or an OVF"));
    }
    let part = Part::create(&import.out)?;
    let (machine, files) = open(&import.file, &part.unpacked(), progress)?;
    check_hardware(import, &machine)?;
    let mut disks = Vec::new();
    for (index, disk) in machine.disks.iter().enumerate() {
        progress(&format!("reading disk {} of {}", index + 1, machine.disks.len()));
        let source = disk.file.as_ref().and_then(|name| files.get(name));
        disks.push(write_disk(import, disk, source, index + 1, &part.folder())?);
    }
    let recipe = recipe(import, &machine, disks)?;
    let path = part.folder().join("appliance.toml");
    let text = toml::to_string(&recipe).map_err(|e| io_error("write", &path)(io::Error::other(e)))?;
    Recipe::parse(&text).map_err(|e| refused(&import.file, format!("what it makes is no appliance: {e}")))?;
    std::fs::write(&path, text).map_err(io_error("write", &path))?;
    File::open(&path).and_then(|file| file.sync_all()).map_err(io_error("write", &path))?;
    std::fs::rename(part.folder(), &import.out).map_err(io_error("finish", &import.out))?;
    Ok(Imported { folder: import.out.clone(), recipe })
}

/// What the machine is, and where the files are that its disks name.
type Machine = (Ovf, BTreeMap<String, PathBuf>);

fn open(path: &Path, unpacked: &Path, progress: &mut dyn FnMut(&str)) -> Result<Machine, ImportError> {
    let mut head = Vec::new();
    let file = File::open(path).map_err(io_error("read", path))?;
    file.take(512).read_to_end(&mut head).map_err(io_error("read", path))?;
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase()).unwrap_or_default();
    if extension == "ova" || head.get(257..262) == Some(b"ustar") {
        let why = |e: io::Error| refused(path, format!("{e}; get the archive again"));
        let (descriptor, manifest) = ova::descriptor(path).map_err(why)?;
        let machine = machine(path, &descriptor.1)?;
        let wanted = wanted(&machine);
        let files = ova::unpack(path, &wanted, unpacked).map_err(why)?;
        if let Some(name) = wanted.keys().find(|name| !files.contains_key(*name)) {
            return Err(refused(path, format!("its disk file {name:?} is missing; get the archive again")));
        }
        if let Some(manifest) = manifest {
            check_files(path, &manifest, &descriptor, &files, progress)?;
        }
        return Ok((machine, files));
    }
    let start = String::from_utf8_lossy(&head);
    let start = start.trim_start_matches('\u{feff}').trim_start();
    if extension == "ovf" || start.starts_with("<?xml") || start.starts_with("<Envelope") {
        return open_ovf(path, progress);
    }
    if let Some(what) = not_a_disk(path, &head).map_err(io_error("read", path))? {
        return Err(refused(path, what));
    }
    let disk = OvfDisk { file: Some(String::new()), file_size: None, capacity: 0, unit: MAX_DISK_BYTES };
    let machine = Ovf { disks: vec![disk], ..Ovf::default() };
    Ok((machine, BTreeMap::from([(String::new(), path.to_owned())])))
}

fn open_ovf(path: &Path, progress: &mut dyn FnMut(&str)) -> Result<Machine, ImportError> {
    let text = read_text(path, MAX_OVF_BYTES)?;
    let machine = machine(path, &text)?;
    let mut files = BTreeMap::new();
    for (name, declared) in wanted(&machine) {
        let file = path.with_file_name(&name);
        let meta = std::fs::symlink_metadata(&file).map_err(io_error("read the disk file", &file))?;
        if !meta.is_file() || declared.is_some_and(|declared| declared != meta.len()) {
            return Err(refused(&file, "it is no ordinary file, or not as long as the OVF says; get it again"));
        }
        files.insert(name, file);
    }
    let manifest = path.with_extension("mf");
    match std::fs::symlink_metadata(&manifest) {
        Ok(meta) if meta.is_file() => {
            let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let manifest = (name(&manifest), read_text(&manifest, MAX_MF_BYTES)?);
            check_files(path, &manifest, &(name(path), text), &files, progress)?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Ok(_) => return Err(refused(path, format!("its manifest {} is no ordinary file", manifest.display()))),
        Err(error) => return Err(io_error("read the manifest", &manifest)(error)),
    }
    Ok((machine, files))
}

fn read_text(path: &Path, limit: u64) -> Result<String, ImportError> {
    let mut text = String::new();
    let file = File::open(path).map_err(io_error("read", path))?;
    let size = file.take(limit + 1).read_to_string(&mut text).map_err(io_error("read", path))?;
    if size as u64 > limit {
        return Err(refused(path, format!("it is longer than {limit} bytes")));
    }
    Ok(text)
}

/// Refuses the package if a file that is used is not as its manifest has it.
fn check_files(
    path: &Path,
    manifest: &ova::Text,
    descriptor: &ova::Text,
    files: &BTreeMap<String, PathBuf>,
    progress: &mut dyn FnMut(&str),
) -> Result<(), ImportError> {
    let differs = |why: String| {
        let manifest = &manifest.0;
        refused(
            path,
            format!("its manifest {manifest:?} {why}; get it again, or remove the manifest if you changed a file"),
        )
    };
    progress("comparing the files with their manifest");
    let checksums = Checksums::parse(&manifest.1).map_err(differs)?;
    checksums.check(&descriptor.0, &mut descriptor.1.as_bytes()).map_err(differs)?;
    for (name, file) in files {
        let mut file = File::open(file).map_err(io_error("read", file))?;
        checksums.check(name, &mut file).map_err(differs)?;
    }
    Ok(())
}

fn machine(path: &Path, text: &str) -> Result<Ovf, ImportError> {
    let machine = ovf::parse(text).map_err(|why| refused(path, format!("its OVF descriptor cannot be used: {why}")))?;
    if let Some(name) = machine.disks.iter().filter_map(|disk| disk.file.as_ref()).find(|name| !ova::is_plain(name)) {
        let name: String = name.chars().take(80).collect();
        return Err(refused(path, format!("its disk file {name:?} is not a file beside the descriptor")));
    }
    Ok(machine)
}

fn wanted(machine: &Ovf) -> BTreeMap<String, Option<u64>> {
    machine.disks.iter().filter_map(|disk| Some((disk.file.clone()?, disk.file_size))).collect()
}

/// Why a file that would pass as raw is none.
fn not_a_disk(path: &Path, head: &[u8]) -> io::Result<Option<&'static str>> {
    use std::io::{Seek, SeekFrom};
    const PACKED: [&[u8]; 5] = [b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh"];
    if PACKED.iter().any(|magic| head.starts_with(magic)) {
        return Ok(Some("it is compressed; unpack it first"));
    }
    let mut file = File::open(path)?;
    let mut foot = Vec::new();
    file.seek(SeekFrom::Start(file.metadata()?.len().saturating_sub(512)))?;
    file.take(512).read_to_end(&mut foot)?;
    let vhd = head.starts_with(b"conectix") || foot.starts_with(b"conectix");
    Ok(vhd.then_some("it is a VHD; convert it first: qemu-img convert -f vpc -O qcow2 FILE disk.qcow2"))
}

fn check_hardware(import: &Import, machine: &Ovf) -> Result<(), ImportError> {
    let cpus = import.cpus.or(machine.cpus).unwrap_or(1);
    if !(1..=255).contains(&cpus) {
        return Err(refused(&import.file, format!("a machine cannot have {cpus} CPUs; give 1 to 255 with --cpus")));
    }
    let memory = import.memory.map(|memory| memory.0).or(machine.memory).unwrap_or(1 << 29);
    if !(1 << 20..=16 << 40).contains(&memory) {
        return Err(refused(&import.file, format!("memory of {memory} bytes is impossible; give some with --memory")));
    }
    if !(1..=MAX_DISKS).contains(&machine.disks.len()) {
        let has = machine.disks.len();
        return Err(refused(&import.file, format!("it has {has} disks; an appliance has 1 to {MAX_DISKS}")));
    }
    if import.ports.contains(&0) {
        return Err(refused(&import.file, "there is no port 0; give 1 to 65535 with --port"));
    }
    Ok(())
}

fn name(text: &str) -> Result<Name, ImportError> {
    text.parse().map_err(|e| refused(Path::new(text), format!("{e}")))
}

fn write_disk(
    import: &Import,
    disk: &OvfDisk,
    source: Option<&PathBuf>,
    number: usize,
    folder: &Path,
) -> Result<RecipeDisk, ImportError> {
    let capacity = disk.capacity.checked_next_multiple_of(512).filter(|capacity| *capacity <= MAX_DISK_BYTES);
    let capacity = capacity.ok_or_else(|| refused(&import.file, "it declares a disk larger than 64 TiB"))?;
    let mut written = RecipeDisk {
        name: name(&format!("disk{number}"))?,
        role: import.role,
        writes: SystemWrites::default(),
        file: None,
        size: Some(ByteSize(capacity)),
    };
    let Some(source) = source else {
        // Nothing is in it that a version could bring.
        written.role = DiskRole::Data;
        let empty = || refused(&import.file, "it declares an empty disk of no size");
        return if capacity == 0 { Err(empty()) } else { Ok(written) };
    };
    let file = format!("disk{number}.raw");
    let to = folder.join(&file);
    let format = format_of(source).map_err(io_error("read", source))?.unwrap_or("raw");
    let length = std::fs::metadata(source).map_err(io_error("read", source))?.len();
    if format == "raw" && (length == 0 || !length.is_multiple_of(512)) {
        let why = "it is in no known format, and its length is not that of a raw disk (a multiple of 512)";
        return Err(refused(source, why));
    }
    // A capacity in larger units may be rounded down.
    let limit = capacity.saturating_add(disk.unit - 1).min(MAX_DISK_BYTES);
    raw_copy(source, format, &to, limit)?;
    let raw = File::open(&to).map_err(io_error("read", &to))?;
    raw.sync_all().map_err(io_error("write", &to))?;
    let size = raw.metadata().map_err(io_error("read", &to))?.len();
    written.file = Some(file.into());
    written.size = (capacity > size).then_some(ByteSize(capacity));
    Ok(written)
}

fn recipe(import: &Import, machine: &Ovf, disks: Vec<RecipeDisk>) -> Result<Recipe, ImportError> {
    let default = RecipeHardware::default();
    let memory = import.memory.map(|memory| memory.0).or(machine.memory).unwrap_or(default.memory.0);
    let firmware = if machine.uefi { Firmware::Uefi } else { Firmware::Bios };
    let mut ports = Vec::new();
    for guest in import.ports.iter().copied().collect::<std::collections::BTreeSet<_>>() {
        let known = [(22, "ssh"), (80, "http"), (443, "https")].into_iter().find(|(port, _)| *port == guest);
        let text = known.map_or_else(|| format!("port{guest}"), |(_, name)| name.to_owned());
        ports.push(Port { name: name(&text)?, guest, protocol: Protocol::Tcp });
    }
    Ok(Recipe {
        publisher: import.appliance.publisher.clone(),
        name: import.appliance.name.clone(),
        version: Some(import.version.clone()),
        summary: machine.summary.clone(),
        hardware: RecipeHardware {
            cpus: import.cpus.or(machine.cpus).unwrap_or(default.cpus),
            memory: ByteSize(memory.next_multiple_of(1 << 20)),
            firmware: import.firmware.unwrap_or(firmware),
            display: default.display,
            cpu: default.cpu,
        },
        disks,
        ports,
        health: None,
        settings: BTreeMap::new(),
        cloud_init: None,
        ssh: None,
        build: None,
    })
}

#[cfg(test)]
#[path = "import_tests.rs"]
mod tests;

//! OVF descriptors: what a machine from elsewhere says about itself, read with suspicion.
//!
//! Only what an appliance can use is read. Whatever the text says, memory stays bounded: no entities, no document type,
//! no deep nesting, no long values.

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// No descriptor is longer than this, in bytes.
pub(crate) const MAX_OVF_BYTES: u64 = 4 << 20;
const MAX_DEPTH: usize = 64;
const MAX_VALUE: usize = 4096;
/// Files, disks or hardware items of one descriptor.
const MAX_PARTS: usize = 1024;

/// What an OVF descriptor says, as far as an appliance can honour it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ovf {
    /// One line for people, maybe empty.
    pub summary: String,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// Memory in bytes.
    pub memory: Option<u64>,
    /// Whether it is started by UEFI.
    pub uefi: bool,
    /// In the order of the hardware.
    pub disks: Vec<OvfDisk>,
}

/// A disk of an OVF descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OvfDisk {
    /// The file with its content, as the descriptor names it; `None` for an empty disk.
    pub file: Option<String>,
    /// The file's length, if it is told.
    pub file_size: Option<u64>,
    /// The disk's size in bytes.
    pub capacity: u64,
    /// `capacity` is told in units of this many bytes, so it may be rounded by so many.
    pub unit: u64,
}

#[derive(Default)]
struct File {
    id: String,
    href: String,
    size: Option<u64>,
    refused: Option<&'static str>,
}

#[derive(Default)]
struct Disk {
    id: String,
    file: Option<String>,
    capacity: u64,
    unit: u64,
    derived: bool,
}

#[derive(Default)]
struct Item {
    configuration: Option<String>,
    bound: bool,
    kind: String,
    quantity: String,
    units: String,
    host: String,
}

#[derive(Default)]
struct Found {
    open: Vec<String>,
    text: String,
    systems: u32,
    name: String,
    product: String,
    annotation: String,
    configuration: Option<(String, bool)>,
    files: Vec<File>,
    disks: Vec<Disk>,
    items: Vec<Item>,
    uefi: bool,
}

/// Reads a descriptor; the error is a sentence without its subject.
pub(crate) fn parse(text: &str) -> Result<Ovf, String> {
    let mut reader = Reader::from_str(text.trim_start_matches('\u{feff}'));
    let mut found = Found::default();
    loop {
        let event = reader.read_event();
        let event =
            event.map_err(|e| format!("it is not well-formed XML near byte {}: {e}", reader.error_position()))?;
        match event {
            Event::Start(tag) => found.begin(&tag)?,
            Event::Empty(tag) => {
                found.begin(&tag)?;
                found.end()?;
            }
            Event::End(_) => found.end()?,
            Event::Text(text) => found.add(&text.xml10_content()),
            Event::CData(text) => found.add(&text.xml10_content()),
            Event::GeneralRef(reference) => match reference.resolve_char_ref() {
                Ok(Some(char)) => found.add(char.encode_utf8(&mut [0; 4])),
                Ok(None) => found.add(named(&reference.xml10_content())?),
                Err(e) => return Err(format!("it has a wrong character reference: {e}")),
            },
            Event::DocType(_) => return Err("it has a document type, which OVF does not know".into()),
            Event::Eof => break,
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) => {}
        }
    }
    if found.open.is_empty() { found.conclude() } else { Err("it ends in the middle".into()) }
}

fn named(entity: &str) -> Result<&'static str, String> {
    Ok(match entity {
        "amp" => "&",
        "lt" => "<",
        "gt" => ">",
        "quot" => "\"",
        "apos" => "'",
        _ => return Err("it uses an entity, which OVF does not know".into()),
    })
}

/// The attribute with this local name; vendors differ in prefixes.
fn attribute(tag: &BytesStart, name: &str) -> Result<Option<String>, String> {
    // The check for duplicates takes quadratic time.
    for attribute in tag.attributes().with_checks(false) {
        let attribute = attribute.map_err(|e| format!("it has a wrong attribute: {e}"))?;
        if attribute.key.local_name().as_ref() == name {
            let value = attribute
                .normalized_value(quick_xml::XmlVersion::Explicit1_0)
                .map_err(|e| format!("its attribute {name} is wrong: {e}"))?;
            if value.len() > MAX_VALUE {
                return Err(format!("its attribute {name} is longer than {MAX_VALUE} bytes"));
            }
            return Ok(Some(value.into_owned()));
        }
    }
    Ok(None)
}

impl Found {
    fn begin(&mut self, tag: &BytesStart) -> Result<(), String> {
        if self.open.len() == MAX_DEPTH || self.files.len() + self.disks.len() + self.items.len() > MAX_PARTS {
            return Err(format!("it nests deeper than {MAX_DEPTH} or lists more than {MAX_PARTS} parts"));
        }
        let name = tag.local_name().as_ref().to_owned();
        if self.open.is_empty() && name != "Envelope" {
            return Err(format!("it is no OVF: it begins with <{}>", name.chars().take(40).collect::<String>()));
        }
        let parent = self.open.last().map_or("", String::as_str);
        match (parent, name.as_str()) {
            ("References", "File") => self.files.push(file(tag)?),
            ("DiskSection", "Disk") => self.disks.push(disk(tag)?),
            ("VirtualHardwareSection", "Item" | "StorageItem") => self.items.push(Item {
                configuration: attribute(tag, "configuration")?,
                bound: attribute(tag, "bound")?.is_some_and(|bound| bound != "normal"),
                ..Item::default()
            }),
            ("DeploymentOptionSection", "Configuration") => {
                let default = attribute(tag, "default")?.is_some_and(|value| value == "true" || value == "1");
                if self.configuration.as_ref().is_none_or(|(_, found)| default && !found) {
                    self.configuration = attribute(tag, "id")?.map(|id| (id, default));
                }
            }
            (_, "VirtualSystem") => self.systems += 1,
            ("VirtualHardwareSection", "Config") => {
                let key = attribute(tag, "key")?.unwrap_or_default();
                self.uefi |= key == "firmware" && attribute(tag, "value")?.is_some_and(|value| is_efi(&value));
            }
            // VirtualBox writes its own settings into the descriptor.
            ("Hardware" | "BIOS", "Firmware") => self.uefi |= attribute(tag, "type")?.is_some_and(|v| is_efi(&v)),
            _ => {}
        }
        self.open.push(name);
        self.text.clear();
        Ok(())
    }

    fn end(&mut self) -> Result<(), String> {
        let name = self.open.pop().ok_or("it closes more than it opens")?;
        let text = std::mem::take(&mut self.text);
        let text = text.trim();
        let parent = self.open.last().map_or("", String::as_str);
        let item = self.items.last_mut().filter(|_| matches!(parent, "Item" | "StorageItem"));
        match (parent, name.as_str(), item) {
            (_, "ResourceType", Some(item)) => item.kind = text.to_owned(),
            (_, "VirtualQuantity", Some(item)) => item.quantity = text.to_owned(),
            (_, "AllocationUnits", Some(item)) => item.units = text.to_owned(),
            (_, "HostResource", Some(item)) if item.host.is_empty() => item.host = text.to_owned(),
            ("VirtualSystem", "Name", _) => self.name = text.to_owned(),
            ("ProductSection", "Product", _) if self.product.is_empty() => self.product = text.to_owned(),
            ("AnnotationSection", "Annotation", _) if self.annotation.is_empty() => self.annotation = text.to_owned(),
            _ => {}
        }
        Ok(())
    }

    fn add(&mut self, text: &str) {
        // What is longer is no value that is used.
        if self.text.len() + text.len() <= MAX_VALUE {
            self.text.push_str(text);
        }
    }

    /// The items that hold: those of no configuration, and those of the default one, which come last and win.
    fn items(&self, kind: &str) -> Vec<&Item> {
        let default = self.configuration.as_ref().map(|(id, _)| id.as_str());
        let all = || self.items.iter().filter(|item| item.kind == kind && !item.bound);
        let chosen = |item: &&Item| {
            let names = item.configuration.as_deref().unwrap_or_default();
            names.split_whitespace().any(|name| Some(name) == default)
        };
        all().filter(|item| item.configuration.is_none()).chain(all().filter(chosen)).collect()
    }

    fn conclude(self) -> Result<Ovf, String> {
        if self.systems != 1 {
            return Err(format!("it describes {} machines; an appliance is one machine", self.systems));
        }
        let number = |item: &Item, what: &str| {
            item.quantity
                .parse::<u64>()
                .map_err(|_| format!("its {what} \"{}\" is not a number", shown(&item.quantity)))
        };
        let cpus = match self.items("3").last() {
            Some(item) => Some(u32::try_from(number(item, "number of CPUs")?).unwrap_or(u32::MAX)),
            None => None,
        };
        let memory = match self.items("4").last() {
            Some(item) => {
                let unit = if item.units.is_empty() { 1 << 20 } else { unit(&item.units)? };
                Some(number(item, "memory")?.checked_mul(unit).ok_or("its memory is not a possible number of bytes")?)
            }
            None => None,
        };
        let told = [&self.product, &self.annotation].into_iter().find(|text| !text.is_empty());
        let summary = told.unwrap_or(&self.name);
        let summary = summary.split_whitespace().collect::<Vec<_>>().join(" ");
        let summary = summary.chars().filter(|char| !char.is_control()).take(200).collect();
        Ok(Ovf { summary, cpus, memory, uefi: self.uefi, disks: self.disks()? })
    }

    fn disks(&self) -> Result<Vec<OvfDisk>, String> {
        let items = self.items("17");
        if items.is_empty() {
            return self.disks.iter().map(|disk| self.resolve(disk)).collect();
        }
        let named = items.iter().map(|item| {
            let id = item.host.rsplit_once("disk/").map(|(_, id)| id);
            let id =
                id.ok_or_else(|| format!("its hard disk refers to \"{}\", which is no disk", shown(&item.host)))?;
            let disk = self.disks.iter().find(|disk| disk.id == id);
            self.resolve(disk.ok_or_else(|| format!("its hardware uses a disk \"{}\" it does not list", shown(id)))?)
        });
        named.collect()
    }

    fn resolve(&self, disk: &Disk) -> Result<OvfDisk, String> {
        if disk.derived {
            return Err(format!("its disk \"{}\" is derived from another disk", shown(&disk.id)));
        }
        let mut resolved = OvfDisk { capacity: disk.capacity, unit: disk.unit, ..OvfDisk::default() };
        if let Some(id) = &disk.file {
            let file = self.files.iter().find(|file| file.id == *id);
            let file = file.ok_or_else(|| format!("its disk \"{}\" is in a file it does not list", shown(&disk.id)))?;
            if let Some(why) = file.refused {
                return Err(format!(
                    "its file \"{}\" is {why}; unpack and join it, and tell the OVF",
                    shown(&file.href)
                ));
            }
            resolved.file = Some(file.href.clone());
            resolved.file_size = file.size;
        }
        Ok(resolved)
    }
}

fn is_efi(value: &str) -> bool {
    value.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("efi"))
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

fn size(tag: &BytesStart, name: &str) -> Result<Option<u64>, String> {
    let Some(value) = attribute(tag, name)? else { return Ok(None) };
    value.parse().map(Some).map_err(|_| format!("its {name} \"{}\" is not a number of bytes", shown(&value)))
}

fn file(tag: &BytesStart) -> Result<File, String> {
    let packed = attribute(tag, "compression")?.is_some_and(|how| !how.is_empty() && how != "identity");
    let cut = attribute(tag, "chunkSize")?.is_some();
    Ok(File {
        id: attribute(tag, "id")?.unwrap_or_default(),
        href: attribute(tag, "href")?.unwrap_or_default(),
        size: size(tag, "size")?,
        refused: if packed { Some("compressed") } else { cut.then_some("in several parts") },
    })
}

fn disk(tag: &BytesStart) -> Result<Disk, String> {
    let unit = match attribute(tag, "capacityAllocationUnits")? {
        Some(text) => unit(&text)?,
        None => 1,
    };
    let capacity = size(tag, "capacity")?.ok_or("it lists a disk without a capacity")?;
    Ok(Disk {
        id: attribute(tag, "diskId")?.unwrap_or_default(),
        file: attribute(tag, "fileRef")?.filter(|file| !file.is_empty()),
        capacity: capacity.checked_mul(unit).ok_or("its disk's capacity is not a possible number of bytes")?,
        unit,
        derived: attribute(tag, "parentRef")?.is_some(),
    })
}

/// `byte * 2^20`, `byte * 1024`, `MegaBytes`, `GB`: in bytes.
fn unit(text: &str) -> Result<u64, String> {
    let wrong = || format!("its unit \"{}\" is not one of bytes", shown(text));
    let mut unit = 1u64;
    for factor in text.to_ascii_lowercase().split('*').map(str::trim) {
        let value = match factor.strip_suffix('s').unwrap_or(factor) {
            "byte" | "b" => Some(1),
            "kilobyte" | "kb" | "kib" => Some(1 << 10),
            "megabyte" | "mb" | "mib" => Some(1 << 20),
            "gigabyte" | "gb" | "gib" => Some(1 << 30),
            "terabyte" | "tb" | "tib" => Some(1 << 40),
            other => match other.split_once('^') {
                Some((base, power)) => match (base.trim().parse::<u64>(), power.trim().parse::<u32>()) {
                    (Ok(base), Ok(power)) => base.checked_pow(power),
                    _ => None,
                },
                None => other.parse().ok(),
            },
        };
        unit = value.and_then(|value| unit.checked_mul(value)).ok_or_else(wrong)?;
    }
    if unit == 0 { Err(wrong()) } else { Ok(unit) }
}

//! OVA archives: only what the descriptor names is taken out, under names of our own.
//!
//! No name of the archive ever becomes a path: members are counted, and a name that could be a path is refused.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;

use tar::{Archive, Entry, EntryType};

use crate::checksums::MAX_MF_BYTES;
use crate::ovf::MAX_OVF_BYTES;

const MAX_MEMBERS: usize = 4096;
/// What may be read for one header with its extensions.
const MAX_HEADER: u64 = 1 << 20;

/// Limits what is read between two refills: headers of an archive may claim to be of any length.
struct Bounded {
    file: File,
    left: Rc<Cell<u64>>,
}

impl Read for Bounded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left.get() == 0 {
            return Err(io::Error::other("a header in it is too long"));
        }
        let most = buffer.len().min(usize::try_from(self.left.get()).unwrap_or(usize::MAX));
        let got = self.file.read(&mut buffer[..most])?;
        self.left.set(self.left.get() - got as u64);
        Ok(got)
    }
}

impl Seek for Bounded {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// Whether `name` is the name of a file in the same folder, and no path.
pub(crate) fn is_plain(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// Calls `look` for each member, with its name, until it says that it is enough.
fn walk(path: &Path, look: &mut dyn FnMut(&str, &mut Entry<Bounded>) -> io::Result<bool>) -> io::Result<()> {
    let left = Rc::new(Cell::new(MAX_HEADER));
    let mut archive = Archive::new(Bounded { file: File::open(path)?, left: left.clone() });
    for (count, entry) in archive.entries_with_seek()?.enumerate() {
        let mut entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.strip_prefix("./").unwrap_or(&name);
        let folder = entry.header().entry_type() == EntryType::Directory && (name.is_empty() || name == ".");
        if count >= MAX_MEMBERS {
            return Err(io::Error::other(format!("it has more than {MAX_MEMBERS} members")));
        }
        if !folder && !is_plain(name) {
            let shown: String = name.chars().take(80).collect();
            return Err(io::Error::other(format!("its member {shown:?} is a path; an OVA has files only")));
        }
        left.set(entry.size().saturating_add(MAX_HEADER));
        if look(name, &mut entry)? {
            return Ok(());
        }
        left.set(MAX_HEADER);
    }
    Ok(())
}

/// A text of the archive, and its name there.
pub(crate) type Text = (String, String);

/// The archive's descriptor, and its manifest if it has one: that may be before the disks or after them.
pub(crate) fn descriptor(path: &Path) -> io::Result<(Text, Option<Text>)> {
    let (mut descriptor, mut manifest) = (None, None);
    walk(path, &mut |name, entry| {
        let lower = name.to_ascii_lowercase();
        let (found, what, limit) = match () {
            () if !entry.header().entry_type().is_file() => return Ok(false),
            () if lower.ends_with(".ovf") && descriptor.is_none() => (&mut descriptor, "descriptor", MAX_OVF_BYTES),
            () if lower.ends_with(".mf") && manifest.is_none() => (&mut manifest, "manifest", MAX_MF_BYTES),
            () => return Ok(false),
        };
        if entry.size() > limit {
            return Err(io::Error::other(format!("its {what} is longer than {limit} bytes")));
        }
        let mut text = String::new();
        let size = entry.size();
        if entry.take(limit).read_to_string(&mut text)? as u64 != size {
            return Err(io::Error::other(format!("it ends in the middle of its {what}")));
        }
        *found = Some((name.to_owned(), text));
        Ok(descriptor.is_some() && manifest.is_some())
    })?;
    let descriptor = descriptor.ok_or_else(|| io::Error::other("it is no OVA: no member is an .ovf descriptor"))?;
    Ok((descriptor, manifest))
}

/// Takes the members in `wanted` (with their declared sizes) out into `folder`; tells where each of them is.
pub(crate) fn unpack(
    path: &Path,
    wanted: &BTreeMap<String, Option<u64>>,
    folder: &Path,
) -> io::Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    walk(path, &mut |name, entry| {
        let Some(declared) = wanted.get(name).filter(|_| !found.contains_key(name)) else { return Ok(false) };
        if !matches!(entry.header().entry_type(), EntryType::Regular | EntryType::Continuous) {
            return Err(io::Error::other(format!("its member {name:?} is no ordinary file")));
        }
        let size = entry.size();
        if declared.is_some_and(|declared| declared != size) {
            return Err(io::Error::other(format!("its member {name:?} has {size} bytes, and the OVF says otherwise")));
        }
        let to = folder.join(format!("member{}", found.len() + 1));
        if io::copy(entry, &mut File::create_new(&to)?)? != size {
            return Err(io::Error::other(format!("it ends in the middle of {name:?}")));
        }
        found.insert(name.to_owned(), to);
        Ok(found.len() == wanted.len())
    })?;
    Ok(found)
}

//! The key of an owner's private data, and where it lies.
//!
//! 32 random bytes, from which everything else is derived (`collective_store::seal`). At rest a key is wrapped: encrypted
//! under the machine's key, which lies outside of the plane's folder, so that a copy of that folder (a backup of the
//! database, a local store) does not open what is in it. A person takes it elsewhere with `collective key export`.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{hex, unhex};

const EXPORTED: &str = "collective-owner-key-1 ";
const WRAPPED: &str = "collective-wrapped-key-1 ";
const MACHINE: &str = "collective-machine-key-1 ";
const ID_CONTEXT: &str = "collective 2026 owner's key: its id";
const WRAP_CONTEXT: &str = "collective 2026 machine's key: wrapping owners' keys";
/// Which of the keys is used from now on.
const CURRENT: &str = "current";
/// No key file is longer, in bytes.
const MAX_FILE: u64 = 4096;

/// An owner's key. Shown nowhere; wiped from memory when it is dropped.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct OwnerKey(Zeroizing<[u8; 32]>);

/// Tells keys apart and says nothing about them: 32 hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(String);

/// Why a key is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum OwnerKeyError {
    /// A file cannot be read or written.
    #[error("cannot use the key file {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} is not a key file: expected one line that begins with \"{}\"", path.display(), expected.trim())]
    Content {
        /// Which.
        path: PathBuf,
        /// What it should begin with.
        expected: &'static str,
    },
    /// There is no such key.
    #[error(
        "the key {0} of this private data is not here: bring it back with `collective key import FILE`. Without the key the \
         data is lost"
    )]
    Missing(KeyId),
    /// Wrapped by another machine, or damaged.
    #[error(
        "the key file {} cannot be unwrapped with {}: one of them is damaged or from elsewhere. Bring the key back with \
         `collective key import FILE`; without it the data is lost", path.display(), machine.display()
    )]
    Unwrap {
        /// The wrapped key.
        path: PathBuf,
        /// The key it is wrapped with.
        machine: PathBuf,
    },
    /// The operating system gave no randomness.
    #[error("cannot make a key: no randomness: {0}")]
    Randomness(getrandom::Error),
}

impl OwnerKey {
    /// A new key.
    pub fn generate() -> Result<Self, OwnerKeyError> {
        random().map(Self)
    }

    /// The 32 bytes.
    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Its id, the same wherever it lies.
    pub fn id(&self) -> KeyId {
        KeyId(hex(&blake3::derive_key(ID_CONTEXT, &*self.0)[..16]))
    }

    /// The line of an exported key file.
    pub fn to_line(&self) -> Zeroizing<String> {
        Zeroizing::new(format!("{EXPORTED}{}\n", &*Zeroizing::new(hex(&*self.0))))
    }

    /// Reads an exported key file.
    pub fn read(path: &Path) -> Result<Self, OwnerKeyError> {
        let missing = || file_error(path)(io::Error::new(io::ErrorKind::NotFound, "there is no such file"));
        let text = read_line(path)?.ok_or_else(missing)?;
        parse(path, &text, EXPORTED).map(Self)
    }

    /// Writes an exported key file, readable by its owner only; there must be no such file.
    pub fn write_new(&self, path: &Path) -> Result<(), OwnerKeyError> {
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
            file.write_all(self.to_line().as_bytes())?;
            file.sync_all()
        };
        write().map_err(file_error(path))
    }
}

impl fmt::Debug for OwnerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnerKey({})", self.id())
    }
}

impl TryFrom<String> for OwnerKey {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let text = Zeroizing::new(text);
        unhex(&text).map(|key| Self(Zeroizing::new(key))).ok_or_else(|| "a key is 64 hexadecimal digits".to_owned())
    }
}

impl From<OwnerKey> for String {
    fn from(key: OwnerKey) -> String {
        hex(&*key.0)
    }
}

impl FromStr for KeyId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match text.len() == 32 && text.bytes().all(digit) {
            true => Ok(Self(text.to_owned())),
            false => Err("a key's id is 32 hexadecimal digits".to_owned()),
        }
    }
}

impl TryFrom<String> for KeyId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> String {
        id.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The keys of a plane's owner: one for what is stored from now on, and older ones for what was stored before.
#[derive(Clone, Debug)]
pub struct KeyRing {
    folder: PathBuf,
    machine: PathBuf,
}

impl KeyRing {
    /// Keys in `folder`, wrapped with the key in the file `machine`. Nothing is made until it is needed.
    pub fn new(folder: &Path, machine: &Path) -> Self {
        Self { folder: folder.to_owned(), machine: machine.to_owned() }
    }

    /// Which key is used from now on; none was made or imported yet, or the whole folder was lost.
    pub fn current(&self) -> Result<Option<KeyId>, OwnerKeyError> {
        let path = self.folder.join(CURRENT);
        let Some(text) = read_line(&path)? else { return Ok(None) };
        let wrong = |_| OwnerKeyError::Content { path, expected: "the id of a key" };
        text.trim().parse().map(Some).map_err(wrong)
    }

    /// A key.
    pub fn get(&self, id: &KeyId) -> Result<OwnerKey, OwnerKeyError> {
        let path = self.path(id);
        let text = read_line(&path)?.ok_or_else(|| OwnerKeyError::Missing(id.clone()))?;
        let content = || OwnerKeyError::Content { path: path.clone(), expected: WRAPPED };
        let rest = text.trim().strip_prefix(WRAPPED).ok_or_else(content)?;
        let (nonce, sealed) = rest.split_once(' ').ok_or_else(content)?;
        let nonce: [u8; NONCE_LEN] = unhex(nonce).ok_or_else(content)?;
        let mut sealed: [u8; 48] = unhex(sealed).ok_or_else(content)?;
        let unwrap = || OwnerKeyError::Unwrap { path: path.clone(), machine: self.machine.clone() };
        let cipher = self.cipher(false)?.ok_or_else(unwrap)?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let opened = cipher.open_in_place(nonce, Aad::from(bound_to(id)), &mut sealed).map_err(|_| unwrap())?;
        let mut key = Zeroizing::new([0; 32]);
        key.copy_from_slice(opened.get(..32).ok_or_else(unwrap)?);
        sealed.zeroize();
        Ok(OwnerKey(key))
    }

    /// Keeps a key, wrapped, and uses it from now on. Keys that are there stay. Durable when it returns.
    pub fn add(&self, key: &OwnerKey) -> Result<(), OwnerKeyError> {
        let id = key.id();
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder);
        made.map_err(file_error(&self.folder))?;
        let nonce: [u8; NONCE_LEN] = *random()?;
        let path = self.path(&id);
        let unwrap = || OwnerKeyError::Unwrap { path: path.clone(), machine: self.machine.clone() };
        let cipher = self.cipher(true)?.ok_or_else(unwrap)?;
        let mut sealed = key.0.to_vec();
        let bound = Aad::from(bound_to(&id));
        let done = cipher.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), bound, &mut sealed);
        done.map_err(|_| unwrap())?;
        write_line(&path, &format!("{WRAPPED}{} {}\n", hex(&nonce), hex(&sealed)))?;
        write_line(&self.folder.join(CURRENT), &format!("{id}\n"))
    }

    fn path(&self, id: &KeyId) -> PathBuf {
        self.folder.join(format!("{id}.key"))
    }

    /// What wraps; made at first use where `create`.
    fn cipher(&self, create: bool) -> Result<Option<LessSafeKey>, OwnerKeyError> {
        let machine = match read_line(&self.machine)? {
            Some(text) => parse(&self.machine, &text, MACHINE)?,
            None if !create => return Ok(None),
            None => {
                let machine: Zeroizing<[u8; 32]> = random()?;
                write_line(&self.machine, &Zeroizing::new(format!("{MACHINE}{}\n", hex(&*machine))))?;
                machine
            }
        };
        let wrapping = Zeroizing::new(blake3::derive_key(WRAP_CONTEXT, &*machine));
        Ok(UnboundKey::new(&AES_256_GCM_SIV, &*wrapping).ok().map(LessSafeKey::new))
    }
}

fn bound_to(id: &KeyId) -> Vec<u8> {
    format!("{WRAPPED}{id}").into_bytes()
}

fn random<const N: usize>() -> Result<Zeroizing<[u8; N]>, OwnerKeyError> {
    let mut bytes = Zeroizing::new([0; N]);
    getrandom::fill(&mut *bytes).map_err(OwnerKeyError::Randomness)?;
    Ok(bytes)
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> OwnerKeyError {
    move |source| OwnerKeyError::File { path: path.to_owned(), source }
}

fn parse(path: &Path, text: &str, expected: &'static str) -> Result<Zeroizing<[u8; 32]>, OwnerKeyError> {
    let key = text.strip_prefix(expected).and_then(|rest| unhex(rest.trim()));
    key.map(Zeroizing::new).ok_or_else(|| OwnerKeyError::Content { path: path.to_owned(), expected })
}

fn read_line(path: &Path) -> Result<Option<Zeroizing<String>>, OwnerKeyError> {
    use std::io::Read;
    let mut text = Zeroizing::new(String::new());
    match File::open(path).and_then(|file| file.take(MAX_FILE).read_to_string(&mut text)) {
        Ok(_) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // Not text: it is refused by what it should begin with.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(Some(Zeroizing::new(String::new()))),
        Err(error) => Err(file_error(path)(error)),
    }
}

/// Whole or as it was before, durable, and for its owner's eyes only.
fn write_line(path: &Path, line: &str) -> Result<(), OwnerKeyError> {
    let write = || -> io::Result<()> {
        let part = path.with_extension("part");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
        file.write_all(line.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&part, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(file_error(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn keys_are_kept_wrapped_and_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let (keys, machine) = (folder.path().join("plane/keys"), folder.path().join("machine.key"));
        let ring = KeyRing::new(&keys, &machine);
        assert!(ring.current().unwrap().is_none());
        let (first, second) = (OwnerKey::generate().unwrap(), OwnerKey::generate().unwrap());
        assert!(matches!(ring.get(&first.id()), Err(OwnerKeyError::Missing(id)) if id == first.id()));
        ring.add(&first).unwrap();
        ring.add(&second).unwrap();
        assert_eq!(ring.current().unwrap(), Some(second.id()));
        for key in [&first, &second] {
            assert_eq!(ring.get(&key.id()).unwrap().bytes(), key.bytes());
        }
        for entry in std::fs::read_dir(&keys).unwrap().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap();
            assert!(!text.contains(&hex(first.bytes())) && !text.contains(&hex(second.bytes())), "{entry:?}");
            assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
        }
        assert_eq!(std::fs::metadata(&machine).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!format!("{first:?}").contains(&hex(first.bytes())));

        // One key's file under another's name, another machine's key, no machine's key, rubbish.
        std::fs::copy(keys.join(format!("{}.key", second.id())), keys.join(format!("{}.key", first.id()))).unwrap();
        assert!(matches!(ring.get(&first.id()), Err(OwnerKeyError::Unwrap { .. })));
        std::fs::write(&machine, format!("{MACHINE}{}\n", "00".repeat(32))).unwrap();
        assert!(matches!(ring.get(&second.id()), Err(OwnerKeyError::Unwrap { .. })));
        std::fs::remove_file(&machine).unwrap();
        assert!(matches!(ring.get(&second.id()), Err(OwnerKeyError::Unwrap { .. })));
        for rubbish in [&b""[..], b"rubbish", b"collective-machine-key-1 12", &[0xff; 100]] {
            std::fs::write(&machine, rubbish).unwrap();
            assert!(matches!(ring.get(&second.id()), Err(OwnerKeyError::Content { .. })));
        }
        std::fs::write(keys.join(CURRENT), "../../x").unwrap();
        assert!(matches!(ring.current(), Err(OwnerKeyError::Content { .. })));
    }

    #[test]
    fn an_exported_key_is_for_its_owner_and_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("owner.key");
        let key = OwnerKey::generate().unwrap();
        key.write_new(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(OwnerKey::read(&path).unwrap().id(), key.id());
        assert!(key.write_new(&path).is_err(), "never over another file");
        let long = format!("{EXPORTED}{}", "0".repeat(66));
        for wrong in ["", "collective-key-1 00", &long, &long[..80], &MACHINE.repeat(9)] {
            std::fs::write(&path, wrong).unwrap();
            assert!(matches!(OwnerKey::read(&path), Err(OwnerKeyError::Content { .. })), "{wrong}");
        }
        let json = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<OwnerKey>(&json).unwrap().id(), key.id());
        assert!(serde_json::from_str::<OwnerKey>("\"00\"").is_err());
    }
}

//! Who says so: signatures over manifests and channel pointers, key files, and trust in publishers.
//!
//! A publisher is a name bound to an Ed25519 key (RFC 8032). The plane binds it at the first publish, every host pins
//! it at the first pull; afterwards only a change signed by the old key, or a person, can bind another.

#![forbid(unsafe_code)]

mod owner;
mod signed;
mod ssh;
mod trust;

use std::fmt;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ed25519_dalek::{Signer, Verifier};
use serde::{Deserialize, Serialize};

pub use owner::{KeyId, KeyRing, OwnerKey, OwnerKeyError};
pub use signed::{ChannelPointer, KeyChange, Kind, MAX_SIGNED_BYTES, SignatureError, Signed};
pub use ssh::{SshKey, new_ssh_key};
pub use trust::{Pins, TrustError};

/// A key that signs. It never leaves its file and this process.
pub struct SigningKey(ed25519_dalek::SigningKey);

/// The half of a key that everyone may know; written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey([u8; 32]);

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot use the key file {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file holds something else.
    #[error("{} is not a key file: expected one line \"collective-key-1 <64 hexadecimal digits>\"", .0.display())]
    Content(PathBuf),
    /// The operating system gave no randomness.
    #[error("cannot make a key: no randomness: {0}")]
    Randomness(getrandom::Error),
}

const HEADER: &str = "collective-key-1 ";

/// 16 random bytes, for ids.
pub fn random_id() -> Result<[u8; 16], KeyError> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(KeyError::Randomness)?;
    Ok(bytes)
}

/// A new secret of 32 random bytes in hexadecimal, for tokens.
pub fn random_secret() -> Result<String, KeyError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(KeyError::Randomness)?;
    Ok(hex(&bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    if text.len() != 2 * N || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; N];
    for (i, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(bytes)
}

impl SigningKey {
    /// A new key.
    pub fn generate() -> Result<Self, KeyError> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(KeyError::Randomness)?;
        Ok(Self(ed25519_dalek::SigningKey::from_bytes(&seed)))
    }

    /// Reads the key in `path`, or makes one there, readable by its owner only. Also says whether it was made now.
    pub fn load_or_create(path: &Path) -> Result<(Self, bool), KeyError> {
        let file_error = |source| KeyError::File { path: path.to_owned(), source };
        match std::fs::read_to_string(path) {
            Ok(text) => {
                let seed = text.strip_prefix(HEADER).and_then(|rest| unhex(rest.trim()));
                let seed = seed.ok_or_else(|| KeyError::Content(path.to_owned()))?;
                Ok((Self(ed25519_dalek::SigningKey::from_bytes(&seed)), false))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = Self::generate()?;
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder).map_err(file_error)?;
                }
                // Complete before it has its name: a second publish at the same time must not read half a key.
                let part = path.with_extension(format!("part{}", std::process::id()));
                let mut file = std::fs::OpenOptions::new()
                    .create(true)
                    .truncate(true)
                    .write(true)
                    .mode(0o600)
                    .open(&part)
                    .map_err(file_error)?;
                writeln!(file, "{HEADER}{}", hex(&key.0.to_bytes())).map_err(file_error)?;
                file.sync_all().map_err(file_error)?;
                match std::fs::hard_link(&part, path) {
                    Ok(()) => {}
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                        let _ = std::fs::remove_file(&part);
                        return Self::load_or_create(path);
                    }
                    Err(e) => return Err(file_error(e)),
                }
                std::fs::remove_file(&part).map_err(file_error)?;
                Ok((key, true))
            }
            Err(source) => Err(file_error(source)),
        }
    }

    /// Puts a new key in place of the one in `path`, which stays beside it as `.old`. `vouch` is given the old and the
    /// new key first, to make everybody else know; if it fails the old key stays.
    pub async fn replace<E: From<KeyError>>(
        path: &Path,
        vouch: impl AsyncFnOnce(&Self, &Self) -> Result<(), E>,
    ) -> Result<Self, E> {
        let (old, _) = Self::load_or_create(path)?;
        // Kept before anybody is told of it: a key that others believe in must not be lost.
        let next = path.with_extension("next");
        let (new, _) = Self::load_or_create(&next)?;
        vouch(&old, &new).await?;
        let file_error = |source| KeyError::File { path: path.to_owned(), source };
        std::fs::copy(path, path.with_extension("old")).map_err(file_error)?;
        std::fs::rename(&next, path).map_err(file_error)?;
        Ok(new)
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl PublicKey {
    fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let Ok(key) = ed25519_dalek::VerifyingKey::from_bytes(&self.0) else {
            return false;
        };
        // A key of small order would accept forged signatures.
        !key.is_weak() && key.verify(message, &ed25519_dalek::Signature::from_bytes(signature)).is_ok()
    }

    /// The first 16 digits, for people.
    pub fn short(&self) -> String {
        hex(&self.0[..8])
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        unhex(text).map(Self).ok_or_else(|| "a public key is 64 hexadecimal digits".to_owned())
    }
}

impl TryFrom<String> for PublicKey {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn key_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys/maker.key");
        let (key, created) = SigningKey::load_or_create(&path).unwrap();
        assert!(created);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let (again, created) = SigningKey::load_or_create(&path).unwrap();
        assert!(!created);
        assert_eq!(key.public(), again.public());
        std::fs::write(&path, "rubbish").unwrap();
        assert!(matches!(SigningKey::load_or_create(&path), Err(KeyError::Content(_))));
    }
}

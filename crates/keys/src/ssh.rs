//! SSH keys in OpenSSH's own format (PROTOCOL.key of OpenSSH, RFC 8709 for the algorithm).
//!
//! An instance's host key belongs to the instance and reaches the guest by its seed disk, so that users see the same one
//! after every update and move. A user's key lets the user in.

use crate::{KeyError, SigningKey};

/// A key as the two files that OpenSSH reads.
pub struct SshKey {
    /// `ssh_host_ed25519_key` of sshd, `id_ed25519` of ssh.
    pub private: String,
    /// The same with `.pub`.
    pub public: String,
}

const ALGORITHM: &[u8] = b"ssh-ed25519";

/// Makes a key.
pub fn new_ssh_key() -> Result<SshKey, KeyError> {
    Ok(SigningKey::generate()?.to_ssh())
}

impl SigningKey {
    /// The same key for OpenSSH; always the same bytes.
    pub fn to_ssh(&self) -> SshKey {
        encode(&self.0.to_bytes(), &self.0.verifying_key().to_bytes())
    }
}

fn encode(seed: &[u8; 32], public: &[u8; 32]) -> SshKey {
    let blob = [string(ALGORITHM), string(public)].concat();
    // Two equal numbers tell a reader that it decrypted well; nothing is encrypted here.
    let check = [0x5e, 0xed, 0x5e, 0xed];
    let pair = [*seed, *public].concat();
    let mut secret =
        [&check[..], &check, &string(ALGORITHM), &string(public), &string(&pair), &string(b"collective")].concat();
    let padding = (8 - secret.len() % 8) % 8;
    secret.extend((1..=padding).map(|byte| byte as u8));
    let parts: [&[u8]; 7] = [
        b"openssh-key-v1\0",
        &string(b"none"),
        &string(b"none"),
        &string(b""),
        &1u32.to_be_bytes(),
        &string(&blob),
        &string(&secret),
    ];
    let body = base64(&parts.concat());
    let lines: Vec<&str> = body.as_bytes().chunks(70).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    SshKey {
        private: format!(
            "-----BEGIN OPENSSH PRIVATE KEY-----\n{}\n-----END OPENSSH PRIVATE KEY-----\n",
            lines.join("\n")
        ),
        public: format!("ssh-ed25519 {} collective\n", base64(&blob)),
    }
}

/// A length and the bytes (RFC 4251, section 5).
fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u32).to_be_bytes(), bytes].concat()
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |chunk: &[u8]| -> Vec<char> {
        let bits = chunk.iter().enumerate().fold(0u32, |bits, (i, byte)| bits | u32::from(*byte) << (16 - 8 * i));
        let digit = |i: usize| char::from(DIGITS[(bits >> (18 - 6 * i) & 63) as usize]);
        (0..4).map(|i| if i <= chunk.len() { digit(i) } else { '=' }).collect()
    };
    bytes.chunks(3).flat_map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;

    #[test]
    fn base64_of_the_rfc() {
        let cases =
            [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foob", "Zm9vYg=="), ("foobar", "Zm9vYmFy")];
        for (plain, encoded) in cases {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn openssh_itself_reads_it() {
        let key = new_ssh_key().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let mut file = std::fs::File::options().create_new(true).write(true).mode(0o600).open(&path).unwrap();
        std::io::Write::write_all(&mut file, key.private.as_bytes()).unwrap();
        let output =
            Command::new("ssh-keygen").args(["-y", "-f"]).arg(&path).output().expect("openssh-client is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let shown = String::from_utf8_lossy(&output.stdout);
        assert_eq!(shown.split(' ').nth(1).map(str::trim), key.public.split(' ').nth(1));
    }
}

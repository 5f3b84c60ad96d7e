//! A signed text: what is signed travels as the exact bytes that were signed (`docs/formats/signed.md`).

use collective_model::{ApplianceName, Digest, Name, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{PublicKey, SigningKey, hex, unhex};

/// A signed document is at most this long, in bytes.
pub const MAX_SIGNED_BYTES: usize = 2 << 20;

/// What a signature is about. It is part of what is signed, so that one kind can never pass for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A version's manifest.
    Manifest,
    /// A [`ChannelPointer`].
    Channel,
    /// A [`KeyChange`].
    KeyChange,
}

/// A text with its signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    /// What it is.
    pub kind: Kind,
    /// The text.
    pub payload: String,
    /// Who signed it.
    pub key: PublicKey,
    /// Ed25519 over the kind and the text, 128 hexadecimal digits.
    pub signature: String,
}

/// A channel's head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelPointer {
    /// Of which appliance.
    pub appliance: ApplianceName,
    /// Which channel.
    pub channel: Name,
    /// Grows with every change; a pointer with a lower one is an old one and is refused.
    pub serial: u64,
    /// The version it points to.
    pub version: Digest,
    /// When it was set.
    pub created: Timestamp,
}

/// A publisher's new key, signed by the old one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyChange {
    /// Whose key.
    pub publisher: Name,
    /// The key that signs this.
    pub old: PublicKey,
    /// The key from now on.
    pub new: PublicKey,
}

/// Why a signed text is refused.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// The signature is not of this key over this text.
    #[error("the signature does not fit: the document was changed or signed by another key than {}", .0.short())]
    Wrong(PublicKey),
    /// A genuine signature over something else.
    #[error("expected a signed {expected:?}, got a {got:?}")]
    Kind {
        /// What was wanted.
        expected: Kind,
        /// What came.
        got: Kind,
    },
    /// The signed text is not what the kind says.
    #[error("the signed document cannot be read: {0}")]
    Payload(#[from] serde_json::Error),
}

impl Signed {
    /// Signs `payload`.
    pub fn sign(kind: Kind, payload: String, key: &SigningKey) -> Self {
        let signature = hex(&key.sign(&message(kind, &payload)));
        Self { kind, payload, key: key.public(), signature }
    }

    /// Signs the JSON of `value`.
    pub fn sign_json<T: Serialize>(kind: Kind, value: &T, key: &SigningKey) -> Result<Self, SignatureError> {
        Ok(Self::sign(kind, serde_json::to_string(value)?, key))
    }

    /// The text, if the signature is right. Whether the key may be believed is another question: see [`crate::Pins`].
    pub fn verified(&self, expected: Kind) -> Result<&str, SignatureError> {
        if self.kind != expected {
            return Err(SignatureError::Kind { expected, got: self.kind });
        }
        let signature = unhex::<64>(&self.signature).ok_or(SignatureError::Wrong(self.key))?;
        if !self.key.verify(&message(self.kind, &self.payload), &signature) {
            return Err(SignatureError::Wrong(self.key));
        }
        Ok(&self.payload)
    }

    /// The text read as JSON, if the signature is right.
    pub fn verified_json<T: DeserializeOwned>(&self, expected: Kind) -> Result<T, SignatureError> {
        Ok(serde_json::from_str(self.verified(expected)?)?)
    }

    /// The name of what is signed: the BLAKE3 of the text.
    pub fn digest(&self) -> Digest {
        Digest::of(self.payload.as_bytes())
    }
}

fn message(kind: Kind, payload: &str) -> Vec<u8> {
    let domain = match kind {
        Kind::Manifest => "collective manifest 1\0",
        Kind::Channel => "collective channel 1\0",
        Kind::KeyChange => "collective key-change 1\0",
    };
    [domain.as_bytes(), payload.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn kinds_cannot_be_swapped() {
        let key = SigningKey::generate().unwrap();
        let mut signed = Signed::sign(Kind::Channel, "{}".into(), &key);
        assert_eq!(signed.verified(Kind::Channel).unwrap(), "{}");
        assert!(signed.verified(Kind::Manifest).is_err());
        signed.kind = Kind::Manifest;
        assert!(matches!(signed.verified(Kind::Manifest), Err(SignatureError::Wrong(_))));
    }

    proptest! {
        #[test]
        fn any_change_is_seen(text in "\\PC{1,40}", at in 0usize..40, other in "[a-z]") {
            let key = SigningKey::generate().unwrap();
            let mut signed = Signed::sign(Kind::Manifest, text.clone(), &key);
            let chars: Vec<char> = text.chars().collect();
            let at = at % chars.len();
            let changed: String = chars.iter().enumerate()
                .map(|(i, c)| if i == at { other.clone() } else { c.to_string() }).collect();
            prop_assume!(changed != text);
            signed.payload = changed;
            prop_assert!(signed.verified(Kind::Manifest).is_err());
        }
    }
}

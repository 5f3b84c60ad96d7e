//! Which key speaks for a publisher: pinned at first use, changed only by the old key or by a person.

use std::collections::BTreeMap;

use collective_model::Name;
use serde::{Deserialize, Serialize};

use crate::{KeyChange, Kind, PublicKey, SignatureError, Signed};

/// The keys that one place (a plane, a host) believes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pins {
    publishers: BTreeMap<Name, PublicKey>,
}

/// Why a key is refused.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// Another key is pinned.
    #[error(
        "publisher \"{publisher}\" is known by key {}, and this is signed by key {}: if the publisher really changed \
         its key, let it do so with `collective rekey`, which the old key signs, or trust the new one yourself with \
         `collective trust {publisher} {offered}` (and `collective host trust` on each host)", pinned.short(), offered.short()
    )]
    OtherKey {
        /// Whose key.
        publisher: Name,
        /// The key believed so far.
        pinned: PublicKey,
        /// The key offered.
        offered: PublicKey,
    },
    /// A key change that does not hold.
    #[error("the key change of \"{publisher}\" is refused: {why}")]
    BadChange {
        /// Whose key.
        publisher: Name,
        /// Why.
        why: String,
    },
    /// The signature itself is wrong.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

impl Pins {
    /// The key believed for `publisher`.
    pub fn get(&self, publisher: &Name) -> Option<PublicKey> {
        self.publishers.get(publisher).copied()
    }

    /// Accepts `offered` if it is the pinned key or the first one seen; true if it was pinned just now.
    pub fn accept(&mut self, publisher: &Name, offered: PublicKey) -> Result<bool, TrustError> {
        match self.get(publisher) {
            Some(pinned) if pinned == offered => Ok(false),
            Some(pinned) => Err(TrustError::OtherKey { publisher: publisher.clone(), pinned, offered }),
            None => {
                self.publishers.insert(publisher.clone(), offered);
                Ok(true)
            }
        }
    }

    /// Accepts what `signer` signed if it is the pinned key, or if signed changes lead from one of the two to the
    /// other: an older version keeps its older signature. The pin moves to the newest key that the changes prove.
    pub fn accept_with_changes(
        &mut self,
        publisher: &Name,
        signer: PublicKey,
        changes: &[Signed],
    ) -> Result<(), TrustError> {
        let newest_from = |key: PublicKey| -> Result<Self, TrustError> {
            let mut pins = Self { publishers: BTreeMap::from([(publisher.clone(), key)]) };
            pins.apply_changes(publisher, changes)?;
            Ok(pins)
        };
        let from_signer = newest_from(signer)?.get(publisher);
        let pinned = self.get(publisher).unwrap_or(signer);
        if signer != pinned && newest_from(pinned)?.get(publisher) != from_signer {
            return Err(TrustError::OtherKey { publisher: publisher.clone(), pinned, offered: signer });
        }
        self.apply_changes(publisher, changes)?;
        if self.get(publisher).is_none() {
            self.publishers.extend(from_signer.map(|key| (publisher.clone(), key)));
        }
        Ok(())
    }

    /// A person says so.
    pub fn trust(&mut self, publisher: &Name, key: PublicKey) {
        self.publishers.insert(publisher.clone(), key);
    }

    /// Follows key changes, oldest first, from the pinned key.
    pub fn apply_changes(&mut self, publisher: &Name, changes: &[Signed]) -> Result<(), TrustError> {
        for signed in changes {
            let change: KeyChange = signed.verified_json(Kind::KeyChange)?;
            let refuse = |why: &str| TrustError::BadChange { publisher: publisher.clone(), why: why.to_owned() };
            if change.publisher != *publisher {
                return Err(refuse("it is about another publisher"));
            }
            if change.old != signed.key {
                return Err(refuse("it is not signed by the key it replaces"));
            }
            // A change away from a key that is not pinned (any more) was followed before.
            if self.get(publisher) == Some(change.old) {
                self.trust(publisher, change.new);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SigningKey;

    #[test]
    fn first_use_then_only_by_the_old_key_or_a_person() {
        let (old, new, thief) =
            (SigningKey::generate().unwrap(), SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
        let demo: Name = "demo".parse().unwrap();
        let mut pins = Pins::default();
        assert!(pins.accept(&demo, old.public()).unwrap());
        assert!(!pins.accept(&demo, old.public()).unwrap());
        assert!(matches!(pins.accept(&demo, thief.public()), Err(TrustError::OtherKey { .. })));

        let change = |from: &SigningKey, by: &SigningKey, to: &SigningKey| {
            let change = KeyChange { publisher: demo.clone(), old: from.public(), new: to.public() };
            Signed::sign_json(Kind::KeyChange, &change, by).unwrap()
        };
        assert!(pins.apply_changes(&demo, &[change(&old, &thief, &thief)]).is_err());
        pins.apply_changes(&demo, &[change(&thief, &thief, &thief)]).unwrap();
        assert_eq!(pins.get(&demo), Some(old.public()), "a change from a key we never believed has no effect");
        pins.apply_changes(&demo, &[change(&old, &old, &new)]).unwrap();
        assert!(!pins.accept(&demo, new.public()).unwrap());
        assert!(pins.accept(&demo, old.public()).is_err());
        // An older version is still the publisher's, and a stranger's is not, whatever the changes.
        let changes = [change(&old, &old, &new)];
        pins.accept_with_changes(&demo, old.public(), &changes).unwrap();
        assert!(pins.accept_with_changes(&demo, thief.public(), &changes).is_err());
        let mut fresh = Pins::default();
        fresh.accept_with_changes(&demo, old.public(), &changes).unwrap();
        assert_eq!(fresh.get(&demo), Some(new.public()), "who comes later learns the newest key");
        pins.trust(&demo, thief.public());
        assert!(!pins.accept(&demo, thief.public()).unwrap());
    }
}

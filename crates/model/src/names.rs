//! Names that people type: appliances, instances, hosts, channels, versions, and references to a version.
//!
//! A name becomes part of paths, URLs and QEMU arguments, so what it may contain is settled once, here.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{Digest, ParseDigestError};

/// A publisher, appliance, instance, host, channel, disk or port: 1 to 63 characters of `a-z 0-9 - _ .`, the first
/// of them a letter or digit. Thus never `.`, `..` or a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(String);

/// The maker's own name of a version, such as `1.4` or `2026-11-22`: 1 to 63 characters of `A-Z a-z 0-9 - _ . +`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VersionName(String);

/// `publisher/name`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ApplianceName {
    /// Who made it; bound to a key at the first publish.
    pub publisher: Name,
    /// Which of the publisher's appliances.
    pub name: Name,
}

/// Which version of an appliance is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selector {
    /// The head of the channel `stable`.
    Default,
    /// A channel or, if there is none of that name, a version: `demo/notes:beta`, `demo/notes:2`.
    Label(VersionName),
    /// Exactly this version: `demo/notes@<digest>`.
    Digest(Digest),
}

/// What a user writes to name a version: `demo/notes`, `demo/notes:2`, `demo/notes:beta`, `demo/notes@<digest>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The appliance.
    pub appliance: ApplianceName,
    /// The version of it.
    pub selector: Selector,
}

/// A text that is not a name, with what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseNameError {
    /// Not a [`Name`].
    #[error("\"{0}\" is not a name: use 1 to 63 of a-z, 0-9, \"-\", \"_\" and \".\", starting with a letter or digit")]
    Name(String),
    /// Not a [`VersionName`].
    #[error(
        "\"{0}\" is not a version: use 1 to 63 of A-Z, a-z, 0-9, \"-\", \"_\", \".\" and \"+\", starting with a letter or digit"
    )]
    Version(String),
    /// Not `publisher/name`.
    #[error("\"{0}\" is not an appliance: write publisher/name, such as demo/notes")]
    Appliance(String),
    /// The part after `@` is no digest.
    #[error(transparent)]
    Digest(#[from] ParseDigestError),
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

fn well_formed(text: &str, allowed: impl Fn(u8) -> bool) -> bool {
    (1..=63).contains(&text.len()) && text.as_bytes()[0].is_ascii_alphanumeric() && text.bytes().all(allowed)
}

impl FromStr for Name {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
        if well_formed(text, allowed) { Ok(Self(text.to_owned())) } else { Err(ParseNameError::Name(shown(text))) }
    }
}

impl FromStr for VersionName {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if well_formed(text, |b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b)) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseNameError::Version(shown(text)))
        }
    }
}

impl FromStr for ApplianceName {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (publisher, name) = text.split_once('/').ok_or_else(|| ParseNameError::Appliance(shown(text)))?;
        Ok(Self { publisher: publisher.parse()?, name: name.parse()? })
    }
}

impl FromStr for Reference {
    type Err = ParseNameError;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((appliance, digest)) = text.split_once('@') {
            return Ok(Self { appliance: appliance.parse()?, selector: Selector::Digest(digest.parse()?) });
        }
        if let Some((appliance, label)) = text.split_once(':') {
            return Ok(Self { appliance: appliance.parse()?, selector: Selector::Label(label.parse()?) });
        }
        Ok(Self { appliance: text.parse()?, selector: Selector::Default })
    }
}

impl Name {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl VersionName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ApplianceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.publisher, self.name)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.selector {
            Selector::Default => write!(f, "{}", self.appliance),
            Selector::Label(label) => write!(f, "{}:{label}", self.appliance),
            Selector::Digest(digest) => write!(f, "{}@{digest}", self.appliance),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for VersionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names travel as plain strings in JSON and TOML, and are checked when read.
macro_rules! as_text {
    ($($type:ty),*) => {$(
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }
            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({ "type": "string" })
            }
        }
    )*};
}
as_text!(Name, VersionName, ApplianceName);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn references() {
        let digest = Digest::of(b"x");
        for (text, ok) in [
            ("demo/notes", true),
            ("demo/notes:2", true),
            ("demo/notes:beta", true),
            (&format!("demo/notes@{digest}"), true),
            ("notes", false),
            ("demo/", false),
            ("demo/../etc", false),
            ("demo/notes:", false),
            ("demo/notes@12", false),
            ("Demo/notes", false),
        ] {
            let parsed = text.parse::<Reference>();
            assert_eq!(parsed.is_ok(), ok, "{text}");
            if let Ok(reference) = parsed {
                assert_eq!(reference.to_string(), text);
            }
        }
    }

    proptest! {
        #[test]
        fn names_never_escape_a_folder(text in "\\PC{0,70}") {
            if let Ok(name) = text.parse::<Name>() {
                prop_assert!(!name.as_str().contains('/'));
                prop_assert!(!name.as_str().starts_with('.'));
            }
        }
    }
}

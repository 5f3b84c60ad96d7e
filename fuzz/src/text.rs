//! What people and makers write.

use std::sync::OnceLock;

use collective_keys::{ChannelPointer, KeyChange, Kind, Signed, SigningKey};
use collective_model::{Manifest, Recipe};

/// A manifest. What is read is written so that it is read again as the same.
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else { return };
    let text = serde_json::to_vec(&manifest).expect("a manifest as JSON");
    assert_eq!(Manifest::parse(&text).expect("what was written"), manifest);
    let _ = (manifest.images(), manifest.settings_with(&Default::default()));
}

/// An `appliance.toml`.
pub fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(recipe) = Recipe::parse(text) else { return };
    let _ = recipe.appliance();
}

/// A signed document, and the same bytes as one with a right signature.
pub fn signed(data: &[u8]) {
    if let Ok(signed) = serde_json::from_slice::<Signed>(data) {
        check(&signed);
    }
    static KEY: OnceLock<SigningKey> = OnceLock::new();
    let key = KEY.get_or_init(|| SigningKey::generate().expect("a key"));
    let Ok(payload) = std::str::from_utf8(data) else { return };
    for kind in [Kind::Manifest, Kind::Channel, Kind::KeyChange] {
        let signed = Signed::sign(kind, payload.to_owned(), key);
        assert_eq!(signed.verified(kind).expect("it was just signed"), payload);
        check(&signed);
    }
}

fn check(signed: &Signed) {
    let good = [Kind::Manifest, Kind::Channel, Kind::KeyChange].map(|kind| signed.verified(kind).is_ok());
    assert!(good.iter().filter(|good| **good).count() <= 1, "one kind passes for another");
    let _ = (signed.verified_json::<ChannelPointer>(Kind::Channel), signed.verified_json::<KeyChange>(Kind::KeyChange));
}

/// An OVF descriptor.
pub fn ovf(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = collective_maker::check_ovf(text);
}

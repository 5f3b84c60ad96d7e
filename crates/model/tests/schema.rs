//! The published JSON Schema of `appliance.toml` is the one that the code reads by.

use std::path::Path;

#[test]
fn the_published_schema_is_current() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/formats/appliance.schema.json");
    let current = serde_json::to_string_pretty(&collective_model::Recipe::json_schema()).unwrap() + "\n";
    if std::env::var_os("UPDATE_SCHEMA").is_some() {
        std::fs::write(&path, &current).unwrap();
    }
    let published = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(published == current, "write it anew: UPDATE_SCHEMA=1 cargo test -p collective-model --test schema");
}

//! The house rules that a program can check: which crate may use which.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// For each crate, the crates of ours that it may use. `model` is everybody's. Arrows point one way; what is not here
/// is not allowed. docs/architecture.md draws the same.
const ALLOWED: [(&str, &[&str]); 13] = [
    ("model", &[]),
    ("keys", &[]),
    ("disk", &[]),
    ("store", &[]),
    ("volume", &["store"]),
    ("vmm", &[]),
    ("api", &["keys", "store"]),
    ("runner", &["disk", "keys", "store", "vmm", "volume"]),
    ("host", &["api", "keys", "store"]),
    ("plane", &["api", "keys", "store"]),
    ("maker", &["disk", "store"]),
    ("testkit", &[]),
    ("collective", &["api", "host", "keys", "maker", "plane", "runner", "store", "vmm", "volume"]),
];

#[test]
fn arrows_point_one_way() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let short = |name: &str| name.strip_prefix("collective-").unwrap_or(name).to_owned();
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for package in metadata["packages"].as_array().unwrap() {
        let uses = package["dependencies"].as_array().unwrap().iter().filter(|d| d["kind"].is_null());
        let ours = uses.map(|d| d["name"].as_str().unwrap()).filter(|name| name.starts_with("collective-"));
        let ours = ours.map(short).filter(|name| name != "model").collect();
        found.insert(short(package["name"].as_str().unwrap()), ours);
    }
    let allowed: BTreeMap<String, BTreeSet<String>> =
        ALLOWED.iter().map(|(name, uses)| ((*name).into(), uses.iter().map(|u| (*u).to_owned()).collect())).collect();
    for (name, uses) in &found {
        let may = allowed.get(name).unwrap_or_else(|| panic!("crate {name} is not in the list"));
        let more: Vec<_> = uses.difference(may).collect();
        assert!(more.is_empty(), "crate {name} may not use {more:?}");
    }
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        allowed.keys().collect::<Vec<_>>(),
        "the list names crates that are gone"
    );
}

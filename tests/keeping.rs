//! What goes from the store and what stays, as a person does it: withdraw, prune, store check. No machine is started.

use std::path::Path;

use collective_testkit::Fleet;

use crate::{PROGRAM, tiny};

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

#[test]
fn old_versions_go_and_damage_is_found_and_repaired() {
    let fleet = Fleet::start(PROGRAM);
    for version in ["1", "2"] {
        fleet.publish(&tiny(version));
    }
    assert_eq!(fleet.json(&["prune"])["bytes"], 0, "everything is referred to");
    let plan = fleet.json(&["prune", "--keep", "1"]);
    assert_eq!(plan["withdraw"].as_array().unwrap().len(), 1);
    let bytes = plan["bytes"].as_u64().unwrap();
    assert!(fleet.fails(&["withdraw", "test/tiny:2"]).contains("channel stable"));
    fleet.ok(&["withdraw", "test/tiny:1"]);
    assert!(fleet.fails(&["show", "test/tiny:1"]).contains("not published"));
    assert_eq!(fleet.json(&["prune"])["bytes"].as_u64().unwrap(), bytes);
    let done = fleet.json(&["prune", "--yes"]);
    assert_eq!(done["bytes"].as_u64().unwrap(), bytes);
    assert_eq!(fleet.json(&["prune"])["bytes"], 0);
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);

    // Damage one pack and lose another; a backup brings both back.
    let store = fleet.file("a/plane/store");
    let backup = fleet.file("backup");
    copy(&store, &backup);
    let home = store.join("packs/test/tiny");
    let mut packs: Vec<_> = std::fs::read_dir(&home).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    assert_eq!(fleet.json(&["store", "check"])["damaged"].as_array().unwrap().len(), 0);
    let mut damaged = std::fs::read(&packs[0]).unwrap();
    damaged[20] ^= 1;
    std::fs::write(&packs[0], damaged).unwrap();
    let lost = packs.get(1).inspect(|path| std::fs::remove_file(path).unwrap());
    let outcome = fleet.run(&["--json", "store", "check"]);
    assert_eq!(outcome.code, Some(1));
    let found: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
    let hits = found["damaged"].as_array().unwrap();
    assert_eq!(hits.len(), 1 + lost.iter().count(), "{found}");
    assert!(hits.iter().all(|hit| hit["versions"][0] == "test/tiny:2"), "{found}");
    assert!(fleet.fails(&["prune", "--yes"]).contains("`collective store check` tells more"));
    fleet.ok(&["prune"]);
    assert!(fleet.fails(&["store", "check", "--repair"]).contains("--from DIR"), "there is no copy");
    assert!(fleet.fails(&["store", "check", "--repair", "--from", "/nonexistent"]).contains("cannot read"));
    fleet.ok(&["store", "check", "--repair", "--from", &backup.to_string_lossy()]);
    assert_eq!(fleet.json(&["store", "check"])["damaged"].as_array().unwrap().len(), 0);
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);
}

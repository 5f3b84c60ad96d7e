//! A user's data leaves its host encrypted, and comes back: also where the instance is gone, and never as something else.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};
use serde_json::Value;

use crate::{PROGRAM, tiny};

const NOTE: &str = "a note that nobody else may read";

fn launch(fleet: &Fleet, name: &str, host: &str) -> Guest {
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", name, "--host", host, "--publish", &format!("{port}:80")]);
    fleet.wait(name, "healthy");
    Guest { port }
}

fn start(fleet: &Fleet, name: &str, guest: &Guest) {
    fleet.ok(&["start", name]);
    fleet.wait(name, "healthy");
    guest.answers();
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// The objects of private data in the store, by their names.
fn objects(fleet: &Fleet) -> HashMap<PathBuf, Vec<u8>> {
    let read = |path: PathBuf| (path.clone(), std::fs::read(path).unwrap());
    files(&fleet.file("a/plane/store/private")).into_iter().map(read).collect()
}

/// Text that does not compress to less than half.
fn book() -> String {
    let mut bytes = vec![0; 100_000];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// Blocks of a guest's data disk, as a user takes it away.
fn blocks(fleet: &Fleet, name: &str) -> Vec<Vec<u8>> {
    let path = fleet.file("data.raw");
    fleet.ok(&["export", name, &path.to_string_lossy(), "--disk", "data"]);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    bytes.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0)).map(<[u8]>::to_vec).collect()
}

#[test]
fn data_comes_back_after_its_instance_is_gone() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = launch(&fleet, "n", "b");
    guest.put("/notes/x", NOTE);
    let book = book();
    guest.put("/notes/book", &book);
    assert!(fleet.fails(&["backup", "n"]).contains("it is running; stop it first"));
    assert!(fleet.fails(&["backup", "restore", "n"]).contains("there is no backup of n"));
    fleet.ok(&["stop", "n"]);
    let first = fleet.json(&["backup", "n"]);
    let number = |backup: &Value, key: &str| backup[key].as_u64().unwrap();
    assert_eq!(number(&first, "new_bytes"), number(&first, "stored_bytes"));

    // A second backup of the same data adds next to nothing, one of a little more adds little.
    let second = fleet.json(&["backup", "n"]);
    assert_eq!(number(&second, "new_bytes"), 0, "{second}");
    start(&fleet, "n", &guest);
    guest.put("/notes/y", "another note");
    fleet.ok(&["stop", "n"]);
    let third = fleet.json(&["backup", "create", "n"]);
    assert!(
        number(&third, "new_bytes") > 0 && number(&third, "new_bytes") * 10 < number(&first, "new_bytes"),
        "{third} {first}"
    );
    // What is remembered of it is read back where it was lost, and what the store lost is sent again.
    let id = fleet.info("n")["id"].as_str().unwrap().to_owned();
    let remembered = fleet.host_data("b").join("instances").join(&id).join("backup-hashes");
    std::fs::remove_dir_all(&remembered).unwrap();
    let again = fleet.json(&["backup", "n"]);
    assert_eq!(number(&again, "new_bytes"), 0, "{again}");
    assert!(remembered.exists());
    fleet.ok(&["backup", "delete", again["id"].as_str().unwrap()]);
    let listed = fleet.json(&["backup", "list", "n"]);
    let ids: Vec<_> = listed.as_array().unwrap().iter().map(|backup| backup["id"].clone()).collect();
    assert_eq!(ids, [&third["id"], &second["id"], &first["id"]].map(Clone::clone));

    nothing_is_readable(&fleet, "n");

    // The instance and its data go; another one, on another host, gets the data of the first backup, then of the last.
    fleet.ok(&["delete", "n", "--data"]);
    let guest = launch(&fleet, "m", "a");
    guest.put("/notes/own", "what m had");
    assert!(fleet.fails(&["backup", "restore", "m"]).contains("there is no backup of m"));
    let restore = |backup: &Value| {
        let id = &backup["id"].as_str().unwrap()[..8];
        fleet.json(&["backup", "restore", "m", "--backup", id])
    };
    let id = first["id"].as_str().unwrap();
    assert!(fleet.fails(&["backup", "restore", "m", "--backup", id]).contains("it is running"));
    fleet.ok(&["stop", "m"]);
    restore(&first);
    start(&fleet, "m", &guest);
    assert_eq!(guest.get("/notes/x"), NOTE);
    assert_eq!(guest.request("GET", "/notes/y", "").unwrap().0, 404, "written after the backup");
    assert_eq!(guest.request("GET", "/notes/own", "").unwrap().0, 404);
    let kept = fleet.info("m")["checkpoints"].clone();
    assert!(kept[0]["why"].as_str().unwrap().starts_with("before restore of backup"), "{kept}");
    // Into a disk that was enlarged.
    fleet.ok(&["stop", "m"]);
    fleet.ok(&["set", "m", "disk.data=64M"]);
    start(&fleet, "m", &guest);
    fleet.ok(&["stop", "m"]);
    restore(&third);
    start(&fleet, "m", &guest);
    assert_eq!(fleet.info("m")["disks"][1]["size"], 64 << 20);
    assert_eq!(guest.get("/notes/x"), NOTE);
    assert!(guest.get("/notes/book") == book);
    assert_eq!(guest.get("/notes/y"), "another note");

    // What no backup needs goes, and what another one needs stays.
    for backup in [&first, &second] {
        fleet.ok(&["backup", "delete", backup["id"].as_str().unwrap()]);
    }
    fleet.ok(&["prune", "--yes"]);
    fleet.ok(&["stop", "m"]);
    restore(&third);
    fleet.ok(&["backup", "delete", third["id"].as_str().unwrap()]);
    fleet.ok(&["prune", "--yes"]);
    assert!(objects(&fleet).is_empty(), "{:?}", objects(&fleet).keys());
    start(&fleet, "m", &guest);
    assert_eq!(guest.get("/notes/y"), "another note");
}

/// Neither the note nor the digest of any block is in the store, and the key is in no file but its own.
fn nothing_is_readable(fleet: &Fleet, name: &str) {
    let objects = objects(fleet);
    assert!(!objects.is_empty());
    let blocks = blocks(fleet, name);
    assert!(blocks.iter().any(|block| contains(block, NOTE.as_bytes())), "it is in the clear on its host");
    let mut wanted = vec![NOTE.as_bytes().to_vec(), b"CLIR".to_vec(), b"CLIL".to_vec()];
    wanted.extend(blocks.iter().map(|block| blake3_of(block).to_vec()));
    wanted.extend(blocks.iter().map(|block| block[..64].to_vec()).filter(|start| start.iter().any(|byte| *byte > 9)));
    for (path, bytes) in &objects {
        for wanted in &wanted {
            assert!(!contains(bytes, wanted), "{}: {:?}", path.display(), String::from_utf8_lossy(wanted));
        }
    }
    let copy = fleet.file("copy.key");
    let told = fleet.ok(&["key", "export", &copy.to_string_lossy()]);
    assert!(fleet.fails(&["key", "export", &copy.to_string_lossy()]).contains("File exists"));
    let text = std::fs::read_to_string(&copy).unwrap();
    let digits = text.trim().rsplit(' ').next().unwrap();
    assert_eq!(digits.len(), 64);
    assert!(!told.contains(digits));
    std::fs::remove_file(&copy).unwrap();
    // Of the fleet: the plane with its database and store, both hosts with their records and runs, all logs.
    for path in files(fleet.path()) {
        let Ok(bytes) = std::fs::read(&path) else { continue };
        if bytes.len() < 64 << 20 {
            assert!(!contains(&bytes, digits.as_bytes()), "the key is in {}", path.display());
        }
    }
}

fn blake3_of(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

#[test]
fn a_lost_key_an_old_store_and_another_host_are_refused() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = launch(&fleet, "n", "b");
    guest.put("/notes/x", NOTE);
    fleet.ok(&["stop", "n"]);
    let first = fleet.json(&["backup", "n"]);
    let old = objects(&fleet);
    start(&fleet, "n", &guest);
    guest.put("/notes/x", "a newer note");
    fleet.ok(&["stop", "n"]);
    fleet.json(&["backup", "n"]);
    let new: Vec<PathBuf> = objects(&fleet).into_keys().filter(|path| !old.contains_key(path)).collect();

    // The store gives older objects under the names of new ones, as they are and cut to the length that is known; then
    // objects with a wrong bit, then none.
    let before = fleet.info("n")["checkpoints"].clone();
    let sound: Vec<Vec<u8>> = new.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let older = old.values().next().unwrap();
    let spoil = |replace: &dyn Fn(&[u8]) -> Option<Vec<u8>>| {
        for (path, bytes) in new.iter().zip(&sound) {
            match replace(bytes) {
                Some(bytes) => std::fs::write(path, bytes).unwrap(),
                None => std::fs::remove_file(path).unwrap(),
            }
        }
        fleet.fails(&["backup", "restore", "n"])
    };
    let flipped = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes[200] ^= 1;
        Some(bytes)
    };
    let cut = |bytes: &[u8]| Some(older[older.len().saturating_sub(bytes.len())..].to_vec());
    for error in [spoil(&|_| Some(older.clone())), spoil(&cut), spoil(&flipped), spoil(&|_| None)] {
        let says = error.contains("does not have disk \"data\" as the plane recorded it")
            && error.contains("Nothing was changed");
        assert!(says, "{error}");
    }
    assert_eq!(fleet.info("n")["checkpoints"], before);
    // The check of the store names it, and repairs it from a copy.
    let refused = fleet.fails(&["store", "check"]);
    assert!(refused.contains("damaged or missing"), "{refused}");
    let found = fleet.run(&["store", "check", "--json"]).stdout;
    assert!(found.contains("missing") && found.contains("backups"), "{found}");
    let copy = fleet.file("copy");
    std::fs::create_dir(&copy).unwrap();
    for (path, bytes) in new.iter().zip(&sound) {
        std::fs::write(copy.join(path.file_name().unwrap()), bytes).unwrap();
    }
    fleet.ok(&["store", "check", "--repair", "--from", &copy.to_string_lossy()]);
    fleet.ok(&["store", "check"]);
    fleet.ok(&["backup", "restore", "n"]);
    start(&fleet, "n", &guest);
    assert_eq!(guest.get("/notes/x"), "a newer note");
    fleet.ok(&["stop", "n"]);

    // The keys are gone: said at once, by restore and by backup, and in the list of keys. A copy brings them back.
    let copy = fleet.file("owner.key").to_string_lossy().into_owned();
    fleet.ok(&["key", "export", &copy]);
    std::fs::rename(fleet.file("a/plane/keys"), fleet.file("gone")).unwrap();
    let error = fleet.fails(&["backup", "restore", "n"]);
    assert!(error.contains("collective key import") && error.contains("the data is lost"), "{error}");
    let error = fleet.fails(&["backup", "n"]);
    assert!(error.contains("collective key import") && error.contains("lost"), "{error}");
    assert_eq!(fleet.json(&["key", "show"])["needed"][0]["here"], false);
    assert!(fleet.fails(&["key", "export", &fleet.file("other.key").to_string_lossy()]).contains("key import"));
    std::fs::write(fleet.file("rubbish"), "collective-owner-key-1 12").unwrap();
    assert!(fleet.fails(&["key", "import", &fleet.file("rubbish").to_string_lossy()]).contains("is not a key file"));
    // With another key in its place the old backups are refused as before, and new ones begin anew.
    fleet.ok(&["key", "new"]);
    assert!(fleet.fails(&["backup", "restore", "n"]).contains("is not here"));
    let anew = fleet.json(&["backup", "n"]);
    assert_eq!(anew["new_bytes"], anew["stored_bytes"]);
    fleet.ok(&["key", "import", &copy]);
    let id = first["id"].as_str().unwrap();
    fleet.ok(&["backup", "restore", "n", "--backup", id]);
    start(&fleet, "n", &guest);
    assert_eq!(guest.get("/notes/x"), NOTE);

    // Backups and data disks that do not fit, ids that are none.
    other_disks(&fleet, id);
    for (arguments, wanted) in [
        (&["backup", "restore", "n", "--backup", "00000000"][..], "there is no backup"),
        (&["backup", "restore", "n", "--backup", "xyz"], "is no id of a backup"),
        (&["backup", "delete", "ff"], "is no id of a backup"),
        (&["backup", "none"], "there is no instance \"none\""),
    ] {
        let error = fleet.fails(arguments);
        assert!(error.contains(wanted), "{arguments:?}: {error}");
    }
}

/// An appliance whose data disk has another name, and one that has none.
fn other_disks(fleet: &Fleet, backup: &str) {
    let built = tiny("1");
    let text = std::fs::read_to_string(built.join("appliance.toml")).unwrap();
    let named = text.replace("name = \"tiny\"", "name = \"named\"").replace("name = \"data\"", "name = \"stuff\"");
    let system = text.replace("name = \"tiny\"", "name = \"bare\"").replace("role = \"data\"", "role = \"scratch\"");
    let system = system.replace("file = \"data.raw\"", "size = \"1M\"");
    for (name, text) in [("named", named), ("bare", system)] {
        let folder = fleet.file(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("appliance.toml"), text).unwrap();
        for disk in ["system.raw", "data.raw"] {
            std::fs::copy(built.join(disk), folder.join(disk)).unwrap();
        }
        fleet.ok(&["publish", &folder.to_string_lossy()]);
        fleet.ok(&["launch", &format!("test/{name}"), "--name", name, "--host", "a"]);
        fleet.wait(name, "running");
        fleet.ok(&["stop", name]);
    }
    let error = fleet.fails(&["backup", "restore", "named", "--backup", backup]);
    assert!(error.contains("has a data disk \"data\", and this instance has stuff"), "{error}");
    let error = fleet.fails(&["backup", "restore", "bare", "--backup", backup]);
    assert!(error.contains("this instance has no data disks"), "{error}");
    assert!(fleet.fails(&["backup", "bare"]).contains("it has no data disks"));
}

#[test]
fn a_backup_that_its_host_died_over_is_made_once() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = launch(&fleet, "n", "b");
    guest.put("/notes/x", NOTE);
    fleet.ok(&["stop", "n"]);
    let mut asked = fleet.spawn(&["backup", "n"]);
    // Wherever it is: the order is there before it is known to be carried out.
    let ordered = || fleet.info("n")["operations"].as_array().is_some_and(|open| !open.is_empty()).then_some(());
    let done = || (!fleet.json(&["backup", "list"]).as_array().unwrap().is_empty()).then_some(());
    eventually("the backup is ordered", Duration::from_secs(60), || ordered().or_else(done));
    fleet.kill_host("b");
    fleet.run_host("b");
    assert!(asked.wait().unwrap().success(), "whoever asked for it hears of its end");
    assert_eq!(fleet.json(&["backup", "list"]).as_array().unwrap().len(), 1);
    // What the store lost is noticed by the next backup, and sent again.
    objects(&fleet).keys().for_each(|path| std::fs::remove_file(path).unwrap());
    assert!(fleet.fails(&["backup", "restore", "n"]).contains("does not have disk"));
    fleet.ok(&["backup", "n"]);
    fleet.ok(&["backup", "restore", "n"]);
    start(&fleet, "n", &guest);
    assert_eq!(guest.get("/notes/x"), NOTE);
}

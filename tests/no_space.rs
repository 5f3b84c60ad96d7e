//! Full disks and missing files: said plainly, nothing half done, and it goes on when there is space again.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

/// Only root can mount a small file system to fill.
fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_full_store_takes_nothing_by_halves() {
    if !is_root() {
        return;
    }
    let fleet = Fleet::start_on_small_disk(PROGRAM, 12 << 20);
    let folder = tiny("1");
    let error = fleet.fails(&["publish", &folder.to_string_lossy()]);
    assert!(error.contains("full") && error.contains("free space"), "{error}");
    assert!(fleet.fails(&["show", "test/tiny"]).contains("no appliance"), "nothing half published");
    fleet.resize_disk("a", 200 << 20);
    fleet.ok(&["publish", &folder.to_string_lossy()]);
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);
}

#[test]
fn a_full_host_pauses_the_guest_until_there_is_space() {
    if !is_root() {
        return;
    }
    let mut fleet = Fleet::start(PROGRAM);
    fleet.small_disk("b", 200 << 20);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "b", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    guest.put("/notes/before", "there was space");
    eventually("everything is fetched", LONG, || (fleet.info("n")["frames_missing"] == 0).then_some(()));
    fleet.resize_disk("b", fleet.used_space("b") + (1 << 20));
    let writer = std::thread::spawn(move || {
        let large = "0123456789abcdef".repeat(500_000);
        Guest { port }.request("PUT", "/notes/large", &large);
    });
    eventually("the guest is paused, and the host says why", LONG, || {
        (fleet.info("n")["state"] == "paused" && fleet.ok(&["history", "n"]).contains("disk is full")).then_some(())
    });
    fleet.resize_disk("b", 200 << 20);
    eventually("it goes on by itself", LONG, || (fleet.info("n")["state"] == "running").then_some(()));
    writer.join().unwrap();
    guest.answers();
    assert_eq!(guest.get("/notes/before"), "there was space");
}

#[test]
fn a_missing_layer_is_named_and_not_made_up() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    fleet.ok(&["launch", "test/tiny", "--name", "n"]);
    fleet.wait("n", "healthy");
    fleet.ok(&["stop", "n"]);
    let id = fleet.info("n")["id"].as_str().unwrap().to_owned();
    let layers = fleet.host_data("a").join("instances").join(&id).join("layers");
    // The data disk is the second, and so is its first layer.
    let data = layers.join("2");
    std::fs::rename(&data, fleet.file("away")).unwrap();
    let error = fleet.fails(&["start", "n"]);
    assert!(error.contains("disk \"data\"") && error.contains("layers/2"), "{error}");
    assert_eq!(fleet.info("n")["state"], "failed");
    assert!(!data.exists(), "an empty disk in its place would be a lie");
    std::fs::rename(fleet.file("away"), &data).unwrap();
    fleet.ok(&["start", "n"]);
    fleet.wait("n", "healthy");
}

//! A version that ships its running machine: a new instance goes on with it where that is possible, and is booted elsewhere.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::live::guest;
use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

fn launch(fleet: &Fleet, name: &str, more: &[&str]) -> Guest {
    let port = free_port();
    let publish = format!("{port}:80");
    let mut command = vec!["launch", "test/tiny", "--name", name, "--publish", &publish];
    command.extend(more);
    fleet.ok(&command);
    fleet.wait(name, "healthy");
    Guest { port }
}

fn happened(fleet: &Fleet, name: &str, what: &str) -> bool {
    fleet.ok(&["history", name]).contains(what)
}

/// The guest has become who the seed disk says.
#[track_caller]
fn is_called(guest: &Guest, name: &str) {
    eventually("it takes up its name", LONG, || (guest.get("/instance/hostname").trim() == name).then_some(()));
}

#[test]
fn a_new_instance_goes_on_with_the_machine_of_its_version() {
    let mut fleet = Fleet::start(PROGRAM);
    let folder = tiny("1");
    let folder = folder.to_string_lossy();
    let published = fleet.json(&["publish", &folder, "--warm"]);
    assert!(published["stored_bytes"].as_u64().unwrap() > 0, "{published}");
    assert!(fleet.ok(&["show", "test/tiny"]).contains("goes on in place of booting"));
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);
    assert_eq!(fleet.json(&["publish", &folder, "--warm"])["sent_bytes"], 0, "it is not booted again");
    fleet.ok(&["publish", &folder]);

    let a = launch(&fleet, "a", &[]);
    let b = launch(&fleet, "b", &[]);
    assert!(happened(&fleet, "a", "goes on with the machine that came with version 1"));
    is_called(&a, "a");
    is_called(&b, "b");
    assert_ne!(a.get("/instance/machine-id"), b.get("/instance/machine-id"));
    assert_eq!(a.get("/boots"), "1", "the maker's");
    a.put("/notes/x", "mine");
    let generation = a.get("/fill?5");

    // From here on it is an instance like any other: what is stored of it is what it has of its own.
    let suspended = fleet.json(&["suspend", "a"]);
    assert!(suspended["store"]["stored_bytes"].as_u64().unwrap() > 0, "{suspended}");
    fleet.ok(&["resume", "a"]);
    fleet.join("other");
    let cold = fleet.json(&["suspend", "b"]);
    let new = cold["store"]["new_bytes"].as_u64().unwrap();
    assert!(new < 8 << 20, "{cold}");
    fleet.ok(&["resume", "b", "--host", "other"]);
    fleet.wait("b", "healthy");
    is_called(&b, "b");
    eventually("all has arrived", LONG, || (fleet.info("b")["arrival"]["complete"] == true).then_some(()));
    fleet.ok(&["suspend", "b"]);
    fleet.ok(&["resume", "b"]);
    fleet.wait("b", "healthy");
    assert_eq!(a.get("/pages"), format!("1280 pages of {generation}, 0 bad"));
    fleet.ok(&["checkpoint", "a"]);
    a.put("/notes/x", "other");
    fleet.ok(&["restore", "a", "1"]);
    fleet.wait("a", "healthy");
    assert_eq!(a.get("/notes/x").trim(), "mine");
    assert_eq!(a.get("/pages"), format!("1280 pages of {generation}, 0 bad"));

    // Off and on it is booted, on its own disks; and the next version finds its data.
    fleet.ok(&["restart", "a"]);
    fleet.wait("a", "healthy");
    assert_eq!(a.get("/boots"), "2");
    assert_eq!(a.get("/notes/x").trim(), "mine");
    fleet.ok(&["publish", &tiny("2").to_string_lossy()]);
    fleet.ok(&["update", "a"]);
    assert_eq!(a.get("/version"), "2");
    assert_eq!(a.get("/notes/x").trim(), "mine");
}

/// Bytes of its memory that a machine reads from pages which another process reads as well.
fn shared_bytes(fleet: &Fleet, name: &str) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", fleet.qemu_pid(name))).unwrap();
    let kib = |line: &str| line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    let (mut is_memory, mut bytes) = (false, 0);
    for line in maps.lines() {
        if line.split_whitespace().next().is_some_and(|first| first.contains('-')) {
            is_memory = line.ends_with("/.memory");
        } else if is_memory && line.starts_with("Shared_Clean:") {
            bytes += kib(line).unwrap() << 10;
        }
    }
    bytes
}

#[test]
fn instances_of_one_machine_share_its_pages() {
    let fleet = Fleet::start(PROGRAM);
    fleet.ok(&["publish", &tiny("1").to_string_lossy(), "--warm"]);
    launch(&fleet, "first", &[]);
    eventually("the version's memory is a file", LONG, || {
        let folder = fleet.host_data("a").join("warm");
        std::fs::read_dir(folder).ok()?.flatten().find(|entry| entry.path().extension().is_none())
    });
    let a = launch(&fleet, "a", &[]);
    let b = launch(&fleet, "b", &[]);
    if rustix::process::geteuid().is_root() {
        let shared = shared_bytes(&fleet, "b");
        assert!(shared > 1 << 20, "{shared}");
    }
    // What one writes, or gives back, no other sees; and what was saved of it does not need the file.
    let (one, other) = (a.get("/fill?20"), b.get("/fill?20"));
    fleet.ok(&["suspend", "a"]);
    assert_eq!(b.get("/pages"), format!("5120 pages of {other}, 0 bad"));
    let c = launch(&fleet, "c", &[]);
    is_called(&c, "c");
    std::fs::remove_dir_all(fleet.host_data("a").join("warm")).unwrap();
    fleet.ok(&["resume", "a"]);
    fleet.wait("a", "healthy");
    assert_eq!(a.get("/pages"), format!("5120 pages of {one}, 0 bad"));
    // Clones have the same files, and share what they read of these.
    fleet.ok(&["delete", "b", "--data"]);
    fleet.ok(&["restart", "c"]);
    fleet.wait("c", "healthy");
    let cold = c.get("/fill?5");
    fleet.ok(&["clone", "c", "--count", "2", "--name", "copy"]);
    for name in ["copy-1", "copy-2"] {
        fleet.wait(name, "healthy");
    }
    if rustix::process::geteuid().is_root() {
        let shared = shared_bytes(&fleet, "copy-2");
        assert!(shared > 1 << 20, "{shared}");
    }
    assert_eq!(c.get("/pages"), format!("1280 pages of {cold}, 0 bad"));
}

#[test]
fn what_the_machine_does_not_suit_is_booted() {
    let fleet = Fleet::start(PROGRAM);
    let folder = tiny("1");
    let folder = folder.to_string_lossy();
    fleet.ok(&["publish", &folder, "--as", "cold"]);
    let error = fleet.fails(&["publish", &folder, "--as", "cold", "--warm"]);
    assert!(error.contains("published without a running machine"), "{error}");
    fleet.ok(&["publish", &folder, "--warm", "--set", "title=Warm"]);
    let other = launch(&fleet, "other", &[]);
    assert!(happened(&fleet, "other", "it was booted with other settings (title)"));
    assert_eq!(other.get("/setting/title"), "Tiny");
    let same = launch(&fleet, "same", &["--set", "title=Warm"]);
    assert!(happened(&fleet, "same", "goes on with the machine"));
    assert_eq!(same.get("/setting/title"), "Warm");
    launch(&fleet, "large", &["--set", "title=Warm", "--memory", "600M"]);
    assert!(happened(&fleet, "large", "another size of memory"));
}

#[test]
fn a_machine_of_its_version_moves_without_what_the_other_host_has_of_that() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("c");
    fleet.ok(&["publish", &tiny("1").to_string_lossy(), "--warm"]);
    fleet.ok(&["launch", "test/tiny", "--name", "other", "--host", "c"]);
    eventually("the other host has all", LONG, || (fleet.info("other")["frames_missing"] == 0).then_some(()));
    fleet.ok(&["delete", "other", "--data"]);
    // Both hosts are this machine, so it publishes no port.
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "a"]);
    fleet.wait("n", "healthy");
    assert!(happened(&fleet, "n", "goes on with the machine that came with version 1"));
    let generation = guest(&fleet).get("/fill?5");
    let moved = fleet.json(&["move", "n", "--to", "c"]);
    let [sent, kept] = ["bytes", "kept_bytes"].map(|field| moved[field].as_u64().unwrap());
    eprintln!("{moved}");
    assert!(moved["live"] == true && kept > sent, "{moved}");
    let there = guest(&fleet);
    assert_eq!(there.get("/pages"), format!("1280 pages of {generation}, 0 bad"));
    assert_eq!(there.get("/boots"), "1", "it was not booted");
    // And home again, where both help: the version's memory, and what was kept.
    let back = fleet.json(&["move", "n", "--to", "a"]);
    assert!(back["bytes"].as_u64().unwrap() < sent, "{back} after {moved}");
    assert_eq!(guest(&fleet).get("/pages"), format!("1280 pages of {generation}, 0 bad"));
}

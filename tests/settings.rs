//! What a user may set, and what survives: settings, identity, resources, names, logs.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::{PROGRAM, tiny};

#[test]
fn settings_and_resources_reach_the_guest_and_survive() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    let port = free_port();
    let published = format!("{port}:80");
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--publish", &published, "--set", "title=It's \"mine\" $HOME"]);
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    assert_eq!(guest.get("/setting/title"), "It's \"mine\" $HOME", "nothing is interpreted on the way");
    guest.put("/notes/x", "kept");
    let machine_id = guest.get("/machine-id");
    assert!(fleet.ok(&["logs", "n"]).contains("tiny 1 ready"));
    assert!(fleet.json(&["open", "n"])["url"].as_str().unwrap().ends_with(&port.to_string()));

    // A running guest is restarted, and the command says so. A disk only grows.
    let error = fleet.fails(&["set", "n", "disk.data=1M"]);
    assert!(error.contains("can only grow"), "{error}");
    assert!(fleet.fails(&["set", "n", "disk.nope=1G"]).contains("no disk"));
    assert!(fleet.fails(&["set", "n", "colour=red"]).contains("no setting"));
    let said = fleet.ok(&["set", "n", "title=Second", "memory=640M", "disk.data=64M"]);
    assert!(said.contains("was restarted"), "{said}");
    eventually("it is restarted", Duration::from_secs(60), || {
        (fleet.info("n")["disks"][1]["size"] == 64 << 20).then_some(())
    });
    fleet.wait("n", "healthy");
    guest.answers();
    assert_eq!(guest.get("/setting/title"), "Second");
    assert_eq!(guest.get("/notes/x"), "kept");
    assert_eq!(guest.get("/machine-id"), machine_id);

    // Another name is another hostname, at the next start; everything else stays.
    fleet.ok(&["rename", "n", "diary"]);
    fleet.ok(&["restart", "diary"]);
    fleet.wait("diary", "healthy");
    guest.answers();
    assert_eq!(guest.get("/hostname"), "diary");
    assert_eq!(guest.get("/machine-id"), machine_id);
    assert!(fleet.fails(&["info", "n"]).contains("no instance"));

    // Deleting keeps the data disk, and says where.
    let kept = fleet.json(&["delete", "diary"])["kept"].as_str().unwrap().to_owned();
    assert!(std::path::Path::new(&kept).join("layers").is_dir());
}

#[test]
fn a_host_takes_what_it_is_told_to_have_memory_for() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    fleet.join("b");
    let has = |fleet: &mut Fleet, size: &str, bytes: u64| {
        fleet.kill_host("b");
        fleet.run_host_with("b", &["--memory", size]);
        eventually("it says so", Duration::from_secs(60), || {
            let hosts = fleet.json(&["host", "list"]);
            let host = hosts.as_array()?.iter().find(|host| host["name"] == "b")?;
            (host["facts"]["memory"] == bytes).then_some(())
        });
    };
    has(&mut fleet, "300M", 300 << 20);
    let launch = ["launch", "test/tiny", "--name", "n", "--host", "b"];
    let error = fleet.fails(&launch);
    assert!(error.contains("44 MiB of memory left"), "{error}");
    has(&mut fleet, "4T", 4 << 40);
    fleet.ok(&launch);
}

#[test]
fn the_same_disks_boot_by_uefi_which_keeps_its_variables() {
    let fleet = Fleet::start(PROGRAM);
    let (built, folder) = (tiny("1"), fleet.file("uefi"));
    std::fs::create_dir(&folder).unwrap();
    for disk in ["system.raw", "data.raw"] {
        std::os::unix::fs::symlink(built.join(disk), folder.join(disk)).unwrap();
    }
    let recipe = std::fs::read_to_string(built.join("appliance.toml")).unwrap();
    std::fs::write(folder.join("appliance.toml"), recipe.replace("\"bios\"", "\"uefi\"")).unwrap();
    fleet.ok(&["publish", &folder.to_string_lossy()]);
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    assert!(fleet.ok(&["logs", "n"]).contains("BdsDxe: starting Boot"), "the firmware found the boot loader");
    assert_eq!(guest.get("/uefi-boots"), "1", "the guest wrote a variable");
    guest.put("/notes/x", "kept");
    // The firmware's flash is part of a machine that goes on, and its guest can restart from it.
    fleet.ok(&["suspend", "n"]);
    fleet.ok(&["resume", "n"]);
    assert_eq!(guest.get("/notes/x"), "kept");

    fleet.ok(&["restart", "n"]);
    fleet.wait("n", "healthy");
    guest.answers();
    assert_eq!(guest.get("/uefi-boots"), "2", "the variable of the first boot is still there");
    assert_eq!(guest.get("/notes/x"), "kept");
    fleet.ok(&["delete", "n", "--data"]);
}

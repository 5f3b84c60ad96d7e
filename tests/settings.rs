//! What a user may set, and what survives: settings, identity, resources, names, logs.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port, tiny};

const PROGRAM: &str = env!("CARGO_BIN_EXE_collective");
const SCRATCH: &str = env!("CARGO_TARGET_TMPDIR");

#[test]
fn settings_and_resources_reach_the_guest_and_survive() {
    let fleet = Fleet::start(PROGRAM);
    fleet.ok(&["publish", &tiny(PROGRAM, SCRATCH, "1").to_string_lossy()]);
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
fn a_uefi_machine_starts_its_firmware_and_keeps_its_variables() {
    let fleet = Fleet::start(PROGRAM);
    let folder = fleet.file("uefi");
    std::fs::create_dir(&folder).unwrap();
    let toml = "publisher='p'\nname='uefi'\nversion='1'\n[hardware]\nmemory='256M'\nfirmware='uefi'\n\
                [[disk]]\nname='system'\nrole='system'\nfile='system.raw'\n";
    std::fs::write(folder.join("appliance.toml"), toml).unwrap();
    std::fs::write(folder.join("system.raw"), vec![0x5a; 1 << 20]).unwrap();
    fleet.ok(&["publish", &folder.to_string_lossy()]);
    fleet.ok(&["launch", "p/uefi", "--name", "n"]);
    fleet.wait("n", "running");
    eventually("the firmware looks for something to boot", Duration::from_secs(60), || {
        fleet.ok(&["logs", "n"]).contains("BdsDxe").then_some(())
    });
    fleet.ok(&["delete", "n", "--data"]);
}

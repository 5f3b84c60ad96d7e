//! Machines come from elsewhere and go elsewhere, and stay the same bytes on the way.

use collective_testkit::{Fleet, Guest, free_port};

use crate::{PROGRAM, tiny};

#[test]
fn out_as_qcow2_and_in_again_is_the_same_image() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    let image = |reference: &str| fleet.json(&["show", reference])["manifest"]["disks"][0]["image"].clone();
    let path = |name: &str| fleet.file(name).to_string_lossy().into_owned();
    fleet.ok(&["export", "test/tiny:1", &path("disk.qcow2")]);
    let info = std::process::Command::new("qemu-img").args(["check", "-q", &path("disk.qcow2")]).status().unwrap();
    assert!(info.success());
    assert!(fleet.fails(&["export", "test/tiny:1", &path("disk.qcow2")]).contains("there already"));
    assert!(fleet.fails(&["export", "test/tiny:1", &path("disk.vhd")]).contains(".qcow2"));
    assert!(fleet.fails(&["export", "n", &path("n.raw")]).contains("instance"));

    let folder = path("again");
    let import = ["import", &path("disk.qcow2"), "--name", "me/again", "--role", "system", "--memory", "256M", "--out"];
    fleet.ok(&[&import[..], &[&folder, "--port", "80"]].concat());
    assert!(fleet.fails(&[&import[..], &[&folder]].concat()).contains("there already"));
    fleet.ok(&["publish", &folder]);
    assert_eq!(image("me/again"), image("test/tiny"), "the same blocks give the same image");
    let shown = fleet.json(&["show", "me/again"]);
    assert_eq!(shown["manifest"]["hardware"]["memory"], 256 << 20);
    assert_eq!(shown["manifest"]["ports"][0]["guest"], 80);

    // A foreign disk is the user's unless its maker says otherwise.
    fleet.ok(&["import", &path("disk.qcow2"), "--name", "me/mine", "--out", &path("mine")]);
    let text = std::fs::read_to_string(fleet.file("mine/appliance.toml")).unwrap();
    assert!(text.contains("role = \"data\""), "{text}");
}

#[test]
fn out_as_ova_and_in_again_is_the_same_machine() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    let path = |name: &str| fleet.file(name).to_string_lossy().into_owned();
    let manifest = |reference: &str| fleet.json(&["show", reference])["manifest"].clone();
    assert!(fleet.fails(&["export", "test/tiny:1", &path("a.ova"), "--disk", "data"]).contains("--disk"));
    let told = fleet.json(&["export", "test/tiny:1", &path("tiny.ova")]);
    assert_eq!(told["disks"].as_array().unwrap().len(), 2);
    assert!(fleet.fails(&["export", "test/tiny:1", &path("tiny.ova")]).contains("there already"));

    // Other programs read it too: the order of the members, and the manifest.
    let run = |command: &str| {
        let output = std::process::Command::new("sh").args(["-c", command]).current_dir(fleet.path()).output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let members = "tiny.ovf\ntiny.mf\ntiny-disk1.vmdk\ntiny-disk2.vmdk\n";
    assert_eq!(run("tar -tf tiny.ova && mkdir open && tar -xf tiny.ova -C open"), members);
    assert_eq!(run("cd open && sha256sum --strict -c tiny.mf").lines().count(), 3);

    fleet.ok(&["import", &path("tiny.ova"), "--name", "me/again", "--role", "system", "--out", &path("again")]);
    fleet.ok(&["publish", &path("again")]);
    let (before, after) = (manifest("test/tiny"), manifest("me/again"));
    assert_eq!(after["hardware"], before["hardware"]);
    assert_eq!(after["summary"], before["summary"]);
    for (disk, file) in [(0, "disk1.raw"), (1, "disk2.raw")] {
        assert_eq!(after["disks"][disk]["size"], before["disks"][disk]["size"]);
        let (name, raw) = (before["disks"][disk]["name"].as_str().unwrap(), path(file));
        fleet.ok(&["export", "test/tiny:1", &raw, "--disk", name]);
        assert!(std::fs::read(&raw).unwrap() == std::fs::read(fleet.file("again").join(file)).unwrap(), "{name}");
    }

    // UEFI and other hardware too.
    let import = ["import", &path("tiny.ova"), "--name", "me/other", "--role", "system", "--out", &path("other")];
    fleet.ok(&[&import[..], &["--firmware", "uefi", "--cpus", "3", "--memory", "300M"]].concat());
    fleet.ok(&["publish", &path("other")]);
    fleet.ok(&["export", "me/other", &path("other.ova")]);
    let import = ["import", &path("other.ova"), "--name", "me/back", "--out", &path("back")];
    let back = fleet.json(&import);
    assert_eq!(back["hardware"], manifest("me/other")["hardware"]);
    assert_eq!(back["hardware"]["firmware"], "uefi");

    // One bit of a disk is damaged on the way.
    let mut bytes = std::fs::read(fleet.file("tiny.ova")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(fleet.file("tiny.ova"), bytes).unwrap();
    let error = fleet.fails(&["import", &path("tiny.ova"), "--name", "me/bad", "--out", &path("bad")]);
    assert!(error.contains("tiny.mf") && error.contains(".vmdk"), "{error}");
    assert!(!fleet.file("bad").exists());
}

#[test]
fn an_instance_leaves_with_all_that_it_wrote() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "b", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    Guest { port }.put("/notes/x", "it comes along");
    let path = |name: &str| fleet.file(name).to_string_lossy().into_owned();
    let refused = fleet.fails(&["export", "n", &path("n.ova")]);
    assert!(refused.contains("an instance that is off, and it is running"), "{refused}");
    fleet.ok(&["stop", "n"]);
    assert!(fleet.fails(&["export", "n", &path("n.raw"), "--disk", "other"]).contains("system, data"));
    fleet.ok(&["export", "n", &path("data.qcow2"), "--disk", "data"]);
    fleet.ok(&["export", "n", &path("n.ova")]);
    let mut left: Vec<_> = std::fs::read_dir(fleet.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    left.retain(|name| name.to_string_lossy().starts_with(".export"));
    assert!(left.is_empty(), "nothing half-made is left behind: {left:?}");

    // The machine starts again from the file, elsewhere and as another appliance, with the note.
    let import = ["import", &path("n.ova"), "--name", "me/n", "--role", "system", "--port", "80"];
    fleet.ok(&[&import[..], &["--out", &path("again")]].concat());
    fleet.ok(&["publish", &path("again")]);
    let port = free_port();
    fleet.ok(&["launch", "me/n", "--name", "m", "--host", "a", "--publish", &format!("{port}:80")]);
    fleet.wait("m", "running");
    let guest = Guest { port };
    guest.answers();
    assert_eq!(guest.get("/notes/x"), "it comes along");
    // And the instance itself is as it was.
    fleet.ok(&["start", "n"]);
    fleet.wait("n", "healthy");

    // A damaged disk does not leave as if it were whole, and the user reads why.
    fleet.ok(&["stop", "n"]);
    let layers = fleet.host_data("b").join("instances").join(fleet.info("n")["id"].as_str().unwrap()).join("layers");
    for layer in
        std::fs::read_dir(layers).unwrap().flatten().filter(|e| e.path().extension().is_some_and(|e| e == "map"))
    {
        std::fs::write(layer.path(), "no map").unwrap();
    }
    let refused = fleet.fails(&["export", "n", &path("damaged.raw")]);
    assert!(refused.contains("cannot be opened") && refused.contains("its map is cut short"), "{refused}");
    assert!(!fleet.file("damaged.raw").exists());
}

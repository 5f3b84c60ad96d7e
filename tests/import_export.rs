//! Machines come from elsewhere and go elsewhere, and stay the same bytes on the way.

use collective_testkit::{Fleet, tiny};

const PROGRAM: &str = env!("CARGO_BIN_EXE_collective");
const SCRATCH: &str = env!("CARGO_TARGET_TMPDIR");

#[test]
fn out_as_qcow2_and_in_again_is_the_same_image() {
    let fleet = Fleet::start(PROGRAM);
    fleet.ok(&["publish", &tiny(PROGRAM, SCRATCH, "1").to_string_lossy()]);
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

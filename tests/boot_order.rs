//! A version that says what its machine reads while it boots: hosts fetch that first, and nothing else before it is up.

use std::path::Path;
use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::{PROGRAM, tiny};

/// A copy of the version's folder, which the notes are written into.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

#[test]
fn what_the_boot_reads_comes_first_and_the_rest_when_the_guest_is_up() {
    let mut fleet = Fleet::start(PROGRAM);
    let link = fleet.join_over_link("b");
    let folder = fleet.file("tiny");
    copy(&tiny("1"), &folder);
    let folder = folder.to_string_lossy();
    assert!(fleet.fails(&["trace", "nothing-here"]).contains("nothing-here"));
    let traced = fleet.json(&["trace", &folder]);
    let published = fleet.json(&["publish", &folder]);
    let (boot, used) = (traced["boot_bytes"].as_u64().unwrap(), published["used_bytes"].as_u64().unwrap());
    assert!(0 < boot && boot < used, "{boot} of {used}");
    assert_eq!(fleet.json(&["publish", &folder])["sent_bytes"], 0, "the same again");
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);

    // Slow enough that whatever is fetched beside the boot would be seen.
    link.slow(1 << 20);
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "b", "--publish", &format!("{port}:80")]);
    eventually("it is healthy", Duration::from_secs(120), || (fleet.info("n")["health"] == "healthy").then_some(()));
    let info = fleet.info("n");
    let sent = published["stored_bytes"].as_u64().unwrap();
    assert!(info["bytes_fetched"].as_u64().unwrap() < sent, "{info}");
    Guest { port }.answers();
    link.slow(0);
    eventually("everything is fetched", Duration::from_secs(60), || {
        (fleet.info("n")["frames_missing"] == 0).then_some(())
    });

    // Notes that are not notes are refused; notes about other content do no harm.
    std::fs::write(Path::new(&*folder).join("boot.json"), "[1, 2").unwrap();
    assert!(fleet.fails(&["publish", &folder, "--as", "2"]).contains("boot.json is wrong"));
    std::fs::write(Path::new(&*folder).join("boot.json"), r#"{"system": [[4294967295, 4294967295], [3, 9]]}"#).unwrap();
    fleet.ok(&["publish", &folder, "--as", "2"]);
    assert_eq!(fleet.json(&["verify", "test/tiny:2"])["sound"], true);
}

//! The disks of a version as files, for programs that know nothing of us.

use std::time::Duration;

use collective_testkit::{Fleet, eventually};

use crate::{PROGRAM, tiny};

#[test]
fn other_programs_read_the_same_bytes_and_writes_are_gone_in_the_end() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    let raw = fleet.file("system.raw");
    fleet.ok(&["export", "test/tiny:1", &raw.to_string_lossy()]);
    let exported = std::fs::read(&raw).unwrap();
    let dir = fleet.file("mnt");
    std::fs::create_dir(&dir).unwrap();
    let dir = dir.to_string_lossy();
    assert!(fleet.fails(&["mount", "test/tiny:7", &dir]).contains("7"));
    assert!(fleet.fails(&["mount", "test/tiny:1", &fleet.path().to_string_lossy()]).contains("not empty"));
    for round in 0..2 {
        let mut mount = fleet.spawn(&["mount", "test/tiny:1", &dir]);
        let disk = fleet.file("mnt/system");
        eventually("it is mounted", Duration::from_secs(30), || disk.exists().then_some(()));
        assert!(fleet.file("mnt/data").exists());
        assert!(std::fs::read(&disk).unwrap() == exported, "round {round}");
        let file = std::fs::File::options().write(true).open(&disk).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[9; 5000], 1 << 20).unwrap();
        drop(file);
        assert_eq!(std::fs::read(&disk).unwrap()[1 << 20..][..5000], [9; 5000]);
        let pid = rustix::process::Pid::from_child(&mount);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        assert!(mount.wait().unwrap().success());
        assert!(!disk.exists(), "it is unmounted");
    }
}

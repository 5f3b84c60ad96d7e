//! What goes out must come in again the same, and what fails must leave nothing.

use std::process::Command;

use collective_model::{ByteSize, Firmware};

use super::*;
use crate::{Import, import};

const SIZE: usize = 1 << 20;

/// A machine of three disks (the last one is empty, and of no whole grain) and their contents.
fn machine(folder: &Path, firmware: Firmware) -> (Export, Vec<Vec<u8>>) {
    let contents: Vec<Vec<u8>> = vec![
        (0..SIZE).map(|index| (index * 7 + index / 251) as u8).collect(),
        (0..SIZE / 2).map(|index| if index < 4096 { 0 } else { index as u8 }).collect(),
        vec![0; SIZE + 512],
    ];
    let roles = [("system", DiskRole::System), ("data", DiskRole::Data), ("tmp", DiskRole::Scratch)];
    let disks = contents.iter().zip(roles).map(|(content, (name, role))| {
        let raw = folder.join(format!("{name}.raw"));
        std::fs::write(&raw, content).unwrap();
        ExportDisk { name: name.parse().unwrap(), role, raw }
    });
    let hardware = Hardware { cpus: 3, memory: ByteSize(768 << 20), firmware, display: false, cpu: Default::default() };
    let summary = "Notes <&\"'> & more\u{1b}\u{7}".to_owned();
    (Export { name: "notes".parse().unwrap(), summary, hardware, disks: disks.collect() }, contents)
}

#[test]
fn an_archive_comes_in_again_the_same() {
    for firmware in [Firmware::Bios, Firmware::Uefi] {
        let folder = tempfile::tempdir().unwrap();
        let (machine, contents) = machine(folder.path(), firmware);
        let ova = folder.path().join("notes.ova");
        export(&machine, &ova, ExportFormat::Ova, &mut |_| {}).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing but the target is left");

        let mut archive = tar::Archive::new(File::open(&ova).unwrap());
        let names = archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().display().to_string());
        let expected = ["notes.ovf", "notes.mf", "notes-disk1.vmdk", "notes-disk2.vmdk", "notes-disk3.vmdk"];
        assert_eq!(names.collect::<Vec<_>>(), expected);

        let order = Import {
            file: ova,
            appliance: "me/notes".parse().unwrap(),
            version: "1".parse().unwrap(),
            out: folder.path().join("out"),
            role: DiskRole::System,
            cpus: None,
            memory: None,
            firmware: None,
            ports: Vec::new(),
        };
        let imported = import(&order, &mut |_| {}).unwrap();
        let hardware = &imported.recipe.hardware;
        assert_eq!((hardware.cpus, hardware.memory, hardware.firmware), (3, ByteSize(768 << 20), firmware));
        assert_eq!(imported.recipe.summary, "Notes <&\"'> & more");
        for (number, content) in (1..).zip(&contents) {
            let back = std::fs::read(imported.folder.join(format!("disk{number}.raw"))).unwrap();
            assert!(back == *content, "disk {number}");
        }
    }
}

/// VirtualBox finds the disks of its own description by the UUIDs of the list, each once.
#[test]
fn virtualbox_is_told_of_uefi_only() {
    let folder = tempfile::tempdir().unwrap();
    let (mut machine, _) = machine(folder.path(), Firmware::Uefi);
    let member = |file: &str| DiskMember { file: file.into(), length: 1, capacity: 512, sum: [255; 32] };
    let members = [member("a"), member("b"), member("c")];
    let text = envelope(&machine, &members);
    let uuids = |start: &str, end: char| -> Vec<_> {
        text.split(start).skip(1).map(|rest| rest.split(end).next().unwrap().to_owned()).collect()
    };
    let listed = uuids("vbox:uuid=\"", '"');
    assert_eq!(listed, uuids("<Image uuid=\"{", '}'));
    assert_eq!(listed.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
    assert_eq!(listed[0], "ffffffff-ffff-8fff-bfff-ffffffffff00");
    machine.hardware.firmware = Firmware::Bios;
    assert!(!envelope(&machine, &members).contains("vbox:Machine"));
}

#[test]
fn one_disk_is_a_file_of_its_own() {
    for (file, format) in [("a.img", ExportFormat::Raw), ("a.qcow2", ExportFormat::Qcow2)] {
        let folder = tempfile::tempdir().unwrap();
        let (mut machine, contents) = machine(folder.path(), Firmware::Bios);
        let to = folder.path().join(file);
        assert_eq!(ExportFormat::of(&to), Some(format));
        let error = export(&machine, &to, format, &mut |_| {}).unwrap_err();
        assert!(matches!(error, ExportError::OneDisk { count: 3, .. }), "{error}");
        machine.disks.truncate(1);
        export(&machine, &to, format, &mut |_| {}).unwrap();
        let back = folder.path().join("back");
        let mut command = Command::new("qemu-img");
        command
            .args(["convert", "-O", "raw"])
            .args((format == ExportFormat::Raw).then_some(["-f", "raw"]).iter().flatten());
        assert!(command.arg(&to).arg(&back).status().unwrap().success());
        assert!(std::fs::read(back).unwrap() == contents[0], "{file}");
    }
    assert_eq!(ExportFormat::of(Path::new("a.vmdk")), None);
}

#[test]
fn what_fails_leaves_nothing_and_overwrites_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (mut machine, _) = machine(folder.path(), Firmware::Bios);
    machine.disks[1].raw = folder.path().join("missing.raw");
    let to = folder.path().join("notes.ova");
    let error = export(&machine, &to, ExportFormat::Ova, &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("missing.raw"), "{error}");
    let mut left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["data.raw", "tmp.raw"], "the first disk was used up, and nothing was added");

    std::fs::write(&to, "mine").unwrap();
    let error = export(&machine, &to, ExportFormat::Ova, &mut |_| {}).unwrap_err();
    assert!(matches!(error, ExportError::Occupied(_)), "{error}");
    // Also what appears while it is at work.
    machine.disks.drain(..2);
    let late = folder.path().join("late.ova");
    let error =
        export(&machine, &late, ExportFormat::Ova, &mut |_| std::fs::write(&late, "mine").unwrap()).unwrap_err();
    assert!(matches!(error, ExportError::Occupied(_)), "{error}");
    assert_eq!(std::fs::read_to_string(&late).unwrap() + &std::fs::read_to_string(&to).unwrap(), "minemine");
}

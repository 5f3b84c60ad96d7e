//! What comes in must come out the same, and what is hostile must not come in.

use std::process::Command;

use super::*;

const SIZE: usize = 1 << 20;

/// A disk in `format`, and its content.
fn disk(folder: &Path, file: &str, format: &str, options: &[&str]) -> Vec<u8> {
    let mut content = vec![0; SIZE];
    for (index, byte) in content.iter_mut().enumerate().skip(4096).take(300_000) {
        *byte = (index * 7 + index / 251) as u8;
    }
    let raw = folder.join("source.img");
    std::fs::write(&raw, &content).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", format]).args(options).arg(raw).arg(folder.join(file));
    assert!(command.status().unwrap().success());
    content
}

fn order(folder: &Path, file: &str) -> Import {
    Import {
        file: folder.join(file),
        appliance: "me/thing".parse().unwrap(),
        version: "1".parse().unwrap(),
        out: folder.join("out"),
        role: DiskRole::Data,
        cpus: None,
        memory: None,
        firmware: None,
        ports: vec![80, 8080, 80],
    }
}

/// It is refused, with these words, and leaves nothing.
fn refuses(folder: &Path, file: &str, words: &str) {
    let error = import(&order(folder, file), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
    assert!(!folder.join("out").exists() && !folder.join("out.part").exists());
}

fn descriptor(href: &str) -> String {
    format!(
        r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References><File ovf:id="f1" ovf:href="{href}"/><File ovf:id="f2" ovf:href="other.iso"/></References>
  <DiskSection><Info>disks</Info>
    <Disk ovf:diskId="d2" ovf:capacity="2" ovf:capacityAllocationUnits="byte * 2^20"/>
    <Disk ovf:diskId="d1" ovf:fileRef="f1" ovf:capacity="1048576"/></DiskSection>
  <VirtualSystem ovf:id="vm"><Info>x</Info><Name>Notes &amp; more</Name>
    <VirtualHardwareSection><Info>y</Info>
      <Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits><rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>768</rasd:VirtualQuantity></Item>
      <Item><rasd:ResourceType>9999</rasd:ResourceType><rasd:VirtualQuantity>many</rasd:VirtualQuantity></Item>
      <Item><rasd:HostResource>ovf:/disk/d1</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:HostResource>ovf:/disk/d2</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
      <vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>
    </VirtualHardwareSection></VirtualSystem></Envelope>"#
    )
}

/// An archive of these members; the names are written as they are, whatever they are.
fn archive(path: &Path, members: &[(&str, &[u8])]) {
    let mut builder = tar::Builder::new(File::create(path).unwrap());
    for (name, content) in members {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.finish().unwrap();
}

#[test]
fn disk_images_come_back_the_same() {
    for format in ["raw", "qcow2", "vmdk", "vdi", "vhdx"] {
        let folder = tempfile::tempdir().unwrap();
        let content = disk(folder.path(), "disk.bin", format, &[]);
        let imported = import(&order(folder.path(), "disk.bin"), &mut |_| {}).unwrap();
        assert!(std::fs::read(imported.folder.join("disk1.raw")).unwrap()[..SIZE] == content, "{format}");
        let recipe = crate::read_recipe(&imported.folder).unwrap();
        assert_eq!((recipe.disks.len(), recipe.disks[0].role, recipe.ports.len()), (1, DiskRole::Data, 2));
        assert!(!folder.path().join("out.part").exists());
        assert!(matches!(import(&order(folder.path(), "disk.bin"), &mut |_| {}), Err(ImportError::Occupied(_))));
    }
}

#[test]
fn an_archive_keeps_its_hardware() {
    let folder = tempfile::tempdir().unwrap();
    let content = disk(folder.path(), "a.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]);
    let vmdk = std::fs::read(folder.path().join("a.vmdk")).unwrap();
    let ovf = descriptor("a.vmdk");
    archive(&folder.path().join("vm.ova"), &[("vm.ovf", ovf.as_bytes()), ("a.vmdk", &vmdk), ("x.txt", b"x")]);
    std::fs::write(folder.path().join("vm.ovf"), &ovf).unwrap();
    for file in ["vm.ova", "vm.ovf"] {
        let imported = import(&order(folder.path(), file), &mut |_| {}).unwrap();
        let recipe = crate::read_recipe(&imported.folder).unwrap();
        assert_eq!((recipe.hardware.cpus, recipe.hardware.memory), (2, ByteSize(768 << 20)));
        assert_eq!((recipe.hardware.firmware, recipe.summary.as_str()), (Firmware::Uefi, "Notes & more"));
        assert_eq!(recipe.disks[1].size, Some(ByteSize(2 << 20)));
        assert!(std::fs::read(imported.folder.join("disk1.raw")).unwrap() == content);
        assert_eq!(std::fs::read_dir(&imported.folder).unwrap().count(), 2);
        std::fs::remove_dir_all(&imported.folder).unwrap();
    }
    let order = Import { cpus: Some(4), firmware: Some(Firmware::Bios), ..order(folder.path(), "vm.ova") };
    let recipe = import(&order, &mut |_| {}).unwrap().recipe;
    assert_eq!((recipe.hardware.cpus, recipe.hardware.firmware), (4, Firmware::Bios));
}

#[test]
fn hostile_archives_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let content = vec![1; SIZE];
    let ova = |members: &[(&str, &[u8])]| archive(&folder.join("vm.ova"), members);
    let ovf = descriptor("a.vmdk");
    ova(&[("vm.ovf", ovf.as_bytes())]);
    refuses(folder, "vm.ova", "missing");
    ova(&[("vm.ovf", ovf.as_bytes()), ("../a.vmdk", &content)]);
    refuses(folder, "vm.ova", "is a path");
    ova(&[("vm.ovf", descriptor("../a.vmdk").as_bytes()), ("a.vmdk", &content)]);
    refuses(folder, "vm.ova", "not a file beside");
    ova(&[("vm.ovf", ovf.as_bytes()), ("a.vmdk", &vec![1; SIZE + 512])]);
    refuses(folder, "vm.ova", "more than");
    ova(&[("vm.ovf", b"<Envelope><<<"), ("a.vmdk", &content)]);
    refuses(folder, "vm.ova", "XML");
    ova(&[("vm.ovf", ovf.as_bytes()), ("a.vmdk", &content)]);
    let whole = std::fs::read(folder.join("vm.ova")).unwrap();
    for cut in [100, 700, 4000, SIZE / 2] {
        std::fs::write(folder.join("vm.ova"), &whole[..cut]).unwrap();
        refuses(folder, "vm.ova", "cannot import");
    }
}

#[test]
fn what_is_no_disk_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    std::fs::write(folder.join("empty"), b"").unwrap();
    refuses(folder, "empty", "empty");
    std::fs::write(folder.join("odd"), [1; 700]).unwrap();
    refuses(folder, "odd", "512");
    std::fs::write(folder.join("x.ovf"), "<!DOCTYPE a [<!ENTITY b 'c'>]><Envelope>&b;</Envelope>").unwrap();
    refuses(folder, "x.ovf", "document type");
    std::fs::write(folder.join("x.ovf"), "<Envelope>".repeat(100)).unwrap();
    refuses(folder, "x.ovf", "nests");
    std::fs::write(folder.join("x.ovf"), descriptor("a.vmdk")).unwrap();
    refuses(folder, "x.ovf", "a.vmdk");
    disk(folder, "flat.vmdk", "vmdk", &["-o", "subformat=monolithicFlat"]);
    refuses(folder, "flat.vmdk", "another file");
    disk(folder, "base.qcow2", "qcow2", &[]);
    let base = folder.join("base.qcow2");
    let mut command = Command::new("qemu-img");
    command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(base).arg(folder.join("top.qcow2"));
    assert!(command.status().unwrap().success());
    refuses(folder, "top.qcow2", "another file");
}

#[test]
fn descriptors_cut_anywhere_are_answered() {
    let whole = descriptor("a.vmdk");
    for cut in 0..whole.len() {
        assert!(ovf::parse(&whole[..cut]).is_err(), "{cut}");
    }
    let units = whole.replace("byte * 2^20", "MegaBytes");
    assert_eq!(ovf::parse(&units), ovf::parse(&whole));
    for unit in ["byte * 2^99", "potatoes", "0", "byte * 2^63 * 4"] {
        let error = ovf::parse(&whole.replace("byte * 2^20", unit)).unwrap_err();
        assert!(error.contains("unit"), "{error}");
    }
}

/// The line of a manifest, by another program than ours.
fn checksum(kind: &str, name: &str, content: &Path) -> String {
    let program = format!("{}sum", kind.to_ascii_lowercase());
    let output = Command::new(program).arg(content).output().unwrap();
    let digest = String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned();
    format!("{kind}({name})= {digest}\n")
}

#[test]
fn a_manifest_is_believed_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    disk(folder, "a.vmdk", "vmdk", &["-o", "subformat=streamOptimized"]);
    let vmdk = std::fs::read(folder.join("a.vmdk")).unwrap();
    let ovf = descriptor("a.vmdk");
    std::fs::write(folder.join("vm.ovf"), &ovf).unwrap();
    let put = |manifest: &str, last: bool| {
        std::fs::write(folder.join("vm.mf"), manifest).unwrap();
        let mut members = vec![("vm.ovf", ovf.as_bytes()), ("a.vmdk", vmdk.as_slice())];
        members.insert(if last { 2 } else { 1 }, ("vm.mf", manifest.as_bytes()));
        archive(&folder.join("vm.ova"), &members);
    };
    for (kind, last) in [("SHA1", false), ("SHA256", true), ("SHA512", false)] {
        let of_ovf = checksum(kind, "vm.ovf", &folder.join("vm.ovf"));
        let of_disk = checksum(kind, "a.vmdk", &folder.join("a.vmdk"));
        let right = format!("{of_ovf}{of_disk}");
        let spaced = right.replace('(', " (").replace(")= ", ") = ").replace('\n', "\r\n");
        for manifest in [&right, &spaced] {
            put(manifest, last);
            for file in ["vm.ova", "vm.ovf"] {
                let imported = import(&order(folder, file), &mut |_| {}).unwrap();
                std::fs::remove_dir_all(&imported.folder).unwrap();
            }
        }
        // Of the right length, and another first digit.
        let wrong = |line: &str| {
            let at = line.find("= ").unwrap() + 2;
            let digit = if line[at..].starts_with('0') { "1" } else { "0" };
            format!("{}{digit}{}", &line[..at], &line[at + 1..])
        };
        let refused = [
            (format!("{}{of_disk}", wrong(&of_ovf)), format!("another {kind} for \"vm.ovf\"")),
            (format!("{of_ovf}{}", wrong(&of_disk)), format!("another {kind} for \"a.vmdk\"")),
            (format!("{right}{}", wrong(&of_disk)), format!("another {kind} for \"a.vmdk\"")),
            (of_ovf.clone(), "no checksum of \"a.vmdk\"".to_owned()),
            (of_disk.clone(), "no checksum of \"vm.ovf\"".to_owned()),
            (String::new(), "no checksum of \"vm.ovf\"".to_owned()),
            (right[..right.len() - 9].to_owned(), "cut off".to_owned()),
            (right[..of_ovf.len() + 9].to_owned(), "cut off".to_owned()),
            (right.replace(kind, "MD5"), "no checksum; it".to_owned()),
        ];
        for (manifest, words) in refused {
            put(&manifest, last);
            for file in ["vm.ova", "vm.ovf"] {
                refuses(folder, file, &words);
                refuses(folder, file, "vm.mf");
            }
        }
    }
    std::fs::write(folder.join("vm.mf"), " ".repeat(1 + MAX_MF_BYTES as usize)).unwrap();
    refuses(folder, "vm.ovf", "longer");
    std::fs::remove_file(folder.join("vm.mf")).unwrap();
    std::fs::create_dir(folder.join("vm.mf")).unwrap();
    refuses(folder, "vm.ovf", "no ordinary file");
}

#[test]
fn firmware_is_found_where_each_hypervisor_writes_it() {
    let vmware = r#"<vmw:Config ovf:required="false" vmw:key="firmware" vmw:value="efi"/>"#;
    let with = |hint: &str, machine: &str| {
        let text = descriptor("a.vmdk").replace(vmware, hint);
        ovf::parse(&text.replace("</VirtualSystem>", &format!("{machine}</VirtualSystem>"))).unwrap().uefi
    };
    let virtualbox = |inner: &str| format!("<vbox:Machine><Hardware>{inner}</Hardware></vbox:Machine>");
    assert!(with(vmware, ""));
    assert!(with("", &virtualbox(r#"<Firmware type="EFI"/>"#)));
    assert!(with("", &virtualbox(r#"<BIOS><Firmware type="EFI64"/></BIOS>"#)));
    assert!(!with("", ""));
    assert!(!with("", &virtualbox(r#"<Firmware type="BIOS"/>"#)));
    assert!(!with(&vmware.replace("efi", "bios"), ""));
    assert!(!with(&vmware.replace("firmware", "other"), ""));
}

#[test]
fn of_several_configurations_the_default_one_holds() {
    let of = |small: &str, large: &str| {
        let item = |name: &str, cpus: u32| {
            format!(
                "<Item ovf:configuration=\"{name}\"><rasd:ResourceType>3</rasd:ResourceType>
                 <rasd:VirtualQuantity>{cpus}</rasd:VirtualQuantity></Item>"
            )
        };
        let bound = "<Item ovf:bound=\"max\"><rasd:ResourceType>3</rasd:ResourceType>
            <rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>";
        let section = format!(
            "<DeploymentOptionSection><Configuration ovf:id=\"small\"{small}/>
             <Configuration ovf:id=\"large\"{large}/></DeploymentOptionSection><VirtualSystem "
        );
        let items = format!("{}{}{bound}<vmw:Config ", item("large other", 8), item("small", 1));
        let text = descriptor("a.vmdk").replace("<VirtualSystem ", &section).replace("<vmw:Config ", &items);
        let machine = ovf::parse(&text).unwrap();
        assert_eq!(machine.memory, Some(768 << 20), "what is of no configuration holds for all");
        machine.cpus
    };
    let default = " ovf:default=\"true\"";
    assert_eq!(of(default, ""), Some(1));
    assert_eq!(of("", default), Some(8));
    assert_eq!(of("", ""), Some(1), "the first, if none is the default");
}

#[test]
fn what_an_interrupted_import_left_is_cleared_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    disk(folder, "disk.raw", "raw", &[]);
    let part = folder.join("out.part");
    std::fs::create_dir_all(part.join("appliance")).unwrap();
    std::fs::write(part.join("appliance/disk1.raw"), "half").unwrap();
    let error = import(&order(folder, "disk.raw"), &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("out.part") && part.join("appliance/disk1.raw").exists(), "it may be somebody's: {error}");
    File::create(part.join(MARK)).unwrap();
    import(&order(folder, "disk.raw"), &mut |_| {}).unwrap();
    assert!(!part.exists() && folder.join("out/disk1.raw").exists());
}

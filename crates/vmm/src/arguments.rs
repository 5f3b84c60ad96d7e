//! The argument vector of QEMU, as a pure function, so that a golden test shows every option we rely on.

use std::path::Path;

use crate::accelerator::Accelerator;
use crate::checkpoint::RAM;
use crate::machine::{Display, Drive, Firmware, Machine, Nic, Outbound};
use crate::processor::Processor;

/// Where QEMU puts its sockets and its log of the serial line.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paths<'a> {
    /// Memory to go on with, and the devices for it, unless they come later; else the guest is booted.
    pub resume: Option<(&'a Path, Option<&'a Path>)>,
    pub qmp_socket: &'a Path,
    pub serial_socket: &'a Path,
    pub serial_log: &'a Path,
}

/// All arguments after the program's name. `machine` must have passed its validation.
pub(crate) fn arguments(
    machine: &Machine,
    (accelerator, processor): (&Accelerator, Processor),
    seccomp: bool,
    paths: Paths<'_>,
) -> Vec<String> {
    let mut line = Line::default();
    // A guest is told by its own configuration what happens after a panic; we report it and do not interfere.
    line.option("-name", format!("guest={0},process=vm-{0}", machine.name));
    line.words(&[
        "-no-user-config",
        "-nodefaults",
        "-display",
        "none",
        "-action",
        "panic=none",
        "-msg",
        "timestamp=on",
    ]);
    if seccomp {
        line.option("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    }
    line.processor(machine, accelerator, processor);
    line.memory(machine.memory_mib, paths.resume);
    line.option("-uuid", machine.uuid.clone());
    line.option("-rtc", "base=utc");
    line.option("-chardev", format!("socket,id=qmp,path={},server=on,wait=off", value(paths.qmp_socket)));
    line.option("-mon", "chardev=qmp,mode=control");
    line.option(
        "-chardev",
        format!(
            "socket,id=serial,path={},server=on,wait=off,logfile={},logappend=on",
            value(paths.serial_socket),
            value(paths.serial_log)
        ),
    );
    line.option("-serial", "chardev:serial");
    line.option("-device", "virtio-rng-pci,id=rng");
    line.option("-device", "pvpanic");
    for drive in &machine.drives {
        line.drive(drive);
    }
    for (index, nic) in machine.nics.iter().enumerate() {
        line.nic(index, nic);
    }
    if machine.display == Display::Vga {
        line.option("-device", "VGA,id=video");
    }
    // A new number at every start: a guest that goes on renews its random numbers, since another may have the same.
    line.option("-device", "vmgenid,guid=auto,id=generation");
    // What the guest frees is given back to the host, and is not in what is saved.
    line.option("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on,page-poison=off");
    line.0
}

/// The name by which the monitor knows the user network of a card.
pub(crate) fn netdev_name(nic: usize) -> String {
    format!("net{nic}")
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn words(&mut self, words: &[&str]) {
        self.0.extend(words.iter().map(|&word| word.to_owned()));
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.extend([name.to_owned(), value.into()]);
    }

    fn processor(&mut self, machine: &Machine, accelerator: &Accelerator, processor: Processor) {
        let mut board = format!("q35,usb=off,memory-backend={RAM},suppress-vmdesc=on");
        if let Firmware::Uefi { code, vars } = &machine.firmware {
            self.option(
                "-blockdev",
                format!("driver=file,filename={},node-name=firmware-code,read-only=on", value(code)),
            );
            self.option("-blockdev", format!("driver=file,filename={},node-name=firmware-vars", value(vars)));
            board.push_str(",pflash0=firmware-code,pflash1=firmware-vars");
        }
        let (accelerate, processor) = match accelerator {
            Accelerator::Kvm => ("kvm".into(), processor.option()),
            Accelerator::Tcg { .. } => {
                (format!("tcg,thread=multi,tb-size={}", translations(machine.memory_mib)), "max".into())
            }
        };
        self.option("-machine", board);
        self.option("-accel", accelerate);
        self.option("-cpu", processor);
        self.option("-smp", machine.cpus.to_string());
        self.option("-m", format!("size={}M", machine.memory_mib));
    }

    /// Memory that is gone on with is mapped privately: nothing that the guest writes reaches the file. What is left out
    /// of the devices' stream is what comes before and after them in a stream with memory.
    fn memory(&mut self, mib: u64, resume: Option<(&Path, Option<&Path>)>) {
        self.option("-global", "migration.send-configuration=off");
        match resume {
            None => self.option("-object", format!("memory-backend-ram,id={RAM},size={mib}M")),
            Some((memory, devices)) => {
                let memory = value(memory);
                self.option("-object", format!("memory-backend-file,id={RAM},size={mib}M,mem-path={memory},share=off"));
                self.words(&["-S", "-incoming"]);
                let from = devices.map(|devices| format!("file:{}", devices.to_string_lossy()));
                self.0.push(from.unwrap_or_else(|| "defer".into()));
            }
        }
    }

    /// The page cache of the host is used and the guest's flush becomes fdatasync. A read or write that fails
    /// (the host's disk is full, a block can not be fetched) pauses the guest and is reported as an event: going
    /// on would make the guest's file system read-only or lose its journal, while `cont` repeats the request.
    fn drive(&mut self, drive: &Drive) {
        let access = if drive.read_only { "read-only=on" } else { "read-only=off,discard=unmap" };
        self.option(
            "-blockdev",
            format!(
                "driver=file,filename={},node-name={},aio=threads,cache.direct=off,cache.no-flush=off,{access}",
                value(&drive.path),
                drive.name
            ),
        );
        let boot = drive.boot_index.map(|index| format!(",bootindex={index}")).unwrap_or_default();
        self.option(
            "-device",
            format!(
                "virtio-blk-pci,drive={0},id=disk-{0},serial={0},discard=on,write-cache=on,rerror=stop,werror=stop{boot}",
                drive.name
            ),
        );
    }

    /// No option ROM: booting from the network is not offered, and loading the ROM takes time under emulation.
    fn nic(&mut self, index: usize, nic: &Nic) {
        let netdev = netdev_name(index);
        let restrict = match nic.outbound {
            Outbound::Internet => "off",
            Outbound::None => "on",
        };
        self.option("-netdev", format!("user,id={netdev},restrict={restrict}"));
        self.option("-device", format!("virtio-net-pci,netdev={netdev},id=nic{index},mac={},romfile=", nic.mac));
    }
}

/// A path inside an option: commas are doubled (QEMU manual, "-drive file="). The path was checked to be text.
fn value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// MiB for translated code. QEMU would take up to 1 GiB beside each guest's memory. A Debian of 512 MiB took 4 % more CPU for its
/// boot with 64, 56 % more with 32.
fn translations(memory_mib: u64) -> u64 {
    (memory_mib / 8).clamp(32, 1024)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::tests::example;

    fn line(machine: &Machine, accelerator: Accelerator) -> String {
        let paths = Paths {
            qmp_socket: Path::new("/run/i/qmp.sock"),
            serial_socket: Path::new("/run/i/serial.sock"),
            serial_log: Path::new("/run/i/serial.log"),
            resume: None,
        };
        arguments(machine, (&accelerator, Processor::Host), true, paths).join(" ").replace(" -", "\n-")
    }

    #[test]
    fn the_whole_command_line() {
        let expected = "\
-name guest=wiki-1,process=vm-wiki-1
-no-user-config
-nodefaults
-display none
-action panic=none
-msg timestamp=on
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,usb=off,memory-backend=ram,suppress-vmdesc=on
-accel tcg,thread=multi,tb-size=64
-cpu max
-smp 2
-m size=512M
-global migration.send-configuration=off
-object memory-backend-ram,id=ram,size=512M
-uuid 0f3c1b2a-1111-2222-3333-444455556666
-rtc base=utc
-chardev socket,id=qmp,path=/run/i/qmp.sock,server=on,wait=off
-mon chardev=qmp,mode=control
-chardev socket,id=serial,path=/run/i/serial.sock,server=on,wait=off,logfile=/run/i/serial.log,logappend=on
-serial chardev:serial
-device virtio-rng-pci,id=rng
-device pvpanic
-blockdev driver=file,filename=/v/a,,b.raw,node-name=system,aio=threads,cache.direct=off,cache.no-flush=off,read-only=off,discard=unmap
-device virtio-blk-pci,drive=system,id=disk-system,serial=system,discard=on,write-cache=on,rerror=stop,werror=stop,bootindex=0
-blockdev driver=file,filename=/v/seed.raw,node-name=seed,aio=threads,cache.direct=off,cache.no-flush=off,read-only=on
-device virtio-blk-pci,drive=seed,id=disk-seed,serial=seed,discard=on,write-cache=on,rerror=stop,werror=stop
-netdev user,id=net0,restrict=off
-device virtio-net-pci,netdev=net0,id=nic0,mac=52:54:00:12:34:56,romfile=
-device vmgenid,guid=auto,id=generation
-device virtio-balloon-pci,id=balloon,free-page-reporting=on,page-poison=off";
        assert_eq!(line(&example(), Accelerator::Tcg { why: "test".into() }), expected);
    }

    #[test]
    fn going_on_with_a_saved_machine() {
        let paths = Paths {
            qmp_socket: Path::new("/run/i/qmp.sock"),
            serial_socket: Path::new("/run/i/serial.sock"),
            serial_log: Path::new("/run/i/serial.log"),
            resume: Some((Path::new("/v/mem,ory"), Some(Path::new("/run/i/devices")))),
        };
        let processor = Processor::portable("x86-64-v3-intel").unwrap();
        let text = arguments(&example(), (&Accelerator::Kvm, processor), true, paths).join(" ");
        let expected = "-object memory-backend-file,id=ram,size=512M,mem-path=/v/mem,,ory,share=off \
                        -S -incoming file:/run/i/devices -uuid";
        assert!(text.contains(expected), "{text}");
        assert!(text.contains("-accel kvm -cpu Haswell-noTSX-IBRS,enforce -smp"), "{text}");
    }

    #[test]
    fn firmware_display_and_kvm() {
        let mut machine = example();
        machine.firmware = Firmware::Uefi { code: "/f/code.fd".into(), vars: "/f/vars.fd".into() };
        machine.display = Display::Vga;
        machine.nics[0].outbound = Outbound::None;
        let text = line(&machine, Accelerator::Kvm);
        for part in [
            "-blockdev driver=file,filename=/f/code.fd,node-name=firmware-code,read-only=on\n",
            "-blockdev driver=file,filename=/f/vars.fd,node-name=firmware-vars\n",
            "-machine q35,usb=off,memory-backend=ram,suppress-vmdesc=on,pflash0=firmware-code,pflash1=firmware-vars\n-accel kvm\n-cpu host\n",
            "-netdev user,id=net0,restrict=on\n",
            "\n-device VGA,id=video",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }
}

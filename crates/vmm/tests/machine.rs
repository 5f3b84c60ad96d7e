//! Real machines under QEMU: a boot sector of our own stands in for an operating system, so that a test takes
//! about a second.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_vmm::{
    Accelerator, Display, Drive, Event, EventReceiver, ExitReason, Firmware, GuardLine, GuardPolicy, LaunchError,
    LaunchOptions, Machine, Nic, Orphan, Outbound, Processor, RunState, Vm, detect_accelerator, find_qemu,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

/// A machine that is emulated on a loaded host takes its time.
const LIMIT: Duration = Duration::from_secs(60);

/// Says `B` on the serial line, then echoes what comes there, and switches off when the power button is pressed.
/// The ports are those of SeaBIOS on q35: 0x600 power management status, 0x602 enable, 0x604 control.
const ECHO: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, // mov dx,0x3f8; mov al,'B'; out dx,al
    0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, // mov dx,0x602; mov ax,0x100; out dx,ax
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0x05, // loop: mov dx,0x3fd; in al,dx; test al,1; jz power
    0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx,0x3f8; in al,dx; out dx,al
    0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xea, // power: mov dx,0x600; in ax,dx; test ah,1; jz loop
    0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef, 0xf4, // mov dx,0x604; mov ax,0x2000; out dx,ax; hlt
];

/// Writes sector 1024 of its disk through the BIOS, says `W`, and stops.
const WRITE: &[u8] = &[
    0x31, 0xc0, 0x8e, 0xd8, // xor ax,ax; mov ds,ax
    0xbe, 0x20, 0x7c, 0xb8, 0x00, 0x43, 0xb2, 0x80, 0xcd,
    0x13, // mov si,0x7c20; mov ax,0x4300; mov dl,0x80; int 0x13
    0xba, 0xf8, 0x03, 0xb0, b'W', 0xee, 0xf4, 0xeb,
    0xfd, // mov dx,0x3f8; mov al,'W'; out dx,al; halt: hlt; jmp halt
    0, 0, 0, 0, 0, 0, 0, 0, 0, // up to 0x7c20
    16, 0, 1, 0, 0x00, 0x7c, 0, 0, 0, 4, 0, 0, 0, 0, 0,
    0, // disk address packet: 1 sector, from 0:0x7c00, to block 1024
];

struct Bench {
    temp: TempDir,
    machine: Machine,
    options: LaunchOptions,
}

impl Bench {
    async fn new(code: &[u8]) -> Bench {
        let temp = tempfile::tempdir().unwrap();
        let drive = temp.path().join("system.raw");
        write_boot_disk(&drive, code);
        let machine = Machine {
            name: "test".into(),
            uuid: "0f3c1b2a-1111-2222-3333-444455556666".into(),
            cpus: 1,
            memory_mib: 32,
            firmware: Firmware::Bios,
            drives: vec![Drive { name: "system".into(), path: drive, read_only: false, boot_index: Some(0) }],
            nics: vec![Nic { mac: "52:54:00:12:34:56".into(), outbound: Outbound::None }],
            display: Display::None,
        };
        let options = LaunchOptions {
            qemu: find_qemu().await.unwrap().path,
            run_dir: temp.path().join("run"),
            accelerator: Accelerator::Tcg { why: "tests run everywhere".into() },
            processor: Processor::Host,
            user: None,
            seccomp: true,
            parent_death_kill: true,
            guard: Some(GuardPolicy::default()),
            resume: None,
        };
        Bench { temp, machine, options }
    }

    /// The same machine in a folder that has its disk.
    fn at(mut self, folder: &Path) -> Bench {
        self.machine.drives[0].path = folder.join("system.raw");
        self.options.run_dir = folder.join("run");
        self
    }

    async fn launch(&self) -> (Vm, EventReceiver) {
        Vm::launch(&self.machine, self.options.clone()).await.unwrap_or_else(|error| panic!("{error}"))
    }

    /// Gives the disk and the way to it to a user of its own.
    fn for_user(mut self, id: u32) -> Bench {
        use std::os::unix::fs::{PermissionsExt, chown};
        std::fs::set_permissions(self.temp.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        chown(&self.machine.drives[0].path, Some(id), Some(id)).unwrap();
        self.options.user = Some((id, id));
        self
    }

    /// Waits until the guest has said this on its serial line.
    async fn serial_says(&self, text: &str) {
        let log = self.options.run_dir.join("serial.log");
        let found = async {
            let mut tick = tokio::time::interval(Duration::from_millis(10));
            while !std::fs::read_to_string(&log).unwrap_or_default().contains(text) {
                tick.tick().await;
            }
        };
        timeout(LIMIT, found).await.unwrap_or_else(|_| panic!("the guest did not say {text:?}"));
    }
}

fn write_boot_disk(path: &Path, code: &[u8]) {
    let mut sector = [0; 512];
    sector[..code.len()].copy_from_slice(code);
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    std::fs::write(path, sector).unwrap();
    std::fs::File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap();
}

async fn next(events: &mut EventReceiver, is_it: impl Fn(&Event) -> bool) -> Event {
    let search = async {
        loop {
            let event = events.recv().await.expect("the event comes before the end");
            if is_it(&event) {
                break event;
            }
        }
    };
    timeout(LIMIT, search).await.expect("the event comes in time")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[tokio::test]
async fn a_machine_boots_talks_and_switches_itself_off() {
    let mut bench = Bench::new(ECHO).await;
    if is_root() {
        bench = bench.for_user(60011);
    }
    let (vm, mut events) = bench.launch().await;
    assert_eq!(vm.status().await.unwrap(), RunState::Running);
    bench.serial_says("B").await;
    let mut console = UnixStream::connect(vm.serial_socket()).await.unwrap();
    console.write_all(b"x").await.unwrap();
    let mut echo = [0];
    timeout(LIMIT, console.read_exact(&mut echo)).await.unwrap().unwrap();
    assert_eq!(&echo, b"x");
    vm.power_button().await.unwrap();
    let off = next(&mut events, |event| matches!(event, Event::GuestShutdown { .. })).await;
    assert_eq!(off, Event::GuestShutdown { by_guest: true, reason: "guest-shutdown".into() });
    let exit = timeout(LIMIT, vm.wait()).await.unwrap();
    assert_eq!((exit.code, exit.reason), (Some(0), ExitReason::GuestShutdown));
    assert!(vm.status().await.unwrap_err().to_string().contains("monitor connection"));
}

#[tokio::test]
async fn a_machine_is_paused_continued_reset_and_killed() {
    let bench = Bench::new(ECHO).await;
    let (vm, mut events) = bench.launch().await;
    vm.pause().await.unwrap();
    next(&mut events, |event| *event == Event::Stopped).await;
    assert_eq!(vm.status().await.unwrap(), RunState::Paused);
    vm.cont().await.unwrap();
    next(&mut events, |event| *event == Event::Resumed).await;
    bench.serial_says("B").await;
    vm.reset().await.unwrap();
    next(&mut events, |event| *event == Event::Reset { by_guest: false }).await;
    bench.serial_says("BB").await;
    vm.kill().await;
    let exit = vm.wait().await;
    assert_eq!((exit.signal, exit.reason), (Some(9), ExitReason::Killed));
}

#[tokio::test]
async fn a_machine_that_dies_unasked_is_a_crash_and_a_dropped_one_is_gone() {
    let bench = Bench::new(ECHO).await;
    let (vm, _events) = bench.launch().await;
    let pid = rustix::process::Pid::from_raw(vm.pid() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::SEGV).unwrap();
    let exit = timeout(LIMIT, vm.wait()).await.unwrap();
    assert!(matches!(exit.reason, ExitReason::Crashed { .. }), "{exit:?}");

    let (vm, mut events) = bench.launch().await;
    drop(vm);
    // The end of the events is the end of the machine.
    let ended = async { while events.recv().await.is_some() {} };
    timeout(LIMIT, ended).await.unwrap();
}

#[tokio::test]
async fn ports_lead_into_the_guest_and_can_be_taken_back() {
    let bench = Bench::new(ECHO).await;
    let (vm, _events) = bench.launch().await;
    let first = vm.forward(0, 80).await.unwrap();
    let second = vm.forward(0, 80).await.unwrap();
    assert!(first.ip().is_loopback() && first.port() != 0 && first != second, "{first} {second}");
    TcpStream::connect(first).await.unwrap();
    let SocketAddr::V4(listening) = first else { panic!("{first}") };
    vm.unforward(0, listening).await.unwrap();
    assert!(TcpStream::connect(first).await.is_err());
    assert!(vm.unforward(0, listening).await.is_err());

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, taken.local_addr().unwrap().port());
    let error = vm.forward_from(0, listen, 22).await.unwrap_err().to_string();
    assert!(error.contains("could not forward") && error.contains(&listen.to_string()), "{error}");
    assert!(vm.forward(7, 22).await.is_err());
    vm.kill().await;
}

#[tokio::test]
async fn the_screen_can_be_looked_at() {
    let mut bench = Bench::new(ECHO).await;
    bench.machine.display = Display::Vga;
    if is_root() {
        bench = bench.for_user(60012);
    }
    let (vm, _events) = bench.launch().await;
    let picture = bench.temp.path().join("screen.png");
    vm.screendump(&picture).await.unwrap();
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
    vm.kill().await;
}

#[tokio::test]
async fn what_qemu_says_when_it_can_not_start_is_in_the_error() {
    let mut bench = Bench::new(ECHO).await;
    bench.machine.drives[0].path = "/nonexistent/disk.raw".into();
    let error = Vm::launch(&bench.machine, bench.options.clone()).await.err().unwrap();
    let text = error.to_string();
    assert!(matches!(error, LaunchError::EarlyExit { .. }), "{text}");
    assert!(
        text.contains("/nonexistent/disk.raw") && text.contains("No such file") && text.contains("exit code 1"),
        "{text}"
    );

    bench.machine.name = "a,b".into();
    assert!(matches!(Vm::launch(&bench.machine, bench.options.clone()).await, Err(LaunchError::Machine(_))));
    bench.machine.name = "ab".into();
    bench.options.qemu = "/nonexistent/qemu".into();
    assert!(matches!(Vm::launch(&bench.machine, bench.options.clone()).await, Err(LaunchError::Spawn { .. })));
}

#[tokio::test]
async fn kvm_that_is_not_there_is_said_by_qemu() {
    let mut bench = Bench::new(ECHO).await;
    bench.options.accelerator = detect_accelerator();
    if bench.options.accelerator == Accelerator::Kvm {
        return eprintln!("skipped: KVM works here");
    }
    // A user of its own is kept out of a /dev/kvm that is there but does not work.
    bench.options.user = is_root().then_some((60013, 60013));
    bench.options.accelerator = Accelerator::Kvm;
    if let Err(error) = Vm::launch(&bench.machine, bench.options.clone()).await {
        assert!(error.to_string().contains("it said: "), "{error}");
    }
}

#[tokio::test]
async fn a_full_disk_pauses_the_guest_and_the_write_is_repeated() {
    let mut bench = Bench::new(WRITE).await;
    let small = bench.temp.path().join("small");
    if let Err(error) = mount_small(&small) {
        return eprintln!("skipped: only root can make a small file system ({error})");
    }
    let drive: PathBuf = small.join("system.raw");
    write_boot_disk(&drive, WRITE);
    bench.machine.drives[0].path = drive;
    let filler = small.join("filler");
    let full = std::fs::write(&filler, vec![1; 1 << 20]).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);

    let (vm, mut events) = bench.launch().await;
    let failed = next(&mut events, |event| matches!(event, Event::BlockError { .. })).await;
    let Event::BlockError { device, nospace, write, .. } = failed else { unreachable!() };
    assert_eq!((device.as_str(), nospace, write), ("system", true, true));
    next(&mut events, |event| *event == Event::Stopped).await;
    assert_eq!(vm.status().await.unwrap(), RunState::IoError);
    std::fs::remove_file(&filler).unwrap();
    vm.cont().await.unwrap();
    bench.serial_says("W").await;
    let disk = std::fs::read(&bench.machine.drives[0].path).unwrap();
    assert_eq!(disk[..512], disk[1024 * 512..1025 * 512]);
    vm.kill().await;
}

/// A file system of 64 KiB that only this thread and its children see; it vanishes with them.
fn mount_small(path: &Path) -> rustix::io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    std::fs::create_dir(path).unwrap();
    // SAFETY: only the view of mounts and the working directory become this thread's own; no memory or descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS)? };
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    mount("tmpfs", path, "tmpfs", MountFlags::empty(), c"size=64k")
}

const ROLE: &str = "COLLECTIVE_TEST_LAUNCHER";

/// Not a test of its own: the role of a launcher that is killed while its machine runs.
#[tokio::test]
#[ignore = "started by another test"]
async fn launcher() {
    use std::os::fd::AsRawFd;
    let Ok(folder) = std::env::var(ROLE) else { return };
    let bench = Bench::new(ECHO).await.at(Path::new(&folder));
    let (vm, _events) = bench.launch().await;
    vm.forward(0, 80).await.unwrap();
    vm.memory().await.unwrap();
    bench.serial_says("B").await;
    vm.untie().await.unwrap();
    let line = vm.lifeline().unwrap();
    let guard = line.guard.unwrap();
    let [process, listener, received] = [&line.process, &guard.listener, &guard.received].map(AsRawFd::as_raw_fd);
    println!("\nREADY {process} {listener} {received}");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_machine_outlives_its_launcher_and_is_taken_over() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    let bench = Bench::new(ECHO).await;
    let mut launcher = Command::new(std::env::current_exe().unwrap());
    launcher.args(["launcher", "--exact", "--ignored", "--nocapture"]).env(ROLE, bench.temp.path());
    let mut launcher = launcher.stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(launcher.stdout.take().unwrap()).lines().map_while(Result::ok);
    let ready = lines.filter_map(|line| line.strip_prefix("READY ").map(ToOwned::to_owned)).next().unwrap();
    let pid = rustix::process::Pid::from_child(&launcher);
    let theirs = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    let mut parts = ready.split(' ').map(|number| {
        let flags = rustix::process::PidfdGetfdFlags::empty();
        rustix::process::pidfd_getfd(&theirs, number.parse().unwrap(), flags).unwrap()
    });
    let [process, listener, received] = std::array::from_fn(|_| parts.next().unwrap());
    launcher.kill().unwrap();
    launcher.wait().unwrap();

    let guard = Some((GuardPolicy::default(), GuardLine { listener, received }));
    let orphan = Orphan { process, guard, run_dir: bench.options.run_dir.clone(), user: None };
    let (vm, mut events) = Vm::adopt(&bench.machine, orphan).await.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(vm.status().await.unwrap(), RunState::Running);
    let forwards = vm.forwards(0).await.unwrap();
    assert_eq!(forwards.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [80]);
    TcpStream::connect(forwards[0].1).await.unwrap();
    // The kernel notes what is written, as it did for the one that died.
    let mut memory = vm.memory().await.unwrap();
    assert_eq!(memory.untracked().is_none(), collective_vmm::tracks_writes().is_ok());
    assert!(!memory.changed().unwrap().is_empty(), "the first answer has everything");
    let mut console = UnixStream::connect(vm.serial_socket()).await.unwrap();
    console.write_all(b"x").await.unwrap();
    let mut echo = [0];
    timeout(LIMIT, console.read_exact(&mut echo)).await.unwrap().unwrap();
    assert_eq!(&echo, b"x");
    vm.power_button().await.unwrap();
    next(&mut events, |event| matches!(event, Event::GuestShutdown { by_guest: true, .. })).await;
    let exit = timeout(LIMIT, vm.wait()).await.unwrap();
    assert_eq!((exit.code, exit.signal, exit.reason), (None, None, ExitReason::GuestShutdown));
}

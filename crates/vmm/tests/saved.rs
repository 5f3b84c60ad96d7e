//! Real machines that are saved and brought back. A boot sector of our own fills 64 KiB of memory with each byte that
//! comes on the serial line, and echoes it.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use collective_vmm::{
    Accelerator, Display, Drive, Firmware, GuardPolicy, GuestMemory, LaunchError, LaunchOptions, Machine, MachineState,
    Nic, Outbound, Processor, Resume, RunState, Vm, find_qemu,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(60);

/// What the guest fills.
const FILLED: std::ops::Range<u64> = 0x20000..0x30000;
const FILL: &[u8] = &[
    0xba, 0xf8, 0x03, 0xb0, b'B', 0xee, // mov dx,0x3f8; mov al,'B'; out dx,al
    0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf8, // loop: mov dx,0x3fd; in al,dx; test al,1; jz loop
    0xba, 0xf8, 0x03, 0xec, // mov dx,0x3f8; in al,dx
    0xb9, 0x00, 0x80, 0x88, 0xc4, 0xbb, 0x00, 0x20, 0x8e,
    0xc3, // mov cx,0x8000; mov ah,al; mov bx,0x2000; mov es,bx
    0x31, 0xff, 0xfc, 0xf3, 0xab, // xor di,di; cld; rep stosw
    0xba, 0xf8, 0x03, 0xee, 0xeb, 0xdf, // mov dx,0x3f8; out dx,al; jmp loop
];

struct Bench {
    temp: TempDir,
    machine: Machine,
    options: LaunchOptions,
}

struct Saved {
    /// Page-wise, as (offset, content).
    pages: Vec<(u64, Vec<u8>)>,
    state: MachineState,
}

impl Bench {
    async fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        let drive = temp.path().join("system.raw");
        let mut sector = [0; 512];
        sector[..FILL.len()].copy_from_slice(FILL);
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        std::fs::write(&drive, sector).unwrap();
        std::fs::File::options().write(true).open(&drive).unwrap().set_len(1 << 20).unwrap();
        let machine = Machine {
            name: "saved".into(),
            uuid: "0f3c1b2a-1111-2222-3333-444455556666".into(),
            cpus: 2,
            memory_mib: 32,
            firmware: Firmware::Bios,
            drives: vec![Drive { name: "system".into(), path: drive, read_only: false, boot_index: Some(0) }],
            nics: vec![Nic { mac: "52:54:00:12:34:56".into(), outbound: Outbound::None }],
            display: Display::Vga,
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
        Self { temp, machine, options }
    }

    async fn try_launch(&self, resume: Option<Resume>) -> Result<Vm, LaunchError> {
        let options = LaunchOptions { resume, ..self.options.clone() };
        Ok(Vm::launch(&self.machine, options).await?.0)
    }

    async fn boot(&self) -> (Vm, UnixStream) {
        let vm = self.try_launch(None).await.unwrap_or_else(|error| panic!("{error}"));
        let mut serial = UnixStream::connect(vm.serial_socket()).await.unwrap();
        heard(&mut serial, b'B').await;
        (vm, serial)
    }

    /// Brings a saved machine back from a file with its pages.
    async fn resume(&self, saved: &Saved, name: &str) -> (Vm, UnixStream) {
        let memory = self.temp.path().join(name);
        write_memory(&memory, saved);
        let resume = Resume { memory, state: Some(saved.state.clone()) };
        let vm = self.try_launch(Some(resume)).await.unwrap_or_else(|error| panic!("{error}"));
        let serial = UnixStream::connect(vm.serial_socket()).await.unwrap();
        (vm, serial)
    }
}

fn write_memory(path: &Path, saved: &Saved) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(32 << 20).unwrap();
    saved.pages.iter().for_each(|(offset, page)| file.write_all_at(page, *offset).unwrap());
}

/// Waits until the guest has said this.
async fn heard(serial: &mut UnixStream, byte: u8) {
    let listen = async { while serial.read_u8().await.unwrap() != byte {} };
    timeout(LIMIT, listen).await.unwrap_or_else(|_| panic!("the guest did not say {:?}", char::from(byte)));
}

async fn fill(serial: &mut UnixStream, byte: u8) {
    serial.write_u8(byte).await.unwrap();
    heard(serial, byte).await;
}

fn changed(memory: &mut GuestMemory) -> Vec<(u64, Vec<u8>)> {
    let ranges = memory.changed().unwrap();
    let mut bytes = vec![0; ranges.iter().map(|range| (range.end - range.start) as usize).sum()];
    memory.read(&ranges, &mut bytes).unwrap();
    let offsets = ranges.into_iter().flat_map(|range| range.step_by(4096));
    offsets.zip(bytes.chunks_exact(4096).map(<[u8]>::to_vec)).collect()
}

/// The pages where the guest was told to fill, and how many others there are.
fn split(pages: &[(u64, Vec<u8>)], byte: u8) -> (usize, usize) {
    let filled = pages.iter().filter(|(offset, _)| FILLED.contains(offset));
    let filled = filled.inspect(|(at, page)| assert!(page.iter().all(|b| *b == byte), "page {at:#x}")).count();
    (filled, pages.len() - filled)
}

async fn save(vm: &Vm, memory: &mut GuestMemory) -> Saved {
    vm.pause().await.unwrap();
    let state = vm.save_state().await.unwrap();
    Saved { pages: changed(memory), state }
}

#[tokio::test]
async fn a_saved_machine_goes_on_where_it_was_and_can_be_reset() {
    let bench = Bench::new().await;
    let (vm, mut serial) = bench.boot().await;
    let mut memory = vm.memory().await.unwrap();
    fill(&mut serial, b'x').await;
    let saved = save(&vm, &mut memory).await;
    assert_eq!(split(&saved.pages, b'x').0, 16);
    // It goes on here, and what was saved does not change by that.
    vm.cont().await.unwrap();
    fill(&mut serial, b'y').await;
    vm.kill().await;

    let encoded = MachineState::decode(&saved.state.encode()).unwrap();
    assert_eq!(encoded, saved.state);
    let (vm, mut serial) = bench.resume(&saved, "memory").await;
    // How its memory is read can be said, and the kernel has heard it ("rr" is MADV_RANDOM, proc_pid_smaps(5)).
    for singly in [true, false] {
        vm.page_by_page(singly).await.unwrap();
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid())).unwrap();
        let (_, memory) = maps.split_once("/memory\n").expect("the memory is mapped");
        let flags = memory.lines().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        assert_eq!(flags.split_whitespace().any(|flag| flag == "rr"), singly, "{flags}");
    }
    assert!(matches!(vm.status().await.unwrap(), RunState::Paused | RunState::Other(_)), "it waits for its start");
    let mut memory = vm.memory().await.unwrap();
    vm.cont().await.unwrap();
    vm.announce().await.unwrap();
    let mut before = vec![0; (FILLED.end - FILLED.start) as usize];
    memory.read(&[FILLED], &mut before).unwrap();
    assert!(before.iter().all(|byte| *byte == b'x'), "it has the memory that was saved");
    fill(&mut serial, b'z').await;
    let pages = changed(&mut memory);
    let (filled, others) = split(&pages, b'z');
    assert_eq!(filled, 16, "what it wrote since is its own");
    assert!(others < 64, "and hardly anything else: {others} pages");
    let untouched = std::fs::read(bench.temp.path().join("memory")).unwrap();
    assert!(untouched[FILLED.start as usize..FILLED.end as usize].iter().all(|byte| *byte == b'x'));
    // Firmware is not part of the guest's memory, and must be there all the same.
    vm.reset().await.unwrap();
    heard(&mut serial, b'B').await;
    fill(&mut serial, b'q').await;
    vm.kill().await;
}

#[tokio::test]
async fn only_what_was_written_since_is_told_again() {
    let bench = Bench::new().await;
    let (vm, mut serial) = bench.boot().await;
    let mut memory = vm.memory().await.unwrap();
    assert_eq!(memory.size(), 32 << 20);
    fill(&mut serial, b'a').await;
    let (filled, others) = split(&changed(&mut memory), b'a');
    assert_eq!(filled, 16);
    assert!(others > 16, "the firmware wrote too: {others}");
    if let Some(why) = memory.untracked() {
        panic!("tests need a kernel that tracks writes: {why}");
    }
    let (filled, others) = split(&changed(&mut memory), b'a');
    assert!(filled == 0 && others < 8, "nothing happened since: {filled} and {others} pages");
    fill(&mut serial, b'b').await;
    assert_eq!(split(&changed(&mut memory), b'b').0, 16);
    memory.forget();
    let (filled, others) = split(&changed(&mut memory), b'b');
    assert!(filled == 16 && others > 16, "everything once more: {filled} and {others}");

    // Several instants of a machine that goes on, each brought back.
    let mut all = changed(&mut memory);
    memory.forget();
    for byte in *b"123" {
        fill(&mut serial, byte).await;
        let saved = save(&vm, &mut memory).await;
        vm.cont().await.unwrap();
        all.retain(|(at, _)| saved.pages.iter().all(|(new, _)| new != at));
        all.extend(saved.pages);
        let whole = Saved { pages: all.clone(), state: saved.state };
        let copy = Bench::new().await;
        let (other, mut line) = copy.resume(&whole, "memory").await;
        let mut found = vec![0; (FILLED.end - FILLED.start) as usize];
        other.memory().await.unwrap().read(&[FILLED], &mut found).unwrap();
        assert!(found.iter().all(|found| *found == byte));
        other.cont().await.unwrap();
        fill(&mut line, b'!').await;
        other.kill().await;
    }
    vm.kill().await;
}

#[tokio::test]
async fn what_does_not_fit_is_refused() {
    let mut bench = Bench::new().await;
    let (vm, mut serial) = bench.boot().await;
    let mut memory = vm.memory().await.unwrap();
    fill(&mut serial, b'x').await;
    let saved = save(&vm, &mut memory).await;
    vm.kill().await;
    let memory = bench.temp.path().join("memory");
    write_memory(&memory, &saved);
    // Another machine.
    bench.machine.display = Display::None;
    let error = bench.try_launch(Some(Resume { memory: memory.clone(), state: Some(saved.state.clone()) })).await.err();
    assert!(error.is_some(), "a machine without the screen must not go on");
    bench.machine.display = Display::Vga;
    // Bytes that QEMU does not take.
    let devices = b"QEVM\0\0\0\x03\xff\xff\xff\xff";
    let mut broken = br#"CLMS"#.to_vec();
    broken.extend([1, 0, 0, 0]);
    let header = format!(r#"{{"blocks":[],"devices":{}}}"#, devices.len());
    broken.extend((header.len() as u32).to_le_bytes());
    broken.extend(header.as_bytes());
    broken.extend(devices);
    let state = MachineState::decode(&broken).unwrap();
    let error = bench.try_launch(Some(Resume { memory, state: Some(state) })).await.err().expect("it is refused");
    assert!(matches!(error, LaunchError::EarlyExit { .. } | LaunchError::NoAnswer { .. }), "{error}");
}

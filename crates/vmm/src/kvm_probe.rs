//! Runs a few bytes of real-mode code under KVM, in a child process that is killed when it hangs.
//!
//! The child is forked from a process with threads, so it calls nothing but the kernel: no allocation, no locks,
//! no formatting. It reports by its exit code. Numbers and structures: Linux, `include/uapi/linux/kvm.h`.

use std::ffi::{c_int, c_ulong, c_void};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

const LIMIT: Duration = Duration::from_secs(2);

const KVM_GET_API_VERSION: c_ulong = 0xae00;
const KVM_CREATE_VM: c_ulong = 0xae01;
const KVM_GET_VCPU_MMAP_SIZE: c_ulong = 0xae04;
const KVM_CREATE_VCPU: c_ulong = 0xae41;
const KVM_SET_USER_MEMORY_REGION: c_ulong = 0x4020_ae46;
const KVM_RUN: c_ulong = 0xae80;
const KVM_SET_REGS: c_ulong = 0x4090_ae82;
const KVM_GET_SREGS: c_ulong = 0x8138_ae83;
const KVM_SET_SREGS: c_ulong = 0x4138_ae84;
const KVM_API_VERSION: c_int = 12;
const KVM_EXIT_HLT: u32 = 5;
const GUEST_BASE: u64 = 0x1000;
const PAGE: usize = 4096;
/// `mov al,2; add al,3; mov [0x1800],al; hlt`: the parent of the idea is lwn.net/Articles/658511 ("Using the KVM API").
const CODE: [u8; 8] = [0xb0, 2, 0x04, 3, 0xa2, 0x00, 0x18, 0xf4];

#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest_address: u64,
    size: u64,
    user_address: u64,
}

/// What each exit code of the child means; the place in the list is the code.
const STEPS: [&str; 10] = [
    "it worked",
    "/dev/kvm could not be opened for reading and writing (is the user in the group kvm?)",
    "/dev/kvm speaks another version of its interface",
    "KVM could not create a machine",
    "KVM could not give memory to a machine",
    "KVM could not create a processor",
    "KVM could not set the registers of a processor",
    "KVM could not run a processor",
    "a small program run under KVM did not end as it should",
    "a small program run under KVM computed a wrong result",
];

/// `Ok` when code really ran under KVM; else the reason as a clause.
pub(crate) fn run_some_code() -> Result<(), String> {
    // SAFETY: the child calls only `probe`, which makes system calls and touches only its own stack and the
    // mappings it makes (async-signal-safe), and ends by `_exit`.
    let forked = unsafe {
        let forked = libc::fork();
        if forked == 0 {
            libc::_exit(probe());
        }
        forked
    };
    let Some(child) = Pid::from_raw(forked).filter(|_| forked > 0) else {
        return Err(format!("no process could be made to try KVM: {}", std::io::Error::last_os_error()));
    };
    await_child(child)
}

fn await_child(child: Pid) -> Result<(), String> {
    let limit = Timespec { tv_sec: LIMIT.as_secs() as i64, tv_nsec: 0 };
    let ended = pidfd_open(child, PidfdFlags::empty())
        .and_then(|pidfd| poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit)).map(|ready| ready > 0))
        .unwrap_or(false);
    if !ended {
        let _ = kill_process(child, Signal::KILL);
    }
    let status = loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(Some((_, status))) => break status,
            other => return Err(format!("the process that tried KVM was lost: {other:?}")),
        }
    };
    match status.exit_status() {
        Some(0) => Ok(()),
        Some(code) => {
            let step = usize::try_from(code).ok().and_then(|code| STEPS.get(code)).unwrap_or(&STEPS[8]);
            Err((*step).to_owned())
        }
        None => Err(format!("a small program run under KVM did not end in {} s", LIMIT.as_secs())),
    }
}

/// Returns an index of [`STEPS`].
fn probe() -> c_int {
    // SAFETY: plain system calls. Every pointer passed is to a live local or to a mapping whose size is at least
    // what the kernel reads or writes there (the sizes are part of the ioctl numbers); the process ends right after,
    // so nothing is closed or unmapped.
    unsafe {
        let device = libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if device < 0 {
            return 1;
        }
        if libc::ioctl(device, KVM_GET_API_VERSION, 0) != KVM_API_VERSION {
            return 2;
        }
        let machine = libc::ioctl(device, KVM_CREATE_VM, 0);
        if machine < 0 {
            return 3;
        }
        let memory = map(PAGE, libc::MAP_ANONYMOUS, -1);
        if memory.is_null() {
            return 4;
        }
        std::ptr::copy_nonoverlapping(CODE.as_ptr(), memory, CODE.len());
        let region = MemoryRegion {
            slot: 0,
            flags: 0,
            guest_address: GUEST_BASE,
            size: PAGE as u64,
            user_address: memory as u64,
        };
        if libc::ioctl(machine, KVM_SET_USER_MEMORY_REGION, &raw const region) < 0 {
            return 4;
        }
        let processor = libc::ioctl(machine, KVM_CREATE_VCPU, 0);
        let run_size = libc::ioctl(device, KVM_GET_VCPU_MMAP_SIZE, 0);
        if processor < 0 || run_size < PAGE as c_int {
            return 5;
        }
        let run = map(run_size as usize, 0, processor);
        if run.is_null() {
            return 5;
        }
        if !set_registers(processor) {
            return 6;
        }
        if libc::ioctl(processor, KVM_RUN, 0) < 0 {
            return 7;
        }
        // struct kvm_run: exit_reason follows 8 bytes of flags and padding.
        if run.add(8).cast::<u32>().read_volatile() != KVM_EXIT_HLT {
            return 8;
        }
        if memory.add(0x800).read_volatile() == 5 { 0 } else { 9 }
    }
}

/// # Safety
/// `descriptor` is -1 (with `MAP_ANONYMOUS`) or a descriptor that can be mapped.
unsafe fn map(size: usize, flags: c_int, descriptor: c_int) -> *mut u8 {
    // SAFETY: asks for a fresh mapping at an address of the kernel's choice.
    let address: *mut c_void = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | flags,
            descriptor,
            0,
        )
    };
    if address == libc::MAP_FAILED { std::ptr::null_mut() } else { address.cast() }
}

/// Real mode with segment base 0, at [`GUEST_BASE`].
///
/// # Safety
/// `processor` is a KVM vcpu descriptor.
unsafe fn set_registers(processor: c_int) -> bool {
    // struct kvm_sregs begins with cs: base u64, limit u32, selector u16. struct kvm_regs: 16 general registers, rip, rflags.
    let mut special = [0u64; 0x138 / 8];
    let mut general = [0u64; 0x90 / 8];
    general[16] = GUEST_BASE;
    general[17] = 2;
    // SAFETY: both arrays have exactly the size that is encoded in the ioctl numbers.
    unsafe {
        if libc::ioctl(processor, KVM_GET_SREGS, special.as_mut_ptr()) < 0 {
            return false;
        }
        special[0] = 0;
        // The selector is the 16 bits after base and limit; the other fields of that word stay.
        special[1] &= !(0xffff << 32);
        libc::ioctl(processor, KVM_SET_SREGS, special.as_ptr()) == 0
            && libc::ioctl(processor, KVM_SET_REGS, general.as_ptr()) == 0
    }
}

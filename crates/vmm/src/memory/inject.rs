//! Has another process ask the kernel to note which pages of a range are written, tell it how they are read, or that it may
//! outlive us.
//!
//! The kernel does this for a process's own memory only (userfaultfd(2), UFFD_FEATURE_WP_ASYNC, Linux 6.7; madvise(2); prctl(2)), and
//! QEMU does not know of it. So its main thread is stopped for a moment, as a debugger does for a call (ptrace(2)), makes
//! some system calls, and goes on where it was. No fault is ever handled by anybody: the kernel notes the write and lets it
//! through.

use std::ffi::c_void;
use std::io;
use std::ptr::null_mut;

use super::kernel;

// Linux, include/uapi/linux/userfaultfd.h
const UFFD_USER_MODE_ONLY: u64 = 1;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFD_API: u64 = 0xaa;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
const MODE_WP: u64 = 1 << 1;

/// The stack below its pointer that a function may use without moving it (System V ABI, AMD64).
const RED_ZONE: u64 = 128;
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// PTRACE_EVENT_STOP, as waitpid(2) shows it.
const EVENT_STOP: i32 = 128;

/// Tracks `length` bytes at `start` of process `pid`, a child of ours, until it ends. Nobody else may wait for the child's
/// stops meanwhile.
pub(super) fn track(pid: u32, start: u64, length: u64) -> io::Result<()> {
    let instruction = find_syscall(pid)?;
    let mut stopped = Stopped::attach(pid as i32)?;
    let descriptor =
        stopped.call(instruction, libc::SYS_userfaultfd, [UFFD_USER_MODE_ONLY | libc::O_CLOEXEC as u64, 0, 0])?;
    let room = (stopped.before.rsp - RED_ZONE - 64) & !63;
    for (request, words) in
        [(UFFDIO_API, [UFFD_API, WP_ASYNC | WP_UNPOPULATED, 0, 0]), (UFFDIO_REGISTER, [start, length, MODE_WP, 0])]
    {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        kernel::write(pid, room, &bytes)?;
        if let Err(error) = stopped.call(instruction, libc::SYS_ioctl, [descriptor, request, room]) {
            let _ = stopped.call(instruction, libc::SYS_close, [descriptor, 0, 0]);
            // One that died before us has it tracked, and only such as we do that.
            return if error.raw_os_error() == Some(libc::EBUSY) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// Has process `pid`, a child of ours, tell the kernel how `length` bytes at `start` are read. Nobody else may wait for the
/// child's stops meanwhile.
pub(super) fn advise(pid: u32, start: u64, length: u64, advice: i32) -> io::Result<()> {
    let instruction = find_syscall(pid)?;
    let mut stopped = Stopped::attach(pid as i32)?;
    stopped.call(instruction, libc::SYS_madvise, [start, length, advice as u64]).map(|_| ())
}

/// Has process `pid`, a child of ours, live on when we die, and others of our user look into it as we may. Nobody else may wait
/// for the child's stops meanwhile.
pub(super) fn untie(pid: u32) -> io::Result<()> {
    let instruction = find_syscall(pid)?;
    let mut stopped = Stopped::attach(pid as i32)?;
    // Only a kernel with Yama knows it, and only that one needs it.
    let _ = stopped.call(instruction, libc::SYS_prctl, [libc::PR_SET_PTRACER as u64, libc::PR_SET_PTRACER_ANY, 0]);
    stopped.call(instruction, libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, 0, 0]).map(|_| ())
}

/// A system call instruction that every process has: in the kernel's own page of code.
fn find_syscall(pid: u32) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let range = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| line.split_once(' '));
    let range = range.and_then(|(range, _)| range.split_once('-'));
    let number = |digits| u64::from_str_radix(digits, 16).ok();
    let (start, end) = range
        .and_then(|(start, end)| number(start).zip(number(end)))
        .ok_or_else(|| io::Error::other("it has no vdso"))?;
    let mut code = vec![0; (end - start) as usize];
    kernel::read(pid, &[(start, code.len())], &mut code)?;
    let at = code.windows(2).position(|pair| pair == SYSCALL);
    at.map(|at| start + at as u64).ok_or_else(|| io::Error::other("its vdso makes no system call"))
}

/// A thread that is stopped; it goes on as it was when this is dropped.
struct Stopped {
    thread: i32,
    before: libc::user_regs_struct,
    /// Signals that came meanwhile, to be given to it when it goes on.
    signals: Vec<i32>,
}

impl Stopped {
    fn attach(thread: i32) -> io::Result<Self> {
        // Should we die in the middle of this, it must not go on with what is in its registers then.
        let dies_with_us = std::ptr::without_provenance_mut(libc::PTRACE_O_EXITKILL as usize);
        request(libc::PTRACE_SEIZE, thread, dies_with_us)?;
        // From here on it has to be let go in any case.
        // SAFETY: the registers are plain numbers.
        let mut stopped = Self { thread, before: unsafe { std::mem::zeroed() }, signals: Vec::new() };
        request(libc::PTRACE_INTERRUPT, thread, null_mut())?;
        stopped.wait_for(|status| status >> 16 == EVENT_STOP)?;
        stopped.before = stopped.registers()?;
        Ok(stopped)
    }

    /// Waits for a stop of the wanted kind; other stops are signals, which are kept for later.
    fn wait_for(&mut self, wanted: impl Fn(i32) -> bool) -> io::Result<()> {
        loop {
            let mut status = 0;
            // SAFETY: the kernel writes one number to a live local.
            let waited = unsafe { libc::waitpid(self.thread, &raw mut status, libc::__WALL) };
            match waited {
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => continue,
                -1 => return Err(io::Error::last_os_error()),
                _ if !libc::WIFSTOPPED(status) => return Err(io::Error::other("it has ended")),
                _ if wanted(status) => return Ok(()),
                _ => {
                    self.signals.push(libc::WSTOPSIG(status));
                    request(libc::PTRACE_SINGLESTEP, self.thread, null_mut())?;
                }
            }
        }
    }

    fn registers(&self) -> io::Result<libc::user_regs_struct> {
        // SAFETY: plain numbers, which the kernel fills.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        request(libc::PTRACE_GETREGS, self.thread, (&raw mut registers).cast())?;
        Ok(registers)
    }

    /// Makes a system call in its name.
    fn call(&mut self, instruction: u64, number: i64, arguments: [u64; 3]) -> io::Result<u64> {
        let mut registers = self.before;
        (registers.rax, registers.rip) = (number as u64, instruction);
        // No call is interrupted here that the kernel would repeat; the one that was is repeated at the end.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        request(libc::PTRACE_SETREGS, self.thread, (&raw mut registers).cast())?;
        request(libc::PTRACE_SINGLESTEP, self.thread, null_mut())?;
        self.wait_for(|status| libc::WSTOPSIG(status) == libc::SIGTRAP)?;
        let result = self.registers()?.rax as i64;
        if (-4095..0).contains(&result) { Err(io::Error::from_raw_os_error(-result as i32)) } else { Ok(result as u64) }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        if self.before.rip != 0 {
            let mut before = self.before;
            let _ = request(libc::PTRACE_SETREGS, self.thread, (&raw mut before).cast());
        }
        let _ = request(libc::PTRACE_DETACH, self.thread, null_mut());
        for signal in &self.signals {
            // SAFETY: only numbers are passed.
            unsafe { libc::syscall(libc::SYS_tgkill, self.thread, self.thread, *signal) };
        }
    }
}

fn request(what: libc::c_uint, thread: i32, data: *mut c_void) -> io::Result<()> {
    // SAFETY: the requests used here read or write through `data` only the registers that it points to, if any.
    let result = unsafe { libc::ptrace(what, thread, null_mut::<c_void>(), data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

//! One instance as a QEMU process.
//!
//! This crate exists so that nothing else has to know QEMU: its command line, its monitor protocol (QMP),
//! its sandbox and its weak spots. A caller describes a [`Machine`], calls [`Vm::launch`], and gets a handle
//! and a stream of [`Event`]s. The rooms inside:
//!
//! * `machine`, `arguments`: what to run, checked and turned into an argument vector; pure.
//! * `accelerator`, `processor`, `qemu`: what this host can do, found out by use.
//! * `spawn`, `run_dir`: the process itself, its rights and its files.
//! * `qmp`, `event`, `vm`: talking to it.
//! * `adopt`: a machine that goes on when the process that launched it has died.
//! * `memory`, `state`, `checkpoint`: a machine as data: what it is beside its disks, saved and brought back.
//! * `notice`: a guest that goes on learns of other content of a disk.
//! * `guard`: keeps the guest away from the host's own addresses, without root and without a firewall.

mod accelerator;
mod adopt;
mod arguments;
mod checkpoint;
mod event;
mod forward;
mod guard;
mod kvm_probe;
mod machine;
mod memory;
mod notice;
mod processor;
mod qemu;
mod qmp;
mod run_dir;
mod spawn;
mod state;
mod vm;

pub use accelerator::{Accelerator, detect_accelerator};
pub use adopt::{Lifeline, Orphan};
pub use checkpoint::Resume;
pub use event::{Event, EventReceiver, Exit, ExitReason, RunState};
pub use guard::{Denial, GuardError, GuardLine, GuardPolicy, HostView, Transport, decide};
pub use machine::{Display, Drive, Firmware, InvalidMachine, Machine, Nic, Outbound};
pub use memory::{GuestMemory, tracks_writes};
pub use processor::{Portable, Processor, portable_processors};
pub use qemu::{QemuError, QemuInfo, find_qemu};
pub use qmp::QmpError;
pub use run_dir::RunDirError;
pub use state::{MachineState, StateError};
pub use vm::{LaunchError, LaunchOptions, Vm, VmError};

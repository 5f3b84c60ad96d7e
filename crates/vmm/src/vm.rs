//! A running machine: start it, speak to it, learn how it ended.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UnixStream;
use tokio::sync::{Mutex, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::accelerator::Accelerator;
use crate::arguments::{Paths, arguments, netdev_name};
use crate::checkpoint::Resume;
use crate::event::{Ending, Event, EventReceiver, Exit, RunState};
use crate::forward;
use crate::guard::{GuardError, GuardPolicy};
use crate::machine::{InvalidMachine, Machine};
use crate::notice::Notices;
use crate::processor::Processor;
use crate::qmp::{Client, QmpError, RawEvents};
use crate::run_dir::{RunDir, RunDirError};
use crate::spawn::{Process, Rights, SpawnError, spawn};

/// From the start of the process to a running guest; a loaded host takes seconds.
const LAUNCH_LIMIT: Duration = Duration::from_secs(30);
/// The same for a machine that goes on: its devices look into its memory, which may come over a thin link.
pub(crate) const RESUME_LIMIT: Duration = Duration::from_secs(300);
/// QEMU has no way to say that its socket is there now.
const SOCKET_RETRY: Duration = Duration::from_millis(5);
/// After a process has ended, its last words on the monitor are only still being read.
const LAST_WORDS_LIMIT: Duration = Duration::from_secs(5);
const EVENT_LIMIT: usize = 1024;

/// How to launch a [`Machine`] on this host.
#[derive(Debug, Clone)]
pub struct LaunchOptions {
    /// QEMU, from [`find_qemu`](crate::find_qemu).
    pub qemu: PathBuf,
    /// Directory of this machine alone, absolute and short: it gets `qmp.sock`, `serial.sock` (the console, one
    /// client at a time), `serial.log` and `qemu.log`. It is made if missing, and given to `user` with mode 0700.
    pub run_dir: PathBuf,
    /// What runs the guest's instructions.
    pub accelerator: Accelerator,
    /// What the guest sees under KVM.
    pub processor: Processor,
    /// User and group id to run QEMU as; needs root. `None` runs it as we are. The drives' files must be
    /// accessible to that user.
    pub user: Option<(u32, u32)>,
    /// QEMU's own system call filter. On, except to look for faults.
    pub seccomp: bool,
    /// Kill QEMU when this process dies: a power cut to the guest. [`Vm::untie`] takes it back.
    pub parent_death_kill: bool,
    /// Keeps the guest from the host's own addresses; `None` leaves them open to it.
    pub guard: Option<GuardPolicy>,
    /// Goes on with a saved machine, the same as this one, in place of booting.
    pub resume: Option<Resume>,
}

/// Why a machine does not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The description is wrong.
    #[error(transparent)]
    Machine(#[from] InvalidMachine),
    /// Its directory can not be used.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The guest could not be kept from the host's addresses.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// The process was not started.
    #[error(
        "{reason}; check that the program can be run, that changing the user is allowed (only root may), and that processes are not limited"
    )]
    Spawn {
        /// Program, user and the system's own words.
        reason: String,
    },
    /// QEMU ended before the guest ran.
    #[error("QEMU ended while it was starting the machine {machine:?} ({how}); it said: {stderr}; see {log}", log = log.display())]
    EarlyExit {
        /// The machine's name.
        machine: String,
        /// Exit code or signal.
        how: String,
        /// QEMU's own words.
        stderr: String,
        /// Where all of them are.
        log: PathBuf,
    },
    /// QEMU took the devices, but the rest does not fit.
    #[error("the saved machine does not fit this one: {reason}; boot it in place of going on")]
    Resume {
        /// What differs.
        reason: String,
    },
    /// QEMU runs, but does not answer.
    #[error(
        "the machine {machine:?} was started, but {reason}; it was killed; QEMU said: {stderr:?}; launch it again when the host is less busy"
    )]
    NoAnswer {
        /// The machine's name.
        machine: String,
        /// What was waited for, and how long.
        reason: String,
        /// QEMU's own words, if any.
        stderr: String,
    },
}

/// Why something asked of a running machine was not done.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The monitor did not do it.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// A port could not be forwarded.
    #[error("could not forward {listen} to port {guest_port} of the guest: {reason}; choose another port or address")]
    Forward {
        /// Where it should listen.
        listen: SocketAddrV4,
        /// Where it should lead.
        guest_port: u16,
        /// QEMU's own words.
        reason: String,
    },
    /// Only read-only disks can have other content.
    #[error("the machine has no read-only disk {drive:?}")]
    NoSuchDisk {
        /// What was asked for.
        drive: String,
    },
    /// The machine could not be saved, looked into or brought back.
    #[error(
        "could not {doing}: {reason}; check that this user may look into its own processes (ptrace_scope below 2) and that the disk has room"
    )]
    Memory {
        /// What was attempted.
        doing: &'static str,
        /// Why not.
        reason: String,
    },
    /// The picture could not be stored.
    #[error("a picture of the screen was taken, but could not be stored as {path}: {source}", path = path.display())]
    Screen {
        /// Where to.
        path: PathBuf,
        /// The system's own words.
        source: std::io::Error,
    },
}

/// A machine that was launched. The handle owns it: dropping it kills QEMU, a power cut to the guest.
pub struct Vm {
    process: Process,
    qmp: Client,
    run_dir: RunDir,
    was_killed: AtomicBool,
    ending: watch::Receiver<(Ending, bool)>,
    forwarding: Mutex<()>,
    notices: Notices,
    user: Option<(u32, u32)>,
}

/// Kills the process of a launch that was given up.
pub(crate) struct Unfinished<'a>(pub Option<&'a Process>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(process) = self.0 {
            process.kill();
        }
    }
}

impl Vm {
    /// Starts QEMU and returns when the guest runs. A machine that is gone on with is paused: it stands where it was saved, or
    /// waits for [`bring`](Self::bring).
    pub async fn launch(machine: &Machine, options: LaunchOptions) -> Result<(Vm, EventReceiver), LaunchError> {
        machine.validate()?;
        let run_dir = RunDir::prepare(&options.run_dir, options.user)?;
        let (qmp_socket, serial_socket, serial_log) =
            (run_dir.qmp_socket(), run_dir.serial_socket(), run_dir.serial_log());
        let devices = run_dir.devices();
        let state = options.resume.as_ref().and_then(|resume| resume.state.as_ref());
        if let Some(state) = state {
            let left = run_dir.leave_devices(&state.devices, options.user);
            left.map_err(|error| LaunchError::Spawn {
                reason: format!("could not hand over the saved devices: {error}"),
            })?;
        }
        let paths = Paths {
            qmp_socket: &qmp_socket,
            serial_socket: &serial_socket,
            serial_log: &serial_log,
            resume: options.resume.as_ref().map(|resume| (&*resume.memory, state.map(|_| &*devices))),
        };
        let notices = Notices::new(machine, state);
        let arguments = arguments(machine, (&options.accelerator, options.processor), options.seccomp, paths);
        tracing::debug!(machine = machine.name, ?arguments, "starting QEMU");
        let log = run_dir
            .log()
            .map_err(|error| LaunchError::Spawn { reason: format!("could not hand over QEMU's log: {error}") })?;
        let process = spawn(&options.qemu, arguments, log, options.rights()).await.map_err(|error| match error {
            SpawnError::Guard(error) => LaunchError::Guard(error),
            start => LaunchError::Spawn { reason: start.to_string() },
        })?;
        let mut unfinished = Unfinished(Some(&process));
        let limit = if options.resume.is_some() { RESUME_LIMIT } else { LAUNCH_LIMIT };
        let is_whole = options.resume.is_none() || state.is_some();
        let (qmp, raw_events) = await_guest(machine, &process, &run_dir, &qmp_socket, (limit, is_whole)).await?;
        unfinished.0 = None;
        drop(unfinished);
        let (vm, events) = Vm::over(process, (qmp, raw_events), run_dir, notices, options.user);
        if let Some(state) = state {
            let _ = std::fs::remove_file(devices);
            vm.fill_blocks(state).await.map_err(|error| LaunchError::Resume { reason: error.to_string() })?;
        }
        Ok((vm, events))
    }

    pub(crate) fn over(
        process: Process,
        (qmp, raw_events): (Client, RawEvents),
        run_dir: RunDir,
        notices: Notices,
        user: Option<(u32, u32)>,
    ) -> (Vm, EventReceiver) {
        let (sender, events) = mpsc::channel(EVENT_LIMIT);
        let (ending_sender, ending) = watch::channel((Ending::NotSaid, false));
        tokio::spawn(pump(raw_events, sender, ending_sender));
        let was_killed = AtomicBool::new(false);
        (Vm { process, qmp, run_dir, was_killed, ending, forwarding: Mutex::new(()), notices, user }, events)
    }

    /// Process id of QEMU.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// The unix socket of the serial console.
    pub fn serial_socket(&self) -> PathBuf {
        self.run_dir.serial_socket()
    }

    /// Whether the guest runs.
    pub async fn status(&self) -> Result<RunState, VmError> {
        Ok(query_status(&self.qmp).await?)
    }

    /// Presses the power button; the guest switches itself off when and if it wants.
    pub async fn power_button(&self) -> Result<(), VmError> {
        self.command("system_powerdown").await
    }

    /// Stops the processors.
    pub async fn pause(&self) -> Result<(), VmError> {
        self.command("stop").await
    }

    /// Lets the processors go on; a disk request that failed is repeated.
    pub async fn cont(&self) -> Result<(), VmError> {
        self.command("cont").await
    }

    /// Presses the reset button.
    pub async fn reset(&self) -> Result<(), VmError> {
        self.command("system_reset").await
    }

    /// Ends QEMU at once, a power cut to the guest, and returns when it is gone.
    pub async fn kill(&self) {
        self.was_killed.store(true, Ordering::SeqCst);
        self.process.kill();
        self.process.exited().await;
    }

    /// Leads a port of 127.0.0.1, chosen by the system, to a TCP port of the guest behind card `nic`.
    pub async fn forward(&self, nic: usize, guest_port: u16) -> Result<SocketAddr, VmError> {
        let listen = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        Ok(SocketAddr::V4(self.forward_from(nic, listen, guest_port).await?))
    }

    /// Leads `listen` to a TCP port of the guest behind card `nic`; with port 0 the system chooses one, and the
    /// address that came out is returned.
    pub async fn forward_from(
        &self,
        nic: usize,
        listen: SocketAddrV4,
        guest_port: u16,
    ) -> Result<SocketAddrV4, VmError> {
        let netdev = netdev_name(nic);
        let fail = |reason: String| VmError::Forward { listen, guest_port, reason };
        // What is new in the list is ours only if nobody else adds at the same time.
        let _one_at_a_time = self.forwarding.lock().await;
        let before = forward::parse(&self.monitor("info usernet").await?, &netdev);
        let answer = self.monitor(&forward::add_command(&netdev, listen, guest_port)).await?;
        if !answer.trim().is_empty() {
            return Err(fail(answer.trim().to_owned()));
        }
        let after = forward::parse(&self.monitor("info usernet").await?, &netdev);
        forward::new_one(&before, &after, guest_port).ok_or_else(|| fail("QEMU does not list it".into()))
    }

    /// Takes back a forward that listens at `listen`.
    pub async fn unforward(&self, nic: usize, listen: SocketAddrV4) -> Result<(), VmError> {
        let _one_at_a_time = self.forwarding.lock().await;
        let answer = self.monitor(&forward::remove_command(&netdev_name(nic), listen)).await?;
        if answer.contains("removed") {
            return Ok(());
        }
        Err(VmError::Forward { listen, guest_port: 0, reason: answer.trim().to_owned() })
    }

    /// Stores a picture of the screen as PNG; the machine must have one.
    pub async fn screendump(&self, path: &Path) -> Result<(), VmError> {
        // QEMU may write only into its own directory.
        let screen = self.run_dir.screen();
        self.qmp.execute("screendump", json!({ "filename": screen.to_string_lossy(), "format": "png" })).await?;
        self.run_dir.take_screen(path).map_err(|source| VmError::Screen { path: path.to_owned(), source })
    }

    /// Begins the log of the serial line anew if it is longer than 16 MiB; to be called now and then.
    pub fn trim_serial_log(&self) -> std::io::Result<()> {
        self.run_dir.trim_serial_log()
    }

    /// Returns when QEMU has ended, and says why.
    pub async fn wait(&self) -> Exit {
        let exit = self.process.exited().await;
        let mut ending = self.ending.clone();
        let _ = timeout(LAST_WORDS_LIMIT, ending.wait_for(|(_, is_over)| *is_over)).await;
        let last_word = ending.borrow().0;
        Exit::new(exit.code, exit.signal, last_word, self.was_killed.load(Ordering::SeqCst), || self.run_dir.log_tail())
    }

    pub(crate) fn process(&self) -> &Process {
        &self.process
    }

    pub(crate) fn run_dir(&self) -> &RunDir {
        &self.run_dir
    }

    pub(crate) fn user(&self) -> Option<(u32, u32)> {
        self.user
    }

    pub(crate) fn notices(&self) -> &Notices {
        &self.notices
    }

    pub(crate) fn qmp(&self) -> &Client {
        &self.qmp
    }

    async fn command(&self, command: &str) -> Result<(), VmError> {
        self.qmp.execute(command, json!({})).await?;
        Ok(())
    }

    /// A command of the monitor for people, for what QMP does not have; returns the text it prints.
    pub(crate) async fn monitor(&self, line: &str) -> Result<String, VmError> {
        let answer = self.qmp.execute("human-monitor-command", json!({ "command-line": line })).await?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.process.kill();
    }
}

impl LaunchOptions {
    fn rights(&self) -> Rights {
        use std::os::unix::fs::MetadataExt;
        // A user of its own is not in the group that may use KVM.
        let kvm_group = || std::fs::metadata("/dev/kvm").ok().map(|metadata| metadata.gid()).filter(|gid| *gid != 0);
        Rights {
            user: self.user,
            extra_group: if self.accelerator == Accelerator::Kvm { kvm_group() } else { None },
            parent_death_kill: self.parent_death_kill,
            guard: self.guard.clone(),
            huge_pages: self.resume.is_none(),
        }
    }
}

pub(crate) async fn await_guest(
    machine: &Machine,
    process: &Process,
    run_dir: &RunDir,
    socket: &Path,
    (limit, is_whole): (Duration, bool),
) -> Result<(Client, RawEvents), LaunchError> {
    let no_answer =
        |reason: String| LaunchError::NoAnswer { machine: machine.name.clone(), reason, stderr: run_dir.log_tail() };
    let result = timeout(limit, open_monitor(process, socket, is_whole)).await;
    match result {
        Ok(Ok(monitor)) => Ok(monitor),
        Err(_) => Err(no_answer(format!("it did not run after {} s", limit.as_secs()))),
        // A lost connection most often means that QEMU is just ending.
        Ok(Err(problem)) => match timeout(LAST_WORDS_LIMIT, process.exited()).await {
            Err(_) => Err(no_answer(problem)),
            Ok(exit) => Err(LaunchError::EarlyExit {
                machine: machine.name.clone(),
                how: match (exit.code, exit.signal) {
                    (Some(code), _) => format!("exit code {code}"),
                    (None, Some(signal)) => format!("signal {signal}"),
                    (None, None) => "in an unknown way".into(),
                },
                stderr: run_dir.log_tail(),
                log: run_dir.log_path(),
            }),
        },
    }
}

async fn open_monitor(process: &Process, socket: &Path, is_whole: bool) -> Result<(Client, RawEvents), String> {
    let connect = async {
        loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(_) => sleep(SOCKET_RETRY).await,
            }
        }
    };
    let stream = tokio::select! {
        stream = connect => stream,
        _ = process.exited() => return Err("it ended".into()),
    };
    let (client, events) = Client::connect(stream).await.map_err(|error| error.to_string())?;
    while is_whole && let RunState::Other(state) = query_status(&client).await.map_err(|error| error.to_string())? {
        if state != "prelaunch" && state != "inmigrate" {
            break;
        }
        sleep(SOCKET_RETRY).await;
    }
    Ok((client, events))
}

async fn query_status(qmp: &Client) -> Result<RunState, QmpError> {
    let answer = qmp.execute("query-status", json!({})).await?;
    Ok(RunState::from_qemu(answer.get("status").and_then(Value::as_str).unwrap_or_default()))
}

/// Translates events and keeps what the last of them says about the end.
async fn pump(mut raw: RawEvents, events: mpsc::Sender<Event>, ending: watch::Sender<(Ending, bool)>) {
    while let Some(event) = raw.recv().await {
        let event = Event::from(event);
        ending.send_modify(|(ending, _)| *ending = ending.after(&event));
        if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
            tracing::warn!(?event, "an event of a machine was dropped, because nobody reads them");
        }
    }
    ending.send_modify(|(_, is_over)| *is_over = true);
}

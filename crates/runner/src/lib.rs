//! The process that keeps one instance alive: its disks (FUSE) and its machine (QEMU), and nothing else.
//!
//! It is started by the host daemon and outlives it. All it needs is in `run.json` in its directory; it answers on
//! `runner.sock` there ([`collective_model::run`]), and leaves `end.json` when the machine has ended. When it dies itself,
//! another one takes over and the guest goes on, if the daemon has what that takes (`lifeline.rs`). Else its death is a power
//! cut to the guest: QEMU dies with it, and the next start finds the disks as after a power cut.

#![forbid(unsafe_code)]

mod ahead;
mod gate;
mod kept;
mod leave;
mod lifeline;
mod line;
mod machine;
mod merge;
mod platform;
mod private;
mod probe;
mod receive;
mod save;
mod saved;
mod send;
mod serve;
mod state;
mod take_over;
mod watch;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use collective_model::Name;
use collective_model::run::{EndKind, PROTOCOL, RunConfig, RunEnd, TOUCHED};
use collective_model::run_private::PrivateNews;
use collective_store::Source;
use collective_store::seal::Seal;
use tokio::io::AsyncWrite;

pub use platform::platform;
pub use private::OpenVault;
pub use saved::{Reader, SavedMachine, as_image, open_saved};
pub use state::NotStarted;

/// The file of the memory beside those of the disks; not a name that a disk can have.
pub(crate) const MEMORY: &str = ".memory";

/// Files of a runner's directory.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The directory itself.
    pub dir: PathBuf,
}

impl Layout {
    /// What to run.
    pub fn config(&self) -> PathBuf {
        self.dir.join("run.json")
    }
    /// Where the runner answers.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("runner.sock")
    }
    /// How it ended.
    pub fn end(&self) -> PathBuf {
        self.dir.join("end.json")
    }
    /// Which blocks the guest read until it was up.
    pub fn trace(&self) -> PathBuf {
        self.dir.join("trace.json")
    }
    /// Which blocks and pages a machine that went on read until it was up.
    pub fn touched(&self) -> PathBuf {
        self.dir.join(TOUCHED)
    }
    /// Entered only by the user that QEMU runs as; the disks are mounted in it.
    pub fn guarded(&self) -> PathBuf {
        self.dir.join("v")
    }
    /// Where the disks are mounted.
    pub fn mount(&self) -> PathBuf {
        self.dir.join("v/d")
    }
    /// The memory that the machine goes on with, in the mount.
    pub fn memory(&self) -> PathBuf {
        self.mount().join(MEMORY)
    }
    /// QEMU's own files, the serial log among them.
    pub fn qemu(&self) -> PathBuf {
        self.dir.join("q")
    }
}

/// How a machine comes to what it is made of.
struct Ways<'a> {
    open_source: &'a OpenSource,
    open_vault: &'a OpenVault,
    /// For what arrives.
    seal: Option<Arc<Seal>>,
    /// Of the machine that is taken over.
    lifeline: Mutex<Option<lifeline::Lifeline>>,
}

/// Opens the store that credentials lead to, keeping versions in the host's folder.
pub type OpenSource = dyn Fn(&RunConfig) -> Result<Arc<dyn Source>, String> + Send + Sync;

/// Runs the instance in `dir` to its end. Where some of it is to arrive, the key for that comes from `input`; a rehearsal
/// ends with it, and what it takes to take a machine over comes before all else. The returned end is also in `end.json`.
pub async fn run(
    dir: &Path,
    open_source: &OpenSource,
    open_vault: &OpenVault,
    input: impl std::io::Read + AsFd + Send + 'static,
) -> RunEnd {
    let layout = Layout { dir: dir.to_owned() };
    let prepare = || {
        let config = read_config(&layout)?;
        let lifeline = config.orphan.as_ref().map(|_| lifeline::take(&input)).transpose()?;
        let mut input = std::io::BufReader::new(input);
        let seal = config.arriving.as_ref().map(|_| private::read_key(&mut input)).transpose()?;
        if config.rehearsal {
            private::end_with(input);
        }
        Ok::<_, String>((config, seal, lifeline))
    };
    let end = match prepare() {
        Ok((config, seal, lifeline)) => {
            let ways = Ways { open_source, open_vault, seal, lifeline: Mutex::new(lifeline) };
            machine::run(&layout, config, &ways).await
        }
        Err(message) => RunEnd::now(EndKind::NotStarted, message),
    };
    tracing::info!(kind = ?end.kind, message = end.message, "the run has ended");
    if let Err(error) = write_end(&layout, &end) {
        tracing::error!(%error, "cannot leave end.json; the daemon will take this for a crash");
    }
    end
}

/// Writes disk `name` of the machine in `dir`, which must be off, to `out` as [`collective_store::sparse`] says.
pub async fn send_disk(
    dir: &Path,
    name: &Name,
    open_source: &OpenSource,
    out: &mut (impl AsyncWrite + Unpin),
) -> Result<(), String> {
    send::send(&read_config(&Layout { dir: dir.to_owned() })?, name, open_source, out).await
}

/// Carries out what the daemon wants with the private data of the machine in `dir`, which must be off: order and key come
/// from `order`, whose end ends this process, and what there is to tell goes to `news`
/// ([`collective_model::run_private`]). False if it failed.
pub async fn private(
    dir: &Path,
    open_source: &OpenSource,
    open_vault: &OpenVault,
    order: impl std::io::Read + Send + 'static,
    news: impl std::io::Write + Send + 'static,
) -> bool {
    let teller = private::Teller::new(news);
    let carry_out = async {
        let mut order = std::io::BufReader::new(order);
        let wanted = private::Wanted::read(&mut order)?;
        private::end_with(order);
        let config = read_config(&Layout { dir: dir.to_owned() })?;
        private::carry_out(&config, wanted, open_source, open_vault, &teller).await
    };
    let outcome = carry_out.await;
    let done = outcome.is_ok();
    teller.tell(&outcome.unwrap_or_else(|why| PrivateNews::Failed { why }));
    done
}

/// Makes one layer of several of a machine that is off: the order comes from `order`, whose end ends this process, and how it
/// went goes to `news` ([`collective_model::run_merge`]). False if it failed.
pub fn merge(order: impl std::io::Read + Send + 'static, news: impl std::io::Write) -> bool {
    merge::merge_alone(order, news)
}

fn read_config(layout: &Layout) -> Result<RunConfig, String> {
    let path = layout.config();
    let bytes = std::fs::read(&path).map_err(|e| format!("cannot read {}: {e}", path.display()))?;
    let config: RunConfig =
        serde_json::from_slice(&bytes).map_err(|e| format!("{} cannot be read: {e}", path.display()))?;
    if config.protocol != PROTOCOL {
        return Err(format!("the daemon speaks protocol {}, and this runner {PROTOCOL}", config.protocol));
    }
    Ok(config)
}

fn write_end(layout: &Layout, end: &RunEnd) -> std::io::Result<()> {
    let part = layout.dir.join("end.part");
    std::fs::write(&part, serde_json::to_vec(end)?)?;
    std::fs::rename(&part, layout.end())
}

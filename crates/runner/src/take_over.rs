//! A machine whose runner died: its disks and memory are served again where it waits for them, and it goes on.
//!
//! Nothing that the guest was told is lost ([`collective_volume::Disk::take_over`]), and what it asked for and was not
//! answered is asked again by the kernel. What the dead runner did beside that, such as saving the machine, is not gone on
//! with: the daemon finds that nobody knows of it.

use std::sync::{Arc, PoisonError};

use collective_model::run::{Arrival, Leave, Phase, RunConfig, RunStatus};
use collective_vmm as vmm;
use collective_volume::Mount;
use tokio::sync::mpsc;

use crate::lifeline::Lifeline;
use crate::machine::{Running, describe, files, guard_policy, open_disks, open_memory, share};
use crate::save::Saver;
use crate::state::{NotStarted, Order, Shared};
use crate::{Layout, Ways, ahead};

/// Takes over the machine that the configuration describes.
pub(crate) async fn take_over(
    layout: &Layout,
    config: RunConfig,
    ways: &Ways<'_>,
    orders: mpsc::Sender<Order>,
) -> Result<Running, NotStarted> {
    let missing = |what: &str| NotStarted::step("the machine cannot be taken over")(format!("{what} is not known"));
    let orphan = config.orphan.clone().ok_or_else(|| missing("how it was"))?;
    let lifeline = ways.lifeline.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Lifeline { disks: connection, process, guard } = lifeline.ok_or_else(|| missing("what keeps it going"))?;
    let platform = orphan.status.platform.clone().ok_or_else(|| missing("what it runs on"))?;
    let shared = share(layout, config, ways, orders).await?;
    let config = &shared.config;
    let disks = open_disks(&shared).await?;
    *shared.disks() = disks.clone();
    let memory = open_memory(&shared).await?;
    shared.memory().clone_from(&memory);
    // What is read first was noted by the one that died, or is not any more.
    disks.iter().chain(&memory).for_each(|disk| _ = disk.stop_recording());
    let shown = files(config, &disks, memory.clone().map(|memory| (memory, None)), shared.memory_waits.clone());
    let runtime = tokio::runtime::Handle::current();
    let mount = Mount::adopt(connection, &layout.mount(), shown, config.user, runtime)
        .map_err(NotStarted::step("the disks cannot be shown to QEMU again"))?;
    let guard = Some((guard_policy(config), guard));
    let machine = vmm::Orphan { process, guard, run_dir: layout.qemu(), user: config.user };
    let adopted = vmm::Vm::adopt(&describe(layout, config)?, machine).await;
    let (vm, events) = adopted.map_err(NotStarted::step("the machine cannot be taken over"))?;
    go_on(&shared, &vm, orphan.sent).await?;
    let forwards = vm.forwards(0).await.map_err(NotStarted::step("its ports are not known"))?;
    if config.open_ports {
        shared.gate.open(&forwards).map_err(NotStarted::step("cannot open the published ports"))?;
    }
    *shared.status() = RunStatus {
        pid: std::process::id(),
        phase: Phase::Running,
        qemu_pid: Some(vm.pid()),
        forwards,
        outlives: true,
        paused: None,
        waiting: None,
        leave: if orphan.sent { Leave::Sent } else { Leave::No },
        save: orphan.status.save.filter(|save| save.outcome.is_some()),
        merge: orphan.status.merge.filter(|merge| merge.outcome.is_some()),
        arrival: shared
            .arrival
            .as_ref()
            .map(|_| Arrival { complete: false, ..orphan.status.arrival.unwrap_or_default() }),
        ..orphan.status
    };
    if memory.is_some() {
        tokio::spawn(ahead::read_on(shared.clone()));
    }
    tokio::spawn(ahead::fetch(shared.clone(), disks, memory));
    let saver = Saver::new(platform, shared.config.resume.as_ref());
    Ok(Running { shared, vm, events, saver, mount, layout: layout.clone() })
}

/// It may stand still, because the one that died was about to save it, or was told that a disk is full.
async fn go_on(shared: &Arc<Shared>, vm: &vmm::Vm, sent: bool) -> Result<(), NotStarted> {
    let state = vm.status().await.map_err(NotStarted::step("the machine does not say how it is"))?;
    tracing::info!(?state, sent, instance = %shared.config.name, "took over");
    let done = match (sent, state) {
        (true, vmm::RunState::Running) => vm.pause().await,
        (false, vmm::RunState::Paused | vmm::RunState::IoError | vmm::RunState::Other(_)) => vm.cont().await,
        _ => Ok(()),
    };
    done.map_err(NotStarted::step("the machine does not go on"))
}

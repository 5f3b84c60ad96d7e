//! From `run.json` to a machine that runs: disks, mount, QEMU. What happens then is in `watch.rs`.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use collective_model::run::{EndKind, Phase, Platform, RunConfig, RunDisk, RunEnd, RunImage, RunResume};
use collective_model::{Firmware, Timestamp};
use collective_store::cache::Cache;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::ImageMap;
use collective_vmm as vmm;
use collective_volume::{Disk, File, Layer, Mount};
use tokio::net::UnixListener;
use tokio::sync::{Notify, mpsc};
use tokio::time::sleep;

use crate::gate::Gate;
use crate::platform;
use crate::save::{self, Saver};
use crate::state::{NotStarted, Order, Shared};
use crate::{Layout, MEMORY, Ways, ahead, private, receive, serve, take_over};

/// Where Debian and Ubuntu keep the UEFI code.
const OVMF_CODE: [&str; 2] = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_CODE.fd"];

/// Runs the machine to its end.
pub(crate) async fn run(layout: &Layout, config: RunConfig, ways: &Ways<'_>) -> RunEnd {
    let (orders, mut inbox) = mpsc::channel(8);
    if config.orphan.is_some() {
        return match take_over::take_over(layout, config, ways, orders).await {
            Ok(running) => running.see_to_its_end(inbox).await,
            Err(error) => RunEnd::now(
                EndKind::Crashed,
                format!("the runner died, and no other one could take over ({error}): a power cut to the guest"),
            ),
        };
    }
    match start(layout, config, ways, orders, &mut inbox).await {
        Ok(running) => running.see_to_its_end(inbox).await,
        Err(error) => RunEnd::now(EndKind::NotStarted, error.to_string()),
    }
}

pub(crate) struct Running {
    pub shared: Arc<Shared>,
    pub vm: vmm::Vm,
    pub events: vmm::EventReceiver,
    pub saver: Saver,
    pub mount: Mount,
    pub layout: Layout,
}

async fn start(
    layout: &Layout,
    config: RunConfig,
    ways: &Ways<'_>,
    orders: mpsc::Sender<Order>,
    inbox: &mut mpsc::Receiver<Order>,
) -> Result<Running, NotStarted> {
    let shared = share(layout, config, ways, orders).await?;
    let disks = open_disks(&shared).await?;
    *shared.disks() = disks.clone();
    if let Some(receiving) = shared.config.receiving.clone() {
        return receive::receive(layout, shared, &receiving, inbox).await;
    }
    let memory = open_memory(&shared).await?;
    shared.memory().clone_from(&memory);
    let backing = shared.config.resume.as_ref().and_then(|resume| backing(&shared.config, resume));
    let singly = backing.is_none();
    let shown = memory.clone().map(|memory| (memory, backing));
    let mount = mount(layout, &shared.config, &disks, shown, shared.memory_waits.clone())?;
    ahead::before_it_goes_on(&shared, &disks, memory.as_ref()).await;
    match launch(layout, &shared, singly).await {
        Ok((vm, events, saver)) => {
            let to = if memory.is_some() { layout.touched() } else { layout.trace() };
            tokio::spawn(ahead::record(shared.clone(), disks.clone(), memory.clone(), to));
            if !shared.config.rehearsal {
                tokio::spawn(ahead::fetch(shared.clone(), disks, memory));
            }
            Ok(Running { shared, vm, events, saver, mount, layout: layout.clone() })
        }
        Err(error) => {
            let _ = mount.unmount();
            Err(error)
        }
    }
}

/// Makes ready for a machine all that its tasks share, and answers the daemon from here on.
pub(crate) async fn share(
    layout: &Layout,
    config: RunConfig,
    ways: &Ways<'_>,
    orders: mpsc::Sender<Order>,
) -> Result<Arc<Shared>, NotStarted> {
    let source = (ways.open_source)(&config).map_err(NotStarted::step("cannot open the store"))?;
    let cache = Cache::open(&config.cache).map_err(NotStarted::step("cannot open the host's cache"))?;
    let gate = Gate::reserve(&config.ports).map_err(NotStarted::step("the ports are not to be had"))?;
    let mut store = Arc::new(FrameStore::new(cache, source));
    let mut arrival = None;
    if let (Some(arriving), Some(seal)) = (&config.arriving, &ways.seal) {
        let opened = private::open_arrival(&config, arriving, seal, &store, ways.open_vault).await;
        let opened = opened.map_err(NotStarted::step("what is to arrive cannot be opened"))?;
        store = opened.store.clone();
        arrival = Some(opened);
    }
    let shared = Arc::new(Shared::new(config, store, gate, orders, arrival));
    let _ = std::fs::remove_file(layout.trace());
    let _ = std::fs::remove_file(layout.socket());
    let listener = UnixListener::bind(layout.socket()).map_err(NotStarted::step("cannot listen for the daemon"))?;
    tokio::spawn(serve::serve(listener, shared.clone()));
    Ok(shared)
}

pub(crate) async fn open_disks(shared: &Shared) -> Result<Vec<Arc<Disk>>, NotStarted> {
    let mut disks = Vec::new();
    for disk in &shared.config.disks {
        let wrong = |why: String| NotStarted::Disk { disk: disk.name.to_string(), why };
        if let Some(top) = disk.layers.last().filter(|top| disk.create_top && !top.exists()) {
            Layer::create(top, disk.size).map_err(|e| wrong(e.to_string()))?;
        }
        let (arrives, layers) = shared.arrives(&disk.layers);
        let image = match arrives {
            Some(image) => Some(image),
            None => load_image(shared, disk.image.as_ref()).await.map_err(|e| wrong(e.to_string()))?,
        };
        let (size, store) = (disk.size, shared.store.clone());
        let opened = match shared.config.orphan {
            Some(_) => Disk::take_over(size, image, store, layers),
            None => Disk::open(size, image, store, layers),
        };
        let mut opened = opened.map_err(|e| wrong(e.to_string()))?;
        if shared.config.resume.is_some() {
            opened.record_all();
        }
        disks.push(Arc::new(opened));
    }
    Ok(disks)
}

/// The memory that the machine goes on with.
pub(crate) async fn open_memory(shared: &Shared) -> Result<Option<Arc<Disk>>, NotStarted> {
    let Some(resume) = &shared.config.resume else { return Ok(None) };
    let size = shared.config.memory_mib << 20;
    if let Some(last) = resume.memory.last().filter(|last| resume.create && !last.exists()) {
        Layer::create(last, size).map_err(NotStarted::step("a layer for its memory cannot be made"))?;
    }
    let (arrives, layers) = shared.arrives(&resume.memory);
    let image = match arrives {
        Some(image) => Some(image),
        None => {
            let loaded = load_image(shared, resume.image.as_ref()).await;
            loaded.map_err(NotStarted::step("the memory that came with its version is not to be had"))?
        }
    };
    let opened = Disk::open_frozen(size, image, shared.store.clone(), layers);
    opened.map(|disk| Some(Arc::new(disk))).map_err(NotStarted::step("the saved memory cannot be opened"))
}

/// Reads the image's index; waits for a store that is away, and says so in the status.
async fn load_image(shared: &Shared, image: Option<&RunImage>) -> Result<Option<Arc<ImageMap>>, FetchError> {
    let Some(image) = image else { return Ok(None) };
    shared.store.add_version(&image.appliance, &image.version).await;
    loop {
        match ImageMap::load(&shared.store, image.root).await {
            Ok(map) => {
                shared.status().waiting = None;
                return Ok(Some(Arc::new(map)));
            }
            Err(error) if error.is_away() => {
                shared.status().waiting = Some(error.to_string());
                sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// A file that is all of the memory, and not this machine's alone: that of a version, or the only layer of clones. What a
/// rehearsal reads has to be seen.
fn backing(config: &RunConfig, resume: &RunResume) -> Option<std::fs::File> {
    if config.rehearsal || config.arriving.is_some() {
        return None;
    }
    let layer = || match &resume.memory[..] {
        [only] if resume.image.is_none() && std::fs::metadata(only).is_ok_and(|found| found.nlink() > 1) => Some(only),
        _ => None,
    };
    let path = resume.copy.as_ref().filter(|copy| copy.exists()).or_else(layer)?;
    let opened = std::fs::File::open(path);
    opened.inspect_err(|error| tracing::warn!(%error, "pages of the memory are not shared with others")).ok()
}

pub(crate) fn mount(
    layout: &Layout,
    config: &RunConfig,
    disks: &[Arc<Disk>],
    memory: Option<(Arc<Disk>, Option<std::fs::File>)>,
    waits: Arc<Notify>,
) -> Result<Mount, NotStarted> {
    let guarded = layout.guarded();
    let prepare = || -> std::io::Result<()> {
        std::fs::create_dir_all(layout.mount())?;
        std::fs::set_permissions(&guarded, std::fs::Permissions::from_mode(0o700))?;
        config.user.map_or(Ok(()), |(uid, gid)| chown(&guarded, Some(uid), Some(gid)))
    };
    prepare().map_err(NotStarted::step("cannot prepare the folder of the disks"))?;
    let files = files(config, disks, memory, waits);
    Mount::new(&layout.mount(), files, config.user, tokio::runtime::Handle::current())
        .map_err(NotStarted::step("cannot show the disks to QEMU"))
}

/// What is shown to QEMU, in this order.
pub(crate) fn files(
    config: &RunConfig,
    disks: &[Arc<Disk>],
    memory: Option<(Arc<Disk>, Option<std::fs::File>)>,
    waits: Arc<Notify>,
) -> Vec<File> {
    let file = |(run, disk): (&RunDisk, &Arc<Disk>)| File {
        name: run.name.to_string(),
        disk: disk.clone(),
        backing: None,
        waits: None,
    };
    let memory = memory.map(|(disk, backing)| File { name: MEMORY.into(), disk, backing, waits: Some(waits) });
    config.disks.iter().zip(disks).map(file).chain(memory).collect()
}

async fn launch(
    layout: &Layout,
    shared: &Shared,
    singly: bool,
) -> Result<(vmm::Vm, vmm::EventReceiver, Saver), NotStarted> {
    let config = &shared.config;
    let resume = |platform: &Platform| {
        let state = config.resume.as_ref().map(|resume| save::load(resume, platform)).transpose();
        let state = state.map_err(NotStarted::step("the saved machine cannot go on here"))?;
        Ok(state.map(|state| vmm::Resume { memory: layout.memory(), state: Some(state) }))
    };
    let (vm, events, platform) = create(layout, shared, resume).await?;
    if config.resume.is_some() {
        if singly {
            read_singly(&vm, true).await;
        }
        vm.cont().await.map_err(NotStarted::step("the machine does not go on"))?;
        if let Err(error) = vm.announce().await {
            tracing::warn!(%error, "the network is not told where the guest is now");
        }
        // What the guest does then would keep one that arrives from what it is asked for.
        if shared.arrival.is_none() {
            save::tell_guest(&vm).await;
        }
    }
    it_runs(shared, &vm, config.resume.is_some());
    Ok((vm, events, Saver::new(platform, config.resume.as_ref())))
}

/// Says that the machine runs.
pub(crate) fn it_runs(shared: &Shared, vm: &vmm::Vm, resumed: bool) {
    let mut status = shared.status();
    status.phase = Phase::Running;
    status.resumed = resumed;
    status.qemu_pid = Some(vm.pid());
    status.started_in_ms = Some(Timestamp::now().since_ms(shared.config.ordered));
}

/// Starts QEMU. A machine that is gone on with is paused then.
pub(crate) async fn create(
    layout: &Layout,
    shared: &Shared,
    resume: impl FnOnce(&Platform) -> Result<Option<vmm::Resume>, NotStarted>,
) -> Result<(vmm::Vm, vmm::EventReceiver, Platform), NotStarted> {
    let config = &shared.config;
    let qemu = vmm::find_qemu().await.map_err(NotStarted::step("cannot find QEMU"))?;
    let accelerator = if config.force_tcg {
        vmm::Accelerator::Tcg { why: "this host was told not to use KVM".into() }
    } else {
        vmm::detect_accelerator()
    };
    shared.status().accelerator = Some(match &accelerator {
        vmm::Accelerator::Kvm => "kvm".into(),
        vmm::Accelerator::Tcg { why } => format!("tcg: {why}"),
    });
    let (platform, processor) =
        platform::here(config, &qemu, &accelerator).map_err(NotStarted::step("the guest cannot have its processor"))?;
    {
        let mut status = shared.status();
        (status.processor, status.platform) = (Some(platform.cpu.clone()), Some(platform.clone()));
    }
    let resume = resume(&platform)?;
    let options = vmm::LaunchOptions {
        qemu: qemu.path,
        run_dir: layout.qemu(),
        accelerator,
        processor,
        user: config.user,
        seccomp: true,
        parent_death_kill: true,
        guard: Some(guard_policy(config)),
        resume,
    };
    let machine = describe(layout, config)?;
    let (vm, events) =
        vmm::Vm::launch(&machine, options).await.map_err(NotStarted::step("the machine does not start"))?;
    // Before anybody is told that it runs, and may ask for its ports.
    forward(&vm, shared).await?;
    Ok((vm, events, platform))
}

/// Memory is read as the guest touches it, so that what comes over the network and what is noted is what is needed.
pub(crate) async fn read_singly(vm: &vmm::Vm, singly: bool) {
    if let Err(error) = vm.page_by_page(singly).await {
        tracing::warn!(%error, "memory is read with what is near");
    }
}

/// Where the guest must not send to.
pub(crate) fn guard_policy(config: &RunConfig) -> vmm::GuardPolicy {
    vmm::GuardPolicy { deny: config.deny.clone(), ..Default::default() }
}

pub(crate) fn describe(layout: &Layout, config: &RunConfig) -> Result<vmm::Machine, NotStarted> {
    let firmware = match (config.firmware, &config.uefi_vars) {
        (Firmware::Bios, _) => vmm::Firmware::Bios,
        (Firmware::Uefi, Some(vars)) => {
            let code = OVMF_CODE.iter().map(Path::new).find(|path| path.exists());
            let code = code.ok_or("no OVMF firmware is installed; install the package ovmf");
            let code = code.map_err(NotStarted::step("the machine needs UEFI"))?.to_owned();
            vmm::Firmware::Uefi { code, vars: vars.clone() }
        }
        (Firmware::Uefi, None) => {
            return Err(NotStarted::step("the machine needs UEFI")("the daemon gave no file for its variables"));
        }
    };
    let mut drives: Vec<vmm::Drive> = (0u32..)
        .zip(&config.disks)
        .map(|(index, disk)| vmm::Drive {
            name: disk.name.to_string(),
            path: layout.mount().join(disk.name.as_str()),
            read_only: false,
            boot_index: Some(index),
        })
        .collect();
    drives.push(vmm::Drive { name: save::SEED.into(), path: config.seed.clone(), read_only: true, boot_index: None });
    let outbound = if config.outbound { vmm::Outbound::Internet } else { vmm::Outbound::None };
    Ok(vmm::Machine {
        name: config.name.to_string(),
        uuid: config.instance.uuid(),
        cpus: config.cpus,
        memory_mib: config.memory_mib,
        firmware,
        drives,
        nics: vec![vmm::Nic { mac: config.instance.mac(0), outbound }],
        display: if config.display { vmm::Display::Vga } else { vmm::Display::None },
    })
}

/// Makes the guest's ports reachable for the health check and the published ports, and begins to probe.
async fn forward(vm: &vmm::Vm, shared: &Shared) -> Result<(), NotStarted> {
    let config = &shared.config;
    let mut ports: Vec<u16> = config.ports.iter().map(|port| port.guest).collect();
    ports.extend(config.health.iter().map(|check| check.http.port));
    ports.sort_unstable();
    ports.dedup();
    let mut forwards = Vec::new();
    for port in ports {
        let at = vm.forward(0, port).await.map_err(NotStarted::step("cannot reach the guest's port"))?;
        forwards.push((port, at));
    }
    if config.open_ports {
        shared.gate.open(&forwards).map_err(NotStarted::step("cannot open the published ports"))?;
    }
    shared.status().forwards = forwards;
    Ok(())
}

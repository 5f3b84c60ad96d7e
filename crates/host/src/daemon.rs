//! The daemon itself: orders come in, reports go out, the cache is kept within its budget.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use collective_api::{Client, ClientError, HostFacts, HostOrders, HostReport, TunnelTarget};
use collective_model::{InstanceId, OperationId, Spec, TunnelId};
use collective_store::cache::Cache;
use collective_store::image::ImageMap;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::mpsc;

use crate::HostConfig;
use crate::context::{Context, lock};
use crate::files::{create_folder, read_json};
use crate::instance::{Command, Instance, record_path};
use crate::left;
use crate::record::{Record, Visiting};
use crate::tunnel::{self, Place};

/// Enough for thousands of machines.
const MOST_DESCRIPTORS: u64 = 65_536;
/// A report goes out at least this often, so that the plane knows that the host is there.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// How long one request for orders may wait at the plane.
const ORDERS_WAIT_MS: u64 = 10_000;
/// Pause after the plane did not answer.
const AWAY_PAUSE: Duration = Duration::from_secs(1);
/// How often the cache is looked at.
const CACHE_EVERY: Duration = Duration::from_secs(30);
/// A report carries at most this many events; the others come next.
const EVENTS_AT_ONCE: usize = 200;
/// Sockets below the data folder must stay within the kernel's 107 bytes.
const MAX_DATA_PATH: usize = 60;

/// Why a host does not start.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Its folder cannot be used.
    #[error("cannot use the host's folder {}: {source}", path.display())]
    Folder {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its path is too long for the sockets in it.
    #[error("the path of the host's folder {} is longer than {MAX_DATA_PATH} bytes, too long for the sockets in it; choose a shorter --data", .0.display())]
    LongPath(std::path::PathBuf),
    /// Another daemon uses it.
    #[error("another host daemon uses {} already; stop it first", .0.display())]
    InUse(std::path::PathBuf),
}

/// Runs until the future is dropped. Guests go on.
pub async fn run(config: HostConfig, client: Arc<Client>) -> Result<(), HostError> {
    let data = config.data.clone();
    let folder = |source| HostError::Folder { path: data.clone(), source };
    if data.as_os_str().len() > MAX_DATA_PATH {
        return Err(HostError::LongPath(data));
    }
    // Others may pass through to the folder of their machine, and see nothing on the way.
    for (name, mode) in [("", 0o711), ("run", 0o711), ("instances", 0o700), ("cache", 0o700)] {
        create_folder(&data.join(name), mode).map_err(folder)?;
    }
    allow_descriptors();
    let lock_file = std::fs::File::create(data.join("lock")).map_err(folder)?;
    lock_file.try_lock().map_err(|_| HostError::InUse(data.clone()))?;
    let cache = Cache::open(&data.join("cache")).map_err(folder)?;
    let context = Arc::new(Context::new(config, client.clone(), cache).map_err(folder)?);
    let mut daemon = Daemon {
        context: context.clone(),
        client: client.clone(),
        instances: HashMap::new(),
        tunnels: HashSet::new(),
        next_user: 0,
    };
    daemon.take_up_instances().map_err(folder)?;
    tokio::join!(daemon.follow_orders(), report(&context, &client), keep_cache(&context));
    drop(lock_file);
    Ok(())
}

struct Daemon {
    context: Arc<Context>,
    client: Arc<Client>,
    instances: HashMap<InstanceId, Known>,
    /// Tunnels that were begun and that the plane still lists.
    tunnels: HashSet<TunnelId>,
    next_user: u32,
}

struct Known {
    place: Place,
    spec: Option<Spec>,
    told: HashSet<OperationId>,
}

impl Daemon {
    /// Instances of earlier runs of the daemon go on without the plane.
    fn take_up_instances(&mut self) -> std::io::Result<()> {
        for entry in std::fs::read_dir(self.context.config.data.join("instances"))? {
            let folder = entry?.path();
            match read_json::<Record>(&record_path(&folder)) {
                Ok(Some(record)) => {
                    self.next_user = self.next_user.max(record.user_index + 1);
                    let id = record.spec.id.clone();
                    self.spawn(&id, None, None)?;
                }
                Ok(None) => tracing::warn!(folder = %folder.display(), "a folder without an instance is left alone"),
                Err(error) => tracing::error!(%error, "an instance is left alone, because its record is damaged"),
            }
        }
        Ok(())
    }

    /// `comes`: the order by which it comes, and is not ours yet.
    fn spawn(&mut self, id: &InstanceId, spec: Option<Spec>, comes: Option<OperationId>) -> std::io::Result<()> {
        let data = &self.context.config.data;
        let folder = data.join("instances").join(id.as_str());
        let run_dir = data.join("run").join(&id.as_str()[..16]);
        let (inbox, commands) = mpsc::channel(64);
        let index = self.next_user;
        let expects = comes.is_some();
        let visiting = comes.map(|operation| Visiting { operation, whole: None });
        let new = || spec.map(|spec| Record { visiting, ..Record::new(spec, index) });
        if let Some(mut instance) = Instance::open(self.context.clone(), folder, run_dir.clone(), new, commands)? {
            self.next_user = self.next_user.max(index + 1);
            instance.expects = expects;
            instance.note_images();
            tokio::spawn(instance.run());
            let place = Place { inbox, run_dir, console: Arc::default() };
            self.instances.insert(id.clone(), Known { place, spec: None, told: HashSet::new() });
        }
        Ok(())
    }

    async fn follow_orders(&mut self) {
        let mut seen = 0;
        let mut was_away = false;
        loop {
            let left: Vec<String> = left::list(&self.context.config.data).iter().map(ToString::to_string).collect();
            let path = format!("/v1/hosts/self/orders?seen={seen}&wait_ms={ORDERS_WAIT_MS}&left={}", left.join(","));
            match self.client.get::<HostOrders>(&path).await {
                Ok(orders) => {
                    if std::mem::take(&mut was_away) {
                        tracing::info!("the plane is back");
                    }
                    seen = orders.revision;
                    self.take_orders(orders).await;
                }
                Err(error) => {
                    if !std::mem::replace(&mut was_away, true) {
                        tracing::warn!(%error, "the plane gives no orders; instances go on");
                    }
                    tokio::time::sleep(AWAY_PAUSE).await;
                }
            }
        }
    }

    async fn take_orders(&mut self, orders: HostOrders) {
        for spec in orders.specs {
            let id = spec.id.clone();
            if self.instances.get(&id).is_some_and(|known| known.place.inbox.is_closed()) {
                if spec.arrival.is_none() {
                    // Deleted here; the plane will notice.
                    continue;
                }
                // It moved away, and comes back.
                self.instances.remove(&id);
            }
            if !self.instances.contains_key(&id)
                && let Err(error) = self.spawn(&id, Some(spec.clone()), None)
            {
                tracing::error!(%error, instance = %spec.name, "the instance cannot be created; it is tried again");
                continue;
            }
            let Some(known) = self.instances.get_mut(&id) else { continue };
            if known.spec.as_ref() != Some(&spec) {
                known.spec = Some(spec.clone());
                let _ = known.place.inbox.send(Command::Spec(Box::new(spec))).await;
            }
        }
        for operation in orders.operations {
            let Some(known) = self.instances.get_mut(&operation.instance) else { continue };
            if known.told.insert(operation.id.clone()) {
                let _ = known.place.inbox.send(Command::Operate(operation)).await;
            }
        }
        for (id, generation) in orders.moved {
            if let Some(known) = self.instances.get(&id) {
                let _ = known.place.inbox.send(Command::Moved(generation)).await;
                if known.place.inbox.is_closed() {
                    self.instances.remove(&id);
                }
            }
        }
        for id in orders.deleted {
            tracing::info!(instance = %id, "an instance that was here was deleted elsewhere: nothing of it is kept");
            left::forget(&self.context.config.data, &id);
        }
        let listed: HashSet<_> = orders.tunnels.iter().map(|order| order.id.clone()).collect();
        self.tunnels.retain(|id| listed.contains(id));
        for order in orders.tunnels {
            if let TunnelTarget::Arrival { operation, spec } = &order.target
                && !self.tunnels.contains(&order.id)
                && self.instances.get(&order.instance).is_none_or(|known| known.place.inbox.is_closed())
            {
                // It comes, and may be ours later.
                self.instances.remove(&order.instance);
                if let Err(error) = self.spawn(&order.instance, Some(Spec::clone(spec)), Some(operation.clone())) {
                    tracing::error!(%error, instance = %spec.name, "there is no place for an instance that comes");
                    continue;
                }
            }
            if let Some(known) = self.instances.get(&order.instance)
                && self.tunnels.insert(order.id.clone())
            {
                tokio::spawn(tunnel::open(self.client.clone(), known.place.clone(), order));
            }
        }
    }
}

async fn report(context: &Context, client: &Client) {
    let mut unheard = false;
    // The plane places nothing on a host that has not told its facts.
    context.outbox.filled.notify_one();
    loop {
        let waited = tokio::time::timeout(REPORT_EVERY, context.outbox.filled.notified());
        let _ = waited.await;
        let report = HostReport {
            facts: facts(context),
            observed: lock(&context.outbox.observed).values().cloned().collect(),
            operations: lock(&context.outbox.operations).clone().into_iter().collect(),
            events: lock(&context.outbox.events).iter().take(EVENTS_AT_ONCE).cloned().collect(),
        };
        let sent: Result<(), ClientError> = client.post("/v1/hosts/self/report", &report).await;
        match sent {
            Ok(()) => {
                unheard = false;
                let mut operations = lock(&context.outbox.operations);
                for (id, state) in &report.operations {
                    if operations.get(id) == Some(state) {
                        operations.remove(id);
                    }
                }
                let mut events = lock(&context.outbox.events);
                events.drain(..report.events.len());
                if !events.is_empty() {
                    context.outbox.filled.notify_one();
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut unheard, true) {
                    tracing::warn!(%error, "the plane does not take reports; they wait");
                }
                tokio::time::sleep(AWAY_PAUSE).await;
                context.outbox.filled.notify_one();
            }
        }
        // Changes come in bursts; users do not see the difference.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Five are open for each machine that runs, and systems give a program 1024 unless it asks for more.
fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = Some(limit.maximum.unwrap_or(MOST_DESCRIPTORS).min(MOST_DESCRIPTORS));
    if limit.current.is_some_and(|current| Some(current) < wanted)
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum: limit.maximum })
    {
        tracing::warn!(%error, "this host cannot have as many files open as many machines need");
    }
}

fn facts(context: &Context) -> HostFacts {
    let config = &context.config;
    HostFacts {
        version: env!("CARGO_PKG_VERSION").into(),
        cpus: std::thread::available_parallelism().map_or(1, |count| count.get() as u32),
        memory: config.memory.or_else(crate::start::total_memory).unwrap_or(0),
        accelerator: config.accelerator.clone(),
        root: rustix::process::geteuid().is_root(),
        cache_bytes: *lock(&context.cache_bytes),
        warnings: config.warnings.clone(),
        platform: config.platform.clone(),
    }
}

/// Keeps the cache within its budget, but for the frames of images that instances use.
async fn keep_cache(context: &Context) {
    loop {
        if let Err(error) = evict(context).await {
            tracing::warn!(error, "the cache cannot be kept within its budget; it is tried again");
        }
        tokio::time::sleep(CACHE_EVERY).await;
        tidy_copies(context);
    }
}

/// Removes memories of versions that no instance here began with. Whoever reads one has it open.
fn tidy_copies(context: &Context) {
    let used: HashSet<_> = {
        let images = lock(&context.used_images);
        images.values().flatten().map(|image| context.config.copy_of(&image.root)).collect()
    };
    for entry in std::fs::read_dir(context.config.warm()).into_iter().flatten().flatten() {
        let path = entry.path();
        // One that is being made has another suffix.
        if !used.contains(&path.with_extension(""))
            && let Err(error) = std::fs::remove_file(&path)
        {
            tracing::warn!(%error, "{} cannot be removed", path.display());
        }
    }
}

async fn evict(context: &Context) -> Result<(), String> {
    let size = context.cache.size().map_err(|e| e.to_string())?;
    // What is kept of instances that are elsewhere goes first.
    let left = left::tidy(context, context.config.cache_budget.saturating_sub(size));
    *lock(&context.cache_bytes) = size + left;
    if size <= context.config.cache_budget {
        return Ok(());
    }
    let images: Vec<_> = lock(&context.used_images).values().flatten().cloned().collect();
    let frames = context.frames(&images).await;
    let mut pinned = HashSet::new();
    for image in images {
        let map = ImageMap::load(&frames, image.root).await.map_err(|e| e.to_string())?;
        pinned.extend(map.frames());
        pinned.extend(map.pages());
    }
    let eviction = context.cache.evict(context.config.cache_budget, &pinned).map_err(|e| e.to_string())?;
    *lock(&context.cache_bytes) = eviction.before - eviction.removed;
    tracing::info!(removed = eviction.removed, pinned = eviction.pinned, "the cache was over its budget");
    Ok(())
}

/// Whether a folder can be passed through by everybody, as the users that QEMU runs as have to.
pub fn first_closed_folder(path: &Path) -> Option<std::path::PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let closed = |folder: &&Path| std::fs::metadata(folder).is_ok_and(|meta| meta.permissions().mode() & 0o001 == 0);
    path.ancestors().find(closed).map(Path::to_owned)
}

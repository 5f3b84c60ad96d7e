//! What all instances of a host share: the way to the store, trust in publishers, and the outbox to the plane.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collective_api::{Client, Event, PlaneStore};
use collective_keys::{Kind, Pins, PublicKey};
use collective_model::run::RunImage;
use collective_model::{Digest, InstanceId, Manifest, Name, Observed, OperationId, OperationState};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use tokio::sync::Notify;

use crate::HostConfig;
use crate::files::{read_json, write_json};

/// Shared by all tasks of a host.
pub struct Context {
    pub config: HostConfig,
    pub store: Arc<PlaneStore>,
    /// The way to the plane, with the host's rights.
    pub client: Arc<Client>,
    pub cache: Cache,
    pub outbox: Outbox,
    /// Images that instances use, which the cache must keep.
    pub used_images: Mutex<HashMap<InstanceId, Vec<RunImage>>>,
    /// As last counted.
    pub cache_bytes: Mutex<u64>,
    pins: Mutex<Pins>,
}

/// What the plane has not heard yet.
#[derive(Default)]
pub struct Outbox {
    pub observed: Mutex<BTreeMap<InstanceId, Observed>>,
    pub operations: Mutex<BTreeMap<OperationId, OperationState>>,
    pub events: Mutex<Vec<Event>>,
    /// Something is new.
    pub filled: Notify,
}

/// A poisoned lock still guards sound data: every change here is a single assignment.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pins_path(data: &Path) -> PathBuf {
    data.join("publishers.json")
}

/// Makes the host in `data` believe a publisher's key, because a person says so.
pub fn trust(data: &Path, publisher: &Name, key: PublicKey) -> std::io::Result<()> {
    let mut pins: Pins = read_json(&pins_path(data))?.unwrap_or_default();
    pins.trust(publisher, key);
    write_json(&pins_path(data), &pins)
}

impl Context {
    pub fn new(config: HostConfig, client: Arc<Client>, cache: Cache) -> std::io::Result<Self> {
        let store = Arc::new(PlaneStore::new(client.clone(), &config.data.join("versions")));
        let pins = read_json(&pins_path(&config.data))?.unwrap_or_default();
        Ok(Self {
            config,
            store,
            client,
            cache,
            outbox: Outbox::default(),
            used_images: Mutex::default(),
            cache_bytes: Mutex::default(),
            pins: Mutex::new(pins),
        })
    }

    /// A version's manifest: fetched or kept, signed by the publisher's pinned key, and sound. Pins the key at first use.
    pub async fn manifest(&self, version: &Digest) -> Result<Manifest, String> {
        let detail = self.store.version(version).await.map_err(|e| e.to_string())?;
        let refused = |why: String| format!("version {} is refused: {why}", version.short());
        if detail.manifest.digest() != *version {
            return Err(refused("the store gave another one in its place".into()));
        }
        let text = detail.manifest.verified(Kind::Manifest).map_err(|e| refused(e.to_string()))?;
        let manifest = Manifest::parse(text.as_bytes()).map_err(|e| refused(e.to_string()))?;
        let publisher = &manifest.appliance.publisher;
        // Read again each time: `host trust` may have changed the file.
        let path = pins_path(&self.config.data);
        let mut pins = lock(&self.pins);
        *pins = read_json(&path).map_err(|e| e.to_string())?.unwrap_or_default();
        let before = pins.clone();
        // What was accepted once stays accepted: an instance must start whatever became of the key since.
        let accepted = self.config.data.join("versions").join(format!("{version}.accepted"));
        if accepted.exists() {
            return Ok(manifest);
        }
        let changes = &detail.key_changes;
        pins.accept_with_changes(publisher, detail.manifest.key, changes).map_err(|e| refused(e.to_string()))?;
        if *pins != before {
            write_json(&path, &*pins).map_err(|e| format!("cannot pin the publisher's key: {e}"))?;
        }
        write_json(&accepted, &detail.manifest.key).map_err(|e| format!("cannot keep what was accepted: {e}"))?;
        Ok(manifest)
    }

    /// A way to the frames of some versions, counting what it moves.
    pub async fn frames<'a>(&self, images: impl IntoIterator<Item = &'a RunImage>) -> FrameStore {
        let frames = FrameStore::new(self.cache.clone(), self.store.clone());
        for image in images {
            frames.add_version(&image.appliance, &image.version).await;
        }
        frames
    }

    /// Tells the plane how far an operation is.
    pub fn tell(&self, id: &OperationId, state: OperationState) {
        lock(&self.outbox.operations).insert(id.clone(), state);
        self.outbox.filled.notify_one();
    }
}

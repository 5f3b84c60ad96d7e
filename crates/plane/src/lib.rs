//! The service plane: what is published, who owns which instance, and what everyone should do.
//!
//! It holds desired state in SQL and packs in an object store. Hosts report what they see and fetch their orders;
//! users change what is wanted; a reconciler closes the gap between the two (today: updates that instances follow).
//! Nothing here is needed for an instance to go on running.

#![forbid(unsafe_code)]

mod access;
mod catalogue;
mod collect;
mod database;
mod hosts;
mod http;
mod http_private;
mod http_store;
mod instances;
mod live;
mod movement;
mod place;
mod private;
mod problem;
mod reconcile;
mod repack;
mod serve;
mod settings;
mod storage;
mod tunnel;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use collective_keys::KeyRing;
use collective_model::Timestamp;
use collective_store::depot::{Access, Depot, DepotError, Place};
use tokio::sync::watch;

use database::Database;
pub use serve::{Listening, Tls, serve};

/// Where a plane keeps its things.
#[derive(Clone, Debug)]
pub struct PlaneConfig {
    /// Database, certificate, and the store where it is local.
    pub data: PathBuf,
    /// The file of the key that wraps the owner's keys: outside of `data`, so that a copy of `data` does not open them.
    pub machine_key: PathBuf,
    /// Where packs are kept; where they were kept so far, if this is not said.
    pub store: Option<Place>,
    /// The way into a bucket, where packs are kept in one.
    pub s3: Access,
    /// What to tell others to connect to, `host:port`, where the plane listens on TCP.
    pub address: Option<String>,
}

/// Why a plane does not start.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// Its folder.
    #[error("cannot use {}: {source}", path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Its database.
    #[error("cannot open the plane's database {}: {source}", path.display())]
    Database {
        /// Which.
        path: PathBuf,
        /// Why.
        source: sqlx::Error,
    },
    /// A record in its database.
    #[error("a record in the plane's database cannot be read: {0}")]
    Record(String),
    /// Its store.
    #[error("cannot open the plane's store: {0}")]
    Store(#[from] DepotError),
    /// Its packs are elsewhere.
    #[error(
        "the plane's packs are in {had}, and {missing} of those that its versions and backups need are not in {place}: copy all that is \
         below packs/ and private/ from there to here while the plane is down, or start it without --store, as it was"
    )]
    Moved {
        /// Where they are.
        had: String,
        /// Where they should be.
        place: String,
        /// How many are not there.
        missing: usize,
    },
    /// Its certificate.
    #[error("cannot use the plane's certificate: {0}")]
    Certificate(String),
    /// Its socket.
    #[error("cannot listen on {at}: {source}")]
    Listen {
        /// Where.
        at: String,
        /// Why.
        source: std::io::Error,
    },
}

/// A plane, open. Cheap to clone.
#[derive(Clone)]
pub struct Plane {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    depot: Depot,
    data: PathBuf,
    /// What tokens tell others: address and certificate.
    public: Option<(String, collective_api::Fingerprint)>,
    tunnels: tunnel::Tunnels,
    /// Held while packs are removed.
    collecting: tokio::sync::Mutex<()>,
    /// Read from where somebody looks whether packs are there until a version refers to them.
    looking: tokio::sync::RwLock<()>,
    /// The owner's keys; one change at a time.
    keys: tokio::sync::Mutex<KeyRing>,
    /// Held alone while packs of private data are removed.
    private: tokio::sync::RwLock<()>,
    /// Grows when something that hosts are told changes.
    orders: watch::Sender<u64>,
    /// Grows when anything that users see changes.
    state: watch::Sender<u64>,
}

impl Plane {
    /// Opens or creates a plane in its folder.
    pub async fn open(config: &PlaneConfig) -> Result<(Self, Tls), PlaneError> {
        Self::open_with(config, None).await
    }

    /// As [`open`](Self::open), over a store of the caller's, which nothing else must change.
    pub async fn open_over(config: &PlaneConfig, store: Depot) -> Result<(Self, Tls), PlaneError> {
        Self::open_with(config, Some(store)).await
    }

    async fn open_with(config: &PlaneConfig, store: Option<Depot>) -> Result<(Self, Tls), PlaneError> {
        let folder = |source| PlaneError::Folder { path: config.data.clone(), source };
        create_private(&config.data).map_err(folder)?;
        let path = config.data.join("plane.db");
        let database =
            Database::open(&path).await.map_err(|source| PlaneError::Database { path: path.clone(), source })?;
        let depot = match store {
            Some(store) => storage::adopt(store, config, &database).await?,
            None => storage::open(config, &database).await?,
        };
        let tls = Tls::load_or_create(&config.data)?;
        let public = config.address.clone().map(|address| (address, tls.fingerprint()));
        // Revisions only have to differ from those that readers saw before a restart.
        let first = Timestamp::now().0;
        let inner = Inner {
            database,
            depot,
            data: config.data.clone(),
            public,
            tunnels: tunnel::Tunnels::default(),
            collecting: Default::default(),
            looking: Default::default(),
            keys: KeyRing::new(&config.data.join("keys"), &config.machine_key).into(),
            private: Default::default(),
            orders: watch::Sender::new(first),
            state: watch::Sender::new(first),
        };
        let plane = Self { inner: Arc::new(inner) };
        tokio::spawn(reconcile::run(plane.clone()));
        tokio::spawn(collect::run(plane.clone()));
        Ok((plane, tls))
    }

    fn database(&self) -> &Database {
        &self.inner.database
    }

    fn depot(&self) -> &Depot {
        &self.inner.depot
    }

    /// Something that users see changed.
    fn state_changed(&self) {
        self.inner.state.send_modify(|revision| *revision += 1);
    }

    /// Something that hosts are told changed.
    fn orders_changed(&self) {
        self.inner.orders.send_modify(|revision| *revision += 1);
        self.state_changed();
    }
}

/// Creates a folder that only its owner enters.
fn create_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

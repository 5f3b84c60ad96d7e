//! How a host reaches its plane: a file that only its user can read, used by the daemon and by every runner.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use collective_api::{Client, Endpoint, Fingerprint, PlaneStore, PrivateStore};
use collective_model::run::RunConfig;
use collective_model::{InstanceId, Name};
use collective_store::{PackInfo, Source, Vault};
use serde::{Deserialize, Serialize};

/// The file's content.
#[derive(Clone, Serialize, Deserialize)]
pub struct Credentials {
    /// The host's name.
    pub name: Name,
    /// The host's secret.
    pub secret: String,
    /// The local socket, or
    pub socket: Option<PathBuf>,
    /// `host:port` and
    pub address: Option<String>,
    /// the certificate.
    pub fingerprint: Option<Fingerprint>,
}

/// Where the file is in a host's folder.
pub fn path(data: &Path) -> PathBuf {
    data.join("host.json")
}

impl Credentials {
    /// Reads the file.
    pub fn load(path: &Path) -> Result<Option<Self>> {
        Ok(collective_host::read_json(path)?)
    }

    /// Writes the file.
    pub fn save(&self, path: &Path) -> Result<()> {
        collective_host::write_json(path, self).with_context(|| format!("cannot write {}", path.display()))
    }

    /// A client with the host's rights.
    pub fn client(&self) -> Result<Client> {
        let endpoint = match (&self.socket, &self.address, self.fingerprint) {
            (Some(socket), _, _) => Endpoint::Unix(socket.clone()),
            (None, Some(address), Some(fingerprint)) => Endpoint::Tls { address: address.clone(), fingerprint },
            _ => return Err(anyhow!("the host's credentials name no plane; join again with `collective host join`")),
        };
        Ok(Client::new(endpoint, Some(self.secret.clone())))
    }
}

/// The store as a runner sees it.
pub fn open_source(config: &RunConfig) -> Result<Arc<dyn Source>, String> {
    let open = || -> Result<Arc<dyn Source>> {
        let folder = config.credentials.parent().unwrap_or(Path::new("/"));
        Ok(Arc::new(PlaneStore::new(Arc::new(client(config)?), &folder.join("versions"))))
    };
    open().map_err(|error| crate::ui::chain(&error))
}

/// The private packs of an instance as a runner sees them.
pub fn open_vault(config: &RunConfig, home: &InstanceId, packs: Vec<PackInfo>) -> Result<Arc<dyn Vault>, String> {
    let client = client(config).map_err(|error| crate::ui::chain(&error))?;
    Ok(Arc::new(PrivateStore::new(Arc::new(client), home.clone(), packs)))
}

fn client(config: &RunConfig) -> Result<Client> {
    let path = &config.credentials;
    Credentials::load(path)?.ok_or_else(|| anyhow!("{} is missing", path.display()))?.client()
}

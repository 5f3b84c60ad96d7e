//! Which store a plane has: what it is told, else what it had; never one in which packs of its versions are missing.

use std::collections::HashMap;
use std::hash::Hash;

use collective_model::{ApplianceName, Digest, InstanceId};
use collective_store::depot::{Depot, DepotError, Place, TroubleKind};

use crate::database::Database;
use crate::{PlaneConfig, PlaneError};

const PLANE: &str = "plane";
const STORE: &str = "store";

/// Opens the store, and claims it for this plane where it is in a bucket.
pub(crate) async fn open(config: &PlaneConfig, database: &Database) -> Result<Depot, PlaneError> {
    let unread = |source| PlaneError::Database { path: config.data.join("plane.db"), source };
    let had: Place = match database.fact(STORE).await.map_err(unread)? {
        Some(text) => text.parse().map_err(|error| PlaneError::Record(format!("{error}")))?,
        None => Place::Local,
    };
    let place = config.store.clone().unwrap_or_else(|| had.clone());
    let (packs, private) = (referred(database).await?, private(database).await?);
    let has_packs = !(packs.is_empty() && private.is_empty());
    let moves = place != had;
    let depot = match &place {
        Place::Local => Depot::local(&config.data.join("store"))?,
        Place::S3(bucket) => {
            let id = plane_id(database).await.map_err(unread)?;
            Depot::s3(bucket, &config.s3)?.owned_by(&id, moves && has_packs)
        }
    };
    if moves && has_packs {
        let missing = lacking(packs, depot.list().await?) + lacking(private, depot.list_private().await?);
        if missing > 0 {
            let (had, place) = (describe(config, &had), describe(config, &place));
            return Err(PlaneError::Moved { had, place, missing });
        }
    }
    match depot.claimed().await {
        Ok(()) => {}
        // Machines of this host go on without it; it is claimed before anything in it is changed.
        Err(DepotError::Backend(trouble)) if !moves && trouble.kind != TroubleKind::NoBucket => {
            tracing::warn!(%trouble, "the store cannot be used now");
        }
        Err(error) => return Err(error.into()),
    }
    database.set_fact(STORE, &place.to_string()).await.map_err(unread)?;
    Ok(depot)
}

/// Takes a store that is open, and claims it.
pub(crate) async fn adopt(depot: Depot, config: &PlaneConfig, database: &Database) -> Result<Depot, PlaneError> {
    let unread = |source| PlaneError::Database { path: config.data.join("plane.db"), source };
    let depot = depot.owned_by(&plane_id(database).await.map_err(unread)?, false);
    depot.claimed().await?;
    Ok(depot)
}

/// How many of the packs that are needed are not there as they should be.
fn lacking<H: Eq + Hash>(mut needed: HashMap<(H, Digest), u64>, there: Vec<(H, Digest, u64)>) -> usize {
    for (home, digest, size) in there {
        let pack = (home, digest);
        if needed.get(&pack) == Some(&size) {
            needed.remove(&pack);
        }
    }
    needed.len()
}

fn describe(config: &PlaneConfig, place: &Place) -> String {
    match place {
        Place::Local => config.data.join("store").display().to_string(),
        Place::S3(_) => place.to_string(),
    }
}

/// The packs that versions need, with their sizes.
async fn referred(database: &Database) -> Result<HashMap<(ApplianceName, Digest), u64>, PlaneError> {
    let versions = database.versions(None).await.map_err(|failure| PlaneError::Record(failure.to_string()))?;
    let packs = versions.iter().flat_map(|row| row.packs.iter().map(|pack| (row.appliance.clone(), pack)));
    Ok(packs.map(|(appliance, pack)| ((appliance, pack.digest), pack.size)).collect())
}

/// The same for backups.
async fn private(database: &Database) -> Result<HashMap<(InstanceId, Digest), u64>, PlaneError> {
    let backups = database.backups(None).await.map_err(|failure| PlaneError::Record(failure.to_string()))?;
    let packs = backups.iter().flat_map(|backup| backup.packs.iter().map(|pack| (backup.instance.clone(), pack)));
    Ok(packs.map(|(instance, pack)| ((instance, pack.digest), pack.size)).collect())
}

/// A name of this plane that no other has.
async fn plane_id(database: &Database) -> Result<String, sqlx::Error> {
    if let Some(id) = database.fact(PLANE).await? {
        return Ok(id);
    }
    let random =
        collective_keys::random_id().map_err(|error| sqlx::Error::Io(std::io::Error::other(error.to_string())))?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    database.set_fact(PLANE, &id).await?;
    Ok(id)
}

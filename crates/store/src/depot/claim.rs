//! A bucket's folder belongs to one plane: only its database knows what publishers need and what may be removed.

use std::sync::Arc;

use object_store::path::Path as Key;
use object_store::{Error, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::{Deserialize, Serialize};
use tokio::sync::OnceCell;

use super::{Depot, DepotError, Trouble, TroubleKind};

const OWNER: &str = "plane.json";

/// What says whose a folder is.
#[derive(Serialize, Deserialize)]
struct Owner {
    format: u32,
    plane: String,
}

/// Who wants to own the folder, and whether it was seen that it does.
pub(super) struct Claim {
    plane: String,
    /// Packs without an owner are taken over: a person brought them there.
    takes_over: bool,
    settled: OnceCell<()>,
}

impl Depot {
    /// Lets the store change for this plane only. Nothing is asked of it yet.
    pub fn owned_by(self, plane: &str, takes_over: bool) -> Self {
        let claim = Claim { plane: plane.to_owned(), takes_over, settled: OnceCell::new() };
        Self { claim: Some(Arc::new(claim)), ..self }
    }

    /// Makes sure that the store is this plane's, once. Everything that changes the store does so first, because the
    /// store may have been away when the plane was started.
    pub async fn claimed(&self) -> Result<(), DepotError> {
        match &self.claim {
            Some(claim) => claim.settled.get_or_try_init(|| self.settle(claim)).await.copied(),
            None => Ok(()),
        }
    }

    async fn settle(&self, claim: &Claim) -> Result<(), DepotError> {
        let found = self.owner().await;
        if let Ok(Some(owner)) = &found {
            return self.compare(owner, claim);
        }
        let is_empty = self.list().await?.is_empty() && self.list_private().await?.is_empty();
        match found {
            // A claim that was written by half: nothing can be here yet.
            Err(DepotError::Settings { .. }) if is_empty => _ = self.remove_owner().await?,
            Err(error) => return Err(error),
            Ok(_) => {}
        }
        if !claim.takes_over && !is_empty {
            return Err(DepotError::Unclaimed { place: self.place.clone(), owner: OWNER });
        }
        if self.create_owner(claim).await? && self.create_owner(claim).await? {
            return Err(DepotError::Unconditional { place: self.place.clone() });
        }
        // Whoever was first wrote it; repeated requests may have made us the first without our knowing.
        match self.owner().await? {
            Some(owner) => self.compare(&owner, claim),
            None => Err(DepotError::Unclaimed { place: self.place.clone(), owner: OWNER }),
        }
    }

    fn compare(&self, owner: &Owner, claim: &Claim) -> Result<(), DepotError> {
        if owner.plane == claim.plane {
            return Ok(());
        }
        let (place, other) = (self.place.clone(), owner.plane.clone());
        Err(DepotError::Owned { place, other, plane: claim.plane.clone(), owner: OWNER })
    }

    async fn owner(&self) -> Result<Option<Owner>, DepotError> {
        let bytes = self
            .repeated("find the owner of", || async { self.objects.get(&Key::from(OWNER)).await?.bytes().await })
            .await?;
        let Some(bytes) = bytes else { return Ok(None) };
        let owner = serde_json::from_slice(&bytes).map_err(|error| DepotError::Settings {
            place: self.place.clone(),
            why: format!("{OWNER} in it cannot be read: {error}"),
        });
        owner.map(Some)
    }

    /// False if it is there already.
    async fn remove_owner(&self) -> Result<Option<()>, DepotError> {
        let remove = || async { self.objects.delete(&Key::from(OWNER)).await };
        self.repeated("claim", remove).await
    }

    async fn create_owner(&self, claim: &Claim) -> Result<bool, DepotError> {
        let owner = Owner { format: 1, plane: claim.plane.clone() };
        let bytes = serde_json::to_vec(&owner).unwrap_or_default();
        let create = || async {
            let options = PutOptions { mode: PutMode::Create, ..Default::default() };
            match self.objects.put_opts(&Key::from(OWNER), PutPayload::from(bytes.clone()), options).await {
                Ok(_) => Ok(true),
                Err(Error::AlreadyExists { .. }) => Ok(false),
                Err(error) => Err(error),
            }
        };
        let created = self.repeated("claim", create).await?;
        let nowhere = || Trouble::new(TroubleKind::NoBucket, "claim", &self.place, "there is no such bucket");
        Ok(created.ok_or_else(nowhere)?)
    }
}

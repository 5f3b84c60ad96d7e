//! What of an instance is still in the store: its machine runs meanwhile, and reads over the network what is not here.
//!
//! ```text
//! receive   files and indexes; one write of the record: the instance is here, with layers that are arriving
//! start     the runner gets the owner's key, shows disks and memory, fetches behind, and makes the layers
//! arrived   one write of the record: nothing is arriving; from the next start on the layers are what counts
//! ```
//! A layer that is arriving is the lowest of its chain and never written to by a guest, so checkpoints and all else refer to
//! it as if it were there. What needs its content while nothing runs brings the rest first.

use std::time::Duration;

use collective_api::{ClientError, PrivateGrant};
use collective_keys::OwnerKey;
use collective_model::run::{Arrival, Arriving, RunStatus};
use collective_model::run_private::{PrivateNews, PrivateOrder};
use collective_model::{OperationId, OperationState};
use tokio::time::sleep;

use crate::instance::Instance;

/// Where what is fetched lies meanwhile, still encrypted, in the instance's folder.
pub(crate) const ARRIVING: &str = "arriving";
/// How often the runner is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// Why there is no key for what is arriving.
#[derive(Debug, thiserror::Error)]
#[error("a part of it is in the store only, and the plane gives no key for that: {0}")]
pub(crate) struct NoKey(ClientError);

impl NoKey {
    /// Whether asking again later may help.
    pub fn is_away(&self) -> bool {
        self.0.is_away()
    }
}

impl From<NoKey> for String {
    fn from(error: NoKey) -> Self {
        error.to_string()
    }
}

impl Instance {
    /// The key for what is arriving; none where all is here.
    pub(crate) async fn arrival_key(&self) -> Result<Option<OwnerKey>, NoKey> {
        if self.record.arriving.is_none() {
            return Ok(None);
        }
        let path = format!("/v1/hosts/self/instances/{}/private", self.record.spec.id);
        let asked: Result<PrivateGrant, _> = self.context.client.post(&path, &()).await;
        asked.map(|grant| Some(grant.key)).map_err(NoKey)
    }

    /// Whether it cannot be started until the plane is back, which has the key for what is arriving. Then that is noted.
    pub(crate) async fn awaits_key(&mut self) -> bool {
        match self.arrival_key().await {
            Err(error) if error.is_away() => {
                self.record.last_error = Some(error.to_string());
                self.save_or_log();
                true
            }
            _ => false,
        }
    }

    /// How much has arrived, for whoever looks.
    pub(crate) fn arrival(&self) -> Option<Arrival> {
        let told = self.status.as_ref().and_then(|status| status.arrival);
        match &self.record.arriving {
            Some(_) => Some(Arrival { complete: false, ..told.unwrap_or_default() }),
            None => told,
        }
    }

    /// Notes that all is here.
    pub(crate) fn note_arrival(&mut self, status: &RunStatus) {
        if self.record.arriving.is_some() && status.arrival.is_some_and(|arrival| arrival.complete) {
            self.record.arriving = None;
            self.save_or_log();
            self.forget_left();
            self.event("complete", "all of it is on this host, and the store is not needed any more".into());
        }
    }

    /// Brings what is arriving: waits for the runner, or has one bring it.
    pub(crate) async fn bring_rest(&mut self, id: Option<&OperationId>) -> Result<(), String> {
        while self.record.arriving.is_some() && self.record.runner_pid.is_some() {
            self.observe().await;
            let missing = self.arrival().map_or(0, |arrival| arrival.bytes);
            if let Some(id) = id {
                let doing = "waiting for the rest of it to arrive".to_owned();
                self.context.tell(id, OperationState::Running { doing, done: 0, total: missing });
            }
            self.publish();
            sleep(ASK_EVERY).await;
        }
        let Some(Arriving { home, packs, scratch, layers, kept, hashes }) = self.record.arriving.clone() else {
            return Ok(());
        };
        let Some(key) = self.arrival_key().await? else { return Ok(()) };
        let (disks, files) = (layers, Vec::new());
        let order = PrivateOrder::Restore { home, packs, scratch, disks, files, begin: false, kept, hashes };
        match self.run_private(id, &key, &order, "fetching the rest of it").await? {
            PrivateNews::Restored { .. } => {}
            other => return Err(format!("its runner answered something else: {other:?}")),
        }
        self.record.arriving = None;
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.forget_left();
        self.clear_arrived();
        Ok(())
    }

    /// Removes what was only needed until everything had arrived, and by the runner of that time.
    pub(crate) fn clear_arrived(&self) {
        if self.record.arriving.is_none() && self.record.runner_pid.is_none() {
            let _ = std::fs::remove_dir_all(self.folder.join(ARRIVING));
        }
    }
}

//! Removing packs that no version refers to, beside publishers and readers at work.
//!
//! ```text
//! a pack that no version refers to     is condemned, with the time
//! a publisher finds or sends it        it is forgiven
//! all leases of publishers that began before it was condemned have ended, and still no version refers to it
//!                                      it is marked as being removed (nobody uses it from here on), and deleted
//! ```
//! Interrupted after the mark, the next run deletes.

use std::collections::HashMap;
use std::time::Duration;

use collective_api::{Collected, PackView, StoreView, VersionUse};
use collective_model::{ApplianceName, Digest, Timestamp};

use crate::Plane;
use crate::database::Condemned;
use crate::problem::{Answer, Failure};

/// A publisher's lease that is not renewed ends after this time.
pub(crate) const LEASE: Duration = Duration::from_secs(120);
/// How often what was left over is removed without being asked.
const TIMER: Duration = Duration::from_secs(3600);

/// Runs for as long as the plane does.
pub(crate) async fn run(plane: Plane) {
    loop {
        tokio::time::sleep(TIMER).await;
        match plane.collect().await {
            Ok(collected) if collected.removed.is_empty() => {}
            Ok(collected) => tracing::info!(
                packs = collected.removed.len(),
                bytes = collected.removed.iter().map(|pack| pack.size).sum::<u64>(),
                "removed packs that no version refers to"
            ),
            Err(error) => tracing::warn!(?error, "removing what is left over failed; it is tried again"),
        }
    }
}

impl Plane {
    /// Begins or renews a publisher's lease.
    pub(crate) async fn hold_lease(&self, appliance: &ApplianceName, id: &str) -> Answer<()> {
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return Err(Failure::invalid("a lease is named by up to 64 letters and digits"));
        }
        let until = Timestamp(Timestamp::now().0 + LEASE.as_millis() as u64);
        self.database().hold_lease(appliance, id, until).await
    }

    /// A pack's size, for a publisher that will not send it if it is there.
    pub(crate) async fn pack_in_use(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<u64> {
        let size = self.depot().pack_size(appliance, pack).await?;
        if self.database().use_pack(appliance, pack).await? {
            return Ok(size);
        }
        Err(Failure::missing(format!("pack {pack} is being removed")))
    }

    /// A publisher is about to send a pack. If it is being removed, or a removal was broken off because the store was
    /// away, that is brought to its end first.
    pub(crate) async fn make_way(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<()> {
        if self.database().use_pack(appliance, pack).await? {
            return Ok(());
        }
        let _alone = self.inner.collecting.lock().await;
        self.end_removal(appliance, pack).await
    }

    /// Brings a removal that was broken off to its end, for whoever holds the lock of the collector and is about to use the
    /// pack's name again.
    pub(crate) async fn end_removal(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<()> {
        if self.database().condemned(appliance, pack).await? == Condemned::Removing {
            self.remove(appliance, pack).await?;
        }
        Ok(())
    }

    /// Deletes a pack that is marked as being removed. The mark is what refuses versions whose pack was there when it was
    /// looked for, so it goes when none of these are left: their publishers may have lost their leases.
    async fn remove(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<()> {
        self.depot().remove_pack(appliance, pack).await?;
        let _nobody_looks = self.inner.looking.write().await;
        self.database().removed(appliance, pack).await
    }

    /// Everything in the store and what needs it.
    pub(crate) async fn store_view(&self) -> Answer<StoreView> {
        let versions = self.database().versions(None).await?;
        let instances = self.database().instances().await?;
        let mut users: HashMap<(ApplianceName, Digest), Vec<Digest>> = HashMap::new();
        let mut uses = Vec::new();
        for row in &versions {
            for pack in &row.packs {
                users.entry((row.appliance.clone(), pack.digest)).or_default().push(row.digest);
            }
            let channels = self.database().channels(&row.appliance).await?;
            let needs = |instance: &&crate::database::InstanceRow| {
                let observed = instance.observed.as_ref();
                let held = observed.into_iter().flat_map(|seen| {
                    seen.checkpoints.iter().map(|kept| kept.version).chain(std::iter::once(seen.version))
                });
                held.chain(std::iter::once(instance.spec.version)).any(|version| version == row.digest)
            };
            uses.push(VersionUse {
                appliance: row.appliance.clone(),
                version: row.version.clone(),
                digest: row.digest,
                channels: channels.into_iter().filter(|c| c.version == row.digest).map(|c| c.channel).collect(),
                instances: instances.iter().filter(needs).map(|instance| instance.spec.name.clone()).collect(),
                packs: row.packs.iter().map(|pack| pack.digest).collect(),
            });
        }
        let mut packs = Vec::new();
        for (appliance, digest, size) in self.depot().list().await? {
            let versions = users.remove(&(appliance.clone(), digest)).unwrap_or_default();
            packs.push(PackView { appliance, digest, size, versions });
        }
        let missing =
            users.into_iter().map(|((appliance, digest), versions)| PackView { appliance, digest, size: 0, versions });
        let private = self.private_view().await?;
        Ok(StoreView { packs, missing: missing.collect(), versions: uses, private })
    }

    /// Removes what may be removed now.
    pub(crate) async fn collect(&self) -> Answer<Collected> {
        // Two at once would remove what one removed, a publisher sent again, and a version refers to.
        let _alone = self.inner.collecting.lock().await;
        let mut collected = Collected { private: self.collect_private().await?, ..Default::default() };
        for pack in self.store_view().await?.packs.into_iter().filter(|pack| pack.versions.is_empty()) {
            let (appliance, digest) = (&pack.appliance, &pack.digest);
            let waits = match self.database().condemn(appliance, digest).await? {
                Condemned::No => continue,
                Condemned::Removing => false,
                Condemned::Since(since) => {
                    self.database().oldest_lease(appliance).await?.is_some_and(|begun| begun <= since)
                }
            };
            if waits {
                collected.waiting.push(pack);
            } else if self.database().begin_removal(appliance, digest).await? {
                self.remove(appliance, digest).await?;
                collected.removed.push(pack);
            }
        }
        Ok(collected)
    }

    /// Forgets a version that nothing needs.
    pub(crate) async fn withdraw(&self, version: &Digest) -> Answer<()> {
        let row = self.database().version(version).await?;
        let row = row.ok_or_else(|| Failure::missing(format!("no version {version} is published here")))?;
        let users = self.database().withdraw(&row).await?;
        if !users.is_empty() {
            return Err(Failure::conflict(format!(
                "{}:{} is needed by {}; move the channel, update or delete the instances first (an instance needs the \
                 versions of its checkpoints too)",
                row.appliance,
                row.version,
                users.join(", ")
            )));
        }
        self.state_changed();
        Ok(())
    }
}

//! What is published: packs, versions, channels, and the keys that vouch for them.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use collective_api::{ApplianceView, KeyUpdate, PublishVersion, VersionDetail, VersionView};
use collective_keys::{ChannelPointer, KeyChange, Kind, Pins, Signed};
use collective_model::{ApplianceName, Digest, Manifest, Name, Reference, Selector, StoredImage, VersionName};
use collective_store::cache::Cache;
use collective_store::depot::{Depot, DepotError};
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::ImageMap;
use collective_store::{PackInfo, Source, SourceError};
use futures_util::future::{BoxFuture, FutureExt};

use crate::Plane;
use crate::database::{ChannelRow, Publisher, VersionRow};
use crate::problem::{Answer, Failure};

impl Plane {
    /// Accepts a version: its signature, its publisher's key, and that every frame it needs is here and durable.
    pub(crate) async fn publish(&self, appliance: &ApplianceName, request: PublishVersion) -> Answer<VersionView> {
        let refused = |why: String| Failure::invalid(format!("this version of {appliance} is refused: {why}"));
        let payload = request.manifest.verified(Kind::Manifest).map_err(|e| refused(e.to_string()))?;
        let manifest = Manifest::parse(payload.as_bytes()).map_err(|e| refused(e.to_string()))?;
        if manifest.appliance != *appliance {
            return Err(refused(format!("its manifest is of {}", manifest.appliance)));
        }
        let digest = request.manifest.digest();
        let view = VersionView { version: manifest.version.clone(), digest, created: manifest.created };
        if let Some(known) = self.database().version_named(appliance, &manifest.version).await? {
            if known.digest == digest {
                return Ok(view);
            }
            return Err(Failure::conflict(format!(
                "{appliance}:{} is published already with other content, and versions never change: publish it under \
                 another version",
                manifest.version
            )));
        }
        if self.database().withdrawn(appliance, &manifest.version).await?.is_some_and(|known| known != digest) {
            return Err(Failure::conflict(format!(
                "{appliance}:{} was published with other content and withdrawn, and versions never change: publish it \
                 under another version",
                manifest.version
            )));
        }
        self.accept_key(&appliance.publisher, &request.manifest).await?;
        let _looking = self.inner.looking.read().await;
        let packs = self.complete(&manifest, &digest, &request.packs).await?;
        let row = VersionRow {
            digest,
            appliance: appliance.clone(),
            version: manifest.version,
            created: manifest.created,
            summary: manifest.summary,
            manifest: request.manifest,
            packs,
        };
        self.database().insert_version(&row).await?;
        self.state_changed();
        Ok(view)
    }

    /// Binds the publisher to the signing key, or compares it with the one it is bound to.
    async fn accept_key(&self, publisher: &Name, signed: &Signed) -> Answer<()> {
        let mut pins = Pins::default();
        let known = self.database().publisher(publisher).await?;
        if let Some(known) = &known {
            pins.trust(publisher, known.key);
        }
        pins.accept(publisher, signed.key).map_err(|e| Failure::forbidden(e.to_string()))?;
        if known.is_none() && !self.database().bind_publisher(publisher, &signed.key).await? {
            // Two first versions at once are fine where one key signed both.
            let bound = self.database().publisher(publisher).await?;
            if bound.is_none_or(|bound| bound.key != signed.key) {
                return Err(Failure::conflict(format!(
                    "somebody else published as \"{publisher}\" just now; try again"
                )));
            }
        }
        Ok(())
    }

    /// Proves that every page and frame of the version's images is in the named packs.
    async fn complete(&self, manifest: &Manifest, digest: &Digest, packs: &[Digest]) -> Answer<Vec<PackInfo>> {
        let mut infos = Vec::new();
        for pack in packs {
            infos.push(self.depot().pack_info(&manifest.appliance, pack).await?);
        }
        let broken = |what: String| {
            Failure::invalid(format!("version {} of {} is not complete: {what}", manifest.version, manifest.appliance))
        };
        let cache = Cache::open(&self.inner.data.join("cache")).map_err(|e| Failure::internal(e.to_string()))?;
        let source = DepotSource { depot: self.depot().clone(), packs: HashMap::from([(*digest, infos.clone())]) };
        let store = FrameStore::new(cache, Arc::new(source));
        store.add_version(&manifest.appliance, digest).await;
        for StoredImage { what, image, boot, most } in manifest.images() {
            let wrong = |why: String| broken(format!("the image of {what}: {why}"));
            let unread = |error: FetchError| match error.is_away() {
                true => Failure::unavailable(error.to_string()),
                false => wrong(error.to_string()),
            };
            let map = ImageMap::load(&store, image).await.map_err(unread)?;
            if map.size > most {
                return Err(wrong(format!("it has {} bytes, and {most} are possible", map.size)));
            }
            store.locate_all(&needed(&map, boot)).await.map_err(unread)?;
        }
        Ok(infos)
    }

    /// Moves a channel.
    pub(crate) async fn set_channel(&self, appliance: &ApplianceName, channel: &Name, pointer: Signed) -> Answer<()> {
        let refused = |why: String| Failure::invalid(format!("channel {appliance}:{channel} is not moved: {why}"));
        let head: ChannelPointer = pointer.verified_json(Kind::Channel).map_err(|e| refused(e.to_string()))?;
        if head.appliance != *appliance || head.channel != *channel {
            return Err(refused("the signed pointer is of another channel".into()));
        }
        let known = self.database().publisher(&appliance.publisher).await?;
        if known.is_none_or(|publisher| publisher.key != pointer.key) {
            return Err(Failure::forbidden(format!("channel {appliance}:{channel} is not signed by its publisher")));
        }
        let version = self.database().version(&head.version).await?;
        if version.is_none_or(|version| version.appliance != *appliance) {
            return Err(refused("it points to a version that is not published".into()));
        }
        let row = ChannelRow { channel: channel.clone(), serial: head.serial, version: head.version, pointer };
        if !self.database().set_channel(appliance, &row).await? {
            let now = self.channel(appliance, channel).await?;
            if now.pointer.payload == row.pointer.payload {
                return Ok(());
            }
            return Err(Failure::conflict(format!(
                "channel {appliance}:{channel} has serial {} already, and serials never fall",
                now.serial
            )));
        }
        self.state_changed();
        Ok(())
    }

    pub(crate) async fn channel(&self, appliance: &ApplianceName, channel: &Name) -> Answer<ChannelRow> {
        let found = self.database().channels(appliance).await?.into_iter().find(|row| row.channel == *channel);
        found.ok_or_else(|| Failure::missing(format!("{appliance} has no channel \"{channel}\"")))
    }

    /// Changes the key that a publisher is bound to.
    pub(crate) async fn change_key(&self, publisher: &Name, update: KeyUpdate) -> Answer<()> {
        let known = self.database().publisher(publisher).await?;
        let known = known.ok_or_else(|| Failure::missing(format!("no publisher \"{publisher}\" is known here")))?;
        let next = match update {
            KeyUpdate::Trust(key) => Publisher { key, changes: Vec::new() },
            KeyUpdate::Change(signed) => {
                let change: KeyChange =
                    signed.verified_json(Kind::KeyChange).map_err(|e| Failure::invalid(e.to_string()))?;
                let mut pins = Pins::default();
                pins.trust(publisher, known.key);
                pins.apply_changes(publisher, std::slice::from_ref(&signed))
                    .map_err(|e| Failure::forbidden(e.to_string()))?;
                if known.key != change.old && known.key != change.new {
                    return Err(Failure::forbidden("the key change is not signed by the publisher's present key"));
                }
                let mut changes = known.changes;
                if known.key == change.old {
                    changes.push(signed);
                }
                Publisher { key: change.new, changes }
            }
        };
        self.database().set_publisher(publisher, &next).await?;
        self.state_changed();
        Ok(())
    }

    /// What a reference means now.
    pub(crate) async fn resolve(&self, reference: &Reference) -> Answer<VersionRow> {
        let appliance = &reference.appliance;
        let found = match &reference.selector {
            Selector::Digest(digest) => {
                self.database().version(digest).await?.filter(|row| row.appliance == *appliance)
            }
            Selector::Default => self.labelled(appliance, "stable").await?,
            Selector::Label(label) => self.labelled(appliance, label.as_str()).await?,
        };
        if let Some(found) = found {
            return Ok(found);
        }
        let versions = self.database().versions(Some(appliance)).await?;
        if versions.is_empty() {
            return Err(Failure::missing(format!(
                "no appliance \"{appliance}\" is published here; `collective search` lists what is"
            )));
        }
        let names: Vec<_> = versions.iter().map(|row| row.version.as_str()).collect();
        Err(Failure::missing(format!("{reference} is not published; versions of {appliance}: {}", names.join(", "))))
    }

    /// A channel's head or, if there is no such channel, a version.
    async fn labelled(&self, appliance: &ApplianceName, label: &str) -> Answer<Option<VersionRow>> {
        let channels = self.database().channels(appliance).await?;
        if let Some(row) = channels.iter().find(|row| row.channel.as_str() == label) {
            return self.database().version(&row.version).await;
        }
        match label.parse::<VersionName>() {
            Ok(name) => self.database().version_named(appliance, &name).await,
            Err(_) => Ok(None),
        }
    }

    pub(crate) async fn detail(&self, row: VersionRow) -> Answer<VersionDetail> {
        let publisher = self.database().publisher(&row.appliance.publisher).await?;
        let key_changes = publisher.map(|publisher| publisher.changes).unwrap_or_default();
        Ok(VersionDetail { manifest: row.manifest, packs: row.packs, key_changes })
    }

    /// Appliances whose name or summary has `query` in it.
    pub(crate) async fn search(&self, query: &str) -> Answer<Vec<ApplianceView>> {
        let mut views: Vec<ApplianceView> = Vec::new();
        for row in self.database().versions(None).await? {
            let version = VersionView { version: row.version, digest: row.digest, created: row.created };
            if let Some(last) = views.last_mut().filter(|view| view.appliance == row.appliance) {
                last.versions.push(version);
                continue;
            }
            let publisher = self.database().publisher(&row.appliance.publisher).await?;
            let Some(publisher) = publisher else { continue };
            views.push(ApplianceView {
                appliance: row.appliance,
                summary: row.summary,
                key: publisher.key,
                channels: Default::default(),
                versions: vec![version],
            });
        }
        let wanted = query.to_lowercase();
        views.retain(|view| format!("{} {}", view.appliance, view.summary).to_lowercase().contains(&wanted));
        for view in &mut views {
            for row in self.database().channels(&view.appliance).await? {
                if let Some(version) = view.versions.iter().find(|version| version.digest == row.version) {
                    view.channels.insert(row.channel, version.version.clone());
                }
            }
        }
        Ok(views)
    }
}

/// Frames and pages of an image, and the page that says what of it is read first.
pub(crate) fn needed(map: &ImageMap, boot: Option<Digest>) -> Vec<Digest> {
    map.frames().chain(map.pages().iter().copied()).chain(boot).collect()
}

/// The depot as a host sees it.
pub(crate) struct DepotSource {
    pub depot: Depot,
    /// The lists of versions.
    pub packs: HashMap<Digest, Vec<PackInfo>>,
}

impl Source for DepotSource {
    fn packs<'a>(
        &'a self,
        _: &'a ApplianceName,
        version: &'a Digest,
    ) -> BoxFuture<'a, Result<Vec<PackInfo>, SourceError>> {
        async move { Ok(self.packs.get(version).cloned().unwrap_or_default()) }.boxed()
    }

    fn read<'a>(
        &'a self,
        appliance: &'a ApplianceName,
        pack: &'a Digest,
        range: Range<u64>,
    ) -> BoxFuture<'a, Result<Bytes, SourceError>> {
        async move {
            self.depot.read(appliance, pack, range).await.map_err(|error| match error {
                DepotError::Backend(_) => SourceError::Away(error.to_string()),
                _ => SourceError::Refused(error.to_string()),
            })
        }
        .boxed()
    }
}

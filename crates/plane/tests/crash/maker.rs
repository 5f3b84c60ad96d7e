//! What makers and hosts do, in the order in which the command line does it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use collective_api::{
    ApplianceView, ChannelHead, Client, Collected, PlaneStore, PublishVersion, Repacked, StoreView, VersionDetail,
    VersionView,
};
use collective_keys::{ChannelPointer, Kind, Signed};
use collective_model::{ApplianceName, Digest, Manifest, Timestamp};
use collective_store::BLOCK;
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::{ImageMap, Run};
use collective_store::pack::{self, Pack};
use collective_store::publish::{BaseReader, KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;
use collective_testkit::Objects;

use super::disk::disk;
use super::world::{Shared, Version, Withdrawal, answered, in_memory};

/// Somebody who talks to the plane.
pub struct Maker {
    pub client: Client,
    pub objects: Objects,
    pub world: Shared,
    /// What it needs may be removed while it is at work: then it fails, and repeats.
    pub loses_lease: bool,
}

type Tried<T> = Result<T, String>;

fn said(error: impl ToString) -> String {
    error.to_string()
}

struct Sink(Vec<Pack>);

impl PackSink for Sink {
    fn put(&mut self, pack: Pack, _: PackHashes) -> io::Result<()> {
        self.0.push(pack);
        Ok(())
    }
}

struct Contents(HashMap<Digest, Vec<u8>>);

impl BaseReader for Contents {
    fn read(&self, frames: &[Digest]) -> io::Result<Vec<Vec<u8>>> {
        Ok(frames.iter().map(|frame| self.0[frame].clone()).collect())
    }
}

fn pack_path(appliance: &ApplianceName, pack: &Digest) -> String {
    format!("/v1/appliances/{appliance}/packs/{pack}")
}

/// A pack's key in the store.
pub fn pack_key(appliance: &ApplianceName, pack: &Digest) -> String {
    format!("packs/{appliance}/{pack}")
}

impl Maker {
    pub fn another(&self) -> Self {
        let Self { client, objects, world, loses_lease } = self;
        let (objects, world, loses_lease) = (objects.clone(), world.clone(), *loses_lease);
        Self { client: client.another(), objects, world, loses_lease }
    }

    /// Publishes a version from the beginning to the end.
    pub async fn publish(&self, version: &Version) -> Tried<()> {
        let (appliance, number) = version;
        let id = format!("v{number}x{}", self.world.lock().unwrap().next());
        let lease = format!("/v1/appliances/{appliance}/leases/{id}");
        self.world.lock().unwrap().leases.insert((appliance.clone(), id.clone()));
        self.client.put::<()>(&lease, &()).await.map_err(said)?;
        if self.loses_lease {
            // It was asleep for longer than a lease lasts.
            self.client.delete::<()>(&lease).await.map_err(said)?;
        }
        let (image, packs, made) = self.cut(version).await?;
        for pack in made {
            self.send(appliance, pack).await?;
        }
        self.objects.instant().await;
        let key = self.world.lock().unwrap().key.clone();
        let manifest = Signed::sign_json(Kind::Manifest, &manifest(version, image), &key).unwrap();
        let request = PublishVersion { manifest, packs };
        self.world.lock().unwrap().records.entry(version.clone()).or_default();
        let path = format!("/v1/appliances/{appliance}/versions");
        self.client.post::<VersionView>(&path, &request).await.map_err(said)?;
        answered(&self.world, |world| world.records.get_mut(version).unwrap().published = true);
        self.objects.instant().await;
        self.client.delete::<()>(&lease).await.map_err(said)?;
        answered(&self.world, |world| _ = world.leases.remove(&(appliance.clone(), id)));
        Ok(())
    }

    /// Compares with what is published, as it is read back. The image, all packs it needs, and those that are new.
    async fn cut(&self, version: &Version) -> Tried<(Digest, Vec<Digest>, Vec<Pack>)> {
        let (appliance, number) = version;
        let mut packs: Vec<(Digest, Bytes)> = Vec::new();
        if let Some(base) = self.base(version).await? {
            let detail: VersionDetail = self.client.get(&format!("/v1/versions/{base}")).await.map_err(said)?;
            for info in detail.packs {
                let path = pack_path(appliance, &info.digest);
                let bytes = self.client.get_range(&path, 0..info.size).await.map_err(said)?;
                if Digest::of(&bytes) != info.digest {
                    return Err(format!("pack {} came back damaged from the store", info.digest));
                }
                packs.push((info.digest, bytes));
            }
        }
        let mut contents = HashMap::new();
        for (_, bytes) in &packs {
            for entry in pack::directory(bytes).unwrap().entries {
                contents.insert(entry.digest, pack::contents(bytes, &entry).unwrap());
            }
        }
        let mut known = KnownBlocks::new(contents.keys().copied().collect::<HashSet<_>>());
        packs.iter().for_each(|(digest, bytes)| known.learn(digest, &PackHashes::of(bytes).unwrap()));
        let (mut sink, contents) = (Sink(Vec::new()), Contents(contents));
        let mut publisher = Publisher::new(known, &mut sink);
        if !packs.is_empty() {
            publisher = publisher.with_bases(&contents);
        }
        let image = publisher.add(&*disk(*number), &[], &Trace::default(), &|_| {}).map_err(said)?;
        let (needed, _) = publisher.finish().map_err(said)?;
        Ok((image, needed, sink.0))
    }

    /// What a version is compared with: itself where it is published, else the newest.
    async fn base(&self, (appliance, number): &Version) -> Tried<Option<Digest>> {
        let views: Vec<ApplianceView> =
            self.client.get(&format!("/v1/appliances?query={appliance}")).await.map_err(said)?;
        let Some(view) = views.into_iter().find(|view| view.appliance == *appliance) else { return Ok(None) };
        let same = view.versions.iter().find(|known| known.version.as_str() == number.to_string());
        Ok(same.or(view.versions.first()).map(|base| base.digest))
    }

    async fn send(&self, appliance: &ApplianceName, pack: Pack) -> Tried<()> {
        let (path, bytes) = (pack_path(appliance, &pack.digest), Bytes::from(pack.bytes));
        if self.client.get::<u64>(&path).await.is_ok_and(|size| size == bytes.len() as u64) {
            return Ok(());
        }
        self.client.put_bytes(&path, bytes).await.map_err(said)
    }

    /// Moves the channel to a version, if it leads to an older one.
    pub async fn point(&self, (appliance, number): &Version) -> Tried<()> {
        let path = format!("/v1/appliances/{appliance}/channels/stable");
        let serial = match self.client.get::<ChannelHead>(&path).await {
            Ok(head) => head.pointer.verified_json::<ChannelPointer>(Kind::Channel).map_err(said)?.serial + 1,
            Err(error) if error.status() == Some(404) => 1,
            Err(error) => return Err(said(error)),
        };
        let views: Vec<ApplianceView> =
            self.client.get(&format!("/v1/appliances?query={appliance}")).await.map_err(said)?;
        let versions = views.into_iter().filter(|view| view.appliance == *appliance).flat_map(|view| view.versions);
        let to = versions.into_iter().find(|known| known.version.as_str() == number.to_string());
        let Some(to) = to else { return Ok(()) };
        let pointer = ChannelPointer {
            appliance: appliance.clone(),
            channel: "stable".parse().unwrap(),
            serial,
            version: to.digest,
            created: Timestamp(serial),
        };
        let key = {
            let world = &mut *self.world.lock().unwrap();
            world.pointed.insert((appliance.clone(), serial, *number));
            world.key.clone()
        };
        let signed = Signed::sign_json(Kind::Channel, &pointer, &key).unwrap();
        self.client.put::<()>(&path, &signed).await.map_err(said)?;
        answered(&self.world, |world| {
            let head = world.heads.entry(appliance.clone()).or_default();
            *head = (*head).max((serial, *number));
        });
        Ok(())
    }

    /// Versions that may be withdrawn.
    pub async fn unneeded(&self) -> Tried<Vec<(Version, Digest)>> {
        let view: StoreView = self.client.get("/v1/store").await.map_err(said)?;
        let numbered = view.versions.into_iter().map(|known| {
            let number = known.version.as_str().parse().unwrap();
            ((known.appliance, number), known.digest)
        });
        let world = self.world.lock().unwrap();
        Ok(numbered.filter(|(version, _)| world.may_withdraw(version)).collect())
    }

    pub async fn withdraw(&self, version: &Version, digest: Digest) -> Tried<()> {
        answered(&self.world, |world| world.records.get_mut(version).unwrap().withdrawal = Withdrawal::Tried);
        self.client.delete::<()>(&format!("/v1/versions/{digest}")).await.map_err(said)?;
        answered(&self.world, |world| world.records.get_mut(version).unwrap().withdrawal = Withdrawal::Done);
        Ok(())
    }

    /// Writes packs again of which little is used, as `prune --yes` does before it collects.
    pub async fn repack(&self) -> Tried<()> {
        self.world.lock().unwrap().repacking += 1;
        let done = self.client.post::<Repacked>("/v1/store/repack", &()).await;
        let world = &mut *self.world.lock().unwrap();
        world.repacking -= 1;
        world.repacked += done.map_err(said)?.packs.len();
        Ok(())
    }

    pub async fn prune(&self) -> Tried<Collected> {
        self.repack().await?;
        self.collect().await
    }

    pub async fn collect(&self) -> Tried<Collected> {
        self.client.post("/v1/store/collect", &()).await.map_err(said)
    }

    /// Puts a sound copy in the place of a pack, as `store check --repair` does.
    pub async fn mend(&self, key: &str) -> Tried<()> {
        let bytes = self.world.lock().unwrap().packs[key].clone();
        let (appliance, pack) = key.trim_start_matches("packs/").rsplit_once('/').unwrap();
        let path = pack_path(&appliance.parse().unwrap(), &pack.parse().unwrap());
        self.client.put_bytes(&path, bytes).await.map_err(said)?;
        answered(&self.world, |world| _ = world.damaged.remove(key));
        Ok(())
    }

    /// The disk of a version, as a host reads it that has nothing in its cache.
    pub async fn read(&self, appliance: &ApplianceName, version: Digest) -> Tried<Vec<u8>> {
        let folder = in_memory();
        let (store, map) = self.load(folder.path(), appliance, version).await?;
        let disk = read(&store, &map).await?;
        // Differences as well, where there are some.
        store.check(&map.frames().collect::<Vec<_>>(), &|_| {}).await.map_err(said)?;
        Ok(disk)
    }

    /// The same as a host that has lists and directories of packs from before, and some of the frames.
    pub async fn read_with_old_lists(&self, appliance: &ApplianceName, version: Digest) -> Tried<Vec<u8>> {
        let host = self.world.lock().unwrap().host.path().to_owned();
        let (store, map) = self.load(&host, appliance, version).await?;
        store.prefetch(&map.frames().collect::<Vec<_>>(), &|_| {}).await.map_err(said)?;
        let disk = read(&store, &map).await?;
        let half = store.cache().size().map_err(said)? / 2;
        store.cache().evict(half, &HashSet::new()).map_err(said)?;
        Ok(disk)
    }

    async fn load(&self, folder: &Path, appliance: &ApplianceName, version: Digest) -> Tried<(FrameStore, ImageMap)> {
        let source = Arc::new(PlaneStore::new(Arc::new(self.client.another()), &folder.join("versions")));
        let manifest = source.version(&version).await.map_err(said)?.manifest;
        let manifest = Manifest::parse(manifest.payload.as_bytes()).unwrap();
        let store = FrameStore::new(Cache::open(folder).unwrap(), source);
        store.add_version(appliance, &version).await;
        let map = ImageMap::load(&store, manifest.images()[0].image).await.map_err(said)?;
        Ok((store, map))
    }
}

async fn read(store: &FrameStore, map: &ImageMap) -> Tried<Vec<u8>> {
    let mut disk = Vec::new();
    let mut block = 0;
    while block < map.blocks() {
        match map.run_at(block) {
            Run::Zeros(blocks) => {
                disk.resize(disk.len() + (blocks * BLOCK) as usize, 0);
                block += blocks;
            }
            Run::Frame { digest, length, offset, blocks } => {
                let frame = store.frame(&digest, length).await.map_err(said)?;
                let from = usize::from(offset) * BLOCK as usize;
                disk.extend_from_slice(&frame[from..from + (blocks * BLOCK) as usize]);
                block += blocks;
            }
        }
    }
    Ok(disk)
}

fn manifest((appliance, number): &Version, image: Digest) -> Manifest {
    serde_json::from_value(serde_json::json!({
        "format": 1, "appliance": appliance, "version": number.to_string(), "created": Timestamp(*number * 1000),
        "hardware": { "cpus": 1, "memory": 67108864 },
        "disks": [{ "name": "system", "role": "system", "size": disk(*number).len(), "image": image }],
    }))
    .unwrap()
}

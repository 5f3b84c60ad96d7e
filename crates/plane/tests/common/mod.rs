//! A plane on a socket of its own, and what makers and hosts say to it.

#![allow(dead_code)]

pub mod crowd;

use std::path::PathBuf;
use std::time::Duration;

use collective_api::{
    Client, ClientError, Endpoint, HostFacts, HostReport, JoinAnswer, JoinRequest, PublishVersion, VersionView,
};
use collective_keys::{ChannelPointer, Kind, Signed, SigningKey};
use collective_model::{Digest, InstanceId, Manifest, Observed, Timestamp};
use collective_plane::{Listening, Plane, PlaneConfig, PlaneError, serve};
use collective_store::depot::{Access, Place};
use collective_store::pack::Pack;
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::trace::Trace;

pub struct Site {
    folder: tempfile::TempDir,
    pub user: Client,
    serving: tokio::task::JoinHandle<Result<(), PlaneError>>,
}

impl Site {
    pub async fn open() -> Self {
        Self::try_open(tempfile::tempdir().unwrap(), None, Access::default()).await.unwrap()
    }

    /// With a store of its own choice.
    pub async fn try_open(
        folder: tempfile::TempDir,
        store: Option<Place>,
        s3: Access,
    ) -> Result<Self, (PlaneError, tempfile::TempDir)> {
        let (data, machine_key) = (folder.path().join("plane"), folder.path().join("machine.key"));
        let opened =
            Plane::open(&PlaneConfig { data, machine_key, store, s3, address: Some("127.0.0.1:1".into()) }).await;
        let (plane, tls) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err((error, folder)),
        };
        let socket = folder.path().join("plane.sock");
        let serving = tokio::spawn(serve(plane, tls, Listening { socket: socket.clone(), tcp: None }));
        let user = Client::new(Endpoint::Unix(socket), None);
        let up = async {
            while user.get::<serde_json::Value>("/v1/status").await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), up).await.unwrap();
        Ok(Self { folder, user, serving })
    }

    /// Where a pack lies, with a store in a folder.
    pub fn pack(&self, pack: &Digest) -> PathBuf {
        self.folder.path().join("plane/store/packs/p/app").join(pack.to_string())
    }

    /// Ends the plane; its folder stays.
    pub fn close(self) -> tempfile::TempDir {
        self.serving.abort();
        self.folder
    }

    pub fn with(&self, secret: &str) -> Client {
        Client::new(Endpoint::Unix(self.folder.path().join("plane.sock")), Some(secret.to_owned()))
    }

    /// Sends the packs of a disk; gives image and packs.
    pub async fn upload(&self, seed: u8) -> (Digest, Vec<Digest>) {
        self.try_upload(seed).await.unwrap()
    }

    pub async fn try_upload(&self, seed: u8) -> Result<(Digest, Vec<Digest>), ClientError> {
        let mut sink = Collected(Vec::new());
        let (image, packs) = {
            let mut publisher = Publisher::new(KnownBlocks::default(), &mut sink);
            let image = publisher.add(&pattern(seed), &[], &Trace::default(), &|_| {}).unwrap();
            (image, publisher.finish().unwrap().0)
        };
        for pack in sink.0 {
            let path = format!("/v1/appliances/p/app/packs/{}", pack.digest);
            self.user.put_bytes(&path, pack.bytes.into()).await?;
        }
        Ok((image, packs))
    }

    pub async fn publish(&self, manifest: Signed, packs: Vec<Digest>) -> Result<VersionView, String> {
        let request = PublishVersion { manifest, packs };
        self.user.post("/v1/appliances/p/app/versions", &request).await.map_err(|e| e.to_string())
    }

    pub async fn point(&self, version: Digest, serial: u64, key: &SigningKey) -> Result<(), String> {
        let pointer = ChannelPointer {
            appliance: "p/app".parse().unwrap(),
            channel: "stable".parse().unwrap(),
            serial,
            version,
            created: Timestamp(serial),
        };
        let signed = Signed::sign_json(Kind::Channel, &pointer, key).unwrap();
        self.user.put("/v1/appliances/p/app/channels/stable", &signed).await.map_err(|e| e.to_string())
    }

    pub async fn join(&self, name: &str) -> Client {
        let answer: JoinAnswer =
            self.user.post("/v1/hosts/join", &JoinRequest { name: name.parse().unwrap() }).await.unwrap();
        self.with(&answer.secret)
    }
}

struct Collected(Vec<Pack>);

impl PackSink for Collected {
    fn put(&mut self, pack: Pack, _: PackHashes) -> std::io::Result<()> {
        self.0.push(pack);
        Ok(())
    }
}

/// One MiB that depends on a number.
fn pattern(seed: u8) -> Vec<u8> {
    let value = |i: u32| ((i / 4096) as u8).wrapping_mul(7).wrapping_add(seed) | 1;
    (0..1 << 20).map(value).collect()
}

pub fn manifest(version: &str, image: Digest) -> Manifest {
    serde_json::from_value(serde_json::json!({
        "format": 1, "appliance": "p/app", "version": version, "created": "2026-11-22T00:00:00Z",
        "hardware": { "cpus": 1, "memory": 67108864 },
        "disks": [{ "name": "system", "role": "system", "size": 1 << 20, "image": image }],
        "settings": { "password": { "secret": true } }
    }))
    .unwrap()
}

pub fn sign(manifest: &Manifest, key: &SigningKey) -> Signed {
    Signed::sign_json(Kind::Manifest, manifest, key).unwrap()
}

pub fn report(observed: Vec<Observed>) -> HostReport {
    let facts = HostFacts {
        version: "0".into(),
        cpus: 2,
        memory: 8 << 30,
        accelerator: "tcg".into(),
        root: true,
        cache_bytes: 0,
        warnings: vec![],
        platform: None,
    };
    HostReport { facts, observed, operations: vec![], events: vec![] }
}

/// What a host says of an instance that runs.
pub fn running(id: &InstanceId, generation: u64, version: Digest) -> Observed {
    let observed = serde_json::json!({
        "id": id, "generation": generation, "state": "running", "version": version, "version_name": "1",
        "accelerator": null, "addresses": [], "ports": [], "ports_open": true, "disks": [], "bytes_fetched": 0,
        "index_bytes_fetched": 0, "bytes_from_cache": 0, "started_in_ms": null, "first_answer_ms": null,
        "frames_missing": null, "waiting": null, "health": "unknown", "probe_output": null, "last_error": null,
        "last_stop": null, "power_serial": 1, "checkpoints": [], "observed_at": "2026-11-22T00:00:00Z"
    });
    serde_json::from_value(observed).unwrap()
}

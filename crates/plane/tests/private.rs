//! Private data at the plane: who may put it there, who may read it, who is given the key, and what is removed when.

mod common;

use std::sync::Arc;

use bytes::Bytes;
use collective_api::{
    Backup, BackupDisk, Client, ClientError, Collected, InstanceView, KeyCopy, KeyView, KeyWanted, LaunchRequest,
    OperationRequest, OperationView, PrivateGrant, StoreView, TokenView,
};
use collective_keys::{OwnerKey, SigningKey};
use collective_model::{Digest, Generation, InstanceId, OperationState, Timestamp};
use collective_store::PackInfo;
use collective_store::pack::Pack;
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher};
use collective_store::seal::Seal;
use collective_store::trace::Trace;

use common::{Site, manifest, report, sign};

struct Two {
    site: Site,
    owner: Client,
    other: Client,
    id: InstanceId,
    second: InstanceId,
}

/// Instance `n` on host `h`, instance `m` on host `g`.
async fn two() -> Two {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(1).await;
    let version = site.publish(sign(&manifest("1", image), &key), packs).await.unwrap().digest;
    site.point(version, 1, &key).await.unwrap();
    let (owner, other) = (site.join("h").await, site.join("g").await);
    let mut ids = Vec::new();
    for (client, name, host) in [(&owner, "n", "h"), (&other, "m", "g")] {
        client.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
        let launch: LaunchRequest = serde_json::from_value(serde_json::json!({
            "reference": "p/app", "name": name, "host": host, "outbound": true
        }))
        .unwrap();
        ids.push(site.user.post::<InstanceView>("/v1/instances", &launch).await.unwrap().spec.id);
    }
    let second = ids.pop().unwrap();
    Two { site, owner, other, id: ids.pop().unwrap(), second }
}

impl Two {
    async fn order(&self, name: &str, request: OperationRequest) -> Result<String, ClientError> {
        let view: OperationView = self.site.user.post(&format!("/v1/instances/{name}/operations"), &request).await?;
        Ok(view.operation.id.to_string())
    }

    async fn conclude(&self, client: &Client, operation: &str) {
        let mut done = report(vec![]);
        done.operations.push((operation.parse().unwrap(), OperationState::Done { result: serde_json::Value::Null }));
        client.post::<()>("/v1/hosts/self/report", &done).await.unwrap();
    }

    /// A whole backup of `n`, as its host makes one.
    async fn back_up(&self, seed: u8) -> Backup {
        let operation = self.order("n", OperationRequest::Backup).await.unwrap();
        let given = grant(&self.owner, &operation).await.unwrap();
        let pack = sealed(seed, &given.key);
        put(&self.owner, &self.id, &pack).await.unwrap();
        let backup = backup(&operation, &self.id, &given.key, &[pack.digest]);
        let recorded = record(&self.owner, &operation, &backup).await.unwrap();
        assert_eq!(record(&self.owner, &operation, &backup).await.unwrap(), recorded, "told twice");
        self.conclude(&self.owner, &operation).await;
        recorded
    }

    async fn collect(&self) -> usize {
        self.site.user.post::<Collected>("/v1/store/collect", &()).await.unwrap().private.len()
    }
}

async fn grant(client: &Client, operation: &str) -> Result<PrivateGrant, ClientError> {
    client.post(&format!("/v1/hosts/self/operations/{operation}/private"), &()).await
}

async fn put(client: &Client, instance: &InstanceId, pack: &Pack) -> Result<(), ClientError> {
    let bytes = Bytes::from(pack.bytes.clone());
    client.put_bytes(&format!("/v1/private/{instance}/packs/{}", pack.digest), bytes).await
}

async fn read(client: &Client, instance: &InstanceId, pack: &Digest) -> Result<Bytes, ClientError> {
    client.get_range(&format!("/v1/private/{instance}/packs/{pack}"), 0..4).await
}

async fn record(client: &Client, operation: &str, backup: &Backup) -> Result<Backup, ClientError> {
    client.post(&format!("/v1/hosts/self/operations/{operation}/backup"), backup).await
}

fn backup(operation: &str, instance: &InstanceId, key: &OwnerKey, packs: &[Digest]) -> Backup {
    Backup {
        id: operation.parse().unwrap(),
        instance: instance.clone(),
        name: "x".parse().unwrap(),
        generation: Generation(1),
        appliance: "p/app".parse().unwrap(),
        version: Digest::of(b"1"),
        version_name: "1".parse().unwrap(),
        taken: Timestamp::now(),
        key: key.id(),
        disks: vec![BackupDisk { name: "data".parse().unwrap(), size: 8192, root: Digest::of(b"root") }],
        packs: packs.iter().map(|digest| PackInfo { digest: *digest, size: 1, directory: 1 }).collect(),
        used_bytes: 8192,
        stored_bytes: 1,
        new_bytes: 1,
        whole: None,
    }
}

struct Last(Option<Pack>);

impl PackSink for Last {
    fn put(&mut self, pack: Pack, _: PackHashes) -> std::io::Result<()> {
        self.0 = Some(pack);
        Ok(())
    }
}

fn cut(seed: u8, key: Option<&OwnerKey>) -> Pack {
    let mut sink = Last(None);
    let mut publisher = Publisher::new(KnownBlocks::default(), &mut sink);
    if let Some(key) = key {
        publisher = publisher.sealing(Arc::new(Seal::new(key.bytes())));
    }
    publisher.add(&vec![seed + 1; 8192], &[], &Trace::default(), &|_| {}).unwrap();
    publisher.finish().unwrap();
    sink.0.unwrap()
}

fn sealed(seed: u8, key: &OwnerKey) -> Pack {
    cut(seed, Some(key))
}

#[tokio::test]
async fn only_the_owning_host_and_only_for_an_order() {
    let two = two().await;
    let some_key = OwnerKey::generate().unwrap();
    let pack = sealed(1, &some_key);
    assert_eq!(put(&two.owner, &two.id, &pack).await.unwrap_err().status(), Some(403), "nobody ordered a backup");
    let operation = two.order("n", OperationRequest::Backup).await.unwrap();
    for (client, instance) in [(&two.other, &two.id), (&two.owner, &two.second), (&two.site.user, &two.id)] {
        assert_eq!(put(client, instance, &pack).await.unwrap_err().status(), Some(403));
    }
    for client in [&two.other, &two.site.user] {
        assert_eq!(grant(client, &operation).await.unwrap_err().status(), Some(403));
    }
    assert_eq!(grant(&two.owner, &"00".repeat(16)).await.unwrap_err().status(), Some(403));
    let readable = cut(1, None);
    let refused = put(&two.owner, &two.id, &readable).await.unwrap_err().to_string();
    assert!(refused.contains("not sealed"), "{refused}");
    let public = format!("/v1/appliances/p/app/packs/{}", pack.digest);
    let refused = two.site.user.put_bytes(&public, pack.bytes.clone().into()).await.unwrap_err().to_string();
    assert!(refused.contains("encrypted"), "{refused}");

    let given = grant(&two.owner, &operation).await.unwrap();
    assert!(given.backup.is_none());
    assert_eq!(grant(&two.owner, &operation).await.unwrap().key.id(), given.key.id(), "made once");
    put(&two.owner, &two.id, &pack).await.unwrap();
    assert_eq!(read(&two.other, &two.id, &pack.digest).await.unwrap_err().status(), Some(403));
    assert_eq!(read(&two.owner, &two.id, &pack.digest).await.unwrap(), "CLPK");
    assert_eq!(read(&two.site.user, &two.id, &pack.digest).await.unwrap(), "CLPK");
    assert!(read(&two.owner, &two.second, &pack.digest).await.is_err(), "a digest alone grants nothing");

    // What the host says of it is checked as far as it can be.
    let good = backup(&operation, &two.id, &given.key, &[pack.digest]);
    let mut older = good.clone();
    older.generation = Generation(0);
    let mut foreign = good.clone();
    foreign.instance = two.second.clone();
    let mut lost = good.clone();
    lost.packs[0].digest = Digest::of(b"lost");
    let mut renamed = good.clone();
    renamed.id = "11".repeat(16).parse().unwrap();
    for wrong in [older, foreign, lost, renamed] {
        assert!(record(&two.owner, &operation, &wrong).await.is_err(), "{wrong:?}");
    }
    assert_eq!(record(&two.other, &operation, &good).await.unwrap_err().status(), Some(403));
    let recorded = record(&two.owner, &operation, &good).await.unwrap();
    assert_eq!((recorded.name.as_str(), recorded.stored_bytes), ("n", pack.bytes.len() as u64));
    two.conclude(&two.owner, &operation).await;
    assert_eq!(grant(&two.owner, &operation).await.unwrap_err().status(), Some(403), "it is over");
    let wrong = two.order("n", OperationRequest::Restart).await.unwrap();
    assert_eq!(grant(&two.owner, &wrong).await.unwrap_err().status(), Some(403));
}

#[tokio::test]
async fn a_host_that_restores_reads_that_backup_and_no_other() {
    let two = two().await;
    let (first, second) = (two.back_up(1).await, two.back_up(2).await);
    assert_eq!(second.new_bytes, second.stored_bytes);
    let refused = two.order("m", OperationRequest::Restore { backup: None }).await.unwrap_err().to_string();
    assert!(refused.contains("there is no backup of m"), "{refused}");
    let request = || OperationRequest::Restore { backup: Some(first.id.clone()) };
    let operation = two.order("m", request()).await.unwrap();
    let given = grant(&two.other, &operation).await.unwrap();
    assert_eq!(given.backup.unwrap(), first);
    assert_eq!(given.key.id(), first.key);
    read(&two.other, &two.id, &first.packs[0].digest).await.unwrap();
    assert_eq!(read(&two.other, &two.id, &second.packs[0].digest).await.unwrap_err().status(), Some(403));
    let deleted = two.site.user.delete::<()>(&format!("/v1/backups/{}", first.id)).await;
    assert_eq!(deleted.unwrap_err().status(), Some(409), "it is being restored");
    two.conclude(&two.other, &operation).await;
    assert_eq!(read(&two.other, &two.id, &first.packs[0].digest).await.unwrap_err().status(), Some(403), "it is over");
    two.site.user.delete::<()>(&format!("/v1/backups/{}", first.id)).await.unwrap();
    assert_eq!(two.order("m", request()).await.unwrap_err().status(), Some(404));
}

#[tokio::test]
async fn what_no_backup_needs_goes_but_not_under_a_backup_that_is_being_made() {
    let two = two().await;
    let first = two.back_up(1).await;
    let operation = two.order("n", OperationRequest::Backup).await.unwrap();
    let given = grant(&two.owner, &operation).await.unwrap();
    assert_eq!(given.backup.unwrap(), first, "what need not be sent again");
    let pack = sealed(2, &given.key);
    put(&two.owner, &two.id, &pack).await.unwrap();
    two.site.user.delete::<()>(&format!("/v1/backups/{}", first.id)).await.unwrap();
    assert_eq!(two.collect().await, 0, "the backup that is being made may need both");
    let both = [first.packs[0].digest, pack.digest];
    record(&two.owner, &operation, &backup(&operation, &two.id, &given.key, &both)).await.unwrap();
    two.conclude(&two.owner, &operation).await;
    assert_eq!(two.collect().await, 0);
    let view: StoreView = two.site.user.get("/v1/store").await.unwrap();
    assert!(view.private.iter().all(|pack| pack.backups.len() == 1 && pack.size > 0), "{:?}", view.private);
    two.site.user.delete::<()>(&format!("/v1/backups/{operation}")).await.unwrap();
    assert_eq!(two.collect().await, 2);
    assert!(read(&two.owner, &two.id, &pack.digest).await.is_err());
}

#[tokio::test]
async fn the_key_is_given_out_at_home_only_and_never_replaced_unasked() {
    let two = two().await;
    let export = async |client: &Client| client.post::<KeyCopy>("/v1/key/export", &KeyWanted::default()).await;
    let token: TokenView = two.site.user.post("/v1/tokens", &serde_json::json!({ "kind": "user" })).await.unwrap();
    let secret = token.token.split('_').nth(1).unwrap().to_owned();
    for client in [&two.owner, &two.site.with(&secret), &two.site.with("rubbish")] {
        assert_eq!(export(client).await.unwrap_err().status(), Some(403));
    }
    let view: KeyView = two.site.user.get("/v1/key").await.unwrap();
    assert!(view.current.is_none());
    let key = export(&two.site.user).await.unwrap().key;
    let made = two.back_up(1).await;
    assert_eq!(made.key, key.id(), "the exported key is the one that is used");
    let other = OwnerKey::generate().unwrap();
    let view: KeyView = two.site.user.post("/v1/key/import", &KeyCopy { key: other.clone() }).await.unwrap();
    assert_eq!(view.current, Some(other.id()));
    assert!(view.needed[0].here, "the old one stays for what it encrypted");
    let operation = two.order("n", OperationRequest::Backup).await.unwrap();
    assert!(grant(&two.owner, &operation).await.unwrap().backup.is_none(), "nothing is shared between keys");
    let restore = two.order("n", OperationRequest::Restore { backup: None }).await.unwrap();
    assert_eq!(grant(&two.owner, &restore).await.unwrap().key.id(), key.id());
    // The keys are lost, and the plane starts again.
    let folder = two.site.close();
    std::fs::remove_dir_all(folder.path().join("plane/keys")).unwrap();
    let site = Site::try_open(folder, None, Default::default()).await.ok().unwrap();
    let refused = export(&site.user).await.unwrap_err().to_string();
    assert!(refused.contains("collective key import") && refused.contains("lost"), "{refused}");
    let view: KeyView = site.user.post("/v1/key/import", &KeyCopy { key }).await.unwrap();
    assert!(view.needed[0].here);
}

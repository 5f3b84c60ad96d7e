//! What the plane's store keeps and what goes, beside publishers at work. No machine is started.

mod common;

use std::sync::Arc;

use collective_api::{InstanceView, LaunchRequest, StoreView};
use collective_keys::SigningKey;
use collective_model::Digest;

use common::crowd::{self, collect, end, lease};
use common::{Site, manifest, report, running, sign};

fn digests(packs: &[collective_api::PackView]) -> Vec<Digest> {
    packs.iter().map(|pack| pack.digest).collect()
}

#[tokio::test]
async fn leftovers_go_when_the_publishers_that_may_need_them_have_ended() {
    let site = Site::open().await;
    lease(&site, "one").await;
    let (_, packs) = site.upload(1).await;
    let first = collect(&site).await;
    assert_eq!((first.removed.len(), digests(&first.waiting)), (0, packs.clone()), "a publisher is at work");
    lease(&site, "one").await;
    assert_eq!(collect(&site).await.removed.len(), 0, "its lease was renewed");
    lease(&site, "two").await;
    end(&site, "one").await;
    assert_eq!(digests(&collect(&site).await.removed), packs, "the second began after it was condemned");
    assert_eq!(collect(&site).await.removed.len(), 0);

    // A publisher that finds a condemned pack keeps it.
    let (image, packs) = site.upload(2).await;
    assert_eq!(collect(&site).await.removed.len(), 0, "the second is at work, and this pack is younger");
    end(&site, "two").await;
    lease(&site, "three").await;
    let path = format!("/v1/appliances/p/app/packs/{}", packs[0]);
    assert!(site.user.get::<u64>(&path).await.unwrap() > 0);
    assert_eq!(digests(&collect(&site).await.waiting), packs, "condemned anew, after the third began");
    let key = SigningKey::generate().unwrap();
    site.publish(sign(&manifest("1", image), &key), packs).await.unwrap();
    end(&site, "three").await;
    let last = collect(&site).await;
    assert_eq!((last.removed.len(), last.waiting.len()), (0, 0), "a version refers to it");
    assert!(site.user.put::<()>("/v1/appliances/p/app/leases/a%2fb", &()).await.is_err());
}

#[tokio::test]
async fn what_is_needed_cannot_be_withdrawn() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image1, packs1) = site.upload(1).await;
    let (image2, packs2) = site.upload(2).await;
    let first = site.publish(sign(&manifest("1", image1), &key), packs1.clone()).await.unwrap().digest;
    let second = site.publish(sign(&manifest("2", image2), &key), packs2.clone()).await.unwrap().digest;
    let withdraw = async |version: Digest| {
        site.user.delete::<()>(&format!("/v1/versions/{version}")).await.map_err(|error| error.to_string())
    };
    site.point(first, 1, &key).await.unwrap();
    assert!(withdraw(first).await.unwrap_err().contains("channel stable"));

    let host = site.join("h").await;
    host.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
    let launch = LaunchRequest {
        reference: "p/app:1".into(),
        name: Some("n".parse().unwrap()),
        host: Some("h".parse().unwrap()),
        follow: None,
        ports: vec![],
        settings: [("password".to_owned(), "hunter2".to_owned())].into(),
        outbound: true,
        cpus: None,
        memory: None,
        authorized_keys: vec![],
    };
    let view: InstanceView = site.user.post("/v1/instances", &launch).await.unwrap();
    site.point(second, 2, &key).await.unwrap();
    assert!(withdraw(first).await.unwrap_err().contains("instance n"));

    // The instance has the second version now, and a checkpoint of the first.
    let mut observed = running(&view.spec.id, 1, second);
    let checkpoint = serde_json::json!({
        "id": 1, "taken": "2026-11-22T00:00:00Z", "why": "before update to 2", "version": first, "version_name": "1",
        "own_bytes": 0
    });
    observed.checkpoints = vec![serde_json::from_value(checkpoint).unwrap()];
    host.post::<()>("/v1/hosts/self/report", &report(vec![observed.clone()])).await.unwrap();
    assert!(withdraw(first).await.unwrap_err().contains("instance n"), "it can go back to it");
    observed.checkpoints.clear();
    host.post::<()>("/v1/hosts/self/report", &report(vec![observed])).await.unwrap();
    let used: StoreView = site.user.get("/v1/store").await.unwrap();
    assert_eq!(used.versions.iter().map(|version| version.instances.len()).collect::<Vec<_>>(), [1, 0]);
    withdraw(first).await.unwrap();
    assert!(withdraw(first).await.unwrap_err().contains("no version"));
    assert!(withdraw(second).await.is_err());

    assert_eq!(digests(&collect(&site).await.removed), packs1);
    let (image3, packs3) = site.upload(3).await;
    let reused = site.publish(sign(&manifest("1", image3), &key), packs3).await.unwrap_err();
    assert!(reused.contains("withdrawn"), "{reused}");
    let (_, packs1) = site.upload(1).await;
    assert_eq!(site.publish(sign(&manifest("1", image1), &key), packs1).await.unwrap().digest, first, "the same again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publishers_and_collectors_at_once() {
    crowd::publish_and_collect(Arc::new(Site::open().await)).await;
}

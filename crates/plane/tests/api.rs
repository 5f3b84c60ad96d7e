//! The plane over its own socket: what makers, hosts and strangers may and may not do. No machine is started.

mod common;

use std::time::Duration;

use bytes::Bytes;
use collective_api::{
    Client, HostOrders, InstanceView, JoinAnswer, JoinRequest, LaunchRequest, TunnelAnswer, TunnelTarget,
};
use collective_keys::{KeyChange, Kind, Signed, SigningKey};
use collective_model::{Digest, Generation, Timestamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use common::{Site, manifest, report, running, sign};

#[tokio::test]
async fn a_version_is_visible_only_when_all_of_it_is_there_and_signed() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(1).await;
    let good = manifest("1", image);

    let missing = site.publish(sign(&good, &key), vec![Digest::of(b"nowhere")]).await.unwrap_err();
    assert!(missing.contains("no pack"), "{missing}");
    let incomplete = site.publish(sign(&manifest("1", Digest::of(b"other")), &key), packs.clone()).await.unwrap_err();
    assert!(incomplete.contains("not complete"), "{incomplete}");
    let mut forged = sign(&good, &key);
    forged.payload = forged.payload.replace("67108864", "68157440");
    assert!(site.publish(forged, packs.clone()).await.unwrap_err().contains("signature"));
    let mut other_kind = sign(&good, &key);
    other_kind.kind = Kind::Channel;
    assert!(site.publish(other_kind, packs.clone()).await.is_err());
    let mut elsewhere = good.clone();
    elsewhere.appliance = "p/another".parse().unwrap();
    assert!(site.publish(sign(&elsewhere, &key), packs.clone()).await.unwrap_err().contains("p/another"));
    let rubbish = Signed::sign(Kind::Manifest, "{\"format\": 1}".into(), &key);
    assert!(site.publish(rubbish, packs.clone()).await.unwrap_err().contains("cannot be read"));
    let newer = Signed::sign(Kind::Manifest, "{\"format\": 2}".into(), &key);
    assert!(site.publish(newer, packs.clone()).await.unwrap_err().contains("update Collective"));
    let mut small = good.clone();
    small.disks[0].size.0 = 4096;
    assert!(site.publish(sign(&small, &key), packs.clone()).await.unwrap_err().contains("1048576"));
    let seen: Vec<serde_json::Value> = site.user.get("/v1/appliances").await.unwrap();
    assert!(seen.is_empty(), "nothing of that became visible");

    let view = site.publish(sign(&good, &key), packs.clone()).await.unwrap();
    assert_eq!(site.publish(sign(&good, &key), packs.clone()).await.unwrap().digest, view.digest, "repeated");
    let mut changed = good.clone();
    changed.summary = "other".into();
    assert!(site.publish(sign(&changed, &key), packs.clone()).await.unwrap_err().contains("never change"));

    // A publisher keeps its key, until the old one signs another.
    let thief = SigningKey::generate().unwrap();
    assert!(
        site.publish(sign(&manifest("2", image), &thief), packs.clone()).await.unwrap_err().contains("is known by key")
    );
    let next = SigningKey::generate().unwrap();
    let change = |old: &SigningKey, by: &SigningKey, new: &SigningKey| {
        let change = KeyChange { publisher: "p".parse().unwrap(), old: old.public(), new: new.public() };
        let signed = Signed::sign_json(Kind::KeyChange, &change, by).unwrap();
        serde_json::json!({ "change": signed })
    };
    let post = async |body: serde_json::Value| site.user.post::<()>("/v1/publishers/p/key", &body).await;
    assert!(post(change(&key, &thief, &thief)).await.is_err());
    assert!(post(change(&thief, &thief, &thief)).await.is_err());
    post(change(&key, &key, &next)).await.unwrap();
    post(change(&key, &key, &next)).await.unwrap();
    assert!(site.publish(sign(&manifest("2", image), &key), packs.clone()).await.is_err(), "the old key is over");
    site.publish(sign(&manifest("2", image), &next), packs).await.unwrap();
}

#[tokio::test]
async fn packs_are_what_their_names_say_and_belong_to_their_appliance() {
    let site = Site::open().await;
    let put = async |digest: Digest, bytes: Vec<u8>| {
        site.user.put_bytes(&format!("/v1/appliances/p/app/packs/{digest}"), Bytes::from(bytes)).await
    };
    let rubbish = b"not a pack".to_vec();
    assert!(put(Digest::of(&rubbish), rubbish.clone()).await.unwrap_err().to_string().contains("refused"));
    assert!(put(Digest::of(b"x"), rubbish).await.unwrap_err().to_string().contains("send it again"));
    let (_, packs) = site.upload(2).await;
    let path = |appliance: &str| format!("/v1/appliances/{appliance}/packs/{}", packs[0]);
    assert_eq!(site.user.get_range(&path("p/app"), 0..4).await.unwrap(), "CLPK");
    assert!(site.user.get_range(&path("p/other"), 0..4).await.is_err(), "a digest alone grants nothing");
    assert!(site.user.get_range(&path("p/app"), 0..1 << 40).await.is_err());
    assert!(site.user.get::<u64>("/v1/appliances/p/..%2f..%2fetc/packs/00").await.is_err());
}

#[tokio::test]
async fn channels_move_forward_only_and_by_their_publisher() {
    let site = Site::open().await;
    let (key, thief) = (SigningKey::generate().unwrap(), SigningKey::generate().unwrap());
    let (image, packs) = site.upload(3).await;
    let first = site.publish(sign(&manifest("1", image), &key), packs.clone()).await.unwrap().digest;
    let second = site.publish(sign(&manifest("2", image), &key), packs).await.unwrap().digest;
    assert!(site.point(Digest::of(b"unpublished"), 1, &key).await.unwrap_err().contains("not published"));
    assert!(site.point(first, 1, &thief).await.unwrap_err().contains("not signed by its publisher"));
    site.point(first, 5, &key).await.unwrap();
    site.point(first, 5, &key).await.unwrap();
    assert!(site.point(second, 5, &key).await.unwrap_err().contains("serials never fall"));
    assert!(site.point(second, 4, &key).await.unwrap_err().contains("serials never fall"));
    site.point(second, 6, &key).await.unwrap();
}

#[tokio::test]
async fn hosts_and_users_have_their_own_doors() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(4).await;
    let version = site.publish(sign(&manifest("1", image), &key), packs).await.unwrap().digest;
    site.point(version, 1, &key).await.unwrap();
    let (host, other) = (site.join("h").await, site.join("g").await);
    let taken = site.user.post::<JoinAnswer>("/v1/hosts/join", &JoinRequest { name: "h".parse().unwrap() }).await;
    assert_eq!(taken.unwrap_err().status(), Some(409));
    host.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
    let stranger = site.with("0000");
    assert_eq!(stranger.get::<serde_json::Value>("/v1/status").await.unwrap_err().status(), Some(403));
    assert_eq!(host.get::<serde_json::Value>("/v1/instances").await.unwrap_err().status(), Some(403));
    assert_eq!(site.user.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap_err().status(), Some(403));

    let launch = LaunchRequest {
        reference: "p/app".into(),
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
    let shown = serde_json::to_string(&view).unwrap();
    assert!(!shown.contains("hunter2"), "a secret is not shown: {shown}");
    let orders: HostOrders = host.get("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap();
    assert_eq!(orders.specs[0].settings["password"], "hunter2", "its host needs it");
    let others: HostOrders = other.get("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap();
    assert!(others.specs.is_empty(), "other hosts are told nothing of it");

    // Only the owner of this generation is believed.
    let seen = |generation: u64| report(vec![running(&view.spec.id, generation, version)]);
    let state = async || {
        let view: InstanceView = site.user.get("/v1/instances/n").await.unwrap();
        view.observed.map(|observed| observed.generation)
    };
    other.post::<()>("/v1/hosts/self/report", &seen(1)).await.unwrap();
    assert_eq!(state().await, None, "a stranger's report is not taken");
    host.post::<()>("/v1/hosts/self/report", &seen(0)).await.unwrap();
    assert_eq!(state().await, None, "nor an older owner's");
    host.post::<()>("/v1/hosts/self/report", &seen(1)).await.unwrap();
    assert_eq!(state().await, Some(Generation(1)));
    let removed = site.user.delete::<()>("/v1/hosts/h").await.unwrap_err();
    assert!(removed.to_string().contains("owns 1 instances"), "{removed}");
    site.user.delete::<()>("/v1/hosts/g").await.unwrap();
    assert_eq!(
        other.get::<HostOrders>("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap_err().status(),
        Some(403)
    );
}

#[tokio::test]
async fn updates_come_to_followers_but_not_to_those_held_or_brought_back() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(5).await;
    let first = site.publish(sign(&manifest("1", image), &key), packs.clone()).await.unwrap().digest;
    let second = site.publish(sign(&manifest("2", image), &key), packs).await.unwrap().digest;
    site.point(second, 1, &key).await.unwrap();
    let host = site.join("h").await;
    host.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
    // The reconciler goes through instances by name: when the last one has its order, it has decided about all.
    let names = ["a-back", "a-held", "z-plain"];
    let mut specs = Vec::new();
    for name in names {
        let launch = serde_json::json!({ "reference": "p/app:1", "name": name, "outbound": true });
        let view: InstanceView = site.user.post("/v1/instances", &launch).await.unwrap();
        specs.push(view.spec);
    }
    let observed = specs.iter().map(|spec| running(&spec.id, 1, first)).collect();
    host.post::<()>("/v1/hosts/self/report", &report(observed)).await.unwrap();
    let rollback = serde_json::json!({ "do": "rollback", "with_data": false });
    let view: collective_api::OperationView =
        site.user.post("/v1/instances/a-back/operations", &rollback).await.unwrap();
    let result = serde_json::json!({ "from_digest": second });
    let mut done = report(vec![]);
    done.operations = vec![(view.operation.id, collective_model::OperationState::Done { result })];
    host.post::<()>("/v1/hosts/self/report", &done).await.unwrap();
    let hold = serde_json::json!({ "hold_until": Timestamp::now().plus(Duration::from_secs(3600)) });
    site.user.patch::<InstanceView>("/v1/instances/a-held", &hold).await.unwrap();
    for name in names {
        let follow = serde_json::json!({ "follow": "stable" });
        site.user.patch::<InstanceView>(&format!("/v1/instances/{name}"), &follow).await.unwrap();
    }
    let orders = async {
        loop {
            let orders: HostOrders = host.get("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap();
            if orders.operations.iter().any(|operation| operation.instance == specs[2].id) {
                return orders.operations;
            }
            tokio::task::yield_now().await;
        }
    };
    let orders = tokio::time::timeout(Duration::from_secs(20), orders).await.unwrap();
    assert_eq!(orders.len(), 1, "{orders:?}");
    assert_eq!(orders[0].kind, collective_model::OperationKind::Update { to: second });
}

#[tokio::test]
async fn a_schedule_is_checked_and_told_to_the_host() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(6).await;
    site.publish(sign(&manifest("1", image), &key), packs).await.unwrap();
    let host = site.join("b").await;
    host.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
    let launch = serde_json::json!({ "reference": "p/app:1", "name": "n", "outbound": true });
    let view: InstanceView = site.user.post("/v1/instances", &launch).await.unwrap();
    assert_eq!(view.spec.checkpoint_every, None, "off at first");
    let patch = |every: &str| serde_json::json!({ "checkpoint_every": every });
    for wrong in ["59s", "8d", "-1m", "often"] {
        let refused = site.user.patch::<InstanceView>("/v1/instances/n", &patch(wrong)).await;
        refused.expect_err(wrong);
    }
    for (every, then) in [("1m", Some(60)), ("7d", Some(7 * 86400)), ("0s", None)] {
        site.user.patch::<InstanceView>("/v1/instances/n", &patch(every)).await.unwrap();
        let orders: HostOrders = host.get("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap();
        assert_eq!(orders.specs[0].checkpoint_every.map(|every| every.0.as_secs()), then);
    }
}

#[tokio::test]
async fn tunnels_are_joined_for_the_owning_host_only() {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(6).await;
    let version = site.publish(sign(&manifest("1", image), &key), packs).await.unwrap().digest;
    site.point(version, 1, &key).await.unwrap();
    let (host, other) = (site.join("h").await, site.join("g").await);
    let target = TunnelTarget::Port { port: 22 };
    let path = "/v1/instances/n/tunnel";
    assert_eq!(site.user.tunnel(path, &target).await.err().and_then(|e| e.status()), Some(404));
    host.post::<()>("/v1/hosts/self/report", &report(vec![])).await.unwrap();
    let launch = serde_json::json!({ "reference": "p/app", "name": "n", "host": "h", "outbound": true });
    site.user.post::<InstanceView>("/v1/instances", &launch).await.unwrap();
    assert_eq!(host.tunnel(path, &target).await.err().and_then(|e| e.status()), Some(403), "not for hosts");
    let plain = site.user.post::<()>(path, &target).await.unwrap_err();
    assert_eq!(plain.status(), Some(422), "not without an upgrade: {plain}");

    let listed = async |host: &Client, at_least: usize| loop {
        let orders: HostOrders = host.get("/v1/hosts/self/orders?seen=0&wait_ms=0").await.unwrap();
        if orders.tunnels.len() >= at_least {
            return orders.tunnels;
        }
        tokio::task::yield_now().await;
    };
    let accept = TunnelAnswer::default();
    let opening = async {
        let order = listed(&host, 1).await.remove(0);
        assert_eq!(order.target, target);
        assert!(listed(&other, 0).await.is_empty(), "another host is not told");
        let answer = format!("/v1/hosts/self/tunnels/{}", order.id);
        assert_eq!(other.tunnel(&answer, &accept).await.err().and_then(|e| e.status()), Some(404), "nor believed");
        let stream = host.tunnel(&answer, &accept).await.unwrap();
        assert_eq!(host.tunnel(&answer, &accept).await.err().and_then(|e| e.status()), Some(404), "and once only");
        stream
    };
    let (user_end, mut host_end) = tokio::join!(site.user.tunnel(path, &target), opening);
    let mut user_end = user_end.unwrap();
    user_end.write_all(b"question").await.unwrap();
    user_end.shutdown().await.unwrap();
    let mut text = String::new();
    host_end.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    host_end.write_all(b"answer after the end").await.unwrap();
    drop(host_end);
    text.clear();
    user_end.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer after the end");

    let refusing = async {
        let order = listed(&host, 1).await.remove(0);
        let refuse = TunnelAnswer { refused: Some("the guest sleeps".into()) };
        host.post::<()>(&format!("/v1/hosts/self/tunnels/{}", order.id), &refuse).await.unwrap();
    };
    let (refused, ()) = tokio::join!(site.user.tunnel(path, &target), refusing);
    assert_eq!(refused.err().map(|e| e.to_string()).as_deref(), Some("the guest sleeps"));
    // A user who has gone is not waited for.
    let impatient = tokio::time::timeout(Duration::from_millis(200), site.user.tunnel(path, &target)).await;
    assert!(impatient.is_err());
    let gone = async {
        while !listed(&host, 0).await.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.unwrap();
}

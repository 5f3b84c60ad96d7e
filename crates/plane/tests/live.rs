//! An instance that moves while it runs: whichever of two transactions comes first decides whose it is.

mod common;

use collective_api::{
    Client, ClientError, InstanceView, LaunchRequest, OperationRequest, OperationView, PrivateGrant, StayAnswer,
    StayRequest,
};
use collective_keys::SigningKey;
use collective_model::{Digest, Generation, InstanceId, OperationState, Spec};

use common::{Site, manifest, report, running, sign};

struct Three {
    site: Site,
    source: Client,
    target: Client,
    stranger: Client,
    id: InstanceId,
    version: Digest,
}

/// Instance `n`, running on host `b`, and hosts `c` and `d`.
async fn three() -> Three {
    let site = Site::open().await;
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(1).await;
    let version = site.publish(sign(&manifest("1", image), &key), packs).await.unwrap().digest;
    site.point(version, 1, &key).await.unwrap();
    let (source, target, stranger) = (site.join("b").await, site.join("c").await, site.join("d").await);
    for host in [&source, &target, &stranger] {
        tell(host, vec![], "10.0.2").await;
    }
    let launch: LaunchRequest =
        serde_json::from_value(serde_json::json!({ "reference": "p/app", "name": "n", "host": "b", "outbound": true }))
            .unwrap();
    let id = site.user.post::<InstanceView>("/v1/instances", &launch).await.unwrap().spec.id;
    tell(&source, vec![running(&id, 1, version)], "10.0.2").await;
    Three { site, source, target, stranger, id, version }
}

async fn tell(host: &Client, observed: Vec<collective_model::Observed>, qemu: &str) {
    let mut report = report(observed);
    let platform = serde_json::json!({ "qemu": qemu, "accelerator": "tcg", "cpu": "max" });
    report.facts.platform = serde_json::from_value(platform).unwrap();
    host.post::<()>("/v1/hosts/self/report", &report).await.unwrap();
}

impl Three {
    async fn order(&self, only_measure: bool) -> Result<String, ClientError> {
        let request = OperationRequest::Live { to: "c".parse().unwrap(), only_measure };
        let view: OperationView = self.site.user.post("/v1/instances/n/operations", &request).await?;
        Ok(view.operation.id.to_string())
    }

    async fn take(&self, host: &Client, order: &str) -> Result<Spec, ClientError> {
        host.post(&format!("/v1/hosts/self/operations/{order}/take"), &()).await
    }

    async fn stay(&self, order: &str, generation: u64) -> StayAnswer {
        let request = StayRequest { generation: Generation(generation), why: "the test".into() };
        self.source.post(&format!("/v1/hosts/self/operations/{order}/stay"), &request).await.unwrap()
    }

    async fn now(&self) -> InstanceView {
        self.site.user.get("/v1/instances/n").await.unwrap()
    }
}

#[tokio::test]
async fn whoever_is_first_has_it() {
    let three = three().await;
    // It stays: nobody can take it any more, however often it is asked.
    let order = three.order(false).await.unwrap();
    for _ in 0..2 {
        assert_eq!(three.stay(&order, 1).await.moved, None);
        assert!(three.take(&three.target, &order).await.is_err());
    }
    let view: OperationView = three.site.user.get(&format!("/v1/operations/{order}")).await.unwrap();
    assert!(matches!(view.progress, OperationState::Failed { .. }), "{view:?}");
    let now = three.now().await;
    assert_eq!((now.host.as_str(), now.spec.generation), ("b", Generation(1)));

    // It is taken: it does not stay, and the answers are the same again.
    let order = three.order(false).await.unwrap();
    assert!(three.take(&three.stranger, &order).await.is_err(), "it goes to another host");
    assert!(three.take(&three.source, &order).await.is_err());
    for _ in 0..2 {
        let spec = three.take(&three.target, &order).await.unwrap();
        assert_eq!((spec.generation, &spec.arrival), (Generation(2), &None));
        assert_eq!(three.stay(&order, 1).await.moved, Some(Generation(2)));
    }
    let now = three.now().await;
    assert_eq!((now.host.as_str(), now.spec.generation), ("c", Generation(2)));
    // What the first host says counts for nothing any more.
    tell(&three.source, vec![running(&three.id, 1, three.version)], "10.0.2").await;
    assert!(three.now().await.observed.is_none_or(|seen| seen.generation == Generation(1)));
    // Had it come back to the first host meanwhile, what that one stopped for would still not be its own.
    tell(&three.target, vec![running(&three.id, 2, three.version)], "10.0.2").await;
}

#[tokio::test]
async fn only_who_has_to_do_with_it_gets_the_key() {
    let three = three().await;
    let order = three.order(false).await.unwrap();
    let path = format!("/v1/hosts/self/operations/{order}/private");
    let one = three.source.post::<PrivateGrant>(&path, &()).await.unwrap();
    let other = three.target.post::<PrivateGrant>(&path, &()).await.unwrap();
    assert_eq!(one.key.id(), other.key.id());
    assert!(three.stranger.post::<PrivateGrant>(&path, &()).await.is_err());
    three.stay(&order, 1).await;
    assert!(three.target.post::<PrivateGrant>(&path, &()).await.is_err(), "it is over");
}

#[tokio::test]
async fn what_cannot_go_on_there_is_not_begun() {
    let three = three().await;
    // A measurement moves nothing.
    let order = three.order(true).await.unwrap();
    assert!(three.take(&three.target, &order).await.is_err());
    three.stay(&order, 1).await;
    tell(&three.target, vec![], "9.2.0").await;
    let error = three.order(false).await.unwrap_err().to_string();
    assert!(error.contains("9.2.0"), "{error}");
    tell(&three.target, vec![], "10.0.2").await;
    let mut stopped = running(&three.id, 1, three.version);
    stopped.state = collective_model::State::Stopped;
    tell(&three.source, vec![stopped], "10.0.2").await;
    let error = three.order(false).await.unwrap_err().to_string();
    assert!(error.contains("does not run"), "{error}");
}

//! A plane whose packs are in a bucket of a real S3 server. No machine is started.

mod common;

use std::sync::Arc;
use std::time::Duration;

use collective_api::{ClientError, PlaneStatus, PlaneStore, StoreView};
use collective_keys::SigningKey;
use collective_plane::PlaneError;
use collective_store::SourceError;
use collective_store::cache::Cache;
use collective_store::depot::{Access, DepotError, Patience, Place};
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_testkit::{Fault, FaultyProxy, Seaweed, Weather};

use common::crowd::{self, check_all, collect, end, lease};
use common::{Site, manifest, sign};

fn access(port: u16) -> Access {
    let short = Duration::from_millis;
    Access {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        key_id: Some(Seaweed::KEY.into()),
        secret: Some(Seaweed::SECRET.into()),
        patience: Patience { request: short(4000), retries: 3, pause: short(50), total: short(2000) },
        ..Access::default()
    }
}

fn place(prefix: &str) -> Option<Place> {
    Some(format!("s3://{}/{prefix}", Seaweed::BUCKET).parse().unwrap())
}

async fn status(site: &Site) -> PlaneStatus {
    site.user.get("/v1/status").await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn publishers_and_collectors_at_once_in_a_bucket() {
    let server = Seaweed::start();
    let site = Site::try_open(tempfile::tempdir().unwrap(), place("crowd"), access(server.port())).await.unwrap();
    assert_eq!(status(&site).await.store.place, "s3://machines/crowd");
    crowd::publish_and_collect(Arc::new(site)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_has_one_plane_and_a_plane_keeps_to_its_store() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 1);
    let open = async |folder, store| Site::try_open(folder, store, access(proxy.port())).await;
    let fresh = || tempfile::tempdir().unwrap();

    proxy.set(Weather::Always(Fault::Busy));
    let (error, folder) = open(fresh(), place("one")).await.err().unwrap();
    assert!(error.to_string().contains("503"), "nobody claims a store that does not answer: {error}");
    proxy.set(Weather::Fair);

    let site = open(folder, place("one")).await.unwrap();
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(1).await;
    site.publish(sign(&manifest("1", image), &key), packs.clone()).await.unwrap();

    let (error, other) = open(fresh(), place("one")).await.err().unwrap();
    assert!(matches!(error, PlaneError::Store(DepotError::Owned { .. })), "{error}");
    assert!(error.to_string().contains("Choose another prefix"), "{error}");
    open(other, place("two")).await.unwrap();

    // Nothing said: what it was. Something else: only with the packs.
    let (error, folder) = open(site.close(), Some(Place::Local)).await.err().unwrap();
    assert!(error.to_string().contains("1 of those that its versions and backups need are not in"), "{error}");
    let (error, folder) = open(folder, place("three")).await.err().unwrap();
    assert!(matches!(error, PlaneError::Moved { missing: 1, .. }), "{error}");
    let site = open(folder, None).await.unwrap();
    assert_eq!(status(&site).await.store.place, "s3://machines/one");
    check_all(&site, &key).await;

    // Away when the plane starts again: it comes up, says so, and goes on when the store is back.
    proxy.set(Weather::Always(Fault::Busy));
    let site = open(site.close(), None).await.unwrap();
    assert!(status(&site).await.store.trouble.is_some_and(|trouble| trouble.contains("answers 503")));
    let path = format!("/v1/appliances/p/app/packs/{}", packs[0]);
    let error = site.user.get_range(&path, 0..9).await.unwrap_err();
    assert!(error.is_away() && error.status() == Some(503), "{error}");
    assert!(matches!(SourceError::from(error), SourceError::Away(why) if why.contains("s3://machines/one")));
    let error = site.try_upload(2).await.unwrap_err();
    assert!(error.is_away(), "{error}");
    let expired = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>";
    proxy.set(Weather::Answer("400 Bad Request", expired));
    let error = site.user.get_range(&path, 0..9).await.unwrap_err();
    assert!(error.is_away() && error.status() == Some(502), "a person has to act, and guests wait: {error}");
    assert!(error.to_string().contains("token has expired"), "{error}");
    proxy.set(Weather::Fair);
    site.user.get_range(&path, 0..9).await.unwrap();
    site.upload(2).await;
    assert!(status(&site).await.store.trouble.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_broken_off_is_no_obstacle() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 1);
    let opened = Site::try_open(tempfile::tempdir().unwrap(), place("broken"), access(proxy.port())).await;
    let site = opened.unwrap();
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(1).await;
    proxy.set(Weather::On("DELETE", Fault::Busy));
    let broken: Result<collective_api::Collected, ClientError> = site.user.post("/v1/store/collect", &()).await;
    let error = broken.unwrap_err();
    assert!(error.to_string().starts_with("cannot remove a pack from the store"), "{error}");
    let refused = site.publish(sign(&manifest("1", image), &key), packs.clone()).await.unwrap_err();
    assert!(refused.contains("is being removed"), "it may be gone at any instant: {refused}");
    assert!(site.try_upload(1).await.unwrap_err().is_away());
    proxy.set(Weather::Fair);
    site.upload(1).await;
    site.publish(sign(&manifest("1", image), &key), packs).await.unwrap();
    collect(&site).await;
    check_all(&site, &key).await;
}

/// Whatever happens on the way: errors can be read, wrong bytes are refused, what was acknowledged is whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_published_in_foul_weather_is_whole() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 3);
    let opened = Site::try_open(tempfile::tempdir().unwrap(), place("foul"), access(proxy.port())).await;
    let site = Arc::new(opened.unwrap());
    let key = Arc::new(SigningKey::generate().unwrap());
    let (image, packs) = site.upload(9).await;
    let first = site.publish(sign(&manifest("0", image), &key), packs).await.unwrap().digest;
    let faults =
        [Fault::Busy, Fault::Reset, Fault::Lost, Fault::Cut, Fault::Short, Fault::FlipRequest, Fault::FlipAnswer];
    proxy.set(Weather::Random(25, faults.into()));

    let publisher = |worker: u8| {
        let (site, key) = (site.clone(), key.clone());
        tokio::spawn(async move {
            let mut published = Vec::new();
            for round in 0..8u8 {
                let id = format!("w{worker}r{round}");
                lease(&site, &id).await;
                match site.try_upload(20 + 2 * (round + worker % 2)).await {
                    Ok((image, packs)) => {
                        let signed = sign(&manifest(&format!("{worker}.{round}"), image), &key);
                        match site.publish(signed, packs).await {
                            Ok(view) => published.push(view.digest),
                            Err(why) => assert!(readable(&why), "{why}"),
                        }
                    }
                    Err(error) => assert!(readable(&error.to_string()), "{error}"),
                }
                end(&site, &id).await;
            }
            published
        })
    };
    let reader = |worker: u8| {
        let site = site.clone();
        tokio::spawn(async move {
            let mut whole = 0;
            for _ in 0..12 {
                match read(&site, first, image).await {
                    Ok(()) => whole += 1,
                    Err(why) => assert!(readable(&why), "reader {worker}: {why}"),
                }
            }
            whole
        })
    };
    let collector = {
        let site = site.clone();
        tokio::spawn(async move {
            for _ in 0..20 {
                let collected: Result<collective_api::Collected, ClientError> =
                    site.user.post("/v1/store/collect", &()).await;
                collected.map_or_else(|error| assert!(readable(&error.to_string()), "{error}"), drop);
            }
        })
    };
    let publishers: Vec<_> = (0..3).map(publisher).collect();
    let readers: Vec<_> = (0..2).map(reader).collect();
    let mut published = Vec::new();
    for publisher in publishers {
        published.extend(publisher.await.unwrap());
    }
    let mut whole = 0;
    for reader in readers {
        whole += reader.await.unwrap();
    }
    collector.await.unwrap();
    eprintln!("{} published, {whole} of 24 readings whole, through {:?}", published.len(), proxy.happened());
    assert!(published.len() > 3 && whole > 0 && proxy.happened().len() == 7, "the test itself");

    proxy.set(Weather::Fair);
    collect(&site).await;
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    assert!(view.missing.is_empty(), "{:?}", view.missing);
    assert!(published.iter().all(|digest| view.versions.iter().any(|version| version.digest == *digest)));
    check_all(&site, &key).await;
}

/// As a host does with an empty cache; every frame is compared with its digest.
async fn read(site: &Site, version: collective_model::Digest, image: collective_model::Digest) -> Result<(), String> {
    let folder = tempfile::tempdir().unwrap();
    let source = PlaneStore::new(Arc::new(site.user.another()), folder.path());
    let store = FrameStore::new(Cache::open(folder.path()).unwrap(), Arc::new(source));
    store.add_version(&"p/app".parse().unwrap(), &version).await;
    let map = ImageMap::load(&store, image).await.map_err(|error| error.to_string())?;
    store.check(&map.frames().collect::<Vec<_>>(), &|_| {}).await.map(drop).map_err(|error| error.to_string())
}

/// What was attempted, and what to do or why it is refused.
fn readable(why: &str) -> bool {
    ["cannot ", "is refused", "not complete", "is being removed", "there is no pack", "in none of the version"]
        .iter()
        .any(|part| why.contains(part))
}

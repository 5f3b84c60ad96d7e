//! Many at one store.

use std::sync::Arc;

use collective_api::{Collected, PlaneStore, StoreView};
use collective_keys::SigningKey;
use collective_model::Manifest;
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;

use super::{Site, manifest, sign};

pub async fn collect(site: &Site) -> Collected {
    site.user.post("/v1/store/collect", &()).await.unwrap()
}

pub async fn lease(site: &Site, id: &str) {
    site.user.put::<()>(&format!("/v1/appliances/p/app/leases/{id}"), &()).await.unwrap();
}

pub async fn end(site: &Site, id: &str) {
    site.user.delete::<()>(&format!("/v1/appliances/p/app/leases/{id}")).await.unwrap();
}

/// Publishers, collectors and withdrawals, all at once: what was acknowledged can be read.
pub async fn publish_and_collect(site: Arc<Site>) {
    let key = SigningKey::generate().unwrap();
    let (image, packs) = site.upload(9).await;
    site.publish(sign(&manifest("0", image), &key), packs).await.unwrap();
    let key = Arc::new(key);
    let publisher = |worker: u8| {
        let (site, key) = (site.clone(), key.clone());
        tokio::spawn(async move {
            for round in 0..12u8 {
                // What goes is content that workers have in common: one finds what another sent, or what is condemned.
                let stays = round % 3 == 0;
                let content = if stays { 20 + 26 * worker + 2 * round } else { 2 * (round % 3) };
                let id = format!("w{worker}r{round}");
                lease(&site, &id).await;
                let (image, packs) = site.upload(content).await;
                let signed = sign(&manifest(&format!("{worker}.{round}"), image), &key);
                let view = site.publish(signed, packs).await.unwrap();
                end(&site, &id).await;
                if !stays {
                    site.user.delete::<()>(&format!("/v1/versions/{}", view.digest)).await.unwrap();
                }
            }
        })
    };
    let publishers: Vec<_> = (0..3).map(publisher).collect();
    let collectors: Vec<_> = (0..2)
        .map(|_| {
            let site = site.clone();
            tokio::spawn(async move {
                let mut removed = 0;
                loop {
                    removed += collect(&site).await.removed.len();
                    let view: StoreView = site.user.get("/v1/store").await.unwrap();
                    if view.versions.len() == 13 {
                        return removed;
                    }
                }
            })
        })
        .collect();
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let mut removed = 0;
    for collector in collectors {
        removed += collector.await.unwrap();
    }
    removed += collect(&site).await.removed.len();
    assert!(removed >= 2, "what was withdrawn is gone");
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    assert!(view.missing.is_empty(), "{:?}", view.missing);
    assert!(view.packs.iter().all(|pack| !pack.versions.is_empty()));
    check_all(&site, &key).await;
}

/// Reads every version back, as a host does, and compares every frame with its digest.
pub async fn check_all(site: &Site, key: &SigningKey) {
    let view: StoreView = site.user.get("/v1/store").await.unwrap();
    for version in view.versions {
        let folder = tempfile::tempdir().unwrap();
        let source = PlaneStore::new(Arc::new(site.user.another()), folder.path());
        let store = FrameStore::new(Cache::open(folder.path()).unwrap(), Arc::new(source));
        store.add_version(&version.appliance, &version.digest).await;
        let detail: collective_api::VersionDetail =
            site.user.get(&format!("/v1/versions/{}", version.digest)).await.unwrap();
        assert_eq!(detail.manifest.key, key.public());
        let manifest = Manifest::parse(detail.manifest.payload.as_bytes()).unwrap();
        let map = ImageMap::load(&store, manifest.images()[0].image).await.unwrap();
        store.check(&map.frames().collect::<Vec<_>>(), &|_| {}).await.unwrap();
    }
}

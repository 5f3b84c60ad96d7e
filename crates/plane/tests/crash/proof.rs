//! What the next process finds, and that it can go on from there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use collective_api::{ChannelHead, PackWaste, StoreView};
use collective_keys::{ChannelPointer, Kind};
use collective_model::Digest;
use collective_testkit::Objects;

use super::Seen;
use super::disk::disk;
use super::life::{expected, open, process};
use super::maker::{Maker, pack_key};
use super::world::{Shared, Version, Withdrawal};

/// Opens what survived, and proves that all is well.
pub fn prove(data: &Path, objects: &Objects, part: Option<usize>, world: &Shared, seen: &mut Seen) {
    process(async {
        objects.restart().await;
        world.lock().unwrap().begin();
        let maker = open(data, objects, part, world).await.unwrap();
        mend_all(&maker).await;
        let versions = visible(&maker).await;
        told(world, &versions, seen);
        channels(&maker, &versions).await;
        // What a repack left is removed, or taken up.
        if versions.len() % 2 == 0 {
            maker.repack().await.unwrap();
        }
        collected(&maker, seen).await;
        readable(&maker, &versions).await;
        settle(world, &versions);
        again(&maker, seen).await;
        maker.repack().await.unwrap();
        let wasted: Vec<PackWaste> = maker.client.get("/v1/store/repack").await.unwrap();
        assert!(wasted.is_empty(), "{wasted:?}");
        collected(&maker, seen).await;
        readable(&maker, &visible(&maker).await).await;
    });
}

/// What was damaged on purpose is repaired as a person would.
async fn mend_all(maker: &Maker) {
    let damaged: Vec<String> = maker.world.lock().unwrap().damaged.iter().cloned().collect();
    for key in damaged {
        maker.mend(&key).await.unwrap();
    }
}

/// For hosts that never saw a version, and for those that know where it was.
async fn readable(maker: &Maker, versions: &BTreeMap<Version, Digest>) {
    for ((appliance, number), digest) in versions {
        let (new, old) = (maker.read(appliance, *digest).await, maker.read_with_old_lists(appliance, *digest).await);
        for found in [new.unwrap(), old.unwrap()] {
            assert!(found == *disk(*number), "{appliance}:{number} is not what was published");
        }
    }
}

async fn visible(maker: &Maker) -> BTreeMap<Version, Digest> {
    let view: StoreView = maker.client.get("/v1/store").await.unwrap();
    assert!(view.missing.is_empty(), "versions refer to packs that are gone: {:?}", view.missing);
    let number = |name: &str| name.parse::<u64>().unwrap();
    view.versions.into_iter().map(|known| ((known.appliance, number(known.version.as_str())), known.digest)).collect()
}

/// Compares what makers were told with what is there.
fn told(world: &Shared, versions: &BTreeMap<Version, Digest>, seen: &mut Seen) {
    let world = world.lock().unwrap();
    for (version, record) in &world.records {
        let is_there = versions.contains_key(version);
        if let Some(must) = expected(record) {
            assert_eq!(is_there, must, "{version:?} {record:?}");
        }
        seen.unanswered += usize::from(!record.published);
        seen.whole_without_answer += usize::from(!record.published && is_there);
    }
    assert!(versions.keys().all(|version| world.records.contains_key(version)), "nobody published {versions:?}");
}

async fn channels(maker: &Maker, versions: &BTreeMap<Version, Digest>) {
    let (heads, pointed) = {
        let world = maker.world.lock().unwrap();
        (world.heads.clone(), world.pointed.clone())
    };
    for (appliance, (serial, _)) in heads {
        let path = format!("/v1/appliances/{appliance}/channels/stable");
        let head: ChannelHead = maker.client.get(&path).await.unwrap();
        let pointer: ChannelPointer = head.pointer.verified_json(Kind::Channel).unwrap();
        assert!(pointer.serial >= serial, "the channel of {appliance} went back");
        let to = versions.iter().find(|(_, digest)| **digest == pointer.version).expect("a version that is there").0;
        assert!(pointed.contains(&(appliance, pointer.serial, to.1)), "nobody moved the channel there");
    }
}

/// When all publishers have ended, nothing stays that no version refers to, and nothing goes that one does.
async fn collected(maker: &Maker, seen: &mut Seen) {
    let leases = std::mem::take(&mut maker.world.lock().unwrap().leases);
    for (appliance, id) in leases {
        maker.client.delete::<()>(&format!("/v1/appliances/{appliance}/leases/{id}")).await.unwrap();
    }
    let first = maker.collect().await.unwrap();
    seen.removed += first.removed.len();
    assert!(first.waiting.is_empty(), "nobody is at work: {:?}", first.waiting);
    let view: StoreView = maker.client.get("/v1/store").await.unwrap();
    assert!(view.missing.is_empty(), "{:?}", view.missing);
    let mut needed = BTreeSet::new();
    for pack in &view.packs {
        assert!(!pack.versions.is_empty(), "pack {} is left over", pack.digest);
        let bytes = maker.objects.content(&pack_key(&pack.appliance, &pack.digest)).await.unwrap();
        assert!(Digest::of(&bytes) == pack.digest, "pack {} is damaged", pack.digest);
        needed.insert(pack.digest);
    }
    assert!(maker.collect().await.unwrap().removed.is_empty());
}

/// From here on it is known what happened to what was not answered.
fn settle(world: &Shared, versions: &BTreeMap<Version, Digest>) {
    for (version, record) in &mut world.lock().unwrap().records {
        let is_there = versions.contains_key(version);
        record.published |= is_there;
        record.withdrawal = match record.withdrawal {
            Withdrawal::Tried if is_there => Withdrawal::No,
            Withdrawal::Tried => Withdrawal::Done,
            known => known,
        };
    }
}

/// What came to nothing is repeated and succeeds; so does what had succeeded.
async fn again(maker: &Maker, seen: &mut Seen) {
    let versions: Vec<(Version, bool)> = {
        let world = maker.world.lock().unwrap();
        let stays = world.records.iter().filter(|(_, record)| record.withdrawal == Withdrawal::No);
        stays.map(|(version, record)| (version.clone(), record.published)).collect()
    };
    let repeated = versions.iter().filter(|(_, published)| !published).chain(versions.last());
    for (version, _) in repeated {
        maker.publish(version).await.unwrap_or_else(|why| panic!("{version:?} cannot be repeated: {why}"));
        let digest = visible(maker).await[version];
        assert!(maker.read(&version.0, digest).await.unwrap() == *disk(version.1));
    }
    seen.removed += maker.collect().await.unwrap().removed.len();
}

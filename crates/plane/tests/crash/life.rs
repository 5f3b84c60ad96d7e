//! One life of a plane: everybody at work, until it dies.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use collective_api::{Client, Endpoint, StoreView};
use collective_model::{ApplianceName, Digest};
use collective_plane::{Listening, Plane, PlaneConfig, PlaneError, serve};
use collective_store::depot::{Access, Depot};
use collective_testkit::{Dice, Objects};
use futures_util::future::{BoxFuture, FutureExt, join_all};
use tokio::sync::Notify;

use super::disk::disk;
use super::maker::{Maker, pack_key};
use super::world::{Shared, Withdrawal, answered};

/// Nothing takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

pub fn appliances() -> [ApplianceName; 2] {
    ["p/one", "p/two"].map(|name| name.parse().unwrap())
}

/// A process of its own, as far as a test can have one: all of it ends with its runtime.
pub fn process<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(LIMIT, work).await }).expect("it hangs")
}

/// Opens the plane in `data` and serves it.
pub async fn open(data: &Path, objects: &Objects, part: Option<usize>, world: &Shared) -> Result<Maker, PlaneError> {
    let config = PlaneConfig {
        data: data.to_owned(),
        machine_key: data.join("machine.key"),
        store: None,
        s3: Access::default(),
        address: Some("127.0.0.1:1".into()),
    };
    let depot = Depot::over(Arc::new(objects.clone()), "in memory".into(), part);
    let (plane, tls) = Plane::open_over(&config, depot).await?;
    let socket = data.join("socket");
    tokio::spawn(serve(plane, tls, Listening { socket: socket.clone(), tcp: None }));
    let client = Client::new(Endpoint::Unix(socket), None);
    while client.get::<serde_json::Value>("/v1/status").await.is_err() {
        tokio::task::yield_now().await;
    }
    Ok(Maker { client, objects: objects.clone(), world: world.clone(), loses_lease: false })
}

/// Lets everybody work until the plane dies; `left` gets what is on the disk at that instant, as after a power cut where
/// `power` says so. True if it died before the work was done.
pub fn life(
    data: &Path,
    objects: &Objects,
    part: Option<usize>,
    world: &Shared,
    dice: &mut Dice,
    (left, power): (PathBuf, bool),
) -> bool {
    let died = Arc::new(Notify::new());
    let at_death = {
        let (died, world, data) = (died.clone(), world.clone(), data.to_owned());
        move || {
            world.lock().unwrap().die();
            copy_disk(&data, &left, power);
            died.notify_one();
        }
    };
    let (operations, changes, percent) = (dice.roll(160), dice.roll(25), *dice.pick(&[0, 0, 3, 12]));
    let (early, seed) = (dice.percent(15), dice.roll(u64::MAX));
    let aged = dice.percent(60).then(|| dice.pick(&appliances()).clone());
    let (soon, later) = if early { (dice.roll(6), percent) } else { (operations, 0) };
    world.lock().unwrap().begin();
    process(async {
        if early {
            objects.fail(later);
            objects.die_after(soon, at_death);
            let work = async {
                if let Ok(maker) = open(data, objects, part, world).await {
                    work(&maker, seed).await;
                }
            };
            return until_death(work, objects, &died).await;
        }
        // It may be a first start, and that has to succeed once.
        let maker = open(data, objects, part, world).await.unwrap();
        if let Some(appliance) = aged {
            age(&maker, &appliance).await;
        }
        objects.fail(percent);
        match operations % 2 {
            0 => objects.die_after(operations, at_death),
            _ => objects.die_after_changes(changes, at_death),
        }
        until_death(work(&maker, seed), objects, &died).await
    })
}

async fn until_death(work: impl Future<Output = ()>, objects: &Objects, died: &Notify) -> bool {
    tokio::select! {
        () = died.notified() => true,
        () = work => {
            objects.die();
            false
        }
    }
}

/// The plane's folder as it is now. The log of the database ends where it was written to; after a power cut the end may
/// be torn.
fn copy_disk(data: &Path, copy: &Path, torn: bool) {
    std::fs::create_dir_all(copy).unwrap();
    let content = |name: &str| std::fs::read(data.join(name)).ok();
    for name in ["certificate.pem", "certificate.key"] {
        content(name).into_iter().for_each(|bytes| std::fs::write(copy.join(name), bytes).unwrap());
    }
    loop {
        // Its threads may write a little longer than a process would.
        let (database, log) = (content("plane.db"), content("plane.db-wal"));
        if database != content("plane.db") {
            continue;
        }
        let tail = |log: &Vec<u8>| Dice::new(log.len() as u64).bytes(log.len() % 5000);
        let log = log.map(|log| if torn { [&log[..], &tail(&log)].concat() } else { log });
        database.into_iter().for_each(|bytes| std::fs::write(copy.join("plane.db"), bytes).unwrap());
        log.into_iter().for_each(|bytes| std::fs::write(copy.join("plane.db-wal"), bytes).unwrap());
        break;
    }
    copy_cache(&data.join("cache"), &copy.join("cache"));
}

fn copy_cache(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).into_iter().flatten().map(Result::unwrap) {
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_cache(&entry.path(), &to),
            // It may be renamed just now.
            false => _ = std::fs::copy(entry.path(), to),
        }
    }
}

/// Versions come and go, until little is used of what the first of them brought.
async fn age(maker: &Maker, appliance: &ApplianceName) {
    for round in 0..4 {
        let version = (appliance.clone(), maker.world.lock().unwrap().next());
        maker.publish(&version).await.unwrap();
        for (known, digest) in maker.unneeded().await.unwrap() {
            if round == 3 && known.0 == *appliance && known != version {
                maker.withdraw(&known, digest).await.unwrap();
            }
        }
    }
}

async fn work(maker: &Maker, seed: u64) {
    let dice = |of: u64| Dice::new(seed ^ of);
    let all: Vec<BoxFuture<()>> = vec![
        publish(maker.another(), dice(1)).boxed(),
        publish(maker.another(), dice(2)).boxed(),
        clean(maker.another(), dice(3)).boxed(),
        read(maker.another(), dice(4)).boxed(),
    ];
    join_all(all).await;
}

/// What people are told must say what was attempted, or why it is refused.
fn readable(why: &str) {
    let parts = ["cannot ", "refused", "not complete", "being removed", "there is no pack", "in none of", "not within"];
    let more = [
        "damaged",
        "withdrawn",
        "not published",
        "serials never fall",
        "no version",
        "needed by",
        "just now",
        "published already",
    ];
    assert!(parts.iter().chain(&more).any(|part| why.contains(part)), "{why}");
}

async fn publish(mut maker: Maker, mut dice: Dice) {
    for _ in 0..3 {
        maker.loses_lease = dice.percent(25);
        let version = (dice.pick(&appliances()).clone(), maker.world.lock().unwrap().next());
        // Two at once: somebody was impatient.
        let twin = dice.percent(20).then(|| maker.another());
        let twin = async {
            if let Some(maker) = &twin {
                maker.publish(&version).await.unwrap_or_else(|why| readable(&why));
            }
        };
        let stubborn = async {
            for _ in 0..2 {
                match maker.publish(&version).await {
                    Ok(()) => break,
                    Err(why) => readable(&why),
                }
            }
        };
        maker.world.lock().unwrap().at_work.insert(version.clone());
        tokio::join!(twin, stubborn);
        maker.world.lock().unwrap().at_work.remove(&version);
        if dice.percent(40) {
            maker.point(&version).await.unwrap_or_else(|why| readable(&why));
        }
    }
}

async fn clean(maker: Maker, mut dice: Dice) {
    for _ in 0..12 {
        let done = match dice.roll(6) {
            0 | 1 => withdraw(&maker, &mut dice).await,
            2 => damage_and_mend(&maker, &mut dice).await,
            3 => maker.repack().await,
            4 => maker.prune().await.map(drop),
            _ => maker.collect().await.map(drop),
        };
        done.unwrap_or_else(|why| readable(&why));
        maker.objects.instant().await;
    }
}

async fn withdraw(maker: &Maker, dice: &mut Dice) -> Result<(), String> {
    let found = maker.unneeded().await?;
    if found.is_empty() {
        return Ok(());
    }
    let (version, digest) = dice.pick(&found);
    maker.withdraw(version, *digest).await
}

/// A disk ages below the store; then somebody repairs it.
async fn damage_and_mend(maker: &Maker, dice: &mut Dice) -> Result<(), String> {
    let view: StoreView = maker.client.get("/v1/store").await.map_err(|error| error.to_string())?;
    if view.packs.is_empty() {
        return Ok(());
    }
    let pack = dice.pick(&view.packs);
    let key = &pack_key(&pack.appliance, &pack.digest);
    // Somebody may be writing it, or removing it.
    let sound = maker.objects.content(key).await.filter(|bytes| Digest::of(bytes) == pack.digest);
    let Some(sound) = sound else { return Ok(()) };
    let mut bytes = sound.to_vec();
    let anywhere = dice.roll(bytes.len() as u64) as usize;
    match dice.roll(3) {
        0 => bytes.truncate(anywhere),
        1 => bytes[anywhere] ^= 1,
        // In the directory.
        _ => {
            let at = bytes.len() - 1 - dice.roll(500) as usize % bytes.len();
            bytes[at] ^= 1;
        }
    }
    let mut dead = true;
    answered(&maker.world, |world| {
        dead = false;
        world.packs.insert(key.clone(), sound);
        world.damaged.insert(key.clone());
    });
    if !dead {
        maker.objects.replace(key, Some(bytes.into())).await;
    }
    maker.objects.instant().await;
    if dice.percent(50) {
        // Nobody has noticed.
        maker.prune().await.map_or_else(|why| readable(&why), drop);
    }
    maker.mend(key).await
}

async fn read(maker: Maker, mut dice: Dice) {
    for _ in 0..3 {
        let view: Result<StoreView, _> = maker.client.get("/v1/store").await;
        let view = match view {
            Ok(view) if !view.versions.is_empty() => view,
            Ok(_) => continue,
            Err(error) => {
                readable(&error.to_string());
                continue;
            }
        };
        let known = dice.pick(&view.versions);
        let found = match dice.percent(50) {
            true => maker.read(&known.appliance, known.digest).await,
            false => maker.read_with_old_lists(&known.appliance, known.digest).await,
        };
        match found {
            Ok(found) => assert!(found == *disk(known.version.as_str().parse().unwrap())),
            Err(why) => readable(&why),
        }
    }
}

/// Whether a version must be there, must not, or may.
pub fn expected(record: &super::world::Record) -> Option<bool> {
    match (record.published, record.withdrawal) {
        (true, Withdrawal::No) => Some(true),
        (_, Withdrawal::Done) => Some(false),
        _ => None,
    }
}

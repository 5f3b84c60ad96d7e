//! The store in a bucket of a real S3 server, in fair weather and in foul.

use std::io::{BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest, InstanceId};
use collective_store::depot::{Access, Bucket, Depot, DepotError, Patience, Place, TroubleKind};
use collective_store::pack::{EntryKind, PackBuilder};
use collective_store::seal::Seal;
use collective_store::{Encoding, encode};
use collective_testkit::{Fault, FaultyProxy, Seaweed, Weather};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};

fn access(port: u16) -> Access {
    let short = Duration::from_millis;
    Access {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        region: None,
        key_id: Some(Seaweed::KEY.into()),
        secret: Some(Seaweed::SECRET.into()),
        session_token: None,
        patience: Patience { request: short(4000), retries: 4, pause: short(100), total: short(3000) },
    }
}

fn bucket(prefix: &str) -> Bucket {
    match format!("s3://{}/{prefix}", Seaweed::BUCKET).parse().unwrap() {
        Place::S3(bucket) => bucket,
        Place::Local => unreachable!(),
    }
}

fn depot(port: u16, prefix: &str) -> Depot {
    Depot::s3(&bucket(prefix), &access(port)).unwrap()
}

/// The same bucket, for what the depot would not do.
fn raw(port: u16) -> impl ObjectStore {
    let builder = AmazonS3Builder::new().with_bucket_name(Seaweed::BUCKET).with_region("us-east-1");
    let builder = builder.with_access_key_id(Seaweed::KEY).with_secret_access_key(Seaweed::SECRET);
    builder.with_endpoint(format!("http://127.0.0.1:{port}")).with_allow_http(true).build().unwrap()
}

fn appliance() -> ApplianceName {
    "demo/notes".parse().unwrap()
}

/// A pack of that many frames of 128 KiB that do not compress.
fn pack(frames: u64, seed: u64) -> (Digest, Bytes) {
    let mut builder = PackBuilder::default();
    let mut random = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    for _ in 0..frames {
        let mut frame = vec![0; 128 << 10];
        random.fill(&mut frame);
        let (encoding, stored) = encode(&frame);
        builder.add(EntryKind::Data, Digest::of(&frame), encoding, &stored, frame.len() as u32);
    }
    let pack = builder.finish();
    (pack.digest, pack.bytes.into())
}

async fn whole(depot: &Depot, digest: &Digest) -> Result<Bytes, DepotError> {
    let size = depot.pack_size(&appliance(), digest).await?;
    depot.read(&appliance(), digest, 0..size).await
}

fn kind(error: &DepotError) -> Option<TroubleKind> {
    if let DepotError::Backend(trouble) = error { Some(trouble.kind) } else { None }
}

#[tokio::test(flavor = "multi_thread")]
async fn packs_go_in_and_come_out_and_damaged_ones_are_replaced() {
    let server = Seaweed::start();
    let depot = depot(server.port(), "a/b");
    let raw = raw(server.port());
    // One object; four parts.
    for (digest, bytes) in [pack(3, 1), pack(200, 2)] {
        let name = appliance();
        let put = || depot.put_pack(&name, digest, bytes.clone());
        let (one, two, three) = tokio::join!(put(), put(), put());
        one.and(two).and(three).unwrap();
        assert!(whole(&depot, &digest).await.unwrap() == bytes);
        let size = bytes.len() as u64;
        assert_eq!(depot.pack_info(&name, &digest).await.unwrap().size, size);
        for range in [0..size + 1, size..size + 1, 8..u64::MAX, 9..9] {
            let error = depot.read(&name, &digest, range.clone()).await.unwrap_err();
            assert!(matches!(error, DepotError::Range(_)), "{range:?}: {error}");
        }
        assert!(depot.trouble().is_none());

        let mut damaged = bytes.to_vec();
        damaged[1000] ^= 4;
        let key = Key::from(format!("a/b/packs/demo/notes/{digest}"));
        raw.put(&key, damaged.into()).await.unwrap();
        assert!(whole(&depot, &digest).await.unwrap() != bytes);
        put().await.unwrap();
        assert!(whole(&depot, &digest).await.unwrap() == bytes, "sent again, it is whole again");
        raw.put(&key, bytes.slice(..500).into()).await.unwrap();
        put().await.unwrap();
        assert!(whole(&depot, &digest).await.unwrap() == bytes);
        assert!(matches!(
            depot.read(&"demo/other".parse::<ApplianceName>().unwrap(), &digest, 0..9).await.unwrap_err(),
            DepotError::Missing(_)
        ));
    }
    let mut listed: Vec<_> = depot.list().await.unwrap().into_iter().map(|(_, digest, size)| (digest, size)).collect();
    let mut sent: Vec<_> = [pack(3, 1), pack(200, 2)].map(|(digest, bytes)| (digest, bytes.len() as u64)).into();
    listed.sort();
    sent.sort();
    assert_eq!(listed, sent);
    for (digest, _) in sent {
        depot.remove_pack(&appliance(), &digest).await.unwrap();
        depot.remove_pack(&appliance(), &digest).await.unwrap();
        assert!(matches!(whole(&depot, &digest).await.unwrap_err(), DepotError::Missing(_)));
    }
    assert!(depot.list().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn private_packs_lie_apart_and_nothing_readable_gets_there() {
    let server = Seaweed::start();
    let depot = depot(server.port(), "private-data");
    let owner = InstanceId::from_random([7; 16]);
    let seal = Seal::new(&[1; 32]);
    let mut builder = PackBuilder::default();
    for frame in [[1; 4096], [2; 4096]] {
        let name = seal.name(&frame);
        let sealed = seal.seal(&name, EntryKind::Data, &frame, 3).unwrap();
        builder.add(EntryKind::Data, name, Encoding::Sealed, &sealed, sealed.len() as u32);
    }
    let sealed = builder.finish();
    let (digest, bytes) = (sealed.digest, Bytes::from(sealed.bytes));
    depot.put_pack(&owner, digest, bytes.clone()).await.unwrap();
    assert_eq!(depot.read(&owner, &digest, 8..100).await.unwrap(), bytes.slice(8..100));
    assert_eq!(depot.pack_info(&owner, &digest).await.unwrap().size, bytes.len() as u64);
    assert_eq!(depot.list_private().await.unwrap(), [(owner.clone(), digest, bytes.len() as u64)]);
    assert!(depot.list().await.unwrap().is_empty());
    let other = InstanceId::from_random([8; 16]);
    assert!(matches!(depot.read(&other, &digest, 0..9).await.unwrap_err(), DepotError::Missing(_)));
    // Each kind of pack is refused in the other's place.
    let (open, open_bytes) = pack(2, 3);
    assert!(matches!(depot.put_pack(&owner, open, open_bytes).await.unwrap_err(), DepotError::Unsound { .. }));
    assert!(matches!(depot.put_pack(&appliance(), digest, bytes).await.unwrap_err(), DepotError::Unsound { .. }));
    depot.remove_pack(&owner, &digest).await.unwrap();
    assert!(depot.list_private().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_told_so_at_once_and_no_secret_is_shown() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 1);
    let (digest, bytes) = pack(1, 1);
    let refused = async |access: &Access, bucket: &Bucket| {
        let begun = Instant::now();
        let depot = Depot::s3(bucket, access).unwrap();
        let error = depot.put_pack(&appliance(), digest, bytes.clone()).await.unwrap_err();
        let read = depot.read(&appliance(), &digest, 0..9).await.unwrap_err();
        assert_eq!(kind(&error), kind(&read), "{error} | {read}");
        assert!(begun.elapsed() < Duration::from_secs(3), "nothing to wait for: {error}");
        assert_eq!(depot.trouble().map(|trouble| trouble.kind), kind(&error));
        let text = format!("{error} | {read} | {error:?} | {read:?}");
        assert!(!text.contains("hunter2") && !text.contains(Seaweed::SECRET), "{text}");
        (kind(&error).unwrap(), error.to_string())
    };
    let mut wrong = access(proxy.port());
    wrong.secret = Some("hunter2".into());
    let (kind, text) = refused(&wrong, &bucket("a")).await;
    assert_eq!(kind, TroubleKind::Denied);
    assert!(text.contains("SignatureDoesNotMatch") && text.contains("AWS_SECRET_ACCESS_KEY"), "{text}");
    wrong.key_id = Some("nobody".into());
    let (kind, text) = refused(&wrong, &bucket("a")).await;
    assert!(kind == TroubleKind::Denied && text.contains("InvalidAccessKeyId"), "{text}");

    let Place::S3(elsewhere) = "s3://not-there/a".parse().unwrap() else { unreachable!() };
    let (kind, text) = refused(&access(proxy.port()), &elsewhere).await;
    assert!(kind == TroubleKind::NoBucket && text.contains("make the bucket"), "{text}");

    // As Amazon words it; it quotes the token.
    let expired = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message>\
                   <Token-0>hunter2</Token-0></Error>";
    proxy.set(Weather::Answer("400 Bad Request", expired));
    let mut token = access(proxy.port());
    token.session_token = Some("hunter2".into());
    let (kind, text) = refused(&token, &bucket("a")).await;
    assert!(kind == TroubleKind::Denied && text.contains("token has expired"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_belongs_to_one_plane() {
    let server = Seaweed::start();
    let claimants = (0..12).map(|plane| {
        let depot = depot(server.port(), "shared").owned_by(&format!("plane{plane}"), false);
        tokio::spawn(async move { (depot.claimed().await, depot) })
    });
    let mut owners = Vec::new();
    for claimant in claimants.collect::<Vec<_>>() {
        match claimant.await.unwrap() {
            (Ok(()), depot) => owners.push(depot),
            (Err(error), depot) => {
                assert!(matches!(error, DepotError::Owned { .. }), "{error}");
                let (digest, bytes) = pack(1, 7);
                let put = depot.put_pack(&appliance(), digest, bytes).await.unwrap_err();
                assert!(put.to_string().contains("belongs to the plane plane"), "{put}");
                assert!(depot.remove_pack(&appliance(), &digest).await.is_err());
            }
        }
    }
    assert_eq!(owners.len(), 1);
    let (digest, bytes) = pack(1, 1);
    owners[0].put_pack(&appliance(), digest, bytes).await.unwrap();

    // Another prefix of the same bucket is another store, also one below or above.
    depot(server.port(), "shared/below").owned_by("other", false).claimed().await.unwrap();

    raw(server.port()).delete(&Key::from("shared/plane.json")).await.unwrap();
    let error = depot(server.port(), "shared").owned_by("other", false).claimed().await.unwrap_err();
    assert!(matches!(error, DepotError::Unclaimed { .. }), "{error}");
    depot(server.port(), "shared").owned_by("other", true).claimed().await.unwrap();
}

/// A server that takes every PUT, whatever its condition.
fn careless_server() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer = |mut stream: std::net::TcpStream| {
        let mut request = BufReader::new(stream.try_clone().unwrap());
        let head: Vec<String> =
            request.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
        let length = head.iter().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        std::io::copy(&mut request.take(length.unwrap_or(0)), &mut std::io::sink()).unwrap();
        let (status, body) = match head[0].split(' ').collect::<Vec<_>>()[..] {
            ["PUT", ..] => ("200 OK", ""),
            ["GET", path, _] if path.contains("list-type") => {
                ("200 OK", "<ListBucketResult><Name>machines</Name><IsTruncated>false</IsTruncated></ListBucketResult>")
            }
            _ => ("404 Not Found", "<Error><Code>NoSuchKey</Code></Error>"),
        };
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nConnection: close\r\nETag: \"1\"\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
    };
    std::thread::spawn(move || listener.incoming().flatten().for_each(answer));
    port
}

#[tokio::test]
async fn a_server_that_ignores_conditions_is_refused() {
    let error = depot(careless_server(), "a").owned_by("me", false).claimed().await.unwrap_err();
    assert!(matches!(error, DepotError::Unconditional { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_away_is_said_to_be_and_comes_back() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 1);
    let depot = depot(proxy.port(), "away").owned_by("me", false);
    let (digest, bytes) = pack(2, 1);
    depot.put_pack(&appliance(), digest, bytes.clone()).await.unwrap();
    for fault in [Fault::Busy, Fault::Reset, Fault::Lost, Fault::Cut, Fault::Short, Fault::Silent] {
        proxy.set(Weather::Always(fault));
        let begun = Instant::now();
        let error = depot.read(&appliance(), &digest, 0..bytes.len() as u64).await.unwrap_err();
        assert_eq!(kind(&error), Some(TroubleKind::Away), "{fault:?}: {error}");
        assert!(begun.elapsed() < Duration::from_secs(40), "{fault:?}: given up after {:?}", begun.elapsed());
        let text = error.to_string();
        assert!(text.starts_with("cannot read a pack from the store s3://machines/away: "), "{fault:?}: {text}");
        assert!(text.contains("machines go on"), "{fault:?}: {text}");
        eprintln!("{fault:?} after {:?}: {text}", begun.elapsed());
        assert!(depot.trouble().is_some());
        proxy.set(Weather::Fair);
        assert!(whole(&depot, &digest).await.unwrap() == bytes);
        assert!(depot.trouble().is_none());
    }
    proxy.set(Weather::Always(Fault::Slow));
    assert!(whole(&depot, &digest).await.unwrap() == bytes, "slow is not away");
    drop(server);
    let error = depot.read(&appliance(), &digest, 0..9).await.unwrap_err();
    assert_eq!(kind(&error), Some(TroubleKind::Away), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_falsified_on_the_way_to_the_store_is_not_taken() {
    let server = Seaweed::start();
    let proxy = FaultyProxy::to(server.port(), 1);
    let depot = depot(proxy.port(), "false");
    // One object; parts.
    for (digest, bytes) in [pack(3, 1), pack(80, 2)] {
        proxy.set(Weather::Always(Fault::FlipRequest));
        let error = depot.put_pack(&appliance(), digest, bytes.clone()).await.unwrap_err();
        assert!(error.to_string().contains("BadDigest"), "{error}");
        proxy.set(Weather::Fair);
        assert!(matches!(whole(&depot, &digest).await.unwrap_err(), DepotError::Missing(_)));
        depot.put_pack(&appliance(), digest, bytes.clone()).await.unwrap();
        assert!(whole(&depot, &digest).await.unwrap() == bytes);
    }
}

/// Everything that can happen, by chance: what was acknowledged is there and whole, and errors can be read.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_acknowledged_is_whole_whatever_happens_on_the_way() {
    let server = Seaweed::start();
    for seed in seeds() {
        let proxy = FaultyProxy::to(server.port(), seed);
        let faults =
            [Fault::Busy, Fault::Reset, Fault::Lost, Fault::Cut, Fault::Short, Fault::Slow, Fault::FlipRequest];
        proxy.set(Weather::Random(35, faults.into()));
        let worker = |worker: u64| {
            let depot = depot(proxy.port(), &format!("chance{seed}"));
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for round in 0..6 {
                    // Two workers send the same packs; every third goes in parts.
                    let (digest, bytes) = pack(if round % 3 == 2 { 80 } else { 2 }, seed * 100 + round + worker / 2);
                    match depot.put_pack(&appliance(), digest, bytes.clone()).await {
                        Ok(()) => acknowledged.push((digest, bytes.clone())),
                        Err(error) => assert!(error.to_string().starts_with("cannot "), "{error}"),
                    }
                    match depot.read(&appliance(), &digest, 5..5000).await {
                        Ok(read) => assert!(read == bytes[5..5000], "nothing in this weather falsifies what is read"),
                        Err(DepotError::Missing(_)) => {}
                        Err(error) => assert_eq!(kind(&error), Some(TroubleKind::Away), "{error}"),
                    }
                }
                acknowledged
            })
        };
        let workers: Vec<_> = (0..4).map(worker).collect();
        let mut acknowledged = Vec::new();
        for worker in workers {
            acknowledged.extend(worker.await.unwrap());
        }
        let happened = proxy.happened();
        eprintln!("seed {seed}: {} packs acknowledged through {happened:?}", acknowledged.len());
        assert!(happened.len() == faults.len() && acknowledged.len() > 4, "the test itself: {happened:?}");
        let calm = Arc::new(depot(server.port(), &format!("chance{seed}")));
        for (digest, bytes) in acknowledged {
            assert!(whole(&calm, &digest).await.unwrap() == bytes, "seed {seed}: pack {digest}");
        }
        for (_, digest, _) in calm.list().await.unwrap() {
            let read = whole(&calm, &digest).await.unwrap();
            assert_eq!(Digest::of(&read), digest, "seed {seed}: nothing half is ever visible");
        }
    }
}

/// `SOAK=N` tries more of them.
fn seeds() -> std::ops::Range<u64> {
    let more = std::env::var("SOAK").ok().and_then(|count| count.parse().ok());
    1..1 + more.unwrap_or(1)
}

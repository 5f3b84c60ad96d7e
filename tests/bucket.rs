//! The plane's packs in a bucket of a real S3 server: everything works as with a folder, also when it is away for a while.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, Link, Seaweed, eventually, free_port};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

fn publish(fleet: &Fleet, version: &str) {
    fleet.publish(&tiny(version));
}

#[test]
fn a_machine_from_a_bucket_waits_while_it_is_away_and_goes_on() {
    let server = Seaweed::start();
    let link = Link::to(server.port());
    let mut fleet = Fleet::start_with_bucket(PROGRAM, link.port());
    assert_eq!(fleet.json(&["status"])["store"]["place"], "s3://machines/fleet");
    publish(&fleet, "1");

    // 18 MB at this rate take 12 s, so the store is away while most of it is missing.
    link.slow(1_500_000);
    let guest = Guest { port: free_port() };
    fleet.ok(&["launch", "test/tiny:1", "--name", "n", "--publish", &format!("{}:80", guest.port)]);
    fleet.wait("n", "running");
    let environment = std::fs::read(format!("/proc/{}/environ", fleet.runner_pid("n"))).unwrap();
    assert!(!String::from_utf8_lossy(&environment).contains(Seaweed::SECRET), "runners get no way into the bucket");
    link.cut();
    let waiting =
        eventually("the guest waits for the store", LONG, || fleet.info("n")["waiting"].as_str().map(str::to_owned));
    assert!(waiting.contains("cannot read a pack from the store s3://machines/fleet"), "{waiting}");
    assert!(guest.ask("/health").is_none(), "it cannot have booted yet");
    let status = fleet.ok(&["status"]);
    assert!(status.contains("store s3://machines/fleet\n  warning: cannot "), "{status}");
    let refused = fleet.fails(&["publish", &tiny("2").to_string_lossy()]);
    assert!(refused.contains("the store s3://machines/fleet"), "{refused}");

    // Plane and daemon die and come back while it is away; the guest goes on waiting.
    fleet.kill_up();
    fleet.up();
    link.slow(0);
    link.mend();
    fleet.wait("n", "healthy");
    eventually("everything is fetched", LONG, || (fleet.info("n")["frames_missing"] == 0).then_some(()));
    guest.put("/notes/kept", "written before the update");

    publish(&fleet, "2");
    fleet.ok(&["update", "n"]);
    assert_eq!(guest.get("/notes/kept"), "written before the update");
    fleet.ok(&["store", "check"]);
    fleet.ok(&["verify", "test/tiny"]);
    link.cut();
    fleet.ok(&["restart", "n"]);
    eventually("all that is needed is here", LONG, || guest.ask("/health"));
}

#[test]
fn a_start_that_fails_tells_its_own_reason_and_no_earlier_one() {
    let fleet = Fleet::start(PROGRAM);
    let data = fleet.file("other");
    let up = |store| fleet.fails(&["up", "--detach", "--data", &data.to_string_lossy(), "--store", store]);
    assert!(up("s3://first/one").contains("s3://first/one"));
    let told = up("s3://second/two");
    assert!(told.contains("s3://second/two") && !told.contains("first"), "{told}");
}

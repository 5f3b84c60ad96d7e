//! Bad luck: daemons, planes, runners and whole hosts die at the worst time; links break; nothing acknowledged is lost.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, Link, eventually, free_port, kill};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

fn publish(fleet: &Fleet, version: &str) {
    fleet.publish(&tiny(version));
}

fn launch(fleet: &Fleet, name: &str, host: &str) -> Guest {
    let port = free_port();
    fleet.ok(&["launch", "test/tiny:1", "--name", name, "--host", host, "--publish", &format!("{port}:80")]);
    Guest { port }
}

#[test]
fn guests_outlive_daemon_plane_and_runner_and_a_dead_qemu_is_a_power_cut() {
    let mut fleet = Fleet::start(PROGRAM);
    publish(&fleet, "1");
    let guest = launch(&fleet, "n", "a");
    fleet.wait("n", "healthy");
    guest.put("/notes/kept", "acknowledged");
    let qemu = fleet.qemu_pid("n");

    // Plane and host daemon die together; the guest answers, commands say what is wrong.
    fleet.kill_up();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    let error = fleet.fails(&["list"]);
    assert!(error.contains("cannot reach the plane") && error.contains("collective up"), "{error}");
    fleet.up();
    fleet.wait("n", "healthy");
    assert_eq!(fleet.qemu_pid("n"), qemu, "the same machine was adopted");
    guest.put("/notes/again", "after adoption");

    // The runner dies: another one takes over, and the guest goes on.
    eventually("it may outlive its runner", LONG, || (fleet.runner_status("n")["outlives"] == true).then_some(()));
    let runner = fleet.runner_pid("n");
    kill(runner);
    let took_over = || fleet.ok(&["history", "n"]).contains("another one took over").then_some(());
    eventually("another runner took over", LONG, took_over);
    assert_eq!(fleet.qemu_pid("n"), qemu);
    assert_ne!(fleet.runner_pid("n"), runner);
    assert_eq!(guest.get("/notes/again"), "after adoption");

    // QEMU dies: the guest starts again as after a power cut.
    kill(qemu);
    eventually("the crash is noticed", LONG, || fleet.ok(&["history", "n"]).contains("crashed").then_some(()));
    eventually("another machine runs", LONG, || (fleet.info("n")["state"] == "running").then_some(()));
    fleet.wait("n", "healthy");
    assert_ne!(fleet.qemu_pid("n"), qemu);
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    assert_eq!(guest.get("/notes/again"), "after adoption");

    // The guest powers itself off: it stays off, and starts when asked.
    fleet.ok(&["stop", "n"]);
    assert!(guest.is_closed());
    fleet.ok(&["start", "n"]);
    guest.answers();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn a_power_cut_in_the_middle_of_an_update_leaves_one_consistent_side() {
    let mut fleet = Fleet::start(PROGRAM);
    publish(&fleet, "1");
    let guest = launch(&fleet, "n", "a");
    fleet.wait("n", "healthy");
    publish(&fleet, "2");
    // Before, around and after the point of no return.
    for (round, moment) in ["updating", "starting-new", "plain"].into_iter().enumerate() {
        guest.put(&format!("/notes/round-{round}"), moment);
        let target = if fleet.info("n")["version"] == "1" { "2" } else { "1" };
        let mut update = fleet.spawn(&["update", "n", "--to", target]);
        eventually("the update begins", LONG, || match moment {
            "updating" => (fleet.info("n")["state"] == "updating").then_some(()),
            "starting-new" => (fleet.info("n")["version"] == target).then_some(()),
            _ => Some(()),
        });
        fleet.kill_everything();
        update.wait().unwrap();
        fleet.up();
        fleet.wait_until_settled("n");
        guest.answers();
        let info = fleet.info("n");
        assert_eq!(guest.get("/version"), info["version"].as_str().unwrap(), "{info}");
        for earlier in 0..=round {
            guest.get(&format!("/notes/round-{earlier}"));
        }
    }
}

#[test]
fn a_lazy_launch_waits_for_a_store_that_is_away() {
    let mut fleet = Fleet::start(PROGRAM);
    let link: Link = fleet.join_over_link("b");
    publish(&fleet, "1");
    // 18 MB at this rate take 12 s, so the link is cut while most of it is missing.
    link.slow(1_500_000);
    let guest = launch(&fleet, "n", "b");
    fleet.wait("n", "running");
    link.cut();
    let carried = link.carried();
    assert!(carried < 10_000_000, "{carried}");
    // Nobody can tell the plane; the host itself knows that its guest waits, for what, and how much is missing.
    let waiting = eventually("the guest waits for the store", LONG, || {
        let status = fleet.runner_status("n");
        status["waiting"].as_str().map(|why| (why.to_owned(), status["frames_missing"].as_u64()))
    });
    assert!(waiting.0.contains("the store cannot be reached"), "{waiting:?}");
    assert!(waiting.1 > Some(0), "{waiting:?}");
    assert!(guest.ask("/health").is_none(), "it cannot have booted yet");
    link.mend();
    link.slow(0);
    fleet.wait("n", "healthy");
    guest.answers();
    eventually("everything is fetched", LONG, || (fleet.info("n")["frames_missing"] == 0).then_some(()));

    // Now that everything is here, neither store nor plane are needed to start.
    fleet.ok(&["stop", "n"]);
    fleet.ok(&["start", "n"]);
    guest.answers();
    link.cut();
    kill(fleet.qemu_pid("n"));
    eventually("the guest is back without the plane", LONG, || guest.ask("/health"));
    guest.put("/notes/alone", "written while the plane was away");
    assert_eq!(guest.get("/notes/alone"), "written while the plane was away");
    link.mend();
}

#[test]
fn publish_killed_at_any_instant_is_repeated() {
    let fleet = Fleet::start(PROGRAM);
    let folder = tiny("1");
    let folder = folder.to_string_lossy();
    for pause in [5u64, 20, 60, 120, 200, 300, 450, 700] {
        let begun = std::time::Instant::now();
        let mut child = fleet.spawn(&["publish", &folder]);
        while begun.elapsed() < Duration::from_millis(pause) && child.try_wait().unwrap().is_none() {
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let _ = child.kill();
        child.wait().unwrap();
        // Either nothing can be seen, or all of it is there.
        let shown = fleet.run(&["show", "test/tiny:1"]);
        if shown.code == Some(0) {
            assert_eq!(fleet.json(&["verify", "test/tiny:1"])["sound"], true);
        }
    }
    fleet.ok(&["publish", &folder]);
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);
    assert_eq!(fleet.json(&["search"])[0]["versions"].as_array().unwrap().len(), 1);
}

//! A machine goes on at another host before it has arrived: what is not there comes when it is touched, and whatever happens to
//! the network, the daemons and the runner meanwhile, nothing of it is lost.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, Link, eventually, kill};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(180);
/// Bytes a second: what the machine needs to go on takes seconds,
const AT_FIRST: u64 = 1_000_000;
/// and the 20 MB that the guest holds take longer than any step of these stories.
const SLOW: u64 = 200_000;

/// A machine on `a` that holds 20 MB and has written, and a host `b` behind a slow link.
struct Story {
    fleet: Fleet,
    link: Link,
    guest: Guest,
    generation: String,
    boots: String,
}

impl Story {
    fn begin() -> Self {
        let mut fleet = Fleet::start(PROGRAM);
        let link = fleet.join_over_link("b");
        fleet.publish(&tiny("1"));
        // The other host has the appliance.
        fleet.ok(&["launch", "test/tiny:1", "--name", "other", "--host", "b"]);
        eventually("the other host has all", LONG, || (fleet.info("other")["frames_missing"] == 0).then_some(()));
        fleet.ok(&["delete", "other", "--data"]);
        let guest = Guest::launch(&fleet, "n", &["--host", "a"]);
        let generation = guest.get("/fill?20");
        guest.put("/notes/kept", "acknowledged");
        let boots = guest.get("/boots");
        Self { fleet, link, guest, generation, boots }
    }

    /// It goes on at `b`, and most of it has not arrived.
    fn arriving(&self) {
        self.fleet.ok(&["suspend", "n"]);
        self.link.slow(AT_FIRST);
        self.fleet.ok(&["resume", "n", "--host", "b"]);
        let info = self.fleet.info("n");
        assert_eq!((info["host"].as_str(), info["state"].as_str()), (Some("b"), Some("running")));
        self.guest.answers();
        self.link.slow(SLOW);
        assert!(!self.is_complete(), "{info}");
    }

    fn is_complete(&self) -> bool {
        self.fleet.info("n")["arrival"]["complete"] == true
    }

    /// Over a slow link the first one of a kind takes long.
    #[track_caller]
    fn put(&self, path: &str, body: &str) {
        let put = || self.guest.request("PUT", path, body).filter(|(status, _)| *status == 201);
        eventually("it keeps what it is told", LONG, put);
    }

    #[track_caller]
    fn get(&self, path: &str) -> String {
        let get = || self.guest.request("GET", path, "").filter(|(status, _)| *status == 200);
        eventually("it tells what it has", LONG, get).1.trim_end().to_owned()
    }

    #[track_caller]
    fn sound(&self) {
        assert_eq!(self.guest.get("/pages"), format!("5120 pages of {}, 0 bad", self.generation));
        assert_eq!(self.guest.get("/notes/kept"), "acknowledged");
    }
}

#[test]
fn what_is_not_there_yet_comes_when_it_is_touched() {
    let mut story = Story::begin();
    story.arriving();
    // It serves, and keeps what it is told, long before it has arrived.
    assert_eq!(story.get("/boots"), story.boots, "it was not booted");
    story.put("/notes/there", "written on b");
    let fleet = &mut story.fleet;
    assert!(fleet.ok(&["info", "n"]).contains("in the store still"));
    let arrived = fleet.json(&["backup", "list"]);
    assert!(arrived.is_array());
    let error = fleet.fails(&["clone", "n", "--name", "copy"]);
    assert!(error.contains("in the store still"), "{error}");
    fleet.ok(&["delete", "copy", "--data"]);
    // It is kept while it arrives, and the daemon may die.
    let kept = fleet.json(&["checkpoint", "n"]);
    fleet.kill_host("b");
    fleet.run_host("b");
    eventually("the host is back", LONG, || (fleet.info("n")["reachable"] == true).then_some(()));
    assert_eq!(story.get("/notes/there"), "written on b");
    story.put("/notes/there", "and once more");
    // Nobody has the store for a while: what the guest waits for comes when it is back.
    story.link.cut();
    let port = story.guest.port;
    let asking = std::thread::spawn(move || Guest { port }.get("/pages"));
    std::thread::park_timeout(Duration::from_secs(2));
    assert!(!asking.is_finished(), "it has the pages already");
    story.link.mend();
    story.link.slow(0);
    assert_eq!(asking.join().unwrap(), format!("5120 pages of {}, 0 bad", story.generation));
    eventually("all has arrived", LONG, || story.is_complete().then_some(()));
    // From here on the store is not needed.
    story.link.cut();
    story.sound();
    let qemu = story.fleet.qemu_pid("n");
    kill(qemu);
    eventually("it crashed and is there again", LONG, || {
        story.guest.ask("/boots").filter(|boots| *boots != story.boots)
    });
    assert_eq!(story.get("/notes/there"), "and once more");
    assert_eq!(story.get("/notes/kept"), "acknowledged");
    story.link.mend();
    eventually("the host is back", LONG, || (story.fleet.info("n")["reachable"] == true).then_some(()));
    story.fleet.ok(&["restore", "n", &kept["id"].to_string()]);
    story.sound();
    assert_eq!(story.get("/notes/there"), "written on b");
}

#[test]
fn a_power_cut_while_it_arrives() {
    let story = Story::begin();
    story.arriving();
    story.put("/notes/there", "written on b");
    let qemu = story.fleet.qemu_pid("n");
    // Nobody has the key for the rest of it just then.
    story.link.cut();
    kill(qemu);
    eventually("it waits for the plane", LONG, || story.fleet.log("b").contains("to=starting").then_some(()));
    std::thread::park_timeout(Duration::from_secs(3));
    story.link.mend();
    // Its memory is lost, as with any power cut; its disks arrive further.
    eventually("it is booted", LONG, || story.guest.ask("/boots").filter(|boots| *boots != story.boots));
    assert_eq!(story.get("/notes/kept"), "acknowledged");
    assert_eq!(story.get("/notes/there"), "written on b");
    story.link.slow(0);
    eventually("all has arrived", LONG, || story.is_complete().then_some(()));
    assert_eq!(story.get("/notes/there"), "written on b");
}

#[test]
fn what_has_not_arrived_is_brought_before_it_goes_on_to_travel() {
    let story = Story::begin();
    story.arriving();
    story.put("/notes/there", "written on b");
    let mut command = story.fleet.spawn(&["suspend", "n"]);
    eventually("it is suspended", LONG, || (story.fleet.info("n")["state"] == "suspended").then_some(()));
    assert_ne!(story.fleet.info("n")["in_store"], true);
    story.link.slow(0);
    assert!(command.wait().unwrap().success());
    let suspended = story.fleet.json(&["suspend", "n"]);
    assert_eq!(suspended["not_stored"], serde_json::Value::Null, "{suspended}");
    story.fleet.ok(&["resume", "n", "--host", "a"]);
    story.sound();
    assert_eq!(story.get("/boots"), story.boots, "it was not booted");
    assert_eq!(story.get("/notes/there"), "written on b");
    // Without its memory, and kept when the instance goes: the data is whole.
    story.fleet.ok(&["suspend", "n"]);
    story.link.slow(SLOW);
    story.fleet.ok(&["resume", "n", "--host", "b", "--cold"]);
    story.guest.answers();
    story.link.slow(0);
    let deleted = story.fleet.json(&["delete", "n"]);
    assert!(deleted["kept"].is_string(), "{deleted}");
}

/// Its first pages would take minutes.
#[test]
fn a_resume_is_broken_off_by_whoever_wants_something_else() {
    let story = Story::begin();
    let fleet = &story.fleet;
    fleet.ok(&["suspend", "n"]);
    let resuming = |command: &[&str]| {
        let command = fleet.spawn(command);
        eventually("it is being resumed", LONG, || (fleet.info("n")["state"] == "resuming").then_some(()));
        story.link.slow(AT_FIRST / 100);
        command
    };
    story.link.slow(AT_FIRST / 4);
    let mut command = resuming(&["resume", "n", "--host", "b"]);
    fleet.ok(&["suspend", "n"]);
    assert_eq!(fleet.info("n")["state"], "suspended");
    assert_eq!(command.wait().unwrap().code(), Some(1));
    let kept = fleet.json(&["checkpoint", "n"])["id"].to_string();
    let mut command = resuming(&["resume", "n"]);
    assert!(fleet.ok(&["stop", "n"]).contains("memory was given up"));
    assert_eq!(command.wait().unwrap().code(), Some(1));
    story.link.slow(0);
    fleet.ok(&["restore", "n", &kept]);
    story.sound();
    assert_eq!(story.get("/boots"), story.boots, "it was not booted");
}

#[test]
fn what_could_not_be_brought_is_moved_again_here_or_elsewhere() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &["--host", "a"]);
    let generation = guest.get("/fill?20");
    let (packs, elsewhere) = (fleet.file("a/plane/store/private"), fleet.file("elsewhere"));
    for host in ["b", "a"] {
        fleet.ok(&["suspend", "n"]);
        std::fs::rename(&packs, &elsewhere).unwrap();
        let error = fleet.fails(&["resume", "n", "--host", "b"]);
        assert!(error.contains("It is in the store; move it again"), "{error}");
        let error = fleet.fails(&["resume", "n"]);
        assert!(error.contains("move it again, here or elsewhere"), "{error}");
        std::fs::rename(&elsewhere, &packs).unwrap();
        fleet.ok(&["move", "n", "--to", host, "--no-live"]);
        guest.sound(&generation);
        assert_eq!(fleet.info("n")["host"], host);
        if host == "b" {
            fleet.ok(&["move", "n", "--to", "a", "--no-live"]);
        }
    }
}

#[test]
fn its_runner_dies_while_it_arrives() {
    let story = Story::begin();
    story.arriving();
    story.put("/notes/there", "written on b");
    eventually("it may outlive its runner", LONG, || {
        (story.fleet.runner_status("n")["outlives"] == true).then_some(())
    });
    let (runner, qemu) = (story.fleet.runner_pid("n"), story.fleet.qemu_pid("n"));
    // Nobody has the key for the rest of it just then: it waits.
    story.link.cut();
    kill(runner);
    std::thread::park_timeout(Duration::from_secs(3));
    assert!(!story.fleet.ok(&["history", "n"]).contains("took over"));
    story.link.mend();
    let took_over = || story.fleet.ok(&["history", "n"]).contains("another one took over").then_some(());
    eventually("another runner took over", LONG, took_over);
    assert_eq!(story.get("/boots"), story.boots, "it was not booted");
    assert_eq!(story.get("/notes/there"), "written on b");
    assert!(!story.is_complete());
    story.link.slow(0);
    eventually("all has arrived", LONG, || story.is_complete().then_some(()));
    story.sound();
    assert_eq!(story.fleet.qemu_pid("n"), qemu);
    // From here on the store is not needed, for the next one neither.
    story.link.cut();
    kill(story.fleet.runner_pid("n"));
    eventually("it answers", LONG, || story.guest.ask("/health"));
    story.sound();
    assert_eq!(story.get("/boots"), story.boots);
    story.link.mend();
    let twice = || (story.fleet.ok(&["history", "n"]).matches("took over").count() == 2).then_some(());
    eventually("another runner took over again", LONG, twice);
    story.fleet.ok(&["suspend", "n"]);
    story.fleet.ok(&["resume", "n"]);
    story.sound();
}

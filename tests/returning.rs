//! An instance goes to another host and comes back: what the first host keeps of it is not brought again, is never believed, and
//! never is the instance.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_testkit::{Dice, Fleet, Guest, Link, eventually};

use crate::live::{guest, machines};
use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(180);

/// A machine on `b` that holds 20 MB of memory and 8 MB on its disk, and `c`, which has the appliance too.
struct Story {
    fleet: Fleet,
    links: [Link; 2],
    id: String,
    generation: String,
    boots: String,
    data: String,
}

impl Story {
    fn begin() -> Self {
        let mut fleet = Fleet::start(PROGRAM);
        let links = ["b", "c"].map(|host| fleet.join_over_link(host));
        fleet.publish(&tiny("1"));
        for host in ["b", "c"] {
            fleet.ok(&["launch", "test/tiny:1", "--name", "other", "--host", host]);
            eventually("the host has all", LONG, || (fleet.info("other")["frames_missing"] == 0).then_some(()));
            fleet.ok(&["delete", "other", "--data"]);
        }
        fleet.ok(&["launch", "test/tiny:1", "--name", "n", "--host", "b"]);
        fleet.wait("n", "healthy");
        let guest = guest(&fleet);
        let generation = guest.get("/fill?20");
        let mut dice = Dice::new(7);
        let data: String = (0..8 << 20).map(|_| char::from(b'!' + dice.roll(90) as u8)).collect();
        guest.put("/notes/data", &data);
        let boots = guest.get("/boots");
        let id = fleet.info("n")["id"].as_str().unwrap().to_owned();
        Self { fleet, links, id, generation, boots, data }
    }

    fn carried(&self) -> u64 {
        self.links.iter().map(Link::carried).sum()
    }

    /// Moves it; gives what the command says, and how many bytes went to either host until all of it was there.
    #[track_caller]
    fn go(&self, to: &str, how: &[&str]) -> (serde_json::Value, u64) {
        let before = self.carried();
        let moved = self.fleet.json(&[&["move", "n", "--to", to], how].concat());
        self.fleet.wait("n", "healthy");
        eventually("all of it is there", LONG, || {
            let arrival = self.fleet.info("n")["arrival"].clone();
            (arrival.is_null() || arrival["complete"] == true).then_some(())
        });
        let bytes = self.carried() - before;
        eprintln!("to {to} {how:?}: {bytes} bytes to the hosts, {moved}");
        (moved, bytes)
    }

    #[track_caller]
    fn sound(&self) -> Guest {
        let guest = guest(&self.fleet);
        assert_eq!(guest.get("/pages"), format!("5120 pages of {}, 0 bad", self.generation));
        assert!(guest.get("/notes/data") == self.data, "the data is as it was");
        assert_eq!(guest.get("/boots"), self.boots, "it was not booted");
        assert_eq!(machines(&self.id), 1);
        guest
    }

    /// What a host keeps of it.
    fn left(&self, host: &str) -> PathBuf {
        self.fleet.host_data(host).join("left").join(&self.id)
    }

    fn instance(&self, host: &str) -> PathBuf {
        self.fleet.host_data(host).join("instances").join(&self.id)
    }

    #[track_caller]
    fn keeps(&self, host: &str) {
        eventually("what was there is kept", LONG, || {
            (self.left(host).join("left.json").exists() && !self.instance(host).exists()).then_some(())
        });
    }
}

/// Every file of it is wrong in some places.
fn damage(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        if entry.file_type().unwrap().is_dir() {
            damage(&entry.path());
        } else if entry.file_name() != "left.json" {
            let file = std::fs::File::options().read(true).write(true).open(entry.path()).unwrap();
            // The header stays, so that what is behind it is read.
            for at in (8192 + 77..file.metadata().unwrap().len()).step_by(64 << 10) {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            }
        }
    }
}

#[test]
fn only_what_changed_comes_back_while_it_runs() {
    let mut story = Story::begin();
    let (there, there_bytes) = story.go("c", &[]);
    assert_eq!((there["live"].as_bool(), there["kept_bytes"].as_u64()), (Some(true), Some(0)), "{there}");
    assert!(there_bytes > 10 << 20, "{there_bytes}");
    story.sound().put("/notes/there", "written on c");
    story.keeps("b");
    let dry = story.fleet.json(&["move", "n", "--to", "b", "--dry-run"]);
    let [to_send, kept] = ["bytes", "kept"].map(|field| dry["estimate"][field].as_u64().unwrap());
    assert!(to_send < kept / 4, "{dry}");
    let (back, back_bytes) = story.go("b", &[]);
    assert_eq!(back["live"], true, "{back}");
    let [sent, first] = [&back, &there].map(|moved| moved["bytes"].as_u64().unwrap());
    assert!(sent < first / 4, "{sent} after {first}");
    assert!(back_bytes < there_bytes / 4, "{back_bytes} after {there_bytes}");
    assert!(back["kept_bytes"].as_u64().unwrap() > 25 << 20, "{back}");
    assert_eq!(story.sound().get("/notes/there"), "written on c");
    assert!(!story.left("b").exists(), "it is here, and nothing beside it");

    // What c keeps is damaged: it is noticed, and sent.
    story.keeps("c");
    damage(&story.left("c"));
    let (again, _) = story.go("c", &[]);
    assert!(again["bytes"].as_u64().unwrap() > sent, "{again}");
    assert_eq!(story.sound().get("/notes/there"), "written on c");
    // And what can be read no more.
    story.keeps("b");
    for file in std::fs::read_dir(story.left("b").join("layers")).unwrap().flatten() {
        std::fs::write(file.path(), b"no layer").unwrap();
    }
    let (again, _) = story.go("b", &[]);
    assert_eq!(again["kept_bytes"], 0, "{again}");
    story.sound();

    // Whoever keeps something never has the machine, also not after a restart.
    story.keeps("c");
    story.fleet.kill_host("c");
    story.fleet.run_host("c");
    eventually("c is back", LONG, || {
        let hosts = story.fleet.json(&["status"])["hosts"].clone();
        hosts.as_array()?.iter().find(|host| host["name"] == "c" && host["reachable"] == true).map(|_| ())
    });
    assert_eq!(story.fleet.info("n")["host"], "b");
    story.sound();
    assert!(!story.instance("c").exists());
}

#[test]
fn only_what_changed_comes_back_through_the_store() {
    let story = Story::begin();
    let (_, there) = story.go("c", &["--no-live"]);
    assert!(there > 10 << 20, "{there}");
    story.sound().put("/notes/there", "written on c");
    story.keeps("b");
    let (moved, back) = story.go("b", &["--no-live"]);
    assert!(back < there / 4, "{back} after {there}");
    assert!(moved["kept_bytes"].as_u64().unwrap() > 8 << 20, "{moved}");
    assert_eq!(story.sound().get("/notes/there"), "written on c");
    eventually("all is here, and nothing beside it", LONG, || (!story.left("b").exists()).then_some(()));
    // What is damaged is fetched.
    story.keeps("c");
    damage(&story.left("c").join("layers"));
    story.go("c", &["--no-live"]);
    assert_eq!(story.sound().get("/notes/there"), "written on c");
    story.keeps("b");
    damage(&story.left("b"));
    story.go("b", &["--no-live"]);
    story.sound();
    // Each way helps the other.
    story.keeps("c");
    let (moved, _) = story.go("c", &[]);
    assert!(moved["kept_bytes"].as_u64().unwrap() > 25 << 20, "{moved}");
    story.sound();
}

#[test]
fn what_is_kept_goes_when_room_is_needed_or_the_instance_is_no_more() {
    let mut story = Story::begin();
    story.go("c", &[]);
    story.keeps("b");
    story.fleet.kill_host("b");
    story.fleet.run_host_with("b", &["--cache-size", "1M"]);
    eventually("its room is needed", LONG, || (!story.left("b").exists()).then_some(()));
    let (moved, _) = story.go("b", &[]);
    assert_eq!(moved["kept_bytes"], 0, "{moved}");
    story.sound();
    story.keeps("c");
    let cache = |story: &Story| {
        let hosts = story.fleet.json(&["status"])["hosts"].clone();
        let c = hosts.as_array().unwrap().iter().find(|host| host["name"] == "c").unwrap().clone();
        c["facts"]["cache_bytes"].as_u64().unwrap()
    };
    // It is counted with what the host has in its cache.
    eventually("it is told", LONG, || (cache(&story) > 30 << 20).then_some(()));
    story.fleet.ok(&["delete", "n", "--data"]);
    eventually("nothing is kept of what is no more", LONG, || (!story.left("c").exists()).then_some(()));
}

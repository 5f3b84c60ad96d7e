//! A runner's death is not its guest's: whatever it was about, another one takes over, and the guest goes on with all that it has.

use std::time::{Duration, Instant};

use collective_testkit::{Dice, Fleet, Guest, eventually, kill};

use crate::{PROGRAM, seeds, tiny};

const LONG: Duration = Duration::from_secs(180);

struct Story {
    fleet: Fleet,
    guest: Guest,
    boots: String,
    generation: String,
    /// Runners that were followed by another one.
    deaths: usize,
}

impl Story {
    /// A guest that holds 20 MB, and writes all the time.
    fn begin() -> Self {
        Self::begin_on(Fleet::start(PROGRAM))
    }

    fn begin_on(fleet: Fleet) -> Self {
        fleet.publish(&tiny("1"));
        let guest = Guest::launch(&fleet, "n", &[]);
        let generation = guest.get("/fill?20");
        let boots = guest.get("/boots");
        let story = Self { fleet, guest, boots, generation, deaths: 0 };
        story.guest.put("/notes/kept", "acknowledged");
        story.is_held();
        story
    }

    /// The daemon has what keeps it going.
    fn is_held(&self) {
        eventually("it may outlive its runner", LONG, || {
            (self.fleet.runner_status("n")["outlives"] == true).then_some(())
        });
    }

    fn kill_runner(&mut self) {
        kill(self.fleet.runner_pid("n"));
        self.deaths += 1;
    }

    /// Another one took over, and the guest goes on where it was.
    fn goes_on(&self) {
        let told = "its runner died; another one took over, and the guest went on after";
        eventually("another runner took over", LONG, || {
            (self.fleet.ok(&["history", "n"]).matches(told).count() == self.deaths).then_some(())
        });
        let history = self.fleet.ok(&["history", "n"]);
        eprintln!("{}", history.lines().rfind(|line| line.contains(told)).unwrap_or_default());
        self.is_held();
        self.guest.answers();
        self.sound();
        self.guest.get("/count?on");
    }

    fn sound(&self) {
        assert_eq!(self.guest.get("/boots"), self.boots, "it was booted");
        self.guest.sound(&self.generation);
        assert_eq!(self.guest.get("/notes/kept"), "acknowledged");
        let said = self.fleet.serial("n");
        assert!(!said.contains("I/O error") && !said.contains("EXT4-fs"), "{said}");
    }

    /// It can be saved, and brought back.
    fn can_be_saved(&mut self, note: &str) {
        let path = format!("/notes/{note}");
        self.guest.put(&path, "then");
        let kept = self.fleet.json(&["checkpoint", "n"])["id"].to_string();
        let generation = std::mem::replace(&mut self.generation, self.guest.get("/fill?20"));
        self.guest.put(&path, "now");
        self.guest.get("/count?on");
        self.fleet.ok(&["suspend", "n"]);
        self.fleet.ok(&["resume", "n"]);
        self.guest.answers();
        self.sound();
        assert_eq!(self.guest.get(&path), "now");
        self.fleet.ok(&["restore", "n", &kept]);
        self.generation = generation;
        self.guest.answers();
        self.sound();
        assert_eq!(self.guest.get(&path), "then");
        self.guest.get("/count?on");
        self.is_held();
    }
}

#[test]
fn another_runner_takes_over_and_the_guest_goes_on() {
    let mut story = Story::begin();
    story.guest.get("/count?on");
    let qemu = story.fleet.qemu_pid("n");
    story.kill_runner();
    story.goes_on();
    assert_eq!(story.fleet.qemu_pid("n"), qemu);
    story.can_be_saved("once");

    // A daemon that is back asks for what keeps it going, too.
    story.fleet.kill_up();
    story.fleet.up();
    eventually("the new daemon knows of it", LONG, || (story.fleet.info("n")["state"] == "running").then_some(()));
    eventually("the new daemon holds it", LONG, || holds_a_connection(&story.fleet).then_some(()));
    story.kill_runner();
    story.goes_on();
    story.can_be_saved("twice");

    // Asked to, it shuts down as any other.
    story.kill_runner();
    story.goes_on();
    story.fleet.ok(&["stop", "n"]);
    assert!(story.guest.is_closed());
    assert!(story.fleet.ok(&["history", "n"]).contains("it shut itself down"));
    story.fleet.ok(&["start", "n"]);
    story.guest.answers();
    assert_eq!(story.guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn the_same_without_root() {
    let mut story = Story::begin_on(Fleet::start_as_nobody(PROGRAM));
    story.guest.get("/count?on");
    story.kill_runner();
    story.goes_on();
    story.can_be_saved("as nobody");
}

/// Whether the process with plane and host has a connection of somebody's disks.
fn holds_a_connection(fleet: &Fleet) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", fleet.up_pid())).unwrap().flatten();
    let mut targets = descriptors.filter_map(|descriptor| std::fs::read_link(descriptor.path()).ok());
    targets.any(|target| target.as_os_str() == "/dev/fuse")
}

/// Whether a checkpoint was taken or not, nothing of the present is lost, and what was taken is whole.
fn dies_while_it_saves(seed: u64, rounds: usize) {
    eprintln!("SEED={seed}");
    let mut dice = Dice::new(seed);
    let mut story = Story::begin();
    story.guest.get("/count?on");
    let begun = Instant::now();
    story.fleet.ok(&["checkpoint", "n"]);
    let takes = begun.elapsed();
    for round in 0..rounds {
        let instant = takes * dice.roll(1000) as u32 / 1000;
        eprintln!("round {round}: {} of {} ms", instant.as_millis(), takes.as_millis());
        story.guest.get("/count?on");
        let mut saving = story.fleet.spawn(&["checkpoint", "n"]);
        std::thread::park_timeout(instant);
        story.kill_runner();
        let saved = saving.wait().unwrap().success();
        story.goes_on();
        if saved {
            story.fleet.ok(&["checkpoint", "n"]);
        }
    }
    story.can_be_saved("afterwards");
    story.kill_runner();
    story.goes_on();
}

#[test]
fn it_dies_while_it_saves_the_machine() {
    seeds(1).for_each(|seed| dies_while_it_saves(seed, 3));
}

#[test]
#[ignore = "takes minutes for each seed; run by make soak"]
fn it_dies_while_it_saves_the_machine_at_many_instants() {
    seeds(4).for_each(|seed| dies_while_it_saves(seed, 5));
}

#[test]
fn it_dies_after_layers_became_one() {
    let mut story = Story::begin();
    for round in 0..4 {
        story.guest.get("/count?on");
        story.guest.put(&format!("/notes/round-{round}"), "acknowledged");
        let kept = story.fleet.json(&["checkpoint", "n"])["id"].to_string();
        if round < 3 {
            story.fleet.ok(&["checkpoint", "n", "--forget", &kept]);
        }
    }
    let record = story.fleet.record_path("n");
    let longest = || {
        let record: serde_json::Value = serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
        let disks = record["disks"].as_array().unwrap().iter().map(|disk| disk["layers"].as_array().unwrap().len());
        disks.max().unwrap()
    };
    eventually("layers became one", LONG, || (longest() <= 3).then_some(()));
    story.kill_runner();
    story.goes_on();
    (0..4).for_each(|round| assert_eq!(story.guest.get(&format!("/notes/round-{round}")), "acknowledged"));
    story.can_be_saved("merged");
    let generation = story.guest.get("/fill?20");
    story.generation = generation;
    story.kill_runner();
    story.goes_on();
}

#[test]
fn runners_that_die_again_and_again_are_not_followed_for_ever() {
    let mut story = Story::begin();
    for _ in 0..5 {
        story.kill_runner();
        story.goes_on();
    }
    kill(story.fleet.runner_pid("n"));
    eventually("it is a power cut", LONG, || story.fleet.ok(&["history", "n"]).contains("a power cut").then_some(()));
    eventually("it was booted", LONG, || story.guest.ask("/boots").filter(|boots| *boots != story.boots));
    assert_eq!(story.guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn with_nobody_left_it_is_a_power_cut() {
    let mut story = Story::begin();
    let (runner, qemu) = (story.fleet.runner_pid("n"), story.fleet.qemu_pid("n"));
    story.fleet.kill_up();
    kill(runner);
    story.fleet.up();
    eventually("its machine is gone", LONG, || (!is_qemu(qemu)).then_some(()));
    eventually("it was booted", LONG, || story.guest.ask("/boots").filter(|boots| *boots != story.boots));
    assert!(story.fleet.ok(&["history", "n"]).contains("a power cut"));
    assert_eq!(story.guest.get("/notes/kept"), "acknowledged");
    assert_ne!(story.fleet.qemu_pid("n"), qemu);
}

fn is_qemu(pid: i32) -> bool {
    std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains("qemu"))
}

//! Layers become one, while the guest runs and while it does not, whoever dies meanwhile; the guest never notices.

use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, kill};
use collective_volume::Layer;
use serde_json::Value;

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

fn launch(fleet: &Fleet, name: &str) -> Guest {
    fleet.publish(&tiny("1"));
    Guest::launch(fleet, name, &[])
}

/// A record.
fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn record(fleet: &Fleet, name: &str) -> Value {
    read(&fleet.record_path(name))
}

fn count(layers: &Value) -> usize {
    layers.as_array().map_or(0, Vec::len)
}

/// Layers of each disk and of the memory.
fn depths(record: &Value) -> Vec<usize> {
    let disks = record["disks"].as_array().unwrap().iter().map(|disk| count(&disk["layers"]));
    let memory = count(&record["memory"]).max(count(&record["suspended"]["machine"]["memory"]));
    disks.chain([memory]).collect()
}

/// Memory has what was put there, the disk has what memory says, and the writer goes on.
#[track_caller]
fn sound(guest: &Guest, generation: &str) {
    guest.sound(generation);
    guest.get("/count?on");
}

/// Waits until every disk and the memory has at most so many layers, and nothing else is left of the others.
#[track_caller]
fn few_layers(fleet: &Fleet, name: &str, most: usize) {
    let path = fleet.record_path(name);
    eventually("few layers are left", LONG, || {
        let record = read(&path);
        let few = depths(&record).iter().all(|depth| *depth <= most);
        (few && record["merge"].is_null()).then_some(())
    });
}

fn forget(fleet: &Fleet, name: &str, keep: &[u64]) {
    for kept in fleet.json(&["timeline", name]).as_array().unwrap() {
        let id = kept["id"].as_u64().unwrap();
        if !keep.contains(&id) {
            fleet.ok(&["checkpoint", name, "--forget", &id.to_string()]);
        }
    }
}

#[test]
fn what_was_kept_and_forgotten_leaves_few_layers() {
    let fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let mut generation = guest.get("/fill?20");
    guest.get("/count?on");
    let mut third = String::new();
    for number in 1..=6 {
        fleet.ok(&["checkpoint", "n"]);
        if number == 3 {
            third = generation;
        }
        generation = guest.get("/fill?20");
    }
    // Each is kept, so nothing can be merged.
    assert!(depths(&record(&fleet, "n")).iter().any(|depth| *depth > 6));
    forget(&fleet, "n", &[3]);
    // One layer up to the third, what came since, and what takes the writes.
    few_layers(&fleet, "n", 4);
    sound(&guest, &generation);
    let qemu = fleet.qemu_pid("n");

    // Suspends and resumes, with merges while it runs and while it does not.
    for _ in 0..2 {
        fleet.ok(&["suspend", "n"]);
        fleet.ok(&["resume", "n"]);
        sound(&guest, &generation);
    }
    assert_ne!(fleet.qemu_pid("n"), qemu);
    few_layers(&fleet, "n", 5);
    sound(&guest, &generation);
    fleet.ok(&["checkpoint", "n"]);
    fleet.ok(&["suspend", "n"]);
    forget(&fleet, "n", &[3]);
    few_layers(&fleet, "n", 4);
    assert_eq!(fleet.info("n")["in_store"], true, "what is in the store is the same as before");
    fleet.ok(&["resume", "n"]);
    sound(&guest, &generation);

    // What was kept is as it was, and so is the present that it takes the place of.
    let back = fleet.json(&["restore", "n", "3"]);
    sound(&guest, &third);
    forget(&fleet, "n", &[back["kept_as_checkpoint"].as_u64().unwrap()]);
    few_layers(&fleet, "n", 4);
    sound(&guest, &third);
    fleet.ok(&["restore", "n", &back["kept_as_checkpoint"].to_string()]);
    sound(&guest, &generation);
    // From its disks, and not from what the guest remembers of them.
    guest.put("/notes/kept", "acknowledged");
    fleet.ok(&["restart", "n"]);
    guest.answers();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    forget(&fleet, "n", &[]);
    fleet.ok(&["stop", "n"]);
    few_layers(&fleet, "n", 3);
    fleet.ok(&["start", "n"]);
    guest.answers();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn deaths_while_layers_become_one() {
    die_while_layers_become_one(3);
}

#[test]
#[ignore = "takes minutes; run by make soak"]
fn many_deaths_while_layers_become_one() {
    die_while_layers_become_one(10);
}

fn die_while_layers_become_one(rounds: u64) {
    let mut fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let mut generation = guest.get("/fill?20");
    guest.put("/notes/kept", "acknowledged");
    guest.get("/count?on");
    let path = fleet.record_path("n");
    let mut interrupted = 0;
    for round in 0..rounds {
        for _ in 0..3 {
            fleet.ok(&["checkpoint", "n"]);
            generation = guest.get("/fill?20");
        }
        let keep = fleet.json(&["checkpoint", "n"])["id"].as_u64().unwrap();
        forget(&fleet, "n", &[keep]);
        eventually("layers are being merged", LONG, || (!read(&path)["merge"].is_null()).then_some(()));
        std::thread::park_timeout(Duration::from_millis(round * 600 / rounds));
        interrupted += u64::from(!read(&path)["merge"].is_null());
        match round % 3 {
            // The daemon: the runner goes on merging, and the next daemon hears of it.
            0 => {
                fleet.kill_up();
                fleet.up();
                sound(&guest, &generation);
            }
            // The runner: another one takes over, and what was merged is merged anew.
            1 => {
                let boots = guest.get("/boots");
                kill(fleet.runner_pid("n"));
                eventually("another runner took over", LONG, || {
                    fleet.ok(&["history", "n"]).contains("another one took over").then_some(())
                });
                sound(&guest, &generation);
                assert_eq!(guest.get("/boots"), boots);
            }
            // QEMU: a power cut to the guest.
            _ => {
                let boots = guest.get("/boots");
                kill(fleet.qemu_pid("n"));
                eventually("it boots again", LONG, || guest.ask("/boots").filter(|now| *now != boots));
                fleet.wait("n", "healthy");
                generation = guest.get("/fill?20");
                guest.get("/count?on");
            }
        }
        few_layers(&fleet, "n", 5);
        sound(&guest, &generation);
        assert_eq!(guest.get("/notes/kept"), "acknowledged");
        // What was kept can still be gone back to.
        fleet.ok(&["restore", "n", &keep.to_string()]);
        assert!(guest.get("/pages").ends_with(", 0 bad"));
        generation = guest.get("/fill?20");
        guest.get("/count?on");
    }
    assert!(interrupted > 0, "no merge was interrupted");

    // While it is suspended.
    for _ in 0..3 {
        fleet.ok(&["suspend", "n"]);
        fleet.ok(&["resume", "n"]);
        guest.get("/fill?20");
    }
    fleet.ok(&["checkpoint", "n"]);
    generation = guest.get("/fill?20");
    fleet.ok(&["suspend", "n"]);
    forget(&fleet, "n", &[]);
    fleet.kill_up();
    fleet.up();
    few_layers(&fleet, "n", 4);
    fleet.ok(&["resume", "n"]);
    sound(&guest, &generation);
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

fn scheduled(record: &Value) -> Vec<u64> {
    let kept = record["checkpoints"].as_array().unwrap().iter().filter(|kept| kept["info"]["scheduled"] == true);
    kept.map(|kept| kept["info"]["id"].as_u64().unwrap()).collect()
}

/// A machine on host `b` of which the clock takes checkpoints; and where its record is.
fn by_the_clock() -> (Fleet, Guest, PathBuf) {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join_over_link("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &["--host", "b"]);
    assert_eq!(fleet.info("n")["checkpoint_every"], Value::Null, "off by default");
    for (value, words) in [("5s", "every 1m to every 7d"), ("8d", "every 1m to every 7d"), ("often", "or off")] {
        let error = fleet.fails(&["set", "n", &format!("checkpoint-every={value}")]);
        assert!(error.contains(words), "{value}: {error}");
    }
    let said = fleet.json(&["set", "n", "checkpoint-every=1m"]);
    assert_eq!(said["restarted"], false, "{said}");
    assert_eq!(fleet.info("n")["checkpoint_every"], "1m");
    assert!(fleet.ok(&["info", "n"]).contains("every 1m while it runs"));
    assert!(fleet.ok(&["timeline", "n"]).contains("every 1m while it runs"));
    let path = fleet.record_path("n");
    eventually("its host has heard of it", LONG, || (read(&path)["spec"]["checkpoint_every"] == "1m").then_some(()));
    (fleet, guest, path)
}

#[test]
#[ignore = "waits for a minute; run by make soak"]
fn the_clock_takes_a_first_checkpoint() {
    let (fleet, guest, path) = by_the_clock();
    let boots = guest.get("/boots");
    eventually("one is taken", LONG, || (!scheduled(&read(&path)).is_empty()).then_some(()));
    assert_eq!(guest.get("/boots"), boots, "nothing was restarted");
    assert!(!fleet.ok(&["history", "n"]).contains("not-kept"));
}

#[test]
fn checkpoints_by_the_clock() {
    let (mut fleet, guest, path) = by_the_clock();
    let (boots, generation) = (guest.get("/boots"), guest.get("/fill?20"));
    let [by_hand, first] = [(), ()].map(|()| fleet.json(&["checkpoint", "n"])["id"].as_u64().unwrap());
    // The plane is away: it is the host that takes them. The clock took one of these, and two weeks went by.
    fleet.kill_up();
    fleet.kill_host("b");
    let mut aged = read(&path);
    for kept in aged["checkpoints"].as_array_mut().unwrap() {
        kept["info"]["taken"] = "2026-01-01T00:00:00Z".into();
        kept["info"]["scheduled"] = (kept["info"]["id"] == first).into();
    }
    std::fs::write(&path, serde_json::to_vec(&aged).unwrap()).unwrap();
    fleet.run_host("b");
    eventually("the next one is taken at once, and the old one goes", LONG, || {
        let kept = scheduled(&read(&path));
        (!kept.is_empty() && !kept.contains(&first)).then_some(())
    });
    assert_eq!(guest.get("/boots"), boots, "nothing was restarted");
    fleet.up();
    fleet.wait_until_settled("n");
    let newest = eventually("the plane hears of it", LONG, || {
        let timeline = fleet.json(&["timeline", "n"]);
        let kept = timeline.as_array().unwrap().iter().rev().find(|kept| kept["scheduled"] == true)?.clone();
        (kept["id"].as_u64() != Some(first)).then_some(kept)
    });
    assert_eq!(newest["why"], "schedule");
    assert!(newest["machine"]["pause_us"].as_u64().unwrap() > 0, "{newest}");
    let timeline = fleet.json(&["timeline", "n"]);
    assert!(timeline.as_array().unwrap().iter().any(|kept| kept["id"] == by_hand), "what was made by hand stays");
    fleet.ok(&["set", "n", "checkpoint-every=off"]);
    assert_eq!(fleet.info("n")["checkpoint_every"], Value::Null);
    fleet.ok(&["restore", "n", &newest["id"].to_string()]);
    sound(&guest, &generation);
    assert!(!fleet.ok(&["history", "n"]).contains("not-kept"));
}

/// More than can be opened, as if none had become one for a year.
#[test]
fn a_chain_that_is_too_long_is_made_shorter_before_a_start() {
    let mut fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    guest.put("/notes/kept", "acknowledged");
    fleet.ok(&["stop", "n"]);
    let path = fleet.record_path("n");
    fleet.kill_up();
    let mut record = read(&path);
    let first = record["next_layer"].as_u64().unwrap();
    for disk in record["disks"].as_array_mut().unwrap() {
        let size = disk["size"].as_u64().unwrap();
        for number in first..first + 300 {
            if disk["name"] == "data" {
                Layer::create(&path.with_file_name("layers").join(number.to_string()), size).unwrap();
                disk["layers"].as_array_mut().unwrap().push(number.into());
            }
        }
    }
    record["next_layer"] = (first + 300).into();
    record["state"] = "starting".into();
    record["spec"]["on"] = true.into();
    std::fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    fleet.up();
    guest.answers();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    assert!(depths(&read(&path)).iter().all(|depth| *depth < 10), "{:?}", depths(&read(&path)));
    assert!(fleet.ok(&["history", "n"]).contains("become one before it starts"));
}

/// What the record names survives a power cut of the host, right after the old layers went.
#[test]
fn a_power_cut_after_a_merge() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: it takes root to make a disk that forgets");
    }
    let mut fleet = Fleet::start(PROGRAM);
    fleet.real_disk("b", 2 << 30);
    fleet.join_over_link("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &["--host", "b"]);
    let mut generations = Vec::new();
    for number in 0..4 {
        generations.push(guest.get("/fill?20"));
        guest.put(&format!("/notes/{number}"), "acknowledged");
        guest.get("/count?on");
        fleet.ok(&["checkpoint", "n"]);
    }
    forget(&fleet, "n", &[3]);
    few_layers(&fleet, "n", 4);
    fleet.cut_power("b");
    fleet.run_host("b");
    eventually("it boots again", LONG, || guest.ask("/notes/3"));
    fleet.wait("n", "healthy");
    for number in 0..4 {
        assert_eq!(guest.get(&format!("/notes/{number}")), "acknowledged", "note {number}");
    }
    fleet.ok(&["restore", "n", "3"]);
    sound(&guest, &generations[2]);
    assert_eq!(guest.request("GET", "/notes/3", "").unwrap().0, 404);
}

#[test]
#[ignore = "takes minutes; run by make soak"]
fn suspended_and_resumed_again_and_again() {
    let fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let generation = guest.get("/fill?20");
    guest.get("/count?on");
    let path = fleet.record_path("n");
    let mut longest = 0;
    for cycle in 0..60 {
        fleet.ok(&["suspend", "n"]);
        fleet.ok(&["resume", "n"]);
        if cycle % 3 == 0 {
            sound(&guest, &generation);
        }
        let depths = depths(&read(&path));
        longest = longest.max(*depths.iter().max().unwrap());
        eprintln!("cycle {cycle}: {depths:?} layers");
    }
    sound(&guest, &generation);
    assert!(longest <= 32, "{longest} layers");
    few_layers(&fleet, "n", 8);
    sound(&guest, &generation);
}

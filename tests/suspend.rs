//! A running machine is data: suspended, resumed, kept while it runs, gone back to; memory and disks always of one instant.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port, kill};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

pub(crate) fn launch(fleet: &Fleet, name: &str) -> Guest {
    fleet.publish(&tiny("1"));
    Guest::launch(fleet, name, &[])
}

pub(crate) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// Sets the guest's clock back, so that it is wrong unless the guest sets it when it goes on. Gives the generation that the
/// guest knows.
pub(crate) fn lose_the_time(guest: &Guest) -> String {
    guest.get("/time?1000000000");
    guest.get("/instance/generation")
}

/// The guest has noticed that it went on, and has set its clock, which has whole seconds.
#[track_caller]
pub(crate) fn knows_the_time(guest: &Guest, since: u64, before: &str) {
    eventually("the guest takes up who it is", LONG, || (guest.get("/instance/generation") != before).then_some(()));
    let time: u64 = guest.get("/time").parse().unwrap();
    assert!(
        (since - 1..=now() + 1).contains(&time),
        "{time} on the guest's clock, gone on with between {since} and now"
    );
}

#[test]
fn suspend_and_resume_under_load() {
    let mut fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let generation = guest.get("/fill?20");
    let boots = guest.get("/boots");
    guest.get("/count?on");
    eventually("it writes", LONG, || (guest.get("/count").parse::<u64>().unwrap() > 20).then_some(()));
    let before: u64 = guest.get("/count").parse().unwrap();

    let seed = lose_the_time(&guest);
    let suspended = fleet.json(&["suspend", "n"]);
    assert_eq!(suspended["state"], "suspended", "{suspended}");
    assert!(suspended["bytes"].as_u64().unwrap() > 20 << 20, "{suspended}");
    assert!(guest.is_closed());
    let info = fleet.info("n");
    assert_eq!(info["state"], "suspended");
    assert_eq!(info["suspended"]["platform"]["accelerator"], "tcg", "{info}");
    assert_eq!(info["suspended"]["platform"]["cpu"], "max", "{info}");
    // Again is no mistake; what needs a machine says what to do.
    assert_eq!(fleet.json(&["suspend", "n"])["state"], "suspended");
    for command in [["restart", "n"], ["rollback", "n"]] {
        let error = fleet.fails(&command);
        assert!(error.contains("suspended; resume it first"), "{error}");
    }
    let error = fleet.fails(&["wait", "n", "--for", "healthy"]);
    assert!(error.contains("collective resume n"), "{error}");

    let ordered = now();
    fleet.ok(&["resume", "n"]);
    knows_the_time(&guest, ordered, &seed);
    let after: u64 = guest.get("/count").parse().unwrap();
    assert!(after >= before, "{after} after {before}");
    assert!(guest.sound(&generation) >= before);
    assert_eq!(guest.get("/boots"), boots, "it was not booted");
    let info = fleet.info("n");
    assert_eq!((&info["resumed"], &info["processor"]), (&true.into(), &"max".into()), "{info}");

    // A second time only what was written since is saved. The daemon dies while it is suspended.
    let seed = lose_the_time(&guest);
    let second = fleet.json(&["suspend", "n"]);
    let (first, second) = (suspended["bytes"].as_u64().unwrap(), second["bytes"].as_u64().unwrap());
    assert!(second < first / 2, "{second} after {first}");
    fleet.kill_up();
    fleet.up();
    assert_eq!(fleet.info("n")["state"], "suspended");
    let ordered = now();
    fleet.ok(&["start", "n"]);
    guest.answers();
    knows_the_time(&guest, ordered, &seed);
    guest.sound(&generation);
    assert_eq!(guest.get("/boots"), boots);

    // A machine that went on can be reset by its guest, and dies like any other.
    guest.put("/notes/kept", "acknowledged");
    kill(fleet.qemu_pid("n"));
    eventually("the crash is noticed", LONG, || fleet.ok(&["history", "n"]).contains("crashed").then_some(()));
    fleet.wait("n", "healthy");
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    assert_ne!(guest.get("/boots"), boots, "after a power cut it boots");

    // Giving the memory up.
    fleet.ok(&["suspend", "n"]);
    let stopped = fleet.ok(&["stop", "n"]);
    assert!(stopped.contains("memory was given up"), "{stopped}");
    fleet.ok(&["start", "n"]);
    guest.answers();
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn checkpoints_of_a_machine_that_writes_and_back() {
    let fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let mut generations = vec![guest.get("/fill?20")];
    let mut counts = Vec::new();
    guest.get("/count?on");
    for number in 1..=3u64 {
        eventually("it writes", LONG, || (guest.get("/count").parse::<u64>().unwrap() > number * 30).then_some(()));
        counts.push(guest.get("/count").parse::<u64>().unwrap());
        let kept = fleet.json(&["checkpoint", "n", "--why", &format!("number {number}")]);
        assert_eq!(kept["id"], number, "{kept}");
        assert!(kept["machine"]["pause_us"].as_u64().unwrap() > 0, "{kept}");
        counts.push(guest.get("/count").parse::<u64>().unwrap());
        generations.push(guest.get("/fill?20"));
    }
    let timeline = fleet.json(&["timeline", "n"]);
    assert_eq!(timeline.as_array().unwrap().len(), 3, "{timeline}");
    assert!(fleet.ok(&["timeline", "n"]).contains("number 2"));

    // Back to the second: memory and disk of that instant, though both went on since. Who it is and when, is of now.
    let seed = lose_the_time(&guest);
    let ordered = now();
    let back = fleet.json(&["restore", "n", "2"]);
    assert_eq!((back["memory"].as_bool(), back["kept_as_checkpoint"].as_u64()), (Some(true), Some(4)), "{back}");
    knows_the_time(&guest, ordered, &seed);
    let count = guest.sound(&generations[1]);
    assert!(count >= counts[2], "{count} {counts:?}");
    // And forward again: the present was kept.
    fleet.ok(&["restore", "n", "4"]);
    guest.sound(&generations[3]);
    // Once more to the second, and on from there to a checkpoint of its own.
    fleet.ok(&["restore", "n", "2"]);
    guest.sound(&generations[1]);
    guest.put("/notes/branch", "written after going back");
    let kept = fleet.json(&["checkpoint", "n"]);
    fleet.ok(&["restore", "n", "1"]);
    assert_eq!(guest.request("GET", "/notes/branch", "").unwrap().0, 404);
    guest.sound(&generations[0]);
    fleet.ok(&["restore", "n", &kept["id"].to_string()]);
    assert_eq!(guest.get("/notes/branch"), "written after going back");

    // Disks only, with the data disk of today: it boots.
    fleet.ok(&["restore", "n", "1", "--disks-only", "--keep", "data"]);
    guest.answers();
    assert_eq!(guest.get("/notes/branch"), "written after going back");
    assert_eq!(guest.get("/pages"), "0 pages of 0, 0 bad", "it was booted");
    assert_eq!(fleet.info("n")["resumed"], false);

    // What is asked wrongly changes nothing.
    let state = fleet.info("n")["state"].clone();
    for (command, words) in [
        (vec!["restore", "n", "77"], "no checkpoint 77"),
        (vec!["restore", "n", "1", "--disks-only", "--keep", "nothing"], "no disk"),
        (vec!["checkpoint", "n", "--forget", "77"], "no checkpoint 77"),
        (vec!["resume", "missing"], "no instance"),
    ] {
        let error = fleet.fails(&command);
        assert!(error.contains(words), "{command:?}: {error}");
    }
    assert_eq!(fleet.info("n")["state"], state);
    fleet.ok(&["checkpoint", "n", "--forget", "3"]);
    assert!(!fleet.ok(&["timeline", "n"]).contains("number 3"));
    fleet.ok(&["restore", "n", "4"]);
    guest.sound(&generations[3]);
}

#[test]
fn deaths_while_it_is_saved() {
    let mut fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let generation = guest.get("/fill?20");
    guest.put("/notes/kept", "acknowledged");
    guest.get("/count?on");
    // The daemon dies at several instants of a checkpoint and of a suspend; the runner finishes what it was told.
    for pause in [15, 150] {
        let mut command = fleet.spawn(&["checkpoint", "n"]);
        std::thread::park_timeout(Duration::from_millis(pause));
        fleet.kill_up();
        let _ = command.wait();
        fleet.up();
        fleet.wait_until_settled("n");
        assert_eq!(guest.get("/pages"), format!("5120 pages of {generation}, 0 bad"));
    }
    for pause in [30, 300] {
        let mut command = fleet.spawn(&["suspend", "n"]);
        std::thread::park_timeout(Duration::from_millis(pause));
        fleet.kill_up();
        let _ = command.wait();
        fleet.up();
        eventually("it is one or the other", LONG, || {
            let info = fleet.info("n");
            let idle = info["operations"].as_array().is_some_and(Vec::is_empty);
            (idle && (info["state"] == "running" || info["state"] == "suspended")).then_some(())
        });
        if fleet.info("n")["state"] == "suspended" {
            fleet.ok(&["resume", "n"]);
        }
        assert_eq!(guest.get("/pages"), format!("5120 pages of {generation}, 0 bad"));
    }
    guest.sound(&generation);
    // Every checkpoint that is listed can be gone back to.
    for kept in fleet.json(&["timeline", "n"]).as_array().unwrap() {
        fleet.ok(&["restore", "n", &kept["id"].to_string()]);
        guest.sound(&generation);
        guest.get("/count?on");
    }
    // The runner dies in the middle of being suspended: it goes on, or is suspended, and what was acknowledged is there.
    let runner = fleet.runner_pid("n");
    let mut command = fleet.spawn(&["suspend", "n"]);
    eventually("it is being suspended", LONG, || {
        let state = fleet.info("n")["state"].clone();
        (state == "suspending" || state == "suspended").then_some(())
    });
    // Unless it was quicker.
    kill(runner);
    let _ = command.wait();
    eventually("it is over", LONG, || {
        let info = fleet.info("n");
        (info["state"] == "suspended" || info["health"] == "healthy").then_some(())
    });
    if fleet.info("n")["state"] == "suspended" {
        fleet.ok(&["resume", "n"]);
    }
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn what_was_damaged_is_not_gone_on_with() {
    let fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    guest.put("/notes/kept", "acknowledged");
    fleet.ok(&["suspend", "n"]);
    let layers = fleet.host_data("a").join("instances").join(fleet.info("n")["id"].as_str().unwrap()).join("layers");
    let states = std::fs::read_dir(&layers).unwrap().flatten().map(|entry| entry.path());
    let state = states.filter(|path| path.extension().is_some_and(|e| e == "state")).max().unwrap();
    let bytes = std::fs::read(&state).unwrap();
    let mut damaged = bytes.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&state, damaged).unwrap();
    let error = fleet.fails(&["resume", "n"]);
    assert!(error.contains("damaged") && error.contains("collective stop"), "{error}");
    let error = fleet.fails(&["start", "n"]);
    assert!(error.contains("suspended"), "{error}");
    assert_eq!(fleet.info("n")["state"], "suspended");
    std::fs::write(&state, bytes).unwrap();
    fleet.ok(&["resume", "n"]);
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
}

#[test]
fn a_running_machine_moves_there_and_back() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &["--host", "a"]);
    let generation = guest.get("/fill?20");
    let boots = guest.get("/boots");
    guest.put("/notes/kept", "acknowledged");
    guest.put("/sysroot/own", "on the system disk");
    guest.get("/count?on");
    let machine = guest.get("/machine-id");

    let verdict = fleet.json(&["check-host", "n", "--host", "b"]);
    assert_eq!(verdict["memory_goes"], true, "{verdict}");
    let dry = fleet.json(&["move", "n", "--to", "b", "--no-live", "--dry-run"]);
    assert!(dry["how"].as_str().unwrap().contains("suspended"), "{dry}");
    assert_eq!(fleet.info("n")["host"], "a", "nothing has moved");
    let (ordered, seed) = (now(), lose_the_time(&guest));
    fleet.ok(&["move", "n", "--to", "b", "--no-live"]);
    knows_the_time(&guest, ordered, &seed);
    let info = fleet.info("n");
    assert_eq!(
        (info["host"].as_str(), info["state"].as_str(), info["generation"].as_u64()),
        (Some("b"), Some("running"), Some(2))
    );
    guest.sound(&generation);
    assert_eq!(guest.get("/boots"), boots, "it was not booted");
    assert_eq!(guest.get("/machine-id"), machine);
    assert_eq!(guest.get("/notes/kept"), "acknowledged");
    guest.put("/notes/there", "written on b");
    let left = fleet.host_data("a").join("instances").join(info["id"].as_str().unwrap());
    eventually("the old host keeps nothing", LONG, || (!left.exists()).then_some(()));
    assert!(fleet.ok(&["history", "n"]).contains("arrived"));

    // And back, with a host that dies while it is suspended.
    guest.get("/count?on");
    let suspended = fleet.json(&["suspend", "n"]);
    assert!(suspended["store"]["new_bytes"].as_u64().unwrap() > 0, "{suspended}");
    assert_eq!(fleet.info("n")["in_store"], true);
    fleet.kill_host("b");
    fleet.ok(&["resume", "n", "--host", "a"]);
    guest.sound(&generation);
    assert_eq!(guest.get("/notes/there"), "written on b");
    let qemu = fleet.qemu_pid("n");
    fleet.run_host("b");
    let left = fleet.host_data("b").join("instances").join(info["id"].as_str().unwrap());
    eventually("the host that died learns that it is not the owner", LONG, || (!left.exists()).then_some(()));
    assert_eq!(fleet.qemu_pid("n"), qemu, "one machine only");
    assert_eq!(fleet.info("n")["host"], "a");

    // Off, and without its memory, with another version than its data disk began with.
    fleet.publish(&tiny("2"));
    fleet.ok(&["update", "n"]);
    fleet.wait("n", "healthy");
    guest.put("/sysroot/own", "on the system disk");
    fleet.ok(&["stop", "n"]);
    fleet.ok(&["move", "n", "--to", "b"]);
    assert_eq!(fleet.info("n")["state"], "stopped");
    fleet.ok(&["start", "n"]);
    guest.answers();
    assert_eq!(guest.get("/notes/there"), "written on b");
    assert_eq!(guest.get("/version"), "2");
    assert_eq!(guest.get("/sysroot/own"), "on the system disk");
    fleet.ok(&["suspend", "n"]);
    fleet.ok(&["resume", "n", "--host", "a", "--cold"]);
    guest.answers();
    assert_eq!(guest.get("/pages"), "0 pages of 0, 0 bad", "it was booted");
    assert_eq!(guest.get("/notes/there"), "written on b");
    for (command, words) in [
        (vec!["move", "n", "--to", "a"], "on host \"a\" already"),
        (vec!["move", "n", "--to", "nowhere"], "no host named"),
        (vec!["check-host", "n", "--host", "nowhere"], "no host named"),
    ] {
        let error = fleet.fails(&command);
        assert!(error.contains(words), "{command:?}: {error}");
    }
    fleet.wait("n", "healthy");
}

/// The others have 20 MB.
#[test]
fn a_hundred_megabytes_are_kept_gone_back_to_and_moved() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let guest = Guest::launch(&fleet, "n", &["--host", "a"]);
    let generation = guest.get("/fill?100");
    guest.get("/count?on");
    fleet.ok(&["move", "n", "--to", "b", "--no-live"]);
    assert_eq!(guest.get("/pages"), format!("25600 pages of {generation}, 0 bad"));
    guest.get("/count?on");
    fleet.ok(&["checkpoint", "n"]);
    guest.get("/fill?20");
    fleet.ok(&["restore", "n", "1"]);
    guest.sound(&generation);
}

#[test]
fn the_timeline_has_pictures_of_the_screen() {
    let fleet = Fleet::start(PROGRAM);
    let folder = fleet.file("with-screen");
    let made = std::process::Command::new("cp").arg("-r").arg(tiny("1")).arg(&folder).status();
    assert!(made.unwrap().success());
    let recipe = folder.join("appliance.toml");
    let text = std::fs::read_to_string(&recipe).unwrap();
    std::fs::write(&recipe, text.replace("display = false", "display = true")).unwrap();
    fleet.ok(&["publish", &folder.to_string_lossy()]);
    let guest = Guest { port: free_port() };
    fleet.ok(&["launch", "test/tiny:1", "--name", "n", "--publish", &format!("{}:80", guest.port)]);
    fleet.wait("n", "healthy");
    let generation = guest.get("/fill?20");
    fleet.ok(&["checkpoint", "n"]);
    let pictures = fleet.file("pictures");
    fleet.ok(&["timeline", "n", "--screens", &pictures.to_string_lossy()]);
    let picture = std::fs::read(pictures.join("1.png")).unwrap();
    assert!(picture.starts_with(b"\x89PNG"), "{} bytes", picture.len());
    // The video memory comes back too.
    fleet.ok(&["restore", "n", "1"]);
    guest.sound(&generation);
}

#[test]
fn an_ordinary_user_can_do_it_too() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: every other test runs as an ordinary user here");
    }
    let fleet = Fleet::start_as_nobody(PROGRAM);
    let guest = launch(&fleet, "n");
    let generation = guest.get("/fill?20");
    guest.get("/count?on");
    fleet.ok(&["checkpoint", "n"]);
    fleet.ok(&["suspend", "n"]);
    fleet.ok(&["resume", "n"]);
    guest.sound(&generation);
    fleet.ok(&["restore", "n", "1"]);
    guest.sound(&generation);
}

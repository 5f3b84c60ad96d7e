//! A machine that moves while it runs: it is on exactly one host at any time, and what it was goes on.

use std::time::{Duration, Instant};

use collective_testkit::{Fleet, Guest, Link, eventually, free_port};

use crate::{PROGRAM, tiny};

const LONG: Duration = Duration::from_secs(120);

/// A fleet with hosts b and c, and a machine on b. It publishes no port, since both hosts are this machine.
fn launch() -> (Fleet, Guest) {
    let (fleet, _, guest) = launch_with(&[]);
    (fleet, guest)
}

/// The same, with b behind a link.
fn launch_with(arguments: &[&str]) -> (Fleet, Link, Guest) {
    let mut fleet = Fleet::start(PROGRAM);
    // Over a link the plane listens at the same port when it is started again.
    let link = fleet.join_over_link("b");
    fleet.join("c");
    fleet.ok(&["publish", &tiny("1").to_string_lossy()]);
    fleet.ok(&[&["launch", "test/tiny:1", "--name", "n", "--host", "b"], arguments].concat());
    fleet.wait("n", "healthy");
    let guest = guest(&fleet);
    (fleet, link, guest)
}

/// The guest by the port that its runner forwards for the health check.
pub(crate) fn guest(fleet: &Fleet) -> Guest {
    let forwards = fleet.runner_status("n")["forwards"].clone();
    let at = forwards.as_array().unwrap().iter().find(|pair| pair[0] == 80).expect("its port 80")[1].clone();
    Guest { port: at.as_str().unwrap().rsplit_once(':').unwrap().1.parse().unwrap() }
}

/// Memory has what was put there, and the disk has what memory says.
#[track_caller]
fn sound(guest: &Guest, generation: &str) -> u64 {
    assert_eq!(guest.get("/pages"), format!("5120 pages of {generation}, 0 bad"));
    guest.get("/count?off");
    let ring = guest.get("/ring");
    let (count, bad) = ring.split_once(", ").unwrap();
    assert_eq!(bad, "0 bad", "{ring}");
    count.parse().unwrap()
}

#[track_caller]
fn writes_on(guest: &Guest) -> u64 {
    let before: u64 = guest.get("/count").parse().unwrap();
    eventually("it writes", LONG, || (guest.get("/count").parse::<u64>().unwrap() > before + 20).then_some(()));
    before
}

#[test]
fn a_machine_that_writes_moves_there_and_back_while_it_runs() {
    let (fleet, guest_on_b) = launch();
    let generation = guest_on_b.get("/fill?20");
    let boots = guest_on_b.get("/boots");
    guest_on_b.put("/notes/kept", "acknowledged");
    guest_on_b.put("/sysroot/own", "on the system disk");
    guest_on_b.get("/count?on");
    let written = writes_on(&guest_on_b);
    let seed = guest_on_b.get("/instance/generation");

    let moved = fleet.json(&["move", "n", "--to", "c"]);
    assert_eq!(moved["live"], true, "{moved}");
    assert!(moved["pause_us"].as_u64().unwrap() > 0, "{moved}");
    let info = fleet.info("n");
    assert_eq!((info["host"].as_str(), info["generation"].as_u64()), (Some("c"), Some(2)), "{info}");
    let guest_on_c = guest(&fleet);
    eventually("nothing of it is left running on b", LONG, || guest_on_b.is_closed().then_some(()));
    eventually("the guest takes up who it is", LONG, || (guest_on_c.get("/instance/generation") != seed).then_some(()));
    assert!(writes_on(&guest_on_c) >= written);
    assert!(sound(&guest_on_c, &generation) >= written);
    assert_eq!(guest_on_c.get("/boots"), boots, "it was not booted");
    assert_eq!(guest_on_c.get("/notes/kept"), "acknowledged");
    guest_on_c.put("/notes/there", "written on c");
    let left = fleet.host_data("b").join("instances").join(info["id"].as_str().unwrap());
    assert!(!left.exists(), "it is no instance of the old host any more");
    assert!(fleet.info("n")["moved_pause_us"].as_u64().is_some());

    // And back, with memory of which a part is mapped from what came.
    guest_on_c.get("/count?on");
    writes_on(&guest_on_c);
    let moved = fleet.json(&["move", "n", "--to", "b"]);
    assert_eq!(moved["live"], true, "{moved}");
    let guest_on_b = guest(&fleet);
    writes_on(&guest_on_b);
    sound(&guest_on_b, &generation);
    assert_eq!(guest_on_b.get("/boots"), boots);
    assert_eq!(guest_on_b.get("/notes/there"), "written on c");
    assert_eq!(guest_on_b.get("/sysroot/own"), "on the system disk");
}

/// QEMUs of the instance, on whichever host.
pub(crate) fn machines(id: &str) -> usize {
    let uuid = format!("{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]);
    let lines = std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some(String::from_utf8_lossy(&line).into_owned())
    });
    lines.filter(|line| line.starts_with("/") && line.contains("qemu-system") && line.contains(&uuid)).count()
}

/// Exactly one host has it, and it runs there. Gives that host and the guest.
fn one_owner(fleet: &Fleet) -> (String, Guest) {
    fleet.wait_until_settled("n");
    let info = fleet.info("n");
    let (host, id) = (info["host"].as_str().unwrap().to_owned(), info["id"].as_str().unwrap().to_owned());
    let other = if host == "b" { "c" } else { "b" };
    let left = fleet.host_data(other).join("instances").join(&id);
    eventually("it is no instance of the other host", LONG, || (!left.exists()).then_some(()));
    let kept = fleet.host_data(other).join("left").join(&id).join("instance.json");
    eventually("what the other host keeps is no instance", LONG, || (!kept.exists()).then_some(()));
    eventually("its machine is there", LONG, || {
        let machines = machines(&id);
        assert!(machines < 2, "one machine only");
        (machines == 1).then_some(())
    });
    fleet.wait("n", "healthy");
    let guest = guest(fleet);
    guest.answers();
    (host, guest)
}

/// Moves it again and again, and lets `die` do its work at another instant each time. Whatever happens, it goes on.
fn die_at_any_instant(mut die: impl FnMut(&mut Fleet, &str, &str)) {
    let (mut fleet, guest) = launch();
    let generation = guest.get("/fill?20");
    let boots = guest.get("/boots");
    guest.get("/count?on");
    let begun = Instant::now();
    fleet.ok(&["move", "n", "--to", "c"]);
    let whole = begun.elapsed();
    let (mut host, mut guest) = one_owner(&fleet);
    for part in [35, 80, 95, 100, 103] {
        let written = writes_on(&guest);
        let to = if host == "b" { "c" } else { "b" };
        let mut command = fleet.spawn(&["move", "n", "--to", to]);
        std::thread::park_timeout(whole * part / 100);
        die(&mut fleet, &host, to);
        let _ = command.wait();
        (host, guest) = one_owner(&fleet);
        eprintln!("after {part} % of the time: it is on {host}, and was to go to {to}");
        assert!(writes_on(&guest) >= written, "it went on");
        assert!(sound(&guest, &generation) >= written);
        assert_eq!(guest.get("/boots"), boots, "it was not booted");
        guest.get("/count?on");
    }
}

#[test]
fn the_daemon_that_gets_it_dies() {
    die_at_any_instant(|fleet, _, to| {
        fleet.kill_host(to);
        fleet.run_host(to);
    });
}

#[test]
fn the_daemon_that_has_it_dies() {
    die_at_any_instant(|fleet, from, _| {
        fleet.kill_host(from);
        fleet.run_host(from);
    });
}

#[test]
fn the_plane_dies() {
    die_at_any_instant(|fleet, _, _| {
        fleet.kill_up();
        fleet.up();
    });
}

/// A power cut to the machine, and to its daemon, at any instant: what was acknowledged is there, wherever it is then.
#[test]
fn the_host_that_has_it_dies() {
    let (mut fleet, _) = launch();
    let begun = Instant::now();
    fleet.ok(&["move", "n", "--to", "c"]);
    let whole = begun.elapsed();
    let (mut host, mut guest) = one_owner(&fleet);
    for part in [50, 90, 97, 101] {
        guest.put("/notes/kept", &format!("acknowledged before {part}"));
        let to = if host == "b" { "c" } else { "b" };
        let runner = fleet.runner_pid("n");
        let mut command = fleet.spawn(&["move", "n", "--to", to]);
        std::thread::park_timeout(whole * part / 100);
        fleet.kill_host(&host);
        // Unless it has gone with the machine.
        let _ = rustix::process::kill_process(
            rustix::process::Pid::from_raw(runner).unwrap(),
            rustix::process::Signal::KILL,
        );
        fleet.run_host(&host);
        let _ = command.wait();
        (host, guest) = one_owner(&fleet);
        eprintln!("after {part} % of the time: it is on {host}, and was to go to {to}");
        assert_eq!(guest.get("/notes/kept"), format!("acknowledged before {part}"));
    }
}

/// Its runner dies at any instant: it goes on, here or there, and stands still in between only until the plane has said whose it is.
#[test]
fn the_runner_that_sends_it_dies() {
    let (fleet, _) = launch();
    let begun = Instant::now();
    fleet.ok(&["move", "n", "--to", "c"]);
    let whole = begun.elapsed();
    let (mut host, mut guest) = one_owner(&fleet);
    let boots = guest.get("/boots");
    for part in [20, 60, 90, 97, 101] {
        guest.put("/notes/kept", &format!("acknowledged before {part}"));
        let to = if host == "b" { "c" } else { "b" };
        eventually("it may outlive its runner", LONG, || (fleet.runner_status("n")["outlives"] == true).then_some(()));
        let runner = fleet.runner_pid("n");
        let mut command = fleet.spawn(&["move", "n", "--to", to]);
        std::thread::park_timeout(whole * part / 100);
        // Unless it has gone with the machine.
        collective_testkit::kill(runner);
        let _ = command.wait();
        (host, guest) = one_owner(&fleet);
        eprintln!("after {part} % of the time: it is on {host}, and was to go to {to}");
        assert_eq!(guest.get("/notes/kept"), format!("acknowledged before {part}"));
        assert_eq!(guest.get("/boots"), boots, "it was not booted");
    }
}

#[test]
fn a_thin_link_is_noticed_and_it_is_suspended_for_the_move() {
    let (fleet, link, guest_on_b) = launch_with(&[]);
    guest_on_b.get("/fill?20");
    // There and back at once: what it left there is only just being cleared away.
    for to in ["c", "b", "c", "b"] {
        assert_eq!(fleet.json(&["move", "n", "--to", to])["live"], true);
    }
    // What is on c of it is of no use.
    guest(&fleet).get("/fill?20");
    let dry = fleet.json(&["move", "n", "--to", "c", "--dry-run"]);
    assert_eq!((dry["live"].as_bool(), dry["why_not_live"].is_null()), (Some(true), true), "{dry}");
    assert!(dry["estimate"]["bytes"].as_u64().unwrap() > 20 << 20, "{dry}");
    assert_eq!(fleet.info("n")["host"], "b", "nothing has moved");
    fleet.ok(&["move", "n", "--to", "c"]);

    let generation = guest(&fleet).get("/fill?20");
    // What is kept there would be enough.
    let kept = fleet.host_data("b").join("left");
    eventually("b keeps it", LONG, || std::fs::read_dir(&kept).ok()?.next().map(|_| ()));
    std::fs::remove_dir_all(&kept).unwrap();
    link.slow(16 << 10);
    let dry = fleet.json(&["move", "n", "--to", "b", "--dry-run"]);
    assert_eq!(dry["live"], false, "{dry}");
    assert!(dry["how"].as_str().unwrap().contains("suspended"), "{dry}");
    assert!(dry["why_not_live"].as_str().unwrap().contains("minutes"), "{dry}");
    let mut command = fleet.spawn(&["move", "n", "--to", "b"]);
    eventually("it is suspended", LONG, || {
        let state = fleet.info("n")["state"].clone();
        (state != "running").then_some(())
    });
    link.slow(0);
    assert!(command.wait().unwrap().success());
    let (host, guest) = one_owner(&fleet);
    assert_eq!(host, "b");
    sound(&guest, &generation);
    let info = fleet.info("n");
    assert_eq!((&info["resumed"], &info["moved_pause_us"]), (&true.into(), &serde_json::Value::Null), "{info}");
}

#[test]
fn what_the_other_host_cannot_take_goes_on_where_it_was() {
    let port = free_port();
    // The other host is the same machine, so it has not got this port.
    let (fleet, _, guest) = launch_with(&["--publish", &format!("{port}:80")]);
    let boots = guest.get("/boots");
    for command in [vec!["move", "n", "--to", "c"], vec!["move", "n", "--to", "c", "--dry-run"]] {
        let error = fleet.fails(&command);
        assert!(error.contains(&format!("cannot publish port {port}")), "{command:?}: {error}");
    }
    let (host, _) = one_owner(&fleet);
    assert_eq!((host.as_str(), Guest { port }.get("/boots")), ("b", boots));
    for (command, words) in [
        (vec!["move", "n", "--to", "b"], "on host \"b\" already"),
        (vec!["move", "n", "--to", "c", "--cold", "--no-live"], "cannot be used with"),
    ] {
        let outcome = fleet.run(&command);
        assert!(outcome.stderr.contains(words), "{command:?}: {outcome:?}");
    }
    // What it does next is saved whole.
    let kept = fleet.json(&["checkpoint", "n"]);
    fleet.ok(&["restore", "n", &kept["id"].to_string()]);
    Guest { port }.answers();
}

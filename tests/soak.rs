//! Stories that take minutes, so not every change has to pass them: a plain Debian with cloud-init, and bad luck at many
//! instants. `make soak` runs them; SOAK=N tries N instants in place of 8.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::{PROGRAM, cloud, tiny};

const LONG: Duration = Duration::from_secs(300);

/// The instants within `whole` at which something is killed: the same at every run, and including its end.
fn instants(whole: Duration) -> impl Iterator<Item = Duration> {
    let count = std::env::var("SOAK").map_or(8, |count| count.parse().expect("SOAK is a number"));
    (1..=count).map(move |index: u32| whole * index / count)
}

/// Lets this much time pass; the instant is what such a test is about.
fn at(instant: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < instant {
        std::thread::park_timeout(instant.saturating_sub(begun.elapsed()));
    }
}

#[test]
#[ignore = "boots Debian; run by make soak"]
fn a_plain_debian_has_its_identity_from_cloud_init_in_every_version() {
    let fleet = Fleet::start(PROGRAM);
    fleet.ok(&["publish", &cloud("1").to_string_lossy()]);
    let key = fleet.file("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
    assert!(made.unwrap().success());
    let (web, port) = (Guest { port: free_port() }, free_port().to_string());
    let published = (format!("{}:80", web.port), format!("{port}:22"));
    let public = fleet.file("key.pub");
    let public = public.to_string_lossy();
    let arguments = ["launch", "test/cloud", "--name", "diary", "--ssh-key", &public];
    fleet.ok(&[&arguments[..], &["--publish", &published.0, "--publish", &published.1]].concat());
    fleet.wait("diary", "healthy");
    assert_eq!(web.get("/health"), "written by user data");
    assert_eq!(web.get("/version"), "1");

    let host_key = || {
        eventually("the guest's sshd shows its key", LONG, || {
            let found = Command::new("ssh-keyscan").args(["-t", "ed25519", "-p", &port, "127.0.0.1"]).output().unwrap();
            let line = String::from_utf8(found.stdout).unwrap();
            (!line.is_empty()).then_some(line)
        })
    };
    let known = host_key();
    std::fs::write(fleet.file("known_hosts"), &known).unwrap();
    let ssh = |command: &str| {
        let mut ssh = Command::new("ssh");
        ssh.args(["-F", "none", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o"]);
        ssh.arg(format!("UserKnownHostsFile={}", fleet.file("known_hosts").display()));
        ssh.arg("-i").arg(&key).args(["-p", &port, "debian@127.0.0.1", command]);
        let output = ssh.output().unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let id = fleet.info("diary")["id"].as_str().unwrap().to_owned();
    let identity = format!("diary\n{id}\n");
    assert_eq!(ssh("hostname; cat /etc/machine-id"), identity);
    assert!(ssh("cloud-init status --wait").contains("status: done"), "all that cloud-init does succeeds");

    fleet.ok(&["publish", &cloud("2").to_string_lossy()]);
    fleet.ok(&["update", "diary"]);
    assert_eq!(web.get("/version"), "2");
    assert_eq!(host_key(), known, "the system disk is new, the host key is not");
    assert_eq!(ssh("hostname; cat /etc/machine-id"), identity);

    // Without the published port and without a key of ours.
    assert_eq!(fleet.ok(&["ssh", "debian@diary", "hostname; cat /etc/machine-id"]), identity);
    assert_eq!(fleet.run(&["ssh", "debian@diary", "exit 7"]).code, Some(7));
    std::fs::write(fleet.file("letter"), "there and back").unwrap();
    let (here, back) = (fleet.file("letter"), fleet.file("back"));
    fleet.ok(&["cp", &here.to_string_lossy(), "debian@diary:/tmp/letter"]);
    fleet.ok(&["cp", "debian@diary:/tmp/letter", &back.to_string_lossy()]);
    assert_eq!(std::fs::read_to_string(back).unwrap(), "there and back");
}

/// Kills in turn all of the machine and only the daemons (the guest goes on) while a user writes and an update runs.
#[test]
#[ignore = "takes ten seconds for each instant; run by make soak"]
fn an_update_killed_at_any_instant_ends_and_loses_nothing_acknowledged() {
    let mut fleet = Fleet::start(PROGRAM);
    for version in ["1", "2"] {
        fleet.publish(&tiny(version));
    }
    let guest = Guest { port: free_port() };
    fleet.ok(&["launch", "test/tiny:1", "--name", "n", "--publish", &format!("{}:80", guest.port)]);
    fleet.wait("n", "healthy");
    let begun = Instant::now();
    fleet.ok(&["update", "n"]);
    for (round, instant) in instants(begun.elapsed()).enumerate() {
        let target = if fleet.info("n")["version"] == "1" { "2" } else { "1" };
        let before = format!("/notes/{round}");
        guest.put(&before, &before);
        let over = AtomicBool::new(false);
        let mut acknowledged: Vec<String> = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let names = (0..).map(|index| format!("{before}-{index}")).take_while(|_| !over.load(Relaxed));
                let written = names.filter(|name| {
                    std::thread::park_timeout(Duration::from_millis(50));
                    guest.request("PUT", name, name).is_some_and(|(status, _)| status == 201)
                });
                written.collect()
            });
            let mut update = fleet.spawn(&["update", "n", "--to", target]);
            at(instant);
            over.store(true, Relaxed);
            if round % 2 == 0 {
                fleet.kill_everything();
            } else {
                fleet.kill_up();
            }
            update.wait().unwrap();
            writer.join().unwrap()
        });
        acknowledged.push(before);
        fleet.up();
        fleet.wait_until_settled("n");
        guest.answers();
        assert_eq!(guest.get("/version"), fleet.info("n")["version"].as_str().unwrap(), "killed after {instant:?}");
        for name in acknowledged {
            assert_eq!(guest.get(&name), name, "killed after {instant:?}");
        }
    }
}

#[test]
#[ignore = "tries many instants; run by make soak"]
fn a_publish_killed_at_any_instant_is_repeated() {
    let fleet = Fleet::start(PROGRAM);
    let built = tiny("1");
    let recipe = std::fs::read_to_string(built.join("appliance.toml")).unwrap();
    // Each round has an appliance of its own, for which the plane has nothing yet.
    let folder = |name: &str| {
        let folder = fleet.file(name);
        std::fs::create_dir(&folder).unwrap();
        for disk in ["system.raw", "data.raw"] {
            std::os::unix::fs::symlink(built.join(disk), folder.join(disk)).unwrap();
        }
        std::fs::write(folder.join("appliance.toml"), recipe.replace("\"tiny\"", &format!("\"{name}\""))).unwrap();
        folder.to_string_lossy().into_owned()
    };
    let first = folder("whole");
    let begun = Instant::now();
    fleet.ok(&["publish", &first]);
    for (round, instant) in instants(begun.elapsed()).enumerate() {
        let name = format!("killed-{round}");
        let (folder, reference) = (folder(&name), format!("test/{name}"));
        let mut child = fleet.spawn(&["publish", &folder]);
        at(instant);
        let _ = child.kill();
        child.wait().unwrap();
        // Either nothing can be seen, or all of it is there.
        if fleet.run(&["show", &reference]).code == Some(0) {
            assert_eq!(fleet.json(&["verify", &reference])["sound"], true, "killed after {instant:?}");
        }
        fleet.ok(&["publish", &folder]);
        assert_eq!(fleet.json(&["verify", &reference])["sound"], true, "killed after {instant:?}");
    }
}

/// The host's disk is a real file system that keeps only what was synced before its machine lost power.
#[test]
#[ignore = "takes a minute for each instant; run by make soak"]
fn a_power_cut_at_any_instant_of_an_update_leaves_one_side() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.real_disk("b", 2 << 30);
    fleet.join("b");
    for version in ["1", "2"] {
        fleet.publish(&tiny(version));
    }
    let guest = Guest { port: free_port() };
    let published = format!("{}:80", guest.port);
    fleet.ok(&["launch", "test/tiny:1", "--name", "n", "--host", "b", "--publish", &published]);
    fleet.wait("n", "healthy");
    let begun = Instant::now();
    fleet.ok(&["update", "n"]);
    for (round, instant) in instants(begun.elapsed()).enumerate() {
        let target = if fleet.info("n")["version"] == "1" { "2" } else { "1" };
        let note = format!("/notes/{round}");
        guest.put(&note, &note);
        let mut update = fleet.spawn(&["update", "n", "--to", target]);
        at(instant);
        fleet.cut_power("b");
        fleet.run_host("b");
        update.wait().unwrap();
        fleet.wait_until_settled("n");
        guest.answers();
        assert_eq!(guest.get("/version"), fleet.info("n")["version"].as_str().unwrap(), "cut after {instant:?}");
        assert_eq!(guest.get(&note), note, "cut after {instant:?}");
    }
}

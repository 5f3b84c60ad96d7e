//! One machine becomes several: each has the memory and the disks of the first, and is somebody else.

use collective_testkit::{Fleet, Guest, free_port};

use crate::PROGRAM;
use crate::suspend::{knows_the_time, launch, lose_the_time, now};

#[test]
fn clones_go_on_beside_each_other() {
    let fleet = Fleet::start(PROGRAM);
    let guest = launch(&fleet, "n");
    let generation = guest.get("/fill?20");
    guest.put("/notes/shared", "before");
    guest.get("/count?on");
    let boots = guest.get("/boots");
    let one = Guest { port: free_port() };
    let (ordered, seed) = (now(), lose_the_time(&guest));
    fleet.ok(&["clone", "n", "--name", "one", "--publish", &format!("{}:80", one.port)]);
    // It goes on with the other's memory, as somebody else.
    knows_the_time(&one, ordered, &seed);
    for (guest, name) in [(&guest, "n"), (&one, "one")] {
        let id = fleet.info(name)["id"].as_str().unwrap().to_owned();
        assert_eq!((guest.get("/hostname"), guest.get("/instance/machine-id")), (name.to_owned(), id.clone()));
        assert_eq!(guest.get("/boots"), boots, "it was not booted");
    }
    let id = fleet.info("one")["id"].as_str().unwrap().to_owned();
    assert_eq!((one.get("/etc/machine-id"), one.get("/etc/hostname")), (id, "one".to_owned()));
    assert_eq!(one.get("/etc/hosts"), "127.0.0.1 localhost\n127.0.1.1 tiny.test tiny", "that was another name");
    assert_eq!(one.get("/etc/ssh/ssh_host_ed25519_key"), one.get("/instance/ssh_host_ed25519_key"));
    assert_ne!(one.get("/instance/ssh_host_ed25519_key.pub"), guest.get("/instance/ssh_host_ed25519_key.pub"));
    assert_eq!(guest.get("/etc/ssh/ssh_host_ed25519_key"), "every tiny's", "the first one stays who it is");
    assert_eq!(guest.get("/instance/generation"), seed);
    assert_eq!(one.request("GET", "/instance/random-seed", "").unwrap().0, 404);
    one.sound(&generation);
    assert_eq!(one.get("/notes/shared"), "before");
    guest.sound(&generation);
    // Each goes its own way.
    one.put("/notes/own", "of the clone");
    guest.put("/notes/own", "of the first");
    let other = one.get("/fill?20");
    one.sound(&other);
    guest.sound(&generation);
    let seed = lose_the_time(&one);
    fleet.ok(&["suspend", "one"]);
    let ordered = now();
    fleet.ok(&["resume", "one"]);
    knows_the_time(&one, ordered, &seed);
    assert_eq!(one.get("/hostname"), "one");
    assert_eq!(one.get("/notes/own"), "of the clone");
    let (a, b) = (fleet.info("n"), fleet.info("one"));
    assert_ne!(a["id"], b["id"]);
    // And it has its own identity at its next boot.
    fleet.ok(&["restart", "one"]);
    one.answers();
    assert_eq!(one.get("/hostname"), "one");
    assert_eq!(one.get("/notes/own"), "of the clone");
    // The first can go; and several at once, of one that is off.
    fleet.ok(&["delete", "n", "--data"]);
    assert_eq!(one.get("/notes/shared"), "before");
    fleet.ok(&["stop", "one"]);
    fleet.ok(&["clone", "one", "--count", "2", "--name", "many"]);
    for name in ["many-1", "many-2"] {
        fleet.wait(name, "healthy");
    }
    // They have the same files, even where nothing else keeps these any more.
    let kept = fleet.json(&["timeline", "one"]).as_array().unwrap().last().unwrap()["id"].to_string();
    fleet.ok(&["checkpoint", "one", "--forget", &kept]);
    fleet.ok(&["start", "one"]);
    one.answers();
    one.put("/notes/later", "of one alone");
    fleet.ok(&["clone", "many-1", "--name", "looked-at", "--publish", &format!("{}:80", guest.port)]);
    // From its disks, and not from what the guest remembers of them.
    fleet.ok(&["restart", "looked-at"]);
    guest.answers();
    assert_eq!(guest.get("/notes/shared"), "before");
    assert_eq!(guest.request("GET", "/notes/later", "").unwrap().0, 404);
    let error = fleet.fails(&["clone", "one", "--name", "many-1"]);
    assert!(error.contains("taken"), "{error}");
    let error = fleet.fails(&["clone", "one", "--checkpoint", "99"]);
    assert!(error.contains("no checkpoint 99"), "{error}");
}

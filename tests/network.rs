//! What a guest reaches: never the host itself, and nothing at all where its user says so. As root, and as anybody.

use collective_testkit::{Fleet, Guest, free_port};

use crate::{PROGRAM, tiny};

/// Launches the tiny guest and lets it try to reach what runs on this host.
fn guest_is_kept_from_the_host(fleet: &Fleet) {
    fleet.publish(&tiny("1"));
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    guest.put("/notes/x", "an ordinary note");
    assert_eq!(guest.get("/notes/x"), "an ordinary note");
    // Something certainly listens on these: the published port, and the plane.
    let status = fleet.json(&["status"]);
    let plane = status["listen"].as_str().unwrap().rsplit_once(':').unwrap().1.to_owned();
    for target in [port.to_string(), plane] {
        // 10.0.2.2 is the host in QEMU's user network; its loopback would answer there.
        for address in ["10.0.2.2", "127.0.0.1"] {
            assert!(std::net::TcpStream::connect(("127.0.0.1", target.parse().unwrap())).is_ok());
            let answer = guest.get(&format!("/connect?{address}:{target}"));
            assert!(!answer.starts_with("connected"), "the guest reached {address}:{target}: {answer}");
        }
    }
    fleet.ok(&["stop", "n"]);
}

#[test]
fn the_guest_reaches_neither_the_loopback_nor_the_plane() {
    guest_is_kept_from_the_host(&Fleet::start(PROGRAM));
}

#[test]
fn it_works_as_an_ordinary_user_and_says_what_that_costs() {
    if !rustix::process::geteuid().is_root() {
        // Then every other test is this test.
        return;
    }
    let fleet = Fleet::start_as_nobody(PROGRAM);
    let warnings = fleet.json(&["status"])["hosts"][0]["facts"]["warnings"].to_string();
    assert!(warnings.contains("not root"), "{warnings}");
    guest_is_kept_from_the_host(&fleet);
}

#[test]
fn without_a_network_the_published_port_still_works() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--network", "none", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    for target in ["10.0.2.2:80", "10.0.2.3:53", "192.0.2.1:80"] {
        let answer = guest.get(&format!("/connect?{target}"));
        assert!(!answer.starts_with("connected"), "{target}: {answer}");
    }
}

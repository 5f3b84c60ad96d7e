//! Into a guest from anywhere: its console, its log as it grows, its ports, on a host that is reached through the plane.

use collective_testkit::Fleet;

use crate::{PROGRAM, tiny};

const ASK: &str = "GET /health HTTP/1.0\r\n\r\n";

#[test]
fn console_log_and_ports_of_a_guest_on_another_host() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "b"]);
    fleet.wait("n", "healthy");

    let log = fleet.talk(&["logs", "n", "--follow"]);
    log.hear("tiny 1 ready");

    let mut first = fleet.talk(&["console", "n"]);
    // What was said before comes first, so that one sees where one is.
    first.hear("tiny 1 ready");
    first.say("echo $((6 * 7)) from $(hostname)\n");
    first.hear("42 from n");
    log.hear("42 from n");

    let refused = fleet.fails(&["console", "n"]);
    assert!(refused.contains("--force"), "{refused}");
    let mut second = fleet.talk(&["console", "n", "--force"]);
    first.hear("somebody took it over");
    assert_eq!(first.end(), Some(0));
    second.say("echo $((6 * 8)) times\n");
    second.hear("48 times");
    second.hang_up();
    assert_eq!(second.end(), Some(0));
    fleet.talk(&["console", "n"]).hear("48 times");

    // Port 80 was not published. The end of our words reaches the guest, and its answer reaches us.
    let mut web = fleet.talk(&["tunnel", "n", "80"]);
    web.say(ASK);
    web.hang_up();
    web.hear("200 OK");
    assert_eq!(web.end(), Some(0));
    // Nobody listens on this one: QEMU takes the connection, and the guest ends it.
    let mut nobody = fleet.talk(&["tunnel", "n", "81"]);
    nobody.hang_up();
    assert_eq!(nobody.end(), Some(0));

    let console = fleet.talk(&["console", "n"]);
    fleet.ok(&["stop", "n"]);
    console.hear("the guest has stopped");
    assert_eq!(console.end(), Some(0));
    for command in [&["console", "n"][..], &["tunnel", "n", "80"]] {
        let refused = fleet.fails(command);
        assert!(refused.contains("cannot reach into n: it does not run"), "{refused}");
    }
    assert!(fleet.fails(&["console", "nobody"]).contains("no instance"));
    assert_eq!(fleet.run(&["tunnel", "n", "0"]).code, Some(2));
    assert!(fleet.fails(&["cp", "here", "there"]).contains("NAME:PATH"));
    assert!(fleet.fails(&["cp", "n:/x", "m:/y"]).contains("one instance"));
    assert!(fleet.fails(&["ssh", "@n"]).contains("[USER@]NAME"));
    assert!(fleet.fails(&["ssh", "root@nobody"]).contains("no instance"));
    // The log is there without the guest, and goes on when it starts again.
    fleet.ok(&["start", "n"]);
    fleet.wait("n", "healthy");
    log.hear("tiny 1 ready");

    // Another daemon reaches the guest that an earlier one started.
    fleet.kill_host("b");
    let mut web = fleet.talk(&["tunnel", "n", "80"]);
    web.say(ASK);
    fleet.run_host("b");
    web.hear("200 OK");
}

#[test]
fn a_version_on_probation_lets_nobody_in_but_the_console() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    fleet.ok(&["launch", "test/tiny", "--name", "n"]);
    fleet.wait("n", "healthy");
    // Version 3 never becomes healthy, so its gate stays closed until its limit is over.
    fleet.publish(&tiny("3"));
    let update = fleet.talk(&["update", "n"]);
    let log = fleet.talk(&["logs", "n", "--follow"]);
    log.hear("tiny 3 is broken on purpose");
    let refused = fleet.fails(&["tunnel", "n", "80"]);
    assert!(refused.contains("has not proved itself"), "{refused}");
    let mut console = fleet.talk(&["console", "n"]);
    console.say("echo $((6 * 7)) days\n");
    console.hear("42 days");
    // That it comes back, and its ports with it, is in the main job; here it need not be waited for.
    drop(update);
}

#[test]
fn ssh_waits_for_a_guest_that_was_started_just_now() {
    let fleet = Fleet::start(PROGRAM);
    fleet.publish(&tiny("1"));
    fleet.ok(&["launch", "test/tiny", "--name", "n"]);
    // The tiny guest has no SSH server, so that ssh says no when it is up, and not before.
    let said = fleet.run(&["ssh", "n", "true"]).stderr;
    assert!(said.contains("waiting for its SSH server"), "{said}");
    assert_eq!(fleet.info("n")["health"], "healthy");
    let said = fleet.run(&["ssh", "n", "true"]).stderr;
    assert!(!said.contains("waiting"), "{said}");
}

//! The main job: publish, launch on another host, update with the user's data kept, come back from a broken version.

use std::time::Duration;

use collective_testkit::{Fleet, Guest, eventually, free_port};

use crate::{PROGRAM, tiny};

fn publish(fleet: &Fleet, version: &str) -> serde_json::Value {
    let folder = tiny(version);
    fleet.json(&["publish", &folder.to_string_lossy()])
}

#[test]
fn publish_launch_update_and_come_back() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    let first = publish(&fleet, "1");
    assert!(first["sent_bytes"].as_u64().unwrap() > 1_000_000);
    let again = publish(&fleet, "1");
    assert_eq!(again["digest"], first["digest"], "publishing the same again changes nothing");
    assert_eq!(again["sent_bytes"], 0);
    assert!(fleet.ok(&["search", "tin"]).contains("test/tiny"));
    assert_eq!(fleet.json(&["show", "test/tiny:1"])["digest"], first["digest"]);
    assert_eq!(fleet.json(&["verify", "test/tiny"])["sound"], true);

    let port = free_port();
    let publish_port = format!("{port}:80");
    let arguments =
        ["launch", "test/tiny", "--name", "n", "--host", "b", "--publish", &publish_port, "--set", "title=Hello"];
    assert_eq!(fleet.json(&arguments)["name"], "n");
    fleet.wait("n", "running");
    fleet.wait("n", "healthy");
    let guest = Guest { port };
    guest.answers();
    assert_eq!(guest.get("/version"), "1");
    assert_eq!(guest.get("/setting/title"), "Hello");
    assert_eq!(guest.get("/hostname"), "n");
    let info = fleet.info("n");
    assert_eq!(guest.get("/machine-id"), info["id"].as_str().unwrap());
    assert!(info["bytes_fetched"].as_u64().unwrap() > 1_000_000, "{info}");
    assert!(info["first_answer_ms"].as_u64().unwrap() > info["started_in_ms"].as_u64().unwrap());
    assert!(info["accelerator"].as_str().unwrap().starts_with("tcg"));
    eventually("everything is fetched", Duration::from_secs(60), || {
        (fleet.info("n")["frames_missing"] == 0).then_some(())
    });

    // The same version again on the same host: nothing more is fetched.
    let second = free_port();
    fleet.ok(&["launch", "test/tiny:1", "--name", "m", "--host", "b", "--publish", &format!("{second}:80")]);
    fleet.wait("m", "healthy");
    let info = fleet.info("m");
    assert_eq!(info["bytes_fetched"], 0, "{info}");
    assert!(info["bytes_from_cache"].as_u64().unwrap() > 1_000_000);
    assert_ne!(Guest { port: second }.get("/machine-id"), guest.get("/machine-id"));
    fleet.ok(&["delete", "m", "--data"]);

    // A true update: exactly the planned bytes, and the note is there.
    guest.put("/notes/shopping", "milk and bread");
    guest.put("/sysroot/mine", "a change to the system disk");
    let identity = guest.get("/machine-id");
    publish(&fleet, "2");
    let plan = fleet.json(&["plan", "n"]);
    assert_eq!((&plan["from"], &plan["to"]), (&"1".into(), &"2".into()));
    assert!(plan["bytes_to_fetch"].as_u64().unwrap() > 100_000);
    assert!(plan["bytes_to_fetch"].as_u64() < first["stored_bytes"].as_u64());
    assert!(plan["own_system_bytes_left_behind"].as_u64().unwrap() > 0);
    let update = fleet.json(&["update", "n"]);
    assert_eq!(update["updated"], true, "{update}");
    assert_eq!(update["bytes_fetched"], plan["bytes_to_fetch"]);
    assert_eq!(guest.get("/version"), "2");
    assert_eq!(guest.get("/notes/shopping"), "milk and bread");
    assert_eq!(guest.get("/machine-id"), identity);
    assert_eq!(guest.get("/hostname"), "n");
    assert_eq!(guest.request("GET", "/sysroot/mine", "").unwrap().0, 404, "the system disk is the version's");
    assert_eq!(fleet.json(&["plan", "n"])["bytes_to_fetch"], 0);

    // A broken version that damages the data: it comes back by itself.
    guest.put("/notes/later", "written on version 2");
    publish(&fleet, "3");
    let mut update = fleet.spawn(&["update", "n"]);
    eventually("the update begins", Duration::from_secs(60), || (fleet.info("n")["state"] == "updating").then_some(()));
    eventually("the new version starts", Duration::from_secs(60), || (fleet.info("n")["version"] == "3").then_some(()));
    assert!(guest.is_closed(), "nobody comes in before the version has proved itself");
    assert_eq!(update.wait().unwrap().code(), Some(1));
    guest.answers();
    assert_eq!(guest.get("/version"), "2");
    assert_eq!(guest.get("/notes/shopping"), "milk and bread");
    assert_eq!(guest.get("/notes/later"), "written on version 2");
    let info = fleet.info("n");
    assert_eq!((&info["version"], &info["state"]), (&"2".into(), &"running".into()));
    assert!(info["last_error"].as_str().unwrap().contains("GET :80/health"), "{info}");
    let failed = |checkpoint: &serde_json::Value| checkpoint["why"].as_str().unwrap().contains("failed update to 3");
    assert!(info["checkpoints"].as_array().unwrap().iter().any(failed), "{info}");
    let history = fleet.ok(&["history", "n"]);
    assert!(history.contains("update-failed") && history.contains("GET :80/health"), "{history}");

    // By hand: the system alone, then its data too.
    fleet.ok(&["rollback", "n"]);
    fleet.wait("n", "healthy");
    assert_eq!(guest.get("/version"), "1");
    assert_eq!(guest.get("/notes/later"), "written on version 2");
    assert_eq!(guest.get("/sysroot/mine"), "a change to the system disk", "its own system disk is back");
    fleet.ok(&["rollback", "n", "--with-data"]);
    fleet.wait("n", "healthy");
    assert_eq!(guest.get("/notes/shopping"), "milk and bread");
    assert_eq!(guest.request("GET", "/notes/later", "").unwrap().0, 404, "data as it was before the update");
    assert!(fleet.fails(&["rollback", "n"]).contains("nothing to go back to"));
    assert!(fleet.ok(&["stop", "n"]).contains("shut itself down"));
}

#[test]
fn updates_come_by_themselves_and_wait_while_held() {
    let fleet = Fleet::start(PROGRAM);
    publish(&fleet, "1");
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--follow", "stable", "--publish", &format!("{port}:80")]);
    fleet.wait("n", "healthy");
    fleet.ok(&["hold", "n", "--until", "1h"]);
    publish(&fleet, "2");
    let version = |fleet: &Fleet| fleet.info("n")["version"].as_str().unwrap().to_owned();
    // That the reconciler has looked and decided against it is proved in crates/plane/tests/api.rs.
    assert_eq!(fleet.json(&["plan", "n"])["to"], "2");
    assert_eq!(version(&fleet), "1");
    assert!(fleet.info("n")["operations"].as_array().unwrap().is_empty());
    fleet.ok(&["hold", "n", "--until", "now"]);
    eventually("it updates by itself", Duration::from_secs(120), || {
        (version(&fleet) == "2" && fleet.info("n")["state"] == "running").then_some(())
    });
    let guest = Guest { port };
    guest.answers();
    assert_eq!(guest.get("/version"), "2");
    // Whoever goes back is not brought forward again.
    fleet.ok(&["rollback", "n"]);
    fleet.wait("n", "healthy");
    assert_eq!(fleet.json(&["plan", "n"])["to"], "2");
    assert_eq!(version(&fleet), "1");
    assert!(fleet.info("n")["operations"].as_array().unwrap().is_empty());
}

//! Bad input: refused at the boundary, by name, with what to do; nothing panics, hangs or is half done.

use std::path::Path;

use collective_testkit::{Fleet, free_port};

use crate::{PROGRAM, tiny};

/// A folder that `publish` takes: a small disk of a pattern, as publisher `p`.
fn appliance(fleet: &Fleet, name: &str, version: &str) -> String {
    let folder = fleet.file(&format!("{name}-{version}"));
    std::fs::create_dir_all(&folder).unwrap();
    let toml = format!(
        "publisher='p'\nname='{name}'\nversion='{version}'\n[hardware]\nmemory='64M'\n\
         [[disk]]\nname='system'\nrole='system'\nfile='system.raw'\n[[port]]\nname='http'\nguest=80\n\
         [settings.level]\ntype='integer'\n"
    );
    std::fs::write(folder.join("appliance.toml"), toml).unwrap();
    let disk: Vec<u8> = (0..1_048_576u32).map(|i| (i / 4096) as u8 ^ version.as_bytes()[0]).collect();
    std::fs::write(folder.join("system.raw"), disk).unwrap();
    folder.to_string_lossy().into_owned()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected {part:?} in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn unknown_things_and_taken_names() {
    let fleet = Fleet::start(PROGRAM);
    says(&fleet.fails(&["show", "p/nothing"]), &["p/nothing", "search"]);
    says(&fleet.fails(&["launch", "nobody/nothing"]), &["nobody/nothing", "search"]);
    fleet.ok(&["publish", &appliance(&fleet, "app", "1")]);
    says(&fleet.fails(&["show", "p/app:9"]), &["p/app:9", "versions of p/app: 1"]);
    says(&fleet.fails(&["launch", "p/app", "--follow", "beta"]), &["no channel \"beta\""]);
    says(&fleet.fails(&["launch", "p/app", "--host", "mars"]), &["no host named \"mars\""]);
    says(&fleet.fails(&["launch", "p/app", "--publish", "8080:81"]), &["offers no port 81", "80 (http)"]);
    says(&fleet.fails(&["launch", "p/app", "--set", "nope=1"]), &["no setting \"nope\"", "level"]);
    says(&fleet.fails(&["launch", "p/app", "--set", "level=high"]), &["integer"]);
    says(&fleet.fails(&["launch", "p/app", "--memory", "900G"]), &["memory", "host \"a\""]);
    says(&fleet.fails(&["launch", "p/app", "--cpus", "200"]), &["CPUs"]);
    says(&fleet.fails(&["info", "nobody"]), &["no instance \"nobody\"", "collective list"]);
    let usage = fleet.run(&["launch", "p/app", "--publish", "http"]);
    assert_eq!(usage.code, Some(2));
    says(&usage.stderr, &["HOSTPORT:GUESTPORT"]);
    assert_eq!(fleet.run(&["launch", "p/app", "--name", "../x"]).code, Some(2));

    // A port that another program has: the instance says so and is failed, not half there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    fleet.ok(&["launch", "p/app", "--name", "n", "--publish", &format!("{port}:80")]);
    says(&fleet.fails(&["wait", "n", "--for", "running"]), &[&port, "publish another port"]);
    assert_eq!(fleet.info("n")["state"], "failed");
    says(&fleet.fails(&["launch", "p/app", "--name", "n"]), &["\"n\" is taken"]);
    says(
        &fleet.fails(&["launch", "p/app", "--name", "m", "--publish", &format!("{port}:80")]),
        &["taken by instance \"n\""],
    );
    drop(listener);
    fleet.ok(&["start", "n"]);
    assert_eq!(fleet.info("n")["state"], "running");
    fleet.ok(&["delete", "n", "--data"]);
    assert!(fleet.json(&["list"]).as_array().unwrap().is_empty());
}

#[test]
fn disk_files_that_are_none() {
    let fleet = Fleet::start(PROGRAM);
    let folder = appliance(&fleet, "app", "1");
    let disk = Path::new(&folder).join("system.raw");
    std::fs::write(&disk, "").unwrap();
    says(&fleet.fails(&["publish", &folder]), &["system.raw", "empty"]);
    std::fs::write(&disk, vec![1; 1000]).unwrap();
    says(&fleet.fails(&["publish", &folder]), &["not a multiple of 512"]);
    let mut qcow2 = b"QFI\xfb\0\0\0\x03".to_vec();
    qcow2.resize(4096, 0xff);
    std::fs::write(&disk, qcow2).unwrap();
    says(&fleet.fails(&["publish", &folder]), &["qemu-img"]);
    std::fs::remove_file(&disk).unwrap();
    says(&fleet.fails(&["publish", &folder]), &["system.raw", "No such file"]);
    std::fs::create_dir(&disk).unwrap();
    says(&fleet.fails(&["publish", &folder]), &["not a file"]);
    std::fs::write(Path::new(&folder).join("appliance.toml"), "publisher = 3").unwrap();
    says(&fleet.fails(&["publish", &folder]), &["appliance.toml", "line 1"]);
    assert!(fleet.json(&["search"]).as_array().unwrap().is_empty(), "nothing became visible");
}

#[test]
fn a_qcow2_that_names_another_file_is_refused() {
    let fleet = Fleet::start(PROGRAM);
    let folder = appliance(&fleet, "app", "1");
    let disk = Path::new(&folder).join("system.raw");
    std::fs::write(fleet.file("secret"), vec![7; 1 << 20]).unwrap();
    std::fs::remove_file(&disk).unwrap();
    let output = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([fleet.file("secret"), disk.clone()])
        .status()
        .unwrap();
    assert!(output.success());
    says(&fleet.fails(&["publish", &folder]), &["refers to another file"]);
    let output =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("1M").status();
    assert!(output.unwrap().success());
    fleet.ok(&["publish", &folder]);
}

#[test]
fn versions_never_change_and_publishers_keep_their_keys() {
    let fleet = Fleet::start(PROGRAM);
    let folder = appliance(&fleet, "app", "1");
    fleet.ok(&["publish", &folder]);
    std::fs::write(Path::new(&folder).join("system.raw"), vec![9; 4096]).unwrap();
    says(&fleet.fails(&["publish", &folder]), &["p/app:1", "versions never change"]);

    // Another key: refused, until a person says that it is right.
    let second = appliance(&fleet, "app", "2");
    std::fs::remove_file(fleet.file("config/keys/p.key")).unwrap();
    let error = fleet.fails(&["publish", &second]);
    says(&error, &["is known by key", "collective trust p "]);
    assert_eq!(fleet.json(&["show", "p/app"])["manifest"]["version"], "1", "the channel did not move");
    let key = error.split("collective trust p ").nth(1).unwrap().get(..64).unwrap().to_owned();
    fleet.ok(&["trust", "p", &key]);
    fleet.ok(&["publish", &second]);
    assert_eq!(fleet.json(&["show", "p/app"])["manifest"]["version"], "2");

    // The old key can hand over to a new one, and what it signed stays good.
    let new = fleet.json(&["rekey", "p"])["key"].as_str().unwrap().to_owned();
    assert_ne!(new, key);
    fleet.ok(&["publish", &appliance(&fleet, "app", "3")]);
    assert_eq!(fleet.json(&["verify", "p/app:2"])["key"], key);
    assert_eq!(fleet.json(&["verify", "p/app:3"])["key"], new);
    fleet.ok(&["launch", "p/app:2", "--name", "old"]);
    fleet.ok(&["launch", "p/app:3", "--name", "new"]);
    fleet.wait("old", "running");
    fleet.wait("new", "running");
}

#[test]
fn tokens_are_used_once_and_certificates_are_pinned() {
    let mut fleet = Fleet::start(PROGRAM);
    let token = fleet.ok(&["token", "create"]).trim().to_owned();
    let data = fleet.file("b").to_string_lossy().into_owned();
    let join = |token: &str| fleet.run(&["host", "join", token, "--name", "b", "--no-run", "--data", &data]);
    let mut forged = token.clone();
    let digit = if &forged[80..81] == "0" { "1" } else { "0" };
    forged.replace_range(80..81, digit);
    let refused = join(&forged);
    assert_eq!(refused.code, Some(1));
    says(&refused.stderr, &["certificate", "another plane"]);
    let mut unknown = token.clone();
    let digit = if &unknown[10..11] == "0" { "1" } else { "0" };
    unknown.replace_range(10..11, digit);
    says(&join(&unknown).stderr, &["not known here"]);
    assert_eq!(join("rubbish").code, Some(1));
    assert_eq!(join(&token).code, Some(0));
    says(&join(&token).stderr, &["joined already"]);
    let other = fleet.file("c").to_string_lossy().into_owned();
    says(&fleet.fails(&["host", "join", &token, "--name", "c", "--no-run", "--data", &other]), &["used up"]);

    // A user's token opens the plane from elsewhere; a wrong one does not.
    let user = fleet.ok(&["token", "create", "--kind", "user"]).trim().to_owned();
    fleet.ok(&["--token", &user, "status"]);
    let mut wrong = user.clone();
    let digit = if &wrong[10..11] == "0" { "1" } else { "0" };
    wrong.replace_range(10..11, digit);
    says(&fleet.fails(&["--token", &wrong, "status"]), &["not known here"]);
    fleet.kill_up();
}

#[test]
fn a_damaged_store_is_named_and_never_reaches_a_guest() {
    let mut fleet = Fleet::start(PROGRAM);
    fleet.join("b");
    fleet.publish(&tiny("1"));
    let packs = fleet.file("a/plane/store/packs/test/tiny");
    let pack = std::fs::read_dir(&packs).unwrap().next().unwrap().unwrap().path();
    let whole = std::fs::read(&pack).unwrap();
    let mut damaged = whole.clone();
    // Every frame but not the directory at the end.
    for position in (1000..damaged.len() - 20_000).step_by(5000) {
        damaged[position] ^= 0x55;
    }
    std::fs::write(&pack, &damaged).unwrap();
    says(&fleet.fails(&["verify", "test/tiny"]), &["frame ", "is refused"]);
    let port = free_port();
    fleet.ok(&["launch", "test/tiny", "--name", "n", "--host", "b", "--publish", &format!("{port}:80")]);
    let outcome = fleet.run(&["wait", "n", "--for", "healthy", "--timeout", "15s"]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    // Cut short: refused as well.
    std::fs::write(&pack, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(fleet.run(&["verify", "test/tiny"]).code, Some(1));
    std::fs::remove_file(&pack).unwrap();
    says(&fleet.fails(&["verify", "test/tiny"]), &["no pack"]);
}

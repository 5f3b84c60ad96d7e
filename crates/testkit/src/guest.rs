//! The guests of the tests: built once per checkout, spoken to by HTTP.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Fleet, eventually, free_port};

/// The folder of a built version of `tests/guests/tiny`, ready for `collective publish`. `scratch` is a folder that
/// stays between test runs, such as cargo's own for tests.
pub fn tiny(program: impl AsRef<Path>, scratch: &str, version: &str) -> PathBuf {
    let (folder, recipe, _lock) = build(program.as_ref(), scratch, "tiny");
    let built = folder.join("build").join(version);
    // Published by other users too, wherever the build's folder is: those pass through only what is open to them.
    let open = std::env::temp_dir().join(format!("cl-tiny-{}", stamp_of(&recipe)));
    let copy = open.join(version);
    if !copy.join("appliance.toml").exists() {
        std::fs::create_dir_all(&copy).expect("a folder for the tiny guest");
        for name in ["system.raw", "data.raw", "appliance.toml"] {
            let status = Command::new("cp").arg("--sparse=always").args([built.join(name), copy.join(name)]).status();
            assert!(status.expect("cp runs").success(), "{name} is copied");
        }
    }
    copy
}

/// The same for `tests/guests/cloud`. To build it takes root, and minutes.
pub fn cloud(program: impl AsRef<Path>, scratch: &str, version: &str) -> PathBuf {
    build(program.as_ref(), scratch, "cloud").0.join("build").join(version)
}

/// Builds a guest of `tests/guests` if its recipe has changed; gives the folder where it was built, the recipe, and a
/// lock that keeps others from building it.
fn build(program: &Path, scratch: &str, guest: &str) -> (PathBuf, String, File) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/guests").join(guest);
    let folder = Path::new(scratch).join(guest);
    std::fs::create_dir_all(&folder).expect("a folder for the guest");
    let lock = File::create(folder.join("lock")).expect("a lock");
    lock.lock().expect("a lock");
    let mut recipe = String::new();
    let mut names: Vec<_> = std::fs::read_dir(&source).expect("the recipe").flatten().collect();
    names.sort_by_key(|entry| entry.file_name());
    for entry in names.iter().filter(|entry| entry.path().is_file()) {
        let bytes = std::fs::read(entry.path()).expect("the recipe");
        recipe += &format!("{:?} {}\n", entry.file_name(), String::from_utf8_lossy(&bytes));
    }
    // A guest may have the files that `build` gives to recipes.
    let given = Path::new(env!("CARGO_MANIFEST_DIR")).join("../maker/guest/usr/lib/collective/instance");
    recipe += &std::fs::read_to_string(given).expect("the files for guests");
    let stamp = folder.join("stamp");
    if std::fs::read_to_string(&stamp).ok().as_deref() != Some(&recipe) {
        for entry in names.iter().filter(|entry| entry.path().is_file()) {
            std::fs::copy(entry.path(), folder.join(entry.file_name())).expect("a copy of the recipe");
        }
        let output = Command::new(program).arg("build").arg(&folder).output().expect("the program runs");
        assert!(output.status.success(), "the guest is built: {}", String::from_utf8_lossy(&output.stderr));
        std::fs::write(&stamp, &recipe).expect("a stamp");
    }
    (folder, recipe, lock)
}

fn stamp_of(text: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// A running guest, by its published port.
pub struct Guest {
    /// The port on 127.0.0.1.
    pub port: u16,
}

impl Guest {
    /// Launches an instance of `test/tiny`, which is published, with these arguments besides, and waits until it is healthy.
    #[track_caller]
    pub fn launch(fleet: &Fleet, name: &str, arguments: &[&str]) -> Self {
        let guest = Self { port: free_port() };
        let publish = format!("{}:80", guest.port);
        let launch = ["launch", "test/tiny:1", "--name", name, "--publish", &publish];
        fleet.ok(&[&launch, arguments].concat());
        fleet.wait(name, "healthy");
        guest
    }

    /// Its memory has what `/fill` put there as this generation, and its disk has what memory says. The writer (`/count?on`)
    /// stands still then; gives how often it wrote.
    #[track_caller]
    pub fn sound(&self, generation: &str) -> u64 {
        let pages = self.get("/pages");
        assert!(pages.ends_with(&format!(" pages of {generation}, 0 bad")), "generation {generation}, and {pages}");
        self.get("/count?off");
        let ring = self.get("/ring");
        let count = ring.strip_suffix(", 0 bad").and_then(|count| count.parse().ok());
        count.unwrap_or_else(|| panic!("disk and memory are of two instants: {ring}"))
    }

    /// One request; `None` if nobody answers.
    pub fn request(&self, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        self.request_within(Duration::from_secs(20), method, path, body)
    }

    /// GET of a guest that may be booting. What is sent to it then is lost, and QEMU sends it again much later; so it is not
    /// waited for long, and asked again. `None` unless it is answered 200.
    pub fn ask(&self, path: &str) -> Option<String> {
        let answer = self.request_within(Duration::from_secs(2), "GET", path, "");
        answer.filter(|(status, _)| *status == 200).map(|(_, body)| body.trim_end().to_owned())
    }

    fn request_within(&self, limit: Duration, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(limit)).ok()?;
        let length = body.len();
        let head =
            format!("{method} {path} HTTP/1.1\r\nHost: guest\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        stream.write_all(body.as_bytes()).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())?;
        Some((status, body))
    }

    /// GET that must be answered 200.
    #[track_caller]
    pub fn get(&self, path: &str) -> String {
        let (status, body) = self.request("GET", path, "").unwrap_or_else(|| panic!("GET {path}: nobody answers"));
        assert_eq!(status, 200, "GET {path}: {body}");
        body.trim_end().to_owned()
    }

    /// PUT that must be answered 201: the guest synced it to its disk.
    #[track_caller]
    pub fn put(&self, path: &str, body: &str) {
        let (status, answer) = self.request("PUT", path, body).unwrap_or_else(|| panic!("PUT {path}: nobody answers"));
        assert_eq!(status, 201, "PUT {path}: {answer}");
    }

    /// Waits until it answers.
    #[track_caller]
    pub fn answers(&self) {
        eventually("the guest answers", Duration::from_secs(120), || self.ask("/health"));
    }

    /// Whether nobody answers on its port.
    pub fn is_closed(&self) -> bool {
        TcpStream::connect(("127.0.0.1", self.port)).is_err()
    }
}

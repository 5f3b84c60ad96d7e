//! A real S3 server, SeaweedFS, in a folder of its own.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::free_port;

/// As installed by `deploy/install-deps test`.
const VERSION: &str = "4.48";
/// Ports are free when they are chosen and may be gone when they are used.
const STARTS: usize = 4;

/// A server with one bucket. It is killed by its pid and its folder removed when this is dropped.
pub struct Seaweed {
    process: Child,
    folder: tempfile::TempDir,
    port: u16,
    filer: u16,
}

impl Seaweed {
    /// The bucket that is there.
    pub const BUCKET: &str = "machines";
    /// Who may do everything.
    pub const KEY: &str = "collective-test";
    /// Its secret.
    pub const SECRET: &str = "seaweed-test-secret";

    /// Starts a server and waits until it takes objects. Panics, with what to do, where it is not installed.
    pub fn start() -> Self {
        let program = program();
        for _ in 0..STARTS {
            if let Some(started) = Self::try_start(&program) {
                return started;
            }
        }
        panic!("SeaweedFS ({}) does not come up; its last words are above, newest first", program.display());
    }

    fn try_start(program: &Path) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let identities = serde_json::json!({ "identities": [{
            "name": "test", "credentials": [{ "accessKey": Self::KEY, "secretKey": Self::SECRET }],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"]
        }] });
        let config = folder.path().join("s3.json");
        std::fs::write(&config, identities.to_string()).expect("the server's configuration");
        let log = std::fs::File::create(folder.path().join("log")).expect("the server's log");
        let ports: Vec<u16> = (0..8).map(|_| free_port()).collect();
        let mut command = Command::new(program);
        command.args(["server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3", "-master.telemetry=false"]);
        command.args(["-volume.max=50", "-volume.minFreeSpace=1", "-master.volumePreallocate=false"]);
        command.args([
            "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
        ]);
        command.arg(format!("-dir={}", folder.path().display())).arg(format!("-s3.config={}", config.display()));
        let names =
            ["s3.port", "filer.port", "master.port", "volume.port"].map(|name| [name.into(), format!("{name}.grpc")]);
        for (name, port) in names.iter().flatten().zip(&ports) {
            command.arg(format!("-{name}={port}"));
        }
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("the log again")).stderr(log);
        let process = command.spawn().expect("SeaweedFS can be run");
        let mut server = Self { process, folder, port: ports[0], filer: ports[2] };
        server.comes_up().then_some(server)
    }

    fn comes_up(&mut self) -> bool {
        let begun = Instant::now();
        let bucket = format!("/buckets/{}/", Self::BUCKET);
        let mut steps = [bucket.as_str(), "/probe"].into_iter().peekable();
        while let Some(path) = steps.peek() {
            if self.process.try_wait().is_ok_and(|ended| ended.is_some()) || begun.elapsed() > Duration::from_secs(40) {
                let log = std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                log.lines().rev().take(20).for_each(|line| eprintln!("{line}"));
                return false;
            }
            // The filer's own door needs no signature, and S3 sees the same objects.
            if TcpStream::connect(("127.0.0.1", self.port)).is_ok() && write(self.filer, path).is_some() {
                steps.next();
            } else {
                std::thread::park_timeout(Duration::from_millis(50));
            }
        }
        true
    }

    /// Where S3 is spoken, at 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl Drop for Seaweed {
    fn drop(&mut self) {
        // It does not heed SIGTERM.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("COLLECTIVE_TEST_WEED") {
        return path.into();
    }
    let home = std::env::var_os("HOME").unwrap_or_default();
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(|| Path::new(&home).join(".cache"), PathBuf::from);
    let path = cache.join(format!("collective-test/weed-{VERSION}"));
    assert!(
        path.exists(),
        "SeaweedFS {VERSION}, which this test needs, is not at {}: run `deploy/install-deps test` as the same user, or name \
         the program in COLLECTIVE_TEST_WEED",
        path.display()
    );
    path
}

/// Writes one byte, or makes a folder; none unless it succeeds.
fn write(port: u16, path: &str) -> Option<()> {
    let (method, body) = if path.ends_with('/') { ("POST", "") } else { ("PUT", "1") };
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: seaweed\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(head.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    // 409: the folder is there.
    (answer.starts_with("HTTP/1.1 2") || answer.starts_with("HTTP/1.1 409")).then_some(())
}

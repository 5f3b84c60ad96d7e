//! A plane and its hosts as real processes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::{Link, Seaweed, Talk, eventually};

/// Everything but a boot is there within this time.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A plane with a host in one process (`up`), and hosts that joined it.
pub struct Fleet {
    pub(crate) dir: tempfile::TempDir,
    program: PathBuf,
    pub(crate) up: Option<Child>,
    pub(crate) hosts: Vec<(String, Child)>,
    link: Option<Link>,
    nobody: bool,
    /// The port of the S3 server where packs are kept.
    bucket: Option<u16>,
}

/// The user `nobody`.
const NOBODY: u32 = 65534;

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    /// Its exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A TCP port of 127.0.0.1 that was free just now, and that the kernel will not soon give to others.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

impl Fleet {
    /// Starts `up` with the program at `program`; its host is called `a`.
    pub fn start(program: impl AsRef<Path>) -> Self {
        Self::new(program, false, None, None)
    }

    /// The same with its packs in a bucket of the S3 server at this port of 127.0.0.1.
    pub fn start_with_bucket(program: impl AsRef<Path>, port: u16) -> Self {
        Self::new(program, false, None, Some(port))
    }

    /// The same as the user `nobody`; for tests that run as root.
    pub fn start_as_nobody(program: impl AsRef<Path>) -> Self {
        Self::new(program, true, None, None)
    }

    /// The same with everything of the plane and its host on a file system of this many bytes; for tests that run as
    /// root.
    pub fn start_on_small_disk(program: impl AsRef<Path>, bytes: u64) -> Self {
        Self::new(program, false, Some(bytes), None)
    }

    fn new(program: impl AsRef<Path>, nobody: bool, disk: Option<u64>, bucket: Option<u16>) -> Self {
        let dir = tempfile::Builder::new().prefix("cl-").tempdir().expect("a temporary directory");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).expect("its mode");
        let mut program = program.as_ref().to_owned();
        if nobody {
            // The build's folder may be closed to others.
            std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("its owner");
            let copy = dir.path().join("collective");
            std::fs::copy(&program, &copy).expect("a copy of the program");
            program = copy;
        }
        let mut fleet = Self { dir, program, up: None, hosts: Vec::new(), link: None, nobody, bucket };
        if let Some(bytes) = disk {
            fleet.small_disk("a", bytes);
        }
        fleet.up();
        fleet
    }

    /// The fleet's directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A path for something of the test's own.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command
            .env("COLLECTIVE_DATA", self.file("a"))
            .env("COLLECTIVE_CONFIG", self.file("config"))
            .env("COLLECTIVE_CACHE", self.file("cache"))
            .env_remove("COLLECTIVE_URL")
            .env_remove("COLLECTIVE_TOKEN")
            .env("HOME", self.dir.path())
            .stdin(Stdio::null());
        if let Some(port) = self.bucket {
            command.env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"));
            command.env("AWS_ACCESS_KEY_ID", Seaweed::KEY).env("AWS_SECRET_ACCESS_KEY", Seaweed::SECRET);
        }
        if self.nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    }

    fn daemon(&self, name: &str, arguments: &[&str]) -> Child {
        let log = File::options().create(true).append(true).open(self.file(&format!("{name}.log"))).expect("a log");
        let mut command = self.command();
        command.args(arguments).stdout(log.try_clone().expect("a log")).stderr(log);
        command.spawn().expect("the program runs")
    }

    /// Starts `up` (again) and waits until its host is there.
    pub fn up(&mut self) {
        let listen = self.link.as_ref().map_or("127.0.0.1:0".to_owned(), |link| format!("127.0.0.1:{}", link.target()));
        let mut arguments = vec!["up", "--name", "a", "--tcg", "--listen", listen.as_str()];
        let store = format!("s3://{}/fleet", Seaweed::BUCKET);
        // Said once; the plane remembers it.
        if self.bucket.is_some() && !self.file("a").exists() {
            arguments.extend(["--store", store.as_str()]);
        }
        let child = self.daemon("up", &arguments);
        self.up = Some(child);
        self.wait_for_host("a");
    }

    fn wait_for_host(&self, name: &str) {
        let found = |status: Value| {
            let hosts = status["hosts"].as_array()?.clone();
            hosts.into_iter().find(|h| h["name"] == name && h["reachable"] == true && !h["facts"].is_null())
        };
        eventually(&format!("host {name} is there ({})", self.log("up")), SOON, || {
            let outcome = self.run(&["status", "--json"]);
            found(serde_json::from_str(&outcome.stdout).ok()?)
        });
    }

    /// A log, to be shown when something fails.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.file(&format!("{name}.log"))).unwrap_or_default()
    }

    /// Starts a host with a cache of its own that joins over TLS.
    pub fn join(&mut self, name: &str) {
        let token = self.ok(&["token", "create"]).trim().to_owned();
        self.join_with(name, &token);
    }

    /// The same over a link that can be slowed and cut.
    pub fn join_over_link(&mut self, name: &str) -> Link {
        let token = self.ok(&["token", "create"]).trim().to_owned();
        let (rest, address) = token.rsplit_once('_').expect("a token");
        let target = address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
        let link = Link::to(target);
        self.link = Some(link.clone());
        self.join_with(name, &format!("{rest}_127.0.0.1:{}", link.port()));
        link
    }

    fn join_with(&mut self, name: &str, token: &str) {
        let data = self.file(name);
        let data = data.to_string_lossy();
        let child = self.daemon(name, &["host", "join", token, "--name", name, "--tcg", "--data", &data]);
        self.hosts.push((name.to_owned(), child));
        self.wait_for_host(name);
    }

    /// Starts a joined host again.
    pub fn run_host(&mut self, name: &str) {
        self.run_host_with(name, &[]);
    }

    /// The same with these arguments besides.
    pub fn run_host_with(&mut self, name: &str, arguments: &[&str]) {
        let data = self.file(name);
        let data = data.to_string_lossy();
        let child = self.daemon(name, &[&["host", "run", "--tcg", "--data", &data], arguments].concat());
        self.hosts.push((name.to_owned(), child));
    }

    /// Runs a command to its end.
    pub fn run<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Outcome {
        let output = self.command().args(arguments).output().expect("the program runs");
        Outcome {
            code: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts a command that the test ends itself.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        self.command().args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program runs")
    }

    /// Starts a command that the test speaks with.
    pub fn talk(&self, arguments: &[&str]) -> Talk {
        let mut command = self.command();
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Talk::new(command.spawn().expect("the program runs"))
    }

    /// Runs a command that must succeed; gives its standard output.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[S]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(0), "{arguments:?}: {outcome:#?}\n{}", self.log("up"));
        outcome.stdout
    }

    /// Runs a command that must fail with code 1; gives its standard error.
    #[track_caller]
    pub fn fails(&self, arguments: &[&str]) -> String {
        let outcome = self.run(arguments);
        assert_eq!(outcome.code, Some(1), "{arguments:?}: {outcome:#?}");
        outcome.stderr
    }

    /// Runs a command with `--json`.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.ok(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?} gave no JSON ({error}): {text}"))
    }

    /// An instance.
    #[track_caller]
    pub fn info(&self, name: &str) -> Value {
        self.json(&["info", name])
    }

    /// Publishes what was built in this folder.
    #[track_caller]
    pub fn publish(&self, folder: &Path) -> Value {
        self.json(&["publish", &folder.to_string_lossy()])
    }

    /// Waits for a state or `healthy`.
    #[track_caller]
    pub fn wait(&self, name: &str, state: &str) {
        let outcome = self.run(&["wait", name, "--for", state, "--timeout", "180s"]);
        let info = self.run(&["info", name]).stdout;
        assert_eq!(outcome.code, Some(0), "{name} {state}: {outcome:#?}\n{info}\n{}", self.serial(name));
    }

    /// Waits until nothing is under way for a running instance, and its published ports are open.
    #[track_caller]
    pub fn wait_until_settled(&self, name: &str) {
        eventually(&format!("{name} settles"), Duration::from_secs(300), || {
            let info = self.info(name);
            let idle = info["operations"].as_array().is_some_and(Vec::is_empty);
            let open = |port: &Value| port["open"] == true;
            let ports = info["ports"].as_array().is_some_and(|ports| ports.iter().all(open));
            (idle && ports && info["state"] == "running").then_some(())
        });
    }

    /// What the guest wrote to its console, on whichever host.
    pub fn serial(&self, name: &str) -> String {
        let info: Value = serde_json::from_str(&self.run(&["info", name, "--json"]).stdout).unwrap_or_default();
        self.run_dir(&info).map_or_else(String::new, |dir| {
            let bytes = std::fs::read(dir.join("q/serial.log")).unwrap_or_default();
            String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(2000)..]).into_owned()
        })
    }

    pub(crate) fn run_dir(&self, info: &Value) -> Option<PathBuf> {
        Some(self.host_data(info["host"].as_str()?).join("run").join(info["id"].as_str()?.get(..16)?))
    }

    /// The folder of a host.
    pub fn host_data(&self, host: &str) -> PathBuf {
        if host == "a" { self.file("a/host") } else { self.file(host) }
    }

    /// Where its host keeps what it knows of an instance; it is replaced whole, so it can be read at any time.
    pub fn record_path(&self, name: &str) -> PathBuf {
        let info = self.info(name);
        let instances = self.host_data(info["host"].as_str().expect("a host")).join("instances");
        instances.join(info["id"].as_str().expect("an id")).join("instance.json")
    }

    /// What the runner of an instance says of it, asked on its own socket.
    pub fn runner_status(&self, name: &str) -> Value {
        let dir = self.run_dir(&self.info(name)).expect("a run directory");
        let mut stream = UnixStream::connect(dir.join("runner.sock")).expect("the runner answers");
        stream.write_all(b"{\"op\":\"status\"}\n").expect("the runner reads");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("the runner answers");
        serde_json::from_str(&line).expect("an answer")
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // Say what happened before the folder is gone.
            for name in ["up", "b"] {
                let log = self.log(name);
                let lines: Vec<&str> = log.lines().collect();
                eprintln!("---- {name}.log ----\n{}", lines[lines.len().saturating_sub(40)..].join("\n"));
            }
        }
        self.kill_everything();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let mark = self.dir.path().to_string_lossy().into_owned();
        for path in mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&mark)) {
            let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
        }
    }
}

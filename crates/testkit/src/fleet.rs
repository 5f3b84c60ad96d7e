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
const SOON: Duration = Duration::from_secs(30);

/// A plane with a host in one process (`up`), and hosts that joined it.
pub struct Fleet {
    dir: tempfile::TempDir,
    program: PathBuf,
    up: Option<Child>,
    hosts: Vec<(String, Child)>,
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

    /// Mounts a file system of this many bytes at a folder of the fleet, such as a host's before it joins.
    pub fn small_disk(&self, folder: &str, bytes: u64) {
        std::fs::create_dir(self.file(folder)).expect("a folder");
        let options = std::ffi::CString::new(format!("size={bytes},mode=711")).expect("no zero byte");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", self.file(folder), "tmpfs", flags, options.as_c_str()).expect("a small disk");
    }

    /// Mounts an ext4 of this many bytes, kept in a file, at a folder of the fleet, such as a host's before it joins: a
    /// disk for [`cut_power`](Self::cut_power).
    pub fn real_disk(&self, folder: &str, bytes: u64) {
        std::fs::create_dir(self.file(folder)).expect("a folder");
        let image = self.disk_image(folder);
        File::create(&image).and_then(|file| file.set_len(bytes)).expect("a file for the disk");
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image));
        self.mount_disk(folder);
    }

    fn disk_image(&self, folder: &str) -> PathBuf {
        self.file(&format!("{folder}.disk"))
    }

    fn mount_disk(&self, folder: &str) {
        // The journal is not committed just because time passes: what is not synced is lost.
        let mut mount = Command::new("mount");
        run(mount.args(["-o", "loop,commit=300"]).arg(self.disk_image(folder)).arg(self.file(folder)));
        std::fs::set_permissions(self.file(folder), std::fs::Permissions::from_mode(0o711)).expect("its mode");
    }

    /// The machine of a host that joined on a [`real_disk`](Self::real_disk) loses power: all its processes die, and
    /// what none of them synced is gone. The host has to be run again.
    pub fn cut_power(&mut self, host: &str) {
        self.kill_host(host);
        self.end_processes(&format!("{}/", self.file(host).display()));
        // The file has what reached the disk; the rest is in the kernel's cache of the mounted file system.
        let (image, copy) = (self.disk_image(host), self.file("copy.disk"));
        run(Command::new("cp").arg("--sparse=always").args([&image, &copy]));
        run(Command::new("umount").args(["-R", "-l"]).arg(self.file(host)));
        std::fs::rename(copy, image).expect("the disk as it was");
        self.mount_disk(host);
    }

    /// Makes a small file system larger or smaller.
    pub fn resize_disk(&self, folder: &str, bytes: u64) {
        let options = std::ffi::CString::new(format!("size={bytes}")).expect("no zero byte");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount_remount(self.file(folder), flags, options.as_c_str()).expect("the file system is resized");
    }

    /// Bytes in use on a small file system.
    pub fn used_space(&self, folder: &str) -> u64 {
        let found = rustix::fs::statvfs(self.file(folder)).expect("the file system is there");
        (found.f_blocks - found.f_bfree) * found.f_frsize
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
        let data = self.file(name);
        let child = self.daemon(name, &["host", "run", "--tcg", "--data", &data.to_string_lossy()]);
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

    fn run_dir(&self, info: &Value) -> Option<PathBuf> {
        Some(self.host_data(info["host"].as_str()?).join("run").join(info["id"].as_str()?.get(..16)?))
    }

    /// The folder of a host.
    pub fn host_data(&self, host: &str) -> PathBuf {
        if host == "a" { self.file("a/host") } else { self.file(host) }
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

    /// The runner of an instance.
    pub fn runner_pid(&self, name: &str) -> i32 {
        let dir = self.run_dir(&self.info(name)).expect("a run directory");
        let mark = dir.to_string_lossy().into_owned();
        let found = processes().into_iter().find(|(_, line)| line.contains("runner") && line.contains(&mark));
        found.map(|(pid, _)| pid).unwrap_or_else(|| panic!("{name} has no runner"))
    }

    /// QEMU of an instance.
    pub fn qemu_pid(&self, name: &str) -> i32 {
        let id = self.info(name)["id"].as_str().expect("an id").to_owned();
        let uuid = format!("{}-{}-{}-{}-{}", &id[..8], &id[8..12], &id[12..16], &id[16..20], &id[20..]);
        let found = processes().into_iter().find(|(_, line)| line.contains("qemu-system") && line.contains(&uuid));
        found.map(|(pid, _)| pid).unwrap_or_else(|| panic!("{name} has no QEMU"))
    }

    /// `kill -9` of the process with plane and host `a`.
    pub fn kill_up(&mut self) {
        let mut child = self.up.take().expect("it is up");
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// `kill -9` of a host daemon.
    pub fn kill_host(&mut self, name: &str) {
        let index = self.hosts.iter().position(|(host, _)| host == name).expect("a host");
        let (_, mut child) = self.hosts.remove(index);
        child.kill().expect("it can be killed");
        child.wait().expect("it ends");
    }

    /// A power cut to every machine of the fleet, as far as processes go: daemons, runners and QEMU die at once.
    pub fn kill_everything(&mut self) {
        for mut child in self.up.take().into_iter().chain(self.hosts.drain(..).map(|(_, child)| child)) {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.end_processes(&self.dir.path().to_string_lossy());
    }

    fn end_processes(&self, mark: &str) {
        eventually("all processes of the fleet end", SOON, || {
            let left: Vec<i32> = processes().into_iter().filter(|(_, line)| line.contains(mark)).map(|p| p.0).collect();
            left.iter().for_each(|pid| kill(*pid));
            left.is_empty().then_some(())
        });
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// `kill -9`.
pub(crate) fn kill(pid: i32) {
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// All processes with their arguments.
fn processes() -> Vec<(i32, String)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let process = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    };
    entries.filter_map(process).filter(|(pid, _)| *pid != std::process::id() as i32).collect()
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

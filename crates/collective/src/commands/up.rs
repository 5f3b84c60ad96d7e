//! `collective up`, `down`, `status`: a plane and a host in one process.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use collective_api::{Client, Endpoint, HostView, JoinAnswer, JoinRequest, PlaneStatus};
use collective_host::create_folder;
use collective_model::{ByteSize, Name};
use collective_plane::{Listening, Plane, PlaneConfig};
use collective_store::depot::{Access, Place, VARIABLES};
use serde::{Deserialize, Serialize};

use super::hosts::{HostOptions, serve_host};
use crate::connect::{default_data, socket};
use crate::credentials::{self, Credentials};
use crate::ui::Ui;

/// How long a detached daemon may take until it answers.
const UP_LIMIT: Duration = Duration::from_secs(30);

/// Start a plane and a host in one process
///
/// Guests that ran when it last ended are adopted, or started again. As an ordinary user everything works but what
/// only root can do: QEMU then runs as the same user in place of one of its own for each instance.
///
/// Example: collective up --detach
#[derive(Debug, clap::Args)]
pub struct Up {
    /// Where everything is kept [default: /var/lib/collective, or ~/.local/share/collective]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Where packs are kept: s3://BUCKET/PREFIX, or "local" for the data folder [default: where they were kept so far]
    ///
    /// The way into a bucket comes from the environment: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
    /// AWS_REGION, and AWS_ENDPOINT_URL for a store that is not Amazon's.
    #[arg(long, value_name = "URL")]
    store: Option<Place>,
    /// Let hosts and users of other machines in, by TLS, on this address
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// What tokens tell others to connect to, where it differs from --listen
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// Return when it is up
    #[arg(long)]
    detach: bool,
    /// Write and enable a systemd unit that does this at every start of the machine, and start it now
    #[arg(long, conflicts_with = "detach")]
    install: bool,
    #[command(flatten)]
    host: HostOptions,
}

/// What `down` and `status` need to know.
#[derive(Serialize, Deserialize)]
struct Running {
    pid: u32,
    listen: Option<String>,
}

fn running_path(data: &Path) -> PathBuf {
    data.join("up.json")
}

impl Up {
    pub async fn run(self, ui: &Ui) -> Result<()> {
        let data = self.data.clone().unwrap_or_else(default_data);
        create_folder(&data, 0o711).with_context(|| format!("cannot create {}", data.display()))?;
        let data = data.canonicalize().with_context(|| format!("cannot enter {}", data.display()))?;
        if Client::new(Endpoint::Unix(socket(&data)), None).get::<PlaneStatus>("/v1/status").await.is_ok() {
            bail!("it is up already in {}; `collective status` shows how it is", data.display());
        }
        match (self.install, self.detach) {
            (true, _) => install(ui, &data).await,
            (_, true) => detach(ui, &data).await,
            _ => self.serve(ui, &data).await,
        }
    }

    async fn serve(self, ui: &Ui, data: &Path) -> Result<()> {
        let tcp =
            match self.listen {
                Some(address) => {
                    let bound = tokio::net::TcpListener::bind(address).await;
                    Some(bound.with_context(|| {
                        format!("cannot listen on {address}; end what uses it, or choose another port")
                    })?)
                }
                None => None,
            };
        let bound = tcp.as_ref().map(|tcp| tcp.local_addr()).transpose()?.map(|address| address.to_string());
        let listen = self.advertise.clone().or(bound);
        let config = PlaneConfig {
            data: data.join("plane"),
            machine_key: data.join("machine.key"),
            store: self.store.clone(),
            s3: Access::from_environment(),
            address: listen.clone(),
        };
        let (plane, tls) = Plane::open(&config).await?;
        let listening = Listening { socket: socket(data), tcp };
        let plane = tokio::spawn(collective_plane::serve(plane, tls, listening));
        collective_host::write_json(&running_path(data), &Running { pid: std::process::id(), listen: listen.clone() })?;
        let client = Client::new(Endpoint::Unix(socket(data)), None);
        wait_for(&client).await?;
        let host_data = data.join("host");
        let credentials = local_credentials(&client, data, &host_data, self.host.name.clone()).await?;
        ui.hint(format!("plane and host \"{}\" are up in {}", credentials.name, data.display()));
        if let Some(listen) = &listen {
            ui.hint(format!("others reach it at {listen}; `collective token create` lets them in"));
        }
        let host = serve_host(ui, host_data, self.host);
        let stop = stop_signal()?;
        let result = tokio::select! {
            result = host => result,
            result = plane => Err(match result {
                Ok(Err(error)) => error.into(),
                _ => anyhow!("the plane ended by itself"),
            }),
            () = stop => {
                ui.hint("going down; guests go on, and are adopted at the next start");
                Ok(())
            }
        };
        let _ = std::fs::remove_file(running_path(data));
        let _ = std::fs::remove_file(socket(data));
        result
    }
}

/// Ends on SIGTERM or Ctrl-C.
pub(super) fn stop_signal() -> Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

async fn wait_for(client: &Client) -> Result<()> {
    let answered = async {
        while client.get::<PlaneStatus>("/v1/status").await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(UP_LIMIT, answered).await.context("the plane does not answer on its own socket")
}

/// The host of the same process joins by the local socket, once.
async fn local_credentials(client: &Client, data: &Path, host_data: &Path, name: Option<Name>) -> Result<Credentials> {
    create_folder(host_data, 0o711)?;
    let path = credentials::path(host_data);
    if let Some(known) = Credentials::load(&path)? {
        return Ok(known);
    }
    let name = name.map_or_else(super::hosts::machine_name, Ok)?;
    let answer: JoinAnswer = client.post("/v1/hosts/join", &JoinRequest { name: name.clone() }).await?;
    let credentials =
        Credentials { name, secret: answer.secret, socket: Some(socket(data)), address: None, fingerprint: None };
    credentials.save(&path)?;
    Ok(credentials)
}

/// The unit: `collective up` with the same options. Stopping or restarting it ends the main process only; the runners
/// go on. When the machine shuts down systemd ends them too, and they shut their guests down.
fn unit(arguments: &[String], environment: &Path, root: bool) -> String {
    let quoted: Vec<String> =
        arguments.iter().map(|text| format!("\"{}\"", text.replace('%', "%%").replace('"', "\\\""))).collect();
    let environment = environment.to_string_lossy().replace('%', "%%");
    let wanted_by = if root { "multi-user.target" } else { "default.target" };
    format!(
        "[Unit]\nDescription=Collective: plane and host\nAfter=network-online.target\nWants=network-online.target\n\
         StartLimitIntervalSec=0\n\n[Service]\nEnvironmentFile=-{environment}\nExecStart={}\nRestart=on-failure\nRestartSec=5\nKillMode=process\nDelegate=yes\n\n\
         [Install]\nWantedBy={wanted_by}\n",
        quoted.join(" ")
    )
}

/// The unit does not have this shell's environment, so the way into a bucket is kept for it, for its user's eyes only.
fn keep_access(path: &Path) -> std::io::Result<bool> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let set = VARIABLES.iter().filter_map(|name| Some((*name, std::env::var(name).ok()?)));
    let lines: Vec<String> = set.map(|(name, value)| assignment(name, &value)).collect();
    if lines.is_empty() {
        return Ok(false);
    }
    let part = path.with_extension("part");
    let mut file = std::fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&part)?;
    file.write_all(lines.concat().as_bytes())?;
    file.sync_all()?;
    std::fs::rename(part, path)?;
    Ok(true)
}

fn assignment(name: &str, value: &str) -> String {
    format!("{name}=\"{}\"\n", value.replace('\\', "\\\\").replace('"', "\\\""))
}

async fn install(ui: &Ui, data: &Path) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let program = std::env::current_exe()?.to_string_lossy().into_owned();
    let mut arguments = vec![program];
    arguments.extend(std::env::args().skip(1).filter(|argument| argument != "--install"));
    if !arguments.iter().any(|argument| argument.starts_with("--data")) {
        arguments.extend(["--data".to_owned(), data.to_string_lossy().into_owned()]);
    }
    let folder = if root { PathBuf::from("/etc/systemd/system") } else { crate::connect::systemd_user_dir() };
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("collective.service");
    let environment = data.join("environment");
    if keep_access(&environment).with_context(|| format!("cannot write {}", environment.display()))? {
        ui.line(format!("wrote {}, with the way into the bucket", environment.display()));
    }
    std::fs::write(&path, unit(&arguments, &environment, root))
        .with_context(|| format!("cannot write {}", path.display()))?;
    ui.line(format!("wrote {}", path.display()));
    let systemctl = |arguments: &[&str]| {
        let scope: &[&str] = if root { &[] } else { &["--user"] };
        let status = std::process::Command::new("systemctl").args(scope).args(arguments).status();
        status.is_ok_and(|status| status.success())
    };
    if !systemctl(&["daemon-reload"]) || !systemctl(&["enable", "--now", "collective.service"]) {
        bail!("systemd did not take the unit; where it runs: systemctl enable --now collective.service");
    }
    let status = tokio::time::timeout(UP_LIMIT, until_up(&Client::new(Endpoint::Unix(socket(data)), None))).await;
    let status = status.map_err(|_| {
        let scope = if root { "" } else { "--user " };
        anyhow!("the unit is enabled, but plane and host do not come up; journalctl {scope}-u collective says why")
    })?;
    show(ui, &status);
    ui.hint("enabled and started; instances that ran come back after a restart of this machine");
    if !root {
        ui.hint("run `loginctl enable-linger` as well, or it ends when you log out");
    }
    Ok(())
}

/// Waits until the plane answers and its host has told of itself.
async fn until_up(client: &Client) -> PlaneStatus {
    loop {
        let status = client.get::<PlaneStatus>("/v1/status").await;
        if let Ok(status) = status
            && status.hosts.iter().any(|host| host.reachable && host.facts.is_some())
        {
            return status;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Runs the same command in the background and waits until it answers.
async fn detach(ui: &Ui, data: &Path) -> Result<()> {
    let log_path = data.join("up.log");
    let log = std::fs::File::options().create(true).append(true).open(&log_path)?;
    let before = log.metadata()?.len();
    let arguments = std::env::args_os().skip(1).filter(|argument| argument != "--detach");
    let mut child = tokio::process::Command::new(std::env::current_exe()?)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(false)
        .spawn()?;
    let client = Client::new(Endpoint::Unix(socket(data)), None);
    let failed = |why: &str| {
        // What earlier ones wrote would only confuse.
        let text = std::fs::read(&log_path).unwrap_or_default();
        let text = String::from_utf8_lossy(text.get(before as usize..).unwrap_or_default());
        let last: Vec<_> = text.lines().rev().take(3).collect();
        let last: Vec<_> = last.into_iter().rev().collect();
        anyhow!("{why}; {} ends with: {}", log_path.display(), last.join(" | "))
    };
    tokio::select! {
        status = until_up(&client) => {
            show(ui, &status);
            Ok(())
        }
        ended = child.wait() => Err(failed(&format!("it ended at once ({})", ended?))),
        () = tokio::time::sleep(UP_LIMIT) => Err(failed("it did not answer in time")),
    }
}

/// End the plane and host that `up` started; guests go on
///
/// Example: collective down --stop-instances
#[derive(Debug, clap::Args)]
pub struct Down {
    /// The folder of `up`
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Shut the guests down first
    #[arg(long)]
    stop_instances: bool,
}

impl Down {
    pub async fn run(self, ui: &Ui) -> Result<()> {
        let data = self.data.clone().unwrap_or_else(default_data);
        let running: Option<Running> = collective_host::read_json(&running_path(&data))?;
        let Some(running) = running else {
            ui.hint(format!("it is not up in {}", data.display()));
            return Ok(());
        };
        if self.stop_instances {
            let client = Client::new(Endpoint::Unix(socket(&data)), None);
            super::lifecycle::stop_all(ui, &client).await?;
        }
        let comm = std::fs::read_to_string(format!("/proc/{}/comm", running.pid)).unwrap_or_default();
        let process = rustix::process::Pid::from_raw(running.pid as i32);
        if let Some(process) = process.filter(|_| comm.trim() == "collective") {
            rustix::process::kill_process(process, rustix::process::Signal::TERM)?;
            let gone = async {
                while rustix::process::test_kill_process(process).is_ok() && running_path(&data).exists() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(UP_LIMIT, gone).await.context("it did not end in time")?;
        } else {
            let _ = std::fs::remove_file(running_path(&data));
        }
        ui.hint(if self.stop_instances { "down" } else { "down; guests go on, and are adopted at the next `up`" });
        Ok(())
    }
}

/// Show the plane and its hosts
///
/// Example: collective status
#[derive(Debug, clap::Args)]
pub struct Status {}

impl Status {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let status: PlaneStatus = client.get("/v1/status").await?;
        show(ui, &status);
        Ok(())
    }
}

fn show(ui: &Ui, status: &PlaneStatus) {
    ui.data(status, |ui| {
        let listen = status.listen.as_deref().unwrap_or("this machine only");
        ui.line(format!("plane {}, {} instances, reached from {listen}", status.version, status.instances));
        ui.line(format!("store {}", status.store.place));
        status.store.trouble.iter().for_each(|trouble| ui.line(format!("  warning: {trouble}")));
        status.hosts.iter().for_each(|host| show_host(ui, host));
    });
}

fn show_host(ui: &Ui, host: &HostView) {
    let reach = if host.reachable { "up" } else { "does not answer" };
    let facts = host.facts.as_ref().map(|facts| {
        format!(
            ", {} cpus, {} of memory, {}, cache {}",
            facts.cpus,
            ByteSize(facts.memory),
            facts.accelerator,
            ByteSize(facts.cache_bytes)
        )
    });
    ui.line(format!("host {}: {reach}, {} instances{}", host.name, host.instances, facts.unwrap_or_default()));
    for warning in host.facts.iter().flat_map(|facts| &facts.warnings) {
        ui.line(format!("  warning: {warning}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_keeps_arguments_whole_and_runners_alive() {
        let arguments = ["/usr/local/bin/collective", "up", "--data", "/srv/a \"b\" 100%"].map(String::from);
        let text = unit(&arguments, Path::new("/srv/100%/environment"), true);
        assert!(text.contains("EnvironmentFile=-/srv/100%%/environment\n"), "{text}");
        assert!(text.contains(r#"ExecStart="/usr/local/bin/collective" "up" "--data" "/srv/a \"b\" 100%%""#), "{text}");
        assert!(text.contains("KillMode=process\n"), "runners are in the unit's control group: {text}");
        assert_eq!(assignment("A", "x\"y\\z"), "A=\"x\\\"y\\\\z\"\n");
        assert!(text.contains("StartLimitIntervalSec=0\n"), "what is missing may come later: {text}");
    }
}

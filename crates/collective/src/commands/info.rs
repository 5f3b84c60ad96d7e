//! Looking at instances: `list`, `info`, `ports`, `history`, `wait`.

use std::time::Duration;

use anyhow::{Result, bail};
use collective_api::{Client, Event, InstanceView, OperationRequest, TunnelTarget};
use collective_model::{ByteSize, HealthState, Name, Span, State, Timestamp};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt};

use crate::ui::{Ui, seconds, table};

/// List instances
///
/// Example: collective list
#[derive(Debug, clap::Args)]
pub struct List {}

impl List {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let views: Vec<InstanceView> = client.get("/v1/instances").await?;
        let values: Vec<Value> = views.iter().map(document).collect();
        ui.data(&values, |ui| {
            let row = |view: &InstanceView| {
                let observed = view.observed.as_ref();
                let version = observed.and_then(|seen| seen.version_name.clone());
                let ports: Vec<_> = view.spec.ports.iter().map(|port| port.to_string()).collect();
                vec![
                    view.spec.name.to_string(),
                    view.spec.appliance.to_string(),
                    version.map(|version| version.to_string()).unwrap_or_default(),
                    state_text(view),
                    observed.map(|seen| seen.health.to_string()).unwrap_or_default(),
                    view.host.to_string(),
                    ports.join(" "),
                ]
            };
            let rows: Vec<_> = views.iter().map(row).collect();
            table(ui, &["NAME", "APPLIANCE", "VERSION", "STATE", "HEALTH", "HOST", "PORTS"], &rows);
        });
        Ok(())
    }
}

fn state_text(view: &InstanceView) -> String {
    let state = view.observed.as_ref().map_or("created", |seen| seen.state.as_str());
    if view.reachable { state.to_owned() } else { format!("{state} (host does not answer)") }
}

/// The stable document of `info --json`.
pub fn document(view: &InstanceView) -> Value {
    let spec = &view.spec;
    let seen = view.observed.as_ref();
    json!({
        "name": spec.name, "id": spec.id, "appliance": spec.appliance,
        "version": seen.and_then(|s| s.version_name.clone()), "digest": seen.map_or(spec.version, |s| s.version),
        "channel": view.follow, "hold_until": view.hold_until,
        "state": seen.map_or("created", |s| s.state.as_str()), "reachable": view.reachable,
        "observed_at": seen.map(|s| s.observed_at), "host": view.host, "generation": spec.generation,
        "accelerator": seen.and_then(|s| s.accelerator.clone()),
        "processor": seen.and_then(|s| s.processor.clone()),
        "addresses": seen.map(|s| s.addresses.clone()).unwrap_or_default(),
        "ports": spec.ports.iter().map(|p| json!({
            "address": p.address, "host": p.host, "guest": p.guest, "open": seen.is_some_and(|s| s.ports_open),
        })).collect::<Vec<_>>(),
        "disks": seen.map(|s| s.disks.clone()).unwrap_or_default(),
        "bytes_fetched": seen.map_or(0, |s| s.bytes_fetched), "index_bytes_fetched": seen.map_or(0, |s| s.index_bytes_fetched),
        "bytes_from_cache": seen.map_or(0, |s| s.bytes_from_cache),
        "frames_missing": seen.and_then(|s| s.frames_missing), "waiting": seen.and_then(|s| s.waiting.clone()),
        "started_in_ms": seen.and_then(|s| s.started_in_ms), "first_answer_ms": seen.and_then(|s| s.first_answer_ms),
        "last_error": seen.and_then(|s| s.last_error.clone()), "last_stop": seen.and_then(|s| s.last_stop.clone()),
        "health": seen.map_or(HealthState::Unknown, |s| s.health), "probe_output": seen.and_then(|s| s.probe_output.clone()),
        "checkpoints": seen.map(|s| s.checkpoints.clone()).unwrap_or_default(),
        "suspended": seen.and_then(|s| s.suspended.clone()), "in_store": seen.is_some_and(|s| s.in_store.is_some()), "resumed": seen.is_some_and(|s| s.resumed),
        "last_pause_us": seen.and_then(last_pause), "arrival": seen.and_then(|s| s.arrival), "moved_pause_us": seen.and_then(|s| s.moved_pause_us),
        "checkpoint_every": spec.checkpoint_every,
        "settings": spec.settings, "operations": view.operations,
    })
}

/// For how long the guest stood still for its last checkpoint, in microseconds.
fn last_pause(seen: &collective_model::Observed) -> Option<u64> {
    seen.checkpoints.iter().rev().find_map(|checkpoint| checkpoint.machine.as_ref()?.pause_us)
}

/// Show an instance
///
/// Example: collective info n --json
#[derive(Debug, clap::Args)]
pub struct Info {
    name: Name,
}

impl Info {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        ui.data(&document(&view), |ui| show(ui, &view));
        Ok(())
    }
}

fn show(ui: &Ui, view: &InstanceView) {
    let field = |name: &str, value: String| ui.line(format!("  {name:<13} {value}"));
    let spec = &view.spec;
    ui.line(format!("{}: {}", spec.name, state_text(view)));
    field("appliance", spec.appliance.to_string());
    field("host", view.host.to_string());
    if let Some(channel) = &view.follow {
        field("follows", channel.to_string());
    }
    if let Some(until) = view.hold_until {
        field("held until", until.to_string());
    }
    if let Some(every) = spec.checkpoint_every {
        field("checkpoints", format!("every {every} while it runs"));
    }
    let Some(seen) = &view.observed else { return };
    if let Some(version) = &seen.version_name {
        field("version", format!("{version} ({})", seen.version.short()));
    }
    field("health", seen.health.to_string());
    if let Some(output) = &seen.probe_output {
        field("last probe", output.clone());
    }
    if let Some(accelerator) = &seen.accelerator {
        field("accelerator", accelerator.clone());
    }
    if let Some(processor) = &seen.processor {
        field("processor", processor.clone());
    }
    for port in &spec.ports {
        let state = if seen.ports_open { "open" } else { "closed" };
        field("port", format!("{}:{} -> {} ({state})", port.address, port.host, port.guest));
    }
    for disk in &seen.disks {
        let role = format!("{:?}", disk.role).to_lowercase();
        let (size, own) = (ByteSize(disk.size), ByteSize(disk.own_bytes));
        field("disk", format!("{} ({role}), {size}, {own} of its own", disk.name));
    }
    field(
        "fetched",
        format!(
            "{} and {} of index; {} came from the cache",
            ByteSize(seen.bytes_fetched),
            ByteSize(seen.index_bytes_fetched),
            ByteSize(seen.bytes_from_cache)
        ),
    );
    match seen.frames_missing {
        Some(0) => field("missing", "nothing; it depends on nobody".into()),
        Some(frames) => field("missing", format!("{frames} frames are still to be fetched")),
        None => {}
    }
    if let Some(pause) = seen.moved_pause_us {
        field("came", format!("while it ran; it stood still for {:.1} ms", pause as f64 / 1000.0));
    }
    if let Some(arrival) = &seen.arrival {
        let (bytes, on_demand) = (ByteSize(arrival.bytes), ByteSize(arrival.on_demand));
        let rest = if arrival.complete {
            "all of it is on this host".into()
        } else {
            format!("{bytes} are in the store still")
        };
        field("arrival", format!("{rest}; {on_demand} came because the guest waited for them"));
    }
    if let Some(waiting) = &seen.waiting {
        field("waiting", waiting.clone());
    }
    if let Some(ms) = seen.started_in_ms {
        field("started in", seconds(ms));
    }
    if let Some(ms) = seen.first_answer_ms {
        field("first answer", format!("after {}", seconds(ms)));
    }
    if let Some(machine) = &seen.suspended {
        field(
            "suspended",
            format!("memory and devices took {} more; goes on with {}", ByteSize(machine.bytes), machine.platform),
        );
    }
    for checkpoint in &seen.checkpoints {
        let own = ByteSize(checkpoint.own_bytes);
        let memory = if checkpoint.machine.is_some() { "with memory, " } else { "" };
        field("checkpoint", format!("{}: {} ({}), {memory}{own}", checkpoint.id.0, checkpoint.why, checkpoint.taken));
    }
    if let Some(pause) = last_pause(seen) {
        field("last pause", format!("{:.1} ms for a checkpoint", pause as f64 / 1000.0));
    }
    if let Some(stop) = &seen.last_stop {
        field("last stop", stop.clone());
    }
    if let Some(error) = &seen.last_error {
        field("last error", error.clone());
    }
}

/// Show published ports
///
/// Example: collective ports n
#[derive(Debug, clap::Args)]
pub struct Ports {
    name: Name,
}

impl Ports {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        ui.data(&document(&view)["ports"], |ui| {
            let open = view.observed.as_ref().is_some_and(|seen| seen.ports_open);
            let row = |port: &collective_model::PublishedPort| {
                let state = if open { "open" } else { "closed" };
                vec![format!("{}:{}", port.address, port.host), port.guest.to_string(), state.to_owned()]
            };
            let rows: Vec<_> = view.spec.ports.iter().map(row).collect();
            table(ui, &["ADDRESS", "GUEST PORT", "STATE"], &rows);
        });
        Ok(())
    }
}

/// No line of a followed log is shown longer than this, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// Show what the guest wrote to its serial console
///
/// Example: collective logs n --lines 50
#[derive(Debug, clap::Args)]
pub struct Logs {
    name: Name,
    /// At most this many of the last lines
    #[arg(long, short = 'n', default_value_t = 200)]
    lines: u32,
    /// Go on with what it writes from now on, until you press Ctrl-C
    #[arg(long, short)]
    follow: bool,
}

impl Logs {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        if self.follow {
            return self.follow(ui, client).await;
        }
        let request = OperationRequest::Logs { lines: self.lines };
        let result = super::operations::operate(ui, client, &self.name, &request).await?;
        ui.data(&result, |ui| {
            let lines = result["lines"].as_array().into_iter().flatten().filter_map(Value::as_str);
            lines.for_each(|line| ui.line(plain(line)));
        });
        Ok(())
    }

    async fn follow(self, ui: &Ui, client: &Client) -> Result<()> {
        let stream = super::reach::tunnel(client, &self.name, &TunnelTarget::Log { lines: self.lines }).await?;
        let mut stream = tokio::io::BufReader::new(stream);
        let mut line = Vec::new();
        // A guest that never ends its line does not fill our memory.
        while AsyncReadExt::take(&mut stream, MAX_LINE).read_until(b'\n', &mut line).await? > 0 {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\r', '\n']);
            ui.data(&json!({ "line": text }), |ui| ui.line(plain(text)));
            line.clear();
        }
        bail!("the log of {} ended: its host went away, or the plane", self.name);
    }
}

/// What a guest writes must not steer the terminal it is shown on.
fn plain(line: &str) -> String {
    line.replace(|c: char| c.is_control() && c != '\t', "")
}

/// Print the address of an instance's first published port, as a URL
///
/// Opens it in a browser where there is one.
///
/// Example: collective open n
#[derive(Debug, clap::Args)]
pub struct Open {
    name: Name,
}

impl Open {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let Some(port) = view.spec.ports.first() else {
            bail!("{} publishes no port; launch it with --publish HOSTPORT:GUESTPORT", self.name);
        };
        if !view.observed.as_ref().is_some_and(|seen| seen.ports_open) {
            bail!("the ports of {} are closed: it is {}", self.name, state_text(&view));
        }
        let url = format!("http://{}", std::net::SocketAddr::new(port.address, port.host));
        ui.data(&json!({ "url": url }), |ui| ui.line(&url));
        if std::env::var_os("DISPLAY").is_some() || std::env::var_os("WAYLAND_DISPLAY").is_some() {
            let _ = std::process::Command::new("xdg-open").arg(&url).spawn();
        }
        Ok(())
    }
}

/// Show what happened to an instance
///
/// Example: collective history n
#[derive(Debug, clap::Args)]
pub struct History {
    name: Name,
}

impl History {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let events: Vec<Event> = client.get(&format!("/v1/instances/{}/history", self.name)).await?;
        ui.data(&events, |ui| {
            let row = |event: &Event| vec![event.at.to_string(), event.what.clone(), event.message.clone()];
            let rows: Vec<_> = events.iter().map(row).collect();
            table(ui, &["WHEN", "WHAT", "HOW"], &rows);
        });
        Ok(())
    }
}

/// Wait until an instance is in a state
///
/// Ends with an error at once if it fails while waiting for something else, and when the time is over.
///
/// Example: collective wait n --for running
#[derive(Debug, clap::Args)]
pub struct Wait {
    name: Name,
    /// A state (running, stopped, ...) or `healthy`
    #[arg(long = "for", value_name = "STATE")]
    state: String,
    /// Give up after this time
    #[arg(long, default_value = "10m")]
    timeout: Span,
}

impl Wait {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let wanted = match self.state.as_str() {
            "healthy" => None,
            state => Some(state.parse::<State>().map_err(anyhow::Error::msg)?),
        };
        let spinner = ui.spinner(&format!("waiting for {} to be {}", self.name, self.state));
        let waited = tokio::time::timeout(self.timeout.0, until(client, &self.name, wanted)).await;
        spinner.finish_and_clear();
        let Ok(view) = waited else {
            let view = super::instance(client, &self.name).await?;
            bail!("{} is not {} after {}: it is {}", self.name, self.state, self.timeout, state_text(&view));
        };
        let view = view?;
        ui.data(&document(&view), |ui| ui.line(format!("{} is {}", self.name, self.state)));
        Ok(())
    }
}

/// Waits for a state, or (`None`) for health.
pub async fn until(client: &Client, name: &Name, wanted: Option<State>) -> Result<InstanceView> {
    let began = Timestamp::now();
    let mut view = super::instance(client, name).await?;
    loop {
        if let Some(seen) = view.observed.as_ref().filter(|seen| seen.power_serial >= view.spec.power_serial) {
            let there = match wanted {
                Some(state) => seen.state == state,
                None => seen.state == State::Running && seen.health == HealthState::Healthy,
            };
            if there {
                return Ok(view);
            }
            if seen.state == State::Failed && wanted != Some(State::Failed) {
                bail!("{name} failed: {}", seen.last_error.as_deref().unwrap_or("no reason is known"));
            }
            if seen.state == State::Suspended && matches!(wanted, None | Some(State::Running)) {
                let why = seen.last_error.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
                bail!("{name} is suspended{why}; `collective resume {name}` lets it go on");
            }
            let stopped = seen.state == State::Stopped && !view.spec.on;
            if stopped && wanted != Some(State::Stopped) {
                bail!("{name} is stopped; start it with `collective start {name}`");
            }
        }
        if Timestamp::now().since_ms(began) > 15_000 && !view.reachable {
            tracing::warn!("host \"{}\" does not answer; waiting for it", view.host);
        }
        view = super::next(client, &view).await?;
        // The plane's answers may be quicker than what they say changes.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

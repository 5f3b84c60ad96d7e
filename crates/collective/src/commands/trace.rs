//! `collective trace`: boots a version once, to learn what it reads.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use collective_api::{Client, Endpoint, InstanceView, LaunchRequest, OperationRequest, PlaneStatus};
use collective_model::{HealthState, Name, Span, State};
use collective_store::trace::Trace as BootTrace;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::launch::key_value;
use super::operations::operate;
use super::publish::{BOOT_FILE, Publish};
use crate::connect::socket;
use crate::ui::Ui;

const UP_LIMIT: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Boot a version once and note what it reads
///
/// Writes boot.json into DIR. `collective publish` then stores what the machine reads until it is healthy first and in this
/// order, and hosts fetch it in this order: a cold start over a thin link waits for little else. The machine runs in
/// a plane of its own, which is removed afterwards.
///
/// Example: collective trace appliances/notes/build/1 && collective publish appliances/notes/build/1
#[derive(Debug, clap::Args)]
pub struct Trace {
    /// The folder with appliance.toml and the disk files
    dir: PathBuf,
    /// A setting of the appliance that it cannot start without
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
    /// How long it may take to become healthy
    #[arg(long, default_value = "15m")]
    limit: Span,
}

impl Trace {
    pub async fn run(self, ui: &Ui) -> Result<()> {
        let folder = tempfile::Builder::new().prefix("collective-trace-").tempdir().context("cannot make a folder")?;
        // QEMU runs as a user of its own, which has to pass through.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        let data = folder.path().join("data");
        let mut up = start(&data, folder.path())?;
        let client = Client::new(Endpoint::Unix(socket(&data)), None);
        let result = tokio::select! {
            result = self.boot(ui, &client, &mut up) => result,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted; nothing was written")),
        };
        let removed = end(&client, up).await;
        let traces = result.with_context(|| format!("cannot trace {}", self.dir.display()))?;
        removed?;
        self.write(ui, &traces)
    }

    /// Publishes into the plane, launches, and waits for the notes.
    async fn boot(&self, ui: &Ui, client: &Client, up: &mut Child) -> Result<Value> {
        let begun = Instant::now();
        while client.get::<PlaneStatus>("/v1/status").await.map_or(true, |status| status.hosts.is_empty()) {
            if up.try_wait()?.is_some() || begun.elapsed() > UP_LIMIT {
                bail!("the plane for it does not start; `collective doctor` may tell why");
            }
            sleep(LOOK_EVERY).await;
        }
        let quiet = Ui::new(false, true);
        let publish = Publish {
            dir: self.dir.clone(),
            channel: "stable".parse()?,
            version: Some("trace".parse()?),
            small: false,
        };
        let published = publish.carry_out(&quiet, client).await?;
        let name: Name = "trace".parse()?;
        let request = LaunchRequest {
            reference: published.appliance.to_string(),
            name: Some(name.clone()),
            host: None,
            follow: None,
            ports: Vec::new(),
            settings: self.set.iter().cloned().collect(),
            outbound: false,
            cpus: None,
            memory: None,
            authorized_keys: Vec::new(),
        };
        client.post::<InstanceView>("/v1/instances", &request).await?;
        let spinner = ui.spinner("booting");
        let begun = Instant::now();
        loop {
            let view: InstanceView = client.get(&format!("/v1/instances/{name}")).await?;
            if let Some(seen) = &view.observed {
                let probe = || seen.probe_output.clone().unwrap_or_default();
                match (seen.state, seen.health) {
                    (State::Failed, _) => bail!("it failed: {}", seen.last_error.clone().unwrap_or_default()),
                    (_, HealthState::Unhealthy) => bail!("it did not become healthy: {}", probe()),
                    _ if begun.elapsed() > self.limit.0 => bail!("it is not up after {}: {}", self.limit, probe()),
                    _ => {}
                }
            }
            if let Ok(traces) = operate(&quiet, client, &name, &OperationRequest::Trace).await {
                spinner.finish_and_clear();
                return Ok(traces);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    fn write(&self, ui: &Ui, traces: &Value) -> Result<()> {
        let path = self.dir.join(BOOT_FILE);
        let part = path.with_extension("part");
        std::fs::write(&part, traces.to_string())
            .and_then(|()| std::fs::rename(&part, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        let traces: std::collections::BTreeMap<Name, BootTrace> = serde_json::from_value(traces.clone())?;
        let blocks = |trace: &BootTrace| trace.0.iter().map(|(_, blocks)| u64::from(*blocks)).sum::<u64>();
        let bytes: u64 = traces.values().map(blocks).sum::<u64>() * collective_store::BLOCK;
        let value = serde_json::json!({ "file": path, "boot_bytes": bytes });
        ui.data(&value, |ui| {
            ui.line(format!("{}: it reads {} until it is up", path.display(), collective_model::ByteSize(bytes)));
        });
        ui.hint(format!("next: collective publish {}", self.dir.display()));
        Ok(())
    }
}

/// A plane and a host in `data`, out of reach of the terminal's signals.
fn start(data: &Path, folder: &Path) -> Result<Child> {
    let log = std::fs::File::create(folder.join("up.log"))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("up").arg("--data").arg(data).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    command.process_group(0).kill_on_drop(true).spawn().context("cannot start a plane for it")
}

/// Removes the machine, which would outlive its plane, and ends the plane.
async fn end(client: &Client, mut up: Child) -> Result<()> {
    let quiet = Ui::new(false, true);
    let views: Vec<InstanceView> = client.get("/v1/instances").await.unwrap_or_default();
    for view in views {
        operate(&quiet, client, &view.spec.name, &OperationRequest::Delete { data: true }).await?;
    }
    up.start_kill()?;
    up.wait().await?;
    Ok(())
}

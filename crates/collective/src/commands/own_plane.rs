//! A plane and a host of its own for one boot of a version, removed afterwards: what is learnt from that goes into the version.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use collective_api::{Client, Endpoint, InstanceView, LaunchRequest, OperationRequest, PlaneStatus};
use collective_model::{HealthState, Name, Span, State};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};

use super::operations::operate;
use super::publish::Publish;
use crate::connect::socket;
use crate::ui::Ui;

const UP_LIMIT: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The plane, with the version and one instance of it.
pub(super) struct OwnPlane {
    client: Client,
    name: Name,
}

/// What is booted.
pub(super) struct Boot<'a> {
    /// The folder with appliance.toml and the disk files.
    pub dir: &'a Path,
    /// Settings for it.
    pub settings: &'a [(String, String)],
    /// How long it may take to become healthy.
    pub limit: Span,
}

impl OwnPlane {
    /// Boots the version, has `work` done with it, and removes everything, whatever the outcome and when interrupted too.
    pub async fn with<T>(boot: &Boot<'_>, ui: &Ui, work: impl AsyncFnOnce(&Self) -> Result<T>) -> Result<T> {
        let folder = tempfile::Builder::new().prefix("collective-boot-").tempdir().context("cannot make a folder")?;
        // QEMU runs as a user of its own, which has to pass through.
        std::fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        let data = folder.path().join("data");
        let mut up = start(&data, folder.path())?;
        let plane = Self { client: Client::new(Endpoint::Unix(socket(&data)), None), name: "boot".parse()? };
        let all = async {
            plane.launch(boot, ui, &mut up).await?;
            work(&plane).await
        };
        let result = tokio::select! {
            result = all => result,
            _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        };
        let removed = plane.end(up).await;
        let result = result?;
        removed?;
        Ok(result)
    }

    /// Asks until the answer is there, or the machine fails or takes too long.
    pub async fn ask_until(&self, ui: &Ui, limit: Span, request: &OperationRequest) -> Result<Value> {
        let spinner = ui.spinner("booting");
        let begun = Instant::now();
        loop {
            self.is_well(begun, limit).await?;
            if let Ok(answer) = self.ask(request).await {
                spinner.finish_and_clear();
                return Ok(answer);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    pub async fn ask(&self, request: &OperationRequest) -> Result<Value> {
        operate(&Ui::new(false, true), &self.client, &self.name, request).await
    }

    async fn is_well(&self, begun: Instant, limit: Span) -> Result<()> {
        let view: InstanceView = self.client.get(&format!("/v1/instances/{}", self.name)).await?;
        let Some(seen) = view.observed else { return Ok(()) };
        let probe = || seen.probe_output.clone().unwrap_or_default();
        match (seen.state, seen.health) {
            (State::Failed, _) => bail!("it failed: {}", seen.last_error.clone().unwrap_or_default()),
            (_, HealthState::Unhealthy) => bail!("it did not become healthy: {}", probe()),
            _ if begun.elapsed() > limit.0 => bail!("it is not up after {limit}: {}", probe()),
            _ => Ok(()),
        }
    }

    async fn launch(&self, boot: &Boot<'_>, ui: &Ui, up: &mut Child) -> Result<()> {
        let begun = Instant::now();
        while self.client.get::<PlaneStatus>("/v1/status").await.map_or(true, |status| status.hosts.is_empty()) {
            if up.try_wait()?.is_some() || begun.elapsed() > UP_LIMIT {
                bail!("the plane for it does not start; `collective doctor` may tell why");
            }
            sleep(LOOK_EVERY).await;
        }
        let publish = Publish::for_a_boot(boot.dir)?;
        let published = publish.carry_out(&Ui::new(false, true), &self.client, None).await?;
        let settings: BTreeMap<_, _> = boot.settings.iter().cloned().collect();
        let request = LaunchRequest {
            reference: published.appliance.to_string(),
            name: Some(self.name.clone()),
            host: None,
            follow: None,
            ports: Vec::new(),
            settings,
            outbound: false,
            cpus: None,
            memory: None,
            authorized_keys: Vec::new(),
        };
        self.client.post::<InstanceView>("/v1/instances", &request).await?;
        ui.hint(format!("booting {} in a plane of its own, without network", boot.dir.display()));
        Ok(())
    }

    /// Removes the machine, which would outlive its plane, and ends the plane.
    async fn end(&self, mut up: Child) -> Result<()> {
        let views: Vec<InstanceView> = self.client.get("/v1/instances").await.unwrap_or_default();
        if !views.is_empty() {
            self.ask(&OperationRequest::Delete { data: true }).await?;
        }
        up.start_kill()?;
        up.wait().await?;
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

/// Where a host on this machine keeps a run.
pub(super) fn run_folder(answer: &Value) -> Result<PathBuf> {
    answer["run"].as_str().map(PathBuf::from).context("the host does not say where its machine is")
}

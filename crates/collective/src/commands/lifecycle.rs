//! `start`, `stop`, `restart`, `delete`.

use anyhow::{Result, bail};
use collective_api::{Client, InstanceView, OperationRequest, PowerRequest};
use collective_model::{Name, State};

use super::info::until;
use super::operations::operate;
use crate::ui::Ui;

pub async fn power(client: &Client, name: &Name, on: bool) -> Result<InstanceView> {
    Ok(client.post(&format!("/v1/instances/{name}/power"), &PowerRequest { on }).await?)
}

/// Start an instance; one that is suspended goes on
///
/// Example: collective start n
#[derive(Debug, clap::Args)]
pub struct Start {
    name: Name,
}

impl Start {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        power(client, &self.name, true).await?;
        let spinner = ui.spinner(&format!("starting {}", self.name));
        let view = until(client, &self.name, Some(State::Running)).await;
        spinner.finish_and_clear();
        ui.data(&super::info::document(&view?), |ui| ui.hint(format!("{} runs", self.name)));
        Ok(())
    }
}

/// Shut an instance down, cleanly if it can within a minute; says which
///
/// Of an instance that is suspended the memory is given up, as in a power cut.
///
/// Example: collective stop n
#[derive(Debug, clap::Args)]
pub struct Stop {
    name: Name,
}

impl Stop {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = stop(ui, client, &self.name).await?;
        let how = view.observed.as_ref().and_then(|seen| seen.last_stop.clone()).unwrap_or_default();
        let value = serde_json::json!({ "name": self.name, "state": "stopped", "how": how });
        ui.data(&value, |ui| ui.line(format!("{} is stopped: {how}", self.name)));
        Ok(())
    }
}

pub async fn stop(ui: &Ui, client: &Client, name: &Name) -> Result<InstanceView> {
    power(client, name, false).await?;
    let spinner = ui.spinner(&format!("stopping {name}"));
    let view = until(client, name, Some(State::Stopped)).await;
    spinner.finish_and_clear();
    view
}

/// Stops everything that runs on reachable hosts.
pub async fn stop_all(ui: &Ui, client: &Client) -> Result<()> {
    let views: Vec<InstanceView> = client.get("/v1/instances").await?;
    // What is suspended stays so: stopping it would give its memory up.
    let suspended = |view: &InstanceView| view.observed.as_ref().is_some_and(|seen| seen.state == State::Suspended);
    for view in views.iter().filter(|view| view.reachable && view.spec.on && !suspended(view)) {
        stop(ui, client, &view.spec.name).await?;
        ui.hint(format!("{} is stopped", view.spec.name));
    }
    Ok(())
}

/// Stop and start an instance
///
/// Example: collective restart n
#[derive(Debug, clap::Args)]
pub struct Restart {
    name: Name,
}

impl Restart {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let result = operate(ui, client, &self.name, &OperationRequest::Restart).await?;
        let how = result["stopped"].as_str().unwrap_or_default().to_owned();
        ui.data(&result, |ui| ui.line(format!("{} was stopped ({how}) and starts again", self.name)));
        Ok(())
    }
}

/// Remove an instance; its data disks are kept unless --data is given
///
/// Example: collective delete n
#[derive(Debug, clap::Args)]
pub struct Delete {
    name: Name,
    /// Remove the data disks as well: the user's data is gone
    #[arg(long)]
    data: bool,
}

impl Delete {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        if !view.reachable {
            bail!("host \"{}\" does not answer, and {} is there; try again when it is back", view.host, self.name);
        }
        let result = operate(ui, client, &self.name, &OperationRequest::Delete { data: self.data }).await?;
        ui.data(&result, |ui| {
            ui.line(match result["kept"].as_str() {
                Some(kept) => {
                    format!("{} is removed; its data disks are kept on host \"{}\" in {kept}", self.name, view.host)
                }
                None => format!("{} is removed", self.name),
            });
        });
        Ok(())
    }
}

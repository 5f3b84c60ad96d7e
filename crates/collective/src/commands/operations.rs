//! `plan`, `update`, `rollback`: what a host does to an instance, watched until it is done.

use std::process::ExitCode;

use anyhow::{Result, anyhow, bail};
use collective_api::{Client, OperationRequest, OperationView, Plan as PlanResult, UpdateResult};
use collective_model::{ByteSize, Name, OperationState, VersionName};
use serde_json::Value;

use crate::ui::{Ui, seconds};

/// Asks for an operation and watches it to its end.
pub async fn operate(ui: &Ui, client: &Client, name: &Name, request: &OperationRequest) -> Result<Value> {
    let view = super::instance(client, name).await?;
    if !view.reachable {
        bail!("host \"{}\" of {name} does not answer; try again when it is back", view.host);
    }
    let view: OperationView = client.post(&format!("/v1/instances/{name}/operations"), request).await?;
    watch(ui, client, name, view).await
}

/// Watches an operation to its end.
pub async fn watch(ui: &Ui, client: &Client, name: &Name, mut view: OperationView) -> Result<Value> {
    let verb = view.operation.kind.verb();
    let bar = ui.bytes(verb, 0);
    loop {
        match view.progress {
            OperationState::Done { result } => {
                bar.finish_and_clear();
                return Ok(result);
            }
            OperationState::Failed { error } => {
                bar.finish_and_clear();
                return Err(anyhow!("{verb} of {name} failed: {error}"));
            }
            OperationState::Running { doing, done, total } => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(doing);
            }
            OperationState::Pending => {}
        }
        let path = format!("/v1/operations/{}?after={}&wait_ms=10000", view.operation.id, view.revision);
        view = client.get(&path).await?;
    }
}

/// Tell exactly what an update would fetch and do
///
/// Example: collective plan n
#[derive(Debug, clap::Args)]
pub struct Plan {
    name: Name,
    /// A version or channel [default: the channel it follows, else stable]
    #[arg(long)]
    to: Option<VersionName>,
}

impl Plan {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let result = operate(ui, client, &self.name, &OperationRequest::Plan { to: self.to }).await?;
        let plan: PlanResult = serde_json::from_value(result)?;
        ui.data(&plan, |ui| {
            if !plan.restart_required {
                ui.line(format!("{} has version {} already", self.name, plan.to));
                return;
            }
            ui.line(format!("{}: {} -> {}", self.name, plan.from, plan.to));
            ui.line(format!(
                "  fetches {} bytes ({} in {} frames) of {} in use",
                plan.bytes_to_fetch,
                ByteSize(plan.bytes_to_fetch),
                plan.frames_to_fetch,
                ByteSize(plan.bytes_total)
            ));
            let left = ByteSize(plan.own_system_bytes_left_behind);
            ui.line(format!("  leaves behind {left} that the instance itself wrote to its system disk"));
            ui.line("  keeps all data disks, checkpoints them first, and restarts the guest");
        });
        Ok(())
    }
}

/// Move an instance to another version, keeping its data
///
/// Its ports stay closed until the new version has proved itself; if it does not, the old version comes back by
/// itself, system and data as before, and the command ends with an error.
///
/// Example: collective update n
#[derive(Debug, clap::Args)]
pub struct Update {
    name: Name,
    /// A version or channel [default: the channel it follows, else stable]
    #[arg(long)]
    to: Option<VersionName>,
}

impl Update {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<ExitCode> {
        let result = operate(ui, client, &self.name, &OperationRequest::Update { to: self.to }).await?;
        let update: UpdateResult = serde_json::from_value(result)?;
        ui.data(&update, |ui| match &update.why {
            None if update.from == update.to => ui.line(format!("{} has version {} already", self.name, update.to)),
            None => ui.line(format!(
                "{} is updated from {} to {}: {} bytes fetched, ports closed for {}",
                self.name,
                update.from,
                update.to,
                update.bytes_fetched,
                seconds(update.closed_ms)
            )),
            Some(why) => ui.line(format!(
                "{} could not be updated to {} and is back on {}, system and data as before: {why}",
                self.name, update.to, update.from
            )),
        });
        Ok(if update.updated { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Go back to the version before the last update
///
/// The present is kept as a checkpoint.
///
/// Example: collective rollback n --with-data
#[derive(Debug, clap::Args)]
pub struct Rollback {
    name: Name,
    /// Data disks go back as well; what was written since the update is in the checkpoint
    #[arg(long)]
    with_data: bool,
}

impl Rollback {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let request = OperationRequest::Rollback { with_data: self.with_data };
        let result = operate(ui, client, &self.name, &request).await?;
        ui.data(&result, |ui| {
            let text = |key: &str| result[key].as_str().unwrap_or_default().to_owned();
            let data = if self.with_data { "system and data" } else { "the system only" };
            let kept = &result["kept_as_checkpoint"];
            ui.line(format!(
                "{} is back from {} on {}: {data}; checkpoint {kept} keeps what was",
                self.name,
                text("from"),
                text("to")
            ));
        });
        Ok(())
    }
}

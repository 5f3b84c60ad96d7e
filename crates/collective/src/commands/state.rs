//! `suspend`, `resume`, `checkpoint`, `timeline`, `restore`: a running machine as data.

use anyhow::Result;
use collective_api::{Client, OperationRequest};
use collective_model::{ByteSize, Checkpoint as Kept, CheckpointId, Name};
use serde_json::Value;

use super::operations::operate;
use crate::ui::{Ui, seconds, table};

/// Save a running instance, memory and all, and end it
///
/// It goes on later where it was, with `collective resume`.
///
/// Example: collective suspend n
#[derive(Debug, clap::Args)]
pub struct Suspend {
    name: Name,
}

impl Suspend {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let result = operate(ui, client, &self.name, &OperationRequest::Suspend).await?;
        ui.data(&result, |ui| {
            let bytes = ByteSize(result["bytes"].as_u64().unwrap_or(0));
            ui.line(format!("{} is suspended; its memory and devices took {bytes} more", self.name));
        });
        Ok(())
    }
}

/// Let a suspended instance go on where it was
///
/// Example: collective resume n
#[derive(Debug, clap::Args)]
pub struct Resume {
    name: Name,
}

impl Resume {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let result = operate(ui, client, &self.name, &OperationRequest::Resume).await?;
        ui.data(&result, |ui| match result["started_in_ms"].as_u64() {
            Some(ms) => ui.line(format!("{} goes on, {} after the order", self.name, seconds(ms))),
            None => ui.line(format!("{} runs", self.name)),
        });
        Ok(())
    }
}

/// Keep what an instance is now: disks, and memory and devices if it runs
///
/// A running instance goes on; it stands still for some milliseconds, whatever its memory. `--forget` removes one.
///
/// Example: collective checkpoint n --why "before the experiment"
#[derive(Debug, clap::Args)]
pub struct Checkpoint {
    name: Name,
    /// A line for the timeline
    #[arg(long)]
    why: Option<String>,
    /// Forget this checkpoint in place of making one
    #[arg(long, value_name = "NUMBER", conflicts_with = "why")]
    forget: Option<u64>,
}

impl Checkpoint {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        if let Some(number) = self.forget {
            let request = OperationRequest::Forget { checkpoint: CheckpointId(number) };
            let result = operate(ui, client, &self.name, &request).await?;
            ui.data(&result, |ui| ui.line(format!("checkpoint {number} of {} is forgotten", self.name)));
            return Ok(());
        }
        let result = operate(ui, client, &self.name, &OperationRequest::Checkpoint { why: self.why }).await?;
        let kept: Kept = serde_json::from_value(result)?;
        ui.data(&kept, |ui| {
            let what = match &kept.machine {
                Some(machine) => match machine.pause_us {
                    Some(pause) => format!("memory and disks; it stood still for {:.1} ms", pause as f64 / 1000.0),
                    None => "memory and disks".into(),
                },
                None => "its disks".into(),
            };
            let number = kept.id.0;
            ui.line(format!("checkpoint {number} of {} keeps {what}, {} more", self.name, ByteSize(kept.own_bytes)));
        });
        Ok(())
    }
}

/// List what was kept of an instance, and what each takes
///
/// Example: collective timeline n
#[derive(Debug, clap::Args)]
pub struct Timeline {
    name: Name,
}

impl Timeline {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let kept = view.observed.map(|seen| seen.checkpoints).unwrap_or_default();
        ui.data(&kept, |ui| {
            let row = |kept: &Kept| {
                let pause = kept.machine.as_ref().and_then(|machine| machine.pause_us);
                vec![
                    kept.id.0.to_string(),
                    kept.taken.to_string(),
                    kept.version_name.to_string(),
                    if kept.machine.is_some() { "memory and disks" } else { "disks" }.to_owned(),
                    ByteSize(kept.own_bytes).to_string(),
                    pause.map(|pause| format!("{:.1} ms", pause as f64 / 1000.0)).unwrap_or_default(),
                    kept.why.clone(),
                ]
            };
            let rows: Vec<_> = kept.iter().map(row).collect();
            table(ui, &["NUMBER", "TAKEN", "VERSION", "KEEPS", "BYTES", "PAUSE", "WHY"], &rows);
            if rows.is_empty() {
                ui.hint(format!("nothing was kept yet; `collective checkpoint {}` keeps the present", self.name));
            }
        });
        Ok(())
    }
}

/// Go back to a checkpoint; the present is kept as one, so that going back can be undone
///
/// With memory, the machine goes on where it was then: memory and all disks are of one instant, and only go back together.
/// With --disks-only the machine is booted from the disks of then, and --keep says which disks stay as they are now.
///
/// Example: collective restore n 3
#[derive(Debug, clap::Args)]
pub struct Restore {
    name: Name,
    /// Its number, from `collective timeline`
    checkpoint: u64,
    /// Leave the memory, and boot
    #[arg(long)]
    disks_only: bool,
    /// A disk that stays as it is now; may be given several times
    #[arg(long, value_name = "DISK", requires = "disks_only")]
    keep: Vec<Name>,
}

impl Restore {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let to = CheckpointId(self.checkpoint);
        let request = OperationRequest::GoBack { to, disks_only: self.disks_only, keep: self.keep };
        let result: Value = operate(ui, client, &self.name, &request).await?;
        ui.data(&result, |ui| {
            let what = if result["memory"] == true { "memory and disks" } else { "disks" };
            let (number, kept) = (self.checkpoint, &result["kept_as_checkpoint"]);
            ui.line(format!("{}: {what} are as in checkpoint {number}; checkpoint {kept} keeps what was", self.name));
        });
        Ok(())
    }
}

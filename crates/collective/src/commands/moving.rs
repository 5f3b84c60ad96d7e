//! `move`: an instance goes to another host, while it runs where that helps.

use anyhow::{Result, anyhow, bail};
use collective_api::{Client, InstanceView, OperationRequest};
use collective_model::live::Estimate;
use collective_model::{ByteSize, Name, State};
use serde_json::{Value, json};

use super::operations::operate;
use super::state::{check, hand_over, never_came};
use crate::ui::{Ui, seconds};

/// Give an instance to another host, running or not
///
/// A running machine goes on there with its memory, its disks, its name and its addresses; its published ports are on the new host
/// then. It is brought over while it runs, and stands still for a moment only; where that would take too long it is suspended for
/// the move. The old host keeps what it had for a week, as cache, so that going back there brings only what has changed.
///
/// Example: collective move n --to laptop
#[derive(Debug, clap::Args)]
pub struct Move {
    name: Name,
    /// The new host
    #[arg(long)]
    to: Name,
    /// Leave the memory of a running machine behind: it is shut down, and booted there
    #[arg(long)]
    cold: bool,
    /// Suspend a running machine for the move, in place of moving it while it runs
    #[arg(long, conflicts_with = "cold")]
    no_live: bool,
    /// Only say how it would move and how long it would take, and what speaks against it
    #[arg(long)]
    dry_run: bool,
}

impl Move {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let state = view.observed.as_ref().map(|seen| seen.state).ok_or_else(|| anyhow!("it was never seen"))?;
        let verdict = check(client, &view, &self.to).await?;
        if view.host == self.to && !never_came(&view) {
            bail!("{} is on host \"{}\" already", self.name, self.to);
        }
        if self.dry_run {
            return self.foretell(ui, client, state, &verdict).await;
        }
        let runs = matches!(state, State::Running | State::Paused);
        if runs
            && !self.cold
            && let Err(why) = &verdict
        {
            bail!(
                "the running machine cannot go on at host \"{}\": {why}; with --cold it is shut down, and booted there",
                self.to
            );
        }
        if state == State::Running && !self.cold && !self.no_live {
            let request = OperationRequest::Live { to: self.to.clone(), only_measure: false };
            let result = operate(ui, client, &self.name, &request).await?;
            if result["live"] == true {
                ui.data(&result, |ui| ui.line(went_live(&self.name, &self.to, &result)));
                return Ok(());
            }
            let why = result["why"].as_str().unwrap_or("its host does not say why");
            ui.hint(format!("it is suspended for the move, because {why}"));
        }
        match state {
            _ if never_came(&view) => {}
            State::Running | State::Paused if !self.cold => {
                let result = operate(ui, client, &self.name, &OperationRequest::Suspend).await?;
                if let Some(why) = result["not_stored"].as_str() {
                    bail!("{} is suspended on its host, but could not be brought to the store: {why}", self.name);
                }
            }
            State::Running | State::Paused => {
                super::lifecycle::stop(ui, client, &self.name).await?;
                operate(ui, client, &self.name, &OperationRequest::Push).await?;
            }
            _ => _ = operate(ui, client, &self.name, &OperationRequest::Push).await?,
        }
        let result = match hand_over(ui, client, &self.name, self.to.clone(), self.cold).await {
            Ok(result) => result,
            Err(error) => {
                self.go_on_there(ui, client, &view, runs).await?;
                return Err(error);
            }
        };
        if runs && self.cold {
            super::lifecycle::power(client, &self.name, true).await?;
        }
        ui.data(&result, |ui| {
            let kept = were_there(result["kept_bytes"].as_u64());
            ui.line(format!("{} is on host \"{}\" now{kept}", self.name, self.to));
        });
        Ok(())
    }
}

/// What did not have to be brought.
fn were_there(bytes: Option<u64>) -> String {
    let bytes = bytes.filter(|bytes| *bytes > 0).map(ByteSize);
    bytes.map_or_else(String::new, |bytes| format!("; {bytes} were there since it was there last"))
}

fn went_live(name: &Name, to: &Name, result: &Value) -> String {
    match (result["pause_us"].as_u64(), result["bytes"].as_u64()) {
        (Some(pause), Some(bytes)) => format!(
            "{name} is on host \"{to}\" now; it stood still for {:.1} ms, and {} were brought over while it ran{}",
            pause as f64 / 1000.0,
            ByteSize(bytes),
            were_there(result["kept_bytes"].as_u64())
        ),
        _ => format!("{name} is on host \"{to}\" now"),
    }
}

impl Move {
    /// Says how it would move.
    async fn foretell(&self, ui: &Ui, client: &Client, state: State, verdict: &Result<(), String>) -> Result<()> {
        let mut estimate = None;
        if state == State::Running && !self.cold && !self.no_live && verdict.is_ok() {
            let request = OperationRequest::Live { to: self.to.clone(), only_measure: true };
            let result = operate(ui, client, &self.name, &request).await?;
            let why = result["why"].as_str().map(ToOwned::to_owned);
            estimate = Some(serde_json::from_value::<Estimate>(result["estimate"].clone()).map_err(|_| why));
        }
        let suspended = "suspended, memory and disks through the store, and it goes on there";
        let (how, why_not_live) = match (state, &estimate) {
            (State::Stopped, _) => ("its disks, encrypted, through the store", None),
            _ if self.cold => ("shut down, its disks through the store, booted there", None),
            (_, Some(Ok(Estimate { why_not: None, .. }))) => {
                ("while it runs, and it stands still for a moment only", None)
            }
            (_, Some(Ok(Estimate { why_not, .. }) | Err(why_not))) => (suspended, why_not.clone()),
            (_, None) => (suspended, None),
        };
        let estimate = estimate.and_then(Result::ok);
        let why_not = verdict.as_ref().err();
        let value = json!({
            "name": self.name, "to": self.to, "how": how, "memory_goes": verdict.is_ok(), "why_not": why_not,
            "live": estimate.as_ref().is_some_and(|estimate| estimate.why_not.is_none()), "why_not_live": why_not_live,
            "estimate": estimate,
        });
        ui.data(&value, |ui| {
            ui.line(format!("{} would move to {}: {how}", self.name, self.to));
            if let Some(Estimate { bytes, rate, total_ms, kept, .. }) = &estimate {
                let (bytes, rate, total) = (ByteSize(*bytes), ByteSize(*rate), seconds(*total_ms));
                let kept = were_there(Some(*kept));
                ui.line(format!(
                    "  {bytes} at {rate} a second, as measured just now: {total}, and what it writes meanwhile{kept}"
                ));
            }
            if let Some(why) = &why_not_live {
                ui.line(format!("  not while it runs: {why}"));
            }
            if let Some(why) = why_not {
                ui.line(format!("  its running memory cannot go: {why}"));
            }
        });
        Ok(())
    }

    /// What could not be given away goes on where it was, unless the new host owns it already.
    async fn go_on_there(&self, ui: &Ui, client: &Client, before: &InstanceView, ran: bool) -> Result<()> {
        let now = super::instance(client, &self.name).await?;
        if !ran || now.host != before.host {
            return Ok(());
        }
        if self.cold {
            super::lifecycle::power(client, &self.name, true).await?;
        } else {
            operate(ui, client, &self.name, &OperationRequest::Resume).await?;
        }
        ui.hint(format!("{} goes on at host \"{}\"", self.name, before.host));
        Ok(())
    }
}

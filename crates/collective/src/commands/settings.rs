//! Changing what is wanted of an instance: `set`, `rename`, `hold`, `follow`.

use anyhow::{Context, Result, anyhow};
use collective_api::{Client, InstancePatch, InstanceView, OperationRequest};
use collective_model::{ByteSize, Name, Span, State, Timestamp};

use super::launch::key_value;
use super::operations::operate;
use crate::ui::Ui;

async fn patch(client: &Client, name: &Name, patch: &InstancePatch) -> Result<InstanceView> {
    Ok(client.patch(&format!("/v1/instances/{name}"), patch).await?)
}

/// Change memory, CPUs, disk sizes, settings, or how often a checkpoint is taken
///
/// All of these reach the guest when it starts, so a running guest is restarted, and the command says so. Only
/// checkpoint-every counts at once: a checkpoint of the running machine is taken so often by itself, and these are thinned: all of the last
/// hour stay, one an hour of the last day, one a day of the last week.
///
/// Example: collective set n memory=1G title="Our notes" disk.data=2G
#[derive(Debug, clap::Args)]
pub struct Set {
    name: Name,
    /// memory=SIZE, cpus=N, disk.NAME=SIZE (disks only grow), checkpoint-every=SPAN or off, or a setting of the appliance
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_value)]
    changes: Vec<(String, String)>,
    /// Do not restart; the change waits for the next start
    #[arg(long)]
    no_restart: bool,
}

/// A key of `set`; no setting of an appliance has a hyphen.
const CHECKPOINT_EVERY: &str = "checkpoint-every";

/// Zero is off.
fn interval(text: &str) -> Result<Span> {
    match text {
        "off" => Ok(Span(std::time::Duration::ZERO)),
        text => text
            .parse()
            .map_err(|_| anyhow!("{CHECKPOINT_EVERY} takes a span such as 10m or 1h, or off, not \"{text}\"")),
    }
}

impl Set {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let mut change = InstancePatch::default();
        for (key, value) in &self.changes {
            let size = || value.parse::<ByteSize>().with_context(|| key.clone());
            match key.as_str() {
                "memory" => change.memory = Some(size()?),
                "cpus" => {
                    change.cpus = Some(value.parse().map_err(|_| anyhow!("cpus takes a number, not \"{value}\""))?)
                }
                CHECKPOINT_EVERY => change.checkpoint_every = Some(interval(value)?),
                key => match key.strip_prefix("disk.") {
                    Some(disk) => _ = change.disk_sizes.insert(disk.parse()?, size()?),
                    None => _ = change.settings.insert(key.to_owned(), value.clone()),
                },
            }
        }
        let is_for_the_guest = self.changes.iter().any(|(key, _)| key != CHECKPOINT_EVERY);
        let view = patch(client, &self.name, &change).await?;
        let runs = is_for_the_guest && view.observed.as_ref().is_some_and(|seen| seen.state == State::Running);
        let restart = runs && !self.no_restart;
        if restart {
            operate(ui, client, &self.name, &OperationRequest::Restart).await?;
        }
        let value = serde_json::json!({ "name": self.name, "restarted": restart });
        ui.data(&value, |ui| {
            ui.line(match (runs, restart) {
                (_, true) => format!("{} is changed and was restarted", self.name),
                (true, false) => format!("{} is changed; it takes effect at the next start", self.name),
                (false, false) => format!("{} is changed", self.name),
            });
        });
        Ok(())
    }
}

/// Give an instance another name
///
/// Its hostname follows at the next start.
///
/// Example: collective rename n diary
#[derive(Debug, clap::Args)]
pub struct Rename {
    name: Name,
    new: Name,
}

impl Rename {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = patch(client, &self.name, &InstancePatch { name: Some(self.new), ..Default::default() }).await?;
        ui.data(&serde_json::json!({ "name": view.spec.name }), |ui| ui.hint(format!("it is now {}", view.spec.name)));
        Ok(())
    }
}

/// Let no updates come by themselves for a time
///
/// Example: collective hold n --until 7d
#[derive(Debug, clap::Args)]
pub struct Hold {
    name: Name,
    /// A span (12h, 7d), an instant (2026-12-31T18:00:00Z), or `now` to end the hold
    #[arg(long, value_parser = instant)]
    until: Timestamp,
}

fn instant(text: &str) -> Result<Timestamp, String> {
    if text == "now" {
        return Ok(Timestamp(0));
    }
    let span = text.parse::<Span>().map(|span| Timestamp::now().plus(span.0));
    span.or_else(|_| text.parse::<Timestamp>()).map_err(|error| error.to_string())
}

impl Hold {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let change = InstancePatch { hold_until: Some(self.until), ..Default::default() };
        let view = patch(client, &self.name, &change).await?;
        ui.data(&serde_json::json!({ "name": self.name, "hold_until": view.hold_until }), |ui| {
            ui.line(match view.hold_until {
                Some(until) => format!("{} is held until {until}", self.name),
                None => format!("{} is not held", self.name),
            });
        });
        Ok(())
    }
}

/// Follow a channel, so that updates come by themselves, or none
///
/// Example: collective follow n stable
#[derive(Debug, clap::Args)]
pub struct Follow {
    name: Name,
    /// The channel; leave it out to follow none
    channel: Option<Name>,
}

impl Follow {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let follow = Some(self.channel.map(|channel| channel.to_string()).unwrap_or_default());
        let view = patch(client, &self.name, &InstancePatch { follow, ..Default::default() }).await?;
        ui.data(&serde_json::json!({ "name": self.name, "channel": view.follow }), |ui| {
            ui.line(match &view.follow {
                Some(channel) => format!("{} follows {channel}", self.name),
                None => format!("{} follows no channel", self.name),
            });
        });
        Ok(())
    }
}

//! `suspend`, `resume`, `clone`, `check-host`, `checkpoint`, `timeline`, `restore`: a running machine as data.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use collective_api::{Client, CloneRequest, HostView, InstanceView, MoveRequest, OperationRequest, OperationView};
use collective_model::run::Platform;
use collective_model::{ByteSize, Checkpoint as Kept, CheckpointId, Name, PublishedPort, State};
use serde_json::{Value, json};

use super::operations::{operate, watch};
use crate::ui::{Ui, seconds, table};

/// Save a running instance, memory and all, and end it
///
/// It goes on later where it was, with `collective resume`: on this host, or with --host on another.
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
            match (result["store"]["new_bytes"].as_u64(), result["not_stored"].as_str()) {
                (_, Some(why)) => ui.hint(format!("it can go on where it is, and nowhere else yet: {why}")),
                (Some(new), None) => {
                    ui.hint(format!("the store has it, {} new, so that it can go on anywhere", ByteSize(new)))
                }
                _ => {}
            }
        });
        Ok(())
    }
}

/// Let a suspended instance go on where it was
///
/// Example: collective resume n --host laptop
#[derive(Debug, clap::Args)]
pub struct Resume {
    name: Name,
    /// On this host, which owns it from then on
    #[arg(long)]
    host: Option<Name>,
    /// With --host: leave its memory behind, and boot it there
    #[arg(long, requires = "host")]
    cold: bool,
}

impl Resume {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let result = match self.host.filter(|host| *host != view.host || never_came(&view)) {
            Some(host) => {
                let result = hand_over(ui, client, &self.name, host, self.cold).await?;
                if self.cold {
                    super::lifecycle::power(client, &self.name, true).await?;
                }
                result
            }
            None => operate(ui, client, &self.name, &OperationRequest::Resume).await?,
        };
        ui.data(&result, |ui| match result["started_in_ms"].as_u64() {
            Some(ms) => ui.line(format!("{} goes on, {} after the order", self.name, seconds(ms))),
            None => ui.line(format!("{} runs", self.name)),
        });
        Ok(())
    }
}

/// Whether it could not be brought to the host that owns it, so that all of it is in the store, and nowhere else.
pub(super) fn never_came(view: &InstanceView) -> bool {
    let seen = view.observed.as_ref().filter(|seen| seen.generation == view.spec.generation);
    view.operations.is_empty() && seen.is_some_and(|seen| seen.arrived != view.spec.arrival)
}

pub(super) async fn hand_over(ui: &Ui, client: &Client, name: &Name, host: Name, cold: bool) -> Result<Value> {
    let request = MoveRequest { host, cold };
    let view: OperationView = client.post(&format!("/v1/instances/{name}/move"), &request).await?;
    watch(ui, client, name, view).await
}

/// Copy an instance, running or not, on its host
///
/// A checkpoint is made, and the copies begin as that: a running machine's go on where it is, with its memory, each with disks of
/// its own that take space only for what they write. Each has an id, a name, an SSH host key and a settings disk of its own, which a
/// guest that goes on reads at its next boot: until then it takes itself for the first one. The kernel is told to renew its random numbers.
///
/// Example: collective clone n --count 3
#[derive(Debug, clap::Args)]
pub struct Clone {
    name: Name,
    /// How many
    #[arg(long, default_value_t = 1)]
    count: u32,
    /// Its name; of several the beginning of each name [default: NAME-clone]
    #[arg(long = "name", value_name = "NAME")]
    new_name: Option<Name>,
    /// Publish a port of the clone; only with one clone
    #[arg(long, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    publish: Vec<PublishedPort>,
    /// As it was at this checkpoint, in place of now
    #[arg(long, value_name = "NUMBER")]
    checkpoint: Option<u64>,
}

impl Clone {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let base = self.new_name.as_ref().map_or_else(|| format!("{}-clone", self.name), ToString::to_string);
        let name = |index: u32| if self.count == 1 { base.clone() } else { format!("{base}-{index}") };
        let names: Result<Vec<Name>, _> = (1..=self.count).map(|index| name(index).parse()).collect();
        let names = names?;
        let checkpoint = match self.checkpoint {
            Some(number) => CheckpointId(number),
            None => {
                let why = Some(format!("for {}", names.first().map(ToString::to_string).unwrap_or_default()));
                let kept = operate(ui, client, &self.name, &OperationRequest::Checkpoint { why }).await?;
                let number = serde_json::from_value::<Kept>(kept)?.id;
                // The plane hears of it a moment later.
                let mut view = super::instance(client, &self.name).await?;
                while !view.observed.as_ref().is_some_and(|seen| seen.checkpoints.iter().any(|kept| kept.id == number))
                {
                    view = super::next(client, &view).await?;
                }
                number
            }
        };
        let request = CloneRequest { checkpoint, names: names.clone(), ports: self.publish };
        let _: Vec<InstanceView> = client.post(&format!("/v1/instances/{}/clone", self.name), &request).await?;
        let mut views = Vec::new();
        for name in &names {
            views.push(super::info::document(&super::info::until(client, name, Some(State::Running)).await?));
        }
        ui.data(&views, |ui| {
            names.iter().for_each(|name| ui.line(format!("{name} goes on as a copy of {}", self.name)))
        });
        Ok(())
    }
}

/// Whether an instance's running memory can go on at a host, or why not.
pub(super) async fn check(client: &Client, view: &InstanceView, host: &Name) -> Result<Result<(), String>> {
    let hosts: Vec<HostView> = client.get("/v1/hosts").await?;
    let find = |name: &Name| hosts.iter().find(|known| known.name == *name);
    let there = find(host).ok_or_else(|| anyhow!("no host named \"{host}\" has joined"))?;
    if !there.reachable {
        return Ok(Err(format!("host \"{host}\" does not answer")));
    }
    let seen = view.observed.as_ref();
    let saved = seen.and_then(|seen| seen.suspended.as_ref()).map(|machine| machine.platform.clone());
    let running = || {
        let here = find(&view.host)?.facts.as_ref()?.platform.clone()?;
        let cpu = seen.and_then(|seen| seen.processor.clone()).unwrap_or(here.cpu);
        Some(Platform { cpu, portable: Vec::new(), ..here })
    };
    let here = saved.or_else(running);
    let there = there.facts.as_ref().and_then(|facts| facts.platform.as_ref());
    Ok(match here {
        Some(here) => here.goes_on_at(there),
        None => Err("it is not known what it runs on".into()),
    })
}

/// Say whether an instance's running memory can go on at a host, or whether it would be booted there, and why
///
/// Example: collective check-host n --host laptop
#[derive(Debug, clap::Args)]
pub struct CheckHost {
    name: Name,
    /// The host
    #[arg(long)]
    host: Name,
}

impl CheckHost {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let verdict = check(client, &view, &self.host).await?;
        let value = json!({ "name": self.name, "host": self.host, "memory_goes": verdict.is_ok(), "why_not": verdict.clone().err() });
        ui.data(&value, |ui| match &verdict {
            Ok(()) => ui.line(format!("{} can go on at {} with its memory", self.name, self.host)),
            Err(why) => ui.line(format!("{} would be booted at {}, with its data: {why}", self.name, self.host)),
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
/// With --screens, pictures of the screen (of machines that have one) are written into a folder, as NUMBER.png.
///
/// Example: collective timeline n
#[derive(Debug, clap::Args)]
pub struct Timeline {
    name: Name,
    /// Write pictures of the screen into this folder
    #[arg(long, value_name = "DIR")]
    screens: Option<PathBuf>,
}

impl Timeline {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view = super::instance(client, &self.name).await?;
        let kept = view.observed.as_ref().map(|seen| seen.checkpoints.clone()).unwrap_or_default();
        if let Some(folder) = &self.screens {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            for kept in kept.iter().filter(|kept| kept.machine.as_ref().is_some_and(|machine| machine.screen)) {
                let request = OperationRequest::Screen { checkpoint: kept.id };
                let picture = operate(ui, client, &self.name, &request).await?;
                let path = folder.join(format!("{}.png", kept.id.0));
                let bytes = from_digits(picture["png"].as_str().unwrap_or_default());
                let bytes = bytes.ok_or_else(|| anyhow!("the picture of checkpoint {} came damaged", kept.id.0))?;
                std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
                ui.hint(format!("the screen at checkpoint {}: {}", kept.id.0, path.display()));
            }
        }
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
            if let Some(every) = view.spec.checkpoint_every {
                ui.line(format!(
                    "one is taken every {every} while it runs; of these stay all of the last hour, one an hour of the last day, \
                     one a day of the last week"
                ));
            } else if rows.is_empty() {
                ui.hint(format!("nothing was kept yet; `collective checkpoint {}` keeps the present", self.name));
            }
        });
        Ok(())
    }
}

fn from_digits(digits: &str) -> Option<Vec<u8>> {
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    digits.as_bytes().chunks(2).map(pair).collect()
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

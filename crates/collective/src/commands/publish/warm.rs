//! The running machine that is shipped with a version: booted once where it is published, and suspended.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Error, Result, bail};
use collective_api::OperationRequest;
use collective_model::run::Platform;
use collective_model::{Digest, Recipe, Warm, WarmFile, WarmImage};
use collective_runner::{Reader, SavedMachine, as_image, open_saved};
use collective_store::publish::Publisher;
use collective_store::trace::Trace;
use serde_json::Value;

use super::super::own_plane::{Boot, OwnPlane, run_folder};
use crate::credentials::open_source;
use crate::ui::Ui;

/// A machine that stands still, in a plane of its own.
pub(in crate::commands) struct Warmed {
    machine: SavedMachine,
    platform: Platform,
    settings: BTreeMap<String, String>,
}

/// Refuses what cannot be shipped running.
pub(super) fn check(recipe: &Recipe, settings: &[(String, String)]) -> Result<()> {
    if recipe.health.is_none() {
        bail!("nobody knows when it is up: it has no [health] in appliance.toml, which --warm needs");
    }
    let is_secret = |(key, _): &&(String, String)| recipe.settings.get(key).is_some_and(|setting| setting.secret);
    if let Some((key, _)) = settings.iter().find(is_secret) {
        bail!(
            "the setting \"{key}\" is secret, and everybody who launches it would have its value in the machine's memory"
        );
    }
    Ok(())
}

/// Waits until it is healthy and has settled, and suspends it.
pub(super) async fn make(ui: &Ui, plane: &OwnPlane, recipe: &Recipe, boot: &Boot<'_>) -> Result<Warmed> {
    // That is known some seconds after the first healthy answer.
    let settled = plane.ask_until(ui, boot.limit, &OperationRequest::Trace).await;
    settled.context("it cannot be shipped running")?;
    let spinner = ui.spinner("suspending");
    plane.ask(&OperationRequest::Suspend).await.context("it cannot be suspended")?;
    let answer: Value = plane.ask(&OperationRequest::Describe).await?;
    let machine = open_saved(&run_folder(&answer)?, &open_source).await.map_err(Error::msg)?;
    spinner.finish_and_clear();
    if recipe.cloud_init.is_some() {
        ui.hint("cloud-init does its work at a boot only: whoever goes on with this machine has what it made of the maker's instance");
    }
    let defaults = recipe.settings.iter().filter_map(|(key, setting)| Some((key.clone(), setting.default.clone()?)));
    let mut settings: BTreeMap<_, _> = defaults.collect();
    settings.extend(boot.settings.iter().cloned());
    Ok(Warmed { machine, platform: serde_json::from_value(answer["platform"].clone())?, settings })
}

impl Warmed {
    /// Adds all of it to the version. What disks and memory have of its images is there already.
    pub(super) fn add(self, publisher: &mut Publisher) -> Result<Warm> {
        let Self { machine, platform, settings } = self;
        let mut image = |reader: &Reader, first: Trace| -> Result<WarmImage> {
            let image = publisher.add(reader, &[], &first, &|_| {})?;
            let boot = if first.0.is_empty() { None } else { Some(publisher.add_trace(&first)?) };
            Ok(WarmImage { image, boot })
        };
        let memory = image(&machine.memory, machine.first_of_memory()).context("cannot publish its memory")?;
        let mut disks = Vec::new();
        for (disk, reader) in machine.config.disks.iter().zip(&machine.disks) {
            let added = image(reader, machine.first_of_disk(disk.name.as_str()));
            disks.push(added.with_context(|| format!("cannot publish its disk \"{}\"", disk.name))?);
        }
        let mut file = |path: &Path| -> Result<WarmFile> {
            let (content, size) = as_image(path).with_context(|| format!("cannot read {}", path.display()))?;
            let digest = Digest::of(content.get(..size as usize).unwrap_or(&content));
            Ok(WarmFile { image: publisher.add(&content, &[], &Trace::default(), &|_| {})?, size, digest })
        };
        let state = file(&machine.resume.state)?;
        let uefi_vars = machine.config.uefi_vars.as_deref().map(&mut file).transpose()?;
        Ok(Warm { platform, settings, epoch: machine.resume.epoch, memory, disks, state, uefi_vars })
    }
}

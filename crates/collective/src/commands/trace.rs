//! `collective trace`: boots a version once, to learn what it reads.

use std::path::PathBuf;

use anyhow::{Context, Result};
use collective_api::OperationRequest;
use collective_model::{Name, Span};
use collective_store::trace::Trace as BootTrace;
use serde_json::Value;

use super::launch::key_value;
use super::own_plane::{Boot, OwnPlane};
use super::publish::BOOT_FILE;
use crate::ui::Ui;

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
        let boot = Boot { dir: &self.dir, settings: &self.set, limit: self.limit };
        let learn = async |plane: &OwnPlane| plane.ask_until(ui, self.limit, &OperationRequest::Trace).await;
        let traces = OwnPlane::with(&boot, ui, learn).await;
        let traces = traces.with_context(|| format!("cannot trace {}; nothing was written", self.dir.display()))?;
        self.write(ui, &traces)
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

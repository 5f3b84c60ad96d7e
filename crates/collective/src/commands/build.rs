//! `collective build`.

use std::path::PathBuf;

use anyhow::Result;
use collective_model::VersionName;

use crate::ui::Ui;

/// Build an appliance's disks from its recipe
///
/// Runs the recipe's script once for each version, into DIR/build/VERSION, which `collective publish` takes.
///
/// Example: collective build appliances/notes
#[derive(Debug, clap::Args)]
pub struct Build {
    /// The recipe's folder
    dir: PathBuf,
    /// Build these versions only
    #[arg(long = "only", value_name = "VERSION")]
    only: Vec<VersionName>,
}

impl Build {
    pub fn run(self, ui: &Ui) -> Result<()> {
        let built = collective_maker::build(&self.dir, &self.only, &mut |line| ui.hint(line))?;
        let values: Vec<_> = built
            .iter()
            .map(|built| serde_json::json!({ "version": built.version, "folder": built.folder, "notes": built.notes }))
            .collect();
        ui.data(&values, |ui| {
            for built in &built {
                ui.line(format!("version {}: {}", built.version, built.folder.display()));
                built.notes.iter().for_each(|note| ui.line(format!("  {note}")));
            }
        });
        if let Some(first) = built.first() {
            ui.hint(format!("next: collective publish {}", first.folder.display()));
        }
        Ok(())
    }
}

//! `collective runner DIR`: what the host daemon starts for each instance. Not for people.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use collective_model::run::EndKind;

use crate::credentials::open_source;

/// Keep one instance alive
#[derive(Debug, clap::Args)]
pub struct Runner {
    directory: PathBuf,
}

impl Runner {
    pub async fn run(self) -> Result<ExitCode> {
        let end = collective_runner::run(&self.directory, &open_source).await;
        let fine = !matches!(end.kind, EndKind::NotStarted | EndKind::Crashed);
        Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

//! `collective runner DIR`: what the host daemon starts for each instance. Not for people.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Error, Result};
use collective_model::Name;
use collective_model::run::EndKind;

use crate::credentials::{open_source, open_vault};

/// Keep one instance alive
#[derive(Debug, clap::Args)]
pub struct Runner {
    directory: PathBuf,
    /// Write this disk of the machine, which must be off, to standard output, and end
    #[arg(long, value_name = "NAME")]
    send_disk: Option<Name>,
    /// Do what standard input says with the private data of the machine, which must be off, and end
    #[arg(long, conflicts_with = "send_disk")]
    private: bool,
    /// Merge the layers that standard input names, on which no machine may run, and end
    #[arg(long, conflicts_with_all = ["send_disk", "private"])]
    merge: bool,
}

impl Runner {
    pub async fn run(self) -> Result<ExitCode> {
        if let Some(disk) = &self.send_disk {
            let mut out = tokio::io::stdout();
            collective_runner::send_disk(&self.directory, disk, &open_source, &mut out).await.map_err(Error::msg)?;
            return Ok(ExitCode::SUCCESS);
        }
        if self.private {
            let (order, news) = (std::io::stdin(), std::io::stdout());
            let done = collective_runner::private(&self.directory, &open_source, &open_vault, order, news).await;
            return Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if self.merge {
            let done = collective_runner::merge(std::io::stdin(), std::io::stdout());
            return Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        // A fault of ours is a death like any other, which the guest survives; what is left half done would be none.
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |fault| {
            usual(fault);
            std::process::abort();
        }));
        let end = collective_runner::run(&self.directory, &open_source, &open_vault, std::io::stdin()).await;
        let fine = !matches!(end.kind, EndKind::NotStarted | EndKind::Crashed);
        Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

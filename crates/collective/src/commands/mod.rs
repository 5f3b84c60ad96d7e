//! The command line, as DESIGN's contract says. Doc comments here are the help texts.

mod backup;
mod build;
mod catalogue;
mod doctor;
mod export;
mod hosts;
mod import;
mod info;
mod key;
mod launch;
mod lifecycle;
mod mount;
mod moving;
mod operations;
mod own_plane;
mod publish;
mod reach;
mod runner;
mod settings;
mod state;
mod store;
mod store_private;
mod trace;
mod up;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use collective_api::{Client, InstanceView};
use collective_model::Name;

use crate::connect::Connect;
use crate::ui::Ui;

/// Whole computers as data: publish once, start anywhere, keep up to date, and keep the user's data.
#[derive(Debug, Parser)]
#[command(name = "collective", version, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// Print JSON: one document, or one per line for streams
    #[arg(long, global = true)]
    pub json: bool,
    /// Print no progress and no hints
    #[arg(long, short, global = true)]
    pub quiet: bool,
    #[command(flatten)]
    pub connect: Connect,
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Up(up::Up),
    Down(up::Down),
    Status(up::Status),
    Doctor(doctor::Doctor),
    Build(build::Build),
    Import(import::Import),
    Trace(trace::Trace),
    Publish(publish::Publish),
    Export(export::Export),
    Mount(mount::Mount),
    Search(catalogue::Search),
    Show(catalogue::Show),
    Channels(catalogue::Channels),
    Verify(catalogue::Verify),
    Trust(catalogue::Trust),
    Rekey(catalogue::Rekey),
    Withdraw(store::Withdraw),
    Prune(store::Prune),
    Store(store::Store),
    Launch(launch::Launch),
    List(info::List),
    Info(info::Info),
    Ports(info::Ports),
    History(info::History),
    Wait(info::Wait),
    Logs(info::Logs),
    Open(info::Open),
    Console(reach::Console),
    Ssh(reach::Ssh),
    Cp(reach::Cp),
    Tunnel(reach::Tunnel),
    Start(lifecycle::Start),
    Stop(lifecycle::Stop),
    Restart(lifecycle::Restart),
    Delete(lifecycle::Delete),
    Suspend(state::Suspend),
    Resume(state::Resume),
    Clone(state::Clone),
    Move(moving::Move),
    CheckHost(state::CheckHost),
    Checkpoint(state::Checkpoint),
    Timeline(state::Timeline),
    Restore(state::Restore),
    Rename(settings::Rename),
    Set(settings::Set),
    Hold(settings::Hold),
    Follow(settings::Follow),
    Plan(operations::Plan),
    Update(operations::Update),
    Rollback(operations::Rollback),
    Backup(backup::Backup),
    Key(key::Key),
    Host(hosts::Host),
    Token(hosts::TokenCommand),
    Completion(Completion),
    Version(Version),
    #[command(hide = true)]
    Runner(runner::Runner),
}

impl Command {
    /// Daemons tell what they do; commands only what goes wrong.
    pub fn log_level(&self) -> &'static str {
        match self {
            Self::Up(_) | Self::Host(_) | Self::Runner(_) => "info",
            _ => "warn",
        }
    }

    /// Carries it out.
    pub async fn run(self, ui: &Ui, connect: &Connect) -> Result<ExitCode> {
        let done = |()| ExitCode::SUCCESS;
        match self {
            Self::Up(command) => command.run(ui).await.map(done),
            Self::Down(command) => command.run(ui).await.map(done),
            Self::Build(command) => command.run(ui).map(done),
            Self::Import(command) => command.run(ui).map(done),
            Self::Trace(command) => command.run(ui).await.map(done),
            Self::Doctor(command) => command.run(ui).await,
            Self::Runner(command) => command.run().await,
            Self::Completion(command) => command.run(ui).map(done),
            Self::Version(command) => command.run(ui).map(done),
            Self::Host(command) => command.run(ui, connect).await.map(done),
            Self::Ssh(command) => command.run(connect).await.map(done),
            Self::Cp(command) => command.run(connect).await.map(done),
            command => command.run_with(ui, &connect.client()?).await,
        }
    }

    async fn run_with(self, ui: &Ui, client: &Client) -> Result<ExitCode> {
        match self {
            Self::Status(command) => command.run(ui, client).await?,
            Self::Publish(command) => command.run(ui, client).await?,
            Self::Export(command) => command.run(ui, client).await?,
            Self::Mount(command) => command.run(ui, client).await?,
            Self::Search(command) => command.run(ui, client).await?,
            Self::Show(command) => command.run(ui, client).await?,
            Self::Channels(command) => command.run(ui, client).await?,
            Self::Verify(command) => command.run(ui, client).await?,
            Self::Trust(command) => command.run(ui, client).await?,
            Self::Rekey(command) => command.run(ui, client).await?,
            Self::Withdraw(command) => command.run(ui, client).await?,
            Self::Prune(command) => command.run(ui, client).await?,
            Self::Store(command) => command.run(ui, client).await?,
            Self::Launch(command) => command.run(ui, client).await?,
            Self::List(command) => command.run(ui, client).await?,
            Self::Info(command) => command.run(ui, client).await?,
            Self::Ports(command) => command.run(ui, client).await?,
            Self::History(command) => command.run(ui, client).await?,
            Self::Wait(command) => command.run(ui, client).await?,
            Self::Logs(command) => command.run(ui, client).await?,
            Self::Open(command) => command.run(ui, client).await?,
            Self::Console(command) => command.run(ui, client).await?,
            Self::Tunnel(command) => command.run(client).await?,
            Self::Start(command) => command.run(ui, client).await?,
            Self::Stop(command) => command.run(ui, client).await?,
            Self::Restart(command) => command.run(ui, client).await?,
            Self::Delete(command) => command.run(ui, client).await?,
            Self::Suspend(command) => command.run(ui, client).await?,
            Self::Resume(command) => command.run(ui, client).await?,
            Self::Clone(command) => command.run(ui, client).await?,
            Self::Move(command) => command.run(ui, client).await?,
            Self::CheckHost(command) => command.run(ui, client).await?,
            Self::Checkpoint(command) => command.run(ui, client).await?,
            Self::Timeline(command) => command.run(ui, client).await?,
            Self::Restore(command) => command.run(ui, client).await?,
            Self::Rename(command) => command.run(ui, client).await?,
            Self::Set(command) => command.run(ui, client).await?,
            Self::Hold(command) => command.run(ui, client).await?,
            Self::Follow(command) => command.run(ui, client).await?,
            Self::Plan(command) => command.run(ui, client).await?,
            Self::Update(command) => return command.run(ui, client).await,
            Self::Rollback(command) => command.run(ui, client).await?,
            Self::Backup(command) => command.run(ui, client).await?,
            Self::Key(command) => command.run(ui, client).await?,
            Self::Token(command) => command.run(ui, client).await?,
            Self::Up(_) | Self::Down(_) | Self::Build(_) | Self::Runner(_) | Self::Doctor(_) => {}
            Self::Import(_) | Self::Completion(_) | Self::Version(_) | Self::Host(_) => {}
            Self::Ssh(_) | Self::Cp(_) | Self::Trace(_) => {}
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Print a completion script for a shell
///
/// Example: collective completion bash > /etc/bash_completion.d/collective
#[derive(Debug, clap::Args)]
pub struct Completion {
    shell: clap_complete::Shell,
}

impl Completion {
    fn run(self, ui: &Ui) -> Result<()> {
        // Into memory first: the generator panics where a reader goes away.
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "collective", &mut script);
        ui.line(String::from_utf8_lossy(&script).trim_end());
        Ok(())
    }
}

/// Print the program's version
///
/// Example: collective version
#[derive(Debug, clap::Args)]
pub struct Version {}

impl Version {
    fn run(self, ui: &Ui) -> Result<()> {
        let version = env!("CARGO_PKG_VERSION");
        ui.data(&serde_json::json!({ "version": version }), |ui| ui.line(format!("collective {version}")));
        Ok(())
    }
}

/// The instance `name`.
async fn instance(client: &Client, name: &Name) -> Result<InstanceView> {
    Ok(client.get(&format!("/v1/instances/{name}")).await?)
}

/// The instance `name` as soon as it differs from what `view` shows.
async fn next(client: &Client, view: &InstanceView) -> Result<InstanceView> {
    let name = &view.spec.name;
    Ok(client.get(&format!("/v1/instances/{name}?after={}&wait_ms=10000", view.revision)).await?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_an_example() {
        let command = Cli::command();
        command.clone().debug_assert();
        for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
            let leaves: Vec<_> = if sub.has_subcommands() { sub.get_subcommands().collect() } else { vec![sub] };
            for leaf in leaves {
                let help = leaf.get_long_about().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example: collective "), "{} {}", sub.get_name(), leaf.get_name());
            }
        }
    }
}

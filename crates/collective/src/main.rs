//! The program: one file per command over the plane's API; the only place that composes plane, host, runner and maker.

#![forbid(unsafe_code)]

mod commands;
mod connect;
mod credentials;
mod ui;

use std::process::ExitCode;

use clap::Parser;

use commands::Cli;
use ui::Ui;

fn main() -> ExitCode {
    // A reader that goes away (`collective list | head`) is no error: end quietly, like every other tool.
    let cli = Cli::parse();
    let log = tracing_subscriber::EnvFilter::try_from_env("COLLECTIVE_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(cli.command.log_level()));
    tracing_subscriber::fmt().with_env_filter(log).with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("collective: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let ui = Ui::new(cli.json, cli.quiet);
    let result = runtime.block_on(cli.command.run(&ui, &cli.connect));
    runtime.shutdown_timeout(std::time::Duration::from_millis(200));
    match result {
        Ok(code) => code,
        Err(error) => {
            ui.error(&error);
            ExitCode::FAILURE
        }
    }
}

//! What people and programs see: data on standard output, progress and hints on standard error.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// How this run talks.
pub struct Ui {
    /// One JSON document in place of text.
    pub json: bool,
    quiet: bool,
}

impl Ui {
    pub fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// A line of data.
    pub fn line(&self, text: impl AsRef<str>) {
        // A closed pipe ends the program without a complaint.
        if writeln!(std::io::stdout(), "{}", text.as_ref()).is_err() {
            std::process::exit(0);
        }
    }

    /// Data: JSON if asked for, else what `text` writes.
    pub fn data<T: Serialize>(&self, value: &T, text: impl FnOnce(&Self)) {
        if self.json {
            match serde_json::to_string(value) {
                Ok(json) => self.line(json),
                Err(error) => self.hint(format!("the answer cannot be written as JSON: {error}")),
            }
        } else {
            text(self);
        }
    }

    /// Something for people only.
    pub fn hint(&self, text: impl AsRef<str>) {
        if !self.quiet {
            let _ = writeln!(std::io::stderr(), "{}", text.as_ref());
        }
    }

    /// Why a command failed.
    pub fn error(&self, error: &anyhow::Error) {
        if self.json {
            let problem = serde_json::json!({ "error": chain(error) });
            let _ = writeln!(std::io::stderr(), "{problem}");
        } else {
            let _ = writeln!(std::io::stderr(), "collective: {}", chain(error));
        }
    }

    fn target(&self) -> ProgressDrawTarget {
        if self.quiet || self.json || !std::io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        }
    }

    /// A bar that counts bytes; hidden where nobody looks.
    pub fn bytes(&self, what: &str, total: u64) -> ProgressBar {
        let style =
            ProgressStyle::with_template("{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
        let bar = ProgressBar::with_draw_target(Some(total), self.target());
        bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())).with_message(what.to_owned())
    }

    /// Something that takes a while.
    pub fn spinner(&self, what: &str) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(None, self.target()).with_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }
}

/// An error with its causes, each said once: many of ours say their cause in their own words already.
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// Columns, padded to the widest cell.
pub fn table(ui: &Ui, header: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain(header.get(column).map(|title| title.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    ui.line(line(&mut header.iter().copied()));
    for row in rows {
        ui.line(line(&mut row.iter().map(String::as_str)));
    }
}

/// Milliseconds for people.
pub fn seconds(ms: u64) -> String {
    format!("{}.{:01} s", ms / 1000, ms % 1000 / 100)
}

//! `collective doctor`: what this machine can do, and what to install or fix.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Result;
use collective_vmm::Accelerator;
use serde::Serialize;

use crate::connect::default_data;
use crate::ui::Ui;

/// Check this machine and say what to install or fix
///
/// Ends with code 1 if instances cannot run here.
///
/// Example: collective doctor
#[derive(Debug, clap::Args)]
pub struct Doctor {}

#[derive(Serialize, PartialEq, Eq, Clone, Copy)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Fine,
    Worse,
    Broken,
}

#[derive(Serialize)]
struct Check {
    what: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it.
    remedy: Option<&'static str>,
}

impl Check {
    fn new(what: &'static str, verdict: Verdict, found: impl Into<String>, remedy: &'static str) -> Self {
        let remedy = (verdict != Verdict::Fine).then_some(remedy);
        Self { what, verdict, found: found.into(), remedy }
    }
}

impl Doctor {
    pub async fn run(self, ui: &Ui) -> Result<ExitCode> {
        let mut checks = vec![qemu().await, accelerator().await?, fuse(), checkpoints(), user()];
        checks.extend([
            tool("qemu-img", "--version", "publishes disks in other formats than raw", "apt install qemu-utils"),
            tool("mmdebstrap", "--version", "builds appliances from Debian packages", "apt install mmdebstrap"),
            tool("mke2fs", "-V", "builds appliances from Debian packages", "apt install e2fsprogs"),
        ]);
        checks.push(space());
        ui.data(&checks, |ui| {
            for check in &checks {
                let mark = match check.verdict {
                    Verdict::Fine => "fine  ",
                    Verdict::Worse => "worse ",
                    Verdict::Broken => "broken",
                };
                ui.line(format!("{mark}  {:<12} {}", check.what, check.found));
                check.remedy.iter().for_each(|remedy| ui.line(format!("        {:<12} {remedy}", "")));
            }
        });
        let broken = checks.iter().any(|check| check.verdict == Verdict::Broken);
        Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }
}

async fn qemu() -> Check {
    let remedy = "apt install qemu-system-x86 (on Debian 12 from bookworm-backports)";
    match collective_vmm::find_qemu().await {
        Err(error) => Check::new("qemu", Verdict::Broken, error.to_string(), remedy),
        Ok(info) => {
            let (major, minor, patch) = info.version;
            let verdict = if info.warning.is_some() { Verdict::Worse } else { Verdict::Fine };
            let warning = info.warning.map(|warning| format!("; {warning}")).unwrap_or_default();
            Check::new("qemu", verdict, format!("{} {major}.{minor}.{patch}{warning}", info.path.display()), remedy)
        }
    }
}

async fn accelerator() -> Result<Check> {
    let found = tokio::task::spawn_blocking(collective_vmm::detect_accelerator).await?;
    let verdict = if found == Accelerator::Kvm { Verdict::Fine } else { Verdict::Worse };
    Ok(Check::new(
        "accelerator",
        verdict,
        found.to_string(),
        "machines run, many times slower; enable virtualisation (KVM)",
    ))
}

fn fuse() -> Check {
    let remedy = "load the fuse module, install the package fuse3, and let users open /dev/fuse (mode 0666)";
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/fuse") {
        return Check::new("fuse", Verdict::Broken, format!("/dev/fuse cannot be opened: {error}"), remedy);
    }
    let root = rustix::process::geteuid().is_root();
    match Command::new("fusermount3").arg("--version").output() {
        Ok(_) => Check::new("fuse", Verdict::Fine, "/dev/fuse opens, fusermount3 is there", remedy),
        Err(_) if root => Check::new("fuse", Verdict::Fine, "/dev/fuse opens; root needs no fusermount3", remedy),
        Err(error) => Check::new("fuse", Verdict::Broken, format!("fusermount3 cannot be run: {error}"), remedy),
    }
}

fn checkpoints() -> Check {
    let remedy = "checkpoints work, and a guest stands still while all its memory is copied";
    match collective_vmm::tracks_writes() {
        Ok(()) => Check::new("checkpoints", Verdict::Fine, "a guest stands still for milliseconds", remedy),
        Err(why) => Check::new("checkpoints", Verdict::Worse, why, remedy),
    }
}

fn user() -> Check {
    let remedy = "instances run as the same user and are less apart from each other; run `collective up` as root";
    if rustix::process::geteuid().is_root() {
        Check::new("user", Verdict::Fine, "root: every machine runs as a user of its own", remedy)
    } else {
        Check::new("user", Verdict::Worse, "an ordinary user", remedy)
    }
}

fn tool(name: &'static str, argument: &str, what_for: &str, remedy: &'static str) -> Check {
    match Command::new(name).arg(argument).output() {
        Ok(_) => Check::new(name, Verdict::Fine, what_for, remedy),
        Err(_) => Check::new(name, Verdict::Worse, format!("missing; it {what_for}"), remedy),
    }
}

fn space() -> Check {
    let remedy = "free space, or keep less with `collective up --cache-size`";
    let data = default_data();
    let there = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(there) {
        Err(error) => {
            Check::new("space", Verdict::Worse, format!("{} cannot be looked at: {error}", there.display()), remedy)
        }
        Ok(found) => {
            let free = found.f_bavail * found.f_frsize;
            let verdict = if free < 2 << 30 { Verdict::Worse } else { Verdict::Fine };
            let free = collective_model::ByteSize(free);
            Check::new("space", verdict, format!("{free} free in {}", there.display()), remedy)
        }
    }
}

//! What a machine runs on here.

use collective_model::Digest;
use collective_model::run::{Platform, RunConfig};
use collective_vmm::{Accelerator, Processor, QemuInfo};

/// What the machine of `config` runs on, with the processor that the daemon wants the guest to see.
pub(crate) fn here(
    config: &RunConfig,
    qemu: &QemuInfo,
    accelerator: &Accelerator,
) -> Result<(Platform, Processor), String> {
    let processor = match &config.processor {
        None => Processor::Host,
        Some(name) => Processor::portable(name).ok_or_else(|| {
            format!("this runner knows no processor \"{name}\"; run daemon and runner from the same installation")
        })?,
    };
    Ok((platform(qemu, accelerator, processor), processor))
}

/// What a machine that is started here runs on, with this processor if it is not emulated.
pub fn platform(qemu: &QemuInfo, accelerator: &Accelerator, processor: Processor) -> Platform {
    let (major, minor, micro) = qemu.version;
    let cpu = match (accelerator, processor) {
        (Accelerator::Tcg { .. }, _) => "max".into(),
        (Accelerator::Kvm, Processor::Portable(portable)) => portable.name.into(),
        (Accelerator::Kvm, Processor::Host) => host_processor().unwrap_or_else(|| "unknown".into()),
    };
    let accelerator = if matches!(accelerator, Accelerator::Kvm) { "kvm" } else { "tcg" };
    Platform { qemu: format!("{major}.{minor}.{micro}"), accelerator: accelerator.into(), cpu, portable: Vec::new() }
}

/// Model and features of this machine's processor, as one word.
fn host_processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let field = |name: &str| {
        let line = text.lines().find(|line| line.split(':').next().map(str::trim) == Some(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    let features = Digest::of(field("flags")?.as_bytes());
    Some(format!("{}-{}", field("model name")?.replace(char::is_whitespace, "_"), features.short()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_the_one_that_the_daemon_wants() {
        let mut config: RunConfig = serde_json::from_value(serde_json::json!({
            "protocol": 1, "instance": "00".repeat(16), "name": "n", "ordered": "2026-11-22T00:00:00Z", "cpus": 1,
            "memory_mib": 64, "firmware": "bios", "display": false, "disks": [], "seed": "/s", "ports": [],
            "open_ports": false, "health": null, "outbound": false, "force_tcg": false, "user": null, "cache": "/c",
            "credentials": "/k"
        }))
        .unwrap();
        let qemu = QemuInfo { path: "/q".into(), version: (10, 0, 2), warning: None };
        let tcg = Accelerator::Tcg { why: "test".into() };
        let on = |config: &RunConfig, accelerator: &Accelerator| here(config, &qemu, accelerator);
        // A daemon of before says nothing of it.
        let (platform, processor) = on(&config, &Accelerator::Kvm).unwrap();
        assert_eq!((processor, Some(platform.cpu)), (Processor::Host, host_processor()));
        assert_eq!(on(&config, &tcg).unwrap().0.cpu, "max");
        config.processor = Some("x86-64-v3-amd".into());
        assert_eq!(on(&config, &Accelerator::Kvm).unwrap().0.cpu, "x86-64-v3-amd");
        assert_eq!(on(&config, &tcg).unwrap().0.cpu, "max", "emulation has one processor");
        config.processor = Some("x86-64-v9-intel".into());
        assert!(on(&config, &Accelerator::Kvm).unwrap_err().contains("x86-64-v9-intel"));
    }
}

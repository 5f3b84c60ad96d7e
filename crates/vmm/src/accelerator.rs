//! Whether KVM works here, found out by use: there are hosts whose `/dev/kvm` opens and makes machines in which
//! a stock kernel then hangs.

use std::fmt;

use crate::kvm_probe;

/// What runs the guest's instructions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor itself.
    Kvm,
    /// QEMU's translation to host code: works everywhere, is many times slower.
    Tcg {
        /// Why KVM is not used, as a clause to show to the user.
        why: String,
    },
}

impl fmt::Display for Accelerator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Accelerator::Kvm => formatter.write_str("KVM"),
            Accelerator::Tcg { why } => write!(formatter, "emulation (TCG), because {why}"),
        }
    }
}

/// Finds out what to use. Blocks for milliseconds, at most some two seconds where KVM hangs.
/// A caller who knows better builds an [`Accelerator`] itself.
#[must_use]
pub fn detect_accelerator() -> Accelerator {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    decide(&processor, kvm_probe::run_some_code)
}

fn decide(processor: &str, probe: impl FnOnce() -> Result<(), String>) -> Accelerator {
    if !has_virtualisation(processor) {
        // The cheap sign of a host that is itself a guest without nested virtualisation.
        return Accelerator::Tcg {
            why: "the processor offers no virtualisation (neither vmx nor svm in /proc/cpuinfo)".into(),
        };
    }
    match probe() {
        Ok(()) => Accelerator::Kvm,
        Err(why) => Accelerator::Tcg { why },
    }
}

fn has_virtualisation(processor: &str) -> bool {
    processor
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_needs_the_flag_and_a_working_probe() {
        let without = "model name : svm vmx\nflags\t\t: fpu sse2\n";
        let with = "flags\t\t: fpu vmx sse2\n";
        assert!(matches!(decide(without, || Ok(())), Accelerator::Tcg { why } if why.contains("neither vmx nor svm")));
        assert!(matches!(decide("", || Ok(())), Accelerator::Tcg { .. }));
        assert_eq!(decide(with, || Ok(())), Accelerator::Kvm);
        assert!(matches!(decide(with, || Err("it hung".into())), Accelerator::Tcg { why } if why == "it hung"));
    }

    #[test]
    fn the_probe_ends_on_any_host() {
        // Whatever this host can do, the answer comes, and a refusal has a reason.
        if let Err(why) = kvm_probe::run_some_code() {
            assert!(!why.is_empty());
        }
    }
}

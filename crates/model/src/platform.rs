//! What a saved machine depends on, and where it can go on. Pure.

use serde::{Deserialize, Serialize};

use crate::Cpu;

/// What a running machine depends on beside its own hardware: it goes on only where this is the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// QEMU's version.
    pub qemu: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The processor that the guest sees. Of a host: the one with all that its own has.
    pub cpu: String,
    /// Of a host: other processors that it can give to a guest, by name, lowest first. What has one of them goes on wherever it
    /// is in this list.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub portable: Vec<String>,
}

impl Platform {
    /// Whether a machine that was saved on this one goes on at a host which has `there`; the error says why not.
    pub fn goes_on_at(&self, there: Option<&Platform>) -> Result<(), String> {
        let there = there.ok_or("it is not known what machines run on there")?;
        let same = (&self.qemu, &self.accelerator) == (&there.qemu, &there.accelerator);
        if same && (self.cpu == there.cpu || there.portable.contains(&self.cpu)) {
            Ok(())
        } else {
            Err(format!("it was saved on {self}, and there is {there}"))
        }
    }

    /// The portable processor for a machine that is booted on this host; none: the host's own. `chosen` is what the owner of
    /// the host wants in place of the best.
    pub fn to_boot(&self, wanted: Cpu, chosen: Option<&str>) -> Option<String> {
        match wanted {
            Cpu::Portable => self.portable.iter().rfind(|name| chosen.is_none_or(|chosen| chosen == *name)).cloned(),
            Cpu::Host => None,
        }
    }

    /// Whether this host can give machines the processor that its owner chose; the error says what can be chosen. Emulation has
    /// one for all.
    pub fn check_choice(&self, chosen: Option<&str>) -> Result<(), String> {
        match chosen {
            Some(name) if self.accelerator == "kvm" && !self.portable.iter().any(|known| known == name) => {
                let known = if self.portable.is_empty() { "none".into() } else { self.portable.join(", ") };
                Err(format!("this host has no processor \"{name}\" for machines; it has: {known}"))
            }
            _ => Ok(()),
        }
    }

    /// The portable processor for a saved machine that goes on at this host; none: it has the host's own, or cannot.
    pub fn to_go_on(&self, saved: &Platform) -> Option<String> {
        self.portable.iter().find(|name| **name == saved.cpu).cloned()
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QEMU {} with {} and processor {}", self.qemu, self.accelerator, self.cpu)?;
        if self.portable.is_empty() { Ok(()) } else { write!(f, " (also {})", self.portable.join(", ")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "x86-64-v2-intel";
    const V3: &str = "x86-64-v3-intel";

    fn platform(cpu: &str, portable: &[&str]) -> Platform {
        let portable = portable.iter().map(|name| (*name).to_owned()).collect();
        Platform { qemu: "10.0.2".into(), accelerator: "kvm".into(), cpu: cpu.into(), portable }
    }

    #[test]
    fn a_portable_processor_goes_on_where_there_is_at_least_that() {
        let new = platform("Xeon-new", &[V2, V3]);
        let old = platform("Xeon-old", &[V2]);
        let amd = platform("Epyc", &["x86-64-v3-amd"]);
        for (machine, goes_to_new, goes_to_old) in [(V2, true, true), (V3, true, false), ("Xeon-old", false, true)] {
            let machine = platform(machine, &[]);
            assert_eq!(machine.goes_on_at(Some(&new)).is_ok(), goes_to_new, "{machine}");
            assert_eq!(machine.goes_on_at(Some(&old)).is_ok(), goes_to_old, "{machine}");
            assert!(machine.goes_on_at(Some(&amd)).is_err() && machine.goes_on_at(None).is_err());
        }
        let why = platform(V3, &[]).goes_on_at(Some(&old)).unwrap_err();
        assert!(why.contains("processor x86-64-v3-intel") && why.contains("Xeon-old (also x86-64-v2-intel)"), "{why}");
        // The rest has to be the same all the same.
        let tcg = Platform { accelerator: "tcg".into(), ..new.clone() };
        assert!(platform(V2, &[]).goes_on_at(Some(&tcg)).unwrap_err().contains("with tcg"));
        assert!(platform(V2, &[]).goes_on_at(Some(&Platform { qemu: "10.1.0".into(), ..new })).is_err());
    }

    #[test]
    fn which_processor_a_guest_gets() {
        let host = platform("Xeon-new", &[V2, V3]);
        assert_eq!(host.to_boot(Cpu::Portable, None).as_deref(), Some(V3));
        assert_eq!(host.to_boot(Cpu::Host, None), None);
        // The owner has other hosts, which are older.
        assert_eq!(host.to_boot(Cpu::Portable, Some(V2)).as_deref(), Some(V2));
        assert_eq!((host.to_boot(Cpu::Host, Some(V2)), host.check_choice(Some(V2))), (None, Ok(())));
        let why = host.check_choice(Some("x86-64-v4-intel")).unwrap_err();
        assert!(why.contains("v4-intel") && why.contains("x86-64-v2-intel, x86-64-v3-intel"), "{why}");
        let emulated = Platform { accelerator: "tcg".into(), ..platform("max", &[]) };
        assert_eq!((emulated.check_choice(Some(V2)), emulated.to_boot(Cpu::Portable, Some(V2))), (Ok(()), None));
        // It goes on with the one it had, whatever it would get today.
        assert_eq!(host.to_go_on(&platform(V2, &[])).as_deref(), Some(V2));
        assert_eq!(host.to_go_on(&platform("Xeon-new", &[])), None);
        assert_eq!(platform("max", &[]).to_boot(Cpu::Portable, None), None);
    }

    #[test]
    fn hosts_and_machines_of_before() {
        let text = r#"{"qemu":"10.0.2","accelerator":"kvm","cpu":"Xeon-old"}"#;
        let saved: Platform = serde_json::from_str(text).unwrap();
        assert_eq!(saved.goes_on_at(Some(&platform("Xeon-old", &[V2]))), Ok(()));
        assert!(platform(V2, &[]).goes_on_at(Some(&saved)).is_err(), "that host does not say that it has it");
        assert_eq!(serde_json::to_string(&saved).unwrap(), text);
    }
}

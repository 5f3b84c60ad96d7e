//! Where should an instance run? A pure decision.

use collective_model::Name;

/// What is known of a host.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Its name.
    pub name: Name,
    /// Whether it was heard of lately.
    pub reachable: bool,
    /// Memory in bytes that its instances do not claim.
    pub free_memory: i64,
    /// Its CPUs.
    pub cpus: u32,
    /// Instances it owns.
    pub instances: u64,
}

/// Chooses the host with the fewest instances among those that fit. The error says why none does.
pub fn place(candidates: &[Candidate], memory: u64, cpus: u32) -> Result<Name, String> {
    if candidates.is_empty() {
        return Err("no host has joined; start one with `collective up` or `collective host join`".into());
    }
    let mut reasons = Vec::new();
    let mut fitting: Vec<&Candidate> = Vec::new();
    for host in candidates {
        match unfit(host, memory, cpus) {
            Some(why) => reasons.push(why),
            None => fitting.push(host),
        }
    }
    let best = fitting.iter().min_by_key(|host| (host.instances, host.name.clone()));
    best.map(|host| host.name.clone()).ok_or_else(|| format!("no host can take it: {}", reasons.join("; ")))
}

/// Why a host cannot take a machine.
pub fn unfit(host: &Candidate, memory: u64, cpus: u32) -> Option<String> {
    if !host.reachable {
        return Some(format!("host \"{}\" does not answer", host.name));
    }
    if host.cpus < cpus {
        return Some(format!("host \"{}\" has {} CPUs, and it needs {cpus}", host.name, host.cpus));
    }
    if host.free_memory < memory as i64 {
        let mib = |bytes: i64| bytes.max(0) >> 20;
        return Some(format!(
            "host \"{}\" has {} MiB of memory left, and it needs {} MiB",
            host.name,
            mib(host.free_memory),
            mib(memory as i64)
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str, reachable: bool, free_mib: i64, instances: u64) -> Candidate {
        Candidate { name: name.parse().unwrap(), reachable, free_memory: free_mib << 20, cpus: 2, instances }
    }

    #[test]
    fn the_emptiest_that_fits() {
        let hosts =
            [host("a", false, 9999, 0), host("b", true, 100, 0), host("c", true, 999, 5), host("d", true, 999, 3)];
        assert_eq!(place(&hosts, 512 << 20, 1).unwrap().as_str(), "d");
        let error = place(&hosts, 2000 << 20, 1).unwrap_err();
        assert!(error.contains("\"a\" does not answer") && error.contains("999 MiB"), "{error}");
        assert!(place(&hosts, 1, 64).unwrap_err().contains("CPUs"));
        assert!(place(&[], 1, 1).unwrap_err().contains("host join"));
    }
}

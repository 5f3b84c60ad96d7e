//! Processors that are the same on many hosts, so that a saved machine is not tied to one model of processor.
//!
//! They are named models of QEMU's for the levels of the x86-64 psABI. A level is offered where the host's processor has it
//! (`/proc/cpuinfo`), and QEMU itself says that KVM gives a guest everything that the model has: a hypervisor below may
//! keep things back. A guest is never moved between makers of processors, which kernels treat differently.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use crate::qmp::Client;

/// From QEMU's start to its list of models.
const LIMIT: Duration = Duration::from_secs(20);

/// The processor that a guest sees under KVM. Under emulation it is always all that QEMU can emulate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// The host's own, with all that it has.
    Host,
    /// One that other hosts have as well.
    Portable(&'static Portable),
}

/// A processor that many hosts have.
#[derive(Debug, PartialEq, Eq)]
pub struct Portable {
    /// What a machine that was saved with it is known by, for ever.
    pub name: &'static str,
    /// `vendor_id` in `/proc/cpuinfo`.
    vendor: &'static str,
    /// QEMU's model; the versions with what guests need against Spectre.
    model: &'static str,
    /// How many of [`LEVELS`] it has.
    levels: usize,
}

/// What each level adds to the one before, by the names of `/proc/cpuinfo` (`pni` is SSE3, `abm` has LZCNT).
const LEVELS: [&[&str]; 3] = [
    &["cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"],
    &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

const INTEL: &str = "GenuineIntel";
const AMD: &str = "AuthenticAMD";

/// Lowest first. QEMU has no model of AMD's for the second level that later processors have too.
const PORTABLE: [Portable; 5] = [
    Portable { name: "x86-64-v2-intel", vendor: INTEL, model: "Nehalem-IBRS", levels: 1 },
    Portable { name: "x86-64-v3-intel", vendor: INTEL, model: "Haswell-noTSX-IBRS", levels: 2 },
    Portable { name: "x86-64-v4-intel", vendor: INTEL, model: "Skylake-Server-noTSX-IBRS", levels: 3 },
    Portable { name: "x86-64-v3-amd", vendor: AMD, model: "EPYC-IBPB", levels: 2 },
    Portable { name: "x86-64-v4-amd", vendor: AMD, model: "EPYC-Genoa", levels: 3 },
];

impl Processor {
    /// The portable one with this name.
    pub fn portable(name: &str) -> Option<Self> {
        PORTABLE.iter().find(|portable| portable.name == name).map(Self::Portable)
    }

    /// As QEMU's option. A model is given whole or not at all.
    pub(crate) fn option(self) -> String {
        match self {
            Self::Host => "host".into(),
            Self::Portable(portable) => format!("{},enforce", portable.model),
        }
    }
}

/// The portable processors that KVM gives to guests here, by name, lowest first. Starts QEMU, and takes a moment.
pub async fn portable_processors(qemu: &Path) -> Result<Vec<&'static str>, String> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").map_err(|e| format!("cannot read /proc/cpuinfo: {e}"))?;
    let candidates = candidates(&cpuinfo);
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    Ok(usable(&candidates, &models(qemu, "kvm").await?))
}

/// Those that the processor has, by what `/proc/cpuinfo` says.
fn candidates(cpuinfo: &str) -> Vec<&'static Portable> {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.split(':').next().map(str::trim) == Some(name));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let flags: Vec<&str> = field("flags").split_ascii_whitespace().collect();
    let has = |level: &&[&str]| level.iter().all(|flag| flags.contains(flag));
    let levels = LEVELS.iter().take_while(|level| has(level)).count();
    let fits = |portable: &&Portable| portable.vendor == field("vendor_id") && portable.levels <= levels;
    PORTABLE.iter().filter(fits).collect()
}

/// Those of which QEMU, in its answer to `query-cpu-definitions`, lacks nothing.
fn usable(candidates: &[&'static Portable], models: &Value) -> Vec<&'static str> {
    let complete = |portable: &&&Portable| {
        let model = models.as_array().and_then(|all| all.iter().find(|model| model["name"] == portable.model));
        model.is_some_and(|model| model["unavailable-features"].as_array().is_some_and(Vec::is_empty))
    };
    candidates.iter().filter(complete).map(|portable| portable.name).collect()
}

/// What QEMU says of its models.
async fn models(qemu: &Path, accelerator: &str) -> Result<Value, String> {
    ask(qemu, ["none", accelerator], "query-cpu-definitions", json!({})).await
}

/// Asks a QEMU of its own, which runs no guest.
async fn ask(qemu: &Path, [machine, accelerator]: [&str; 2], command: &str, arguments: Value) -> Result<Value, String> {
    let failed = |why: String| format!("QEMU did not say which processors it can give to guests: {why}");
    let mut child = Command::new(qemu)
        .args(["-no-user-config", "-nodefaults", "-display", "none", "-S", "-machine", machine, "-accel", accelerator])
        .args(["-qmp", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(e.to_string()))?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed("there is no way to ask it".into()));
    };
    let conversation = async {
        let (client, _events) = Client::connect(tokio::io::join(output, input)).await?;
        client.execute(command, arguments).await
    };
    let answer = match timeout(LIMIT, conversation).await {
        Err(_) => return Err(failed(format!("no answer in {} s", LIMIT.as_secs()))),
        Ok(answer) => answer,
    };
    let _ = child.start_kill();
    match answer {
        Ok(answer) => Ok(answer),
        Err(error) => {
            let said = child.wait_with_output().await.map(|output| output.stderr).unwrap_or_default();
            Err(failed(format!("{error}; it said: {}", String::from_utf8_lossy(&said).trim())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "fpu cx16 lahf_lm popcnt pni ssse3 sse4_1 sse4_2";
    const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
    const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

    fn names(vendor: &str, flags: &[&str]) -> Vec<&'static str> {
        let flags = flags.join(" ");
        let one =
            |number| format!("processor\t: {number}\nvendor_id\t: {vendor}\nflags\t\t: {flags} vmx\nbugs\t\t:\n\n");
        candidates(&(one(0) + &one(1))).iter().map(|portable| portable.name).collect()
    }

    #[test]
    fn levels_by_what_the_processor_has() {
        assert_eq!(names(INTEL, &["fpu sse2"]), [""; 0]);
        assert_eq!(names(INTEL, &[V2]), ["x86-64-v2-intel"]);
        assert_eq!(names(INTEL, &[V2, V3]), ["x86-64-v2-intel", "x86-64-v3-intel"]);
        assert_eq!(names(INTEL, &[V2, V3, V4]), ["x86-64-v2-intel", "x86-64-v3-intel", "x86-64-v4-intel"]);
        assert_eq!(names(AMD, &[V2]), [""; 0]);
        assert_eq!(names(AMD, &[V2, V3]), ["x86-64-v3-amd"]);
        assert_eq!(names(AMD, &[V2, V3, V4]), ["x86-64-v3-amd", "x86-64-v4-amd"]);
        // A level has all of the ones below it.
        assert_eq!(names(INTEL, &[V3, V4]), [""; 0]);
        assert_eq!(names(INTEL, &[V2, V4]), ["x86-64-v2-intel"]);
        assert_eq!(names(INTEL, &[V2, &V3.replace(" movbe", "")]), ["x86-64-v2-intel"], "each of it counts");
        assert_eq!(names("HygonGenuine", &[V2, V3]), [""; 0]);
        assert!(candidates("").is_empty());
    }

    #[test]
    fn qemu_has_the_last_word() {
        let intel: Vec<&Portable> = PORTABLE.iter().filter(|portable| portable.vendor == INTEL).collect();
        let models = json!([
            { "name": "Nehalem-IBRS", "unavailable-features": [] },
            { "name": "Haswell-noTSX-IBRS", "unavailable-features": ["invpcid"] },
            { "name": "Skylake-Server-noTSX-IBRS" },
        ]);
        assert_eq!(usable(&intel, &models), ["x86-64-v2-intel"]);
        assert_eq!(usable(&intel, &json!({})), [""; 0]);
    }

    /// This QEMU has the models, and each has what its level is named for.
    #[tokio::test]
    async fn the_models_are_there() {
        let qemu = crate::find_qemu().await.unwrap().path;
        let models = models(&qemu, "tcg").await.unwrap();
        for portable in &PORTABLE {
            let model = models.as_array().unwrap().iter().find(|model| model["name"] == portable.model);
            let model = model.unwrap_or_else(|| panic!("{} is not there", portable.model));
            assert!(model["unavailable-features"].is_array(), "{model}");
            let which = json!({ "type": "full", "model": { "name": portable.model } });
            let full = ask(&qemu, ["q35", "tcg"], "query-cpu-model-expansion", which).await.unwrap();
            for flag in LEVELS[..portable.levels].concat() {
                let name = if flag == "pni" { "sse3".into() } else { flag.replace("sse4_", "sse4.").replace('_', "-") };
                assert_eq!(full["model"]["props"][&name], true, "{} has {name}", portable.model);
            }
            assert_eq!(full["model"]["props"]["vendor"], portable.vendor);
        }
        // Emulation has no AVX-512, and says so.
        let all: Vec<&Portable> = PORTABLE.iter().collect();
        assert!(!usable(&all, &models).iter().any(|name| name.contains("v4")), "{models}");
        let error = super::models(&qemu, "no-such-accelerator").await.unwrap_err();
        assert!(error.contains("no-such-accelerator"), "{error}");
    }

    #[test]
    fn names_lead_back() {
        for portable in &PORTABLE {
            assert_eq!(Processor::portable(portable.name), Some(Processor::Portable(portable)));
        }
        assert_eq!(Processor::portable("max"), None);
        assert_eq!(Processor::portable("x86-64-v3-amd").unwrap().option(), "EPYC-IBPB,enforce");
        assert_eq!(Processor::Host.option(), "host");
    }
}

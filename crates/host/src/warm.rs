//! A new instance goes on with the machine that its maker shipped with the version, in place of a first boot.
//!
//! The machine is made to look as if it had been suspended here, so from there on it is one of those. Memory and disks are
//! images of the version, read as the guest touches them, and shared with all others of the version by the host's cache; a
//! layer over the memory, empty at first, gives the file with the rest its name as everywhere.

use std::collections::BTreeMap;
use std::path::Path;

use collective_model::run::{Platform, RunImage};
use collective_model::{CheckpointMachine, Digest, Manifest, Spec, State, Timestamp, Warm, WarmFile, WarmImage};
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use serde_json::{Value, json};

use crate::files::{create_folder, replace, write_json};
use crate::instance::Instance;
use crate::record::{MachineRecord, SuspendedRecord, state_path};

/// Files that come with a version are far below it, in bytes.
const MAX_FILE: u64 = 1 << 30;

/// Why a version's machine does not go on.
enum Booted {
    /// It has none.
    None,
    /// It has, but not for this.
    Because(String),
}

impl Instance {
    /// Starts an instance that never ran.
    pub(crate) async fn start_first(&mut self) {
        let why = match self.begin_warm().await {
            Ok(()) => match self.go_on().await {
                Ok(_) => return,
                // It runs, or somebody wanted something else before it did.
                Err(_) if self.record.state.is_live() || self.is_unwanted() => return,
                Err(why) => why,
            },
            Err(Booted::None) => return self.start(true).await,
            Err(Booted::Because(why)) => why,
        };
        self.event(
            "booted",
            format!("it is booted, and does not go on with the machine that came with its version: {why}"),
        );
        self.record.suspended = None;
        self.record.disks.clear();
        self.record.last_error = None;
        self.set_state(State::Stopped);
        self.start(true).await;
    }

    /// Makes it what the version's machine is.
    async fn begin_warm(&mut self) -> Result<(), Booted> {
        let version = self.record.version;
        let manifest = self.manifest(&version).await.map_err(Booted::Because)?;
        let warm = manifest.warm.as_ref().ok_or(Booted::None)?;
        suits(warm, &manifest, &self.record.spec, self.context.config.platform.as_ref()).map_err(Booted::Because)?;
        let layer = self.record.layer_for_memory();
        self.bring_files(warm, &manifest, version, layer).await.map_err(Booted::Because)?;
        let image = |warm: &WarmImage| RunImage {
            root: warm.image,
            appliance: manifest.appliance.clone(),
            version,
            boot: warm.boot,
        };
        let record = &mut self.record;
        record.adopt_version(&manifest, version);
        record.disks.iter_mut().zip(&warm.disks).for_each(|(disk, warm)| disk.image = Some(image(warm)));
        let machine = MachineRecord {
            image: Some(image(&warm.memory)),
            memory: vec![layer],
            digest: warm.state.digest,
            epoch: warm.epoch.clone(),
            memory_mib: manifest.hardware.memory.0 >> 20,
            cpus: manifest.hardware.cpus,
            info: CheckpointMachine {
                bytes: warm.state.size,
                pause_us: None,
                platform: warm.platform.clone(),
                screen: false,
            },
        };
        record.suspended = Some(SuspendedRecord { machine, disks: record.disks.clone() });
        self.set_state(State::Suspended);
        self.event("warm", format!("it goes on with the machine that came with version {}", manifest.version));
        Ok(())
    }

    /// Says of what the suspended machine is made, to whoever makes a version of it on this host.
    pub(crate) async fn describe_machine(&mut self) -> Result<Value, String> {
        let suspended = self.record.suspended.as_ref().filter(|_| self.record.state == State::Suspended);
        let platform = suspended.ok_or("it is not suspended")?.machine.info.platform.clone();
        self.clear_leftovers().await;
        let manifest = self.manifest(&self.record.version.clone()).await?;
        let config = self.run_config(&manifest, Timestamp::now(), false);
        let mut config = config.map_err(|e| format!("cannot describe it: {e}"))?;
        self.resume_config(&mut config)?;
        self.learn_what_is_read_first().await;
        write_json(&self.run_dir.join("run.json"), &config).map_err(|e| format!("cannot write run.json: {e}"))?;
        Ok(json!({ "run": self.run_dir, "platform": platform }))
    }

    /// The devices, and what UEFI knows.
    async fn bring_files(&self, warm: &Warm, manifest: &Manifest, version: Digest, layer: u64) -> Result<(), String> {
        let frames = self.context.frames(&[]).await;
        frames.add_version(&manifest.appliance, &version).await;
        create_folder(&self.run_dir.join("v"), 0o700).map_err(|e| format!("cannot prepare it: {e}"))?;
        let vars = warm.uefi_vars.as_ref().map(|vars| (vars, self.uefi_vars_path()));
        for (file, path) in [(&warm.state, state_path(&self.folder, layer))].into_iter().chain(vars) {
            bring_file(&frames, file, &path).await.map_err(|e| format!("{} is not to be had: {e}", path.display()))?;
        }
        Ok(())
    }
}

/// Whether the machine that came with a version is what is wanted here; the error says why not.
fn suits(warm: &Warm, manifest: &Manifest, spec: &Spec, here: Option<&Platform>) -> Result<(), String> {
    let settings: BTreeMap<_, _> = manifest.settings_with(&spec.settings)?;
    warm.goes_on(here, &settings)?;
    let hardware = &manifest.hardware;
    let other_size = spec.cpus.is_some_and(|cpus| cpus != hardware.cpus)
        || spec.memory.is_some_and(|memory| memory != hardware.memory)
        || !spec.disk_sizes.is_empty();
    if other_size { Err("another size of memory, disks or processors is wanted".into()) } else { Ok(()) }
}

/// Writes a file that came with a version, if it is that; durable when it returns.
async fn bring_file(frames: &FrameStore, file: &WarmFile, path: &Path) -> Result<(), String> {
    let map = ImageMap::load(frames, file.image).await.map_err(|e| e.to_string())?;
    if file.size > map.size || map.size > MAX_FILE {
        return Err("it has another size than the version says".into());
    }
    let mut content = vec![0; file.size as usize];
    let put = |at: u64, part: &[u8]| {
        content[at as usize..][..part.len()].copy_from_slice(part);
        Ok(())
    };
    map.read_into(frames, file.size, put).await.map_err(|e| e.to_string())?;
    if content.len() as u64 != file.size || Digest::of(&content) != file.digest {
        return Err("it is not what the version says".into());
    }
    replace(path, &content).map_err(|e| e.to_string())
}

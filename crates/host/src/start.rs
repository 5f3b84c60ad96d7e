//! From a record to a runner: everything that has to be in its place before a machine is started.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use collective_keys::{OwnerKey, SshKey};
use collective_model::run::{PROTOCOL, RunConfig, RunDisk};
use collective_model::{Digest, Firmware, Manifest, State, Timestamp};
use tokio::time::Instant;

use crate::context::lock;
use crate::files::{create_folder, read_json, write_json};
use crate::instance::Instance;
use crate::record::layer_path;
use crate::{link, seed};

/// The first of the user ids for QEMU; nothing else on a machine uses these.
const FIRST_USER: u32 = 1_600_000_000;
/// Where Debian and Ubuntu keep the template of UEFI variables.
const OVMF_VARS: [&str; 2] = ["/usr/share/OVMF/OVMF_VARS_4M.fd", "/usr/share/OVMF/OVMF_VARS.fd"];

impl Instance {
    pub(crate) async fn try_start(&mut self, open_ports: bool) -> Result<(), String> {
        let ordered = Timestamp::now();
        self.clear_leftovers().await;
        self.make_room().await;
        let version = self.record.version;
        let manifest = self.manifest(&version).await?;
        if self.record.disks.is_empty() {
            self.record.adopt_version(&manifest, version);
        }
        self.record.version_name = Some(manifest.version.clone());
        let memory = self.record.spec.memory.unwrap_or(manifest.hardware.memory);
        check_memory(memory.0)?;
        let key_for_rest = self.arrival_key().await?;
        self.clear_arrived();
        let resume = self.record.state == State::Resuming;
        if resume {
            self.record.prepare_resume();
        } else {
            // From here on it is more than the store has.
            self.record.stored = None;
            self.record.forget_memory();
            self.record.forget_warm(&manifest);
            let (folder, arriving) = (self.folder.clone(), self.record.arriving.clone());
            self.record.prepare_start(&|layer| {
                let path = layer_path(&folder, layer);
                let arrives = arriving.iter().flat_map(|arriving| &arriving.layers).any(|disk| disk.layer == path);
                // A clone has the same files: hard links.
                arrives || std::fs::metadata(path).is_ok_and(|found| found.nlink() > 1)
            });
        }
        self.drop_unheld_layers().map_err(|e| format!("cannot tidy its layers: {e}"))?;
        self.save().map_err(|e| format!("cannot keep its record: {e}"))?;
        self.note_images();
        let mut config =
            self.run_config(&manifest, ordered, open_ports).map_err(|e| format!("cannot prepare it: {e}"))?;
        if resume {
            self.resume_config(&mut config)?;
        }
        self.hand_out(&config, &manifest, key_for_rest).await
    }

    /// Starts the runner with all that it needs.
    pub(crate) async fn hand_out(
        &mut self,
        config: &RunConfig,
        manifest: &Manifest,
        key_for_rest: Option<OwnerKey>,
    ) -> Result<(), String> {
        let key = self.ssh_host_key().map_err(|e| format!("cannot make its SSH host key: {e}"))?;
        seed::write(&config.seed, &self.record.spec, manifest, &key)
            .map_err(|e| format!("cannot write its seed disk: {e}"))?;
        if let Some((uid, gid)) = config.user {
            let give = |path: &Path| std::os::unix::fs::chown(path, Some(uid), Some(gid));
            let given = give(&config.seed).and_then(|()| config.uefi_vars.as_deref().map_or(Ok(()), give));
            given.map_err(|e| format!("cannot give its files to its user: {e}"))?;
        }
        write_json(&self.run_dir.join("run.json"), config).map_err(|e| format!("cannot write run.json: {e}"))?;
        let _ = std::fs::remove_file(self.run_dir.join("end.json"));
        let pid = link::spawn(&self.context.config.runner, &self.run_dir, key_for_rest)
            .await
            .map_err(|e| format!("cannot start its runner: {e}"))?;
        self.record.runner_pid = Some(pid);
        self.record.qemu_pid = None;
        self.record.last_error = None;
        self.started = Instant::now();
        self.save().map_err(|e| format!("cannot keep its record: {e}"))
    }

    /// Exactly one machine may write to the disks: whatever is left of the last run is ended first, and whatever merges
    /// layers that a machine is about to open.
    pub(crate) async fn clear_leftovers(&mut self) {
        if let Some(pid) = self.record.runner_pid.take() {
            link::kill(pid, &self.run_dir.to_string_lossy()).await;
        }
        self.end_machine().await;
        link::clear_mount(&self.run_dir.join("v/d")).await;
        self.end_merge();
    }

    /// Writes `run.json` for a process that only reads the disks of this machine, which is off.
    pub(crate) async fn describe_disks(&mut self) -> Result<(), String> {
        self.clear_leftovers().await;
        let manifest = self.manifest(&self.record.version.clone()).await?;
        let config = self.run_config(&manifest, Timestamp::now(), false);
        let config = config.map_err(|e| format!("cannot prepare its disks: {e}"))?;
        write_json(&self.run_dir.join("run.json"), &config).map_err(|e| format!("cannot write run.json: {e}"))
    }

    pub(crate) fn drop_unheld_layers(&self) -> std::io::Result<()> {
        let held = self.record.held_layers();
        for entry in std::fs::read_dir(self.folder.join("layers"))? {
            let path = entry?.path();
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
            if number.is_some_and(|number| !held.contains(&number)) {
                std::fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    pub(crate) fn run_config(
        &self,
        manifest: &Manifest,
        ordered: Timestamp,
        open_ports: bool,
    ) -> std::io::Result<RunConfig> {
        let spec = &self.record.spec;
        let user = rustix::process::geteuid().is_root().then(|| FIRST_USER + self.record.user_index);
        let guarded = self.run_dir.join("v");
        create_folder(&guarded, 0o700)?;
        let uefi_vars = match manifest.hardware.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(self.uefi_vars()?),
        };
        let disks = self.record.disks.iter().map(|disk| RunDisk {
            name: disk.name.clone(),
            size: disk.size,
            image: disk.image.clone(),
            layers: disk.layers.iter().map(|layer| layer_path(&self.folder, *layer)).collect(),
            create_top: disk.layers.last().is_some_and(|top| self.record.fresh.contains(top)),
        });
        Ok(RunConfig {
            protocol: PROTOCOL,
            instance: spec.id.clone(),
            name: spec.name.clone(),
            ordered,
            cpus: spec.cpus.unwrap_or(manifest.hardware.cpus),
            memory_mib: spec.memory.unwrap_or(manifest.hardware.memory).0 >> 20,
            firmware: manifest.hardware.firmware,
            uefi_vars,
            display: manifest.hardware.display,
            disks: disks.collect(),
            seed: guarded.join("seed.img"),
            ports: spec.ports.clone(),
            open_ports,
            health: manifest.health.clone(),
            outbound: spec.outbound,
            deny: self.context.config.plane.clone(),
            force_tcg: self.context.config.force_tcg,
            processor: self.context.config.processor_for(manifest),
            user: user.map(|user| (user, user)),
            cache: self.context.config.data.join("cache"),
            credentials: self.context.config.credentials.clone(),
            resume: None,
            arriving: self.record.arriving.clone(),
            rehearsal: false,
            receiving: None,
            orphan: None,
        })
    }

    /// The instance's own SSH host key, made at the first start.
    fn ssh_host_key(&self) -> Result<SshKey, String> {
        let path = self.folder.join("ssh_host_key.json");
        if let Some((private, public)) = read_json(&path).map_err(|e| e.to_string())? {
            return Ok(SshKey { private, public });
        }
        let key = collective_keys::new_ssh_key().map_err(|e| e.to_string())?;
        write_json(&path, &(&key.private, &key.public)).map_err(|e| e.to_string())?;
        Ok(key)
    }

    /// The public half of its SSH host key, once it has one, which never changes.
    pub(crate) fn public_host_key(&self) -> Option<String> {
        if self.host_key.get().is_none()
            && let Ok(Some((_, public))) = read_json::<(String, String)>(&self.folder.join("ssh_host_key.json"))
        {
            let _ = self.host_key.set(public.trim().to_owned());
        }
        self.host_key.get().cloned()
    }

    /// The instance's own UEFI variables, made from the distribution's template at the first start.
    fn uefi_vars(&self) -> std::io::Result<PathBuf> {
        let path = self.uefi_vars_path();
        if !path.exists() {
            let template = OVMF_VARS.iter().find(|path| Path::new(path).exists());
            let template = template
                .ok_or_else(|| std::io::Error::other("no OVMF firmware is installed; install the package ovmf"))?;
            std::fs::copy(template, &path)?;
        }
        Ok(path)
    }

    pub(crate) fn uefi_vars_path(&self) -> PathBuf {
        self.run_dir.join("v/uefi-vars.fd")
    }

    /// Bytes that a layer takes on the host's disk.
    pub(crate) fn layer_bytes(&self, layer: u64) -> u64 {
        std::fs::metadata(layer_path(&self.folder, layer)).map_or(0, |meta| meta.blocks() * 512)
    }

    pub(crate) fn note_images(&self) {
        let record = &self.record;
        let memory = record.suspended.iter().filter_map(|suspended| suspended.machine.image.clone());
        let memory = memory.chain(record.memory_image.clone());
        let images = record.disks.iter().filter_map(|disk| disk.image.clone()).chain(memory).collect();
        lock(&self.context.used_images).insert(self.record.spec.id.clone(), images);
    }

    /// Manifest of a version, for the procedures.
    pub(crate) async fn manifest(&self, version: &Digest) -> Result<Manifest, String> {
        let manifest = self.context.manifest(version).await?;
        if manifest.appliance != self.record.spec.appliance {
            return Err(format!("version {} is of {}, another appliance", version.short(), manifest.appliance));
        }
        Ok(manifest)
    }
}

/// This machine's memory in bytes.
pub(crate) fn total_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    total.trim().strip_suffix(" kB")?.parse::<u64>().ok().map(|kib| kib << 10)
}

pub(crate) fn check_memory(wanted: u64) -> Result<(), String> {
    match total_memory() {
        Some(total) if total < wanted => {
            Err(format!("it needs {} MiB of memory, and this host has {} MiB", wanted >> 20, total >> 20))
        }
        _ => Ok(()),
    }
}

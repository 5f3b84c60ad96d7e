//! A copy of a suspended machine goes on for a moment, to learn what it reads first.
//!
//! The same is then put first in the store, and fetched first by another host, so that the machine runs there long before it
//! has arrived. Nobody can tell from outside which pages a guest will read: those that it has written are known, and most of
//! what it reads first it only reads. The copy has the disks under layers that are thrown away, no network, no published
//! ports, and nobody but the health check speaks to it; so nothing that it does is seen anywhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use collective_model::Timestamp;
use collective_model::run::{RunConfig, TOUCHED};
use tokio::time::timeout;

use crate::files::{create_folder, write_json};
use crate::instance::Instance;
use crate::link;

/// A runner that has not learnt it by then is ended.
const LIMIT: Duration = Duration::from_secs(15);
/// With less new memory than this, in bytes, what was learnt before is good enough.
const WORTH_IT: u64 = 32 << 20;

impl Instance {
    /// What the suspended machine reads first, in a file; none if that is not known. It only saves time later.
    pub(crate) async fn learn_what_is_read_first(&self) -> Option<PathBuf> {
        let suspended = self.record.suspended.as_ref()?;
        let known = self.run_dir.join(TOUCHED);
        if known.exists() && suspended.machine.info.bytes < WORTH_IT {
            return Some(known);
        }
        let folder = self.run_dir.join("rehearsal");
        let learnt = self.rehearse(&folder).await.and_then(|()| {
            let end = link::end(&folder).map_or_else(|| "its runner says nothing".into(), |end| end.message);
            std::fs::rename(folder.join(TOUCHED), &known).map_err(|e| format!("{end} ({e})"))
        });
        if let Err(why) = learnt {
            tracing::warn!(why, instance = %self.record.spec.name, "what the machine reads first could not be learnt");
        }
        clear(&folder).await;
        known.exists().then_some(known)
    }

    async fn rehearse(&self, folder: &Path) -> Result<(), String> {
        let failed = |what: &'static str| move |e: std::io::Error| format!("cannot {what}: {e}");
        clear(folder).await;
        create_folder(folder, 0o711).map_err(failed("make its folder"))?;
        let config = self.rehearsal_config(folder).await?;
        write_json(&folder.join("run.json"), &config).map_err(failed("write run.json"))?;
        let mut runner =
            link::spawn_rehearsal(&self.context.config.runner, folder).map_err(failed("start its runner"))?;
        // Waiting would close it, and the runner end.
        let _held = runner.stdin.take();
        match timeout(LIMIT, runner.wait()).await {
            Ok(ended) => ended.map(drop).map_err(failed("wait for its end")),
            Err(_) => runner.kill().await.map_err(failed("end it")),
        }
    }

    async fn rehearsal_config(&self, folder: &Path) -> Result<RunConfig, String> {
        let failed = |e: std::io::Error| format!("cannot prepare it: {e}");
        let manifest = self.manifest(&self.record.version).await?;
        let mut config = self.run_config(&manifest, Timestamp::now(), false).map_err(failed)?;
        self.resume_config(&mut config)?;
        let disks = self.record.suspended.iter().flat_map(|suspended| &suspended.disks);
        for (disk, record) in config.disks.iter_mut().zip(disks) {
            disk.layers = record.layers.iter().map(|layer| crate::record::layer_path(&self.folder, *layer)).collect();
            disk.layers.push(folder.join(disk.name.as_str()));
            disk.create_top = true;
        }
        // QEMU writes to these, so it has files of its own.
        let guarded = folder.join("v");
        create_folder(&guarded, 0o700).map_err(failed)?;
        for path in std::iter::once(&mut config.seed).chain(&mut config.uefi_vars) {
            let own = guarded.join(path.file_name().unwrap_or_default());
            std::fs::copy(&*path, &own).map_err(failed)?;
            if let Some((user, group)) = config.user {
                std::os::unix::fs::chown(&own, Some(user), Some(group)).map_err(failed)?;
            }
            *path = own;
        }
        (config.ports, config.outbound, config.rehearsal) = (Vec::new(), false, true);
        Ok(config)
    }
}

async fn clear(folder: &Path) {
    link::clear_mount(&folder.join("v/d")).await;
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "what a rehearsal left cannot be removed");
    }
}

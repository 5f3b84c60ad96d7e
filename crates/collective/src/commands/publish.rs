//! `collective publish`: cut, compare with what is published, upload what is new, sign.
//!
//! Interrupted at any instant, it is simply repeated: packs are made the same way again, those that arrived are not
//! sent again, and the version becomes visible with its manifest, which comes last.

mod known;
mod warm;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use collective_api::{ApplianceView, ChannelHead, Client, PublishVersion, VersionDetail, VersionView};
use collective_keys::{ChannelPointer, Kind, Signed, SigningKey};
use collective_maker::{PreparedDisk, open_disks, read_recipe};
use collective_model::{
    ApplianceName, ByteSize, Digest, Disk, Hardware, MANIFEST_FORMAT, Manifest, Name, Recipe, Span, Timestamp,
    VersionName, Warm,
};
use collective_store::pack::Pack;
use collective_store::publish::{KnownBlocks, PackHashes, PackSink, Publisher, Summary};
use collective_store::trace::Trace;
use indicatif::ProgressBar;
use tokio::runtime::Handle;

use super::launch::key_value;
use super::own_plane::{Boot, OwnPlane};
use crate::connect::config_dir;
use crate::ui::Ui;
use known::{Bases, hashes_path, known_blocks, remember};
pub(super) use warm::Warmed;

/// What `collective trace` writes into the folder of a version.
pub(super) const BOOT_FILE: &str = "boot.json";

/// Publish a version of an appliance
///
/// DIR has an appliance.toml and the disk files it names, as `collective build` makes them. Only blocks that no
/// earlier version has are sent. With a boot.json, from `collective trace`, what the machine reads while it boots is stored
/// first. The version is signed with the publisher's key, which is created on first use.
///
/// Example: collective publish appliances/notes/build/1
#[derive(Debug, clap::Args)]
pub struct Publish {
    /// The folder with appliance.toml and the disk files
    pub(super) dir: PathBuf,
    /// The channel that moves to this version
    #[arg(long, default_value = "stable")]
    pub(super) channel: Name,
    /// The version's name, in place of the one in appliance.toml
    #[arg(long = "as", value_name = "VERSION")]
    pub(super) version: Option<VersionName>,
    /// Compress harder: some 12 % fewer bytes of a first version, for some 27 times the CPU
    #[arg(long)]
    pub(super) small: bool,
    /// Boot it once, and ship the running machine with the version: hosts go on with it in place of booting
    #[arg(long)]
    warm: bool,
    /// With --warm: a setting to boot with; who launches with another one has it booted
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value, requires = "warm")]
    set: Vec<(String, String)>,
    /// With --warm: how long it may take to become healthy
    #[arg(long, default_value = "15m", requires = "warm")]
    limit: Span,
}

/// What became of a publish.
pub(super) struct Published {
    pub appliance: ApplianceName,
    view: VersionView,
    summary: Summary,
    sent: u64,
}

impl Publish {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let published = match self.warm {
            true => self.carry_out_warm(ui, client).await?,
            false => self.carry_out(ui, client, None).await?,
        };
        show(ui, &self.channel, &published);
        Ok(())
    }

    /// A publish of the folder into a plane of its own.
    pub(super) fn for_a_boot(dir: &Path) -> Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            channel: "stable".parse()?,
            version: Some("boot".parse()?),
            small: false,
            warm: false,
            set: Vec::new(),
            limit: Span(Duration::ZERO),
        })
    }

    /// Boots it first. What is published with its machine already is not booted again: that would give another machine.
    async fn carry_out_warm(&self, ui: &Ui, client: &Client) -> Result<Published> {
        let recipe = read_recipe(&self.dir)?;
        let (appliance, version) = (recipe.appliance(), self.version_of(&recipe)?);
        let known = find(client, &appliance).await?;
        if let Some(known) = known.iter().flat_map(|view| &view.versions).find(|known| known.version == version) {
            let detail: VersionDetail = client.get(&format!("/v1/versions/{}", known.digest)).await?;
            if Manifest::parse(detail.manifest.payload.as_bytes())?.warm.is_none() {
                bail!(
                    "version {version} is published without a running machine, and never changes; choose another with --as"
                );
            }
            ui.hint(format!("version {version} is published; its running machine stays as it is"));
            return self.carry_out(ui, client, None).await;
        }
        warm::check(&recipe, &self.set)?;
        let boot = Boot { dir: &self.dir, settings: &self.set, limit: self.limit };
        let publish = async |plane: &OwnPlane| {
            let warmed = warm::make(ui, plane, &recipe, &boot).await?;
            self.carry_out(ui, client, Some(warmed)).await
        };
        OwnPlane::with(&boot, ui, publish).await
    }

    fn version_of(&self, recipe: &Recipe) -> Result<VersionName> {
        let version = self.version.clone().or_else(|| recipe.version.clone());
        version.ok_or_else(|| {
            anyhow!("{} names no version: add `version = \"1\"` or use --as", self.dir.join("appliance.toml").display())
        })
    }

    pub(super) async fn carry_out(&self, ui: &Ui, client: &Client, warmed: Option<Warmed>) -> Result<Published> {
        let recipe = read_recipe(&self.dir)?;
        let version = self.version_of(&recipe)?;
        let appliance = recipe.appliance();
        let disks = open_disks(&self.dir, &recipe)?;
        let boot = boot_traces(&self.dir)?;
        for (disk, note) in
            disks.iter().flat_map(|d| d.content.iter().flat_map(move |c| c.notes.iter().map(move |n| (d, n))))
        {
            ui.hint(format!("disk \"{}\": {note}", disk.disk.name));
        }
        // Before anything is compared: what is there now stays until this has ended.
        let lease = Lease::hold(client, &appliance).await?;
        let (key, created) = SigningKey::load_or_create(&key_path(&recipe.publisher))?;
        if created {
            let path = key_path(&recipe.publisher);
            ui.hint(format!("made a key for publisher \"{}\": {} (keep a copy)", recipe.publisher, path.display()));
        }
        let published = find(client, &appliance).await?;
        // A publish that is repeated is compared with itself, so that it gives the same manifest, whoever published since.
        let same = |view: &&VersionView| view.version == version;
        let base = published.as_ref().and_then(|view| view.versions.iter().find(same).or(view.versions.first()));
        let (known, bases) = match base {
            Some(base) => known_blocks(ui, client, &appliance, base.digest).await?,
            None => Default::default(),
        };
        let uploads = Uploads::new(client, &appliance)?;
        let bar = ui.bytes("reading", disks.iter().map(|disk| disk.size).sum());
        let what = What { disks, boot, warmed, small: self.small };
        let (images, warm, packs, summary) = cut(known, bases, what, uploads.clone(), bar).await?;
        let manifest = Manifest { warm, ..manifest(&recipe, &version, images) };
        manifest.check()?;
        let signed = self.sign(client, manifest, &key, published.as_ref()).await?;
        let digest = signed.digest();
        let view: VersionView = client
            .post(&format!("/v1/appliances/{appliance}/versions"), &PublishVersion { manifest: signed, packs })
            .await?;
        lease.end().await;
        self.move_channel(client, &appliance, digest, &key).await?;
        Ok(Published { appliance, view, summary, sent: uploads.sent.load(Ordering::Relaxed) })
    }

    /// The signed manifest; the very same one where this content is published under this name already.
    async fn sign(
        &self,
        client: &Client,
        manifest: Manifest,
        key: &SigningKey,
        published: Option<&ApplianceView>,
    ) -> Result<Signed> {
        let same = published.and_then(|view| view.versions.iter().find(|known| known.version == manifest.version));
        if let Some(same) = same {
            let detail: VersionDetail = client.get(&format!("/v1/versions/{}", same.digest)).await?;
            let old = Manifest::parse(detail.manifest.payload.as_bytes())?;
            // A machine that was shipped with it is another one at each boot.
            let same = Manifest { created: old.created, warm: old.warm.clone(), ..manifest.clone() };
            if old == same && detail.manifest.key == key.public() {
                return Ok(detail.manifest);
            }
        }
        Ok(Signed::sign_json(Kind::Manifest, &manifest, key)?)
    }

    async fn move_channel(
        &self,
        client: &Client,
        appliance: &ApplianceName,
        to: Digest,
        key: &SigningKey,
    ) -> Result<()> {
        let path = format!("/v1/appliances/{appliance}/channels/{}", self.channel);
        let serial = match client.get::<ChannelHead>(&path).await {
            Ok(head) => {
                let now: ChannelPointer = head.pointer.verified_json(Kind::Channel)?;
                if now.version == to {
                    return Ok(());
                }
                now.serial + 1
            }
            Err(error) if error.status() == Some(404) => 1,
            Err(error) => return Err(error.into()),
        };
        let pointer = ChannelPointer {
            appliance: appliance.clone(),
            channel: self.channel.clone(),
            serial,
            version: to,
            created: Timestamp::now(),
        };
        let () = client.put(&path, &Signed::sign_json(Kind::Channel, &pointer, key)?).await?;
        Ok(())
    }
}

/// What `collective trace` noted, by disk.
fn boot_traces(folder: &Path) -> Result<BTreeMap<Name, Trace>> {
    let path = folder.join(BOOT_FILE);
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
            format!("{} is wrong; remove it, or make it anew with `collective trace`", path.display())
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn show(ui: &Ui, channel: &Name, published: &Published) {
    let Published { appliance, view, summary, sent } = published;
    let value = serde_json::json!({
        "appliance": appliance, "version": view.version, "digest": view.digest, "channel": channel,
        "disk_bytes": summary.disk_bytes, "used_bytes": summary.used_bytes, "new_bytes": summary.new_bytes,
        "stored_bytes": summary.stored_bytes, "index_bytes": summary.index_bytes,
        "delta_frames": summary.delta_frames, "delta_bytes": summary.delta_bytes, "sent_bytes": sent,
    });
    ui.data(&value, |ui| {
        ui.line(format!("published {appliance}:{} ({}), channel {channel}", view.version, view.digest.short()));
        ui.line(format!(
            "  {} of disks, {} in use, {} new, {} to store and {} of index; {} sent",
            ByteSize(summary.disk_bytes),
            ByteSize(summary.used_bytes),
            ByteSize(summary.new_bytes),
            ByteSize(summary.stored_bytes),
            ByteSize(summary.index_bytes),
            ByteSize(*sent)
        ));
        if summary.delta_frames > 0 {
            ui.line(format!(
                "  for hosts with the version before: {} of {} new frames are also stored as differences, {}",
                summary.delta_frames,
                summary.frames,
                ByteSize(summary.delta_bytes)
            ));
        }
    });
    let label = if channel.as_str() == "stable" { String::new() } else { format!(":{channel}") };
    ui.hint(format!("next: collective launch {appliance}{label}"));
}

pub(super) fn key_path(publisher: &Name) -> PathBuf {
    config_dir().join("keys").join(format!("{publisher}.key"))
}

async fn find(client: &Client, appliance: &ApplianceName) -> Result<Option<ApplianceView>> {
    let views: Vec<ApplianceView> = client.get(&format!("/v1/appliances?query={appliance}")).await?;
    Ok(views.into_iter().find(|view| view.appliance == *appliance))
}

fn manifest(recipe: &Recipe, version: &VersionName, disks: Vec<Disk>) -> Manifest {
    Manifest {
        format: MANIFEST_FORMAT,
        appliance: recipe.appliance(),
        version: version.clone(),
        created: Timestamp::now(),
        summary: recipe.summary.clone(),
        hardware: Hardware {
            cpus: recipe.hardware.cpus,
            memory: recipe.hardware.memory,
            firmware: recipe.hardware.firmware,
            display: recipe.hardware.display,
            cpu: recipe.hardware.cpu,
        },
        disks,
        ports: recipe.ports.clone(),
        health: recipe.health.clone(),
        settings: recipe.settings.clone(),
        cloud_init: recipe.cloud_init.clone(),
        ssh: recipe.ssh.clone(),
        warm: None,
    }
}

/// Tells the plane that a publish is under way, for as long as it is.
struct Lease {
    client: Client,
    path: String,
    renewal: tokio::task::JoinHandle<()>,
}

impl Lease {
    /// A quarter of the time after which the plane takes a publisher for dead.
    const RENEW: Duration = Duration::from_secs(30);

    async fn hold(client: &Client, appliance: &ApplianceName) -> Result<Self> {
        let id = Digest::of(&collective_keys::random_id()?).to_string();
        let path = format!("/v1/appliances/{appliance}/leases/{id}");
        let () = client.put(&path, &()).await?;
        let (renewer, renewed) = (client.another(), path.clone());
        let renewal = tokio::spawn(async move {
            loop {
                tokio::time::sleep(Self::RENEW).await;
                if let Err(error) = renewer.put::<()>(&renewed, &()).await {
                    tracing::debug!(%error, "the publisher's lease was not renewed; it is tried again");
                }
            }
        });
        Ok(Self { client: client.another(), path, renewal })
    }

    /// A lease that is not ended runs out by itself.
    async fn end(self) {
        self.renewal.abort();
        if let Err(error) = self.client.delete::<()>(&self.path).await {
            tracing::debug!(%error, "the publisher's lease was not ended");
        }
    }
}

/// Sends packs while the next ones are being made.
#[derive(Clone)]
struct Uploads {
    client: Arc<Client>,
    appliance: ApplianceName,
    runtime: Handle,
    sent: Arc<AtomicU64>,
}

impl Uploads {
    fn new(client: &Client, appliance: &ApplianceName) -> Result<Self> {
        Ok(Self {
            client: Arc::new(client.another()),
            appliance: appliance.clone(),
            runtime: Handle::current(),
            sent: Arc::default(),
        })
    }

    async fn send(&self, pack: Pack, hashes: PackHashes) -> Result<()> {
        let path = format!("/v1/appliances/{}/packs/{}", self.appliance, pack.digest);
        if self.client.get::<u64>(&path).await.is_ok_and(|size| size == pack.bytes.len() as u64) {
            return Ok(());
        }
        let size = pack.bytes.len() as u64;
        self.client.put_bytes(&path, pack.bytes.into()).await?;
        remember(&hashes_path(&pack.digest), &hashes);
        self.sent.fetch_add(size, Ordering::Relaxed);
        Ok(())
    }
}

impl PackSink for Uploads {
    fn put(&mut self, pack: Pack, hashes: PackHashes) -> io::Result<()> {
        self.runtime.block_on(self.send(pack, hashes)).map_err(|error| io::Error::other(crate::ui::chain(&error)))
    }
}

/// What becomes a version.
struct What {
    disks: Vec<PreparedDisk>,
    boot: BTreeMap<Name, Trace>,
    warmed: Option<Warmed>,
    small: bool,
}

/// Cuts all disks on a thread of its own; the packs go out as they are full.
async fn cut(
    known: KnownBlocks,
    bases: Option<Bases>,
    What { disks, boot, warmed, small }: What,
    mut uploads: Uploads,
    bar: ProgressBar,
) -> Result<(Vec<Disk>, Option<Warm>, Vec<Digest>, Summary)> {
    let work = move || -> Result<_> {
        let mut publisher = Publisher::new(known, &mut uploads);
        if small {
            publisher = publisher.small();
        }
        if let Some(bases) = &bases {
            publisher = publisher.with_bases(bases);
        }
        let mut images = Vec::new();
        let mut before = 0;
        for prepared in disks {
            let trace = boot.get(&prepared.disk.name);
            let image = match &prepared.content {
                None => None,
                Some(content) => {
                    let progress = |done: u64| bar.set_position(before + done);
                    let image =
                        publisher.add(&content.file, &content.unused, trace.unwrap_or(&Trace::default()), &progress);
                    Some(image.with_context(|| format!("cannot publish disk \"{}\"", prepared.disk.name))?)
                }
            };
            before += prepared.size;
            images.push(Disk {
                name: prepared.disk.name,
                role: prepared.disk.role,
                writes: prepared.disk.writes,
                size: ByteSize(prepared.size),
                image,
                boot: trace.filter(|_| image.is_some()).map(|trace| publisher.add_trace(trace)).transpose()?,
            });
        }
        bar.finish_and_clear();
        let mut publisher = publisher.finely();
        let warm = warmed.map(|warmed| warmed.add(&mut publisher)).transpose()?;
        let (packs, summary) = publisher.finish().context("cannot finish the upload")?;
        Ok((images, warm, packs, summary))
    };
    tokio::task::spawn_blocking(work).await?
}

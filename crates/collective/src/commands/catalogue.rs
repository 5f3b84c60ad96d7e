//! Finding and checking what is published: `search`, `show`, `channels`, `verify`, `trust`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, bail};
use collective_api::{ApplianceView, Client, KeyUpdate, PlaneStore, VersionDetail};
use collective_keys::{KeyChange, Kind, Pins, PublicKey, Signed, SigningKey};
use collective_model::{ApplianceName, ByteSize, Cpu, Digest, Manifest, Name, Reference, StoredImage};
use collective_store::cache::Cache;
use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;

use crate::ui::{Ui, table};

/// List published appliances
///
/// Example: collective search notes
#[derive(Debug, clap::Args)]
pub struct Search {
    /// Part of a name or summary
    #[arg(default_value = "")]
    query: String,
}

impl Search {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let views: Vec<ApplianceView> = client.get(&format!("/v1/appliances?query={}", escape(&self.query))).await?;
        ui.data(&views, |ui| {
            let row = |view: &ApplianceView| {
                let stable = view.channels.iter().map(|(channel, version)| format!("{channel}={version}"));
                let stable = stable.collect::<Vec<_>>().join(" ");
                vec![view.appliance.to_string(), stable, view.versions.len().to_string(), view.summary.clone()]
            };
            let rows: Vec<_> = views.iter().map(row).collect();
            table(ui, &["APPLIANCE", "CHANNELS", "VERSIONS", "SUMMARY"], &rows);
        });
        if views.is_empty() {
            ui.hint("nothing is published under that name; `collective publish DIR` publishes an appliance");
        }
        Ok(())
    }
}

/// Percent-encodes a query value (RFC 3986).
fn escape(text: &str) -> String {
    let byte = |b: u8| match b {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' | b':' | b'@' => {
            char::from(b).to_string()
        }
        _ => format!("%{b:02X}"),
    };
    text.bytes().map(byte).collect()
}

pub(super) async fn resolve(client: &Client, reference: &Reference) -> Result<(VersionDetail, Manifest)> {
    let detail: VersionDetail =
        client.get(&format!("/v1/resolve?reference={}", escape(&reference.to_string()))).await?;
    let manifest = signed_manifest(&detail)?;
    Ok((detail, manifest))
}

/// The manifest of a version that an instance has.
pub(super) async fn manifest_of(client: &Client, version: &Digest) -> Result<Manifest> {
    signed_manifest(&client.get(&format!("/v1/versions/{version}")).await?)
}

fn signed_manifest(detail: &VersionDetail) -> Result<Manifest> {
    Ok(Manifest::parse(detail.manifest.verified(Kind::Manifest)?.as_bytes())?)
}

/// The version must be signed by the key that its publisher is bound to.
pub(super) async fn trusted(client: &Client, detail: &VersionDetail, manifest: &Manifest) -> Result<()> {
    let publisher = &manifest.appliance.publisher;
    let views: Vec<ApplianceView> = client.get(&format!("/v1/appliances?query={}", manifest.appliance)).await?;
    let mut pins = Pins::default();
    if let Some(view) = views.into_iter().find(|view| view.appliance == manifest.appliance) {
        pins.trust(publisher, view.key);
    }
    pins.accept_with_changes(publisher, detail.manifest.key, &detail.key_changes)?;
    Ok(())
}

/// Show a version: hardware, disks, ports, settings
///
/// Example: collective show demo/notes
#[derive(Debug, clap::Args)]
pub struct Show {
    /// demo/notes, demo/notes:2, demo/notes:beta or demo/notes@DIGEST
    reference: Reference,
}

impl Show {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let (detail, manifest) = resolve(client, &self.reference).await?;
        let packs: u64 = detail.packs.iter().map(|pack| pack.size).sum();
        let value = serde_json::json!({
            "digest": detail.manifest.digest(), "key": detail.manifest.key, "packs_bytes": packs, "manifest": manifest,
        });
        ui.data(&value, |ui| {
            let hardware = &manifest.hardware;
            ui.line(format!("{}:{}  {}", manifest.appliance, manifest.version, manifest.summary));
            ui.line(format!("  digest    {}", detail.manifest.digest()));
            ui.line(format!("  signed by {}", detail.manifest.key));
            ui.line(format!("  published {}", manifest.created));
            let firmware = format!("{:?}", hardware.firmware).to_lowercase();
            let processor = if hardware.cpu == Cpu::Host { ", the host's own processor" } else { "" };
            let (cpus, mib) = (hardware.cpus, hardware.memory.0 >> 20);
            ui.line(format!("  machine   {cpus} cpus, {mib} MiB, {firmware}{processor}"));
            for disk in &manifest.disks {
                let role = format!("{:?}", disk.role).to_lowercase();
                ui.line(format!("  disk      {} ({role}), {}", disk.name, ByteSize(disk.size.0)));
            }
            if let Some(warm) = &manifest.warm {
                ui.line(format!("  warm      goes on in place of booting, where there is {}", warm.platform));
            }
            for port in &manifest.ports {
                ui.line(format!("  port      {} ({})", port.guest, port.name));
            }
            if let Some(health) = &manifest.health {
                let http = &health.http;
                ui.line(format!(
                    "  healthy   GET :{}{} answers {} within {}",
                    http.port, http.path, http.status, health.limit
                ));
            }
            for (key, setting) in &manifest.settings {
                let default = setting.default.as_deref().map(|value| format!(" = {value:?}")).unwrap_or_default();
                ui.line(format!("  setting   {key}{default}  {}", setting.description));
            }
            ui.line(format!("  stored in {} packs, {}", detail.packs.len(), ByteSize(packs)));
        });
        Ok(())
    }
}

/// List the channels of an appliance and the versions they point to
///
/// Example: collective channels demo/notes
#[derive(Debug, clap::Args)]
pub struct Channels {
    appliance: ApplianceName,
}

impl Channels {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let views: Vec<ApplianceView> = client.get(&format!("/v1/appliances?query={}", self.appliance)).await?;
        let Some(view) = views.into_iter().find(|view| view.appliance == self.appliance) else {
            bail!("no appliance \"{}\" is published here; `collective search` lists what is", self.appliance);
        };
        ui.data(&view.channels, |ui| {
            let rows: Vec<_> = view.channels.iter().map(|(c, v)| vec![c.to_string(), v.to_string()]).collect();
            table(ui, &["CHANNEL", "VERSION"], &rows);
        });
        Ok(())
    }
}

/// Read a whole version back from the store and check every frame against the signed manifest
///
/// Example: collective verify demo/notes
#[derive(Debug, clap::Args)]
pub struct Verify {
    reference: Reference,
}

impl Verify {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let (detail, manifest) = resolve(client, &self.reference).await?;
        trusted(client, &detail, &manifest).await?;
        let digest = detail.manifest.digest();
        let folder = tempfile::tempdir().context("cannot make a folder to read the version into")?;
        let source = PlaneStore::new(Arc::new(client.another()), &folder.path().join("versions"));
        let store = FrameStore::new(Cache::open(folder.path())?, Arc::new(source));
        store.add_version(&manifest.appliance, &digest).await;
        let mut needed = Vec::new();
        let mut pages = 0;
        for StoredImage { what, image, boot, .. } in manifest.images() {
            let map = ImageMap::load(&store, image).await.with_context(|| format!("the image of {what}"))?;
            needed.extend(map.frames());
            needed.extend_from_slice(map.pages());
            needed.extend(boot);
            pages += map.pages().len() + usize::from(boot.is_some());
        }
        needed.sort_unstable();
        needed.dedup();
        let bar = ui.bytes("verifying", detail.packs.iter().map(|pack| pack.size).sum());
        let checked = store.check(&needed, &|bytes| bar.inc(bytes)).await?;
        bar.finish_and_clear();
        let index = store.counters.index_fetched.load(Ordering::Relaxed);
        let frames = needed.len() - pages;
        let value = serde_json::json!({
            "reference": self.reference.to_string(), "digest": digest, "key": detail.manifest.key, "frames": frames,
            "pages": pages, "bytes": checked.bytes, "deltas": checked.deltas,
            "deltas_without_bases": checked.deltas_without_bases, "index_bytes": index, "sound": true,
        });
        ui.data(&value, |ui| {
            ui.line(format!(
                "{} is sound: signed by {}; {frames} frames, {pages} pages and {} differences ({}) are what they should be",
                self.reference,
                detail.manifest.key.short(),
                checked.deltas,
                ByteSize(checked.bytes)
            ));
        });
        if checked.deltas_without_bases > 0 {
            ui.hint(format!(
                "{} differences to frames that only other versions have were not looked at; hosts check them as they \
                 use them",
                checked.deltas_without_bases
            ));
        }
        Ok(())
    }
}

/// Bind a publisher to another key, because you know that it is right
///
/// This is for the plane; each host that pinned the old key needs `collective host trust` as well, unless the
/// publisher signed the change with its old key.
///
/// Example: collective trust demo 3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29
#[derive(Debug, clap::Args)]
pub struct Trust {
    publisher: Name,
    /// 64 hexadecimal digits
    key: PublicKey,
}

impl Trust {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let path = format!("/v1/publishers/{}/key", self.publisher);
        let () = client.post(&path, &KeyUpdate::Trust(self.key)).await?;
        ui.hint(format!("publisher \"{}\" is now bound to key {}", self.publisher, self.key.short()));
        Ok(())
    }
}

/// Change a publisher's key, signed by the present one, so that planes and hosts follow by themselves
///
/// The new key takes the place of the old one in the key file, and the old one stays beside it. Older versions stay
/// valid.
///
/// Example: collective rekey demo
#[derive(Debug, clap::Args)]
pub struct Rekey {
    publisher: Name,
}

impl Rekey {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let path = super::publish::key_path(&self.publisher);
        if !path.exists() {
            bail!("there is no key of publisher \"{}\" here ({})", self.publisher, path.display());
        }
        let vouch = async |old: &SigningKey, new: &SigningKey| -> Result<()> {
            let change = KeyChange { publisher: self.publisher.clone(), old: old.public(), new: new.public() };
            let signed = Signed::sign_json(Kind::KeyChange, &change, old)?;
            let url = format!("/v1/publishers/{}/key", self.publisher);
            Ok(client.post::<()>(&url, &KeyUpdate::Change(signed)).await?)
        };
        let new = SigningKey::replace(&path, vouch).await?;
        let value = serde_json::json!({ "publisher": self.publisher, "key": new.public() });
        ui.data(&value, |ui| ui.line(format!("publisher \"{}\" now signs with key {}", self.publisher, new.public())));
        ui.hint(format!("keep a copy of {}", path.display()));
        Ok(())
    }
}

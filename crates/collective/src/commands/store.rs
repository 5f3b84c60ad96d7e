//! What becomes of what was published: `withdraw`, `prune`, `store check`.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Subcommand;
use collective_api::{Client, Collected, PackView, PackWaste, PrivatePack, Repacked, StoreView, VersionUse};
use collective_model::{ApplianceName, ByteSize, Digest, Reference};
use collective_store::pack;
use futures_util::StreamExt;
use indicatif::ProgressBar;

use super::catalogue::resolve;
use super::store_private;
use crate::ui::{Ui, table};

/// Bytes of a pack read at once while checking.
const STEP: u64 = 8 << 20;
/// What is wrong with most.
const OTHER_BYTES: &str = "its bytes are not what its name says";
/// One damaged pack must not keep all others from being removed.
const UNREAD: &str = "no pack is written again, as not all can be read; `collective store check` tells more";
/// Packs looked at at once.
const PACKS: usize = 4;

/// Take a version out of the catalogue
///
/// Refused while a channel points to it or an instance needs it. Its bytes go with `collective prune`. The name of a
/// withdrawn version never gets other content.
///
/// Example: collective withdraw demo/notes:1
#[derive(Debug, clap::Args)]
pub struct Withdraw {
    /// demo/notes:1 or demo/notes@DIGEST
    reference: Reference,
}

impl Withdraw {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let (detail, manifest) = resolve(client, &self.reference).await?;
        let digest = detail.manifest.digest();
        let () = client.delete(&format!("/v1/versions/{digest}")).await?;
        let view: StoreView = client.get("/v1/store").await?;
        let freed: u64 = unreferred(&view, &manifest.appliance).map(|pack| pack.size).sum();
        let value = serde_json::json!({
            "appliance": manifest.appliance, "version": manifest.version, "digest": digest, "prunable_bytes": freed,
        });
        ui.data(&value, |ui| ui.line(format!("withdrew {}:{}", manifest.appliance, manifest.version)));
        ui.hint(format!("`collective prune` can now remove {} of {}", ByteSize(freed), manifest.appliance));
        Ok(())
    }
}

fn unreferred<'a>(view: &'a StoreView, appliance: &'a ApplianceName) -> impl Iterator<Item = &'a PackView> {
    view.packs.iter().filter(move |pack| pack.appliance == *appliance && pack.versions.is_empty())
}

/// Remove from the store what nothing needs
///
/// Shows what would go and how many bytes that is; --yes removes it. Without --keep only packs go that no version refers
/// to: what interrupted publishes left, and what was withdrawn. Packs of which less than half is used are written again
/// without the rest. Safe while others publish and fetch.
///
/// Example: collective prune --keep 3 --yes
#[derive(Debug, clap::Args)]
pub struct Prune {
    /// Withdraw all but the newest N versions of each appliance, but none that a channel or an instance needs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    keep: Option<u32>,
    /// Remove it
    #[arg(long)]
    yes: bool,
}

/// What may go.
#[derive(Debug, Default, PartialEq, Eq)]
struct Prunable {
    versions: Vec<VersionUse>,
    packs: Vec<PackView>,
}

fn prunable(view: &StoreView, keep: Option<u32>) -> Prunable {
    let mut seen: HashMap<ApplianceName, u32> = HashMap::new();
    let old = |version: &&VersionUse| {
        let newer = seen.entry(version.appliance.clone()).or_default();
        *newer += 1;
        keep.is_some_and(|keep| *newer > keep) && version.channels.is_empty() && version.instances.is_empty()
    };
    let versions: Vec<VersionUse> = view.versions.iter().filter(old).cloned().collect();
    let gone: HashSet<Digest> = versions.iter().map(|version| version.digest).collect();
    let unused = |pack: &&PackView| pack.versions.iter().all(|version| gone.contains(version));
    Prunable { packs: view.packs.iter().filter(unused).cloned().collect(), versions }
}

fn bytes_of(packs: &[PackView]) -> u64 {
    packs.iter().map(|pack| pack.size).sum()
}

impl Prune {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let view: StoreView = client.get("/v1/store").await?;
        let prunable = prunable(&view, self.keep);
        if self.yes {
            return remove(ui, client, &prunable).await;
        }
        let wasted: Vec<PackWaste> = client.get("/v1/store/repack").await.unwrap_or_else(|error| {
            ui.hint(format!("{UNREAD}: {error}"));
            Vec::new()
        });
        let repackable: u64 = wasted.iter().map(|pack| pack.size - pack.used_bytes.min(pack.size)).sum();
        let private = |pack: &&PrivatePack| pack.backups.is_empty();
        let private: Vec<&PrivatePack> = view.private.iter().filter(private).collect();
        let bytes = bytes_of(&prunable.packs) + private.iter().map(|pack| pack.size).sum::<u64>();
        let all = bytes_of(&view.packs) + view.private.iter().map(|pack| pack.size).sum::<u64>();
        let count = prunable.packs.len() + private.len();
        let value = serde_json::json!({
            "withdraw": prunable.versions, "packs": prunable.packs, "private": private, "bytes": bytes, "repack": wasted,
            "repack_bytes": repackable, "store_bytes": all,
        });
        ui.data(&value, |ui| {
            for version in &prunable.versions {
                ui.line(format!("would withdraw {}:{}", version.appliance, version.version));
            }
            ui.line(format!("would remove {count} packs, {} of {}", ByteSize(bytes), ByteSize(all)));
            if !wasted.is_empty() {
                ui.line(format!("would write {} packs again, without {}", wasted.len(), ByteSize(repackable)));
            }
        });
        if !wasted.is_empty() || count > 0 || !prunable.versions.is_empty() {
            ui.hint("nothing was changed; --yes removes it");
        } else if self.keep.is_none() {
            ui.hint("--keep N also withdraws versions older than the newest N of each appliance");
        }
        Ok(())
    }
}

async fn remove(ui: &Ui, client: &Client, prunable: &Prunable) -> Result<()> {
    let mut kept = Vec::new();
    for version in &prunable.versions {
        // An instance may have come meanwhile; then the version stays, and this says so.
        match client.delete::<()>(&format!("/v1/versions/{}", version.digest)).await {
            Err(error) if error.status() == Some(409) => kept.push(error.to_string()),
            done => done?,
        }
    }
    let (repacked, unread) = match client.post::<Repacked>("/v1/store/repack", &()).await {
        Ok(repacked) => (repacked, None),
        Err(error) => (Repacked::default(), Some(error)),
    };
    let collected: Collected = client.post("/v1/store/collect", &()).await?;
    let private: u64 = collected.private.iter().map(|pack| pack.size).sum();
    let (removed, waiting) = (bytes_of(&collected.removed) + private, bytes_of(&collected.waiting));
    let packs = collected.removed.len() + collected.private.len();
    let value = serde_json::json!({
        "withdrawn": prunable.versions.len() - kept.len(), "packs": packs, "bytes": removed,
        "waiting_bytes": waiting, "repacked": repacked.packs.len(), "bytes_written": repacked.bytes_written,
    });
    ui.data(&value, |ui| {
        ui.line(format!(
            "withdrew {} versions, removed {packs} packs, {}",
            prunable.versions.len() - kept.len(),
            ByteSize(removed)
        ));
        if !repacked.packs.is_empty() {
            let (packs, written) = (repacked.packs.len(), ByteSize(repacked.bytes_written));
            ui.line(format!("wrote what is used of {packs} packs again, {written}"));
        }
    });
    kept.iter().for_each(|why| ui.hint(why));
    if waiting > 0 {
        ui.hint(format!(
            "{} stay for a publish that is under way, or was broken off just now; the plane removes them by itself within \
             the hour",
            ByteSize(waiting)
        ));
    }
    unread.map_or(Ok(()), |error| Err(error).context(UNREAD))
}

/// Look after the store of the plane
#[derive(Debug, clap::Args)]
pub struct Store {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    Check(Check),
}

/// Read every pack and name what is damaged or missing, and whom it hits
///
/// Exits with 1 if something is damaged and was not repaired.
///
/// Example: collective store check --repair --from /backup/collective/plane/store
#[derive(Debug, clap::Args)]
struct Check {
    /// Replace what is damaged or missing by a sound copy: of another appliance, or from --from
    #[arg(long)]
    repair: bool,
    /// A folder with copies of packs: a backup of the store, or the store of another plane
    #[arg(long, value_name = "DIR", requires = "repair")]
    from: Option<PathBuf>,
}

/// A pack that is not what its name says.
struct Bad {
    pack: PackView,
    what: String,
    repaired: bool,
}

impl Store {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let StoreCommand::Check(check) = self.command;
        check.run(ui, client).await
    }
}

impl Check {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        if let Some(folder) = &self.from {
            std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        }
        let view: StoreView = client.get("/v1/store").await?;
        let total = bytes_of(&view.packs) + view.private.iter().map(|pack| pack.size).sum::<u64>();
        let bar = ui.bytes("checking", total);
        let look = |pack: &PackView| tokio::spawn(look(client.another(), pack.clone(), bar.clone()));
        let mut looks = futures_util::stream::iter(view.packs.iter().map(look)).buffered(PACKS);
        let mut bad = Vec::new();
        let mut packs = view.packs.iter();
        while let (Some(what), Some(pack)) = (looks.next().await, packs.next()) {
            bad.extend(what??.map(|what| Bad { pack: pack.clone(), what, repaired: false }));
        }
        let private = store_private::check(client, &view, self.from.as_deref(), &bar).await?;
        bar.finish_and_clear();
        let missing = |pack: &PackView| Bad { pack: pack.clone(), what: "missing".into(), repaired: false };
        bad.extend(view.missing.iter().map(missing));
        if self.repair {
            let damaged: HashSet<_> = bad.iter().map(|bad| (bad.pack.appliance.clone(), bad.pack.digest)).collect();
            let sound: Vec<&PackView> =
                view.packs.iter().filter(|pack| !damaged.contains(&(pack.appliance.clone(), pack.digest))).collect();
            for bad in &mut bad {
                bad.repaired = self.mend(client, &bad.pack, &sound).await?;
            }
        }
        report(ui, &view, &bad, &private, total);
        let left = bad.iter().filter(|bad| !bad.repaired).count();
        let left = left + private.iter().filter(|bad| !bad.repaired).count();
        if left > 0 {
            let how = match (self.repair, &self.from) {
                (false, _) => "--repair replaces those of which there is a sound copy",
                (true, None) => "of these the store has no sound copy; --from DIR takes them from a backup of it",
                (true, Some(_)) => "of these there is no sound copy there either",
            };
            bail!("{left} packs are damaged or missing; {how}");
        }
        Ok(())
    }

    /// Puts a sound copy in the place of a pack; false if there is none.
    async fn mend(&self, client: &Client, bad: &PackView, sound: &[&PackView]) -> Result<bool> {
        let mut copy = None;
        for twin in sound.iter().filter(|twin| twin.digest == bad.digest) {
            copy = copy.or(Some(client.get_range(&path(twin), 0..twin.size).await?));
        }
        if let Some(folder) = &self.from {
            copy = copy.or(find(folder, bad)?);
        }
        match copy.filter(|bytes| Digest::of(bytes) == bad.digest) {
            Some(bytes) => {
                client.put_bytes(&path(bad), bytes).await.with_context(|| format!("cannot repair {}", bad.digest))?;
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

fn path(pack: &PackView) -> String {
    format!("/v1/appliances/{}/packs/{}", pack.appliance, pack.digest)
}

/// A file named like the pack, where a store or a flat copy of one has it.
fn find(folder: &Path, pack: &PackView) -> Result<Option<Bytes>> {
    let (digest, appliance) = (pack.digest.to_string(), pack.appliance.to_string());
    for at in [folder.join("packs").join(&appliance), folder.join(&appliance), folder.to_owned()] {
        match std::fs::read(at.join(&digest)) {
            Ok(bytes) => return Ok(Some(bytes.into())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", at.join(&digest).display())),
        }
    }
    Ok(None)
}

/// What is wrong with an object that is named by the hash of its bytes.
pub(super) async fn differs(
    client: &Client,
    path: &str,
    digest: &Digest,
    size: u64,
    bar: &ProgressBar,
) -> Result<Option<String>> {
    let mut hasher = blake3::Hasher::new();
    for start in (0..size).step_by(STEP as usize) {
        let bytes = match client.get_range(path, start..(start + STEP).min(size)).await {
            Err(error) if error.is_away() => return Err(error.into()),
            Err(error) => return Ok(Some(format!("it cannot be read: {error}"))),
            Ok(bytes) => bytes,
        };
        hasher.update(&bytes);
        bar.inc(bytes.len() as u64);
    }
    Ok((Digest(*hasher.finalize().as_bytes()) != *digest).then(|| OTHER_BYTES.to_owned()))
}

/// What is wrong with a pack. Its name is the hash of all its bytes, so that one comparison covers everything in it.
async fn look(client: Client, pack: PackView, bar: ProgressBar) -> Result<Option<String>> {
    match differs(&client, &path(&pack), &pack.digest, pack.size, &bar).await? {
        Some(what) if what == OTHER_BYTES => {}
        done => return Ok(done),
    }
    let bytes = client.get_range(&path(&pack), 0..pack.size).await?;
    let Ok(directory) = pack::directory(&bytes) else { return Ok(Some("its directory is damaged".into())) };
    let damaged = directory.entries.iter().filter(|entry| pack::contents(&bytes, entry).is_err()).count();
    Ok(Some(match damaged {
        0 => "its bytes are not what its name says, but every frame in it that stands for itself is sound".into(),
        count => format!("{count} of its {} frames are damaged", directory.entries.len()),
    }))
}

fn report(ui: &Ui, view: &StoreView, bad: &[Bad], private: &[store_private::Bad], bytes: u64) {
    let hit = |pack: &PackView| -> Vec<&VersionUse> {
        view.versions.iter().filter(|version| pack.versions.contains(&version.digest)).collect()
    };
    let names = |pack: &PackView| -> Vec<String> {
        hit(pack).iter().map(|version| format!("{}:{}", version.appliance, version.version)).collect()
    };
    let instances = |pack: &PackView| -> Vec<String> {
        hit(pack).iter().flat_map(|version| version.instances.iter().map(ToString::to_string)).collect()
    };
    let found: Vec<_> = bad
        .iter()
        .map(|bad| {
            serde_json::json!({
                "appliance": bad.pack.appliance, "pack": bad.pack.digest, "what": bad.what, "repaired": bad.repaired,
                "versions": names(&bad.pack), "instances": instances(&bad.pack),
            })
        })
        .chain(private.iter().map(store_private::document))
        .collect();
    let packs = view.packs.len() + view.private.iter().filter(|pack| pack.size > 0).count();
    let value = serde_json::json!({ "packs": packs, "bytes": bytes, "damaged": found });
    ui.data(&value, |ui| {
        let count = bad.len() + private.len();
        ui.line(format!("{packs} packs, {}: {count} damaged or missing", ByteSize(bytes)));
        store_private::show(ui, private);
        if bad.is_empty() {
            return;
        }
        let row = |bad: &Bad| {
            let what = if bad.repaired { format!("{} (repaired)", bad.what) } else { bad.what.clone() };
            let hits = names(&bad.pack).join(" ");
            let hits = if hits.is_empty() { "nothing".into() } else { hits };
            vec![
                bad.pack.appliance.to_string(),
                bad.pack.digest.to_string(),
                what,
                hits,
                instances(&bad.pack).join(" "),
            ]
        };
        table(ui, &["APPLIANCE", "PACK", "WHAT", "HITS", "INSTANCES"], &bad.iter().map(row).collect::<Vec<_>>());
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prune_takes_only_what_nothing_needs() {
        let digest = |n: u8| Digest([n; 32]);
        let version = |n: u8, channels: &[&str], instances: &[&str]| VersionUse {
            appliance: "demo/notes".parse().unwrap(),
            version: n.to_string().parse().unwrap(),
            digest: digest(n),
            channels: channels.iter().map(|name| name.parse().unwrap()).collect(),
            instances: instances.iter().map(|name| name.parse().unwrap()).collect(),
            packs: Vec::new(),
        };
        let pack = |n: u8, versions: &[u8]| PackView {
            appliance: "demo/notes".parse().unwrap(),
            digest: digest(100 + n),
            size: u64::from(n),
            versions: versions.iter().copied().map(digest).collect(),
        };
        let view = StoreView {
            versions: vec![
                version(5, &[], &[]),
                version(4, &["stable"], &[]),
                version(3, &[], &[]),
                version(2, &[], &["n"]),
                version(1, &[], &[]),
            ],
            packs: vec![pack(1, &[1]), pack(2, &[1, 2]), pack(3, &[3, 1]), pack(4, &[]), pack(5, &[5])],
            ..StoreView::default()
        };
        let summary = |keep| {
            let prunable = prunable(&view, keep);
            let versions = prunable.versions.iter().map(|version| version.digest.0[0]).collect::<Vec<_>>();
            (versions, bytes_of(&prunable.packs))
        };
        assert_eq!(summary(None), (vec![], 4));
        assert_eq!(summary(Some(1)), (vec![3, 1], 1 + 3 + 4));
        assert_eq!(summary(Some(3)), (vec![1], 1 + 4));
        assert_eq!(summary(Some(9)), (vec![], 4));
    }
}

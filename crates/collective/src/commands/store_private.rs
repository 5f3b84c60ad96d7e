//! The part of `store check` that looks at packs of private data: compared with their names, which needs no key.

use std::path::Path;

use anyhow::{Context, Result};
use collective_api::{Backup, Client, PrivatePack, StoreView};
use collective_model::Digest;
use indicatif::ProgressBar;

use super::store::differs;
use crate::ui::{Ui, table};

/// A private pack that is not what its name says.
pub(super) struct Bad {
    pack: PrivatePack,
    what: String,
    pub repaired: bool,
    /// The backups that it hits, in words.
    hits: Vec<String>,
}

fn path(pack: &PrivatePack) -> String {
    format!("/v1/private/{}/packs/{}", pack.instance, pack.digest)
}

/// Reads all of them. `from` is a folder with sound copies to put in place.
pub(super) async fn check(
    client: &Client,
    view: &StoreView,
    from: Option<&Path>,
    bar: &ProgressBar,
) -> Result<Vec<Bad>> {
    let backups: Vec<Backup> = client.get("/v1/backups").await?;
    let mut bad = Vec::new();
    for pack in &view.private {
        let what = match pack.size {
            0 => Some("missing".to_owned()),
            size => differs(client, &path(pack), &pack.digest, size, bar).await?,
        };
        let Some(what) = what else { continue };
        let hit = backups.iter().filter(|backup| pack.backups.contains(&backup.id));
        let hits = hit.map(|backup| format!("{} of {}", &backup.id.as_str()[..8], backup.name)).collect();
        let repaired = mend(client, pack, from).await?;
        bad.push(Bad { pack: pack.clone(), what, repaired, hits });
    }
    Ok(bad)
}

/// Puts a sound copy in the place of a pack; false if there is none, or nothing needs it.
async fn mend(client: &Client, pack: &PrivatePack, from: Option<&Path>) -> Result<bool> {
    let Some(folder) = from.filter(|_| !pack.backups.is_empty()) else { return Ok(false) };
    let (instance, digest) = (pack.instance.as_str(), pack.digest.to_string());
    for at in [folder.join("private").join(instance), folder.join(instance), folder.to_owned()] {
        let Ok(bytes) = std::fs::read(at.join(&digest)) else { continue };
        if Digest::of(&bytes) == pack.digest {
            client.put_bytes(&path(pack), bytes.into()).await.with_context(|| format!("cannot repair {digest}"))?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// For programs.
pub(super) fn document(bad: &Bad) -> serde_json::Value {
    serde_json::json!({
        "instance": bad.pack.instance, "pack": bad.pack.digest, "what": bad.what, "repaired": bad.repaired,
        "backups": bad.pack.backups,
    })
}

/// For people.
pub(super) fn show(ui: &Ui, bad: &[Bad]) {
    let row = |bad: &Bad| {
        let what = if bad.repaired { format!("{} (repaired)", bad.what) } else { bad.what.clone() };
        let hits = if bad.hits.is_empty() { "nothing".to_owned() } else { bad.hits.join(", ") };
        vec![bad.pack.instance.to_string(), bad.pack.digest.to_string(), what, hits]
    };
    if !bad.is_empty() {
        table(ui, &["PRIVATE DATA OF", "PACK", "WHAT", "BACKUPS"], &bad.iter().map(row).collect::<Vec<_>>());
    }
}

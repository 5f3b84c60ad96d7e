//! Packs of which little is used are written again without the rest.
//!
//! What versions of the appliance use of such packs goes into new ones, bodies as they are; when these are durable, one
//! transaction puts them into the lists of packs of the versions that were looked at, in place of the old. The old packs
//! are then packs that no version refers to, and go as such (`collect.rs`): a publisher at work that knows one keeps it.
//! A host whose list names a pack that is gone asks for the list again. Interrupted at any instant, new packs that no
//! list names are left, which go the same way.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use collective_api::{PackWaste, Repacked};
use collective_model::{ApplianceName, Digest};
use collective_store::pack::{self, Directory, Entry as Body, Pack, PackBuilder, TARGET_PACK_BYTES};
use collective_store::{PackInfo, cache::Cache, fetch::FrameStore, image::ImageMap};

use crate::Plane;
use crate::catalogue::{DepotSource, needed};
use crate::database::VersionRow;
use crate::instances::manifest_of;
use crate::problem::{Answer, Failure};

/// What the versions of an appliance use.
struct Uses {
    appliance: ApplianceName,
    versions: Vec<VersionRow>,
    needed: HashSet<Digest>,
    packs: Vec<(PackInfo, Directory)>,
}

impl Uses {
    /// The entries of a pack that are used: differences only where a host may have what they differ from.
    fn keep(&self, mut directory: Directory) -> Directory {
        directory.entries.retain(|entry| self.needed.contains(&entry.digest));
        directory.deltas.retain(|delta| {
            self.needed.contains(&delta.entry.digest)
                && delta.bases.iter().all(|base| self.needed.contains(&base.frame))
        });
        directory
    }

    /// Packs of which less than half is used, apart from their directories: of these there would be one again.
    fn wasteful(&self) -> Vec<PackWaste> {
        let waste = |(info, directory): &(PackInfo, Directory)| {
            let used_bytes = bodies(&self.keep(directory.clone()));
            (used_bytes * 2 < bodies(directory)).then(|| PackWaste {
                appliance: self.appliance.clone(),
                digest: info.digest,
                size: info.size,
                used_bytes,
            })
        };
        self.packs.iter().filter_map(waste).collect()
    }
}

/// Bytes of all frames and pages in a pack, as they are stored.
fn bodies(directory: &Directory) -> u64 {
    let entries = directory.entries.iter().chain(directory.deltas.iter().map(|delta| &delta.entry));
    entries.map(|entry| u64::from(entry.stored)).sum()
}

/// New packs being filled.
struct Writer<'a> {
    plane: &'a Plane,
    uses: &'a Uses,
    plain: PackBuilder,
    deltas: PackBuilder,
    written: Vec<Digest>,
}

impl Writer<'_> {
    /// Takes over what is used of a pack. Nothing but its name vouches for its directory and for differences: one that is
    /// damaged would lose what it has.
    async fn copy(&mut self, pack: &Digest, bytes: &[u8]) -> Answer<()> {
        let unsound = |why: &dyn std::fmt::Display| damaged(&self.uses.appliance, pack, why);
        if Digest::of(bytes) != *pack {
            return Err(unsound(&"its bytes are not what its name says"));
        }
        let used = self.uses.keep(pack::directory(bytes).map_err(|error| unsound(&error))?);
        // Of a whole pack, so that all entries lie within it.
        let body = |entry: &Body| &bytes[entry.offset as usize..][..entry.stored as usize];
        for entry in &used.entries {
            self.plain.add(entry.kind, entry.digest, entry.encoding, body(entry), entry.length);
        }
        for delta in used.deltas {
            let entry = &delta.entry;
            self.deltas.add_delta(entry.kind, entry.digest, body(entry), entry.length, delta.bases);
        }
        self.put(TARGET_PACK_BYTES).await
    }

    /// Stores the packs that have reached `limit`. The depot checks every frame of them first.
    async fn put(&mut self, limit: usize) -> Answer<()> {
        let appliance = &self.uses.appliance;
        for builder in [&mut self.plain, &mut self.deltas] {
            if !builder.is_empty() && builder.len() >= limit {
                let Pack { digest, bytes, .. } = std::mem::take(builder).finish();
                self.plane.end_removal(appliance, &digest).await?;
                self.plane.depot().put_pack(appliance, digest, bytes.into()).await?;
                self.written.push(digest);
            }
        }
        Ok(())
    }
}

impl Plane {
    /// Packs of which little is used.
    pub(crate) async fn wasted(&self) -> Answer<Vec<PackWaste>> {
        let mut wasted = Vec::new();
        for uses in self.uses().await? {
            wasted.extend(uses.wasteful());
        }
        Ok(wasted)
    }

    /// Writes them again without the rest; the old ones are left to the collector.
    pub(crate) async fn repack(&self) -> Answer<Repacked> {
        // The collector must not take new packs for left over.
        let _alone = self.inner.collecting.lock().await;
        let mut repacked = Repacked::default();
        for uses in self.uses().await? {
            let wasteful = uses.wasteful();
            if wasteful.is_empty() {
                continue;
            }
            let (plain, deltas) = Default::default();
            let mut writer = Writer { plane: self, uses: &uses, plain, deltas, written: Vec::new() };
            for PackWaste { digest, size, .. } in &wasteful {
                let bytes = self.depot().read(&uses.appliance, digest, 0..*size).await?;
                writer.copy(digest, &bytes).await?;
            }
            writer.put(0).await?;
            let mut new = Vec::new();
            for digest in writer.written {
                new.push(self.depot().pack_info(&uses.appliance, &digest).await?);
            }
            let old: HashSet<Digest> = wasteful.iter().map(|waste| waste.digest).collect();
            let versions: Vec<Digest> = uses.versions.iter().map(|row| row.digest).collect();
            self.database().replace_packs(&versions, &old, &new).await?;
            repacked.bytes_written += new.iter().map(|info| info.size).sum::<u64>();
            repacked.packs.extend(wasteful);
        }
        Ok(repacked)
    }

    async fn uses(&self) -> Answer<Vec<Uses>> {
        let mut rows: HashMap<ApplianceName, Vec<VersionRow>> = HashMap::new();
        for row in self.database().versions(None).await? {
            rows.entry(row.appliance.clone()).or_default().push(row);
        }
        let mut all = Vec::new();
        for (appliance, versions) in rows {
            all.push(self.uses_of(appliance, versions).await?);
        }
        Ok(all)
    }

    async fn uses_of(&self, appliance: ApplianceName, versions: Vec<VersionRow>) -> Answer<Uses> {
        let lists = versions.iter().map(|row| (row.digest, row.packs.clone())).collect();
        let source = DepotSource { depot: self.depot().clone(), packs: lists };
        let cache = Cache::open(&self.inner.data.join("cache")).map_err(|e| Failure::internal(e.to_string()))?;
        let store = FrameStore::new(cache, Arc::new(source));
        let mut all = HashSet::new();
        for row in &versions {
            store.add_version(&appliance, &row.digest).await;
            for stored in manifest_of(row)?.images() {
                let map = ImageMap::load(&store, stored.image).await;
                let unread = |e| Failure::unavailable(format!("cannot read {appliance}:{}: {e}", row.version));
                all.extend(needed(&map.map_err(unread)?, stored.boot));
            }
        }
        let mut packs = HashMap::new();
        for info in versions.iter().flat_map(|row| &row.packs) {
            if let Entry::Vacant(place) = packs.entry(info.digest) {
                place.insert((*info, self.directory(&appliance, info).await?));
            }
        }
        let mut packs: Vec<(PackInfo, Directory)> = packs.into_values().collect();
        packs.sort_unstable_by_key(|(info, _)| info.digest);
        Ok(Uses { appliance, versions, needed: all, packs })
    }

    async fn directory(&self, appliance: &ApplianceName, info: &PackInfo) -> Answer<Directory> {
        let info = self.depot().pack_info(appliance, &info.digest).await?;
        let start = info.size - info.directory;
        let tail = self.depot().read(appliance, &info.digest, start..info.size).await?;
        pack::parse_directory(&tail, start).map_err(|error| damaged(appliance, &info.digest, &error))
    }
}

fn damaged(appliance: &ApplianceName, pack: &Digest, why: &dyn std::fmt::Display) -> Failure {
    let mend = "`collective store check --repair` repairs it from another copy";
    Failure::internal(format!("pack {pack} of {appliance} is damaged: {why}; {mend}"))
}

//! The SQL of what is kept and what may go: leases of publishers, condemned packs, withdrawn versions.
//!
//! SQLite has one writer at a time, and each step that decides is one transaction that begins as a writer. So a version
//! is never inserted while one of its packs is being removed, and no pack is removed that a version got meanwhile.

use std::collections::HashSet;

use collective_model::{ApplianceName, Digest, Timestamp, VersionName};
use collective_store::PackInfo;
use sqlx::{Row, Sqlite, SqliteConnection, Transaction};

use super::{Database, VersionRow, text};
use crate::problem::{Answer, Failure};

/// What is known of a pack that no version refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condemned {
    /// Nothing.
    No,
    /// Since then; it may be used again.
    Since(Timestamp),
    /// It is being removed and must not be used.
    Removing,
}

impl Database {
    async fn writer(&self) -> Answer<Transaction<'static, Sqlite>> {
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    /// What the plane remembers of itself.
    pub async fn fact(&self, name: &str) -> Result<Option<String>, sqlx::Error> {
        sqlx::query_scalar("SELECT value FROM facts WHERE name = ?").bind(name).fetch_optional(&self.pool).await
    }

    /// Remembers something of the plane itself.
    pub async fn set_fact(&self, name: &str, value: &str) -> Result<(), sqlx::Error> {
        let query = "INSERT INTO facts(name, value) VALUES(?1, ?2) ON CONFLICT DO UPDATE SET value = ?2";
        sqlx::query(query).bind(name).bind(value).execute(&self.pool).await.map(drop)
    }

    /// Begins or renews a publisher's lease.
    pub async fn hold_lease(&self, appliance: &ApplianceName, id: &str, until: Timestamp) -> Answer<()> {
        let query = sqlx::query(
            "INSERT INTO leases(id, publisher, appliance, begun, expires) VALUES(?, ?, ?, ?, ?)
             ON CONFLICT DO UPDATE SET expires = excluded.expires",
        );
        let query = query.bind(id).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        query.bind(Timestamp::now().0 as i64).bind(until.0 as i64).execute(&self.pool).await?;
        Ok(())
    }

    /// Ends a lease.
    pub async fn end_lease(&self, id: &str) -> Answer<()> {
        sqlx::query("DELETE FROM leases WHERE id = ?").bind(id).execute(&self.pool).await?;
        Ok(())
    }

    /// When the oldest lease of an appliance that has not ended began. Forgets those that were not renewed in time.
    pub async fn oldest_lease(&self, appliance: &ApplianceName) -> Answer<Option<Timestamp>> {
        let expired = sqlx::query("DELETE FROM leases WHERE expires < ?").bind(Timestamp::now().0 as i64);
        expired.execute(&self.pool).await?;
        let query = sqlx::query_scalar("SELECT min(begun) FROM leases WHERE publisher = ? AND appliance = ?");
        let query = query.bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        let begun: Option<i64> = query.fetch_one(&self.pool).await?;
        Ok(begun.map(|at| Timestamp(at as u64)))
    }

    /// Whether a pack is condemned.
    pub async fn condemned(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<Condemned> {
        condemned(&mut *self.pool.acquire().await?, appliance, pack).await
    }

    /// Condemns a pack, where that was not done before and no version refers to it.
    pub async fn condemn(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<Condemned> {
        let mut writer = self.writer().await?;
        if referred(&mut writer, appliance).await?.contains(pack) {
            forgive(&mut writer, appliance, pack).await?;
            writer.commit().await?;
            return Ok(Condemned::No);
        }
        let query = sqlx::query(
            "INSERT INTO condemned(publisher, appliance, pack, since) VALUES(?, ?, ?, ?) ON CONFLICT DO NOTHING",
        );
        let query = query.bind(appliance.publisher.as_str()).bind(appliance.name.as_str()).bind(pack.to_string());
        query.bind(Timestamp::now().0 as i64).execute(&mut *writer).await?;
        let now = condemned(&mut writer, appliance, pack).await?;
        writer.commit().await?;
        Ok(now)
    }

    /// A publisher is about to use a pack that is there; false if it is being removed.
    pub async fn use_pack(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<bool> {
        if self.condemned(appliance, pack).await? == Condemned::No {
            return Ok(true);
        }
        let mut writer = self.writer().await?;
        forgive(&mut writer, appliance, pack).await?;
        let now = condemned(&mut writer, appliance, pack).await?;
        writer.commit().await?;
        Ok(now == Condemned::No)
    }

    /// Decides that a condemned pack goes; false if it was forgiven, or a version refers to it after all.
    pub async fn begin_removal(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<bool> {
        let mut writer = self.writer().await?;
        if referred(&mut writer, appliance).await?.contains(pack) {
            return Ok(false);
        }
        let query = "UPDATE condemned SET removing = 1 WHERE publisher = ? AND appliance = ? AND pack = ?";
        let query = sqlx::query(query).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        let done = query.bind(pack.to_string()).execute(&mut *writer).await?.rows_affected() == 1;
        writer.commit().await?;
        Ok(done)
    }

    /// The pack is gone.
    pub async fn removed(&self, appliance: &ApplianceName, pack: &Digest) -> Answer<()> {
        let query = "DELETE FROM condemned WHERE publisher = ? AND appliance = ? AND pack = ?";
        let query = sqlx::query(query).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        query.bind(pack.to_string()).execute(&self.pool).await?;
        Ok(())
    }

    /// Makes a version visible; all it refers to must be durable.
    pub async fn insert_version(&self, row: &VersionRow) -> Answer<()> {
        let mut writer = self.writer().await?;
        for pack in &row.packs {
            if condemned(&mut writer, &row.appliance, &pack.digest).await? == Condemned::Removing {
                let pack = pack.digest;
                return Err(Failure::conflict(format!("pack {pack} is being removed just now; repeat the command")));
            }
            forgive(&mut writer, &row.appliance, &pack.digest).await?;
        }
        let query = sqlx::query(
            "INSERT INTO versions(digest, publisher, appliance, version, created, summary, manifest, packs)
             VALUES(?, ?, ?, ?, ?, ?, ?, ?)",
        );
        query
            .bind(row.digest.to_string())
            .bind(row.appliance.publisher.as_str())
            .bind(row.appliance.name.as_str())
            .bind(row.version.as_str())
            .bind(row.created.0 as i64)
            .bind(&row.summary)
            .bind(serde_json::to_string(&row.manifest)?)
            .bind(serde_json::to_string(&row.packs)?)
            .execute(&mut *writer)
            .await?;
        writer.commit().await?;
        Ok(())
    }

    /// In the lists of `versions`, puts the packs `new`, which are durable, in place of those in `old`.
    pub async fn replace_packs(&self, versions: &[Digest], old: &HashSet<Digest>, new: &[PackInfo]) -> Answer<()> {
        let mut writer = self.writer().await?;
        for version in versions {
            let query = sqlx::query("SELECT * FROM versions WHERE digest = ?").bind(version.to_string());
            // It may have been withdrawn meanwhile.
            let Some(row) = query.fetch_optional(&mut *writer).await? else { continue };
            let row = Self::version_row(&row)?;
            let mut packs: Vec<PackInfo> =
                row.packs.iter().filter(|info| !old.contains(&info.digest)).copied().collect();
            if packs.len() == row.packs.len() {
                continue;
            }
            let kept: HashSet<Digest> = packs.iter().map(|info| info.digest).collect();
            packs.extend(new.iter().filter(|info| !kept.contains(&info.digest)));
            for info in new {
                forgive(&mut writer, &row.appliance, &info.digest).await?;
            }
            let query = sqlx::query("UPDATE versions SET packs = ? WHERE digest = ?");
            query.bind(serde_json::to_string(&packs)?).bind(version.to_string()).execute(&mut *writer).await?;
        }
        writer.commit().await?;
        Ok(())
    }

    /// The digest of a version that was withdrawn under this name.
    pub async fn withdrawn(&self, appliance: &ApplianceName, version: &VersionName) -> Answer<Option<Digest>> {
        let query = "SELECT digest FROM withdrawn WHERE publisher = ? AND appliance = ? AND version = ?";
        let query = sqlx::query_scalar(query).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        query.bind(version.as_str()).fetch_optional(&self.pool).await?.map(text).transpose()
    }

    /// Forgets a version, unless something needs it. The answer names what does: channels, instances.
    pub async fn withdraw(&self, row: &VersionRow) -> Answer<Vec<String>> {
        let mut writer = self.writer().await?;
        let digest = row.digest.to_string();
        // A digest stands nowhere by chance, so a search in the documents finds every use: the version an instance has
        // or starts with, those of its checkpoints, and operations that are under way.
        let users = sqlx::query_scalar(
            "SELECT 'channel ' || channel FROM channels WHERE version = ?1
             UNION SELECT 'instance ' || name FROM instances WHERE instr(spec, ?1) OR instr(coalesce(observed, ''), ?1)
             UNION SELECT 'an update under way' FROM operations WHERE final = 0 AND instr(operation, ?1)",
        );
        let users: Vec<String> = users.bind(&digest).fetch_all(&mut *writer).await?;
        if users.is_empty() {
            let query = sqlx::query(
                "INSERT INTO withdrawn(publisher, appliance, version, digest) VALUES(?, ?, ?, ?)
                 ON CONFLICT DO UPDATE SET digest = excluded.digest",
            );
            let query = query.bind(row.appliance.publisher.as_str()).bind(row.appliance.name.as_str());
            query.bind(row.version.as_str()).bind(&digest).execute(&mut *writer).await?;
            sqlx::query("DELETE FROM versions WHERE digest = ?").bind(&digest).execute(&mut *writer).await?;
            writer.commit().await?;
        }
        Ok(users)
    }
}

/// The packs that versions of an appliance refer to.
async fn referred(connection: &mut SqliteConnection, appliance: &ApplianceName) -> Answer<HashSet<Digest>> {
    let query = sqlx::query("SELECT * FROM versions WHERE publisher = ? AND appliance = ?");
    let query = query.bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
    let mut packs = HashSet::new();
    for row in query.fetch_all(connection).await? {
        packs.extend(Database::version_row(&row)?.packs.iter().map(|pack| pack.digest));
    }
    Ok(packs)
}

async fn condemned(connection: &mut SqliteConnection, appliance: &ApplianceName, pack: &Digest) -> Answer<Condemned> {
    let query = "SELECT since, removing FROM condemned WHERE publisher = ? AND appliance = ? AND pack = ?";
    let query = sqlx::query(query).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
    Ok(match query.bind(pack.to_string()).fetch_optional(connection).await? {
        None => Condemned::No,
        Some(row) if row.get::<i64, _>(1) == 0 => Condemned::Since(Timestamp(row.get::<i64, _>(0) as u64)),
        Some(_) => Condemned::Removing,
    })
}

async fn forgive(connection: &mut SqliteConnection, appliance: &ApplianceName, pack: &Digest) -> Answer<()> {
    let query = "DELETE FROM condemned WHERE publisher = ? AND appliance = ? AND pack = ? AND removing = 0";
    let query = sqlx::query(query).bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
    query.bind(pack.to_string()).execute(connection).await?;
    Ok(())
}

//! All SQL. Records that only travel are kept as the JSON they travel in; what is searched or guarded is a column.

mod backups;
mod keeping;
mod live;

use std::path::Path;
use std::time::Duration;

use collective_api::Event;
use collective_keys::{PublicKey, Signed};
use collective_model::{
    ApplianceName, Digest, InstanceId, Name, Observed, Operation, OperationId, OperationState, Spec, Timestamp,
    VersionName,
};
use collective_store::PackInfo;
use serde::de::DeserializeOwned;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Row, SqlitePool};

use crate::problem::{Answer, Failure};

pub use keeping::Condemned;

/// The schema is created at once; later changes expand it first and contract it one release later.
const SCHEMA: &str = include_str!("schema.sql");

/// The connection pool.
pub struct Database {
    pool: SqlitePool,
}

/// A row of `publishers`.
pub struct Publisher {
    pub key: PublicKey,
    pub changes: Vec<Signed>,
}

/// A row of `versions`.
pub struct VersionRow {
    pub digest: Digest,
    pub appliance: ApplianceName,
    pub version: VersionName,
    pub created: Timestamp,
    pub summary: String,
    pub manifest: Signed,
    pub packs: Vec<PackInfo>,
}

/// A row of `channels`.
pub struct ChannelRow {
    pub channel: Name,
    pub serial: u64,
    pub version: Digest,
    pub pointer: Signed,
}

/// A row of `hosts`.
pub struct HostRow {
    pub name: Name,
    pub facts: Option<collective_api::HostFacts>,
    pub seen: Option<Timestamp>,
    pub instances: u64,
}

/// A row of `instances`.
#[derive(Clone)]
pub struct InstanceRow {
    pub spec: Spec,
    pub host: Name,
    pub follow: Option<Name>,
    pub hold_until: Option<Timestamp>,
    pub observed: Option<Observed>,
    pub failed: Vec<Digest>,
}

fn text<T: std::str::FromStr>(value: String) -> Answer<T>
where
    T::Err: std::fmt::Display,
{
    value.parse().map_err(|e| Failure::internal(format!("a record in the plane's database cannot be read: {e}")))
}

fn json<T: DeserializeOwned>(value: Option<String>) -> Answer<Option<T>> {
    Ok(value.map(|value| serde_json::from_str(&value)).transpose()?)
}

impl Database {
    pub async fn open(path: &Path) -> Result<Self, sqlx::Error> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // What was acknowledged survives a power cut.
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(20))
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await?;
        sqlx::raw_sql(SCHEMA).execute(&pool).await?;
        Ok(Self { pool })
    }

    pub async fn publisher(&self, name: &Name) -> Answer<Option<Publisher>> {
        let row = sqlx::query("SELECT key, changes FROM publishers WHERE name = ?").bind(name.as_str());
        let Some(row) = row.fetch_optional(&self.pool).await? else { return Ok(None) };
        Ok(Some(Publisher { key: text(row.get(0))?, changes: serde_json::from_str(row.get(1))? }))
    }

    /// Binds a publisher to its first key; false if somebody else was first.
    pub async fn bind_publisher(&self, name: &Name, key: &PublicKey) -> Answer<bool> {
        let query = sqlx::query("INSERT INTO publishers(name, key) VALUES(?, ?) ON CONFLICT DO NOTHING");
        Ok(query.bind(name.as_str()).bind(key.to_string()).execute(&self.pool).await?.rows_affected() == 1)
    }

    pub async fn set_publisher(&self, name: &Name, publisher: &Publisher) -> Answer<()> {
        let query = sqlx::query(
            "INSERT INTO publishers(name, key, changes) VALUES(?1, ?2, ?3)
             ON CONFLICT DO UPDATE SET key = ?2, changes = ?3",
        );
        let changes = serde_json::to_string(&publisher.changes)?;
        query.bind(name.as_str()).bind(publisher.key.to_string()).bind(changes).execute(&self.pool).await?;
        Ok(())
    }

    fn version_row(row: &sqlx::sqlite::SqliteRow) -> Answer<VersionRow> {
        let appliance = ApplianceName { publisher: text(row.get("publisher"))?, name: text(row.get("appliance"))? };
        Ok(VersionRow {
            digest: text(row.get("digest"))?,
            appliance,
            version: text(row.get("version"))?,
            created: Timestamp(row.get::<i64, _>("created") as u64),
            summary: row.get("summary"),
            manifest: serde_json::from_str(row.get("manifest"))?,
            packs: serde_json::from_str(row.get("packs"))?,
        })
    }

    pub async fn version(&self, digest: &Digest) -> Answer<Option<VersionRow>> {
        let row = sqlx::query("SELECT * FROM versions WHERE digest = ?").bind(digest.to_string());
        row.fetch_optional(&self.pool).await?.as_ref().map(Self::version_row).transpose()
    }

    pub async fn version_named(&self, appliance: &ApplianceName, name: &VersionName) -> Answer<Option<VersionRow>> {
        let query = sqlx::query("SELECT * FROM versions WHERE publisher = ? AND appliance = ? AND version = ?");
        let query = query.bind(appliance.publisher.as_str()).bind(appliance.name.as_str()).bind(name.as_str());
        query.fetch_optional(&self.pool).await?.as_ref().map(Self::version_row).transpose()
    }

    /// All versions, or those of one appliance, newest first.
    pub async fn versions(&self, appliance: Option<&ApplianceName>) -> Answer<Vec<VersionRow>> {
        let query = sqlx::query(
            "SELECT * FROM versions WHERE ?1 IS NULL OR (publisher = ?1 AND appliance = ?2)
             ORDER BY publisher, appliance, created DESC, rowid DESC",
        );
        let query = query
            .bind(appliance.map(|a| a.publisher.as_str().to_owned()))
            .bind(appliance.map(|a| a.name.as_str().to_owned()));
        query.fetch_all(&self.pool).await?.iter().map(Self::version_row).collect()
    }

    pub async fn channels(&self, appliance: &ApplianceName) -> Answer<Vec<ChannelRow>> {
        let query = sqlx::query(
            "SELECT channel, serial, version, pointer FROM channels WHERE publisher = ? AND appliance = ? ORDER BY channel",
        );
        let rows = query.bind(appliance.publisher.as_str()).bind(appliance.name.as_str());
        let row = |row: &sqlx::sqlite::SqliteRow| {
            Ok(ChannelRow {
                channel: text(row.get(0))?,
                serial: row.get::<i64, _>(1) as u64,
                version: text(row.get(2))?,
                pointer: serde_json::from_str(row.get(3))?,
            })
        };
        rows.fetch_all(&self.pool).await?.iter().map(row).collect()
    }

    /// Moves a channel; false if its serial is not higher than before.
    pub async fn set_channel(&self, appliance: &ApplianceName, row: &ChannelRow) -> Answer<bool> {
        let query = sqlx::query(
            "INSERT INTO channels(publisher, appliance, channel, serial, version, pointer)
             VALUES(?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT DO UPDATE SET serial = ?4, version = ?5, pointer = ?6 WHERE serial < ?4",
        );
        let done = query
            .bind(appliance.publisher.as_str())
            .bind(appliance.name.as_str())
            .bind(row.channel.as_str())
            .bind(row.serial as i64)
            .bind(row.version.to_string())
            .bind(serde_json::to_string(&row.pointer)?)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    pub async fn insert_token(&self, hash: &Digest, kind: &str) -> Answer<()> {
        let query = sqlx::query("INSERT INTO tokens(hash, kind, created) VALUES(?, ?, ?)");
        query.bind(hash.to_string()).bind(kind).bind(Timestamp::now().0 as i64).execute(&self.pool).await?;
        Ok(())
    }

    /// `join`, `user` or `host:NAME` for a secret's hash.
    pub async fn token_kind(&self, hash: &Digest) -> Answer<Option<String>> {
        let host = sqlx::query_scalar::<_, String>("SELECT 'host:' || name FROM hosts WHERE secret_hash = ?");
        if let Some(kind) = host.bind(hash.to_string()).fetch_optional(&self.pool).await? {
            return Ok(Some(kind));
        }
        let query = sqlx::query_scalar("SELECT kind FROM tokens WHERE hash = ?").bind(hash.to_string());
        Ok(query.fetch_optional(&self.pool).await?)
    }

    /// Uses up a join token and creates the host; false if the name is taken. Both or neither.
    pub async fn join(&self, name: &Name, secret: &Digest, token: Option<&Digest>) -> Answer<bool> {
        let mut transaction = self.pool.begin().await?;
        let query = sqlx::query("INSERT INTO hosts(name, secret_hash) VALUES(?, ?) ON CONFLICT DO NOTHING");
        let done = query.bind(name.as_str()).bind(secret.to_string()).execute(&mut *transaction).await?;
        if done.rows_affected() == 0 {
            return Ok(false);
        }
        if let Some(token) = token {
            let query = sqlx::query("DELETE FROM tokens WHERE hash = ? AND kind = 'join'");
            if query.bind(token.to_string()).execute(&mut *transaction).await?.rows_affected() == 0 {
                return Err(Failure::forbidden(
                    "this join token was used already; make another with `collective token create`",
                ));
            }
        }
        transaction.commit().await?;
        Ok(true)
    }

    pub async fn hosts(&self) -> Answer<Vec<HostRow>> {
        let query = sqlx::query(
            "SELECT name, facts, seen, (SELECT count(*) FROM instances WHERE host = hosts.name) FROM hosts ORDER BY name",
        );
        let row = |row: &sqlx::sqlite::SqliteRow| {
            Ok(HostRow {
                name: text(row.get(0))?,
                facts: json(row.get(1))?,
                seen: row.get::<Option<i64>, _>(2).map(|seen| Timestamp(seen as u64)),
                instances: row.get::<i64, _>(3) as u64,
            })
        };
        query.fetch_all(&self.pool).await?.iter().map(row).collect()
    }

    pub async fn host_seen(&self, name: &Name, facts: Option<&collective_api::HostFacts>) -> Answer<()> {
        let query = sqlx::query("UPDATE hosts SET seen = ?, facts = coalesce(?, facts) WHERE name = ?");
        let facts = facts.map(serde_json::to_string).transpose()?;
        query.bind(Timestamp::now().0 as i64).bind(facts).bind(name.as_str()).execute(&self.pool).await?;
        Ok(())
    }

    pub async fn remove_host(&self, name: &Name) -> Answer<bool> {
        let query = sqlx::query("DELETE FROM hosts WHERE name = ?").bind(name.as_str());
        Ok(query.execute(&self.pool).await?.rows_affected() == 1)
    }

    /// False if the name is taken, or the version was withdrawn just now.
    pub async fn insert_instance(&self, row: &InstanceRow) -> Answer<bool> {
        let query = sqlx::query(
            "INSERT INTO instances(id, name, host, generation, spec, follow)
             SELECT ?, ?, ?, ?, ?, ? WHERE EXISTS (SELECT 1 FROM versions WHERE digest = ?) ON CONFLICT DO NOTHING",
        );
        let done = query
            .bind(row.spec.id.as_str())
            .bind(row.spec.name.as_str())
            .bind(row.host.as_str())
            .bind(row.spec.generation.0 as i64)
            .bind(serde_json::to_string(&row.spec)?)
            .bind(row.follow.as_ref().map(|name| name.as_str().to_owned()))
            .bind(row.spec.version.to_string())
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    fn instance_row(row: &sqlx::sqlite::SqliteRow) -> Answer<InstanceRow> {
        Ok(InstanceRow {
            spec: serde_json::from_str(row.get("spec"))?,
            host: text(row.get("host"))?,
            follow: row.get::<Option<String>, _>("follow").map(text).transpose()?,
            hold_until: row.get::<Option<i64>, _>("hold_until").map(|at| Timestamp(at as u64)),
            observed: json(row.get("observed"))?,
            failed: serde_json::from_str(row.get("failed"))?,
        })
    }

    pub async fn instances(&self) -> Answer<Vec<InstanceRow>> {
        let rows = sqlx::query("SELECT * FROM instances ORDER BY name").fetch_all(&self.pool).await?;
        rows.iter().map(Self::instance_row).collect()
    }

    pub async fn instance_named(&self, name: &Name) -> Answer<Option<InstanceRow>> {
        let query = sqlx::query("SELECT * FROM instances WHERE name = ?").bind(name.as_str());
        query.fetch_optional(&self.pool).await?.as_ref().map(Self::instance_row).transpose()
    }

    pub async fn instance(&self, id: &InstanceId) -> Answer<Option<InstanceRow>> {
        let query = sqlx::query("SELECT * FROM instances WHERE id = ?").bind(id.as_str());
        query.fetch_optional(&self.pool).await?.as_ref().map(Self::instance_row).transpose()
    }

    /// What users may change; false if the new name is taken.
    pub async fn update_instance(&self, row: &InstanceRow) -> Answer<bool> {
        let query = sqlx::query(
            "UPDATE OR IGNORE instances SET name = ?, spec = ?, follow = ?, hold_until = ?, failed = ?
             WHERE id = ? AND generation = ?",
        );
        let done = query
            .bind(row.spec.name.as_str())
            .bind(serde_json::to_string(&row.spec)?)
            .bind(row.follow.as_ref().map(|name| name.as_str().to_owned()))
            .bind(row.hold_until.map(|at| at.0 as i64))
            .bind(serde_json::to_string(&row.failed)?)
            .bind(row.spec.id.as_str())
            .bind(row.spec.generation.0 as i64)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Makes `host` the owner, under the generation of `spec`, and has it bring the instance; false if the instance is not
    /// what it was in `row`, or something was ordered meanwhile.
    pub async fn change_owner(
        &self,
        row: &InstanceRow,
        host: &Name,
        spec: &collective_model::Spec,
        operation: &Operation,
    ) -> Answer<bool> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let query = sqlx::query(
            "SELECT spec FROM instances WHERE id = ?1 AND NOT EXISTS
             (SELECT 1 FROM operations WHERE instance = ?1 AND final = 0)",
        );
        let now = query.bind(spec.id.as_str()).fetch_optional(&mut *transaction).await?;
        let now: Option<collective_model::Spec> = now.map(|now| serde_json::from_str(now.get(0))).transpose()?;
        if now.as_ref() != Some(&row.spec) {
            return Ok(false);
        }
        let query = sqlx::query("UPDATE instances SET host = ?, generation = ?, spec = ? WHERE id = ?");
        let query = query.bind(host.as_str()).bind(spec.generation.0 as i64).bind(serde_json::to_string(spec)?);
        query.bind(spec.id.as_str()).execute(&mut *transaction).await?;
        Self::put_operation(operation)?.execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(true)
    }

    /// What the owner saw; refused (false) from anyone but the owner of this generation.
    pub async fn observe(&self, host: &Name, observed: &Observed) -> Answer<bool> {
        let query = sqlx::query("UPDATE instances SET observed = ? WHERE id = ? AND host = ? AND generation = ?");
        let done = query
            .bind(serde_json::to_string(observed)?)
            .bind(observed.id.as_str())
            .bind(host.as_str())
            .bind(observed.generation.0 as i64)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    pub async fn delete_instance(&self, id: &InstanceId) -> Answer<()> {
        let mut transaction = self.pool.begin().await?;
        for statement in ["DELETE FROM events WHERE instance = ?", "DELETE FROM instances WHERE id = ?"] {
            sqlx::query(statement).bind(id.as_str()).execute(&mut *transaction).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    pub async fn insert_operation(&self, operation: &Operation) -> Answer<()> {
        Self::put_operation(operation)?.execute(&self.pool).await?;
        Ok(())
    }

    fn put_operation(
        operation: &Operation,
    ) -> Answer<sqlx::query::Query<'_, sqlx::Sqlite, sqlx::sqlite::SqliteArguments>> {
        let query = sqlx::query(
            "INSERT INTO operations(id, instance, operation, state, final, created) VALUES(?, ?, ?, ?, 0, ?)",
        );
        Ok(query
            .bind(operation.id.as_str())
            .bind(operation.instance.as_str())
            .bind(serde_json::to_string(operation)?)
            .bind(serde_json::to_string(&OperationState::Pending)?)
            .bind(Timestamp::now().0 as i64))
    }

    fn operation_row(row: &sqlx::sqlite::SqliteRow) -> Answer<(Operation, OperationState)> {
        Ok((serde_json::from_str(row.get(0))?, serde_json::from_str(row.get(1))?))
    }

    pub async fn operation(&self, id: &OperationId) -> Answer<Option<(Operation, OperationState)>> {
        let query = sqlx::query("SELECT operation, state FROM operations WHERE id = ?").bind(id.as_str());
        query.fetch_optional(&self.pool).await?.as_ref().map(Self::operation_row).transpose()
    }

    /// Operations that are not finished, oldest first.
    pub async fn open_operations(&self) -> Answer<Vec<(Operation, OperationState)>> {
        let query = sqlx::query("SELECT operation, state FROM operations WHERE final = 0 ORDER BY created, rowid");
        query.fetch_all(&self.pool).await?.iter().map(Self::operation_row).collect()
    }

    /// False if it was final already.
    pub async fn set_operation(&self, id: &OperationId, state: &OperationState) -> Answer<bool> {
        let query = sqlx::query("UPDATE operations SET state = ?, final = ? WHERE id = ? AND final = 0");
        let query = query.bind(serde_json::to_string(state)?).bind(state.is_final()).bind(id.as_str());
        Ok(query.execute(&self.pool).await?.rows_affected() == 1)
    }

    pub async fn insert_event(&self, event: &Event) -> Answer<()> {
        let query = sqlx::query(
            "INSERT INTO events(instance, serial, at, what, message)
             SELECT ?1, ?2, ?3, ?4, ?5 WHERE EXISTS (SELECT 1 FROM instances WHERE id = ?1) ON CONFLICT DO NOTHING",
        );
        query
            .bind(event.instance.as_str())
            .bind(event.serial as i64)
            .bind(event.at.0 as i64)
            .bind(&event.what)
            .bind(&event.message)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Oldest first.
    pub async fn events(&self, instance: &InstanceId) -> Answer<Vec<Event>> {
        let query = sqlx::query("SELECT serial, at, what, message FROM events WHERE instance = ? ORDER BY serial");
        let row = |row: &sqlx::sqlite::SqliteRow| Event {
            instance: instance.clone(),
            serial: row.get::<i64, _>(0) as u64,
            at: Timestamp(row.get::<i64, _>(1) as u64),
            what: row.get(2),
            message: row.get(3),
        };
        Ok(query.bind(instance.as_str()).fetch_all(&self.pool).await?.iter().map(row).collect())
    }
}

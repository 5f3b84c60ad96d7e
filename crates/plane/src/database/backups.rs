//! The SQL of backups.

use std::collections::HashSet;

use collective_api::Backup;
use collective_model::{BackupId, Digest, InstanceId};
use sqlx::Row;

use super::Database;
use crate::problem::Answer;

impl Database {
    /// All backups, or those of one instance, newest first.
    pub async fn backups(&self, instance: Option<&InstanceId>) -> Answer<Vec<Backup>> {
        let query = "SELECT backup FROM backups WHERE ?1 IS NULL OR instance = ?1 ORDER BY taken DESC, rowid DESC";
        let query = sqlx::query(query).bind(instance.map(|id| id.as_str().to_owned()));
        let rows = query.fetch_all(&self.pool).await?;
        rows.iter().map(|row| Ok(serde_json::from_str(row.get(0))?)).collect()
    }

    pub async fn backup(&self, id: &BackupId) -> Answer<Option<Backup>> {
        let query = sqlx::query("SELECT backup FROM backups WHERE id = ?").bind(id.as_str());
        let row = query.fetch_optional(&self.pool).await?;
        Ok(row.map(|row| serde_json::from_str(row.get(0))).transpose()?)
    }

    /// Makes a backup visible; all it refers to must be durable. What is there already stays as it is.
    pub async fn insert_backup(&self, backup: &Backup) -> Answer<()> {
        let query = "INSERT INTO backups(id, instance, taken, backup) VALUES(?, ?, ?, ?) ON CONFLICT DO NOTHING";
        let query = sqlx::query(query).bind(backup.id.as_str()).bind(backup.instance.as_str());
        query.bind(backup.taken.0 as i64).bind(serde_json::to_string(backup)?).execute(&self.pool).await?;
        Ok(())
    }

    /// Forgets a backup; false if there is none, or something that is under way needs it.
    pub async fn delete_backup(&self, id: &BackupId) -> Answer<bool> {
        // An id stands nowhere by chance, so a search in the documents finds every use.
        let query = "DELETE FROM backups WHERE id = ?1
                     AND NOT EXISTS (SELECT 1 FROM operations WHERE final = 0 AND instr(operation, ?1))";
        Ok(sqlx::query(query).bind(id.as_str()).execute(&self.pool).await?.rows_affected() == 1)
    }

    /// The packs that backups of an instance refer to.
    pub async fn private_packs(&self, instance: &InstanceId) -> Answer<HashSet<Digest>> {
        let backups = self.backups(Some(instance)).await?;
        Ok(backups.iter().flat_map(|backup| &backup.packs).map(|pack| pack.digest).collect())
    }
}

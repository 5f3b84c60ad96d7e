//! Who has an instance that moves while it runs: two transactions, of which one wins.

use collective_model::{Generation, InstanceId, Name, OperationId, OperationKind, OperationState, Spec};
use sqlx::Row;

use super::Database;
use crate::problem::{Answer, Failure};

impl Database {
    /// Gives the instance to `host` if the order `id` to bring it there is open; what it is then, also if that was done before. None:
    /// it stays where it is.
    pub async fn take(&self, host: &Name, id: &OperationId) -> Answer<Option<Spec>> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let query = sqlx::query("SELECT operation, state FROM operations WHERE id = ?").bind(id.as_str());
        let found = query.fetch_optional(&mut *transaction).await?;
        let Some((operation, state)) = found.as_ref().map(Self::operation_row).transpose()? else { return Ok(None) };
        let OperationKind::Live { to, only_measure: false } = &operation.kind else { return Ok(None) };
        // One that has failed was ended by the first owner, or by us.
        if to != host || matches!(state, OperationState::Failed { .. }) {
            return Ok(None);
        }
        let query = sqlx::query("SELECT host, spec FROM instances WHERE id = ?").bind(operation.instance.as_str());
        let Some(row) = query.fetch_optional(&mut *transaction).await? else { return Ok(None) };
        let mut spec: Spec = serde_json::from_str(row.get(1))?;
        if row.get::<&str, _>(0) == host.as_str() {
            return Ok(Some(spec));
        }
        if state.is_final() {
            return Ok(None);
        }
        spec.generation = Generation(spec.generation.0 + 1);
        spec.arrival = None;
        let query = sqlx::query("UPDATE instances SET host = ?, generation = ?, spec = ? WHERE id = ?");
        let query = query.bind(host.as_str()).bind(spec.generation.0 as i64).bind(serde_json::to_string(&spec)?);
        query.bind(spec.id.as_str()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(Some(spec))
    }

    /// Ends the order `id` if `host` has the instance, by the same ownership as ever; otherwise says since which ownership another has it.
    pub async fn stay(
        &self,
        (host, generation): (&Name, Generation),
        id: &OperationId,
        instance: &InstanceId,
        ended: OperationState,
    ) -> Answer<Option<Generation>> {
        let mut transaction = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let query = sqlx::query("SELECT host, generation FROM instances WHERE id = ?").bind(instance.as_str());
        let row = query.fetch_optional(&mut *transaction).await?;
        let row = row.ok_or_else(|| Failure::missing("the instance is not there any more"))?;
        let now = Generation(row.get::<i64, _>(1) as u64);
        if row.get::<&str, _>(0) != host.as_str() || now != generation {
            return Ok(Some(now));
        }
        let query = sqlx::query("UPDATE operations SET state = ?, final = 1 WHERE id = ? AND final = 0");
        query.bind(serde_json::to_string(&ended)?).bind(id.as_str()).execute(&mut *transaction).await?;
        transaction.commit().await?;
        Ok(None)
    }
}

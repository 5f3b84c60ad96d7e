//! Updates that come by themselves: for every instance that follows a channel, a pure decision, on signal and timer.

use std::collections::HashMap;
use std::time::Duration;

use collective_model::{InstanceId, OperationKind, Timestamp, UpdateDecision, UpdateFacts, decide_update};

use crate::Plane;
use crate::problem::Answer;

const TIMER: Duration = Duration::from_secs(5);
/// An update that could not even begin is tried again after this time.
const TRY_AGAIN_MS: u64 = 60_000;

/// Runs for as long as the plane does.
pub(crate) async fn run(plane: Plane) {
    let mut changed = plane.inner.state.subscribe();
    let mut tried = HashMap::new();
    loop {
        let _ = tokio::time::timeout(TIMER, changed.changed()).await;
        changed.mark_unchanged();
        if let Err(error) = updates(&plane, &mut tried).await {
            tracing::warn!(?error, "deciding about updates failed; it is tried again");
        }
        // Changes come in bursts.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn updates(plane: &Plane, tried: &mut HashMap<InstanceId, Timestamp>) -> Answer<()> {
    let rows = plane.database().instances().await?;
    if rows.iter().all(|row| row.follow.is_none()) {
        return Ok(());
    }
    let open = plane.database().open_operations().await?;
    for row in rows {
        let (Some(channel), Some(observed)) = (&row.follow, &row.observed) else { continue };
        let channels = plane.database().channels(&row.spec.appliance).await?;
        let facts = UpdateFacts {
            current: observed.version,
            head: channels.iter().find(|head| head.channel == *channel).map(|head| head.version),
            hold_until: row.hold_until,
            failed: row.failed.clone(),
            state: observed.state,
            busy: open.iter().any(|(operation, _)| operation.instance == row.spec.id),
            now: Timestamp::now(),
        };
        if let UpdateDecision::Update(to) = decide_update(&facts) {
            let last = tried.get(&row.spec.id).copied().unwrap_or_default();
            if facts.now.since_ms(last) < TRY_AGAIN_MS {
                continue;
            }
            tried.insert(row.spec.id.clone(), facts.now);
            tracing::info!(instance = %row.spec.name, %to, "the channel moved; the instance is updated");
            plane.insert_operation(&row.spec.id, OperationKind::Update { to }).await?;
        }
    }
    Ok(())
}

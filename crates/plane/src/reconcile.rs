//! Updates that come by themselves: for every instance that follows a channel, a pure decision, on signal and timer.

use std::time::Duration;

use collective_model::{OperationKind, Timestamp, UpdateDecision, UpdateFacts, decide_update};

use crate::Plane;
use crate::problem::Answer;

const TIMER: Duration = Duration::from_secs(5);

/// Runs for as long as the plane does.
pub(crate) async fn run(plane: Plane) {
    let mut changed = plane.inner.state.subscribe();
    loop {
        let _ = tokio::time::timeout(TIMER, changed.changed()).await;
        changed.mark_unchanged();
        if let Err(error) = updates(&plane).await {
            tracing::warn!(?error, "deciding about updates failed; it is tried again");
        }
        // Changes come in bursts.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn updates(plane: &Plane) -> Answer<()> {
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
            tracing::info!(instance = %row.spec.name, %to, "the channel moved; the instance is updated");
            plane.insert_operation(&row.spec.id, OperationKind::Update { to }).await?;
        }
    }
    Ok(())
}

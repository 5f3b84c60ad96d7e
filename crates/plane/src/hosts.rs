//! Hosts: joining, reporting, fetching orders.

use std::time::Duration;

use collective_api::{HostOrders, HostReport, HostView, JoinAnswer, Token, TokenKind, TokenView};
use collective_model::{Digest, InstanceId, Name, Observed, Operation, OperationKind, OperationState, Timestamp};

use crate::Plane;
use crate::database::HostRow;
use crate::problem::{Answer, Failure};

/// A host that was not heard of for this long counts as unreachable. Hosts wait for orders for at most half of it.
const REACHABLE_MS: u64 = 30_000;

pub(crate) fn is_reachable(seen: Option<Timestamp>) -> bool {
    seen.is_some_and(|seen| Timestamp::now().since_ms(seen) < REACHABLE_MS)
}

fn random_secret() -> Answer<String> {
    collective_keys::random_secret().map_err(|e| Failure::internal(e.to_string()))
}

impl Plane {
    /// Makes a token.
    pub(crate) async fn create_token(&self, kind: &str) -> Answer<TokenView> {
        let kinds = [("join", TokenKind::Join), ("user", TokenKind::User)];
        let (word, kind) = kinds
            .into_iter()
            .find(|(word, _)| *word == kind)
            .ok_or_else(|| Failure::invalid(format!("\"{kind}\" is not a kind of token: use join or user")))?;
        let (address, fingerprint) = self.inner.public.clone().ok_or_else(|| {
            Failure::invalid(
                "this plane listens on this machine only; start it with `collective up --listen ADDR:PORT`",
            )
        })?;
        let secret = random_secret()?;
        self.database().insert_token(&Digest::of(secret.as_bytes()), word).await?;
        Ok(TokenView { token: Token { kind, secret, fingerprint, address }.to_string() })
    }

    /// Makes a host.
    pub(crate) async fn join(&self, name: &Name, token: Option<&Digest>) -> Answer<JoinAnswer> {
        let secret = random_secret()?;
        if !self.database().join(name, &Digest::of(secret.as_bytes()), token).await? {
            return Err(Failure::conflict(format!(
                "a host named \"{name}\" has joined already; choose another --name"
            )));
        }
        self.state_changed();
        Ok(JoinAnswer { secret })
    }

    /// Takes a host's report.
    pub(crate) async fn report(&self, host: &Name, report: HostReport) -> Answer<()> {
        self.database().host_seen(host, Some(&report.facts)).await?;
        for observed in &report.observed {
            if self.database().observe(host, observed).await? {
                self.follow_version(observed).await?;
            } else {
                tracing::warn!(%host, instance = %observed.id, "a report of an instance that this host does not own is refused");
            }
        }
        for event in &report.events {
            self.database().insert_event(event).await?;
        }
        for (id, state) in &report.operations {
            let Some((operation, _)) = self.database().operation(id).await? else { continue };
            let owner = self.database().instance(&operation.instance).await?.map(|row| row.host);
            if owner.as_ref() == Some(host) && self.database().set_operation(id, state).await? && state.is_final() {
                self.concluded(&operation, state).await?;
            }
        }
        self.state_changed();
        Ok(())
    }

    /// The host says which version an instance has; what is wanted follows once nothing is under way.
    async fn follow_version(&self, observed: &Observed) -> Answer<()> {
        let Some(mut row) = self.database().instance(&observed.id).await? else { return Ok(()) };
        if row.spec.version != observed.version {
            row.spec.version = observed.version;
            self.database().update_instance(&row).await?;
        }
        Ok(())
    }

    async fn concluded(&self, operation: &Operation, state: &OperationState) -> Answer<()> {
        match (&operation.kind, state) {
            (OperationKind::Delete { .. }, OperationState::Done { .. }) => {
                self.database().delete_instance(&operation.instance).await?;
            }
            // An update that was not begun, such as for want of space, says nothing about the version.
            (OperationKind::Update { to }, OperationState::Done { result }) => {
                self.set_failed(operation, *to, result["updated"] != true).await?;
            }
            // Whoever goes back does not want to be brought forward again by the channel.
            (OperationKind::Rollback { .. }, OperationState::Done { result }) => {
                if let Ok(from) = serde_json::from_value::<Digest>(result["from_digest"].clone()) {
                    self.set_failed(operation, from, true).await?;
                }
            }
            _ => {}
        }
        self.orders_changed();
        Ok(())
    }

    async fn set_failed(&self, operation: &Operation, version: Digest, failed: bool) -> Answer<()> {
        let Some(mut row) = self.database().instance(&operation.instance).await? else { return Ok(()) };
        row.failed.retain(|known| *known != version);
        if failed {
            row.failed.push(version);
        }
        self.database().update_instance(&row).await?;
        Ok(())
    }

    /// Everything a host should know, as soon as it differs from what it was at `seen`.
    /// `left`: instances of which it keeps something, and wants to know whether they are still there.
    pub(crate) async fn orders(
        &self,
        host: &Name,
        seen: u64,
        wait: Duration,
        mut left: Vec<InstanceId>,
    ) -> Answer<HostOrders> {
        self.database().host_seen(host, None).await?;
        let mut changed = self.inner.orders.subscribe();
        let wait = wait.min(Duration::from_millis(REACHABLE_MS / 2));
        // A time-out only means that nothing has changed; the answer is the same as before.
        let _ = tokio::time::timeout(wait, changed.wait_for(|revision| *revision != seen)).await;
        let revision = *changed.borrow_and_update();
        let rows = self.database().instances().await?;
        let moved = self.moved(&rows, host);
        left.retain(|id| rows.iter().all(|row| row.spec.id != *id));
        let rows = rows.into_iter().filter(|row| row.host == *host);
        let specs: Vec<_> = rows.map(|row| row.spec).collect();
        let open = self.database().open_operations().await?.into_iter().map(|(operation, _)| operation);
        let operations = open.filter(|operation| specs.iter().any(|spec| spec.id == operation.instance)).collect();
        let tunnels = self.inner.tunnels.for_host(host);
        Ok(HostOrders { revision, host: host.clone(), specs, operations, tunnels, moved, deleted: left })
    }

    pub(crate) async fn host_views(&self) -> Answer<Vec<HostView>> {
        let view = |row: HostRow| HostView {
            reachable: is_reachable(row.seen),
            name: row.name,
            seen: row.seen,
            facts: row.facts,
            instances: row.instances,
        };
        Ok(self.database().hosts().await?.into_iter().map(view).collect())
    }

    /// Forgets a host that owns nothing.
    pub(crate) async fn remove_host(&self, name: &Name) -> Answer<()> {
        let hosts = self.database().hosts().await?;
        let host = hosts.iter().find(|host| host.name == *name);
        match host {
            None => Err(Failure::missing(format!("no host named \"{name}\" has joined"))),
            Some(host) if host.instances > 0 => Err(Failure::conflict(format!(
                "host \"{name}\" owns {} instances; delete or move them first",
                host.instances
            ))),
            Some(_) => {
                self.database().remove_host(name).await?;
                self.state_changed();
                Ok(())
            }
        }
    }
}

//! Streams from a user into an instance. Hosts are never connected to: a host hears that somebody waits, dials out, and
//! here the two connections become one.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use collective_api::{TunnelAnswer, TunnelOrder, TunnelTarget};
use collective_model::{InstanceId, Name, TunnelId};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;

use crate::Plane;
use crate::hosts::is_reachable;
use crate::instances::random_id;
use crate::problem::{Answer, Failure};

/// A host that has not answered by then is busy or gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);
/// More than this many users of one plane do not wait at the same time.
const MAX_WAITING: usize = 1024;

/// Bytes that are passed on at once.
const AT_ONCE: usize = 64 << 10;

const NOBODY_WAITS: &str = "nobody waits for this tunnel any more";

/// Tunnels whose hosts have not dialled yet.
#[derive(Default)]
pub(crate) struct Tunnels {
    waiting: Mutex<HashMap<TunnelId, Waiting>>,
}

struct Waiting {
    host: Name,
    order: TunnelOrder,
    answer: oneshot::Sender<Result<OnUpgrade, String>>,
}

/// Takes a tunnel off the list when its user has gone.
struct Listed<'a>(&'a Tunnels, TunnelId);

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

impl Tunnels {
    fn lock(&self) -> MutexGuard<'_, HashMap<TunnelId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a host should open.
    pub fn for_host(&self, host: &Name) -> Vec<TunnelOrder> {
        self.lock().values().filter(|waiting| waiting.host == *host).map(|waiting| waiting.order.clone()).collect()
    }
}

impl Plane {
    /// Waits for the host of an instance to open a tunnel.
    pub(crate) async fn open_tunnel(&self, name: &Name, target: TunnelTarget) -> Answer<OnUpgrade> {
        if matches!(target, TunnelTarget::Arrival { .. }) {
            return Err(Failure::forbidden("this is between hosts"));
        }
        let row = self.row(name).await?;
        self.open_tunnel_to(row.host, name, row.spec.id, target).await
    }

    /// The same to any host.
    pub(crate) async fn open_tunnel_to(
        &self,
        host: Name,
        name: &Name,
        instance: InstanceId,
        target: TunnelTarget,
    ) -> Answer<OnUpgrade> {
        let hosts = self.database().hosts().await?;
        if !hosts.iter().any(|known| known.name == host && is_reachable(known.seen)) {
            let message = format!("host \"{host}\" of {name} does not answer; try again when it is back");
            return Err(Failure::unavailable(message));
        }
        let id = TunnelId::from_random(random_id()?);
        let order = TunnelOrder { id: id.clone(), instance, target };
        let (answer, answered) = oneshot::channel();
        let _listed = {
            let mut waiting = self.inner.tunnels.lock();
            if waiting.len() >= MAX_WAITING {
                return Err(Failure::unavailable("too many users wait for hosts at this moment; try again"));
            }
            waiting.insert(id.clone(), Waiting { host: host.clone(), order, answer });
            Listed(&self.inner.tunnels, id)
        };
        self.inner.orders.send_modify(|revision| *revision += 1);
        match tokio::time::timeout(ANSWER_LIMIT, answered).await {
            Ok(Ok(Ok(stream))) => Ok(stream),
            Ok(Ok(Err(refused))) => Err(Failure::conflict(refused)),
            _ => Err(Failure::unavailable(format!("host \"{host}\" of {name} did not answer in time; try again"))),
        }
    }

    /// A host has opened a tunnel, or says why not. Whether its stream is wanted.
    pub(crate) fn tunnel_answered(
        &self,
        host: &Name,
        id: &TunnelId,
        answer: TunnelAnswer,
        stream: Option<OnUpgrade>,
    ) -> Answer<bool> {
        let mut waiting = self.inner.tunnels.lock();
        if waiting.get(id).is_none_or(|waiting| waiting.host != *host) {
            return Err(Failure::missing(NOBODY_WAITS));
        }
        let Some(waiting) = waiting.remove(id) else { return Ok(false) };
        let (result, wanted) = match (answer.refused, stream) {
            (Some(refused), _) => (Err(refused), false),
            (None, Some(stream)) => (Ok(stream), true),
            (None, None) => return Err(Failure::invalid("a tunnel needs a connection that can be upgraded")),
        };
        let gone = waiting.answer.send(result).is_err();
        if gone { Err(Failure::missing(NOBODY_WAITS)) } else { Ok(wanted) }
    }
}

/// Makes two connections one, until both are closed.
pub(crate) fn splice(user: OnUpgrade, host: OnUpgrade) {
    tokio::spawn(async move {
        let (Ok(user), Ok(host)) = tokio::join!(user, host) else { return };
        let (mut user, mut host) = (TokioIo::new(user), TokioIo::new(host));
        let copied = tokio::io::copy_bidirectional_with_sizes(&mut user, &mut host, AT_ONCE, AT_ONCE).await;
        if let Err(error) = copied {
            tracing::debug!(%error, "a tunnel broke");
        }
    });
}

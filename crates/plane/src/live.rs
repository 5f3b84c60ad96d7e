//! An instance changes its host while it runs. The hosts bring the machine over by themselves; here is who has it.
//!
//! One transaction ([`Plane::take`]) makes the other host the owner, as long as the order to move it is open. One other
//! ([`Plane::stay`]) ends that order, as long as the first host is the owner. So whichever comes first decides, and each host
//! can ask again until it has heard it.

use collective_api::{StayAnswer, StayRequest, TunnelTarget};
use collective_model::run::Platform;
use collective_model::{Name, Operation, OperationId, OperationKind, OperationState, Spec, State};
use hyper::upgrade::OnUpgrade;

use crate::Plane;
use crate::database::InstanceRow;
use crate::problem::{Answer, Failure};

impl Plane {
    /// Whether a running instance could go on at another host.
    pub(crate) async fn may_move_live(&self, row: &InstanceRow, to: &Name) -> Answer<()> {
        let name = &row.spec.name;
        if row.host == *to {
            return Err(Failure::conflict(format!("{name} is on host \"{to}\" already")));
        }
        let seen = row.observed.as_ref().filter(|seen| seen.generation == row.spec.generation);
        let seen = seen.filter(|seen| seen.state == State::Running && seen.arrived == row.spec.arrival);
        let seen =
            seen.ok_or_else(|| Failure::conflict(format!("{name} cannot move while it runs: it does not run")))?;
        let hosts = self.database().hosts().await?;
        let here =
            hosts.iter().find(|host| host.name == row.host).and_then(|host| host.facts.as_ref()?.platform.clone());
        let here = here.map(|here| {
            let cpu = seen.processor.clone().unwrap_or(here.cpu);
            Platform { cpu, portable: Vec::new(), ..here }
        });
        let here = here.ok_or_else(|| Failure::conflict(format!("it is not known what {name} runs on")))?;
        self.fits(row, to, Some(&here)).await
    }

    /// The order `id` to move an instance while it runs, where it goes, and whether it is open.
    async fn move_of(&self, id: &OperationId) -> Answer<Option<(Operation, Name, OperationState)>> {
        let found = self.database().operation(id).await?;
        Ok(found.and_then(|(operation, state)| match operation.kind.clone() {
            OperationKind::Live { to, .. } => Some((operation, to, state)),
            _ => None,
        }))
    }

    /// Whether `host` is where the instance of this order goes to.
    pub(crate) async fn comes_to(&self, host: &Name, id: &OperationId) -> Answer<bool> {
        Ok(self.move_of(id).await?.is_some_and(|(_, to, state)| to == *host && !state.is_final()))
    }

    /// From the host that has an instance to the one where it goes.
    pub(crate) async fn tunnel_between(&self, host: &Name, id: &OperationId) -> Answer<OnUpgrade> {
        let not_yours = || Failure::forbidden("no such operation is to be carried out by this host");
        let (operation, to, state) = self.move_of(id).await?.ok_or_else(not_yours)?;
        let row = self.database().instance(&operation.instance).await?.ok_or_else(not_yours)?;
        if row.host != *host || state.is_final() || to == *host {
            return Err(not_yours());
        }
        let spec = Box::new(row.spec.clone());
        let target = TunnelTarget::Arrival { operation: id.clone(), spec };
        self.open_tunnel_to(to, &row.spec.name, row.spec.id, target).await
    }

    /// Makes `host` the owner of the instance that comes to it. Asked again the answer is the same.
    pub(crate) async fn take(&self, host: &Name, id: &OperationId) -> Answer<Spec> {
        let taken = self.database().take(host, id).await?;
        let spec = taken.ok_or_else(|| Failure::conflict("the instance does not come to this host any more"))?;
        tracing::info!(instance = %spec.name, to = %host, "the instance has another owner, while it runs");
        self.orders_changed();
        Ok(spec)
    }

    /// Says whose an instance is that was to move: if it is still this host's, it stays so.
    pub(crate) async fn stay(&self, host: &Name, id: &OperationId, request: StayRequest) -> Answer<StayAnswer> {
        let (operation, _, _) =
            self.move_of(id).await?.ok_or_else(|| Failure::missing("there is no such order to move an instance"))?;
        let StayRequest { generation, why } = request;
        let ended = OperationState::Failed { error: why };
        let moved = self.database().stay((host, generation), id, &operation.instance, ended).await?;
        self.orders_changed();
        Ok(StayAnswer { moved })
    }
}

//! An instance is copied, or, while it does not run, changes its host. The plane's database is the only arbiter: one write makes another host
//! the owner and counts the ownership, and whatever the old one says or does from then on counts for nothing.

use collective_api::{Backup, CloneRequest, InstanceView, MoveRequest, OperationView};
use collective_model::{
    Generation, InstanceId, Name, Observed, Operation, OperationId, OperationKind, Origin, Spec, State,
};

use crate::Plane;
use crate::database::InstanceRow;
use crate::instances::{check_ports, manifest_of, random_id};
use crate::problem::{Answer, Failure};

/// Clones made at once.
const MOST_CLONES: usize = 100;

impl Plane {
    /// Gives an instance that is suspended or stopped, and in the store, to another host.
    pub(crate) async fn move_instance(&self, name: &Name, request: MoveRequest) -> Answer<OperationView> {
        let row = self.row(name).await?;
        let refused = |why: String| Failure::conflict(format!("{name} cannot move: {why}"));
        let open = self.database().open_operations().await?;
        if open.iter().any(|(operation, _)| operation.instance == row.spec.id) {
            return Err(refused("something is under way for it; try again when that is over".into()));
        }
        let seen = row.observed.clone().filter(|seen| seen.generation == row.spec.generation);
        let seen = seen.ok_or_else(|| refused(format!("host \"{}\" has not said yet how it is", row.host)))?;
        let is_there = seen.arrived == row.spec.arrival;
        if row.host == request.host && is_there {
            return Err(refused(format!("it is on host \"{}\" already", request.host)));
        }
        let backup = self.at_rest(&seen, &row).await.map_err(refused)?;
        let memory = backup.whole.as_ref().and_then(|whole| whole.machine.as_ref()).filter(|_| !request.cold);
        self.fits(&row, &request.host, memory.map(|machine| &machine.info.platform)).await?;
        let kind = OperationKind::Receive { backup: backup.id.clone(), cold: request.cold };
        let operation = Operation { id: OperationId::from_random(random_id()?), instance: row.spec.id.clone(), kind };
        let mut spec = row.spec.clone();
        spec.generation = Generation(spec.generation.0 + 1);
        spec.arrival = Some(backup.id);
        if !self.database().change_owner(&row, &request.host, &spec, &operation).await? {
            return Err(refused("it changed just now; try again".into()));
        }
        tracing::info!(instance = %name, from = %row.host, to = %request.host, "the instance has another owner");
        self.orders_changed();
        self.operation_view(&operation.id).await
    }

    /// What the instance is, in the store; the error says why it is not.
    async fn at_rest(&self, seen: &Observed, row: &InstanceRow) -> Result<Backup, String> {
        if !matches!(seen.state, State::Suspended | State::Stopped) {
            return Err(format!("it is {}; suspend or stop it first", seen.state));
        }
        if seen.power_serial < row.spec.power_serial && seen.arrived == row.spec.arrival {
            return Err("it was told to start or stop just now".into());
        }
        let pushed = seen.in_store.as_ref().ok_or("what it is now is on its host only; put it into the store first")?;
        let backup = self.database().backup(pushed).await.ok().flatten();
        backup.filter(|backup| backup.whole.is_some()).ok_or_else(|| "the store has lost what it is".to_owned())
    }

    pub(crate) async fn fits(
        &self,
        row: &InstanceRow,
        host: &Name,
        platform: Option<&collective_model::run::Platform>,
    ) -> Answer<()> {
        let hosts = self.database().hosts().await?;
        let there = hosts.iter().find(|known| known.name == *host);
        let there = there.ok_or_else(|| Failure::missing(format!("no host named \"{host}\" has joined")))?;
        self.has_room(row, host).await?;
        if let Some(platform) = platform {
            let facts = there.facts.as_ref().and_then(|facts| facts.platform.as_ref());
            platform.goes_on_at(facts).map_err(|why| {
                Failure::conflict(format!(
                    "the running machine cannot go on at host \"{host}\": {why}; with --cold it moves without its memory, and \
                     is booted there"
                ))
            })?;
        }
        Ok(())
    }

    /// Copies an instance, as it was at a checkpoint, on the host where it is.
    pub(crate) async fn clone_instance(&self, name: &Name, request: CloneRequest) -> Answer<Vec<InstanceView>> {
        let row = self.row(name).await?;
        let seen = row.observed.as_ref().filter(|seen| seen.generation == row.spec.generation);
        let known = seen.is_some_and(|seen| seen.checkpoints.iter().any(|kept| kept.id == request.checkpoint));
        if !known {
            return Err(Failure::missing(format!("{name} has no checkpoint {}", request.checkpoint.0)));
        }
        if request.names.is_empty() || request.names.len() > MOST_CLONES {
            return Err(Failure::invalid(format!("1 to {MOST_CLONES} clones can be made at once")));
        }
        if request.names.len() > 1 && !request.ports.is_empty() {
            return Err(Failure::invalid("a port can only be published for one clone"));
        }
        let version = self.database().version(&row.spec.version).await?;
        let manifest = version.as_ref().map(manifest_of).transpose()?;
        let manifest = manifest.ok_or_else(|| Failure::internal("the instance's version is not published any more"))?;
        check_ports(&request.ports, &manifest, &row.host, &self.database().instances().await?)?;
        let mut views = Vec::new();
        for clone in request.names {
            self.has_room(&InstanceRow { spec: Spec { ports: vec![], ..row.spec.clone() }, ..row.clone() }, &row.host)
                .await?;
            let origin = Origin { instance: row.spec.id.clone(), checkpoint: request.checkpoint };
            let spec = Spec {
                id: InstanceId::from_random(random_id()?),
                name: clone.clone(),
                generation: Generation(1),
                on: true,
                power_serial: 1,
                ports: request.ports.clone(),
                arrival: None,
                origin: Some(origin),
                ..row.spec.clone()
            };
            let new = InstanceRow { spec, observed: None, failed: Vec::new(), ..row.clone() };
            if !self.database().insert_instance(&new).await? {
                return Err(Failure::conflict(format!("the name \"{clone}\" is taken; choose another")));
            }
            self.orders_changed();
            views.push(self.instance_view(&clone).await?);
        }
        Ok(views)
    }

    /// What `host` does not have any more, because another has it and says so.
    pub(crate) fn moved(&self, rows: &[InstanceRow], host: &Name) -> Vec<(InstanceId, Generation)> {
        let arrived = |row: &&InstanceRow| {
            let seen = row.observed.as_ref();
            row.spec.generation.0 > 1
                && seen.is_some_and(|seen| seen.generation == row.spec.generation && seen.arrived == row.spec.arrival)
        };
        let elsewhere = rows.iter().filter(|row| row.host != *host).filter(arrived);
        elsewhere.map(|row| (row.spec.id.clone(), row.spec.generation)).collect()
    }
}

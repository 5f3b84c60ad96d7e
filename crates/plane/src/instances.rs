//! Instances: what users want of them.

use collective_api::{InstanceView, LaunchRequest, OperationRequest, OperationView};
use collective_model::{
    ApplianceName, Generation, InstanceId, Manifest, Name, Operation, OperationId, OperationKind, PublishedPort,
    Reference, Selector, Spec, VersionName,
};

use crate::Plane;
use crate::database::{HostRow, InstanceRow, VersionRow};
use crate::hosts::is_reachable;
use crate::place::{Candidate, place, unfit};
use crate::problem::{Answer, Failure};

/// Memory that a host keeps for itself, in bytes.
const HOST_MEMORY: i64 = 256 << 20;

pub(crate) fn random_id() -> Answer<[u8; 16]> {
    collective_keys::random_id().map_err(|e| Failure::internal(e.to_string()))
}

pub(crate) fn manifest_of(row: &VersionRow) -> Answer<Manifest> {
    Manifest::parse(row.manifest.payload.as_bytes())
        .map_err(|e| Failure::internal(format!("the manifest of {} cannot be read: {e}", row.digest)))
}

impl Plane {
    /// Creates an instance and gives it to a host.
    pub(crate) async fn launch(&self, request: LaunchRequest) -> Answer<InstanceView> {
        let reference: Reference =
            request.reference.parse().map_err(|e: collective_model::ParseNameError| Failure::invalid(e.to_string()))?;
        let version = self.resolve(&reference).await?;
        let manifest = manifest_of(&version)?;
        manifest.settings_with(&request.settings).map_err(Failure::invalid)?;
        let instances = self.database().instances().await?;
        if let Some(follow) = &request.follow {
            self.channel(&reference.appliance, follow).await?;
        }
        let memory = request.memory.unwrap_or(manifest.hardware.memory).0;
        let cpus = request.cpus.unwrap_or(manifest.hardware.cpus);
        let host = self.choose_host(request.host.as_ref(), &instances, memory, cpus).await?;
        check_ports(&request.ports, &manifest, &host, &instances)?;
        let id = InstanceId::from_random(random_id()?);
        let name = match request.name {
            Some(name) => name,
            None => free_name(&reference.appliance, &instances)?,
        };
        let spec = Spec {
            id,
            name: name.clone(),
            generation: Generation(1),
            appliance: reference.appliance,
            version: version.digest,
            on: true,
            power_serial: 1,
            ports: request.ports,
            settings: request.settings,
            outbound: request.outbound,
            cpus: request.cpus,
            memory: request.memory,
            disk_sizes: Default::default(),
            authorized_keys: request.authorized_keys,
            arrival: None,
            origin: None,
            checkpoint_every: None,
        };
        let row =
            InstanceRow { spec, host, follow: request.follow, hold_until: None, observed: None, failed: Vec::new() };
        if !self.database().insert_instance(&row).await? {
            if self.database().version(&row.spec.version).await?.is_none() {
                return Err(Failure::conflict("this version was withdrawn just now"));
            }
            return Err(Failure::conflict(format!("the name \"{name}\" is taken; choose another --name")));
        }
        self.orders_changed();
        self.instance_view(&name).await
    }

    async fn choose_host(
        &self,
        wanted: Option<&Name>,
        instances: &[InstanceRow],
        memory: u64,
        cpus: u32,
    ) -> Answer<Name> {
        let mut claims = Vec::new();
        for row in instances.iter().filter(|row| row.spec.on) {
            claims.push((&row.host, self.memory_of(row).await?));
        }
        let candidate = |host: HostRow| {
            let claimed: i64 =
                claims.iter().filter(|(owner, _)| **owner == host.name).map(|(_, bytes)| *bytes as i64).sum();
            let total = host.facts.as_ref().map_or(0, |facts| facts.memory as i64);
            Candidate {
                reachable: is_reachable(host.seen) && host.facts.is_some(),
                free_memory: total - HOST_MEMORY - claimed,
                cpus: host.facts.as_ref().map_or(0, |facts| facts.cpus),
                instances: host.instances,
                name: host.name,
            }
        };
        let candidates: Vec<Candidate> = self.database().hosts().await?.into_iter().map(candidate).collect();
        let Some(wanted) = wanted else {
            return place(&candidates, memory, cpus).map_err(Failure::conflict);
        };
        let host = candidates.iter().find(|host| host.name == *wanted);
        let host = host.ok_or_else(|| Failure::missing(format!("no host named \"{wanted}\" has joined")))?;
        match unfit(host, memory, cpus) {
            Some(why) => Err(Failure::conflict(why)),
            None => Ok(host.name.clone()),
        }
    }

    /// Memory that an instance claims, in bytes.
    async fn memory_of(&self, row: &InstanceRow) -> Answer<u64> {
        if let Some(memory) = row.spec.memory {
            return Ok(memory.0);
        }
        let version = self.database().version(&row.spec.version).await?;
        Ok(version.as_ref().map(manifest_of).transpose()?.map_or(0, |manifest| manifest.hardware.memory.0))
    }

    pub(crate) async fn row(&self, name: &Name) -> Answer<InstanceRow> {
        let row = self.database().instance_named(name).await?;
        row.ok_or_else(|| Failure::missing(format!("there is no instance \"{name}\"; `collective list` shows all")))
    }

    /// An instance as users see it.
    pub(crate) async fn instance_view(&self, name: &Name) -> Answer<InstanceView> {
        let row = self.row(name).await?;
        let mut views = self.views(vec![row]).await?;
        views.pop().ok_or_else(|| Failure::internal("a view was lost"))
    }

    pub(crate) async fn instance_views(&self) -> Answer<Vec<InstanceView>> {
        let rows = self.database().instances().await?;
        self.views(rows).await
    }

    async fn views(&self, rows: Vec<InstanceRow>) -> Answer<Vec<InstanceView>> {
        let revision = *self.inner.state.borrow();
        let hosts = self.database().hosts().await?;
        let open = self.database().open_operations().await?;
        let mut views = Vec::new();
        for row in rows {
            let host = hosts.iter().find(|host| host.name == row.host);
            let mine = open.iter().filter(|(operation, _)| operation.instance == row.spec.id);
            let view = |(operation, progress): &(Operation, _)| OperationView {
                operation: operation.clone(),
                progress: Clone::clone(progress),
                revision,
            };
            let operations = mine.map(view).collect();
            let mut spec = row.spec;
            self.hide_secrets(&mut spec).await?;
            views.push(InstanceView {
                operations,
                reachable: host.is_some_and(|host| is_reachable(host.seen)),
                spec,
                host: row.host,
                follow: row.follow,
                hold_until: row.hold_until,
                observed: row.observed,
                revision,
            });
        }
        Ok(views)
    }

    async fn hide_secrets(&self, spec: &mut Spec) -> Answer<()> {
        if spec.settings.is_empty() {
            return Ok(());
        }
        let manifest = self.database().version(&spec.version).await?.as_ref().map(manifest_of).transpose()?;
        for (key, value) in &mut spec.settings {
            let known = manifest.as_ref().and_then(|manifest| manifest.settings.get(key));
            if known.is_none_or(|setting| setting.secret) {
                *value = "(secret)".into();
            }
        }
        Ok(())
    }

    /// Starts or stops.
    pub(crate) async fn power(&self, name: &Name, on: bool) -> Answer<InstanceView> {
        let mut row = self.row(name).await?;
        row.spec.on = on;
        row.spec.power_serial += 1;
        if !self.database().update_instance(&row).await? {
            return Err(Failure::conflict(format!("{name} was given to another host just now; try again")));
        }
        self.orders_changed();
        self.instance_view(name).await
    }

    /// Whether a host can take this instance beside what it has.
    pub(crate) async fn has_room(&self, row: &InstanceRow, host: &Name) -> Answer<()> {
        let mut others = self.database().instances().await?;
        others.retain(|other| other.spec.id != row.spec.id);
        let version = self.database().version(&row.spec.version).await?;
        let manifest = version.as_ref().map(manifest_of).transpose()?;
        let cpus = row.spec.cpus.or(manifest.map(|manifest| manifest.hardware.cpus)).unwrap_or(1);
        self.choose_host(Some(host), &others, self.memory_of(row).await?, cpus).await?;
        check_free_ports(&row.spec.ports, host, &others)
    }

    /// Asks the owner of an instance to do something.
    pub(crate) async fn operate(&self, name: &Name, request: OperationRequest) -> Answer<OperationView> {
        let mut row = self.row(name).await?;
        if matches!(request, OperationRequest::Restart) && !row.spec.on {
            row.spec.on = true;
            self.database().update_instance(&row).await?;
        }
        let kind = match request {
            OperationRequest::Plan { to } => OperationKind::Plan { to: self.target(&row, to).await? },
            OperationRequest::Update { to } => OperationKind::Update { to: self.target(&row, to).await? },
            OperationRequest::Rollback { with_data } => OperationKind::Rollback { with_data },
            OperationRequest::Restart => OperationKind::Restart,
            OperationRequest::Trace => OperationKind::Trace,
            OperationRequest::Describe => OperationKind::Describe,
            OperationRequest::Logs { lines } => OperationKind::Logs { lines },
            OperationRequest::Backup => OperationKind::Backup,
            OperationRequest::Restore { backup } => {
                OperationKind::Restore { backup: self.backup_for(&row, backup).await? }
            }
            OperationRequest::Push => OperationKind::Push,
            OperationRequest::Suspend => OperationKind::Suspend,
            OperationRequest::Resume => OperationKind::Resume,
            OperationRequest::Live { to, only_measure } => {
                self.may_move_live(&row, &to).await?;
                OperationKind::Live { to, only_measure }
            }
            OperationRequest::Checkpoint { why } => OperationKind::Checkpoint { why: checked_words(why)? },
            OperationRequest::GoBack { to, disks_only, keep } => {
                if !keep.is_empty() && !disks_only {
                    return Err(Failure::invalid(
                        "memory and all disks are of one instant and only go back together; to keep a disk, let only disks go back",
                    ));
                }
                OperationKind::GoBack { to, disks_only, keep }
            }
            OperationRequest::Screen { checkpoint } => OperationKind::Screen { checkpoint },
            OperationRequest::Forget { checkpoint } => OperationKind::Forget { checkpoint },
            OperationRequest::Delete { data } => OperationKind::Delete { data },
        };
        self.insert_operation(&row.spec.id, kind).await
    }

    pub(crate) async fn insert_operation(&self, instance: &InstanceId, kind: OperationKind) -> Answer<OperationView> {
        let operation = Operation { id: OperationId::from_random(random_id()?), instance: instance.clone(), kind };
        self.database().insert_operation(&operation).await?;
        self.orders_changed();
        self.operation_view(&operation.id).await
    }

    /// The version an update goes to: as asked for, else the head of the followed channel, else of `stable`.
    async fn target(&self, row: &InstanceRow, to: Option<VersionName>) -> Answer<collective_model::Digest> {
        let selector = match (to, &row.follow) {
            (Some(label), _) => Selector::Label(label),
            (None, Some(channel)) => {
                Selector::Label(channel.as_str().parse().map_err(|e| Failure::internal(format!("{e}")))?)
            }
            (None, None) => Selector::Default,
        };
        let reference = Reference { appliance: row.spec.appliance.clone(), selector };
        Ok(self.resolve(&reference).await?.digest)
    }

    pub(crate) async fn operation_view(&self, id: &OperationId) -> Answer<OperationView> {
        let revision = *self.inner.state.borrow();
        let found = self.database().operation(id).await?;
        let (operation, progress) = found.ok_or_else(|| Failure::missing("there is no such operation"))?;
        Ok(OperationView { operation, progress, revision })
    }
}

/// A line for people, as the history shows it.
fn checked_words(why: Option<String>) -> Answer<Option<String>> {
    match why {
        Some(why) if why.chars().count() > 100 || why.chars().any(char::is_control) => {
            Err(Failure::invalid("the reason may have 100 characters, all of them printable"))
        }
        why => Ok(why.filter(|why| !why.trim().is_empty())),
    }
}

pub(crate) fn check_ports(
    ports: &[PublishedPort],
    manifest: &Manifest,
    host: &Name,
    instances: &[InstanceRow],
) -> Answer<()> {
    for (index, port) in ports.iter().enumerate() {
        if !manifest.ports.iter().any(|offered| offered.guest == port.guest) {
            let offered: Vec<_> = manifest.ports.iter().map(|p| format!("{} ({})", p.guest, p.name)).collect();
            return Err(Failure::invalid(format!(
                "{} offers no port {}; it offers: {}",
                manifest.appliance,
                port.guest,
                offered.join(", ")
            )));
        }
        if ports[..index].iter().any(|other| overlap(other, port)) {
            return Err(Failure::invalid(format!("port {} is published twice", port.host)));
        }
    }
    check_free_ports(ports, host, instances)
}

fn overlap(one: &PublishedPort, other: &PublishedPort) -> bool {
    let any = one.address.is_unspecified() || other.address.is_unspecified();
    one.host == other.host && (any || one.address == other.address)
}

/// Ports of a host that `instances` have are not given to another.
fn check_free_ports(ports: &[PublishedPort], host: &Name, instances: &[InstanceRow]) -> Answer<()> {
    for port in ports {
        let has = |row: &&InstanceRow| row.host == *host && row.spec.ports.iter().any(|other| overlap(other, port));
        if let Some(taker) = instances.iter().find(has) {
            return Err(Failure::conflict(format!(
                "port {} of host \"{host}\" is taken by instance \"{}\"",
                port.host, taker.spec.name
            )));
        }
    }
    Ok(())
}

fn free_name(appliance: &ApplianceName, instances: &[InstanceRow]) -> Answer<Name> {
    let base = appliance.name.as_str();
    let taken = |name: &str| instances.iter().any(|row| row.spec.name.as_str() == name);
    let numbered = (2..).map(|number| format!("{base}-{number}"));
    let name = std::iter::once(base.to_owned()).chain(numbered).find(|name| !taken(name));
    let name = name.unwrap_or_else(|| base.to_owned());
    name.parse().map_err(|e| Failure::invalid(format!("give it a --name: {e}")))
}

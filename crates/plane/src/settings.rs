//! What users change of an instance after its launch.

use std::collections::BTreeMap;

use collective_api::{InstancePatch, InstanceView};
use collective_model::schedule::check_interval;
use collective_model::{ByteSize, Name, Timestamp};

use crate::Plane;
use crate::database::InstanceRow;
use crate::instances::manifest_of;
use crate::problem::{Answer, Failure};

impl Plane {
    /// Changes what may be changed at any time.
    pub(crate) async fn change(&self, name: &Name, patch: InstancePatch) -> Answer<InstanceView> {
        let mut row = self.row(name).await?;
        match patch.follow.as_deref() {
            None => {}
            Some("") => row.follow = None,
            Some(channel) => {
                let channel: Name = channel.parse().map_err(|e| Failure::invalid(format!("{e}")))?;
                self.channel(&row.spec.appliance, &channel).await?;
                row.follow = Some(channel);
            }
        }
        if let Some(until) = patch.hold_until {
            row.hold_until = (until > Timestamp::now()).then_some(until);
        }
        if let Some(new) = &patch.name {
            row.spec.name = new.clone();
        }
        if !patch.settings.is_empty() {
            let version = self.database().version(&row.spec.version).await?;
            let version =
                version.ok_or_else(|| Failure::internal("the instance's version is not published any more"))?;
            row.spec.settings.extend(patch.settings);
            manifest_of(&version)?.settings_with(&row.spec.settings).map_err(Failure::invalid)?;
        }
        if let Some(cpus) = patch.cpus {
            row.spec.cpus = Some(cpus);
        }
        if let Some(memory) = patch.memory {
            row.spec.memory = Some(memory);
        }
        if let Some(every) = patch.checkpoint_every {
            row.spec.checkpoint_every = (!every.0.is_zero()).then_some(every);
            row.spec.checkpoint_every.map_or(Ok(()), check_interval).map_err(Failure::invalid)?;
        }
        self.enlarge(&mut row, patch.disk_sizes).await?;
        let name = row.spec.name.clone();
        if !self.database().update_instance(&row).await? {
            return Err(Failure::conflict(format!("the name \"{name}\" is taken")));
        }
        self.orders_changed();
        self.instance_view(&name).await
    }

    async fn enlarge(&self, row: &mut InstanceRow, sizes: BTreeMap<Name, ByteSize>) -> Answer<()> {
        if sizes.is_empty() {
            return Ok(());
        }
        let version = self.database().version(&row.spec.version).await?;
        let manifest = version.as_ref().map(manifest_of).transpose()?;
        for (disk, size) in sizes {
            let known = manifest.as_ref().and_then(|m| m.disks.iter().find(|known| known.name == disk));
            let known = known.ok_or_else(|| Failure::invalid(format!("there is no disk \"{disk}\"")))?;
            let now = row.spec.disk_sizes.get(&disk).copied().unwrap_or(known.size);
            if size < now {
                return Err(Failure::invalid(format!(
                    "disk \"{disk}\" has {} bytes and can only grow, because the guest's file systems would be cut off",
                    now.0
                )));
            }
            if !size.0.is_multiple_of(1 << 20) || size.0 > 16 << 40 {
                return Err(Failure::invalid("a disk's size must be whole MiB, up to 16 TiB"));
            }
            row.spec.disk_sizes.insert(disk, size);
        }
        Ok(())
    }
}

//! `backup`: an instance's data disks, encrypted, in the plane's store; and back.

use anyhow::{Result, bail};
use clap::Subcommand;
use collective_api::{Backup as Record, Client, OperationRequest};
use collective_model::{BackupId, ByteSize, Name};

use super::operations::operate;
use crate::ui::{Ui, table};

/// Fewer digits of an id say too little.
const LEAST_DIGITS: usize = 4;

/// Encrypt the data of an instance and put it into the plane's store
///
/// Only data disks, and of these only what their file systems use; the second backup stores only what changed. The instance
/// has to be off. What is stored can be read with the owner's key only: keep a copy of it with `collective key export`,
/// because without it the data is lost. An instance named like a word below is backed up with `backup create NAME`.
///
/// Example: collective backup n
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Backup {
    /// The instance
    #[arg(required = true)]
    name: Option<Name>,
    #[command(subcommand)]
    command: Option<BackupCommand>,
}

#[derive(Debug, Subcommand)]
enum BackupCommand {
    Create(Create),
    List(List),
    Restore(Restore),
    Delete(Delete),
}

/// The same as `backup NAME`
///
/// Example: collective backup create n
#[derive(Debug, clap::Args)]
struct Create {
    /// The instance
    name: Name,
}

/// List backups, newest first
///
/// STORED is all that a backup is made of, NEW what it added to those before it. Backups stay when their instance is deleted.
///
/// Example: collective backup list n
#[derive(Debug, clap::Args)]
struct List {
    /// Those of instances that have, or had, this name [default: all]
    name: Option<Name>,
}

/// Put the data of a backup in place of an instance's present data
///
/// The instance has to be off, and needs data disks of the same names: it may be the one that was backed up, or another, such
/// as one launched in place of a deleted one. Its present data is kept as a checkpoint.
///
/// Example: collective backup restore n --backup 3f9c01d2
#[derive(Debug, clap::Args)]
struct Restore {
    /// The instance
    name: Name,
    /// Which backup, by the first digits of its id, also of another instance [default: the newest of this instance]
    #[arg(long, value_name = "ID")]
    backup: Option<String>,
}

/// Remove a backup
///
/// What other backups do not need of it goes from the store with the next `collective prune --yes`, or within the hour.
///
/// Example: collective backup delete 3f9c01d2
#[derive(Debug, clap::Args)]
struct Delete {
    /// The first digits of its id
    backup: String,
}

impl Backup {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        match (self.command, self.name) {
            (Some(BackupCommand::Create(create)), _) => make(ui, client, &create.name).await,
            (Some(BackupCommand::List(list)), _) => list.run(ui, client).await,
            (Some(BackupCommand::Restore(restore)), _) => restore.run(ui, client).await,
            (Some(BackupCommand::Delete(delete)), _) => delete.run(ui, client).await,
            (None, Some(name)) => make(ui, client, &name).await,
            (None, None) => bail!("name an instance"),
        }
    }
}

fn short(id: &BackupId) -> &str {
    &id.as_str()[..8]
}

async fn make(ui: &Ui, client: &Client, name: &Name) -> Result<()> {
    let result = operate(ui, client, name, &OperationRequest::Backup).await?;
    let backup: Record = serde_json::from_value(result)?;
    let all: Vec<Record> = client.get("/v1/backups").await?;
    ui.data(&document(&backup), |ui| {
        ui.line(format!(
            "backup {} of {name}: {} in use, {} stored, {} of it new",
            short(&backup.id),
            ByteSize(backup.used_bytes),
            ByteSize(backup.stored_bytes),
            ByteSize(backup.new_bytes)
        ));
    });
    if all.len() == 1 {
        ui.hint(
            "it can be read with the owner's key only, and without that key it is lost: `collective key export FILE`",
        );
    }
    Ok(())
}

/// A backup for programs.
fn document(backup: &Record) -> serde_json::Value {
    let disks = backup.disks.iter().map(|disk| serde_json::json!({ "name": disk.name, "size": disk.size }));
    serde_json::json!({
        "id": backup.id, "name": backup.name, "instance": backup.instance, "taken": backup.taken, "key": backup.key,
        "appliance": backup.appliance, "version": backup.version_name, "disks": disks.collect::<Vec<_>>(),
        "used_bytes": backup.used_bytes, "stored_bytes": backup.stored_bytes, "new_bytes": backup.new_bytes,
        "packs": backup.packs.len(),
    })
}

impl List {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let mut backups: Vec<Record> = client.get("/v1/backups").await?;
        // Whole instances at rest are not backups; they go by themselves.
        backups.retain(|backup| backup.whole.is_none());
        if let Some(name) = &self.name {
            // An instance may have another name now.
            let id = super::instance(client, name).await.ok().map(|view| view.spec.id);
            backups.retain(|backup| backup.name == *name || id.as_ref() == Some(&backup.instance));
        }
        ui.data(&backups.iter().map(document).collect::<Vec<_>>(), |ui| {
            let row = |backup: &Record| {
                vec![
                    short(&backup.id).to_owned(),
                    backup.name.to_string(),
                    backup.taken.to_string(),
                    format!("{}:{}", backup.appliance, backup.version_name),
                    ByteSize(backup.used_bytes).to_string(),
                    ByteSize(backup.stored_bytes).to_string(),
                    ByteSize(backup.new_bytes).to_string(),
                ]
            };
            let rows: Vec<_> = backups.iter().map(row).collect();
            table(ui, &["ID", "INSTANCE", "TAKEN", "VERSION", "IN USE", "STORED", "NEW"], &rows);
        });
        if let (true, Some(name)) = (backups.is_empty(), &self.name) {
            ui.hint(format!("there is no backup of {name}; `collective backup list` shows those of others"));
        }
        Ok(())
    }
}

impl Restore {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let backup = match &self.backup {
            Some(digits) => Some(find(client, digits).await?.id),
            None => None,
        };
        let result = operate(ui, client, &self.name, &OperationRequest::Restore { backup }).await?;
        ui.data(&result, |ui| {
            let text = |key: &str| result[key].as_str().unwrap_or_default().to_owned();
            ui.line(format!(
                "{} has the data of {} as of {} ({}); checkpoint {} keeps what was",
                self.name,
                text("of"),
                text("taken"),
                ByteSize(result["bytes"].as_u64().unwrap_or_default()),
                result["kept_as_checkpoint"]
            ));
        });
        ui.hint(format!("`collective start {}` starts it", self.name));
        Ok(())
    }
}

impl Delete {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let backup = find(client, &self.backup).await?;
        let () = client.delete(&format!("/v1/backups/{}", backup.id)).await?;
        ui.data(&document(&backup), |ui| {
            ui.line(format!("removed backup {} of {}, taken {}", short(&backup.id), backup.name, backup.taken));
        });
        Ok(())
    }
}

/// The one backup whose id begins with these digits.
async fn find(client: &Client, digits: &str) -> Result<Record> {
    let mut backups: Vec<Record> = client.get("/v1/backups").await?;
    backups.retain(|backup| backup.whole.is_none());
    choose(backups, digits)
}

fn choose(backups: Vec<Record>, digits: &str) -> Result<Record> {
    if digits.len() < LEAST_DIGITS || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!(
            "\"{digits}\" is no id of a backup: give at least its first {LEAST_DIGITS} digits, as `collective backup list` shows"
        );
    }
    let wanted = digits.to_ascii_lowercase();
    let mut found = backups.into_iter().filter(|backup| backup.id.as_str().starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(backup), None) => Ok(backup),
        (Some(_), Some(_)) => bail!("more than one backup begins with {digits}; give more digits"),
        (None, _) => bail!("there is no backup {digits}; `collective backup list` shows all"),
    }
}

//! `key`: the key that private data is encrypted with.

use std::path::PathBuf;

use anyhow::Result;
use clap::Subcommand;
use collective_api::{Client, KeyCopy, KeyView, KeyWanted};
use collective_keys::{KeyId, OwnerKey};

use crate::ui::Ui;

/// Look after the key that backups are encrypted with
///
/// It is made at the first backup and lies wrapped in the plane's folder. Without it the data in backups is lost, whoever has
/// them: keep a copy.
#[derive(Debug, clap::Args)]
pub struct Key {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    Show(Show),
    Export(Export),
    Import(Import),
    New(New),
}

/// Show which keys there are, and which ones backups need
///
/// Example: collective key show
#[derive(Debug, clap::Args)]
struct Show {}

/// Write the key into a file, readable by you only
///
/// Whoever has the file and the store can read all backups; without it they are lost when the plane's machine is. Keep it
/// elsewhere. Only on the plane's machine.
///
/// Example: collective key export /media/usb/collective-owner.key
#[derive(Debug, clap::Args)]
struct Export {
    /// The file to write; it must not exist
    file: PathBuf,
    /// Another key than the one in use
    #[arg(long, value_name = "ID")]
    key: Option<KeyId>,
}

/// Bring a key back, and use it from now on
///
/// Keys that are here stay, for the backups that were encrypted with them. Only on the plane's machine.
///
/// Example: collective key import /media/usb/collective-owner.key
#[derive(Debug, clap::Args)]
struct Import {
    /// What `key export` wrote
    file: PathBuf,
}

/// Make a new key, and use it from now on
///
/// The next backup of each instance stores everything anew. Keys that are here stay. Only on the plane's machine.
///
/// Example: collective key new
#[derive(Debug, clap::Args)]
struct New {}

impl Key {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        match self.command {
            KeyCommand::Show(_) => show(ui, &client.get("/v1/key").await?),
            KeyCommand::Export(export) => export.run(ui, client).await?,
            KeyCommand::Import(import) => {
                let key = OwnerKey::read(&import.file)?;
                show(ui, &client.post("/v1/key/import", &KeyCopy { key }).await?);
            }
            KeyCommand::New(_) => {
                show(ui, &client.post("/v1/key/new", &()).await?);
                ui.hint("without this key what it encrypts is lost: `collective key export FILE`");
            }
        }
        Ok(())
    }
}

impl Export {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let copy: KeyCopy = client.post("/v1/key/export", &KeyWanted { key: self.key }).await?;
        copy.key.write_new(&self.file)?;
        let id = copy.key.id();
        ui.data(&serde_json::json!({ "key": id, "file": self.file }), |ui| {
            ui.line(format!("key {id} is in {}", self.file.display()));
        });
        ui.hint(
            "keep it elsewhere, and secret: with it and the store all backups can be read, without it they are lost",
        );
        Ok(())
    }
}

fn show(ui: &Ui, view: &KeyView) {
    ui.data(view, |ui| {
        match &view.current {
            Some(id) => ui.line(format!("key {id} is used for backups")),
            None => ui.line("there is no key yet; the first backup makes one"),
        }
        for need in &view.needed {
            let here =
                if need.here { "is here" } else { "IS NOT HERE: without it they are lost; `collective key import`" };
            ui.line(format!("{} backups need key {}, which {here}", need.backups, need.key));
        }
    });
}

//! `collective launch`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use collective_api::{Client, InstanceView, LaunchRequest};
use collective_model::{ByteSize, Name, PublishedPort};

use crate::ui::Ui;

/// Create an instance of an appliance and start it
///
/// Prints its name. It starts at once and fetches what it needs while it runs; `collective wait` waits for it.
///
/// Example: collective launch demo/notes --name n --publish 8080:80
#[derive(Debug, clap::Args)]
pub struct Launch {
    /// demo/notes, demo/notes:2, demo/notes:beta or demo/notes@DIGEST
    reference: String,
    /// Its name [default: the appliance's]
    #[arg(long)]
    name: Option<Name>,
    /// The host to run it [default: one is chosen]
    #[arg(long)]
    host: Option<Name>,
    /// Follow this channel: updates come by themselves
    #[arg(long, value_name = "CHANNEL")]
    follow: Option<Name>,
    /// Make a guest port reachable on the host; on 127.0.0.1 unless ADDR is given
    #[arg(long, value_name = "[ADDR:]HOSTPORT:GUESTPORT")]
    publish: Vec<PublishedPort>,
    /// A setting of the appliance; `collective show` lists them
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
    /// `none`: the guest reaches nothing outside
    #[arg(long, value_name = "none", value_parser = ["none", "internet"], default_value = "internet")]
    network: String,
    /// CPUs, in place of the appliance's
    #[arg(long)]
    cpus: Option<u32>,
    /// Memory, in place of the appliance's
    #[arg(long)]
    memory: Option<ByteSize>,
    /// A file with SSH public keys that may log in, beside the one that `collective ssh` uses
    #[arg(long, value_name = "FILE")]
    ssh_key: Vec<PathBuf>,
}

/// Reads KEY=VALUE.
pub fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("\"{text}\" is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Launch {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let mut authorized_keys = vec![super::reach::own_key()?.1];
        for path in &self.ssh_key {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            authorized_keys.extend(text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
        }
        let request = LaunchRequest {
            reference: self.reference,
            name: self.name,
            host: self.host,
            follow: self.follow,
            ports: self.publish,
            settings: self.set.into_iter().collect::<BTreeMap<_, _>>(),
            outbound: self.network != "none",
            cpus: self.cpus,
            memory: self.memory,
            authorized_keys,
        };
        let view: InstanceView = client.post("/v1/instances", &request).await?;
        ui.data(&serde_json::json!({ "name": view.spec.name, "host": view.host, "id": view.spec.id }), |ui| {
            ui.line(view.spec.name.as_str());
        });
        let name = &view.spec.name;
        ui.hint(format!("starting on host \"{}\"; next: collective wait {name} --for healthy", view.host));
        Ok(())
    }
}

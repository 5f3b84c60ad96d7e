//! `collective host ...` and `collective token`: more machines.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use collective_api::{Client, HostView, JoinAnswer, JoinRequest, NewToken, Token, TokenKind, TokenView};
use collective_host::{HostConfig, create_folder};
use collective_keys::PublicKey;
use collective_model::{ByteSize, Name};

use crate::connect::{Connect, default_data};
use crate::credentials::{self, Credentials};
use crate::ui::{Ui, table};

/// Options of every host daemon.
#[derive(Debug, Clone, clap::Args)]
pub struct HostOptions {
    /// The host's name [default: this machine's]
    #[arg(long = "name", value_name = "NAME")]
    pub name: Option<Name>,
    /// Keep the cache below this, apart from what instances need
    #[arg(long, default_value = "32G", value_name = "SIZE")]
    cache_size: ByteSize,
    /// Let the instances that run here claim this much memory together [default: all of the machine's]
    ///
    /// More than there is serves where most of them stand idle: an instance takes memory only as its guest uses it. Where all of them do, the system may end some.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Never use KVM
    #[arg(long)]
    tcg: bool,
    /// Start machines with this processor, so that they can go on at hosts that have no better one, such as x86-64-v2-intel
    /// [default: the best that this host has]
    #[arg(long, value_name = "NAME")]
    processor: Option<String>,
}

/// Add machines, list and remove them
#[derive(Debug, clap::Args)]
pub struct Host {
    #[command(subcommand)]
    command: HostCommand,
}

#[derive(Debug, clap::Subcommand)]
enum HostCommand {
    Join(Join),
    Run(Run),
    List(List),
    Remove(Remove),
    Trust(TrustHere),
}

impl Host {
    pub async fn run(self, ui: &Ui, connect: &Connect) -> Result<()> {
        match self.command {
            HostCommand::Join(command) => command.run(ui).await,
            HostCommand::Run(command) => command.run(ui).await,
            HostCommand::List(command) => command.run(ui, &connect.client()?).await,
            HostCommand::Remove(command) => command.run(ui, &connect.client()?).await,
            HostCommand::Trust(command) => command.run(ui),
        }
    }
}

/// Join a plane as a host, and run the host daemon
///
/// The token comes from `collective token create` at the plane and is used up.
///
/// Example: collective host join join1_... --name B
#[derive(Debug, clap::Args)]
struct Join {
    /// The token; `-` reads it from standard input
    token: String,
    /// The host's folder [default: /var/lib/collective/host, or ~/.local/share/collective/host]
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Only join; `collective host run` starts the daemon
    #[arg(long)]
    no_run: bool,
    #[command(flatten)]
    options: HostOptions,
}

impl Join {
    async fn run(self, ui: &Ui) -> Result<()> {
        let text = if self.token == "-" { std::io::read_to_string(std::io::stdin())? } else { self.token };
        let token: Token = text.parse()?;
        if token.kind != TokenKind::Join {
            return Err(anyhow!("this is not a token for joining; make one with `collective token create`"));
        }
        let data = host_data(self.data)?;
        let path = credentials::path(&data);
        if let Some(known) = Credentials::load(&path)? {
            return Err(anyhow!(
                "{} has joined already as \"{}\"; start it with `collective host run`, or choose another --data",
                data.display(),
                known.name
            ));
        }
        let name = self.options.name.clone().map_or_else(machine_name, Ok)?;
        let client = Client::new(token.endpoint(), Some(token.secret.clone()));
        let answer: JoinAnswer = client.post("/v1/hosts/join", &JoinRequest { name: name.clone() }).await?;
        let credentials = Credentials {
            name: name.clone(),
            secret: answer.secret,
            socket: None,
            address: Some(token.address),
            fingerprint: Some(token.fingerprint),
        };
        credentials.save(&path)?;
        ui.hint(format!("joined as host \"{name}\""));
        if self.no_run {
            return Ok(());
        }
        run_until_told(ui, data, self.options).await
    }
}

/// Run the host daemon of a machine that has joined
///
/// Example: collective host run
#[derive(Debug, clap::Args)]
struct Run {
    /// The host's folder
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(flatten)]
    options: HostOptions,
}

impl Run {
    async fn run(self, ui: &Ui) -> Result<()> {
        run_until_told(ui, host_data(self.data)?, self.options).await
    }
}

/// List hosts
///
/// Example: collective host list
#[derive(Debug, clap::Args)]
struct List {}

impl List {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let hosts: Vec<HostView> = client.get("/v1/hosts").await?;
        ui.data(&hosts, |ui| {
            let row = |host: &HostView| {
                let state = if host.reachable { "up" } else { "does not answer" };
                let facts = host.facts.as_ref();
                vec![
                    host.name.to_string(),
                    state.to_owned(),
                    host.instances.to_string(),
                    facts.map(|facts| facts.cpus.to_string()).unwrap_or_default(),
                    facts.map(|facts| ByteSize(facts.memory).to_string()).unwrap_or_default(),
                    facts.map(|facts| ByteSize(facts.cache_bytes).to_string()).unwrap_or_default(),
                    facts.map(|facts| facts.accelerator.clone()).unwrap_or_default(),
                ]
            };
            let rows: Vec<_> = hosts.iter().map(row).collect();
            table(ui, &["HOST", "STATE", "INSTANCES", "CPUS", "MEMORY", "CACHE", "ACCELERATOR"], &rows);
        });
        Ok(())
    }
}

/// Forget a host that owns no instances
///
/// Example: collective host remove B
#[derive(Debug, clap::Args)]
struct Remove {
    name: Name,
}

impl Remove {
    async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let () = client.delete(&format!("/v1/hosts/{}", self.name)).await?;
        ui.hint(format!("host \"{}\" is forgotten", self.name));
        Ok(())
    }
}

/// Make this machine's host believe another key of a publisher
///
/// Example: collective host trust demo 3b6a27bcceb6a42d62a3a8d02a6f0d73653215771de243a63ac048a18b59da29
#[derive(Debug, clap::Args)]
struct TrustHere {
    publisher: Name,
    /// 64 hexadecimal digits
    key: PublicKey,
    /// The host's folder
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
}

impl TrustHere {
    fn run(self, ui: &Ui) -> Result<()> {
        collective_host::trust(&host_data(self.data)?, &self.publisher, self.key)?;
        ui.hint(format!("this host now believes key {} of publisher \"{}\"", self.key.short(), self.publisher));
        Ok(())
    }
}

fn host_data(data: Option<PathBuf>) -> Result<PathBuf> {
    let data = data.unwrap_or_else(|| default_data().join("host"));
    create_folder(&data, 0o711).with_context(|| format!("cannot create {}", data.display()))?;
    data.canonicalize().with_context(|| format!("cannot enter {}", data.display()))
}

/// This machine's name, as far as it is one for a host.
pub fn machine_name() -> Result<Name> {
    let node = rustix::system::uname();
    let text = node.nodename().to_string_lossy().to_lowercase();
    let text = text.split('.').next().unwrap_or_default().to_owned();
    text.parse().map_err(|_| anyhow!("this machine's name \"{text}\" is no name for a host; choose one with --name"))
}

async fn run_until_told(ui: &Ui, data: PathBuf, options: HostOptions) -> Result<()> {
    let stop = super::up::stop_signal()?;
    tokio::select! {
        result = serve_host(ui, data, options) => result,
        () = stop => {
            ui.hint("going down; guests go on, and are adopted at the next start");
            Ok(())
        }
    }
}

/// Runs the host daemon in `data`.
pub async fn serve_host(ui: &Ui, data: PathBuf, options: HostOptions) -> Result<()> {
    let path = credentials::path(&data);
    let credentials = Credentials::load(&path)?
        .ok_or_else(|| anyhow!("{} has not joined a plane; use `collective host join`", data.display()))?;
    let client = Arc::new(credentials.client()?);
    let qemu = collective_vmm::find_qemu().await?;
    let accelerator = if options.tcg {
        collective_vmm::Accelerator::Tcg { why: "this host was told not to use KVM".to_owned() }
    } else {
        tokio::task::spawn_blocking(collective_vmm::detect_accelerator).await?
    };
    let mut platform = collective_runner::platform(&qemu, &accelerator, collective_vmm::Processor::Host);
    let mut warnings: Vec<String> = qemu.warning.iter().cloned().collect();
    let accelerator = match accelerator {
        collective_vmm::Accelerator::Kvm => {
            match collective_vmm::portable_processors(&qemu.path).await {
                Ok(portable) => platform.portable = portable.into_iter().map(str::to_owned).collect(),
                Err(why) => warnings.push(format!(
                    "{why}; machines are started with all that this host's processor has, and go on only where it is the same"
                )),
            }
            "kvm".to_owned()
        }
        collective_vmm::Accelerator::Tcg { why } => format!("tcg: {why}"),
    };
    platform.check_choice(options.processor.as_deref()).map_err(|why| anyhow!(why))?;
    if !rustix::process::geteuid().is_root() {
        warnings.push(
            "not root: all instances run as the same user, so one that breaks out of QEMU reaches the others".into(),
        );
    } else if let Some(closed) = collective_host::first_closed_folder(&data) {
        return Err(anyhow!(
            "QEMU runs as a user of its own for each instance, and {} keeps it out; choose another --data, or `chmod o+x` it",
            closed.display()
        ));
    }
    warnings.iter().for_each(|warning| ui.hint(format!("warning: {warning}")));
    let plane = match &credentials.address {
        // A name that cannot be looked up now cannot be reached by a guest under that name either.
        Some(address) => tokio::net::lookup_host(address).await.map(Iterator::collect).unwrap_or_default(),
        None => Vec::new(),
    };
    let runner = vec![std::env::current_exe()?.into(), "runner".into()];
    let config = HostConfig {
        data,
        runner,
        credentials: path,
        plane,
        force_tcg: options.tcg,
        platform: Some(platform),
        processor: options.processor,
        accelerator,
        warnings,
        cache_budget: options.cache_size.0,
        memory: options.memory.map(|size| size.0),
    };
    Ok(collective_host::run(config, client).await?)
}

/// Let other machines and users in
#[derive(Debug, clap::Args)]
pub struct TokenCommand {
    #[command(subcommand)]
    command: TokenVerb,
}

#[derive(Debug, clap::Subcommand)]
enum TokenVerb {
    Create(CreateToken),
}

/// Print a new token; it is not shown again
///
/// Example: collective token create
#[derive(Debug, clap::Args)]
struct CreateToken {
    /// join: for one host, once. user: to use this plane from another machine
    #[arg(long, default_value = "join", value_parser = ["join", "user"])]
    kind: String,
}

impl TokenCommand {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let TokenVerb::Create(create) = self.command;
        let view: TokenView = client.post("/v1/tokens", &NewToken { kind: create.kind.clone() }).await?;
        ui.data(&view, |ui| ui.line(&view.token));
        ui.hint(match create.kind.as_str() {
            "join" => "on the other machine: collective host join TOKEN --name NAME",
            _ => "on the other machine: export COLLECTIVE_TOKEN=TOKEN",
        });
        Ok(())
    }
}

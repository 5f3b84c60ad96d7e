//! `console`, `ssh`, `cp`, `tunnel`: from here into a guest, wherever it runs. Hosts dial out to the plane, so nothing has
//! to be published or opened for it.

use std::io::{IsTerminal, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use collective_api::{Client, TunnelTarget};
use collective_keys::SigningKey;
use collective_model::{HealthState, Name, State};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::connect::{Connect, config_dir};
use crate::ui::Ui;

/// Ctrl-], which ends a console as it ends telnet and virsh.
const ESCAPE: u8 = 0x1d;

/// A guest that went on takes up its identity within this time.
const MEET_LIMIT: Duration = Duration::from_secs(30);
const MEET_AGAIN: Duration = Duration::from_millis(500);
/// A guest that was started just now is waited for so long; under emulation a boot takes a minute.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
/// An SSH server greets at once.
const GREETING_LIMIT: Duration = Duration::from_secs(5);

/// Opens a tunnel into the instance `name`.
pub async fn tunnel(client: &Client, name: &Name, target: &TunnelTarget) -> Result<collective_api::Tunnel> {
    let opened = client.tunnel(&format!("/v1/instances/{name}/tunnel"), target).await;
    opened.with_context(|| format!("cannot reach into {name}"))
}

/// Sit at an instance's serial console; Ctrl-] leaves it
///
/// Example: collective console n
#[derive(Debug, clap::Args)]
pub struct Console {
    name: Name,
    /// Take it over from whoever is there
    #[arg(long)]
    force: bool,
}

impl Console {
    pub async fn run(self, ui: &Ui, client: &Client) -> Result<()> {
        let stream = tunnel(client, &self.name, &TunnelTarget::Console { force: self.force }).await?;
        let raw = RawTerminal::enter()?;
        if raw.is_some() {
            ui.hint(format!("console of {}; Ctrl-] leaves it\r", self.name));
        }
        let (from_guest, to_guest) = tokio::io::split(stream);
        let ending = tokio::select! {
            typed = type_into(tokio::io::stdin(), to_guest, raw.is_some()) => typed.map(|()| None),
            shown = show(from_guest, tokio::io::stdout()) => shown.map(|()| Some("the console was closed: the guest has stopped, or somebody took it over")),
        };
        drop(raw);
        if let Some(why) = ending? {
            ui.hint(format!("\n{why}"));
        }
        Ok(())
    }
}

/// The terminal passes every key on, until this is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// Nothing, where standard input is no terminal.
    fn enter() -> Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin).context("cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("cannot change the terminal's settings")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Until the input ends or, at a terminal, the escape key is pressed.
async fn type_into(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    at_terminal: bool,
) -> std::io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        let read = from.read(&mut buffer).await?;
        let typed = &buffer[..read];
        let escape = typed.iter().position(|byte| at_terminal && *byte == ESCAPE);
        to.write_all(&typed[..escape.unwrap_or(read)]).await?;
        to.flush().await?;
        if read == 0 || escape.is_some() {
            return Ok(());
        }
    }
}

async fn show(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> std::io::Result<()> {
    let mut buffer = [0; 16384];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..read]).await?;
        to.flush().await?;
    }
}

/// Connect standard input and output to a TCP port of the guest, published or not
///
/// Example: collective tunnel n 80
#[derive(Debug, clap::Args)]
pub struct Tunnel {
    name: Name,
    #[arg(value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
}

impl Tunnel {
    pub async fn run(self, client: &Client) -> Result<()> {
        let stream = tunnel(client, &self.name, &TunnelTarget::Port { port: self.port }).await?;
        let (from_guest, mut to_guest) = tokio::io::split(stream);
        let sending = tokio::spawn(async move {
            type_into(tokio::io::stdin(), &mut to_guest, false).await?;
            // The guest may answer only when it has seen the end.
            to_guest.shutdown().await
        });
        show(from_guest, tokio::io::stdout()).await?;
        sending.abort();
        Ok(())
    }
}

/// Log in to an instance by SSH
///
/// USER defaults to the account that the appliance names, else root. No port has to be published; the key is the one
/// that every launch from here puts into the instance, beside your own.
///
/// Example: collective ssh n uptime
#[derive(Debug, clap::Args)]
pub struct Ssh {
    /// [USER@]NAME
    #[arg(value_name = "[USER@]NAME")]
    target: String,
    /// A command, in place of a shell; options for ssh come first
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Ssh {
    pub async fn run(self, connect: &Connect) -> Result<()> {
        let login = Login::find(&connect.client()?, &self.target).await?;
        login.meet(connect)?;
        let mut ssh = login.command("ssh", connect)?;
        // What begins with a dash is for ssh itself.
        let options = self.command.iter().take_while(|word| word.starts_with('-')).count();
        ssh.args(&self.command[..options]).arg(login.destination()).args(&self.command[options..]);
        become_it(ssh)
    }
}

/// Copy files into an instance or out of it, by SSH
///
/// One of SOURCE and TARGET is [USER@]NAME:PATH.
///
/// Example: collective cp notes.txt n:/data/
#[derive(Debug, clap::Args)]
pub struct Cp {
    /// Folders with everything in them
    #[arg(long, short)]
    recursive: bool,
    /// Files here, or NAME:PATH there; the last one is the target
    #[arg(required = true, num_args = 2.., value_name = "PATH")]
    paths: Vec<String>,
}

impl Cp {
    pub async fn run(self, connect: &Connect) -> Result<()> {
        let remote: Vec<_> = self.paths.iter().filter_map(|path| there(path)).collect();
        let Some((target, _)) = remote.first() else {
            bail!("neither side is in an instance; write NAME:PATH for the one that is");
        };
        if remote.iter().any(|(other, _)| other != target) {
            bail!("one copy goes to or from one instance; copy to this machine first");
        }
        let login = Login::find(&connect.client()?, target).await?;
        login.meet(connect)?;
        let mut scp = login.command("scp", connect)?;
        scp.args(self.recursive.then_some("-r"));
        for path in &self.paths {
            match there(path) {
                Some((_, inside)) => scp.arg(format!("{}:{inside}", login.destination())),
                // So that a name with a colon is not taken for a machine.
                None if path.starts_with(['/', '.']) => scp.arg(path),
                None => scp.arg(format!("./{path}")),
            };
        }
        become_it(scp)
    }
}

/// `[USER@]NAME:PATH`; a path here has a slash before its first colon, or none.
fn there(path: &str) -> Option<(&str, &str)> {
    path.split_once(':').filter(|(target, _)| !target.contains('/') && !target.is_empty())
}

/// Waits for the SSH server of a guest that was started just now; of one that does not answer, ssh itself says more. Returns the
/// host key that its host tells.
async fn await_server(client: &Client, name: &Name, port: u16) -> Result<Option<String>> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        let answers = tokio::time::timeout(GREETING_LIMIT, greets(client, name, port)).await.unwrap_or(false);
        let view = super::instance(client, name).await?;
        let comes_up = view.spec.on
            && view.observed.as_ref().is_none_or(|seen| match seen.state {
                State::Starting | State::Resuming => true,
                // Its host has not come to it.
                State::Stopped => seen.last_stop.is_none() || seen.power_serial < view.spec.power_serial,
                _ => seen.health == HealthState::Waiting,
            });
        if answers || !comes_up || begun.elapsed() > BOOT_LIMIT {
            return Ok(view.observed.and_then(|seen| seen.ssh_host_key));
        }
        if !std::mem::replace(&mut told, true) {
            eprintln!("{name} was started just now; waiting for its SSH server");
        }
        tokio::time::sleep(MEET_AGAIN).await;
    }
}

/// Whether an SSH server greets there (RFC 4253, section 4.2).
async fn greets(client: &Client, name: &Name, port: u16) -> bool {
    let mut greeting = [0; 4];
    match tunnel(client, name, &TunnelTarget::Port { port }).await {
        Ok(mut stream) => stream.read_exact(&mut greeting).await.is_ok() && &greeting == b"SSH-",
        Err(_) => false,
    }
}

/// Whom to be in which guest.
struct Login {
    name: Name,
    id: String,
    user: String,
    port: u16,
    /// What the guest should show, as its host says.
    host_key: Option<String>,
}

impl Login {
    async fn find(client: &Client, target: &str) -> Result<Self> {
        let (user, name) = match target.split_once('@') {
            Some((user, name)) => (Some(user), name),
            None => (None, target),
        };
        if user.is_some_and(|user| user.is_empty() || user.starts_with('-')) {
            bail!("\"{target}\" is not [USER@]NAME");
        }
        let name: Name = name.parse()?;
        let view = super::instance(client, &name).await?;
        let version = view.observed.as_ref().map_or(view.spec.version, |seen| seen.version);
        let manifest = super::catalogue::manifest_of(client, &version).await?;
        let (account, port) = manifest.ssh.map_or(("root".into(), 22), |ssh| (ssh.user.to_string(), ssh.port));
        let user = user.map_or(account, str::to_owned);
        let host_key = await_server(client, &name, port).await?;
        Ok(Self { name, id: view.spec.id.to_string(), user, port, host_key })
    }

    /// `ssh` and `scp` look the name up nowhere: the tunnel knows the way, and keys are kept by the instance's id.
    fn destination(&self) -> String {
        format!("{}@{}", self.user, self.name)
    }

    /// The name of the guest in ssh's list of keys.
    fn alias(&self) -> String {
        format!("collective-{}", self.id)
    }

    /// Before the first login: has ssh believe the key of the guest's seed disk. A guest that went on as another one shows that one's
    /// for some seconds, and until then has not got the keys of users either.
    fn meet(&self, connect: &Connect) -> Result<()> {
        let Some(key) = &self.host_key else { return Ok(()) };
        let entry = format!("{} {key}\n", self.alias());
        if std::fs::read_to_string(known_hosts()).is_ok_and(|known| known.contains(&entry)) {
            return Ok(());
        }
        let expected = tempfile::NamedTempFile::new().context("cannot make a file for ssh")?;
        std::fs::write(expected.path(), &entry)?;
        let begun = Instant::now();
        while begun.elapsed() < MEET_LIMIT {
            // Of an option the first value counts, so these have to come before the usual ones.
            let usual: Vec<_> = self.command("ssh", connect)?.get_args().map(ToOwned::to_owned).collect();
            let mut ask = Command::new("ssh");
            connect.pass_on(&mut ask);
            let known = format!("UserKnownHostsFile={}", path_option(expected.path())?);
            for option in [&known, "StrictHostKeyChecking=yes", "BatchMode=yes", "PreferredAuthentications=none"] {
                ask.arg("-o").arg(option);
            }
            let asked = ask.args(usual).arg(self.destination()).arg("true").output();
            let said = asked.context("cannot run ssh; install the package openssh-client")?;
            if !String::from_utf8_lossy(&said.stderr).contains("Host key verification failed") {
                return self.remember(&entry);
            }
            std::thread::sleep(MEET_AGAIN);
        }
        eprintln!(
            "{} shows another host key than that of its seed disk; it is believed as any other server's",
            self.name
        );
        Ok(())
    }

    /// In place of what was remembered of it before.
    fn remember(&self, entry: &str) -> Result<()> {
        let path = known_hosts();
        if path.exists() {
            let mut forget = Command::new("ssh-keygen");
            forget.args(["-R", &self.alias(), "-f"]).arg(&path).stdout(Stdio::null()).stderr(Stdio::null());
            forget.status().context("cannot run ssh-keygen; install the package openssh-client")?;
        }
        let file = std::fs::File::options().create(true).append(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(entry.as_bytes()));
        written.with_context(|| format!("cannot keep the host key in {}", path.display()))
    }

    fn command(&self, program: &str, connect: &Connect) -> Result<Command> {
        let us = std::env::current_exe().context("cannot find this program's own file")?;
        let us = us.to_str().context("this program's path is not UTF-8, and ssh cannot call it")?;
        let mut command = Command::new(program);
        connect.pass_on(&mut command);
        let way = format!("{} tunnel {} {}", quote(us), self.name, self.port);
        let known_hosts = path_option(&known_hosts())?;
        // Naming one key hides the usual ones; those that do not exist are passed over.
        for usual in ["id_ed25519", "id_ecdsa", "id_rsa"] {
            command.arg("-o").arg(format!("IdentityFile=~/.ssh/{usual}"));
        }
        for option in [
            // % begins a token of ssh.
            format!("ProxyCommand={}", way.replace('%', "%%")),
            format!("HostKeyAlias={}", self.alias()),
            format!("UserKnownHostsFile={known_hosts}"),
            "StrictHostKeyChecking=accept-new".into(),
            format!("IdentityFile={}", path_option(&own_key()?.0)?),
            "LogLevel=ERROR".into(),
        ] {
            command.arg("-o").arg(option);
        }
        Ok(command)
    }
}

/// Where ssh keeps the keys of guests.
fn known_hosts() -> PathBuf {
    config_dir().join("known_hosts")
}

/// For the shell that ssh starts the tunnel with.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn path_option(path: &std::path::Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains('"'));
    let text = text.with_context(|| format!("ssh cannot use the path {}", path.display()))?;
    Ok(format!("\"{}\"", text.replace('%', "%%")))
}

/// Ends this program and goes on as `command`, so that signals and the terminal are its own.
fn become_it(mut command: Command) -> Result<()> {
    let program = command.get_program().to_owned();
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}; install the package openssh-client", program.display()))
}

/// The key that launches from here put into every instance: its private file, which ssh reads, and its public text.
/// Made at first use.
pub fn own_key() -> Result<(PathBuf, String)> {
    let folder = config_dir();
    // Two launches at the same time make one key, and write the same file.
    let (key, _) = SigningKey::load_or_create(&folder.join("ssh.key"))?;
    let (key, path) = (key.to_ssh(), folder.join("id_ed25519"));
    if std::fs::read_to_string(&path).ok().as_ref() != Some(&key.private) {
        let write = || -> std::io::Result<()> {
            // Readable by its owner only.
            let mut file = tempfile::NamedTempFile::new_in(&folder)?;
            file.write_all(key.private.as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().with_context(|| format!("cannot keep an SSH key in {}", folder.display()))?;
    }
    Ok((path, key.public.trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_there_and_here() {
        assert_eq!(there("n:/data/"), Some(("n", "/data/")));
        assert_eq!(there("root@n:x:y"), Some(("root@n", "x:y")));
        for here in ["x", "./a:b", "/tmp/a:b", ":x", ""] {
            assert_eq!(there(here), None, "{here}");
        }
    }

    #[test]
    fn words_for_the_shell_stay_one_word() {
        assert_eq!(quote("/a b/it's"), r"'/a b/it'\''s'");
    }

    #[tokio::test]
    async fn the_escape_key_leaves_only_at_a_terminal() {
        let input = b"ls\n\x1drm\n";
        let mut sent = Vec::new();
        type_into(&input[..], &mut sent, true).await.unwrap();
        assert_eq!(sent, b"ls\n");
        sent.clear();
        type_into(&input[..], &mut sent, false).await.unwrap();
        assert_eq!(sent, input);
    }
}

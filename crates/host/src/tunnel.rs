//! The host's end of tunnels: it reaches the target first, and then dials the plane, where the user waits.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use collective_api::{Client, ClientError, Tunnel, TunnelAnswer, TunnelOrder, TunnelTarget};
use collective_model::run::Request;
use collective_model::{Name, State, TunnelId};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle};
use tokio::time::{sleep, timeout};

use crate::context::lock;
use crate::instance::{Command, Instance};
use crate::link;
use crate::report::read_end;

/// How much of what the console said before is shown to whoever comes, in bytes.
const CONSOLE_PAST: u64 = 2048;
/// How far back a log is searched for lines, in bytes.
const LOG_PAST: u64 = 256 << 10;
/// How much of a log is read for its last line, in bytes.
const LAST_WORDS: u64 = 2048;
/// How often a growing log is looked at.
const LOG_PAUSE: Duration = Duration::from_millis(200);
/// A user who takes nothing for this long has gone, and the instance is needed.
const STALLED: Duration = Duration::from_secs(60);

/// How an instance is reached.
#[derive(Clone)]
pub(crate) struct Place {
    /// Of the task that alone changes its record.
    pub inbox: mpsc::Sender<Command>,
    /// Where its runner and QEMU listen.
    pub run_dir: PathBuf,
    pub console: Arc<Console>,
}

/// Who sits at an instance's console.
#[derive(Default)]
pub(crate) struct Console(Mutex<Option<AbortHandle>>);

impl Console {
    /// Begins to serve somebody; throws out who is there, if asked to, and else begins nothing.
    fn sit<T: Send + 'static>(
        &self,
        force: bool,
        serve: impl Future<Output = T> + Send + 'static,
    ) -> Result<JoinHandle<T>, String> {
        let mut seat = lock(&self.0);
        if let Some(other) = seat.as_ref().filter(|other| !other.is_finished()) {
            if !force {
                return Err("somebody is at this console already; take it over with --force".into());
            }
            other.abort();
        }
        let task = tokio::spawn(serve);
        *seat = Some(task.abort_handle());
        Ok(task)
    }
}

/// The way back to the user who waits.
#[derive(Clone)]
pub(crate) struct Dial {
    client: Arc<Client>,
    id: TunnelId,
}

impl std::fmt::Debug for Dial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "tunnel {}", self.id)
    }
}

impl Dial {
    /// The target is there.
    pub(crate) async fn connect(&self) -> Result<Tunnel, ClientError> {
        self.client.tunnel(&format!("/v1/hosts/self/tunnels/{}", self.id), &TunnelAnswer::default()).await
    }

    pub(crate) async fn refuse(&self, why: String) {
        let answer = TunnelAnswer { refused: Some(why) };
        let told: Result<(), _> = self.client.post(&format!("/v1/hosts/self/tunnels/{}", self.id), &answer).await;
        if let Err(error) = told {
            tracing::debug!(%error, "a user is not told why a tunnel was refused");
        }
    }
}

/// Opens a tunnel and keeps it to its end.
pub(crate) async fn open(client: Arc<Client>, place: Place, order: TunnelOrder) {
    let dial = Dial { client, id: order.id };
    let served = match order.target {
        TunnelTarget::Port { port } => serve_port(&place.run_dir, port, &dial).await,
        TunnelTarget::Console { force } => {
            match place.console.sit(force, serve_console(place.run_dir.clone(), dial.clone())) {
                // An error of the task itself is that it was thrown out.
                Ok(task) => task.await.unwrap_or(Ok(())),
                Err(why) => Err(why),
            }
        }
        TunnelTarget::Log { lines } => serve_log(&place.run_dir, lines, &dial).await,
        TunnelTarget::Arrival { operation, spec } => {
            let gone = |_| "the instance is being deleted there".to_owned();
            place.inbox.send(Command::Visit { operation, spec, tunnel: dial.clone() }).await.map_err(gone)
        }
        TunnelTarget::Disk { disk } => {
            let gone = |_| "the instance is being deleted".to_owned();
            place.inbox.send(Command::SendDisk { disk, tunnel: dial.clone() }).await.map_err(gone)
        }
    };
    if let Err(why) = served {
        dial.refuse(why).await;
    }
}

/// What goes wrong after the dial is seen by the user as the end of the stream.
fn ended(result: std::io::Result<impl Sized>) {
    if let Err(error) = result {
        tracing::debug!(%error, "a tunnel ended");
    }
}

fn no_plane(error: ClientError) -> String {
    format!("the host cannot dial the plane: {error}")
}

async fn serve_port(run_dir: &Path, port: u16, dial: &Dial) -> Result<(), String> {
    let asked = link::ask(run_dir, &Request::Forward { port }).await;
    let status = asked.map_err(|error| match error {
        link::LinkError::Silent(_) => "it does not run; start it first".into(),
        link::LinkError::Refused(why) => why,
    })?;
    if !status.ports_open {
        return Err("its new version has not proved itself yet, and ports are closed until then".into());
    }
    let to = status.forwards.iter().find(|(guest, _)| *guest == port);
    let (_, to) = to.ok_or_else(|| format!("its port {port} cannot be reached"))?;
    let guest = TcpStream::connect(to).await.and_then(|guest| guest.set_nodelay(true).map(|()| guest));
    let mut guest = guest.map_err(|e| format!("its port {port} cannot be reached: {e}"))?;
    let mut user = dial.connect().await.map_err(no_plane)?;
    ended(copy_bidirectional(&mut user, &mut guest).await);
    Ok(())
}

async fn serve_console(run_dir: PathBuf, dial: Dial) -> Result<(), String> {
    let guest = UnixStream::connect(run_dir.join("q/serial.sock")).await;
    let mut guest = guest.map_err(|_| "it does not run; start it first".to_owned())?;
    let (past, _) = read_end(&run_dir.join("q/serial.log"), CONSOLE_PAST).unwrap_or_default();
    let mut user = dial.connect().await.map_err(no_plane)?;
    ended(user.write_all(&past).await);
    ended(copy_bidirectional(&mut user, &mut guest).await);
    Ok(())
}

async fn serve_log(run_dir: &Path, lines: u32, dial: &Dial) -> Result<(), String> {
    let path = run_dir.join("q/serial.log");
    let (past, mut at) = read_end(&path, LOG_PAST).map_err(|e| format!("cannot read the console's log: {e}"))?;
    let from = past.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').nth(lines as usize);
    let mut user = dial.connect().await.map_err(no_plane)?;
    let mut part = past[from.map_or(0, |(index, _)| index + 1)..].to_vec();
    let mut end = [0];
    loop {
        if user.write_all(&part).await.is_err() {
            return Ok(());
        }
        // A user who went away is noticed at once, also where the guest is silent.
        tokio::select! {
            read = user.read(&mut end) => if !matches!(read, Ok(1..)) { return Ok(()) },
            () = sleep(LOG_PAUSE) => {}
        }
        part.clear();
        let Ok(mut file) = tokio::fs::File::open(&path).await else { continue };
        let length = file.metadata().await.map_or(0, |meta| meta.len());
        // Shorter than before: it was begun anew.
        at = if length < at { 0 } else { at };
        if file.seek(std::io::SeekFrom::Start(at)).await.is_ok()
            && file.take(LOG_PAST).read_to_end(&mut part).await.is_ok()
        {
            at += part.len() as u64;
        }
    }
}

impl Instance {
    /// Sends a disk; until its end the instance does nothing else, so that nothing changes the disk.
    pub(crate) async fn send_disk(&mut self, disk: &Name, tunnel: Dial) {
        if let Err(why) = self.try_send_disk(disk, &tunnel).await {
            tunnel.refuse(why).await;
        }
    }

    async fn try_send_disk(&mut self, disk: &Name, tunnel: &Dial) -> Result<(), String> {
        if !matches!(self.record.state, State::Stopped | State::Failed) || self.record.disks.is_empty() {
            return Err(format!("a disk is taken from an instance that is off, and it is {}", self.record.state));
        }
        self.bring_rest(None).await?;
        self.describe_disks().await?;
        let mut sender = link::spawn_sender(&self.context.config.runner, &self.run_dir, disk)
            .map_err(|e| format!("cannot read its disk: {e}"))?;
        let Some(mut content) = sender.stdout.take() else { return Err("cannot read its disk".into()) };
        let mut buffer = vec![0; 1 << 16];
        // The first bytes prove that the disk can be opened.
        let mut length = content.read(&mut buffer).await.map_err(|e| e.to_string())?;
        if length == 0 {
            // The sender has ended, and its last words are in the log.
            let (log, _) = read_end(&self.run_dir.join("runner.log"), LAST_WORDS).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            let said = log.lines().last().unwrap_or("no reason is known");
            return Err(said.trim_start_matches("collective: ").to_owned());
        }
        let mut user = tunnel.connect().await.map_err(no_plane)?;
        while length > 0 {
            match timeout(STALLED, user.write_all(&buffer[..length])).await {
                Ok(Ok(())) => {}
                _ => break,
            }
            length = content.read(&mut buffer).await.unwrap_or(0);
        }
        // The sender is killed with its handle, if it has not ended.
        ended(user.shutdown().await);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[tokio::test]
    async fn a_console_is_for_one() {
        let console = Console::default();
        let first = console.sit(false, std::future::pending::<()>()).unwrap();
        let begun = Arc::new(AtomicBool::new(false));
        let refused = console.sit(false, {
            let begun = begun.clone();
            async move { begun.store(true, Ordering::Relaxed) }
        });
        assert!(refused.unwrap_err().contains("--force"));
        let second = console.sit(true, std::future::pending::<()>()).unwrap();
        assert!(first.await.unwrap_err().is_cancelled());
        assert!(!begun.load(Ordering::Relaxed), "who is refused reaches nothing");
        second.abort();
        let _ = second.await;
        console.sit(false, async {}).unwrap().await.unwrap();
    }
}

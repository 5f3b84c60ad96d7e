//! The runner's socket: one request per line, one answer per line.

use std::io;
use std::sync::Arc;

use collective_model::run::{MAX_MESSAGE_BYTES, Phase, Reply, Request, SaveOrder, SaveStatus};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use crate::line::Line;
use crate::state::{Order, Shared};
use crate::{leave, lifeline, merge};

/// Serves daemons until the runner ends.
pub(crate) async fn serve(listener: UnixListener, shared: Arc<Shared>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => _ = tokio::spawn(converse(stream, shared.clone())),
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection from the daemon");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, shared: Arc<Shared>) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    loop {
        let mut line = Vec::new();
        (&mut reader).take(MAX_MESSAGE_BYTES as u64).read_until(b'\n', &mut line).await?;
        if line.is_empty() {
            return Ok(());
        }
        let reply = match serde_json::from_slice(&line) {
            Ok(Request::Leave { epoch, whole, only_measure, keep }) => {
                let what = leave::What { epoch, whole, only_measure, keep };
                return hand_over(&shared, Line { reader, writer }, |line| Order::Leave { what, line }).await;
            }
            Ok(Request::Arrive) => {
                return hand_over(&shared, Line { reader, writer }, |line| Order::Arrive { line }).await;
            }
            Ok(Request::Lifeline) => {
                lifeline::give(&shared, &mut writer).await?;
                continue;
            }
            Ok(request) => answer(request, &shared).await,
            Err(error) => Reply::Error { message: format!("not a request that this runner knows: {error}") },
        };
        let mut bytes = serde_json::to_vec(&reply)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await?;
    }
}

/// The machine has the connection from here on.
async fn hand_over(shared: &Shared, mut line: Line, to: impl FnOnce(Line) -> Order) -> io::Result<()> {
    let mut bytes = serde_json::to_vec(&Reply::Status(Box::new(shared.snapshot())))?;
    bytes.push(b'\n');
    line.writer.write_all(&bytes).await?;
    shared.orders.send(to(line)).await.map_err(|_| io::Error::other("the machine has ended"))
}

async fn answer(request: Request, shared: &Arc<Shared>) -> Reply {
    let done = match request {
        Request::Status => Ok(()),
        Request::OpenPorts => open_ports(shared),
        Request::Forward { port } => forward(shared, port).await,
        Request::Stop { limit_ms } => order(shared, Order::Stop { limit_ms }).await,
        Request::PowerOff => order(shared, Order::PowerOff).await,
        Request::Save(what) => save(shared, what).await,
        Request::Stay => order(shared, Order::Stay).await,
        Request::Hold => order(shared, Order::Hold).await,
        Request::Lifeline => Err("descriptors come with a message of their own".into()),
        // These have the whole connection.
        Request::Leave { .. } | Request::Arrive => Err("this is the last thing that is asked on a connection".into()),
        Request::Merge(what) => merge::begin(shared, what),
    };
    match done {
        Ok(()) => Reply::Status(Box::new(shared.snapshot())),
        Err(message) => Reply::Error { message },
    }
}

async fn order(shared: &Shared, order: Order) -> Result<(), String> {
    shared.orders.send(order).await.map_err(|_| "the machine has ended".into())
}

async fn save(shared: &Shared, what: SaveOrder) -> Result<(), String> {
    {
        let mut status = shared.status();
        if status.phase != Phase::Running {
            return Err("there is no running machine to save".into());
        }
        if let Some(save) = &status.save {
            if save.number == what.number {
                return Ok(());
            }
            if save.outcome.is_none() {
                return Err("it is being saved already".into());
            }
        }
        status.save = Some(SaveStatus { number: what.number, written: 0, outcome: None });
    }
    order(shared, Order::Save(what)).await
}

fn open_ports(shared: &Shared) -> Result<(), String> {
    let forwards = shared.status().forwards.clone();
    if shared.gate.is_open() { Ok(()) } else { shared.gate.open(&forwards) }
}

async fn forward(shared: &Shared, port: u16) -> Result<(), String> {
    {
        let status = shared.status();
        if status.phase != Phase::Running {
            return Err("the guest does not run yet; try again in a moment".into());
        }
        if status.forwards.iter().any(|(guest, _)| *guest == port) {
            return Ok(());
        }
    }
    let (done, answer) = oneshot::channel();
    order(shared, Order::Forward { port, done }).await?;
    answer.await.unwrap_or_else(|_| Err("the machine has ended".into()))
}

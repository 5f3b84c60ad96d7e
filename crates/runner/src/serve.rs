//! The runner's socket: one request per line, one answer per line.

use std::io;
use std::sync::Arc;

use collective_model::run::{MAX_MESSAGE_BYTES, Reply, Request};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use crate::state::{Order, Shared};

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
            Ok(request) => answer(request, &shared).await,
            Err(error) => Reply::Error { message: format!("not a request that this runner knows: {error}") },
        };
        let mut bytes = serde_json::to_vec(&reply)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await?;
    }
}

async fn answer(request: Request, shared: &Shared) -> Reply {
    let order = match request {
        Request::Status => None,
        Request::OpenPorts => {
            let forwards = shared.status().forwards.clone();
            if !shared.gate.is_open()
                && let Err(message) = shared.gate.open(&forwards)
            {
                return Reply::Error { message };
            }
            None
        }
        Request::Stop { limit_ms } => Some(Order::Stop { limit_ms }),
        Request::PowerOff => Some(Order::PowerOff),
    };
    if let Some(order) = order
        && shared.orders.send(order).await.is_err()
    {
        return Reply::Error { message: "the machine has ended".into() };
    }
    Reply::Status(Box::new(shared.snapshot()))
}

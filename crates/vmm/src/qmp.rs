//! A thin client of QMP, QEMU's monitor protocol: one JSON object per line, both ways.
//!
//! Own and small, because what matters here is what libraries leave out: a bound on every line and queue, a limit
//! on every wait, events that we do not know, and errors that carry QEMU's own words. Protocol:
//! QEMU, `docs/interop/qmp-spec.rst`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncRead, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

/// Longest line accepted from the other side; QEMU's longest answers (its schema) have some 200 KB.
const LINE_LIMIT: usize = 16 << 20;
/// Events kept for a reader that is behind; more are dropped and counted.
const EVENT_LIMIT: usize = 1024;
/// Longest wait for the answer of a command. A thread of QEMU that touches memory which comes over a thin link holds up all.
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// Why a command to QEMU gave no result.
#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// QEMU answered with an error.
    #[error("QEMU refused {command:?}: {description} ({class})")]
    Refused {
        /// The QMP command.
        command: String,
        /// QEMU's class of the error, such as `GenericError`.
        class: String,
        /// QEMU's own words.
        description: String,
    },
    /// The connection is gone; the machine has most likely ended.
    #[error(
        "the monitor connection to QEMU was lost before {command:?} was answered: {reason}; ask how the machine ended, or look into its qemu.log"
    )]
    Lost {
        /// The QMP command.
        command: String,
        /// Why the connection ended.
        reason: String,
    },
    /// No answer came in time.
    #[error(
        "QEMU did not answer {command:?} in {seconds} s; it may be stuck on slow storage: try again, or kill the machine"
    )]
    Timeout {
        /// The QMP command.
        command: String,
        /// How long we waited.
        seconds: u64,
    },
    /// The other side does not speak QMP.
    #[error("the monitor connection to QEMU could not be opened: {reason}")]
    Handshake {
        /// What was received instead.
        reason: String,
    },
}

/// An event as it came: its name and its data (an empty object when there is none).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RawEvent {
    pub name: String,
    pub data: Value,
}

/// Events of one connection. Its end is the end of the connection.
pub(crate) type RawEvents = mpsc::Receiver<RawEvent>;

type Answer = Result<Value, QmpError>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// One monitor connection. Commands may be issued concurrently.
pub(crate) struct Client {
    writer: AsyncMutex<Writer>,
    shared: Arc<Shared>,
    next_id: AtomicU64,
    reader: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    /// Waiting commands by id, or why the connection ended.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, (String, oneshot::Sender<Answer>)>,
    lost: Option<String>,
}

impl Client {
    /// Reads the greeting, enables the command mode, and begins to pass on events.
    pub(crate) async fn connect<S>(stream: S) -> Result<(Client, RawEvents), QmpError>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (reader, writer) = tokio::io::split(stream);
        let mut reader = BufReader::new(reader);
        let greeting = read_line(&mut reader).await.map_err(|reason| QmpError::Handshake { reason })?;
        if !greeting.get("QMP").is_some_and(Value::is_object) {
            return Err(QmpError::Handshake { reason: format!("expected a greeting, got {}", excerpt(&greeting)) });
        }
        let shared = Arc::new(Shared::default());
        let (sender, events) = mpsc::channel(EVENT_LIMIT);
        let reader = tokio::spawn(read_all(reader, shared.clone(), sender));
        let writer = AsyncMutex::new(Box::new(writer) as Writer);
        let client = Client { writer, shared, next_id: AtomicU64::new(1), reader };
        client.execute("qmp_capabilities", json!({})).await?;
        Ok((client, events))
    }

    /// Runs one command and waits for its answer, at most [`COMMAND_LIMIT`].
    pub(crate) async fn execute(&self, command: &str, arguments: Value) -> Answer {
        self.execute_within(command, arguments, COMMAND_LIMIT).await
    }

    pub(crate) async fn execute_within(&self, command: &str, arguments: Value, limit: Duration) -> Answer {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let answer = self.shared.register(id, command)?;
        let exchange = async {
            self.send(id, command, arguments).await?;
            answer.await.unwrap_or_else(|_| Err(lost(command, "the client was closed")))
        };
        tokio::time::timeout(limit, exchange).await.unwrap_or_else(|_| {
            self.shared.forget(id);
            Err(QmpError::Timeout { command: command.to_owned(), seconds: limit.as_secs() })
        })
    }

    async fn send(&self, id: u64, command: &str, arguments: Value) -> Result<(), QmpError> {
        let mut line = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        line.push('\n');
        let mut writer = self.writer.lock().await;
        // A command that is given up half-written would garble the next one, so a failed or cancelled write shows in
        // the answer of QEMU to the next line at worst; QEMU then reports a JSON error and goes on.
        let written = match writer.write_all(line.as_bytes()).await {
            Ok(()) => writer.flush().await,
            Err(error) => Err(error),
        };
        written.map_err(|error| {
            self.shared.forget(id);
            lost(command, &self.shared.reason().unwrap_or_else(|| error.to_string()))
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // No code that holds the lock can panic half-way through a change, so the state is sound even if poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, id: u64, command: &str) -> Result<oneshot::Receiver<Answer>, QmpError> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        if let Some(reason) = &state.lost {
            return Err(lost(command, reason));
        }
        state.waiting.insert(id, (command.to_owned(), sender));
        Ok(receiver)
    }

    fn forget(&self, id: u64) {
        self.lock().waiting.remove(&id);
    }

    fn reason(&self) -> Option<String> {
        self.lock().lost.clone()
    }

    fn answer(&self, id: Option<u64>, result: impl FnOnce(&str) -> Answer) {
        let waiting = id.and_then(|id| self.lock().waiting.remove(&id));
        match waiting {
            // The one who asked may have given up meanwhile.
            Some((command, sender)) => drop(sender.send(result(&command))),
            None => tracing::debug!(?id, "QEMU answered a command that nobody waits for"),
        }
    }

    fn end(&self, reason: String) {
        let mut state = self.lock();
        for (_, (command, sender)) in state.waiting.drain() {
            drop(sender.send(Err(lost(&command, &reason))));
        }
        state.lost = Some(reason);
    }
}

fn lost(command: &str, reason: &str) -> QmpError {
    QmpError::Lost { command: command.to_owned(), reason: reason.to_owned() }
}

async fn read_all(mut reader: impl AsyncBufRead + Unpin, shared: Arc<Shared>, events: mpsc::Sender<RawEvent>) {
    let mut dropped = 0u64;
    let reason = loop {
        match read_line(&mut reader).await {
            Err(reason) => break reason,
            Ok(message) => {
                if let Some(event) = dispatch(message, &shared)
                    && events.try_send(event).is_err()
                {
                    dropped += 1;
                    tracing::warn!(dropped, "events of QEMU were dropped, because nobody reads them");
                }
            }
        }
    };
    shared.end(reason);
}

/// Answers the command that a message belongs to, or returns the event that it is.
fn dispatch(mut message: Map<String, Value>, shared: &Shared) -> Option<RawEvent> {
    if let Some(Value::String(name)) = message.remove("event") {
        let data = message.remove("data").unwrap_or_else(|| json!({}));
        return Some(RawEvent { name, data });
    }
    let id = message.get("id").and_then(Value::as_u64);
    if let Some(value) = message.remove("return") {
        shared.answer(id, |_| Ok(value));
    } else if let Some(error) = message.remove("error") {
        let text = |key: &str| error.get(key).and_then(Value::as_str).unwrap_or("not said").to_owned();
        shared.answer(id, |command| {
            Err(QmpError::Refused { command: command.to_owned(), class: text("class"), description: text("desc") })
        });
    } else {
        tracing::debug!(message = excerpt(&message), "QEMU sent something that is neither answer nor event");
    }
    None
}

/// One line as a JSON object; the error says why there will be no more.
async fn read_line(reader: &mut (impl AsyncBufRead + Unpin)) -> Result<Map<String, Value>, String> {
    let mut line = Vec::new();
    loop {
        let chunk = reader.fill_buf().await.map_err(|error| format!("reading failed: {error}"))?;
        if chunk.is_empty() {
            return Err("QEMU closed the connection".into());
        }
        let end = chunk.iter().position(|&byte| byte == b'\n');
        let taken = end.map_or(chunk.len(), |end| end + 1);
        if line.len() + taken > LINE_LIMIT {
            return Err(format!("a line of more than {LINE_LIMIT} bytes came"));
        }
        line.extend_from_slice(&chunk[..taken]);
        reader.consume(taken);
        if end.is_none() {
            continue;
        }
        if line.trim_ascii().is_empty() {
            line.clear();
            continue;
        }
        return serde_json::from_slice(&line)
            .map_err(|error| format!("{:?} is not a JSON object: {error}", excerpt_bytes(&line)));
    }
}

fn excerpt(message: &Map<String, Value>) -> String {
    excerpt_bytes(serde_json::to_string(message).unwrap_or_default().as_bytes())
}

fn excerpt_bytes(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(200)]).into_owned()
}

#[cfg(test)]
mod tests;

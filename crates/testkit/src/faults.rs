//! An HTTP server's bad days: a proxy that refuses, stalls, cuts and falsifies, on purpose or by chance from a seed.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What happens to a request or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// 503 with Retry-After; the server never sees the request.
    Busy,
    /// The connection ends before the server sees the request.
    Reset,
    /// The server does it, and the connection ends in place of an answer.
    Lost,
    /// The answer ends in the middle of its body.
    Cut,
    /// The answer has half of its body and says that this is all.
    Short,
    /// One bit of the answer's body is another.
    FlipAnswer,
    /// One bit of the request's body is another.
    FlipRequest,
    /// The answer comes, but late.
    Slow,
    /// No answer for as long as the client waits.
    Silent,
}

/// Whom it happens to.
#[derive(Clone, Debug)]
pub enum Weather {
    /// Nobody.
    Fair,
    /// Everybody.
    Always(Fault),
    /// All requests with this method.
    On(&'static str, Fault),
    /// So many of a hundred requests, each with one of these.
    Random(u32, Vec<Fault>),
    /// Everybody gets this answer (status and body).
    Answer(&'static str, &'static str),
}

/// A port of 127.0.0.1 before another one.
#[derive(Clone)]
pub struct FaultyProxy {
    port: u16,
    state: Arc<Mutex<State>>,
}

struct State {
    weather: Weather,
    random: u64,
    happened: BTreeMap<Fault, u64>,
}

impl FaultyProxy {
    /// To a port of 127.0.0.1; the seed decides what happens to whom.
    pub fn to(target: u16, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let state = State {
            weather: Weather::Fair,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            happened: BTreeMap::new(),
        };
        let proxy = Self { port, state: Arc::new(Mutex::new(state)) };
        let shared = proxy.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let proxy = shared.clone();
                std::thread::spawn(move || proxy.serve(client, target));
            }
        });
        proxy
    }

    /// Where clients connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on.
    pub fn set(&self, weather: Weather) {
        self.lock().weather = weather;
    }

    /// What happened so far, by count.
    pub fn happened(&self) -> BTreeMap<Fault, u64> {
        self.lock().happened.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number below `limit`.
    fn random(&self, limit: usize) -> usize {
        let state = &mut *self.lock();
        state.random ^= state.random << 13;
        state.random ^= state.random >> 7;
        state.random ^= state.random << 17;
        (state.random % limit.max(1) as u64) as usize
    }

    fn fault(&self, head: &str) -> Option<Fault> {
        let weather = self.lock().weather.clone();
        let fault = match weather {
            Weather::Always(fault) => Some(fault),
            Weather::On(method, fault) => head.starts_with(method).then_some(fault),
            Weather::Random(percent, faults) => {
                (self.random(100) < percent as usize).then(|| faults[self.random(faults.len())])
            }
            Weather::Fair | Weather::Answer(..) => None,
        };
        fault.inspect(|fault| *self.lock().happened.entry(*fault).or_default() += 1)
    }

    /// One request per connection: whatever breaks, the next one is whole again.
    fn serve(&self, mut client: TcpStream, target: u16) -> Option<()> {
        let (head, mut body) = message(&mut client)?;
        let fault = self.fault(&head);
        if let Weather::Answer(status, text) = self.lock().weather {
            return answer(&mut client, status, "", text);
        }
        match fault {
            Some(Fault::Busy) => return answer(&mut client, "503 Service Unavailable", "Retry-After: 1\r\n", "busy"),
            Some(Fault::Reset) => return client.shutdown(Shutdown::Both).ok(),
            Some(Fault::Silent) => {
                let _ = client.read(&mut [0]);
                return None;
            }
            Some(Fault::FlipRequest) => self.flip(&mut body),
            _ => {}
        }
        let mut server = TcpStream::connect(("127.0.0.1", target)).ok()?;
        let head = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        server.write_all(head.as_bytes()).and_then(|()| server.write_all(&body)).ok()?;
        let (head, mut body) = answered(&mut server)?;
        match fault {
            Some(Fault::Lost) => return client.shutdown(Shutdown::Both).ok(),
            Some(Fault::Cut) => body.truncate(body.len() / 2),
            Some(Fault::FlipAnswer) => self.flip(&mut body),
            Some(Fault::Slow) => std::thread::park_timeout(Duration::from_millis(300)),
            Some(Fault::Short) if !body.is_empty() => {
                let (whole, half) = (body.len(), body.len() / 2);
                body.truncate(half);
                let head = head.replace(&format!("Content-Length: {whole}"), &format!("Content-Length: {half}"));
                return client.write_all(head.as_bytes()).and_then(|()| client.write_all(&body)).ok();
            }
            _ => {}
        }
        client.write_all(head.as_bytes()).and_then(|()| client.write_all(&body)).ok()
    }

    fn flip(&self, body: &mut [u8]) {
        let at = self.random(body.len());
        if let Some(byte) = body.get_mut(at) {
            *byte ^= 1 << self.random(8);
        }
    }
}

fn answer(client: &mut TcpStream, status: &str, header: &str, body: &str) -> Option<()> {
    let length = body.len();
    let text = format!("HTTP/1.1 {status}\r\nConnection: close\r\n{header}Content-Length: {length}\r\n\r\n{body}");
    client.write_all(text.as_bytes()).ok()
}

fn head(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return Some((String::from_utf8(bytes).ok()?, rest));
        }
        match stream.read(&mut buffer).ok()? {
            0 => return None,
            count => bytes.extend(&buffer[..count]),
        }
    }
}

fn length(head: &str) -> u64 {
    let line =
        head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// A request with all of its body.
fn message(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let (head, mut body) = head(stream)?;
    let rest = length(&head).saturating_sub(body.len() as u64);
    stream.take(rest).read_to_end(&mut body).ok()?;
    Some((head, body))
}

/// An answer up to the end of its connection.
fn answered(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let (head, mut body) = head(stream)?;
    stream.read_to_end(&mut body).ok()?;
    Some((head, body))
}

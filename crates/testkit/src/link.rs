//! A TCP link in user space that can be slowed, cut and mended, because this is what real links do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A listening port whose connections are passed on to another port.
#[derive(Clone)]
pub struct Link {
    port: u16,
    target: u16,
    state: Arc<State>,
}

struct State {
    cut: AtomicBool,
    /// Bytes per second towards the client; 0 is as fast as it goes.
    rate: AtomicU64,
    carried: AtomicU64,
}

impl Link {
    /// To a port of 127.0.0.1.
    pub fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let state = Arc::new(State { cut: false.into(), rate: 0.into(), carried: 0.into() });
        let shared = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let state = shared.clone();
                std::thread::spawn(move || carry(client, target, &state));
            }
        });
        Self { port, target, state }
    }

    /// Where clients connect.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Where connections lead.
    pub fn target(&self) -> u16 {
        self.target
    }

    /// Breaks all connections and refuses new ones, until mended.
    pub fn cut(&self) {
        self.state.cut.store(true, Ordering::SeqCst);
    }

    /// Lets connections through again.
    pub fn mend(&self) {
        self.state.cut.store(false, Ordering::SeqCst);
    }

    /// Slows the way to the client down to this many bytes per second; 0 ends it.
    pub fn slow(&self, bytes_per_second: u64) {
        self.state.rate.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Bytes that went to clients.
    pub fn carried(&self) -> u64 {
        self.state.carried.load(Ordering::SeqCst)
    }
}

fn carry(client: TcpStream, target: u16, state: &Arc<State>) {
    if state.cut.load(Ordering::SeqCst) {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { return };
    let (Ok(client_2), Ok(server_2)) = (client.try_clone(), server.try_clone()) else { return };
    let back = state.clone();
    std::thread::spawn(move || pump(client_2, server_2, &back, false));
    pump(server, client, state, true);
}

fn pump(mut from: TcpStream, mut to: TcpStream, state: &State, shaped: bool) {
    let _ = from.set_read_timeout(Some(Duration::from_millis(50)));
    let mut buffer = vec![0; 16 << 10];
    while !state.cut.load(Ordering::SeqCst) {
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => {
                let begun = Instant::now();
                if to.write_all(&buffer[..count]).is_err() {
                    break;
                }
                let rate = state.rate.load(Ordering::SeqCst);
                if shaped {
                    state.carried.fetch_add(count as u64, Ordering::SeqCst);
                }
                if shaped && rate > 0 {
                    let due = Duration::from_micros(count as u64 * 1_000_000 / rate);
                    std::thread::park_timeout(due.saturating_sub(begun.elapsed()));
                }
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

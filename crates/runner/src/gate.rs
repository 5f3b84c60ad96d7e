//! Published ports: reserved before the machine starts, opened when users may come in.
//!
//! The runner itself listens and passes connections on to the port that QEMU forwards to the guest. So a port is
//! known to be free before anything is started, it can be below 1024 though QEMU is nobody, and during an update it
//! stays closed until the new version has proved itself.

use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use collective_model::PublishedPort;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

/// The reserved ports.
pub(crate) struct Gate {
    reserved: Mutex<Vec<(PublishedPort, TcpSocket)>>,
    open: AtomicBool,
}

impl Gate {
    /// Reserves the ports. Connections are refused until [`open`](Self::open).
    pub fn reserve(ports: &[PublishedPort]) -> Result<Self, String> {
        let reserve = |port: &PublishedPort| {
            let taken = |error: io::Error| {
                format!(
                    "cannot publish port {} on {}: {error}; end what uses it, or publish another port",
                    port.host, port.address
                )
            };
            let socket = if port.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
            let socket = socket.map_err(taken)?;
            socket.set_reuseaddr(true).map_err(taken)?;
            socket.bind(SocketAddr::new(port.address, port.host)).map_err(taken)?;
            Ok((port.clone(), socket))
        };
        let reserved = ports.iter().map(reserve).collect::<Result<_, String>>()?;
        Ok(Self { reserved: Mutex::new(reserved), open: AtomicBool::new(false) })
    }

    /// Lets users in; `forwards` says where each guest port is.
    pub fn open(&self, forwards: &[(u16, SocketAddr)]) -> Result<(), String> {
        let reserved = std::mem::take(&mut *self.reserved.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for (port, socket) in reserved {
            let Some((_, to)) = forwards.iter().find(|(guest, _)| *guest == port.guest) else {
                return Err(format!("guest port {} is not forwarded", port.guest));
            };
            let listener = socket.listen(128).map_err(|e| format!("cannot listen on port {}: {e}", port.host))?;
            tokio::spawn(accept(listener, *to));
        }
        self.open.store(true, Ordering::Release);
        Ok(())
    }

    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }
}

async fn accept(listener: TcpListener, to: SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => _ = tokio::spawn(pass(client, to)),
            Err(error) => {
                // Out of descriptors, most likely: others will be closed.
                tracing::warn!(%error, "cannot take a connection to a published port");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn pass(mut client: TcpStream, to: SocketAddr) {
    let passed = async {
        let mut guest = TcpStream::connect(to).await?;
        client.set_nodelay(true)?;
        guest.set_nodelay(true)?;
        tokio::io::copy_bidirectional(&mut client, &mut guest).await
    };
    if let Err(error) = passed.await {
        tracing::debug!(%error, "a connection to a published port broke");
    }
}

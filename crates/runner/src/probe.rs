//! Health, as seen from outside: one HTTP request at a time, and until the first answer two.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collective_model::{HealthCheck, HealthState, HttpProbe, Span, Timestamp};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::state::Shared;

/// How much of an answer is kept to be shown.
const SHOWN: usize = 400;
/// How often it is tried until it answers, if not more often.
const FIRST: Duration = Duration::from_millis(500);
/// A machine that is still arriving is given at least so much time for an answer.
const WHILE_IT_ARRIVES: Span = Span(Duration::from_secs(300));
/// Until it answers, one of two requests is given up after this time and made anew.
const EAGER: Duration = Duration::from_secs(1);
/// A healthy instance is unhealthy after this many failed probes in a row.
const PATIENCE: u32 = 3;

/// Probes for ever, and writes what it finds into the status.
pub(crate) async fn watch(shared: Arc<Shared>, check: HealthCheck, at: SocketAddr) {
    let began = Instant::now();
    let (mut answered, mut failures) = (false, 0);
    shared.status().health = HealthState::Waiting;
    loop {
        // One that went on hears what it is sent from the beginning.
        let result = if answered || shared.config.resume.is_some() {
            let timeout = if arrives(&shared) { check.timeout.max(WHILE_IT_ARRIVES) } else { check.timeout };
            patient(&check, timeout, at).await
        } else {
            first(&check, at).await
        };
        {
            let mut status = shared.status();
            match result {
                Ok(()) => {
                    (answered, failures) = (true, 0);
                    status.health = HealthState::Healthy;
                    status.probe_output = None;
                    let ordered = shared.config.ordered;
                    status.first_answer_ms.get_or_insert_with(|| Timestamp::now().since_ms(ordered));
                }
                Err(why) => {
                    failures += 1;
                    let (HttpProbe { port, path, .. }, limit) = (&check.http, check.limit);
                    status.probe_output = Some(format!("GET :{port}{path}: {why}"));
                    if answered && failures >= PATIENCE || !answered && began.elapsed() > limit.0 {
                        status.health = HealthState::Unhealthy;
                    }
                }
            }
        }
        let pause = if answered { check.interval.0 } else { check.interval.0.min(FIRST) };
        tokio::time::sleep(pause).await;
    }
}

/// Whether the machine waits for parts of itself. A request that is given up and made anew would have it touch yet more of these.
fn arrives(shared: &Shared) -> bool {
    shared.status().arrival.is_some_and(|arrival| !arrival.complete)
}

async fn patient(check: &HealthCheck, timeout: Span, at: SocketAddr) -> Result<(), String> {
    let result = tokio::time::timeout(timeout.0, probe(at, &check.http)).await;
    result.unwrap_or_else(|_| Err(format!("no answer within {timeout}")))
}

/// What is sent to a guest that boots is lost, and QEMU sends it again many seconds later. So there are always two requests: one
/// may take its time, and one comes soon after the guest can hear it.
async fn first(check: &HealthCheck, at: SocketAddr) -> Result<(), String> {
    let eager = async {
        while !matches!(tokio::time::timeout(EAGER, probe(at, &check.http)).await, Ok(Ok(()))) {
            tokio::time::sleep(FIRST / 5).await;
        }
    };
    tokio::select! {
        result = patient(check, check.timeout, at) => result,
        () = eager => Ok(()),
    }
}

async fn probe(at: SocketAddr, probe: &HttpProbe) -> Result<(), String> {
    let answer = request(at, &probe.path).await.map_err(|error| error.to_string())?;
    let answer = String::from_utf8_lossy(&answer);
    let status =
        answer.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|code| code.parse::<u16>().ok());
    match status {
        Some(status) if probe.status == status => Ok(()),
        Some(status) => Err(format!("answered {status} in place of {}: {}", probe.status, shown(&answer))),
        None if answer.is_empty() => Err("the connection was closed without an answer".into()),
        None => Err(format!("the answer is not HTTP: {}", shown(&answer))),
    }
}

fn shown(answer: &str) -> String {
    let body = answer.split_once("\r\n\r\n").map_or(answer, |(_, body)| body);
    body.chars().filter(|c| !c.is_control()).take(SHOWN).collect()
}

async fn request(at: SocketAddr, path: &str) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(at).await?;
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: collective\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(4096).read_to_end(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use collective_model::Span;
    use tokio::net::TcpListener;

    async fn answered_with(answer: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        });
        probe(at, &HttpProbe { port: 80, path: "/health".into(), status: 200 }).await
    }

    /// The first connection is one that the guest never hears of.
    #[tokio::test]
    async fn a_guest_that_missed_the_first_request_is_asked_again() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        tokio::spawn(async move {
            let _deaf = [listener.accept().await.unwrap(), listener.accept().await.unwrap()];
            let (mut stream, _) = listener.accept().await.unwrap();
            // Closed with something unread, it would be reset, and so would those that nobody answers.
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
            drop(stream);
            std::future::pending::<()>().await;
        });
        let http = HttpProbe { port: 80, path: "/health".into(), status: 200 };
        let long = Span(Duration::from_secs(60));
        let check = HealthCheck { http, interval: long, timeout: long, limit: long };
        assert_eq!(first(&check, at).await, Ok(()));
    }

    #[tokio::test]
    async fn answers() {
        assert_eq!(answered_with("HTTP/1.1 200 OK\r\n\r\nok").await, Ok(()));
        let error = answered_with("HTTP/1.1 503 No\r\n\r\ndisk is full").await.unwrap_err();
        assert!(error.contains("503") && error.contains("disk is full"), "{error}");
        assert!(answered_with("").await.is_err());
        assert!(answered_with("SSH-2.0-OpenSSH\r\n").await.unwrap_err().contains("not HTTP"));
        assert!(answered_with("HTTP/1.").await.is_err());
    }
}

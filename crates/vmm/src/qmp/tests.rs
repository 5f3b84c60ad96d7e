//! The client against a server of our own on a socket pair, friendly and hostile.

use super::*;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 10}}, \"capabilities\": []}}\r\n";

/// The other end of the connection; speaks line by line.
struct Server {
    reader: BufReader<tokio::net::unix::OwnedReadHalf>,
    writer: tokio::net::unix::OwnedWriteHalf,
}

impl Server {
    async fn says(&mut self, text: &str) {
        self.writer.write_all(text.as_bytes()).await.unwrap();
    }

    async fn hears(&mut self) -> Map<String, Value> {
        read_line(&mut self.reader).await.unwrap()
    }

    async fn answers_next(&mut self) {
        let heard = self.hears().await;
        self.says(&format!("{{\"return\": {{}}, \"id\": {}}}\n", heard["id"])).await;
    }
}

fn pair() -> (UnixStream, Server) {
    let (client, server) = UnixStream::pair().unwrap();
    let (reader, writer) = server.into_split();
    (client, Server { reader: BufReader::new(reader), writer })
}

async fn connected() -> (Client, RawEvents, Server) {
    let (stream, mut server) = pair();
    let greet = async {
        server.says(GREETING).await;
        server.answers_next().await;
        server
    };
    let (client, server) = tokio::join!(Client::connect(stream), greet);
    let (client, events) = client.unwrap();
    (client, events, server)
}

#[tokio::test]
async fn commands_may_overlap_and_answers_come_in_any_order() {
    let (client, mut events, mut server) = connected().await;
    let serve = async {
        let (first, second) = (server.hears().await, server.hears().await);
        server.says("{\"event\": \"BRAND_NEW\", \"timestamp\": {}}\n\n").await;
        server.says(&format!("{{\"return\": {}, \"id\": {}}}\n", second["execute"], second["id"])).await;
        server.says(&format!("{{\"return\": 1, \"id\": {}}}\n", first["id"])).await;
        server
    };
    let (one, two, _server) = tokio::join!(client.execute("a", json!({})), client.execute("b", json!({"x": 1})), serve);
    assert_eq!(one.unwrap(), json!(1));
    assert_eq!(two.unwrap(), json!("b"));
    assert_eq!(events.recv().await.unwrap(), RawEvent { name: "BRAND_NEW".into(), data: json!({}) });
}

#[tokio::test]
async fn a_refusal_carries_the_words_of_qemu() {
    let (client, _events, mut server) = connected().await;
    let serve = async {
        let heard = server.hears().await;
        server
            .says(&format!(
                "{{\"error\": {{\"class\": \"GenericError\", \"desc\": \"no such thing\"}}, \"id\": {}}}\n",
                heard["id"]
            ))
            .await;
    };
    let (answer, ()) = tokio::join!(client.execute("frob", json!({})), serve);
    assert_eq!(answer.unwrap_err().to_string(), "QEMU refused \"frob\": no such thing (GenericError)");
}

#[tokio::test]
async fn the_end_of_the_connection_ends_every_wait() {
    let (client, mut events, mut server) = connected().await;
    let serve = async {
        server.hears().await;
        drop(server);
    };
    let (answer, ()) = tokio::join!(client.execute("stop", json!({})), serve);
    assert!(matches!(answer, Err(QmpError::Lost { ref command, .. }) if command == "stop"), "{answer:?}");
    assert!(events.recv().await.is_none());
    let later = client.execute("cont", json!({})).await;
    assert!(matches!(later, Err(QmpError::Lost { ref reason, .. }) if reason.contains("closed")), "{later:?}");
}

#[tokio::test]
async fn garbage_is_the_end_of_the_connection() {
    let (client, _events, mut server) = connected().await;
    let serve = async {
        server.hears().await;
        server.says("\u{0}\u{1}]]\n").await;
    };
    let (answer, ()) = tokio::join!(client.execute("stop", json!({})), serve);
    assert!(
        matches!(answer, Err(QmpError::Lost { ref reason, .. }) if reason.contains("not a JSON object")),
        "{answer:?}"
    );
}

#[tokio::test]
async fn odd_but_valid_messages_are_passed_over() {
    let (client, mut events, mut server) = connected().await;
    let serve = async {
        server
            .says(
                "{}\n{\"return\": 5, \"id\": 999999}\n{\"return\": 5}\n{\"error\": 7, \"id\": \"x\"}\n{\"event\": 5}\n",
            )
            .await;
        server.says("{\"event\": \"RESET\", \"data\": {\"guest\": true}}\n").await;
        server.answers_next().await;
    };
    let (answer, ()) = tokio::join!(client.execute("stop", json!({})), serve);
    assert_eq!(answer.unwrap(), json!({}));
    assert_eq!(events.recv().await.unwrap().name, "RESET");
}

#[tokio::test]
async fn a_line_without_end_is_cut_off() {
    let (stream, mut server) = pair();
    let flood = async {
        let part = vec![b'x'; 1 << 20];
        // The client hangs up at its limit; only then does writing fail.
        while server.writer.write_all(&part).await.is_ok() {}
    };
    let (client, ()) = tokio::join!(Client::connect(stream), flood);
    let error = client.err().unwrap().to_string();
    assert!(error.contains("more than 16777216 bytes"), "{error}");
}

#[tokio::test]
async fn another_greeting_is_refused() {
    let (stream, mut server) = pair();
    server.says("{\"hello\": 1}\n").await;
    let error = Client::connect(stream).await.err().unwrap().to_string();
    assert!(error.contains("expected a greeting, got {\"hello\":1}"), "{error}");
}

#[tokio::test]
async fn silence_is_a_timeout_and_the_connection_goes_on() {
    let (client, _events, mut server) = connected().await;
    let silent = client.execute_within("stop", json!({}), Duration::from_millis(20)).await;
    assert!(matches!(silent, Err(QmpError::Timeout { seconds: 0, .. })), "{silent:?}");
    assert!(client.shared.lock().waiting.is_empty());
    let late = server.hears().await;
    server.says(&format!("{{\"return\": {{}}, \"id\": {}}}\n", late["id"])).await;
    let (answer, ()) = tokio::join!(client.execute("cont", json!({})), server.answers_next());
    assert_eq!(answer.unwrap(), json!({}));
}

#[tokio::test]
async fn events_that_nobody_reads_do_not_block_answers() {
    let (client, mut events, mut server) = connected().await;
    let serve = async {
        let many = "{\"event\": \"STOP\"}\n".repeat(EVENT_LIMIT + 10);
        server.says(&many).await;
        server.answers_next().await;
        let mut rest = Vec::new();
        let _ = server.reader.read_to_end(&mut rest).await;
    };
    let ask = async {
        let answer = client.execute("stop", json!({})).await;
        drop(client);
        answer
    };
    let (answer, ()) = tokio::join!(ask, serve);
    assert!(answer.is_ok());
    let mut count = 0;
    while events.recv().await.is_some() {
        count += 1;
    }
    assert_eq!(count, EVENT_LIMIT);
}

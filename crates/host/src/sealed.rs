//! A stream between two hosts, by way of the plane, which carries it and cannot look into it: it is sealed as private data is
//! ([`collective_store::seal`]), with the owner's key.
//!
//! ```text
//! 32 bytes name | u32 length | what was sealed under that name
//! ```
//! What is sealed begins with the order that it belongs to (32 digits), the direction (one byte) and a number that counts from 0
//! (u64): so nothing can be taken out, put in, repeated or reordered without being noticed.

use std::sync::Arc;

use collective_model::{Digest, OperationId};
use collective_store::pack::EntryKind;
use collective_store::seal::{MAX_SEALED_BYTES, Seal};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The quickest level of zstd: somebody waits.
const LEVEL: i32 = 1;
/// At most so many bytes are sealed at once.
pub(crate) const MOST: usize = 1000 << 10;

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// The host that has the machine.
    Source = 0,
    /// The host that gets it.
    Target = 1,
}

struct Count {
    seal: Arc<Seal>,
    operation: OperationId,
    side: Side,
    number: u64,
}

impl Count {
    /// What the next message begins with.
    fn next(&mut self) -> Vec<u8> {
        let mut head = self.operation.as_str().as_bytes().to_vec();
        head.push(self.side as u8);
        head.extend(self.number.to_le_bytes());
        self.number += 1;
        head
    }
}

/// The end that sends.
pub(crate) struct Sender<W> {
    out: W,
    count: Count,
}

impl<W: AsyncWrite + Unpin> Sender<W> {
    pub fn new(out: W, seal: Arc<Seal>, operation: OperationId, side: Side) -> Self {
        Self { out, count: Count { seal, operation, side, number: 0 } }
    }

    /// Sends at most [`MOST`] bytes.
    pub async fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        let mut content = self.count.next();
        content.extend(bytes);
        let name = self.count.seal.name(&content);
        let sealed = self.count.seal.seal(&name, EntryKind::Page, &content, LEVEL)?;
        let mut message = name.0.to_vec();
        message.extend((sealed.len() as u32).to_le_bytes());
        message.extend(sealed);
        self.out.write_all(&message).await?;
        self.out.flush().await
    }
}

/// The end that hears.
pub(crate) struct Receiver<R> {
    from: R,
    count: Count,
}

impl<R: AsyncRead + Unpin> Receiver<R> {
    /// `side` is the other one.
    pub fn new(from: R, seal: Arc<Seal>, operation: OperationId, side: Side) -> Self {
        Self { from, count: Count { seal, operation, side, number: 0 } }
    }

    /// The next message; the error says that the stream has ended, or is not what the other host sent.
    pub async fn receive(&mut self) -> Result<Vec<u8>, String> {
        let cut = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => "the connection with the other host broke".to_owned(),
            _ => format!("the connection with the other host broke: {error}"),
        };
        let mut name = [0; 32];
        self.from.read_exact(&mut name).await.map_err(cut)?;
        let length = self.from.read_u32_le().await.map_err(cut)? as usize;
        if length > MAX_SEALED_BYTES {
            return Err("the other host sent more at once than can be".into());
        }
        let mut sealed = vec![0; length];
        self.from.read_exact(&mut sealed).await.map_err(cut)?;
        let opened = self.count.seal.open(&Digest(name), &sealed);
        let opened = opened.map_err(|e| format!("what came was not sealed by the other host: {e}"))?;
        match opened.content.strip_prefix(self.count.next().as_slice()) {
            Some(bytes) => Ok(bytes.to_vec()),
            None => Err("what came is of another time or order than the other host sent it".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(number: u8) -> OperationId {
        OperationId::from_random([number; 16])
    }

    async fn sent(messages: &[&[u8]]) -> Vec<Vec<u8>> {
        let seal = Arc::new(Seal::new(&[7; 32]));
        let mut all = Vec::new();
        let mut sender = Sender::new(Vec::new(), seal, operation(1), Side::Source);
        for message in messages {
            sender.send(message).await.unwrap();
            all.push(std::mem::take(&mut sender.out));
        }
        all
    }

    fn hears(bytes: &[u8], key: u8, id: u8, side: Side) -> Receiver<&[u8]> {
        Receiver::new(bytes, Arc::new(Seal::new(&[key; 32])), operation(id), side)
    }

    #[tokio::test]
    async fn what_is_sent_is_heard_and_nothing_else() {
        let big = vec![9; MOST];
        let all = sent(&[b"one", b"two", &big]).await;
        let stream = all.concat();
        let mut receiver = hears(&stream, 7, 1, Side::Source);
        assert_eq!(receiver.receive().await.unwrap(), b"one");
        assert_eq!(receiver.receive().await.unwrap(), b"two");
        assert_eq!(receiver.receive().await.unwrap(), big);
        assert!(receiver.receive().await.unwrap_err().contains("broke"));
        for (bytes, key, id, side) in [
            (&all[1], 7, 1, Side::Source),
            (&all[0], 8, 1, Side::Source),
            (&all[0], 7, 2, Side::Source),
            (&all[0], 7, 1, Side::Target),
        ] {
            assert!(hears(bytes, key, id, side).receive().await.is_err());
        }
        let mut changed = all[0].clone();
        *changed.last_mut().unwrap() ^= 1;
        assert!(hears(&changed, 7, 1, Side::Source).receive().await.unwrap_err().contains("not sealed"));
        let twice = [all[0].clone(), all[0].clone()].concat();
        let mut receiver = hears(&twice, 7, 1, Side::Source);
        receiver.receive().await.unwrap();
        assert!(receiver.receive().await.unwrap_err().contains("order"));
    }
}

//! A connection with the daemon that carries a machine ([`collective_model::run_live`]).

use std::io;

use collective_model::run_live::{MAX_PIECE, Piece, Word};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Both directions of it.
#[derive(Debug)]
pub(crate) struct Line {
    pub reader: BufReader<OwnedReadHalf>,
    pub writer: OwnedWriteHalf,
}

impl Line {
    pub async fn send(&mut self, piece: &Piece) -> io::Result<()> {
        self.writer.write_all(&piece.encode()).await
    }

    pub async fn say(&mut self, word: Word) -> io::Result<()> {
        self.send(&Piece::Word(word)).await
    }

    pub async fn hear(&mut self) -> Result<Piece, String> {
        let cut = |error: io::Error| match error.kind() {
            io::ErrorKind::UnexpectedEof => "the connection with the other host broke".to_owned(),
            _ => format!("the connection with the other host broke: {error}"),
        };
        let length = self.reader.read_u32_le().await.map_err(cut)? as usize;
        if length > MAX_PIECE {
            return Err("the other host sent a piece that is too long".into());
        }
        let mut bytes = vec![0; length];
        self.reader.read_exact(&mut bytes).await.map_err(cut)?;
        match Piece::decode(&bytes)? {
            Piece::Word(Word::Failed { why }) => Err(why),
            piece => Ok(piece),
        }
    }
}

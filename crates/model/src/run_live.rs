//! What is said while a machine moves and runs: from the runner that has it, by both daemons, to the runner that gets it, and
//! back. Part of the runner's protocol ([`crate::run`]).
//!
//! A daemon asks its runner to begin ([`Request::Leave`](crate::run::Request::Leave), [`Request::Arrive`](crate::run::Request::Arrive))
//! on a connection of its own, which then carries pieces, in both directions:
//!
//! ```text
//! u32 length of what follows | u8 kind | ...
//!   0  a Word, as JSON
//!   1  content of a disk or of memory: u16 which | u64 offset | bytes, whole blocks
//!   2  zeros:                          u16 which | u64 offset | u64 length
//!   3  a part of the machine's state, as its file has it
//!   4  blocks that are offered:         u16 which | u64 offset of the first | 16 bytes for each, its hash
//!   5  the answer to all offers since the last one: a bit for each block that is lacking ([`crate::kept`])
//! ```
//! Numbers are little-endian. Disks have the numbers of their order, memory has [`MEMORY`].

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::kept::{KeptPart, OfferHash};

/// The number of the memory.
pub const MEMORY: u16 = u16::MAX;
/// A piece is at most this long, in bytes, without its length.
pub const MAX_PIECE: usize = (512 << 10) + 64;
/// Content is cut to so many bytes.
pub const STEP: usize = 512 << 10;

/// A machine that is to come: its layers are written while it runs elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receiving {
    /// The layer of memory to create.
    pub memory: PathBuf,
    /// The file to create with the rest of the machine.
    pub state: PathBuf,
    /// The instant, once it has come.
    pub epoch: String,
    /// Layers that take the writes of the disks from when it goes on here; those of [`RunDisk`](crate::run::RunDisk) have what came.
    pub tops: Vec<PathBuf>,
    /// What this host keeps of it since it was here.
    #[serde(default)]
    pub kept: Vec<KeptPart>,
}

/// What is said beside content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "kebab-case")]
pub enum Word {
    /// From the one that gets it: what comes can be taken.
    Ready {
        /// Of these disks something is kept there, so that they are offered first.
        #[serde(default)]
        keeps: Vec<u16>,
    },
    /// From the one that has it: these were offers; which of them do you lack?
    Offered,
    /// From the one that has it: so far; say when you have it.
    Round {
        /// Counts them.
        number: u64,
        /// Whether it is to be durable too.
        durable: bool,
    },
    /// From the one that gets it: all up to there is here.
    Took {
        /// Which round.
        number: u64,
    },
    /// From the one that has it: the guest is being stopped.
    Stopping {
        /// The shortest time from a question to its answer so far, in microseconds.
        round_trip_us: u64,
    },
    /// From the one that has it: that was all. From here on it does not go on before its daemon says so.
    Final {
        /// Bytes of the state.
        state_bytes: u64,
        /// Bytes sent in all.
        bytes: u64,
        /// Rounds while it ran.
        rounds: u64,
        /// Bytes of the last one.
        last_bytes: u64,
        /// Bytes that were there already.
        #[serde(default)]
        kept: u64,
    },
    /// From the runner that gets it to its daemon: all is here and durable.
    Kept {
        /// The digest of the file with the state.
        digest: Digest,
        /// Bytes of memory that it takes.
        memory_bytes: u64,
        /// As in [`Word::Final`].
        bytes: u64,
        /// As in [`Word::Final`].
        rounds: u64,
        /// As in [`Word::Final`].
        #[serde(default)]
        kept: u64,
    },
    /// From its daemon to the runner that got it: it is ours, go on.
    GoOn,
    /// From the one that got it: it goes on.
    Gone {
        /// For how long the guest stood still, in microseconds.
        pause_us: u64,
    },
    /// From its daemon to the runner that had it: it goes on there; what its memory is goes into the layer for that.
    Keep,
    /// The answer.
    Left,
    /// From the one that has it: it stays, and this is why it should be suspended in place of that.
    Better {
        /// Why.
        why: String,
    },
    /// From the one that has it, asked for an estimate: what was measured. It stays.
    Measured(crate::live::Estimate),
    /// From either: it does not work.
    Failed {
        /// Why.
        why: String,
    },
}

/// One piece of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A word.
    Word(Word),
    /// Content.
    Content {
        /// Which disk.
        which: u16,
        /// Where.
        offset: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Zeros.
    Zeros {
        /// Which disk.
        which: u16,
        /// Where.
        offset: u64,
        /// How many.
        length: u64,
    },
    /// A part of the state.
    State(Vec<u8>),
    /// Blocks, one after the other, by their hashes.
    Offer {
        /// Which disk.
        which: u16,
        /// Where the first one is.
        offset: u64,
        /// The hashes.
        hashes: Vec<OfferHash>,
    },
    /// What is lacking of the blocks that were offered.
    Lacks(Vec<u8>),
}

impl Piece {
    /// As bytes, with its length before it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; 4];
        match self {
            Self::Word(word) => {
                out.push(0);
                // A word has nothing that could not be written as JSON.
                out.extend(serde_json::to_vec(word).unwrap_or_default());
            }
            Self::Content { which, offset, bytes } => {
                out.push(1);
                out.extend(which.to_le_bytes());
                out.extend(offset.to_le_bytes());
                out.extend(bytes);
            }
            Self::Zeros { which, offset, length } => {
                out.push(2);
                out.extend(which.to_le_bytes());
                out.extend(offset.to_le_bytes());
                out.extend(length.to_le_bytes());
            }
            Self::State(bytes) => {
                out.push(3);
                out.extend(bytes);
            }
            Self::Offer { which, offset, hashes } => {
                out.push(4);
                out.extend(which.to_le_bytes());
                out.extend(offset.to_le_bytes());
                out.extend(hashes.as_flattened());
            }
            Self::Lacks(bits) => {
                out.push(5);
                out.extend(bits);
            }
        }
        let length = (out.len() - 4) as u32;
        out[..4].copy_from_slice(&length.to_le_bytes());
        out
    }

    /// From bytes that may be anybody's, without the length.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        let broken = || "a piece of the stream cannot be read; are both hosts of the same version?".to_owned();
        let (kind, rest) = bytes.split_first().ok_or_else(broken)?;
        let place = || {
            let (which, rest) = rest.split_first_chunk().ok_or_else(broken)?;
            let (offset, rest) = rest.split_first_chunk().ok_or_else(broken)?;
            Ok::<_, String>((u16::from_le_bytes(*which), u64::from_le_bytes(*offset), rest))
        };
        match kind {
            0 => serde_json::from_slice(rest).map(Self::Word).map_err(|_| broken()),
            1 => place().map(|(which, offset, rest)| Self::Content { which, offset, bytes: rest.to_vec() }),
            2 => {
                let (which, offset, rest) = place()?;
                let length = rest.try_into().map_err(|_| broken())?;
                Ok(Self::Zeros { which, offset, length: u64::from_le_bytes(length) })
            }
            3 => Ok(Self::State(rest.to_vec())),
            4 => {
                let (which, offset, rest) = place()?;
                let (hashes, []) = rest.as_chunks() else { return Err(broken()) };
                Ok(Self::Offer { which, offset, hashes: hashes.to_vec() })
            }
            5 => Ok(Self::Lacks(rest.to_vec())),
            _ => Err(broken()),
        }
    }

    /// The word in such bytes, if it is one.
    pub fn word(bytes: &[u8]) -> Option<Word> {
        bytes.strip_prefix(&[0]).and_then(|rest| serde_json::from_slice(rest).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn there_and_back() {
        let pieces = [
            Piece::Word(Word::Took { number: 7 }),
            Piece::Content { which: 3, offset: 4096, bytes: vec![1; 4096] },
            Piece::Zeros { which: MEMORY, offset: 0, length: 1 << 30 },
            Piece::State(vec![1, 2, 3]),
            Piece::Offer { which: 1, offset: 8192, hashes: vec![[7; 16], [8; 16]] },
            Piece::Lacks(vec![0, 255]),
        ];
        for piece in pieces {
            let bytes = piece.encode();
            let (length, rest) = bytes.split_first_chunk().unwrap();
            assert_eq!(u32::from_le_bytes(*length) as usize, rest.len());
            assert_eq!(Piece::decode(rest), Ok(piece.clone()));
            assert_eq!(Piece::word(rest).is_some(), matches!(piece, Piece::Word(_)));
        }
    }

    /// As a runner says it that keeps nothing and knows nothing of that.
    #[test]
    fn an_older_word() {
        assert_eq!(Piece::word(b"\0{\"word\":\"ready\"}"), Some(Word::Ready { keeps: Vec::new() }));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes: Vec<u8>) {
            let _ = Piece::decode(&bytes);
        }
    }
}

//! The stored form of a frame or page: as it is, or compressed with zstd (RFC 8878), whichever is shorter.

use collective_model::Digest;

use crate::{BLOCK, FRAME_BLOCKS, MAX_PAGE_BYTES};

/// How content is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Plain = 0,
    /// One zstd frame.
    Zstd = 1,
}

impl TryFrom<u8> for Encoding {
    type Error = FrameError;
    fn try_from(byte: u8) -> Result<Self, FrameError> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Zstd),
            other => Err(FrameError::Encoding(other)),
        }
    }
}

/// Why stored bytes are refused. Refused bytes are never given to anyone.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Written by a newer program, or damaged.
    #[error("unknown encoding {0}: the data is damaged, or written by a newer Collective")]
    Encoding(u8),
    /// Longer than anything may be.
    #[error("it claims to be {0} bytes long, more than the format allows")]
    TooLong(usize),
    /// The compressed stream is damaged.
    #[error("it cannot be decompressed: {0}")]
    Zstd(std::io::Error),
    /// It has another length than its directory says.
    #[error("it is {got} bytes long in place of {expected}")]
    Length {
        /// As declared.
        expected: usize,
        /// As found.
        got: usize,
    },
    /// It is not what its name says.
    #[error("its content has the digest {0}")]
    Digest(Digest),
}

/// The zstd level for frames: 158 MB/s on one thread, 5 % larger than level 9 at four times its speed.
const LEVEL: i32 = 3;

/// Encodes `content`.
pub fn encode(content: &[u8]) -> (Encoding, Vec<u8>) {
    match zstd::bulk::compress(content, LEVEL) {
        Ok(compressed) if compressed.len() < content.len() => (Encoding::Zstd, compressed),
        _ => (Encoding::Plain, content.to_vec()),
    }
}

/// Decodes and verifies. `length` is the declared length of the content; the output never grows beyond it.
pub fn decode(digest: &Digest, encoding: Encoding, stored: &[u8], length: usize) -> Result<Vec<u8>, FrameError> {
    if length > MAX_PAGE_BYTES.max(FRAME_BLOCKS * BLOCK as usize) {
        return Err(FrameError::TooLong(length));
    }
    let content = match encoding {
        Encoding::Plain => stored.to_vec(),
        Encoding::Zstd => zstd::bulk::decompress(stored, length).map_err(FrameError::Zstd)?,
    };
    if content.len() != length {
        return Err(FrameError::Length { expected: length, got: content.len() });
    }
    let found = Digest::of(&content);
    if found != *digest { Err(FrameError::Digest(found)) } else { Ok(content) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(content in proptest::collection::vec(0u8..4, 1..20_000)) {
            let (encoding, stored) = encode(&content);
            prop_assert!(stored.len() <= content.len());
            let digest = Digest::of(&content);
            prop_assert_eq!(decode(&digest, encoding, &stored, content.len()).unwrap(), content);
        }

        #[test]
        fn damage_is_refused(at in 0usize..1000, bit in 0u8..8, cut in 0usize..1000) {
            let content: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 7) as u8).collect();
            let (encoding, mut stored) = encode(&content);
            let digest = Digest::of(&content);
            let at = at % stored.len();
            prop_assert!(decode(&digest, encoding, &stored[..cut % stored.len()], 4096).is_err());
            stored[at] ^= 1 << bit;
            // A flipped bit in the checksum-less zstd header may not matter; then the content is still right.
            if let Ok(decoded) = decode(&digest, encoding, &stored, 4096) {
                prop_assert_eq!(decoded, content);
            }
        }
    }

    #[test]
    fn output_is_bounded() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert!(decode(&Digest::of(b""), Encoding::Zstd, &bomb, 4096).is_err());
        assert!(decode(&Digest::of(b""), Encoding::Zstd, &bomb, 64 << 20).is_err());
    }
}

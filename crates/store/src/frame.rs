//! The stored form of a frame or page: as it is, or compressed with zstd (RFC 8878), whichever is shorter; or, beside
//! one of these, compressed after other frames that the reader has.

use std::cell::RefCell;
use std::io::{self, Read, Write};

use collective_model::Digest;
use zstd::bulk::{Compressor, Decompressor};

use crate::{BLOCK, FRAME_BLOCKS, MAX_PAGE_BYTES};

/// How content is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Plain = 0,
    /// One zstd frame.
    Zstd = 1,
    /// One zstd frame, with the content of other frames before it.
    Delta = 2,
    /// Compressed, padded and encrypted for an owner ([`Seal`](crate::seal::Seal)).
    Sealed = 3,
}

impl TryFrom<u8> for Encoding {
    type Error = FrameError;
    fn try_from(byte: u8) -> Result<Self, FrameError> {
        match byte {
            0 => Ok(Self::Plain),
            1 => Ok(Self::Zstd),
            2 => Ok(Self::Delta),
            3 => Ok(Self::Sealed),
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
    /// A delta alone.
    #[error("it is stored as a difference to other frames, and these were not given")]
    Bases,
    /// Private, and no key at hand.
    #[error("it is encrypted for its owner, and no key was given")]
    Sealed,
    /// Not private where all should be.
    #[error("it is not encrypted, as everything of private data is: the store gave something else")]
    Readable,
    /// The key does not fit.
    #[error(
        "it cannot be decrypted: it was changed in the store, is something else, or was encrypted with another key"
    )]
    Unsealed,
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

/// The zstd level for frames where nothing else is asked for (docs/adr/0010).
pub(crate) const LEVEL: i32 = 3;
/// The level where bytes matter more than the maker's time.
pub(crate) const SMALL_LEVEL: i32 = 19;

/// The zstd level for differences: few bytes that many hosts fetch (docs/adr/0008).
const DELTA_LEVEL: i32 = 6;

/// The window of differences: all bases and the content.
const DELTA_WINDOW_LOG: u32 = 20;

thread_local! {
    // Their memory is as large as many a frame: made anew for each one, the kernel's work for it is a tenth of all.
    static COMPRESSOR: RefCell<Option<(i32, Compressor<'static>)>> = const { RefCell::new(None) };
    static DECOMPRESSOR: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

fn compress(content: &[u8], level: i32) -> io::Result<Vec<u8>> {
    COMPRESSOR.with_borrow_mut(|kept| match kept {
        Some((found, compressor)) if *found == level => compressor.compress(content),
        _ => kept.insert((level, Compressor::new(level)?)).1.compress(content),
    })
}

fn decompress(stored: &[u8], length: usize) -> io::Result<Vec<u8>> {
    DECOMPRESSOR.with_borrow_mut(|kept| match kept {
        Some(decompressor) => decompressor.decompress(stored, length),
        None => kept.insert(Decompressor::new()?).decompress(stored, length),
    })
}

/// Encodes `content`.
pub fn encode(content: &[u8]) -> (Encoding, Vec<u8>) {
    encode_at(LEVEL, content)
}

/// Encodes `content` at a level of zstd, 1 to 19: higher ones take longer and give less.
pub(crate) fn encode_at(level: i32, content: &[u8]) -> (Encoding, Vec<u8>) {
    match compress(content, level) {
        Ok(compressed) if compressed.len() < content.len() => (Encoding::Zstd, compressed),
        _ => (Encoding::Plain, content.to_vec()),
    }
}

/// Decodes and verifies. `length` is the declared length of the content; the output never grows beyond it.
pub fn decode(digest: &Digest, encoding: Encoding, stored: &[u8], length: usize) -> Result<Vec<u8>, FrameError> {
    let content = decode_within(encoding, stored, length)?;
    let found = Digest::of(&content);
    if found != *digest { Err(FrameError::Digest(found)) } else { Ok(content) }
}

/// Decodes content of exactly `length` bytes; the output never grows beyond it.
pub(crate) fn decode_within(encoding: Encoding, stored: &[u8], length: usize) -> Result<Vec<u8>, FrameError> {
    if length > MAX_PAGE_BYTES.max(FRAME_BLOCKS * BLOCK as usize) {
        return Err(FrameError::TooLong(length));
    }
    let content = match encoding {
        Encoding::Plain => stored.to_vec(),
        Encoding::Zstd => decompress(stored, length).map_err(FrameError::Zstd)?,
        Encoding::Delta => return Err(FrameError::Bases),
        Encoding::Sealed => return Err(FrameError::Sealed),
    };
    match content.len() {
        got if got == length => Ok(content),
        got => Err(FrameError::Length { expected: length, got }),
    }
}

/// Encodes `content` as a difference to `bases`, the content of other frames back to back.
pub fn encode_delta(content: &[u8], bases: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut encoder = zstd::stream::write::Encoder::with_ref_prefix(Vec::new(), DELTA_LEVEL, bases)?;
    encoder.window_log(DELTA_WINDOW_LOG)?;
    encoder.include_contentsize(false)?;
    encoder.set_pledged_src_size(Some(content.len() as u64))?;
    encoder.write_all(content)?;
    encoder.finish()
}

/// Decodes and verifies what [`encode_delta`] made with the same bases.
pub fn decode_delta(digest: &Digest, stored: &[u8], length: usize, bases: &[u8]) -> Result<Vec<u8>, FrameError> {
    if length > FRAME_BLOCKS * BLOCK as usize {
        return Err(FrameError::TooLong(length));
    }
    let mut content = Vec::with_capacity(length + 1);
    let mut decoder = zstd::stream::read::Decoder::with_ref_prefix(stored, bases).map_err(FrameError::Zstd)?;
    decoder.window_log_max(DELTA_WINDOW_LOG).map_err(FrameError::Zstd)?;
    // One byte more than there may be, so that more is noticed.
    decoder.take(length as u64 + 1).read_to_end(&mut content).map_err(FrameError::Zstd)?;
    verified(digest, content, length)
}

fn verified(digest: &Digest, content: Vec<u8>, length: usize) -> Result<Vec<u8>, FrameError> {
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
    fn a_delta_is_small_and_needs_its_bases() {
        let mut base = vec![0; 400_000];
        blake3::Hasher::new().finalize_xof().fill(&mut base);
        let mut content = base[100_003..231_075].to_vec();
        content[5000] ^= 1;
        let digest = Digest::of(&content);
        let delta = encode_delta(&content, &base).unwrap();
        assert!(delta.len() < 200, "{}", delta.len());
        assert_eq!(decode_delta(&digest, &delta, content.len(), &base).unwrap(), content);
        assert!(decode_delta(&digest, &delta, content.len(), &base[..399_999]).is_err());
        assert!(decode_delta(&digest, &delta, content.len(), &[]).is_err());
        assert!(decode_delta(&digest, &delta, content.len() - 4096, &base).is_err(), "longer than declared");
        assert!(matches!(decode(&digest, Encoding::Delta, &delta, content.len()), Err(FrameError::Bases)));
        for at in 0..delta.len() {
            let mut damaged = delta.clone();
            damaged[at] ^= 0x10;
            if let Ok(decoded) = decode_delta(&digest, &damaged, content.len(), &base) {
                assert_eq!(decoded, content);
            }
            assert!(decode_delta(&digest, &delta[..at], content.len(), &base).is_err());
        }
        let bomb = encode_delta(&vec![0; 64 << 20], &base).unwrap();
        assert!(decode_delta(&digest, &bomb, 131_072, &base).is_err());
    }

    #[test]
    fn output_is_bounded() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 3).unwrap();
        assert!(decode(&Digest::of(b""), Encoding::Zstd, &bomb, 4096).is_err());
        assert!(decode(&Digest::of(b""), Encoding::Zstd, &bomb, 64 << 20).is_err());
    }
}

//! Private data: frames and pages that only their owner can name, read, or tell apart (docs/formats/private.md).
//!
//! Names are keyed (BLAKE3 with a key): whoever has no key cannot find out whether known content is among them, while
//! equal content of one owner still has one name. What is stored is compressed, padded, and sealed with AES-256-GCM-SIV
//! (RFC 8452), which stays sound when a nonce comes twice. The nonce is a keyed hash of exactly what is sealed, so equal
//! input gives equal bytes, and two versions of the compressor, whose output differs, never share a nonce.

use std::io;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use collective_model::Digest;
use zeroize::Zeroizing;

use crate::frame::encode_at;
use crate::known::{BlockHash, PartAnchors, part_anchors};
use crate::pack::{self, Directory, Entry, EntryKind, PackError};
use crate::{Encoding, FrameError, MAX_PAGE_BYTES, decode_within};

/// What derived keys and the sealed name are bound to: another use of the same owner's key gets other keys.
const NAMES: &str = "collective 2026 private data 1: names of frames and pages";
const NONCES: &str = "collective 2026 private data 1: nonces";
const CIPHER: &str = "collective 2026 private data 1: AES-256-GCM-SIV";
const BOUND_TO: &[u8] = b"collective sealed 1\0";

const TAG_LEN: usize = 16;
/// Nonce and tag.
const OVERHEAD: usize = NONCE_LEN + TAG_LEN;
/// What stands before the compressed content: kind, encoding, two zeros, u32 bytes of the content, u32 of this form.
const HEADER: usize = 12;
/// Nothing is padded to fewer bytes: the smallest pages would tell their count of extents.
const LEAST: usize = 512;
/// No sealed frame or page is longer than this, in bytes.
pub const MAX_SEALED_BYTES: usize = padded(MAX_PAGE_BYTES + HEADER) + OVERHEAD;
/// None is shorter.
pub(crate) const MIN_SEALED_BYTES: usize = LEAST + OVERHEAD;

/// An owner's keys for private data, derived from one of 32 bytes.
pub struct Seal {
    names: Zeroizing<[u8; 32]>,
    nonces: Zeroizing<[u8; 32]>,
    cipher: LessSafeKey,
}

impl std::fmt::Debug for Seal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seal(secret)")
    }
}

/// What was sealed.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// A frame of blocks, or a page.
    pub kind: EntryKind,
    /// The content, verified.
    pub content: Vec<u8>,
}

/// The next length to pad to: at most an eighth more, some hundredth on the average for frames, and so that the length of what
/// was padded shows in its highest few bits only (Padmé, from "Reducing Metadata Leakage from Encrypted Files and
/// Communication with PURBs", 2019).
const fn padded(length: usize) -> usize {
    let length = if length < LEAST { LEAST } else { length };
    let exponent = length.ilog2();
    let mask = (1 << (exponent - exponent.ilog2() - 1)) - 1;
    (length + mask) & !mask
}

impl Seal {
    /// Derives an owner's keys.
    pub fn new(owner_key: &[u8; 32]) -> Self {
        let derive = |context| Zeroizing::new(blake3::derive_key(context, owner_key));
        let cipher = UnboundKey::new(&AES_256_GCM_SIV, &*derive(CIPHER));
        let cipher = cipher.unwrap_or_else(|_| unreachable!("a key of the cipher has 32 bytes"));
        Self { names: derive(NAMES), nonces: derive(NONCES), cipher: LessSafeKey::new(cipher) }
    }

    /// The name of some content.
    pub fn name(&self, content: &[u8]) -> Digest {
        Digest(*blake3::keyed_hash(&self.names, content).as_bytes())
    }

    /// What the blocks of a frame that is not sealed are compared by, with what is.
    pub fn block_names(&self, content: &[u8]) -> Vec<[u8; 32]> {
        content.chunks_exact(crate::BLOCK as usize).map(|block| self.name(block).0).collect()
    }

    /// Seals content named `name`.
    pub fn seal(&self, name: &Digest, kind: EntryKind, content: &[u8], level: i32) -> io::Result<Vec<u8>> {
        let (encoding, body) = encode_at(level, content);
        let mut inner = Vec::with_capacity(OVERHEAD + padded(HEADER + body.len()));
        inner.extend_from_slice(&[kind as u8, encoding as u8, 0, 0]);
        inner.extend_from_slice(&(content.len() as u32).to_le_bytes());
        inner.extend_from_slice(&(body.len() as u32).to_le_bytes());
        inner.extend_from_slice(&body);
        inner.resize(padded(inner.len()), 0);
        let nonce = self.nonce(name, &inner);
        let failed = |_| io::Error::other("cannot encrypt a frame: it is too long");
        let bound = Aad::from(bound_to(name));
        let tag = self.cipher.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), bound, &mut inner);
        let tag = tag.map_err(failed)?;
        Ok([&nonce, inner.as_slice(), tag.as_ref()].concat())
    }

    fn nonce(&self, name: &Digest, inner: &[u8]) -> [u8; NONCE_LEN] {
        let mut hasher = blake3::Hasher::new_keyed(&self.nonces);
        hasher.update(&name.0).update(inner);
        let mut nonce = [0; NONCE_LEN];
        hasher.finalize_xof().fill(&mut nonce);
        nonce
    }

    /// Opens what was sealed under `name`, and verifies it.
    pub fn open(&self, name: &Digest, stored: &[u8]) -> Result<Opened, FrameError> {
        if stored.len() < MIN_SEALED_BYTES || stored.len() > MAX_SEALED_BYTES {
            return Err(FrameError::Unsealed);
        }
        let (nonce, rest) = stored.split_first_chunk::<NONCE_LEN>().ok_or(FrameError::Unsealed)?;
        let mut rest = rest.to_vec();
        let bound = Aad::from(bound_to(name));
        let opened = self.cipher.open_in_place(Nonce::assume_unique_for_key(*nonce), bound, &mut rest);
        // Sound from here on; what follows is refused only where another program of the owner wrote it.
        let inner: &[u8] = opened.map_err(|_| FrameError::Unsealed)?;
        let (header, rest) = inner.split_first_chunk::<HEADER>().ok_or(FrameError::Unsealed)?;
        let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let kind = match header[0] {
            0 => EntryKind::Data,
            1 => EntryKind::Page,
            _ => return Err(FrameError::Unsealed),
        };
        let body = rest.get(..number(8) as usize).ok_or(FrameError::Unsealed)?;
        let content = decode_within(Encoding::try_from(header[1])?, body, number(4) as usize)?;
        match self.name(&content) {
            found if found == *name => Ok(Opened { kind, content }),
            found => Err(FrameError::Digest(found)),
        }
    }
}

fn bound_to(name: &Digest) -> Vec<u8> {
    [BOUND_TO, &name.0].concat()
}

/// How content is named and stored: for all who may read an appliance, or sealed for an owner.
#[derive(Clone, Debug, Default)]
pub(crate) struct Form(pub Option<Arc<Seal>>);

impl Form {
    /// The name of a frame or page.
    pub fn name(&self, content: &[u8]) -> Digest {
        match &self.0 {
            None => Digest::of(content),
            Some(seal) => seal.name(content),
        }
    }

    /// What blocks are compared by. It never leaves the machine, and is keyed as well, so that what is remembered of
    /// private packs says as little as they do.
    pub fn block(&self, block: &[u8]) -> BlockHash {
        self.name(block).0
    }

    /// What similar frames are found by. Sealed frames have none: an anchor is a piece of the content.
    pub fn anchors(&self, content: &[u8]) -> PartAnchors {
        if self.0.is_some() { Vec::new() } else { part_anchors(content) }
    }

    /// The stored form.
    pub fn encode(&self, name: &Digest, kind: EntryKind, content: &[u8], level: i32) -> io::Result<Stored> {
        let (encoding, bytes) = match &self.0 {
            None => encode_at(level, content),
            Some(seal) => (Encoding::Sealed, seal.seal(name, kind, content, level)?),
        };
        match encoding {
            // How long the content is, and what it is, is for the owner to know.
            Encoding::Sealed => Ok(Stored { kind: EntryKind::Data, length: bytes.len() as u32, encoding, bytes }),
            _ => Ok(Stored { kind, length: content.len() as u32, encoding, bytes }),
        }
    }

    /// Decodes and verifies; `kind` and `length` are what the pack says.
    pub fn decode(
        &self,
        name: &Digest,
        kind: EntryKind,
        encoding: Encoding,
        stored: &[u8],
        length: usize,
    ) -> Result<Opened, FrameError> {
        match (&self.0, encoding) {
            (Some(seal), Encoding::Sealed) => seal.open(name, stored),
            (Some(_), _) => Err(FrameError::Readable),
            (None, _) => crate::decode(name, encoding, stored, length).map(|content| Opened { kind, content }),
        }
    }
}

/// A frame or page as it goes into a pack.
pub(crate) struct Stored {
    pub kind: EntryKind,
    pub encoding: Encoding,
    pub length: u32,
    pub bytes: Vec<u8>,
}

/// Reads a whole private pack and checks its form, which is all that can be done without its owner's key: everything in
/// it has to be sealed, one after the other and without gaps, where something readable could be.
pub fn verify_sealed(bytes: &[u8]) -> Result<Directory, PackError> {
    let directory = pack::directory(bytes)?;
    let mut at = pack::HEADER;
    for (index, entry) in directory.entries.iter().enumerate() {
        if entry.encoding != Encoding::Sealed || entry.offset != at {
            return Err(PackError::Entry { index, why: "it is not sealed, as everything of a private pack is" });
        }
        at = entry.range().end;
    }
    let range = pack::directory_range(&bytes[bytes.len() - pack::TRAILER as usize..], bytes.len() as u64)?;
    if !directory.deltas.is_empty() || at != range.start {
        return Err(PackError::Format("a private pack has something in it that is not sealed"));
    }
    Ok(directory)
}

/// What a sealed entry of a whole pack holds, for its owner.
pub fn unsealed(bytes: &[u8], entry: &Entry, seal: &Arc<Seal>) -> Result<Opened, PackError> {
    pack::opened(bytes, entry, &Form(Some(seal.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{LEVEL, SMALL_LEVEL};
    use proptest::prelude::*;

    fn seal(owner: u8) -> Seal {
        Seal::new(&[owner; 32])
    }

    #[test]
    fn lengths_show_in_few_steps() {
        assert_eq!([0, 1, 511, 512, 513, 530].map(padded), [512, 512, 512, 512, 544, 544]);
        assert_eq!([200_000, 262_144, 524_300].map(padded), [200_704, 262_144, 540_672]);
        let steps: std::collections::BTreeSet<usize> = (0..600_000).map(padded).collect();
        assert!(steps.len() < 250, "{}", steps.len());
        let worst = (512..600_000).map(|length| padded(length) * 1000 / length).max().unwrap();
        assert!(worst < 1125, "{worst}");
        assert_eq!(MAX_SEALED_BYTES, padded(MAX_PAGE_BYTES + HEADER) + OVERHEAD);
    }

    /// `docs/formats/private.md` shows these bytes.
    #[test]
    fn the_format_is_fixed() {
        let seal = Seal::new(&std::array::from_fn(|i| i as u8));
        // It does not compress, so that nothing here depends on a version of the compressor.
        let mut content = vec![0; 4096];
        blake3::Hasher::new().finalize_xof().fill(&mut content);
        let name = seal.name(&content);
        let stored = seal.seal(&name, EntryKind::Data, &content, LEVEL).unwrap();
        assert_eq!(stored.len(), 4352 + OVERHEAD);
        let shown = [name, Digest::of(&stored)].map(|digest| digest.to_string());
        let expected = [
            "776947676c1debb61903a9fdf2659bfa26a4e7a16b7136c1025e50637688014a",
            "b7da87386e693ba61c5d1d3825da948f2d3dbe09b4b022eaada354949aeb3a78",
        ];
        assert_eq!(shown.each_ref().map(String::as_str), expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn round_trip_and_equal_bytes(content in proptest::collection::vec(0u8..4, 1..20_000), page: bool) {
            let (seal, kind) = (seal(1), if page { EntryKind::Page } else { EntryKind::Data });
            let name = seal.name(&content);
            let stored = seal.seal(&name, kind, &content, LEVEL).unwrap();
            prop_assert_eq!(&stored, &Seal::new(&[1; 32]).seal(&name, kind, &content, LEVEL).unwrap());
            prop_assert_eq!(seal.open(&name, &stored).unwrap(), Opened { kind, content });
        }

        #[test]
        fn any_flipped_bit_and_any_cut_is_refused(at: prop::sample::Index, bit in 0u8..8, length in 1usize..9000) {
            let seal = seal(1);
            let content: Vec<u8> = (0..length as u32).map(|i| ((i * i) >> 7) as u8).collect();
            let name = seal.name(&content);
            let mut stored = seal.seal(&name, EntryKind::Data, &content, LEVEL).unwrap();
            let at = at.index(stored.len());
            prop_assert!(seal.open(&name, &stored[..at]).is_err());
            stored[at] ^= 1 << bit;
            prop_assert!(matches!(seal.open(&name, &stored), Err(FrameError::Unsealed)));
        }

        #[test]
        fn owners_share_nothing(content in proptest::collection::vec(any::<u8>(), 1..5000), a: u8, b: u8) {
            prop_assume!(a != b);
            let (a, b) = (seal(a), seal(b));
            let name = a.name(&content);
            prop_assert_ne!(name, b.name(&content));
            prop_assert_ne!(name, Digest::of(&content));
            let stored = a.seal(&name, EntryKind::Data, &content, LEVEL).unwrap();
            // The same name, so that only the key differs.
            prop_assert_ne!(&stored[..NONCE_LEN], &b.seal(&name, EntryKind::Data, &content, LEVEL).unwrap()[..NONCE_LEN]);
            prop_assert!(matches!(b.open(&name, &stored), Err(FrameError::Unsealed)));
            prop_assert!(matches!(a.open(&b.name(&content), &stored), Err(FrameError::Unsealed)));
        }
    }

    #[test]
    fn another_compression_of_the_same_content_has_another_nonce() {
        let seal = seal(1);
        let content: Vec<u8> = (0..100_000u32).map(|i| (((i / 7) * (i / 5)) >> 9) as u8).collect();
        let name = seal.name(&content);
        let forms = [LEVEL, SMALL_LEVEL].map(|level| seal.seal(&name, EntryKind::Data, &content, level).unwrap());
        assert_ne!(forms[0][..NONCE_LEN], forms[1][..NONCE_LEN]);
        for form in &forms {
            assert_eq!(seal.open(&name, form).unwrap().content, content);
        }
    }

    #[test]
    fn what_is_not_sealed_is_refused_where_everything_should_be() {
        let content = vec![7; 4096];
        let form = Form(Some(Arc::new(seal(1))));
        let (encoding, stored) = crate::encode(&content);
        let refused = form.decode(&Digest::of(&content), EntryKind::Data, encoding, &stored, 4096);
        assert!(matches!(refused, Err(FrameError::Readable)));
        let sealed = form.encode(&form.name(&content), EntryKind::Data, &content, LEVEL).unwrap();
        let open = Form::default();
        let refused = open.decode(&form.name(&content), EntryKind::Data, sealed.encoding, &sealed.bytes, 4096);
        assert!(matches!(refused, Err(FrameError::Sealed)));
    }
}

//! Packs, their directories, what is in them, and what a maker remembers of them.

use collective_model::Digest;
use collective_store::pack;
use collective_store::publish::{KnownBlocks, PackHashes};
use collective_store::trace::Trace;
use collective_store::{Encoding, FrameError, decode, decode_delta};

use super::number;

/// A whole pack.
pub fn pack(data: &[u8]) {
    let hashes = PackHashes::of(data);
    let Ok(directory) = pack::verify(data) else { return };
    for entry in &directory.entries {
        let content = pack::contents(data, entry).expect("it was verified");
        assert_eq!(Digest::of(&content), entry.digest);
        assert_eq!(content.len(), entry.length as usize);
    }
    let hashes = hashes.expect("it was verified");
    assert_eq!(PackHashes::decode(&hashes.encode()), Some(hashes));
}

/// Directory and trailer, as a host reads them from a pack's end; the size of the pack comes first.
pub fn tail(data: &[u8]) {
    let rest = &mut { data };
    let size = number(rest, 4);
    let cut = rest.len().saturating_sub(pack::TRAILER as usize);
    let Ok(range) = pack::directory_range(&rest[cut..], size) else { return };
    assert!(range.start <= range.end && range.end <= size);
    let Ok(directory) = pack::parse_directory(rest, range.start) else { return };
    let deltas = directory.deltas.iter().map(|delta| &delta.entry);
    for entry in directory.entries.iter().chain(deltas) {
        assert!(entry.range().end <= range.start, "it lies outside of the bodies");
    }
    assert!(directory.deltas.iter().all(|delta| !delta.bases.is_empty()));
}

/// One stored form: encoding, length of the content, bytes.
pub fn frame(data: &[u8]) {
    let rest = &mut { data };
    let (encoding, length) = (number(rest, 1) as u8, number(rest, 4) as usize);
    let Ok(encoding) = Encoding::try_from(encoding) else { return };
    right_or_refused(length, |digest| decode(digest, encoding, rest, length));
}

/// A difference: lengths of the content and of the bases, the bases, bytes.
pub fn delta(data: &[u8]) {
    let rest = &mut { data };
    let (length, bases) = (number(rest, 4) as usize, number(rest, 2) as usize);
    let (bases, stored) = rest.split_at(bases.min(rest.len()));
    right_or_refused(length, |digest| decode_delta(digest, stored, length, bases));
}

/// Nothing has this name; whoever is told the right one gets what it says.
fn right_or_refused(length: usize, decode: impl Fn(&Digest) -> Result<Vec<u8>, FrameError>) {
    let Err(FrameError::Digest(found)) = decode(&Digest([0; 32])) else { return };
    let content = decode(&found).expect("it is what its name says");
    assert!(content.len() == length && Digest::of(&content) == found);
}

/// What a maker remembers, with its check sum made right.
pub fn hashes(data: &[u8]) {
    assert!(PackHashes::decode(data).is_none_or(|hashes| hashes.encode() == data));
    let right = [data, &Digest::of(data).0].concat();
    let Some(hashes) = PackHashes::decode(&right) else { return };
    assert!(hashes.encode() == right, "the same memory has the same bytes");
    KnownBlocks::default().learn(&Digest([0; 32]), &hashes);
}

/// A boot trace.
pub fn trace(data: &[u8]) {
    let Ok(trace) = Trace::decode(data) else { return };
    assert!(trace.encode() == data, "the same trace has the same bytes");
    assert!(trace.ranges(1000).all(|range| range.start < range.end && range.end <= 1000));
}

//! Whole machines as content-addressed images: cut, hashed, packed, published, fetched, verified.
//!
//! An **image** is an address space of 4 KiB [`BLOCK`]s. Blocks that are not zero lie in **frames** of up to 128
//! blocks, each named by the BLAKE3 of its content. A tree of **pages** says which blocks lie where; it is
//! content-addressed too, and its root page names the image. Frames and pages travel in **packs**, immutable
//! objects that any store can serve by range. `docs/formats/` has every byte.
//!
//! The maker's side is [`publish`], the plane's is [`depot`], the host's is [`fetch`] over its [`cache`].

#![forbid(unsafe_code)]

mod blocks;
pub mod cache;
mod decoded;
pub mod depot;
pub mod fetch;
mod frame;
pub mod image;
mod known;
mod locate;
pub mod pack;
pub mod page;
pub mod publish;
pub mod seal;
mod settle;
mod similar;
mod source;
pub mod sparse;
pub mod trace;

pub(crate) use frame::decode_within;
pub use frame::{Encoding, FrameError, decode, decode_delta, encode};
pub use source::{PackInfo, Source, SourceError, Vault};

/// The unit of identity, in bytes.
pub const BLOCK: u64 = 4096;
/// A frame holds at most this many blocks (512 KiB).
pub const FRAME_BLOCKS: usize = 128;
/// Differences are made against parts of frames of this many blocks (128 KiB), counted from the frame's first.
pub const PART_BLOCKS: usize = 32;
/// No page is longer than this, in bytes.
pub const MAX_PAGE_BYTES: usize = 1 << 20;

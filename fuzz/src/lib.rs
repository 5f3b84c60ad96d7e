//! One function for each format that comes from outside: it takes any bytes, and must neither panic nor take long nor
//! believe what contradicts itself. cargo-fuzz runs them (`make fuzz`), and `tests/formats.rs` with what is in `corpus/`.

mod disk;
mod image;
mod pack;
mod stream;
mod text;

#[allow(unused_imports)] // Only who makes the corpus needs the second.
pub use disk::{disk, shortened};
pub use image::{image, page};
pub use pack::{delta, frame, hashes, pack, tail, trace};
pub use stream::{layer, machine, sparse};
pub use text::{manifest, ovf, recipe, signed};

/// A target's function.
pub type Target = fn(&[u8]);

/// All targets by their names, and how many inputs an ordinary test run gives them: those that write files are slower.
pub const TARGETS: [(&str, Target, u64); 16] = [
    ("delta", delta, 25_000),
    ("disk", disk, 4000),
    ("frame", frame, 50_000),
    ("hashes", hashes, 100_000),
    ("image", image, 1200),
    ("layer", layer, 1000),
    ("machine", machine, 100_000),
    ("manifest", manifest, 80_000),
    ("ovf", ovf, 80_000),
    ("pack", pack, 100_000),
    ("page", page, 150_000),
    ("recipe", recipe, 50_000),
    ("signed", signed, 3000),
    ("sparse", sparse, 5000),
    ("tail", tail, 150_000),
    ("trace", trace, 150_000),
];

/// A folder for what a target writes, in memory where that can be.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder for temporary files")
}

/// Whatever needs a runtime.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(future)
}

/// Little-endian number at the front, which is taken away; zeros where there are too few bytes.
fn number(data: &mut &[u8], bytes: usize) -> u64 {
    let (head, rest) = data.split_at(bytes.min(data.len()));
    *data = rest;
    head.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

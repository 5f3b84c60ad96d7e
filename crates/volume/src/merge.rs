//! Several layers in one: what a chain reads through them, in a layer of its own.
//!
//! The old ones are only read, so they may belong to others too. Time and space are those of what the new one holds:
//! what a newer layer hides is not read, and holes stay holes.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use collective_store::BLOCK;

use crate::layer::{Layer, LayerError};
use crate::make::map_path;
use crate::map;

/// Bytes that are copied at once.
const STEP: u64 = 1 << 20;
/// Written data goes to the disk after so many bytes, so that the flush of a guest does not wait for all of it.
const FLUSH_EVERY: u64 = 32 << 20;

impl Layer {
    /// Makes one layer of several that lie on each other, oldest first, at `target`, where there must be none. Durable
    /// when it returns; there is nothing at `target` if it fails.
    ///
    /// Without `keep_zeros` blocks of zeros are left out: only where nothing, not even an image, is below the lowest one.
    /// `pace` hears of every piece before it is copied, in bytes; it may wait, and its error ends the merge.
    pub fn merge(
        layers: &[Arc<Layer>],
        target: &Path,
        keep_zeros: bool,
        pace: &mut dyn FnMut(u64) -> io::Result<()>,
    ) -> Result<Layer, LayerError> {
        let size = layers.iter().map(|layer| layer.made_for()).max().unwrap_or(0);
        Layer::create(target, size)?;
        let made = Layer::open(target, size, true).and_then(|merged| {
            let failed = |source| LayerError::Io { attempt: "merge layers into", path: target.to_owned(), source };
            Copier { merged: &merged, keep_zeros, unflushed: 0, pace }.copy_all(layers, size).map_err(failed)?;
            Ok(merged)
        });
        if made.is_err() {
            remove(target);
        }
        made
    }
}

/// Removes both files of a layer that nobody needs, as far as they are there.
fn remove(layer: &Path) {
    for path in [layer.to_owned(), map_path(layer)] {
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %path.display(), "what is left of a merge that failed cannot be removed");
        }
    }
}

struct Copier<'a> {
    merged: &'a Layer,
    keep_zeros: bool,
    unflushed: u64,
    pace: &'a mut dyn FnMut(u64) -> io::Result<()>,
}

impl Copier<'_> {
    fn copy_all(&mut self, layers: &[Arc<Layer>], size: u64) -> io::Result<()> {
        let mut taken = vec![0; map::bits_length(size)];
        for layer in layers.iter().rev() {
            // Of a layer that lost something nobody knows what; the copy would be taken for whole.
            layer.flush()?;
            let mut bits = layer.bits();
            for (held, taken) in bits.iter_mut().zip(&mut taken) {
                let new = *held & !*taken;
                *taken |= *held;
                *held = new;
            }
            map::runs(&bits).try_for_each(|blocks| self.copy_held(layer, blocks))?;
        }
        self.merged.flush()
    }

    /// Copies blocks that `layer` holds.
    fn copy_held(&mut self, layer: &Layer, blocks: Range<u64>) -> io::Result<()> {
        let end = blocks.end * BLOCK;
        let mut at = blocks.start * BLOCK;
        while at < end {
            // A file system may have smaller pieces than blocks.
            let data = layer.next_data(at..end)?;
            let data = data.map_or(end..end, |data| data.start / BLOCK * BLOCK..data.end.next_multiple_of(BLOCK));
            self.put_zeros(at..data.start)?;
            for start in data.clone().step_by(STEP as usize) {
                self.copy_piece(layer, start..data.end.min(start + STEP))?;
            }
            at = data.end;
        }
        Ok(())
    }

    fn copy_piece(&mut self, layer: &Layer, piece: Range<u64>) -> io::Result<()> {
        (self.pace)(piece.end - piece.start)?;
        let mut buffer = vec![0; (piece.end - piece.start) as usize];
        layer.read(piece.start, &mut buffer)?;
        let is_zero = |block: &[u8; BLOCK as usize]| block.iter().all(|byte| *byte == 0);
        let (blocks, _) = buffer.as_chunks();
        let mut at = piece.start;
        for alike in blocks.chunk_by(|one, next| is_zero(one) == is_zero(next)) {
            let run = alike.as_flattened();
            let length = run.len() as u64;
            if is_zero(&alike[0]) {
                self.put_zeros(at..at + length)?;
            } else {
                self.merged.write(at, run)?;
                self.unflushed += length;
            }
            at += length;
        }
        if self.unflushed >= FLUSH_EVERY {
            self.merged.flush()?;
            self.unflushed = 0;
        }
        Ok(())
    }

    fn put_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        match self.keep_zeros && range.start < range.end {
            true => self.merged.discard(range.start / BLOCK, (range.end - range.start) / BLOCK),
            false => Ok(()),
        }
    }
}

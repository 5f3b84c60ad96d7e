//! A disk: an image under a chain of layers.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use collective_store::BLOCK;
use collective_store::fetch::{FetchError, FrameStore};
use collective_store::image::{ImageMap, Run};
use collective_store::trace::Trace;

use crate::chain::Chain;
use crate::follow::Follower;
use crate::layer::{Layer, LayerError};
use crate::recorder::Recorder;

/// A chain has at most this many layers.
pub const MAX_LAYERS: usize = 255;

/// No run that is looked for is longer, in bytes.
const MAX_RUN: usize = 64 << 20;

/// Why a disk cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// One of its layers.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The chain cannot take writes, or has too many layers.
    #[error("a disk needs 1 to {MAX_LAYERS} layers, and this one has {0}")]
    Layers(usize),
    /// Whoever died had it open, and its last words are missing.
    #[error("what was written to it last is not known any more: it is not noted, or a flush had failed")]
    NotNoted,
}

/// A disk, open. Reads run side by side; writes to blocks that the top layer holds do as well.
pub struct Disk {
    size: u64,
    image: Option<Arc<ImageMap>>,
    store: Arc<FrameStore>,
    /// The last one takes the writes, unless the disk is frozen. Another one comes only with `settling` held alone.
    pub(crate) chain: Chain,
    pub(crate) frozen: bool,
    recorder: Recorder,
    pub(crate) follower: Follower,
    /// Whether what is read of layers is noted too.
    records_layers: bool,
    /// Shared by all who change blocks; alone while old content goes into a block that is not in the top layer yet, so
    /// that it cannot overwrite what another wrote there meanwhile. Never held while something is fetched.
    settling: RwLock<()>,
}

/// Part of a read: all from one place.
enum Piece {
    Zeros,
    Layer(Arc<Layer>),
    Frame { digest: collective_model::Digest, length: u32, from: usize },
}

fn unreadable(error: &FetchError) -> io::Error {
    tracing::error!(%error, "a guest's read fails");
    io::Error::other(error.to_string())
}

impl Disk {
    /// Opens a disk of `size` bytes that is never written to, such as a saved memory.
    pub fn open_frozen(
        size: u64,
        image: Option<Arc<ImageMap>>,
        store: Arc<FrameStore>,
        layers: &[PathBuf],
    ) -> Result<Self, DiskError> {
        if layers.len() > MAX_LAYERS {
            return Err(DiskError::Layers(layers.len()));
        }
        let layers = layers.iter().map(|path| Layer::open(path, size, false)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { frozen: true, records_layers: true, ..Self::over(size, image, store, layers) })
    }

    /// Opens a disk of `size` bytes: `image` under `layers`, oldest first; the last one takes the writes.
    pub fn open(
        size: u64,
        image: Option<Arc<ImageMap>>,
        store: Arc<FrameStore>,
        layers: &[PathBuf],
    ) -> Result<Self, DiskError> {
        let disk = Self::open_layers(size, image, store, layers)?;
        disk.chain.forget_void();
        Ok(disk)
    }

    fn open_layers(
        size: u64,
        image: Option<Arc<ImageMap>>,
        store: Arc<FrameStore>,
        layers: &[PathBuf],
    ) -> Result<Self, DiskError> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return Err(DiskError::Layers(layers.len()));
        }
        let last = layers.len() - 1;
        let open = |(i, path): (usize, &PathBuf)| Layer::open(path, size, i == last);
        let mut layers = layers.iter().enumerate().map(open).collect::<Result<Vec<_>, _>>()?;
        if let Some(top) = layers.pop() {
            layers.push(top.note_held()?);
        }
        Ok(Self::over(size, image, store, layers))
    }

    /// Opens a disk that another process had open until it died, as it was then: with all that was written to it, whether it
    /// was flushed or not. That is durable afterwards.
    pub fn take_over(
        size: u64,
        image: Option<Arc<ImageMap>>,
        store: Arc<FrameStore>,
        layers: &[PathBuf],
    ) -> Result<Self, DiskError> {
        let disk = Self::open_layers(size, image, store, layers)?;
        if disk.chain.is_known() { Ok(disk) } else { Err(DiskError::NotNoted) }
    }

    /// `layers`: at least one, all of them for `size`, the last one writable.
    pub(crate) fn over(size: u64, image: Option<Arc<ImageMap>>, store: Arc<FrameStore>, layers: Vec<Layer>) -> Self {
        let chain = Chain::new(size.div_ceil(BLOCK), layers);
        let recorder = Recorder::new(chain.blocks());
        let follower = Follower::default();
        let settling = RwLock::new(());
        Self { size, image, store, chain, frozen: false, recorder, follower, records_layers: false, settling }
    }

    /// Keeps what the disk is now: from here on `next`, an empty layer, takes the writes. What the old layers got is
    /// durable after the next [`flush`](Self::flush).
    pub fn freeze(&self, next: Layer) -> Result<(), DiskError> {
        let next = next.note_held()?;
        let _alone = self.alone();
        if self.frozen || !self.chain.push(next) {
            return Err(DiskError::Layers(self.chain.len() + 1));
        }
        Ok(())
    }

    /// Goes on with `layer`, durable and frozen, below all others: it has what the image shows in the blocks that it holds.
    pub fn put_below(&self, layer: Layer) -> Result<(), DiskError> {
        if self.chain.push_below(layer) { Ok(()) } else { Err(DiskError::Layers(self.chain.len() + 1)) }
    }

    /// The layers at these paths, oldest first, if they are next to each other in this disk and none of them takes writes.
    pub fn frozen_layers(&self, paths: &[PathBuf]) -> Option<Vec<Arc<Layer>>> {
        let found = self.chain.find(paths)?;
        (self.frozen || !self.chain.has_top(&found)).then_some(found)
    }

    /// Whether blocks of zeros in this layer can be seen: there is something below it.
    pub fn is_over_something(&self, layer: &Arc<Layer>) -> bool {
        self.image.is_some() || !self.chain.is_lowest(layer)
    }

    /// Goes on with `merged` ([`Layer::merge`]) in place of these layers; reads under way keep the old ones. False if they
    /// are not all in the disk, next to each other, or take writes.
    pub fn replace(&self, layers: &[Arc<Layer>], merged: Layer) -> bool {
        (self.frozen || !self.chain.has_top(layers)) && self.chain.replace(layers, merged)
    }

    /// Whether it is never written to.
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes in which it differs from its image.
    pub fn own_bytes(&self) -> u64 {
        self.chain.own_bytes()
    }

    /// The image's data frames.
    pub fn image(&self) -> Option<&Arc<ImageMap>> {
        self.image.as_ref()
    }

    /// From here on not only reads of the image are noted, but those of layers too.
    pub fn record_all(&mut self) {
        self.records_layers = true;
    }

    /// Stops noting which blocks are read, and gives them in the order of the first time.
    pub fn stop_recording(&self) -> Trace {
        self.recorder.stop()
    }

    /// Where the bytes at `offset` come from, and how many of the next `length` come from there.
    fn piece_at(&self, offset: u64, length: usize) -> (Piece, usize) {
        let (block, within) = (offset / BLOCK, offset % BLOCK);
        let (owner, alike) = self.chain.run_at(block, (within + length as u64).div_ceil(BLOCK));
        let (piece, run) = match (owner, &self.image) {
            (Some(layer), _) => (Piece::Layer(layer), alike),
            (None, None) => (Piece::Zeros, alike),
            (None, Some(image)) => match image.run_at(block) {
                Run::Zeros(run) => (Piece::Zeros, run.min(alike)),
                Run::Frame { digest, length, offset, blocks } => {
                    let from = usize::from(offset) * BLOCK as usize + within as usize;
                    (Piece::Frame { digest, length, from }, blocks.min(alike))
                }
            },
        };
        (piece, ((run * BLOCK - within) as usize).min(length))
    }

    /// The first range at or after `offset` that may hold something else than zeros.
    pub fn next_data(&self, offset: u64) -> Option<Range<u64>> {
        let mut at = offset;
        while at < self.size {
            let (piece, count) = self.piece_at(at, self.clamp(at, MAX_RUN));
            let end = at + count as u64;
            if !matches!(piece, Piece::Zeros) {
                return Some(at..end);
            }
            at = end;
        }
        None
    }

    fn note(&self, piece: &Piece, at: u64, count: usize) {
        if match piece {
            Piece::Zeros => false,
            Piece::Layer(_) => self.records_layers,
            Piece::Frame { .. } => true,
        } {
            self.recorder.note(at / BLOCK..(at + count as u64).div_ceil(BLOCK));
        }
    }

    fn clamp(&self, offset: u64, length: usize) -> usize {
        length.min(self.size.saturating_sub(offset) as usize)
    }

    /// Reads without waiting for the network; `None` where that is not possible. Short at the end of the disk.
    pub fn try_read(&self, offset: u64, length: usize) -> io::Result<Option<Vec<u8>>> {
        let mut out = vec![0; self.clamp(offset, length)];
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let (piece, count) = self.piece_at(at, out.len() - done);
            let part = &mut out[done..done + count];
            self.note(&piece, at, count);
            match piece {
                Piece::Zeros => {}
                Piece::Layer(layer) => layer.read(at, part)?,
                Piece::Frame { digest, length, from } => {
                    if !self.store.read_at_hand(&digest, length, from, part).map_err(|e| unreadable(&e))? {
                        return Ok(None);
                    }
                }
            }
            done += count;
        }
        Ok(Some(out))
    }

    /// Reads, fetching what is missing and waiting for a store that is away.
    pub async fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; self.clamp(offset, length)];
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let (piece, count) = self.piece_at(at, out.len() - done);
            let part = &mut out[done..done + count];
            self.note(&piece, at, count);
            match piece {
                Piece::Zeros => {}
                Piece::Layer(layer) => layer.read(at, part)?,
                Piece::Frame { digest, length, from } => {
                    let frame = self.store.frame_patiently(&digest, length).await.map_err(|e| unreadable(&e))?;
                    copy(&frame, from, part)?;
                }
            }
            done += count;
        }
        Ok(out)
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.frozen {
            return Err(rustix::io::Errno::ROFS.into());
        }
        match offset.checked_add(length) {
            Some(end) if end <= self.size => Ok(()),
            // As a file that cannot grow says it; an error without a number would look like a broken disk.
            _ => Err(rustix::io::Errno::FBIG.into()),
        }
    }

    /// Writes without waiting for the network; false where old content has to be fetched first.
    pub fn try_write(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        self.check(offset, data.len() as u64)?;
        self.put(offset, data)
    }

    /// Writes, fetching the rest of blocks that are written in part.
    pub async fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check(offset, data.len() as u64)?;
        // A new layer may come in between.
        while !self.put(offset, data)? {
            for block in self.partial_blocks(offset, data.len() as u64) {
                self.own_block(block).await?;
            }
        }
        Ok(())
    }

    /// Blocks that a write touches but does not cover; the disk's last block may be shorter.
    fn partial_blocks(&self, offset: u64, length: u64) -> Vec<u64> {
        let end = offset + length;
        let mut partial = Vec::new();
        if length > 0 && !offset.is_multiple_of(BLOCK) {
            partial.push(offset / BLOCK);
        }
        if length > 0 && !end.is_multiple_of(BLOCK) && end != self.size && partial.last() != Some(&(end / BLOCK)) {
            partial.push(end / BLOCK);
        }
        partial
    }

    /// Copies a block into the top layer, so that parts of it can be written there.
    async fn own_block(&self, block: u64) -> io::Result<()> {
        if self.chain.is_in_top(block) {
            return Ok(());
        }
        let old = self.read(block * BLOCK, BLOCK as usize).await?;
        let _alone = self.alone();
        // Another write may have taken the block while its old content was fetched.
        if !self.chain.is_in_top(block) {
            self.top_layer()?.write(block * BLOCK, &old)?;
            self.chain.take(block..block + 1);
        }
        Ok(())
    }

    pub(crate) fn top_layer(&self) -> io::Result<Arc<Layer>> {
        self.chain.top_layer().ok_or_else(|| rustix::io::Errno::ROFS.into())
    }

    fn changing(&self) -> RwLockReadGuard<'_, ()> {
        self.settling.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        self.settling.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes into the top layer; false where that does not hold the rest of a block that is written in part.
    pub(crate) fn put(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        // Else a write of nothing inside a block would take that block without its content.
        if data.is_empty() {
            return Ok(true);
        }
        let _changing = self.changing();
        if self.partial_blocks(offset, data.len() as u64).iter().any(|block| !self.chain.is_in_top(*block)) {
            return Ok(false);
        }
        self.top_layer()?.write(offset, data)?;
        let blocks = offset / BLOCK..(offset + data.len() as u64).div_ceil(BLOCK);
        self.chain.take(blocks.clone());
        self.follower.note(blocks);
        Ok(true)
    }

    /// Makes a range zeros; whole blocks of it give their space back.
    pub async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check(offset, length)?;
        let end = offset + length;
        let (first, last) = (offset.div_ceil(BLOCK), end / BLOCK);
        if first >= last {
            return self.write(offset, &vec![0; length as usize]).await;
        }
        self.write(offset, &vec![0; (first * BLOCK - offset) as usize]).await?;
        self.punch(first..last)?;
        self.write(last * BLOCK, &vec![0; (end - last * BLOCK) as usize]).await
    }

    pub(crate) fn punch(&self, blocks: Range<u64>) -> io::Result<()> {
        let _changing = self.changing();
        self.top_layer()?.discard(blocks.start, blocks.end - blocks.start)?;
        self.chain.take(blocks.clone());
        self.follower.note(blocks);
        Ok(())
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        self.chain.flush()
    }
}

fn copy(frame: &[u8], from: usize, part: &mut [u8]) -> io::Result<()> {
    let found = frame.get(from..from + part.len());
    part.copy_from_slice(found.ok_or_else(|| io::Error::other("an extent reaches beyond its frame"))?);
    Ok(())
}

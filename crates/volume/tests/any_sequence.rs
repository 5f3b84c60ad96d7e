//! Whatever is done to a disk, it reads like an array of bytes, after every reopening too.

mod common;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use collective_store::fetch::FrameStore;
use collective_store::image::ImageMap;
use collective_volume::{Disk, Layer};
use common::{Shelf, image_of, noise, store_of};
use proptest::prelude::*;

/// Positions are parts per 65536 of the disk; `grain` rounds position and length.
#[derive(Clone, Debug)]
enum Step {
    Read {
        at: u16,
        length: usize,
        grain: usize,
    },
    Write {
        at: u16,
        length: usize,
        grain: usize,
        seed: u64,
    },
    Zero {
        at: u16,
        length: usize,
        grain: usize,
    },
    Flush,
    Reopen,
    Freeze,
    Grow(usize),
    /// Forgets what was kept at one of the instants.
    Forget(u8),
    Merge {
        live: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let span = || (any::<u16>(), 1usize..40_000, prop_oneof![Just(1usize), Just(512), Just(4096)]);
    let step = prop_oneof![
        4 => span().prop_map(|(at, length, grain)| Step::Read { at, length, grain }),
        6 => (span(), any::<u64>()).prop_map(|((at, length, grain), seed)| Step::Write { at, length, grain, seed }),
        3 => span().prop_map(|(at, length, grain)| Step::Zero { at, length, grain }),
        1 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        2 => Just(Step::Freeze),
        1 => any::<u8>().prop_map(Step::Forget),
        2 => any::<bool>().prop_map(|live| Step::Merge { live }),
        1 => (1usize..40).prop_map(|sectors| Step::Grow(sectors * 512)),
    ];
    proptest::collection::vec(step, 1..60)
}

struct Rig {
    folder: tempfile::TempDir,
    store: Arc<FrameStore>,
    image: Option<Arc<ImageMap>>,
    layers: Vec<PathBuf>,
    disk: Disk,
    model: Vec<u8>,
    /// The layers of states that were kept, and what they were.
    kept: Vec<(Vec<PathBuf>, Vec<u8>)>,
    next_layer: usize,
}

impl Rig {
    async fn new(size: usize, image: Option<Vec<u8>>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Arc::new(Shelf::default());
        let store = store_of(&folder.path().join("cache"), &shelf).await;
        let mut model = image.clone().unwrap_or_default();
        model.resize(size, 0);
        let image = match image {
            Some(content) => Some(image_of(&shelf, &store, &content).await),
            None => None,
        };
        let layers = vec![new_layer(folder.path(), 0, size)];
        let disk = Disk::open(size as u64, image.clone(), store.clone(), &layers).unwrap();
        Self { folder, store, image, layers, disk, model, kept: Vec::new(), next_layer: 1 }
    }

    fn span(&self, at: u16, length: usize, grain: usize) -> (usize, usize) {
        let offset = self.model.len() * usize::from(at) / 65536 / grain * grain;
        (offset, length.next_multiple_of(grain).min(self.model.len() - offset))
    }

    fn reopen(&mut self) {
        self.disk.flush().unwrap();
        let size = self.model.len() as u64;
        self.disk = Disk::open(size, self.image.clone(), self.store.clone(), &self.layers).unwrap();
    }

    async fn take(&mut self, step: &Step) {
        match *step {
            Step::Read { at, length, grain } => {
                let (offset, length) = self.span(at, length, grain);
                let expected = &self.model[offset..offset + length];
                if let Some(found) = self.disk.try_read(offset as u64, length).unwrap() {
                    assert!(found == expected, "without waiting, {length} at {offset}");
                }
                let found = self.disk.read(offset as u64, length).await.unwrap();
                assert!(found == expected, "{length} at {offset}");
            }
            Step::Write { at, length, grain, seed } => {
                let (offset, length) = self.span(at, length, grain);
                let bytes = noise(length, seed);
                if seed % 2 == 0 || !self.disk.try_write(offset as u64, &bytes).unwrap() {
                    self.disk.write(offset as u64, &bytes).await.unwrap();
                }
                self.model[offset..offset + length].copy_from_slice(&bytes);
            }
            Step::Zero { at, length, grain } => {
                let (offset, length) = self.span(at, length, grain);
                self.disk.zero(offset as u64, length as u64).await.unwrap();
                self.model[offset..offset + length].fill(0);
            }
            Step::Flush => self.disk.flush().unwrap(),
            Step::Reopen => self.reopen(),
            Step::Freeze => {
                self.kept.push((self.layers.clone(), self.model.clone()));
                let path = self.next_path();
                Layer::create(&path, self.model.len() as u64).unwrap();
                self.layers.push(path);
                let next = Layer::open(&self.layers[self.layers.len() - 1], self.model.len() as u64, true).unwrap();
                self.disk.freeze(next).unwrap();
            }
            Step::Grow(by) => {
                self.model.resize(self.model.len() + by, 0);
                self.reopen();
            }
            Step::Forget(which) => {
                if !self.kept.is_empty() {
                    self.kept.remove(usize::from(which) % self.kept.len());
                }
            }
            Step::Merge { live } => self.merge(live),
        }
    }

    fn next_path(&mut self) -> PathBuf {
        self.next_layer += 1;
        self.folder.path().join(format!("layer-{}", self.next_layer))
    }

    /// The first layers that lie on each other and between which nothing that is kept ends.
    fn mergeable(&self) -> Option<Range<usize>> {
        let ends = |index: usize| self.kept.iter().any(|(layers, _)| layers.len() == index + 1);
        let frozen = self.layers.len() - 1;
        let first = (0..frozen).find(|first| first + 1 < frozen && !ends(*first))?;
        let last = (first + 1..frozen).find(|last| ends(*last) || *last == frozen - 1)?;
        Some(first..last + 1)
    }

    /// Merges while the disk is in use, or beside it.
    fn merge(&mut self, live: bool) {
        let Some(range) = self.mergeable() else { return };
        let old = self.layers[range.clone()].to_vec();
        let target = self.next_path();
        let mut moved = 0;
        let mut pace = |bytes| {
            moved += bytes;
            Ok(())
        };
        if live {
            let layers = self.disk.frozen_layers(&old).unwrap();
            let over_something = self.disk.is_over_something(&layers[0]);
            let merged = Layer::merge(&layers, &target, over_something, &mut pace).unwrap();
            assert!(self.disk.replace(&layers, merged));
            assert_eq!(self.disk.frozen_layers(&old).map(|found| found.len()), None, "they are not there any more");
        } else {
            self.disk.flush().unwrap();
            let layers: Vec<_> = old.iter().map(|path| Arc::new(Layer::open_frozen(path).unwrap())).collect();
            Layer::merge(&layers, &target, range.start > 0 || self.image.is_some(), &mut pace).unwrap();
        }
        for layers in self.kept.iter_mut().map(|(layers, _)| layers).chain([&mut self.layers]) {
            if layers.len() >= range.end {
                layers.splice(range.clone(), [target.clone()]);
            }
        }
        for path in old {
            std::fs::remove_file(path.with_extension("map")).unwrap();
            std::fs::remove_file(path).unwrap();
        }
        if !live {
            self.reopen();
        }
    }

    async fn run(size: usize, image: Option<Vec<u8>>, steps: &[Step]) {
        let mut rig = Self::new(size, image).await;
        for step in steps {
            rig.take(step).await;
        }
        rig.reopen();
        let found = rig.disk.read(0, rig.model.len() + 5000).await.unwrap();
        assert!(
            found == rig.model,
            "at the end, first at {:?}",
            found.iter().zip(&rig.model).position(|(a, b)| a != b)
        );
        for (layers, content) in &rig.kept {
            let kept = Disk::open_frozen(content.len() as u64, rig.image.clone(), rig.store.clone(), layers);
            let kept = kept.unwrap();
            assert!(kept.read(0, content.len()).await.unwrap() == *content, "as it was under {layers:?}");
            assert!(kept.try_write(0, &[1; 512]).is_err(), "what is kept is not written to");
        }
    }
}

fn new_layer(folder: &Path, number: usize, size: usize) -> PathBuf {
    let path = folder.join(format!("layer-{number}"));
    Layer::create(&path, size as u64).unwrap();
    path
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// Half of its blocks are zeros; the last one may be short.
fn image_content(sectors: usize) -> Vec<u8> {
    let mut content = noise(sectors * 512, 7);
    for block in content.chunks_mut(4096).skip(1).step_by(2) {
        block.fill(0);
    }
    content
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn zeros_under_layers(sectors in 1usize..700, steps in steps()) {
        block_on(Rig::run(sectors * 512, None, &steps));
    }

    #[test]
    fn an_image_under_layers(sectors in 1usize..700, larger in 0usize..100, steps in steps()) {
        block_on(Rig::run((sectors + larger) * 512, Some(image_content(sectors)), &steps));
    }
}

#[test]
fn nothing_written_inside_a_block_changes_nothing() {
    block_on(async {
        let rig = Rig::new(8192, Some(noise(8192, 1))).await;
        rig.disk.write(100, &[]).await.unwrap();
        rig.disk.zero(4096 + 100, 0).await.unwrap();
        assert!(rig.disk.try_write(200, &[]).unwrap());
        assert!(rig.disk.read(0, 8192).await.unwrap() == rig.model);
        assert_eq!(rig.disk.own_bytes(), 0);
    });
}

#[test]
fn beyond_the_end_is_refused_and_not_taken_for_a_broken_disk() {
    block_on(async {
        let rig = Rig::new(4096 + 512, None).await;
        let big = rustix::io::Errno::FBIG.raw_os_error();
        assert_eq!(rig.disk.write(4096, &[1; 513]).await.unwrap_err().raw_os_error(), Some(big));
        assert_eq!(rig.disk.zero(u64::MAX, 2).await.unwrap_err().raw_os_error(), Some(big));
        assert!(rig.disk.read(4608, 10).await.unwrap().is_empty());
        assert_eq!(rig.disk.read(4600, 100).await.unwrap().len(), 8);
        assert_eq!(rig.disk.own_bytes(), 0);
    });
}

/// A new layer comes while the old content for the partial write is on its way.
#[test]
fn a_slow_partial_write_finds_the_new_layer() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Arc::new(Shelf::default());
        let store = store_of(&folder.path().join("cache"), &shelf).await;
        let old = noise(4096, 1);
        let image = image_of(&shelf, &store, &old).await;
        let layers = [new_layer(folder.path(), 0, 4096), new_layer(folder.path(), 1, 4096)];
        let disk = Arc::new(Disk::open(4096, Some(image.clone()), store.clone(), &layers[..1]).unwrap());
        let before = shelf.reads.lock().unwrap().len();
        shelf.permits.forget_permits(usize::MAX);
        let partial = tokio::spawn({
            let disk = disk.clone();
            async move { disk.write(0, &[7; 512]).await }
        });
        while shelf.reads.lock().unwrap().len() == before {
            tokio::task::yield_now().await;
        }
        disk.freeze(Layer::open(&layers[1], 4096, true).unwrap()).unwrap();
        shelf.permits.add_permits(10);
        partial.await.unwrap().unwrap();
        assert_eq!(disk.read(0, 4096).await.unwrap(), [&[7; 512], &old[512..]].concat());
        disk.flush().unwrap();
        let kept = Disk::open_frozen(4096, Some(image), store, &layers[..1]).unwrap();
        assert_eq!(kept.read(0, 4096).await.unwrap(), old, "what was kept is as it was");
    });
}

/// The whole block comes while the old content for the partial write is still on its way.
#[test]
fn a_slow_partial_write_does_not_undo_a_whole_one() {
    block_on(async {
        let folder = tempfile::tempdir().unwrap();
        let shelf = Arc::new(Shelf::default());
        let store = store_of(&folder.path().join("cache"), &shelf).await;
        let image = image_of(&shelf, &store, &noise(4096, 1)).await;
        let disk = Arc::new(Disk::open(4096, Some(image), store, &[new_layer(folder.path(), 0, 4096)]).unwrap());
        let before = shelf.reads.lock().unwrap().len();
        shelf.permits.forget_permits(usize::MAX);
        let partial = tokio::spawn({
            let disk = disk.clone();
            async move { disk.write(0, &[7; 512]).await }
        });
        while shelf.reads.lock().unwrap().len() == before {
            tokio::task::yield_now().await;
        }
        assert!(disk.try_write(0, &[9; 4096]).unwrap());
        shelf.permits.add_permits(10);
        partial.await.unwrap().unwrap();
        assert_eq!(disk.read(0, 4096).await.unwrap(), [[7; 512].as_slice(), &[9; 3584]].concat());
    });
}

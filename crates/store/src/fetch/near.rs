//! Content that this host has in some other form than as frames: it is looked for there before the store is asked.

use std::sync::{Arc, Mutex};

use collective_model::Digest;
use rayon::prelude::*;

use super::{FrameStore, lock};
use crate::cache::Cache;

/// Another form of what is in the store.
pub trait Near: Send + Sync {
    /// Whether it may have a frame; told at once.
    fn may_have(&self, digest: &Digest) -> bool;
    /// Makes ready for questions, which may take a while. Never called by a thread that others of the pool wait for.
    fn prepare(&self);
    /// The frame's content, once it is ready. Whoever asks compares it with the name.
    fn content(&self, digest: &Digest) -> Option<Vec<u8>>;
}

impl FrameStore {
    /// Looks near by before it fetches.
    pub fn beside(self, near: Arc<dyn Near>) -> Self {
        Self { near: Mutex::new(Some(near)), ..self }
    }

    /// Looks there no more, and lets go of it.
    pub fn leave_near(&self) {
        lock(&self.near).take();
    }

    /// Whether a frame may be near by.
    pub(super) fn is_near(&self, digest: &Digest) -> bool {
        lock(&self.near).as_ref().is_some_and(|near| near.may_have(digest))
    }

    /// Takes what is near by of `digests` and not in the cache into the cache.
    pub(super) async fn bring_near(&self, digests: &[Digest]) -> std::io::Result<()> {
        let is_wanted = |digest: &&Digest| self.is_near(digest) && !self.cache.has(digest);
        let wanted: Vec<Digest> = digests.iter().filter(is_wanted).copied().collect();
        let near = lock(&self.near).clone();
        let Some(near) = near.filter(|_| !wanted.is_empty()) else { return Ok(()) };
        let cache = self.cache.clone();
        let bring = move || {
            near.prepare();
            wanted.par_iter().for_each(|digest| take(&cache, near.as_ref(), digest));
        };
        tokio::task::spawn_blocking(bring).await.map_err(std::io::Error::other)
    }
}

/// Keeps a frame that is near by as one that was fetched.
fn take(cache: &Cache, near: &dyn Near, digest: &Digest) {
    let content = near.content(digest).filter(|content| cache.name_of(content) == *digest);
    if let Some(Err(error)) = content.map(|content| cache.keep(digest, &content)) {
        // It is fetched then, which a full disk does not keep from being used.
        tracing::warn!(frame = %digest, %error, "a frame that is near by cannot be kept in the cache");
    }
}

//! The plane's side: packs kept in any object store, durable before they are acknowledged.
//!
//! Objects: `packs/<publisher>/<appliance>/<digest>`, and `private/<instance>/<digest>` for private data. Packs lie below
//! their appliance or instance, because reading is granted by these and never by knowing a digest. In a bucket there is
//! `plane.json` beside them, which says whose they are.

mod claim;
mod s3;
mod trouble;

use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use collective_model::{ApplianceName, Digest, InstanceId};
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use crate::PackInfo;
use crate::pack::{self, Directory, PackError};
use crate::seal;

pub use s3::{Access, Bucket, Patience, Place, PlaceError, VARIABLES};
pub use trouble::{Trouble, TroubleKind};

/// Parts of one pack that are sent at the same time.
const PARALLEL: usize = 4;
/// How often a pack is written anew when it is there and gone again, or the connection breaks.
const ATTEMPTS: usize = 3;

/// The persistent store behind a plane.
#[derive(Clone)]
pub struct Depot {
    objects: Arc<dyn ObjectStore>,
    /// For people.
    place: String,
    /// Packs above this size are sent in parts.
    part: Option<usize>,
    claim: Option<Arc<claim::Claim>>,
    /// What was wrong when it was last used.
    trouble: Arc<Mutex<Option<Trouble>>>,
}

/// Whose packs are meant.
pub trait Home {
    /// The folder that they are in.
    fn folder(&self) -> String;
    /// Checks a whole pack as far as it can be checked without keys.
    fn verify(bytes: &[u8]) -> Result<Directory, PackError>;
}

impl Home for ApplianceName {
    fn folder(&self) -> String {
        format!("packs/{}/{}", self.publisher, self.name)
    }
    fn verify(bytes: &[u8]) -> Result<Directory, PackError> {
        pack::verify(bytes)
    }
}

/// Private data of an instance.
impl Home for InstanceId {
    fn folder(&self) -> String {
        format!("private/{self}")
    }
    fn verify(bytes: &[u8]) -> Result<Directory, PackError> {
        seal::verify_sealed(bytes)
    }
}

/// Why the store does not do what it is asked.
#[derive(Debug, thiserror::Error)]
pub enum DepotError {
    /// The pack's bytes are not what its name says.
    #[error("pack {expected} is refused: its bytes have the digest {got}; send it again")]
    Name {
        /// As named.
        expected: Digest,
        /// As found.
        got: Digest,
    },
    /// The pack or a frame in it is not sound.
    #[error("pack {pack} is refused: {source}")]
    Unsound {
        /// Which.
        pack: Digest,
        /// Why.
        source: PackError,
    },
    /// There is no such pack.
    #[error("there is no pack {0} there")]
    Missing(Digest),
    /// The range is not within the pack.
    #[error("bytes {}-{} are not within the pack", .0.start, .0.end)]
    Range(Range<u64>),
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] Trouble),
    /// It cannot be used as it is configured.
    #[error("cannot use the store {place}: {why}")]
    Settings {
        /// Where.
        place: String,
        /// Why.
        why: String,
    },
    /// It is another plane's.
    #[error(
        "the store {place} belongs to the plane {other}, and this is the plane {plane}: only one plane can know what in it \
         is needed. Choose another prefix; if that plane is gone for good, remove {place} with all that is in it ({owner} \
         says whose it is)"
    )]
    Owned {
        /// Where.
        place: String,
        /// Whose it is.
        other: String,
        /// Who asks.
        plane: String,
        /// The object that says so.
        owner: &'static str,
    },
    /// Packs without an owner.
    #[error(
        "there are packs in the store {place}, but no {owner} that says whose they are, and this plane knows none of them: \
         it would remove them as unused. Choose another prefix, or start the plane with the database that belongs to them"
    )]
    Unclaimed {
        /// Where.
        place: String,
        /// The object that is missing.
        owner: &'static str,
    },
    /// It overwrites what it must not.
    #[error(
        "the store {place} cannot be used: it ignores the condition \"If-None-Match: *\" of a PUT, by which planes are kept \
         apart; choose a store that knows it"
    )]
    Unconditional {
        /// Where.
        place: String,
    },
}

impl Depot {
    /// Over a local directory. Everything acknowledged is synced.
    pub fn local(root: &Path) -> Result<Self, DepotError> {
        let place = root.display().to_string();
        let settings = |error: &dyn std::fmt::Display| DepotError::Settings {
            place: place.clone(),
            why: format!("{error}; see that the folder can be written"),
        };
        std::fs::create_dir_all(root).map_err(|error| settings(&error))?;
        let files = object_store::local::LocalFileSystem::new_with_prefix(root).map_err(|error| settings(&error))?;
        Ok(Self::over(Arc::new(files.with_fsync(true)), place, None))
    }

    /// Over any object store; `place` is its name for people. Packs above `part` bytes are sent in parts.
    pub fn over(objects: Arc<dyn ObjectStore>, place: String, part: Option<usize>) -> Self {
        Self { objects, place, part, claim: None, trouble: Arc::default() }
    }

    /// Where it is, for people.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// What was wrong when it was last used, if anything.
    pub fn trouble(&self) -> Option<Trouble> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn key(home: &impl Home, pack: &Digest) -> Key {
        Key::from(format!("{}/{pack}", home.folder()))
    }

    /// Takes a pack after checking every frame in it that stands for itself. A pack that is there already stays as it
    /// is, unless it is damaged: then it is replaced.
    pub async fn put_pack<H: Home>(&self, home: &H, pack: Digest, bytes: Bytes) -> Result<(), DepotError> {
        let checked = bytes.clone();
        let check = tokio::task::spawn_blocking(move || {
            let got = Digest::of(&checked);
            if got != pack {
                return Err(DepotError::Name { expected: pack, got });
            }
            H::verify(&checked).map_err(|source| DepotError::Unsound { pack, source })
        });
        let broken = |panic| self.note("check a pack for", &object_store::Error::JoinError { source: panic });
        check.await.map_err(broken)??;
        self.claimed().await?;
        let key = Self::key(home, &pack);
        for _ in 1..ATTEMPTS {
            match self.create(&key, pack, &bytes).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // The answer may be lost and the pack there.
                Err(DepotError::Backend(trouble)) if trouble.passing => {}
                Err(error) => return Err(error),
            }
        }
        if self.create(&key, pack, &bytes).await? {
            return Ok(());
        }
        Err(Trouble::new(TroubleKind::Away, "write a pack to", &self.place, "it comes and goes").into())
    }

    /// Writes a pack that is not there, or is damaged. False if it is there and gone again: somebody removed it, or
    /// somebody's writing that was in the way came to nothing.
    ///
    /// A small pack is created on the condition that nothing is there. A large one goes in parts, where S3 has no such
    /// condition; two that write the same name write the same bytes, so whichever is last changes nothing.
    async fn create(&self, key: &Key, pack: Digest, bytes: &Bytes) -> Result<bool, DepotError> {
        let payload = PutPayload::from_bytes(bytes.clone());
        let part = self.part.filter(|part| bytes.len() > *part);
        let found = match part {
            Some(_) => self.objects.head(key).await.map(|_| true),
            None => {
                let options = PutOptions { mode: PutMode::Create, ..Default::default() };
                self.objects.put_opts(key, payload.clone(), options).await.map(|_| false)
            }
        };
        match (found, part) {
            (Ok(false), _) => return Ok(self.fine(true)),
            (Ok(true) | Err(object_store::Error::AlreadyExists { .. }), _) => match self.stored(key).await? {
                Some(stored) if stored == pack => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            },
            (Err(object_store::Error::NotFound { .. }), Some(_)) => {}
            (Err(error), _) => return Err(self.note("write a pack to", &error).into()),
        }
        let written = match part {
            Some(part) => self.upload(key, bytes, part).await,
            None => self.objects.put(key, payload).await.map(drop),
        };
        written.map_err(|error| self.note("write a pack to", &error))?;
        Ok(self.fine(true))
    }

    async fn upload(&self, key: &Key, bytes: &Bytes, part: usize) -> object_store::Result<()> {
        let mut upload = self.objects.put_multipart(key).await?;
        let ranges = (0..bytes.len()).step_by(part).map(|at| at..(at + part).min(bytes.len()));
        let parts: Vec<_> = ranges.map(|range| upload.put_part(bytes.slice(range).into())).collect();
        match stream::iter(parts).buffer_unordered(PARALLEL).try_collect::<Vec<()>>().await {
            Ok(_) => upload.complete().await.map(drop),
            Err(error) => {
                // What stays if this fails too is never visible, and goes by the bucket's own rules.
                let _ = upload.abort().await;
                Err(error)
            }
        }
    }

    /// The digest of what is stored under a name.
    async fn stored(&self, key: &Key) -> Result<Option<Digest>, DepotError> {
        let size = self.repeated("look for a pack in", || self.objects.head(key)).await?.map(|meta| meta.size);
        let Some(size) = size else { return Ok(None) };
        let mut hasher = blake3::Hasher::new();
        for start in (0..size).step_by(s3::PART) {
            let range = start..(start + s3::PART as u64).min(size);
            match self.bytes(key, range).await? {
                Some(bytes) => hasher.update(&bytes),
                None => return Ok(None),
            };
        }
        Ok(Some(Digest(*hasher.finalize().as_bytes())))
    }

    /// A pack's size in bytes.
    pub async fn pack_size(&self, home: &impl Home, pack: &Digest) -> Result<u64, DepotError> {
        let key = Self::key(home, pack);
        let meta = self.repeated("look for a pack in", || self.objects.head(&key)).await?;
        Ok(meta.ok_or(DepotError::Missing(*pack))?.size)
    }

    /// A pack as lists name it.
    pub async fn pack_info(&self, home: &impl Home, digest: &Digest) -> Result<PackInfo, DepotError> {
        let size = self.pack_size(home, digest).await?;
        let unsound = |source| DepotError::Unsound { pack: *digest, source };
        let trailer = self.read(home, digest, size.saturating_sub(pack::TRAILER)..size).await?;
        let directory = pack::directory_range(&trailer, size).map_err(unsound)?;
        Ok(PackInfo { digest: *digest, size, directory: size - directory.start })
    }

    /// Some bytes of a pack; exactly as many as asked for.
    pub async fn read(&self, home: &impl Home, pack: &Digest, range: Range<u64>) -> Result<Bytes, DepotError> {
        if range.start >= range.end {
            return Err(DepotError::Range(range));
        }
        let key = Self::key(home, pack);
        match self.bytes(&key, range.clone()).await {
            Ok(bytes) => bytes.ok_or(DepotError::Missing(*pack)),
            // Backends word this in many ways; asking for the size costs a request in this case only.
            Err(DepotError::Backend(trouble)) if trouble.passing || trouble.kind == TroubleKind::Other => {
                match self.objects.head(&key).await {
                    Ok(meta) if range.end > meta.size => Err(self.fine(DepotError::Range(range))),
                    _ => Err(trouble.into()),
                }
            }
            Err(error) => Err(error),
        }
    }

    async fn bytes(&self, key: &Key, range: Range<u64>) -> Result<Option<Bytes>, DepotError> {
        let wanted = range.end - range.start;
        let get = || async {
            let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), ..Default::default() };
            let bytes = self.objects.get_opts(key, options).await?.bytes().await?;
            if bytes.len() as u64 == wanted {
                return Ok(bytes);
            }
            let source = format!("it gave {} bytes of {wanted}", bytes.len()).into();
            Err(object_store::Error::Generic { store: "S3", source })
        };
        self.repeated("read a pack from", get).await
    }

    /// All packs of appliances, with their sizes in bytes. What is not named like a pack is passed over.
    pub async fn list(&self) -> Result<Vec<(ApplianceName, Digest, u64)>, DepotError> {
        self.list_below("packs", |parts| {
            let [_, publisher, name, digest] = parts else { return None };
            Some((format!("{publisher}/{name}").parse().ok()?, digest.parse().ok()?))
        })
        .await
    }

    /// All packs of private data, in the same way.
    pub async fn list_private(&self) -> Result<Vec<(InstanceId, Digest, u64)>, DepotError> {
        self.list_below("private", |parts| {
            let [_, instance, digest] = parts else { return None };
            Some((instance.parse().ok()?, digest.parse().ok()?))
        })
        .await
    }

    async fn list_below<T>(
        &self,
        folder: &str,
        named: impl Fn(&[String]) -> Option<(T, Digest)>,
    ) -> Result<Vec<(T, Digest, u64)>, DepotError> {
        let folder = Key::from(folder);
        let list = || self.objects.list(Some(&folder)).try_collect::<Vec<ObjectMeta>>();
        let objects = self.repeated("list", list).await?.unwrap_or_default();
        let pack = |meta: ObjectMeta| {
            let parts: Vec<String> = meta.location.parts().map(|part| part.as_ref().to_owned()).collect();
            named(&parts).map(|(home, digest)| (home, digest, meta.size))
        };
        Ok(objects.into_iter().filter_map(pack).collect())
    }

    /// Removes a pack.
    pub async fn remove_pack(&self, home: &impl Home, pack: &Digest) -> Result<(), DepotError> {
        self.claimed().await?;
        let key = Self::key(home, pack);
        self.repeated("remove a pack from", || self.objects.delete(&key)).await.map(drop)
    }

    /// Does what may be done twice; once more where the connection broke. None if there is no such object.
    async fn repeated<T, F>(&self, doing: &str, attempt: impl Fn() -> F) -> Result<Option<T>, DepotError>
    where
        F: Future<Output = object_store::Result<T>>,
    {
        let mut again = true;
        loop {
            let error = match attempt().await {
                Ok(done) => return Ok(Some(self.fine(done))),
                Err(error) => error,
            };
            let trouble = Trouble::of(&error, doing, &self.place);
            if matches!(error, object_store::Error::NotFound { .. }) && trouble.kind != TroubleKind::NoBucket {
                return Ok(self.fine(None));
            }
            if !(again && trouble.passing) {
                return Err(self.note(doing, &error).into());
            }
            again = false;
        }
    }

    fn fine<T>(&self, done: T) -> T {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
        done
    }

    fn note(&self, doing: &str, error: &object_store::Error) -> Trouble {
        let trouble = Trouble::of(error, doing, &self.place);
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(trouble.clone());
        trouble
    }
}

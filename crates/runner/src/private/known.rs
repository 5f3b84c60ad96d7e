//! What is in private packs, as this host remembers it: only what is in none of them goes into new ones.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use collective_model::Digest;
use collective_model::run_private::RunPack;
use collective_store::pack::TRAILER;
use collective_store::publish::{KnownBlocks, PackHashes};
use collective_store::seal::Seal;
use collective_store::{SourceError, Vault};

/// What the packs of the backup before hold: as remembered, else read back and verified. A pack that is not there, or not
/// what it was, is not known: what it held is sent again.
pub(super) async fn recall(
    vault: &dyn Vault,
    packs: &[RunPack],
    hashes: &Path,
    seal: &Arc<Seal>,
) -> Result<KnownBlocks, String> {
    let mut known = KnownBlocks::new(HashSet::new());
    let nowhere = "private/data".parse().map_err(|e| format!("{e}"))?;
    for pack in packs {
        let path = hashes.join(pack.digest.to_string());
        let remembered = std::fs::read(&path).ok().and_then(|bytes| PackHashes::decode(&bytes));
        let from = if remembered.is_some() { pack.size.saturating_sub(TRAILER) } else { 0 };
        let bytes = match vault.read(&nowhere, &pack.digest, from..pack.size).await {
            Ok(bytes) => bytes,
            Err(error @ SourceError::Away(_)) => return Err(format!("cannot compare with the backup before: {error}")),
            Err(error) => {
                tracing::warn!(pack = %pack.digest, %error, "a pack of the backup before is not there; its content is sent again");
                continue;
            }
        };
        let held = match remembered {
            Some(held) => held,
            None if Digest::of(&bytes) != pack.digest => {
                tracing::warn!(pack = %pack.digest, "a pack of the backup before is damaged; its content is sent again");
                continue;
            }
            None => {
                let read = PackHashes::of_sealed(&bytes, seal);
                let read = read.map_err(|e| format!("the backup before cannot be read: {e}"))?;
                remember(hashes, &pack.digest, &read);
                read
            }
        };
        known.learn(&pack.digest, &held);
    }
    Ok(known)
}

/// Keeps what is in a pack; this only saves time at the next backup.
pub(super) fn remember(folder: &Path, pack: &Digest, hashes: &PackHashes) {
    let write = || std::fs::write(folder.join(pack.to_string()), hashes.encode());
    if let Err(error) = std::fs::create_dir_all(folder).and_then(|()| write()) {
        tracing::warn!(%error, "what is in a pack cannot be remembered; the next backup reads it back");
    }
}

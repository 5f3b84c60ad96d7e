//! What the other host keeps of the machine since it was there is not sent: blocks are offered by their hashes first
//! ([`collective_model::kept`]).
//!
//! An offer is as good as sending: what is written after it was read comes in a later round.

use std::time::Instant;

use collective_model::kept::{OfferHash, Offers};
use collective_model::live::{self, Sent};
use collective_model::run_live::{Piece, STEP, Word};
use collective_store::BLOCK;

use super::{Origin, Part, Sender, Stays, is_zero};
use crate::save::runs;

/// So many blocks are offered before an answer is waited for: 64 MiB, whose hashes are 256 KiB.
const AT_ONCE: u64 = 16 << 10;
/// Bytes of a hash.
const HASH: u64 = size_of::<OfferHash>() as u64;

impl Sender<'_> {
    /// Offers what of `parts` the other host may have; gives what has to be sent.
    pub(super) async fn offer(&mut self, parts: Vec<Part>, keeps: &[u16]) -> Result<Vec<Part>, Stays> {
        let (mut rest, mut offers) = (Vec::new(), Offers::default());
        let offered = |part: &&Part| keeps.contains(&part.which);
        let mut left: u64 = parts.iter().filter(offered).map(|part| part.range.end - part.range.start).sum();
        let begun = Instant::now();
        let mut sent = 0;
        for part in parts {
            if !keeps.contains(&part.which) {
                rest.push(part);
                continue;
            }
            for start in part.range.clone().step_by(STEP) {
                let range = start..part.range.end.min(start + STEP as u64);
                self.offer_step(Part { range, ..part }, &mut offers, &mut rest).await?;
                if offers.blocks() >= AT_ONCE {
                    let bytes = offers.blocks() * HASH;
                    self.answered(std::mem::take(&mut offers), &mut rest).await?;
                    sent += bytes;
                    left = left.saturating_sub(AT_ONCE * BLOCK);
                    let so_far = [Sent { bytes: sent, took_us: begun.elapsed().as_micros() as u64 }];
                    if let (true, Some(rate)) = (live::is_known(&so_far), live::rate(&so_far)) {
                        let why = live::is_worth_it(left / BLOCK * HASH, rate);
                        why.map_err(|why| Stays::Told(Word::Better { why }))?;
                    }
                }
            }
        }
        self.answered(offers, &mut rest).await?;
        Ok(rest)
    }

    /// Zeros are sent as such, which is cheaper.
    async fn offer_step(
        &mut self,
        part: Part,
        offers: &mut Offers<(u16, Origin)>,
        rest: &mut Vec<Part>,
    ) -> Result<(), Stays> {
        let Part { which, range, from } = part;
        let mut content = self.read(which, &range, from).await?;
        content.resize(content.len().next_multiple_of(BLOCK as usize), 0);
        let mut at = range.start;
        for run in runs(&content, is_zero) {
            let end = at + run.len() as u64;
            if is_zero(&run[..BLOCK as usize]) {
                rest.push(Part { which, range: at..end.min(range.end), from });
            } else {
                let hashes = run.chunks(BLOCK as usize).map(|block| self.hasher.hash(block)).collect();
                self.line.send(&Piece::Offer { which, offset: at, hashes }).await?;
                offers.add((which, from), at / BLOCK..end / BLOCK);
            }
            at = end;
        }
        Ok(())
    }

    async fn answered(&mut self, offers: Offers<(u16, Origin)>, rest: &mut Vec<Part>) -> Result<(), Stays> {
        let blocks = offers.blocks();
        if blocks == 0 {
            return Ok(());
        }
        self.line.say(Word::Offered).await?;
        let lacking = match self.line.hear().await? {
            Piece::Lacks(answer) => offers.lacking(&answer)?,
            other => {
                return Err(Stays::Failed(format!("the other host does not say which blocks it lacks: {other:?}")));
            }
        };
        let mut lacks = 0;
        for ((which, from), blocks) in lacking {
            lacks += blocks.end - blocks.start;
            let end = self.disks.get(usize::from(which)).map_or(u64::MAX, |disk| disk.size());
            rest.push(Part { which, range: blocks.start * BLOCK..(blocks.end * BLOCK).min(end), from });
        }
        self.kept += (blocks - lacks) * BLOCK;
        Ok(())
    }
}

//! Where frames and pages lie, in which forms, and which form costs least.
//!
//! Pure bookkeeping: directories go in, pieces to fetch come out.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use collective_model::{ApplianceName, Digest};

use crate::pack::{Base, Directory, Entry};

/// Bytes of a pack that give a frame or page.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub appliance: ApplianceName,
    pub pack: Digest,
    pub entry: Entry,
    /// What it differs from; empty where it stands for itself.
    pub bases: Arc<[Base]>,
}

#[derive(Clone)]
struct Form {
    /// Its place in `packs`.
    pack: u32,
    entry: Entry,
    bases: Arc<[Base]>,
}

/// The directories of packs.
#[derive(Default)]
pub(crate) struct Forms {
    packs: Vec<(ApplianceName, Digest)>,
    known: HashSet<Digest>,
    plain: HashMap<Digest, Form>,
    deltas: HashMap<Digest, Vec<Form>>,
}

impl Forms {
    /// Whether a pack was taken up.
    pub fn knows(&self, pack: &Digest) -> bool {
        self.known.contains(pack)
    }

    /// Forgets all packs, and names them.
    pub fn forget(&mut self) -> HashSet<Digest> {
        std::mem::take(self).known
    }

    /// Takes up a pack.
    pub fn learn(&mut self, appliance: &ApplianceName, pack: Digest, directory: Directory) {
        let number = self.packs.len() as u32;
        self.packs.push((appliance.clone(), pack));
        self.known.insert(pack);
        let nothing: Arc<[Base]> = Arc::new([]);
        for entry in directory.entries {
            self.plain.insert(entry.digest, Form { pack: number, entry, bases: nothing.clone() });
        }
        for delta in directory.deltas {
            let form = Form { pack: number, entry: delta.entry, bases: delta.bases.into() };
            self.deltas.entry(delta.entry.digest).or_default().push(form);
        }
    }

    /// The form that stands for itself.
    pub fn plain(&self, digest: &Digest) -> Option<Piece> {
        self.plain.get(digest).map(|form| self.piece(form))
    }

    /// All forms as differences.
    pub fn deltas(&self, digest: &Digest) -> Vec<Piece> {
        self.deltas.get(digest).into_iter().flatten().map(|form| self.piece(form)).collect()
    }

    /// All that has a form which stands for itself.
    pub fn digests(&self) -> impl Iterator<Item = Digest> + '_ {
        self.plain.keys().copied()
    }

    fn piece(&self, form: &Form) -> Piece {
        let (appliance, pack) = &self.packs[form.pack as usize];
        Piece { appliance: appliance.clone(), pack: *pack, entry: form.entry, bases: form.bases.clone() }
    }

    /// For each of `missing` the piece that costs least: a difference counts only where everything it differs from is
    /// at hand (`has`), or comes in its plain form anyway because there is no other. Each once; pieces that stand for
    /// themselves come before the differences that may need them. The error names what has no plain form.
    pub fn cheapest(&self, missing: &[Digest], has: impl Fn(&Digest) -> bool) -> Result<Vec<Piece>, Digest> {
        let mut seen = HashSet::new();
        let missing: Vec<&Digest> = missing.iter().filter(|digest| seen.insert(**digest)).collect();
        let mut at_hand: HashMap<Digest, bool> = HashMap::new();
        for digest in missing.iter().filter(|digest| !self.deltas.contains_key(digest)) {
            at_hand.insert(**digest, true);
        }
        let mut standing = Vec::new();
        let mut differences = Vec::new();
        for digest in missing {
            let plain = self.plain.get(digest).ok_or(*digest)?;
            let mut fits = |form: &&Form| {
                let mut known = |base: &Base| *at_hand.entry(base.frame).or_insert_with(|| has(&base.frame));
                form.entry.stored < plain.entry.stored && form.bases.iter().all(&mut known)
            };
            let deltas = self.deltas.get(digest).into_iter().flatten();
            match deltas.filter(&mut fits).min_by_key(|form| form.entry.stored) {
                Some(delta) => differences.push(self.piece(delta)),
                None => standing.push(self.piece(plain)),
            }
        }
        standing.append(&mut differences);
        Ok(standing)
    }
}

/// Neighbours in a pack, fetched by one request.
pub(crate) struct Group(pub Vec<Piece>);

impl Group {
    /// Where its bytes begin and end in the pack.
    pub fn range(&self) -> std::ops::Range<u64> {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return 0..0 };
        first.entry.offset..last.entry.range().end
    }
}

/// Joins what follows each other in a pack into requests of at most `limit` bytes; gaps are never fetched, so what is
/// counted is what moves.
pub(crate) fn group(pieces: Vec<Piece>, limit: u64) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for piece in pieces {
        if let Some(last) = groups.last_mut() {
            let range = last.range();
            let follows = last.0[0].pack == piece.pack && range.end == piece.entry.offset;
            if follows && piece.entry.range().end - range.start <= limit {
                last.0.push(piece);
                continue;
            }
        }
        groups.push(Group(vec![piece]));
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Encoding;
    use crate::pack::{Delta, EntryKind};

    fn name(n: u8) -> Digest {
        Digest([n; 32])
    }

    fn entry(n: u8, stored: u32, offset: u64) -> Entry {
        let encoding = Encoding::Plain;
        Entry { digest: name(n), kind: EntryKind::Data, encoding, stored, length: 4096, offset }
    }

    fn forms() -> Forms {
        let mut forms = Forms::default();
        let appliance: ApplianceName = "demo/notes".parse().unwrap();
        let entries = (0..6).map(|n| entry(n, 1000, 8 + 1000 * u64::from(n))).collect();
        forms.learn(&appliance, name(100), Directory { entries, deltas: Vec::new() });
        let delta = |n, stored, bases: &[u8]| Delta {
            entry: entry(n, stored, 8 + 100 * u64::from(n)),
            bases: bases.iter().map(|base| Base { frame: name(*base), part: 0 }).collect(),
        };
        let deltas = vec![delta(3, 200, &[0, 1]), delta(4, 300, &[0, 7]), delta(4, 100, &[3]), delta(5, 2000, &[0])];
        forms.learn(&appliance, name(101), Directory { entries: Vec::new(), deltas });
        forms
    }

    fn chosen(missing: &[u8], has: &[u8]) -> Vec<(u8, u32)> {
        let missing: Vec<Digest> = missing.iter().copied().map(name).collect();
        let pieces = forms().cheapest(&missing, |digest| has.contains(&digest.0[0])).unwrap();
        pieces.iter().map(|piece| (piece.entry.digest.0[0], piece.entry.stored)).collect()
    }

    #[test]
    fn the_cheapest_form_that_can_be_read() {
        assert_eq!(chosen(&[3], &[]), [(3, 1000)]);
        assert_eq!(chosen(&[3], &[0]), [(3, 1000)], "one of two bases");
        assert_eq!(chosen(&[3, 3], &[0, 1]), [(3, 200)], "each once");
        assert_eq!(chosen(&[4], &[0, 7]), [(4, 300)]);
        assert_eq!(chosen(&[4], &[0, 7, 3]), [(4, 100)]);
        assert_eq!(chosen(&[5], &[0]), [(5, 1000)], "a longer difference is of no use");
        assert_eq!(chosen(&[3, 0, 1], &[]), [(0, 1000), (1, 1000), (3, 200)], "bases that come anyway come first");
        assert_eq!(chosen(&[4, 3], &[0, 1]), [(4, 1000), (3, 200)], "no difference to what comes as a difference");
        assert_eq!(forms().cheapest(&[name(9)], |_| true).unwrap_err(), name(9));
    }

    #[test]
    fn neighbours_are_joined_up_to_the_limit() {
        let forms = forms();
        let pieces: Vec<Piece> = [0, 1, 3, 5].iter().map(|n| forms.plain(&name(*n)).unwrap()).collect();
        let sizes = |limit| group(pieces.clone(), limit).iter().map(|group| group.0.len()).collect::<Vec<_>>();
        assert_eq!(sizes(1 << 20), [2, 1, 1]);
        assert_eq!(sizes(1999), [1, 1, 1, 1]);
    }
}

//! Which packs stay because another backup needs them.

use std::collections::{BTreeMap, BTreeSet};

use super::{BegunState, Stock};
use crate::format::{BackupId, Committed, Reference};

/// Backups whose packs and file lists nobody may touch: what runs, or cannot be read, may lean on them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Protected {
    named: BTreeSet<BackupId>,
    /// Every backup before this one is protected as well: what that one leans on is not known.
    all_before: Option<BackupId>,
}

impl Protected {
    /// Returns whether the objects of a backup must stay.
    pub fn covers(&self, id: &BackupId) -> bool {
        self.named.contains(id) || self.all_before.as_ref().is_some_and(|before| id < before)
    }

    /// Protects what a backup leans on; all backups before it if that is not known.
    pub fn add(&mut self, id: &BackupId, leans_on: Option<&[BackupId]>) {
        self.named.insert(id.clone());
        match leans_on {
            Some(leans_on) => self.named.extend(leans_on.iter().cloned()),
            None => self.all_before = self.all_before.take().max(Some(id.clone())),
        }
    }

    /// Protects what `begun.json` of a backup names.
    pub fn add_begun(&mut self, id: &BackupId, begun: &BegunState) {
        match begun {
            BegunState::Readable(begun) => {
                let all: Vec<BackupId> =
                    begun.leans_on.iter().chain(&begun.parent).cloned().collect();
                self.add(id, Some(&all));
            }
            BegunState::Unreadable => self.add(id, None),
            BegunState::Absent => {}
        }
    }
}

/// Returns what running and unreadable backups may lean on.
pub(super) fn protected(stock: &Stock, running: &BTreeSet<&BackupId>) -> Protected {
    let mut protected = Protected::default();
    for backup in &stock.unreadable {
        protected.add(&backup.id, backup.leans_on.as_deref());
    }
    for backup in stock.unfinished.iter().filter(|backup| running.contains(&backup.id)) {
        protected.add_begun(&backup.id, &backup.begun);
    }
    protected
}

/// The packs of deleted backups that kept ones reference. One bit for each pack.
#[derive(Debug, Default)]
pub struct NeededPacks {
    by_owner: BTreeMap<BackupId, Vec<u64>>,
}

impl NeededPacks {
    /// Adds what a kept backup references.
    pub fn add(&mut self, kept: &Committed) {
        for reference in &kept.references {
            let bits = self.by_owner.entry(reference.backup.clone()).or_default();
            for pack in &reference.packs {
                let (word, bit) = (pack.pack as usize / 64, pack.pack % 64);
                if bits.len() <= word {
                    bits.resize(word + 1, 0);
                }
                bits[word] |= 1 << bit;
            }
        }
    }

    /// Returns whether a kept backup references this pack.
    pub fn needs(&self, owner: &BackupId, pack: u32) -> bool {
        let word = self.by_owner.get(owner).and_then(|bits| bits.get(pack as usize / 64));
        word.is_some_and(|word| word >> (pack % 64) & 1 == 1)
    }
}

/// Packs of which it is not known yet that a committed backup needs them: nobody is held back from deleting those that
/// a deleted backup has left, and perhaps somebody is about to.
#[derive(Debug, Default)]
pub struct LoosePacks {
    by_owner: BTreeMap<BackupId, BTreeSet<u32>>,
}

impl LoosePacks {
    /// Adds what is counted on.
    pub fn add(&mut self, reference: &Reference) {
        let packs = reference.packs.iter().map(|pack| pack.pack);
        self.by_owner.entry(reference.backup.clone()).or_default().extend(packs);
    }

    /// Takes out what a committed backup needs.
    pub fn hold(&mut self, committed: &Committed) {
        for reference in &committed.references {
            if let Some(loose) = self.by_owner.get_mut(&reference.backup) {
                for pack in &reference.packs {
                    loose.remove(&pack.pack);
                }
            }
        }
        self.by_owner.retain(|_, packs| !packs.is_empty());
    }

    /// Returns the backups whose packs these are, oldest first.
    pub fn owners(&self) -> impl Iterator<Item = &BackupId> {
        self.by_owner.keys()
    }

    /// Returns whether each of them is needed by a committed backup.
    pub fn is_empty(&self) -> bool {
        self.by_owner.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::format::PackUse;

    fn id(second: i64) -> BackupId {
        BackupId::at(jiff::Timestamp::from_second(second).unwrap(), 1)
    }

    fn reference(backup: i64, packs: &[u32]) -> Reference {
        let packs = packs.iter().map(|pack| PackUse { pack: *pack, live_bytes: 1 });
        Reference { backup: id(backup), packs: packs.collect() }
    }

    #[test]
    fn a_pack_is_loose_until_some_committed_backup_needs_that_very_pack() {
        let mut loose = LoosePacks::default();
        assert!(loose.is_empty());
        loose.add(&reference(1, &[0, 1]));
        loose.add(&reference(2, &[0]));
        let holding = |references| Committed { references, ..Committed::example(id(9)) };
        loose.hold(&holding(vec![reference(1, &[0, 2]), reference(3, &[0, 1])]));
        assert_eq!(loose.owners().collect::<Vec<_>>(), [&id(1), &id(2)]);
        loose.hold(&holding(vec![reference(2, &[0, 1])]));
        assert_eq!(loose.owners().collect::<Vec<_>>(), [&id(1)], "pack 1 of it");
        loose.hold(&holding(vec![reference(1, &[1])]));
        assert!(loose.is_empty());
    }
}

//! Which packs stay because another backup needs them.

use std::collections::{BTreeMap, BTreeSet};

use super::{BegunState, Stock};
use crate::format::{BackupId, Committed};

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

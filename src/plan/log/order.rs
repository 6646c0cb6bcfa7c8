//! Joining what segments tell of transactions, newest or oldest first.
//!
//! ```text
//! oldest first   what is open is carried forward until it ends
//! newest first   what has ended waits until the segment is reached in which it began
//! ```
//!
//! Both wait and carry within bounds; what is told earlier than it is complete is told as not exact.

use std::collections::{BTreeMap, VecDeque};

use super::fold::{Keep, OPEN_MAX, SegmentDigest};
use super::{Entry, Found, Tally, TransactionFound, is_at_or_after};

/// How many segments back an entry waits for the beginning of its transaction.
pub const LOOK_BACK_MAX: u32 = 64;

/// How many entries wait.
pub const WAITING_MAX: usize = 100_000;

/// Joins segments that follow each other without a gap.
#[derive(Debug)]
pub struct Assembler {
    order: Keep,
    /// Newest first: entries in the order in which they are told, each with the segments it has waited for.
    waiting: VecDeque<(Entry, u32)>,
    /// The number of the first of them, counted from the beginning.
    waiting_from: u64,
    /// Newest first: which of them a transaction belongs to.
    by_xid: BTreeMap<u32, u64>,
    /// Oldest first: what is known of transactions that are open.
    open: BTreeMap<u32, Tally>,
    /// Oldest first: transactions from this one on began where they could be seen.
    known_from: Option<u32>,
    is_spilled: bool,
}

impl Assembler {
    /// Makes one; [`Keep::Newest`] tells newest first.
    pub fn new(order: Keep) -> Self {
        Self {
            order,
            waiting: VecDeque::new(),
            waiting_from: 0,
            by_xid: BTreeMap::new(),
            open: BTreeMap::new(),
            known_from: None,
            is_spilled: false,
        }
    }

    /// Returns whether something waits for what an older segment says.
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes what a pass over the next segment has found, and returns what can be told now. `is_first` and `is_last`:
    /// of the passes over this segment.
    pub fn add(&mut self, digest: SegmentDigest, is_first: bool, is_last: bool) -> Vec<Entry> {
        match self.order {
            Keep::Newest => self.add_older(digest, is_first),
            Keep::Oldest => self.add_newer(digest, is_first, is_last),
        }
    }

    /// Returns what still waits: there is a gap, or no more WAL. What is open is forgotten.
    pub fn flush(&mut self) -> Vec<Entry> {
        self.by_xid.clear();
        self.open.clear();
        self.known_from = None;
        self.is_spilled = false;
        self.waiting_from += self.waiting.len() as u64;
        self.waiting.drain(..).map(|(entry, _)| entry).collect()
    }

    fn add_older(&mut self, digest: SegmentDigest, is_first: bool) -> Vec<Entry> {
        if is_first {
            for (xid, tally) in digest.left {
                self.join(xid, tally);
            }
            for (entry, waited) in &mut self.waiting {
                *waited += 1;
                let Found::Transaction(end) = &mut entry.found else { continue };
                if digest.is_spilled {
                    for xid in end.open_xids.drain(..) {
                        self.by_xid.remove(&xid);
                    }
                } else if let (Some(xid), Some(next)) = (end.xid, digest.first_next_xid)
                    && !end.open_xids.is_empty()
                    && is_at_or_after(xid, next)
                {
                    end.is_exact = true;
                    for xid in end.open_xids.drain(..) {
                        self.by_xid.remove(&xid);
                    }
                }
            }
        }
        for entry in digest.entries.into_iter().rev() {
            let number = self.waiting_from + self.waiting.len() as u64;
            if let Found::Transaction(end) = &entry.found {
                self.by_xid.extend(end.open_xids.iter().map(|xid| (*xid, number)));
            }
            self.waiting.push_back((entry, 0));
        }
        let mut ready = Vec::new();
        while let Some((entry, waited)) = self.waiting.front() {
            let waits =
                matches!(&entry.found, Found::Transaction(end) if !end.open_xids.is_empty());
            if waits && *waited < LOOK_BACK_MAX && self.waiting.len() <= WAITING_MAX {
                break;
            }
            if let Some((entry, _)) = self.waiting.pop_front() {
                self.waiting_from += 1;
                if let Found::Transaction(end) = &entry.found {
                    for xid in &end.open_xids {
                        self.by_xid.remove(xid);
                    }
                }
                ready.push(entry);
            }
        }
        ready
    }

    fn join(&mut self, xid: u32, tally: Tally) {
        let Some(number) = self.by_xid.get(&xid) else { return };
        let at = number.checked_sub(self.waiting_from).and_then(|at| usize::try_from(at).ok());
        if let Some((Entry { found: Found::Transaction(end), .. }, _)) =
            at.and_then(|at| self.waiting.get_mut(at))
        {
            end.tally.absorb(tally);
        }
    }

    fn add_newer(&mut self, digest: SegmentDigest, is_first: bool, is_last: bool) -> Vec<Entry> {
        if is_first {
            self.is_spilled |= digest.is_spilled;
        }
        for xid in digest.ended_unwanted {
            self.open.remove(&xid);
        }
        let mut entries: Vec<Entry> = digest.entries.into();
        for entry in &mut entries {
            if let Found::Transaction(end) = &mut entry.found {
                self.complete(end);
            }
        }
        // Only now: what was known before the first moment of this segment says nothing of earlier ones.
        self.known_from = self.known_from.or(digest.first_next_xid);
        if is_last {
            for (xid, tally) in digest.left {
                if self.open.len() >= OPEN_MAX && !self.open.contains_key(&xid) {
                    self.is_spilled = true;
                    continue;
                }
                self.open.entry(xid).or_default().absorb(tally);
            }
        }
        entries
    }

    fn complete(&mut self, end: &mut TransactionFound) {
        for xid in std::mem::take(&mut end.open_xids) {
            if let Some(part) = self.open.remove(&xid) {
                end.tally.absorb(part);
            }
            if let (Some(top), Some(from)) = (end.xid, self.known_from) {
                end.is_exact = is_at_or_after(top, from) && !self.is_spilled;
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! Holes in WAL, and what each thing that is wrong takes away.

use std::collections::BTreeMap;

use super::findings::{About, Fault, LostMoments, Raw};
use super::{Verifying, readable_identities};
use crate::failure::Failure;
use crate::format::{BackupId, Committed, WalObject};
use crate::ops::now;
use crate::ops::stock::take_stock_despite;
use crate::ops::wal_times::{StoredWay, reach};
use crate::pg::{Lsn, PgTimestamp, SegmentName, SystemId, Timeline, TimelineHistory, WalFileName};
use crate::plan::restore::Holdings;
use crate::plan::retention::{Incarnation, Stock, plan};
use crate::plan::window::{
    Hole, Lost, Stretch, filled, harmful_holes, lost, stretches, ways, without,
};

/// Findings whose moments are told by time as well; the others by LSN only. Each may cost the store a few reads.
const TIMED_MAX: usize = 50;

/// What is not there, or cannot be used.
pub(super) enum Gone<'a> {
    /// WAL of one timeline, or of whichever owns it.
    Wal {
        timeline: Option<Timeline>,
        start_lsn: Lsn,
        end_lsn: Lsn,
    },
    Backup(&'a BackupId),
}

impl Verifying<'_> {
    /// Finds holes that harm; what is seen once only may be on its way.
    pub(super) async fn look_for_holes(&mut self) -> Result<Vec<Raw>, Failure> {
        self.progress.note("looking for holes in WAL");
        let before = self.holes(&self.gathered.stock);
        if before.values().all(Vec::is_empty) && self.torn.is_empty() {
            return Ok(Vec::new());
        }
        let mut stop = self.stop.clone();
        tokio::select! {
            () = tokio::time::sleep(self.request.look_again_after) => {}
            _ = stop.wanted() => {}
        }
        self.check_stop().await?;
        let identities = readable_identities(self.repository, &mut Vec::new()).await;
        let identities = identities.map_err(|error| self.failed(error, "take stock"))?;
        let taken = take_stock_despite(self.repository, &identities).await;
        self.gathered = taken.map_err(|error| self.failed(error, "take stock"))?.0;
        let after = self.holes(&self.gathered.stock);
        let mut found = Vec::new();
        for (system_id, holes) in after {
            let seen = before.get(&system_id).map_or(&[][..], Vec::as_slice);
            let was_seen = |hole: &&Hole| {
                seen.iter().any(|s| s.start_lsn <= hole.start_lsn && hole.end_lsn <= s.end_lsn)
            };
            for hole in holes.iter().filter(was_seen) {
                for rest in self.unaccepted(system_id, *hole) {
                    let about = About::Hole(system_id, rest);
                    found.push(Raw { about, fault: Fault::Gap, why: String::new() });
                }
            }
        }
        for torn in self.look_at_torn_again().await? {
            let is_part = |raw: &Raw| match (&raw.about, &torn.about) {
                (About::Hole(one, around), About::Hole(other, inner)) => {
                    one == other
                        && around.start_lsn <= inner.start_lsn
                        && inner.end_lsn <= around.end_lsn
                }
                _ => false,
            };
            if !found.iter().any(is_part) {
                found.push(torn);
            }
        }
        Ok(found)
    }

    /// Returns the holes that keep backups from what should be reached from them.
    fn holes(&self, stock: &Stock) -> BTreeMap<SystemId, Vec<Hole>> {
        let policy = &self.request.policy;
        let fates = plan(stock, policy, now(), &BTreeMap::new()).backups;
        let alone: Vec<BackupId> = fates
            .into_iter()
            .filter(|fate| policy.is_set() && !fate.is_for_recovery())
            .map(|fate| fate.id)
            .collect();
        let for_recovery = |backup: &Committed| !alone.contains(&backup.id);
        let of = |one: &Incarnation| (one.system_id, harmful_holes(&one.holdings(), for_recovery));
        stock.incarnations.iter().map(of).collect()
    }

    /// Returns the parts of a hole that no operator has accepted, segment by segment.
    fn unaccepted(&self, system_id: SystemId, hole: Hole) -> Vec<Hole> {
        let Some(size) = self.incarnation(system_id).map(|one| one.segment_size) else {
            return vec![hole];
        };
        let accepted = self.raw.iter().filter_map(|raw| match &raw.about {
            About::Accepted(of, segment, _) if *of == system_id => segment.start_lsn(size),
            _ => None,
        });
        let mut parts = vec![hole];
        for start in accepted {
            let end = Lsn(start.0.saturating_add(size.bytes()));
            let cut = |part: Hole| {
                [
                    Hole { end_lsn: part.end_lsn.min(start), ..part },
                    Hole { start_lsn: part.start_lsn.max(end), ..part },
                ]
            };
            parts = parts.into_iter().flat_map(cut).filter(|p| p.start_lsn < p.end_lsn).collect();
        }
        parts
    }

    pub(super) fn incarnation(&self, system_id: SystemId) -> Option<&Incarnation> {
        self.gathered.stock.incarnations.iter().find(|one| one.system_id == system_id)
    }

    /// Returns what of WAL something wrong stands for.
    pub(super) fn wal_of(&self, raw: &Raw) -> Option<(SystemId, Gone<'static>)> {
        let of_segment = |system_id, segment: SegmentName, from: u32, to: Option<u32>| {
            let size = self.incarnation(system_id)?.segment_size;
            let start = segment.start_lsn(size)?;
            let to = to.map_or(size.bytes(), u64::from);
            Some((
                system_id,
                Gone::Wal {
                    timeline: Some(segment.timeline),
                    start_lsn: Lsn(start.0.saturating_add(u64::from(from))),
                    end_lsn: Lsn(start.0.saturating_add(to)),
                },
            ))
        };
        match &raw.about {
            About::Hole(system_id, Hole { start_lsn, end_lsn, .. }) => {
                let (start_lsn, end_lsn) = (*start_lsn, *end_lsn);
                Some((*system_id, Gone::Wal { timeline: None, start_lsn, end_lsn }))
            }
            About::Wal(system_id, WalObject::File(WalFileName::Segment(segment)), _)
            | About::Accepted(system_id, segment, _) => of_segment(*system_id, *segment, 0, None),
            About::Wal(system_id, WalObject::Piece { segment, start, end }, _) => {
                of_segment(*system_id, *segment, *start, Some(*end))
            }
            _ => None,
        }
    }

    /// Returns the moments that cannot be reached because something is gone, by LSN.
    pub(super) fn lost_moments(
        &self,
        system_id: SystemId,
        gone: &Gone<'_>,
    ) -> Vec<(TimelineHistory, LostMoments)> {
        let Some(one) = self.incarnation(system_id) else { return Vec::new() };
        let holes = self.holes_found(system_id);
        let mut found: Vec<(TimelineHistory, LostMoments)> = Vec::new();
        // The newest timeline first: what it shares with older ones is told once.
        for way in ways(&one.holdings()).into_iter().rev() {
            let whole = filled(&one.coverage, &way, &holes);
            let mut left = whole.clone();
            let mut backups = one.backups.clone();
            match gone {
                Gone::Wal { timeline, start_lsn, end_lsn } => {
                    let of = way.path().into_iter().map(|stretch| stretch.timeline);
                    for owner in of.filter(|owner| timeline.is_none_or(|one| one == *owner)) {
                        left = without(&left, owner, *start_lsn, *end_lsn);
                    }
                }
                Gone::Backup(id) => backups.retain(|backup| backup.id != **id),
            }
            let before = Holdings { coverage: &whole, ..one.holdings() };
            let after = Holdings { backups: &backups, coverage: &left, ..one.holdings() };
            let (before, after) = (stretches(&before, &way), stretches(&after, &way));
            for moments in lost(&before, &after) {
                let told = told(way.timeline(), &before, &moments);
                let is_told = |(_, known): &(TimelineHistory, LostMoments)| {
                    (known.from_lsn, known.from_is_lost) == (told.from_lsn, told.from_is_lost)
                        && (known.to_lsn == told.to_lsn || known.timeline > told.timeline)
                };
                if !found.iter().any(is_told) {
                    found.push((way.clone(), told));
                }
            }
        }
        found
    }

    fn holes_found(&self, system_id: SystemId) -> Vec<Hole> {
        let of = |raw: &Raw| match &raw.about {
            About::Hole(of, hole) if *of == system_id => Some(*hole),
            About::Accepted(of, segment, _) if *of == system_id => {
                let size = self.incarnation(system_id)?.segment_size;
                let start_lsn = segment.start_lsn(size)?;
                let end_lsn = Lsn(start_lsn.0.saturating_add(size.bytes()));
                Some(Hole { timeline: segment.timeline, start_lsn, end_lsn })
            }
            _ => None,
        };
        self.raw.iter().filter_map(of).collect()
    }

    /// Adds times to lost moments, as far as WAL around them tells.
    pub(super) async fn timed(
        &self,
        system_id: SystemId,
        moments: Vec<(TimelineHistory, LostMoments)>,
        number: usize,
    ) -> Result<Vec<LostMoments>, Failure> {
        let mut all = Vec::with_capacity(moments.len());
        for (way, mut one) in moments {
            if number < TIMED_MAX && !one.from_is_lost {
                one.from_time = self.last_commit_before(system_id, &way, one.from_lsn).await?;
            }
            all.push(one);
        }
        Ok(all)
    }

    async fn last_commit_before(
        &self,
        system_id: SystemId,
        way: &TimelineHistory,
        lsn: Lsn,
    ) -> Result<Option<PgTimestamp>, Failure> {
        let Some(one) = self.incarnation(system_id) else { return Ok(None) };
        let size = one.segment_size;
        let stored = StoredWay { repository: self.repository, system_id, way, size };
        let from = one.backups.iter().map(|backup| backup.start_lsn).filter(|start| *start < lsn);
        let Some(from) = from.max() else { return Ok(None) };
        match reach(stored, from, lsn).await {
            Ok(end) => Ok(end.last_commit_time),
            Err(error) if error.is_absent() => Ok(None),
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(self.failed(error, "read WAL")),
        }
    }
}

fn told(timeline: Timeline, before: &[Stretch<'_>], moments: &Lost<'_>) -> LostMoments {
    let first = before.iter().find(|one| one.start_lsn == moments.start_lsn);
    let from_is_lost = moments.after_lsn.is_none();
    LostMoments {
        timeline,
        from_lsn: moments.start_lsn,
        from_is_lost,
        to_lsn: moments.end_lsn,
        open: moments.before.is_none(),
        from_time: first.filter(|_| from_is_lost).map(Stretch::earliest_time),
        to_time: moments.before.map(|again| again.earliest_time()),
    }
}

//! A small world to try plans in, and what is true of it by brute force.
//!
//! Time runs in hours. WAL is written in whole segments, each with one moment to go back to in its middle; backups,
//! promotions and returns to the past begin between segments' ends. What can be reached is decided here by
//! looking at every backup, every way and every segment, without the rules under test.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::format::FORMAT_VERSION;
use crate::pg::Lsn;
use crate::plan::examples::{self, SIZE};

/// 2026-01-01 00:00:00 UTC, a Thursday, in seconds since 1970.
const BEGIN: i64 = 1_767_225_600;

pub(super) const HOUR: i64 = 3_600;

/// A moment that somebody may want to go back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment {
    pub(super) hour: i64,
    pub(super) cluster: usize,
    pub(super) timeline: Timeline,
    pub(super) lsn: Lsn,
}

/// One cluster as its servers wrote it.
#[derive(Debug, Clone)]
pub(super) struct Cluster {
    pub(super) histories: BTreeMap<Timeline, TimelineHistory>,
    /// Stored segments and the hour in which each was stored.
    pub(super) stored: BTreeMap<(Timeline, u64), i64>,
    /// Where each timeline is written on.
    heads: BTreeMap<Timeline, Lsn>,
    pub(super) current: Timeline,
}

/// Everything there is, and what may be asked for.
#[derive(Debug, Clone)]
pub(super) struct World {
    pub(super) hour: i64,
    pub(super) clusters: Vec<Cluster>,
    pub(super) backups: Vec<(usize, Committed)>,
    pub(super) unfinished: Vec<Unfinished>,
    pub(super) pins: BTreeMap<BackupId, Pinned>,
    pub(super) moments: Vec<Moment>,
}

pub(super) fn at(hour: i64) -> PgTimestamp {
    PgTimestamp::from_unix_seconds(BEGIN + hour * HOUR)
}

pub(super) fn id_at(hour: i64) -> BackupId {
    BackupId::at(jiff::Timestamp::from_second(BEGIN + hour * HOUR).unwrap(), 1)
}

impl Cluster {
    fn new() -> Self {
        Self {
            histories: BTreeMap::new(),
            stored: BTreeMap::new(),
            heads: BTreeMap::from([(Timeline::FIRST, SIZE.start_of(1))]),
            current: Timeline::FIRST,
        }
    }

    fn way(&self, timeline: Timeline) -> TimelineHistory {
        self.histories.get(&timeline).cloned().unwrap_or_else(TimelineHistory::first)
    }

    fn has_segments(&self, way: &TimelineHistory, from: Lsn, to: Lsn) -> bool {
        let last = SIZE.segment_of(Lsn(to.0 - 1));
        (SIZE.segment_of(from)..=last).all(|number| {
            let end = SIZE.start_of(number + 1).min(to);
            let owner = way.owner_of(Lsn(end.0 - 1));
            let newer = way.owner_of(Lsn(SIZE.start_of(number + 1).0 - 1));
            [owner, newer].iter().any(|one| self.stored.contains_key(&(*one, number)))
        })
    }
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            hour: 0,
            clusters: vec![Cluster::new()],
            backups: Vec::new(),
            unfinished: Vec::new(),
            pins: BTreeMap::new(),
            moments: Vec::new(),
        }
    }

    fn cluster(&mut self) -> &mut Cluster {
        self.clusters.last_mut().unwrap()
    }

    pub(super) fn pass(&mut self, hours: i64) {
        self.hour += hours;
    }

    /// Writes one segment on a timeline; if it is lost, the archive has a hole there.
    pub(super) fn write_on(&mut self, timeline: Timeline, is_lost: bool) {
        let hour = self.hour;
        let cluster = self.clusters.len() - 1;
        let head = self.cluster().heads[&timeline];
        let number = SIZE.segment_of(head);
        let end = SIZE.start_of(number + 1);
        self.cluster().heads.insert(timeline, end);
        if !is_lost {
            self.cluster().stored.insert((timeline, number), hour);
        }
        let lsn = Lsn(u64::midpoint(head.0, end.0));
        self.moments.push(Moment { hour, cluster, timeline, lsn });
    }

    /// Returns whether a server wrote on this timeline of the present cluster not long ago. One that is silent for longer
    /// than the window may be let go, and nobody can know that it wakes up again.
    pub(super) fn was_written_within(&self, timeline: Timeline, hours: i64) -> bool {
        let cluster = self.clusters.len() - 1;
        let ours = |moment: &&Moment| moment.cluster == cluster && moment.timeline == timeline;
        self.moments.iter().rev().find(ours).is_some_and(|last| last.hour >= self.hour - hours)
    }

    pub(super) fn write(&mut self, is_lost: bool) {
        let timeline = self.cluster().current;
        self.write_on(timeline, is_lost);
    }

    /// Takes a backup, during which a segment is written.
    pub(super) fn back_up(&mut self) -> BackupId {
        let timeline = self.cluster().current;
        let start = Lsn(self.cluster().heads[&timeline].0 + 0x100);
        self.write(false);
        let stop = Lsn(self.cluster().heads[&timeline].0 + 0x200);
        self.write(false);
        let second = BEGIN + self.hour * HOUR;
        let made = Committed {
            started_at: at(self.hour),
            finished_at: at(self.hour),
            reaches_from: at(self.hour),
            ..examples::backup(second, timeline.0, start, stop, 0)
        };
        let id = made.id.clone();
        // Two in one hour would have one name.
        if !self.backups.iter().any(|(_, backup)| backup.id == id) {
            self.backups.push((self.clusters.len() - 1, made));
        }
        id
    }

    /// A backup that died, or runs still.
    pub(super) fn fail_to_back_up(&mut self) {
        let begun = Begun {
            format: FORMAT_VERSION,
            id: id_at(self.hour),
            begun_at: at(self.hour),
            host: "host".to_owned(),
            pid: 1,
            parent: self.backups.last().map(|(_, backup)| backup.id.clone()),
            leans_on: Vec::new(),
            tool: "test".to_owned(),
        };
        if self.backups.iter().all(|(_, backup)| backup.id != begun.id) {
            let (id, last_stored) = (begun.id.clone(), Some(at(self.hour)));
            let begun = BegunState::Readable(begun);
            self.unfinished.push(Unfinished { id, begun, last_stored });
        }
    }

    /// Goes on along a new timeline from so many segments back on the way of the current one.
    pub(super) fn fork(&mut self, segments_back: u64) {
        let cluster = self.cluster();
        let old = cluster.current;
        let head = cluster.heads[&old].0.saturating_sub(SIZE.bytes() * segments_back);
        let lsn = Lsn(head.max(SIZE.start_of(1).0) + 0x1000);
        let way = cluster.way(old);
        let mut lines = String::new();
        for (ancestor, switch) in way.ancestors().iter().filter(|(_, switch)| *switch < lsn) {
            lines.push_str(&format!("{ancestor}\t{switch}\ttest\n"));
        }
        let owner = way.owner_of(lsn);
        lines.push_str(&format!("{owner}\t{lsn}\ttest\n"));
        let newest = *cluster.heads.keys().last().unwrap();
        let new = Timeline(newest.0 + 1);
        let history = TimelineHistory::parse(new, lines.as_bytes()).unwrap();
        cluster.histories.insert(new, history);
        cluster.heads.insert(new, lsn);
        cluster.current = new;
    }

    /// `pg_upgrade`: another system identifier, WAL from the beginning.
    pub(super) fn upgrade(&mut self) {
        self.clusters.push(Cluster::new());
    }

    /// What the planner gets to see.
    pub(super) fn stock(&self) -> Stock {
        let clusters = self.clusters.iter().enumerate();
        let incarnation = |(place, cluster): (usize, &Cluster)| {
            let mut coverage = Coverage::new();
            let mut last_stored = BTreeMap::new();
            for ((timeline, number), hour) in &cluster.stored {
                let (start, end) = (SIZE.start_of(*number), SIZE.start_of(number + 1));
                let ranges: &mut Vec<(Lsn, Lsn)> = coverage.entry(*timeline).or_default();
                match ranges.last_mut() {
                    Some(last) if last.1 == start => last.1 = end,
                    _ => ranges.push((start, end)),
                }
                let last = last_stored.entry(*timeline).or_insert(at(*hour));
                *last = at(*hour).max(*last);
            }
            let ours = self.backups.iter().filter(|(owner, _)| *owner == place);
            Incarnation {
                system_id: SystemId(place as u64 + 1),
                segment_size: SIZE,
                backups: ours.map(|(_, backup)| backup.clone()).collect(),
                coverage,
                last_stored,
                histories: cluster.histories.clone(),
            }
        };
        Stock {
            incarnations: clusters.map(incarnation).collect(),
            unreadable: Vec::new(),
            unfinished: self.unfinished.clone(),
            pins: self.pins.clone(),
        }
    }

    /// Plans by the world's own clock.
    pub(super) fn plan(&self, policy: &Policy) -> Plan {
        plan(&self.stock(), policy, at(self.hour), &BTreeMap::new())
    }

    /// Carries a plan out.
    pub(super) fn carry_out(&mut self, plan: &Plan) {
        let going: BTreeSet<BackupId> = plan.expiring().map(|fate| fate.id.clone()).collect();
        self.backups.retain(|(_, backup)| !going.contains(&backup.id));
        for (place, cluster) in self.clusters.iter_mut().enumerate() {
            let kept = &plan.wal[&SystemId(place as u64 + 1)];
            let untouched = plan.wal_untouched_since;
            cluster.stored.retain(|(timeline, number), hour| {
                kept.keeps(crate::pg::SegmentName::new(*timeline, *number, SIZE))
                    || untouched.is_some_and(|since| at(*hour) >= since)
            });
        }
        let gone = |fate: &UnfinishedFate| fate.fate != Unfinishedness::Running;
        let dead: BTreeSet<&BackupId> =
            plan.unfinished.iter().filter(|f| gone(f)).map(|f| &f.id).collect();
        self.unfinished.retain(|backup| !dead.contains(&backup.id));
        self.pins.retain(|id, _| !going.contains(id));
    }

    /// Returns whether recovery from a backup can stop at a position of a timeline: some way holds both, and each
    /// segment between them is there on the timeline that owns its last byte, or on one that forked off within it.
    pub(super) fn reaches(
        &self,
        backup: &Committed,
        timeline: Timeline,
        lsn: Lsn,
        of: usize,
    ) -> bool {
        let cluster = &self.clusters[of];
        if backup.stop_lsn > lsn {
            return false;
        }
        cluster.heads.keys().any(|end_of_way| {
            let way = cluster.way(*end_of_way);
            let last_byte = Lsn(lsn.0 - 1);
            let holds = way.owner_of(last_byte) == timeline
                && way.owner_of(backup.start_lsn) == backup.timeline
                && way.owner_of(Lsn(backup.stop_lsn.0 - 1)) == backup.stop_timeline;
            holds && cluster.has_segments(&way, backup.start_lsn, lsn)
        })
    }

    /// Returns whether a moment can be gone back to from any backup.
    pub(super) fn can_reach(&self, moment: &Moment) -> bool {
        let ours = self.backups.iter().filter(|(of, _)| *of == moment.cluster);
        // The nearest first: it is the cheapest to try.
        ours.rev().any(|(of, backup)| self.reaches(backup, moment.timeline, moment.lsn, *of))
    }

    /// Returns whether a backup can become consistent.
    pub(super) fn is_usable(&self, of: usize, backup: &Committed) -> bool {
        self.reaches(backup, backup.stop_timeline, backup.stop_lsn, of)
    }

    /// Returns the usable backups, oldest first.
    pub(super) fn usable(&self) -> Vec<&(usize, Committed)> {
        self.backups.iter().filter(|(of, backup)| self.is_usable(*of, backup)).collect()
    }
}

/// Fails unless what is left after a plan is all that was promised of what was there before.
pub(super) fn check(before: &World, after: &World, policy: &Policy, plan: &Plan) {
    check_always_kept(before, plan);
    let start =
        policy.window.map_or(PgTimestamp(i64::MAX), |window| super::before(plan.as_of, window));
    for moment in before.moments.iter().filter(|moment| at(moment.hour) >= start) {
        if before.can_reach(moment) {
            assert!(after.can_reach(moment), "{moment:?} is lost\n{plan:#?}");
        }
    }
    let left: BTreeSet<&BackupId> = after.backups.iter().map(|(_, backup)| &backup.id).collect();
    let usable = before.usable();
    for (of, backup) in &after.backups {
        if before.is_usable(*of, backup) {
            assert!(after.is_usable(*of, backup), "backup {} lost its WAL\n{plan:#?}", backup.id);
        }
    }
    let least = policy.min_backups.max(policy.backups.unwrap_or(0));
    for (of, backup) in usable.iter().rev().take(least) {
        assert!(left.contains(&backup.id), "{} is one of the newest\n{plan:#?}", backup.id);
        for moment in before.moments.iter().filter(|moment| moment.cluster == *of) {
            if before.reaches(backup, moment.timeline, moment.lsn, *of) {
                assert!(after.can_reach(moment), "{moment:?} is lost to {}", backup.id);
            }
        }
    }
    for (id, pin) in &before.pins {
        let there = usable.iter().any(|(_, backup)| backup.id == *id);
        assert!(!there || !pin.holds_at(plan.as_of) || left.contains(id), "{id} was pinned");
    }
    for (tier, period) in TIERS {
        let mut seen = BTreeSet::new();
        for (_, backup) in usable.iter().rev() {
            if seen.insert(period(&backup.id)) && seen.len() <= tier(policy).unwrap_or(0) {
                assert!(left.contains(&backup.id), "{} is its period's last", backup.id);
            }
        }
    }
}

/// Fails unless the plan keeps the WAL that every policy keeps.
fn check_always_kept(before: &World, plan: &Plan) {
    for (system_id, kept) in &always_kept(before.stock(), at(before.hour)) {
        for timeline in kept.timelines.keys() {
            let numbers = before.clusters.iter().flat_map(|cluster| cluster.stored.keys());
            for number in numbers.filter(|(of, _)| of == timeline).map(|(_, number)| *number) {
                let segment = crate::pg::SegmentName::new(*timeline, number, SIZE);
                assert!(
                    !kept.keeps(segment) || plan.wal[system_id].keeps(segment),
                    "{segment}\n{plan:#?}"
                );
            }
        }
    }
}

type Tier = (fn(&Policy) -> Option<usize>, fn(&BackupId) -> i64);

/// Each tier's count, and the number of the period in which a backup began.
const TIERS: [Tier; 3] = [
    (|policy| policy.daily, |id| seconds_of(id).div_euclid(24 * HOUR)),
    // 1970-01-01 was a Thursday.
    (|policy| policy.weekly, |id| (seconds_of(id).div_euclid(24 * HOUR) + 3).div_euclid(7)),
    (|policy| policy.monthly, |id| id.as_str()[..6].parse().unwrap()),
];

fn seconds_of(id: &BackupId) -> i64 {
    let text = id.as_str();
    let (date, time) = (&text[..8], &text[9..15]);
    let written = format!("{date}T{time}Z");
    written.parse::<jiff::Timestamp>().unwrap().as_second()
}

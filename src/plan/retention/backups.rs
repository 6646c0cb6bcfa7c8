//! Which backups stay, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{CLOCKS_DIFFER_MAX, Incarnation, Policy, Stock, before};
use crate::format::{BackupId, Committed};
use crate::pg::{PgTimestamp, SystemId, Timeline, TimelineHistory};
use crate::plan::lineage::unbroken_end;
use crate::plan::restore::lies_on;

/// Why a backup stays.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// It lies in the window, or it reaches the moments at its beginning until the backup after it does, at `until`.
    Window {
        /// From when on the window no longer needs it; `None` while no usable backup follows it.
        until: Option<PgTimestamp>,
    },
    /// It is one of the newest that are wanted.
    Newest,
    /// Fewer than `min_backups` would be left.
    Least,
    /// It is the last one of this day.
    Daily(String),
    /// It is the last one of the week that begins on this Monday.
    Weekly(String),
    /// It is the last one of this month.
    Monthly(String),
    /// It is pinned, until this moment or for ever.
    Pinned(Option<PgTimestamp>),
    /// It was pinned after the plan was made.
    JustPinned,
    /// Its WAL is not whole, and it is younger than backups that stay: what is missing may still come.
    WalMissing,
    /// Its time lies in the future, so that its age is not known.
    Future,
    /// The history file of its timeline is not stored, so that its WAL is not known.
    NoHistory,
    /// The store did not allow its deletion.
    Locked,
}

impl Reason {
    /// Returns whether the backup stays with all WAL behind it, not only with its own.
    pub fn is_for_recovery(&self) -> bool {
        matches!(self, Self::Window { .. } | Self::Newest | Self::Least)
    }

    /// Returns the word that `--json` prints.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Window { .. } => "window",
            Self::Newest => "newest",
            Self::Least => "min_backups",
            Self::Daily(_) => "daily",
            Self::Weekly(_) => "weekly",
            Self::Monthly(_) => "monthly",
            Self::Pinned(_) | Self::JustPinned => "pinned",
            Self::WalMissing => "wal_missing",
            Self::Future => "future",
            Self::NoHistory => "no_history",
            Self::Locked => "locked",
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Window { until: None } => f.write_str("the window, which needs it still"),
            Self::Window { until: Some(until) } => write!(f, "the window, until {until}"),
            Self::Newest => f.write_str("one of the newest"),
            Self::Least => f.write_str("min_backups"),
            Self::Daily(day) => write!(f, "the day {day}"),
            Self::Weekly(monday) => write!(f, "the week of {monday}"),
            Self::Monthly(month) => write!(f, "the month {month}"),
            Self::Pinned(Some(until)) => write!(f, "pinned until {until}"),
            Self::Pinned(None) => f.write_str("pinned"),
            Self::JustPinned => f.write_str("pinned just now"),
            Self::WalMissing => f.write_str("its WAL is not whole, and may still come"),
            Self::Future => f.write_str("ITS TIME LIES IN THE FUTURE; look at the clocks"),
            Self::NoHistory => f.write_str("the history file of its timeline is missing"),
            Self::Locked => f.write_str("THE STORE DOES NOT LET IT BE DELETED"),
        }
    }
}

/// What becomes of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupFate {
    /// Its id.
    pub id: BackupId,
    /// Its cluster.
    pub system_id: SystemId,
    /// Why it stays; empty if it goes.
    pub reasons: Vec<Reason>,
    /// Whether the WAL that makes it consistent is stored.
    pub is_usable: bool,
}

impl BackupFate {
    /// Returns whether it stays.
    pub fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }

    /// Returns whether it stays with all WAL behind it.
    pub fn is_for_recovery(&self) -> bool {
        self.reasons.iter().any(Reason::is_for_recovery)
    }
}

/// The timelines of one incarnation that a decision may take for alive.
#[derive(Debug)]
pub(super) struct Lives {
    by_incarnation: BTreeMap<SystemId, BTreeSet<Timeline>>,
}

impl Lives {
    pub(super) fn of(stock: &Stock, policy: &Policy, as_of: PgTimestamp) -> Self {
        let window = policy.window.unwrap_or_default().max(super::ALIVE_FOR);
        let since = before(as_of, window.saturating_add(CLOCKS_DIFFER_MAX));
        let newest = stock.incarnations.len().saturating_sub(1);
        let alive = |(place, one): (usize, &Incarnation)| {
            let stored = one.last_stored.iter().filter(|(_, last)| **last >= since);
            let mut alive: BTreeSet<Timeline> = stored.map(|(timeline, _)| *timeline).collect();
            if place == newest {
                alive.extend(timelines(one).last());
                alive.extend(one.backups.last().map(|backup| backup.stop_timeline));
            }
            (one.system_id, alive)
        };
        Self { by_incarnation: stock.incarnations.iter().enumerate().map(alive).collect() }
    }

    pub(super) fn has(&self, system_id: SystemId, timeline: Timeline) -> bool {
        self.by_incarnation.get(&system_id).is_some_and(|alive| alive.contains(&timeline))
    }
}

/// Returns every timeline of which anything is known, ascending.
pub(super) fn timelines(one: &Incarnation) -> BTreeSet<Timeline> {
    let of_backups = one.backups.iter().flat_map(|b| [b.timeline, b.stop_timeline]);
    let stored = one.histories.keys().chain(one.coverage.keys()).chain(one.last_stored.keys());
    stored.copied().chain(of_backups).collect()
}

/// Returns the way to a timeline; `None` where its history file is not stored.
pub(super) fn way_to(one: &Incarnation, timeline: Timeline) -> Option<TimelineHistory> {
    let known = one.histories.get(&timeline).cloned();
    known.or_else(|| (timeline == Timeline::FIRST).then(TimelineHistory::first))
}

/// A backup with what decides about it.
struct Known<'a> {
    incarnation: &'a Incarnation,
    backup: &'a Committed,
    /// `None` where it cannot be told.
    is_usable: Option<bool>,
    reasons: BTreeSet<Reason>,
}

impl Known<'_> {
    /// Whether it may be counted.
    fn counts(&self) -> bool {
        self.is_usable == Some(true) && !self.reasons.contains(&Reason::Future)
    }
}

/// Returns the period of a tier in which a day lies.
type PeriodOf = fn(jiff::civil::Date) -> Reason;

struct Choice<'a> {
    stock: &'a Stock,
    policy: &'a Policy,
    /// Of all incarnations, oldest first.
    known: Vec<Known<'a>>,
}

/// Decides about every committed backup.
pub(super) fn choose(
    stock: &Stock,
    policy: &Policy,
    lives: &Lives,
    window_start: Option<PgTimestamp>,
    as_of: PgTimestamp,
    forced: &BTreeMap<BackupId, Reason>,
) -> Vec<BackupFate> {
    let mut choice = Choice::of(stock, policy, as_of);
    choice.keep_pinned(as_of, forced);
    choice.keep_newest();
    choice.keep_tiers();
    for one in &stock.incarnations {
        for timeline in timelines(one).into_iter().filter(|t| lives.has(one.system_id, *t)) {
            choice.keep_on_way(one, timeline, window_start);
        }
    }
    choice.keep_incomplete(lives);
    let fates = choice.known.into_iter().map(|known| BackupFate {
        id: known.backup.id.clone(),
        system_id: known.incarnation.system_id,
        reasons: known.reasons.into_iter().collect(),
        is_usable: known.is_usable == Some(true),
    });
    fates.collect()
}

impl<'a> Choice<'a> {
    fn of(stock: &'a Stock, policy: &'a Policy, as_of: PgTimestamp) -> Self {
        let future = PgTimestamp(as_of.0.saturating_add(micros(CLOCKS_DIFFER_MAX)));
        let mut known = Vec::new();
        for incarnation in &stock.incarnations {
            for backup in &incarnation.backups {
                let mut reasons = BTreeSet::new();
                if backup.started_at > future || backup.reaches_from > future {
                    reasons.insert(Reason::Future);
                }
                let is_usable = is_usable(incarnation, backup);
                if is_usable.is_none() {
                    reasons.insert(Reason::NoHistory);
                }
                known.push(Known { incarnation, backup, is_usable, reasons });
            }
        }
        known.sort_by(|one, other| one.backup.id.cmp(&other.backup.id));
        Self { stock, policy, known }
    }

    fn keep_pinned(&mut self, as_of: PgTimestamp, forced: &BTreeMap<BackupId, Reason>) {
        for known in &mut self.known {
            let pin = self.stock.pins.get(&known.backup.id);
            if let Some(pin) = pin.filter(|pin| pin.holds_at(as_of)) {
                let until = match pin {
                    super::Pinned::ForEver => None,
                    super::Pinned::Until(until) => Some(*until),
                };
                known.reasons.insert(Reason::Pinned(until));
            }
            known.reasons.extend(forced.get(&known.backup.id).cloned());
        }
    }

    /// The newest of the whole place, whichever incarnation they are of: right after `pg_upgrade`
    /// the old cluster's backups are all there is.
    fn keep_newest(&mut self) {
        let wanted = self.policy.backups.unwrap_or(0);
        let least = self.policy.min_backups.max(1);
        let newest_first = self.known.iter_mut().rev().filter(|known| known.counts());
        for (place, known) in newest_first.enumerate() {
            if place < wanted {
                known.reasons.insert(Reason::Newest);
            }
            if place < least {
                known.reasons.insert(Reason::Least);
            }
        }
    }

    fn keep_tiers(&mut self) {
        let tiers: [(Option<usize>, PeriodOf); 3] = [
            (self.policy.daily, |day| Reason::Daily(day.to_string())),
            (self.policy.weekly, |day| {
                let past_monday = day.weekday().to_monday_zero_offset();
                let back = jiff::Span::new().days(i64::from(past_monday));
                Reason::Weekly(day.saturating_sub(back).to_string())
            }),
            (self.policy.monthly, |day| Reason::Monthly(day.strftime("%Y-%m").to_string())),
        ];
        for (count, period_of) in tiers {
            let mut seen: BTreeSet<Reason> = BTreeSet::new();
            for known in self.known.iter_mut().rev().filter(|known| known.counts()) {
                let Some(moment) = known.backup.started_at.to_jiff() else { continue };
                let day = moment.to_zoned(jiff::tz::TimeZone::UTC).date();
                let period = period_of(day);
                if seen.len() < count.unwrap_or(0) && seen.insert(period.clone()) {
                    known.reasons.insert(period);
                }
            }
        }
    }

    /// Keeps what recovery on the way to a live timeline needs: the window, and no fewer than the least.
    fn keep_on_way(
        &mut self,
        one: &Incarnation,
        timeline: Timeline,
        window_start: Option<PgTimestamp>,
    ) {
        let Some(way) = way_to(one, timeline) else { return };
        let mut on_way: Vec<&mut Known<'a>> = self
            .known
            .iter_mut()
            .filter(|known| known.incarnation.system_id == one.system_id && known.counts())
            .filter(|known| lies_on(&way, known.backup))
            .collect();
        on_way.sort_by_key(|known| known.backup.start_lsn);
        let least = on_way.len().saturating_sub(self.policy.min_backups.max(1));
        for known in on_way.iter_mut().skip(least) {
            known.reasons.insert(Reason::Least);
        }
        let (Some(start), Some(window)) = (window_start, self.policy.window) else { return };
        let anchor = on_way.iter().rposition(|known| known.backup.reaches_from < start);
        let next: Vec<Option<PgTimestamp>> = on_way
            .iter()
            .skip(1)
            .map(|known| Some(known.backup.reaches_from))
            .chain([None])
            .collect();
        for (known, next) in on_way.iter_mut().zip(next).skip(anchor.unwrap_or(0)) {
            let until = next.map(|from| PgTimestamp(from.0.saturating_add(micros(window))));
            known.reasons.insert(Reason::Window { until });
        }
    }

    /// A backup without its WAL serves nobody, but WAL may be late.
    fn keep_incomplete(&mut self, lives: &Lives) {
        for one in &self.stock.incarnations {
            let of_it = |known: &&mut Known<'a>| known.incarnation.system_id == one.system_id;
            let kept = |known: &Known<'a>| known.reasons.iter().any(Reason::is_for_recovery);
            let ours = self.known.iter().filter(|k| k.incarnation.system_id == one.system_id);
            let oldest = ours.clone().find(|known| kept(known)).map(|known| &known.backup.id);
            let lives_without =
                oldest.is_none() && timelines(one).iter().any(|t| lives.has(one.system_id, *t));
            let oldest = oldest.cloned();
            for known in self.known.iter_mut().filter(of_it) {
                let is_younger = oldest.as_ref().is_some_and(|oldest| known.backup.id > *oldest);
                if known.is_usable == Some(false) && (is_younger || lives_without) {
                    known.reasons.insert(Reason::WalMissing);
                }
            }
        }
    }
}

/// Returns whether the WAL that makes a backup consistent is stored; `None` where the way is not known.
fn is_usable(one: &Incarnation, backup: &Committed) -> Option<bool> {
    let way = way_to(one, backup.stop_timeline)?;
    let end = unbroken_end(&way, &one.coverage, backup.start_lsn, one.segment_size);
    Some(lies_on(&way, backup) && end >= backup.stop_lsn)
}

fn micros(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}
